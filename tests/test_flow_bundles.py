# SPDX-License-Identifier: Apache-2.0
"""The overlay rflow.json trains each bundle as a rectified flow, which is sampled as any other model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, run, user_error
from PIL import Image
from source_images import shades

from monai_synth.checkpoint import classifier_file, load_file
from monai_synth.data.classes import prepare_classes
from monai_synth.data.joint import from_image
from monai_synth.data.pairs import prepare_pairs
from monai_synth.data.phantom_nuclei import write_nuclei
from monai_synth.training import AlignedPrepareBatch, ClassDiffusionPrepareBatch

FLOW = {"num_train_timesteps": 1000, "flow": "rectified", "sample_method": "uniform"}
TINY = {
    "cfg_ddpm": {"max_epochs": 2, "base_channels": 8, "num_heads": 2, "num_grid_samples": 2},
    "jdm": {"image_size": [32, 32], "num_iterations": 4, "iterations_per_epoch": 2},
    "fad": {
        "max_epochs": 2, "image_size": [16, 16], "block_out_channels": [8, 16], "cross_attention": [False, True],
        "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8, "text_dim": 16, "num_grid_samples": 2,
    },
    "lsdm": {
        "image_size": [64, 64], "max_epochs": 2, "autoencoder_epochs": 2, "classifier_epochs": 2,
        "features": ["malignancy"],
    },
}  # fmt: skip
SHARED = {"preset": "demo", "val_interval": 1, "device": "cpu"}


@pytest.mark.parametrize("bundle", sorted(TINY))
def test_the_overlays_describe_one_flow_and_write_a_file_of_their_own(bundle: str) -> None:
    overlay = json.loads((BUNDLES / bundle / "configs" / "rflow.json").read_text())
    assert overlay["schedule"] == FLOW
    assert overlay["model_file"] == "model_rflow.pt"
    assert ("learned_variance" in overlay) == (bundle == "jdm")


def test_classifiers_of_a_flow_have_names_of_their_own() -> None:
    diffusion = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    assert classifier_file("texture", diffusion) == "classifier_texture.pt"
    assert classifier_file("texture", FLOW) == "classifier_texture_rflow.pt"


def prepare_shades(root: Path) -> None:
    prepare_classes(shades(root / "s", ("dark", "bright")), root / "p", splits=(0.7, 0.15, 0.15), progress=False)


def trained(bundle: str, root: Path, dataset: Path, overlays: tuple[str, ...] = (), **values: Any) -> dict[str, str]:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(root / "models"), "output_dir": str(root / "eval")}
    batches = {} if bundle == "lsdm" else {"batch_size": 4, "save_interval": 1}
    run(
        bundle, ["train.json", *overlays, "rflow.json"], "train", "training", **SHARED, **batches, **TINY[bundle],
        **places, latest_dir=str(root), **values,
    )  # fmt: skip
    contract = load_file(root / "models" / "model_rflow.pt", stage="diffusion")["contract"]
    assert contract["schedule"] == FLOW
    return {key: places[key] for key in ("dataset_dir", "ckpt_dir")} | {"model_file": "model_rflow.pt"}


def sampled(bundle: str, places: dict[str, str], out: Path, **values: Any) -> list[np.ndarray]:
    run(bundle, "inference.json", "infer", "run", **places, output_dir=str(out), num_steps=3, device="cpu", **values)
    return [np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))]


def test_the_expert_of_the_alignment_sees_x_t_of_the_flow() -> None:
    """What is aligned is the image of the flow at t, in the units of the expert: 0 to 1."""
    seen = []

    class Looking:
        def to_unit(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 1) / 2

        def __call__(self, unit: torch.Tensor) -> torch.Tensor:
            seen.append(unit)
            return unit.flatten(1)

    image = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = {"image": image, "class": torch.arange(6) % 2, "index": torch.arange(6)}
    inner = ClassDiffusionPrepareBatch(FLOW, null_class=2, drop_prob=0.0, seed=0)
    x_t, target, _, given = AlignedPrepareBatch(inner, Looking(), image_channels=1)(batch, "cpu")
    assert torch.equal(seen[0], (x_t + 1) / 2)
    x_0 = from_image(image, (-1, 1))
    s = (given["timesteps"] / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - s) * x_0 + s * (x_0 - target), rtol=1e-5, atol=1e-5)
    assert given["timesteps"].min() >= 1


@pytest.mark.slow
def test_fad_trains_as_a_flow_and_samples(tmp_path: Path) -> None:
    prepare_shades(tmp_path)
    places = trained("fad", tmp_path, tmp_path / "p", ("baseline.json",))
    assert len(sampled("fad", places, tmp_path / "out", per_class=1)) == 2 + 1  # and the sheet


@pytest.mark.slow
def test_cfg_ddpm_trains_as_a_flow_and_samples_guided_by_its_default_and_by_heun(tmp_path: Path) -> None:
    prepare_shades(tmp_path)
    places = trained("cfg_ddpm", tmp_path, tmp_path / "p")
    default, heun = (
        sampled("cfg_ddpm", places, tmp_path / name, per_class=2, guidance_scale=3.0, sampler=name)
        for name in ("dpm++", "heun")
    )
    assert len(default) == len(heun) == 4 + 1  # and the sheet
    lines = (tmp_path / "heun" / "provenance.jsonl").read_text().splitlines()
    assert {json.loads(line)["sampler"] for line in lines} == {"heun"}
    error = user_error(lambda: sampled("cfg_ddpm", places, tmp_path / "no", per_class=1, sampler="eulr"))
    assert "of a rectified flow it must be one of" in str(error)


@pytest.mark.slow
def test_jdm_trains_as_a_flow_and_samples_pairs_and_images_of_given_masks(tmp_path: Path) -> None:
    write_nuclei(tmp_path / "s", num_images=12, size=64, seed=0)
    prepare_pairs(tmp_path / "s", tmp_path / "p", labels=["nucleus"], splits=(0.7, 0.15, 0.15))
    places = trained("jdm", tmp_path, tmp_path / "p")
    assert len(sampled("jdm", places, tmp_path / "pairs", num_samples=2, sampler="euler")) >= 4
    masked = {"num_samples": 2, "condition": "mask", "resize_maps": True}
    assert sampled("jdm", places, tmp_path / "masked", **masked)
    assert sampled("jdm", places, tmp_path / "repaint", **masked, sampler="ddpm", resample=2)
    error = user_error(lambda: trained("jdm", tmp_path / "no", tmp_path / "p", learned_variance=True))
    assert "a rectified flow has no variance to learn" in str(error)


@pytest.mark.slow
def test_lsdm_trains_as_a_flow_with_classifiers_of_its_own_and_is_guided_by_them(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    places = trained("lsdm", tmp_path, tiny_dataset)
    files = {path.name for path in (tmp_path / "models").glob("*.pt")}
    assert {"autoencoder.pt", "model_rflow.pt", "classifier_malignancy_rflow.pt"} <= files
    assert "classifier_malignancy.pt" not in files
    given = {"features": ["malignancy"], "num_samples": 2}
    plain = sampled("lsdm", places, tmp_path / "plain", **given, guidance_scale=0)
    guided = sampled("lsdm", places, tmp_path / "guided", **given, guidance_scale=50.0)
    assert len(guided) == len(plain)
    assert any((a != b).any() for a, b in zip(plain, guided, strict=True))
    error = user_error(lambda: sampled("lsdm", places, tmp_path / "no", features=["texture"], num_samples=1))
    assert "['train_classifier.json','rflow.json'] --feature texture" in str(error)

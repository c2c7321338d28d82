# SPDX-License-Identifier: Apache-2.0
"""Each diffusion bundle trains with all its switches for speed at once, and feeds its network plain tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lsdm_toy
import mlflow
import pytest
import torch
from bundle_runs import only_plain_tensors, run, user_error
from expert_toy import write_classifier
from monai.data import MetaTensor
from source_images import shades
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from monai_synth.checkpoint import load_file
from monai_synth.data.classes import prepare_classes
from monai_synth.data.pairs import prepare_pairs
from monai_synth.data.phantom_nuclei import write_nuclei

CLASSES = {"01_TUMOR": 0, "02_STROMA": 1, "03_COMPLEX": 2}
SWITCHES = {"amp": True, "accumulate": 2, "use_checkpoint": True}


@pytest.fixture(autouse=True)
def _own_tracking() -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)


def of_classes(root: Path) -> str:
    prepare_classes(
        shades(root / "source", list(CLASSES), step=70), root / "prepared", splits=(0.7, 0.15, 0.15), progress=False
    )
    return str(root / "prepared")


def lsdm(root: Path, tiny_dataset: Path) -> dict[str, Any]:
    lsdm_toy.write_all(root, tiny_dataset)
    for name in ("model.pt", "model_ldm.pt"):
        (root / "models" / name).unlink()
    return {"dataset_dir": str(tiny_dataset), "batch_size": 4, "features": [], "image_size": [64, 64]}


def jdm(root: Path, tiny_dataset: Path) -> dict[str, Any]:
    write_nuclei(root / "source", num_images=12, size=64, seed=0)
    prepare_pairs(root / "source", root / "prepared", labels=["nucleus"], splits=(0.7, 0.15, 0.15))
    sizes = {"image_size": [32, 32], "num_iterations": 2, "iterations_per_epoch": 2, "batch_size": 2}
    return {"dataset_dir": str(root / "prepared"), **sizes}


def cfg_ddpm(root: Path, tiny_dataset: Path) -> dict[str, Any]:
    return {
        "dataset_dir": of_classes(root), "batch_size": 6, "base_channels": 8, "num_heads": 2, "num_grid_samples": 1,
    }  # fmt: skip


def fad(root: Path, tiny_dataset: Path) -> dict[str, Any]:
    expert = write_classifier(root / "expert.pt", CLASSES, seed=3)
    return {
        "dataset_dir": of_classes(root), "batch_size": 6, "image_size": [16, 16], "block_out_channels": [8, 16],
        "cross_attention": [False, True], "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": 8,
        "text_dim": 16, "align_layer": "unet.down_blocks.1", "num_grid_samples": 1, "expert": str(expert),
    }  # fmt: skip


@pytest.fixture
def convolved() -> Iterator[dict[bool, set[torch.dtype]]]:
    """What convolutions computed in, in training (True) and elsewhere."""
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def look(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(module, nn.Conv2d):
            seen[module.training and torch.is_grad_enabled()].add(output.dtype)

    handle = register_module_forward_hook(look)
    yield seen
    handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [lsdm, jdm, cfg_ddpm, fad])
def test_a_bundle_trains_with_all_switches_and_records_them(
    prepare: Callable, tmp_path: Path, tiny_dataset: Path, convolved: dict[bool, set]
) -> None:
    bundle = prepare.__name__
    values = prepare(tmp_path, tiny_dataset) | SWITCHES | {"preset": "demo", "device": "cpu", "val_interval": 1}
    values |= {} if bundle == "jdm" else {"max_epochs": 1}
    places = {"ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval"), "latest_dir": str(tmp_path)}
    run(bundle, "train.json", "train", "training", **values, **places)
    assert convolved == {True: {torch.bfloat16}, False: {torch.float32}}
    content = load_file(tmp_path / "models" / "model.pt", stage="diffusion")
    record = {"precision": "bfloat16", "compile": False, "accumulate": 2}
    assert content["training"] == [{"until_epoch": 1, **record}]
    assert content["arch"]["args"]["use_checkpoint"] is True
    last = load_file(tmp_path / "models" / "last_model.pt")
    assert last["training"] == content["training"]
    assert last["state"]["optimizer"]["state"][0]["step"] == 2  # of 3 or 4 batches
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/eval/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name(bundle).experiment_id])
    assert {key: found.data.params[f"training.{key}"] for key in record} == {k: str(v) for k, v in record.items()}


@pytest.mark.parametrize("bundle", ["lsdm", "jdm", "cfg_ddpm", "fad"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accumulate": 0}, "accumulate is 0, allowed are integers from 1"),
        ({"compile": "yes"}, "compile is 'yes'; allowed are True and False"),
    ],
)
def test_wrong_switches_end_in_one_message(bundle: str, values: dict, message: str, tmp_path: Path) -> None:
    places = {"dataset_dir": "nowhere", "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval")}
    asked = {"preset": "demo", "device": "cpu", **places, **values}
    assert message in str(user_error(lambda: run(bundle, "train.json", "train", "training", **asked)))
    assert not list(tmp_path.iterdir())


def test_the_check_of_plain_tensors_bites() -> None:
    layer = nn.Sequential(nn.Identity())
    with only_plain_tensors():
        layer(torch.zeros(1))
        with pytest.raises(AssertionError, match="Sequential was fed a MetaTensor"):
            layer(MetaTensor(torch.zeros(1)))
    layer(MetaTensor(torch.zeros(1)))

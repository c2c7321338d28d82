# SPDX-License-Identifier: Apache-2.0
"""Bundles obey what MONAI Label's own ``monaibundle`` app asks of one; its task runs where MONAI Label is installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES
from label_toy import AFFINE, as_nifti, mask, semantic, write_models
from PIL import Image

from monai_synth.label.parameters import read_parameters
from monai_synth.label.served import sample_case, served_bundles

MAGIC = ("deepedit", "deepgrow", "detection", "segmentation", "classification")
RESERVED = {
    "image", "label", "device", "model", "model_filename", "description", "result", "labels", "logging", "latencies",
    "points", "pred",
}  # fmt: skip
FROM_MAPS = ("lsdm", "spade_gan", "jdm")


def config(bundle: str, name: str) -> dict[str, Any]:
    return json.loads((BUNDLES / bundle / "configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("bundle", sorted(p.name for p in BUNDLES.iterdir() if p.is_dir()))
def test_names_and_metadata_are_those_that_the_app_reads(bundle: str) -> None:
    assert not any(word in bundle for word in MAGIC)  # the app takes the kind of task from the folder's name
    formats = config(bundle, "metadata")["network_data_format"]
    assert next(iter(formats["inputs"])) == "image"
    assert next(iter(formats["outputs"])) == "pred"
    for part in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        assert all(isinstance(v, str) and k.isdecimal() for k, v in part.get("channel_def", {}).items())
    assert "network_def" in config(bundle, "inference")
    assert {"network_def", "train"} <= config(bundle, "train").keys()


@pytest.mark.parametrize("bundle", FROM_MAPS)
def test_what_a_request_may_set_is_no_word_of_the_app_and_reaches_the_inferer(bundle: str) -> None:
    inference = config(bundle, "inference")
    names = inference["displayable_configs"]
    assert names == {name: f"@{name}" for name in names}  # the command line's values are the defaults
    assert not RESERVED & names.keys()
    assert {f"@displayable_configs#{name}" for name in names} <= set(map(str, inference["inferer"].values()))


@pytest.fixture(scope="module")
def stock() -> type:
    """The app's task; a torchvision that does not fit torch gets its missing operators declared."""
    pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own; run .ci/label")
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [n for n in sys.modules if n.startswith("torchvision")]:
            del sys.modules[name]
        stock.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            stock.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("monailabel.tasks.infer.bundle").BundleInferTask


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> dict[str, Path]:
    """Bundles with untrained weights in models/, by name; None is where the weights lie."""
    root = tmp_path_factory.mktemp("stock")
    folders = {}
    for name, models in write_models(root / "toy", tiny_dataset).items():
        folders[name] = root / "bundles" / name
        folders[name].mkdir(parents=True)
        (folders[name] / "configs").symlink_to(BUNDLES / name / "configs")
        (folders[name] / "models").symlink_to(models)
    return folders


@pytest.mark.parametrize("bundle", FROM_MAPS)
def test_the_stock_task_gives_the_voxels_that_our_app_gives(
    bundle: str, stock: type, toy: dict[str, Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    steps = {} if bundle == "spade_gan" else {"num_steps": 3}
    label = mask(0) if bundle == "jdm" else semantic(tiny_dataset)
    flipped = np.diag([0.7, 0.8, 2.5, 1.0])  # axes against those of the model
    for name, affine in (("a", AFFINE), ("b", flipped)):
        source = as_nifti(label, tmp_path / f"{name}.nii.gz", affine)
        task = stock(str(toy[bundle]), {})
        assert task.is_valid()
        assert {"seed", *steps} <= task.config().keys()
        file, _ = task({"image": str(source), "device": "cpu", "seed": 5, **steps})
        again, _ = task({"image": str(source), "device": "cpu", "seed": 5, **steps})
        other, _ = task({"image": str(source), "device": "cpu", "seed": 6, **steps})
        image = nib.load(file)
        assert Path(file).read_bytes() == Path(again).read_bytes()
        if bundle != "spade_gan":  # the toy GAN has no noise, so it has no seeds
            assert not np.array_equal(image.get_fdata(), nib.load(other).get_fdata())
        np.testing.assert_allclose(image.affine, affine, atol=1e-5)
        served = served_bundles({"bundles": bundle, "bundles_dir": str(toy[bundle].parent)}, tmp_path / "app")[bundle]
        unguided = {"guidance_scale": 0} if bundle == "lsdm" else {}
        parameters = read_parameters({"seed": 5, **steps, **unguided}, bundle)
        (tmp_path / f"out_{name}").mkdir()
        ours = sample_case(served, parameters, source=source, source_id="a", out=tmp_path / f"out_{name}")
        np.testing.assert_array_equal(np.squeeze(image.get_fdata()), np.squeeze(nib.load(ours.image).get_fdata()))
        assert image.get_data_dtype() == (np.uint8 if bundle == "jdm" else np.int16)


def test_the_stock_task_takes_pictures(stock: type, toy: dict[str, Path], tiny_dataset: Path, tmp_path: Path) -> None:
    Image.fromarray(semantic(tiny_dataset)).save(tmp_path / "map.png")
    file, _ = stock(str(toy["lsdm"]), {})({"image": str(tmp_path / "map.png"), "device": "cpu", "num_steps": 3})
    assert np.asarray(Image.open(file)).shape == (64, 64)

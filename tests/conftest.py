# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test module shares."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from monai.handlers import MLFlowHandler
from PIL import Image

from monai_synth.data.semantic import FEATURES, LABELS

REPO = Path(__file__).resolve().parents[1]

# Small problems: more threads cost more than they bring, and much more on a busy machine.
torch.set_num_threads(1)

# Where the tests run in the background, their shell has Ctrl-C ignored, and so would the processes that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of the real verification images; a test that needs it skips where it is absent."""
    folder = Path(os.environ.get("MONAI_SYNTH_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real verification images are not at {folder}; set MONAI_SYNTH_TEST_DATA")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _new_databases_are_copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow takes seconds to make its tables; here a training's new database begins as a copy of an empty one."""
    empty = tmp_path_factory.mktemp("mlflow") / "mlruns.db"
    begin = MLFlowHandler.__init__

    def copied(self: MLFlowHandler, tracking_uri: str | None = None, *args: Any, **options: Any) -> None:
        path = Path(str(tracking_uri).removeprefix("sqlite:///"))
        if path.name == empty.name and not path.exists():
            if not empty.exists():
                MlflowClient(f"sqlite:///{empty}").search_experiments()
            shutil.copyfile(empty, path)
        begin(self, tracking_uri, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLFlowHandler, "__init__", copied)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of 64x64 slices: an ellipse with two lungs and a nodule; 12 training, 4 + 4 held out."""
    root = tmp_path_factory.mktemp("prepared") / "tiny"
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:64, :64]

    def disc(row: float, col: float, a: float, b: float) -> np.ndarray:
        return ((rows - row) / a) ** 2 + ((cols - col) / b) ** 2 <= 1

    def case(number: int) -> dict:
        label = np.zeros((64, 64), np.uint8)
        label[disc(32, 32, 24, 29)] = 1
        label[disc(32, 32, 21, 26)] = 2
        label[disc(46, 32, 5, 5)] = 3
        for col in (20, 44):
            label[disc(30, col + rng.integers(-1, 2), 14, 8)] = 4
        row, col = int(rng.integers(22, 40)), int(rng.choice([20, 44]))
        malignancy = 1 + number % 5
        value = 5 + (malignancy >= 3) + (malignancy > 3)
        nodule = disc(row, col, 2 + malignancy / 2, 2 + malignancy / 2)
        label[nodule] = value
        grey = np.array([0, 125, 150, 230, 25, 110, 130, 160])[label] + rng.normal(0, 3, label.shape)
        name = f"p{number:04d}-s1-z0001"
        Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(label).save(root / "labels" / f"{name}.png")
        found = np.argwhere(nodule)
        ratings = dict.fromkeys(FEATURES, 3) | {"malignancy": malignancy, "spiculation": malignancy, "texture": 5}
        entry = {
            "nodule_id": 1, "center": [row, col], "bbox": [*found.min(0).tolist(), *(found.max(0) + 1).tolist()],
            "area": int(nodule.sum()), "num_readers": 4, "label": value, "malignant": int(malignancy > 2), **ratings,
        }  # fmt: skip
        files = {"image": f"images/{name}.png", "label": f"labels/{name}.png"}
        return {**files, "case_id": name, "patient_id": name[:5], "spacing": [1.0, 1.0], "nodules": [entry]}

    content = {
        "name": "tiny", "task": "lidc", "modality": "CT", "image_channels": 1, "spatial_shape": [64, 64],
        "intensity": {"unit": "HU", "min": -1024, "max": 800, "stored": "uint8 0..255"}, "labels": LABELS,
        "training": [case(i) for i in range(12)], "validation": [case(i) for i in range(12, 16)],
        "test": [case(i) for i in range(16, 20)],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root

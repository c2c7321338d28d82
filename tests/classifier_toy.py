# SPDX-License-Identifier: Apache-2.0
"""Small datasets of two classes: a bright spot on the left, or on the right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from monai_synth.data.pair_files import write_image
from monai_synth.experiments.classifier import Settings

SIZE = (16, 16)


def toy_image(rng, label, size=SIZE, channels=1):
    image = rng.integers(0, 60, (channels, *size))
    row, column = size[0] // 2, size[1] // 4 + label * size[1] // 2
    image[:, row - 3 : row + 3, column - 3 : column + 3] += 150
    return image.astype(np.uint8)


def write_dataset(folder, splits, *, classes=("left", "right"), size=SIZE, channels=1, seed=0, **head):
    """``splits``: name -> number of images of each class."""
    rng = np.random.default_rng(seed)
    content = {
        "name": folder.name,
        "task": "classes",
        "modality": "toy",
        "image_channels": channels,
        "spatial_shape": list(size),
        "intensity": {},
        "classes": {name: k for k, name in enumerate(classes)},
        "training": [],
        "validation": [],
        "test": [],
        **head,
    }
    for split, numbers in splits.items():
        for label, number in enumerate(numbers):
            for k in range(number):
                name = f"{split}_{label}_{k}"
                path = Path(classes[label], f"{name}.png")
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                write_image(folder / path, toy_image(rng, label, size, channels))
                case = {"image": str(path), "class": label, "case_id": name, "patient_id": f"{split}{label}{k // 2}"}
                content[split].append(case)
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_both(folder):
    real = write_dataset(folder / "real", {"training": (9, 15), "validation": (4, 4), "test": (6, 8)})
    return real, write_dataset(folder / "synthetic", {"training": (12, 12)}, seed=1, synthetic={})


def settings(folder, out="out", **given):
    values = {"epochs": 2, "batch_size": 8, "lr": 0.01, "seeds": 1, "workers": 1, "device": "cpu", "num_bootstrap": 50}
    paths = {"real": str(folder / "real"), "synthetic": str(folder / "synthetic"), "out": str(folder / out)}
    return Settings(**{**paths, **values, **given})

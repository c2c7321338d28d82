# SPDX-License-Identifier: Apache-2.0
"""Discs on a noisy ground as prepared datasets of pairs and as synthetic nnU-Net datasets, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from monai_synth.data.pair_files import FILE_ENDINGS, write_image, write_label
from monai_synth.export.nnunet import NNUNetRawWriter

CHANNELS = {1: ["L"], 3: ["R", "G", "B"]}


def disc_pair(rng: np.random.Generator, shape: tuple[int, ...], channels: int, num_labels: int):
    """uint8 image (C, *S) and label (*S): one disc per foreground label, darker than the ground."""
    grid = np.indices(shape)
    label = np.zeros(shape, np.uint8)
    for value in range(1, num_labels):
        centre = [rng.integers(n // 4, 3 * n // 4) for n in shape]
        distance = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True))
        label[distance < rng.integers(min(shape) // 8, min(shape) // 4) ** 2] = value
    ground = 200 - 80.0 * label + 10 * np.arange(channels).reshape(-1, *[1] * len(shape))
    image = ground + rng.normal(0, 10, (channels, *shape))
    return image.clip(0, 255).astype(np.uint8), label


def write_prepared(
    folder: Path,
    *,
    splits: dict[str, int],
    shape: tuple[int, ...] = (40, 48),
    channels: int = 3,
    num_labels: int = 2,
    per_patient: int = 1,
    seed: int = 0,
    name: str = "discs",
    **head: object,
) -> Path:
    """A prepared dataset of pairs; ``per_patient`` cases in a row are of one patient."""
    rng = np.random.default_rng(seed)
    ending = FILE_ENDINGS[len(shape)]
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    content: dict[str, object] = {
        "name": name, "task": "pairs", "modality": "RGB" if channels == 3 else "L", "image_channels": channels,
        "channel_names": CHANNELS[channels], "spatial_dims": len(shape), "spatial_shape": list(shape),
        "intensity": {"unit": "none", "min": 0, "max": 255, "stored": "uint8 0..255"},
        "labels": {"background": 0, **{f"disc{k}": k for k in range(1, num_labels)}}, "file_ending": ending,
        "source": {}, "created_with": {}, **head,
    }  # fmt: skip
    number = 0
    for split, count in splits.items():
        cases = []
        for _ in range(count):
            image, label = disc_pair(rng, shape, channels, num_labels)
            case = f"c{number:03d}"
            files = {"image": f"images/{case}{ending}", "label": f"labels/{case}{ending}"}
            write_image(folder / files["image"], image, [1.0] * len(shape))
            write_label(folder / files["label"], label, [1.0] * len(shape))
            patient = f"p{number // per_patient}"
            cases.append({**files, "case_id": case, "patient_id": patient, "spacing": [1.0] * len(shape)})
            number += 1
        content[split] = cases
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def write_synthetic(
    folder: Path, *, num: int, shape: tuple[int, ...] = (32, 32), channels: int = 3, num_labels: int = 2
) -> Path:
    """A synthetic nnU-Net raw dataset."""
    rng = np.random.default_rng(1)
    writer = NNUNetRawWriter(
        folder,
        dataset_id=900,
        name="Pool",
        channel_names=CHANNELS[channels],
        labels={"background": 0, **{f"disc{k}": k for k in range(1, num_labels)}},
        file_ending=FILE_ENDINGS[len(shape)],
    )
    for k in range(num):
        image, label = disc_pair(rng, shape, channels, num_labels)
        writer.add(f"s{k:03d}", image[0] if channels == 1 else np.moveaxis(image, 0, -1), label)
    return writer.finish()

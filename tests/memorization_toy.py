# SPDX-License-Identifier: Apache-2.0
"""Images of patients who have an anatomy in common, and copies of them as a model might hand them out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

KINDS = ("exact", "mirrored", "turned", "both", "noised", "shifted", "gamma", "window", "inverse contrast range", "all")


def patient(seed: int, size: int = 64, channels: int = 1) -> np.ndarray:
    """uint8 (C, H, W): two dark fields on a bright ground, which all share, and structure of the patient's own."""
    rng = np.random.default_rng([seed, 77])
    y, x = np.mgrid[:size, :size] / size - 0.5
    fields = sum(np.exp(-((y / 0.35) ** 4) - ((x - c) / 0.17) ** 4) for c in (-0.2, 0.2))
    own = np.zeros((size, size), np.float32)
    for cells, scale in ((5, 0.5), (11, 0.4), (21, 0.25)):
        noise = torch.from_numpy(rng.normal(size=(1, 1, cells, cells)).astype(np.float32))
        own += scale * F.interpolate(noise, size=(size, size), mode="bicubic")[0, 0].numpy()
    image = 160 - 90 * fields + 24 * own + rng.normal(0, 2, (size, size))
    return np.stack([image + 9 * c for c in range(channels)]).clip(0, 255).astype(np.uint8)


def copied(image: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """A copy that a user would still call one."""
    rng = np.random.default_rng([seed, 78])
    size = image.shape[-1]
    if kind == "mirrored":
        return image[..., ::-1].copy()
    if kind == "turned":
        return np.rot90(image, int(rng.integers(1, 4)), axes=(-2, -1)).copy()
    if kind == "both":
        return copied(copied(image, "mirrored", seed), "turned", seed)
    if kind == "noised":
        return (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
    if kind == "shifted":
        most = max(1, size // 20)
        return ndimage.shift(image, (0, *rng.integers(-most, most + 1, 2)), order=0, mode="nearest")
    if kind == "gamma":
        return np.rint(255 * (image / 255) ** rng.choice([0.5, 0.7, 1.5, 2.0])).astype(np.uint8)
    if kind == "window":
        return np.rint((image - 30.0) / (215 - 30) * 255).clip(0, 255).astype(np.uint8)
    if kind == "inverse contrast range":
        return np.rint(70 + image * 0.4).astype(np.uint8)
    if kind == "all":
        for step in ("both", "shifted", "gamma", "noised"):
            image = copied(image, step, seed)
        return image
    return image.copy()


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    last = np.moveaxis(image, 0, -1)
    Image.fromarray(np.ascontiguousarray(last[..., 0] if len(image) == 1 else last)).save(path, compress_level=1)
    return path


def write_sets(
    root: Path, *, train: int, held: int, fresh: int, copies: int, size: int = 64, channels: int = 1
) -> dict[str, int]:
    """Plain folders train, held, synthetic; returns the id of each planted copy with the number of its source."""
    for i in range(train):
        save(root / "train" / f"t{i:05d}.png", patient(i, size, channels))
    for i in range(held):
        save(root / "held" / f"h{i:05d}.png", patient(100_000 + i, size, channels))
    for i in range(fresh):
        save(root / "synthetic" / f"f{i:05d}.png", patient(200_000 + i, size, channels))
    planted = {}
    for i in range(copies):
        source = (i * 37 + 5) % train
        image = copied(patient(source, size, channels), KINDS[i % len(KINDS)], i)
        planted[save(root / "synthetic" / f"z{i:05d}.png", image).stem] = source
    return planted

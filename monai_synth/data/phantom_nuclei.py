# SPDX-License-Identifier: Apache-2.0
"""Computed pictures of stained tissue with the mask of their nuclei: pairs of image and label without a download.

Haematoxylin (nuclei) and eosin (the rest) absorb light by Beer-Lambert's law, so that the colours and their
variation from picture to picture are those of stained sections. Every picture depends on the seed and its number alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from monai_synth.data.phantom_files import check_limits, write_pictures

Array = np.ndarray

# Absorption of red, green and blue by one unit of each stain (Ruifrok and Johnston 2001).
_HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
_EOSIN = np.array([0.07, 0.99, 0.11])
_LIMITS = {"num_images": (1, 99999), "size": (32, 2048)}
_AREA_PER_NUCLEUS = 330.0  # pixels, in the mean picture


def write_nuclei(
    out: str | Path,
    *,
    num_images: int = 40,
    size: int = 128,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write pictures and masks, whole or not at all; the same arguments give the same bytes.

    Args:
        out: folder to write; it must not exist or be empty. ``images/n0001.png`` (RGB) and ``masks/n0001.png``
            (grey, 0 and 255) go into it; read it with ``monai-synth prepare pairs``.
        num_images: pictures; 1 to 99999.
        size: rows and columns of a picture; 32 to 2048.
        seed: of everything in it; 0 or more.
        num_workers: processes; None takes as many as pay off. The files do not depend on it.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: an argument is out of range, ``out`` holds something, or cannot be written.
    """
    check_limits(_LIMITS, num_workers=num_workers, num_images=num_images, size=size, seed=seed)
    asked = [(seed, index, size) for index in range(1, num_images + 1)]
    folders = ("images", "masks")
    return write_pictures(out, _named, asked, folders=folders, num_workers=num_workers, progress=progress)


def _named(seed: int, index: int, size: int) -> list[tuple[str, Array]]:
    image, mask = nuclei_picture(seed, index, size=size)
    return [(f"images/n{index:04d}", image), (f"masks/n{index:04d}", np.where(mask, np.uint8(255), np.uint8(0)))]


def nuclei_picture(seed: int, index: int, *, size: int = 128) -> tuple[Array, Array]:
    """Compute one picture.

    Args:
        seed: seed of the data set.
        index: number of the picture from 1.
        size: rows and columns.

    Returns:
        Image uint8 (size, size, 3) and mask bool (size, size).
    """
    rng = np.random.default_rng([seed, index])
    fibres, gaps = _stroma(rng, size)
    nuclei, stain = _nuclei(rng, size, gaps)
    # Stain variation: how much of each dye was taken up, and the hue of this batch.
    blue = rng.uniform(0.85, 1.2) * (stain + 0.10 * fibres * (1 - gaps))
    pink = rng.uniform(0.8, 1.25) * (1 - gaps) * (0.36 * fibres + 0.05) * (1 - 0.35 * nuclei)
    absorbed = blue[..., None] * _hue(rng, _HAEMATOXYLIN) + pink[..., None] * _hue(rng, _EOSIN)
    light = rng.uniform(0.94, 1.0, 3) * np.exp(-absorbed)
    light = gaussian_filter(light, (0.45, 0.45, 0))  # the lens
    light += rng.normal(0, 0.012, light.shape)  # the camera
    return (255 * light).clip(0, 255).round().astype(np.uint8), nuclei > 0.5


def _hue(rng: np.random.Generator, stain: Array) -> Array:
    vector = stain * rng.uniform(0.88, 1.12, 3)
    return vector / np.linalg.norm(vector)


def _field(rng: np.random.Generator, size: int, scale: tuple[float, float]) -> Array:
    """Smooth noise of mean 0 and variance 1 with a correlation length per axis in pixels."""
    field = gaussian_filter(rng.standard_normal((size, size)), scale, mode="wrap")
    return (field - field.mean()) / (field.std() + 1e-9)


def _stroma(rng: np.random.Generator, size: int) -> tuple[Array, Array]:
    """Density of fibres, about 1, and share of white gaps between them, 0 to 1; both (size, size)."""
    along = _field(rng, size, (1.0, 5.0))
    bend_rows, bend_cols = 6.0 * _field(rng, size, (18, 18)), 6.0 * _field(rng, size, (18, 18))
    rows, cols = np.mgrid[:size, :size]
    angle = rng.uniform(0, np.pi)
    u = np.cos(angle) * rows - np.sin(angle) * cols + bend_rows
    v = np.sin(angle) * rows + np.cos(angle) * cols + bend_cols
    waves = along[np.round(u).astype(int) % size, np.round(v).astype(int) % size]
    coarse, fine = _field(rng, size, (14, 14)), _field(rng, size, (1.2, 1.2))
    fibres = (1 + 0.22 * waves + 0.22 * coarse + 0.10 * fine).clip(0.25, None)
    hollow = _field(rng, size, (7, 7)) + 0.25 * fine
    gaps = 1 / (1 + np.exp(-6 * (hollow - rng.uniform(1.5, 2.6))))
    return gaussian_filter(fibres, 0.5), gaps


def _nuclei(rng: np.random.Generator, size: int, gaps: Array) -> tuple[Array, Array]:
    """Share of nucleus (0 to 1) and haematoxylin in each pixel, both (size, size)."""
    share, stain = np.zeros((size, size)), np.zeros((size, size))
    chromatin = _field(rng, size, (1.3, 1.3))
    crowd = _field(rng, size, (16, 16))  # cells lie in nests
    wanted = max(3, round(rng.uniform(0.6, 1.4) * size * size / _AREA_PER_NUCLEUS))
    mean_radius = rng.uniform(4.6, 6.6)
    placed: list[tuple[float, float, float]] = []
    for _ in range(12 * wanted):
        if len(placed) == wanted:
            break
        row, col = rng.uniform(-2, size + 2, 2)
        radius = mean_radius * np.exp(rng.normal(0, 0.22))
        inside = int(np.clip(row, 0, size - 1)), int(np.clip(col, 0, size - 1))
        if gaps[inside] > 0.4 or crowd[inside] < rng.normal(-0.2, 0.8):
            continue
        # Neighbours may touch and overlap a little, never lie on one another.
        if any(np.hypot(row - r, col - c) < 0.85 * (radius + other) for r, c, other in placed):
            continue
        placed.append((row, col, radius))
        _paint(rng, share, stain, chromatin, row, col, radius)
    return share, stain


def _paint(
    rng: np.random.Generator, share: Array, stain: Array, chromatin: Array, row: float, col: float, radius: float
) -> None:
    """Add one nucleus to ``share`` and ``stain``: an ellipse with a wavy, darker rim and grainy chromatin."""
    size, reach = share.shape[0], int(1.9 * radius) + 3
    low = [max(0, int(x) - reach) for x in (row, col)]
    high = [min(size, int(x) + reach + 1) for x in (row, col)]
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    rows, cols = np.mgrid[box]
    angle, longer = rng.uniform(0, np.pi), 1 + abs(rng.normal(0, 0.28))
    y = np.cos(angle) * (rows - row) - np.sin(angle) * (cols - col)
    x = np.sin(angle) * (rows - row) + np.cos(angle) * (cols - col)
    turn = np.arctan2(y, x)
    wave = sum(rng.normal(0, 0.05 / n) * np.cos(n * turn + rng.uniform(0, 2 * np.pi)) for n in (2, 3, 4))
    distance = np.hypot(x / np.sqrt(longer), y * np.sqrt(longer)) / (1 + wave) - radius  # in pixels, 0 at the rim
    own = 1 / (1 + np.exp(3.0 * distance))
    rim = np.exp(-(((distance + 1.0) / 0.9) ** 2))
    dark = rng.uniform(0.62, 1.15) * (1 + 0.16 * chromatin[box] + 0.22 * rim)
    stain[box] = np.maximum(stain[box], own * dark)
    share[box] = np.maximum(share[box], own)

# SPDX-License-Identifier: Apache-2.0
"""Computed tiles of stained tissue of four classes: images with a class without a download.

The kinds are those of Kather et al. (2016) that look least alike; the tiles are grey, as of a section in haematoxylin
and eosin that was photographed without colour. A class is the texture of the larger part of a tile; pose, stain,
exposure, focus and noise, and what lies in a corner, are drawn without a look at it. A tile depends on the seed and its
number alone, and shows the same piece of tissue at every size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from monai_synth.data.phantom_files import check_limits, write_pictures
from monai_synth.data.phantom_tissue_textures import TEXTURES, Dyes, Plane, noise, step, turned

Array = np.ndarray

CLASSES = ("tumor", "stroma", "lympho", "adipose")

# Four pictures hold every class.
_LIMITS = {"num_images": (4, 99999), "size": (16, 1024)}
_POINTS = 112  # at least, along an axis, from which a picture is averaged
_FINE = 400  # pixels along an axis from which on one point in each is enough, and else two by two
_NOISE = (0.006, 0.05)  # standard deviation, equally likely in its logarithm; 1 is white
_MIXED = 0.4  # share of the tiles with a corner of another tissue
_CORNER = (0.45, 1.1)  # how far from the middle its border runs, half sides


@dataclass(frozen=True)
class Tissue:
    """One tile and what it shows.

    Attributes:
        image: uint8 (size, size).
        label: number of the class in ``CLASSES``.
        number: of the tile in the data set, from 1.
        other: number of the class that lies in a corner, that of the tile itself where there is none.
        share: part of the picture that it covers, 0 to about a third.
    """

    image: Array
    label: int
    number: int
    other: int
    share: float

    @property
    def name(self) -> str:
        """Path in the data set without the ending."""
        return f"{CLASSES[self.label]}/{self.number:05d}"


def write_tissue(
    folder: str | Path,
    *,
    num_images: int = 800,
    size: int = 64,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write tiles into a folder per class, whole or not at all; the same arguments give the same bytes.

    The classes take turns: any two of them differ by at most one in number.

    Args:
        folder: folder to write; it must not exist or be empty. ``tumor/00001.png``, ``stroma/00002.png``,
            ``lympho/00003.png``, ``adipose/00004.png`` (8-bit grey) and so on go into it. Read it with
            ``monai-synth prepare classes``.
        num_images: pictures; 4 to 99999.
        size: rows and columns of a picture; 16 to 1024.
        seed: of everything in it; 0 or more.
        num_workers: processes; None takes as many as pay off. The files do not depend on it.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: an argument is out of range, ``folder`` holds something, or cannot be written.
    """
    check_limits(_LIMITS, num_workers=num_workers, num_images=num_images, size=size, seed=seed)
    asked = [(seed, number, size) for number in range(1, num_images + 1)]
    return write_pictures(folder, _named, asked, folders=CLASSES, num_workers=num_workers, progress=progress)


def _named(seed: int, number: int, size: int) -> list[tuple[str, Array]]:
    tissue = tissue_picture(seed, number, size=size)
    return [(tissue.name, tissue.image)]


def tissues(seed: int, num_images: int, *, size: int = 64) -> Iterator[Tissue]:
    """Compute the first tiles of a data set.

    Args:
        seed: seed of the data set.
        num_images: how many.
        size: rows and columns.
    """
    for number in range(1, num_images + 1):
        yield tissue_picture(seed, number, size=size)


def tissue_picture(seed: int, number: int, *, size: int = 64, label: int | None = None) -> Tissue:
    """Compute one tile.

    Args:
        seed: seed of the data set.
        number: number of the tile from 1.
        size: rows and columns.
        label: number of the class; None is that of the number. Pose, stain, exposure, focus and noise stay the same.

    Returns:
        The tile and what it shows.
    """
    # Streams of their own, so that the draws of one leave those of another alone.
    pose, cells, corner, film = (np.random.default_rng([seed, number, stream]) for stream in range(4))
    if label is None:
        label = (number - 1) % len(CLASSES)
    ratio = max(-(-_POINTS // size), 1 if size >= _FINE else 2)
    plane = _plane(pose, size * ratio)
    step_on, share = _corner(corner, size * ratio)
    other = (label + step_on) % len(CLASSES)
    pink, blue = TEXTURES[label](cells, plane)
    if other != label:
        pink, blue = _mix((pink, blue), TEXTURES[other](corner, plane), share)
    return Tissue(_film(film, pink, blue, ratio), label, number, other, float(share.mean()))


def _plane(rng: np.random.Generator, num: int) -> Plane:
    """The piece of the section that the tile shows: turned, magnified, and warped by the knife."""
    axis = (2 * np.arange(num) + 1) / num - 1
    zoom, angle, warp = rng.uniform(0.85, 1.35), rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.12)
    x, y = turned(*np.meshgrid(zoom * axis, zoom * axis), angle)
    u, v = (place + warp * noise(rng, x, y, 0.9) for place in (x, y))
    ragged = rng.uniform(0.010, 0.022)
    aside = u + ragged * noise(rng, x, y, 0.11) + 1j * (v + ragged * noise(rng, x, y, 0.11))
    return Plane(u, v, 1.5 * zoom + 0.4, aside)


def _corner(rng: np.random.Generator, num: int) -> tuple[int, Array]:
    """How many classes on the tissue in a corner is (0: there is none), and its share (num, num) of each point."""
    axis = (2 * np.arange(num) + 1) / num - 1
    mixed, step_on = rng.random() < _MIXED, int(rng.integers(1, len(CLASSES)))
    away, angle = rng.uniform(*_CORNER), rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(axis, axis)
    along, _ = turned(x, y, angle)
    share = step(along + 0.08 * noise(rng, x, y, 0.4) - away, -0.04, 0.04)
    return (step_on, share) if mixed else (0, np.zeros_like(share))


def _mix(first: Dyes, second: Dyes, share: Array) -> Dyes:
    return tuple(a * (1 - share) + b * share for a, b in zip(first, second, strict=True))


def _film(rng: np.random.Generator, pink: Array, blue: Array, ratio: int) -> Array:
    """Picture uint8 of the dyes: how much tissue took them up, thickness, lamp, exposure, focus and noise."""
    num = len(pink)
    size = num // ratio
    eosin, haematoxylin = rng.uniform(0.35, 0.85), rng.uniform(0.75, 1.7)
    axis = (2 * np.arange(num) + 1) / num - 1
    thick = 1 + 0.10 * noise(rng, *np.meshgrid(axis, axis), 0.8)
    light = np.exp(-thick * (eosin * pink + haematoxylin * blue))
    light = gaussian_filter(light, rng.uniform(0.006, 0.016) * num / 2)  # out of focus
    light = light.reshape(size, ratio, size, ratio).mean((1, 3))
    lean = rng.normal(0, 0.04, 2)
    axis = (2 * np.arange(size) + 1) / size - 1
    light *= 1 + lean[0] * axis[:, None] + lean[1] * axis
    # The camera meters: the mean comes part of the way to one level.
    metered = rng.uniform(0.38, 0.58) / light.mean()
    light *= metered ** rng.uniform(0.45, 0.85)
    light /= (1 + (light / 0.95) ** 6) ** (1 / 6)  # nothing is whiter than white
    black = rng.uniform(0.0, 0.08)
    light = black + (1 - black) * light ** rng.uniform(0.85, 1.2)
    light += np.exp(rng.uniform(*np.log(_NOISE))) * rng.standard_normal((size, size))
    return (255 * light).clip(0, 255).round().astype(np.uint8)

# SPDX-License-Identifier: Apache-2.0
"""Nodules of the phantom, drawn after their ratings, and the four readers who outline them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, binary_fill_holes, label

from monai_synth.data.phantom_shapes import Array, Box, Grid, blend, capsule, soft
from monai_synth.data.semantic import FEATURES as RATINGS

RATING_MAX = dict.fromkeys(RATINGS, 5) | {"internal_structure": 4, "calcification": 6}
NUM_READERS = 4

# Diameter in mm that each malignancy rating 1..5 draws from, and density in HU for each texture rating 1..5.
_DIAMETER = {1: (6.0, 8.5), 2: (7.5, 11.0), 3: (10.0, 15.0), 4: (14.0, 21.0), 5: (19.0, 30.0)}
_DENSITY = {1: -620.0, 2: -540.0, 3: -430.0, 4: -120.0, 5: 35.0}


@dataclass
class Nodule:
    """One nodule: where it is, how it is rated and where its surface runs.

    Attributes:
        center: position (x, y, z) in mm.
        diameter_mm: mean diameter.
        ratings: the true value of every rated feature.
        box: index box that holds the nodule.
        surface: radial distance (d, h, w) in `box` to the surface in mm, negative inside.
    """

    center: Array
    diameter_mm: float
    ratings: dict[str, int]
    box: Box
    surface: Array
    spikes: list[Array] = field(default_factory=list)


def draw_ratings(rng: np.random.Generator, malignancy: int | None = None) -> dict[str, int]:
    """Ratings that go together as in patients: malignant nodules are large, spiculated and lobulated."""
    m = int(rng.integers(1, 6)) if malignancy is None else malignancy

    def near(value: float, spread: float) -> int:
        return int(np.clip(np.rint(rng.normal(value, spread)), 1, 5))

    texture = 5 if rng.random() < 0.65 else int(rng.integers(1, 5))
    spiculation = near(0.4 + 0.8 * m, 1.0)
    calcified = m <= 2 and texture == 5 and rng.random() < 0.3
    return {
        "subtlety": int(np.clip(np.rint(1.5 + 0.5 * m + 0.3 * texture + rng.normal(0, 0.4)), 1, 5)),
        "internal_structure": 1,
        "calcification": 3 if calcified else 6,
        "sphericity": near(4.8 - 0.35 * m, 0.7),
        "margin": near(5.3 - 0.5 * spiculation if texture > 2 else 2.0, 0.6),
        "lobulation": near(0.6 + 0.6 * m, 1.1),
        "spiculation": spiculation,
        "texture": texture,
        "malignancy": m,
    }


def _directions(rng: np.random.Generator, count: int, flat: float = 1.0) -> Array:
    """Unit vectors (count, 3) that do not bunch; `flat` < 1 favours the slice plane."""
    chosen: list[Array] = []
    while len(chosen) < count:
        trial = rng.normal(size=(8, 3)) * (1, 1, flat)
        trial /= np.linalg.norm(trial, axis=1, keepdims=True)
        if chosen:
            trial = trial[[int(np.argmin((trial @ np.array(chosen).T).max(1)))]]
        chosen.append(trial[0])
    return np.array(chosen)


def shape_nodule(
    grid: Grid,
    center: Array,
    ratings: dict[str, int],
    rng: np.random.Generator,
    diameter_mm: float | None = None,
) -> Nodule | None:
    """Give a nodule the outline that its ratings ask for.

    The surface is a ball stretched as sphericity says, with broad bumps (lobulation) and narrow cones
    (spiculation).

    Args:
        grid: voxel grid.
        center: position (x, y, z) in mm.
        ratings: all nine features.
        rng: source of directions and sizes.
        diameter_mm: mean diameter; None draws it from the malignancy.

    Returns:
        The nodule, or None if it lies off the grid.
    """
    if diameter_mm is None:
        diameter_mm = max(float(rng.uniform(*_DIAMETER[ratings["malignancy"]])), 3.2 * grid.pixel_mm)
    radius = diameter_mm / 2
    box = grid.box(center[None], 1.9 * radius + 3)
    if box is None:
        return None
    x, y, z = np.broadcast_arrays(*grid.offsets(box, center.astype(np.float32)))
    distance = np.sqrt(x * x + y * y + z * z) + 1e-4
    unit = np.stack([x, y, z], axis=-1) / distance[..., None]

    reach = np.full(distance.shape, 1.0, dtype=np.float32)
    stretch = 0.13 * (5 - ratings["sphericity"])
    if stretch:
        axis = unit @ _directions(rng, 1, 0.5)[0].astype(np.float32)
        reach *= (1 + stretch * (1.5 * axis**2 - 0.5)).astype(np.float32)
    lobes = 0.10 * (ratings["lobulation"] - 1)
    if lobes:
        for v in _directions(rng, int(rng.integers(5, 8)), 0.7):
            reach += lobes * (np.exp(9 * (unit @ v.astype(np.float32) - 1)) - 0.16)
    spikes = 0.13 * (ratings["spiculation"] - 1)
    rays: list[Array] = []
    if spikes:
        sharp = float(np.clip(8 * radius / grid.pixel_mm, 30, 120))
        for v in _directions(rng, int(rng.integers(14, 20)), 0.6):
            long = spikes * rng.uniform(0.7, 1.3)
            reach += long * np.exp(sharp * (unit @ v.astype(np.float32) - 1))
            rays.append(v * radius * (1 + long))
        reach -= 0.25 * spikes
    return Nodule(center, diameter_mm, ratings, box, (distance - radius * reach).astype(np.float32), rays)


def paint_nodule(hu: Array, lung: Array, nodule: Nodule, grid: Grid, rng: np.random.Generator) -> None:
    """Draw a nodule into the lung densities `hu` (D, H, W) in place.

    Margin sets how wide the edge is, texture how dense the nodule is (ground glass, part solid, solid),
    calcification 3 gives it the density of bone; long spicules trail off beyond the outline.
    """
    px, rating, box = grid.pixel_mm, nodule.ratings, nodule.box
    edge = px * (1 + 0.35 * (5 - rating["margin"]))
    value = _DENSITY[rating["texture"]] + rng.normal(0, 12)
    if rating["calcification"] != 6:
        value = 380.0
    cover = soft(nodule.surface, edge)
    blend(hu[box], value + rng.normal(0, 14, cover.shape).astype(np.float32), cover)
    if rating["texture"] in (3, 4):
        blend(hu[box], 25.0, soft(nodule.surface + 0.28 * nodule.diameter_mm, 2 * px))
    if rating["spiculation"] >= 3:
        fine = np.zeros(hu[box].shape, dtype=np.float32)
        for ray in nodule.spikes:
            tip = nodule.center + ray * rng.uniform(1.1, 1.5)
            hit = capsule(grid, nodule.center + 0.8 * ray, tip, (0.7, 0.3), 1.0, slab=1.5)
            if hit is None:
                continue
            inner = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(hit[0], box, strict=True))
            if any(s.stop <= s.start for s in inner):
                continue
            here = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(inner, box, strict=True))
            there = tuple(slice(s.start - a.start, s.stop - a.start) for s, a in zip(inner, hit[0], strict=True))
            np.maximum(fine[here], 0.5 * soft(hit[1][there], px), out=fine[here])
        blend(hu[box], min(value, 0.0), fine)


def nodule_mask(nodule: Nodule, lung: Array) -> Array:
    """Voxels (d, h, w) of the nodule's box that belong to it: inside its surface and inside the lung."""
    return (nodule.surface < 0) & (lung[nodule.box] < 0)


@dataclass
class Reading:
    """What one reader marked as one nodule.

    Attributes:
        ratings: the reader's values; empty for nodules under 3 mm.
        contours: slice index to the ordered outline [(row, column), ...]; one point for nodules under 3 mm.
    """

    ratings: dict[str, int]
    contours: dict[int, list[tuple[int, int]]]


def read_nodule(nodule: Nodule, lung: Array, grid: Grid, rng: np.random.Generator) -> Reading:
    """One reader's opinion: the outline moved by a fraction of a pixel, ratings by at most one."""
    x, y, z = np.broadcast_arrays(*grid.offsets(nodule.box, nodule.center.astype(np.float32)))
    unit = np.stack([x, y, z], axis=-1) / (np.sqrt(x * x + y * y + z * z)[..., None] + 1e-4)
    loose = min(0.25 * grid.pixel_mm, 0.06 * nodule.diameter_mm)
    offset = rng.normal(-0.35 * loose, loose) + unit @ rng.normal(0, loose, 3).astype(np.float32)
    drawn = (nodule.surface < offset) & (lung[nodule.box] < 0)
    contours = {}
    k0, i0, j0 = (s.start for s in nodule.box)
    for k, mask in enumerate(drawn):
        outline = outer_border(mask)
        if outline:
            contours[k0 + k] = [(i0 + i, j0 + j) for i, j in outline]
    step = rng.choice([-1, 0, 0, 0, 1], size=len(RATINGS))
    ratings = {
        name: int(np.clip(nodule.ratings[name] + s, 1, RATING_MAX[name]))
        if name not in ("internal_structure", "calcification")
        else nodule.ratings[name]
        for name, s in zip(RATINGS, step, strict=True)
    }
    return Reading(ratings, contours)


_AROUND = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]


def outer_border(mask: Array) -> list[tuple[int, int]]:
    """Outline of a mask's largest part in LIDC's manner: the pixels just outside it, in order and closed.

    The pixels of the outline do not belong to the nodule; those that it encloses do. Notches one pixel wide
    are closed, because no such outline can show them.

    Args:
        mask: binary image (h, w).

    Returns:
        Pixels (row, column) of an 8-connected closed curve, the first repeated at the end; empty for an empty
        mask. Rows and columns can be -1 or h, w where the mask touches the edge.
    """
    parts, count = label(mask)
    if not count:
        return []
    biggest = 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))
    grown = binary_fill_holes(binary_dilation(np.pad(parts == biggest, 2)))
    edge = grown & ~binary_erosion(grown)
    start = tuple(int(v) for v in np.argwhere(edge)[0])
    path, here, heading = [start], start, 0
    first_step: tuple[int, int] | None = None
    while True:
        for turn in range(8):
            side = (heading + 6 + turn) % 8
            to = (here[0] + _AROUND[side][0], here[1] + _AROUND[side][1])
            if grown[to]:
                break
        if here == start and first_step is not None and to == first_step:
            break
        first_step = first_step or to
        here, heading = to, side
        path.append(here)
    return [(int(i) - 2, int(j) - 2) for i, j in path]

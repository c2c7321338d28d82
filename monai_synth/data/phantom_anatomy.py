# SPDX-License-Identifier: Apache-2.0
"""The phantom's thorax without lesions: heart, vessels and airways, diaphragm and the shape of the lungs.

The shapes are analytic, in millimetres, and vary from patient to patient. Levels follow the usual landmarks
with the carina at z = 0: aortic arch at +25, lung apex at +105, dome of the diaphragm near -100.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from monai_synth.data.phantom_shapes import (
    Array,
    Box,
    Grid,
    blend,
    capsule,
    ellipse,
    ellipsoid,
    smooth_max,
    smooth_min,
    smooth_noise,
    soft,
)
from monai_synth.data.phantom_wall import AIR, FAT, ChestWall, Habitus, draw_spine, draw_wall, spine_y

FAR = 40.0  # distance in mm beyond which the mediastinum's shape does not matter


@dataclass
class Thorax:
    """The drawn chest.

    Attributes:
        hu: densities (D, H, W) before the lungs are filled in.
        lung: signed distance (D, H, W) to the surface of the lungs in mm, negative inside.
    """

    hu: Array
    lung: Array


def build_thorax(grid: Grid, who: Habitus, rng: np.random.Generator) -> Thorax:
    """Draw one chest.

    Args:
        grid: voxel grid.
        who: the patient.
        rng: source of the tissue texture.

    Returns:
        Densities and the distance to the lung surface.
    """
    wall = ChestWall(grid, who)
    hu = np.full(grid.shape, AIR, dtype=np.float32)
    lung = np.empty(grid.shape, dtype=np.float32)
    cell = 9.0 / grid.pixel_mm
    marble = smooth_noise(rng, grid.shape, (4, max(1.0, cell), max(1.0, cell)))
    for k in range(grid.num_slices):
        draw_wall(grid, who, wall, hu[k], marble[k], k)
    organs = np.full(grid.shape, FAR, dtype=np.float32)
    _draw_organs(grid, who, rng, hu, organs)
    dome = _dome(grid, who)
    for k in range(grid.num_slices):
        _draw_abdomen(grid, who, wall, hu[k], dome, marble[k], k)
        draw_spine(grid, who, hu[k], marble[k], k)
        lung[k] = _lung_distance(grid, who, wall, organs[k], dome, k)
    return Thorax(hu, lung)


def _paint(hu: Array, organs: Array, hit: tuple[Box, Array] | None, value: Array | float, px: float) -> None:
    """Draw one organ and add it to the shape of the mediastinum."""
    if hit is None:
        return
    box, distance = hit
    blend(hu[box], value, soft(distance, px))
    np.minimum(organs[box], distance, out=organs[box])


def _draw_organs(grid: Grid, who: Habitus, rng: np.random.Generator, hu: Array, organs: Array) -> None:
    """Heart, great vessels, gullet and airways into `hu`; their joint distance into `organs`."""
    px, reach = grid.pixel_mm, 14.0
    blood = who.blood_hu
    wall_hu = 45 + 0.35 * (blood - 45)
    h, d = who.heart, who.depth
    spine = spine_y(who, 0.0)

    def tube(path: list[tuple[float, float, float, float]], value: float) -> None:
        for a, b in pairwise(path):
            hit = capsule(grid, np.array(a[:3]), np.array(b[:3]), (a[3], b[3]), reach)
            _paint(hu, organs, hit, value, px)

    def ball(center: tuple[float, float, float], half: tuple[float, float, float], turn: float, value: float) -> None:
        _paint(hu, organs, ellipsoid(grid, np.array(center), np.array(half), turn, reach), value, px)

    # Heart: pericardial fat, muscle, then the chambers.
    heart_z = who.dome_z + 27
    ball((23, -33 * d, heart_z), (60 * h, 42 * h, 45), 0.62, -80.0)
    ball((-20, -20 * d, heart_z + 5), (28 * h, 28 * h, 34), 0.3, -80.0)
    ball((22, -30 * d, heart_z), (57 * h, 39 * h, 42), 0.62, wall_hu)
    ball((-21, -16 * d, heart_z + 6), (26 * h, 26 * h, 32), 0.3, blood)
    ball((40, -22 * d, heart_z - 2), (34 * h, 19 * h, 30), 0.62, blood - 5)
    ball((10, -46 * d, heart_z - 2), (34 * h, 15 * h, 30), 0.45, blood + 5)
    ball((4, 9 * d, heart_z + 33), (33 * h, 19 * h, 21), 0.0, blood)
    for s in (-1, 1):  # pulmonary veins into the left atrium
        tube([(s * 20, 12, heart_z + 36, 8), (s * 40, 14, heart_z + 42, 6)], blood)

    # Arteries and veins at the base of the heart.
    tube([(10, -48 * d, -40, 14), (14, -40 * d, -24, 14), (20, -18 * d, -9, 13)], blood)
    tube([(18, -20 * d, -12, 11), (-10, 2, -15, 10), (-42, 10, -18, 8)], blood)
    tube([(20, -18 * d, -9, 12), (34, 6, -2, 10), (44, 16, -14, 8)], blood)
    arch = [(-4, -20 * d, -46, 15), (-16, -32 * d, -20, 16), (-17, -30 * d, 6, 15), (-9, -20 * d, 20, 14)]
    arch += [(6, -4, 27, 13), (19, 18, 25, 13), (25, spine - 22, 12, 12.5), (25, spine - 16, -15, 12)]
    arch += [(22, spine - 16, -70, 11.5), (12, spine - 22, -130, 11), (6, spine - 26, -200, 10)]
    tube(arch, blood)
    tube([(-30, -22 * d, 48, 8), (-27, -18 * d, -5, 9), (-23, -14, -45, 10)], blood + 20)
    tube([(-20, -2, who.dome_z + 12, 12), (-22, 6, who.dome_z - 60, 12)], blood - 10)
    tube([(-28, -24 * d, 48, 7), (4, -36 * d, 46, 6), (34, -34 * d, 62, 6), (60, -26, 82, 6)], blood + 10)
    tube([(-30, -22 * d, 48, 7), (-38, -28, 72, 7), (-62, -26, 90, 7)], blood + 10)
    tube([(-7, -18 * d, 26, 7), (-14, -22 * d, 55, 6), (-26, -14, 90, 5)], blood)
    tube([(5, -8, 30, 4.5), (12, -14, 60, 4), (16, -18, 110, 4)], blood)
    tube([(17, 8, 30, 5.5), (24, 2, 60, 5), (42, -4, 88, 5)], blood)
    tube([(-9, spine - 16, -120, 3), (-9, spine - 18, 8, 3.5), (-24, 6, 16, 3.5), (-26, -10, 10, 4)], blood)
    # Gullet with a little gas, lymph nodes.
    tube([(7, 18, 110, 6.5), (8, spine - 32, 20, 6.5), (9, spine - 30, -60, 7.5), (14, 22, -120, 9)], 42.0)
    tube([(7, 16, 40 + rng.uniform(-30, 30), 1.8), (8, spine - 33, 8, 2.0)], -700.0)
    for _ in range(6):
        spot = (float(rng.uniform(-24, 24)), float(rng.uniform(-25, 20)), float(rng.uniform(-30, 60)))
        ball(spot, (float(rng.uniform(3, 6)), float(rng.uniform(2.5, 4)), 4.0), 0.5, 45.0)
    # Windpipe and main bronchi: wall, then air.
    airways = [[(0, -24 * d, 112, 8.5), (0, -2, 30, 8.5), (0, 8, 0, 9.0)]]
    airways += [[(-3, 8, 0, 7.0), (-34, 13, -22, 6.0)], [(3, 8, 0, 6.5), (40, 17, -28, 5.5)]]
    for grow, value in ((1.3, 30.0), (0.0, AIR + 10)):
        for path in airways:
            tube([(*p[:3], p[3] + grow) for p in path], value)


def _dome(grid: Grid, who: Habitus) -> Array:
    """Height z (H, W) of the diaphragm: two domes that fall off to the chest wall, deepest behind."""

    def half(center: tuple[float, float], top: float) -> Array:
        x, y = (grid.x - center[0]) * np.sign(center[0]), grid.y - center[1]
        x = x / (np.where(x > 0, 60, 105) * who.width)  # flat towards the heart, steep at the wall and behind
        y = y / (np.where(y > 0, 66, 108) * who.depth)
        return top - 46 * (x * x + y * y) - 8 * np.clip(y, 0, 2)

    return np.where(grid.x < 0, half((-62, -10), who.dome_z), half((66, -6), who.dome_z - 13)).astype(np.float32)


def _draw_abdomen(grid: Grid, who: Habitus, wall: ChestWall, hu: Array, dome: Array, marble: Array, k: int) -> None:
    """What lies under the diaphragm: liver, spleen and stomach."""
    px, z, x, y = grid.pixel_mm, float(grid.z[k]), grid.x, grid.y
    under = soft((z - dome) * 0.6, px) * soft(wall.radius - wall.at(wall.cavity, k) + 1, px)
    if not under.any():
        return
    boost = 0.25 * max(0.0, who.blood_hu - 50)
    content = np.full_like(hu, FAT + 10) + 8 * marble
    blend(content, 58 + boost + 3 * marble, soft(ellipse(x + 42, y + 14, (88, 84)), px))
    blend(content, 50 + 1.4 * boost, soft(ellipse(x - 82, y - 42, (26, 38), -0.5), px))
    blend(content, 35.0 + 15 * marble, soft(ellipse(x - 62, y + 26, (34, 42), 0.3), px))
    blend(content, AIR + 60, soft(ellipse(x - 62, y + 46, (20, 12)), px) * float(z < who.dome_z - 28))
    blend(hu, content, under)
    blend(hu, who.muscle_hu, under * soft(np.abs((z - dome) * 0.6 + 1.5) - 1.5, px))


def _lung_distance(grid: Grid, who: Habitus, wall: ChestWall, organs: Array, dome: Array, k: int) -> Array:
    """Distance to the lungs of slice k: inside the cavity, beside the mediastinum, above the diaphragm."""
    z, x, y = float(grid.z[k]), grid.x, grid.y
    cavity = wall.radius - wall.at(wall.cavity, k) + 1.2
    spine = spine_y(who, z)
    # Half width of the middle over the depth: thin in front, wide at the great vessels and the spine.
    front = float(np.interp(z, [-60, -20, 25, 60, 90], [14, 4, 5, 22, 34]))
    middle = float(np.interp(z, [-60, 0, 40, 70, 110], [10, 15, 20, 26, 30]))
    depth = np.array([-90.0, -42.0, -22.0, spine - 24, spine - 6, spine + 8, spine + 30])
    wide = np.array([front, front, middle, middle - 4, 20.0, 23.0, 34.0])
    column = np.abs(x) - np.interp(y, depth, wide).astype(np.float32)
    center = smooth_min(column, organs - 2.0, 8.0)
    lung = smooth_max(cavity, -center, 9.0)
    return smooth_max(lung, (dome - z) * 0.6, 5.0)

# SPDX-License-Identifier: Apache-2.0
"""The phantom's thorax without lesions: chest wall, bones, mediastinum, diaphragm and the shape of the lungs.

The shapes are analytic, in millimetres, and vary from patient to patient. Levels follow the usual landmarks
with the carina at z = 0: aortic arch at +25, lung apex at +105, dome of the diaphragm near -100.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.interpolate import PchipInterpolator

from monai_synth.data.phantom_shapes import (
    Array,
    Box,
    Grid,
    blend,
    capsule,
    ellipse,
    ellipsoid,
    segment_2d,
    smooth_max,
    smooth_min,
    smooth_noise,
    soft,
)

AIR, FAT, SKIN = -1000.0, -100.0, 5.0
FAR = 40.0  # distance in mm beyond which the mediastinum's shape does not matter

# Level z, then half width, front depth and back depth of the thoracic cavity and of the whole body, in mm.
_LEVELS = np.array([-190, -120, -60, 0, 40, 70, 92, 112], dtype=float)
_CAVITY = {
    "half": np.array([120, 119, 117, 111, 98, 78, 58, 34], dtype=float),
    "front": np.array([76, 80, 79, 70, 56, 38, 18, 4], dtype=float),
    "back": np.array([84, 88, 89, 86, 77, 66, 53, 38], dtype=float),
}
_BODY = {
    "half": np.array([146, 148, 149, 151, 155, 158, 156, 150], dtype=float),
    "front": np.array([104, 104, 101, 93, 80, 66, 54, 48], dtype=float),
    "back": np.array([106, 108, 110, 111, 108, 103, 95, 88], dtype=float),
}


@dataclass
class Habitus:
    """What differs between two patients. Lengths in mm, densities in HU."""

    width: float
    depth: float
    fat_mm: float
    breast_mm: float
    muscle_hu: float
    blood_hu: float
    bone: float
    rib_shift: float
    vertebra_shift: float
    dome_z: float
    heart: float
    table_y: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Habitus:
        contrast = rng.random() < 0.6
        return cls(
            width=float(np.clip(rng.normal(1.0, 0.04), 0.9, 1.05)),
            depth=float(np.clip(rng.normal(1.0, 0.05), 0.88, 1.08)),
            fat_mm=float(rng.uniform(4, 15)),
            breast_mm=float(rng.uniform(14, 30)) if rng.random() < 0.45 else 0.0,
            muscle_hu=float(rng.uniform(45, 60)),
            blood_hu=float(rng.uniform(130, 260) if contrast else rng.uniform(40, 52)),
            bone=float(rng.uniform(0.8, 1.15)),
            rib_shift=float(rng.uniform(0, 22)),
            vertebra_shift=float(rng.uniform(0, 23)),
            dome_z=float(rng.uniform(-108, -90)),
            heart=float(rng.uniform(0.92, 1.08)),
            table_y=float(rng.uniform(4, 9)),
        )


@dataclass
class Thorax:
    """The drawn chest.

    Attributes:
        hu: densities (D, H, W) before the lungs are filled in.
        lung: signed distance (D, H, W) to the surface of the lungs in mm, negative inside.
    """

    hu: Array
    lung: Array


def _superellipse(phi: Array, half: Array, front: Array, back: Array, power: float) -> Array:
    """Radius (D, P) at the angles phi (P,) from the back, for half axes (D,)."""
    sin, cos = np.abs(np.sin(phi)), np.abs(np.cos(phi))
    depth = np.where(np.cos(phi) > 0, back[:, None], front[:, None])
    return ((sin / half[:, None]) ** power + (cos / depth) ** power) ** (-1 / power)


def _bump(phi: Array, center: float, width: float) -> Array:
    return np.exp(-(((phi - center) / width) ** 2))


class _Wall:
    """Radii of the chest wall's layers over the angle from the back (0) by the side to the front (pi)."""

    def __init__(self, grid: Grid, who: Habitus) -> None:
        self.angle = np.arctan2(np.abs(grid.x), grid.y).astype(np.float32)
        self.radius = np.hypot(grid.x, grid.y)
        at = self.angle * (180 / np.pi)
        self._low = np.minimum(at.astype(np.int32), 179)
        self._part = at - self._low
        phi = np.linspace(0, np.pi, 181)
        z = grid.z.astype(float)
        level = np.clip(z, _LEVELS[0], _LEVELS[-1])

        def profile(table: dict[str, Array], name: str) -> Array:
            scale = who.width if name == "half" else who.depth
            return scale * PchipInterpolator(_LEVELS, table[name])(level)

        self.front, self.back = profile(_CAVITY, "front"), profile(_CAVITY, "back")
        self.cavity = _superellipse(phi, profile(_CAVITY, "half"), self.front, self.back, 2.35)
        upper = 1 / (1 + np.exp(-(z + 15) / 14))[:, None]  # shoulder girdle grows in above the heart
        muscle = 5 + 6 * _bump(phi, 1.1, 0.5) + 13 * _bump(phi, 0.33, 0.22)
        girdle = 26 * _bump(phi, 0.9, 0.45) + 14 * _bump(phi, 2.4, 0.42) + 9 * _bump(phi, 1.55, 0.3)
        muscle = muscle + upper * girdle
        skin = _superellipse(
            phi, profile(_BODY, "half"), profile(_BODY, "front"), profile(_BODY, "back"), 2.25
        )
        lower = np.exp(-(((z + 45) / 38) ** 2))[:, None]
        skin = (
            skin
            + (who.fat_mm - 8)
            + who.breast_mm * lower * _bump(phi, 2.33, 0.24)
            - 2 * _bump(phi, 0.0, 0.12)
        )
        self.skin = np.maximum(skin, self.cavity + 12 + 0.5 * muscle)
        arms = 0.85 * (np.clip((z - 15) / 60, 0, 1))[:, None] * _bump(phi, 1.45, 0.85)
        muscle = muscle + arms * np.maximum(self.skin - who.fat_mm - 5 - self.cavity - 11 - muscle, 0)
        self.muscle = np.minimum(self.cavity + 11 + muscle, self.skin - 4)
        self.tissue = self.cavity + 11  # outside of the ribs

    def at(self, table: Array, k: int) -> Array:
        """Look the radius of slice k up for every pixel."""
        row = table[k].astype(np.float32)
        return row[self._low] + self._part * (row[self._low + 1] - row[self._low])


def build_thorax(grid: Grid, who: Habitus, rng: np.random.Generator) -> Thorax:
    """Draw one chest.

    Args:
        grid: voxel grid.
        who: the patient.
        rng: source of the tissue texture.

    Returns:
        Densities and the distance to the lung surface.
    """
    wall = _Wall(grid, who)
    hu = np.full(grid.shape, AIR, dtype=np.float32)
    lung = np.empty(grid.shape, dtype=np.float32)
    cell = 9.0 / grid.pixel_mm
    marble = smooth_noise(rng, grid.shape, (4, max(1.0, cell), max(1.0, cell)))
    for k in range(grid.num_slices):
        _draw_wall(grid, who, wall, hu[k], marble[k], k)
    organs = np.full(grid.shape, FAR, dtype=np.float32)
    _draw_organs(grid, who, rng, hu, organs)
    dome = _dome(grid, who)
    for k in range(grid.num_slices):
        _draw_abdomen(grid, who, wall, hu[k], dome, marble[k], k)
        _draw_spine(grid, who, hu[k], marble[k], k)
        lung[k] = _lung_distance(grid, who, wall, organs[k], dome, k)
    return Thorax(hu, lung)


def _draw_wall(grid: Grid, who: Habitus, wall: _Wall, hu: Array, marble: Array, k: int) -> None:
    """Table, skin, fat, muscle, ribs, sternum, clavicles and shoulder blades of slice k."""
    px, z, x, y = grid.pixel_mm, float(grid.z[k]), grid.x, grid.y
    side = np.abs(x)
    skin = wall.radius - wall.at(wall.skin, k)
    # The couch: a thin shell curved around the back, and the mat on it.
    couch = np.hypot(grid.couch_x, grid.couch_y + 330) - (330 + wall.skin[:, 0].max() + who.table_y)
    across = np.abs(grid.couch_x)
    blend(hu, -940.0, soft(np.abs(couch + 3) - 3, px) * soft(across - 118, px))
    blend(hu, 150.0, soft(np.abs(couch - 7) - 0.9, px) * soft(across - 125, px))
    blend(hu, -960.0, soft(np.abs(couch - 19) - 11, px) * soft(across - 118, px))

    blend(hu, SKIN, soft(skin, px))
    blend(hu, FAT + 6 * marble, soft(skin + 2.0, px))
    outer, tissue, cavity = (wall.radius - wall.at(t, k) for t in (wall.muscle, wall.tissue, wall.cavity))
    blend(hu, who.muscle_hu + 8 * marble, soft(outer, px))
    blend(hu, FAT + 30, 0.7 * soft(np.abs(marble) - 0.12, 0.25) * soft(outer + 2, px))  # between its bundles
    armpit = ellipse(side - 121 * who.width, y - 8, (13, 19), -0.3)
    blend(hu, FAT, soft(armpit, 3) * soft(4 - tissue, 3) * float(np.exp(-(((z - 42) / 26) ** 4))))
    if who.breast_mm:
        gland = (
            np.clip(marble - 0.3, 0, 1) * soft(ellipse(side - 78, y + 92, (34, 15)), 8) * soft(skin + 7, 4)
        )
        blend(hu, 25.0, gland * soft(5 - outer, 4) * np.exp(-(((z + 45) / 35) ** 2)))
    # Fat planes between the muscles.
    middle = 0.5 * (outer + tissue) + 1.5 * marble
    plane = soft(np.abs(middle) - 1.0, 1.5 * px) * soft(10 - (tissue - outer), 6)
    blend(hu, FAT + 25, 0.8 * plane)
    blend(hu, FAT + 20, 0.75 * soft(np.abs(tissue + 0.5) - 0.9, 1.5 * px) * soft(6 - (tissue - outer), 4))

    blend(hu, FAT + 12 + 9 * marble, soft(cavity + 1.5, px))  # fat of the mediastinum

    # Ribs run down from the spine to the front, so a slice cuts several of them obliquely.
    fall = 108 * np.clip((wall.angle - 0.22) / 2.4, 0, 1.1) ** 0.85
    along = (z + fall + who.rib_shift + np.where(x < 0, 3.0, 0.0) + 440) / 22
    number = np.round(along)
    level = (along - number) * 22 + 2.5 * np.sin(2.1 * number)
    rib = np.hypot((cavity - 6.0 - 0.6 * marble) / 3.4, level * 0.93 / 5.6) - 1
    front = soft(wall.angle - 2.42, 0.15)
    shell = soft(rib * 3.4, px)
    inside = soft(rib * 3.4 + 1.5, px)
    density = who.bone * (560 - 330 * inside)
    blend(hu, front * density + (1 - front) * 95, shell * soft(0.24 - wall.angle, 0.05))

    # Breast bone, and the collar bones above it.
    if -85 < z < 70:
        wide = 25 if z > 30 else 17 - 0.06 * max(0.0, -z - 20)
        bone = ellipse(x, y + wall.front[k] + 9.5, (wide, 6.0))
        blend(hu, who.bone * (430 - 270 * soft(bone + 1.8, px)), soft(bone, px))
    if 40 < z < 100:
        center = 22 + (z - 48) * 2.2
        bone = ellipse(side - center, y + wall.front[k] + 9 - 0.25 * (center - 22), (15, 5.5), 0.25)
        blend(hu, who.bone * (620 - 330 * soft(bone + 1.8, px)), soft(bone, px))
    _draw_scapula(who, wall, hu, side, y, z, px, k)


def _draw_scapula(
    who: Habitus, wall: _Wall, hu: Array, side: Array, y: Array, z: float, px: float, k: int
) -> None:
    """Shoulder blade: a thin bent plate in the muscle behind the ribs, thick towards the arm."""
    if z < -35:
        return
    up = np.clip((z + 35) / 125, 0, 1)
    phi = [0.62 + 0.06 * up, 0.95 + 0.05 * up, 1.05 + 0.3 * up]
    reach = np.interp(phi, np.linspace(0, np.pi, 181), wall.tissue[k]) + np.array([8, 12, 13 + 10 * up])
    px_, py_ = reach * np.sin(phi), reach * np.cos(phi)
    first = segment_2d(side, y, (px_[0], py_[0]), (px_[1], py_[1])) - 1.7
    second = segment_2d(side, y, (px_[1], py_[1]), (px_[2], py_[2])) - (1.8 + 2.7 * up)
    plate = smooth_min(first, second, 3.0)
    if z > 25:
        spine = segment_2d(side, y, (px_[1], py_[1]), (px_[1] + 8, py_[1] + 9)) - 2.0
        plate = smooth_min(plate, spine, 3.0)
    blend(hu, who.bone * (460 - 220 * soft(plate + 2.0, px)), soft(plate, px))


def _draw_spine(grid: Grid, who: Habitus, hu: Array, marble: Array, k: int) -> None:
    """Vertebra, disc, canal and processes of slice k, with the heads of the ribs."""
    px, z, x = grid.pixel_mm, float(grid.z[k]), grid.x
    y = grid.y - _spine_y(who, z)
    side = np.abs(x)
    phase = ((z + who.vertebra_shift) / 23) % 1.0  # 0 lower end plate .. 0.82 upper end plate .. 1 disc
    size = 1.0 - 0.0012 * z
    body = smooth_max(ellipse(x, y, (18 * size, 15.5 * size)), y - 11.5 * size, 4.0)
    disc = float(np.clip((phase - 0.80) / 0.06, 0, 1) * np.clip((1.0 - phase) / 0.04, 0, 1))
    plate = float(np.exp(-(((phase - 0.78) / 0.06) ** 2)) + np.exp(-((phase / 0.06) ** 2)))
    pith = 190 + 150 * plate + 35 * marble
    bone = who.bone * (pith + (430 - pith) * (1 - soft(body + 2.0, px)))
    arch_y = y - 19.0 * size
    arch = np.abs(np.hypot(x / 1.2, arch_y) - 10.8) - 2.2
    arch = np.maximum(arch, -arch_y - 2) if not 0.3 < phase < 0.8 else np.maximum(arch, -arch_y - 10)
    blend(hu, who.bone * (480 - 120 * soft(arch + 1.5, px)), soft(arch, px))
    tail = 4 + 10 * phase
    process = segment_2d(x, y, (0.0, 31.0 * size), (0.0, 31.0 * size + tail)) - 2.3
    blend(hu, who.bone * 430, soft(process, px))
    if 0.35 < phase < 0.85:
        wing = segment_2d(side, y, (12, 22), (30, 30)) - 3.6
        blend(hu, who.bone * (480 - 220 * soft(wing + 1.6, px)), soft(wing, px))
        neck = segment_2d(side, y, (21, 9), (36, 23)) - 3.2
        blend(hu, who.bone * (500 - 230 * soft(neck + 1.5, px)), soft(neck, px))
    blend(hu, bone + disc * (90 - bone), soft(body, px))
    canal = ellipse(x, y - 19.0 * size, (9.5, 7.5))
    blend(hu, -20.0, soft(canal, px))
    blend(hu, 32.0, soft(ellipse(x, y - 19.0 * size, (5.5, 4.6)), px))


def _spine_y(who: Habitus, z: float) -> float:
    """Middle of the vertebral bodies over the level: the chest's backward curve."""
    return who.depth * float(np.interp(z, [-190, -60, 0, 60, 110], [58, 61, 58, 45, 33]))


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
    spine = _spine_y(who, 0.0)

    def tube(path: list[tuple[float, float, float, float]], value: float) -> None:
        for a, b in pairwise(path):
            hit = capsule(grid, np.array(a[:3]), np.array(b[:3]), (a[3], b[3]), reach)
            _paint(hu, organs, hit, value, px)

    def ball(
        center: tuple[float, float, float], half: tuple[float, float, float], turn: float, value: float
    ) -> None:
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

    return np.where(grid.x < 0, half((-62, -10), who.dome_z), half((66, -6), who.dome_z - 13)).astype(
        np.float32
    )


def _draw_abdomen(
    grid: Grid, who: Habitus, wall: _Wall, hu: Array, dome: Array, marble: Array, k: int
) -> None:
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


def _lung_distance(grid: Grid, who: Habitus, wall: _Wall, organs: Array, dome: Array, k: int) -> Array:
    """Distance to the lungs of slice k: inside the cavity, beside the mediastinum, above the diaphragm."""
    z, x, y = float(grid.z[k]), grid.x, grid.y
    cavity = wall.radius - wall.at(wall.cavity, k) + 1.2
    spine = _spine_y(who, z)
    # Half width of the middle over the depth: thin in front, wide at the great vessels and the spine.
    front = float(np.interp(z, [-60, -20, 25, 60, 90], [14, 4, 5, 22, 34]))
    middle = float(np.interp(z, [-60, 0, 40, 70, 110], [10, 15, 20, 26, 30]))
    depth = np.array([-90.0, -42.0, -22.0, spine - 24, spine - 6, spine + 8, spine + 30])
    wide = np.array([front, front, middle, middle - 4, 20.0, 23.0, 34.0])
    column = np.abs(x) - np.interp(y, depth, wide).astype(np.float32)
    center = smooth_min(column, organs - 2.0, 8.0)
    lung = smooth_max(cavity, -center, 9.0)
    return smooth_max(lung, (dome - z) * 0.6, 5.0)

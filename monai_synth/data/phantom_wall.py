# SPDX-License-Identifier: Apache-2.0
"""The phantom's frame: what patients differ in, the layers of the chest wall, bones and couch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from monai_synth.data.phantom_shapes import (
    Array,
    Grid,
    blend,
    ellipse,
    segment_2d,
    smooth_max,
    smooth_min,
    soft,
)

AIR, FAT, SKIN = -1000.0, -100.0, 5.0

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
            fat_mm=float(rng.uniform(6, 16)),
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


def _superellipse(phi: Array, half: Array, front: Array, back: Array, power: float) -> Array:
    """Radius (D, P) at the angles phi (P,) from the back, for half axes (D,)."""
    sin, cos = np.abs(np.sin(phi)), np.abs(np.cos(phi))
    depth = np.where(np.cos(phi) > 0, back[:, None], front[:, None])
    return ((sin / half[:, None]) ** power + (cos / depth) ** power) ** (-1 / power)


def _bump(phi: Array, center: float, width: float) -> Array:
    return np.exp(-(((phi - center) / width) ** 2))


class ChestWall:
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
        skin = _superellipse(phi, profile(_BODY, "half"), profile(_BODY, "front"), profile(_BODY, "back"), 2.25)
        lower = np.exp(-(((z + 45) / 38) ** 2))[:, None]
        skin = skin + (who.fat_mm - 8) + who.breast_mm * lower * _bump(phi, 2.33, 0.24) - 2 * _bump(phi, 0.0, 0.12)
        self.skin = np.maximum(skin, self.cavity + 12 + 0.5 * muscle)
        arms = 0.85 * (np.clip((z - 15) / 60, 0, 1))[:, None] * _bump(phi, 1.45, 0.85)
        muscle = muscle + arms * np.maximum(self.skin - who.fat_mm - 5 - self.cavity - 11 - muscle, 0)
        self.muscle = np.minimum(self.cavity + 11 + muscle, self.skin - 5)
        self.tissue = self.cavity + 11  # outside of the ribs

    def at(self, table: Array, k: int) -> Array:
        """Look the radius of slice k up for every pixel."""
        row = table[k].astype(np.float32)
        return row[self._low] + self._part * (row[self._low + 1] - row[self._low])


def draw_wall(grid: Grid, who: Habitus, wall: ChestWall, hu: Array, marble: Array, k: int) -> None:
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
        gland = np.clip(marble - 0.3, 0, 1) * soft(ellipse(side - 78, y + 92, (34, 15)), 8) * soft(skin + 7, 4)
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


def _draw_scapula(who: Habitus, wall: ChestWall, hu: Array, side: Array, y: Array, z: float, px: float, k: int) -> None:
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


def draw_spine(grid: Grid, who: Habitus, hu: Array, marble: Array, k: int) -> None:
    """Vertebra, disc, canal and processes of slice k, with the heads of the ribs."""
    px, z = grid.pixel_mm, float(grid.z[k])
    box = grid.box(np.array([[0.0, spine_y(who, z) + 14.0, z]]), 45.0)
    if box is None:
        return
    hu, marble = hu[box[1:]], marble[box[1:]]
    x, y = grid.x[box[1:]], grid.y[box[1:]] - spine_y(who, z)
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


def spine_y(who: Habitus, z: float) -> float:
    """Middle of the vertebral bodies over the level: the chest's backward curve."""
    return who.depth * float(np.interp(z, [-190, -60, 0, 60, 110], [58, 61, 58, 45, 33]))

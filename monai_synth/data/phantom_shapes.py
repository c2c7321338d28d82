# SPDX-License-Identifier: Apache-2.0
"""Grid, distance functions and vessel trees from which the thorax phantom is drawn.

Everything is in millimetres in the patient's frame: x to the left, y to the back, z to the head, origin in
the middle of the chest at the level of the carina. Distances are negative inside a shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SLICE_MM = 2.5
FIELD_OF_VIEW_MM = 330.0
BEND_MM = 4.0

Array = np.ndarray
Box = tuple[slice, slice, slice]


@dataclass
class Grid:
    """Voxel centres of one scan, turned and shifted as the patient lies on the table.

    Attributes:
        num_slices: slices D, ordered from head to foot.
        matrix: rows and columns, H = W.
        top_mm: z of the first slice.
        angle: roll of the patient in radians.
        shift_mm: offset (x, y) of the patient on the table.
        bend: smooth displacement (2, H, W) of x and y in mm, at most BEND_MM; makes the shapes irregular.
    """

    num_slices: int
    matrix: int
    top_mm: float
    angle: float = 0.0
    shift_mm: tuple[float, float] = (0.0, 0.0)
    bend: Array | None = None
    pixel_mm: float = field(init=False)
    z: Array = field(init=False)  # (D,), falling
    x: Array = field(init=False)  # (H, W)
    y: Array = field(init=False)  # (H, W)
    couch_x: Array = field(init=False)  # (H, W), as x and y but level and not bent
    couch_y: Array = field(init=False)

    def __post_init__(self) -> None:
        self.pixel_mm = FIELD_OF_VIEW_MM / self.matrix
        self.z = (self.top_mm - SLICE_MM * np.arange(self.num_slices)).astype(np.float32)
        axis = (np.arange(self.matrix) - (self.matrix - 1) / 2) * self.pixel_mm
        col, row = np.meshgrid(axis - self.shift_mm[0], axis - self.shift_mm[1])
        self.couch_x, self.couch_y = col.astype(np.float32), row.astype(np.float32)
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        self.x = (cos * col + sin * row).astype(np.float32)
        self.y = (cos * row - sin * col).astype(np.float32)
        if self.bend is not None:
            self.x += np.clip(self.bend[0], -BEND_MM, BEND_MM)
            self.y += np.clip(self.bend[1], -BEND_MM, BEND_MM)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_slices, self.matrix, self.matrix

    def voxel(self, points: Array) -> Array:
        """Positions (..., 3) (x, y, z) in mm to voxel indices (..., 3), to within BEND_MM."""
        x, y, z = np.moveaxis(np.asarray(points, dtype=float), -1, 0)
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        col = (cos * x - sin * y + self.shift_mm[0]) / self.pixel_mm + (self.matrix - 1) / 2
        row = (sin * x + cos * y + self.shift_mm[1]) / self.pixel_mm + (self.matrix - 1) / 2
        return np.stack([(self.top_mm - z) / SLICE_MM, row, col], axis=-1)

    def position(self, voxels: Array) -> Array:
        """Integer voxel indices (N, 3) to positions (N, 3) as (x, y, z) in mm."""
        k, i, j = np.asarray(voxels).T
        return np.stack([self.x[i, j], self.y[i, j], self.z[k]], axis=-1)

    def box(self, points: Array, reach_mm: float) -> Box | None:
        """Index box that holds all `points` (N, 3) with `reach_mm` around them; None if off the grid."""
        voxels = self.voxel(points)
        reach = (reach_mm + (0 if self.bend is None else BEND_MM)) / np.array([SLICE_MM, self.pixel_mm, self.pixel_mm])
        low = np.maximum(np.ceil(voxels.min(0) - reach), 0).astype(int)
        high = np.minimum(np.floor(voxels.max(0) + reach) + 1, self.shape).astype(int)
        if np.any(high <= low):
            return None
        return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])

    def offsets(self, box: Box, center: Array) -> tuple[Array, Array, Array]:
        """Offsets x (h, w), y (h, w) and z (d, 1, 1) of the voxels of `box` from `center`."""
        k, i, j = box
        return self.x[i, j] - center[0], self.y[i, j] - center[1], (self.z[k] - center[2])[:, None, None]


def soft(distance: Array, width: float) -> Array:
    """Coverage 0..1 of a voxel whose centre lies `distance` from a surface, with an edge `width` wide."""
    return np.clip(0.5 - distance / width, 0.0, 1.0)


def blend(image: Array, value: Array | float, coverage: Array) -> None:
    """Paint `value` over `image` in place with the given coverage 0..1."""
    image += coverage * (value - image)


def smooth_min(a: Array, b: Array, radius: float) -> Array:
    """Union of two shapes whose seam is rounded over `radius` (polynomial smooth minimum)."""
    h = np.clip(0.5 + 0.5 * (b - a) / radius, 0.0, 1.0)
    return b + (a - b) * h - radius * h * (1 - h)


def smooth_max(a: Array, b: Array, radius: float) -> Array:
    """Intersection of two shapes with a rounded seam."""
    return -smooth_min(-a, -b, radius)


def ellipse(x: Array, y: Array, half: tuple[float, float], turn: float = 0.0) -> Array:
    """Approximate distance to an ellipse around 0 with half axes `half`, turned by `turn` radians."""
    cos, sin = np.cos(turn), np.sin(turn)
    u, v = cos * x + sin * y, cos * y - sin * x
    f = np.sqrt((u / half[0]) ** 2 + (v / half[1]) ** 2) + 1e-6
    return np.sqrt(u * u + v * v) * (1 - 1 / f) + 1e-3 * (f - 1)


def segment_2d(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
    """Distance to a line segment in the plane."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    t = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy + 1e-9), 0.0, 1.0)
    return np.hypot(x - start[0] - t * dx, y - start[1] - t * dy)


def capsule(
    grid: Grid, start: Array, end: Array, radii: tuple[float, float], reach: float, slab: float = 0.0
) -> tuple[Box, Array] | None:
    """Distance to a tapered capsule within its bounding box.

    Args:
        grid: voxel grid.
        start: first end (x, y, z) in mm.
        end: other end.
        radii: radius at either end in mm.
        reach: how far outside the surface the distance is wanted, in mm.
        slab: thickness of the slice that counts as hit, in mm, so that thin vessels between two slice centres
            stay visible.

    Returns:
        The index box and the distance (d, h, w) in it, or None if nothing of it is on the grid.
    """
    start, end = np.asarray(start, dtype=np.float32), np.asarray(end, dtype=np.float32)
    box = grid.box(np.stack([start, end]), max(radii) + reach + slab / 2)
    if box is None:
        return None
    x, y, z = grid.offsets(box, start)
    dx, dy, dz = end - start
    t = np.clip((x * dx + y * dy + z * dz) / (dx * dx + dy * dy + dz * dz + 1e-6), 0.0, 1.0)
    off_z = z - t * dz
    if slab:
        off_z = np.maximum(np.abs(off_z) - slab / 2, 0.0)
    distance = np.sqrt((x - t * dx) ** 2 + (y - t * dy) ** 2 + off_z**2)
    return box, distance - (radii[0] + t * (radii[1] - radii[0]))


def ellipsoid(grid: Grid, center: Array, half: Array, turn: float, reach: float) -> tuple[Box, Array] | None:
    """Approximate distance to an ellipsoid turned by `turn` radians around z, within its bounding box."""
    box = grid.box(np.asarray(center, dtype=float)[None], float(np.max(half)) + reach)
    if box is None:
        return None
    x, y, z = grid.offsets(box, np.asarray(center, dtype=np.float32))
    cos, sin = np.cos(turn), np.sin(turn)
    u, v = cos * x + sin * y, cos * y - sin * x
    f = np.sqrt((u / half[0]) ** 2 + (v / half[1]) ** 2 + (z / half[2]) ** 2) + 1e-6
    return box, np.sqrt(u * u + v * v + z * z) * (1 - 1 / f)


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], cell: tuple[float, ...]) -> Array:
    """Smooth random field of about unit variance: white noise on a lattice, joined by quadratic splines.

    Args:
        rng: source of the noise.
        shape: size of the field.
        cell: distance of the lattice's points along each axis, in samples.
    """
    field = rng.standard_normal([int(n / c) + 4 for n, c in zip(shape, cell, strict=True)]).astype(np.float32)
    for axis, (n, c) in enumerate(zip(shape, cell, strict=True)):
        place = (np.arange(n) + rng.uniform(0, c)) / c + 1
        gap = np.abs(place[:, None] - np.arange(field.shape[axis]))
        weight = np.where(gap < 0.5, 0.75 - gap**2, 0.5 * np.clip(1.5 - gap, 0, None) ** 2).astype(np.float32)
        field = np.moveaxis(np.tensordot(weight, field, axes=(1, axis)), 0, axis)
    return field / (float(field.std()) + 1e-6)


def vessel_tree(
    root: Array, points: Array, rng: np.random.Generator, *, detour: float = 0.75, tip_mm: float = 0.55
) -> list[tuple[Array, Array, float, float]]:
    """Grow a branching tree from `root` that reaches every one of `points`.

    Points are joined from near to far, each to the node that makes its way to the root short (weight
    `detour`) and its own branch short; the radius follows Murray's law, r^p = sum of the children's r^p.

    Args:
        root: position (x, y, z) in mm where the vessel enters the lung.
        points: positions (N, 3) to supply.
        rng: source of the bends.
        detour: 0 gives the shortest total length, 1 straight rays from the root.
        tip_mm: radius of the last branches.

    Returns:
        Segments (start, end, radius at start, radius at end) in mm.
    """
    points = points[np.argsort(np.linalg.norm(points - root, axis=1))]
    nodes = np.concatenate([root[None], points]).astype(np.float64)
    count = len(nodes)
    parent, way = np.zeros(count, dtype=int), np.zeros(count)
    for n in range(1, count):
        gap = np.sqrt(((nodes[:n] - nodes[n]) ** 2).sum(1))
        parent[n] = np.argmin(gap + detour * way[:n])
        way[n] = way[parent[n]] + gap[parent[n]]
    load = np.ones(count)
    for n in range(count - 1, 0, -1):
        load[parent[n]] += load[n]
    radius = tip_mm * load ** (1 / 2.4)
    segments = []
    for n in range(1, count):
        start, end = nodes[parent[n]], nodes[n]
        first = min(radius[parent[n]], 1.25 * radius[n])
        middle = (start + end) / 2 + rng.normal(0, 0.045 * np.linalg.norm(end - start), 3)
        between = (first + radius[n]) / 2
        segments += [(start, middle, first, between), (middle, end, between, radius[n])]
    return segments

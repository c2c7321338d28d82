# SPDX-License-Identifier: Apache-2.0
"""What four kinds of stained tissue take from the light, as two dyes on a plane of points.

Places are of the section: u and v, about 40 um to the unit. Each texture draws its cells in a given order on a plane
without end, so that they are the same at every resolution. ``pink`` is eosin, 1 in solid tissue; ``blue`` is
haematoxylin, 1 in a dark nucleus; both are 0 where the slide is empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.spatial import KDTree

Array = np.ndarray
Dyes = tuple[Array, Array]

_LATTICE = 64  # noise repeats after that many grains
_FINER = 4  # steps to a grain of the cubic splines between which noise runs straight


def _spline() -> Array:
    """Periodic cubic splines through the lattice, (_FINER * _LATTICE, _LATTICE), that keep the mean variance at 1."""
    along = np.arange(_FINER * _LATTICE)[:, None] / _FINER - np.arange(_LATTICE)
    away = np.abs((along + _LATTICE / 2) % _LATTICE - _LATTICE / 2)
    basis = np.where(away < 1, 4 - 6 * away**2 + 3 * away**3, (2 - away).clip(0, None) ** 3) / 6
    return basis / np.sqrt((basis**2).sum(1).mean())


_SPLINE = _spline()


@dataclass
class Plane:
    """Points of a section.

    Attributes:
        u, v: where the points lie; (num, num).
        reach: no point is farther than that from the origin along u or v.
        aside: u + 1j v displaced by fine noise, where shapes are to have ragged borders.
    """

    u: Array
    v: Array
    reach: float
    aside: Array


def draw_tumor(rng: np.random.Generator, plane: Plane) -> Dyes:
    """Crowded nuclei, large, mottled and unequal, in rows about crooked lumens, with torn cracks between."""
    u, v = plane.u, plane.v
    gland = noise(rng, u, v, rng.uniform(0.5, 0.9)) + 0.18 * noise(rng, u, v, 0.13)
    lumen = step(gland, *edge(rng.uniform(1.0, 2.4), 0.15))
    ragged = 0.5 * noise(rng, u, v, 0.12)
    wide = rng.uniform(0.02, 0.10) * (noise(rng, u, v, 0.45) + ragged).clip(0, None)
    crack = step(wide - np.abs(noise(rng, u, v, 0.5) + 0.1 * ragged), *edge(0.0, 0.03))
    turn, bend = rng.uniform(0, np.pi), rng.uniform(0.3, 1.2)
    spacing = rng.uniform(0.23, 0.34)
    cells = scatter(rng, plane.reach, spacing, stretch=rng.uniform(1.0, 1.5), turn=turn, jitter=0.42)
    angle = turn + bend * noise(rng, *cells.T, 0.8) + rng.normal(0, 0.3, len(cells))
    radius = spacing * rng.uniform(0.45, 0.60) * np.exp(rng.normal(0, 0.24, len(cells)))
    share, away, dye = nuclei(rng, plane, cells, angle, radius, rng.uniform(1.2, 2.4, len(cells)), spread=0.25)
    rim = rng.uniform(0.0, 0.6)
    mottle = noise(rng, u, v, 0.05)
    chromatin = 1 - rim * (1 - away**2).clip(0, 1) + rng.uniform(0.15, 0.35) * mottle
    tissue = (1 - lumen) * (1 - 0.9 * crack)
    body = 0.9 + 0.14 * noise(rng, u, v, 0.08) + 0.14 * noise(rng, u, v, 0.4)
    blue = share * dye * chromatin.clip(0.15, 1.6) * tissue
    return tissue * body.clip(0.2, None) * (1 - 0.3 * share), 0.9 * blue + rng.uniform(0.15, 0.45) * tissue


def draw_stroma(rng: np.random.Generator, plane: Plane) -> Dyes:
    """Wavy fibres side by side, slits between them and a few spindle-shaped nuclei along them."""
    turn = rng.uniform(0, np.pi)
    along, across = turned(plane.u, plane.v, turn)
    length = rng.uniform(0.7, 1.4)
    wave = rng.uniform(0.03, 0.10) * noise(rng, along, across, rng.uniform(0.3, 0.7), 1.6)
    wave += rng.uniform(0.05, 0.25) * noise(rng, along, across, 1.2)
    across = across + wave
    fine = noise(rng, along, across, 0.5 * length, rng.uniform(0.03, 0.05))
    bundles = noise(rng, along, across, length, rng.uniform(0.10, 0.2))
    slit = noise(rng, along, across, rng.uniform(0.5, 0.9) * length, rng.uniform(0.07, 0.16))
    slit = step(slit + 0.2 * fine + 0.2 * noise(rng, along, across, 0.12), *edge(rng.uniform(0.9, 2.6), 0.25))
    spacing = rng.uniform(0.32, 0.55)
    cells = scatter(rng, plane.reach, spacing, stretch=1.5, turn=0.0, jitter=0.6)
    cells = cells[noise(rng, *cells.T, 0.5) + rng.normal(0, 0.6, len(cells)) > rng.uniform(-0.9, 0.9)]
    radius = rng.uniform(0.065, 0.095) * np.exp(rng.normal(0, 0.22, len(cells)))
    longer = rng.uniform(1.6, 2.6) * np.exp(rng.normal(0, 0.3, len(cells))).clip(0.6, 2)
    bent = Plane(along, across, plane.reach, along + 1j * across + (plane.aside - plane.u - 1j * plane.v))
    share, _, dye = nuclei(rng, bent, cells, rng.normal(0, 0.2, len(cells)), radius, longer, spread=0.25)
    body = 0.95 + rng.uniform(0.12, 0.26) * fine + rng.uniform(0.1, 0.22) * bundles
    body = (body + 0.10 * noise(rng, plane.u, plane.v, 0.06)).clip(0.1, None)
    tissue = 1 - slit
    return tissue * body * (1 - 0.3 * share), tissue * (share * dye + 0.18 * body)


def draw_lympho(rng: np.random.Generator, plane: Plane) -> Dyes:
    """Small, round, dark nuclei of one size, close together; little between them."""
    u, v = plane.u, plane.v
    spacing = rng.uniform(0.165, 0.215)
    cells = scatter(rng, plane.reach, spacing, stretch=1.0, turn=rng.uniform(0, np.pi), jitter=0.33)
    crowd = noise(rng, *cells.T, 0.5)
    cells = cells[crowd + rng.normal(0, 0.5, len(cells)) > rng.uniform(-3.0, -0.7)]
    radius = spacing * rng.uniform(0.40, 0.50) * np.exp(rng.normal(0, 0.10, len(cells)))
    angle = rng.uniform(0, np.pi, len(cells))
    share, _, dye = nuclei(rng, plane, cells, angle, radius, rng.uniform(1.0, 1.35, len(cells)), spread=0.16)
    hollow = noise(rng, u, v, 0.13) + 0.8 * noise(rng, u, v, 0.45)
    tissue = 1 - step(hollow, *edge(rng.uniform(0.2, 3.2), 0.5)) * (1 - share)
    strands = noise(rng, *turned(u, v, rng.uniform(0, np.pi)), 0.5, 0.08)
    body = 0.75 + 0.2 * noise(rng, u, v, 0.07) + rng.uniform(0.1, 0.3) * strands
    blue = share * dye * (1.0 + 0.15 * noise(rng, u, v, 0.05))
    return tissue * body.clip(0.1, None) * (1 - 0.3 * share), blue + rng.uniform(0.1, 0.5) * tissue


def draw_adipose(rng: np.random.Generator, plane: Plane) -> Dyes:
    """Large empty cells with thin walls that thicken and fold where they meet."""
    u, v = plane.u, plane.v
    spacing = rng.uniform(0.75, 1.45)
    cells = scatter(rng, plane.reach, spacing, stretch=rng.uniform(1.0, 1.5), turn=rng.uniform(0, np.pi), jitter=0.42)
    sway = 0.10 * (noise(rng, u, v, 0.5) + 1j * noise(rng, u, v, 0.5))
    points = np.stack([(plane.aside + sway).real, (plane.aside + sway).imag], -1)
    apart, nearest = KDTree(cells).query(points, k=3)
    ends = np.hypot(*np.moveaxis(cells[nearest[..., 0]] - cells[nearest[..., 1]], -1, 0))
    away = (apart[..., 1] ** 2 - apart[..., 0] ** 2) / (2 * ends)  # from the wall between the two nearest cells
    corner = np.exp(-(((apart[..., 2] - apart[..., 0]) / rng.uniform(0.08, 0.22)) ** 2))
    width = rng.uniform(0.02, 0.12) * np.exp(0.5 * noise(rng, u, v, 0.5)) + 0.06 * corner
    wall = step(width - away, -0.012, 0.02)
    rim = np.exp(-(((width - away) / 0.03) ** 2))
    sheet = step(noise(rng, u, v, 0.6) + 0.15 * noise(rng, u, v, 0.2), *edge(rng.uniform(0.5, 2.8), 0.05))
    crease = noise(rng, *turned(u, v, rng.uniform(0, np.pi)), 0.7, 0.09)
    spots = scatter(rng, plane.reach, 0.4, stretch=1.0, turn=0.0, jitter=0.6)
    spots = spots[rng.random(len(spots)) < rng.uniform(0.2, 0.8)]
    radius = rng.uniform(0.04, 0.075, len(spots))
    angle = rng.uniform(0, np.pi, len(spots))
    share, _, dye = nuclei(rng, plane, spots, angle, radius, rng.uniform(1.2, 3.0, len(spots)), spread=0.2)
    grain = (1 + 0.15 * noise(rng, u, v, 0.08) + 0.2 * noise(rng, u, v, 0.4) + 0.2 * crease).clip(0.2, None)
    dense, folded = rng.uniform(0.25, 0.9), rng.uniform(0.2, 1.2)
    pink = dense * (wall * (0.8 + 0.4 * rim) + 0.6 * sheet * (1 - 0.4 * wall)) + folded * corner * wall
    return pink * grain + 0.03, 0.4 * folded * corner * wall * grain + 0.9 * share * dye * wall + 0.1 * wall


TEXTURES = (draw_tumor, draw_stroma, draw_lympho, draw_adipose)


def noise(rng: np.random.Generator, x: Array, y: Array, grain: float, other: float | None = None) -> Array:
    """Noise of mean 0 and variance 1 at any points, smooth over ``grain`` along x and ``other`` along y."""
    values = _SPLINE @ rng.standard_normal((_LATTICE, _LATTICE)) @ _SPLINE.T
    places = np.stack([x * (_FINER / grain), y * (_FINER / (other or grain))])
    return map_coordinates(values, places, order=1, mode="grid-wrap")


def nuclei(
    rng: np.random.Generator, plane: Plane, cells: Array, angle: Array, radius: Array, longer: Array, *, spread: float
) -> tuple[Array, Array, Array]:
    """Ellipses with ragged borders that yield to one another where they would overlap.

    Args:
        rng: draws how dark each one is.
        plane: points.
        cells: middles (N, 2).
        angle: of the long axes (N,), radians.
        radius: of the circles of equal area (N,).
        longer: long over short axis (N,).
        spread: standard deviation of the darkness, whose mean is 1.

    Returns:
        For each point: share of nucleus, 0 to 1; distance from the middle, 1 at the border; darkness of the nucleus.
    """
    dark = (1 + spread * rng.standard_normal(len(cells))).clip(0.35, 1.6)
    points = np.stack([plane.aside.real, plane.aside.imag], -1)
    _, nearest = KDTree(cells).query(points)
    along, across = turned(*np.moveaxis(points - cells[nearest], -1, 0), angle[nearest])
    root = np.sqrt(longer[nearest])
    away = np.hypot(along / root, across * root) / radius[nearest]
    return step(-away, -1.12, -0.88), away, dark[nearest]


def scatter(
    rng: np.random.Generator, reach: float, spacing: float, *, stretch: float, turn: float, jitter: float
) -> Array:
    """Points (N, 2) of a hexagonal lattice that were each pushed by up to ``jitter`` times the spacing.

    ``stretch`` makes the lattice wider along ``turn`` (radians) and keeps the density.
    """
    across, along = spacing / np.sqrt(stretch), spacing * np.sqrt(stretch)
    many = int(np.ceil(1.5 * reach / across / 0.87)) + 1
    row, col = np.mgrid[-many : many + 1, -many : many + 1].reshape(2, -1)
    places = np.stack([col + 0.5 * (row % 2), 0.87 * row], 1) + rng.uniform(-jitter, jitter, (len(row), 2))
    places += rng.uniform(-0.5, 0.5, 2)
    x, y = turned(places[:, 0] * along, places[:, 1] * across, -turn)
    inside = (np.abs(x) < reach + spacing) & (np.abs(y) < reach + spacing)
    return np.stack([x, y], 1)[inside]


def turned(x: Array, y: Array, angle: float | Array) -> tuple[Array, Array]:
    """Coordinates along and across the direction ``angle`` (radians)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def edge(middle: float, half: float) -> tuple[float, float]:
    return middle - half, middle + half


def step(x: Array, low: float, high: float) -> Array:
    """0 below ``low``, 1 above ``high``, smooth between."""
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)

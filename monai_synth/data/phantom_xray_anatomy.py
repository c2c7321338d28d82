# SPDX-License-Identifier: Apache-2.0
"""How a crude chest absorbs X-rays: bones, soft tissue, lungs and what fills them, as numbers on a plane.

Places are of the patient as the viewer sees him: x from -1 (his right) to 1 (his left), y from -1 (neck) to 1 (belly).
Absorption is 1 through the middle of the chest without its lungs and 0 through air.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Range = tuple[float, float]

_AIR = 0.74  # what the air of the deepest lung takes away from the absorption
_TIP, _BASE = 0.30, 0.78  # x of the top of a lung, y of its lowest corner
_FORMS = ("lobar", "patchy", "diffuse")
_CHANCES = (0.40, 0.20, 0.40)

# What differs between patients, and between the pictures of one patient; all drawn uniformly.
_ANATOMY: dict[str, Range] = {
    "trunk": (0.86, 1.02),  # half width of the body
    "fat": (0.90, 1.12),  # thickness of the body
    "apex": (-0.76, -0.62),  # y of the top of the lungs
    "lateral": (0.68, 0.82),  # x of their outer border at the widest
    "medial": (0.11, 0.16),  # x of their inner border
    "thymus": (-0.10, 0.10),  # how much one side of the upper mediastinum is wider
    "heart": (0.85, 1.18),
    "heart_turn": (0.3, 0.75),
    "hilum": (0.6, 1.4),
    "slope": (0.26, 0.44),  # how far a rib falls from the back to the front
    "rib": (0.132, 0.165),  # from one to the next
    "bone": (0.6, 1.25),
    "scapula": (0.0, 1.0),
    "left_dome": (0.0, 0.09),  # how much lower the left dome stands
}
_VISIT: dict[str, Range] = {
    "tilt": (-0.07, 0.07),  # radians
    "wide": (1.00, 1.32),
    "tall": (1.02, 1.30),
    "shift_x": (-0.06, 0.06),
    "shift_y": (-0.10, 0.10),
    "turn": (-0.05, 0.05),  # the patient stands askew: the middle moves to a side
    "dome": (0.34, 0.56),  # y of the right dome: how deep he has breathed in
    "arms": (-1.0, 1.0),  # below 0: raised
    "chin": (-1.5, 1.0),  # above 0: in the picture
    "gas": (-0.8, 1.0),  # above 0: air in the stomach
}


@dataclass
class Chest:
    """One patient in one pose on a plane of points.

    Attributes:
        absorbed: without the lungs' air.
        air: what the air of healthy lungs takes away from it; 0 outside the lungs.
        x, y: where the points lie in the patient.
        down, across: place in the lung: 0 (top) to 1 (base), and 0 (middle) to 1 (ribs).
    """

    absorbed: Array
    air: Array
    x: Array
    y: Array
    down: Array
    across: Array


def draw_chest(anatomy: np.random.Generator, visit: np.random.Generator, num: int) -> Chest:
    """Chest on (num, num) points.

    Args:
        anatomy: draws what belongs to the patient.
        visit: draws what belongs to the picture.
        num: rows and columns.
    """
    a = {name: anatomy.uniform(*limits) for name, limits in _ANATOMY.items()}
    v = {name: visit.uniform(*limits) for name, limits in _VISIT.items()}
    axis = plane_axis(num)
    col, row = np.meshgrid(axis - v["shift_x"], axis - v["shift_y"])
    cos, sin = np.cos(v["tilt"]), np.sin(v["tilt"])
    x = (cos * col + sin * row) / v["wide"] + 0.012 * smooth_noise(anatomy, axis, 0.5)
    y = (cos * row - sin * col) / v["tall"] + 0.012 * smooth_noise(anatomy, axis, 0.5)
    trees = [_vessels(anatomy, side) for side in (-1, 1)]

    body = _body(x, y, a, v)
    mid = x - v["turn"] * _step(y, -0.9, 0.1)
    side, out = np.sign(x), np.abs(mid)
    down = ((y - a["apex"]) / (_BASE - a["apex"])).clip(0, 1)
    lateral = _lateral(a, down)
    wider = 0.03 + np.abs(a["thymus"]) * (np.sign(a["thymus"]) == side)
    medial = _TIP - (_TIP - a["medial"] - wider * _bump(y, -0.30, 0.22)) * (1 - (1 - down) ** 3) ** 0.5
    across = ((out - medial) / (lateral - medial + 1e-6)).clip(0, 1)
    depth = (1 - np.abs(2 * across - 1) ** 3) ** 0.7 * (0.55 + 0.45 * _step(down, 0, 0.4))

    dome = v["dome"] + np.where(side > 0, a["left_dome"], 0)
    dome = dome + np.where(out > 0.36, 1.45, 0.6) * (out - 0.36) ** 2
    above = _step(dome - y, -0.012, 0.012)
    heart = _heart(mid, y, a, v["dome"])
    air = _AIR * depth * above * (1 - heart) * (down > 0)
    share = air / _AIR

    absorbed = body * (1 + 0.22 * (1 - above) + 0.10 * heart)
    for tree in trees:
        absorbed += 0.17 * a["hilum"] * share * _lines(x, y, tree)
    for where in (-1, 1):  # the roots of the lungs
        absorbed += 0.16 * a["hilum"] * share * _bump(mid, where * 0.21, 0.06) * _bump(y, 0.02, 0.10)
    absorbed += _spine(mid, y)
    absorbed += a["bone"] * (_ribs(x, y, a, above, share) + _shoulders(x, y, a))
    absorbed -= 0.15 * _tube(np.abs(mid - 0.01), 0.05) * _step(-y, 0.12, 0.2) * (body > 0.1)  # windpipe
    absorbed -= _gas(mid, y, v["gas"], dome, 1 - above)
    return Chest(absorbed.clip(0, None), air, x, y, down, across)


def draw_opacities(rng: np.random.Generator, chest: Chest) -> Array:
    """Share of the lungs' air that fluid has displaced, 0 to below 1, as ``chest.air``; 0 outside the lungs."""
    num = len(chest.air)
    axis = plane_axis(num)
    form = rng.choice(_FORMS, p=_CHANCES)
    strength = rng.uniform(0.22, 0.95)
    fill = np.zeros((num, num))
    ragged = smooth_noise(rng, axis, 0.16) + 0.5 * smooth_noise(rng, axis, 0.06)
    if form == "diffuse":  # both lungs, from the roots outwards; a net of thickened septa
        net = np.exp(-((smooth_noise(rng, axis, 0.045) / 0.45) ** 2))
        haze = 1.1 - chest.across ** rng.uniform(0.7, 2.0)
        haze *= 0.55 + 0.45 * _bump(chest.down, rng.uniform(0.4, 0.8), 0.4)
        fill = strength * 0.85 * haze * (0.55 + 0.45 * net) * (1 + 0.25 * ragged)
    else:
        lobar = form == "lobar"
        for _ in range(1 if lobar else rng.integers(2, 6)):
            side = rng.choice((-1, 1))
            down, across = rng.uniform(0.2, 0.8), rng.uniform(0.15, 0.75)
            radius = rng.uniform(0.22, 0.42) if lobar else rng.uniform(0.09, 0.19)
            longer = rng.uniform(0.8, 1.25)
            # the lung's own axes bend with it: a patch follows its shape and stays on its side
            apart = np.hypot((chest.across - across) * 0.45 * longer, (chest.down - down) * 1.4 / longer) / radius
            soft = rng.uniform(0.12, 0.3)
            patch = 1 / (1 + np.exp(((apart + 0.22 * ragged - 1) / soft).clip(-30, 30)))
            patch *= (1 + 0.12 * ragged) * (np.sign(chest.x) == side)
            fill = np.maximum(fill, strength * rng.uniform(0.75, 1.0) * patch)
    return fill.clip(0, 0.95) * (chest.air > 0)


def plane_axis(num: int) -> Array:
    """Middles of ``num`` equal parts of -1 to 1."""
    return (2 * np.arange(num) + 1) / num - 1


def smooth_noise(rng: np.random.Generator, axis: Array, grain: float) -> Array:
    """Noise of mean 0 and variance 1 at the points of ``axis`` x ``axis``, smooth over ``grain``.

    The values are Gaussian bumps on a fixed lattice: the same at every resolution.
    """
    centres = np.arange(-1 - 3 * grain, 1 + 3 * grain, grain)
    bumps = np.exp(-0.5 * ((axis[:, None] - centres) / (0.8 * grain)) ** 2)
    bumps /= np.sqrt((bumps**2).sum(1, keepdims=True))
    return bumps @ rng.standard_normal((len(centres), len(centres))) @ bumps.T


def _body(x: Array, y: Array, a: dict[str, float], v: dict[str, float]) -> Array:
    """Thickness of trunk, neck, head and arms."""
    out = np.abs(x)
    shoulder = -0.98 + 0.34 * (out / a["trunk"]) ** 2.2
    inside = np.minimum(a["trunk"] - out, y - shoulder)
    inside = np.maximum(inside, 0.26 - out - 0.1 * _step(-y, 0.6, 1.0))
    round_ = np.sqrt(1 - (1 - (inside / 0.75).clip(0, 1)) ** 2)
    body = a["fat"] * round_ * (0.80 + 0.20 * _step(y, -0.9, 0.3))
    for side in (-1, 1):
        top = side * (a["trunk"] - 0.04), -0.56
        end = (side * 1.25, -1.35) if v["arms"] < 0 else (side * (a["trunk"] + 0.10 + 0.25 * v["arms"]), 1.2)
        away = _from_line(x, y, top, end)
        arm = 0.62 * _tube(away, 0.17) + 0.28 * a["bone"] * _tube(away, 0.05)
        joint = 0.30 * a["bone"] * _blob(x - top[0], y - top[1], 0.09, 0.10)
        body = np.maximum(body, arm) + joint
    return body + 0.7 * max(v["chin"], 0) * _blob(x, y + 1.12, 0.34, 0.30)


def _lateral(a: dict[str, float], down: Array) -> Array:
    """x of the outer border of a lung."""
    return _TIP + (a["lateral"] - _TIP) * (1 - (1 - down) ** 2.4) ** 0.6


def _heart(x: Array, y: Array, a: dict[str, float], dome: float) -> Array:
    """Share of the lungs' place that heart and great vessels take, 0 to 1."""
    size, cos, sin = a["heart"], np.cos(a["heart_turn"]), np.sin(a["heart_turn"])
    u, w = x - 0.13, y - (dome - 0.18)
    left = _blob(cos * u + sin * w, cos * w - sin * u, 0.36 * size, 0.27 * size)
    right = _blob(x + 0.06, y - (dome - 0.20), 0.19 * size, 0.27 * size)
    arch = _blob(x - 0.12, y + 0.26, 0.10, 0.11)
    trunk = _blob(x - 0.11, y + 0.02, 0.13, 0.28)
    return (2.2 * np.maximum(np.maximum(left, right), np.maximum(arch, trunk))).clip(0, 1)


def _spine(mid: Array, y: Array) -> Array:
    level = (y + 1.0) / 0.125
    off = np.abs(level - np.round(level))  # 0 in the middle of a disc, 0.5 in that of a vertebra
    spine = 0.17 * _tube(np.abs(mid), 0.095) * (0.72 + 0.28 * _step(off, 0.08, 0.16))
    for side in (-1, 1):
        spine += 0.06 * _blob(mid - side * 0.055, 0.125 * (off - 0.34), 0.022, 0.028)  # pedicles
    return spine


def _ribs(x: Array, y: Array, a: dict[str, float], above: Array, share: Array) -> Array:
    """Ten pairs: tilted rings seen from the front, with the half at the back above the half in front."""
    ribs = np.zeros_like(x)
    dimmer = (0.45 + 0.55 * above) * (0.62 + 0.38 * share)
    for number in range(10):
        at = a["apex"] - 0.10 + a["rib"] * number
        down = np.clip((at + a["slope"] / 2 - a["apex"]) / (_BASE - a["apex"]), 0.02, 1)
        reach = _lateral(a, down) + 0.02
        cosine = np.sqrt((1 - (x / reach) ** 2).clip(1e-3, 1))
        steep = np.sqrt(1 + (a["slope"] / 2 * x / (reach**2 * cosine)) ** 2)
        out = np.abs(x) / reach
        for sign, most, ends in ((-1, 0.17, (0.10, 0.16)), (1, 0.12, (0.42, 0.55))):
            away = np.abs(y - at - a["slope"] * (1 + sign * cosine) / 2) / steep
            shell = _tube(away, 0.030) - 0.45 * _tube(away, 0.019)
            ribs += most * shell * _step(out, *ends) * _step(-out, -1.0, -0.97) * dimmer
    return ribs


def _shoulders(x: Array, y: Array, a: dict[str, float]) -> Array:
    """Collar bones and shoulder blades."""
    bones = np.zeros_like(x)
    for side in (-1, 1):
        along = ((side * x - 0.08) / 0.68).clip(0, 1)
        middle = a["apex"] + 0.16 - 0.17 * along + 0.05 * np.sin(2 * np.pi * along)
        ends = _step(side * x, 0.06, 0.09) * _step(-side * x, -0.80, -0.74)
        away = np.abs(y - middle)
        bones += 0.22 * (_tube(away, 0.038) - 0.4 * _tube(away, 0.022)) * ends
        across = _step(side * x, 0.46, 0.56) * _step(-side * x + 0.25 * y, -0.86, -0.80)
        bones += 0.07 * a["scapula"] * across * _step(-np.abs(y + 0.25), -0.36, -0.24)
    return bones


def _gas(x: Array, y: Array, amount: float, dome: Array, below: Array) -> Array:
    """What the air in the stomach takes away: a bubble under the left dome with a level of fluid."""
    if amount <= 0:
        return np.zeros_like(x)
    top = dome + 0.05
    size = 0.08 + 0.10 * amount
    bubble = _blob(x - 0.36, y - top - 0.6 * size, 1.25 * size, size)
    level = _step(top + 1.0 * size - y, -0.01, 0.02)
    return 0.40 * bubble * level * below


def _vessels(rng: np.random.Generator, side: int) -> Array:
    """Branching lines (N, 5) from the root of a lung: x and y of both ends, half width."""
    lines, ends = [], []
    for angle in np.linspace(-1.35, 1.45, 8) + rng.normal(0, 0.12, 8):
        ends.append((side * rng.uniform(0.15, 0.24), rng.normal(0.02, 0.05), angle, 0.016))
    while ends:
        x, y, angle, width = ends.pop()
        if width < 0.005:
            continue
        length = rng.uniform(0.06, 0.13)
        x1, y1 = x + side * length * np.cos(angle), y + length * np.sin(angle)
        lines.append((x, y, x1, y1, width))
        for turn in (rng.uniform(0.0, 0.7), -rng.uniform(0.0, 0.7)):
            ends.append((x1, y1, angle + turn, width * rng.uniform(0.55, 0.85)))
    return np.array(lines)


def _lines(x: Array, y: Array, lines: Array) -> Array:
    """Tubes, 1 for the thickest; ``x`` and ``y`` rise along columns and rows but for a small tilt."""
    num, slack, drawn = len(x), 0.12, np.zeros_like(x)
    widest = lines[:, 4].max()
    for x0, y0, x1, y1, width in lines:
        box = tuple(
            slice(*np.searchsorted(axis, [min(p, q) - slack, max(p, q) + slack]))
            for axis, p, q in ((y[:, num // 2], y0, y1), (x[num // 2], x0, x1))
        )
        away = _from_line(x[box], y[box], (x0, y0), (x1, y1))
        drawn[box] = np.maximum(drawn[box], (width / widest) ** 0.7 * _tube(away, width))
    return drawn


def _from_line(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float]) -> Array:
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = (((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)).clip(0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


def _tube(away: Array, radius: float) -> Array:
    """Chord through a tube, 1 in its middle, 0 beside it."""
    return np.sqrt((1 - (away / radius) ** 2).clip(0, None))


def _blob(x: Array, y: Array, rx: float, ry: float) -> Array:
    """Chord through an ellipsoid, 1 in its middle, 0 beside it."""
    return np.sqrt((1 - (x / rx) ** 2 - (y / ry) ** 2).clip(0, None))


def _bump(x: Array, middle: float, width: float) -> Array:
    return np.exp(-0.5 * ((x - middle) / width) ** 2)


def _step(x: Array, low: float, high: float) -> Array:
    """0 below ``low``, 1 above ``high``, smooth between."""
    t = ((x - low) / (high - low)).clip(0, 1)
    return t * t * (3 - 2 * t)

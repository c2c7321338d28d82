# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, density and coverage: which images lie among those of the other set, by nearest neighbours.

A ball around each image of a set reaches to its k-th nearest neighbour in the same set; together they cover where the
set lies. Precision and recall after Kynkaanniemi et al. 2019, density and coverage after Naeem et al. 2020, whose
package also fixed that a point on the edge of a ball is outside. The intervals come from leaving out groups of
patients, as those of the other distances do (see `distribution`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from monai_synth.errors import UserError
from monai_synth.evaluate.distribution import checked_features, common_groups, jackknife_variance, result_of

NUM_NEIGHBOURS = 5
KEYS = ("precision", "recall", "density", "coverage")
RECIPE = (
    f"Euclidean distances of features, balls to the {NUM_NEIGHBOURS}th nearest neighbour of the same set; precision: "
    "share of synthetic images in a ball of a real one; recall: share of real images in a ball of a synthetic one; "
    "density: balls of real images that hold a synthetic one, over what equal sets reach; coverage: share of real "
    "images whose ball holds a synthetic one"
)
_BLOCK = 1 << 24  # distances in memory at once
_EDGE = 1 - 1e-9  # of a squared radius: the neighbour on the edge stays outside whatever the last digits say


def neighbour_results(
    real: np.ndarray,
    synthetic: np.ndarray,
    groups_real: Sequence[Any] | None = None,
    groups_synthetic: Sequence[Any] | None = None,
    *,
    k: int = NUM_NEIGHBOURS,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The four numbers, each with its 95 % interval.

    A set compared with itself has 1 everywhere. Two sets of one distribution have less: compare with what two real
    sets reach.

    Args:
        real: features (n, D).
        synthetic: features (m, D).
        groups_real: patient of each; images of one patient are left out together. Default: each image by itself.
        groups_synthetic: likewise.
        k: which neighbour a ball reaches to.
        seed: of the division into groups.

    Returns:
        Name -> ``{"value", "n": [n, m], "ci", "standard_error", "dimension", "warnings"}``.

    Raises:
        UserError: k below 1, or see `distribution.frechet_distance`.
    """
    if k < 1:
        raise UserError(f"k is {k}; allowed are whole numbers from 1")
    real, synthetic = checked_features(real, synthetic)
    real, synthetic = real - real.mean(0), synthetic - real.mean(0)  # else distances of far points lose digits
    n, m = len(real), len(synthetic)
    if min(n, m) <= k:
        why = f"{k + 1} images or more are needed on each side for the {k}th nearest neighbour"
        empty = {"value": None, "n": [n, m], "ci": None, "standard_error": None, "warnings": [why]}
        return {key: {**empty} for key in KEYS}
    gx, gy = common_groups(groups_real, groups_synthetic, n, m, seed)
    if gx is not None and gy is not None and min(n - np.bincount(gx).max(), m - np.bincount(gy).max()) <= k:
        gx = gy = None
    radii_real, radii_synthetic = _radii(real, k, gx), _radii(synthetic, k, gy)
    counts = _Counts(real, synthetic, radii_real, radii_synthetic, gx, gy)
    value = counts.values(k)
    without = [[], []] if gx is None or gy is None else counts.left_out(k)
    num_groups = len(without[0])
    warnings = []
    if min(n, m) < 20 * k:
        warnings.append(f"few images for {k} neighbours: the balls are wide, so the value says little; use 100 or more")
    results = {}
    for i, key in enumerate(KEYS):
        variance = sum(jackknife_variance(np.asarray([v[i] for v in side])) for side in without)
        result = result_of(float(value[i]), n, m, variance, num_groups)
        if result["ci"]:
            low, high = result["ci"]
            result["ci"] = [max(0.0, low), high if key == "density" else min(1.0, high)]
        results[key] = result | {"dimension": real.shape[1], "warnings": list(warnings)}
    return results


class _Counts:
    """Memberships of balls, for all images and with each group left out, from one pass over the distances."""

    def __init__(
        self,
        real: np.ndarray,
        synthetic: np.ndarray,
        radii_real: np.ndarray,
        radii_synthetic: np.ndarray,
        gx: np.ndarray | None,
        gy: np.ndarray | None,
    ) -> None:
        n, m = len(real), len(synthetic)
        self.gx, self.gy = gx, gy
        num = len(radii_real)  # 1 + groups
        self.balls_of_y = np.zeros((num, m))  # balls of real images that hold each synthetic one; [1 + g]: without g
        self.x_in_ball = np.zeros((num, n), bool)  # in a ball of synthetic images; [1 + g]: without synthetic group g
        self.nearest_of_x = np.full((num, n), np.inf)  # to synthetic images; [1 + g]: without synthetic group g
        self.radii_real = radii_real
        step = max(1, _BLOCK // n)
        for start in range(0, m, step):
            part = slice(start, start + step)
            d = _squared(synthetic[part], real)
            for g in range(num):
                kept_x = slice(None) if not g else gx != g - 1
                self.balls_of_y[g, part] = (d[:, kept_x] < radii_real[g][kept_x]).sum(1)
                rows = d if not g else d[gy[part] != g - 1]
                if len(rows):
                    radii = radii_synthetic[g][part] if not g else radii_synthetic[g][part][gy[part] != g - 1]
                    self.x_in_ball[g] |= (rows < radii[:, None]).any(0)
                    self.nearest_of_x[g] = np.minimum(self.nearest_of_x[g], rows.min(0))

    def values(self, k: int) -> tuple[float, float, float, float]:
        balls = self.balls_of_y[0]
        covered = self.nearest_of_x[0] < self.radii_real[0]
        return (
            float((balls > 0).mean()),
            float(self.x_in_ball[0].mean()),
            float(balls.mean() / k),
            float(covered.mean()),
        )

    def left_out(self, k: int) -> list[list[tuple[float, float, float, float]]]:
        """The numbers without each group of real images, and without each of synthetic ones."""
        without_x, without_y = [], []
        for g in range(1, len(self.balls_of_y)):
            balls, x = self.balls_of_y[g], self.gx != g - 1
            covered = self.nearest_of_x[0][x] < self.radii_real[g][x]
            without_x.append(((balls > 0).mean(), self.x_in_ball[0][x].mean(), balls.mean() / k, covered.mean()))
            balls = self.balls_of_y[0][self.gy != g - 1]
            covered = self.nearest_of_x[g] < self.radii_real[0]
            without_y.append(((balls > 0).mean(), self.x_in_ball[g].mean(), balls.mean() / k, covered.mean()))
        return [without_x, without_y]


def _radii(x: np.ndarray, k: int, groups: np.ndarray | None) -> np.ndarray:
    """Squared distance to the k-th nearest other image, (1 + groups, n); row 1 + g leaves out the images of group g."""
    num = 1 if groups is None else 2 + int(groups.max())
    radii = np.empty((num, len(x)))
    step = max(1, _BLOCK // len(x))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        d = _squared(x[part], x)
        d[np.arange(len(d)), np.arange(start, start + len(d))] = np.inf
        for g in range(num):
            kept = d if not g else d[:, groups != g - 1]
            radii[g, part] = np.partition(kept, k - 1, axis=1)[:, k - 1] * _EDGE
    return radii


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (len(a), len(b))."""
    return ((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * (a @ b.T)).clip(0)

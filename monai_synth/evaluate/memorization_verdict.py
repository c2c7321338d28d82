# SPDX-License-Identifier: Apache-2.0
"""When a resemblance is too close: the statistics of the audit, from what held-out patients show by chance.

A synthetic image is called a near copy where both hold, for one of the scores:

- *by counting*: no larger share of held-out patients than the level resembles the training set as much. With P patients
  the smallest such share is 1 / (P + 1) (a conformal p-value, exact whatever the distribution); where that is above the
  level, an image must resemble more than every held-out image does;
- *by the tail*, it stays significant among all synthetic images (Benjamini and Hochberg at the level), where chances
  below 1 / (P + 1) come from a Gumbel tail, which nearest neighbours follow at the heaviest, fitted to the middle of
  the held-out scores with its scale at the upper 95 % limit; or *by the mark*: it is a copy nearly to the pixel
  (`MARKS`) and far beyond the nearest held-out image.

The first keeps the promise "more than real patients resemble each other"; the second keeps a thousand fresh images from
giving ten alarms at a level of 1 %. Of fewer than `MIN_PATIENTS` held-out patients no tail is fitted, and one fresh
image in P + 1 lies above them all; there only the mark tells copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

MIN_PATIENTS = 20  # with fewer no tail is fitted: of 8 it calls fresh phantoms copies in 2.5 % of audits
# copies of phantoms reach 0.97 of small pictures even when noised and turned, fresh phantoms at most 0.94
MARKS = {"features": 0.97, "ssim": 0.97, "mask": 0.97}
_MARK = 0.999  # of scores whose extractor is not known
_BEYOND = 0.6  # on the scale of arctanh: six scales of the tail that phantoms' nearest neighbours have
_TOP = 1 - 1e-6  # a score of 1 has no finite transform


@dataclass(frozen=True)
class Null:
    """What held-out patients show.

    Attributes:
        scores: of held-out images, -1 to 1, higher for closer.
        weights: of each, equal for each patient, sum 1.
        num_patients: P.
        location: of the Gumbel tail, on the scale of arctanh; None with fewer than 20 patients.
        scale: likewise.
    """

    scores: np.ndarray
    weights: np.ndarray
    num_patients: int
    location: float | None
    scale: float | None


def mark_of(score: str) -> float:
    """What a copy nearly to the pixel exceeds by the score of this name."""
    return MARKS.get(score, _MARK)


def fit_null(scores: np.ndarray, patients: Sequence[str]) -> Null:
    """The null distribution of one score.

    Args:
        scores: of held-out images; NaN is left out.
        patients: of each.
    """
    there = np.isfinite(scores)
    scores, names = np.asarray(scores, np.float64)[there], np.asarray(patients, dtype=str)[there]
    _, number, count = np.unique(names, return_inverse=True, return_counts=True)
    num = len(count)
    weights = 1 / (count[number] * max(1, num))
    if num < MIN_PATIENTS:
        return Null(scores, weights, num, None, None)
    middle, high = (_quantile(transformed(scores), weights, q) for q in (0.5, 0.9))
    # Gumbel: the median is location + 0.3665 scale, the 90 % quantile location + 2.2504 scale
    inflation = 1 + 2.4 / np.sqrt(num)
    scale = max((high - middle) / 1.8839, 0.01) * inflation
    return Null(scores, weights, num, middle - 0.3665 * scale / inflation, scale)


def transformed(scores: np.ndarray) -> np.ndarray:
    """Fisher's transform, on which cosines and SSIM near 1 are not squeezed."""
    return np.arctanh(np.clip(scores, -_TOP, _TOP))


def counting_p(scores: np.ndarray, null: Null) -> np.ndarray:
    """Conformal p-values by patient: (1 + sum over patients of the share of their images at or above) / (P + 1).

    Valid for an image of a new patient, whatever the distribution; NaN gives 1.
    """
    order = np.argsort(null.scores)
    above = np.concatenate([np.cumsum(null.weights[order][::-1])[::-1], [0.0]])
    share = above[np.searchsorted(null.scores[order], np.nan_to_num(scores, nan=-2.0), side="left")]
    return np.minimum(1.0, (1 + null.num_patients * share) / (null.num_patients + 1))


def tail_p(scores: np.ndarray, null: Null) -> np.ndarray:
    """p-values of the fitted tail; those of counting where there is no fit."""
    if null.location is None or null.scale is None:
        return counting_p(scores, null)
    z = transformed(np.nan_to_num(scores, nan=-1.0))
    return -np.expm1(-np.exp(-np.clip((z - null.location) / null.scale, -30, 700)))


def judge(scores: np.ndarray, null: Null, level: float, *, mark: float = _MARK) -> tuple[np.ndarray, dict[str, Any]]:
    """Near copies by one score.

    Args:
        scores: of synthetic images; NaN is never one.
        null: of the same score.
        level: share of false alarms that is allowed.
        mark: see `mark_of`.

    Returns:
        bool (N,), and ``{"level", "supported_level", "threshold", "num_patients", "has_tail", "held_out_median",
        "held_out_max", "held_out_above"}``; the last counts held-out images that the same threshold would flag.
    """
    count, tail = counting_p(scores, null), tail_p(scores, null)
    supported = max(level, 1 / (null.num_patients + 1))
    by_mark = max(mark, float(np.tanh(transformed(null.scores.max()) + _BEYOND)))
    significant, cut = scores > by_mark, 0.0
    if null.location is not None:
        ordered = np.sort(tail)
        passing = np.flatnonzero(ordered <= level * (np.arange(len(tail)) + 1) / len(tail))
        cut = level * (passing[-1] + 1 if len(passing) else 1) / len(tail)
        significant |= tail <= cut
    flagged = significant & (count <= supported + 1e-12) & np.isfinite(scores)
    threshold = max(_upper(null, supported), min(by_mark, _tail_score(null, cut)))
    return flagged, {
        "level": level,
        "supported_level": supported,
        "threshold": threshold,
        "num_patients": null.num_patients,
        "has_tail": null.location is not None,
        "held_out_median": _quantile(null.scores, null.weights, 0.5),
        "held_out_max": float(null.scores.max()),
        "held_out_above": int((null.scores > threshold).sum()),
    }


def _tail_score(null: Null, p: float) -> float:
    """Score of a chance p by the tail; infinite without one."""
    if null.location is None or null.scale is None:
        return float("inf")
    return float(np.tanh(null.location - null.scale * np.log(-np.log1p(-min(p, 1 - 1e-12)))))


def _upper(null: Null, level: float) -> float:
    """The smallest held-out score above which counting gives at most the level."""
    values = np.unique(null.scores)
    p = counting_p(np.nextafter(values, 2), null)
    return float(values[np.flatnonzero(p <= level + 1e-12)[0]])


def suspicious_held_out(null: Null, level: float) -> int:
    """Held-out images that the tail of the others calls copies: patients, scans or videos in both sets."""
    if null.location is None:
        return 0
    return int((np.sort(tail_p(null.scores, null)) <= level / len(null.scores)).sum())


def rate(flagged: np.ndarray) -> dict[str, Any]:
    """Share of near copies with its exact 95 % interval (Clopper and Pearson)."""
    k, n = int(flagged.sum()), len(flagged)
    interval = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    return {"value": k / n, "count": k, "n": n, "ci": [float(interval.low), float(interval.high)]}


def membership(
    training: np.ndarray,
    held_out: np.ndarray,
    patients: tuple[Sequence[str], Sequence[str]],
    *,
    seed: int,
    num_bootstrap: int = 1000,
) -> dict[str, Any]:
    """How well resemblance to the nearest synthetic image tells training images from held-out ones.

    Args:
        training: resemblance of training images to their nearest synthetic one.
        held_out: likewise.
        patients: of both; they are drawn whole.
        seed: of the bootstrap.
        num_bootstrap: draws for the interval.

    Returns:
        ``{"value", "n", "ci", "num_patients"}``: area under the curve, 0.5 where nothing leaks, 1 where every training
        image can be told.
    """
    groups = [np.unique(np.asarray(p, dtype=str), return_inverse=True)[1] for p in patients]
    sides = [np.asarray(training), np.asarray(held_out)]
    values, rank = np.unique(np.concatenate(sides), return_inverse=True)
    ranks = [rank[: len(sides[0])], rank[len(sides[0]) :]]

    def area(weights: Sequence[np.ndarray]) -> float:
        mass = [np.bincount(r, weights=w, minlength=len(values)) / w.sum() for r, w in zip(ranks, weights, strict=True)]
        return float((mass[0] * (np.cumsum(mass[1]) - mass[1] / 2)).sum())

    rng = np.random.default_rng([seed, 7])
    draws = []
    for _ in range(num_bootstrap):
        weights = []
        for group in groups:
            num = int(group.max()) + 1
            weights.append(np.bincount(rng.integers(0, num, num), minlength=num)[group].astype(float))
        draws.append(area(weights))
    few = min(int(g.max()) + 1 for g in groups) < 5
    return {
        "value": area([np.ones(len(s)) for s in sides]),
        "n": [len(s) for s in sides],
        "ci": None if few else [float(q) for q in np.quantile(draws, (0.025, 0.975))],
        "num_patients": [int(g.max()) + 1 for g in groups],
    }


def _quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    order = np.argsort(values)
    position = np.cumsum(weights[order]) - weights[order] / 2
    return float(np.interp(q * weights.sum(), position, values[order]))

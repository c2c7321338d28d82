# SPDX-License-Identifier: Apache-2.0
"""Distances of two sets of feature vectors, with the interval that each deserves: Frechet and kernel distance.

Both intervals come from leaving out groups of images (delete-a-group jackknife). A bootstrap would be wrong here:
a resample holds only about 63 % distinct images, so its covariance has a lower rank and its Frechet distance lies
above the value itself, often outside of its own interval; equal images likewise break the unbiased kernel estimate,
which leaves out an image's similarity to itself but not that to its copies. Leaving out a twentieth keeps all images
distinct and changes the bias by a twentieth only, and that change is the same for all twenty and cancels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from monai_synth.errors import UserError

NUM_GROUPS = 20
MIN_GROUPS = 5  # with fewer, a spread says nothing
_BLOCK = 1024  # rows of a kernel matrix at once


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """|m - m_w|^2 + Tr(C + C_w - 2 (C C_w)^(1/2)) of two sets (X-ray text, Sec 4.2), the squared distance.

    With C = A^T A and C_w = B^T B for centred and scaled features, the eigenvalues of C C_w are the squared singular
    values of A B^T, so Tr (C C_w)^(1/2) is the sum of the latter. No root of a singular product is taken: it is exact
    for fewer images than features, never complex, and needs no epsilon on the diagonal. C has n - 1 in the
    denominator, as pytorch-fid's.

    Args:
        x: features (n, D).
        y: features (m, D).

    Returns:
        0 or more. It is biased upwards for finite n and m.

    Raises:
        UserError: fewer than 2 vectors, other lengths, or values that are not finite.
    """
    x, y = checked_features(x, y)
    a, b = _factor(x), _factor(y)
    return _frechet(x, y, a, b, np.linalg.svd(a @ b.T, compute_uv=False).sum())


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018).

    Args:
        x: features (n, D).
        y: features (m, D).

    Returns:
        Near 0 for sets of one distribution, where it is as often negative as positive.

    Raises:
        UserError: see `frechet_distance`.
    """
    x, y = checked_features(x, y)
    sums = _group_sums(x, y, np.zeros(len(x), int), np.zeros(len(y), int))
    return _unbiased(*(s.sum() for s in sums), len(x), len(y))


def frechet_result(
    x: np.ndarray,
    y: np.ndarray,
    groups_x: Sequence[Any] | None = None,
    groups_y: Sequence[Any] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """`frechet_distance` with its 95 % interval and a warning where n is too small.

    The interval tells how far the value would move with other images, as many and of the same kind. It does not
    reach down to the distance that infinitely many images would have.

    Args:
        x: features (n, D).
        y: features (m, D).
        groups_x: patient of each; images of one patient are left out together. Default: each image by itself.
        groups_y: likewise.
        seed: of the division into groups.

    Returns:
        ``{"value", "n": [n, m], "ci", "standard_error", "dimension", "warnings"}``; ci and standard_error are None
        with fewer than 5 patients on a side.
    """
    x, y = checked_features(x, y)
    value = frechet_distance(x, y)
    gx, gy = common_groups(groups_x, groups_y, len(x), len(y), seed)
    left_out = [] if gx is None else [_quick_frechet(x[gx != g], y[gy != g]) for g in range(gx.max() + 1)]
    # Both sides lose a group at a time: the two parts of the variance add up, in half the evaluations.
    smaller, dimension = min(len(x), len(y)), x.shape[1]
    warnings = []
    if smaller < dimension:
        warnings.append(
            f"fewer images than the {dimension} features: the covariance is rank-deficient and the value is biased "
            "upwards; compare only values with equal n, and read the kernel distance, which has no such bias"
        )
    return result_of(value, len(x), len(y), jackknife_variance(np.asarray(left_out)), len(left_out)) | {
        "dimension": dimension,
        "warnings": warnings,
    }


def kernel_result(
    x: np.ndarray,
    y: np.ndarray,
    groups_x: Sequence[Any] | None = None,
    groups_y: Sequence[Any] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """`kernel_distance` of all images with standard error and 95 % interval.

    The usual "mean and deviation over 100 subsets of 1000" is no standard error: it grows smaller the more the
    subsets overlap, and is 0 for sets of 1000. Here groups of images are left out instead, on each side by itself.

    Args:
        x: features (n, D).
        y: features (m, D).
        groups_x: see `frechet_result`.
        groups_y: likewise.
        seed: of the division into groups.

    Returns:
        See `frechet_result`.
    """
    x, y = checked_features(x, y)
    gx, gy = common_groups(groups_x, groups_y, len(x), len(y), seed)
    if gx is None or gy is None:
        return result_of(kernel_distance(x, y), len(x), len(y), 0.0, 0) | {"dimension": x.shape[1], "warnings": []}
    xx, yy, xy = _group_sums(x, y, gx, gy)
    sizes_x, sizes_y = np.bincount(gx), np.bincount(gy)
    total = xx.sum(), yy.sum(), xy.sum()
    without_x = [
        _unbiased(total[0] - 2 * xx[g].sum() + xx[g, g], total[1], total[2] - xy[g].sum(), len(x) - s, len(y))
        for g, s in enumerate(sizes_x)
    ]
    without_y = [
        _unbiased(total[0], total[1] - 2 * yy[g].sum() + yy[g, g], total[2] - xy[:, g].sum(), len(x), len(y) - s)
        for g, s in enumerate(sizes_y)
    ]
    variance = jackknife_variance(np.asarray(without_x)) + jackknife_variance(np.asarray(without_y))
    return result_of(_unbiased(*total, len(x), len(y)), len(x), len(y), variance, len(sizes_x)) | {
        "dimension": x.shape[1],
        "warnings": [],
    }


def grouped_result(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    x: np.ndarray,
    y: np.ndarray,
    groups_x: Sequence[Any] | None = None,
    groups_y: Sequence[Any] | None = None,
    *,
    seed: int = 0,
    least: float | None = None,
) -> dict[str, Any]:
    """Any statistic of two sets of rows with the interval of this module.

    Args:
        statistic: of the rows of both sets.
        x: a row for each image (or object) of the first set.
        y: of the second.
        groups_x: patient of each row; rows of one patient are left out together.
        groups_y: likewise.
        seed: of the division into groups.
        least: the statistic is never below; the interval is cut there.

    Returns:
        ``{"value", "n": [n, m], "ci", "standard_error", "warnings"}``; value None where a side has no row.
    """
    if not (len(x) and len(y)):
        why = "a side has nothing to measure"
        return {"value": None, "n": [len(x), len(y)], "ci": None, "standard_error": None, "warnings": [why]}
    gx, gy = common_groups(groups_x, groups_y, len(x), len(y), seed)
    without = [[], []]
    if gx is not None and gy is not None:
        groups = range(gx.max() + 1)
        without = [[statistic(x[gx != g], y) for g in groups], [statistic(x, y[gy != g]) for g in groups]]
    variance = sum(jackknife_variance(np.asarray(side)) for side in without)
    result = result_of(float(statistic(x, y)), len(x), len(y), variance, len(without[0]))
    if result["ci"] and least is not None:
        result["ci"] = [max(least, edge) for edge in result["ci"]]
    return result | {"warnings": []}


def checked_features(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets in double precision.

    Raises:
        UserError: see `frechet_distance`.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        msg = f"features of shapes {x.shape} and {y.shape}; needed are (n, D) and (m, D) with 2 images or more each"
        raise UserError(msg)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError("features hold NaN or infinity; the extractor's weights are damaged, give other ones")
    return x, y


def _frechet(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, common: float) -> float:
    difference = x.mean(0) - y.mean(0)
    return max(0.0, float(difference @ difference + (a * a).sum() + (b * b).sum() - 2 * common))


def _quick_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """`frechet_distance` to about seven digits, enough for a spread, in a fraction of the time for many images."""
    a, b = _quick_factor(x), _quick_factor(y)
    common = a @ b.T if len(a) <= len(b) else b @ a.T
    return _frechet(x, y, a, b, np.sqrt(np.linalg.eigvalsh(common @ common.T).clip(0)).sum())


def _quick_factor(x: np.ndarray) -> np.ndarray:
    if len(x) > x.shape[1]:
        centred = x - x.mean(0)
        with contextlib.suppress(np.linalg.LinAlgError):  # singular: features that never vary, as after a ReLU
            return np.linalg.cholesky(centred.T @ centred / (len(x) - 1)).T
    return _factor(x)


def _factor(x: np.ndarray) -> np.ndarray:
    """A (min(n, D), D) with A^T A the covariance of x (n, D)."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    return centred if len(x) <= x.shape[1] else np.linalg.qr(centred, mode="r")


def _group_sums(
    x: np.ndarray, y: np.ndarray, gx: np.ndarray, gy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of the kernel by group: within x and within y without the diagonal, and between them; each (G, G)."""

    def sums(a: np.ndarray, b: np.ndarray, ga: np.ndarray, gb: np.ndarray) -> np.ndarray:
        one_hot_b = np.eye(gb.max() + 1)[gb]
        out = np.zeros((ga.max() + 1, gb.max() + 1))
        for i in range(0, len(a), _BLOCK):
            rows = ((a[i : i + _BLOCK] @ b.T) / a.shape[1] + 1) ** 3 @ one_hot_b
            np.add.at(out, ga[i : i + _BLOCK], rows)
        return out

    def within(a: np.ndarray, ga: np.ndarray) -> np.ndarray:
        own = ((a * a).sum(1) / a.shape[1] + 1) ** 3
        return sums(a, a, ga, ga) - np.diag(np.bincount(ga, weights=own, minlength=ga.max() + 1))

    return within(x, gx), within(y, gy), sums(x, y, gx, gy)


def _unbiased(xx: float, yy: float, xy: float, n: int, m: int) -> float:
    return float(xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m))


def common_groups(
    groups_x: Sequence[Any] | None, groups_y: Sequence[Any] | None, n: int, m: int, seed: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """A group of equally many patients for each image, as many groups on both sides; None where they are too few."""
    patients = []
    for groups, num in ((groups_x, n), (groups_y, m)):
        names = np.arange(num) if groups is None else np.asarray([str(g) for g in groups])
        if len(names) != num:
            raise UserError(f"{len(names)} groups for {num} images; give one group per image")
        patients.append(np.unique(names, return_inverse=True)[1])
    num_groups = min(NUM_GROUPS, *(int(p.max()) + 1 for p in patients))
    if num_groups < MIN_GROUPS or min(n, m) < 2 * num_groups:
        num_groups = min(num_groups, min(n, m) // 2)
    if num_groups < MIN_GROUPS:
        return None, None
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.arange(p.max() + 1) % num_groups)[p] for p in patients]
    if any(np.bincount(g).max() > len(g) - 2 for g in shuffled):  # one patient has nearly all images
        return None, None
    return shuffled[0], shuffled[1]


def jackknife_variance(left_out: np.ndarray) -> float:
    """Of the statistic, from its values with each of G groups left out."""
    if not len(left_out):
        return 0.0
    num = len(left_out)
    return float((num - 1) / num * ((left_out - left_out.mean()) ** 2).sum())


def result_of(value: float, n: int, m: int, variance: float, num_groups: int) -> dict[str, Any]:
    """A value with its 95 % interval from the variance of a jackknife with so many groups; 0 groups give none."""
    result: dict[str, Any] = {"value": value, "n": [n, m], "ci": None, "standard_error": None}
    if num_groups:
        error = float(np.sqrt(variance))
        reach = float(stats.t.ppf(0.975, num_groups - 1)) * error
        result |= {"ci": [value - reach, value + reach], "standard_error": error}
    return result

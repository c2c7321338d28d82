# SPDX-License-Identifier: Apache-2.0
"""Dice and IoU of segmentations: per image as nnU-Net's ``foreground_mean``, and pooled over all pixels.

The text's Eq. 4.1 and 4.2 read as pooled scores, but its numbers fit means over images [J-22], so both are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RECIPE = (
    "mDice and mIoU: mean over test images for each label, then over labels, then over runs (folds and seeds); an "
    "image is left out of a label that neither its truth nor its prediction has (nnU-Net's foreground_mean). Pooled: "
    "pixels of all test images counted together. Interval: 95 % percentile bootstrap over patients of the test set, "
    "the same draws for every row; a difference is taken on the same images."
)
METRICS = ("mDice", "mIoU", "pooled Dice", "pooled IoU")


def confusion(truth: np.ndarray, found: np.ndarray, num_labels: int) -> np.ndarray:
    """Pixels per foreground label that are right, wrongly found and missed: int (num_labels - 1, 3).

    Args:
        truth: label map (*S).
        found: predicted label map (*S).
        num_labels: with the background.
    """
    both = np.bincount(
        truth.astype(np.int64).ravel() * num_labels + found.astype(np.int64).ravel(), minlength=num_labels**2
    ).reshape(num_labels, num_labels)
    right = np.diag(both)
    return np.stack([right, both.sum(0) - right, both.sum(1) - right], axis=1)[1:]


def resize_nearest(label: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Label map (*S) -> (*size): each new pixel takes the label of the old pixel that holds its centre."""
    for axis, new in enumerate(size):
        old = label.shape[axis]
        if new != old:
            label = label.take((2 * np.arange(new) + 1) * old // (2 * new), axis=axis)
    return label


def score(counts: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The four scores of ``METRICS``, mean over runs.

    Args:
        counts: int (runs, images, labels, 3) of `confusion`.
        weights: how often each image counts, (draws, images). Default: each once.

    Returns:
        (draws, 4); NaN where no image of a draw has any label.
    """
    tp, fp, fn = np.moveaxis(counts.astype(float), -1, 0)
    weights = np.ones((1, counts.shape[1])) if weights is None else weights.astype(float)
    total = tp + fp + fn
    seen = total > 0
    per_image = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for values in (2 * tp / (tp + total), tp / total):
            sums = np.einsum("di,ril->drl", weights, np.where(seen, values, 0.0))
            per_image.append(sums / np.einsum("di,ril->drl", weights, seen.astype(float)))
        tp, total = (np.einsum("di,ril->drl", weights, x) for x in (tp, total))
        pooled = [2 * tp / (tp + total), tp / total]
    return np.stack([_mean_of_known(_mean_of_known(x)) for x in (*per_image, *pooled)], axis=-1)


def draws(groups: Sequence[str], num_bootstrap: int, seed: int) -> np.ndarray | None:
    """How often each image counts in each bootstrap draw of whole groups: int (draws, images).

    Returns:
        None with one group only, of which no interval can be had.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    num_groups = int(index.max()) + 1
    if num_groups < 2:
        return None
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_bootstrap)[:, index]


def numbers(
    counts: np.ndarray, *, weights: np.ndarray | None, minus: np.ndarray | None = None
) -> dict[str, dict[str, Any]]:
    """Value and interval of each metric, or of its difference to another row on the same images.

    Args:
        counts: see `score`.
        weights: see `draws`.
        minus: counts of the row to take off.

    Returns:
        ``{metric: {"value", "n", "ci"}}``; None where there is no number.
    """
    value, drawn = score(counts)[0], None if weights is None else score(counts, weights)
    if minus is not None:
        value = value - score(minus)[0]
        drawn = None if drawn is None else drawn - score(minus, weights)
    result = {}
    for k, metric in enumerate(METRICS):
        interval = None
        if drawn is not None and np.isfinite(drawn[:, k]).any():
            interval = [float(edge) for edge in np.nanpercentile(drawn[:, k], (2.5, 97.5))]
        result[metric] = {
            "value": float(value[k]) if np.isfinite(value[k]) else None,
            "n": counts.shape[1],
            "ci": interval,
        }
    return result


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without NaN; NaN where all are."""
    known = np.isfinite(values)
    return np.divide(
        np.where(known, values, 0.0).sum(-1),
        known.sum(-1),
        out=np.full(values.shape[:-1], np.nan),
        where=known.any(-1),
    )

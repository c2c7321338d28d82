# SPDX-License-Identifier: Apache-2.0
"""Scores of classifiers from their probabilities, per seed and with intervals over the test patients.

Each score is that of scikit-learn with ``sample_weight`` (the tests compare them), computed for all draws of the
bootstrap at once, which scikit-learn would take hours for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RECIPE = (
    "Each score is computed for each seed, then averaged over seeds; sd is the standard deviation over seeds. P, R and "
    "F1 are macro averages, as the numbers of the text are; a class that was never found has precision 0. AUROC of "
    "more than two classes: mean over classes, each against the rest. Interval: 95 % percentile bootstrap over the "
    "patients of the test set, all seeds together, the same draws for every row; it does not tell what other seeds "
    "would give. A difference counts as one where that interval and the one over patients and seeds (ci_seeds) leave "
    "out 0. Differences are taken between classifiers of the same seeds on the same images. The epoch is the one "
    "of highest validation accuracy (of equals the one of lowest validation loss), applied in evaluation mode."
)


def metric_names(classes: Sequence[str], positive: int | None) -> list[str]:
    """Names of what `score` gives, in its order."""
    names = ["accuracy", *(f"accuracy ({name})" for name in classes), "precision", "recall", "f1", "auroc"]
    if positive is not None:
        names += [f"{name} ({classes[positive]})" for name in ("precision", "recall", "f1")]
    return names


def confusion(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """How often each class (rows) was taken for each (columns), (draws, K, K).

    Args:
        truth: int (N,).
        probabilities: (N, K); the largest counts.
        weights: how often each image counts, (draws, N). Default: each once.
    """
    num = probabilities.shape[1]
    weights = np.ones((1, len(truth))) if weights is None else weights.astype(float)
    cells = np.eye(num * num)[truth * num + probabilities.argmax(1)]
    return (weights @ cells).reshape(-1, num, num)


def auroc(truth: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Area under the curve of one class against the rest, (draws,); NaN where one side is empty.

    Args:
        truth: bool (N,).
        scores: (N,); equal ones count half.
        weights: see `confusion`.
    """
    weights = np.ones((1, len(truth))) if weights is None else weights.astype(float)
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where a group of equal scores begins
    positive = np.add.reduceat(weights[:, order] * truth[order], first, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~truth[order], first, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def score(
    truth: np.ndarray, probabilities: np.ndarray, positive: int | None = None, weights: np.ndarray | None = None
) -> np.ndarray:
    """Scores of one classifier, (draws, metrics) as `metric_names` lists them; NaN where one is undefined.

    Args:
        truth: int (N,).
        probabilities: (N, K).
        positive: class of the binary scores; None leaves them out.
        weights: see `confusion`.
    """
    counts = confusion(truth, probabilities, weights)
    right, there, found = np.diagonal(counts, axis1=1, axis2=2), counts.sum(2), counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall = right / there
        precision = np.where(found > 0, right / found, 0.0)
        f1 = 2 * right / (there + found)
        accuracy = right.sum(1) / counts.sum((1, 2))
    num = probabilities.shape[1]
    areas = [auroc(truth == k, probabilities[:, k], weights) for k in range(num)]
    area = areas[1] if num == 2 else np.mean(areas, axis=0)
    # A class that a draw leaves out counts for nothing, as in scikit-learn.
    known = (there > 0) | (found > 0)
    macro = [_mean(x, known) for x in (precision, np.where(there > 0, recall, 0.0), f1)]
    parts = [accuracy, *recall.T, *macro, area]
    if positive is not None:
        parts += [x[:, positive] for x in (precision, recall, f1)]
    return np.stack(parts, axis=-1)


def numbers(
    names: Sequence[str], values: np.ndarray, drawn: np.ndarray | None, num_images: int
) -> dict[str, dict[str, Any]]:
    """What is told of each metric, from its scores or from their differences.

    Args:
        names: of the metrics.
        values: (seeds, metrics).
        drawn: the same for each draw of test patients, (seeds, draws, metrics); None without interval.
        num_images: of the test set.

    Returns:
        ``{metric: {"value", "sd", "n", "num_seeds", "ci", "ci_seeds"}}``: mean and standard deviation over seeds, the
        interval over test patients, and the one over both, whose draws take other seeds too; None where there is none.
    """
    num_seeds = len(values)
    means = {"ci": None if drawn is None else drawn.mean(0), "ci_seeds": None}
    if drawn is not None and num_seeds > 1:
        chosen = np.random.default_rng(0).integers(num_seeds, size=(drawn.shape[1], num_seeds))
        means["ci_seeds"] = drawn[chosen, np.arange(drawn.shape[1])[:, None]].mean(1)
    result = {}
    for k, name in enumerate(names):
        column = values[:, k]
        defined = bool(np.isfinite(column).all())
        result[name] = {
            "value": float(column.mean()) if defined else None,
            "sd": float(column.std(ddof=1)) if defined and num_seeds > 1 else None,
            "n": num_images,
            "num_seeds": num_seeds,
        }
        for key, mean in means.items():
            known = mean is not None and np.isfinite(mean[:, k]).any()
            result[name][key] = [float(edge) for edge in np.nanpercentile(mean[:, k], (2.5, 97.5))] if known else None
    return result


def _mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, values, 0.0).sum(1) / known.sum(1)

# SPDX-License-Identifier: Apache-2.0
"""The numbers of the expert experiment: what is sampled is judged and compared, arm by arm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.experiments import expert_scores as scores
from monai_synth.experiments.expert_real import RealImages
from monai_synth.experiments.expert_sampling import (
    FILTER_REACH,
    MOST_ATTEMPTS,
    Plan,
    Samples,
    load_samples,
    samples_path,
)
from monai_synth.experiments.expert_source import REAL, Judge, Model

_TOLD_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how it is told.

    Attributes:
        out: folder of the experiment.
        arms: models by arm.
        baseline: the arm that others are compared with.
        judges: one expert or two.
        classes: name -> number, all of the models'.
        left: those that the experts choose from.
        plan: what was sampled.
        num_seeds: that were asked for.
        real: real images.
        num_bootstrap: draws for the intervals.
        show_real: put real images into the page.
        device: where experts compute.
        settings: to print.
    """

    out: Path
    arms: Mapping[str, Sequence[Model]]
    baseline: str
    judges: Sequence[Judge]
    classes: Mapping[str, int]
    left: Mapping[str, int]
    plan: Plan
    num_seeds: int
    real: RealImages
    num_bootstrap: int
    show_real: bool
    device: str
    settings: Mapping[str, Any]


class Done:
    """The samples that are there."""

    def __init__(self, given: Comparison) -> None:
        self.given = given

    def seeds(self, *arms: str) -> list[int]:
        """Seeds that all trainings of the arms have."""
        models = [model for arm in arms for model in self.given.arms[arm]]
        paths = ([samples_path(self.given.out, m, seed) for m in models] for seed in range(self.given.num_seeds))
        return [seed for seed, each in enumerate(paths) if all(path.is_file() for path in each)]

    def samples(self, model: Model, seed: int) -> Samples:
        """Images of a model and a seed."""
        return load_samples(samples_path(self.given.out, model, seed))


def same_models(arms: Mapping[str, Sequence[Model]]) -> list[list[str]]:
    """Pairs of arms that have a model in common."""
    names = list(arms)
    hashes = {arm: {model.sha256 for model in models} for arm, models in arms.items()}
    return [[a, b] for i, a in enumerate(names) for b in names[i + 1 :] if hashes[a] & hashes[b]]


def judged(
    given: Comparison, done: Done, judge: Judge, bootstrap: scores.Bootstrap, report: Callable[[str], None]
) -> dict[str, Any]:
    """What one expert says of all arms and of real test images."""
    opinions = scores.Opinions(judge, given.out / "logits", given.device)
    columns, sampled = list(given.left.values()), list(given.plan.classes.values())
    n = given.plan.per_class
    # (T, S, K', Kc) of each arm, and where in them the right answers are
    counts: dict[str, np.ndarray] = {}
    told_at = time.monotonic()
    for arm, models in given.arms.items():
        seeds = done.seeds(arm)
        found = np.zeros((len(models), len(seeds), len(sampled), len(columns)), np.int64)
        for t, model in enumerate(models):
            for s, seed in enumerate(seeds):
                samples = done.samples(model, seed)
                images = samples.images.reshape(-1, *samples.images.shape[2:])
                logits = opinions(images, f"{model.folder}/seed_{seed}", samples.digest)
                found[t, s] = scores.confusion(np.repeat(samples.classes, n), logits, columns)[sampled]
                if time.monotonic() - told_at > _TOLD_EVERY:
                    told_at = time.monotonic()
                    report(f"    {judge.name}: {model.folder}, {s + 1} of {len(seeds)} seeds")
        counts[arm] = found
    names = list(given.plan.classes)
    right = [columns.index(k) for k in sampled]

    def told(arm: str, minus: str | None = None) -> dict[str, Any]:
        seeds = done.seeds(arm) if minus is None else done.seeds(arm, minus)
        share = _of_seeds(counts[arm], done.seeds(arm), seeds) / n
        if minus is not None:
            share = share - _of_seeds(counts[minus], done.seeds(minus), seeds) / n
        recall = share[:, :, np.arange(len(right)), right]
        number = n * share.shape[0] * share.shape[1]  # of each class
        accuracy = bootstrap.numbers(recall.mean(2, keepdims=True), number * len(names))[0]
        accuracy["per_seed"] = {
            str(seed): [float(value) for value in recall[:, s].mean(1)] for s, seed in enumerate(seeds)
        }
        if minus is not None:
            accuracy["wilcoxon"] = scores.signed_rank(recall.mean((0, 2)))
        called = bootstrap.table(share.mean(2), number * len(names), list(given.left))
        shares = bootstrap.numbers(share.reshape(*share.shape[:2], -1), number)
        taken = {
            name: dict(zip(given.left, shares[i * len(columns) : (i + 1) * len(columns)], strict=True))
            for i, name in enumerate(names)
        }
        return {
            "accuracy": accuracy,
            "recall": bootstrap.table(recall, number, names),
            "called": called,
            "taken_for": taken,
        }

    arms: dict[str, Any] = {}
    for arm, found in counts.items():
        if not found.shape[1]:
            continue
        pooled = found.sum((0, 1))
        wrong = [scores.most_frequent_wrong(row, column) for row, column in zip(pooled, right, strict=True)]
        arms[arm] = {
            **told(arm),
            "confusion": pooled.tolist(),
            "most_taken_for": {
                name: None if column is None else list(given.left)[column]
                for name, column in zip(names, wrong, strict=True)
            },
            "steered": judge.steered(given.arms[arm]),
            "difference": None,
        }
        if arm != given.baseline and done.seeds(arm, given.baseline):
            arms[arm]["difference"] = {"minus": given.baseline, **told(arm, given.baseline)}
    return {
        "name": judge.name,
        "file": f"{judge.path.parent.name}/{judge.path.name}",
        "sha256": judge.sha256,
        "backbone": judge.arch.get("args", {}).get("backbone"),
        "image_size": list(judge.image_size),
        "val_accuracy": judge.contract.get("val_accuracy"),
        "same_dataset": None if judge.fingerprint is None else judge.fingerprint == given.real.dataset.fingerprint,
        "arms": arms,
        "real": _real(given, judge, opinions),
    }


def _real(given: Comparison, judge: Judge, opinions: scores.Opinions) -> dict[str, Any]:
    """What the expert says of held-out real images: at the models' size, as generated ones are, and at its own."""
    found: dict[str, Any] = {}
    for key, size in (("as_generated", given.real.image_size), ("own_size", judge.image_size)):
        if key == "own_size" and size == given.real.image_size:
            continue
        images, truth = given.real.test(size)
        logits = opinions(images, f"real_test_{key}")
        everything = scores.confusion(truth, logits, list(given.classes.values()))
        among = scores.confusion(truth, logits, list(given.left.values()))[list(given.left.values())]
        found[key] = {
            "n": int(everything.sum()),
            "accuracy": float(np.trace(everything) / everything.sum()),
            "n_left": int(among.sum()),
            "accuracy_left": float(np.trace(among) / among.sum()) if among.sum() else None,
            "recall_left": {
                name: float(row[i] / row.sum()) if row.sum() else None
                for i, (name, row) in enumerate(zip(given.left, among, strict=True))
            },
            "confusion": everything.tolist(),
        }
    return found


def _of_seeds(values: np.ndarray, there: Sequence[int], wanted: Sequence[int]) -> np.ndarray:
    """(T, S, ...) of some of the seeds."""
    return values[:, [list(there).index(seed) for seed in wanted]]


def similarity(given: Comparison, done: Done, bootstrap: scores.Bootstrap) -> dict[str, Any]:
    """Mean SSIM of pairs for each arm and for real training images, by class and over all."""
    names, n = list(given.plan.classes), given.plan.per_class
    values = {
        arm: np.array([[_pairs(done.samples(m, seed).images) for seed in done.seeds(arm)] for m in models])
        for arm, models in given.arms.items()
        if done.seeds(arm)
    }

    def told(array: np.ndarray, pairs: int) -> dict[str, Any]:
        number = pairs * array.shape[0] * array.shape[1]
        return {
            "mean": bootstrap.numbers(array.mean(2, keepdims=True), number * len(names))[0],
            "classes": bootstrap.table(array, number, names),
        }

    result: dict[str, Any] = {}
    each = n * (n - 1) // 2
    for arm, array in values.items():
        result[arm] = {**told(array, each), "difference": None}
        if arm != given.baseline and (seeds := done.seeds(arm, given.baseline)):
            less = _of_seeds(array, done.seeds(arm), seeds)
            less = less - _of_seeds(values[given.baseline], done.seeds(given.baseline), seeds)
            result[arm]["difference"] = {"minus": given.baseline, **told(less, each)}
            result[arm]["difference"]["mean"]["wilcoxon"] = scores.signed_rank(less.mean((0, 2)))
    seeds = sorted({seed for arm in values for seed in done.seeds(arm)})
    if seeds:
        drawn = [[given.real.drawn(seed, name, n) for name in names] for seed in seeds]
        array = np.array([[[scores.mean_similarity(images) for images in row] for row in drawn]])
        counts = [len(images) for images in drawn[0]]
        result[REAL] = {**told(array, each), "difference": None, "num_images": dict(zip(names, counts, strict=True))}
        for i, name in enumerate(names):  # rare classes have fewer pairs
            result[REAL]["classes"][name]["n"] = counts[i] * (counts[i] - 1) // 2 * len(seeds)
        result[REAL]["mean"]["n"] = sum(number["n"] for number in result[REAL]["classes"].values())
    return result


def _pairs(images: np.ndarray) -> list[float]:
    return [scores.mean_similarity(of_class) for of_class in images]


def filtered(given: Comparison, done: Done) -> dict[str, Any] | None:
    """What the mean filter did, by arm and class."""
    floors = given.plan.floors
    if floors is None:
        return None
    result: dict[str, Any] = {}
    for arm, models in given.arms.items():
        every = [done.samples(model, seed) for model in models for seed in done.seeds(arm)]
        if not every:
            continue
        attempts, below = (np.stack([getattr(s, key) for s in every]) for key in ("attempts", "below"))
        result[arm] = {
            name: {
                "n": int(attempts[:, k].size),
                "redraws": int((attempts[:, k] - 1).sum()),
                "num_redrawn": int((attempts[:, k] > 1).sum()),
                "kept_below": int(below[:, k].sum()),
            }
            for k, name in enumerate(given.plan.classes)
        }
    return {"reach": FILTER_REACH, "most_attempts": MOST_ATTEMPTS, "lowest_mean": dict(floors), "arms": result}

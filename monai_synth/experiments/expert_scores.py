# SPDX-License-Identifier: Apache-2.0
"""Scores of the expert experiment: what experts take images for, how alike images are, and how sure that is.

Every score is an array (T, S, ...) over trainings and seeds. All arms share the noise of a seed, so their difference is
taken seed by seed, and trainings in the order in which they were given.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from monai_synth.atomic import write_bytes
from monai_synth.checkpoint import load_file, restore_network
from monai_synth.evaluate.similarity import SSIM_RECIPE, ssim
from monai_synth.experiments.expert_source import EXPERT_STAGE, Judge

RECIPE = (
    "Generation accuracy: share of the images of a seed that the expert takes for the class they were made as, its "
    "largest logit among the classes that are left in; mean over trainings and seeds, sd over seeds. Images are "
    "resized to the expert's own size (bilinear with a low-pass filter) and fed in [0, 1]. Interval: 95 % percentile "
    "bootstrap over seeds for these trained models; where an arm has several trainings a second one (ci_trainings) "
    "draws trainings too. All arms start from the same noise, so differences are taken seed by seed. Wilcoxon: signed "
    "rank test of the differences per seed (mean over trainings), two-sided, without equal seeds. Similarity: mean "
    f"SSIM over all pairs of the images of a class and seed, then over seeds and classes. {SSIM_RECIPE}."
)
_JUDGED_TOGETHER = 64  # images
_COUNTED = 16  # seeds up to which ties are counted out: 2^16 signs


class Opinions:
    """The logits of an expert, kept below a folder for the images they are of.

    Args:
        judge: the expert.
        folder: where they are kept.
        device: where to compute.
    """

    def __init__(self, judge: Judge, folder: Path, device: str) -> None:
        self.judge, self.folder, self.device = judge, folder / judge.sha256[:16], device
        self._network: nn.Module | None = None

    def __call__(self, images: np.ndarray, name: str, digest: str | None = None) -> np.ndarray:
        """Logits (N, K) of uint8 images (N, C, H, W).

        Args:
            images: the images.
            name: of the file.
            digest: of the images; logits of others are replaced.
        """
        digest = digest or hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
        path = self.folder / f"{name}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                if str(file["images"]) == digest:
                    return file["logits"]
        if self._network is None:
            content = load_file(self.judge.path, stage=EXPERT_STAGE)
            self._network = restore_network(content, self.judge.path).to(self.device)
        logits = classify(self._network, images, self.judge.image_size, self.device)
        buffer = io.BytesIO()
        np.savez(buffer, logits=logits, images=digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, buffer.getvalue())
        return logits


def classify(network: nn.Module, images: np.ndarray, size: Sequence[int], device: str = "cpu") -> np.ndarray:
    """Logits float32 (N, K) of uint8 images (N, C, H, W), which are resized to (H, W) = ``size``."""
    parts = []
    with torch.inference_mode():
        for part in torch.from_numpy(images).split(_JUDGED_TOGETHER):
            x = part.to(device).float() / 255
            if tuple(x.shape[2:]) != tuple(size):
                x = F.interpolate(x, tuple(size), mode="bilinear", antialias=True)
            parts.append(network(x).float().cpu())
    return torch.cat(parts).numpy()


def confusion(truth: np.ndarray, logits: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """How often the images of each class are taken for each of some classes.

    Args:
        truth: int (N,), numbers of classes.
        logits: (N, K).
        columns: numbers of the classes that count; the largest of their logits decides.

    Returns:
        int (K, len(columns)), a row for each class.
    """
    found = logits[:, list(columns)].argmax(1)
    counts = np.zeros((logits.shape[1], len(columns)), np.int64)
    np.add.at(counts, (truth, found), 1)
    return counts


def mean_similarity(images: np.ndarray) -> float:
    """Mean SSIM over all unordered pairs of uint8 images (N, C, H, W), N 2 or more."""
    x = torch.from_numpy(images).double() / 255
    first, second = map(list, zip(*combinations(range(len(x)), 2), strict=True))
    values = [
        ssim(x[a], x[b]) for a, b in zip(torch.tensor(first).split(256), torch.tensor(second).split(256), strict=True)
    ]
    return float(torch.cat(values).mean())


class Bootstrap:
    """Draws of seeds and of trainings, the same for every score of as many.

    Args:
        num_draws: draws.
        seed: of the draws.
    """

    def __init__(self, num_draws: int, seed: int = 0) -> None:
        self.num_draws, self.seed = num_draws, seed
        self._weights: dict[tuple[str, int], np.ndarray] = {}

    def _draw(self, what: str, number: int) -> np.ndarray:
        """How much each counts, (draws, number); rows sum to 1."""
        if (what, number) not in self._weights:
            rng = np.random.default_rng([self.seed, len(what), number])
            drawn = rng.multinomial(number, np.full(number, 1 / number), size=self.num_draws)
            self._weights[what, number] = drawn / number
        return self._weights[what, number]

    def numbers(self, values: np.ndarray, num_images: int) -> list[dict[str, Any]]:
        """What is told of each of M scores.

        Args:
            values: (T, S, M).
            num_images: that they are of.

        Returns:
            ``{"value", "sd", "n", "num_seeds", "num_trainings", "ci", "ci_trainings", "per_training"}`` for each;
            None where there is no such number.
        """
        num_trainings, num_seeds = values.shape[:2]
        per_seed = values.mean(0)
        ends = trained = None
        if num_seeds > 1:
            seeds = self._draw("seeds", num_seeds)
            ends = np.percentile(seeds @ per_seed, (2.5, 97.5), axis=0)
            if num_trainings > 1:
                drawn = np.einsum("bt,bs,tsm->bm", self._draw("trainings", num_trainings), seeds, values, optimize=True)
                trained = np.percentile(drawn, (2.5, 97.5), axis=0)
        return [
            {
                "value": float(values[..., m].mean()),
                "sd": float(per_seed[:, m].std(ddof=1)) if num_seeds > 1 else None,
                "n": num_images,
                "num_seeds": num_seeds,
                "num_trainings": num_trainings,
                "ci": None if ends is None else [float(end) for end in ends[:, m]],
                "ci_trainings": None if trained is None else [float(end) for end in trained[:, m]],
                "per_training": [float(value) for value in values[..., m].mean(1)],
            }
            for m in range(values.shape[2])
        ]

    def table(self, values: np.ndarray, num_images: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """`numbers` by name."""
        return dict(zip(names, self.numbers(values, num_images), strict=True))


def signed_rank(values: np.ndarray) -> dict[str, Any]:
    """Wilcoxon's signed rank test of differences, two-sided.

    Args:
        values: (S,), one for each seed; those that are 0 are left out.

    Returns:
        ``{"p", "statistic", "n", "num_equal", "num_higher", "num_lower", "method"}``. Without ties, or up to 16
        differences, p is counted out ("exact"), else from the normal distribution; None where all are 0.
    """
    from scipy.stats import PermutationMethod, wilcoxon

    values = np.round(np.asarray(values, np.float64), 12)  # equal counts, whatever their sums were rounded to
    moved = values[values != 0]
    result: dict[str, Any] = {
        "p": None,
        "statistic": None,
        "n": len(moved),
        "num_equal": len(values) - len(moved),
        "num_higher": int((moved > 0).sum()),
        "num_lower": int((moved < 0).sum()),
        "method": None,
    }
    if not len(moved):
        return result
    ties = len(np.unique(np.abs(moved))) < len(moved)
    if len(moved) <= _COUNTED and ties:
        method: Any = PermutationMethod(n_resamples=np.inf)
    else:
        method = "asymptotic" if ties or len(moved) > 50 else "exact"
    found = wilcoxon(moved, method=method)
    name = "normal approximation" if method == "asymptotic" else "exact"
    return result | {"p": float(found.pvalue), "statistic": float(found.statistic), "method": name}


def most_frequent_wrong(row: np.ndarray, right: int) -> int | None:
    """Column of the class that the images of a row are most often taken for by mistake; None without a mistake."""
    wrong = np.where(np.arange(len(row)) == right, 0, row)
    return int(wrong.argmax()) if wrong.max() > 0 else None

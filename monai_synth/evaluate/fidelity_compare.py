# SPDX-License-Identifier: Apache-2.0
"""What is measured between two sets of images: distances of features, neighbours, and similarity of pairs of images."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from monai_synth.evaluate import similarity
from monai_synth.evaluate.distribution import frechet_result, jackknife_variance, kernel_result, result_of
from monai_synth.evaluate.features import Extractor
from monai_synth.evaluate.fidelity_sets import AnySet
from monai_synth.evaluate.neighbours import KEYS, neighbour_results
from monai_synth.evaluate.perceptual import Perceptual

_MAX_VALUES = 1 << 22  # of a batch of images in double precision, of which SSIM holds about ten
_JUDGED = ("control", "synthetic", "real_test", "real_train")  # of two sets the one that is held against the other
_NUM_GROUPS = 20


def metric_keys(extractor: str) -> tuple[str, str]:
    """Names of the Frechet and the kernel distance of an extractor; only Inception's published weights give FID."""
    return ("fid", "kid") if extractor == "inception" else (f"frechet_{extractor}", f"kernel_{extractor}")


def neighbour_keys(extractor: str) -> tuple[str, ...]:
    """Names of precision, recall, density and coverage of an extractor."""
    return tuple(f"{key}_{extractor}" for key in KEYS)


@dataclass(frozen=True)
class Measures:
    """What is at hand for comparing images.

    Attributes:
        extractors: of features.
        features: extractor's key -> set's key -> (n, D).
        perceptual: LPIPS; None without its weights.
        num_pairs: of images for the similarities.
        batch_size: images at once.
        seed: of draws and groups.
        device: where similarities are computed.
    """

    extractors: Sequence[Extractor]
    features: Mapping[str, Mapping[str, np.ndarray]]
    perceptual: Perceptual | None
    num_pairs: int
    batch_size: int
    seed: int
    device: torch.device

    @property
    def similarity_names(self) -> tuple[str, ...]:
        return ("ssim", "ms_ssim", *(("lpips",) if self.perceptual else ()))

    def of_features(
        self, a: AnySet, b: AnySet, chosen: Sequence[np.ndarray], patients: Sequence[np.ndarray]
    ) -> dict[str, dict[str, Any]]:
        """Frechet and kernel distance, precision, recall, density and coverage for each extractor."""
        sizes = [len(c) for c in chosen]
        metrics: dict[str, dict[str, Any]] = {}
        judged_first = _JUDGED.index(a.key) < _JUDGED.index(b.key)
        for extractor in self.extractors:
            frechet, kernel = metric_keys(extractor.key)
            names = neighbour_keys(extractor.key)
            if min(sizes) < 2:
                why = unmeasured(sizes, "2 images or more are needed on each side")
                metrics |= dict.fromkeys((frechet, kernel, *names), why)
                continue
            x, y = (self.features[extractor.key][s.key][c] for s, c in zip((a, b), chosen, strict=True))
            metrics[frechet] = frechet_result(x, y, *patients, seed=self.seed)
            metrics[kernel] = kernel_result(x, y, *patients, seed=self.seed)
            sides = [(x, patients[0]), (y, patients[1])]
            (judged, its), (real, theirs) = sides if judged_first else sides[::-1]
            found = neighbour_results(real, judged, theirs, its, seed=self.seed)
            metrics |= {name: found[key] | {"n": list(sizes)} for name, key in zip(names, KEYS, strict=True)}
        return metrics

    def of_random_pairs(
        self, a: AnySet, b: AnySet, chosen: Sequence[np.ndarray], patients: Sequence[np.ndarray]
    ) -> dict[str, dict[str, Any]]:
        """Similarity of random images of both sets."""
        sizes = [len(c) for c in chosen]
        refused = self._refused(a.form, min(sizes))
        if refused:
            return refused
        seed = [self.seed, zlib.crc32(f"{a.key} {b.key}".encode())]
        pairs = similarity.random_pairs(*sizes, self.num_pairs, seed)
        sides = [(s.readers(), c[p]) for s, c, p in zip((a, b), chosen, pairs.T, strict=True)]
        values = self._values(*([read[i] for i in numbers] for read, numbers in sides))
        groups = [p[i] for p, i in zip(patients, pairs.T, strict=True)]
        return {
            name: similarity.mean_of_pairs(column, *groups) | {"warnings": []}
            for name, column in zip(self.similarity_names, values, strict=True)
        }

    def within(self, image_set: AnySet) -> dict[str, dict[str, Any]]:
        """Similarity of random images of one set, of two patients each: the less, the more varied is the set."""
        n = len(image_set)
        refused = self._refused(image_set.form, n)
        if refused:
            return refused
        patients = np.asarray(image_set.patients)
        seed = [self.seed, zlib.crc32(f"within {image_set.key}".encode())]
        pairs = similarity.random_pairs(n, n, min(4 * self.num_pairs, n * n), seed)
        pairs = pairs[(patients[pairs[:, 0]] != patients[pairs[:, 1]])][: self.num_pairs]
        if not len(pairs):
            return dict.fromkeys(self.similarity_names, unmeasured(0, "all images are of one patient"))
        readers = image_set.readers()
        values = self._values([readers[i] for i in pairs[:, 0]], [readers[i] for i in pairs[:, 1]])
        return {
            name: _mean_within(column, patients[pairs], self.seed)
            for name, column in zip(self.similarity_names, values, strict=True)
        }

    def of_given_pairs(
        self,
        x: Sequence[Callable[[], np.ndarray]],
        y: Sequence[Callable[[], np.ndarray]],
        groups: Sequence[Any],
        form: tuple[int, int, int],
    ) -> dict[str, dict[str, Any]]:
        """Similarity of images that belong together, x[i] and y[i]; groups are patients."""
        refused = self._refused(form, len(x))
        if refused:
            return refused
        return {
            name: similarity.mean_of_pairs(column, groups, groups) | {"warnings": []}
            for name, column in zip(self.similarity_names, self._values(x, y), strict=True)
        }

    def _refused(self, form: tuple[int, int, int], smallest: int) -> dict[str, dict[str, Any]]:
        if min(form[1:]) < similarity.WINDOW:
            why = f"images of {form[1]} x {form[2]} are smaller than the window of {similarity.WINDOW} pixels"
            return dict.fromkeys(self.similarity_names, unmeasured(0, why))
        if smallest < 1:
            return dict.fromkeys(self.similarity_names, unmeasured(0, "a side has no image"))
        return {}

    def _values(self, x: Sequence[Callable[[], np.ndarray]], y: Sequence[Callable[[], np.ndarray]]) -> np.ndarray:
        """(metrics, P), a batch of images in memory at a time."""
        columns = []
        for first, second in self._batches(x, y):
            column = [similarity.ssim(first, second), similarity.ms_ssim(first, second)]
            if self.perceptual:
                column.append(self.perceptual(first, second))
            columns.append(torch.stack([c.cpu() for c in column]).numpy())
        return np.concatenate(columns, axis=1)

    def _batches(
        self, x: Sequence[Callable[[], np.ndarray]], y: Sequence[Callable[[], np.ndarray]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        step = max(1, min(self.batch_size, _MAX_VALUES // int(np.prod(x[0]().shape))))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            yield tuple(
                torch.from_numpy(np.stack([read() for read in side[part]])).to(self.device).double() / 255
                for side in (x, y)
            )


def _mean_within(values: np.ndarray, patients: np.ndarray, seed: int) -> dict[str, Any]:
    """Mean over pairs (P,) of patients (P, 2), with the interval of leaving out all pairs of a group of patients."""
    names, index = np.unique(patients, return_inverse=True)
    index = index.reshape(patients.shape)
    num = min(_NUM_GROUPS, len(names))
    groups = np.random.default_rng(seed).permutation(np.arange(len(names)) % num)[index]
    without = [values[(groups != g).all(1)] for g in range(num)]
    measured = len(names) >= 10 and all(map(len, without))
    left_out = np.asarray([v.mean() for v in without]) if measured else np.zeros(0)
    result = result_of(float(values.mean()), len(values), 0, jackknife_variance(left_out), len(left_out))
    return result | {"n": len(values), "sd": float(values.std(ddof=1)) if len(values) > 1 else None, "warnings": []}


def unmeasured(n: Any, why: str) -> dict[str, Any]:
    """A result without a value, and why."""
    return {"value": None, "n": n, "ci": None, "standard_error": None, "warnings": [why]}

# SPDX-License-Identifier: Apache-2.0
"""What is measured of the images of the lung CT experiment, and how sure it is: Tables 5.1 and 5.2.

All intervals leave out groups of patients (delete-a-group jackknife). The groups are the same for all arms, and a
patient leaves real and generated images together, so the interval of a difference is that of paired images.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_synth.atomic import write_bytes
from monai_synth.data.semantic import uint8_to_hu
from monai_synth.evaluate.distribution import (
    MIN_GROUPS,
    NUM_GROUPS,
    frechet_distance,
    jackknife_variance,
    kernel_distance,
    result_of,
)
from monai_synth.evaluate.feature_cache import FeatureCache
from monai_synth.evaluate.features import Extractor
from monai_synth.evaluate.hu_fidelity import crop_at
from monai_synth.evaluate.perceptual import Perceptual
from monai_synth.evaluate.semantic_fidelity import CLASSES, class_dice
from monai_synth.evaluate.similarity import WINDOW, ms_ssim, ssim
from monai_synth.experiments.lsdm_sampling import Samples
from monai_synth.experiments.lsdm_source import Arm, Cases

SEED = 0  # of the groups
DICE = tuple(f"dice_{name}" for name in CLASSES)
_FORMAT = 1  # of the cached scores
RECIPE = (
    "Paired measures compare each generated slice with the real slice of the same map, 8-bit window, then average: "
    "value = mean over slices and seeds, sd = over the images. Distances are computed for each seed between its images "
    "and the real slices of the same maps: value = mean over seeds, sd = over the seeds. Crops are centred at the "
    "nodules of the dataset's nodule table; outside the slice is black. Intervals (95 %): delete-a-group jackknife by "
    "patient with Student's t, real and generated images of a patient left out together; a difference is that of equal "
    "maps and equal noise."
)


class Patients:
    """Groups of patients that are left out together.

    Args:
        names: patient of each row.
    """

    def __init__(self, names: Sequence[str]) -> None:
        unique, index = np.unique(np.asarray(names), return_inverse=True)
        self.num_patients = len(unique)
        self.num_groups = min(NUM_GROUPS, len(unique)) if len(unique) >= MIN_GROUPS else 0
        shuffled = np.random.default_rng(SEED).permutation(len(unique))
        self.groups = (shuffled % max(1, self.num_groups))[index]

    def values(self, statistic: Callable[[np.ndarray], float]) -> np.ndarray:
        """The statistic of all rows, then with each group left out; it takes a bool mask of the rows (N,)."""
        every = np.ones(len(self.groups), bool)
        return np.array([statistic(every)] + [statistic(self.groups != g) for g in range(self.num_groups)])

    def result(self, values: np.ndarray, n: int, **more: Any) -> dict[str, Any]:
        """``{"value", "n", "ci", "standard_error", "num_patients", ...}`` of what `values` gave."""
        if not np.isfinite(values[0]):
            return {
                "value": None,
                "n": n,
                "ci": None,
                "standard_error": None,
                "num_patients": self.num_patients,
                **more,
            }
        sure = np.isfinite(values).all() and len(values) > 1
        variance = jackknife_variance(values[1:]) if sure else 0.0
        result = result_of(float(values[0]), n, n, variance, len(values) - 1 if sure else 0)
        return result | {"n": n, "num_patients": self.num_patients, **more}


class Scorer:
    """Measures arms against the real slices.

    Args:
        samples: where the images are.
        indices: slices that are compared.
        num_seeds: seeds 0 to this minus one.
        crop: side of a nodule crop, pixels.
        extractors: of features, for distances.
        perceptual: LPIPS; None without its weights.
        cache: folder of scores and features.
    """

    def __init__(
        self,
        samples: Samples,
        indices: Sequence[int],
        num_seeds: int,
        *,
        crop: int,
        extractors: Sequence[Extractor],
        perceptual: Perceptual | None,
        cache: Path,
    ) -> None:
        self.samples, self.cases, self.indices, self.num_seeds = samples, samples.cases, tuple(indices), num_seeds
        self.crop, self.extractors, self.perceptual, self.cache = crop, list(extractors), perceptual, cache
        self.features = {e.key: FeatureCache(cache / "features", e) for e in self.extractors}
        self.patients = Patients([self.cases.patient(i) for i in self.indices])
        nodules = [(i, n) for i in self.indices for n in self.cases.item(i)["nodules"]]
        self.crop_patients = Patients([self.cases.patient(i) for i, _ in nodules])
        self.num_crops = len(nodules)
        self._values: dict[tuple[str, str], np.ndarray] = {}  # (arm, metric) -> statistic with groups left out

    @property
    def paired(self) -> tuple[str, ...]:
        """Names of the paired measures of whole slices."""
        return ("ssim", "ms_ssim", *(("lpips",) if self.perceptual else ()), *DICE)

    def real(self) -> dict[str, dict[str, Any]]:
        """Dice of real slices with their own maps, the ceiling."""
        rows = [_dice(self.cases, i, self.cases.real(i)) for i in self.indices]
        return {name: self._mean(("", name), np.array(rows)[:, None, k], self.patients) for k, name in enumerate(DICE)}

    def scores(self, arm: Arm) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Measures of whole slices and of nodule crops of an arm, all of whose images are there."""
        each = np.stack([self._each(arm, seed) for seed in range(self.num_seeds)], axis=1)  # (n, S, metrics)
        whole = {
            name: self._mean((arm.name, name), each[..., k], self.patients)
            for k, name in enumerate((*self.paired, "crop_ssim"))
        }
        crops = {"crop_ssim": whole.pop("crop_ssim")}
        for extractor in self.extractors:
            for prefix, found, patients, reader in (
                ("", whole, self.patients, self._slices),
                ("crop_", crops, self.crop_patients, self._crops),
            ):
                found |= self._distances(arm, extractor, prefix, patients, reader)
        return whole, crops

    def difference(self, arm: Arm, baseline: Arm, metric: str) -> dict[str, Any]:
        """The measure of an arm less that of another on the same maps and noise; both were scored before."""
        own, other = self._values[arm.name, metric], self._values[baseline.name, metric]
        crop = metric.startswith("crop_") and metric != "crop_ssim"
        patients, n = (self.crop_patients, self.num_crops) if crop else (self.patients, len(self.indices))
        return patients.result(own - other, n, minus=baseline.name)

    def _mean(self, key: tuple[str, str], each: np.ndarray, patients: Patients) -> dict[str, Any]:
        """Mean of (n, S) values, NaN where there is nothing to measure."""
        there = np.isfinite(each)

        def mean(mask: np.ndarray) -> float:
            chosen = each[mask][there[mask]]
            return float(chosen.mean()) if len(chosen) else np.nan

        self._values[key] = patients.values(mean)
        number = int(there.sum())
        sd = float(each[there].std(ddof=1)) if number > 1 else None
        return patients.result(self._values[key], int(there.any(1).sum()), num_images=number, sd=sd)

    def _distances(
        self, arm: Arm, extractor: Extractor, prefix: str, patients: Patients, reader: Callable[..., list[np.ndarray]]
    ) -> dict[str, dict[str, Any]]:
        cache = self.features[extractor.key]
        real = _features(cache, reader(None, 0))
        made = [_features(cache, reader(arm, seed)) for seed in range(self.num_seeds)]
        found = {}
        for name, distance in zip(distance_names(extractor.key), (frechet_distance, kernel_distance), strict=True):
            by_seed: list[float] = []

            def mean(mask: np.ndarray, distance: Any = distance, by_seed: list[float] = by_seed) -> float:
                if mask.sum() < 2:
                    return np.nan
                values = [distance(real[mask], features[mask]) for features in made]
                by_seed[:] = by_seed or values  # of the first call, which has all rows
                return float(np.mean(values))

            values = patients.values(mean)
            self._values[arm.name, prefix + name] = values
            sd = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
            few = len(real) < extractor.num_features and distance is frechet_distance
            warning = (
                f"{len(real)} images for {extractor.num_features} features: biased upwards; compare only within this "
                "table, and read the kernel distance"
            )
            found[prefix + name] = patients.result(
                values, len(real), sd=sd, per_seed=by_seed, warnings=[*extractor.warnings, *([warning] if few else [])]
            )
        return found

    def _slices(self, arm: Arm | None, seed: int) -> list[np.ndarray]:
        if arm is None:
            return [self.cases.real(i)[None] for i in self.indices]
        return [image[None] for _, image in self.samples.load(arm, seed, self.indices)]

    def _crops(self, arm: Arm | None, seed: int) -> list[np.ndarray]:
        images = (
            ((i, self.cases.real(i)) for i in self.indices)
            if arm is None
            else self.samples.load(arm, seed, self.indices)
        )
        return [
            crop_at(image[None], nodule["center"], self.crop)
            for i, image in images
            for nodule in self.cases.item(i)["nodules"]
        ]

    def _each(self, arm: Arm, seed: int) -> np.ndarray:
        """(n, metrics) of one seed; from the cache where its images have been scored."""
        rows = []
        for path, chunk in self.samples.parts(arm, seed, self.indices):
            lpips = self.perceptual.weights_sha256 if self.perceptual else ""
            text = f"{_FORMAT} {self.crop} {lpips} {self.cases.dataset.fingerprint}"
            key = hashlib.sha256(text.encode() + path.read_bytes()).hexdigest()[:24]
            cached = self.cache / "scores" / f"{key}.npz"
            try:
                with np.load(cached, allow_pickle=False) as file:
                    part = file["rows"]
            except Exception:  # missing or truncated: computed again
                pairs = self.samples.load(arm, seed, chunk)
                part = np.array([self._score(i, image) for i, image in pairs])
                cached.parent.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()
                np.savez(buffer, rows=part)
                write_bytes(cached, buffer.getvalue())
            rows.append(part)
        return np.concatenate(rows)

    def _score(self, index: int, image: np.ndarray) -> list[float]:
        real = self.cases.real(index)
        x, y = (_unit(i) for i in (image, real))
        values = [float(ssim(x, y)), float(ms_ssim(x, y))]
        if self.perceptual:
            values.append(float(self.perceptual(x, y)))
        values += _dice(self.cases, index, image)
        crops = [
            float(ssim(*(_unit(crop_at(i[None], n["center"], self.crop)[0]) for i in (image, real))))
            for n in self.cases.item(index)["nodules"]
            if self.crop >= WINDOW
        ]
        return [*values, float(np.mean(crops)) if crops else np.nan]


def distance_names(key: str) -> tuple[str, str]:
    """Of the Frechet and the kernel distance; only Inception's published weights give FID."""
    return ("fid", "kid") if key == "inception" else (f"frechet_{key}", f"kernel_{key}")


def _features(cache: FeatureCache, images: Sequence[np.ndarray]) -> np.ndarray:
    return cache.features([lambda image=image: image for image in images]).astype(np.float64)


def _unit(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.astype(np.float64) / 255)[None, None]


def _dice(cases: Cases, index: int, image: np.ndarray) -> list[float]:
    item = cases.item(index)
    spacing = tuple(float(s) for s in item["spacing"])
    found = class_dice(item["label"][0].numpy(), uint8_to_hu(image), spacing=spacing)
    return [found[name] for name in CLASSES]

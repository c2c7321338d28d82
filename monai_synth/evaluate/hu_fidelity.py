# SPDX-License-Identifier: Apache-2.0
"""Hounsfield units of CT slices: how far apart two sets are, as a whole and under each label, and crops of nodules.

The distance is Wasserstein's first, in HU: how far the values of one set must be moved on average to become those of
the other. On histograms with bins of one HU it is the area between the two cumulative shares, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from monai_synth.evaluate.case_sets import CT_WINDOW, CaseSet
from monai_synth.evaluate.distribution import grouped_result

WHOLE = "whole image"
CROP = 64  # pixels, LSDM thesis, Table 5.2
RECIPE = (
    "HU clipped to the window {:g} to {:g}, bins of 1 HU; Wasserstein-1 of the pooled values; by label: values of the "
    "pixels that the label map gives to it"
)


class HuHistograms:
    """Histograms of HU of each image of a set, whole and by label.

    Args:
        cases: of kind "ct".
        window: HU to which values are clipped.
    """

    def __init__(self, cases: CaseSet, window: tuple[float, float] = CT_WINDOW) -> None:
        self.low, high = (round(edge) for edge in window)
        self.num_bins = high - self.low + 1
        self.patients = np.asarray([case.patient_id for case in cases.cases])
        names = {WHOLE: -1, **cases.labels}
        self.counts = {name: np.zeros((len(cases), self.num_bins), np.uint32) for name in names}
        for i in range(len(cases)):
            bins = np.clip(cases.image(i)[0].astype(np.int64), self.low, high) - self.low
            self.counts[WHOLE][i] = np.bincount(bins.ravel(), minlength=self.num_bins)
            label = cases.label(i)
            if label is None or label.shape != bins.shape:
                continue
            joint = np.bincount((label.astype(np.int64) * self.num_bins + bins).ravel(), minlength=256 * self.num_bins)
            for name, value in cases.labels.items():
                self.counts[name][i] = joint[value * self.num_bins : (value + 1) * self.num_bins]

    @property
    def names(self) -> list[str]:
        """ "whole image" and the labels that an image of the set has."""
        return [name for name, counts in self.counts.items() if counts.any()]

    def having(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Histograms and patients of the images that have the label."""
        has = self.counts[name].any(1) if name in self.counts else np.zeros(len(self.patients), bool)
        return self.counts.get(name, np.zeros((len(has), self.num_bins), np.uint32))[has], self.patients[has]

    def summary(self, name: str) -> dict[str, Any]:
        """Mean and standard deviation of all pixels, and the number of images."""
        rows, patients = self.having(name)
        if not len(rows):
            return {"mean": None, "sd": None, "n": 0, "num_patients": 0}
        total = rows.sum(0, dtype=np.float64)
        values = self.low + np.arange(self.num_bins)
        mean = float(total @ values / total.sum())
        sd = float(np.sqrt(max(0.0, total @ (values - mean) ** 2 / total.sum())))
        return {"mean": mean, "sd": sd, "n": len(rows), "num_patients": len(set(patients.tolist()))}


def hu_distances(a: HuHistograms, b: HuHistograms, *, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Distances of two sets.

    Returns:
        "whole image" or label -> ``wasserstein`` (HU, 0 for equal distributions) and ``mean_difference`` (HU, first
        set less second), each a result with its 95 % interval by patient; n is the number of images that have it.
    """
    levels = a.low + np.arange(a.num_bins)

    def difference(x: np.ndarray, y: np.ndarray) -> float:
        return float(_shares(x) @ levels - _shares(y) @ levels)

    results = {}
    for name in dict.fromkeys([*a.names, *b.names]):
        (x, gx), (y, gy) = a.having(name), b.having(name)
        results[name] = {
            "wasserstein": grouped_result(histogram_wasserstein, x, y, gx, gy, seed=seed, least=0.0),
            "mean_difference": grouped_result(difference, x, y, gx, gy, seed=seed),
        }
    return results


def histogram_wasserstein(x: np.ndarray, y: np.ndarray) -> float:
    """Wasserstein-1 of the pooled values of two sets of histograms (n, bins) and (m, bins), in bins."""
    return float(np.abs(np.cumsum(_shares(x) - _shares(y)))[:-1].sum())


def _shares(rows: np.ndarray) -> np.ndarray:
    total = rows.sum(0, dtype=np.float64)
    return total / total.sum()


def nodule_labels(labels: Mapping[str, int]) -> list[int]:
    """Values of the labels that are nodules, by name."""
    return [value for name, value in labels.items() if "nodule" in name.lower()]


def nodule_crops(cases: CaseSet, size: int = CROP) -> tuple[list[np.ndarray], list[str]]:
    """A crop around each nodule of the label maps: connected pixels of any nodule label.

    Args:
        cases: with label maps.
        size: side of the crop, pixels; what lies outside the image is black.

    Returns:
        uint8 (C, size, size) for each nodule, and its patient.
    """
    values = nodule_labels(cases.labels)
    crops, patients = [], []
    for i, case in enumerate(cases.cases):
        label = cases.label(i)
        if label is None or not values:
            continue
        found, num = ndimage.label(np.isin(label, values), np.ones((3, 3)))
        if num:
            picture = cases.picture(i)
            for box in ndimage.find_objects(found):
                center = [(part.start + part.stop) // 2 for part in box]
                crops.append(crop_at(picture, center, size))
                patients.append(case.patient_id)
    return crops, patients


def crop_at(image: np.ndarray, center: Sequence[int], size: int) -> np.ndarray:
    """(C, size, size) with pixel ``center`` of (C, H, W) at size // 2; 0 outside the image."""
    half = size // 2
    padded = np.pad(image, ((0, 0), (size, size), (size, size)))
    row, column = (int(c) + size - half for c in center)
    return np.ascontiguousarray(padded[:, row : row + size, column : column + size])

# SPDX-License-Identifier: Apache-2.0
"""Masks of two sets of pairs: are objects as large, as many and of the same forms?

An object is a connected part of a label. Each statistic is compared as a distribution: Wasserstein's first distance, in
the statistic's own unit, and Kolmogorov and Smirnov's, the largest gap of the two cumulative shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats
from skimage import measure

from monai_synth.evaluate.case_sets import CaseSet
from monai_synth.evaluate.distribution import grouped_result

# name -> (unit, what it is)
STATISTICS = {
    "area": ("% of the image", "share of the image that the label fills"),
    "count": ("objects", "objects in an image"),
    "object_area": ("% of the image", "size of one object"),
    "eccentricity": ("", "how long an object is: 0 for a circle, near 1 for a line"),
    "solidity": ("", "how smooth its outline is: 1 for a convex object, less with dents"),
}
RECIPE = (
    "objects: 8-connected parts of a label of 4 pixels or more; eccentricity and solidity by scikit-image's "
    "regionprops; intervals by leaving out groups of patients"
)
_PER_IMAGE = ("area", "count")
MIN_PIXELS = 4


class MaskStatistics:
    """Statistics of the label maps of a set.

    Args:
        cases: with label maps; a label map's value 0 is background.
        labels: name -> value of those to look at. Default: all that the set names.
    """

    def __init__(self, cases: CaseSet, labels: Mapping[str, int] | None = None) -> None:
        self.rows: dict[str, dict[str, list[float]]] = {}
        self.patients: dict[str, dict[str, list[str]]] = {}
        names = {name: value for name, value in (labels or cases.labels).items() if value}
        for name in names:
            self.rows[name] = {key: [] for key in STATISTICS}
            self.patients[name] = {key: [] for key in STATISTICS}
        for i, case in enumerate(cases.cases):
            label = cases.label(i)
            if label is not None:
                for name, value in names.items():
                    self._add(name, label == value, case.patient_id)

    def _add(self, name: str, mask: np.ndarray, patient: str) -> None:
        objects = [o for o in measure.regionprops(measure.label(mask, connectivity=2)) if o.area >= MIN_PIXELS]
        percent = 100 / mask.size
        found = {"area": [float(mask.sum()) * percent], "count": [float(len(objects))]}
        found["object_area"] = [float(o.area) * percent for o in objects]
        found["eccentricity"] = [float(o.eccentricity) for o in objects]
        found["solidity"] = [float(o.solidity) for o in objects]
        for key, values in found.items():
            self.rows[name][key] += values
            self.patients[name][key] += [patient] * len(values)

    def values(self, name: str, key: str) -> np.ndarray:
        """One per image (area, count) or per object."""
        return np.asarray(self.rows.get(name, {}).get(key, ()), np.float64)

    def groups(self, name: str, key: str) -> list[str]:
        """Patient of each value."""
        return list(self.patients.get(name, {}).get(key, ()))

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Label -> statistic -> mean, standard deviation, n and what n counts."""
        return {
            name: {
                key: {
                    "mean": float(np.mean(values)) if values else None,
                    "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                    "n": len(values),
                    "of": "images" if key in _PER_IMAGE else "objects",
                }
                for key, values in rows.items()
            }
            for name, rows in self.rows.items()
        }


def mask_distances(
    a: MaskStatistics, b: MaskStatistics, *, seed: int = 0
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Label -> statistic -> ``wasserstein``, ``kolmogorov_smirnov`` and ``mean_difference`` (first less second).

    Each is a result with its 95 % interval by patient; 0 for equal distributions.
    """

    def difference(x: np.ndarray, y: np.ndarray) -> float:
        return float(x.mean() - y.mean())

    def smirnov(x: np.ndarray, y: np.ndarray) -> float:
        return float(stats.ks_2samp(x, y, method="asymp").statistic)

    functions = {
        "wasserstein": (stats.wasserstein_distance, 0.0),
        "kolmogorov_smirnov": (smirnov, 0.0),
        "mean_difference": (difference, None),
    }
    return {
        name: {
            key: {
                title: grouped_result(
                    function,
                    a.values(name, key),
                    b.values(name, key),
                    a.groups(name, key),
                    b.groups(name, key),
                    seed=seed,
                    least=least,
                )
                for title, (function, least) in functions.items()
            }
            for key in STATISTICS
        }
        for name in dict.fromkeys([*a.rows, *b.rows])
    }

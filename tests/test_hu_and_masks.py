# SPDX-License-Identifier: Apache-2.0
"""HU of CT sets and shapes of masks: closed forms, agreement with scipy, planted differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from monai_synth.data.semantic import uint8_to_hu
from monai_synth.evaluate.case_sets import read_case_set
from monai_synth.evaluate.distribution import grouped_result
from monai_synth.evaluate.hu_fidelity import (
    WHOLE,
    HuHistograms,
    crop_at,
    histogram_wasserstein,
    hu_distances,
    nodule_crops,
)
from monai_synth.evaluate.mask_fidelity import MaskStatistics, mask_distances


class Fake:
    """A set of cases in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None = None, names: dict[str, int] | None = None):
        self.images, self.maps, self.labels = images, labels, names or {}
        self.cases = [type("Case", (), {"patient_id": f"p{i}", "case_id": f"c{i}"})() for i in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> np.ndarray:
        return self.images[i][None]

    def picture(self, i: int) -> np.ndarray:
        return self.images[i][None].astype(np.uint8)

    def label(self, i: int) -> np.ndarray | None:
        return None if self.maps is None else self.maps[i]


def noise(seed: int, mean: float, n: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 50, (n, 16, 16)).round().astype(np.int16)


def test_the_distance_of_hu_is_scipys_wasserstein_distance_of_all_pixels() -> None:
    x, y = noise(0, -300), noise(1, -200, 9)
    result = hu_distances(HuHistograms(Fake(x)), HuHistograms(Fake(y)))[WHOLE]["wasserstein"]
    assert result["value"] == pytest.approx(stats.wasserstein_distance(x.ravel(), y.ravel()), rel=1e-9)
    assert result["n"] == [12, 9]


def test_a_set_shifted_by_c_hu_is_at_distance_c_and_itself_at_0() -> None:
    x = noise(0, 0)
    a, b = HuHistograms(Fake(x)), HuHistograms(Fake(x + np.int16(37)))
    assert hu_distances(a, b)[WHOLE]["wasserstein"]["value"] == pytest.approx(37)
    assert hu_distances(a, b)[WHOLE]["mean_difference"]["value"] == pytest.approx(-37)
    assert hu_distances(a, a)[WHOLE]["wasserstein"]["value"] == 0
    assert a.summary(WHOLE)["mean"] == pytest.approx(x.mean())
    assert a.summary(WHOLE)["sd"] == pytest.approx(x.std())


def test_values_outside_the_window_count_as_its_ends() -> None:
    x = np.full((4, 8, 8), -2000, np.int16)
    assert hu_distances(HuHistograms(Fake(x)), HuHistograms(Fake(x * 0 - 1024)))[WHOLE]["wasserstein"]["value"] == 0
    assert histogram_wasserstein(np.eye(3)[:1], np.eye(3)[2:]) == 2


def test_hu_under_a_label_are_those_of_its_pixels_only() -> None:
    maps = np.zeros((6, 8, 8), np.uint8)
    maps[:4, :4] = 1  # two images lack the label
    x = np.where(maps == 1, -800, 40).astype(np.int16)
    y = np.where(maps == 1, -700, 40).astype(np.int16)
    names = {"background": 0, "lung": 1}
    found = hu_distances(HuHistograms(Fake(x, maps, names)), HuHistograms(Fake(y, maps, names)))
    assert found["lung"]["wasserstein"]["value"] == pytest.approx(100)
    assert found["lung"]["wasserstein"]["n"] == [4, 4]
    assert found["background"]["wasserstein"]["value"] == 0


def test_intervals_of_hu_distances_are_as_wide_as_the_spread_of_other_patients() -> None:
    def draw(seed: int) -> Fake:
        rng = np.random.default_rng(seed)
        means = np.repeat(rng.normal(0, 60, 20), 3)[:, None, None]  # 20 patients, 3 images each
        fake = Fake((means + rng.normal(0, 5, (60, 8, 8))).round().astype(np.int16))
        for i, case in enumerate(fake.cases):
            case.patient_id = f"p{i // 3}"
        return fake

    draws = [
        hu_distances(HuHistograms(draw(i)), HuHistograms(draw(100 + i)))[WHOLE]["mean_difference"] for i in range(40)
    ]
    spread = np.std([d["value"] for d in draws], ddof=1)
    assert 0.6 * spread < np.mean([d["standard_error"] for d in draws]) < 1.6 * spread
    assert np.mean([d["ci"][0] <= 0 <= d["ci"][1] for d in draws]) > 0.8


def test_nodule_crops_are_centred_and_padded() -> None:
    image = np.arange(100, dtype=np.uint8).reshape(10, 10)
    maps = np.zeros((1, 10, 10), np.uint8)
    maps[0, 4:7, 3:6] = 2  # centre (5, 4)
    maps[0, 0, 9] = 3  # another nodule in the corner
    crops, patients = nodule_crops(Fake(image[None], maps, {"lung": 1, "nodule_a": 2, "nodule_b": 3}), size=4)
    assert patients == ["p0", "p0"]
    by_center = {int(crop[0, 2, 2]): crop for crop in crops}
    np.testing.assert_array_equal(by_center[54][0], image[3:7, 2:6])
    assert by_center[9][0, :2].sum() == 0
    np.testing.assert_array_equal(crop_at(image[None], (0, 9), 4)[0, 2:, :3], image[:2, 7:])
    assert nodule_crops(Fake(image[None], maps, {"lung": 1})) == ([], [])


def test_hu_of_a_prepared_dataset_are_those_of_its_window(tiny_dataset: Path) -> None:
    cases = read_case_set(tiny_dataset, option="--real", split="training")
    histograms = HuHistograms(cases, cases.window)
    pixels = np.stack([uint8_to_hu(cases.picture(i)[0]) for i in range(len(cases))])
    assert histograms.summary(WHOLE)["mean"] == pytest.approx(pixels.mean(), abs=0.5)
    assert {"lung", "high_dense"} <= set(histograms.names)
    assert len(nodule_crops(cases)[0]) == len(cases)


def discs(radius: int, num: int, n: int = 10) -> Fake:
    rows, cols = np.mgrid[:64, :64]
    maps = np.zeros((n, 64, 64), np.uint8)
    for k in range(num):
        maps[:, (rows - 14 - 34 * (k // 2)) ** 2 + (cols - 14 - 34 * (k % 2)) ** 2 <= radius**2] = 1
    return Fake(maps, maps, {"background": 0, "polyp": 1})


def test_planted_sizes_and_numbers_of_objects_are_found() -> None:
    a, b = MaskStatistics(discs(5, 1)), MaskStatistics(discs(10, 3))
    area = discs(5, 1).maps[0].sum() / 40.96
    assert a.summary()["polyp"]["area"]["mean"] == pytest.approx(area)
    assert b.summary()["polyp"]["count"] == {"mean": 3, "sd": 0, "n": 10, "of": "images"}
    assert b.summary()["polyp"]["object_area"]["n"] == 30
    assert a.summary()["polyp"]["eccentricity"]["mean"] < 0.1
    assert a.summary()["polyp"]["solidity"]["mean"] > 0.9
    found = mask_distances(a, b)["polyp"]
    assert found["count"]["wasserstein"]["value"] == 2
    assert found["count"]["kolmogorov_smirnov"]["value"] == 1
    assert found["count"]["mean_difference"]["value"] == -2
    assert found["object_area"]["wasserstein"]["value"] == pytest.approx(discs(10, 1).maps[0].sum() / 40.96 - area)


def test_masks_and_themselves_are_at_distance_0_and_a_line_is_no_circle() -> None:
    a = MaskStatistics(discs(8, 2))
    assert all(r["value"] == 0 for s in mask_distances(a, a)["polyp"].values() for r in s.values())
    line = np.zeros((6, 64, 64), np.uint8)
    line[:, 30:33, 5:60] = 1
    long = MaskStatistics(Fake(line, line, {"polyp": 1}))
    assert long.summary()["polyp"]["eccentricity"]["mean"] > 0.99


def test_a_set_without_any_object_has_no_value_and_says_why() -> None:
    empty = np.zeros((6, 16, 16), np.uint8)
    found = mask_distances(MaskStatistics(Fake(empty, empty, {"polyp": 1})), MaskStatistics(discs(5, 1)))["polyp"]
    assert found["object_area"]["wasserstein"]["value"] is None
    assert found["area"]["wasserstein"]["value"] > 0


def test_the_interval_of_any_statistic_is_the_jackknifes() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 40))
    result = grouped_result(lambda a, b: a.mean() - b.mean(), x, y)
    # Twenty groups of two of each side: by hand for the mean.
    expected = np.sqrt(x.var(ddof=1) / 40 + y.var(ddof=1) / 40)
    assert result["standard_error"] == pytest.approx(expected, rel=0.35)
    assert result["ci"][0] < result["value"] < result["ci"][1]

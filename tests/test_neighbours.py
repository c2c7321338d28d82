# SPDX-License-Identifier: Apache-2.0
"""Precision, recall, density and coverage: identities, an independent computation, and what intervals mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import NearestNeighbors

from monai_synth.errors import UserError
from monai_synth.evaluate import neighbours as module
from monai_synth.evaluate.neighbours import KEYS, neighbour_results


def cloud(seed: int, n: int, dimension: int = 6, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dimension)) * scale + shift


def independent(real: np.ndarray, synthetic: np.ndarray, k: int) -> list[float]:
    """By scikit-learn's neighbours and scipy's distances, after the definitions of Naeem et al."""

    def radii(x: np.ndarray) -> np.ndarray:
        return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]

    d = cdist(real, synthetic)
    in_real = d < radii(real)[:, None]
    return [
        in_real.any(0).mean(), (d < radii(synthetic)[None]).any(1).mean(), in_real.sum(0).mean() / k,
        (d.min(1) < radii(real)).mean(),
    ]  # fmt: skip


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (0.7, 1), (0, 0.4), (100, 1)])
def test_all_four_agree_with_an_independent_computation(shift: float, scale: float) -> None:
    real, synthetic = cloud(0, 90, shift=30), cloud(1, 70, shift=30 + shift, scale=scale)
    results = neighbour_results(real, synthetic, k=4)
    assert [results[key]["value"] for key in KEYS] == pytest.approx(independent(real, synthetic, 4), abs=1e-12)
    assert results["recall"]["n"] == [90, 70]


def test_values_with_a_group_left_out_are_those_of_the_sets_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 300)  # several blocks
    real, synthetic = cloud(2, 60), cloud(3, 50, shift=0.5)
    gx, gy = np.arange(60) % 6, np.arange(50) % 6
    counts = module._Counts(real, synthetic, module._radii(real, 3, gx), module._radii(synthetic, 3, gy), gx, gy)
    without_x, without_y = counts.left_out(3)
    for g in range(6):
        assert list(without_x[g]) == pytest.approx(independent(real[gx != g], synthetic, 3))
        assert list(without_y[g]) == pytest.approx(independent(real, synthetic[gy != g], 3))


def test_a_set_and_itself_have_1_everywhere() -> None:
    x = cloud(4, 120) + 1000
    results = neighbour_results(x, x.copy())
    assert [results[key]["value"] for key in KEYS] == [1, 1, 1, 1]


def test_one_repeated_image_is_precise_and_covers_nothing() -> None:
    real = cloud(5, 200)
    synthetic = np.repeat(real[:1], 100, axis=0) + cloud(6, 100, scale=1e-3)
    results = {key: r["value"] for key, r in neighbour_results(real, synthetic).items()}
    assert results["precision"] == 1
    assert results["recall"] < 0.05
    assert results["coverage"] < 0.1


def test_sets_far_apart_share_nothing() -> None:
    results = neighbour_results(cloud(7, 50), cloud(8, 50, shift=1000))
    assert {r["value"] for r in results.values()} == {0}
    assert results["precision"]["ci"] == [0, 0]


def test_intervals_hold_the_value_and_are_as_wide_as_other_draws_spread() -> None:
    draws = [neighbour_results(cloud(i, 100), cloud(1000 + i, 100, shift=0.3)) for i in range(30)]
    for key in KEYS:
        spread = np.std([d[key]["value"] for d in draws], ddof=1)
        stated = np.mean([d[key]["standard_error"] for d in draws])
        assert 0.5 * spread < stated < 2.5 * spread, key
        assert all(d[key]["ci"][0] <= d[key]["value"] <= d[key]["ci"][1] for d in draws)


def test_images_of_one_patient_are_left_out_together() -> None:
    x = np.repeat(cloud(9, 20), 5, axis=0) + cloud(10, 100, scale=0.01)
    y = np.repeat(cloud(11, 20), 5, axis=0) + cloud(12, 100, scale=0.01)
    patients = np.repeat(np.arange(20), 5)
    single, grouped = neighbour_results(x, y), neighbour_results(x, y, patients, patients)
    assert grouped["precision"]["value"] == single["precision"]["value"]
    total = [sum(result[key]["standard_error"] for key in KEYS) for result in (single, grouped)]
    assert total[1] > 1.3 * total[0]


def test_too_few_images_are_not_measured_and_few_are_warned_of() -> None:
    assert neighbour_results(cloud(0, 5), cloud(1, 50))["recall"]["value"] is None
    assert "few images" in neighbour_results(cloud(0, 30), cloud(1, 50))["recall"]["warnings"][0]
    with pytest.raises(UserError, match="k is 0"):
        neighbour_results(cloud(0, 30), cloud(1, 50), k=0)

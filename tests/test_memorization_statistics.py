# SPDX-License-Identifier: Apache-2.0
"""Statistics of the memorization audit: levels hold on data without copies, whatever their distribution."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from monai_synth.evaluate.memorization_pictures import POSES, posed, ranks
from monai_synth.evaluate.memorization_scores import align
from monai_synth.evaluate.memorization_verdict import counting_p, fit_null, judge, membership, rate


def test_ranks_do_not_change_under_any_increasing_curve() -> None:
    image = np.random.default_rng(0).integers(0, 200, (20, 30), dtype=np.uint8)
    curve = np.cumsum(np.random.default_rng(1).integers(1, 2, 256)).astype(np.uint8)
    np.testing.assert_array_equal(ranks(image), ranks(curve[image]))
    assert ranks(image).mean() == pytest.approx(0.5)


def test_the_eight_poses_are_all_different_and_the_first_changes_nothing() -> None:
    image = np.arange(9).reshape(3, 3)
    assert len({posed(image, k).tobytes() for k in range(len(POSES))}) == 8
    np.testing.assert_array_equal(posed(image, 0), image)


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-4, 4)])
def test_a_shift_is_found_to_the_pixel(shift: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    query = np.roll(image, shift, (0, 1))
    assert align(query, image, (0, 0), 4, 6) == shift


def test_counting_is_the_conformal_p_value_by_patient() -> None:
    null = fit_null(np.array([0.1, 0.5, 0.5, 0.9]), ["a", "b", "c", "c"])
    # patients a, b and half of c lie below 0.7; c's other half above
    np.testing.assert_allclose(counting_p(np.array([0.7, 0.95, 0.0]), null), [(1 + 0.5) / 4, 1 / 4, 1.0])


@pytest.mark.parametrize("shape", ["normal", "gumbel", "exponential", "uniform"])
@pytest.mark.parametrize("num_patients", [1, 2, 5, 8, 19, 20, 100, 1000])
def test_fresh_images_raise_hardly_an_alarm_in_a_whole_audit(shape: str, num_patients: int) -> None:
    rng = np.random.default_rng(5)
    draw = {"normal": rng.normal, "gumbel": rng.gumbel, "exponential": rng.exponential, "uniform": rng.random}[shape]
    alarms = 0
    for _ in range(200):
        held, fresh = (np.tanh(0.5 + 0.1 * draw(size=n)) for n in (num_patients, 500))
        alarms += judge(fresh, fit_null(held, range(num_patients)), 0.01, mark=0.97)[0].any()
    assert alarms / 200 <= 0.05


@pytest.mark.parametrize("num", [1, 2, 3, 5, 8, 12, 19])
def test_of_few_patients_a_copy_to_the_pixel_is_flagged_and_what_only_exceeds_them_is_not(num: int) -> None:
    held = np.tanh(1.0 + 0.12 * np.random.default_rng(num).normal(size=num))
    flagged, record = judge(np.array([held.max() + 0.02, 0.99999]), fit_null(held, range(num)), 0.01, mark=0.97)
    assert flagged.tolist() == [False, True]
    assert record["threshold"] >= max(0.97, held.max())
    assert not record["has_tail"]


def test_a_copy_is_flagged_of_as_few_as_twenty_patients_without_the_mark() -> None:
    rng = np.random.default_rng(0)
    scores = np.append(np.tanh(0.5 + 0.1 * rng.normal(size=99)), 0.96)
    flagged, record = judge(scores, fit_null(np.tanh(0.5 + 0.1 * rng.normal(size=20)), range(20)), 0.01)
    assert np.flatnonzero(flagged).tolist() == [99]
    assert record["supported_level"] == pytest.approx(1 / 21)


def test_many_images_of_few_patients_are_few_patients() -> None:
    null = fit_null(np.linspace(0.1, 0.9, 100), [f"p{i % 4}" for i in range(100)])
    assert null.location is None
    assert not judge(np.array([0.95]), null, 0.01)[0].any()


def test_a_mark_near_which_held_out_images_lie_is_no_mark() -> None:
    """Where other patients reach 0.98, so do fresh images."""
    flagged, record = judge(
        np.array([0.985, 0.99, 0.99999]), fit_null(np.array([0.9, 0.98]), range(2)), 0.01, mark=0.97
    )
    assert flagged.tolist() == [False, False, True]
    assert 0.99 < record["threshold"] < 1


def test_the_threshold_separates_what_is_flagged() -> None:
    rng = np.random.default_rng(0)
    null = fit_null(np.tanh(0.5 + 0.1 * rng.normal(size=300)), range(300))
    scores = np.tanh(np.concatenate([0.5 + 0.1 * rng.normal(size=500), rng.uniform(0.5, 3, 40)]))
    flagged, record = judge(scores, null, 0.01)
    np.testing.assert_array_equal(flagged, scores > record["threshold"])


def test_one_patient_with_many_images_counts_once() -> None:
    held = np.concatenate([np.full(50, 0.99), np.linspace(0.1, 0.5, 49)])
    patients = ["many"] * 50 + [f"p{i}" for i in range(49)]
    p = counting_p(np.array([0.9]), fit_null(held, patients))
    assert p[0] == pytest.approx(2 / 51)


def test_membership_is_the_area_under_the_curve_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0.5, 1, 80).round(1), rng.normal(0, 1, 60).round(1)
    result = membership(inside, outside, (range(80), range(60)), seed=0)
    truth = np.r_[np.ones(80), np.zeros(60)]
    assert result["value"] == pytest.approx(roc_auc_score(truth, np.r_[inside, outside]))
    assert result["ci"][0] < result["value"] < result["ci"][1]
    assert membership(inside, outside, (range(80), ["a"] * 60), seed=0)["ci"] is None


def test_a_rate_of_zero_has_an_interval_that_shrinks_with_n() -> None:
    assert rate(np.zeros(100, bool))["ci"] == pytest.approx([0, 1 - 0.025 ** (1 / 100)])

# SPDX-License-Identifier: Apache-2.0
"""Frechet and kernel distance: closed forms, identities, other implementations, and what their intervals hold."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import FIDMetric

from monai_synth.errors import UserError
from monai_synth.evaluate.distribution import (
    _quick_frechet,
    frechet_distance,
    frechet_result,
    kernel_distance,
    kernel_result,
)


def features(seed: int, n: int, d: int) -> np.ndarray:
    """Correlated vectors (n, d)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ (np.random.default_rng(99).normal(size=(d, d)) / d**0.5)


def with_moments(seed: int, n: int, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Vectors whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(n, len(mean)))
    x = x - x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return white @ np.linalg.cholesky(cov).T + mean


def sqrtm_distance(x: np.ndarray, y: np.ndarray) -> float:
    """As the text prints it, by scipy."""
    c, w = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c @ w).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c + w - 2 * root))


def naive_kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / a.shape[1], coef0=1)

    n, m = len(x), len(y)
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    return float(sum(within) - 2 * kernel(x, y).sum() / (n * m))


@pytest.mark.parametrize(("n", "d"), [(50, 8), (10, 30)])
def test_a_set_is_at_frechet_distance_0_from_itself_in_any_order(n: int, d: int) -> None:
    x = features(0, n, d)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(x, x[np.random.default_rng(1).permutation(n)]) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("n", "d"), [(40, 8), (10, 30)])
def test_a_shift_by_c_is_at_frechet_distance_c_squared(n: int, d: int) -> None:
    x, shift = features(0, n, d), np.linspace(-1, 2, d)
    assert frechet_distance(x, x + shift) == pytest.approx((shift**2).sum())


def test_gaussians_with_commuting_covariances_have_the_closed_form() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    a, b = np.array([1, 2, 3, 0.1, 5, 0.01]), np.array([2, 2, 0.5, 0.3, 1, 4])
    mean_a, mean_b = np.arange(6.0), np.full(6, 0.5)
    x = with_moments(1, 40, mean_a, turn @ np.diag(a) @ turn.T)
    y = with_moments(2, 30, mean_b, turn @ np.diag(b) @ turn.T)
    expected = ((mean_a - mean_b) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)


@given(st.integers(0, 2**20), st.sampled_from([(30, 20, 5), (12, 40, 20), (6, 5, 20)]))
@settings(max_examples=25, deadline=None)
def test_frechet_distance_is_symmetric_not_negative_and_keeps_under_one_rotation_of_both(
    seed: int, sizes: tuple[int, int, int]
) -> None:
    n, m, d = sizes
    x, y = features(seed, n, d), 1.3 * features(seed + 1, m, d) + 0.2
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    value = frechet_distance(x, y)
    assert value >= 0
    assert frechet_distance(y, x) == pytest.approx(value, rel=1e-9)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d", "rel"), [(300, 200, 20, 1e-10), (100, 90, 64, 1e-9), (40, 30, 64, 1e-6)])
def test_scipy_and_monai_give_the_same_frechet_distance(n: int, m: int, d: int, rel: float) -> None:
    # Below n = d the root of a singular product, which these take, has no more digits than that.
    x, y = features(0, n, d), 1.2 * features(1, m, d) + 0.1
    assert frechet_distance(x, y) == pytest.approx(sqrtm_distance(x, y), rel=rel)
    assert frechet_distance(x, y) == pytest.approx(
        FIDMetric()(torch.from_numpy(x), torch.from_numpy(y)).item(), rel=rel
    )


@pytest.mark.parametrize(("n", "m", "d"), [(60, 40, 10), (12, 30, 50)])
def test_scikit_learns_kernel_gives_the_same_distance(n: int, m: int, d: int) -> None:
    x, y = features(0, n, d), features(1, m, d) + 0.3
    assert kernel_distance(x, y) == pytest.approx(naive_kernel_distance(x, y), rel=1e-10)
    assert kernel_result(x, y)["value"] == pytest.approx(kernel_distance(x, y), rel=1e-10)


def test_torchmetrics_gives_the_same_kernel_distance() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = features(0, 50, 12), features(1, 50, 12) + 0.3
    other = kid.poly_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert kernel_distance(x, y) == pytest.approx(other.item(), rel=1e-10)


def test_kernel_distance_of_two_halves_of_one_set_is_0_on_average_and_frechet_distance_is_not() -> None:
    rng, x = np.random.default_rng(0), features(3, 120, 10)
    kernel, frechet = [], []
    for _ in range(200):
        order = rng.permutation(120)
        halves = x[order[:60]], x[order[60:]]
        kernel.append(kernel_distance(*halves))
        frechet.append(frechet_distance(*halves))
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / 200**0.5
    assert min(kernel) < 0 < max(kernel)
    assert min(frechet) > 0


def test_leaving_out_groups_by_their_sums_is_computing_the_kernel_distance_anew() -> None:
    x, y = features(0, 40, 6), features(1, 40, 6) + 0.2
    groups = np.arange(40) % 8
    result = kernel_result(x, y, groups, groups)
    variance = 0.0
    for left in ([(x[groups != g], y) for g in range(8)], [(x, y[groups != g]) for g in range(8)]):
        values = np.array([naive_kernel_distance(*pair) for pair in left])
        variance += 7 / 8 * ((values - values.mean()) ** 2).sum()
    assert result["standard_error"] == pytest.approx(variance**0.5, rel=1e-9)


@pytest.mark.parametrize("measure", [frechet_result, kernel_result])
@pytest.mark.parametrize(("n", "m", "d"), [(100, 80, 6), (40, 50, 64)])
def test_the_interval_holds_the_mean_of_many_repetitions_as_often_as_it_says(measure, n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(0)
    results = [measure(rng.normal(size=(n, d)), 1.2 * rng.normal(size=(m, d)) + 0.2, seed=i) for i in range(80)]
    values = np.array([result["value"] for result in results])
    inside = np.mean([result["ci"][0] <= values.mean() <= result["ci"][1] for result in results])
    error = np.mean([result["standard_error"] for result in results])
    assert inside >= 0.88
    assert 0.85 < error / values.std(ddof=1) < 1.8  # rather too wide than too narrow


def test_a_bootstrap_of_the_frechet_distance_would_lie_above_the_distance() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 40)), rng.normal(size=(60, 40))
    resampled = [frechet_distance(x[rng.integers(0, 60, 60)], y[rng.integers(0, 60, 60)]) for _ in range(40)]
    assert min(resampled) > frechet_distance(x, y)


@pytest.mark.parametrize("measure", [frechet_result, kernel_result])
def test_copies_of_a_patients_image_do_not_narrow_the_interval(measure) -> None:
    x, y = features(0, 60, 5), features(1, 60, 5) + 0.3
    four = np.repeat(x, 4, axis=0) + 1e-6 * features(2, 240, 5)
    by_image = measure(four, y)["standard_error"]
    by_patient = measure(four, y, np.repeat(np.arange(60), 4), None)["standard_error"]
    assert by_patient > 1.2 * by_image


def test_fewer_images_than_features_are_warned_of() -> None:
    result = frechet_result(features(0, 30, 40), features(1, 50, 40))
    assert result["n"] == [30, 50]
    assert "biased upwards" in result["warnings"][0]
    assert not frechet_result(features(0, 41, 40), features(1, 50, 40))["warnings"]


@pytest.mark.parametrize("measure", [frechet_result, kernel_result])
def test_a_handful_of_images_or_patients_gets_a_value_without_an_interval(measure) -> None:
    few = measure(features(0, 6, 4), features(1, 50, 4))
    assert few["value"] is not None
    assert few["ci"] is None
    assert measure(features(0, 40, 4), features(1, 40, 4), np.arange(40) % 3, None)["ci"] is None


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (np.ones((1, 4)), np.ones((5, 4)), "2 images or more"),
        (np.ones((5, 4)), np.ones((5, 3)), "shapes"),
        (np.full((5, 4), np.nan), np.ones((5, 4)), "NaN"),
    ],
)
def test_features_that_cannot_be_compared_are_refused(x: np.ndarray, y: np.ndarray, match: str) -> None:
    for measure in (frechet_distance, kernel_distance, frechet_result, kernel_result):
        with pytest.raises(UserError, match=match):
            measure(x, y)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 12), (20, 60, 30), (15, 10, 30)])
def test_the_quick_form_behind_the_interval_agrees_also_where_features_never_vary(
    n: int, m: int, d: int, constant: bool
) -> None:
    x, y = features(0, n, d), 1.2 * features(1, m, d) + 0.1
    if constant:
        x[:, :3] = y[:, :3] = 0
    assert _quick_frechet(x, y) == pytest.approx(frechet_distance(x, y), rel=1e-6)

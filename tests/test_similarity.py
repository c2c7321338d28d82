# SPDX-License-Identifier: Apache-2.0
"""SSIM and MS-SSIM against other implementations, the draw of pairs and the interval of their mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from skimage.metrics import structural_similarity

from monai_synth.errors import UserError
from monai_synth.evaluate.similarity import mean_of_pairs, ms_ssim, random_pairs, scale_weights, ssim


def images(seed: int, *shape: int) -> torch.Tensor:
    """Noise over a flat half, where the variance is a difference of nearly equal numbers."""
    rng = np.random.default_rng(seed)
    x = rng.random(shape) ** 2
    x[..., : shape[-1] // 2] = 0.7 + 1e-3 * x[..., : shape[-1] // 2]
    return torch.from_numpy(x)


@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 40, 33)])
def test_scikit_image_gives_the_same_ssim(shape: tuple[int, ...]) -> None:
    x = images(0, *shape)
    y = 0.6 * x + 0.4 * images(1, *shape)
    expected = [
        structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, data_range=1.0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(x, y, strict=True)
    ]  # fmt: skip
    np.testing.assert_allclose(ssim(x, y), expected, atol=1e-9)


def test_monai_gives_the_same_ssim_and_ms_ssim_within_single_precision() -> None:
    x = images(0, 3, 1, 64, 64)
    y = 0.6 * x + 0.4 * images(1, 3, 1, 64, 64)
    np.testing.assert_allclose(ssim(x, y), SSIMMetric(2)(x, y)[:, 0], atol=1e-4)
    weights = scale_weights((64, 64))
    assert len(weights) == 3
    np.testing.assert_allclose(ms_ssim(x, y), MultiScaleSSIMMetric(2, weights=weights)(x, y)[:, 0], atol=1e-4)


def test_five_scales_are_those_of_the_paper() -> None:
    x = images(0, 2, 1, 192, 192)
    y = 0.8 * x + 0.2 * images(1, 2, 1, 192, 192)
    assert scale_weights((192, 192)) == pytest.approx((0.0448, 0.2856, 0.3001, 0.2363, 0.1333), abs=1e-4)
    np.testing.assert_allclose(ms_ssim(x, y), MultiScaleSSIMMetric(2)(x, y)[:, 0], atol=2e-4)


@given(st.integers(0, 2**20), st.integers(11, 40))
@settings(max_examples=20, deadline=None)
def test_an_image_is_at_similarity_1_to_itself_and_two_images_are_as_like_either_way(seed: int, size: int) -> None:
    x, y = images(seed, 1, 1, size, 28), images(seed + 1, 1, 1, size, 28)
    for measure in (ssim, ms_ssim):
        assert measure(x, x).item() == pytest.approx(1, abs=1e-9)
        assert measure(x, y).item() == pytest.approx(measure(y, x).item(), abs=1e-12)
        assert measure(x, y).item() < 1


def test_two_flat_images_have_the_luminance_term_alone() -> None:
    a, b = 0.3, 0.8
    x, y = (torch.full((1, 1, 28, 28), v, dtype=torch.float64) for v in (a, b))
    expected = (2 * a * b + 0.01**2) / (a * a + b * b + 0.01**2)
    assert ssim(x, y).item() == pytest.approx(expected, rel=1e-9)
    # Two scales at this size, of which the coarser alone sees luminance.
    assert ms_ssim(x, y).item() == pytest.approx(expected ** (0.2856 / (0.0448 + 0.2856)), rel=1e-9)


@pytest.mark.parametrize(
    ("size", "num"), [((28, 28), 2), ((21, 40), 1), ((64, 80), 3), ((176, 300), 5), ((175, 300), 4)]
)
def test_as_many_scales_are_taken_as_hold_the_window(size: tuple[int, int], num: int) -> None:
    assert len(scale_weights(size)) == num
    assert sum(scale_weights(size)) == pytest.approx(1)


def test_images_smaller_than_the_window_are_refused() -> None:
    x = torch.zeros(1, 1, 10, 28)
    for measure in (ssim, ms_ssim):
        with pytest.raises(UserError, match="11 x 11"):
            measure(x, x)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 200), st.integers(0, 99))
def test_random_pairs_are_all_different_and_use_each_image_equally_often(n: int, m: int, num: int, seed: int) -> None:
    pairs = random_pairs(n, m, num, seed)
    assert len(pairs) == min(num, n * m)
    assert len({tuple(pair) for pair in pairs.tolist()}) == len(pairs)
    for side, size in ((0, n), (1, m)):
        counts = np.bincount(pairs[:, side], minlength=size)
        assert counts.max() - counts.min() <= 1


def test_the_same_seed_draws_the_same_pairs_and_another_seed_others() -> None:
    np.testing.assert_array_equal(random_pairs(50, 40, 60, [0, 1]), random_pairs(50, 40, 60, [0, 1]))
    assert (random_pairs(50, 40, 60, [0, 1]) != random_pairs(50, 40, 60, [0, 2])).any()


def test_the_interval_of_pairs_that_share_nothing_is_the_usual_one() -> None:
    values = np.random.default_rng(0).normal(size=200)
    result = mean_of_pairs(values, range(200), range(200))
    assert result["value"] == values.mean()
    assert result["n"] == 200
    assert result["standard_error"] == pytest.approx(values.std(ddof=1) / 200**0.5)


def test_the_interval_of_pairs_that_share_images_holds_the_mean_as_often_as_it_says() -> None:
    rng, inside, naive = np.random.default_rng(0), [], []
    for seed in range(300):
        a, b = rng.normal(size=40), rng.normal(size=25)
        pairs = random_pairs(40, 25, 400, seed)
        values = a[pairs[:, 0]] + b[pairs[:, 1]] + rng.normal(size=400)
        result = mean_of_pairs(values, *pairs.T)
        inside.append(result["ci"][0] <= 0 <= result["ci"][1])
        naive.append(abs(values.mean()) < 1.96 * values.std() / 20)
    assert 0.9 <= np.mean(inside) <= 0.98
    assert np.mean(naive) < 0.75


def test_pairs_of_one_patient_have_no_interval_but_a_spread() -> None:
    values = np.asarray([0.1, 0.5, 0.3])
    result = mean_of_pairs(values, ["p", "p", "p"], ["q", "r", "s"])
    assert result["ci"] is None
    assert result["sd"] == pytest.approx(0.2)
    assert mean_of_pairs(values, ["p", "p", "t"], ["q", "r", "s"])["ci"] is not None

# SPDX-License-Identifier: Apache-2.0
"""Sampling given a known part: exact recursions where image and mask are jointly Gaussian, beside the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monai_synth.diffusion import alphas_cumprod, sampling_timesteps
from monai_synth.errors import UserError
from monai_synth.inference import make_generators
from monai_synth.inference.conditioning import KnownPart
from monai_synth.inference.joint import JointInferer

LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
CORRELATION, GIVEN = 0.9, 1.0
COVARIANCE = np.array([[1.0, CORRELATION], [CORRELATION, 1.0]])  # of (sampled b, given a)
TRUE_MEAN, TRUE_STD = CORRELATION * GIVEN, math.sqrt(1 - CORRELATION**2)
NUM_SAMPLES = 20_000


class ExactDenoiser(torch.nn.Module):
    """E[eps | x_t] of jointly Gaussian channels; every pixel is a draw of its own."""

    def __init__(self, covariance: np.ndarray = COVARIANCE) -> None:
        super().__init__()
        identity = np.eye(len(covariance))
        tables = [math.sqrt(1 - a) * np.linalg.inv(a * covariance + (1 - a) * identity) for a in ABAR]
        self.tables = torch.from_numpy(np.stack(tables)).float()

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cd,bdn->bcn", self.tables[timesteps[0]], x)


def sampled(**options) -> tuple[float, float]:
    """Mean and standard deviation of b given a, by the inferer. Its s^2 is 1 for this range, as that of the data."""
    known = torch.full((2, 2, NUM_SAMPLES // 2), GIVEN)
    is_known = torch.zeros_like(known, dtype=torch.bool)
    is_known[:, 1] = True
    inferer = JointInferer(LINEAR, value_range=(-1, 1), learned_variance=False, clip=False, **options)
    x_0 = inferer(known, ExactDenoiser(), is_known=is_known, seeds=[0, 1])["x_0"]
    assert (x_0[:, 1] == GIVEN).all()
    return float(x_0[:, 0].mean()), float(x_0[:, 0].std())


# The recursion, in numpy, sharing no code with the package. All is linear: b = mean + slope z + sqrt(variance) w, where
# z is the noise of a that stays ("fixed"; slope 0 for "fresh") and w is all other noise.


def recursion(
    sampler: str, num_steps: int, known_noise: str = "fresh", resample: int = 1, gradient_scale: float = 0.0
) -> tuple[float, float]:
    steps = sampling_timesteps(LINEAR, num_steps)
    mean, slope, variance = 0.0, 0.0, 1.0
    for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
        abar, before = ABAR[t], ABAR[t_prev] if t_prev >= 0 else 1.0
        data = math.sqrt(abar) * COVARIANCE @ np.linalg.inv(abar * COVARIANCE + (1 - abar) * np.eye(2))
        r_squared = (1 - abar) / (abar + 1 - abar)
        # gradient of -(a - x_0_a)^2 / (2 r^2) by b, as a number times a, a_t and b
        pull = gradient_scale * data[1, 0] / r_squared * np.array([1.0, -data[1, 1], -data[1, 0]])
        if sampler == "ddpm":
            step_variance = (1 - before) / (1 - abar) * (1 - abar / before)
            from_data = math.sqrt(before) * (1 - abar / before) / (1 - abar)
            factor = from_data * np.array([0, data[0, 1], data[0, 0]]) + step_variance * pull
            factor[2] += math.sqrt(abar / before) * (1 - before) / (1 - abar)
        else:
            step_variance = 0.0
            x_0 = np.array([0, data[0, 1], data[0, 0]]) + (1 - abar) / math.sqrt(abar) * pull
            eps = (np.array([0, 0, 1]) - math.sqrt(abar) * x_0) / math.sqrt(1 - abar)
            factor = math.sqrt(before) * x_0 + math.sqrt(1 - before) * eps
        for repeat in range(resample if t_prev >= 0 else 1):
            if repeat:
                kept = abar / before
                mean, slope, variance = math.sqrt(kept) * mean, math.sqrt(kept) * slope, kept * variance + 1 - kept
            mean = factor[0] * GIVEN + factor[1] * math.sqrt(abar) * GIVEN + factor[2] * mean
            variance = factor[2] ** 2 * variance + step_variance
            slope = factor[2] * slope
            if known_noise == "fixed":
                slope += factor[1] * math.sqrt(1 - abar)
            else:
                variance += factor[1] ** 2 * (1 - abar)
    return mean, math.sqrt(slope**2 + variance)


def distance(mean: float, std: float) -> float:
    """2-Wasserstein distance to the true conditional."""
    return math.hypot(mean - TRUE_MEAN, std - TRUE_STD)


@pytest.mark.parametrize(
    ("sampler", "num_steps", "options"),
    [
        ("ddpm", 1000, {}),
        ("ddpm", 100, {}),
        ("ddpm", 50, {}),
        ("ddpm", 100, {"known_noise": "fixed"}),
        ("ddpm", 50, {"resample": 2}),
        ("ddpm", 50, {"resample": 5}),
        ("ddpm", 50, {"resample": 10}),
        ("ddpm", 100, {"gradient_scale": 1.0}),
        ("ddpm", 50, {"gradient_scale": 0.5, "resample": 3}),
        ("ddim", 20, {}),
        ("ddim", 20, {"known_noise": "fixed"}),
        ("ddim", 20, {"gradient_scale": 1.0}),
    ],
)
def test_samples_given_the_known_part_have_the_mean_and_spread_of_the_exact_recursion(sampler, num_steps, options):
    expected_mean, expected_std = recursion(sampler, num_steps, **options)
    mean, std = sampled(sampler=sampler, num_steps=num_steps, **options)
    error = expected_std / math.sqrt(NUM_SAMPLES)
    rounding = 2e-3 if sampler == "ddim" else 1e-3  # diffusers keeps its tables in single precision
    assert mean == pytest.approx(expected_mean, abs=4 * error + rounding)
    assert std == pytest.approx(expected_std, abs=4 * error / math.sqrt(2) + rounding)


class TestBias:
    """What the docs say of the distance to the truth, in closed form."""

    def test_replacement_alone_is_far_from_the_true_conditional_however_many_steps_are_taken(self):
        found = [recursion("ddpm", num_steps) for num_steps in (1000, 100, 50)]
        assert all(mean < 0.7 * TRUE_MEAN and std > 1.2 * TRUE_STD for mean, std in found)

    @pytest.mark.parametrize("num_steps", [1000, 100, 50])
    def test_each_repetition_of_the_steps_brings_it_closer(self, num_steps):
        distances = [distance(*recursion("ddpm", num_steps, resample=r)) for r in (1, 2, 5, 10)]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < distances[0] / 7

    @pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", 1000), ("ddpm", 100), ("ddpm", 50), ("ddim", 20)])
    def test_the_gradient_correction_is_less_than_a_third_as_far_off(self, sampler, num_steps):
        corrected = distance(*recursion(sampler, num_steps, gradient_scale=1.0))
        assert corrected < distance(*recursion(sampler, num_steps)) / 3

    @pytest.mark.parametrize(("sampler", "num_steps"), [("ddpm", 1000), ("ddpm", 50), ("ddim", 20)])
    def test_fresh_noise_of_the_known_part_is_closer_than_one_noise_for_the_whole_path(self, sampler, num_steps):
        fresh, fixed = (distance(*recursion(sampler, num_steps, known_noise)) for known_noise in ("fresh", "fixed"))
        assert fresh < fixed


class TestManyKnownEntries:
    """One entry given 16 others, all correlated: the correction counts each of these as news."""

    COVARIANCE = np.full((17, 17), 0.5) + 0.5 * np.eye(17)

    def distance(self, **options) -> float:
        weights = np.linalg.solve(self.COVARIANCE[1:, 1:], self.COVARIANCE[1:, 0])
        true_mean, true_std = weights.sum() * GIVEN, math.sqrt(1 - weights @ self.COVARIANCE[1:, 0])
        known = torch.full((1, 17, 3_000), GIVEN)
        is_known = torch.ones_like(known, dtype=torch.bool)
        is_known[:, 0] = False
        inferer = JointInferer(LINEAR, value_range=(-1, 1), learned_variance=False, clip=False, **options)
        x_0 = inferer(known, ExactDenoiser(self.COVARIANCE), is_known=is_known, seeds=[0])["x_0"][:, 0]
        return math.hypot(float(x_0.mean()) - true_mean, float(x_0.std()) - true_std)

    def test_a_weak_correction_helps_and_a_full_one_overshoots(self):
        none, weak, full = (self.distance(sampler="dpm++", num_steps=20, gradient_scale=g) for g in (0.0, 0.1, 1.0))
        assert weak < 0.7 * none
        assert full > 2 * none

    def test_repeated_steps_help(self):
        once, often = (self.distance(sampler="ddpm", num_steps=50, resample=r) for r in (1, 5))
        assert often < 0.7 * once


class TestKnownPart:
    def part(self, known_noise: str = "fresh", size: int = 20_000) -> KnownPart:
        known = torch.full((2, 2, size), 0.3)
        is_known = torch.zeros_like(known, dtype=torch.bool)
        is_known[:, 1] = True
        table = alphas_cumprod(LINEAR)
        return KnownPart(known, is_known, table, make_generators([1, 2]), known_noise=known_noise)

    @pytest.mark.parametrize("t_prev", [900, 300, 0])
    def test_known_entries_get_the_noise_of_the_end_of_the_step(self, t_prev):
        x = torch.zeros(2, 2, 20_000)
        replaced = self.part().replace(x, t_prev)
        assert (replaced[:, 0] == 0).all()
        assert float(replaced[:, 1].mean()) == pytest.approx(0.3 * math.sqrt(ABAR[t_prev]), abs=0.02)
        assert float(replaced[:, 1].var()) == pytest.approx(1 - ABAR[t_prev], rel=0.05)

    def test_after_the_last_step_they_are_what_was_given(self):
        assert (self.part().replace(torch.zeros(2, 2, 20_000), -1)[:, 1] == torch.tensor(0.3)).all()

    def test_fixed_noise_is_that_of_the_start_at_every_step(self):
        part, x_T = self.part("fixed", 50), torch.randn(2, 2, 50)
        start = part.begin(x_T, 999)
        assert torch.equal(start[:, 0], x_T[:, 0])
        for t, x in ((999, start), (400, part.replace(x_T, 400)), (10, part.replace(x_T, 10))):
            eps = (x[:, 1] - math.sqrt(ABAR[t]) * 0.3) / math.sqrt(1 - ABAR[t])
            torch.testing.assert_close(eps, x_T[:, 1], rtol=1e-4, atol=1e-4)

    def test_fresh_noise_is_another_at_every_step_and_in_every_sample(self):
        part = self.part("fresh", 50)
        first, second = (part.replace(torch.zeros(2, 2, 50), 500)[:, 1] for _ in range(2))
        assert (first != second).all()
        assert (first[0] != first[1]).all()

    def test_another_kind_of_noise_is_refused(self):
        with pytest.raises(UserError, match="known_noise is 'none'; allowed are fresh, fixed"):
            self.part("none")


def test_the_gradient_is_that_of_the_log_probability_and_0_at_the_known_entries():
    """Central differences of log N(known; x_0(x_t), r^2), written out, for a network that is not linear."""

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flip(1) + 0.3 * x.roll(1, dims=2)) + 0.1 * x**2

    generator = torch.Generator().manual_seed(0)
    x, known = (torch.randn(2, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    is_known = torch.rand(x.shape, generator=generator) > 0.5
    part = KnownPart(known, is_known, alphas_cumprod(LINEAR), make_generators([0, 1]))
    t, s_squared = 400, 0.7
    with torch.no_grad():
        found = part.guidance(predict, scale=1.5, data_variance=s_squared)(x, t, 0.1)
    r_squared = s_squared * (1 - ABAR[t]) / (s_squared * ABAR[t] + 1 - ABAR[t])
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[i] = 1e-5
        up, down = (
            -float(((known - predict(x + s * step.view_as(x), None))[is_known] ** 2).sum()) / (2 * r_squared)
            for s in (1, -1)
        )
        expected = 0.0 if is_known.flatten()[i] else 1.5 * (up - down) / 2e-5
        assert float(found.flatten()[i]) == pytest.approx(expected, rel=1e-6, abs=1e-8)

# SPDX-License-Identifier: Apache-2.0
"""Posterior, learned variance, KL and decoder likelihood, against diffusers, torch.distributions and scipy."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from scipy.stats import norm

from monai_synth.diffusion import add_noise, alphas_cumprod, predicted_x_0, sampling_timesteps, training_target
from monai_synth.diffusion.variance import (
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    learned_log_variance,
    posterior_log_variance,
    posterior_mean,
)

LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
SCHEDULES = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
TIMESTEPS = torch.tensor([0, 1, 2, 10, 500, 998, 999])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diffusers_scheduler(schedule: dict, timesteps: list[int]) -> DDPMScheduler:
    """In float64, so that only formulas can differ."""
    scheduler = DDPMScheduler(**schedule, variance_type="learned_range", clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(timesteps=timesteps)
    scheduler.alphas_cumprod = alphas_cumprod(schedule)
    return scheduler


class TestPosterior:
    @SCHEDULES
    def test_the_mean_is_the_step_of_diffusers_without_its_noise(self, schedule, monkeypatch):
        scheduler = diffusers_scheduler(schedule, list(range(999, -1, -1)))
        x_0, x_t = normal(len(TIMESTEPS), 3), normal(len(TIMESTEPS), 3, seed=1)
        mean = posterior_mean(schedule, x_0, x_t, TIMESTEPS)
        for i, t in enumerate(TIMESTEPS.tolist()):
            noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            output = torch.cat([x_0[i : i + 1], -torch.ones(1, 3)], dim=1)
            steps = []
            for sign in (1, -1):  # two draws of opposite noise: their mean is the mean
                monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, draw=sign * noise, **__: draw)
                steps.append(scheduler.step(output, t, x_t[i : i + 1], return_dict=False)[0])
            torch.testing.assert_close(mean[i : i + 1], (steps[0] + steps[1]) / 2, rtol=1e-9, atol=1e-9)

    def test_the_mean_is_that_of_two_gaussians_multiplied(self):
        """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add."""
        table = alphas_cumprod(LINEAR)
        t = TIMESTEPS[1:]
        alpha, before = table[t] / table[t - 1], table[t - 1]
        x_0, x_t = normal(len(t)), normal(len(t), seed=1)
        precision = alpha / (1 - alpha) + 1 / (1 - before)
        mean = (alpha.sqrt() * x_t / (1 - alpha) + before.sqrt() * x_0 / (1 - before)) / precision
        torch.testing.assert_close(posterior_mean(LINEAR, x_0, x_t, t), mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(posterior_log_variance(LINEAR, t), -precision.log(), rtol=1e-9, atol=1e-9)

    def test_at_the_first_timestep_the_mean_is_x_0_and_the_variance_that_of_the_second(self):
        x_0, x_t, zero = normal(4), normal(4, seed=1), torch.zeros(4, dtype=torch.long)
        torch.testing.assert_close(posterior_mean(LINEAR, x_0, x_t, zero), x_0, rtol=1e-12, atol=1e-12)
        assert torch.equal(posterior_log_variance(LINEAR, zero), posterior_log_variance(LINEAR, zero + 1))

    def test_single_precision_costs_less_than_1e_5(self):
        x_0, x_t = normal(len(TIMESTEPS), 50), normal(len(TIMESTEPS), 50, seed=1)
        mean = posterior_mean(LINEAR, x_0, x_t, TIMESTEPS)
        single = posterior_mean(LINEAR, x_0.float(), x_t.float(), TIMESTEPS)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), mean, rtol=1e-5, atol=1e-5)


class TestLearnedVariance:
    @SCHEDULES
    @pytest.mark.parametrize("num_steps", [1000, 50])
    def test_it_is_the_learned_range_of_diffusers_on_the_full_and_on_a_shortened_chain(self, schedule, num_steps):
        timesteps = sampling_timesteps(schedule, num_steps)
        scheduler = diffusers_scheduler(schedule, timesteps)
        table = alphas_cumprod(schedule)[timesteps[::-1]]
        v = normal(num_steps).clamp(-1, 1)
        found = learned_log_variance(table, v, torch.arange(num_steps))
        for i in (1, 2, num_steps // 2, num_steps - 1):
            expected = scheduler._get_variance(timesteps[::-1][i], v[i])
            assert float(found[i]) == pytest.approx(float(expected), abs=1e-9)

    def test_half_way_is_the_geometric_mean_and_the_ends_are_beta_and_beta_tilde(self):
        table = alphas_cumprod(LINEAR)
        t = TIMESTEPS[1:]
        beta = 1 - table[t] / table[t - 1]
        tilde = beta * (1 - table[t - 1]) / (1 - table[t])
        for value, expected in ((-1, tilde), (0, (beta * tilde).sqrt()), (1, beta)):
            v = torch.full((len(t),), value, dtype=torch.float64)
            torch.testing.assert_close(learned_log_variance(LINEAR, v, t).exp(), expected, rtol=1e-9, atol=0)

    def test_it_lies_between_beta_tilde_and_beta_at_every_timestep(self):
        t = torch.arange(1000)
        v = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
        log_variance = learned_log_variance(LINEAR, v, t)
        table = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod(LINEAR)])
        assert (log_variance <= torch.log(1 - table[1:] / table[:-1])).all()
        assert (log_variance >= posterior_log_variance(LINEAR, t)).all()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_data_that_a_prediction_means_are_those_it_was_made_of(kind):
    schedule = {**LINEAR, "prediction_type": kind}
    x_0, eps = normal(len(TIMESTEPS), 9), normal(len(TIMESTEPS), 9, seed=1)
    x_t = add_noise(schedule, x_0, eps, TIMESTEPS)
    prediction = training_target(schedule, x_0, eps, TIMESTEPS)
    torch.testing.assert_close(predicted_x_0(schedule, prediction, x_t, TIMESTEPS), x_0, rtol=1e-9, atol=1e-9)


class TestDivergence:
    def test_kl_is_that_of_torch_distributions(self):
        mean_1, log_1, mean_2, log_2 = (normal(200, seed=i) for i in range(4))
        first, second = (
            torch.distributions.Normal(mean, (0.5 * log).exp()) for mean, log in ((mean_1, log_1), (mean_2, log_2))
        )
        expected = torch.distributions.kl_divergence(first, second)
        torch.testing.assert_close(gaussian_kl(mean_1, log_1, mean_2, log_2), expected, rtol=1e-9, atol=1e-9)

    def test_kl_of_a_gaussian_to_itself_is_exactly_0(self):
        mean, log_variance = normal(50).float(), normal(50, seed=1).float()
        assert (gaussian_kl(mean, log_variance, mean, log_variance) == 0).all()


@pytest.mark.parametrize("value_range", [(0, 1), (-1, 1)], ids=["0..1", "-1..1"])
class TestLikelihood:
    def values(self, value_range: tuple[int, int]) -> torch.Tensor:
        low, high = value_range
        return low + (high - low) * torch.arange(256, dtype=torch.float64) / 255

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
    @pytest.mark.parametrize("scale", [0.003, 0.05, 1.0])
    def test_the_probabilities_of_all_values_sum_to_1(self, value_range, scale, dtype, tolerance):
        x_0 = self.values(value_range).to(dtype)
        for mean in (-1.2, 0.0, 0.37, 1.0):
            log = discretized_gaussian_log_likelihood(
                x_0, torch.full_like(x_0, mean), torch.full_like(x_0, math.log(scale)), value_range
            )
            assert float(log.exp().sum()) == pytest.approx(1, abs=tolerance)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
    def test_it_is_the_difference_of_scipys_distribution_functions(self, value_range, dtype, tolerance):
        x_0 = self.values(value_range)
        scale = 0.05
        mean = x_0 + scale * normal(256).clamp(-3, 3)
        edges = (x_0[1:] + x_0[:-1]) / 2
        edges = torch.cat([torch.tensor([-math.inf]), edges, torch.tensor([math.inf])]).numpy()
        expected = norm.cdf(edges[1:], mean, scale) - norm.cdf(edges[:-1], mean, scale)
        found = discretized_gaussian_log_likelihood(
            x_0.to(dtype), mean.to(dtype), torch.full_like(x_0, math.log(scale)).to(dtype), value_range
        )
        torch.testing.assert_close(found.exp().double(), torch.from_numpy(expected), rtol=0, atol=tolerance)

    def test_a_prediction_that_is_far_off_costs_a_finite_amount_and_has_a_gradient(self, value_range):
        x_0 = self.values(value_range).float()
        log_scale = torch.full_like(x_0, math.log(0.01), requires_grad=True)
        log = discretized_gaussian_log_likelihood(x_0, torch.full_like(x_0, 3.0), log_scale, value_range)
        log.sum().backward()
        assert log.isfinite().all()
        assert log_scale.grad.isfinite().all()
        assert (log_scale.grad[:255] > 0).all()  # a larger variance costs less

# SPDX-License-Identifier: Apache-2.0
"""The sampling loop: guidance by closed forms, independence of samples, and no state that leaks."""

from __future__ import annotations

import math

import pytest
import torch

from monai_synth.diffusion import SAMPLERS, alphas_cumprod, make_sampler, sampling_timesteps, step_variance
from monai_synth.inference import initial_noise, make_generators, sample

SCALED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0205,
}
TABLE = alphas_cumprod(SCALED)
DATA_STD, TARGET, SHARPNESS = 0.5, 2.0, 0.3

EVERY_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)


def exact(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The best prediction of the noise for data N(0, DATA_STD^2)."""
    abar = TABLE[t[0]]  # one timestep for all; a table look-up for each of many samples would take all the time
    return (1 - abar).sqrt() * x_t / (abar * DATA_STD**2 + 1 - abar)


def towards_target(x_t: torch.Tensor, t: int, variance: float) -> torch.Tensor:
    """Gradient of log p = -SHARPNESS / 2 (x_t - TARGET)^2."""
    return -SHARPNESS * (x_t - TARGET)


def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Something nonlinear that mixes neighbours."""
    kernel = torch.linspace(-0.3, 0.3, 9, device=x_t.device).view(1, 1, 3, 3).expand(2, 2, 3, 3)
    return torch.tanh(torch.nn.functional.conv2d(x_t, kernel, padding=1)) + 0.5 * x_t + t.view(-1, 1, 1, 1) / 2000


class TestGuidance:
    @pytest.mark.parametrize("num_steps", [1000, 50, 20])
    def test_a_quadratic_log_probability_shifts_an_ancestral_mean_by_the_closed_form(self, num_steps):
        """The chain is affine in x: its mean follows mean' = a mean + variance * gradient(mean), from 0."""
        steps = sampling_timesteps(SCALED, num_steps)
        mean = 0.0
        for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
            abar, before = float(TABLE[t]), float(TABLE[t_prev]) if t_prev >= 0 else 1.0
            data = math.sqrt(abar) * DATA_STD**2 / (abar * DATA_STD**2 + 1 - abar)
            factor = math.sqrt(before) * (1 - abar / before) / (1 - abar) * data
            factor += math.sqrt(abar / before) * (1 - before) / (1 - abar)
            variance = (1 - before) / (1 - abar) * (1 - abar / before)
            mean = factor * mean - variance * SHARPNESS * (mean - TARGET)
        noise = torch.randn(5_000, 1, dtype=torch.float64)
        x_0 = sample(exact, noise, make_sampler("ddpm", SCALED, num_steps), guidance=towards_target)
        assert mean > 0.2
        assert float(x_0.mean()) == pytest.approx(mean, abs=4 * float(x_0.std()) / math.sqrt(5_000))

    @pytest.mark.parametrize("num_steps", [1000, 50, 20])
    def test_a_quadratic_log_probability_shifts_a_ddim_sample_by_the_closed_form(self, num_steps):
        steps = sampling_timesteps(SCALED, num_steps)
        x = 0.7
        for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
            abar, before = float(TABLE[t]), float(TABLE[t_prev]) if t_prev >= 0 else 1.0
            score = -x / (abar * DATA_STD**2 + 1 - abar) - SHARPNESS * (x - TARGET)
            data = (x + (1 - abar) * score) / math.sqrt(abar)  # Tweedie's formula
            x = math.sqrt(before) * data - math.sqrt(1 - before) * math.sqrt(1 - abar) * score
        noise = torch.full((1, 1), 0.7, dtype=torch.float64)
        x_0 = sample(exact, noise, make_sampler("ddim", SCALED, num_steps), guidance=towards_target)
        assert float(x_0) == pytest.approx(x, rel=1e-3)
        assert float(x_0) - float(sample(exact, noise, make_sampler("ddim", SCALED, num_steps))) > 0.2

    def test_all_deterministic_solvers_agree_on_the_guided_sample(self):
        """They solve the same guided equation, so with many steps they meet."""
        noise = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64)
        ddim, dpm, unipc = (
            sample(exact, noise, make_sampler(name, SCALED, 500), guidance=towards_target)
            for name in ("ddim", "dpm++", "unipc")
        )
        torch.testing.assert_close(dpm, unipc, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(ddim, dpm, rtol=2e-2, atol=2e-2)

    @EVERY_SAMPLER
    def test_a_zero_gradient_changes_no_bit(self, name):
        noise = initial_noise((2, 6, 6), make_generators([1, 2]))
        plain, guided = (
            sample(network, noise, make_sampler(name, SCALED, 12), guidance=g, generators=make_generators([1, 2]))
            for g in (None, lambda x_t, t, variance: torch.zeros_like(x_t))
        )
        assert torch.equal(plain, guided)

    @EVERY_SAMPLER
    def test_guidance_hears_the_timestep_and_the_variance_of_its_ancestral_step(self, name):
        heard = []

        def listen(x_t, t, variance):
            heard.append((t, variance))
            return torch.zeros_like(x_t)

        sample(network, torch.zeros(1, 2, 4, 4), make_sampler(name, SCALED, 5), guidance=listen)
        steps = sampling_timesteps(SCALED, 5)
        assert [t for t, _ in heard] == steps
        expected = [step_variance(SCALED, t, t_prev) for t, t_prev in zip(steps, [*steps[1:], -1], strict=True)]
        assert [v for _, v in heard] == pytest.approx(expected, rel=1e-3)
        assert heard[-1][1] == 0

    @pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
    @pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc"])
    def test_guidance_is_the_same_whatever_the_network_predicts(self, name, prediction_type):
        def denoise(x_t, t):
            abar, eps = TABLE[t[0]], exact(x_t, t)
            data = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
            return data if prediction_type == "sample" else abar.sqrt() * eps - (1 - abar).sqrt() * data

        noise = torch.randn(4, 1, dtype=torch.float64)
        sampler = make_sampler(name, SCALED | {"prediction_type": prediction_type}, 20)
        x_0 = sample(denoise, noise, sampler, guidance=towards_target)
        expected = sample(exact, noise, make_sampler(name, SCALED, 20), guidance=towards_target)
        torch.testing.assert_close(x_0, expected, rtol=1e-3, atol=1e-4)


class TestSeeds:
    @EVERY_SAMPLER
    def test_the_image_of_a_seed_is_the_same_alone_and_among_others(self, name):
        def run(seeds):
            generators = make_generators(seeds)
            noise = initial_noise((2, 8, 8), generators)
            return sample(network, noise, make_sampler(name, SCALED, 15), generators=generators)

        together = run([11, 12, 13, 14])
        for i, seed in enumerate([11, 12, 13, 14]):
            torch.testing.assert_close(together[i], run([seed])[0], rtol=1e-5, atol=1e-5)
        assert (together[0] - together[1]).abs().max() > 0.1

    def test_the_ancestral_noise_of_a_seed_comes_from_its_own_generator(self):
        """With a network that predicts 0 and equal starts, samples differ only by the noise of the steps."""
        zero = torch.zeros(3, 2, 4, 4)
        x_0 = sample(
            lambda x_t, t: torch.zeros_like(x_t),
            zero,
            make_sampler("ddpm", SCALED, 10),
            generators=make_generators([1, 2, 1]),
        )
        assert torch.equal(x_0[0], x_0[2])
        assert not torch.equal(x_0[0], x_0[1])

    def test_the_global_generator_is_neither_used_nor_moved(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        generators = make_generators([4])
        sample(
            network,
            initial_noise((2, 4, 4), generators),
            make_sampler("ddpm", SCALED, 5),
            generators=generators,
        )
        assert torch.equal(before, torch.get_rng_state())

    def test_initial_noise_is_what_each_generator_draws(self):
        noise = initial_noise((3, 4), make_generators([5, 6]))
        assert torch.equal(noise[1], torch.randn(3, 4, generator=torch.Generator().manual_seed(6)))

    def test_a_wrong_number_of_generators_is_refused(self):
        with pytest.raises(ValueError, match="2 generators for 3 samples"):
            sample(
                network,
                torch.zeros(3, 2, 4, 4),
                make_sampler("ddpm", SCALED, 5),
                generators=make_generators([1, 2]),
            )


class TestState:
    @EVERY_SAMPLER
    def test_a_scheduler_serves_two_calls_with_the_same_result(self, name):
        sampler, noise = make_sampler(name, SCALED, 10), initial_noise((2, 6, 6), make_generators([0]))
        first, second = (sample(network, noise, sampler, generators=make_generators([0])) for _ in range(2))
        assert torch.equal(first, second)

    def test_a_scheduler_that_someone_stepped_is_refused(self):
        sampler, noise = make_sampler("dpm++", SCALED, 10), torch.zeros(1, 2, 4, 4)
        sampler.step(noise, sampler.timesteps[0], noise)
        with pytest.raises(ValueError, match="has been stepped before"):
            sample(network, noise, sampler)

    def test_the_noise_that_is_given_stays_as_it_is(self):
        noise = torch.ones(1, 2, 4, 4)
        sample(lambda x_t, t: x_t.mul_(0.5), noise, make_sampler("ddim", SCALED, 3))
        assert torch.equal(noise, torch.ones(1, 2, 4, 4))

    def test_the_denoiser_runs_without_gradients(self):
        weight = torch.nn.Parameter(torch.ones(()))
        x_0 = sample(lambda x_t, t: weight * x_t, torch.ones(1, 2, 4, 4), make_sampler("ddim", SCALED, 3))
        assert not x_0.requires_grad


class TestHooks:
    @EVERY_SAMPLER
    def test_replaced_data_are_in_the_result_and_the_hook_hears_each_target_timestep(self, name):
        known, heard = torch.full((1, 4, 4), 0.25), []

        def replace(x, t_prev):
            heard.append(t_prev)
            return torch.cat([x[:, :1], known.expand(len(x), 1, 4, 4)], dim=1)

        x_0 = sample(network, torch.zeros(2, 2, 4, 4), make_sampler(name, SCALED, 6), replace=replace)
        assert heard == [*sampling_timesteps(SCALED, 6)[1:], -1]
        assert (x_0[:, 1] == 0.25).all()

    def test_the_callback_sees_every_step_and_the_result_last(self):
        seen = []
        x_0 = sample(
            network,
            torch.zeros(1, 2, 4, 4),
            make_sampler("ddim", SCALED, 4),
            callback=lambda *args: seen.append(args),
        )
        assert [number for number, _, _ in seen] == [0, 1, 2, 3]
        assert seen[-1][1] == -1
        assert torch.equal(seen[-1][2], x_0)

# SPDX-License-Identifier: Apache-2.0
"""Rectified flow: MONAI's conventions, closed forms of Gaussian data, and guidance as that of a diffusion."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from monai.networks.schedulers import RFlowScheduler

from monai_synth.diffusion import (
    FLOW_SAMPLERS,
    DiffusionTarget,
    HybridLoss,
    add_noise,
    alphas_cumprod,
    clipped_prediction,
    draw_timesteps,
    make_sampler,
    predicted_x_0,
    signal_and_noise,
    step_variance,
    training_target,
)
from monai_synth.diffusion.flow import flow_timesteps, guidance_factor
from monai_synth.errors import UserError
from monai_synth.inference import initial_noise, make_generators, sample
from monai_synth.inference.classes import ClassInferer, guided
from monai_synth.inference.conditioning import KnownPart
from monai_synth.inference.joint import JointInferer
from monai_synth.inference.sampler import _shift_score

T = 1000
FLOW = {"num_train_timesteps": T, "flow": "rectified"}
DETERMINISTIC = ("euler", "heun", "dpm++", "unipc")
EVERY_SAMPLER = pytest.mark.parametrize("name", FLOW_SAMPLERS)

# Data N(MEAN, COVARIANCE) of two channels that depend on each other, of different spreads.
MEAN = torch.tensor([0.4, -0.2], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.25, 0.12], [0.12, 0.09]], dtype=torch.float64)
STDS, AXES = torch.linalg.eigh(COVARIANCE)[0].sqrt(), torch.linalg.eigh(COVARIANCE)[1]


def velocity(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x_0 - eps | x_t] of that data, (B, 2).

    x_0 - eps and x_t = (1 - s) x_0 + s eps are jointly Gaussian: mean + cov(v, x_t) cov(x_t)^-1 (x_t - E x_t), with
    cov(v, x_t) = (1 - s) C - s.
    """
    s = float(t[0]) / T
    identity = torch.eye(2, dtype=torch.float64)
    gain = ((1 - s) * COVARIANCE - s * identity) @ torch.linalg.inv((1 - s) ** 2 * COVARIANCE + s**2 * identity)
    return MEAN + (x_t - (1 - s) * MEAN) @ gain.T


def exact_flow(noise: torch.Tensor) -> torch.Tensor:
    """Where the ODE takes noise: the map keeps each principal axis and scales it from 1 to its standard deviation."""
    return MEAN + noise @ AXES @ torch.diag(STDS) @ AXES.T


def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Something nonlinear that mixes neighbours."""
    kernel = torch.linspace(-0.3, 0.3, 9).view(1, 1, 3, 3).expand(2, 2, 3, 3)
    return torch.tanh(torch.nn.functional.conv2d(x_t, kernel, padding=1)) - 0.5 * x_t + t.view(-1, 1, 1, 1) / 2000


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(5, 2, 6, 6, generator=generator) for _ in range(2))
    return x_0, eps, torch.tensor([1, 250, 500, 999, 1000])


class TestConventions:
    def test_x_t_equals_that_of_monais_scheduler(self):
        x_0, eps, t = batch()
        expected = RFlowScheduler(num_train_timesteps=T).add_noise(x_0, eps, t)
        torch.testing.assert_close(add_noise(FLOW, x_0, eps, t), expected, rtol=1e-6, atol=1e-6)
        table = alphas_cumprod(FLOW)
        assert torch.equal(add_noise(FLOW, x_0, eps, t, table=table), add_noise(FLOW, x_0, eps, t))

    def test_the_true_velocity_has_no_loss_and_another_has_its_square(self):
        x_0, eps, t = batch()
        x_t = add_noise(FLOW, x_0, eps, t)
        loss = HybridLoss(FLOW, value_range=(-1, 1), learned_variance=False)
        target = DiffusionTarget(x_0=x_0, x_t=x_t, eps=eps, t=t)
        assert float(loss(x_0 - eps, target)) == 0
        assert float(loss(x_0 - eps + 0.5, target)) == pytest.approx(0.25, rel=1e-5)
        assert torch.equal(training_target(FLOW, x_0, eps, t), x_0 - eps)

    def test_the_true_velocity_means_the_data_and_clipping_holds_x_t(self):
        x_0, eps, t = batch()
        x_t = add_noise(FLOW, x_0, eps, t)
        torch.testing.assert_close(predicted_x_0(FLOW, x_0 - eps, x_t, t), x_0, rtol=1e-5, atol=1e-5)
        clipped = clipped_prediction(FLOW, x_0 - eps, x_t, t, (-0.5, 0.5))
        data = predicted_x_0(FLOW, clipped, x_t, t)
        torch.testing.assert_close(data, x_0.clamp(-0.5, 0.5), rtol=1e-4, atol=1e-4)
        noise = data - clipped  # what the velocity says the noise is
        torch.testing.assert_close(add_noise(FLOW, data, noise, t), x_t, rtol=1e-4, atol=1e-4)

    def test_predicted_data_equal_those_of_monais_step(self):
        x_0, eps, _ = batch()
        scheduler = RFlowScheduler(num_train_timesteps=T)
        scheduler.set_timesteps(10)
        for t in (1000, 300, 1):
            expected = scheduler.step(x_0 - 2 * eps, t, eps, 0)[1]
            found = predicted_x_0(FLOW, x_0 - 2 * eps, eps, torch.full((5,), t))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 30, 1000])
    def test_euler_is_monais_steps_and_ddim_is_the_same(self, num_steps):
        noise = initial_noise((2, 6, 6), make_generators([1, 2]))
        scheduler = RFlowScheduler(num_train_timesteps=T)
        scheduler.set_timesteps(num_steps)
        timesteps = scheduler.timesteps.tolist()
        x = noise
        for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
            x, _ = scheduler.step(network(x, torch.full((2,), t)), t, x, t_next)
        for name in ("euler", "ddim"):
            assert torch.equal(sample(network, noise, make_sampler(name, FLOW, num_steps)), x)

    def test_a_step_of_ddim_on_a_diffusion_at_the_same_signal_to_noise_ratio_is_eulers(self):
        """Both keep the predicted data and noise and only change their shares; the scale of x differs."""
        x_0, eps, _ = batch()
        t, t_prev = 700, 400
        x_t = add_noise(FLOW, x_0, eps, torch.full((5,), t))
        guess = 0.9 * x_0 - 1.1 * eps
        data = predicted_x_0(FLOW, guess, x_t, torch.full((5,), t))
        noise = data - guess
        abar = alphas_cumprod(FLOW)[t_prev]
        scale = math.sqrt(0.6**2 + 0.4**2)  # of the flow's x at t_prev
        ddim = abar.sqrt().float() * data + (1 - abar).sqrt().float() * noise
        torch.testing.assert_close(x_t + guess * (t - t_prev) / T, scale * ddim, rtol=1e-4, atol=1e-5)

    def test_the_table_is_the_share_of_the_data_in_the_variance_of_x_t(self):
        data, noise = signal_and_noise(FLOW, torch.tensor([0, 300, 1000]))
        torch.testing.assert_close(data, torch.tensor([1, 0.49, 0]).double())
        torch.testing.assert_close(noise, torch.tensor([0, 0.09, 1]).double())
        table = alphas_cumprod(FLOW)
        assert (table[0], table[1000], len(table)) == (1, 0, 1001)
        assert float(table[300]) == pytest.approx(0.49 / 0.58)


class TestTimesteps:
    def test_training_draws_every_timestep_from_1_to_the_last_evenly(self):
        small = FLOW | {"num_train_timesteps": 8}
        drawn = draw_timesteps(small, (8000,), torch.Generator().manual_seed(0))
        counts = torch.bincount(drawn, minlength=9)
        assert counts[0] == 0
        assert (counts[1:] - 1000).abs().max() < 5 * math.sqrt(1000)

    def test_logit_normal_draws_have_the_distribution_of_monais(self):
        logit = FLOW | {"sample_method": "logit-normal", "loc": 0.5, "scale": 0.7}
        drawn = draw_timesteps(logit, (20_000,), torch.Generator().manual_seed(0)).double() / T
        assert drawn.min() > 0
        logits = torch.logit((drawn - 0.5 / T).clamp(1e-4, 1 - 1e-4))
        assert float(logits.mean()) == pytest.approx(0.5, abs=0.02)
        assert float(logits.std()) == pytest.approx(0.7, abs=0.02)
        torch.manual_seed(0)
        monai = RFlowScheduler(sample_method="logit-normal", loc=0.5, scale=0.7).sample_timesteps(torch.zeros(20_000))
        shares = torch.tensor([0.1, 0.5, 0.9]).double()
        torch.testing.assert_close(drawn.quantile(shares), (monai.double() / T).quantile(shares), rtol=0, atol=0.01)

    def test_a_diffusion_draws_what_it_drew_before_there_were_flows(self):
        cosine = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2"}
        torch.manual_seed(3)
        drawn = draw_timesteps(cosine, (50,))
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.randint(0, 500, (50,)))

    @pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 20, 21, 999, 1000])
    @EVERY_SAMPLER
    def test_a_sampler_makes_as_many_calls_as_it_is_asked_for_from_pure_noise_on(self, name, num_steps):
        timesteps = make_sampler(name, FLOW, num_steps).timesteps.tolist()
        assert len(timesteps) == num_steps
        assert timesteps[0] == T
        assert timesteps[-1] >= 1
        assert all(a >= b for a, b in pairwise(timesteps))
        assert len(set(timesteps)) == (num_steps // 2 + 1 if name == "heun" else num_steps)

    def test_the_spacing_of_the_second_order_solvers_reaches_every_timestep(self):
        assert flow_timesteps(T, T) == list(range(T, 0, -1))


class TestClosedForm:
    @pytest.mark.parametrize("name", DETERMINISTIC)
    def test_samples_reach_the_exact_solution_as_the_steps_grow(self, name):
        noise = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        errors = [
            float((sample(velocity, noise, make_sampler(name, FLOW, n)) - exact_flow(noise)).square().mean().sqrt())
            for n in (10, 20, 50, 200)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < (0.01 if name == "euler" else 5e-4)

    def test_heun_is_of_second_order_and_euler_of_first(self):
        """A fourfold number of calls divides the error by 4^order."""
        noise = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def order(name: str) -> float:
            few, many = (
                float((sample(velocity, noise, make_sampler(name, FLOW, n)) - exact_flow(noise)).abs().mean())
                for n in (49, 199)
            )
            return math.log(few / many, 4)

        assert order("euler") == pytest.approx(1, abs=0.15)
        assert order("heun") == pytest.approx(2, abs=0.3)

    @pytest.mark.parametrize(("name", "num_steps"), [("heun", 199), ("dpm++", 50), ("unipc", 50), ("ddpm", 200)])
    def test_samples_have_the_mean_and_covariance_of_the_data(self, name, num_steps):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(20_000, 2, dtype=torch.float64, generator=generator)
        torch.manual_seed(0)
        x_0 = sample(velocity, noise, make_sampler(name, FLOW, num_steps))
        torch.testing.assert_close(x_0.mean(0), MEAN, rtol=0, atol=0.015)
        torch.testing.assert_close(x_0.T.cov(), COVARIANCE, rtol=0.04, atol=0.003)

    def test_with_20_calls_the_second_order_solvers_are_closer_than_euler_with_50(self):
        noise = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def error(name: str, n: int) -> float:
            return float((sample(velocity, noise, make_sampler(name, FLOW, n)) - exact_flow(noise)).square().mean())

        assert error("dpm++", 20) < 0.64 * error("euler", 50)
        assert error("unipc", 20) < 0.64 * error("euler", 50)
        assert error("heun", 20) < error("euler", 20)

    @EVERY_SAMPLER
    def test_no_sampler_clips(self, name):
        """Latents have no bounds: a velocity towards 30 ends there."""
        x_0 = sample(
            lambda x_t, t: (30.0 - x_t) / (t.view(-1, 1) / T), torch.full((4, 1), 2.0), make_sampler(name, FLOW, 20)
        )
        torch.testing.assert_close(x_0, torch.full((4, 1), 30.0), rtol=1e-3, atol=1e-3)

    def test_step_variance_is_that_of_the_product_of_two_gaussians(self):
        """q(x_prev | x_t, x_0) is q(x_prev | x_0) times the likelihood of x_t; precisions add."""
        for t, t_prev in [(1000, 900), (999, 500), (300, 2)]:
            ratio = (T - t) / (T - t_prev)
            new = (t / T) ** 2 - ratio**2 * (t_prev / T) ** 2
            precision = 1 / (t_prev / T) ** 2 + ratio**2 / new
            assert step_variance(FLOW, t, t_prev) == pytest.approx(1 / precision, rel=1e-9)
        assert step_variance(FLOW, 40, -1) == 0


class TestGuidance:
    def test_a_gradient_moves_the_noise_by_as_much_as_in_a_diffusion_at_the_same_signal_to_noise_ratio(self):
        """In the diffusion x = x_t / c with c^2 = (1 - s)^2 + s^2, so its gradient is c times that of x_t."""
        x_0, eps, _ = batch()
        gradient = torch.linspace(-1, 1, x_0.numel()).view_as(x_0)
        for t in (100, 500, 950):
            s, steps = t / T, torch.full((5,), t)
            c = math.sqrt((1 - s) ** 2 + s**2)
            x_t = add_noise(FLOW, x_0, eps, steps)
            shifted = _shift_score(x_0 - eps, gradient, t, make_sampler("euler", FLOW, 10))
            noise_of_flow = predicted_x_0(FLOW, shifted, x_t, steps) - shifted
            abar = float(alphas_cumprod(FLOW)[t])
            noise_of_diffusion = eps - math.sqrt(1 - abar) * c * gradient
            torch.testing.assert_close(noise_of_flow, noise_of_diffusion, rtol=1e-4, atol=1e-4)

    def test_at_pure_noise_nothing_is_guided_and_the_factor_is_finite(self):
        assert guidance_factor(T, T) == 0
        assert guidance_factor(T, 500) == 1
        assert guidance_factor(T, 0) == 0

    @pytest.mark.parametrize("name", DETERMINISTIC)
    def test_the_exact_gradient_of_a_measured_channel_gives_the_conditional_distribution(self, name):
        """log p(y | x_t) of y = first channel + N(0, 0.1^2) is known; added to the score it samples x_0 given y."""
        y, noise_of_y = 1.1, 0.1

        def gradient(x_t, t, variance):
            s = t / T
            spread = (1 - s) ** 2 * COVARIANCE + s**2 * torch.eye(2, dtype=torch.float64)
            gain = (1 - s) * COVARIANCE[0] @ torch.linalg.inv(spread)
            left = COVARIANCE[0, 0] - (1 - s) * gain @ COVARIANCE[0] + noise_of_y**2
            error = y - MEAN[0] - (x_t - (1 - s) * MEAN) @ gain
            return error[:, None] * gain / left

        noise = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x_0 = sample(velocity, noise, make_sampler(name, FLOW, 200), guidance=gradient)
        share = COVARIANCE[0] / (COVARIANCE[0, 0] + noise_of_y**2)
        torch.testing.assert_close(x_0.mean(0), MEAN + share * (y - MEAN[0]), rtol=0, atol=0.02)
        wanted = COVARIANCE - share[:, None] * COVARIANCE[0]
        torch.testing.assert_close(x_0.T.cov(), wanted, rtol=0.1, atol=1e-3)

    @EVERY_SAMPLER
    def test_a_zero_gradient_changes_no_bit(self, name):
        noise = initial_noise((2, 6, 6), make_generators([1, 2]))
        plain, guided = (
            sample(network, noise, make_sampler(name, FLOW, 12), guidance=g, generators=make_generators([1, 2]))
            for g in (None, lambda x_t, t, variance: torch.zeros_like(x_t))
        )
        assert torch.equal(plain, guided)

    def test_both_calls_of_a_step_of_heun_hear_the_variance_of_a_step(self):
        heard = []

        def listen(x_t, t, variance):
            heard.append((t, variance))
            return torch.zeros_like(x_t)

        sample(network, torch.zeros(1, 2, 4, 4), make_sampler("heun", FLOW, 5), guidance=listen)
        assert [t for t, _ in heard] == [1000, 667, 667, 333, 333]
        expected = [step_variance(FLOW, *pair) for pair in ((1000, 667), (667, 333), (667, 333), (333, -1), (333, -1))]
        assert [variance for _, variance in heard] == expected


class TestLoop:
    @EVERY_SAMPLER
    def test_the_image_of_a_seed_is_the_same_alone_and_among_others(self, name):
        def run(seeds):
            generators = make_generators(seeds)
            noise = initial_noise((2, 8, 8), generators)
            return sample(network, noise, make_sampler(name, FLOW, 15), generators=generators)

        together = run([11, 12, 13])
        for i, seed in enumerate([11, 12, 13]):
            torch.testing.assert_close(together[i], run([seed])[0], rtol=1e-5, atol=1e-5)

    @EVERY_SAMPLER
    def test_a_sampler_serves_two_calls_with_the_same_result(self, name):
        sampler, noise = make_sampler(name, FLOW, 10), initial_noise((2, 6, 6), make_generators([0]))
        first, second = (sample(network, noise, sampler, generators=make_generators([0])) for _ in range(2))
        assert torch.equal(first, second)

    @EVERY_SAMPLER
    def test_replaced_data_are_in_the_result_and_the_hook_hears_each_target_timestep(self, name):
        known, heard = torch.full((1, 4, 4), 0.25), []

        def replace(x, t_prev):
            heard.append(t_prev)
            return torch.cat([x[:, :1], known.expand(len(x), 1, 4, 4)], dim=1)

        sampler = make_sampler(name, FLOW, 6)
        x_0 = sample(network, torch.zeros(2, 2, 4, 4), sampler, replace=replace)
        assert heard == [*sampler.timesteps.tolist()[1:], -1]
        assert (x_0[:, 1] == 0.25).all()

    def test_repeating_ancestral_steps_keeps_the_distribution(self):
        torch.manual_seed(0)
        x_0 = sample(velocity, torch.randn(20_000, 2).double(), make_sampler("ddpm", FLOW, 200), resample=2)
        torch.testing.assert_close(x_0.mean(0), MEAN, rtol=0, atol=0.015)
        torch.testing.assert_close(x_0.T.cov(), COVARIANCE, rtol=0.06, atol=0.003)


class VelocityOfPixels(torch.nn.Module):
    """The exact velocity where every pixel is a draw of two channels of its own."""

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        pairs = x.double().movedim(1, -1)
        return velocity(pairs.reshape(-1, 2), timesteps).view_as(pairs).movedim(-1, 1).to(x)


class TestKnownPart:
    """The second channel is given, the first is sampled; their joint distribution is that of the closed forms."""

    GIVEN = 0.2
    SLOPE = float(COVARIANCE[0, 1] / COVARIANCE[1, 1])
    TRUE_MEAN = float(MEAN[0]) + SLOPE * (GIVEN - float(MEAN[1]))
    TRUE_STD = math.sqrt(float(COVARIANCE[0, 0]) - SLOPE * float(COVARIANCE[0, 1]))

    def distance(self, **options) -> float:
        """2-Wasserstein distance of what is sampled to the true conditional."""
        known = torch.full((2, 2, 10_000), self.GIVEN)
        is_known = torch.zeros_like(known, dtype=torch.bool)
        is_known[:, 1] = True
        # the range tells only the data's variance to the gradient, 0.25 for this one
        inferer = JointInferer(FLOW, value_range=(0, 1), learned_variance=False, clip=False, **options)
        x_0 = inferer(known, VelocityOfPixels(), is_known=is_known, seeds=[0, 1])["x_0"]
        assert (x_0[:, 1] == torch.tensor(self.GIVEN)).all()
        return math.hypot(float(x_0[:, 0].mean()) - self.TRUE_MEAN, float(x_0[:, 0].std()) - self.TRUE_STD)

    @pytest.mark.parametrize("t_prev", [900, 300, 1])
    def test_known_entries_get_the_noise_of_the_flow_at_the_end_of_the_step(self, t_prev):
        is_known = torch.ones(1, 1, 50_000, dtype=torch.bool)
        part = KnownPart(torch.full((1, 1, 50_000), 0.3), is_known, FLOW, make_generators([1]))
        noised = part.replace(torch.zeros(1, 1, 50_000), t_prev)
        assert float(noised.mean()) == pytest.approx(0.3 * (1 - t_prev / T), abs=0.02)
        assert float(noised.std()) == pytest.approx(t_prev / T, rel=0.02)
        start = torch.randn(1, 1, 50_000)
        assert torch.equal(part.begin(start, T), start)  # pure noise shows nothing of what is known

    def test_without_any_correction_the_mean_is_off_by_a_good_part_of_the_std(self):
        assert self.distance(sampler="dpm++", num_steps=20) > 0.05

    @pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "ddpm"])
    def test_the_gradient_brings_a_sample_closer_to_the_true_conditional(self, name):
        plain, corrected = (self.distance(sampler=name, num_steps=100, gradient_scale=g) for g in (0.0, 1.0))
        assert corrected < 0.7 * plain

    def test_repeating_steps_brings_a_sample_closer_to_the_true_conditional(self):
        once, often = (self.distance(sampler="ddpm", num_steps=50, resample=r) for r in (1, 5))
        assert often < 0.7 * once


class TestClassGuidance:
    def test_guiding_the_velocity_is_guiding_the_noise(self):
        """Both are linear in what is predicted, so null + s (cond - null) commutes with the change of prediction."""
        x_0, eps, t = batch()
        x_t = add_noise(FLOW, x_0, eps, t)
        cond, null = x_0 - eps, 0.7 * x_0 - 1.2 * eps

        def noise(velocity: torch.Tensor) -> torch.Tensor:
            return predicted_x_0(FLOW, velocity, x_t, t) - velocity

        torch.testing.assert_close(
            noise(guided(cond, null, 3.0)), guided(noise(cond), noise(null), 3.0), rtol=1e-4, atol=1e-4
        )

    @EVERY_SAMPLER
    def test_images_of_classes_are_sampled_within_their_range_and_guided(self, name):
        def denoise(x_t, t, *, class_labels):
            wanted = torch.tensor([-0.4, 0.4, 0.0])[class_labels].view(-1, 1, 1, 1)
            return (wanted - x_t) / (t.view(-1, 1, 1, 1) / T)

        options = {"image_size": (4, 4), "image_channels": 1, "null_class": 2, "sampler": name}
        images = ClassInferer(FLOW, guidance_scale=2.0, guidance_interval=(0, T), **options)(
            torch.tensor([0, 1]), denoise, seeds=[0, 1]
        )
        torch.testing.assert_close(images.mean((1, 2, 3)), torch.tensor([-0.8, 0.8]), rtol=1e-3, atol=1e-3)
        clipped = ClassInferer(FLOW, guidance_scale=4.0, **options)(torch.tensor([0, 1]), denoise, seeds=[0, 1])
        torch.testing.assert_close(clipped.mean((1, 2, 3)), torch.tensor([-1.0, 1.0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "change", "num_steps", "words"),
    [
        ("euller", {}, 10, "'euller'; of a rectified flow .*'euler', 'heun'"),
        ("euler", {}, 0, "num_steps is 0; .*1 to 1000"),
        ("heun", {}, 1001, "num_steps is 1001"),
        ("dpm++", {"flow": "curved"}, 10, "'curved'; it must be 'rectified'"),
        ("dpm++", {"beta_start": 0.1}, 10, "unknown keys \\['beta_start'\\]"),
        ("dpm++", {"sample_method": "normal"}, 10, "'normal'; .*'logit-normal'"),
        ("dpm++", {"num_train_timesteps": 4000}, 10, "4000; a rectified flow takes 1 to 2048"),
        ("dpm++", {"scale": 0}, 10, "scale of the flow is 0"),
        ("dpm++", {"loc": "left"}, 10, "loc of the flow is 'left'"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(name, change, num_steps, words):
    with pytest.raises(UserError, match=words):
        make_sampler(name, FLOW | change, num_steps)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_a_sampler_of_flows_is_refused_for_a_diffusion(name):
    cosine = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2"}
    with pytest.raises(UserError, match=f"'{name}'; it must be one of .* rectified flow, and this is a diffusion"):
        make_sampler(name, cosine, 20)


def test_a_flow_has_no_variance_to_learn():
    with pytest.raises(UserError, match="learned_variance is true, but a rectified flow"):
        HybridLoss(FLOW, value_range=(0, 1))

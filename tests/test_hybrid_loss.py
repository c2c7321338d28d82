# SPDX-License-Identifier: Apache-2.0
"""The learned variance and the hybrid loss against closed forms and independent implementations."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

from monai_synth.diffusion import DiffusionTarget, HybridLoss, Posterior, add_noise, alphas_cumprod, training_target
from monai_synth.diffusion.variance import discretized_gaussian_log_likelihood, gaussian_kl
from monai_synth.errors import UserError

LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
COSINE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def target(schedule: dict, t: list[int], seed: int = 0) -> DiffusionTarget:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(t), 3, 4, 5)
    x_0 = torch.randint(0, 256, shape, generator=generator) / 255
    eps = torch.randn(shape, generator=generator)
    times = torch.tensor(t)
    return DiffusionTarget(x_0=x_0, x_t=add_noise(schedule, x_0, eps, times), eps=eps, t=times)


def true_prediction(schedule: dict, made: DiffusionTarget) -> torch.Tensor:
    return training_target(schedule, made.x_0, made.eps, made.t)


# The posterior and its parts


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
@pytest.mark.parametrize("t", [1, 2, 50, 99])
def test_the_posterior_mean_is_that_of_an_independent_sampler(schedule: dict, t: int) -> None:
    made = target(schedule, [t])
    other = DDPMScheduler(**schedule, clip_sample=False, prediction_type="sample")
    other.alphas_cumprod = alphas_cumprod(schedule)  # in double precision
    other.set_timesteps(timesteps=[t, t - 1])
    # two draws with opposite noise: their mean is the mean
    steps = []
    for sign in (1, -1):
        with mock.patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, sign=sign, **_: sign * noise):
            noise = torch.randn(made.x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
            steps.append(other.step(made.x_0.double(), t, made.x_t.double()).prev_sample)
    ours = Posterior(schedule).mean(made.x_0.double(), made.x_t.double(), made.t)
    assert ((steps[0] + steps[1]) / 2 - ours).abs().max() < 1e-5


@pytest.mark.parametrize("t", [1, 2, 500, 999])
@pytest.mark.parametrize("v", [-1.0, -0.3, 0.0, 0.8, 1.0])
def test_the_learned_variance_is_that_of_an_independent_sampler(t: int, v: float) -> None:
    other = DDPMScheduler(**LINEAR, clip_sample=False, variance_type="learned_range")
    other.alphas_cumprod = alphas_cumprod(LINEAR)  # in double precision
    expected = other._get_variance(t, predicted_variance=torch.tensor(v, dtype=torch.float64))
    ours = Posterior(LINEAR).learned_log_variance(torch.full((1, 1), v, dtype=torch.float64), torch.tensor([t]))
    assert ours.item() == pytest.approx(float(expected), abs=1e-5)
    assert Posterior(LINEAR).log_beta_tilde[t] <= ours.item() + 1e-12 <= Posterior(LINEAR).log_beta[t] + 1e-9


def test_half_way_between_the_bounds_is_their_geometric_mean() -> None:
    q = Posterior(LINEAR)
    halfway = q.learned_log_variance(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([1])).exp()
    bounds = [table[1].exp() for table in (q.log_beta, q.log_beta_tilde)]
    assert halfway.item() == pytest.approx(math.sqrt(bounds[0] * bounds[1]))
    assert halfway.item() == pytest.approx(8.09e-5, rel=1e-3)  # the variances' mean would be 8.72e-5


def test_the_divergence_is_that_of_torch() -> None:
    means, logs = torch.randn(2, 50), torch.randn(2, 50)
    normals = [torch.distributions.Normal(m, (0.5 * s).exp()) for m, s in zip(means, logs, strict=True)]
    expected = torch.distributions.kl_divergence(*normals)
    torch.testing.assert_close(gaussian_kl(means[0], logs[0], means[1], logs[1]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("scale", [1e-3, 0.05, 2.0])
def test_the_probabilities_of_all_grey_values_add_up_to_one_and_are_those_of_the_normal_distribution(
    value_range: tuple, scale: float
) -> None:
    low, high = value_range
    values = torch.linspace(low, high, 256, dtype=torch.float64)
    mean = torch.full_like(values, low + 0.3 * (high - low))
    logs = discretized_gaussian_log_likelihood(values, mean, torch.full_like(values, math.log(scale)), value_range)
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-9)
    edges = np.concatenate([[-np.inf], (values[:-1] + values[1:]).numpy() / 2, [np.inf]])
    expected = np.diff(stats.norm.cdf(edges, mean[0].item(), scale))
    seen = expected > 1e-9
    np.testing.assert_allclose(logs.exp().numpy()[seen], expected[seen], rtol=1e-5)


def test_the_likelihood_of_a_value_far_off_is_small_and_finite_in_single_precision() -> None:
    x_0 = torch.tensor([0.5, 0.5, 0.0, 1.0])
    mean = torch.tensor([0.5, -40.0, 30.0, -30.0], requires_grad=True)
    logs = discretized_gaussian_log_likelihood(x_0, mean, torch.full((4,), math.log(0.01)), (0.0, 1.0))
    logs.sum().backward()
    assert torch.isfinite(logs).all()
    assert torch.isfinite(mean.grad).all()
    assert (logs[1:] < -1e5).all()


# The loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_bound_is_zero_where_the_model_is_the_posterior(prediction: str) -> None:
    schedule = LINEAR | {"prediction_type": prediction}
    made = target(schedule, [1, 10, 400, 999])
    exact = torch.cat([true_prediction(schedule, made), torch.full_like(made.x_0, -1.0)], dim=1)
    simple, vlb = HybridLoss(schedule, value_range=(0, 1)).terms(exact, made)
    assert simple.abs().max() == 0
    assert vlb.abs().max() < 1e-6
    other = torch.cat([true_prediction(schedule, made), torch.zeros_like(made.x_0)], dim=1)
    assert (HybridLoss(schedule, value_range=(0, 1)).terms(other, made)[1][:1] > 1e-4).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_gradient_of_the_bound_reaches_the_variance_only(prediction: str) -> None:
    schedule = LINEAR | {"prediction_type": prediction}
    made = target(schedule, [0, 1, 300, 800])
    output = torch.randn(4, 6, 4, 5, requires_grad=True)
    gradients = []
    for weight in (0.0, 0.001, 1.0):
        loss = HybridLoss(schedule, value_range=(0, 1), vlb_weight=weight)(output, made)
        gradients.append(torch.autograd.grad(loss, output)[0])
    for gradient in gradients:
        assert torch.equal(gradient[:, :3], gradients[0][:, :3])
    assert gradients[0][:, 3:].abs().max() == 0
    assert all((g[:, 3:].flatten(1).abs().max(1).values > 0).all() for g in gradients[1:])


def test_the_two_terms_are_weighted_as_the_text_has_it() -> None:
    made = target(LINEAR, [0, 3, 500])
    output = torch.randn(3, 6, 4, 5)
    loss = HybridLoss(LINEAR, value_range=(0, 1))
    simple, vlb = loss.terms(output, made)
    torch.testing.assert_close(loss(output, made), (simple + vlb * 1000 / 1000).mean())  # lambda T = 1
    torch.testing.assert_close(simple, (output[:, :3] - made.eps).square().mean((1, 2, 3)))


@pytest.mark.parametrize("value_range", [(0, 1), (-1, 1)])
def test_the_first_term_is_the_likelihood_of_the_grey_values_in_bits(value_range: tuple) -> None:
    low, high = value_range
    made = target(LINEAR, [0])
    x_0 = low + (high - low) * made.x_0
    made = DiffusionTarget(x_0=x_0, x_t=add_noise(LINEAR, x_0, made.eps, made.t), eps=made.eps, t=made.t)
    output = torch.cat([made.eps, torch.zeros_like(made.eps)], dim=1)
    _, vlb = HybridLoss(LINEAR, value_range=value_range).terms(output, made)
    q = Posterior(LINEAR)
    scale = math.exp(0.25 * (q.log_beta[0] + q.log_beta[1] + math.log((1 - _abar(0)) / (1 - _abar(1)))))
    half = (high - low) / 255 / 2
    inner = stats.norm.cdf(half / scale) - stats.norm.cdf(-half / scale)
    ends = stats.norm.cdf(half / scale)
    is_end = ((x_0 == low) | (x_0 == high)).float().mean().item()
    expected = -(is_end * math.log2(ends) + (1 - is_end) * math.log2(inner))
    assert vlb.item() == pytest.approx(expected, rel=1e-3)


def _abar(t: int) -> float:
    return float(alphas_cumprod(LINEAR)[t])


def test_without_a_learned_variance_the_loss_is_the_squared_error() -> None:
    made = target(LINEAR, [0, 5, 9])
    output = torch.randn(3, 3, 4, 5)
    loss = HybridLoss(LINEAR, value_range=(0, 1), learned_variance=False)
    torch.testing.assert_close(loss(output, made), torch.nn.functional.mse_loss(output, made.eps))
    with pytest.raises(UserError, match="gives 3 channels for 3 of x_0, and learned_variance True needs 6"):
        HybridLoss(LINEAR, value_range=(0, 1))(output, made)


def test_the_loss_of_an_exact_denoiser_trains_the_variance_to_that_of_the_data() -> None:
    """x_0 of a point mass: the posterior variance is exact, so v must go to -1."""
    x_0 = torch.full((64, 1, 1, 1), 0.25)
    v = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=0.05)
    loss = HybridLoss(LINEAR, value_range=(0, 1))
    for step in range(150):
        eps = torch.randn(64, 1, 1, 1, generator=torch.Generator().manual_seed(step))
        t = torch.randint(1, 5, (64,), generator=torch.Generator().manual_seed(step))
        made = DiffusionTarget(x_0=x_0, x_t=add_noise(LINEAR, x_0, eps, t), eps=eps, t=t)
        optimizer.zero_grad()
        loss(torch.cat([eps, v.expand_as(eps)], dim=1), made).backward()
        optimizer.step()
    assert v.item() == pytest.approx(-1, abs=0.1)

# SPDX-License-Identifier: Apache-2.0
"""Noise schedules hold their definitions; every sampler is exact on data whose denoiser is a closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch

from monai_synth.diffusion import (
    SAMPLERS,
    add_noise,
    alphas_cumprod,
    make_sampler,
    sampling_timesteps,
    step_variance,
)
from monai_synth.errors import UserError
from monai_synth.inference import make_generators, sample

LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SCALED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0205,
}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
SCHEDULES = pytest.mark.parametrize("schedule", [LINEAR, SCALED], ids=["linear", "scaled_linear"])
STEPS = pytest.mark.parametrize("num_steps", [1000, 250, 50, 20])
DATA_STD = 0.3


def exact_denoiser(schedule: dict, std: float = DATA_STD, mean: float = 0.0):
    """The best possible prediction of the noise, where the data are N(mean, std^2)."""
    table = alphas_cumprod(schedule)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = table[t[0]]  # one timestep for all; a look-up for each of many samples would take all the time
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)

    return denoise


# The closed forms below are written from the papers, with numpy, and share no code with the package. All of a
# chain is linear in x for Gaussian data, so that one number (or one and its predecessor) describes a whole
# sampler.


def table_of(schedule: dict) -> np.ndarray:
    first, last, num_steps = schedule["beta_start"], schedule["beta_end"], schedule["num_train_timesteps"]
    if schedule["beta_schedule"] == "linear":
        return np.cumprod(1 - np.linspace(first, last, num_steps))
    return np.cumprod(1 - np.linspace(first**0.5, last**0.5, num_steps) ** 2)


def posterior_mean_factor(abar: float) -> float:
    """E[x_0 | x_t] / x_t of data N(0, DATA_STD^2)."""
    return math.sqrt(abar) * DATA_STD**2 / (abar * DATA_STD**2 + 1 - abar)


def ancestral_std(abars: np.ndarray) -> float:
    """Ho et al. 2020, Eq 6 and 7, for neighbours of the shortened chain; abars from noise to data."""
    variance = 1.0
    for abar, before in zip(abars, [*abars[1:], 1.0], strict=True):
        alpha = abar / before
        mean = math.sqrt(before) * (1 - alpha) / (1 - abar) * posterior_mean_factor(abar)
        mean += math.sqrt(alpha) * (1 - before) / (1 - abar)
        variance = mean**2 * variance + (1 - before) / (1 - abar) * (1 - alpha)
    return math.sqrt(variance)


def ddim_std(abars: np.ndarray) -> float:
    """Song et al. 2021, Eq 12 with sigma = 0."""
    factor = 1.0
    for abar, before in zip(abars, [*abars[1:], 1.0], strict=True):
        data = posterior_mean_factor(abar)
        noise = (1 - math.sqrt(abar) * data) / math.sqrt(1 - abar)
        factor *= math.sqrt(before) * data + math.sqrt(1 - before) * noise
    return factor


def dpm_solver_std(abars: np.ndarray) -> float:
    """Lu et al. 2022, DPM-Solver++ (2M), Alg 2; the last step, to sigma = 0, is of first order."""
    x, last_data, last_width = 1.0, None, None
    log_snr = 0.5 * np.log(abars / (1 - abars))
    for i, abar in enumerate(abars):
        data = posterior_mean_factor(abar) * x
        if i == len(abars) - 1:
            return data
        width = log_snr[i + 1] - log_snr[i]
        estimate = data
        if last_data is not None:
            ratio = last_width / width
            estimate = (1 + 1 / (2 * ratio)) * data - 1 / (2 * ratio) * last_data
        sigma, next_sigma = math.sqrt(1 - abar), math.sqrt(1 - abars[i + 1])
        x = next_sigma / sigma * x - math.sqrt(abars[i + 1]) * math.expm1(-width) * estimate
        last_data, last_width = data, width
    return x


def unipc_std(abars: np.ndarray) -> float:
    """Zhao et al. 2023, UniPC-2 (bh2, data prediction): B(h) = e^(-h) - 1; the last step gives the data."""
    log_snr = 0.5 * np.log(abars / (1 - abars))
    alpha, sigma = np.sqrt(abars), np.sqrt(1 - abars)
    x, data = 1.0, posterior_mean_factor(abars[0]) * 1.0
    datas, points = [data], [x]
    for i in range(1, len(abars)):
        h = log_snr[i] - log_snr[i - 1]
        b = math.expm1(-h)
        base = sigma[i] / sigma[i - 1] * points[-1] - alpha[i] * b * datas[-1]
        # Predictor: order 2 from the second step on (rho = 1/2), order 1 in the first.
        slope = 0.0
        if i > 1:
            r = (log_snr[i - 2] - log_snr[i - 1]) / h
            slope = (datas[-2] - datas[-1]) / r
        predicted = base - alpha[i] * b * 0.5 * slope
        data = posterior_mean_factor(abars[i]) * predicted
        # Corrector of the same order: solves sum rho_m r_m^(k-1) = b_k of the paper's Eq 10.
        phi = b / (-h) - 1
        first = phi / b
        if i == 1:
            corrected = base - alpha[i] * b * 0.5 * (data - datas[-1])
        else:
            second = 2 * (phi / (-h) - 0.5) / b
            rho = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([first, second]))
            corrected = base - alpha[i] * b * (rho[0] * slope + rho[1] * (data - datas[-1]))
        points.append(corrected)
        datas.append(data)
    return datas[-1]


CLOSED_FORMS = {"ddpm": ancestral_std, "ddim": ddim_std, "dpm++": dpm_solver_std, "unipc": unipc_std}
NUM_SAMPLES = 20_000


def sampled_std(name: str, schedule: dict, num_steps: int) -> float:
    """Standard deviation of samples; a deterministic chain is linear, so one sample at 1 tells it exactly."""
    noise = torch.randn(NUM_SAMPLES, 1) if name == "ddpm" else torch.ones(1, 1)
    x_0 = sample(exact_denoiser(schedule), noise.double(), make_sampler(name, schedule, num_steps))
    return float(x_0.std() if name == "ddpm" else x_0)


@SCHEDULES
@STEPS
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_a_gaussian_have_the_std_that_the_papers_recursion_gives(name, schedule, num_steps):
    measured = sampled_std(name, schedule, num_steps)
    abars = table_of(schedule)[sampling_timesteps(schedule, num_steps)]
    sampling_error = 1 / math.sqrt(2 * NUM_SAMPLES) if name == "ddpm" else 0
    assert measured == pytest.approx(CLOSED_FORMS[name](abars), rel=4 * sampling_error + 2e-4)

    close_to_data = {("ddpm", 1000): 0.05, ("ddpm", 50): 0.2, ("ddim", 20): 0.13}.get((name, num_steps), 0.05)
    if name != "ddpm" or num_steps in (1000, 50):
        assert measured == pytest.approx(DATA_STD, rel=close_to_data)


@SCHEDULES
@pytest.mark.parametrize("num_steps", [20, 23, 50])
def test_ddim_loses_at_least_what_any_first_order_chain_loses(schedule, num_steps):
    """A DDIM step on a Gaussian multiplies by the cosine of a change of angle; tan(a) = noise / (signal std).

    The angles fall from nearly 90 degrees to 0, so no choice of timesteps exceeds cos(90 degrees / n)^n:
    0.940 at 20 steps. Within 5 % of the data begins at 24 steps, whatever the spacing.
    """
    abars = table_of(schedule)[sampling_timesteps(schedule, num_steps)]
    angles = np.arctan(np.append(np.sqrt((1 - abars) / abars), 0) / DATA_STD)
    start = math.sqrt(abars[0] * DATA_STD**2 + 1 - abars[0])  # the chain starts with a std of 1 instead of this
    predicted = DATA_STD * np.prod(np.cos(np.diff(angles))) / start
    measured = sampled_std("ddim", schedule, num_steps)
    assert measured == pytest.approx(predicted, rel=2e-4)
    assert measured < DATA_STD * math.cos(math.pi / 2 / num_steps) ** num_steps * 1.001


@pytest.mark.parametrize("schedule", [LINEAR, SCALED, COSINE], ids=["linear", "scaled_linear", "cosine"])
def test_tables_equal_those_of_diffusers(schedule):
    table = alphas_cumprod(schedule)
    assert table.dtype == torch.float64
    torch.testing.assert_close(table.float(), diffusers.DDPMScheduler(**schedule).alphas_cumprod, rtol=2e-5, atol=1e-8)
    assert (table.diff() < 0).all()


def test_few_calls_are_spent_on_the_pure_noise_at_the_end_of_the_cosine_schedule():
    cosine = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2"}
    table = alphas_cumprod(cosine)
    steps = sampling_timesteps(cosine, 20)
    assert sum(float(table[t]) < 1e-3 for t in steps) <= 4  # it was 9 where the spacing began at the capped betas
    linear = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    log_snr = torch.log(alphas_cumprod(linear) / (1 - alphas_cumprod(linear)))
    spans = torch.diff(log_snr[sampling_timesteps(linear, 20)])
    assert spans[:12].max() / spans[:12].min() < 1.05  # where timesteps are dense the spacing is even from the end on


@pytest.mark.parametrize("schedule", [LINEAR, SCALED, COSINE], ids=["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 50, 250, 333, 999, 1000])
def test_timesteps_descend_without_repeats_from_pure_noise_to_the_last(schedule, num_steps):
    steps = sampling_timesteps(schedule, num_steps)
    assert len(steps) == num_steps
    assert all(a > b for a, b in pairwise(steps))
    assert steps[0] == 999
    assert steps[-1] == (0 if num_steps > 1 else 999)
    for name in SAMPLERS:
        assert make_sampler(name, schedule, num_steps).timesteps.tolist() == steps


@SCHEDULES
def test_no_sampler_clips(schedule):
    """Latents have no bounds: data of std 30 must not come out within [-1, 1]."""
    for name in SAMPLERS:
        x_0 = sample(exact_denoiser(schedule, std=30.0), torch.full((64, 1), 2.0), make_sampler(name, schedule, 20))
        assert x_0.abs().max() > 20, name


@SCHEDULES
def test_step_variance_is_that_of_the_product_of_two_gaussians(schedule):
    """q(x_prev | x_t, x_0) is q(x_prev | x_0) times the likelihood of x_t; precisions add."""
    table = table_of(schedule)
    for t, t_prev in [(999, 998), (999, 600), (500, 20), (1, 0)]:
        alpha = table[t] / table[t_prev]
        precision = 1 / (1 - table[t_prev]) + alpha / (1 - alpha)
        assert step_variance(schedule, t, t_prev) == pytest.approx(1 / precision, rel=1e-9)
    assert step_variance(schedule, 40, -1) == 0


@SCHEDULES
def test_noised_data_have_the_mean_and_std_of_their_timestep(schedule):
    t = torch.tensor([0, 300, 999])
    x_t = add_noise(schedule, torch.full((3, 1, 50_000), 2.0), torch.randn(3, 1, 50_000), t)
    abar = torch.tensor(table_of(schedule)[t.numpy()]).float()
    torch.testing.assert_close(x_t.mean(dim=(1, 2)), 2 * abar.sqrt(), atol=0.02, rtol=0)
    torch.testing.assert_close(x_t.std(dim=(1, 2)), (1 - abar).sqrt(), atol=0.0, rtol=0.02)
    half = add_noise(schedule, torch.ones(3, 4).half(), torch.zeros(3, 4).half(), t)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half[:, 0].float(), abar.sqrt(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "change", "num_steps", "words"),
    [
        ("euler", {}, 10, "'euler'.*'ddpm', 'ddim', 'dpm\\+\\+', 'unipc'"),
        ("ddim", {}, 0, "num_steps is 0; .*1 to 1000"),
        ("ddim", {}, 1001, "num_steps is 1001"),
        ("ddim", {}, 2.5, "num_steps is 2.5"),
        ("ddim", {"beta_schedule": "cosin"}, 10, "beta_schedule .*'cosin'.*'linear'"),
        ("ddim", {"prediction_type": "eps"}, 10, "prediction_type .*'eps'.*'epsilon'"),
        ("ddim", {"clip_sample": True}, 10, "unknown keys \\['clip_sample'\\]"),
        ("ddim", {"beta_end": 2.0}, 10, "beta_end 2.0"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(name, change, num_steps, words):
    with pytest.raises(UserError, match=words):
        make_sampler(name, SCALED | change, num_steps)


def test_a_description_without_betas_is_refused():
    with pytest.raises(UserError, match="lacks \\['beta_start', 'beta_end'\\]"):
        alphas_cumprod({"num_train_timesteps": 1000, "beta_schedule": "linear"})


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_network_may_predict_data_or_velocity_as_well(name, prediction_type):
    table = alphas_cumprod(SCALED)

    def denoise(x_t, t):
        eps, abar = exact_denoiser(SCALED, mean=1.5)(x_t, t), table[t[0]]
        data = (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()
        return data if prediction_type == "sample" else abar.sqrt() * eps - (1 - abar).sqrt() * data

    noise = torch.randn(5, 1, dtype=torch.float64)
    sampler = make_sampler(name, SCALED | {"prediction_type": prediction_type}, 20)
    x_0 = sample(denoise, noise, sampler, generators=make_generators(range(5)))
    expected = sample(
        exact_denoiser(SCALED, mean=1.5),
        noise,
        make_sampler(name, SCALED, 20),
        generators=make_generators(range(5)),
    )
    torch.testing.assert_close(x_0, expected, rtol=1e-4, atol=1e-5)

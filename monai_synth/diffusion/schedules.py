# SPDX-License-Identifier: Apache-2.0
"""Noise schedules and the samplers that walk them, from one description that is the same everywhere.

A schedule is a mapping with the names of diffusers::

    {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205,
     "prediction_type": "epsilon"}

Timesteps run from 0 (least noise) to T - 1. Tables are computed and kept in float64. A mapping with the key "flow"
describes a rectified flow (:mod:`monai_synth.diffusion.flow`), whose timesteps run from 0 (data) to T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from monai_synth.diffusion.flow import (
    FlowSampler,
    draw_flow_timesteps,
    flow_powers,
    flow_variance,
    is_flow,
    make_flow_sampler,
    num_flow_timesteps,
)
from monai_synth.errors import UserError

Schedule = Mapping[str, Any]

SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc")
FLOW_ONLY = ("euler", "heun")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
LEAST_LOG_SNR = -10.2  # just below the end of DDPM's linear schedule, -10.1
_KEYS = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")


def alphas_cumprod(schedule: Schedule) -> Tensor:
    """The products of 1 - beta up to each timestep: the share of the data's variance in x_t.

    Args:
        schedule: "linear" has betas linear in t (the thesis' Sec 3.4), "scaled_linear" has their roots linear
            in t (latent diffusion, and so the thesis' Sec 7.1), "squaredcos_cap_v2" is the cosine schedule.

    Returns:
        float64 tensor (T,), strictly decreasing, within (0, 1). Of a flow, whose x_t has not the variance 1, the same
        share of x_t's variance, (T + 1,), from 1 to 0; noise is added to its data by the description, not by this
        table.

    Raises:
        UserError: if the description has unknown, missing or impossible values.
    """
    if is_flow(schedule):
        last = num_flow_timesteps(schedule)
        data, noise = flow_powers(last, torch.arange(last + 1))
        return data / (data + noise)
    num_steps, kind, start, end = _checked(schedule)
    if kind == "linear":
        betas = torch.linspace(start, end, num_steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), num_steps, dtype=torch.float64) ** 2
    else:
        edges = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        kept = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def signal_and_noise(schedule: Schedule | Tensor, t: Tensor, *, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squares of the factors of data and noise in x_t: ``abar`` and ``1 - abar``; of a flow ``(1 - s)^2`` and ``s^2``.

    Args:
        schedule: the description, or the table :func:`alphas_cumprod` of a diffusion.
        t: timesteps, of any shape.
        table: :func:`alphas_cumprod` of the schedule, where it is at hand.

    Returns:
        Both float64, of the shape of t.
    """
    if is_flow(schedule):
        return flow_powers(schedule["num_train_timesteps"], t)
    abar = _table(schedule if table is None else table).to(t.device)[t]
    return abar, 1 - abar


def draw_timesteps(schedule: Schedule, shape: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
    """Timesteps to train at, on the CPU: evenly from 0 to T - 1, or as a flow's description says from 1 to T."""
    if is_flow(schedule):
        return draw_flow_timesteps(schedule, shape, generator)
    return torch.randint(0, int(schedule["num_train_timesteps"]), tuple(shape), generator=generator)


def add_noise(
    schedule: Schedule | Tensor, x_0: Tensor, eps: Tensor, t: Tensor, *, table: Tensor | None = None
) -> Tensor:
    """Draw from q(x_t | x_0): ``sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` (LSDM thesis, Eq 2.5).

    Args:
        schedule: the description, or the table :func:`alphas_cumprod` of a diffusion.
        x_0: clean data (B, ...).
        eps: standard normal noise, of the same shape.
        t: timesteps (B,), 0 to T - 1. Of a flow 0 to T; x_t is then ``(1 - t / T) x_0 + t / T eps``.
        table: :func:`alphas_cumprod` of the schedule, where it is at hand.

    Returns:
        x_t, of the shape and type of x_0.
    """
    data, noise = _powers(schedule, t, x_0, table)
    return data.sqrt().to(x_0) * x_0 + noise.sqrt().to(x_0) * eps


def training_target(schedule: Schedule, x_0: Tensor, eps: Tensor, t: Tensor, *, table: Tensor | None = None) -> Tensor:
    """What the network learns to predict: eps (LSDM thesis, Eq 3.1), x_0, or v; of a flow the velocity ``x_0 - eps``.

    ``v = sqrt(abar) eps - sqrt(1 - abar) x_0`` (Salimans and Ho 2022). At high noise an error in eps is multiplied
    by ``sqrt((1 - abar) / abar)`` in x_0, so eps needs long training there; v does not.

    Args:
        schedule: the description; its ``prediction_type`` decides.
        x_0: clean data (B, ...).
        eps: the noise that was added, of the same shape.
        t: timesteps (B,).
        table: :func:`alphas_cumprod` of the schedule, where it is at hand.

    Returns:
        Target of the shape of x_0.
    """
    if is_flow(schedule):
        return x_0 - eps
    kind = schedule.get("prediction_type", "epsilon")
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x_0
    data, noise = _powers(schedule, t, x_0, table)
    return data.sqrt().to(x_0) * eps - noise.sqrt().to(x_0) * x_0


def predicted_x_0(
    schedule: Schedule, prediction: Tensor, x_t: Tensor, t: Tensor, *, table: Tensor | None = None
) -> Tensor:
    """The data that a prediction means: what :func:`training_target` of them and of x_t would be undone.

    Args:
        schedule: the description; its ``prediction_type`` decides.
        prediction: of the network (B, ...), without a variance.
        x_t: noisy data, of the same shape.
        t: timesteps (B,).
        table: :func:`alphas_cumprod` of the schedule, where it is at hand.

    Returns:
        x_0 as predicted, of the shape of x_t.
    """
    kind = schedule.get("prediction_type", "epsilon")
    if kind == "sample":
        return prediction
    data, noise = _powers(schedule, t, x_t, table)
    if is_flow(schedule):
        return x_t + noise.sqrt().to(x_t) * prediction
    if kind == "epsilon":
        return (x_t - noise.sqrt().to(x_t) * prediction) / data.sqrt().to(x_t)
    return data.sqrt().to(x_t) * x_t - noise.sqrt().to(x_t) * prediction


def clipped_prediction(
    schedule: Schedule,
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor,
    value_range: Sequence[float],
    *,
    table: Tensor | None = None,
) -> Tensor:
    """The prediction whose :func:`predicted_x_0` is clipped to a range; where that is within it, no bit changes.

    Args:
        schedule: the description; its ``prediction_type`` decides.
        prediction: of the network (B, ...), without a variance.
        x_t: noisy data, of the same shape.
        t: timesteps (B,).
        value_range: lowest and highest value.
        table: :func:`alphas_cumprod` of the schedule, where it is at hand.

    Returns:
        Prediction, of the shape of x_t.
    """
    x_0 = predicted_x_0(schedule, prediction, x_t, t, table=table)
    change = x_0.clamp(*value_range) - x_0
    kind = schedule.get("prediction_type", "epsilon")
    if kind == "sample":
        return prediction + change
    # x_t stays, so a change of x_0 changes eps by -sqrt(abar / (1 - abar)), v by -sqrt(1 / (1 - abar)) as much, and
    # the velocity of a flow by 1 / s.
    data, noise = _powers(schedule, t, x_t, table)
    if is_flow(schedule):
        return prediction + change / noise.sqrt().to(x_t)
    factor = data / noise if kind == "epsilon" else 1 / noise
    return prediction - factor.sqrt().to(x_t) * change


def step_variance(schedule: Schedule | Tensor, t: int, t_prev: int) -> float:
    """Variance of x_{t_prev} given x_t and x_0: what the ancestral sampler adds in the step from t to t_prev.

    Args:
        schedule: the description, or its table :func:`alphas_cumprod`.
        t: timestep of the step's start.
        t_prev: timestep of its end, any smaller one; -1 stands for the clean data.

    Returns:
        The variance; 0 for ``t_prev = -1``.
    """
    if is_flow(schedule):
        return flow_variance(schedule["num_train_timesteps"], t, t_prev)
    table = _table(schedule)
    abar, abar_prev = float(table[t]), float(table[t_prev]) if t_prev >= 0 else 1.0
    return (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)


def sampling_timesteps(schedule: Schedule | Tensor, num_steps: int) -> list[int]:
    """The timesteps a sampler visits, evenly spaced in the logarithm of the signal-to-noise ratio.

    A schedule that ends in pure noise (the cosine, whose last betas are capped) has timesteps there that hardly differ
    in what they show of the data; the even spacing starts at ``LEAST_LOG_SNR``, which no other schedule here reaches.

    The log-SNR is the time in which a diffusion runs evenly, so this spacing needs fewer steps than one that
    is even in t; for 20 steps of DPM-Solver++ on a Gaussian it is the difference between 1 % and 30 % error
    of the standard deviation. The list holds whole timesteps only, so that the network is asked for just the
    noise level that the
    solver computes with, and all are distinct: with T steps it is every timestep.

    Args:
        schedule: the description, or its table :func:`alphas_cumprod`.
        num_steps: how many, 1 to T.

    Returns:
        Descending timesteps. The first is T - 1, the last is 0 (unless there is but one).

    Raises:
        UserError: if ``num_steps`` is not within 1 to T.
    """
    table = _table(schedule)
    if isinstance(num_steps, (bool, str)) or int(num_steps) != num_steps or not 1 <= num_steps <= len(table):
        msg = f"num_steps is {num_steps!r}; a sampler takes 1 to {len(table)} steps with this schedule."
        raise UserError(msg)
    num_steps = int(num_steps)
    log_snr = torch.log(table / (1 - table)).numpy()
    wanted = np.linspace(max(log_snr[-1], LEAST_LOG_SNR), log_snr[0], num_steps)
    wanted[0] = log_snr[-1]
    steps = np.interp(-wanted, -log_snr, np.arange(len(table))).round().astype(int)
    # Near the data one timestep spans several of the wanted levels: each then takes the next free timestep.
    order = np.arange(num_steps)
    steps = np.minimum.accumulate(steps + order) - order
    return np.maximum(steps, num_steps - 1 - order).tolist()


def make_sampler(
    name: str, schedule: Schedule, num_steps: int, *, learned_variance: bool = False
) -> SchedulerMixin | FlowSampler:
    """A diffusers scheduler for one of our samplers, with its timesteps set; of a flow see ``make_flow_sampler``.

    None clips the predicted data: latents have no bounds, and data that have are clipped in the denoiser.

    Args:
        name: "ddpm" is ancestral sampling with the posterior variance of the shortened chain (LSDM thesis, Eq
            2.6 and 2.7). "ddim" is deterministic (Eq 2.9 with sigma = 0); it is the first-order solver,
            because diffusers' own DDIM assumes evenly spaced timesteps. "dpm++" is DPM-Solver++ (2M) and
            "unipc" is UniPC, both of second order and deterministic.
        schedule: the description of the noise schedule.
        num_steps: calls of the network, 1 to T.
        learned_variance: "ddpm" takes its variance from the second half of the denoiser's output, between beta
            tilde (-1) and beta (1) of the shortened chain in the logarithm (JDM thesis, Eq 2.17). The other samplers
            have no variance.

    Returns:
        The scheduler, for :func:`monai_synth.inference.sampler.sample`.

    Raises:
        UserError: if the name is unknown, ``num_steps`` not within 1 to T, or the description is wrong.
    """
    if is_flow(schedule):
        return make_flow_sampler(name, schedule, num_steps)
    table = alphas_cumprod(schedule)
    timesteps = sampling_timesteps(table, num_steps)
    options: dict[str, Any] = {key: schedule[key] for key in _KEYS if key in schedule}
    if name == "ddpm":
        # The step to the data adds no noise, but diffusers adds it to all that do not start at timestep 0.
        variance = "learned_range" if learned_variance and num_steps > 1 else "fixed_small"
        scheduler = DDPMScheduler(**options, variance_type=variance, clip_sample=False)
        scheduler.set_timesteps(timesteps=timesteps)
    elif name in ("ddim", "dpm++"):
        scheduler = DPMSolverMultistepScheduler(**options, solver_order=1 if name == "ddim" else 2)
        scheduler.set_timesteps(timesteps=timesteps)
    elif name == "unipc":
        scheduler = UniPCMultistepScheduler(**options)
        scheduler.set_timesteps(num_steps)
        # UniPC of diffusers takes no list of timesteps; these two attributes are what it would derive from
        # one.
        scheduler.timesteps = torch.tensor(timesteps)
        noise_to_signal = ((1 - table) / table).sqrt()[timesteps]
        scheduler.sigmas = torch.cat([noise_to_signal, torch.zeros(1)]).float()
    else:
        msg = f"The sampler is {name!r}; it must be one of {SAMPLERS}."
        if name in FLOW_ONLY:
            msg += " It is for models trained as a rectified flow, and this is a diffusion."
        raise UserError(msg)
    return scheduler


def _table(schedule: Schedule | Tensor) -> Tensor:
    return schedule if isinstance(schedule, Tensor) else alphas_cumprod(schedule)


def _powers(schedule: Schedule | Tensor, t: Tensor, like: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`signal_and_noise` at t (B,), to be broadcast against ``like`` (B, ...)."""
    data, noise = signal_and_noise(schedule, t, table=table)
    shape = (-1, *[1] * (like.ndim - 1))
    return data.view(shape), noise.view(shape)


def _checked(schedule: Schedule) -> tuple[int, str, float, float]:
    """Number of steps, kind, first and last beta of a valid description."""
    unknown = sorted(set(schedule) - set(_KEYS))
    kind = schedule.get("beta_schedule")
    needed = _KEYS[:2] if kind == "squaredcos_cap_v2" else _KEYS[:4]
    missing = [key for key in needed if key not in schedule]
    if unknown or missing:
        msg = f"The noise schedule has unknown keys {unknown} and lacks {missing}; its keys are {_KEYS}."
        raise UserError(msg)
    prediction = schedule.get("prediction_type", "epsilon")
    for key, value, allowed in (
        ("beta_schedule", kind, BETA_SCHEDULES),
        ("prediction_type", prediction, PREDICTION_TYPES),
    ):
        if value not in allowed:
            msg = f"{key} of the noise schedule is {value!r}; it must be one of {allowed}."
            raise UserError(msg)
    num_steps, start, end = (
        schedule["num_train_timesteps"],
        schedule.get("beta_start", 1e-4),
        schedule.get("beta_end", 0.02),
    )
    if num_steps < 1 or not 0 < start <= end < 1:
        msg = (
            f"The noise schedule has num_train_timesteps {num_steps}, beta_start {start} and beta_end {end};"
            " needed are at least 1 step and 0 < beta_start <= beta_end < 1."
        )
        raise UserError(msg)
    return int(num_steps), kind, float(start), float(end)

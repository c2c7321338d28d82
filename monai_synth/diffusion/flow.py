# SPDX-License-Identifier: Apache-2.0
"""Rectified flow: straight paths from data to noise, and the samplers that walk them back.

    x_t = (1 - s) x_0 + s eps,  v = x_0 - eps,  s = t / T

Time and sign are those of ``monai.networks.schedulers.RFlowScheduler``: timestep T is pure noise, 0 the data, and the
velocity points at the data. A flow is described as a diffusion is, by a mapping::

    {"num_train_timesteps": 1000, "flow": "rectified", "sample_method": "uniform"}

with ``loc`` and ``scale`` beside the ``sample_method`` "logit-normal". MONAI's scheduler makes the timesteps and the
steps of Euler and Heun. Its noising and its draws of t have counterparts here, because it noises only images and
volumes and cannot draw by a generator, which repeatable validation needs. Timesteps are whole numbers from 1 to T in
training (a network that is shown data without noise has nothing to learn from their noise), and T is at most 2048: the
scheduler keeps timesteps in float16, which holds whole numbers only that far and rounds all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from monai_synth.errors import UserError

FLOW_SAMPLERS = ("ddpm", "ddim", "dpm++", "unipc", "euler", "heun")
SAMPLE_METHODS = ("uniform", "logit-normal")
MOST_TIMESTEPS = 2048
_KEYS = ("num_train_timesteps", "flow", "sample_method", "loc", "scale")


def is_flow(schedule: Any) -> bool:
    """Whether a description is one of a rectified flow."""
    return isinstance(schedule, Mapping) and "flow" in schedule


def num_flow_timesteps(schedule: Mapping[str, Any]) -> int:
    """T of a valid description.

    Raises:
        UserError: if it has unknown or impossible values.
    """
    unknown = sorted(set(schedule) - set(_KEYS))
    if unknown or "num_train_timesteps" not in schedule:
        msg = f"The description of a rectified flow has unknown keys {unknown} or lacks num_train_timesteps"
        raise UserError(f"{msg}; its keys are {_KEYS}, and a flow has no betas.")
    if schedule["flow"] != "rectified":
        raise UserError(f"flow of the schedule is {schedule['flow']!r}; it must be 'rectified'.")
    method = schedule.get("sample_method", "uniform")
    if method not in SAMPLE_METHODS:
        raise UserError(f"sample_method of the flow is {method!r}; it must be one of {SAMPLE_METHODS}.")
    given = schedule["num_train_timesteps"]
    if type(given) is not int or not 1 <= given <= MOST_TIMESTEPS:
        msg = f"num_train_timesteps of the flow is {given!r}; a rectified flow takes 1 to {MOST_TIMESTEPS}."
        raise UserError(msg)
    for key, allowed in (("loc", "a number"), ("scale", "a number above 0")):
        value = schedule.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (key == "scale" and not value > 0):
            raise UserError(f"{key} of the flow is {value!r}; it must be {allowed}.")
    return given


def flow_powers(num_timesteps: int, t: Tensor) -> tuple[Tensor, Tensor]:
    """Variances ``(1 - s)^2`` and ``s^2`` of data (of variance 1) and noise in x_t, float64, of the shape of t."""
    s = t.double() / num_timesteps
    return (1 - s) ** 2, s**2


def draw_flow_timesteps(
    schedule: Mapping[str, Any], shape: Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    """Timesteps of a training batch, 1 to T: uniform, or the logistic function of a normal number (loc, scale).

    As ``RFlowScheduler.sample_timesteps`` draws them, but rounded up instead of down, by a generator, on the CPU.
    """
    last = num_flow_timesteps(schedule)
    if schedule.get("sample_method", "uniform") == "uniform":
        return torch.randint(1, last + 1, tuple(shape), generator=generator)
    normal = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    share = torch.sigmoid(schedule.get("loc", 0.0) + schedule.get("scale", 1.0) * normal)
    return (share * last).ceil().clamp(1, last).long()


def flow_variance(num_timesteps: int, t: int, t_prev: int) -> float:
    """Variance of x_{t_prev} given x_t and x_0; -1 and 0 both stand for the data."""
    return _ancestral(num_timesteps, t, t_prev)[2]


def _ancestral(num_timesteps: int, t: int, t_prev: int) -> tuple[float, float, float]:
    """Of q(x_prev | x_t, x_0): the factors of x_t and of x_0 in its mean, and its variance.

    With a = alpha_t / alpha_prev: ``a sigma_prev^2 / sigma_t^2``, ``alpha_prev (1 - a^2 sigma_prev^2 / sigma_t^2)`` and
    ``sigma_prev^2 (1 - a^2 sigma_prev^2 / sigma_t^2)``, which for ``alpha^2 + sigma^2 = 1`` are those of a diffusion.
    """
    s, s_prev = t / num_timesteps, max(t_prev, 0) / num_timesteps
    if s_prev == s:
        return 1.0, 0.0, 0.0
    ratio = (1 - s) / (1 - s_prev)
    share = ratio * s_prev**2 / s**2
    return share, (1 - s_prev) * (1 - ratio * share), s_prev**2 * (1 - ratio * share)


def guidance_factor(num_timesteps: int, t: int) -> float:
    """By what the gradient of a log-probability is multiplied before it is added to the velocity: ``s / (1 - s)``.

    By Tweedie's formula ``x_0 = (x_t + s^2 score) / (1 - s)`` and ``eps = -s score``, so the velocity of a flow is
    ``x_0 - eps = (x_t + s score) / (1 - s)``, and a gradient g added to the score adds ``s / (1 - s) g``. In the noise
    that the velocity means this is ``-s g``. A diffusion at the same signal-to-noise ratio has ``x = c^-1 x_t`` with
    ``c^2 = (1 - s)^2 + s^2``, so its gradient is ``c g`` and its ``-sqrt(1 - abar) c g = -s / c c g`` is the same.

    At t = T the noise says nothing of the data, every log-probability is flat there, and the factor is 0.
    """
    return 0.0 if t >= num_timesteps else t / (num_timesteps - t)


class FlowSampler:
    """Walks a flow by MONAI's steps: Euler, Heun, or ancestral; used by ``monai_synth.inference.sample``.

    Heun spends two calls on a step. The last step is Euler's, which ends on the predicted data, and with an even number
    of calls so is the first.

    Args:
        kind: "euler", "heun" or "ddpm".
        schedule: of the flow.
        num_steps: calls of the network.
    """

    def __init__(self, kind: str, schedule: Mapping[str, Any], num_steps: int) -> None:
        from monai.networks.schedulers import RFlowScheduler  # takes seconds, which no diffusion needs

        self.kind, self.flow_schedule, self.num_timesteps = kind, dict(schedule), num_flow_timesteps(schedule)
        self.is_ancestral = kind == "ddpm"
        self.config = FrozenDict(prediction_type="flow_prediction", num_train_timesteps=self.num_timesteps)
        self.scheduler = RFlowScheduler(num_train_timesteps=self.num_timesteps, use_discrete_timesteps=True)
        self.scheduler.set_timesteps(num_steps // 2 + 1 if kind == "heun" else num_steps)
        points = self.scheduler.timesteps.tolist()
        if kind == "heun":
            first = 1 if num_steps % 2 == 0 else 0
            points = [*points[:first], points[first], *(t for t in points[first + 1 :] for _ in range(2))]
        self.timesteps = torch.tensor(points)
        self.step_index: int | None = None
        self.start: tuple[Tensor, Tensor, int] | None = None  # x, v and t of the Heun step under way

    def step(
        self,
        output: Tensor,
        t: int,
        x: Tensor,
        *,
        generator: Sequence[torch.Generator] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """x after a call of the network at t, whose velocity is ``output``."""
        t = int(t)
        if self.start is not None:
            start, velocity, t_start = self.start
            self.start = None
            return (self._straight((velocity + output) / 2, t_start, t, start),)
        self.step_index = 0 if self.step_index is None else self.step_index + 1
        points = [point for point in self.timesteps.tolist() if point < t]
        following = max(points, default=0)
        if self.is_ancestral:
            return (self._ancestral(output, t, following, x, generator),)
        if self.kind == "heun" and self.timesteps.tolist().count(following) == 2:
            self.start = x, output, t
        return (self._straight(output, t, following, x),)

    def _straight(self, velocity: Tensor, t: int, following: int, x: Tensor) -> Tensor:
        return self.scheduler.step(velocity, t, x, following)[0]

    def _ancestral(
        self, velocity: Tensor, t: int, following: int, x: Tensor, generators: Sequence[torch.Generator] | None
    ) -> Tensor:
        of_x, of_data, variance = _ancestral(self.num_timesteps, t, following)
        mean = of_x * x + of_data * (x + t / self.num_timesteps * velocity)
        if variance == 0:
            return mean
        if generators is None:
            return mean + variance**0.5 * torch.randn_like(x)
        noise = torch.stack([torch.randn(*x.shape[1:], generator=generator) for generator in generators])
        return mean + variance**0.5 * noise.to(x)


class _TowardsData:
    """diffusers' velocity points at the noise, MONAI's at the data."""

    def convert_model_output(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().convert_model_output(-model_output, *args, **kwargs)


class _FlowDPMSolver(_TowardsData, DPMSolverMultistepScheduler):
    pass


class _FlowUniPC(_TowardsData, UniPCMultistepScheduler):
    pass


def make_flow_sampler(name: str, schedule: Mapping[str, Any], num_steps: int) -> FlowSampler | SchedulerMixin:
    """The sampler of a flow, with its timesteps set.

    Args:
        name: "euler" takes MONAI's straight steps, evenly in t; a step of DDIM on a flow is the same, so "ddim" is too.
            "heun" is of second order. "dpm++" is DPM-Solver++ (2M) and "unipc" is UniPC, in diffusers' form for flows.
            "ddpm" draws from q(x_prev | x_t, x_0) of the flow.
        schedule: of the flow.
        num_steps: calls of the network, 1 to T.

    Raises:
        UserError: an unknown name or a number out of range.
    """
    last = num_flow_timesteps(schedule)
    if name not in FLOW_SAMPLERS:
        raise UserError(f"The sampler is {name!r}; of a rectified flow it must be one of {FLOW_SAMPLERS}.")
    if isinstance(num_steps, (bool, str)) or int(num_steps) != num_steps or not 1 <= num_steps <= last:
        raise UserError(f"num_steps is {num_steps!r}; a sampler takes 1 to {last} steps with this flow.")
    num_steps = int(num_steps)
    if name in ("euler", "ddim", "heun", "ddpm"):
        return FlowSampler("euler" if name == "ddim" else name, schedule, num_steps)
    options = {"num_train_timesteps": last, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    scheduler = _FlowDPMSolver(**options) if name == "dpm++" else _FlowUniPC(**options)
    scheduler.set_timesteps(num_steps)
    timesteps = flow_timesteps(last, num_steps)
    # diffusers takes no list of noise levels; these two attributes are what it would derive from one. At pure noise the
    # logarithm of the signal-to-noise ratio would be infinite, which UniPC does not take.
    scheduler.timesteps = torch.tensor(timesteps)
    levels = (torch.tensor(timesteps, dtype=torch.float64) / last).clamp(max=1 - 1e-6)
    scheduler.sigmas = torch.cat([levels, torch.zeros(1)]).float()
    scheduler.flow_schedule = dict(schedule)
    return scheduler


def flow_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """T, and below it timesteps evenly spaced in the logarithm of the signal-to-noise ratio, distinct and descending.

    As :func:`monai_synth.diffusion.sampling_timesteps` spaces those of a diffusion. A flow reaches every ratio, so the
    spacing needs bounds: the last step starts at 0.6 / n noise, somewhat below the 1 / n of an even spacing in t, and
    the first ends as near to pure noise. Fixed bounds would leave an error that no number of steps removes.
    """
    bound = 1 + 2 * np.log(num_steps)
    log_snr = np.linspace(-bound, bound, num_steps)
    steps = (num_timesteps / (1 + np.exp(log_snr / 2))).round().astype(int)
    steps[0] = num_timesteps
    order = np.arange(num_steps)
    steps = np.minimum.accumulate(steps + order) - order
    return np.maximum(steps, num_steps - order).tolist()

# SPDX-License-Identifier: Apache-2.0
"""The one sampling loop: denoise, guide, step, replace.

Every sample has its own random generator, on the CPU, so the image of a seed depends neither on the batch it
is made in nor on the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from monai_synth.diffusion.flow import FlowSampler, guidance_factor
from monai_synth.diffusion.schedules import signal_and_noise, step_variance
from monai_synth.errors import UserError

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t, t (B,) long) -> what the network predicts
Guidance = Callable[[Tensor, int, float], Tensor]  # (x_t, t, variance) -> gradient of log p with respect to x_t
Replace = Callable[[Tensor, int], Tensor]  # (x_{t_prev}, t_prev) -> x_{t_prev}
Callback = Callable[[int, int, Tensor], None]  # (number of the step, t_prev, x_{t_prev})

_watcher: ContextVar[Callback | None] = ContextVar("watcher of sampling", default=None)


@contextmanager
def watched(callback: Callback) -> Iterator[None]:
    """Within, every :func:`sample` of this thread calls back after each step; what it raises ends the sampling.

    So whoever started an inferer can show progress and cancel, and no inferer has to hand a callback through.
    """
    token = _watcher.set(callback)
    try:
        yield
    finally:
        _watcher.reset(token)


def make_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One random generator for each seed, on the CPU.

    PyTorch's generator there sees only the low 32 bits of its seed, so larger seeds are hashed into them.
    """
    return [torch.Generator().manual_seed(_within_32_bits(int(seed))) for seed in seeds]


def _within_32_bits(seed: int) -> int:
    return seed if seed < 2**32 else int(np.random.SeedSequence(seed).generate_state(1)[0])


def initial_noise(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise x_T, each sample drawn by its own generator.

    Args:
        shape: shape of one sample (C, *S).
        generators: one for each sample, see :func:`make_generators`.
        device: where the result goes.

    Returns:
        float32 noise (B, C, *S).
    """
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


def noise_like(x: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Standard normal noise of the shape of x (B, C, *S), by one generator for each sample or by torch's global one."""
    if generators is None:
        return torch.randn_like(x)
    return initial_noise(x.shape[1:], generators, x.device).to(x.dtype)


def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    scheduler: SchedulerMixin | FlowSampler,
    *,
    guidance: Guidance | None = None,
    replace: Replace | None = None,
    generators: Sequence[torch.Generator] | None = None,
    resample: int = 1,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Walk from noise to data.

    Guidance enters as its theory has it. Ancestral sampling (DDPM) shifts the mean of each step by the step's
    variance times the gradient (LSDM thesis, Eq 2.14 and Alg 2 in the corrected form). The deterministic
    samplers shift the predicted noise, ``eps - sqrt(1 - abar_t) gradient``, which adds the gradient to the
    score (Dhariwal and Nichol 2021, Alg 2); on a rectified flow they shift the velocity by as much, see
    ``monai_synth.diffusion.flow.guidance_factor``. A gradient of 0 leaves every bit as it is.

    Args:
        denoiser: network with its conditions bound: ``(x_t, t)`` with t (B,) long gives what the schedule's
            ``prediction_type`` names, in the shape of x_t; with v as further C channels if the scheduler was made
            for a learned variance. It runs without gradients.
        x_T: noise (B, C, *S), see :func:`initial_noise`.
        scheduler: see :func:`monai_synth.diffusion.make_sampler`. It is copied, so that it can be used again.
        guidance: ``(x_t, t, variance)`` gives the gradient of a log-probability with respect to x_t, already
            scaled. ``variance`` is that of the ancestral step from t, whatever the sampler. It has to enable
            gradients itself.
        replace: ``(x, t_prev)`` may replace parts of the result of each step, e.g. by known data with the
            noise of t_prev; t_prev is -1 after the last step. Heun's step
            is two of these, both with the timestep of its end.
        generators: one for each sample, for the noise of the ancestral sampler; without them torch's global
            one.
        resample: how often each step but the last is walked. From the second time on it starts from the result of the
            time before, diffused back to t, so that replaced and sampled parts come to agree (RePaint, Lugmayr et
            al. 2022, Alg 1). Only for "ddpm": the other samplers remember their steps.
        progress: show a progress bar.
        callback: called with the number of the step, t_prev and x after each step.

    Returns:
        x_0 (B, C, *S).

    Raises:
        UserError: if ``resample`` is below 1, or above 1 with a sampler other than "ddpm".
        ValueError: if the scheduler has been stepped before, or the numbers of generators and samples differ.
    """
    if getattr(scheduler, "step_index", None) is not None:
        msg = "The scheduler has been stepped before and keeps a state. Make a new one with make_sampler."
        raise ValueError(msg)
    if generators is not None and len(generators) != len(x_T):
        msg = f"Got {len(generators)} generators for {len(x_T)} samples; give one for each sample."
        raise ValueError(msg)
    scheduler = copy.deepcopy(scheduler)
    is_ancestral = isinstance(scheduler, DDPMScheduler) or getattr(scheduler, "is_ancestral", False)
    if isinstance(resample, bool) or int(resample) != resample or resample < 1:
        raise UserError(f"resample is {resample!r}; allowed are whole numbers from 1, which walks each step once")
    if resample > 1 and not is_ancestral:
        msg = (
            f"resample is {resample}, but the sampler remembers its steps and cannot repeat one; use ddpm or resample 1"
        )
        raise UserError(msg)
    step_options = {"generator": list(generators)} if is_ancestral and generators is not None else {}
    timesteps = scheduler.timesteps.tolist()
    steps = zip(timesteps, [*timesteps[1:], -1], strict=True)
    schedule = getattr(scheduler, "flow_schedule", None) or scheduler.alphas_cumprod

    # Tensors made in inference mode can never take part in a gradient, so guidance would fail there.
    with torch.inference_mode(False), torch.no_grad():
        x = x_T.clone()
        for number, (t, t_prev) in enumerate(tqdm(steps, total=len(timesteps), disable=not progress)):
            for repeat in range(resample if t_prev >= 0 else 1):
                if repeat > 0:
                    kept, added = _back(schedule, t, t_prev)
                    x = kept * x + added * noise_like(x, generators)
                output = denoiser(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
                gradient = None
                # a call within Heun's step does not move on in t; it is guided as one that does
                t_next = t_prev if t_prev < t else max((point for point in timesteps if point < t), default=-1)
                variance = step_variance(schedule, t, t_next)
                if guidance is not None:
                    gradient = guidance(x, t, variance)
                    if not is_ancestral:
                        output = _shift_score(output, gradient, t, scheduler)
                x = scheduler.step(output, t, x, return_dict=False, **step_options)[0]
                if gradient is not None and is_ancestral:
                    x = x + variance * gradient
                if replace is not None:
                    x = replace(x, t_prev)
            for call in (callback, _watcher.get()):
                if call is not None:
                    call(number, t_prev, x)
    return x


def _back(schedule: Mapping[str, Any] | Tensor, t: int, t_prev: int) -> tuple[float, float]:
    """Factors of x_{t_prev} and of new noise in a draw from q(x_t | x_{t_prev})."""
    if isinstance(schedule, Tensor):
        kept = float(schedule[t] / schedule[t_prev])
        return math.sqrt(kept), math.sqrt(1 - kept)
    (data, data_prev), (noise, noise_prev) = signal_and_noise(schedule, torch.tensor([t, t_prev]))
    kept = float(data / data_prev)
    return math.sqrt(kept), math.sqrt(float(noise) - kept * float(noise_prev))


def _shift_score(output: Tensor, gradient: Tensor, t: int, scheduler: SchedulerMixin | FlowSampler) -> Tensor:
    """The network's prediction with the gradient added to the score it implies.

    At a given x_t the predictions of noise, data and velocity are linear in each other:
    ``d x_0 = -d eps sqrt(1 - abar) / sqrt(abar)`` and ``d v = d eps / sqrt(abar)``.
    """
    if scheduler.config.prediction_type == "flow_prediction":
        return output + guidance_factor(scheduler.config.num_train_timesteps, t) * gradient
    abar = float(scheduler.alphas_cumprod[t])
    by_type = {
        "epsilon": -math.sqrt(1 - abar),
        "sample": (1 - abar) / math.sqrt(abar),
        "v_prediction": -math.sqrt(1 - abar) / math.sqrt(abar),
    }
    return output + by_type[scheduler.config.prediction_type] * gradient

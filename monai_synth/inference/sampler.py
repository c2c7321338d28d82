# SPDX-License-Identifier: Apache-2.0
"""The one sampling loop: denoise, guide, step, replace.

Every sample has its own random generator, on the CPU, so the image of a seed depends neither on the batch it
is made in nor on the device.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from monai_synth.diffusion.schedules import step_variance

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_t, t (B,) long) -> what the network predicts, as x_t
Guidance = Callable[[Tensor, int, float], Tensor]  # (x_t, t, variance) -> gradient of log p with respect to x_t
Replace = Callable[[Tensor, int], Tensor]  # (x_{t_prev}, t_prev) -> x_{t_prev}
Callback = Callable[[int, int, Tensor], None]  # (number of the step, t_prev, x_{t_prev})


def make_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One random generator for each seed, on the CPU."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


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


def sample(
    denoiser: Denoiser,
    x_T: Tensor,
    scheduler: SchedulerMixin,
    *,
    guidance: Guidance | None = None,
    replace: Replace | None = None,
    generators: Sequence[torch.Generator] | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Walk from noise to data.

    Guidance enters as its theory has it. Ancestral sampling (DDPM) shifts the mean of each step by the step's
    variance times the gradient (LSDM thesis, Eq 2.14 and Alg 2 in the corrected form). The deterministic
    samplers shift the predicted noise, ``eps - sqrt(1 - abar_t) gradient``, which adds the gradient to the
    score (Dhariwal and Nichol 2021, Alg 2). A gradient of 0 leaves every bit as it is.

    Args:
        denoiser: network with its conditions bound: ``(x_t, t)`` with t (B,) long gives what the schedule's
            ``prediction_type`` names, in the shape of x_t. It runs without gradients.
        x_T: noise (B, C, *S), see :func:`initial_noise`.
        scheduler: see :func:`monai_synth.diffusion.make_sampler`. It is copied, so that it can be used again.
        guidance: ``(x_t, t, variance)`` gives the gradient of a log-probability with respect to x_t, already
            scaled. ``variance`` is that of the ancestral step from t, whatever the sampler. It has to enable
            gradients itself.
        replace: ``(x, t_prev)`` may replace parts of the result of each step, e.g. by known data with the
            noise of t_prev; t_prev is -1 after the last step.
        generators: one for each sample, for the noise of the ancestral sampler; without them torch's global
            one.
        progress: show a progress bar.
        callback: called with the number of the step, t_prev and x after each step.

    Returns:
        x_0 (B, C, *S).

    Raises:
        ValueError: if the scheduler has been stepped before, or the numbers of generators and samples differ.
    """
    if getattr(scheduler, "step_index", None) is not None:
        msg = "The scheduler has been stepped before and keeps a state. Make a new one with make_sampler."
        raise ValueError(msg)
    if generators is not None and len(generators) != len(x_T):
        msg = f"Got {len(generators)} generators for {len(x_T)} samples; give one for each sample."
        raise ValueError(msg)
    scheduler = copy.deepcopy(scheduler)
    is_ancestral = isinstance(scheduler, DDPMScheduler)
    step_options = {"generator": list(generators)} if is_ancestral and generators is not None else {}
    timesteps = scheduler.timesteps.tolist()
    steps = zip(timesteps, [*timesteps[1:], -1], strict=True)

    # Tensors made in inference mode can never take part in a gradient, so guidance would fail there.
    with torch.inference_mode(False), torch.no_grad():
        x = x_T.clone()
        for number, (t, t_prev) in enumerate(tqdm(steps, total=len(timesteps), disable=not progress)):
            output = denoiser(x, torch.full((len(x),), t, device=x.device)).to(x.dtype)
            gradient = None
            variance = step_variance(scheduler.alphas_cumprod, t, t_prev)
            if guidance is not None:
                gradient = guidance(x, t, variance)
                if not is_ancestral:
                    output = _shift_score(output, gradient, t, scheduler)
            x = scheduler.step(output, t, x, return_dict=False, **step_options)[0]
            if gradient is not None and is_ancestral:
                x = x + variance * gradient
            if replace is not None:
                x = replace(x, t_prev)
            if callback is not None:
                callback(number, t_prev, x)
    return x


def _shift_score(output: Tensor, gradient: Tensor, t: int, scheduler: SchedulerMixin) -> Tensor:
    """The network's prediction with the gradient added to the score it implies.

    At a given x_t the predictions of noise, data and velocity are linear in each other:
    ``d x_0 = -d eps sqrt(1 - abar) / sqrt(abar)`` and ``d v = d eps / sqrt(abar)``.
    """
    abar = float(scheduler.alphas_cumprod[t])
    by_type = {
        "epsilon": -math.sqrt(1 - abar),
        "sample": (1 - abar) / math.sqrt(abar),
        "v_prediction": -math.sqrt(1 - abar) / math.sqrt(abar),
    }
    return output + by_type[scheduler.config.prediction_type] * gradient

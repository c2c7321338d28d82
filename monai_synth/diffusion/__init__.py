# SPDX-License-Identifier: Apache-2.0
"""Noise schedules, the samplers that walk them, and the losses of a denoiser."""

from __future__ import annotations

from monai_synth.diffusion.losses import DiffusionTarget, HybridLoss
from monai_synth.diffusion.schedules import (
    SAMPLERS,
    add_noise,
    alphas_cumprod,
    make_sampler,
    sampling_timesteps,
    step_variance,
    training_target,
)
from monai_synth.diffusion.variance import Posterior

__all__ = [
    "SAMPLERS",
    "DiffusionTarget",
    "HybridLoss",
    "Posterior",
    "add_noise",
    "alphas_cumprod",
    "make_sampler",
    "sampling_timesteps",
    "step_variance",
    "training_target",
]

# SPDX-License-Identifier: Apache-2.0
"""Noise schedules, the samplers that walk them, and the losses of a denoiser."""

from __future__ import annotations

from monai_synth.diffusion.losses import DiffusionTarget, HybridLoss
from monai_synth.diffusion.schedules import (
    SAMPLERS,
    add_noise,
    alphas_cumprod,
    clipped_prediction,
    make_sampler,
    predicted_x_0,
    sampling_timesteps,
    step_variance,
    training_target,
)

__all__ = [
    "SAMPLERS",
    "DiffusionTarget",
    "HybridLoss",
    "add_noise",
    "alphas_cumprod",
    "clipped_prediction",
    "make_sampler",
    "predicted_x_0",
    "sampling_timesteps",
    "step_variance",
    "training_target",
]

# SPDX-License-Identifier: Apache-2.0
"""Noise schedules, the samplers that walk them, and the losses of a denoiser."""

from __future__ import annotations

from monai_synth.diffusion.flow import FLOW_SAMPLERS, is_flow
from monai_synth.diffusion.losses import DiffusionTarget, HybridLoss
from monai_synth.diffusion.schedules import (
    SAMPLERS,
    add_noise,
    alphas_cumprod,
    clipped_prediction,
    draw_timesteps,
    make_sampler,
    predicted_x_0,
    sampling_timesteps,
    signal_and_noise,
    step_variance,
    training_target,
)

__all__ = [
    "FLOW_SAMPLERS",
    "SAMPLERS",
    "DiffusionTarget",
    "HybridLoss",
    "add_noise",
    "alphas_cumprod",
    "clipped_prediction",
    "draw_timesteps",
    "is_flow",
    "make_sampler",
    "predicted_x_0",
    "sampling_timesteps",
    "signal_and_noise",
    "step_variance",
    "training_target",
]

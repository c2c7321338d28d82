# SPDX-License-Identifier: Apache-2.0
"""Noise schedules, and the samplers that walk them."""

from __future__ import annotations

from monai_synth.diffusion.schedules import (
    SAMPLERS,
    add_noise,
    alphas_cumprod,
    make_sampler,
    sampling_timesteps,
    step_variance,
    training_target,
)

__all__ = [
    "SAMPLERS",
    "add_noise",
    "alphas_cumprod",
    "make_sampler",
    "sampling_timesteps",
    "step_variance",
    "training_target",
]

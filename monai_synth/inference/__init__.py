# SPDX-License-Identifier: Apache-2.0
"""Sampling: the loop, and the guidance that steers it."""

from __future__ import annotations

from monai_synth.inference.guidance import NoduleGuidance, NoduleRequest, nodule_requests
from monai_synth.inference.sampler import initial_noise, make_generators, sample
from monai_synth.networks.latent_codec import latent_window

__all__ = [
    "NoduleGuidance",
    "NoduleRequest",
    "initial_noise",
    "latent_window",
    "make_generators",
    "nodule_requests",
    "sample",
]

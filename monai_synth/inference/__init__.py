# SPDX-License-Identifier: Apache-2.0
"""Sampling: the loop, and the guidance that steers it."""

from __future__ import annotations

from monai_synth.inference.sampler import initial_noise, make_generators, sample

__all__ = ["initial_noise", "make_generators", "sample"]

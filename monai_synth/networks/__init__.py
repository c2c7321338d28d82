# SPDX-License-Identifier: Apache-2.0
"""Networks: the SPADE U-Net that denoises and the classifier of noisy crops that guides it."""

from __future__ import annotations

from monai_synth.networks.noisy_classifier import NoisyClassifier
from monai_synth.networks.spade import SPADE, pool_semantic
from monai_synth.networks.spade_unet import SPADEUNet

__all__ = ["SPADE", "NoisyClassifier", "SPADEUNet", "pool_semantic"]

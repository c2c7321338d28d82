# SPDX-License-Identifier: Apache-2.0
"""Networks: the U-Nets that denoise, the classifier of noisy crops that guides one of them, and that of images."""

from __future__ import annotations

from monai_synth.networks.class_unet import ClassUNet
from monai_synth.networks.image_classifier import ImageClassifier
from monai_synth.networks.joint_unet import JointUNet
from monai_synth.networks.noisy_classifier import FeatureHead, NoisyClassifier, feature_columns
from monai_synth.networks.spade import SPADE, pool_semantic
from monai_synth.networks.spade_gan import MapDiscriminator, SPADEGenerator
from monai_synth.networks.spade_unet import SPADEUNet
from monai_synth.networks.text_unet import TextUNet

__all__ = [
    "SPADE",
    "ClassUNet",
    "FeatureHead",
    "ImageClassifier",
    "JointUNet",
    "MapDiscriminator",
    "NoisyClassifier",
    "SPADEGenerator",
    "SPADEUNet",
    "TextUNet",
    "feature_columns",
    "pool_semantic",
]

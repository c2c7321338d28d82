# SPDX-License-Identifier: Apache-2.0
"""Trainers, prepare-batch classes, datasets of latents and handlers; the names here are what configs use."""

from monai_synth.training.alignment import (
    AlignedLoss,
    AlignedNetwork,
    AlignedOutput,
    HeldOutAlignment,
    plain_network,
    weight_schedule,
)
from monai_synth.training.autoencoder import AutoencoderTrainer, Reconstruction
from monai_synth.training.classes import (
    BalancedSampler,
    ClassDiffusionPrepareBatch,
    ClassReport,
    class_sampler,
    denoising_loss,
    iterations_for,
)
from monai_synth.training.classifier import ConvergenceReport, classifier_loss, initial_output, is_classification
from monai_synth.training.expert import AlignedPrepareBatch, Expert, load_expert
from monai_synth.training.handlers import (
    EMA,
    EpochSeed,
    MLflowRun,
    RunProgress,
    SharedHandler,
    StageCheckpoint,
    run_training,
)
from monai_synth.training.latents import LatentCache, LatentDataset, NoduleCropDataset
from monai_synth.training.loss_plot import LossPlot
from monai_synth.training.optim import PerceptualLoss, lr_decay, perceptual_loss
from monai_synth.training.pairs import (
    IterationSampler,
    JointDiffusionPrepareBatch,
    epochs_for,
    num_real,
    pair_list,
    pair_preprocessing,
    pair_spacing,
)
from monai_synth.training.pictures import ValidationRecord
from monai_synth.training.prepare_batch import (
    ConditionDropout,
    ExpandChannels,
    LatentDiffusionPrepareBatch,
    NoisyCropPrepareBatch,
)

__all__ = [
    "EMA",
    "AlignedLoss",
    "AlignedNetwork",
    "AlignedOutput",
    "AlignedPrepareBatch",
    "AutoencoderTrainer",
    "BalancedSampler",
    "ClassDiffusionPrepareBatch",
    "ClassReport",
    "ConditionDropout",
    "ConvergenceReport",
    "EpochSeed",
    "ExpandChannels",
    "Expert",
    "HeldOutAlignment",
    "IterationSampler",
    "JointDiffusionPrepareBatch",
    "LatentCache",
    "LatentDataset",
    "LatentDiffusionPrepareBatch",
    "LossPlot",
    "MLflowRun",
    "NoduleCropDataset",
    "NoisyCropPrepareBatch",
    "PerceptualLoss",
    "Reconstruction",
    "RunProgress",
    "SharedHandler",
    "StageCheckpoint",
    "ValidationRecord",
    "class_sampler",
    "classifier_loss",
    "denoising_loss",
    "epochs_for",
    "initial_output",
    "is_classification",
    "iterations_for",
    "load_expert",
    "lr_decay",
    "num_real",
    "pair_list",
    "pair_preprocessing",
    "pair_spacing",
    "perceptual_loss",
    "plain_network",
    "run_training",
    "weight_schedule",
]

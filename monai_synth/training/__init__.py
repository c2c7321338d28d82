# SPDX-License-Identifier: Apache-2.0
"""Trainers, prepare-batch classes, datasets of latents and handlers; the names here are what configs use."""

from monai_synth.precision import check_compile, training_precision
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
    flipped_batch,
    iterations_for,
)
from monai_synth.training.classifier import (
    ConvergenceReport,
    classifier_loss,
    initial_output,
    is_classification,
    num_outputs,
    told_features,
)
from monai_synth.training.dreambooth import (
    InstancePrepareBatch,
    PriorPreservationLoss,
    dreambooth_iterations,
    dreambooth_list,
    instance_number,
    is_prior,
    start_from,
)
from monai_synth.training.expert import AlignedPrepareBatch, Expert, load_expert
from monai_synth.training.expert_training import (
    BestEpoch,
    ExpertPlot,
    ExpertPrepareBatch,
    ExpertReport,
    best_expert,
    check_start,
    compare_experts,
    initial_expert,
    initial_weights,
    normalisation,
)
from monai_synth.training.handlers import (
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
from monai_synth.training.spade_gan import MapPrepareBatch, SPADEGANTrainer, ttur_rates
from monai_synth.training.steps import EMA, LrSchedule, MixedPrecisionInferer
from monai_synth.training.text import class_prompts, hash_of, text_network, where_from

__all__ = [
    "EMA",
    "AlignedLoss",
    "AlignedNetwork",
    "AlignedOutput",
    "AlignedPrepareBatch",
    "AutoencoderTrainer",
    "BalancedSampler",
    "BestEpoch",
    "ClassDiffusionPrepareBatch",
    "ClassReport",
    "ConditionDropout",
    "ConvergenceReport",
    "EpochSeed",
    "ExpandChannels",
    "Expert",
    "ExpertPlot",
    "ExpertPrepareBatch",
    "ExpertReport",
    "HeldOutAlignment",
    "InstancePrepareBatch",
    "IterationSampler",
    "JointDiffusionPrepareBatch",
    "LatentCache",
    "LatentDataset",
    "LatentDiffusionPrepareBatch",
    "LossPlot",
    "LrSchedule",
    "MLflowRun",
    "MapPrepareBatch",
    "MixedPrecisionInferer",
    "NoduleCropDataset",
    "NoisyCropPrepareBatch",
    "PerceptualLoss",
    "PriorPreservationLoss",
    "Reconstruction",
    "RunProgress",
    "SPADEGANTrainer",
    "SharedHandler",
    "StageCheckpoint",
    "ValidationRecord",
    "best_expert",
    "check_compile",
    "check_start",
    "class_prompts",
    "class_sampler",
    "classifier_loss",
    "compare_experts",
    "denoising_loss",
    "dreambooth_iterations",
    "dreambooth_list",
    "epochs_for",
    "flipped_batch",
    "hash_of",
    "initial_expert",
    "initial_output",
    "initial_weights",
    "instance_number",
    "is_classification",
    "is_prior",
    "iterations_for",
    "load_expert",
    "lr_decay",
    "normalisation",
    "num_outputs",
    "num_real",
    "pair_list",
    "pair_preprocessing",
    "pair_spacing",
    "perceptual_loss",
    "plain_network",
    "run_training",
    "start_from",
    "text_network",
    "told_features",
    "training_precision",
    "ttur_rates",
    "weight_schedule",
    "where_from",
]

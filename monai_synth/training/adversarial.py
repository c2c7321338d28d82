# SPDX-License-Identifier: Apache-2.0
"""What trainings with a discriminator share: the trainer's frame and the hinge losses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from monai.engines import Trainer, default_prepare_batch
from torch import nn


def hinge_discriminator_loss(logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
    """0.5 (E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))]); SEEDS 2.3.9 for LSDM's Eq 3.2."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def hinge_generator_loss(logits_fake: torch.Tensor) -> torch.Tensor:
    """-E[D(fake)]."""
    return -logits_fake.mean()


def unwrap(network: nn.Module) -> nn.Module:
    """The network without its wrapper for distributed training."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


class AdversarialTrainer(Trainer):
    """Frame of a trainer with two optimisers; subclasses write ``_iteration``.

    Args:
        device: where to train.
        max_epochs: epochs in all.
        train_data_loader: batches.
        epoch_length: iterations of an epoch; None takes the data loader's length.
        prepare_batch: batch -> (input, target).
        key_train_metric: see MONAI's ``Trainer``.
        additional_metrics: see MONAI's ``Trainer``.
        train_handlers: see MONAI's ``Trainer``.
        amp: compute in bfloat16 where torch deems it safe; weights and optimisers stay in float32.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        train_data_loader: Iterable,
        *,
        epoch_length: int | None = None,
        prepare_batch: Callable = default_prepare_batch,
        key_train_metric: dict[str, Any] | None = None,
        additional_metrics: dict[str, Any] | None = None,
        train_handlers: list | None = None,
        amp: bool = False,
    ) -> None:
        super().__init__(
            device=device,
            max_epochs=max_epochs,
            data_loader=train_data_loader,
            epoch_length=epoch_length,
            prepare_batch=prepare_batch,
            key_metric=key_train_metric,
            metric_cmp_fn=operator.lt,
            additional_metrics=additional_metrics,
            handlers=train_handlers,
            decollate=False,
        )
        self.autocast_enabled = amp

    def _autocast(self, x: torch.Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.autocast_enabled)

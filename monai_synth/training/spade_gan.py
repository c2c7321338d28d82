# SPDX-License-Identifier: Apache-2.0
"""Training of the SPADE GAN (Park et al. 2019): hinge loss, feature matching, perceptual loss, KL, two time scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.engines import PrepareBatch
from torch import Tensor, nn
from torch.optim import Optimizer

from monai_synth.data.slices import semantic_input
from monai_synth.training.adversarial import (
    AdversarialTrainer,
    hinge_discriminator_loss,
    hinge_generator_loss,
    unwrap,
)
from monai_synth.training.autoencoder import kl_per_pixel


class MapPrepareBatch(PrepareBatch):
    """Batch with ``label`` (B, 1, *S) and ``image`` (B, C, *S) -> (one-hot map, image).

    Args:
        num_labels: K.
        collapse_nodule_labels: hide malignancy in the map.
    """

    def __init__(self, num_labels: int, *, collapse_nodule_labels: bool = False) -> None:
        self.num_labels = num_labels
        self.collapse_nodule_labels = collapse_nodule_labels

    def __call__(
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        label, image = (batchdata[key].to(device, non_blocking=non_blocking) for key in ("label", "image"))
        return semantic_input(label, self.num_labels, self.collapse_nodule_labels), image


def ttur_rates(learning_rate: float, ttur: bool) -> tuple[float, float]:
    """Learning rates of generator and discriminator: half and twice the rate with two time scales, else both alike."""
    return (learning_rate / 2, learning_rate * 2) if ttur else (learning_rate, learning_rate)


def feature_matching_loss(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean absolute difference of the features, summed over the layers, averaged over the discriminators.

    Args:
        fake: features of generated images by discriminator and layer.
        real: the same of real images; no gradient goes there.
    """
    layers = [
        F.l1_loss(f, r.detach())
        for by_layer_fake, by_layer_real in zip(fake, real, strict=True)
        for f, r in zip(by_layer_fake, by_layer_real, strict=True)
    ]
    return torch.stack(layers).sum() / len(fake)


class SPADEGANTrainer(AdversarialTrainer):
    """One step of the generator, then one of the discriminator on the same fakes.

    Args:
        device: where to train.
        max_epochs: epochs in all.
        train_data_loader: batches for ``prepare_batch``.
        generator: :class:`monai_synth.networks.SPADEGenerator`, may be wrapped for distributed training.
        discriminator: :class:`monai_synth.networks.MapDiscriminator`, may be wrapped.
        generator_optimizer: optimiser of the generator, and of the encoder where there is one.
        discriminator_optimizer: optimiser of the discriminator.
        prepare_batch: gives (one-hot map, image), see :class:`MapPrepareBatch`.
        feature_weight: weight of :func:`feature_matching_loss`.
        perceptual_loss: ``loss(prediction, target)`` or None.
        perceptual_weight: weight of it.
        kl_weight: weight of the encoder's KL divergence from N(0, 1), summed over z and averaged over the batch.
        options: the other options of :class:`AdversarialTrainer`.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        train_data_loader: Iterable,
        generator: nn.Module,
        discriminator: nn.Module,
        generator_optimizer: Optimizer,
        discriminator_optimizer: Optimizer,
        *,
        prepare_batch: Callable,
        feature_weight: float = 10.0,
        perceptual_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_weight: float = 10.0,
        kl_weight: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(device, max_epochs, train_data_loader, prepare_batch=prepare_batch, **options)
        self.generator = generator
        self.discriminator = discriminator
        self.generator_optimizer = generator_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.feature_weight = feature_weight
        self.perceptual_loss = perceptual_loss
        self.perceptual_weight = perceptual_weight
        self.kl_weight = kl_weight

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> dict[str, Tensor]:
        seg, real = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking)
        self.generator.train()
        self.discriminator.train()

        with self._autocast(real):
            generated = self.generator(seg, real)
            fake, losses = self._generator_losses(seg, real, generated)
            loss = sum(losses.values())
        self.generator_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.generator_optimizer.step()

        self.discriminator_optimizer.zero_grad(set_to_none=True)
        with self._autocast(real):
            loss_d = self._discriminator_loss(seg, real, fake.detach())
        loss_d.backward()
        self.discriminator_optimizer.step()

        parts = {name: value.detach() for name, value in losses.items()}
        return {"pred": fake.detach(), "loss": loss.detach(), **parts, "loss_discriminator": loss_d.detach()}

    def _generator_losses(
        self, seg: Tensor, real: Tensor, generated: Tensor | tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The fakes, and each weighted part of the generator's loss."""
        fake, *posterior = generated if isinstance(generated, tuple) else (generated,)
        # the bare discriminator, which learns nothing from this step
        bare = unwrap(self.discriminator).requires_grad_(False)
        logits, features = bare(torch.cat([seg, seg]), torch.cat([fake, real]))
        bare.requires_grad_(True)
        features_fake, features_real = ([[f.chunk(2)[i] for f in scale] for scale in features] for i in (0, 1))
        losses = {
            "adversarial": sum(hinge_generator_loss(scale.chunk(2)[0]) for scale in logits) / len(logits),
            "feature_matching": self.feature_weight * feature_matching_loss(features_fake, features_real),
        }
        if self.perceptual_loss is not None:
            losses["perceptual"] = self.perceptual_weight * self.perceptual_loss(fake, real)
        if posterior:
            mean, log_variance = posterior
            losses["kl"] = self.kl_weight * kl_per_pixel(mean, torch.exp(0.5 * log_variance), 1)
        return fake, losses

    def _discriminator_loss(self, seg: Tensor, real: Tensor, fake: Tensor) -> Tensor:
        """Hinge loss averaged over the scales; real and fake share one call, so that gradients are reduced once."""
        logits, _ = self.discriminator(torch.cat([seg, seg]), torch.cat([real, fake]))
        return sum(hinge_discriminator_loss(*scale.chunk(2)) for scale in logits) / len(logits)

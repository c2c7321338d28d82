# SPDX-License-Identifier: Apache-2.0
"""Training of the KL autoencoder against a patch discriminator (LSDM thesis, Sec 3.1, Eq 3.2; losses of LDM).

MONAI's ``AdversarialTrainer`` expects a generator with one output; ``AutoencoderKL`` returns reconstruction, mean
and sigma, and the adversarial weight follows the gradients, so the two-optimiser step is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from monai_synth.training.adversarial import (
    AdversarialTrainer,
    hinge_discriminator_loss,
    hinge_generator_loss,
    unwrap,
)


def kl_per_pixel(mean: torch.Tensor, sigma: torch.Tensor, num_pixels: int) -> torch.Tensor:
    """KL(N(mean, sigma^2) || N(0, 1)) summed over the latent, averaged over the batch, per image pixel."""
    kl = 0.5 * (mean**2 + sigma**2 - torch.log(sigma**2) - 1.0)
    return kl.sum() / (mean.shape[0] * num_pixels)


def adaptive_weight(
    rec_loss: torch.Tensor, adv_loss: torch.Tensor, last_layer: torch.Tensor, maximum: float = 1e4
) -> torch.Tensor:
    """Norm of the reconstruction gradient over that of the adversarial one, both at the decoder's last weight."""
    rec_grad = torch.autograd.grad(rec_loss, last_layer, retain_graph=True)[0]
    adv_grad = torch.autograd.grad(adv_loss, last_layer, retain_graph=True)[0]
    return (rec_grad.norm() / (adv_grad.norm() + 1e-4)).clamp(0.0, maximum).detach()


def last_decoder_weight(autoencoder: nn.Module) -> torch.Tensor:
    """Weight of the last convolution of the decoder."""
    convs = [m for m in autoencoder.decoder.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    return convs[-1].weight


class Reconstruction(nn.Module):
    """x -> D(mean of E(x)); what validation compares with x."""

    def __init__(self, autoencoder: nn.Module) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(self.autoencoder.encode(x)[0])


class AutoencoderTrainer(AdversarialTrainer):
    """One step: reconstruction + perceptual + KL + weighted adversarial loss, then the discriminator's step.

    Args:
        device: where to train.
        max_epochs: epochs in all.
        train_data_loader: batches with ``image`` (B, 1, *S) in [-1, 1].
        autoencoder: MONAI ``AutoencoderKL``, may be wrapped for distributed training.
        discriminator: MONAI ``PatchDiscriminator``, may be wrapped.
        autoencoder_optimizer: optimiser of the autoencoder.
        discriminator_optimizer: optimiser of the discriminator.
        image_channels: the one-channel image is repeated to so many channels.
        perceptual_loss: ``loss(prediction, target)`` or None for L1 alone.
        perceptual_weight: weight of it.
        kl_weight: weight of :func:`kl_per_pixel`.
        adversarial_weight: factor on the adaptive weight; 0 trains without a discriminator.
        adversarial_start: iteration from which the discriminator takes part.
        options: ``epoch_length``, ``prepare_batch`` and the others of :class:`AdversarialTrainer`.
    """

    def __init__(
        self,
        device: torch.device,
        max_epochs: int,
        train_data_loader: Iterable,
        autoencoder: nn.Module,
        discriminator: nn.Module,
        autoencoder_optimizer: Optimizer,
        discriminator_optimizer: Optimizer,
        *,
        image_channels: int = 1,
        perceptual_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 50_001,
        **options: Any,
    ) -> None:
        super().__init__(device, max_epochs, train_data_loader, **options)
        self.autoencoder = autoencoder
        self.discriminator = discriminator
        self.autoencoder_optimizer = autoencoder_optimizer
        self.discriminator_optimizer = discriminator_optimizer
        self.image_channels = image_channels
        self.perceptual_loss = perceptual_loss
        self.perceptual_weight = perceptual_weight
        self.kl_weight = kl_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start

    def _iteration(self, engine: Any, batchdata: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x, _ = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking)
        x = x.expand(-1, self.image_channels, *x.shape[2:])
        self.autoencoder.train()
        self.discriminator.train()
        adversarial = self.adversarial_weight > 0 and engine.state.iteration >= self.adversarial_start

        # Autoencoder. The bare discriminator is used: its gradients of this step are thrown away.
        with self._autocast(x):
            x_rec, mean, sigma = self.autoencoder(x)
            l1 = F.l1_loss(x_rec, x)
            rec = l1 if self.perceptual_loss is None else l1 + self.perceptual_weight * self.perceptual_loss(x_rec, x)
            kl = kl_per_pixel(mean, sigma, x[0, 0].numel())
            loss = rec + self.kl_weight * kl
            if adversarial:
                adv = hinge_generator_loss(unwrap(self.discriminator)(x_rec)[-1])
                weight = adaptive_weight(rec, adv, last_decoder_weight(unwrap(self.autoencoder)))
                loss = loss + self.adversarial_weight * weight * adv
        self.autoencoder_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.autoencoder_optimizer.step()

        # Discriminator, real and fake in one call so that distributed training reduces its gradients once.
        loss_d = torch.zeros((), device=x.device)
        if adversarial:
            self.discriminator_optimizer.zero_grad(set_to_none=True)
            with self._autocast(x):
                logits = self.discriminator(torch.cat([x, x_rec.detach()]))[-1]
                loss_d = hinge_discriminator_loss(*logits.chunk(2))
            loss_d.backward()
            self.discriminator_optimizer.step()

        return {
            "image": x,
            "pred": x_rec.detach(),
            "loss": loss.detach(),
            "l1": l1.detach(),
            "kl": kl.detach(),
            "loss_discriminator": loss_d.detach(),
        }

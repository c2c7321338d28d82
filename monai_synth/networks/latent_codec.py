# SPDX-License-Identifier: Apache-2.0
"""Between images or label maps and the latent space of a KL autoencoder (LSDM thesis, Sec 3.1 and 3.2).

The codec hides three decisions: one-channel CT is repeated to the autoencoder's channels and averaged back
(SEEDS 2.3.14), label maps are scaled to [-1, 1] before they are encoded by the image autoencoder (Sec 4.3),
and latents are multiplied by ``scale_factor`` so that the diffusion model sees unit variance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class LatentCodec(nn.Module):
    """A frozen autoencoder with the conventions around it.

    Args:
        autoencoder: network with ``encode(x) -> (mean, sigma)`` and ``decode(z)``, e.g. MONAI's ``AutoencoderKL``.
        image_channels: channels that the autoencoder takes, 1 or 3.
        factor: spatial reduction f of the encoder.
        num_labels: number of labels of a semantic map, so that label ``num_labels - 1`` maps to +1.
        scale_factor: 1 / std of the training latents; 1 leaves latents as the encoder gives them.

    Shape: image_pm1 (B, 1, *S) in [-1, 1] <-> z (B, c, *S/f).
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        image_channels: int,
        factor: int,
        num_labels: int,
        scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.image_channels = image_channels
        self.factor = factor
        self.num_labels = num_labels
        self.scale_factor = float(scale_factor)

    def train(self, mode: bool = True) -> LatentCodec:
        """The autoencoder stays in evaluation mode whatever contains it is set to."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def expand(self, image_pm1: torch.Tensor) -> torch.Tensor:
        """Repeat a one-channel image to the autoencoder's channels."""
        return image_pm1.expand(-1, self.image_channels, *image_pm1.shape[2:])

    @torch.no_grad()
    def encode_image(self, image_pm1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation of an image, unscaled."""
        return self.autoencoder.encode(self.expand(image_pm1))

    @torch.no_grad()
    def encode_label(self, label: torch.Tensor) -> torch.Tensor:
        """E(m): posterior mean of a label map (B, 1, *S) with values 0..num_labels-1, unscaled."""
        map_pm1 = label.float() * (2.0 / (self.num_labels - 1)) - 1.0
        return self.autoencoder.encode(self.expand(map_pm1))[0]

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Image (B, 1, *S), nominally in [-1, 1], of scaled latents; differentiable in ``z``."""
        return self.autoencoder.decode(z / self.scale_factor).mean(dim=1, keepdim=True)


def latent_window(center: Sequence[int], size: int, shape: Sequence[int]) -> tuple[slice, ...]:
    """The crop around a nodule, moved inwards where it would reach over a border.

    Args:
        center: pixel that gets the index ``size // 2`` in the crop, if no border is near.
        size: edge of the crop.
        shape: shape of the whole map, nowhere smaller than ``size``.

    Returns:
        A slice of that size for each axis.
    """
    starts = [min(max(int(c) - size // 2, 0), extent - size) for c, extent in zip(center, shape, strict=True)]
    return tuple(slice(start, start + size) for start in starts)

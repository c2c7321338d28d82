# SPDX-License-Identifier: Apache-2.0
"""Spatially adaptive normalisation (SPADE) and the pooling of semantic maps to each resolution of a U-Net.

SPADE normalises a feature map without learned parameters and then scales and shifts it pixel by pixel with
values that a small network reads off the semantic map (Park et al. 2019; LSDM thesis, Sec 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from monai_synth.errors import UserError

Modulation = tuple[Tensor, Tensor]  # (1 + gamma, beta), each (B, C, *S): all that a SPADE layer takes from the map
SpadeVariant = Literal["paper", "monai"]
SemanticDownsample = Literal["max_onehot", "max_label", "nearest"]

SPADE_VARIANTS = ("paper", "monai")
SEMANTIC_DOWNSAMPLES = ("max_onehot", "max_label", "nearest")


class SPADE(nn.Module):
    """Group normalisation whose scale and shift come from a semantic map: ``norm(x) * (1 + gamma) + beta``.

    The layer names are those of ``monai.networks.blocks.SPADE``.

    Args:
        spatial_dims: 2 or 3.
        norm_channels: channels of the feature map.
        label_nc: channels K of the semantic map.
        hidden_channels: channels of the convolution that gamma and beta share.
        num_groups: groups of the normalisation.
        eps: added to the variance in the normalisation.
        variant: "paper" has a parameter-free GroupNorm, ReLU and plain convolutions for gamma and beta.
            "monai" equals MONAI's block inside its SPADEDiffusionModelUNet: an affine GroupNorm, LeakyReLU,
            and an InstanceNorm after gamma and after beta. That InstanceNorm makes gamma and beta of a
            uniform map vanish but for border effects; it is here so that weights trained with MONAI load.
    """

    def __init__(
        self,
        spatial_dims: int,
        norm_channels: int,
        label_nc: int,
        *,
        hidden_channels: int = 128,
        num_groups: int = 32,
        eps: float = 1e-6,
        variant: SpadeVariant = "paper",
    ) -> None:
        super().__init__()
        if variant not in SPADE_VARIANTS:
            msg = f"spade_variant is {variant!r}; it must be one of {SPADE_VARIANTS}."
            raise UserError(msg)
        is_monai = variant == "monai"
        self.param_free_norm = nn.GroupNorm(num_groups, norm_channels, eps=eps, affine=is_monai)
        self.mlp_shared = Convolution(
            spatial_dims, label_nc, hidden_channels, norm=None, act="LEAKYRELU" if is_monai else "RELU"
        )
        norm = "INSTANCE" if is_monai else None
        self.mlp_gamma = Convolution(spatial_dims, hidden_channels, norm_channels, norm=norm, act=None)
        self.mlp_beta = Convolution(spatial_dims, hidden_channels, norm_channels, norm=norm, act=None)

    def modulation(self, seg: Tensor) -> Modulation:
        """Scale and shift of every pixel; they depend on the map alone, not on the features or the timestep.

        Args:
            seg: semantic map (B, K, *S) at the resolution of the feature map.

        Returns:
            ``(1 + gamma, beta)``, each (B, C, *S).
        """
        hidden = self.mlp_shared(seg)
        return 1 + self.mlp_gamma(hidden), self.mlp_beta(hidden)

    def forward(self, x: Tensor, cond: Tensor | Modulation) -> Tensor:
        """Normalise and modulate.

        Args:
            x: features (B, C, *S).
            cond: the semantic map (B, K, *S), or what :meth:`modulation` returned for it.

        Returns:
            Features (B, C, *S).
        """
        scale, shift = self.modulation(cond) if isinstance(cond, Tensor) else cond
        return self.param_free_norm(x) * scale + shift


def pool_semantic(seg: Tensor, spatial_shape: Sequence[int], mode: SemanticDownsample = "max_onehot") -> Tensor:
    """Bring a semantic map to a lower resolution without losing small structures.

    LSDM thesis, Sec 3.3 max-pools the label map and then makes it one-hot: that is ``max_label``.
    ``max_onehot`` pools each class by itself, so that a pixel can carry several classes and neither a nodule
    nor what surrounds it is lost.

    Args:
        seg: map (B, K, *S'), 1 where a class is present and 0 elsewhere. A pixel without any class stays
            without.
        spatial_shape: the shape S to reach; S' must be an integer multiple of it.
        mode: "max_onehot" takes the maximum of each class over the window, "max_label" keeps only the highest
            class of those present in the window, "nearest" takes the first pixel of the window (as MONAI
            does, and loses structures smaller than the window).

    Returns:
        Map (B, K, *S).

    Raises:
        UserError: if S' is not an integer multiple of S, or the mode is unknown.
    """
    if mode not in SEMANTIC_DOWNSAMPLES:
        msg = f"semantic_downsample is {mode!r}; it must be one of {SEMANTIC_DOWNSAMPLES}."
        raise UserError(msg)
    source, target = tuple(seg.shape[2:]), tuple(spatial_shape)
    if len(source) != len(target) or any(s < t or s % t for s, t in zip(source, target, strict=True)):
        msg = (
            f"The semantic map has shape {source}, but the network needs {target}. Give a map whose size is"
            " the same or an integer multiple along every axis."
        )
        raise UserError(msg)
    window = [s // t for s, t in zip(source, target, strict=True)]
    if mode == "nearest":
        return seg[(..., *(slice(None, None, w) for w in window))]
    if any(w > 1 for w in window):
        pool = F.max_pool2d if len(window) == 2 else F.max_pool3d
        seg = pool(seg, kernel_size=window)
    return _highest_label(seg) if mode == "max_label" else seg


def _highest_label(seg: Tensor) -> Tensor:
    """Keep the highest class of each pixel: (B, K, *S) multi-hot -> one-hot, or all 0 where there is none."""
    rank = torch.arange(1, seg.shape[1] + 1, device=seg.device).view(1, -1, *[1] * (seg.ndim - 2))
    highest = ((seg > 0) * rank).amax(dim=1, keepdim=True)
    return (rank == highest).to(seg.dtype)

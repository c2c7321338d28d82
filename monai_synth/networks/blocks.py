# SPDX-License-Identifier: Apache-2.0
"""Blocks that the U-Net and the classifier share: residual, down, middle and up blocks with a time embedding.

Every residual block can take SPADE layers instead of its GroupNorms. Layers carry the names of MONAI's
diffusion U-Nets, and its convolution, attention and resampling blocks are used as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from monai.networks.blocks import Convolution, SpatialAttentionBlock
from monai.networks.nets.diffusion_model_unet import DiffusionUnetDownsample, WrappedUpsample, zero_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monai_synth.networks.spade import SPADE, Modulation, SpadeVariant

# What the two SPADE layers of one residual block get: the map at their resolution, or their cached
# modulations.
BlockCondition = Tensor | tuple[Modulation, Modulation] | None
Conditions = Iterator[BlockCondition]  # one entry per residual block that has SPADE layers, in forward order


@dataclass(frozen=True)
class BlockSettings:
    """What all blocks of one network have in common.

    Attributes:
        spatial_dims: 2 or 3.
        time_channels: length of the time embedding.
        norm_num_groups: groups of every GroupNorm.
        norm_eps: added to the variance in every GroupNorm.
        time_scale_shift: the time embedding scales and shifts the second norm's output; else it is added
            before it.
        label_nc: classes of the semantic map; 0 for a network without SPADE.
        spade_hidden_channels: hidden channels of the SPADE layers.
        spade_variant: see :class:`SPADE`.
        use_flash_attention: torch's fused attention.
        use_checkpoint: recompute activations in the backward pass, block by block, instead of keeping them.
    """

    spatial_dims: int
    time_channels: int
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    time_scale_shift: bool = True
    label_nc: int = 0
    spade_hidden_channels: int = 128
    spade_variant: SpadeVariant = "paper"
    use_flash_attention: bool = True
    use_checkpoint: bool = False


def conv(spatial_dims: int, in_channels: int, out_channels: int, *, kernel_size: int = 3) -> Convolution:
    """A plain convolution that keeps the size of the image."""
    return Convolution(spatial_dims, in_channels, out_channels, kernel_size=kernel_size, conv_only=True)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between them, and a shortcut.

    With ``time_scale_shift`` the embedding scales and shifts the features after the second norm, SPADE or not
    (as in guided diffusion and in semantic diffusion models); otherwise it is added before that norm, as
    MONAI does.
    """

    def __init__(
        self,
        settings: BlockSettings,
        in_channels: int,
        out_channels: int,
        *,
        spade: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        dims = settings.spatial_dims
        self.time_scale_shift = settings.time_scale_shift
        self.has_spade = spade
        self.norm1 = _norm(settings, in_channels, spade=spade)
        self.nonlinearity = nn.SiLU()
        self.conv1 = conv(dims, in_channels, out_channels)
        self.resample = _resample(dims, in_channels, up=up, down=down)
        time_outputs = 2 * out_channels if settings.time_scale_shift else out_channels
        self.time_emb_proj = nn.Linear(settings.time_channels, time_outputs)
        self.norm2 = _norm(settings, out_channels, spade=spade)
        self.conv2 = zero_module(conv(dims, out_channels, out_channels))
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else conv(dims, in_channels, out_channels, kernel_size=1)
        )

    def modulations(self, seg: Tensor) -> tuple[Modulation, Modulation]:
        """What both SPADE layers take from the map (B, K, *S) at this block's resolution."""
        return self.norm1.modulation(seg), self.norm2.modulation(seg)

    def forward(self, x: Tensor, emb: Tensor, cond: BlockCondition = None) -> Tensor:
        """Features (B, C, *S) and time embedding (B, E) -> features (B, C_out, *S)."""
        cond1, cond2 = cond if isinstance(cond, tuple) else (cond, cond)
        h = self.norm1(x, cond1) if self.has_spade else self.norm1(x)
        h = self.nonlinearity(h)
        h = self.conv1(self.resample(h))
        time = self.time_emb_proj(self.nonlinearity(emb))
        time = time.view(*time.shape, *[1] * (h.ndim - 2))
        if not self.time_scale_shift:
            h = h + time
        h = self.norm2(h, cond2) if self.has_spade else self.norm2(h)
        if self.time_scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = h * (1 + scale) + shift
        h = self.conv2(self.nonlinearity(h))
        return self.skip_connection(self.resample(x)) + h


class _Stage(nn.Module):
    """Runs the layers of one resolution, with activation checkpointing where it is on."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__()
        self.use_checkpoint = settings.use_checkpoint

    def run(self, layer: nn.Module, *inputs: Tensor | BlockCondition) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def run_attention(self, attention: nn.Module, h: Tensor) -> Tensor:
        out = self.run(attention, h)
        return (
            out.contiguous() if h.is_contiguous() else out
        )  # it returns channels last, which is slow if not asked for

    def run_res(self, block: ResBlock, h: Tensor, emb: Tensor, conditions: Conditions) -> Tensor:
        return self.run(block, h, emb, next(conditions) if block.has_spade else None)


class DownBlock(_Stage):
    """Residual blocks of one level of the encoder, with attention if asked, then the down-sampling."""

    def __init__(
        self,
        settings: BlockSettings,
        in_channels: int,
        out_channels: int,
        *,
        num_res_blocks: int,
        num_head_channels: int | None,
        add_downsample: bool,
        resblock_updown: bool = False,
        spade: bool = False,
    ) -> None:
        super().__init__(settings)
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.resnets = nn.ModuleList(
            ResBlock(settings, widths[i], out_channels, spade=spade) for i in range(num_res_blocks)
        )
        self.attentions = _attentions(settings, out_channels, num_head_channels, count=num_res_blocks)
        self.downsampler: nn.Module | None = None
        if add_downsample and resblock_updown:
            self.downsampler = ResBlock(settings, out_channels, out_channels, down=True)
        elif add_downsample:
            self.downsampler = DiffusionUnetDownsample(settings.spatial_dims, out_channels, use_conv=True)

    def forward(self, h: Tensor, emb: Tensor, conditions: Conditions) -> tuple[Tensor, list[Tensor]]:
        """Features (B, C, *S) -> features at half the size, and what the decoder gets of each layer."""
        skips = []
        for resnet, attention in zip(self.resnets, self.attentions or [None] * len(self.resnets), strict=True):
            h = self.run_res(resnet, h, emb, conditions)
            if attention is not None:
                h = self.run_attention(attention, h)
            skips.append(h)
        if self.downsampler is not None:
            h = self.downsampler(h, emb)
            skips.append(h)
        return h, skips


class MiddleBlock(_Stage):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, settings: BlockSettings, channels: int, *, num_head_channels: int, spade: bool = False) -> None:
        super().__init__(settings)
        self.resnet_1 = ResBlock(settings, channels, channels, spade=spade)
        self.attention = _attention(settings, channels, num_head_channels)
        self.resnet_2 = ResBlock(settings, channels, channels, spade=spade)

    def forward(self, h: Tensor, emb: Tensor, conditions: Conditions) -> Tensor:
        """Features (B, C, *S) -> features (B, C, *S)."""
        h = self.run_res(self.resnet_1, h, emb, conditions)
        h = self.run_attention(self.attention, h)
        return self.run_res(self.resnet_2, h, emb, conditions)


class UpBlock(_Stage):
    """Residual blocks of one level of the decoder, each fed by one of the encoder, then the up-sampling."""

    def __init__(
        self,
        settings: BlockSettings,
        in_channels: int,
        out_channels: int,
        *,
        skip_channels: list[int],
        num_head_channels: int | None,
        add_upsample: bool,
        resblock_updown: bool = False,
        spade: bool = False,
    ) -> None:
        super().__init__(settings)
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nn.ModuleList(
            ResBlock(settings, width + skip, out_channels, spade=spade)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        self.attentions = _attentions(settings, out_channels, num_head_channels, count=len(skip_channels))
        self.upsampler: nn.Module | None = None
        if add_upsample and resblock_updown:
            self.upsampler = ResBlock(settings, out_channels, out_channels, up=True)
        elif add_upsample:
            post_conv = conv(settings.spatial_dims, out_channels, out_channels)
            self.upsampler = _upsample(settings.spatial_dims, out_channels, post_conv)

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor, conditions: Conditions) -> Tensor:
        """Features (B, C, *S) -> features at twice the size. Takes what it needs off the end of ``skips``."""
        for resnet, attention in zip(self.resnets, self.attentions or [None] * len(self.resnets), strict=True):
            h = self.run_res(resnet, torch.cat([h, skips.pop()], dim=1), emb, conditions)
            if attention is not None:
                h = self.run_attention(attention, h)
        return h if self.upsampler is None else self.upsampler(h, emb)


def _norm(settings: BlockSettings, channels: int, *, spade: bool) -> nn.Module:
    if not spade:
        return nn.GroupNorm(settings.norm_num_groups, channels, eps=settings.norm_eps)
    return SPADE(
        settings.spatial_dims,
        channels,
        settings.label_nc,
        hidden_channels=settings.spade_hidden_channels,
        num_groups=settings.norm_num_groups,
        eps=settings.norm_eps,
        variant=settings.spade_variant,
    )


def _attention(settings: BlockSettings, channels: int, num_head_channels: int) -> SpatialAttentionBlock:
    return SpatialAttentionBlock(
        settings.spatial_dims,
        channels,
        num_head_channels=num_head_channels,
        norm_num_groups=settings.norm_num_groups,
        norm_eps=settings.norm_eps,
        use_flash_attention=settings.use_flash_attention,
    )


def _attentions(
    settings: BlockSettings, channels: int, num_head_channels: int | None, *, count: int
) -> nn.ModuleList | None:
    if num_head_channels is None:
        return None
    return nn.ModuleList(_attention(settings, channels, num_head_channels) for _ in range(count))


def _upsample(spatial_dims: int, channels: int, post_conv: nn.Module | None = None) -> WrappedUpsample:
    return WrappedUpsample(
        spatial_dims,
        in_channels=channels,
        out_channels=channels,
        scale_factor=2.0,
        mode="nontrainable",
        interp_mode="nearest",
        align_corners=None,
        post_conv=post_conv,
    )


def _resample(spatial_dims: int, channels: int, *, up: bool, down: bool) -> nn.Module:
    if up:
        return _upsample(spatial_dims, channels)
    if down:
        return DiffusionUnetDownsample(spatial_dims, channels, use_conv=False)
    return nn.Identity()

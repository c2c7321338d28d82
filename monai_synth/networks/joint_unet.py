# SPDX-License-Identifier: Apache-2.0
"""Denoising U-Net of the joint diffusion model (JDM thesis, Sec 2.2 and Tab 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

from monai_synth.networks.plain_unet import plain_levels
from monai_synth.networks.spade_unet import SPADEUNet


class JointUNet(SPADEUNet):
    """U-Net over image and label channels at once, described in the words of the thesis' Table 4.1.

    It is the plain :class:`SPADEUNet`: residual blocks with a time embedding, attention at the coarse levels and in
    the middle. Where the variance is learned, the second half of the output channels interpolates it.

    Args:
        spatial_dims: 2 or 3.
        image_channels: C, channels of the image.
        label_channels: K - 1, labels other than the background.
        image_size: spatial size of the input; each side divisible by 2 to the number of levels minus one.
        base_channels: channels of the first level, a multiple of ``norm_num_groups``.
        channel_mult: factor on ``base_channels`` for each level.
        num_res_blocks: residual blocks of each level.
        attention_resolutions: sizes of the map (its shortest side) at which there is attention. The thesis' text
            calls them factors, its code takes sizes (SEEDS 2.4.7).
        num_heads: attention heads at every level.
        learned_variance: two outputs for each input channel instead of one.
        norm_num_groups: groups of the normalisations.
        time_scale_shift: let the time embedding scale and shift after the second normalisation (the thesis' code),
            else add it before (its Fig 2.2b).
        use_checkpoint: recompute activations in the backward pass.

    Raises:
        UserError: the options do not fit each other.
    """

    def __init__(
        self,
        spatial_dims: int,
        image_channels: int,
        label_channels: int,
        image_size: Sequence[int],
        *,
        base_channels: int = 128,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16, 8),
        num_heads: int = 4,
        learned_variance: bool = True,
        norm_num_groups: int = 32,
        time_scale_shift: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        levels = plain_levels(
            image_size,
            spatial_dims=spatial_dims,
            base_channels=base_channels,
            channel_mult=channel_mult,
            attention_resolutions=attention_resolutions,
            num_heads=num_heads,
        )
        in_channels = image_channels + label_channels
        super().__init__(
            spatial_dims,
            in_channels,
            in_channels * (2 if learned_variance else 1),
            label_nc=0,
            **levels,
            num_res_blocks=num_res_blocks,
            norm_num_groups=norm_num_groups,
            norm_eps=1e-5,
            spade_in=(),
            time_scale_shift=time_scale_shift,
            use_checkpoint=use_checkpoint,
        )
        self.image_channels, self.label_channels = image_channels, label_channels

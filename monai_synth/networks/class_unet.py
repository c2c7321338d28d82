# SPDX-License-Identifier: Apache-2.0
"""Denoising U-Net that is told a class, or that there is none (classifier-free guidance, Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Sequence

from monai_synth.networks.plain_unet import plain_levels
from monai_synth.networks.spade_unet import SPADEUNet


class ClassUNet(SPADEUNet):
    """U-Net over images of one of K classes.

    It is the plain :class:`SPADEUNet` with a learned vector for each class and one more for the null class, number K,
    which stands for no class. The vector is added to the time embedding, which scales and shifts every residual block.
    The X-ray text takes the U-Net of lucidrains' code: three levels of 64, 128 and 256 channels, two residual blocks
    each, groups of 8. Where that has linear attention at every level, this has full attention at the sizes named.

    Args:
        spatial_dims: 2 or 3.
        image_channels: C.
        num_classes: K.
        image_size: spatial size of the images; each side divisible by 2 to the number of levels minus one.
        base_channels: channels of the first level, a multiple of ``norm_num_groups``.
        channel_mult: factor on ``base_channels`` for each level.
        num_res_blocks: residual blocks of each level.
        attention_resolutions: sizes of the map (its shortest side) at which there is attention.
        num_heads: attention heads at every level.
        norm_num_groups: groups of the normalisations.
        time_scale_shift: let the embedding of time and class scale and shift, else add it.
        use_checkpoint: recompute activations in the backward pass.

    Raises:
        UserError: the options do not fit each other.
    """

    def __init__(
        self,
        spatial_dims: int,
        image_channels: int,
        num_classes: int,
        image_size: Sequence[int],
        *,
        base_channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16, 14, 8, 7),
        num_heads: int = 4,
        norm_num_groups: int = 8,
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
        super().__init__(
            spatial_dims,
            image_channels,
            image_channels,
            label_nc=0,
            **levels,
            num_res_blocks=num_res_blocks,
            norm_num_groups=norm_num_groups,
            norm_eps=1e-5,
            spade_in=(),
            time_scale_shift=time_scale_shift,
            use_checkpoint=use_checkpoint,
            num_class_embeds=num_classes + 1,
        )
        self.num_classes = num_classes

    @property
    def null_class(self) -> int:
        """The number that stands for no class."""
        return self.num_classes

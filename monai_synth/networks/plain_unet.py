# SPDX-License-Identifier: Apache-2.0
"""The words in which U-Nets without a map are described: sizes and factors instead of channels and flags per level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai_synth.errors import UserError


def plain_levels(
    image_size: Sequence[int],
    *,
    spatial_dims: int,
    base_channels: int,
    channel_mult: Sequence[int],
    attention_resolutions: Sequence[int],
    num_heads: int,
) -> dict[str, Any]:
    """Options of :class:`monai_synth.networks.SPADEUNet` for such a description.

    Args:
        image_size: spatial size of the input; each side divisible by 2 to the number of levels minus one.
        spatial_dims: 2 or 3.
        base_channels: channels of the first level.
        channel_mult: factor on ``base_channels`` for each level.
        attention_resolutions: sizes of the map (its shortest side) at which there is attention.
        num_heads: attention heads at every level.

    Returns:
        ``channels``, ``attention_levels``, ``num_head_channels``.

    Raises:
        UserError: the options do not fit each other.
    """
    factor = 2 ** (len(channel_mult) - 1)
    if len(image_size) != spatial_dims or any(s < factor or s % factor for s in image_size):
        msg = (
            f"image_size {list(image_size)} does not fit a {spatial_dims}-D network of {len(channel_mult)} levels; "
            f"give {spatial_dims} sizes that are multiples of {factor}, or another channel_mult"
        )
        raise UserError(msg)
    channels = [base_channels * m for m in channel_mult]
    if any(c % num_heads for c in channels):
        raise UserError(f"num_heads {num_heads} does not divide the channels {channels}; choose others")
    sizes = [min(image_size) // 2**level for level in range(len(channels))]
    return {
        "channels": channels,
        "attention_levels": [size in attention_resolutions for size in sizes],
        "num_head_channels": [c // num_heads for c in channels],
    }

# SPDX-License-Identifier: Apache-2.0
"""The descending half that the U-Net and the classifier share, and the checks of what both are given."""

from __future__ import annotations

from collections.abc import Sequence

from monai.data import MetaTensor
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

from monai_synth.errors import UserError
from monai_synth.networks.blocks import BlockSettings, DownBlock


def time_embedding(settings: BlockSettings) -> nn.Sequential:
    """Two linear layers that turn the sinusoidal embedding of t into what the residual blocks get."""
    channels = settings.time_channels
    return nn.Sequential(nn.Linear(channels // 4, channels), nn.SiLU(), nn.Linear(channels, channels))


def encoder(
    settings: BlockSettings,
    channels: Sequence[int],
    num_res_blocks: Sequence[int],
    num_head_channels: Sequence[int],
    attention_levels: Sequence[bool],
    *,
    resblock_updown: bool = False,
    spade: bool = False,
) -> nn.ModuleList:
    """The down blocks of all levels; the last level does not halve the size."""
    last = len(channels) - 1
    return nn.ModuleList(
        DownBlock(
            settings,
            channels[max(level - 1, 0)],
            channels[level],
            num_res_blocks=num_res_blocks[level],
            num_head_channels=num_head_channels[level] if attention_levels[level] else None,
            add_downsample=level < last,
            resblock_updown=resblock_updown,
            spade=spade,
        )
        for level in range(last + 1)
    )


def check_levels(
    channels: Sequence[int],
    attention_levels: Sequence[bool],
    num_res_blocks: int | Sequence[int],
    num_head_channels: int | Sequence[int],
    norm_num_groups: int,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the options against each other; return residual blocks and head channels of each level."""
    try:
        res_blocks = ensure_tuple_rep(num_res_blocks, len(channels))
        heads = ensure_tuple_rep(num_head_channels, len(channels))
    except ValueError as error:
        msg = (
            f"num_res_blocks {num_res_blocks} and num_head_channels {num_head_channels} must be one number,"
            f" or one for each of the {len(channels)} levels."
        )
        raise UserError(msg) from error
    if len(attention_levels) != len(channels):
        msg = f"attention_levels has {len(attention_levels)} entries for {len(channels)} levels in channels."
        raise UserError(msg)
    if any(c <= 0 or c % norm_num_groups for c in channels):
        msg = f"channels {tuple(channels)} must all be multiples of norm_num_groups {norm_num_groups}."
        raise UserError(msg)
    for level, (c, h) in enumerate(zip(channels, heads, strict=True)):
        if c % h and (attention_levels[level] or level == len(channels) - 1):
            msg = f"Level {level} has {c} channels, which num_head_channels {h} does not divide."
            raise UserError(msg)
    return res_blocks, heads


def check_input(x: Tensor, in_channels: int, num_levels: int) -> None:
    """Refuse an input that would fail, or lose its borders, somewhere inside the network."""
    factor = 2 ** (num_levels - 1)
    if x.shape[1] != in_channels or any(size % factor for size in x.shape[2:]):
        msg = (
            f"The input has shape {tuple(x.shape)}; the network needs {in_channels} channels and sizes that"
            f" are multiples of {factor} (it has {num_levels} levels)."
        )
        raise UserError(msg)


def plain_tensor(x: Tensor | None) -> Tensor | None:
    """A MetaTensor without its metadata, which would cost some milliseconds in each forward pass."""
    return x.as_tensor() if isinstance(x, MetaTensor) else x

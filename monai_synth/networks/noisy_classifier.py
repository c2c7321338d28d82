# SPDX-License-Identifier: Apache-2.0
"""Classifier of noisy image crops that knows the timestep (LSDM thesis, Sec 3.4, Fig 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers.factories import Pool
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn

from monai_synth.data.semantic import MALIGNANCY
from monai_synth.errors import UserError
from monai_synth.networks.blocks import BlockSettings, MiddleBlock, conv
from monai_synth.networks.encoder import check_input, check_levels, encoder, plain_tensor, time_embedding


class NoisyClassifier(nn.Module):
    """Encoder and middle block of the U-Net without SPADE, then pooling and one linear layer.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image crop.
        out_channels: 2 for the logits of benign and malignant, 1 for a regression; of several features together, in
            the order of :func:`feature_columns`.
        channels: channels of each level, each a multiple of ``norm_num_groups``.
        attention_levels: which levels have attention after each residual block. The middle block always has.
        num_res_blocks: residual blocks of each level.
        num_head_channels: channels of an attention head, for all levels or for each.
        norm_num_groups: groups of the normalisations.
        norm_eps: added to the variance in the normalisations.
        use_flash_attention: torch's fused attention.
        output_bias: initial bias of the output, one number or one for each of its channels; the middle of a rating
            scale saves a regressor the way there.

    Raises:
        UserError: if the options do not fit each other.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int],
        *,
        attention_levels: Sequence[bool],
        num_res_blocks: int | Sequence[int] = 2,
        num_head_channels: int | Sequence[int] = 32,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        use_flash_attention: bool = True,
        output_bias: float | Sequence[float] = 0.0,
    ) -> None:
        super().__init__()
        res_blocks, heads = check_levels(channels, attention_levels, num_res_blocks, num_head_channels, norm_num_groups)
        settings = BlockSettings(
            spatial_dims=spatial_dims,
            time_channels=channels[0] * 4,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            use_flash_attention=use_flash_attention,
        )
        self.in_channels, self.out_channels, self.channels = in_channels, out_channels, tuple(channels)
        self.conv_in = conv(spatial_dims, in_channels, channels[0])
        self.time_embed = time_embedding(settings)
        self.down_blocks = encoder(settings, channels, res_blocks, heads, attention_levels)
        self.middle_block = MiddleBlock(settings, channels[-1], num_head_channels=heads[-1])
        self.out = nn.Sequential(
            nn.GroupNorm(norm_num_groups, channels[-1], eps=norm_eps),
            nn.SiLU(),
            Pool[Pool.ADAPTIVEAVG, spatial_dims](1),
            nn.Flatten(),
            nn.Linear(channels[-1], out_channels),
        )
        bias = torch.as_tensor(output_bias, dtype=torch.float32)
        if bias.ndim and len(bias) != out_channels:
            raise UserError(f"output_bias has {len(bias)} numbers for {out_channels} output channels; give as many")
        with torch.no_grad():
            self.out[-1].bias.copy_(bias)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Classify noisy crops.

        Args:
            x: crops (B, C, *S); S divisible by 2 to the number of levels minus one.
            timesteps: (B,), noise level of each crop, 0 to T - 1.

        Returns:
            Logits or predicted values (B, out_channels).
        """
        x = plain_tensor(x)
        check_input(x, self.in_channels, len(self.channels))
        emb = self.time_embed(get_timestep_embedding(timesteps, self.channels[0]).to(x.dtype))
        conditions = iter(())
        h = self.conv_in(x)
        for block in self.down_blocks:
            h, _ = block(h, emb, conditions)
        return self.out(self.middle_block(h, emb, conditions))


def feature_columns(features: Sequence[str]) -> dict[str, slice]:
    """Output channels of each feature of a classifier: two for malignancy (logits), one for a rating."""
    columns, start = {}, 0
    for feature in features:
        stop = start + (2 if feature == MALIGNANCY else 1)
        columns[feature] = slice(start, stop)
        start = stop
    return columns


class FeatureHead(nn.Module):
    """One feature's answer of a classifier that tells several at once.

    Args:
        network: ``(x, timesteps) -> (B, C)``; heads of one network share it, so that it need run only once for all.
        columns: of the answer.
    """

    def __init__(self, network: nn.Module, columns: slice) -> None:
        super().__init__()
        self.network, self.columns = network, columns

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, 2) of malignancy, or the rating (B, 1)."""
        return self.network(x, timesteps)[:, self.columns]

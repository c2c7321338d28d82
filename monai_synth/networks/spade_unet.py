# SPDX-License-Identifier: Apache-2.0
"""Denoising U-Net whose normalisations read a semantic map (LSDM thesis, Sec 3.3, Fig 2.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from monai.networks.nets.diffusion_model_unet import get_timestep_embedding, zero_module
from torch import Tensor, nn

from monai_synth.errors import UserError
from monai_synth.networks.blocks import BlockSettings, MiddleBlock, ResBlock, UpBlock, conv
from monai_synth.networks.checkpoints import convert_monai_state_dict, load_strictly
from monai_synth.networks.encoder import check_input, check_levels, encoder, plain_tensor, time_embedding
from monai_synth.networks.spade import (
    SEMANTIC_DOWNSAMPLES,
    Modulation,
    SemanticDownsample,
    SpadeVariant,
    pool_semantic,
)

SPADE_PLACES = ("down", "middle", "up")


class SPADEUNet(nn.Module):
    """U-Net with time embedding that predicts the noise in x_t, guided by a semantic map through SPADE.

    The map enters every residual block of the parts named in ``spade_in``. With ``spade_in=()`` this is the
    plain U-Net of latent diffusion. Layers are named as in MONAI's ``DiffusionModelUNet`` and
    ``SPADEDiffusionModelUNet``; with ``spade_in=("up",)``, ``spade_variant="monai"``,
    ``semantic_downsample="nearest"`` and ``time_scale_shift=False`` it computes what the latter computes.
    Residual blocks that resample (``resblock_updown``) have no SPADE, as there. With ``num_class_embeds`` a learned
    vector for each class is added to the time embedding, as MONAI's network does.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input; LSDM gives 2c: the noisy latent and the encoded map, concatenated.
        out_channels: channels of the predicted noise.
        label_nc: classes K of the semantic map; unused when ``spade_in`` is empty.
        channels: channels of each level, each a multiple of ``norm_num_groups``.
        num_res_blocks: residual blocks of each level; the decoder has one more.
        attention_levels: which levels have attention after each residual block. The middle block always has.
        num_head_channels: channels of an attention head, for all levels or for each.
        norm_num_groups: groups of the normalisations.
        norm_eps: added to the variance in the normalisations.
        spade_in: parts with SPADE: any of "down", "middle", "up". LSDM has all (Fig 3.2).
        spade_hidden_channels: hidden channels in each SPADE layer.
        spade_variant: "paper" or "monai", see :class:`SPADE`.
        time_scale_shift: let the time embedding scale and shift after the second normalisation, else add it
            before.
        semantic_downsample: how the map reaches each level, see :func:`pool_semantic`.
        resblock_updown: resample with residual blocks instead of a strided convolution and nearest
            neighbours.
        use_flash_attention: torch's fused attention; same result, less time and memory.
        use_checkpoint: recompute activations in the backward pass: about a quarter of the memory for 1.2x the
            time.
        num_class_embeds: classes that the network is told; None for a network without classes.

    Raises:
        UserError: if the options do not fit each other.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        label_nc: int,
        channels: Sequence[int],
        *,
        attention_levels: Sequence[bool],
        num_res_blocks: int | Sequence[int] = 2,
        num_head_channels: int | Sequence[int] = 32,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-6,
        spade_in: Sequence[str] = SPADE_PLACES,
        spade_hidden_channels: int = 128,
        spade_variant: SpadeVariant = "paper",
        time_scale_shift: bool = True,
        semantic_downsample: SemanticDownsample = "max_onehot",
        resblock_updown: bool = False,
        use_flash_attention: bool = True,
        use_checkpoint: bool = False,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        spade_in = (spade_in,) if isinstance(spade_in, str) else tuple(spade_in)
        _check_spade(spade_in, label_nc, semantic_downsample)
        res_blocks, heads = check_levels(channels, attention_levels, num_res_blocks, num_head_channels, norm_num_groups)
        settings = BlockSettings(
            spatial_dims=spatial_dims,
            time_channels=channels[0] * 4,
            norm_num_groups=norm_num_groups,
            norm_eps=norm_eps,
            time_scale_shift=time_scale_shift,
            label_nc=label_nc,
            spade_hidden_channels=spade_hidden_channels,
            spade_variant=spade_variant,
            use_flash_attention=use_flash_attention,
            use_checkpoint=use_checkpoint,
        )
        self.spatial_dims, self.in_channels, self.out_channels = spatial_dims, in_channels, out_channels
        self.label_nc, self.channels, self.spade_in = label_nc, tuple(channels), spade_in
        self.semantic_downsample = semantic_downsample
        num_levels = len(channels)

        self.conv_in = conv(spatial_dims, in_channels, channels[0])
        self.time_embed = time_embedding(settings)
        self.class_embedding = (
            None if num_class_embeds is None else nn.Embedding(num_class_embeds, settings.time_channels)
        )
        self.down_blocks = encoder(
            settings,
            channels,
            res_blocks,
            heads,
            attention_levels,
            resblock_updown=resblock_updown,
            spade="down" in spade_in,
        )
        self.middle_block = MiddleBlock(settings, channels[-1], num_head_channels=heads[-1], spade="middle" in spade_in)
        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for level in reversed(range(num_levels)):
            # The last layer of a level meets the output of the level above, the others the outputs of their
            # own.
            from_encoder = [channels[level]] * res_blocks[level] + [channels[max(level - 1, 0)]]
            self.up_blocks.append(
                UpBlock(
                    settings,
                    below,
                    channels[level],
                    skip_channels=from_encoder,
                    num_head_channels=heads[level] if attention_levels[level] else None,
                    add_upsample=level > 0,
                    resblock_updown=resblock_updown,
                    spade="up" in spade_in,
                )
            )
            below = channels[level]
        self.out = nn.Sequential(
            nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps),
            nn.SiLU(),
            zero_module(conv(spatial_dims, channels[0], out_channels)),
        )

    def modulations(self, seg: Tensor, spatial_shape: Sequence[int]) -> tuple[tuple[Modulation, Modulation], ...]:
        """All that the network takes from a map; compute it once and reuse it over all steps of a sample.

        Args:
            seg: semantic map (B, K, *S'), S' the input's shape or an integer multiple of it. With B = 1 the
                result serves inputs of any batch size.
            spatial_shape: spatial shape S of the input that will go with it.

        Returns:
            For each residual block with SPADE, in forward order, the ``(1 + gamma, beta)`` of its two layers,
            each (B, C, *S_level). Empty where ``spade_in`` is.
        """
        maps = self._pooled(seg.to(self.time_embed[0].weight.dtype), spatial_shape)
        return tuple(block.modulations(maps[level]) for block, level in self._spade_blocks())

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        seg: Tensor | None = None,
        modulations: Sequence[tuple[Modulation, Modulation]] | None = None,
        *,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise.

        Args:
            x: noisy input (B, C, *S); S divisible by 2 to the number of levels minus one.
            timesteps: (B,), 0 to T - 1.
            seg: semantic map (B, K, *S'), S' equal to S or an integer multiple of it; ignored where
                ``spade_in`` is empty or ``modulations`` are given.
            modulations: what :meth:`modulations` returned for that map.
            class_labels: (B,) integers, 0 to ``num_class_embeds - 1``; needed where the network has classes.

        Returns:
            Predicted noise (B, out_channels, *S).

        Raises:
            UserError: if what the network is conditioned on is missing, or shapes do not fit.
        """
        x, seg = plain_tensor(x), plain_tensor(seg)
        check_input(x, self.in_channels, len(self.channels))
        conditions = self._conditions(seg, modulations, x.shape[2:])

        # 1. Time, and the class.
        emb = self.time_embed(get_timestep_embedding(timesteps, self.channels[0]).to(x.dtype))
        if self.class_embedding is not None:
            emb = emb + self.class_embedding(self._classes(class_labels)).to(emb.dtype)

        # 2. Encoder.
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h, outputs = block(h, emb, conditions)
            skips += outputs

        # 3. Middle.
        h = self.middle_block(h, emb, conditions)

        # 4. Decoder.
        for block in self.up_blocks:
            h = block(h, skips, emb, conditions)
        return self.out(h)

    def load_monai_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load weights of MONAI's or monai-generative's diffusion U-Nets, so that the outputs are the same.

        Takes ``SPADEDiffusionModelUNet`` and ``DiffusionModelUNet`` of MONAI >= 1.4 and of monai-generative
        0.2.3, without cross-attention. This network must have been built with
        ``time_scale_shift=False`` and, for SPADE, with ``spade_in=("up",)``, ``spade_variant="monai"`` and
        ``semantic_downsample="nearest"``.

        Raises:
            UserError: if any key is left over or missing, or any shape differs. Nothing is loaded then.
        """
        load_strictly(self, convert_monai_state_dict(state_dict, self.state_dict()))

    def _spade_blocks(self) -> Iterator[tuple[ResBlock, int]]:
        """Residual blocks with SPADE and their level, in forward order."""
        lowest = len(self.channels) - 1
        stages = [(block.resnets, level) for level, block in enumerate(self.down_blocks)]
        stages.append(([self.middle_block.resnet_1, self.middle_block.resnet_2], lowest))
        stages += [(block.resnets, lowest - i) for i, block in enumerate(self.up_blocks)]
        return ((block, level) for blocks, level in stages for block in blocks if block.has_spade)

    def _pooled(self, seg: Tensor, spatial_shape: Sequence[int]) -> list[Tensor]:
        """The map at every level, level 0 first."""
        if seg.ndim != self.spatial_dims + 2 or seg.shape[1] != self.label_nc:
            msg = (
                f"The semantic map has shape {tuple(seg.shape)}; the network needs (B, {self.label_nc},"
                f" {self.spatial_dims} spatial sizes): one channel for each class."
            )
            raise UserError(msg)
        maps = [pool_semantic(seg, spatial_shape, self.semantic_downsample)]
        for _ in self.channels[1:]:
            maps.append(pool_semantic(maps[-1], [s // 2 for s in maps[-1].shape[2:]], self.semantic_downsample))
        return maps

    def _classes(self, class_labels: Tensor | None) -> Tensor:
        """The class labels, if there are any."""
        if class_labels is None:
            msg = (
                f"The network knows {self.class_embedding.num_embeddings} classes and needs `class_labels` (B,),"
                " one for each input."
            )
            raise UserError(msg)
        return plain_tensor(class_labels)

    def _conditions(
        self,
        seg: Tensor | None,
        modulations: Sequence[tuple[Modulation, Modulation]] | None,
        spatial_shape: Sequence[int],
    ) -> Iterator[Tensor | tuple[Modulation, Modulation]]:
        """What each residual block with SPADE gets: its cached modulations, or the map at its level."""
        if not self.spade_in:
            return iter(())
        if modulations is None and seg is None:
            msg = f"The network has SPADE in {self.spade_in} and needs the map `seg` or `modulations`."
            raise UserError(msg)
        levels = [level for _, level in self._spade_blocks()]
        if modulations is None:
            maps = self._pooled(seg.to(self.time_embed[0].weight.dtype), spatial_shape)
            return iter([maps[level] for level in levels])
        if len(modulations) != len(levels):
            msg = (
                f"Got modulations for {len(modulations)} residual blocks, the network has {len(levels)} with"
                " SPADE. Compute them with the `modulations` method of this network."
            )
            raise UserError(msg)
        return iter(modulations)


def _check_spade(spade_in: tuple[str, ...], label_nc: int, semantic_downsample: str) -> None:
    if not set(spade_in) <= set(SPADE_PLACES):
        msg = f"spade_in is {spade_in}; it may hold any of {SPADE_PLACES}."
        raise UserError(msg)
    if spade_in and label_nc < 1:
        msg = f"label_nc is {label_nc}, but SPADE needs at least one class. With spade_in () it is unused."
        raise UserError(msg)
    if semantic_downsample not in SEMANTIC_DOWNSAMPLES:
        msg = f"semantic_downsample is {semantic_downsample!r}; it must be one of {SEMANTIC_DOWNSAMPLES}."
        raise UserError(msg)

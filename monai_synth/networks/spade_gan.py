# SPDX-License-Identifier: Apache-2.0
"""The SPADE GAN's two networks: MONAI's, with what they lack of Park et al. (2019) put in.

MONAI's ``SPADENet`` ends at half resolution in a block of as many channels as the image has, lets gamma and beta
through an InstanceNorm, and changes the list of channels that it is given. Here it is the trunk that ends in feature
maps; the block at full resolution and the image's convolution follow it. MONAI's ``MultiScalePatchDiscriminator`` is
used as it is, on map and image together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from monai.networks.blocks import Convolution, spade_norm
from monai.networks.layers.utils import get_norm_layer
from monai.networks.nets import MultiScalePatchDiscriminator, SPADENet
from monai.networks.nets.spade_network import SPADENetResBlock
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as add_spectral_norm

from monai_synth.errors import UserError
from monai_synth.networks.spade import (
    SEMANTIC_DOWNSAMPLES,
    SPADE,
    SPADE_VARIANTS,
    SemanticDownsample,
    SpadeVariant,
    pool_semantic,
)

NORMS = {"batch": "BATCH", "instance": "INSTANCE"}


class MapSPADE(SPADE):
    """SPADE without learned parameters in its norm, which pools the map to the features' resolution itself.

    Args:
        spatial_dims: 2 or 3.
        norm_channels: channels of the features.
        label_nc: channels of the map.
        hidden_channels: see :class:`monai_synth.networks.SPADE`.
        norm: "batch" (Park et al.) or "instance".
        semantic_downsample: see :func:`monai_synth.networks.pool_semantic`.
    """

    def __init__(
        self,
        spatial_dims: int,
        norm_channels: int,
        label_nc: int,
        *,
        hidden_channels: int,
        norm: str,
        semantic_downsample: SemanticDownsample,
    ) -> None:
        super().__init__(spatial_dims, norm_channels, label_nc, hidden_channels=hidden_channels, num_groups=1)
        self.param_free_norm = get_norm_layer((NORMS[norm], {"affine": False}), spatial_dims, norm_channels)
        self.semantic_downsample = semantic_downsample

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """Normalise x (B, C, *S) and modulate it by the map (B, K, *S'), S' a multiple of S."""
        return super().forward(x, pool_semantic(cond, x.shape[2:], self.semantic_downsample))


class SPADEGenerator(nn.Module):
    """Semantic map -> image in [-1, 1] (Park et al. 2019, Sec 3 and Appendix A).

    Without an encoder the generator starts from the map at the lowest resolution and gives one image for each map.
    With one (``z_dim``) it starts from a vector z, which the encoder reads off an image in training and which is drawn
    from N(0, 1) in sampling.

    Args:
        spatial_dims: 2 or 3.
        label_nc: labels of the map.
        out_channels: of the image.
        image_size: *S; a multiple of ``2 ** len(channels)``.
        channels: of the blocks from half resolution down, as MONAI has it; the decoder takes them in reverse.
        last_channels: what leaves the block at half and that at full resolution.
        spade_hidden_channels: of the convolution that gamma and beta share.
        z_dim: length of z; 0 is without an encoder.
        norm: what SPADE modulates, "batch" (Park et al.) or "instance" (MONAI's).
        semantic_downsample: how the map comes to each resolution; "nearest" is Park et al.'s and MONAI's.
        spade_variant: "paper", or "monai" for MONAI's layers as they are.
        spectral_norm: on the convolutions of the residual blocks (Park et al.).
        init_gain: of the Xavier initialisation; 0.02 is Park et al.'s, with which SPADE starts as a plain norm and
            takes thousands of steps to read the map.

    Raises:
        UserError: unknown norm, variant or pooling, or an image size that cannot be halved so often.
    """

    def __init__(
        self,
        spatial_dims: int,
        label_nc: int,
        out_channels: int,
        image_size: Sequence[int],
        channels: Sequence[int],
        last_channels: Sequence[int],
        *,
        spade_hidden_channels: int = 128,
        z_dim: int = 0,
        norm: str = "batch",
        semantic_downsample: SemanticDownsample = "nearest",
        spade_variant: SpadeVariant = "paper",
        spectral_norm: bool = True,
        init_gain: float = 0.02,
    ) -> None:
        super().__init__()
        for key, value, allowed in (
            ("norm", norm, tuple(NORMS)),
            ("spade_variant", spade_variant, SPADE_VARIANTS),
            ("semantic_downsample", semantic_downsample, SEMANTIC_DOWNSAMPLES),
        ):
            if value not in allowed:
                raise UserError(f"{key} is {value!r}; allowed are {', '.join(allowed)}")
        if isinstance(z_dim, bool) or not isinstance(z_dim, int) or z_dim < 0:
            raise UserError(f"z_dim is {z_dim!r}; allowed are whole numbers from 0, which is without an encoder")
        factor = 2 ** len(channels)
        if len(image_size) != spatial_dims or any(s < factor or s % factor for s in image_size):
            msg = (
                f"image_size is {list(image_size)}; allowed are {spatial_dims} multiples of {factor}, since the "
                f"generator doubles the resolution {len(channels)} times"
            )
            raise UserError(msg)
        self.z_dim = z_dim
        self.trunk = SPADENet(
            spatial_dims,
            in_channels=out_channels,
            out_channels=last_channels[0],
            label_nc=label_nc,
            input_shape=tuple(image_size),
            channels=list(channels),  # MONAI reverses and extends the list that it is given
            z_dim=z_dim or None,
            is_vae=z_dim > 0,
            spade_intermediate_channels=spade_hidden_channels,
        )
        self.last_block = SPADENetResBlock(
            spatial_dims, *last_channels, label_nc, spade_intermediate_channels=spade_hidden_channels
        )
        self.to_image = nn.Sequential(
            nn.LeakyReLU(0.2), Convolution(spatial_dims, last_channels[1], out_channels, conv_only=True), nn.Tanh()
        )
        decoder = self.trunk.decoder
        decoder.last_conv = nn.Identity()
        if spade_variant == "paper":
            if not z_dim:
                decoder.conv_init = Convolution(spatial_dims, label_nc, channels[-1], conv_only=True)
            options = {"hidden_channels": spade_hidden_channels, "norm": norm}
            for block in (*decoder.blocks, self.last_block):
                for name in [n for n, layer in block.named_children() if isinstance(layer, spade_norm.SPADE)]:
                    width = block.in_channels if name != "norm_1" else block.int_channels
                    layer = MapSPADE(spatial_dims, width, label_nc, **options, semantic_downsample=semantic_downsample)
                    setattr(block, name, layer)
        self.apply(partial(_xavier, gain=init_gain))
        if spectral_norm:
            for block in (*decoder.blocks, self.last_block):
                for name in ("conv_0", "conv_1", "conv_s"):
                    if hasattr(block, name):
                        add_spectral_norm(getattr(block, name).conv)

    def forward(
        self, seg: Tensor, image: Tensor | None = None, z: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Image of a map.

        Args:
            seg: map (B, K, *S) of zeros and ones.
            image: image (B, C, *S) in [-1, 1] from which z is drawn, in training with an encoder.
            z: (B, z_dim); without it and without an image z is 0, the mean of its prior.

        Returns:
            Image (B, C, *S); with ``image`` and an encoder also mean and log-variance of z, each (B, z_dim).
        """
        if not self.z_dim:
            return self._decode(seg, None)
        if image is not None:
            mean, log_variance = self.trunk.encoder(image)
            z = self.trunk.encoder.reparameterize(mean, log_variance)
            return self._decode(seg, z), mean, log_variance
        return self._decode(seg, seg.new_zeros(len(seg), self.z_dim) if z is None else z)

    def _decode(self, seg: Tensor, z: Tensor | None) -> Tensor:
        return self.to_image(self.last_block(self.trunk.decoder(seg, z), seg))


class MapDiscriminator(nn.Module):
    """MONAI's multi-scale patch discriminator on map and image together (Park et al. 2019, Appendix A).

    Args:
        spatial_dims: 2 or 3.
        label_nc: labels of the map.
        in_channels: channels of the image.
        image_size: *S, which must survive all strides.
        channels: of the first convolution; each layer doubles them.
        num_d: number of discriminators.
        num_layers_d: layers of the first; the n-th has n times as many.
        spectral_norm: on the convolutions that are followed by an InstanceNorm.

    Raises:
        UserError: the image is too small for so many layers.
    """

    def __init__(
        self,
        spatial_dims: int,
        label_nc: int,
        in_channels: int,
        image_size: Sequence[int],
        *,
        channels: int = 64,
        num_d: int = 2,
        num_layers_d: int = 2,
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        # MONAI counts the strides; the unpadded rest and InstanceNorm need more than one pixel
        needed = 2 ** (num_d * num_layers_d + 2)
        if min(image_size) < needed:
            msg = (
                f"image_size {list(image_size)} is too small for {num_d} discriminators of {num_layers_d} to "
                f"{num_d * num_layers_d} layers; give sides of at least {needed}, or fewer layers"
            )
            raise UserError(msg)
        self.scales = MultiScalePatchDiscriminator(
            num_d=num_d,
            num_layers_d=num_layers_d,
            spatial_dims=spatial_dims,
            channels=channels,
            in_channels=label_nc + in_channels,
            norm="INSTANCE",
            minimum_size_im=min(image_size),
        )
        if spectral_norm:
            for layer in self.scales.modules():
                if isinstance(layer, Convolution) and hasattr(layer, "adn") and hasattr(layer.adn, "N"):
                    add_spectral_norm(layer.conv)

    def forward(self, seg: Tensor, image: Tensor) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Logits of each discriminator, and its features layer by layer.

        Args:
            seg: map (B, K, *S).
            image: (B, C, *S).
        """
        return self.scales(torch.cat([seg, image], dim=1))


def _xavier(layer: nn.Module, gain: float) -> None:
    """Initialise a convolution or linear layer as Park et al.'s code does."""
    if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.Linear)):
        nn.init.xavier_normal_(layer.weight, gain=gain)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

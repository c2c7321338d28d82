# SPDX-License-Identifier: Apache-2.0
"""Vision transformer whose output is its class token, and the published weights of two sizes of it as MONAI names them.

The layers are MONAI's, set up to compute what torchvision's and DeiT's do (Dosovitskiy et al. 2021, Touvron et al.
2021): LayerNorm with eps 1e-6 and a bias in the projections of the attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from monai.networks.nets import ViT
from torch import Tensor, nn

PATCH = 16  # side of a patch in pixels

_TORCHVISION = (
    (r"^cls_token$", "class_token"),
    (r"^patch_embedding\.position_embeddings$", "encoder.pos_embedding"),
    (r"^patch_embedding\.patch_embeddings\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm(\d)\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.out_proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.linear1\.", ".mlp.0."),
    (r"\.mlp\.linear2\.", ".mlp.3."),
)
_DEIT = (
    (r"^patch_embedding\.position_embeddings$", "pos_embed"),
    (r"^patch_embedding\.patch_embeddings\.", "patch_embed.proj."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.linear(\d)\.", r".mlp.fc\1."),
)


class ClassTokenViT(ViT):
    """MONAI's vision transformer with patches of 16 x 16 pixels, 12 blocks and a class token.

    MONAI gives the class token no position of its own, and needs none: the sum of both is a parameter as free.

    Args:
        image_size: H, W; multiples of 16.
        hidden_size: D, the length of a token.
        num_heads: of the attention.
    """

    def __init__(self, image_size: Sequence[int], *, hidden_size: int, num_heads: int) -> None:
        super().__init__(
            in_channels=3,
            img_size=tuple(image_size),
            patch_size=PATCH,
            hidden_size=hidden_size,
            mlp_dim=4 * hidden_size,
            num_heads=num_heads,
            classification=True,
            num_classes=1,
            spatial_dims=2,
            post_activation=None,
            qkv_bias=True,
        )
        for block in self.blocks:
            block.norm_cross_attn = nn.Identity()  # MONAI makes it also where there is no such attention
            block.attn.use_flash_attention = True
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        """Class token after the last normalisation, through the classification head.

        Args:
            x: images (B, 3, H, W).

        Returns:
            (B, 1), or (B, D) where the head is the identity.
        """
        return super().forward(x)[0]


def torchvision_name(key: str) -> str:
    """Name of a parameter in torchvision's state dict."""
    return _renamed(key, _TORCHVISION)


def deit_name(key: str) -> str:
    """Name of a parameter in DeiT's state dict, which timm shares."""
    return _renamed(key, _DEIT)


def fit_torchvision(published: Mapping[str, Tensor], image_size: Sequence[int]) -> dict[str, Tensor]:
    """torchvision's state dict for images of a size and a class token with its position in it.

    Args:
        published: by torchvision's names; the file that it publishes has older ones for the layers of the MLP.
        image_size: H, W.
    """
    older = {".mlp.linear_1.": ".mlp.0.", ".mlp.linear_2.": ".mlp.3."}
    renamed = {re.sub(r"\.mlp\.linear_\d\.", lambda m: older[m[0]], key): value for key, value in published.items()}
    return _fitted(renamed, "class_token", "encoder.pos_embedding", image_size)


def fit_deit(published: Mapping[str, Tensor], image_size: Sequence[int]) -> dict[str, Tensor]:
    """DeiT's state dict for images of a size and a class token with its position in it.

    Args:
        published: by DeiT's names.
        image_size: H, W.
    """
    return _fitted(published, "cls_token", "pos_embed", image_size)


def interpolate_positions(positions: Tensor, grid: Sequence[int]) -> Tensor:
    """Position embeddings of another grid of patches, by bicubic interpolation (as DeiT's code does it).

    Args:
        positions: (1, n * n, D), of a square grid, row by row.
        grid: rows and columns wanted.

    Returns:
        (1, rows * columns, D); the same where the grid is.
    """
    side = math.isqrt(positions.shape[1])
    if tuple(grid) == (side, side):
        return positions
    maps = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    maps = F.interpolate(maps, tuple(grid), mode="bicubic", align_corners=False)
    return maps.flatten(2).transpose(1, 2).to(positions.dtype)


def _renamed(key: str, names: Sequence[tuple[str, str]]) -> str:
    for pattern, name in names:
        key = re.sub(pattern, name, key)
    return key


def _fitted(
    published: Mapping[str, Tensor], token: str, positions: str, image_size: Sequence[int]
) -> dict[str, Tensor]:
    """What does not look like a token and its positions stays, for the caller to refuse by its shape."""
    result = dict(published)
    cls, pos = result.get(token), result.get(positions)
    if cls is None or pos is None or cls.ndim != 3 or pos.ndim != 3 or cls.shape[::2] != pos.shape[::2]:
        return result
    num = pos.shape[1] - 1
    if cls.shape[:2] != (1, 1) or num < 1 or math.isqrt(num) ** 2 != num:
        return result
    result[token] = cls + pos[:, :1]
    result[positions] = interpolate_positions(pos[:, 1:], [side // PATCH for side in image_size])
    return result

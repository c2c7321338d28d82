# SPDX-License-Identifier: Apache-2.0
"""Geometric augmentation of a whole batch at once: flip, rotation and shift as one resampling per image.

As `torchvision.transforms.RandomAffine(30, (.1, .1))` after `RandomHorizontalFlip`, but bilinear instead of nearest
and shifted by parts of pixels. What is drawn is apart from what is done with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREES, SHIFT = 30.0, 0.1
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


@dataclass(frozen=True)
class Geometry:
    """What is done with each image of a batch.

    Attributes:
        flip: (B,) bool, left and right exchanged.
        angle: (B,) radians, clockwise as seen in the picture.
        shift: (B, 2) right and down, in parts of the width and the height.
        crop: (B, 4) centre right, centre down, width, height of what is cut out before all that, in parts of the
            image; None: nothing is cut.
    """

    flip: Tensor
    angle: Tensor
    shift: Tensor
    crop: Tensor | None = None


def draw_geometry(num: int, size: Sequence[int], generator: torch.Generator, *, crop: bool = False) -> Geometry:
    """Draw the augmentation of ``num`` images.

    Args:
        num: B.
        size: (H, W).
        generator: of the processor.
        crop: first cut out 8 to 100 % of the area and enlarge it, as the text's code does.
    """
    flip = torch.rand(num, generator=generator) < 0.5
    angle = (2 * torch.rand(num, generator=generator) - 1) * math.radians(DEGREES)
    shift = (2 * torch.rand(num, 2, generator=generator) - 1) * SHIFT
    return Geometry(flip, angle, shift, _draw_crop(num, size, generator) if crop else None)


def apply_geometry(images: Tensor, geometry: Geometry) -> Tensor:
    """Resample images bilinearly; what comes from outside is 0.

    Args:
        images: float (B, C, H, W).
        geometry: of B images.

    Returns:
        Images of the same shape.
    """
    height, width = images.shape[-2:]
    device = images.device
    angle, shift = geometry.angle.to(device), geometry.shift.to(device)
    cos, sin = angle.cos(), angle.sin()
    # Where a new pixel p comes from, in pixels: R(-angle) (p - shift); affine_grid counts in half widths and heights.
    right, down = shift[:, 0] * width, shift[:, 1] * height
    rows = (
        torch.stack([cos, sin * height / width, -(cos * right + sin * down) * 2 / width], dim=-1),
        torch.stack([-sin * width / height, cos, (sin * right - cos * down) * 2 / height], dim=-1),
    )
    theta = torch.stack(rows, dim=1)
    theta[:, 0] = torch.where(geometry.flip.to(device)[:, None], -theta[:, 0], theta[:, 0])
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if geometry.crop is not None:
        crop = geometry.crop.to(device)[:, None, None]
        inside = (grid.abs() <= 1).all(-1, keepdim=True)
        grid = torch.where(inside, 2 * crop[..., :2] - 1 + crop[..., 2:] * grid, 4.0)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _draw_crop(num: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """As torchvision's RandomResizedCrop, in parts of pixels: the first of ten draws that fits, else the whole."""
    height, width = size
    area = torch.empty(num, CROP_TRIES).uniform_(*CROP_AREA, generator=generator) * (height * width)
    ratio = torch.empty(num, CROP_TRIES).uniform_(*(math.log(r) for r in CROP_RATIO), generator=generator).exp()
    wide, high = (area * ratio).sqrt() / width, (area / ratio).sqrt() / height
    fits = (wide <= 1) & (high <= 1)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1)
    extent = torch.stack([wide.gather(1, first)[:, 0], high.gather(1, first)[:, 0]], dim=-1)
    extent[none] = 1.0
    centre = extent / 2 + torch.rand(num, 2, generator=generator) * (1 - extent)
    return torch.cat([centre, extent], dim=-1)

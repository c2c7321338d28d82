# SPDX-License-Identifier: Apache-2.0
"""The joint variable x = (image, label) as one tensor of one value range (JDM thesis, Eq 3.1 and 3.2).

A label map of K labels becomes K - 1 channels, one for each label other than the background, that are the high end
of the range inside the label and the low end elsewhere. For two labels this is the mask channel of the thesis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_synth.errors import UserError

VALUE_RANGES = ((0, 1), (-1, 1))


def check_value_range(value_range: Sequence[float]) -> tuple[float, float]:
    """The range as a pair of numbers.

    Raises:
        UserError: it is neither [0, 1] nor [-1, 1].
    """
    if tuple(value_range) not in VALUE_RANGES:
        raise UserError(f"value_range is {list(value_range)}; allowed are [0, 1] (the text's) and [-1, 1]")
    low, high = value_range
    return float(low), float(high)


def to_joint(image: Tensor, label: Tensor, num_labels: int, value_range: Sequence[float]) -> Tensor:
    """x_0 from files.

    Args:
        image: uint8 (B, C, *S).
        label: integers (B, *S), 0 to num_labels - 1.
        num_labels: K.
        value_range: lowest and highest value.

    Returns:
        float32 (B, C + K - 1, *S).
    """
    low, high = check_value_range(value_range)
    parts = torch.stack([label == k for k in range(1, num_labels)], dim=1)
    unit = torch.cat([image.float() / 255, parts.float()], dim=1)
    return low + (high - low) * unit


def split_joint(x: Tensor, image_channels: int) -> tuple[Tensor, Tensor]:
    """The image's and the label's channels of x; C and K - 1, not halves (the thesis' Alg 2 has `chunk`)."""
    return x[:, :image_channels], x[:, image_channels:]


def from_image(image: Tensor, value_range: Sequence[float]) -> Tensor:
    """uint8 -> float32 of the range; `to_image` takes it back."""
    low, high = check_value_range(value_range)
    return low + image.float() * ((high - low) / 255)


def to_image(image: Tensor, value_range: Sequence[float]) -> Tensor:
    """Image part (B, C, *S) -> uint8, clipped to the range."""
    low, high = check_value_range(value_range)
    return ((image.float() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)


def to_label(label: Tensor, value_range: Sequence[float]) -> Tensor:
    """Label part (B, K - 1, *S) -> uint8 (B, *S): the label of the largest channel where that is above the middle."""
    low, high = check_value_range(value_range)
    largest, index = label.max(dim=1)
    return torch.where(largest > (low + high) / 2, index + 1, 0).to(torch.uint8)

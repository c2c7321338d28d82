# SPDX-License-Identifier: Apache-2.0
"""What of an image is compared: grey ranks, in which a change of window, gamma or contrast leaves no trace.

Ranks (histogram equalisation) are the same after every monotone change of brightness. Before ranks are taken of a small
picture it is averaged down, which removes noise that ranks would blow up in flat regions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from monai_synth.data.pair_files import resize_image
from monai_synth.evaluate.features import Extractor

SMALL = 32  # rows and columns of small pictures
POSES = ("as is", "turned 90", "turned 180", "turned 270", "mirrored", "mirrored, turned 90", "mirrored, turned 180",
         "mirrored, turned 270")  # fmt: skip


def posed(array: np.ndarray, pose: int) -> np.ndarray:
    """An image (..., H, W) in one of the eight poses: mirrored left to right for 4 to 7, then turned by quarters.

    Args:
        array: any.
        pose: index of `POSES`; odd ones swap H and W.
    """
    if pose >= 4:
        array = array[..., ::-1]
    return np.rot90(array, pose % 4, axes=(-2, -1))


def poses_of(size: Sequence[int]) -> tuple[int, ...]:
    """Poses that keep the shape (H, W): all eight of a square, else the four without a quarter turn."""
    return tuple(range(8)) if size[0] == size[1] else (0, 2, 4, 6)


def grey(image: np.ndarray) -> np.ndarray:
    """uint8 (1 or 3, H, W) -> uint8 (H, W); luminance of RGB (ITU-R BT.601)."""
    if len(image) == 1:
        return image[0]
    return np.rint(np.tensordot(np.float32([0.299, 0.587, 0.114]), image.astype(np.float32), 1)).astype(np.uint8)


def ranks(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W) -> float32 (H, W) in (0, 1): share of the pixels that are darker, half of those that are equal."""
    counts = np.bincount(image.ravel(), minlength=256)
    return ((np.cumsum(counts) - counts / 2) / image.size).astype(np.float32)[image]


def small_side(size: Sequence[int]) -> int:
    """Side of the small pictures of images of a size; of tiny images half of it, since noise must average out."""
    return SMALL if min(size) >= 2 * SMALL else max(16, 4 * round(min(size) / 8))


def small_picture(image: np.ndarray, side: int) -> np.ndarray:
    """Ranks of an image that was averaged down: uint8 (C, H, W) -> float32 (side, side)."""
    return ranks(resize_image(grey(image)[None], (side, side))[0])


def small_extractor(size: Sequence[int]) -> Extractor:
    """Small pictures through the door of features, so that they are cached as features are.

    Args:
        size: (H, W) of the images.
    """
    side = small_side(size)

    def call(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([small_picture(image, side).ravel() for image in images.numpy()]))

    return Extractor(
        key="small_ranks",
        title="small pictures of grey ranks",
        recipe=f"grey (luminance), bilinear with low-pass filter to {side} x {side}, rank of each value from 0 to 1",
        weights_sha256=hashlib.sha256(b"").hexdigest(),
        num_features=side * side,
        channels=None,
        warnings=(),
        call=call,
        device=torch.device("cpu"),
    )

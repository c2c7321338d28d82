# SPDX-License-Identifier: Apache-2.0
"""Label maps in colours, the stamp, and images with their maps laid over."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping

import numpy as np
from PIL import Image
from scipy import ndimage

from monai_synth.data.semantic import LABELS
from monai_synth.errors import UserError

# background, body, soft tissue, high dense, lung, benign, indeterminate and malignant nodule
_CT = ((0, 0, 0), (90, 70, 60), (170, 90, 80), (240, 235, 215), (70, 120, 190), (90, 220, 90), (250, 200, 40),
       (240, 40, 40))  # fmt: skip


def colours_of(labels: Mapping[str, int]) -> np.ndarray:
    """A colour for each label value, uint8 (K, 3); the background is black."""
    if dict(labels) == LABELS:
        return np.array(_CT, np.uint8)
    hues = [(0.12 + 0.618034 * number) % 1.0 for number in range(len(labels) - 1)]
    rest = [[round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 0.95)] for hue in hues]
    return np.array([[0, 0, 0], *rest], np.uint8)


def hex_of(colour: np.ndarray) -> str:
    """``#rrggbb``."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def stamp(label: np.ndarray, value: int, center: tuple[float, float], diameter: float) -> np.ndarray:
    """The map with a disc of a label.

    Args:
        label: uint8 (H, W).
        value: label of the disc.
        center: (row, column) in pixels.
        diameter: in pixels; the pixel at the centre is always within.

    Raises:
        UserError: the centre lies outside the map, or the diameter is no positive number.
    """
    inside = all(0 <= place < side for place, side in zip(center, label.shape, strict=True))
    if not inside or not 0 < diameter <= max(label.shape):
        rows, columns = label.shape
        raise UserError(
            f"a stamp at row {center[0]:g}, column {center[1]:g} of diameter {diameter:g} does not fit; give a row "
            f"from 0 to {rows - 1}, a column from 0 to {columns - 1} and a diameter from 1 to {max(label.shape)}"
        )
    row, column = np.ogrid[: label.shape[0], : label.shape[1]]
    disc = (row - center[0]) ** 2 + (column - center[1]) ** 2 <= (diameter / 2) ** 2
    disc[int(center[0]), int(center[1])] = True
    return np.where(disc, value, label).astype(np.uint8)


def overlay(image: np.ndarray, label: np.ndarray, colours: np.ndarray, strength: float = 0.35) -> np.ndarray:
    """RGB (H, W, 3) of an image, grey or RGB, with its map laid over; the background stays as it is."""
    rgb = image if image.ndim == 3 else image[..., None].repeat(3, axis=-1)
    mixed = np.round((1 - strength) * rgb + strength * colours[label]).astype(np.uint8)
    return np.where((label > 0)[..., None], mixed, rgb)


def enlarged(picture: np.ndarray, least: int = 256) -> Image.Image:
    """A picture, grey or RGB, enlarged by a whole factor until its longer side has at least so many pixels."""
    factor = max(1, -(-least // max(picture.shape[:2])))
    return Image.fromarray(picture.repeat(factor, axis=0).repeat(factor, axis=1))


def outline(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Pixels just outside a mask, bool (H, W)."""
    return ndimage.binary_dilation(mask, iterations=width) & ~mask if mask.any() else mask

# SPDX-License-Identifier: Apache-2.0
"""How the values of an image become 8 bits, and how the head of a dataset says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from monai_synth.data.pictures_read import Form, Picture

PERCENTILES = (0.5, 99.5)


def percentiles_for(
    window: Sequence[float] | None, percentiles: Sequence[float] | None, forms: Iterable[Form]
) -> tuple[float, ...] | None:
    """``percentiles`` as given; without them and a window :data:`PERCENTILES`, unless all images have 8 bits."""
    if window is None and percentiles is None and not all(form.eight_bit for form in forms):
        return PERCENTILES
    return percentiles and tuple(percentiles)


def intensity_entry(window: Sequence[float] | None, percentiles: Sequence[float] | None) -> dict[str, Any]:
    """What ``dataset.json`` says about the intensities."""
    if window:
        unit, limits = "window", window
    elif percentiles:
        unit, limits = "percentile of each image", percentiles
    else:
        unit, limits = "grey value", (0, 255)
    return {"unit": unit, "min": limits[0], "max": limits[1], "stored": "uint8 0..255"}


def to_uint8(
    picture: Picture,
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    grey: bool = False,
) -> np.ndarray:
    """Image uint8 (C, *S): kept, or a window or percentiles of each channel spread over 0 to 255; RGB made grey."""
    values = picture.values
    if window is not None:
        values = _spread(values, *window)
    elif percentiles is not None:
        values = np.stack([_spread(channel, *np.percentile(channel, percentiles)) for channel in values])
    if picture.inverted:
        values = 255 - values
    if grey and len(values) == 3:
        values = np.asarray(Image.fromarray(np.ascontiguousarray(np.moveaxis(values, 0, -1))).convert("L"))[None]
    return values


def _spread(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``low`` or less to 0, ``high`` or more to 255, linear between."""
    share = (values.astype(np.float32) - np.float32(low)) / np.float32(max(high - low, 1e-12))
    return (255 * share.clip(0, 1)).round().astype(np.uint8)

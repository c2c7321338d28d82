# SPDX-License-Identifier: Apache-2.0
"""Semantic fidelity: does a generated CT slice show the tissue that its map asks for, where it asks?

The classes of the map are derived again from the image, by HU bands alone, and compared with the given map by
Dice. The bands know nothing of the segmentation that made the map, so real slices and their own maps do not
reach 1 either: what they reach is the ceiling, and `evaluate_folder` on a prepared dataset prints it.

What counts as what, in the map and in the image:

* lung: map labels lung and nodule (all three), for a nodule lies in the lung and may have the HU of either.
  In the image: below -400 HU inside the body, with enclosed holes of up to 0.2 % of the picture (vessels,
  nodules) filled. By HU the windpipe and bowel gas are lung too; where the map says background, such air is
  what it asks for, and counts as background.
* high_dense: map label high_dense; in the image 200 HU and more outside the lung.

An image enters the mean of a class when the map gives it at least 0.1 % of the pixels; Dice of a few pixels
says nothing. How many entered is the ``n`` of that class.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from scipy import ndimage

from monai_synth import __version__
from monai_synth.data.lungs import body_mask
from monai_synth.data.semantic import LABELS
from monai_synth.errors import UserError

CLASSES = ("lung", "high_dense")
LUNG_BELOW, DENSE_FROM = -400.0, 200.0  # HU (LSDM thesis, Sec 4.3)
MIN_FRACTION = 0.001  # of the picture: what a class must fill in the map to be counted
MAX_HOLE_FRACTION = 0.002  # of the picture: 524 of 512 x 512 pixels, about 250 mm^2
FIELD_OF_VIEW = 360.0  # mm, where no spacing is known
RECIPE = "Dice of map and HU bands of the image (lung < -400 HU in the body, high_dense >= 200 HU)"


def hu_classes(image_hu: np.ndarray, *, spacing: tuple[float, float] | None = None) -> np.ndarray:
    """Tissue classes of an axial slice by HU bands.

    Args:
        image_hu: slice (H, W) in HU; padding at -1024 or below.
        spacing: (row, column) in mm. Default: a field of view of 360 mm along the longer side.

    Returns:
        uint8 (H, W) with the values of ``LABELS`` for background, body [-400, 0), soft_tissue [0, 200),
        high_dense [200, ...) and lung.

    Raises:
        UserError: not a 2-D image.
    """
    image_hu = np.asarray(image_hu, np.float32)
    if image_hu.ndim != 2 or image_hu.size == 0:
        msg = f"image has shape {image_hu.shape}; give one slice (H, W) at a time"
        raise UserError(msg)
    if spacing is None:
        spacing = (FIELD_OF_VIEW / max(image_hu.shape),) * 2
    classes = np.full(image_hu.shape, LABELS["background"], np.uint8)
    for low, name in ((LUNG_BELOW, "body"), (0.0, "soft_tissue"), (DENSE_FROM, "high_dense")):
        classes[image_hu >= low] = LABELS[name]
    air = (image_hu < LUNG_BELOW) & body_mask(image_hu, spacing)
    classes[_small_holes_filled(air, MAX_HOLE_FRACTION * air.size)] = LABELS["lung"]
    return classes


def _small_holes_filled(mask: np.ndarray, max_pixels: float) -> np.ndarray:
    """Fill what is enclosed and not larger than this."""
    holes, _ = ndimage.label(ndimage.binary_fill_holes(mask) & ~mask)
    small = np.bincount(holes.ravel()) <= max_pixels
    small[0] = False
    return mask | small[holes]


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Dice of two boolean arrays of one shape; NaN when both are empty."""
    total = int(first.sum()) + int(second.sum())
    return 2.0 * int((first & second).sum()) / total if total else math.nan


def class_dice(
    label: np.ndarray, image_hu: np.ndarray, *, spacing: tuple[float, float] | None = None
) -> dict[str, float]:
    """Dice per class of one map and its image; NaN where the map hardly has the class.

    Args:
        label: semantic map (H, W), values of ``LABELS``.
        image_hu: image (H, W) in HU.
        spacing: see `hu_classes`.

    Raises:
        UserError: shapes differ, or the map holds an unknown value.
    """
    label = np.asarray(label)
    if label.shape != np.shape(image_hu):
        msg = f"map has shape {label.shape}, image {np.shape(image_hu)}; compare each image with its own map"
        raise UserError(msg)
    unknown = sorted(set(np.unique(label).tolist()) - set(LABELS.values()))
    if unknown:
        msg = f"semantic map has values {unknown[:8]}, allowed are 0..{max(LABELS.values())}; remap it first"
        raise UserError(msg)
    found = hu_classes(image_hu, spacing=spacing)
    asked = {"lung": label >= LABELS["lung"], "high_dense": label == LABELS["high_dense"]}
    found[(found == LABELS["lung"]) & (label == LABELS["background"])] = LABELS["background"]
    return {
        name: dice(asked[name], found == LABELS[name]) if asked[name].mean() >= MIN_FRACTION else math.nan
        for name in CLASSES
    }


def semantic_fidelity(
    labels: Iterable[np.ndarray],
    images_hu: Iterable[np.ndarray],
    *,
    groups: Sequence[str] | None = None,
    spacing: tuple[float, float] | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean Dice per class over maps and the images made from them.

    Args:
        labels: semantic maps (H, W), values of ``LABELS``.
        images_hu: images (H, W) in HU, in the same order. Both may be generators: one pair is held at a time.
        groups: patient per pair; see `summarize`.
        spacing: see `hu_classes`.
        num_bootstrap: see `summarize`.
        seed: see `summarize`.

    Returns:
        See `summarize`.

    Raises:
        UserError: no pair, different numbers of maps and images, or a pair that `class_dice` refuses.
    """
    scores, missing = [], object()
    for label, image_hu in zip_longest(labels, images_hu, fillvalue=missing):
        if label is missing or image_hu is missing:
            more, fewer = ("images", "maps") if label is missing else ("maps", "images")
            msg = f"there are {len(scores)} {fewer} and more {more}; give one map per image"
            raise UserError(msg)
        scores.append(class_dice(label, image_hu, spacing=spacing))
    return summarize(scores, groups=groups, num_bootstrap=num_bootstrap, seed=seed)


def summarize(
    scores: Sequence[dict[str, float]],
    *,
    groups: Sequence[str] | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Means of `class_dice` over images, with intervals.

    Args:
        scores: what `class_dice` gave for each image.
        groups: patient per image; the interval then resamples patients, whose slices are not independent.
            Default: each image is its own group.
        num_bootstrap: resamplings for the 95 % percentile interval.
        seed: of the resampling.

    Returns:
        ``{"metric", "classes": {name: {"value", "n", "num_groups", "ci": [low, high] or None}}, "num_images",
        "recipe", "seed", "versions", "settings"}``; value and ci are None for a class that no map has, ci
        also with one group only.

    Raises:
        UserError: no image, or another number of groups than of images.
    """
    if not scores:
        msg = "there is no image to evaluate; give at least one map with its image"
        raise UserError(msg)
    if groups is not None and len(groups) != len(scores):
        msg = f"{len(groups)} groups for {len(scores)} images; give one group per image"
        raise UserError(msg)
    if num_bootstrap < 1 or seed < 0:
        msg = f"num_bootstrap is {num_bootstrap}, seed {seed}; allowed are 1 or more and 0 or more"
        raise UserError(msg)
    names = np.asarray(groups if groups is not None else [str(i) for i in range(len(scores))])
    return {
        "metric": "semantic_fidelity",
        "classes": {
            name: _summary(np.asarray([score[name] for score in scores]), names, num_bootstrap, seed)
            for name in CLASSES
        },
        "num_images": len(scores),
        "recipe": RECIPE,
        "seed": seed,
        "versions": {"monai_synth": __version__, "numpy": np.__version__},
        "settings": {
            "num_bootstrap": num_bootstrap,
            "min_fraction": MIN_FRACTION,
            "max_hole": MAX_HOLE_FRACTION,
        },
    }


def _summary(values: np.ndarray, groups: np.ndarray, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Mean with a 95 % percentile interval from resampling whole groups."""
    counted = ~np.isnan(values)
    values, groups = values[counted], groups[counted]
    if len(values) == 0:
        return {"value": None, "n": 0, "num_groups": 0, "ci": None}
    _, index = np.unique(groups, return_inverse=True)
    sums, sizes = np.bincount(index, weights=values), np.bincount(index)
    interval = None
    if len(sums) > 1:
        drawn = np.random.default_rng(seed).integers(0, len(sums), (num_bootstrap, len(sums)))
        means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
        interval = [float(q) for q in np.percentile(means, (2.5, 97.5))]
    return {"value": float(values.mean()), "n": len(values), "num_groups": len(sums), "ci": interval}

# SPDX-License-Identifier: Apache-2.0
"""One pair of a source turned into cases of a prepared dataset: intensities, labels, size and tiles."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.data.intensity import to_uint8
from monai_synth.data.pair_files import FILE_ENDINGS, resize_image, resize_label, write_image, write_label
from monai_synth.data.pairs_source import Pair
from monai_synth.data.pictures_read import Mask, Picture, read_mask, read_picture
from monai_synth.data.problems import Problem
from monai_synth.data.workers import stopped
from monai_synth.errors import UserError

_JPEG_THRESHOLD = 127.0  # the middle of 8 bits
_AXES = {2: "yx", 3: "xyz"}


@dataclass(frozen=True)
class Recipe:
    """What is done to every pair.

    Attributes:
        spatial_dims: of every image.
        channels: C of every image, after ``grey``.
        num_labels: with the background.
        label_values: value of each label in the masks; None for one label that has any one value but 0.
        threshold: masks are foreground above it; None for masks that hold labels.
        window: values that become 0 and 255; None for percentiles or to keep 8-bit values.
        percentiles: per image, that become 0 and 255; None for a window or to keep 8-bit values.
        grey: make RGB grey.
        size: resize to this; None keeps the size.
        patch_size: cut tiles of this size; None does not.
        stride: distance of the tiles.
    """

    spatial_dims: int
    channels: int
    num_labels: int
    label_values: tuple[int, ...] | None = None
    threshold: float | None = None
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    grey: bool = False
    size: tuple[int, ...] | None = None
    patch_size: tuple[int, ...] | None = None
    stride: int | None = None


@dataclass(frozen=True)
class PairTask:
    """A pair under the names it gets in the dataset."""

    pair: Pair
    case_id: str
    patient_id: str
    recipe: Recipe


@dataclass
class PairResult:
    """What a pair became.

    Attributes:
        task: whose result it is.
        cases: entries of ``dataset.json``.
        shapes: spatial shapes of the cases.
        value: that stood for the only label in the mask; None where it is empty or not asked.
        digest: of the image's pixels.
        num_with: cases that show each label, the background first.
    """

    task: PairTask
    cases: list[dict[str, Any]]
    shapes: set[tuple[int, ...]]
    value: int | None = None
    digest: str = ""
    num_with: list[int] = field(default_factory=list)


def prepare_pair(task: PairTask, folder: Path) -> PairResult | Problem | None:
    """Read, convert, cut and write one pair.

    Args:
        task: the pair.
        folder: dataset with ``images/`` and ``labels/``.

    Returns:
        What was written; a problem with the pair; None where the run is being given up.
    """
    if stopped():
        return None
    recipe, pair = task.recipe, task.pair
    try:
        picture, mask = read_picture(pair.images), read_mask(pair.label)
        _check_places(picture, mask, pair)
        image = to_uint8(picture, recipe.window, recipe.percentiles, recipe.grey)
        if (image.ndim - 1, len(image)) != (recipe.spatial_dims, recipe.channels):
            raise UserError(f"{pair.images[0]}: its header and its pixels differ in form; write the file again")
        label, value = to_labels(mask, recipe, pair.label)
        spacing = picture.spacing
        if recipe.size is not None:
            spacing = tuple(s * old / new for s, old, new in zip(spacing, label.shape, recipe.size, strict=True))
            image = resize_image(image, recipe.size)
            label = resize_label(label, recipe.size, recipe.num_labels)
        cuts = list(tiles(label.shape, recipe.patch_size, recipe.stride))
        if not cuts:
            size, patch = _size(label.shape), _size(recipe.patch_size or ())
            raise UserError(f"{pair.images[0]}: {size} is smaller than a patch of {patch}; use a smaller --patch-size")
    except UserError as error:
        return Problem("unusable", str(error))
    digest = hashlib.sha256(np.ascontiguousarray(picture.values)).hexdigest()
    result = PairResult(task, [], set(), value, digest, [0] * recipe.num_labels)
    for start, cut in cuts:
        name = task.case_id + _place(start) if recipe.patch_size else task.case_id
        _write(result, folder, name, image[(slice(None), *cut)], label[cut], spacing)
    return result


def to_labels(mask: Mask, recipe: Recipe, path: str) -> tuple[np.ndarray, int | None]:
    """Label map uint8 (*S) with 0 for the background and 1, 2, ... for the labels.

    Returns:
        The map, and the value that stood for the only label, where any may.

    Raises:
        UserError: the mask holds other values than the labels.
    """
    threshold = recipe.threshold
    if mask.lossy and threshold is None:
        if recipe.num_labels > 2 or recipe.label_values is not None:
            raise UserError(f"{path}: JPEG changes the values of a mask, so it cannot hold given labels; use PNG")
        threshold = _JPEG_THRESHOLD
    if threshold is not None:
        return (mask.values > threshold).astype(np.uint8), None
    if mask.deep:
        remedy = "save labels with 8 bits, or give --threshold 0 to make one label of numbered objects"
        raise UserError(f"{path}: a mask with more than 8 bits; {remedy}")
    distinct = np.unique(mask.values)
    if (distinct != np.round(distinct)).any():
        other = distinct[distinct != np.round(distinct)][0]
        remedy = "give --threshold T (above it is foreground), or resample it with nearest neighbours"
        raise UserError(f"{path}: the mask holds {other:g}; labels are whole numbers; {remedy}")
    found = [int(value) for value in distinct]
    if recipe.label_values is None and recipe.num_labels == 2:
        value = found[-1] if found != [0] else None
        if any(v not in (0, value) for v in found):
            remedy = "give --threshold T (above it is foreground), or the names of all labels"
            raise UserError(f"{path}: the mask holds {_listed(found)}; one label is 0 and one other value; {remedy}")
        return (mask.values != 0).astype(np.uint8), value
    values = recipe.label_values or tuple(range(1, recipe.num_labels))
    others = [v for v in found if v not in (0, *values)]
    if others:
        allowed = f"0 (background) and {_listed(values)}"
        remedy = "name every label with --labels, and its value with --label-values"
        raise UserError(f"{path}: the mask holds {_listed(others)}; allowed are {allowed}; {remedy}")
    label = np.zeros(mask.values.shape, np.uint8)
    for number, v in enumerate(values, 1):
        label[mask.values == v] = number
    return label, None


def tiles(
    shape: Sequence[int], patch_size: Sequence[int] | None, stride: int | None
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Starts and slices of the tiles; the last of each axis is moved inside, so that they cover everything.

    Args:
        shape: of the image.
        patch_size: of the tiles; None for the whole image as one.
        stride: distance of the tiles, at most ``patch_size``; None for ``patch_size``.

    Yields:
        Nothing where the image is smaller than a tile.
    """
    patch = tuple(patch_size or shape)
    if any(n < p for n, p in zip(shape, patch, strict=True)):
        return
    starts = [sorted({*range(0, n - p + 1, stride or p), n - p}) for n, p in zip(shape, patch, strict=True)]
    for start in itertools.product(*starts):
        yield start, tuple(slice(a, a + p) for a, p in zip(start, patch, strict=True))


def _check_places(picture: Picture, mask: Mask, pair: Pair) -> None:
    shape = picture.values.shape[1:]
    if shape != mask.values.shape:
        sizes = f"the image is {_size(shape)}, its mask {pair.label} {_size(mask.values.shape)}"
        raise UserError(f"{pair.images[0]}: {sizes}; they must have the same size")
    affines = picture.affine, mask.affine
    if all(a is not None for a in affines) and not np.allclose(*affines, atol=1e-2):
        raise UserError(f"{pair.images[0]}: its mask {pair.label} lies elsewhere in space (affine); resample it")


def _write(
    result: PairResult,
    folder: Path,
    name: str,
    image: np.ndarray,
    label: np.ndarray,
    spacing: Sequence[float],
) -> None:
    ending = FILE_ENDINGS[label.ndim]
    paths = {"image": f"images/{name}{ending}", "label": f"labels/{name}{ending}"}
    write_image(folder / paths["image"], image, spacing)
    write_label(folder / paths["label"], label, spacing)
    entry = {**paths, "case_id": name, "patient_id": result.task.patient_id}
    result.cases.append({**entry, "spacing": [round(float(s), 6) for s in spacing]})
    result.shapes.add(tuple(label.shape))
    result.num_with = [n + bool((label == k).any()) for k, n in enumerate(result.num_with)]


def _place(start: Sequence[int]) -> str:
    return "".join(f"-{axis}{n:04d}" for axis, n in zip(_AXES[len(start)], start, strict=True))


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def _listed(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return shown if len(values) <= 8 else f"{shown}, ... ({len(values)} values)"

# SPDX-License-Identifier: Apache-2.0
"""From the PNG pairs of a prepared CT dataset to tensors, the same for every stage and for sampling."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    EnsureTyped,
    MapTransform,
    RandSpatialCropSamplesd,
    Resized,
    ScaleIntensityRanged,
    SelectItemsd,
)
from PIL import Image

from monai_synth.errors import UserError

NODULE_LABEL_MIN = 5  # labels 5, 6, 7 are nodules (SEEDS L-4)


def resize_semantic(label: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize an integer label map; anatomy by nearest neighbour, nodules by maximum so that none is lost.

    Args:
        label: (..., *S) integer map, labels of at least :data:`NODULE_LABEL_MIN` are nodules.
        size: target spatial size.

    Returns:
        Map of the same dtype, (..., *size).
    """
    dims = len(size)
    if tuple(label.shape[-dims:]) == tuple(size):
        return label
    x = label.reshape(-1, 1, *label.shape[-dims:]).float()
    base = F.interpolate(x, size=tuple(size), mode="nearest-exact")
    pool = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[dims]
    nodule = pool(x * (x >= NODULE_LABEL_MIN), tuple(size))
    out = torch.where(nodule > 0, nodule, base)
    return out.reshape(*label.shape[:-dims], *size).to(label.dtype)


def one_hot(label: torch.Tensor, num_labels: int) -> torch.Tensor:
    """(B, 1, *S) integer map -> (B, K, *S) float map of zeros and ones."""
    return F.one_hot(label[:, 0].long(), num_labels).movedim(-1, 1).float()


def collapse_nodules(label: torch.Tensor) -> torch.Tensor:
    """Give all nodules the label of the first nodule class, so that the map does not tell malignancy (SEEDS 2.3.15)."""
    return label.clamp(max=NODULE_LABEL_MIN)


def semantic_input(label: torch.Tensor, num_labels: int, collapse_nodule_labels: bool = False) -> torch.Tensor:
    """What a network reads of label maps (B, 1, *S) at full size: (B, K, *S) of zeros and ones."""
    return one_hot(collapse_nodules(label) if collapse_nodule_labels else label, num_labels)


def check_labels(label: torch.Tensor | np.ndarray, num_labels: int, where: str) -> None:
    """Refuse a label map with a value outside 0..num_labels-1.

    Raises:
        UserError: names the file and the values.
    """
    values = np.unique(np.asarray(label))
    bad = [v.item() for v in values if v < 0 or v >= num_labels or v != int(v)]
    if bad:
        msg = (
            f"label map {where} has values {bad[:8]}, allowed are the integers 0..{num_labels - 1}; "
            "remap it to the labels of dataset.json, and store it as an 8-bit image without anti-aliasing"
        )
        raise UserError(msg)


def read_png(path: str | Path) -> np.ndarray:
    """Grey values (H, W) of an 8-bit picture.

    Raises:
        UserError: missing, damaged, or not an 8-bit grey picture.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "P", "1"):
                msg = f"{path} has mode {picture.mode}, allowed is 8-bit grey (L); prepare the dataset again"
                raise UserError(msg)
            return np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    except (OSError, SyntaxError) as error:
        msg = f"{path} cannot be read as a picture ({error}); prepare the dataset again (monai-synth prepare ...)"
        raise UserError(msg) from error


class ReadPNGd(MapTransform):
    """Path -> float32 tensor (1, H, W) of grey values 0..255, rows first."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            data[key] = torch.from_numpy(read_png(data[key]).astype(np.float32))[None]
        return data


class PrepareLabeld(MapTransform):
    """Check label values, then :func:`resize_semantic`; output is uint8."""

    def __init__(self, keys: KeysCollection, size: Sequence[int], num_labels: int, name_key: str = "case_id") -> None:
        super().__init__(keys)
        self.size = tuple(size)
        self.num_labels = num_labels
        self.name_key = name_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        data = dict(data)
        for key in self.key_iterator(data):
            check_labels(data[key], self.num_labels, str(data.get(self.name_key, key)))
            data[key] = resize_semantic(torch.as_tensor(np.asarray(data[key])).to(torch.uint8), self.size)
        return data


def slice_preprocessing(
    image_size: Sequence[int], *, num_labels: int = 8, keys: Sequence[str] = ("image", "label")
) -> Compose:
    """PNG files -> ``image`` (1, H, W) float32 in [-1, 1] and ``label`` (1, H, W) uint8 in 0..num_labels-1.

    Args:
        image_size: (H, W) of the tensors; images are resized by area averaging.
        num_labels: number of labels that a map may hold.
        keys: which of ``image`` and ``label`` to load.
    """
    steps: list[Any] = [ReadPNGd(keys=keys)]
    if "image" in keys:
        steps += [
            ScaleIntensityRanged(keys="image", a_min=0, a_max=255, b_min=-1, b_max=1),
            Resized(keys="image", spatial_size=tuple(image_size), mode="area"),
            EnsureTyped(keys="image", dtype=torch.float32, track_meta=False),
        ]
    if "label" in keys:
        steps.append(PrepareLabeld(keys="label", size=image_size, num_labels=num_labels))
    return Compose([*steps, SelectItemsd(keys=[*keys, "case_id"])])


def with_random_crops(preprocessing: Compose, crop_size: Sequence[int], num_crops: int) -> Compose:
    """The preprocessing followed by ``num_crops`` random crops of the image; none where that is 0."""
    if num_crops == 0:
        return preprocessing
    crop = RandSpatialCropSamplesd(keys="image", roi_size=tuple(crop_size), num_samples=num_crops, random_size=False)
    return Compose([*preprocessing.transforms, crop, EnsureTyped(keys="image", track_meta=False)])

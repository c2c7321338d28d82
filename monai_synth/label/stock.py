# SPDX-License-Identifier: Apache-2.0
"""Transforms by which MONAI Label's own ``monaibundle`` app reads a map and writes the image on the map's grid.

That app knows one input ``image`` and one output ``pred``, and resizes and places the output by the input's header.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from monai_synth.data.joint import to_image, to_joint
from monai_synth.errors import UserError
from monai_synth.label.maps import GivenMap, read_map

GIVEN = "given_map"


class MapForModeld(MapTransform):
    """Path of a semantic map -> label tensor (1, H, W) uint8, turned as the model knows slices.

    Args:
        keys: ``image``.
        image_size: the model's (H, W).
        num_labels: the model's.

    Raises:
        UserError: the map cannot be read, or has another size or labels than the model's.
    """

    def __init__(self, keys: KeysCollection, *, image_size: Sequence[int], num_labels: int) -> None:
        super().__init__(keys)
        self.image_size = tuple(image_size)
        self.num_labels = num_labels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.keys:
            given = given_map(d[key], self.image_size, self.num_labels, axial=True)
            d[key] = torch.from_numpy(given.labels.copy())[None]
            d |= {GIVEN: given, f"{key}_meta_dict": place_of(given)}
        return d


class MaskForModeld(MapTransform):
    """Path of a mask -> the joint tensor (C + K - 1, *S) of image and label, the image NaN, which is unknown.

    Args:
        keys: ``image``.
        image_size: the model's S.
        image_channels: the model's C; the app takes 1.
        num_labels: the model's K.
        value_range: the model's.

    Raises:
        UserError: the mask cannot be read, or has another size or labels than the model's; a model of colours.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        image_size: Sequence[int],
        image_channels: int,
        num_labels: int,
        value_range: Sequence[float],
    ) -> None:
        super().__init__(keys)
        self.image_size, self.image_channels = tuple(image_size), image_channels
        self.num_labels, self.value_range = num_labels, value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        if self.image_channels != 1:
            msg = f"the model makes {self.image_channels} channels, the monaibundle app writes one"
            raise UserError(f"{msg}; serve it by the app of `monai-synth label-app`")
        d = dict(data)
        for key in self.keys:
            given = given_map(d[key], self.image_size, self.num_labels, axial=False)
            label = torch.from_numpy(given.labels.copy())[None]
            nothing = torch.zeros(1, self.image_channels, *self.image_size, dtype=torch.uint8)
            d[key] = to_joint(nothing, label, self.num_labels, self.value_range)[0]
            d[key][: self.image_channels] = torch.nan
            d |= {GIVEN: given, f"{key}_meta_dict": place_of(given)}
        return d


def given_map(path: str, image_size: tuple[int, ...], num_labels: int, *, axial: bool) -> GivenMap:
    """The map of a file, if it is of the model's size.

    Raises:
        UserError: it is not, or see :func:`read_map`.
    """
    given = read_map(path, dims=len(image_size), num_labels=num_labels, axial=axial)
    if given.labels.shape != image_size:
        got, wanted = ("x".join(map(str, s)) for s in (given.labels.shape, image_size))
        raise UserError(f"the map is {got}, the model makes {wanted}; give maps of that size")
    return given


def place_of(given: GivenMap) -> dict[str, Any]:
    """What the app asks of an image's header; of a picture any place, which it does not write."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) if given.affine is None else given.affine
    return {"spatial_shape": given.shape or given.labels.shape[::-1], "original_affine": affine}


class ImageOnGridd(MapTransform):
    """Sampled slice (1, H, W) in [-1, 1] -> the map's own grid (1, X, Y, 1): HU as int16; for PNG 8-bit (X, Y).

    Args:
        keys: ``pred``.
        intensity: ``min`` and ``max`` HU of the image range.
    """

    def __init__(self, keys: KeysCollection, *, intensity: Mapping[str, float]) -> None:
        super().__init__(keys)
        self.low, self.high = float(intensity["min"]), float(intensity["max"])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        given: GivenMap = d.pop(GIVEN)
        for key in self.keys:
            unit = (d[key][0].detach().float().cpu().clamp(-1, 1).numpy() + 1) / 2
            if given.header is None:
                array = np.round(unit * 255).astype(np.uint8)
            else:
                array = np.round(self.low + unit * (self.high - self.low)).astype(np.int16)
            d[key] = _on_grid(array, given)
        return d


class PairOnGridd(MapTransform):
    """Joint tensor (C + K - 1, *S) -> its image on the mask's own grid, 8-bit: (1, X, Y, Z), or (X, Y) for PNG.

    Args:
        keys: ``pred``.
        value_range: the model's.
    """

    def __init__(self, keys: KeysCollection, *, value_range: Sequence[float]) -> None:
        super().__init__(keys)
        self.value_range = value_range

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        given: GivenMap = d.pop(GIVEN)
        for key in self.keys:
            d[key] = _on_grid(to_image(d[key][0].detach().cpu(), self.value_range).numpy(), given)
        return d


def _on_grid(array: np.ndarray, given: GivenMap) -> torch.Tensor:
    if given.header is None:
        return torch.from_numpy(array.T.copy())
    return torch.from_numpy(given.on_grid(array).copy())[None]

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
            given = read_map(d[key], dims=2, num_labels=self.num_labels, axial=True)
            if given.labels.shape != self.image_size:
                got, wanted = ("x".join(map(str, s)) for s in (given.labels.shape, self.image_size))
                raise UserError(f"the map is {got}, the model makes {wanted}; give maps of that size")
            d[key] = torch.from_numpy(given.labels.copy())[None]
            d[GIVEN] = given
            d[f"{key}_meta_dict"] = {
                "spatial_shape": given.shape or given.labels.shape[::-1],
                "original_affine": np.diag([-1.0, -1.0, 1.0, 1.0]) if given.affine is None else given.affine,
            }
        return d


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
                d[key] = torch.from_numpy(np.round(unit * 255).astype(np.uint8).T.copy())
            else:
                hu = np.round(self.low + unit * (self.high - self.low)).astype(np.int16)
                d[key] = torch.from_numpy(given.on_grid(hu).copy())[None]
        return d

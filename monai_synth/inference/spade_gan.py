# SPDX-License-Identifier: Apache-2.0
"""Sampling of the SPADE GAN as a MONAI inferer: semantic map -> CT slice in one call of the generator."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_synth.data.slices import semantic_input
from monai_synth.inference.sampler import initial_noise, make_generators

logger = logging.getLogger(__name__)


class SPADEGANInferer(Inferer):
    """Generates images from semantic maps, one by one, so that no image depends on those beside it, not by one bit.

    Args:
        num_labels: labels of the model.
        collapse_nodule_labels: hide malignancy in the map, as in training.
        seed: of the first map where no seeds are given.
    """

    def __init__(self, num_labels: int, *, collapse_nodule_labels: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.num_labels = num_labels
        self.collapse_nodule_labels = collapse_nodule_labels
        self.seed = seed

    def __call__(
        self,
        inputs: Tensor,
        network: nn.Module,
        *,
        seeds: Sequence[int] | None = None,
        nodules: Any = None,
        targets: Any = None,
    ) -> Tensor:
        """Generate one image per map.

        Args:
            inputs: label maps (B, 1, H, W), integers.
            network: :class:`monai_synth.networks.SPADEGenerator`.
            seeds: one per map; z is drawn from it where the network has an encoder, else the map alone decides.
                Default: those from ``seed`` on.
            nodules: taken so that the cases of bundle lsdm fit; a GAN has nothing to guide, so they are not used.
            targets: as ``nodules``.

        Returns:
            Images (B, 1, H, W) in [-1, 1].
        """
        seg = semantic_input(inputs, self.num_labels, self.collapse_nodule_labels)
        generators = make_generators(range(self.seed, self.seed + len(inputs)) if seeds is None else seeds)
        images = []
        with torch.no_grad():
            for i, generator in enumerate(generators):
                z = initial_noise((network.z_dim,), [generator], seg.device) if network.z_dim else None
                images.append(network(seg[i : i + 1], z=z))
        return torch.cat(images)


def warn_of_repeats(network: nn.Module, num_maps: int, num_samples: int) -> None:
    """Say that a generator without an encoder makes the same image of a map again and again."""
    if not network.z_dim and num_samples > num_maps:
        logger.warning(
            f"{num_samples} samples are asked of {num_maps} maps, but this generator has no encoder and makes one "
            "image of each map, whatever the seed: images will repeat. Train with --z_dim 256 for several of a map"
        )

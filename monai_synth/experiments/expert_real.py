# SPDX-License-Identifier: Apache-2.0
"""Real images beside which the expert experiment puts generated ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_synth.data.class_images import ClassImages
from monai_synth.data.datalist import PreparedDataset
from monai_synth.experiments.classifier_sets import derived_seed


class RealImages:
    """Images of a prepared dataset at the models' size.

    Args:
        dataset: the dataset.
        contract: of the models: ``image_size``, ``image_channels``.
    """

    def __init__(self, dataset: PreparedDataset, contract: Mapping[str, Any]) -> None:
        self.dataset = dataset
        self.image_size = tuple(contract["image_size"])
        self.image_channels = int(contract["image_channels"])
        self.classes = dataset.classes
        self.training = dataset.indexed("training")

    def read(self, cases: Sequence[Mapping[str, Any]], size: Sequence[int] | None = None) -> np.ndarray:
        """uint8 (N, C, H, W), resized to ``size``, the models' by default."""
        size = self.image_size if size is None else size
        options = {"image_size": size, "image_channels": self.image_channels, "progress": False, "max_bytes": 1 << 62}
        return ClassImages(cases, **options).images.numpy()

    def test(self, size: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Held-out images and their classes, int (N,)."""
        cases = self.dataset.indexed("test")
        return self.read(cases, size), np.array([case["class"] for case in cases])

    def drawn(self, seed: int, name: str, number: int) -> np.ndarray:
        """At most so many random training images of a class, others for each seed."""
        cases = [case for case in self.training if case["class"] == self.classes[name]]
        order = np.random.default_rng(derived_seed(seed, self.classes[name], "real")).permutation(len(cases))
        return self.read([cases[i] for i in order[:number]])

    def class_means(self, names: Sequence[str]) -> dict[str, float]:
        """Mean value in [0, 1] of the training images of each class."""
        means = {}
        for name in names:
            cases = [case for case in self.training if case["class"] == self.classes[name]]
            parts = [cases[i : i + 256] for i in range(0, len(cases), 256)]
            means[name] = float(np.concatenate([self.read(part).mean((1, 2, 3)) for part in parts]).mean() / 255)
        return means

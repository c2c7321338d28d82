# SPDX-License-Identifier: Apache-2.0
"""One knob turned at a time: the scale of malignancy guidance (Fig 5.8, 5.9) and each feature's value (Fig 5.7).

All pictures of a nodule start from the same noise. What changed is measured in the nodule's area of the label map:
its mean HU, how far its pixels moved from the unguided image, and what the guiding classifier reads in the result.
That classifier is the one that was followed, so its reading tells that guidance works, not that a reader would agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_synth.data.semantic import uint8_to_hu
from monai_synth.data.slices import NODULE_LABEL_MIN
from monai_synth.experiments.lsdm_sampling import Samples, to_tensor
from monai_synth.experiments.lsdm_source import FEATURE_OF, Arm, Model
from monai_synth.inference.guidance import MALIGNANCY
from monai_synth.inference.model import LSDMModel
from monai_synth.networks.latent_codec import latent_window

LABELS = {"benign": 0.0, "malignant": 1.0}
RATINGS = (1.0, 2.0, 3.0, 4.0, 5.0)


class Sweeps:
    """Samples and measures the sweeps.

    Args:
        model: which is guided.
        samples: of the main experiment; the sweeps' images go into a folder of their own.
        folder: of the sweeps' images.
        indices: slices, each with a nodule.
        scales: s of the first sweep.
        scale: s of the second.
    """

    def __init__(
        self,
        model: Model,
        samples: Samples,
        folder: Path,
        indices: Sequence[int],
        scales: Sequence[float],
        scale: float,
    ) -> None:
        self.model, self.indices, self.cases = model, list(indices), samples.cases
        self.samples = Samples(folder, samples.cases, samples.loaded, batch_size=samples.batch_size)
        self.unguided = Arm(model.name, model)
        self.scale_arms: dict[tuple[str, float], Arm] = {}
        if MALIGNANCY in model.features:
            for label, target in LABELS.items():
                for s in scales:
                    name = f"{model.name}+mali_{label}_s{s:g}"
                    self.scale_arms[label, s] = Arm(name, model, "mali", (MALIGNANCY,), s, {MALIGNANCY: target})
        self.feature_arms: dict[tuple[str, float], Arm] = {}
        for word, feature in FEATURE_OF.items():
            if feature in model.features:
                for value in LABELS.values() if feature == MALIGNANCY else RATINGS:
                    name = f"{model.name}+{word}_{value:g}_s{scale:g}"
                    self.feature_arms[feature, value] = Arm(name, model, word, (feature,), scale, {feature: value})

    @property
    def arms(self) -> list[Arm]:
        return [self.unguided, *self.scale_arms.values(), *self.feature_arms.values()]

    def make(self, report: Callable[[str], None]) -> None:
        """Sample what is not there yet."""
        left = [arm for arm in self.arms if not self.samples.is_done(arm, 0, self.indices)]
        if left:
            report(f"sweeps: {len(left)} settings x {len(self.indices)} slices")
        for arm in self.arms:
            self.samples.make(arm, [0], self.indices, lambda text: None)

    def is_done(self) -> bool:
        return bool(self.indices) and all(self.samples.is_done(arm, 0, self.indices) for arm in self.arms)

    def images(self, arm: Arm) -> dict[int, np.ndarray]:
        """Images by slice, uint8 (H, W)."""
        return dict(self.samples.load(arm, 0, self.indices))

    def measure(self) -> dict[str, Any]:
        """Measures of both sweeps; n is the number of slices."""
        features = tuple(dict.fromkeys(feature for feature, _ in self.feature_arms))
        loaded = self.samples.loaded.diffusion(self.model)
        before = self.images(self.unguided)

        def told(arm: Arm, feature: str) -> dict[str, Any]:
            rows = [self._measure(loaded, i, image, before[i], feature) for i, image in self.images(arm).items()]
            return {"n": len(rows)} | {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}

        scale = {f"{label} s={s:g}": told(arm, MALIGNANCY) for (label, s), arm in self.scale_arms.items()}
        feature = {f"{f} {v:g}": told(arm, f) for (f, v), arm in self.feature_arms.items()}
        unguided = {f: told(self.unguided, f) for f in features}
        cases = [self.cases.case_id(i) for i in self.indices]
        return {"cases": cases, "unguided": unguided, "scale": scale, "feature": feature}

    def _measure(
        self, loaded: LSDMModel, index: int, image: np.ndarray, before: np.ndarray, feature: str
    ) -> dict[str, float]:
        item = self.cases.item(index)
        area = item["label"][0].numpy() >= NODULE_LABEL_MIN
        hu, old = uint8_to_hu(image), uint8_to_hu(before)
        return {
            "mean_hu": float(hu[area].mean()),
            "mean_change_hu": float(np.abs(hu - old)[area].mean()),
            "change_outside_hu": float(np.abs(hu - old)[~area].mean()),
            "reading": float(np.mean([reading(loaded, image, nodule, feature) for nodule in item["nodules"]])),
        }


@torch.no_grad()
def reading(model: LSDMModel, image: np.ndarray, nodule: dict[str, Any], feature: str) -> float:
    """What a classifier says of a finished image's nodule (t = 0): p(malignant), or the rating.

    Args:
        model: with the classifier.
        image: uint8 (H, W).
        nodule: with ``center`` in pixels.
        feature: whose classifier.
    """
    factor, side = model.codec.factor, model.crop_size_latent
    center = tuple(int(c) // factor for c in nodule["center"])
    window = latent_window(center, side, tuple(length // factor for length in image.shape))
    crop = image[tuple(slice(w.start * factor, w.stop * factor) for w in window)]
    network = model.classifiers[feature]
    device = next(network.parameters()).device
    output = network(to_tensor(crop).to(device), torch.zeros(1, dtype=torch.long, device=device)).float()[0]
    return float(torch.softmax(output, 0)[1] if feature == MALIGNANCY else output[0])

# SPDX-License-Identifier: Apache-2.0
"""What the autoencoder alone loses: real held-out slices through its encoder and decoder (lung CT text, Fig 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from monai_synth.data.semantic import uint8_to_hu
from monai_synth.evaluate.perceptual import Perceptual
from monai_synth.evaluate.similarity import ms_ssim, ssim
from monai_synth.experiments.lsdm_sampling import to_tensor
from monai_synth.experiments.lsdm_scores import Patients
from monai_synth.experiments.lsdm_source import Cases, to_pixels
from monai_synth.inference.model import LSDMModel

MOST = 128  # slices, evenly spread


@torch.no_grad()
def reconstruct(model: LSDMModel, image: np.ndarray) -> np.ndarray:
    """uint8 (H, W) -> uint8 (H, W); the posterior's mean is decoded, no map takes part."""
    device = next(model.codec.parameters()).device
    mean, _ = model.codec.encode_image(to_tensor(image).to(device))
    return to_pixels(model.codec.decode(mean * model.codec.scale_factor)[0])


def measure(model: LSDMModel, cases: Cases, perceptual: Perceptual | None) -> dict[str, dict[str, Any]]:
    """SSIM, MS-SSIM, LPIPS and the mean absolute error in HU between slices and their reconstructions."""
    indices = _spread(cases.indices)
    rows = []
    for i in indices:
        real = cases.real(i)
        made = reconstruct(model, real)
        x, y = (torch.from_numpy(image.astype(np.float64) / 255)[None, None] for image in (made, real))
        row = {"ssim": float(ssim(x, y)), "ms_ssim": float(ms_ssim(x, y))}
        if perceptual:
            row["lpips"] = float(perceptual(x, y))
        rows.append(row | {"mean_absolute_hu": float(np.abs(uint8_to_hu(made) - uint8_to_hu(real)).mean())})
    patients = Patients([cases.patient(i) for i in indices])
    found = {}
    for name in rows[0]:
        values = np.array([row[name] for row in rows])

        def mean(mask: np.ndarray, values: np.ndarray = values) -> float:
            return float(values[mask].mean())

        found[name] = patients.result(patients.values(mean), len(values), sd=float(values.std(ddof=1)))
    return found


def _spread(indices: Sequence[int]) -> list[int]:
    chosen = np.linspace(0, len(indices) - 1, min(MOST, len(indices))).round().astype(int)
    return [indices[i] for i in chosen]

# SPDX-License-Identifier: Apache-2.0
"""What the malignancy classifier asks of a noisy nodule: d log p / d image crop and d log p / d latent (Fig 5.4, 5.5).

The first is the derivative by the decoded noisy crop x_t = D(Crop(z_t)), which is what the classifier reads. The
second is what sampling adds: the same chain through the decoder, back in the latent and zero outside of the nodule's
slightly enlarged area; it is computed by the very class that guides sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from monai_synth.data.semantic import MALIGNANCY
from monai_synth.diffusion import add_noise
from monai_synth.experiments.lsdm_scores import Patients
from monai_synth.inference.guidance import NoduleGuidance, NoduleRequest, nodule_requests
from monai_synth.inference.model import LSDMModel
from monai_synth.inference.sampler import initial_noise, make_generators
from monai_synth.networks.latent_codec import latent_window

LABELS = {"benign": 0, "malignant": 1}
RING = 3  # pixels around the nodule that count as its boundary


@dataclass(frozen=True)
class View:
    """One nodule at one noise level.

    Attributes:
        t: timestep.
        noisy: x_t, float (k, k), nominally in [-1, 1].
        inside: bool (k, k), the nodule in the label map.
        probability: of malignant, by the classifier.
        image: label -> d log p(label) / d x_t, (k, k).
        latent: label -> guidance in the latent, (c, k / f, k / f).
    """

    t: int
    noisy: np.ndarray
    inside: np.ndarray
    probability: float
    image: dict[str, np.ndarray]
    latent: dict[str, np.ndarray]


def image_gradient(classifier: nn.Module, x_t: Tensor, t: int, target: int) -> Tensor:
    """d log p(target | x_t, t) / d x_t of crops (B, 1, k, k)."""
    with torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        logits = classifier(x, torch.full((len(x),), t, device=x.device))
        log_p = torch.log_softmax(logits, dim=1)[:, target].sum()
        return torch.autograd.grad(log_p, x)[0]


def latent_gradient(model: LSDMModel, z_t: Tensor, t: int, request: NoduleRequest, target: int) -> Tensor:
    """What guidance of scale 1 adds to a latent (1, c, h, w): R times d log p(target) / d z_t (Eq 3.7, 3.8)."""
    asked = NoduleRequest(request.center, request.region, {MALIGNANCY: float(target)})
    guide = NoduleGuidance(
        model.codec.decode,
        {MALIGNANCY: model.classifiers[MALIGNANCY]},
        [[asked]],
        crop_size_latent=model.crop_size_latent,
    )
    return guide(z_t, t, 0.0)


def view_nodule(
    model: LSDMModel, image_pm1: Tensor, label: Tensor, nodule: Mapping[str, Any], t: int, *, seed: int
) -> View:
    """Gradients at a nodule of a slice.

    Args:
        model: with the classifier of malignancy.
        image_pm1: slice (1, 1, H, W) in [-1, 1].
        label: its map (1, H, W).
        nodule: entry of the nodule table, in pixels of the map.
        t: timestep.
        seed: of the noise, the same at every t.
    """
    codec, side, factor = model.codec, model.crop_size_latent, model.codec.factor
    z_0 = codec.encode_image(image_pm1)[0] * codec.scale_factor
    noise = initial_noise(tuple(z_0.shape[1:]), make_generators([seed]), z_0.device)
    z_t = add_noise(model.contract["schedule"], z_0, noise, torch.tensor([t], device=z_0.device))
    (request,) = nodule_requests(label[0], [nodule], factor, features=(), targets={MALIGNANCY: 1.0})
    window = latent_window(request.center, side, z_t.shape[2:])
    pixels = tuple(slice(w.start * factor, w.stop * factor) for w in window)
    classifier = model.classifiers[MALIGNANCY]
    with torch.no_grad():
        x_t = codec.decode(z_t[(slice(None), slice(None), *window)])
        logits = classifier(x_t, torch.full((1,), t, device=x_t.device))
        probability = float(torch.softmax(logits, dim=1)[0, 1])
    inside = np.zeros(tuple(label.shape[1:]), bool)
    top, left, bottom, right = (int(edge) for edge in nodule["bbox"])
    inside[top:bottom, left:right] = label[0, top:bottom, left:right].numpy() >= 5
    return View(
        t,
        x_t[0, 0].cpu().numpy(),
        inside[pixels],
        probability,
        {name: image_gradient(classifier, x_t, t, y)[0, 0].cpu().numpy() for name, y in LABELS.items()},
        {
            name: latent_gradient(model, z_t, t, request, y)[(0, slice(None), *window)].cpu().numpy()
            for name, y in LABELS.items()
        },
    )


def centre_and_boundary(gradient: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Mean gradient in the nodule and in the ring around it, each in units of the crop's mean absolute gradient."""
    unit = float(np.abs(gradient).mean())
    ring = ndimage.binary_dilation(inside, np.ones((3, 3)), RING) & ~inside
    if not unit or not inside.any() or not ring.any():
        return np.nan, np.nan
    return float(gradient[inside].mean() / unit), float(gradient[ring].mean() / unit)


def summarize(views: Sequence[Sequence[View]], patients: Sequence[str]) -> dict[str, Any]:
    """Whether the text's reading of Fig 5.4 holds: towards "benign" a nodule's centre brightens, its boundary darkens.

    Args:
        views: (nodules, timesteps).
        patients: of each nodule.

    Returns:
        ``{"t": {"benign": {"centre", "boundary"}, "probability"}}`` with results by patient.
    """
    groups = Patients(patients)
    found: dict[str, Any] = {}
    for k in range(len(views[0])):
        column = [row[k] for row in views]
        pairs = np.array([centre_and_boundary(v.image["benign"], v.inside) for v in column])
        results = {}
        for name, values in (("centre", pairs[:, 0]), ("boundary", pairs[:, 1])):
            there = np.isfinite(values)

            def mean(mask: np.ndarray, values: np.ndarray = values, there: np.ndarray = there) -> float:
                return float(values[mask & there].mean()) if (mask & there).any() else np.nan

            results[name] = groups.result(groups.values(mean), int(there.sum()))
        malignant = [v.probability for v in column]
        found[str(column[0].t)] = {"benign": results, "mean_probability_malignant": float(np.mean(malignant))}
    return found


def as_rgb(latent: np.ndarray) -> np.ndarray:
    """Latent gradient (c, h, w) -> (h, w, 3) in [0, 1], 0 in grey: the first three channels, or one repeated."""
    channels = latent[:3] if len(latent) >= 3 else np.repeat(latent[:1], 3, axis=0)
    reach = float(np.abs(channels).max()) or 1.0
    return np.moveaxis(channels / (2 * reach) + 0.5, 0, -1)

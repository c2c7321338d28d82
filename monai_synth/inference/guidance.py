# SPDX-License-Identifier: Apache-2.0
"""Local in-painting guidance of nodules by several classifiers (LSDM thesis, Sec 3.4.1, Alg 2, Fig 3.5).

At each step the latent around a nodule is cropped and decoded, classifiers read the noisy crop, and the
gradient of the log-probability of what is asked for goes back into the latent, but only inside the nodule.
The regressors act first, together; malignancy is then judged on the latent they have moved. Where one network tells
all features, all act together, so that a step needs one decoder call and one of that network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from monai_synth.data.semantic import MALIGNANCY
from monai_synth.data.slices import NODULE_LABEL_MIN
from monai_synth.errors import UserError
from monai_synth.networks.latent_codec import latent_window
from monai_synth.networks.noisy_classifier import FeatureHead


@dataclass(frozen=True)
class NoduleRequest:
    """What one nodule should look like.

    Attributes:
        center: (row, column) of the nodule in latent pixels.
        region: R, bool (h, w) over the whole latent: where guidance may act (LSDM thesis, Eq 3.8 with M = 1 -
            R).
        targets: value asked of each feature: 0 (benign) or 1 for "malignancy", a rating for the others.
    """

    center: tuple[int, int]
    region: Tensor
    targets: Mapping[str, float]


class NoduleGuidance:
    """Gradient of the log-probability of the requested nodules, for :func:`monai_synth.inference.sample`.

    The log-probability is minus the cross-entropy for malignancy and minus the squared error for the other
    features (Fig 3.5 derives losses, hence the signs).

    Args:
        decoder: frozen decoder of latents (N, c, s, s) into images (N, C, s f, s f). Undoing the latent scale
            is its business. If it is a module its weights are frozen here.
        classifiers: for each feature a network ``(image crop, t (N,)) -> (N, 2)`` logits for "malignancy",
            ``(N, 1)`` rating for the others. They are set to eval mode and frozen. Heads of one network
            (:class:`monai_synth.networks.FeatureHead`) act together.
        requests: for each sample of the batch the requests of its nodules; may be empty.
        scales: s of each feature (Sec 5.6); 1 where not given. It multiplies the gradient.
        crop_size_latent: s, edge of the crop in latent pixels; 16 is 64 pixels of the image at f = 4.
        scale_by: "variance" shifts the mean of an ancestral step by ``s variance gradient`` as the theory has
            it (Eq 2.14), "sigma" by its root, ``s sigma gradient`` (the printed Alg 2). Both work with any
            sampler.
        decode: "crop_first" decodes the crop of the latent (Fig 3.4, 3.5), "decode_first" crops the decoded
            slice (Eq 3.7). The decoder's norms and attention see different surroundings, so the two are
            different functions.
        interval: (first, last) timestep at which to guide, both included; elsewhere the gradient is 0.

    Raises:
        UserError: if a target or a scale has no classifier, or an option is unknown.
    """

    def __init__(
        self,
        decoder: Callable[[Tensor], Tensor],
        classifiers: Mapping[str, nn.Module],
        requests: Sequence[Sequence[NoduleRequest]],
        *,
        scales: Mapping[str, float] | None = None,
        crop_size_latent: int = 16,
        scale_by: Literal["variance", "sigma"] = "variance",
        decode: Literal["crop_first", "decode_first"] = "crop_first",
        interval: tuple[int, int] | None = None,
    ) -> None:
        scales = dict(scales or {})
        asked = {name for of_sample in requests for request in of_sample for name in request.targets}
        unknown = sorted((asked | set(scales)) - set(classifiers))
        if unknown:
            msg = f"There is no classifier for {unknown}; there are classifiers for {sorted(classifiers)}."
            raise UserError(msg)
        for option, value, allowed in (
            ("scale_by", scale_by, ("variance", "sigma")),
            ("decode", decode, ("crop_first", "decode_first")),
        ):
            if value not in allowed:
                msg = f"{option} is {value!r}; it must be one of {allowed}."
                raise UserError(msg)
        self.decoder, self.classifiers, self.requests = decoder, dict(classifiers), requests
        self.scales = {name: float(scales.get(name, 1.0)) for name in classifiers}
        self.crop_size_latent, self.scale_by, self.decode, self.interval = (
            crop_size_latent,
            scale_by,
            decode,
            interval,
        )
        networks = {id(c.network) if isinstance(c, FeatureHead) else id(c) for c in classifiers.values()}
        self.shared = len(networks) == 1
        for module in (decoder, *classifiers.values()):
            if isinstance(module, nn.Module):
                module.eval().requires_grad_(False)

    def __call__(self, z_t: Tensor, t: int, variance: float) -> Tensor:
        """The gradient at one step.

        Args:
            z_t: latents (B, c, h, w).
            t: timestep.
            variance: variance of the ancestral step from t; the regressors move the latent by it before
                malignancy is judged.

        Returns:
            Scaled gradient (B, c, h, w), float32, exactly 0 outside the regions of the requests.

        Raises:
            UserError: if the requests do not fit the latents.
        """
        self._check(z_t)
        gradient = torch.zeros_like(z_t, dtype=torch.float32)
        if self.interval is not None and not self.interval[0] <= t <= self.interval[1]:
            return gradient
        weight = 1.0
        if self.scale_by == "sigma":  # variance * weight = sigma; a step without variance is not guided
            weight = 1 / math.sqrt(variance) if variance > 0 else 0.0
        z = z_t.detach().float()
        if self.shared:
            return weight * self._gradient(z, t, list(self.classifiers))
        regressed = [name for name in self.classifiers if name != MALIGNANCY]
        gradient = weight * self._gradient(z, t, regressed)
        if MALIGNANCY in self.classifiers:
            gradient = gradient + weight * self._gradient(z + variance * gradient, t, [MALIGNANCY])
        return gradient

    def _gradient(self, z: Tensor, t: int, features: Sequence[str]) -> Tensor:
        """Scaled gradients of some features, summed over all nodules; one decoder call serves them all."""
        total = torch.zeros_like(z)
        nodules = [
            (sample, request)
            for sample, of_sample in enumerate(self.requests)
            for request in of_sample
            if any(name in request.targets and self.scales[name] for name in features)
        ]
        if not nodules:
            return total
        crops = [latent_window(request.center, self.crop_size_latent, z.shape[2:]) for _, request in nodules]
        whole = (slice(None),) * (z.ndim - 2)
        windows = crops if self.decode == "crop_first" else [whole] * len(nodules)
        latents = torch.stack([z[(i, slice(None), *window)] for (i, _), window in zip(nodules, windows, strict=True)])
        with torch.enable_grad():
            latents.requires_grad_()
            images = self.decoder(latents)
            if self.decode == "decode_first":
                images = torch.stack(
                    [_scaled_crop(image, crop, z.shape[2:]) for image, crop in zip(images, crops, strict=True)]
                )
            log_p = self._log_p(features, images, t, [request for _, request in nodules])
            (gradients,) = torch.autograd.grad(log_p, latents)
        for (i, request), window, of_nodule in zip(nodules, windows, gradients, strict=True):
            inside = request.region.to(z.device)[window]
            total[(i, slice(None), *window)] += torch.where(inside, of_nodule, 0.0)
        return total

    def _log_p(self, features: Sequence[str], images: Tensor, t: int, requests: Sequence[NoduleRequest]) -> Tensor:
        """Scaled log-probability of what the nodules ask for, summed; a network of several features runs once."""
        total, answers = images.new_zeros(()), {}
        for name in features:
            chosen = [i for i, request in enumerate(requests) if name in request.targets]
            if not chosen or not self.scales[name]:
                continue
            classifier = self.classifiers[name]
            if isinstance(classifier, FeatureHead):
                if classifier.network not in answers:
                    timesteps = torch.full((len(images),), t, device=images.device)
                    answers[classifier.network] = classifier.network(images, timesteps).float()
                output = answers[classifier.network][chosen, classifier.columns]
            else:
                output = classifier(images[chosen], torch.full((len(chosen),), t, device=images.device)).float()
            targets = torch.tensor([float(requests[i].targets[name]) for i in chosen], device=output.device)
            if name == MALIGNANCY:
                log_p = -F.cross_entropy(output, targets.long(), reduction="sum")
            else:
                log_p = -F.mse_loss(output.flatten(), targets, reduction="sum")
            total = total + self.scales[name] * log_p
        return total

    def _check(self, z_t: Tensor) -> None:
        if len(self.requests) != len(z_t):
            msg = f"Got requests for {len(self.requests)} samples, but {len(z_t)} latents; each needs a list."
            raise UserError(msg)
        shape = tuple(z_t.shape[2:])
        if any(size < self.crop_size_latent for size in shape):
            msg = f"crop_size_latent {self.crop_size_latent} is larger than the latent, which is {shape}."
            raise UserError(msg)
        for request in (request for of_sample in self.requests for request in of_sample):
            if tuple(request.region.shape) != shape:
                msg = f"A nodule's region has shape {tuple(request.region.shape)}, but the latent is {shape}."
                raise UserError(msg)


def nodule_requests(
    label: np.ndarray | Tensor,
    nodules: Sequence[Mapping[str, Any]] | None,
    factor: int,
    *,
    features: Sequence[str] = (MALIGNANCY,),
    targets: Mapping[str, float] | None = None,
    dilation: int = 1,
) -> list[NoduleRequest]:
    """Requests for the nodules of one semantic map.

    Args:
        label: integer map (H, W); labels from 5 on are nodules.
        nodules: their entries in ``dataset.json``: "center" in image pixels, "malignant" 0 or 1, and ratings.
            Nodules that touch in the map are parted by the nearest centre. None makes one request of each
            connected nodule region; malignancy is then known from its label (5 is benign, 6 and 7 are not),
            and the other features only from ``targets``.
        factor: image pixels per latent pixel, f.
        features: what to ask for, with the nodule's own values. Features it has no value for are left out.
        targets: values that replace those of every nodule, whether named in ``features`` or not.
        dilation: latent pixels by which the region is enlarged (Sec 5.1).

    Returns:
        One request for each nodule that has any target.

    Raises:
        UserError: if the map's size is no multiple of the factor, or it has no nodule where one is listed.
    """
    array = label.detach().cpu().numpy() if isinstance(label, Tensor) else np.asarray(label)
    if array.ndim != 2 or any(size % factor for size in array.shape):
        msg = f"The label map has shape {array.shape}; it must be (H, W), both multiples of {factor}."
        raise UserError(msg)
    components, count = ndimage.label(array >= NODULE_LABEL_MIN, structure=np.ones((3, 3)))
    if nodules is None:
        found = [(components == i + 1) for i in range(count)]
        centers = [np.argwhere(mask).mean(axis=0) for mask in found]
        nodules = [
            {"malignant": int(array[mask].max() > NODULE_LABEL_MIN), "center": center}
            for mask, center in zip(found, centers, strict=True)
        ]
    else:
        found = _regions(components, nodules)
    requests = []
    for nodule, mask in zip(nodules, found, strict=True):
        own = {name: nodule.get("malignant" if name == MALIGNANCY else name) for name in features}
        asked = {name: float(value) for name, value in (own | dict(targets or {})).items() if value is not None}
        if asked:
            row, column = (int(c) // factor for c in nodule["center"])
            requests.append(NoduleRequest((row, column), _latent_region(mask, factor, dilation), asked))
    return requests


def _regions(components: np.ndarray, nodules: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """For each nodule the pixels of its connected component that are nearer to it than to the others."""
    pixels = np.argwhere(components > 0)
    centers = [np.asarray(nodule["center"], dtype=float) for nodule in nodules]
    owners = []
    for nodule, center in zip(nodules, centers, strict=True):
        distances = np.linalg.norm(pixels - center, axis=1) if len(pixels) else np.array([np.inf])
        top, left, bottom, right = nodule.get("bbox", (0, 0, *components.shape))
        if distances.min() > max(bottom - top, right - left):
            msg = f"The case lists a nodule at {nodule['center']}, but its label map has none there."
            raise UserError(msg)
        owners.append(components[tuple(pixels[distances.argmin()])])
    regions = []
    for i, owner in enumerate(owners):
        mask = components == owner
        rivals = [j for j, other in enumerate(owners) if other == owner]
        inside = np.argwhere(mask)
        distances = [np.linalg.norm(inside - centers[j], axis=1) for j in rivals]
        lost = inside[np.argmin(distances, axis=0) != rivals.index(i)]
        mask[tuple(lost.T)] = False
        regions.append(mask)
    return regions


def _latent_region(mask: np.ndarray, factor: int, dilation: int) -> Tensor:
    """A nodule's pixels (H, W) as bool (H / f, W / f): max-pooled, so that none is lost, then enlarged."""
    pooled = F.max_pool2d(torch.from_numpy(mask).float()[None, None], factor)
    if dilation:
        pooled = F.max_pool2d(pooled, 2 * dilation + 1, stride=1, padding=dilation)
    return pooled[0, 0] > 0


def _scaled_crop(image: Tensor, window: Sequence[slice], latent_shape: Sequence[int]) -> Tensor:
    """The part of a decoded image (C, H, W) that a window of the latent covers."""
    factors = [size // latent for size, latent in zip(image.shape[1:], latent_shape, strict=True)]
    return image[(slice(None), *(slice(w.start * f, w.stop * f) for w, f in zip(window, factors, strict=True)))]

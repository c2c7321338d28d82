# SPDX-License-Identifier: Apache-2.0
"""LSDM's sampler as a MONAI inferer: semantic map -> CT slice (LSDM thesis, Alg 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_synth.data.slices import collapse_nodules, one_hot
from monai_synth.diffusion import make_sampler
from monai_synth.errors import UserError
from monai_synth.inference.guidance import NoduleGuidance, nodule_requests
from monai_synth.inference.sampler import initial_noise, make_generators, sample
from monai_synth.networks.latent_codec import LatentCodec
from monai_synth.networks.spade import pool_semantic


class LSDMInferer(Inferer):
    """Samples latents under semantic maps and decodes them.

    The SPADE modulations of a batch are computed once and reused at every step. The image of a seed does not depend
    on the batch it is made in.

    Args:
        codec: autoencoder with the scale factor of the diffusion model.
        schedule: noise schedule of the training.
        sampler: ``dpm++``, ``unipc``, ``ddim`` or ``ddpm``; of a rectified flow ``euler`` or ``heun`` as well.
        num_steps: steps of the sampler, at most the schedule's.
        classifiers: noisy classifier per feature; none samples without guidance.
        guidance_scale: s, one number or one per feature (thesis default 1); 0 is exactly unguided.
        guidance_scale_by: ``variance`` or ``sigma`` (SEEDS 2.3.1).
        guidance_decode: ``crop_first`` or ``decode_first`` (SEEDS 2.3.13).
        guidance_interval: (first, last) timesteps between which guidance acts; None is everywhere.
        crop_size_latent: side of the classifiers' crop.
        semantic_downsample: pooling of maps, as in training.
        collapse_nodule_labels: hide malignancy in the map, as in training.
        cache_modulations: False recomputes SPADE at every step (for measurements).
        seed: of the first map where no seeds are given.
    """

    def __init__(
        self,
        codec: LatentCodec,
        schedule: Mapping[str, Any],
        *,
        sampler: str = "dpm++",
        num_steps: int = 20,
        classifiers: Mapping[str, nn.Module] | None = None,
        guidance_scale: float | Mapping[str, float] = 1.0,
        guidance_scale_by: str = "variance",
        guidance_decode: str = "crop_first",
        guidance_interval: tuple[int, int] | None = None,
        crop_size_latent: int = 16,
        semantic_downsample: str = "max_onehot",
        collapse_nodule_labels: bool = False,
        cache_modulations: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.codec = codec
        self.schedule = dict(schedule)
        self.sampler = sampler
        self.num_steps = num_steps
        self.classifiers = dict(classifiers or {})
        self.scales = guidance_scales(guidance_scale, list(self.classifiers))
        self.guidance_scale_by = guidance_scale_by
        self.guidance_decode = guidance_decode
        self.guidance_interval = None if guidance_interval is None else tuple(guidance_interval)
        self.crop_size_latent = crop_size_latent
        self.semantic_downsample = semantic_downsample
        self.collapse_nodule_labels = collapse_nodule_labels
        self.cache_modulations = cache_modulations
        self.seed = seed
        make_sampler(sampler, schedule, num_steps)  # refuse wrong settings before any work

    @property
    def num_labels(self) -> int:
        """Labels of the model."""
        return self.codec.num_labels

    def __call__(
        self,
        inputs: Tensor,
        network: nn.Module,
        *,
        seeds: Sequence[int] | None = None,
        nodules: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
        targets: Sequence[Mapping[str, float]] | None = None,
    ) -> Tensor:
        """Sample one image per map.

        Args:
            inputs: label maps (B, 1, H, W), integers.
            network: SPADE U-Net.
            seeds: one per map. Default: those from ``seed`` on.
            nodules: per map, the nodule table (``center`` in pixels of the map, features), or None for a map
                without one; nothing at all samples without guidance.
            targets: per map, features that replace the nodules' own.

        Returns:
            Images (B, 1, H, W) in [-1, 1], clipped.
        """
        label = inputs
        if self.collapse_nodule_labels:
            label = collapse_nodules(label)
        cond = self.codec.encode_label(label) * self.codec.scale_factor
        size = tuple(cond.shape[2:])
        seg = pool_semantic(one_hot(label, self.codec.num_labels), size, self.semantic_downsample)
        generators = make_generators(range(self.seed, self.seed + len(inputs)) if seeds is None else seeds)
        x_T = initial_noise(tuple(cond.shape[1:]), generators, cond.device)
        with torch.no_grad():
            modulations = network.modulations(seg, size) if self.cache_modulations else None

        def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
            extra = {"seg": seg} if modulations is None else {"modulations": modulations}
            return network(torch.cat([x_t, cond], dim=1), t, **extra)

        z_0 = sample(
            denoiser,
            x_T,
            make_sampler(self.sampler, self.schedule, self.num_steps),
            guidance=self._guidance(inputs, nodules, targets),
            generators=generators,
        )
        with torch.no_grad():
            return self.codec.decode(z_0).clamp(-1.0, 1.0)

    def _guidance(
        self,
        label: Tensor,
        nodules: Sequence[Sequence[Mapping[str, Any]] | None] | None,
        targets: Sequence[Mapping[str, float]] | None,
    ) -> NoduleGuidance | None:
        active = {f: self.classifiers[f] for f, s in self.scales.items() if s != 0}
        if not active or nodules is None:
            return None
        targets = targets or [{}] * len(nodules)
        requests = [
            nodule_requests(
                label[i, 0].cpu(), nodules[i], self.codec.factor, features=list(active),
                targets={f: v for f, v in targets[i].items() if f in active},
            )
            for i in range(len(nodules))
        ]  # fmt: skip
        if not any(requests):
            return None
        return NoduleGuidance(
            self.codec.decode,
            active,
            requests,
            scales={f: self.scales[f] for f in active},
            crop_size_latent=self.crop_size_latent,
            scale_by=self.guidance_scale_by,
            decode=self.guidance_decode,
            interval=self.guidance_interval,
        )


def guidance_scales(scale: float | Mapping[str, float], features: Sequence[str]) -> dict[str, float]:
    """One scale per feature.

    Raises:
        UserError: a scale for a feature without a classifier, or no number.
    """
    if isinstance(scale, Mapping):
        unknown = [f for f in scale if f not in features]
        if unknown:
            msg = f"guidance_scale names {unknown}, classifiers are loaded for {list(features)}; add them to --features"
            raise UserError(msg)
        return {f: float(scale.get(f, 0.0)) for f in features}
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise UserError(f"guidance_scale is {scale!r}; give a number, or a number per feature")
    return dict.fromkeys(features, float(scale))

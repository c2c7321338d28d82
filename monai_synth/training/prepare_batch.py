# SPDX-License-Identifier: Apache-2.0
"""What a MONAI trainer or evaluator feeds to a diffusion network or to a noisy classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from monai.engines import PrepareBatch

from monai_synth.checks import share
from monai_synth.diffusion import add_noise, alphas_cumprod, draw_timesteps, training_target
from monai_synth.networks.latent_codec import LatentCodec


class NoisyPrepareBatch(PrepareBatch):
    """Draws t and eps; with ``seed`` the draws depend on the item's index alone, so that validation is repeatable.

    Args:
        schedule: the noise schedule (see ``monai_synth.diffusion``).
        seed: None draws from torch's global generator (training); a number fixes every item's t and eps.
    """

    def __init__(self, schedule: Mapping[str, Any], *, seed: int | None = None) -> None:
        self.schedule = dict(schedule)
        self.alphas_cumprod = alphas_cumprod(schedule)
        self.seed = seed

    def draw(self, shape: torch.Size, index: torch.Tensor, num_noises: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Timesteps (B,) and ``num_noises`` noises of ``shape``, on the CPU so that devices agree."""
        if self.seed is None:
            t = draw_timesteps(self.schedule, (shape[0],))
            return t, [torch.randn(shape) for _ in range(num_noises)]
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + int(i)) for i in index]
        t = torch.cat([draw_timesteps(self.schedule, (1,), g) for g in generators])
        return t, [torch.stack([torch.randn(shape[1:], generator=g) for g in generators]) for _ in range(num_noises)]

    def noisy_latents(
        self, mean: torch.Tensor, std: torch.Tensor, index: torch.Tensor, scale_factor: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A scaled draw z_0 from the posterior, z_t, its noise eps, and t, on the device of ``mean``."""
        t, noises = self.draw(mean.shape, index, 2)
        t = t.to(mean.device)
        posterior, eps = (n.to(mean) for n in noises)
        z_0 = (mean + std * posterior) * scale_factor
        return z_0, add_noise(self.schedule, z_0, eps, t, table=self.alphas_cumprod), eps, t


class ConditionDropout:
    """Replaces some conditions by "none", so that one network learns to do with and without (classifier-free guidance).

    Args:
        drop_prob: share of the conditions that are dropped, each on its own; 0 drops none.
        null: what stands for none: a number for classes, or a tensor of a condition's shape.
        seed: None draws from torch's global generator (training); a number fixes what is dropped by the item's index.

    Raises:
        UserError: ``drop_prob`` is not from 0 to 1.
    """

    def __init__(self, drop_prob: float, null: int | torch.Tensor, *, seed: int | None = None) -> None:
        self.drop_prob, self.null, self.seed = share("drop_prob", drop_prob), null, seed

    def __call__(self, condition: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The conditions (B, ...) of the items ``index`` (B,), some of them dropped."""
        if self.seed is None:
            drawn = torch.rand(len(condition))
        else:
            seeds = [(self.seed + 1) * 7_000_003 + int(i) for i in index]
            drawn = torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(s)) for s in seeds])
        dropped = (drawn < self.drop_prob).to(condition.device).view(-1, *[1] * (condition.ndim - 1))
        return torch.where(dropped, torch.as_tensor(self.null).to(condition), condition)


class ExpandChannels(PrepareBatch):
    """Image -> (image, image) with the channels that the autoencoder takes."""

    def __init__(self, image_channels: int) -> None:
        self.image_channels = image_channels

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image = batchdata["image"].to(device, non_blocking=non_blocking)
        image = image.expand(-1, self.image_channels, *image.shape[2:])
        return image, image


class LatentDiffusionPrepareBatch(NoisyPrepareBatch):
    """Cached latents -> (Concat(z_t, E(m)), target, (), {timesteps, seg}) (thesis Eq 3.1, Eq 3.3, Alg 1).

    The batch holds ``mean``, ``std`` and ``cond`` (B, c, h, w) unscaled, ``seg`` (B, K, h, w), ``index`` (B,).

    Args:
        schedule: noise schedule.
        scale_factor: multiplies latents and E(m).
        seed: see :class:`NoisyPrepareBatch`.
    """

    def __init__(self, schedule: Mapping[str, Any], *, scale_factor: float, seed: int | None = None) -> None:
        super().__init__(schedule, seed=seed)
        self.scale_factor = float(scale_factor)

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, torch.Tensor]]:
        mean, std, cond, seg = (
            batchdata[k].to(device, non_blocking=non_blocking) for k in ("mean", "std", "cond", "seg")
        )
        z_0, z_t, eps, t = self.noisy_latents(mean, std, batchdata["index"], self.scale_factor)
        inputs = torch.cat([z_t, cond * self.scale_factor], dim=1)
        return inputs, training_target(self.schedule, z_0, eps, t), (), {"timesteps": t, "seg": seg}


class NoisyCropPrepareBatch(NoisyPrepareBatch):
    """Latent crops at nodules -> (D(z_t), target, (), {timesteps}) for a noisy classifier (thesis Sec 3.4, Fig 3.4).

    The batch holds ``mean``, ``std`` (B, c, k, k) unscaled, ``target`` (B,) or (B, features), ``index`` (B,).

    Args:
        schedule: noise schedule, the same as the diffusion model's.
        codec: frozen decoder with the scale factor.
        classification: targets are class numbers (long) rather than numbers (float, (B, features)).
        seed: see :class:`NoisyPrepareBatch`.
    """

    def __init__(
        self,
        schedule: Mapping[str, Any],
        *,
        codec: LatentCodec,
        classification: bool,
        seed: int | None = None,
    ) -> None:
        super().__init__(schedule, seed=seed)
        self.codec = codec
        self.classification = classification

    @torch.no_grad()
    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, torch.Tensor]]:
        mean, std = (batchdata[k].to(device, non_blocking=non_blocking) for k in ("mean", "std"))
        target = batchdata["target"].to(device)
        _, z_t, _, t = self.noisy_latents(mean, std, batchdata["index"], self.codec.scale_factor)
        x_t = self.codec.decode(z_t)
        target = target.long() if self.classification else target.float().reshape(len(target), -1)
        return x_t, target, (), {"timesteps": t}

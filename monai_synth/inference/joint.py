# SPDX-License-Identifier: Apache-2.0
"""Sampling the joint variable of image and label, whole or given a part of it (JDM thesis, Sec 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_synth.data.joint import check_value_range
from monai_synth.diffusion import alphas_cumprod, clipped_prediction, is_flow, make_sampler, predicted_x_0
from monai_synth.diffusion.flow import FlowSampler
from monai_synth.diffusion.variance import split_output
from monai_synth.errors import UserError
from monai_synth.inference.conditioning import KNOWN_NOISES, KnownPart
from monai_synth.inference.sampler import initial_noise, make_generators, sample

SEEDS_PER_MEMBER = 2**40  # member m of an ensemble takes seed + m times this

SEED_OF_KNOWN = 2**39  # added to a seed for the noise of the known part; lies between those of two members

# Variance of the data for the gradient correction, as a share of the range's square. It is the largest that data within
# the range can have (a mask half of which is foreground), so the correction errs to the weak side.
DATA_VARIANCE = 0.25


class JointInferer(Inferer):
    """Samples image and label channels together, or the unknown ones given the others.

    Args:
        schedule: noise schedule of the training.
        value_range: lowest and highest value of x_0.
        learned_variance: the network gives v beside the prediction. "ddpm" uses it, within -1 to 1, which keeps the
            variance between beta tilde and beta.
        sampler: "ddpm", "ddim", "dpm++" or "unipc"; of a rectified flow "euler" or "heun" as well.
        num_steps: calls of the network, 1 to T.
        clip: keep each predicted x_0 within the range, as the thesis' code does.
        resample: times that each step is walked (RePaint), at as many times the cost; more than 1 needs "ddpm". It
            brings what is sampled beside known parts closer to the true conditional.
        gradient_scale: of the gradient correction of what is sampled beside known parts; 0 is pure replacement. Known
            entries that depend on each other are counted as if they did not, so 1 fits a single one; with many, values
            near 0.1 help and larger ones overshoot.
        known_noise: see :class:`KnownPart`. None takes "fresh": where the true conditional is known (jointly Gaussian
            data), it is mostly closer to it than "fixed", and nowhere farther off by more than 0.004.
        num_ensemble: samples whose mean and standard deviation are given. They are made one after the other, so
            memory is that of the batch.
        seed: of the first sample where no seeds are given.

    Raises:
        UserError: a setting out of range, or settings that do not go together.
    """

    def __init__(
        self,
        schedule: Mapping[str, Any],
        *,
        value_range: Sequence[float] = (0, 1),
        learned_variance: bool = True,
        sampler: str = "dpm++",
        num_steps: int = 20,
        clip: bool = True,
        resample: int = 1,
        gradient_scale: float = 0.0,
        known_noise: str | None = None,
        num_ensemble: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(resample, bool) or not isinstance(resample, int) or resample < 1:
            raise UserError(f"resample is {resample!r}; allowed are integers from 1, which is no resampling")
        if resample > 1 and sampler != "ddpm":
            msg = f"resample {resample} repeats steps, for which {sampler!r} remembers too much; give --sampler ddpm"
            raise UserError(msg)
        if isinstance(gradient_scale, bool) or not gradient_scale >= 0:
            raise UserError(f"gradient_scale is {gradient_scale!r}; allowed are numbers from 0, which is none")
        if isinstance(num_ensemble, bool) or not isinstance(num_ensemble, int) or num_ensemble < 1:
            raise UserError(f"num_ensemble is {num_ensemble!r}; allowed are integers from 1")
        if known_noise not in (None, *KNOWN_NOISES):
            raise UserError(f"known_noise is {known_noise!r}; allowed are {', '.join(KNOWN_NOISES)}, or none given")
        self.schedule = dict(schedule)
        self.value_range = check_value_range(value_range)
        self.learned_variance = learned_variance
        self.sampler, self.num_steps = sampler, num_steps
        self.clip = clip
        self.resample = resample
        self.gradient_scale = float(gradient_scale)
        self.known_noise = known_noise or "fresh"
        self.num_ensemble = num_ensemble
        self.seed = seed
        self.alphas_cumprod = alphas_cumprod(schedule)
        self._scheduler()  # refuse wrong settings before any work

    def __call__(
        self,
        known: Tensor,
        network: nn.Module,
        *,
        is_known: Tensor | None = None,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor | None] | Tensor:
        """Sample one x_0 for each seed.

        Args:
            known: (B, C, *S) in ``value_range`` where ``is_known``, anything elsewhere.
            network: called with (x_t, timesteps).
            is_known: booleans of that shape; None where nothing is known.
            seeds: one for each sample. Without any, those from ``seed`` on are taken, what is NaN is unknown, and
                x_0 alone is given, as callers want it that know one tensor in and one out.

        Returns:
            ``x_0`` (B, C, *S), the known entries bit by bit as given; with an ensemble its mean, and ``std`` its
            standard deviation, else None.

        Raises:
            UserError: the network's channels do not fit ``learned_variance``.
        """
        if seeds is None:
            there = ~known.isnan()
            seeds = range(self.seed, self.seed + len(known))
            return self(known.nan_to_num(), network, is_known=there if there.any() else None, seeds=seeds)["x_0"]
        with torch.inference_mode(False), torch.no_grad():
            if is_known is not None:
                # Tensors made in inference mode can never take part in a gradient.
                is_known = is_known.clone()
                known = torch.where(is_known, known.clone(), 0)
            mean = squares = torch.zeros_like(known)
            for member in range(self.num_ensemble):
                seeds_of_member = [int(seed) + member * SEEDS_PER_MEMBER for seed in seeds]
                x_0 = self._sample(known, network, is_known, seeds_of_member)
                # Welford's running mean and sum of squares: memory does not grow with the ensemble.
                delta = x_0 - mean
                mean = mean + delta / (member + 1)
                squares = squares + delta * (x_0 - mean)
            std = (squares / (self.num_ensemble - 1)).sqrt() if self.num_ensemble > 1 else None
            return {"x_0": mean if is_known is None else torch.where(is_known, known, mean), "std": std}

    def _sample(self, known: Tensor, network: nn.Module, is_known: Tensor | None, seeds: Sequence[int]) -> Tensor:
        generators = make_generators(seeds)
        x_T = initial_noise(tuple(known.shape[1:]), generators, known.device)
        scheduler = self._scheduler()
        takes_v = scheduler.config.get("variance_type") == "learned_range"
        part = guidance = None
        if is_known is not None:
            generators_known = make_generators(seed + SEED_OF_KNOWN for seed in seeds)
            part = KnownPart(known, is_known, self._levels(), generators_known, known_noise=self.known_noise)
            x_T = part.begin(x_T, int(scheduler.timesteps[0]))
            if self.gradient_scale > 0:
                low, high = self.value_range
                guidance = part.guidance(
                    lambda x_t, t: self._x_0(network(x_t, t), x_t, t),
                    scale=self.gradient_scale,
                    data_variance=DATA_VARIANCE * (high - low) ** 2,
                )
        x_0 = sample(
            lambda x_t, t: self._denoise(network(x_t, t), x_t, t, takes_v),
            x_T,
            scheduler,
            guidance=guidance,
            replace=None if part is None else part.replace,
            generators=generators,
            resample=self.resample,
        )
        return x_0.clamp(*self.value_range) if self.clip else x_0

    def _levels(self) -> Mapping[str, Any] | Tensor:
        """What tells noise levels: the description of a flow, the table of a diffusion."""
        return self.schedule if is_flow(self.schedule) else self.alphas_cumprod

    def _scheduler(self) -> SchedulerMixin | FlowSampler:
        return make_sampler(self.sampler, self.schedule, self.num_steps, learned_variance=self.learned_variance)

    def _denoise(self, output: Tensor, x_t: Tensor, t: Tensor, takes_v: bool) -> Tensor:
        """The prediction with its x_0 clipped, followed by v where the sampler takes it."""
        prediction, v = self._split(output, x_t)
        if self.clip:
            prediction = clipped_prediction(
                self.schedule, prediction, x_t, t, self.value_range, table=self.alphas_cumprod
            )
        return torch.cat([prediction, v.clamp(-1, 1)], dim=1) if takes_v else prediction

    def _x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Predicted data, differentiable. Clipping changes their values but not their slope, or it would end there."""
        prediction, _ = self._split(output, x_t)
        x_0 = predicted_x_0(self.schedule, prediction, x_t, t, table=self.alphas_cumprod)
        return x_0 + (x_0.clamp(*self.value_range) - x_0).detach() if self.clip else x_0

    def _split(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and v, which has no channels if the variance is not learned."""
        return split_output(output.to(x_t.dtype), x_t.shape[1], self.learned_variance)

# SPDX-License-Identifier: Apache-2.0
"""What a denoiser with a learned variance is trained on (JDM thesis, Eq 2.17 and 2.18)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from monai_synth.diffusion.schedules import Schedule, alphas_cumprod, training_target
from monai_synth.diffusion.variance import (
    Posterior,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    nats_to_bits,
)
from monai_synth.errors import UserError


@dataclass(frozen=True)
class DiffusionTarget:
    """What the loss compares a prediction with.

    Attributes:
        x_0: clean data (B, C, *S).
        x_t: noisy data, the network's input.
        eps: the noise in it.
        t: timesteps (B,).
    """

    x_0: Tensor
    x_t: Tensor
    eps: Tensor
    t: Tensor

    def __len__(self) -> int:
        """Size of the batch, for metrics that average over cases."""
        return len(self.x_0)


class HybridLoss(nn.Module):
    """L_simple + lambda L_vlb, whose second term reaches the variance only.

    L_simple is the mean squared error of the prediction. L_vlb is T times the mean over t of the variational bound's
    terms in bits per dimension: the KL divergence of the model's step from the posterior, at t = 0 the negative log
    likelihood of the 8-bit value. Its gradient stops at the mean.

    Args:
        schedule: noise schedule, whose ``prediction_type`` says what is predicted.
        value_range: lowest and highest value of x_0.
        learned_variance: the prediction has twice the channels of x_0, the second half is v; else L_simple alone.
        vlb_weight: lambda.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        value_range: Sequence[float],
        learned_variance: bool = True,
        vlb_weight: float = 0.001,
    ) -> None:
        super().__init__()
        self.schedule = dict(schedule)
        self.value_range = (float(value_range[0]), float(value_range[1]))
        self.learned_variance = learned_variance
        self.vlb_weight = float(vlb_weight)
        self.posterior = Posterior(alphas_cumprod(schedule))

    def forward(self, prediction: Tensor, target: DiffusionTarget) -> Tensor:
        """Mean loss of a batch.

        Args:
            prediction: (B, 2C, *S), or (B, C, *S) without a learned variance.
            target: what to compare with.

        Raises:
            UserError: the numbers of channels do not fit.
        """
        simple, vlb = self.terms(prediction, target)
        return simple.mean() if vlb is None else (simple + self.vlb_weight * len(self.posterior.abar) * vlb).mean()

    def terms(self, prediction: Tensor, target: DiffusionTarget) -> tuple[Tensor, Tensor | None]:
        """L_simple and the bound's term at t in bits per dimension, of each case (B,)."""
        channels = target.x_0.shape[1]
        wanted = channels * (2 if self.learned_variance else 1)
        if prediction.shape[1] != wanted:
            msg = (
                f"the network gives {prediction.shape[1]} channels for {channels} of x_0, and learned_variance "
                f"{self.learned_variance} needs {wanted}; give both the same learned_variance"
            )
            raise UserError(msg)
        mean_part = prediction[:, :channels].float()
        wanted_part = training_target(self.schedule, target.x_0, target.eps, target.t)
        simple = (mean_part - wanted_part).square().flatten(1).mean(1)
        if not self.learned_variance:
            return simple, None
        return simple, self._bound(mean_part.detach(), prediction[:, channels:].float(), target)

    def _bound(self, mean_part: Tensor, v: Tensor, target: DiffusionTarget) -> Tensor:
        if self.posterior.abar.device != target.t.device:
            self.posterior = self.posterior.to(target.t.device)
        q, t = self.posterior, target.t
        mean = q.mean(self._x_0(mean_part, target), target.x_t, t)
        log_variance = q.learned_log_variance(v, t)
        true_mean = q.mean(target.x_0, target.x_t, t)
        kl = gaussian_kl(true_mean, q.log_variance(target.x_t, t), mean, log_variance).flatten(1).mean(1)
        first = t == 0
        if first.any():
            likelihood = discretized_gaussian_log_likelihood(
                target.x_0[first], mean[first], 0.5 * log_variance[first], self.value_range
            )
            kl = kl.masked_scatter(first, -likelihood.flatten(1).mean(1))
        return nats_to_bits(kl)

    def _x_0(self, prediction: Tensor, target: DiffusionTarget) -> Tensor:
        """x_0 that the prediction means."""
        kind = self.schedule.get("prediction_type", "epsilon")
        if kind == "sample":
            return prediction
        abar = self.posterior.abar[target.t].view(-1, *[1] * (prediction.ndim - 1))
        signal, noise = abar.sqrt().to(prediction), (1 - abar).sqrt().to(prediction)
        if kind == "epsilon":
            return (target.x_t - noise * prediction) / signal
        return signal * target.x_t - noise * prediction

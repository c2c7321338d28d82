# SPDX-License-Identifier: Apache-2.0
"""The loss of a diffusion model with learned variance, L_hybrid = L_simple + lambda L_vlb (JDM thesis, Eq 2.18)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monai_synth.data.joint import check_value_range
from monai_synth.diffusion.flow import is_flow
from monai_synth.diffusion.schedules import Schedule, alphas_cumprod, predicted_x_0, training_target
from monai_synth.diffusion.variance import (
    check_learnable,
    discretized_gaussian_log_likelihood,
    gaussian_kl,
    learned_log_variance,
    posterior_log_variance,
    posterior_mean,
    split_output,
)
from monai_synth.errors import UserError


@dataclass(frozen=True)
class DiffusionTarget:
    """What a noisy batch was made of: the label of a diffusion model's training.

    Attributes:
        x_0: clean data (B, C, *S).
        x_t: noisy data, of the same shape.
        eps: the noise.
        t: timesteps (B,).
    """

    x_0: Tensor
    x_t: Tensor
    eps: Tensor
    t: Tensor

    def __len__(self) -> int:
        return len(self.t)


class HybridLoss(nn.Module):
    """Mean squared error of the prediction, and the variational bound for the variance.

    L_vlb sees the predicted mean without its gradient, so it trains only the variance. One t is drawn for each
    sample, so the bound is T times the mean of its terms, in bits for each element; with T = 1000 and the weight of
    0.001 the two losses are added as they are, as in improved-diffusion.

    Args:
        schedule: noise schedule.
        value_range: lowest and highest value of x_0, of 8-bit data: [0, 1] or [-1, 1].
        learned_variance: False for a network that predicts only; the bound is then left out.
        vlb_weight: lambda.

    Raises:
        UserError: an option is not within its range, or a learned variance is asked of a flow.
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
        if not vlb_weight >= 0:
            raise UserError(f"vlb_weight is {vlb_weight!r}; allowed are numbers from 0, the text's is 0.001")
        if learned_variance and is_flow(schedule):
            msg = "learned_variance is true, but a rectified flow has no variance to learn; set it false"
            raise UserError(msg)
        self.schedule = dict(schedule)
        self.value_range = check_value_range(value_range)
        self.learned_variance = learned_variance
        self.vlb_weight = float(vlb_weight)
        table = alphas_cumprod(schedule)
        if learned_variance:
            check_learnable(table)
        self.register_buffer("alphas_cumprod", table, persistent=False)

    def forward(self, prediction: Tensor, target: DiffusionTarget) -> Tensor:
        """The loss.

        Args:
            prediction: of the network (B, 2 C, *S), or (B, C, *S) without a learned variance.
            target: what x_t was made of.

        Returns:
            Scalar.
        """
        mse, vlb = self.terms(prediction, target)
        return mse.mean() + self.vlb_weight * len(self.alphas_cumprod) * vlb.mean()

    def terms(self, prediction: Tensor, target: DiffusionTarget) -> tuple[Tensor, Tensor]:
        """Squared error and term of the bound at t in bits, both means over the elements of each sample (B,).

        Raises:
            UserError: the network has not the channels that the loss needs.
        """
        prediction = prediction.to(target.x_0.dtype)
        mean_half, v = split_output(prediction, target.x_0.shape[1], self.learned_variance)
        wanted = training_target(self.schedule, target.x_0, target.eps, target.t, table=self.alphas_cumprod)
        mse = _mean_of_sample((mean_half - wanted) ** 2)
        if not self.learned_variance:
            return mse, torch.zeros_like(mse)
        return mse, self._vlb(mean_half.detach(), v, target)

    def _vlb(self, mean_half: Tensor, v: Tensor, target: DiffusionTarget) -> Tensor:
        """L_{t-1}, or at t = 0 the decoder's L_0 (Nichol and Dhariwal 2021, Eq 4 to 7), in bits, (B,)."""
        table, x_0, x_t, t = self.alphas_cumprod, target.x_0, target.x_t, target.t
        x_0_hat = predicted_x_0(self.schedule, mean_half, x_t, t, table=table)
        mean = posterior_mean(table, x_0_hat, x_t, t)
        log_variance = learned_log_variance(table, v, t)
        true_log_variance = posterior_log_variance(table, t).to(v).view(-1, *[1] * (v.ndim - 1))
        kl = gaussian_kl(posterior_mean(table, x_0, x_t, t), true_log_variance, mean, log_variance)
        nll = -discretized_gaussian_log_likelihood(x_0, mean, 0.5 * log_variance, self.value_range)
        return torch.where(t == 0, _mean_of_sample(nll), _mean_of_sample(kl)) / math.log(2)


def _mean_of_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)

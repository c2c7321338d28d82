# SPDX-License-Identifier: Apache-2.0
"""The posterior q(x_{t-1} | x_t, x_0), the learned variance and the likelihoods of which L_vlb is made.

Everything is in nats; tables are float64 and cast on use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from monai_synth.diffusion.schedules import Schedule, alphas_cumprod


class Posterior:
    """Mean and variance of q(x_{t-1} | x_t, x_0) at every timestep (JDM thesis, Eq 2.6).

    Args:
        schedule: the description, or its table ``alphas_cumprod``.

    Attributes:
        log_beta: log of the upper bound of the step's variance (T,).
        log_beta_tilde: log of the lower bound, the variance given x_0 (T,). That of t = 0 is 0; as in improved
            DDPM its place is taken by that of t = 1.
    """

    def __init__(self, schedule: Schedule | Tensor) -> None:
        table = schedule.double() if isinstance(schedule, Tensor) else alphas_cumprod(schedule)
        before = torch.cat([torch.ones(1, dtype=torch.float64, device=table.device), table[:-1]])
        beta = 1 - table / before
        self.abar = table
        self.x_0_factor = beta * before.sqrt() / (1 - table)
        self.x_t_factor = (1 - before) * (1 - beta).sqrt() / (1 - table)
        beta_tilde = beta * (1 - before) / (1 - table)
        beta_tilde[0] = beta_tilde[1] if len(table) > 1 else beta[0]
        self.log_beta, self.log_beta_tilde = beta.log(), beta_tilde.log()

    def to(self, device: torch.device | str) -> Posterior:
        """The same tables on a device."""
        moved = object.__new__(Posterior)
        moved.__dict__.update({name: value.to(device) for name, value in vars(self).items()})
        return moved

    def mean(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of x_{t-1} given x_t and x_0, both (B, ...); t is (B,)."""
        return _at(self.x_0_factor, t, x_0) * x_0 + _at(self.x_t_factor, t, x_t) * x_t

    def log_variance(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Log of the variance of x_{t-1} given x_t and x_0, (B, 1, ...)."""
        return _at(self.log_beta_tilde, t, x_t)

    def learned_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """Between the two bounds, in the logarithm (thesis Eq 2.17): v = -1 gives the lower, v = 1 the upper.

        The text has v in [0, 1]; its code, and so this, maps [-1, 1] there (SEEDS 2.4.10).
        """
        share = (v + 1) / 2
        return share * _at(self.log_beta, t, v) + (1 - share) * _at(self.log_beta_tilde, t, v)


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL divergence, in nats, of the second from the first of two normal distributions, element by element."""
    return 0.5 * (
        log_variance_2
        - log_variance_1
        + (log_variance_1 - log_variance_2).exp()
        + (mean_1 - mean_2).square() * (-log_variance_2).exp()
        - 1
    )


def discretized_gaussian_log_likelihood(
    x_0: Tensor, mean: Tensor, log_scale: Tensor, value_range: Sequence[float]
) -> Tensor:
    """Log of the probability, in nats, that a normal distribution gives to the 8-bit bin of each value.

    The bins of the two ends of the range reach to infinity, so that the 256 probabilities add up to 1
    (Ho et al. 2020, Eq 13).

    Args:
        x_0: values in the range.
        mean: of the distribution.
        log_scale: log of its standard deviation.
        value_range: lowest and highest value, 256 levels from the one to the other.
    """
    low, high = value_range
    half = (high - low) / 255 / 2
    inverse = (-log_scale).exp()
    above = _log_ndtr_difference((x_0 - mean + half) * inverse, (x_0 - mean - half) * inverse)
    lowest = torch.special.log_ndtr((x_0 - mean + half) * inverse)
    highest = torch.special.log_ndtr(-(x_0 - mean - half) * inverse)
    return torch.where(x_0 < low + half, lowest, torch.where(x_0 > high - half, highest, above))


def _log_ndtr_difference(upper: Tensor, lower: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)) without cancellation: in the lower tail, to which the upper one is mirrored."""
    flip = (upper + lower) > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    gap = (log_lower - log_upper).clamp(max=-1e-7)
    return log_upper + torch.log(-torch.expm1(gap))


def nats_to_bits(value: Tensor) -> Tensor:
    """The same information in bits."""
    return value / math.log(2.0)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Entries of a table at t (B,), to be multiplied with ``like`` (B, ...)."""
    return table[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))

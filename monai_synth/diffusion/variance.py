# SPDX-License-Identifier: Apache-2.0
"""Gaussians of a diffusion chain: its posterior, the learned variance, and how far two of them are apart.

Every function takes a schedule or its table of ``abar``. A shortened chain is a chain of its own: with the table at
the timesteps that it visits, ascending, and t counting these, the functions hold for it as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.special import log_ndtr

from monai_synth.diffusion.schedules import Schedule, alphas_cumprod
from monai_synth.errors import UserError

BINS = 256  # data are whole numbers 0 to 255 on disk


def posterior_mean(schedule: Schedule | Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (JDM thesis, Eq 2.6); x_0 itself at t = 0.

    ``(sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t) / (1 - abar_t)``

    Args:
        schedule: the description, or its table ``alphas_cumprod``.
        x_0: clean data (B, ...), or their prediction.
        x_t: noisy data, of the same shape.
        t: timesteps (B,), 0 to T - 1.

    Returns:
        Mean, of the shape and type of x_0.
    """
    abar, before = _abar(schedule, t)
    share = before.sqrt() * (1 - abar / before) / (1 - abar)
    rest = (abar / before).sqrt() * (1 - before) / (1 - abar)
    return _spread(share, x_0) * x_0 + _spread(rest, x_0) * x_t


def posterior_log_variance(schedule: Schedule | Tensor, t: Tensor) -> Tensor:
    """Logarithm of the variance of q(x_{t-1} | x_t, x_0), ``beta~_t`` (JDM thesis, Eq 2.6).

    That variance is 0 at t = 0; as in improved-diffusion, the one of t = 1 stands there.

    Args:
        schedule: the description, or its table, of at least two timesteps.
        t: timesteps (B,).

    Returns:
        float64 (B,).
    """
    abar, before = _abar(schedule, t.clamp(min=1))
    return torch.log((1 - before) / (1 - abar) * (1 - abar / before))


def learned_log_variance(schedule: Schedule | Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Log variance between ``beta~_t`` and ``beta_t``, interpolated in the logarithm (JDM thesis, Eq 2.17).

    ``(v + 1) / 2 log beta_t + (1 - v) / 2 log beta~_t``

    Args:
        schedule: the description, or its table, of at least two timesteps.
        v: second half of the network's output (B, ...); -1 is ``beta~_t``, 1 is ``beta_t``.
        t: timesteps (B,).

    Returns:
        Log variance, of the shape and type of v.
    """
    abar, before = _abar(schedule, t)
    largest = _spread(torch.log(1 - abar / before), v)
    least = _spread(posterior_log_variance(schedule, t), v)
    fraction = (v + 1) / 2
    return fraction * largest + (1 - fraction) * least


def gaussian_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """KL divergence from N(mean_1, exp(log_variance_1)) to N(mean_2, exp(log_variance_2)), per element, in nats."""
    difference = log_variance_1 - log_variance_2
    distance = (mean_1 - mean_2) ** 2 * torch.exp(-log_variance_2)
    return 0.5 * (difference.exp() - difference - 1 + distance)


def discretized_gaussian_log_likelihood(
    x_0: Tensor, mean: Tensor, log_scale: Tensor, value_range: Sequence[float]
) -> Tensor:
    """Log-probability of the 8-bit value of x_0 under a Gaussian, per element, in nats (Ho et al. 2020, Eq 13).

    A value's bin reaches half way to its neighbours; the first and the last are open to the outside, so the 256
    probabilities sum to 1. It is exact in the tails too, where a difference of two distribution functions is 0.

    Args:
        x_0: data (...), multiples of 1 / 255 of the range.
        mean: of the Gaussian, of the same shape.
        log_scale: logarithm of its standard deviation.
        value_range: lowest and highest value.

    Returns:
        Log-probability, of the shape of x_0.
    """
    low, high = value_range
    half_width = (high - low) / (BINS - 1) / 2
    # Mirrored so that the bin lies in the left tail, where log_ndtr keeps its digits.
    side = torch.where(x_0 > mean, -1.0, 1.0)
    middle = side * (x_0 - mean)
    scale = torch.exp(log_scale)
    upper = log_ndtr((middle + half_width) / scale)
    lower = log_ndtr((middle - half_width) / scale)
    gap = (lower - upper).clamp(max=-1e-7)  # a bin narrower than the type's digits must not give log 0
    inside = upper + torch.log(-torch.expm1(gap))
    outer_left = log_ndtr((x_0 - mean + half_width) / scale)
    outer_right = log_ndtr(-(x_0 - mean - half_width) / scale)
    return torch.where(x_0 < low + half_width, outer_left, torch.where(x_0 > high - half_width, outer_right, inside))


def split_output(output: Tensor, channels: int, learned_variance: bool) -> tuple[Tensor, Tensor]:
    """The halves of a network's output.

    Args:
        output: (B, 2 C, *S), or (B, C, *S) without a learned variance.
        channels: C, of the data.
        learned_variance: whether there is a second half.

    Returns:
        Prediction (B, C, *S) and v; v has no channels without a learned variance.

    Raises:
        UserError: another number of channels.
    """
    needed = channels * (2 if learned_variance else 1)
    if output.shape[1] != needed:
        msg = (
            f"the network has {output.shape[1]} output channels; with {channels} channels of data and learned_variance "
            f"{learned_variance} it needs {needed}; give the learned_variance of its training"
        )
        raise UserError(msg)
    return output[:, :channels], output[:, channels:]


def check_learnable(table: Tensor) -> None:
    """Refuse a schedule whose variance has nothing to learn.

    Raises:
        UserError: it has a single timestep.
    """
    if len(table) < 2:
        msg = f"the schedule has {len(table)} timestep, a learned variance takes at least 2; set learned_variance false"
        raise UserError(msg)


def _abar(schedule: Schedule | Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """abar at t and at t - 1 (1 for t = 0), float64 (B,)."""
    table = (schedule if isinstance(schedule, Tensor) else alphas_cumprod(schedule)).to(t.device)
    return table[t], torch.where(t > 0, table[(t - 1).clamp(min=0)], 1.0)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), of the type of ``like``."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))

# SPDX-License-Identifier: Apache-2.0
"""Holding a known part of the joint variable while the rest is sampled (JDM thesis, Alg 1 and 2).

Replacement puts q(known | t - 1) in the place of the known entries after every step. The rest then never sees how the
known part was noised on the way, so what it samples is only near the true conditional. Two corrections are offered:
repeating each step with fresh noise (RePaint), and the gradient of the known part's likelihood with respect to the rest
(reconstruction guidance, Ho et al. 2022). On Gaussian data, where all is known in closed form, repeating always comes
closer; the gradient does so at full strength for a single known entry, and overshoots for many that are correlated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from monai_synth.diffusion.schedules import Schedule, signal_and_noise
from monai_synth.errors import UserError
from monai_synth.inference.sampler import noise_like

KNOWN_NOISES = ("fresh", "fixed")


class KnownPart:
    """What is given, and how it enters the sampling loop.

    Args:
        known: values (B, C, *S); anything where ``is_known`` is false.
        is_known: booleans of that shape.
        schedule: the description, or the table ``alphas_cumprod`` of a diffusion.
        generators: one for each sample, other than those of the sampling loop, so that what a sample's neighbours
            know does not change its noise.
        known_noise: "fresh" draws new noise for the known part at each step (Alg 2); "fixed" keeps the noise of x_T,
            so that the known part runs along one path.

    Raises:
        UserError: an unknown ``known_noise``.
    """

    def __init__(
        self,
        known: Tensor,
        is_known: Tensor,
        schedule: Schedule | Tensor,
        generators: Sequence[torch.Generator],
        *,
        known_noise: str = "fresh",
    ) -> None:
        if known_noise not in KNOWN_NOISES:
            raise UserError(f"known_noise is {known_noise!r}; allowed are {', '.join(KNOWN_NOISES)}")
        self.known, self.is_known = known, is_known
        self.schedule = schedule
        self.generators = list(generators)
        self.known_noise = known_noise
        self.eps: Tensor | None = None  # noise of x_T

    def begin(self, x_T: Tensor, t: int) -> Tensor:
        """x_T whose known part is q(known | t) with the noise that x_T has there."""
        self.eps = x_T
        return torch.where(self.is_known, self._noised(x_T, t), x_T)

    def replace(self, x: Tensor, t_prev: int) -> Tensor:
        """Hook of the sampling loop: the known entries at the noise of ``t_prev``, and exactly after the last step.

        The text prints abar_t in Eq 2.22; the entries must have the noise of the step's end, as in its Eq 3.5.
        """
        if t_prev < 0:
            return torch.where(self.is_known, self.known, x)
        eps = self.eps
        if self.known_noise == "fresh" or eps is None:
            eps = noise_like(x, self.generators)
        return torch.where(self.is_known, self._noised(eps, t_prev), x)

    def _noised(self, eps: Tensor, t: int) -> Tensor:
        data, noise = signal_and_noise(self.schedule, torch.tensor(t))
        return data.sqrt().to(eps) * self.known + noise.sqrt().to(eps) * eps

    def guidance(
        self, predict_x_0: Callable[[Tensor, Tensor], Tensor], *, scale: float, data_variance: float
    ) -> Callable[[Tensor, int, float], Tensor]:
        """Gradient of log N(known; x_0(x_t), r_t^2) with respect to the unknown entries of x_t.

        ``r_t^2 = s^2 (1 - abar) / (s^2 abar + 1 - abar)`` is the variance that x_0 still has given x_t, where the data
        have the variance s^2; of a flow abar and 1 - abar are the squares of the factors of data and noise (Song et al.
        2023, pseudo-inverse guidance). Added to the score of x_t it would give that of x_t given the known part, if x_0
        given x_t had independent entries of that variance.

        Args:
            predict_x_0: (x_t, t (B,)) -> x_0, differentiable.
            scale: factor on the gradient; 1 is what the formula asks for.
            data_variance: s^2.

        Returns:
            The ``guidance`` of the sampling loop; 0 at the known entries, which are replaced anyway.
        """

        def gradient(x_t: Tensor, t: int, variance: float) -> Tensor:
            data, noise = (float(power) for power in signal_and_noise(self.schedule, torch.tensor(t)))
            # data + noise is 1 in a diffusion, whose bits depend on the order
            r_squared = data_variance * noise / (data_variance * data + (data + noise) - data)
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                x_0 = predict_x_0(x, torch.full((len(x),), t, device=x.device))
                error = torch.where(self.is_known, self.known - x_0, 0)
                log_p = -error.square().sum() / (2 * r_squared)
                (slope,) = torch.autograd.grad(log_p, x)
            return torch.where(self.is_known, 0, scale * slope)

        return gradient

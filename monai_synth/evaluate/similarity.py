# SPDX-License-Identifier: Apache-2.0
"""Structural similarity of images, and its mean over random pairs of two sets.

Computed in double precision: MONAI's own metric casts to single, where the variance of flat regions, a difference of
nearly equal numbers, is rounded by more than the sixth digit of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from monai_synth.errors import UserError

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, finest first
SSIM_RECIPE = (
    f"SSIM, Gaussian window {WINDOW} x {WINDOW} with sigma {SIGMA}, inside the image only, k1 {K1}, k2 {K2}, values "
    "0 to 1, mean over positions and channels"
)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (X-ray text, Sec 4.2).

    (2 mu_x mu_y + c1)(2 sigma_xy + c2) / ((mu_x^2 + mu_y^2 + c1)(sigma_x^2 + sigma_y^2 + c2)) with c1 = k1^2 and
    c2 = k2^2, its means under a window that never leaves the image.

    Args:
        x: images (B, C, H, W) in [0, 1]; H and W 11 or more.
        y: images of the same shape.

    Returns:
        (B,) in [-1, 1]; 1 for equal images only.

    Raises:
        UserError: shapes differ, or images smaller than the window.
    """
    luminance, structure = _terms(x, y)
    return (luminance * structure).mean(dim=(1, 2, 3))


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang et al. 2003) with as many of its five scales as fit.

    A scale fits where the halved image still holds the window: two at 28 x 28, five from 176 x 176. The weights of
    the scales that are left are divided by their sum. Negative terms, as images that have nothing in common have
    them, count as 0.

    Args:
        x: images (B, C, H, W) in [0, 1]; H and W 11 or more.
        y: images of the same shape.

    Returns:
        (B,) in [0, 1].

    Raises:
        UserError: see `ssim`.
    """
    weights = scale_weights(x.shape[-2:])
    x, y = x.double(), y.double()
    product = torch.ones(x.shape[:2], dtype=torch.float64, device=x.device)
    for scale, weight in enumerate(weights):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        luminance, structure = _terms(x, y)
        term = luminance * structure if scale == len(weights) - 1 else structure
        product = product * term.mean(dim=(2, 3)).relu() ** weight
    return product.mean(dim=1)


def scale_weights(size: Sequence[int]) -> tuple[float, ...]:
    """Weights of the scales of `ms_ssim` for images of this size, finest first; their sum is 1."""
    num = sum(min(size) // 2**scale >= WINDOW for scale in range(len(SCALE_WEIGHTS)))
    weights = np.asarray(SCALE_WEIGHTS[: max(1, num)])
    return tuple((weights / weights.sum()).tolist())


def ms_ssim_recipe(size: Sequence[int]) -> str:
    """What `ms_ssim` does at this size, in words."""
    weights = scale_weights(size)
    shown = ", ".join(f"{w:.4f}" for w in weights)
    return f"MS-SSIM of {len(weights)} of 5 scales (as many as fit), weights {shown}; each scale as {SSIM_RECIPE}"


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure at each position of the window, (B, C, H - 10, W - 10)."""
    if x.shape != y.shape or x.ndim != 4 or min(x.shape[-2:]) < WINDOW:
        msg = f"images of shapes {tuple(x.shape)} and {tuple(y.shape)}; SSIM needs equal ones of {WINDOW} x {WINDOW}"
        raise UserError(msg + " pixels or more")
    x, y = x.double(), y.double()
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - (WINDOW - 1) / 2
    window = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    window = window / window.sum()

    def mean(v: Tensor) -> Tensor:
        channels = v.flatten(0, 1)[:, None]
        channels = F.conv2d(F.conv2d(channels, window[None, None, :, None]), window[None, None, None, :])
        return channels.reshape(*v.shape[:2], *channels.shape[-2:])

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + K1**2) / (mu_x**2 + mu_y**2 + K1**2)
    structure = (2 * cov + K2**2) / (var_x + var_y + K2**2)
    return luminance, structure


def random_pairs(n: int, m: int, num_pairs: int, seed: int | Sequence[int]) -> np.ndarray:
    """Pairs of an image of one set and one of another, int (P, 2), all different.

    Every image is drawn equally often, plus or minus one, as long as there are pairs left to draw.

    Args:
        n: size of the first set.
        m: size of the second.
        num_pairs: wanted; at most n m are there.
        seed: of the draw.
    """
    if min(n, m, num_pairs) < 1:
        raise UserError(f"{num_pairs} pairs of {n} and {m} images; each must be 1 or more")
    num_pairs = min(num_pairs, n * m)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(n), rng.permutation(m)
    # Walk the diagonals of the table: after lcm(n, m) steps a diagonal is used up, and the next one begins.
    step = np.arange(num_pairs)
    shift = step // np.lcm(n, m)
    return np.stack([rows[step % n], columns[(step + shift) % m]], axis=1)


def mean_of_pairs(values: np.ndarray, groups_x: Sequence[Any], groups_y: Sequence[Any]) -> dict[str, Any]:
    """Mean over pairs with a 95 % interval that knows which pairs share an image or a patient.

    The squared standard error adds the parts that come from each side and takes off what is in both (two-way
    clustering; Cameron, Gelbach and Miller 2011). Where no image is used twice it is the usual one.

    Args:
        values: (P,) of each pair.
        groups_x: patient of the first image of each pair.
        groups_y: of the second.

    Returns:
        ``{"value", "n", "ci", "standard_error", "sd"}``; n is the number of pairs, sd their standard deviation (None
        for one pair); ci is None where a side is of one patient.
    """
    values = np.asarray(values, np.float64)
    error = values - values.mean()

    def part(*groups: Sequence[Any]) -> float:
        names = ["\x00".join(map(str, key)) for key in zip(*groups, strict=True)]
        _, index = np.unique(names, return_inverse=True)
        sums = np.bincount(index, weights=error)
        return float((sums**2).sum()) * len(sums) / max(1, len(sums) - 1)

    result = {"value": float(values.mean()), "n": len(values), "ci": None, "standard_error": None, "sd": None}
    if len(values) > 1:
        result["sd"] = float(values.std(ddof=1))
    if min(len({str(g) for g in groups}) for groups in (groups_x, groups_y)) > 1:  # one patient says nothing of others
        x, y, both = part(groups_x), part(groups_y), part(groups_x, groups_y)
        variance = max(x + y - both, x, y, both) / len(values) ** 2
        reach = 1.959964 * variance**0.5
        result |= {"ci": [result["value"] - reach, result["value"] + reach], "standard_error": variance**0.5}
    return result

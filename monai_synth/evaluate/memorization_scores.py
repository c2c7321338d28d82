# SPDX-License-Identifier: Apache-2.0
"""Exact scores of a few candidates: the images themselves, laid over each other to the pixel.

A candidate gives pose and rough shift. The shift is then found to the pixel by correlation of both images, both are cut
to what lies on both at every allowed shift, and compared there: so all pairs are compared over equally many pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import fft, ndimage

from monai_synth.evaluate.memorization_pictures import grey, posed, ranks, small_picture
from monai_synth.evaluate.memorization_search import Whitening
from monai_synth.evaluate.similarity import WINDOW, ssim

REACH = 16  # the largest shift is a 16th of the shorter side


def reach_of(size: Sequence[int]) -> int:
    """Largest shift in pixels of images (H, W)."""
    return max(1, round(min(size) / REACH))


def align(query: np.ndarray, reference: np.ndarray, start: Sequence[int], reach: int, slack: int) -> tuple[int, int]:
    """Shift (rows, columns) by which the query's window must move to lie on the reference, at most ``reach``.

    Args:
        query: ranks (H, W), in its pose.
        reference: ranks (H, W).
        start: shift near which it lies.
        reach: largest shift.
        slack: how far from ``start`` it may be.
    """
    spectra = [fft.rfft2(_edges(x)) for x in (query, reference)]
    agreement = fft.irfft2(spectra[0] * np.conj(spectra[1]), s=query.shape)  # [d] = sum_x q[x + d] r[x]
    rows, columns = (
        np.arange(max(-reach, int(s) - slack), min(reach, int(s) + slack) + 1) for s in (start[0], start[1])
    )
    if not len(rows) or not len(columns):
        return 0, 0
    part = agreement[np.ix_(rows % query.shape[0], columns % query.shape[1])]
    r, c = np.unravel_index(part.argmax(), part.shape)
    return int(rows[r]), int(columns[c])


def _edges(x: np.ndarray) -> np.ndarray:
    """The image without its slow parts, fading out at the border, where a cyclic shift has a seam."""
    box = max(3, min(x.shape) // 5)
    detail = x - ndimage.uniform_filter(x, box, mode="nearest")
    return detail * np.outer(*(np.hanning(n + 2)[1:-1] ** 0.25 for n in x.shape)).astype(np.float32)


def overlap(
    query: np.ndarray, reference: np.ndarray, shift: Sequence[int], reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """The parts (H - 2 reach, W - 2 reach) of both that are compared."""
    h, w = reference.shape[-2:]
    dy, dx = shift
    return (
        query[..., reach + dy : h - reach + dy, reach + dx : w - reach + dx],
        reference[..., reach : h - reach, reach : w - reach],
    )


def similarity_of(query: np.ndarray, reference: np.ndarray, shift: Sequence[int], reach: int) -> float:
    """SSIM of the ranks of two grey images where they overlap; uint8 (H, W), the query in its pose."""
    pair = overlap(query, reference, shift, reach)
    if min(pair[0].shape) < WINDOW:
        return float("nan")
    x, y = (torch.from_numpy(ranks(np.ascontiguousarray(part)))[None, None] for part in pair)
    return float(ssim(x, y))


def feature_similarity(query: np.ndarray, target: np.ndarray, shift: Sequence[int], whitening: Whitening) -> float:
    """Whitened cosine of small pictures of images that lie on each other to the pixel; -1 to 1.

    Args:
        query: uint8 (H, W), in its pose.
        target: of the reference's small picture, see `Whitening.centres`.
        shift: of the query.
        whitening: of small pictures.
    """
    picture = small_picture(_moved(query, shift)[None], whitening.side)
    return float(whitening.centres(picture[None, None])[0] @ target)


def _moved(query: np.ndarray, shift: Sequence[int]) -> np.ndarray:
    """The query shifted, with its border repeated where nothing is known; the windows of small pictures end before."""
    h, w = query.shape
    rows = np.clip(np.arange(h) + shift[0], 0, h - 1)
    columns = np.clip(np.arange(w) + shift[1], 0, w - 1)
    return query.take(rows, axis=0).take(columns, axis=1)


def score_pair(
    query: np.ndarray,
    reference: np.ndarray,
    target: np.ndarray,
    *,
    pose: int,
    shift: Sequence[float],
    size: Sequence[int],
    whitening: Whitening,
) -> dict[str, float | list[int]]:
    """All scores of a query and one candidate.

    Args:
        query: uint8 (C, H, W).
        reference: uint8 (C, H, W).
        target: vector of its small picture.
        pose: that the query is brought to.
        shift: of the candidate, in pixels of small pictures.
        size: (H, W).
        whitening: of small pictures.

    Returns:
        ``ssim``, ``features`` and the ``shift`` to the pixel.
    """
    a, b = posed(grey(query), pose), grey(reference)
    reach = reach_of(size)
    cell = [n / whitening.side for n in size]
    start = [round(s * c) for s, c in zip(shift, cell, strict=True)]
    slack = max(2, int(np.ceil(1.5 * max(cell))))
    found = [align(ranks(a), ranks(b), start, reach, slack), (0, 0)]
    features, at = max((feature_similarity(a, target, at, whitening), at) for at in set(found))
    return {"ssim": similarity_of(a, b, at, reach), "features": features, "shift": list(at)}

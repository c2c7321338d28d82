# SPDX-License-Identifier: Apache-2.0
"""Lungs in thorax CT: K-means, erosion and dilation, marching squares (LSDM thesis, Sec 4.3).

The slice decides where the boundary runs. Whether a dark region is lung at all cannot always be told from
one slice (bowel with gas looks alike), so a coarse look at the whole scan can be given to decide that.

The pixels that marching squares enclose at a level are exactly those below the level, so no contour is
traced: the field that would be contoured is compared with the level instead, which gives the same mask many
times faster.

Lengths and areas are in mm, so that all fields of view are treated alike.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

HU_MIN = -1024
_TISSUE_HU = -400.0
_MIN_AREA = 40.0  # mm^2
_MAX_HOLE_AREA = 350.0  # mm^2: vessels, not the heart between the lungs nor the dome of the liver below them
_LARGE_AREA = 2500.0  # mm^2
_AIR_HU, _AIR_HU_LARGE = -930.0, -965.0  # airways and bowel gas; emphysema is lung all the same
_COARSE_MM = 2.8
_MIN_SHARE = 0.06  # of the largest lung's volume


def two_means_threshold(values: np.ndarray, start: tuple[float, float] = (-850.0, 50.0)) -> float:
    """Threshold between two clusters of HU by K-means (k = 2), deterministic by its fixed starting centres.

    It works on a histogram of 4 HU per bin, which is exact enough and independent of the number of pixels.

    Args:
        values: HU of any shape, at least one.
        start: starting centres in HU.

    Returns:
        Midpoint of the final centres in HU.
    """
    counts, edges = np.histogram(np.clip(values, HU_MIN, 400), bins=(400 - HU_MIN) // 4, range=(HU_MIN, 400))
    middles = (edges[:-1] + edges[1:]) / 2
    low, high = start
    for _ in range(50):
        below = middles < (low + high) / 2
        num_low, num_high = counts[below].sum(), counts[~below].sum()
        new = (
            float((counts * middles)[below].sum() / num_low) if num_low else low,
            float((counts * middles)[~below].sum() / num_high) if num_high else high,
        )
        if new == (low, high):
            break
        low, high = new
    return (low + high) / 2


def body_mask(image_hu: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """The patient with everything inside, without the air around and the table.

    It is the largest piece of tissue after an opening, its holes filled. Where the field of view cuts the
    patient open, the lung would be no hole; so each side of the image counts as tissue between its outermost
    tissue pixels.

    Args:
        image_hu: HU, shape (H, W).
        spacing: (row, column) spacing in mm.

    Returns:
        Boolean image (H, W).
    """
    tissue = _opened(image_hu > _TISSUE_HU, 2.5 / min(spacing))
    pieces, num = ndimage.label(tissue)
    if num == 0:
        return np.zeros(image_hu.shape, bool)
    framed = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    for side in (framed[0], framed[-1], framed[:, 0], framed[:, -1]):
        where = np.flatnonzero(side)
        if len(where):
            side[where[0] : where[-1] + 1] = True
    return ndimage.binary_fill_holes(framed)


class LungPrior:
    """Where in a scan the lungs are, at about 3 mm.

    A coarse voxel is airy where all its pixels are. Of the airy pieces inside the body, in three dimensions,
    the largest and those with at least 6 % of its volume are lungs; the trachea and bowel gas are pieces of
    their own.

    Args:
        slices: slices in HU in order of position, each (H, W); they are taken one after the other.
        spacing: (slice, row, column) spacing in mm.
    """

    def __init__(self, slices: Iterable[np.ndarray], spacing: tuple[float, float, float]) -> None:
        self.factor = max(round(_COARSE_MM / min(spacing[1:])), 1)
        coarse_spacing = (spacing[1] * self.factor, spacing[2] * self.factor)
        airy = []
        for image_hu in slices:
            blocks = self._blocks(image_hu)
            body = body_mask(blocks.mean((1, 3)), coarse_spacing)
            airy.append((blocks.max((1, 3)) < _TISSUE_HU) & ndimage.binary_erosion(body))
        pieces, num = ndimage.label(np.stack(airy))
        volumes = np.bincount(pieces.ravel(), minlength=num + 1)
        volumes[0] = 0
        self.lungs = ((volumes >= _MIN_SHARE * volumes.max()) & (volumes > 0))[pieces]

    def _blocks(self, image_hu: np.ndarray) -> np.ndarray:
        f = self.factor
        padded = np.pad(image_hu, [(0, -n % f) for n in image_hu.shape], mode="edge")
        return padded.reshape(padded.shape[0] // f, f, padded.shape[1] // f, f)

    def on_slice(self, z: int, shape: tuple[int, int]) -> np.ndarray:
        """Boolean image of a slice: lungs there or in a neighbouring slice."""
        near = self.lungs[max(z - 1, 0) : z + 2].any(0)
        return near.repeat(self.factor, 0).repeat(self.factor, 1)[: shape[0], : shape[1]]


def lung_mask(image_hu: np.ndarray, spacing: tuple[float, float], prior: np.ndarray | None = None) -> np.ndarray:
    """Lungs of an axial slice; empty where there are none.

    K-means separates air from tissue inside the body, erosion and dilation part the airways from the lung,
    pieces that are too small, too airy or not where the ``prior`` has lungs are dropped, vessels are filled
    and the boundary follows the image at the level between the two clusters.

    Args:
        image_hu: HU, shape (H, W), padding at -1024.
        spacing: (row, column) spacing in mm.
        prior: boolean image (H, W), see :meth:`LungPrior.on_slice`; None leaves it to the slice alone.

    Returns:
        Boolean image (H, W).
    """
    image_hu = np.maximum(np.asarray(image_hu, np.float32), HU_MIN)
    lungs = np.zeros(image_hu.shape, bool)
    body = body_mask(image_hu, spacing)
    if not body.any():
        return lungs
    # A slice with hardly any lung would make K-means split fat from muscle, so the threshold keeps to the
    # usual range.
    threshold = float(np.clip(two_means_threshold(image_hu[body]), -600.0, -350.0))
    airy = (ndimage.gaussian_filter(image_hu, 0.5) < threshold) & body
    if not airy.any():
        return lungs
    rows, cols = (np.flatnonzero(airy.any(axis)) for axis in (1, 0))
    margin = int(8.0 / min(spacing)) + 2
    box = tuple(slice(max(int(w[0]) - margin, 0), int(w[-1]) + margin + 1) for w in (rows, cols))
    image_hu, body, airy = image_hu[box], body[box], airy[box]
    kept = _lung_pieces(image_hu, airy, spacing, None if prior is None else prior[box])
    if kept.any():
        lungs[box] = _precise(image_hu, body, airy, kept, threshold, spacing)
    return lungs


def _lung_pieces(
    image_hu: np.ndarray, airy: np.ndarray, spacing: tuple[float, float], prior: np.ndarray | None
) -> np.ndarray:
    pixel = spacing[0] * spacing[1]
    core = _opened(airy, 1.0 / min(spacing))
    pieces, num = ndimage.label(core)
    kept = np.zeros(num + 1, bool)
    inner = ndimage.binary_erosion(core)
    for index, where in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[where] == index
        area = piece.sum() * pixel
        middle = piece & inner[where]
        median = np.median(image_hu[where][middle if middle.any() else piece])
        in_lungs = prior is None or bool((prior[where] & piece).any())
        kept[index] = area >= _MIN_AREA and in_lungs and median > (_AIR_HU if area < _LARGE_AREA else _AIR_HU_LARGE)
    return kept[pieces]


def _precise(
    image_hu: np.ndarray,
    body: np.ndarray,
    airy: np.ndarray,
    kept: np.ndarray,
    threshold: float,
    spacing: tuple[float, float],
) -> np.ndarray:
    """Lungs with their vessels, bounded where the smoothed image crosses the threshold."""
    near = _dilated(kept, 1.5 / min(spacing)) & airy
    near |= _specks(image_hu, airy & ~near, _dilated(kept, 4.0 / min(spacing)), spacing)
    closed = _closed(near, 3.0 / min(spacing)) & body
    filled = _holes_filled(closed, _MAX_HOLE_AREA / (spacing[0] * spacing[1]))
    smooth = ndimage.gaussian_filter(image_hu, 0.7)
    # Within the lung all is lung whatever its HU, what was dropped is none; between them the image decides.
    field = np.where(filled | ~airy, smooth, threshold + 300)
    field[_eroded(filled, 1.5) | (filled & ~near)] = threshold - 300
    return (field < threshold) & _dilated(filled, 1.5)


def _specks(image_hu: np.ndarray, rest: np.ndarray, close: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Small bits close to the lung that are no air, such as lung between a nodule and the chest wall."""
    pieces, num = ndimage.label(rest)
    index = np.arange(num + 1)
    small = np.bincount(pieces.ravel(), minlength=num + 1) * spacing[0] * spacing[1] < _MIN_AREA
    mean = ndimage.mean(image_hu, pieces, index) if num else np.zeros(1)
    kept = small & (mean > -900.0) & (np.bincount(pieces[close], minlength=num + 1) > 0)
    kept[0] = False
    return kept[pieces]


def _holes_filled(mask: np.ndarray, max_pixels: float) -> np.ndarray:
    holes, num = ndimage.label(~mask)
    fill = np.bincount(holes.ravel(), minlength=num + 1) <= max_pixels
    for side in (holes[0], holes[-1], holes[:, 0], holes[:, -1]):
        fill[side] = False
    fill[0] = True
    return fill[holes]


# Disks by distance transform: as fast for large radii as for small ones. Beyond the image is as at its
# border.
def _dilated(mask: np.ndarray, radius: float) -> np.ndarray:
    return ndimage.distance_transform_edt(~mask) <= radius if mask.any() else mask


def _eroded(mask: np.ndarray, radius: float) -> np.ndarray:
    return mask if mask.all() else ndimage.distance_transform_edt(mask) > radius


def _opened(mask: np.ndarray, radius: float) -> np.ndarray:
    return _dilated(_eroded(mask, radius), radius)


def _closed(mask: np.ndarray, radius: float) -> np.ndarray:
    return _eroded(_dilated(mask, radius), radius) | mask

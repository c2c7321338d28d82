# SPDX-License-Identifier: Apache-2.0
"""Semantic maps of thorax CT slices with the eight labels of the LSDM thesis (Sec 4.3), and its intensity window.

Everything works on one axial slice. Where the thesis leaves a choice open, this is what is done:

* HU bands outside the lung: [-400, 0) body, [0, 200) soft tissue, 200 and more high-dense, below -400 background. The
  lung overrides the bands and nodules override all.
* Air that is not lung - around the patient, in the trachea and main bronchi, in stomach and bowel - is background.
* Vessels inside the lung belong to the lung; the heart never does, not even where both lungs meet in front of it.
* Table, blanket and wires are kept: they are in the image, so the bands name them.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from skimage.draw import polygon
from skimage.measure import find_contours

LABELS: dict[str, int] = {
    "background": 0,
    "body": 1,
    "soft_tissue": 2,
    "high_dense": 3,
    "lung": 4,
    "nodule_benign": 5,
    "nodule_indeterminate": 6,
    "nodule_malignant": 7,
}

FEATURES: tuple[str, ...] = (
    "subtlety",
    "internal_structure",
    "calcification",
    "sphericity",
    "margin",
    "lobulation",
    "spiculation",
    "texture",
    "malignancy",
)

HU_MIN, HU_MAX = -1024, 800
HU_BANDS = ((-400, "body"), (0, "soft_tissue"), (200, "high_dense"))

# Areas in mm^2 and lengths in mm, so that fields of view of any size are treated alike.
_MIN_LUNG_AREA = 60.0
_MAX_HOLE_AREA = 1500.0
_SMALL_AREA = 2500.0
_AIR_HU, _AIR_HU_LARGE = -930.0, -965.0


def window_to_uint8(image_hu: np.ndarray) -> np.ndarray:
    """HU clipped to [-1024, 800] and mapped linearly to integers 0...255 (thesis, Sec 4.1)."""
    scaled = (np.clip(image_hu, HU_MIN, HU_MAX).astype(np.float32) - HU_MIN) * (255.0 / (HU_MAX - HU_MIN))
    return np.rint(scaled).astype(np.uint8)


def uint8_to_hu(image: np.ndarray) -> np.ndarray:
    """HU at the middle of each of the 256 steps of :func:`window_to_uint8`, float32; exact to half a step (3.6 HU)."""
    return np.asarray(image, np.float32) * ((HU_MAX - HU_MIN) / 255.0) + HU_MIN


def two_means_threshold(values: np.ndarray, start: tuple[float, float] = (-850.0, 50.0)) -> float:
    """Threshold between two clusters of HU by K-means (k = 2) from fixed starting centres, so it is deterministic.

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
        threshold = (low + high) / 2
        below = middles < threshold
        n_low, n_high = counts[below].sum(), counts[~below].sum()
        new = (
            float((counts * middles)[below].sum() / n_low) if n_low else low,
            float((counts * middles)[~below].sum() / n_high) if n_high else high,
        )
        if new == (low, high):
            break
        low, high = new
    return (low + high) / 2


def body_mask(image_hu: np.ndarray, spacing: tuple[float, float] = (0.7, 0.7)) -> np.ndarray:
    """The patient without the air around and the table: tissue opened, its largest piece, holes filled.

    Where the field of view cuts the patient open, the lung would not be a hole any more; so the border of the image
    counts as tissue between the outermost tissue pixels of each side.
    """
    radius = 2.5 / min(spacing)
    tissue = _opened(image_hu > -400, radius)
    pieces, num = ndimage.label(tissue)
    if num == 0:
        return np.zeros(image_hu.shape, bool)
    body = pieces == 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    framed = body.copy()
    for edge, line in (
        (framed[0], body[0]),
        (framed[-1], body[-1]),
        (framed[:, 0], body[:, 0]),
        (framed[:, -1], body[:, -1]),
    ):
        where = np.flatnonzero(line)
        if len(where):
            edge[where[0] : where[-1] + 1] = True
    return ndimage.binary_fill_holes(framed)


def lung_mask(image_hu: np.ndarray, spacing: tuple[float, float] = (0.7, 0.7)) -> np.ndarray:
    """Lung of an axial slice (thesis, Sec 4.3); empty where there is none.

    K-means separates air from tissue inside the body, erosion and dilation part the airways from the lung, pieces that
    are too small or too airy (trachea, stomach, bowel) are dropped, and marching squares draw the boundary that is
    filled.

    Args:
        image_hu: slice in HU, shape (H, W); padding is expected at -1024.
        spacing: (row, column) spacing in mm.

    Returns:
        Boolean image (H, W).
    """
    image_hu = np.maximum(np.asarray(image_hu, np.float32), HU_MIN)
    pixel = float(spacing[0] * spacing[1])
    body = body_mask(image_hu, spacing)
    if not body.any():
        return np.zeros(image_hu.shape, bool)
    # Slices with hardly any lung would let K-means split fat from muscle: then the threshold keeps to the usual range.
    threshold = float(np.clip(two_means_threshold(image_hu[body]), -600.0, -350.0))
    smooth = ndimage.gaussian_filter(image_hu, 0.5)
    airy = (smooth < threshold) & body
    core = _opened(airy, 1.0 / min(spacing))
    pieces, num = ndimage.label(core)
    kept = np.zeros(image_hu.shape, bool)
    inner = ndimage.binary_erosion(core)
    for index, box in enumerate(ndimage.find_objects(pieces), 1):
        piece = pieces[box] == index
        area = piece.sum() * pixel
        values = image_hu[box][piece & inner[box]]
        median = float(np.median(values)) if len(values) else float(np.median(image_hu[box][piece]))
        limit = _AIR_HU if area < _SMALL_AREA else _AIR_HU_LARGE
        if area >= _MIN_LUNG_AREA and median > limit:
            kept[box] |= piece
    if not kept.any():
        return kept
    near = _dilated(kept, 2.0 / min(spacing)) & airy
    closed = _closed(near, 3.0 / min(spacing)) & body
    filled = _holes_filled(closed, _MAX_HOLE_AREA / pixel)
    # Field for marching squares: the image itself at the boundary, plainly lung where a vessel was filled.
    inside = ndimage.binary_erosion(filled)
    field = np.where(
        near, np.minimum(smooth, threshold - 1), np.where(inside | (filled & ~airy), threshold - 100, 100)
    )
    field = np.where(filled, field, np.maximum(smooth, threshold + 100))
    return _filled_contours(field.astype(np.float32), threshold)


def semantic_map(
    image_hu: np.ndarray, nodule_label: np.ndarray | None = None, spacing: tuple[float, float] = (0.7, 0.7)
) -> np.ndarray:
    """Label map of a slice (thesis, Sec 4.3; bands as resolved in this module's docstring).

    Args:
        image_hu: slice in HU, shape (H, W).
        nodule_label: 0 or a nodule label (5, 6, 7) per pixel, shape (H, W); None for a slice without nodules.
        spacing: (row, column) spacing in mm.

    Returns:
        uint8 image (H, W) with the values of :data:`LABELS`.

    Raises:
        ValueError: shapes differ, or a nodule label is none of 0, 5, 6, 7.
    """
    label = np.zeros(image_hu.shape, np.uint8)
    for low, name in HU_BANDS:
        label[image_hu >= low] = LABELS[name]
    label[lung_mask(image_hu, spacing)] = LABELS["lung"]
    if nodule_label is not None:
        if nodule_label.shape != image_hu.shape:
            raise ValueError(
                f"nodule_label has shape {nodule_label.shape}, the image {image_hu.shape}; give equal shapes"
            )
        wrong = set(np.unique(nodule_label).tolist()) - {0, 5, 6, 7}
        if wrong:
            raise ValueError(f"nodule_label holds {sorted(wrong)}; allowed are 0, 5, 6 and 7 (see LABELS)")
        label = np.where(nodule_label > 0, nodule_label, label).astype(np.uint8)
    return label


def _filled_contours(field: np.ndarray, level: float) -> np.ndarray:
    padded = np.pad(field, 1, constant_values=level + 1000)
    inside = np.zeros(padded.shape, bool)
    for line in find_contours(padded, level, positive_orientation="low"):
        rows, cols = polygon(line[:, 0], line[:, 1], padded.shape)
        # Contours around low values run one way, those around holes the other; a hole in the lung is removed again.
        area = np.sum(line[:-1, 1] * line[1:, 0] - line[1:, 1] * line[:-1, 0])
        inside[rows, cols] ^= True if area else False
    return inside[1:-1, 1:-1]


def _holes_filled(mask: np.ndarray, max_pixels: float) -> np.ndarray:
    holes, num = ndimage.label(~mask)
    if num == 0:
        return mask
    sizes = np.bincount(holes.ravel())
    fill = sizes <= max_pixels
    fill[0] = True
    fill[np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))] = False
    fill[0] = True
    return fill[holes]


# Balls by distance transform: as fast for large radii as for small ones.
def _dilated(mask: np.ndarray, radius: float) -> np.ndarray:
    return ndimage.distance_transform_edt(~mask) <= radius if mask.any() else mask


def _eroded(mask: np.ndarray, radius: float) -> np.ndarray:
    return ndimage.distance_transform_edt(np.pad(mask, 1, constant_values=True))[1:-1, 1:-1] > radius


def _opened(mask: np.ndarray, radius: float) -> np.ndarray:
    return _dilated(_eroded(mask, radius), radius) if not mask.all() else mask


def _closed(mask: np.ndarray, radius: float) -> np.ndarray:
    return _eroded(_dilated(mask, radius), radius) | mask

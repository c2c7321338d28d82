# SPDX-License-Identifier: Apache-2.0
"""Semantic maps of thorax CT slices with the eight labels of the LSDM thesis (Sec 4.3), and its HU window.

Where the thesis leaves a choice open, this is what is done:

* HU bands outside the lung: [-400, 0) body, [0, 200) soft tissue, 200 and more high-dense, below -400
  background. The lung overrides the bands and nodules override all.
* Air that is not lung - around the patient, in the trachea, in stomach and bowel - is background; so are the
  main bronchi until they open into the lung in that slice.
* Vessels inside the lung belong to the lung; the heart and the dome of the liver do not.
* Specks of background of at most 4 mm^2, which partial volume leaves along the pleura, are body.
* The table and wires stay: they are in the image, so the bands name them.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from monai_synth.data.lungs import HU_MIN, lung_mask

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

MALIGNANCY = "malignancy"  # the one feature that is classified, as benign or malignant; the others are rated 1 to 5
# those whose classifiers the thesis finds to converge (Sec 4.2), and guides by
GUIDING_FEATURES: tuple[str, ...] = (MALIGNANCY, "lobulation", "spiculation", "texture")

HU_MAX = 800
HU_BANDS = ((-400, "body"), (0, "soft_tissue"), (200, "high_dense"))
_SPECK_AREA = 4.0  # mm^2
NODULE_LABELS = frozenset(LABELS[name] for name in ("nodule_benign", "nodule_indeterminate", "nodule_malignant"))


def window_to_uint8(image_hu: np.ndarray) -> np.ndarray:
    """HU clipped to [-1024, 800] and mapped linearly to integers 0...255 (LSDM thesis, Sec 4.1)."""
    scaled = (np.clip(image_hu, HU_MIN, HU_MAX).astype(np.float32) - HU_MIN) * (255.0 / (HU_MAX - HU_MIN))
    return np.rint(scaled).astype(np.uint8)


def uint8_to_hu(image: np.ndarray) -> np.ndarray:
    """HU of the 256 steps of :func:`window_to_uint8`, float32; exact to half a step (3.6 HU)."""
    return np.asarray(image, np.float32) * ((HU_MAX - HU_MIN) / 255.0) + HU_MIN


def semantic_map(
    image_hu: np.ndarray,
    nodule_label: np.ndarray | None = None,
    spacing: tuple[float, float] = (0.7, 0.7),
    *,
    prior: np.ndarray | None = None,
) -> np.ndarray:
    """Label map of an axial slice.

    Args:
        image_hu: HU, shape (H, W), padding at -1024.
        nodule_label: 0 or a nodule label (5, 6, 7) per pixel, shape (H, W); None where there is no nodule.
        spacing: (row, column) spacing in mm.
        prior: where the whole scan has lungs, see :meth:`monai_synth.data.lungs.LungPrior.on_slice`.

    Returns:
        uint8 image (H, W) with the values of :data:`LABELS`.

    Raises:
        ValueError: shapes differ, or a nodule label is none of 0, 5, 6, 7.
    """
    label = np.zeros(image_hu.shape, np.uint8)
    for low, name in HU_BANDS:
        label[image_hu >= low] = LABELS[name]
    label[lung_mask(image_hu, spacing, prior)] = LABELS["lung"]
    label[_specks(label == LABELS["background"], _SPECK_AREA / (spacing[0] * spacing[1]))] = LABELS["body"]
    if nodule_label is None:
        return label
    if nodule_label.shape != image_hu.shape:
        msg = f"nodule_label has shape {nodule_label.shape}, the image {image_hu.shape}; give equal shapes"
        raise ValueError(msg)
    wrong = set(np.unique(nodule_label).tolist()) - NODULE_LABELS - {0}
    if wrong:
        raise ValueError(f"nodule_label holds {sorted(wrong)}; allowed are 0, 5, 6 and 7 (see LABELS)")
    return np.where(nodule_label > 0, nodule_label, label).astype(np.uint8)


def _specks(mask: np.ndarray, max_pixels: float) -> np.ndarray:
    """Pieces of a mask of at most ``max_pixels`` (and of single pixels) that do not touch the border."""
    pieces, num = ndimage.label(mask)
    small = np.bincount(pieces.ravel(), minlength=num + 1) <= max(max_pixels, 1)
    for side in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        small[side] = False
    small[0] = False
    return small[pieces]

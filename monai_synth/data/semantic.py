# SPDX-License-Identifier: Apache-2.0
"""Semantic maps of thorax CT slices with the eight labels of the LSDM thesis (Sec 4.3)."""

from __future__ import annotations

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

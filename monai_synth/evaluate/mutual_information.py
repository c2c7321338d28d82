# SPDX-License-Identifier: Apache-2.0
"""Mutual information of two label maps, and the nearest of many by it (JDM thesis, Eq 5.1).

It is a sum over the joint histogram of the labels at equal pixels: 0 for independent maps, the entropy of a map with
itself. It does not see the names of labels: a mask and its negative have the mutual information of equal masks.
"""

from __future__ import annotations

import numpy as np

from monai_synth.errors import UserError

BLOCK_BYTES = 2**28  # memory for the one-hot maps of the references that are compared at once


def mutual_information(a: np.ndarray, b: np.ndarray, num_labels: int) -> float:
    """MI(a, b) in nats (Eq 5.1).

    Args:
        a: integers 0 to num_labels - 1, any shape.
        b: integers of the same shape.
        num_labels: K.

    Raises:
        UserError: shapes differ, or a value is no label.
    """
    return float(_pairwise(np.asarray(a)[None], np.asarray(b)[None], num_labels)[0, 0])


def nearest_by_mutual_information(
    queries: np.ndarray, references: np.ndarray, num_labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each query the reference of the highest mutual information; the first of equal ones.

    Args:
        queries: integers (N, *S), 0 to num_labels - 1.
        references: integers (M, *S), M at least 1.
        num_labels: K.

    Returns:
        Index of the reference (N,) and the mutual information in nats (N,).

    Raises:
        UserError: shapes differ, a value is no label, or there is no reference.
    """
    if not len(references):
        raise UserError("there is no label map to compare with; give a dataset whose training split has cases")
    queries, references = np.asarray(queries), np.asarray(references)
    step = max(1, BLOCK_BYTES // (4 * num_labels * max(1, references[0].size)))
    blocks = [_pairwise(queries, references[i : i + step], num_labels) for i in range(0, len(references), step)]
    information = np.concatenate(blocks, axis=1)
    index = information.argmax(axis=1)
    return index, np.take_along_axis(information, index[:, None], axis=1)[:, 0]


def _pairwise(a: np.ndarray, b: np.ndarray, num_labels: int) -> np.ndarray:
    """MI of every map of a (N, *S) with every map of b (M, *S), (N, M)."""
    if a.shape[1:] != b.shape[1:]:
        raise UserError(f"label maps have shapes {a.shape[1:]} and {b.shape[1:]}; resize them to one size first")
    for maps in (a, b):
        if maps.size and (maps.min() < 0 or maps.max() >= num_labels):
            raise UserError(f"label maps have values {maps.min()} to {maps.max()}, allowed are 0 to {num_labels - 1}")
    num_pixels = a[0].size if len(a) else 1
    # float32 counts whole numbers up to 2**24 exactly, as many pixels as a 256^3 volume has
    kind = np.float32 if num_pixels <= 2**24 else np.float64
    a_hot = [(a == k).reshape(len(a), -1).astype(kind) for k in range(num_labels)]
    b_hot = [(b == k).reshape(len(b), -1).astype(kind) for k in range(num_labels)]
    a_share = [hot.mean(axis=1, dtype=np.float64) for hot in a_hot]
    b_share = [hot.mean(axis=1, dtype=np.float64) for hot in b_hot]
    out = np.zeros((len(a), len(b)))
    for i in range(num_labels):
        for j in range(num_labels):
            joint = (a_hot[i] @ b_hot[j].T).astype(np.float64) / num_pixels
            there = joint > 0  # 0 log 0 = 0
            independent = np.outer(a_share[i], b_share[j])
            out[there] += joint[there] * np.log(joint[there] / independent[there])
    return np.maximum(out, 0.0)

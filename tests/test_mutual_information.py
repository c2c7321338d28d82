# SPDX-License-Identifier: Apache-2.0
"""Mutual information of label maps against scikit-learn's, closed forms, and a planted neighbour."""

from __future__ import annotations

import numpy as np
import pytest

from monai_synth.errors import UserError
from monai_synth.evaluate import mutual_information as module
from monai_synth.evaluate.mutual_information import mutual_information, nearest_by_mutual_information


def smooth_maps(rng: np.random.Generator, count: int, num_labels: int, size: int = 32) -> np.ndarray:
    coarse = rng.integers(0, num_labels, (count, size // 8, size // 8))
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_it_agrees_with_scikit_learn(num_labels: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(num_labels)
    queries, references = smooth_maps(rng, 4, num_labels), rng.integers(0, num_labels, (5, 32, 32))
    references[0] = 0  # a map of one label
    for q in queries:
        expected = [metrics.mutual_info_score(q.ravel(), r.ravel()) for r in references]
        got = [mutual_information(q, r, num_labels) for r in references]
        np.testing.assert_allclose(got, expected, atol=1e-10)
        index, value = nearest_by_mutual_information(q[None], references, num_labels)
        assert index[0] == np.argmax(expected)
        np.testing.assert_allclose(value[0], max(expected), atol=1e-10)


def test_a_map_with_itself_has_its_entropy_and_with_a_constant_nothing() -> None:
    half = np.zeros((4, 4), int)
    half[:2] = 1
    assert mutual_information(half, half, 2) == pytest.approx(np.log(2))
    assert mutual_information(half, 1 - half, 2) == pytest.approx(np.log(2))
    assert mutual_information(half, np.ones((4, 4), int), 2) == 0.0
    assert mutual_information(half, half.T, 2) == pytest.approx(0.0, abs=1e-12)


def test_a_planted_neighbour_is_found_also_when_some_of_its_pixels_differ() -> None:
    rng = np.random.default_rng(0)
    references = smooth_maps(rng, 60, 4)
    planted = rng.permutation(60)[:10]
    queries = references[planted].copy()
    noise = rng.random(queries.shape) < 0.2
    queries[noise] = rng.integers(0, 4, noise.sum())
    index, value = nearest_by_mutual_information(queries, references, 4)
    np.testing.assert_array_equal(index, planted)
    assert value.min() > 0.4


def test_references_in_blocks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    queries, references = smooth_maps(rng, 3, 3), smooth_maps(rng, 20, 3)
    whole = nearest_by_mutual_information(queries, references, 3)
    monkeypatch.setattr(module, "BLOCK_BYTES", 7 * 4 * 3 * 32 * 32)
    for got, expected in zip(nearest_by_mutual_information(queries, references, 3), whole, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_volumes_are_compared_voxel_by_voxel() -> None:
    rng = np.random.default_rng(1)
    references = rng.integers(0, 2, (3, 4, 5, 6))
    index, value = nearest_by_mutual_information(references[[2]], references, 2)
    assert index.tolist() == [2]
    assert value[0] == pytest.approx(mutual_information(references[2].ravel(), references[2].ravel(), 2))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 4, 4), int), np.zeros((1, 4, 5), int), "resize them to one size"),
        (np.full((1, 4, 4), 2), np.zeros((1, 4, 4), int), "allowed are 0 to 1"),
        (np.zeros((1, 4, 4), int), np.full((1, 4, 4), -1), "allowed are 0 to 1"),
        (np.zeros((1, 4, 4), int), np.zeros((0, 4, 4), int), "no label map to compare with"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nearest_by_mutual_information(a, b, 2)

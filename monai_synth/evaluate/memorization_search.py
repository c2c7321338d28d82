# SPDX-License-Identifier: Apache-2.0
"""The coarse search: candidates for the nearest of many pictures, over poses and small shifts, by matrix products.

Pictures of one kind have much in common: every chest X-ray has lungs. Cosines are therefore taken after whitening by
the training pictures, which weighs down what all share. Chunks bound the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from monai_synth.evaluate.memorization_pictures import posed

_RIDGE = 0.3  # of the mean kept variance, added to every variance: directions that hardly vary are mostly noise
_SAMPLES = 4000  # windows from which a whitening is learnt
_VALUES = 2**25  # float32 values of cosines at once: 128 MiB


@dataclass(frozen=True)
class Whitening:
    """Windows of small pictures as unit vectors in which directions that all pictures share count less.

    Attributes:
        channels: of the pictures.
        side: rows and columns of a picture.
        margin: pixels at each border that a window leaves free: the largest shift.
        mean: (D,) of unit windows.
        matrix: (D, K).
    """

    channels: int
    side: int
    margin: int
    mean: np.ndarray
    matrix: np.ndarray

    @property
    def shifts(self) -> tuple[tuple[int, int], ...]:
        """Shifts (rows, columns) of `windows`, in its order."""
        span = range(-self.margin, self.margin + 1)
        return tuple((dy, dx) for dy in span for dx in span)

    def windows(self, pictures: np.ndarray) -> np.ndarray:
        """Vectors of pictures at every shift: (N, C, S, S) -> unit (N, shifts, K)."""
        inner = self.side - 2 * self.margin
        m = self.margin
        cut = [pictures[..., m + dy : m + dy + inner, m + dx : m + dx + inner] for dy, dx in self.shifts]
        stack = np.stack([c.reshape(len(pictures), -1) for c in cut], axis=1)
        return self.project(stack)

    def centres(self, pictures: np.ndarray) -> np.ndarray:
        """Vectors of pictures without a shift: (N, C, S, S) -> unit (N, K)."""
        m, end = self.margin, self.side - self.margin
        return self.project(pictures[..., m:end, m:end].reshape(len(pictures), -1))

    def project(self, windows: np.ndarray) -> np.ndarray:
        """Flat windows (..., D) -> unit (..., K)."""
        return _unit((_unit(windows - windows.mean(-1, keepdims=True)) - self.mean) @ self.matrix)


def learn_whitening(
    pictures: np.ndarray, *, margin: int, components: int, poses: Sequence[int], seed: int
) -> Whitening:
    """Whitening from pictures in random poses and at random shifts.

    Args:
        pictures: of the training set, (N, C, S, S).
        margin: largest shift in pixels of the pictures.
        components: K at most.
        poses: that images may have.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    num, channels, side = pictures.shape[:3]
    inner = side - 2 * margin
    span = 2 * margin + 1
    total = min(_SAMPLES, num * len(poses) * span * span)
    rows = []
    for index in rng.permutation(np.arange(total) % num):
        dy, dx = rng.integers(0, span, 2)
        picture = posed(pictures[index], int(rng.choice(poses)))
        rows.append(picture[:, dy : dy + inner, dx : dx + inner].ravel())
    windows = np.stack(rows)
    windows = _unit(windows - windows.mean(-1, keepdims=True)).astype(np.float64)
    mean = windows.mean(0)
    variance, vectors = np.linalg.eigh(np.cov(windows - mean, rowvar=False, bias=True))
    keep = np.argsort(variance)[::-1][:components]
    kept = variance[keep].clip(0)
    scale = 1 / np.sqrt(kept + _RIDGE * max(float(kept.mean()), 1e-12))
    matrix = (vectors[:, keep] * scale).astype(np.float32)
    return Whitening(channels, side, margin, mean.astype(np.float32), matrix)


@dataclass(frozen=True)
class Candidates:
    """For each query its K candidates, best first.

    Attributes:
        index: of the reference, (N, K).
        pose: that the query is brought to, (N, K).
        score: cosine, (N, K).
    """

    index: np.ndarray
    pose: np.ndarray
    score: np.ndarray


def coarse_search(
    queries: np.ndarray,
    references: np.ndarray,
    whitening: Whitening,
    *,
    poses: Sequence[int],
    num_candidates: int,
    progress: Callable[[int], object] | None = None,
) -> Candidates:
    """References that resemble each query most, in the pose that resembles most, whatever the shift.

    Args:
        queries: (N, C, S, S).
        references: (M, C, S, S).
        whitening: of S x S pictures.
        poses: to bring queries to.
        num_candidates: K, at most M.
        progress: called with the number of queries that were just done.
    """
    targets = whitening.centres(references).T.copy()  # (K, M)
    num_refs = targets.shape[1]
    top = min(num_candidates, num_refs)
    variants = len(whitening.shifts)
    step = max(1, _VALUES // (variants * num_refs))
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(queries), step):
        chunk = queries[start : start + step]
        best = np.full((len(chunk), num_refs), -2, np.float32)
        best_pose = np.zeros((len(chunk), num_refs), np.int8)
        for pose in poses:
            vectors = whitening.windows(posed(chunk, pose))
            cosines = (vectors.reshape(-1, vectors.shape[-1]) @ targets).reshape(len(chunk), variants, num_refs)
            cosines = cosines.max(axis=1)
            better = cosines > best
            np.copyto(best_pose, pose, where=better)
            np.maximum(best, cosines, out=best)
        chosen = np.argpartition(-best, top - 1, axis=1)[:, :top]
        scores = np.take_along_axis(best, chosen, 1)
        order = np.lexsort((chosen, -scores), axis=1)
        chosen = np.take_along_axis(chosen, order, 1)
        parts.append(
            (chosen, np.take_along_axis(best_pose, chosen, 1).astype(int), np.take_along_axis(scores, order, 1))
        )
        if progress is not None:
            progress(len(chunk))
    return Candidates(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def refine(
    queries: np.ndarray, references: np.ndarray, found: Candidates, whitening: Whitening, *, keep: int
) -> tuple[Candidates, np.ndarray]:
    """Candidates ranked again by larger pictures, in their pose, at their best shift.

    Args:
        queries: (N, C, S, S), larger than those of the search.
        references: (M, C, S, S).
        found: of the search.
        whitening: of these S x S pictures.
        keep: how many to return.

    Returns:
        Candidates, best first, and the shift (rows, columns) of the window in the posed query, (N, keep, 2).
    """
    shifts = np.asarray(whitening.shifts)
    index, pose, score, shift = [], [], [], []
    for i, query in enumerate(queries):
        used, back = np.unique(found.pose[i], return_inverse=True)
        vectors = whitening.windows(np.stack([posed(query, int(p)) for p in used]))[back]  # (K, shifts, D)
        targets = whitening.centres(references[found.index[i]])
        cosines = np.einsum("ksd,kd->ks", vectors, targets)
        at = cosines.argmax(axis=1)
        best = cosines[np.arange(len(at)), at]
        order = np.lexsort((found.index[i], -best))[:keep]
        index.append(found.index[i][order])
        pose.append(found.pose[i][order])
        score.append(best[order])
        shift.append(shifts[at[order]])
    return Candidates(np.stack(index), np.stack(pose), np.stack(score)), np.stack(shift)


def halved(pictures: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels: (N, C, S, S) -> (N, C, S / 2, S / 2)."""
    n, c, s, _ = pictures.shape
    return pictures.reshape(n, c, s // 2, 2, s // 2, 2).mean(axis=(3, 5))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)

# SPDX-License-Identifier: Apache-2.0
"""The nearest training image of every image of a set, from the coarse search to the exact scores.

Synthetic and held-out images go through here in exactly the same way; only so is the one a null for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from monai_synth.data.workers import map_unordered
from monai_synth.evaluate.case_sets import CaseSet
from monai_synth.evaluate.feature_cache import FeatureCache, content_hash
from monai_synth.evaluate.features import Extractor
from monai_synth.evaluate.memorization_pictures import SMALL, poses_of, small_extractor, small_side
from monai_synth.evaluate.memorization_scores import score_pair
from monai_synth.evaluate.memorization_search import (
    Candidates,
    Whitening,
    coarse_search,
    halved,
    learn_whitening,
    refine,
)

_CHUNK = 64  # images of a task of the exact stage
_FEW = 400  # images below which starting processes costs more than it saves


@dataclass(frozen=True)
class SmallSet:
    """A set with what the search needs of it.

    Attributes:
        cases: the set.
        pictures: small pictures, (N, 1, S, S).
        hashes: of the pixels of each image.
    """

    cases: CaseSet
    pictures: np.ndarray
    hashes: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.cases)

    def subset(self, indices: Sequence[int]) -> SmallSet:
        """With these images only."""
        chosen = list(map(int, indices))
        return SmallSet(self.cases.subset(chosen), self.pictures[chosen], tuple(self.hashes[i] for i in chosen))


def read_small(cases: CaseSet, size: tuple[int, int], cache: Path, label: str) -> SmallSet:
    """Small pictures and hashes of all images of a set.

    Args:
        cases: the set.
        size: (H, W) that images are brought to.
        cache: folder of features.
        label: for the progress bar.

    Raises:
        UserError: see `CaseSet.image`.
    """
    store = FeatureCache(cache, small_extractor(size))
    hashes: list[bytes] = []

    def read(i: int) -> np.ndarray:
        image = cases.picture(i, size)
        hashes.append(content_hash(image))
        return image

    side = small_side(size)
    with tqdm(total=len(cases), desc=label, unit="image") as bar:
        flat = store.features([partial(read, i) for i in range(len(cases))], progress=bar.update)
    return SmallSet(cases, flat.reshape(-1, 1, side, side), tuple(hashes))


class ImageSearch:
    """Looks for images in a training set.

    Args:
        train: the set that is searched.
        size: (H, W) of all images.
        seed: of what the whitening is learnt from.
        whitenings: of another search, to compare alike; None learns them from ``train``.
    """

    def __init__(
        self,
        train: SmallSet,
        *,
        size: tuple[int, int],
        seed: int,
        whitenings: tuple[Whitening, Whitening] | None = None,
    ) -> None:
        self.train, self.size, self.poses = train, size, poses_of(size)
        side = train.pictures.shape[-1]
        margin = max(1, side // 16)
        self.coarse_pictures = _coarse(train.pictures)
        self.whitenings = whitenings or (
            learn_whitening(self.coarse_pictures, margin=1, components=64, poses=self.poses, seed=seed),
            learn_whitening(train.pictures, margin=margin, components=96, poses=self.poses, seed=seed),
        )

    def candidates(
        self, queries: SmallSet, *, num_candidates: int, keep: int, label: str
    ) -> tuple[Candidates, np.ndarray]:
        """The best candidates of each query by small pictures, and their shifts."""
        coarse, fine = self.whitenings
        with tqdm(total=len(queries), desc=label, unit="image") as bar:
            found = coarse_search(
                _coarse(queries.pictures),
                self.coarse_pictures,
                coarse,
                poses=self.poses,
                num_candidates=num_candidates,
                progress=bar.update,
            )
        return refine(queries.pictures, self.train.pictures, found, fine, keep=keep)

    def nearest(
        self, queries: SmallSet, *, num_candidates: int, keep: int, workers: int, label: str
    ) -> list[dict[str, Any]]:
        """For each query its nearest training image by exact scores.

        Returns:
            ``{"features": {"index", "pose", "shift", "value"}, "ssim": {...}, "identical"}`` for each; ``identical``
            tells whether a training image has the same pixels.
        """
        found, shifts = self.candidates(
            queries, num_candidates=num_candidates, keep=keep, label=f"{label}: coarse search"
        )
        tasks = []
        for start in range(0, len(queries), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(queries)))
            wanted = sorted({int(j) for i in rows for j in found.index[i]})
            place = {j: k for k, j in enumerate(wanted)}
            jobs = [
                [
                    (place[int(j)], int(pose), tuple(map(int, shift)))
                    for j, pose, shift in zip(found.index[i], found.pose[i], shifts[i], strict=True)
                ]
                for i in rows
            ]
            targets = self.whitenings[1].centres(self.train.pictures[wanted])
            sets = queries.cases.subset(list(rows)), self.train.cases.subset(wanted)
            tasks.append((start, *sets, wanted, targets, jobs))
        work = partial(_score_chunk, size=self.size, whitening=self.whitenings[1])
        results: list[dict[str, Any]] = [{} for _ in range(len(queries))]
        with tqdm(total=len(queries), desc=f"{label}: exact scores", unit="image") as bar:
            for start, part in map_unordered(work, tasks, workers if len(queries) >= _FEW else 1):
                results[start : start + len(part)] = part
                bar.update(len(part))
        known = set(self.train.hashes)
        for i, result in enumerate(results):
            result["identical"] = queries.hashes[i] in known
        return results


def _coarse(pictures: np.ndarray) -> np.ndarray:
    return halved(pictures) if pictures.shape[-1] == SMALL else pictures


def _score_chunk(
    task: tuple[int, CaseSet, CaseSet, list[int], np.ndarray, list[list[tuple[int, int, tuple[int, int]]]]],
    *,
    size: tuple[int, int],
    whitening: Whitening,
) -> tuple[int, list[dict[str, Any]]]:
    start, queries, train, numbers, targets, jobs = task
    out = []
    for i, job in enumerate(jobs):
        query = queries.picture(i, size)
        best: dict[str, Any] = {}
        for j, pose, shift in job:
            reference = train.picture(j, size)
            scores = score_pair(query, reference, targets[j], pose=pose, shift=shift, size=size, whitening=whitening)
            for name in ("features", "ssim"):
                value = float(scores[name])
                if name not in best or not value <= best[name]["value"]:
                    best[name] = {"index": numbers[j], "pose": pose, "shift": scores["shift"], "value": value}
        out.append(best)
    return start, out


def nearest_by_extractor(
    queries: CaseSet, train: CaseSet, extractor: Extractor, *, size: tuple[int, int], cache: Path, label: str
) -> list[dict[str, Any]]:
    """Nearest training image by the cosine of features about their training mean, images as they are.

    Returns:
        ``{"index", "value", "distance"}`` for each query; the distance is Euclidean.
    """
    store = FeatureCache(cache, extractor)
    features = []
    for cases in (train, queries):
        with tqdm(total=len(cases), desc=f"{label}: features ({extractor.title})", unit="image") as bar:
            readers = [partial(cases.picture, i, size) for i in range(len(cases))]
            features.append(store.features(readers, progress=bar.update).astype(np.float32))
    mean = features[0].mean(0)
    refs, rows = (x - mean for x in features)
    refs_unit = refs / np.maximum(np.linalg.norm(refs, axis=1, keepdims=True), 1e-9)
    rows_unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    out = []
    for start in range(0, len(rows), 1024):
        cosines = rows_unit[start : start + 1024] @ refs_unit.T
        for i, (j, value) in enumerate(zip(cosines.argmax(1), cosines.max(1), strict=True), start=start):
            distance = float(np.linalg.norm(rows[i] - refs[j]))
            out.append({"index": int(j), "pose": 0, "value": float(value), "distance": distance})
    return out

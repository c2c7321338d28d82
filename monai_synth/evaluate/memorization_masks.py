# SPDX-License-Identifier: Apache-2.0
"""The nearest training mask of every mask, by mutual information (JDM thesis, Eq 5.1), over poses and small shifts.

MI(s, t) is at most the entropy of s, and reaches it where t determines s; so MI(s, t) / H(s) ranks training masks as
MI does and says how much of s is in t: 1 for a copy. Candidates come from small maps of the labels' shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from monai_synth.data.pair_files import resize_label
from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet
from monai_synth.evaluate.memorization_pictures import posed
from monai_synth.evaluate.memorization_scores import align, overlap, reach_of
from monai_synth.evaluate.memorization_search import coarse_search, learn_whitening, refine
from monai_synth.evaluate.mutual_information import mutual_information

_SIDE = 16


class MaskSearch:
    """Looks for masks in a training set.

    Args:
        train: cases with masks.
        size: (H, W) that masks are brought to.
        poses: that keep it.
        num_labels: K; values 0 to K - 1.
        seed: of the whitening.
    """

    def __init__(
        self, train: CaseSet, *, size: Sequence[int], poses: Sequence[int], num_labels: int, seed: int
    ) -> None:
        self.train, self.size, self.poses, self.num_labels = train, tuple(size), tuple(poses), num_labels
        self.small = self._small(train, lambda n: None)
        self.whitening = learn_whitening(self.small, margin=1, components=64, poses=poses, seed=seed)

    def nearest(
        self, queries: CaseSet, *, num_candidates: int, exact: int, progress: Callable[[int], object]
    ) -> list[dict[str, Any]]:
        """For each query ``{"index", "pose", "mi", "share"}``; share is NaN for a mask of one label, that has none."""
        small = self._small(queries, lambda n: None)
        found = coarse_search(small, self.small, self.whitening, poses=self.poses, num_candidates=num_candidates)
        found, shifts = refine(small, self.small, found, self.whitening, keep=exact)
        reach = reach_of(self.size)
        cell = [n / _SIDE for n in self.size]
        results = []
        for i in range(len(queries)):
            mask = self._mask(queries, i)
            best: dict[str, Any] = {"index": int(found.index[i, 0]), "pose": 0, "mi": 0.0, "share": float("nan")}
            for j, pose, shift in zip(found.index[i], found.pose[i], shifts[i], strict=True):
                a, b = posed(mask, int(pose)), self._mask(self.train, int(j))
                start = [round(s * c) for s, c in zip(shift, cell, strict=True)]
                slack = int(np.ceil(1.5 * max(cell)))
                options = {align(a.astype(np.float32), b.astype(np.float32), start, reach, slack), (0, 0)}
                for at in sorted(options):
                    x, y = overlap(a, b, at, reach)
                    entropy = mutual_information(x, x, self.num_labels)
                    information = mutual_information(x, y, self.num_labels)
                    share = information / entropy if entropy > 0.01 else float("nan")
                    if np.isfinite(share) and not share <= best["share"]:
                        best = {"index": int(j), "pose": int(pose), "mi": information, "share": min(1.0, share)}
            results.append(best)
            progress(1)
        return results

    def _mask(self, cases: CaseSet, i: int) -> np.ndarray:
        mask = cases.label(i)
        if mask is None:
            raise UserError(f"case {cases.cases[i].case_id!r} of {cases.root} has no mask, others have; add it")
        mask = resize_label(mask, self.size, self.num_labels)
        if mask.max() >= self.num_labels:
            msg = (
                f"the mask of case {cases.cases[i].case_id!r} of {cases.root} has value {mask.max()}, allowed are 0 to "
            )
            raise UserError(f"{msg}{self.num_labels - 1}; write its dataset again")
        return mask

    def _small(self, cases: CaseSet, progress: Callable[[int], object]) -> np.ndarray:
        """Shares of labels 1 to K - 1, (N, K - 1, 16, 16)."""
        out = np.empty((len(cases), self.num_labels - 1, _SIDE, _SIDE), np.float32)
        for i in range(len(cases)):
            mask = torch.from_numpy(self._mask(cases, i).astype(np.int64))
            shares = torch.stack([(mask == k).float() for k in range(1, self.num_labels)])
            out[i] = F.interpolate(shares[None], size=(_SIDE, _SIDE), mode="bilinear", antialias=True)[0].numpy()
            progress(1)
        return out

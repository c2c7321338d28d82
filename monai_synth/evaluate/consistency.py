# SPDX-License-Identifier: Apache-2.0
"""Do synthetic images show what their masks say? A segmenter that learned from real pairs is the judge.

It is trained on the training split of the real pairs and segments the synthetic images; its Dice with their masks is
read beside its Dice on real pairs that it has not seen, which is what consistent pairs reach. It is a small network
trained for a minute: good enough to compare the two numbers, no result in itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor
from tqdm import trange

from monai_synth.data.pair_files import resize_image, resize_label
from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet
from monai_synth.evaluate.distribution import grouped_result

_CHANNELS = (16, 32, 64, 128)
_MULTIPLE = 2 ** (len(_CHANNELS) - 1)
_BATCH = 8
_RATE = 2e-3


@dataclass(frozen=True)
class SegmenterOptions:
    """How the segmenter is trained.

    Attributes:
        num_steps: of 8 images each.
        size: pixels of the longer side to which images are brought; larger ones see finer outlines and take longer.
        seed: of weights, order and flips.
    """

    num_steps: int = 400
    size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.size < 16:
            msg = f"consistency with {self.num_steps} steps at {self.size} pixels; allowed are 1 or more and 16 or more"
            raise UserError(msg)


class Segmenter:
    """A small MONAI U-Net, trained on pairs.

    Args:
        training: real pairs to learn from.
        options: how.
        device: where.
        shape: (H, W) of the images that are judged; its longer side becomes ``options.size``.

    Raises:
        UserError: the pairs have no labels but background.
    """

    def __init__(
        self,
        training: CaseSet,
        options: SegmenterOptions,
        *,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.options, self.device, self.labels = options, torch.device(device), dict(training.labels)
        if not any(self.labels.values()):
            raise UserError(f"{training.root} has no labels but background; consistency needs masks of something")
        scale = options.size / max(shape)
        self.size = tuple(max(_MULTIPLE, round(side * scale / _MULTIPLE) * _MULTIPLE) for side in shape)
        self.num_labels = max(self.labels.values()) + 1
        images, labels = self.read(training)
        foreground = np.unique(labels)
        if not (foreground > 0).any():
            raise UserError(f"no mask of {training.root} has anything but background; consistency needs masks")
        numbers = images.reshape(len(images), images.shape[1], -1).astype(np.float32)
        self._mean = torch.tensor(numbers.mean((0, 2)), device=self.device)[:, None, None]
        self._sd = torch.tensor(numbers.std((0, 2)) + 1e-3, device=self.device)[:, None, None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.network = UNet(
                2, images.shape[1], self.num_labels, channels=_CHANNELS, strides=(2,) * (len(_CHANNELS) - 1),
                num_res_units=1, norm=("instance", {"affine": True}),
            ).to(self.device)  # fmt: skip
        self._train(images, labels)

    @property
    def recipe(self) -> str:
        """What it is and how it was trained, in words."""
        return (
            f"MONAI UNet of channels {_CHANNELS}, images at {self.size[0]} x {self.size[1]}, {self.options.num_steps} "
            f"steps of {_BATCH} (Dice and cross entropy, AdamW, one cycle to {_RATE:g}, flips), trained on real pairs "
            "of other patients than those it is judged by; Dice per image, mean over the labels that the mask or the "
            "segmentation has"
        )

    def read(self, cases: CaseSet) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (N, C, h, w) and label maps uint8 (N, h, w) at the segmenter's size."""
        images, labels = [], []
        for i in range(len(cases)):
            label = cases.label(i)
            if label is None:
                raise UserError(f"case {cases.cases[i].case_id} of {cases.root} has no mask; consistency needs masks")
            images.append(resize_image(cases.picture(i), self.size))
            labels.append(resize_label(label, self.size, self.num_labels))
        return np.stack(images), np.stack(labels)

    def _train(self, images: np.ndarray, labels: np.ndarray) -> None:
        rng = np.random.default_rng(self.options.seed)
        loss_of = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
        optimizer = torch.optim.AdamW(self.network.parameters(), _RATE, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=self.options.num_steps + 1)
        order = np.concatenate(
            [rng.permutation(len(images)) for _ in range(-(-self.options.num_steps * _BATCH // len(images)))]
        )
        self.network.train()
        with trange(self.options.num_steps, desc="consistency: training a segmenter", unit="step") as steps:
            for step in steps:
                chosen = order[step * _BATCH : (step + 1) * _BATCH]
                flips = tuple(axis for axis in (-2, -1) if rng.random() < 0.5)
                x = torch.from_numpy(images[chosen]).to(self.device)
                y = torch.from_numpy(labels[chosen]).to(self.device)
                loss = loss_of(self._logits(x.flip(flips)), y.flip(flips)[:, None])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                if step % 20 == 0:
                    steps.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        self.network.eval()

    def _logits(self, x: Tensor) -> Tensor:
        return self.network((x.float() - self._mean) / self._sd)

    def segment(self, images: np.ndarray) -> np.ndarray:
        """Label maps uint8 (N, h, w) of images uint8 (N, C, h, w)."""
        with torch.inference_mode():
            return np.concatenate(
                [
                    self._logits(torch.from_numpy(images[i : i + 32]).to(self.device)).argmax(1).to(torch.uint8).cpu()
                    for i in range(0, len(images), 32)
                ]
            )

    def judge(self, cases: CaseSet) -> dict[str, Any]:
        """Dice of segmentation and mask for each image of a set.

        Returns:
            ``dice`` per image (NaN where neither has anything), ``labels``: name -> Dice per image, ``patients``, and
            ``images``, ``masks`` and ``found`` for pictures.
        """
        images, masks = self.read(cases)
        found = self.segment(images)
        by_label = {
            name: np.asarray([dice(f == value, m == value) for f, m in zip(found, masks, strict=True)])
            for name, value in self.labels.items()
            if value
        }
        table = np.stack(list(by_label.values()))
        has = ~np.isnan(table)
        mean = np.where(has, table, 0).sum(0) / np.maximum(has.sum(0), 1)
        return {
            "dice": np.where(has.any(0), mean, np.nan),
            "labels": by_label,
            "patients": [case.patient_id for case in cases.cases],
            "images": images,
            "masks": masks,
            "found": found,
        }


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Of two boolean arrays; NaN where both are empty."""
    total = int(first.sum()) + int(second.sum())
    return 2.0 * int((first & second).sum()) / total if total else float("nan")


def consistency_results(
    synthetic: dict[str, Any], real: dict[str, Any], *, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Dice on synthetic and on unseen real pairs and their difference, as results with 95 % intervals by patient.

    Args:
        synthetic: of `Segmenter.judge`.
        real: likewise.
        seed: of the division into groups.

    Returns:
        "all labels" or label -> ``synthetic``, ``real`` and ``difference`` (synthetic less real).
    """
    rows = {"all labels": (synthetic["dice"], real["dice"])}
    rows |= {name: (synthetic["labels"][name], real["labels"][name]) for name in real["labels"]}
    if len(rows) == 2:  # one label only
        rows.popitem()
    results = {}
    for name, sides in rows.items():
        kept = [~np.isnan(side) for side in sides]
        (x, y) = (side[k] for side, k in zip(sides, kept, strict=True))
        (gx, gy) = (np.asarray(j["patients"])[k] for j, k in zip((synthetic, real), kept, strict=True))
        results[name] = {
            "synthetic": _mean_result(x, gx, seed),
            "real": _mean_result(y, gy, seed),
            "difference": grouped_result(lambda a, b: float(a.mean() - b.mean()), x, y, gx, gy, seed=seed),
        }
    return results


def _mean_result(values: np.ndarray, groups: np.ndarray, seed: int, num_bootstrap: int = 2000) -> dict[str, Any]:
    """Mean with a 95 % interval by bootstrap over patients."""
    if not len(values):
        why = "no image has the label"
        return {"value": None, "n": 0, "ci": None, "standard_error": None, "warnings": [why]}
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    result: dict[str, Any] = {"value": float(values.mean()), "n": len(values), "ci": None, "standard_error": None}
    if len(counts) > 1:
        drawn = np.random.default_rng(seed).integers(0, len(counts), (num_bootstrap, len(counts)))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        result |= {"ci": np.percentile(means, [2.5, 97.5]).tolist(), "standard_error": float(means.std(ddof=1))}
    return result | {"sd": float(values.std(ddof=1)) if len(values) > 1 else None, "warnings": []}


def held_out(cases: CaseSet, *, share: float = 0.2, seed: int = 0) -> tuple[CaseSet, CaseSet]:
    """A set divided by patient into pairs to learn from and pairs to judge by.

    Raises:
        UserError: fewer than 2 patients.
    """
    patients = sorted({case.patient_id for case in cases.cases})
    if len(patients) < 2:
        raise UserError(f"{cases.root} has one patient; consistency needs real pairs of another to compare with")
    rng = np.random.default_rng(seed)
    kept = set(rng.permutation(patients)[: max(1, round(share * len(patients)))].tolist())
    away = [i for i, case in enumerate(cases.cases) if case.patient_id in kept]
    return cases.subset([i for i in range(len(cases)) if i not in set(away)]), cases.subset(away)

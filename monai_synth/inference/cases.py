# SPDX-License-Identifier: Apache-2.0
"""What to sample: maps of a prepared dataset or of a folder, seeds, and what is asked of each nodule."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.engines import PrepareBatch

from monai_synth.data.datalist import read_dataset
from monai_synth.data.semantic import FEATURES
from monai_synth.data.slices import check_labels, read_png, resize_semantic
from monai_synth.errors import UserError

MAP_ENDINGS = (".png", ".nii", ".nii.gz")


def check_targets(targets: Mapping[str, Any] | None) -> dict[str, float]:
    """Requested features: binary ``malignancy``, ratings 1 to 5 for the others.

    Raises:
        UserError: unknown feature or value out of range.
    """
    out: dict[str, float] = {}
    for name, value in dict(targets or {}).items():
        low, high = (0, 1) if name == "malignancy" else (1, 5)
        if name not in FEATURES:
            raise UserError(f"unknown nodule feature {name!r}; allowed are {', '.join(FEATURES)}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high or (name == "malignancy" and value not in (0, 1)):
            allowed = "0 (benign) or 1 (malignant)" if name == "malignancy" else "a rating from 1 to 5"
            raise UserError(f"nodule feature {name} is {value!r}; allowed is {allowed}")
        out[name] = float(value)
    return out


def read_label_file(path: str | Path) -> np.ndarray:
    """Label map (rows, columns) of a PNG or of a two-dimensional NIfTI file.

    Raises:
        UserError: damaged, or not two-dimensional.
    """
    path = Path(path)
    if path.name.endswith(".png"):
        return read_png(path)
    try:
        array = np.asarray(nib.load(path).dataobj)
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise UserError(f"{path} cannot be read as NIfTI ({error}); write the label map again") from error
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.ndim != 2:
        raise UserError(
            f"{path} has shape {array.shape}; label maps are 2-D, (X, Y) or (X, Y, 1): give one file a slice"
        )
    return array.T


def find_cases(
    *,
    dataset_dir: str,
    split: str,
    label_dir: str | None,
    requests: str | None,
    targets: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Cases to sample from.

    Args:
        dataset_dir: prepared dataset, whose nodule table gives each nodule's features.
        split: split of it.
        label_dir: folder of label maps that is used in its stead; features other than malignancy (which the label
            tells) then come from ``targets`` and ``requests``.
        requests: JSON file, case id -> features, overriding those of that case's nodules.
        targets: features overriding those of every nodule.

    Returns:
        Dicts with ``case_id``, ``label`` (path), ``nodules`` (list or None) and ``targets``.

    Raises:
        UserError: nothing there, or a request that makes no sense.
    """
    everywhere = check_targets(targets)
    if label_dir is None:
        cases = [dict(case, source=split) for case in read_dataset(dataset_dir).datalist(split)]
        if not cases:
            raise UserError(f"split {split!r} of {dataset_dir} has no case; give another --split or a --label_dir")
    else:
        folder = Path(label_dir).expanduser()
        files = sorted(p for p in folder.glob("*") if p.name.endswith(MAP_ENDINGS)) if folder.is_dir() else []
        if not files:
            raise UserError(f"label_dir {folder} holds no label map; allowed are {', '.join(MAP_ENDINGS)} files")
        cases = [
            {"case_id": p.name.split(".")[0], "label": str(p), "nodules": None, "source": "label_dir"} for p in files
        ]
    by_case: dict[str, dict[str, float]] = {}
    if requests is not None:
        try:
            content = json.loads(Path(requests).expanduser().read_text())
            by_case = {str(k): check_targets(v) for k, v in content.items()}
        except (OSError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"requests {requests} cannot be read as JSON, case id -> features ({error})") from error
        unknown = sorted(set(by_case) - {c["case_id"] for c in cases})
        if unknown:
            known = ", ".join(c["case_id"] for c in cases[:3])
            raise UserError(f"requests {requests} names {unknown[:3]}, which are no cases; cases are {known}, ...")
    for case in cases:
        case["targets"] = everywhere | by_case.get(case["case_id"], {})
    return cases


class SamplingDataset(torch.utils.data.Dataset):
    """One item per image to make; image ``i`` takes map ``i mod len(cases)`` and seed ``seed + i``.

    Args:
        cases: see :func:`find_cases`.
        num_samples: images in all, over all processes.
        seed: seed of the first image.
        image_size: the model's (H, W).
        num_labels: labels of the model.
        resize_maps: resize maps of another aspect than the model's; maps of a prepared dataset always are.
        is_done: whether an image of this id is there already; it is left out.
        process: (rank, number of processes); each takes every n-th image, so that seeds do not depend on them.

    Items: ``label`` (1, H, W) uint8, ``seed``, ``case_id``, ``nodules``, ``targets``, ``conditioning``, ``spacing``.

    Raises:
        UserError: ``num_samples`` below 1, a map with an unknown value or another size.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        *,
        num_samples: int,
        seed: int,
        image_size: Sequence[int],
        num_labels: int,
        resize_maps: bool = False,
        is_done: Callable[[str], bool] | None = None,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise UserError(f"num_samples is {num_samples!r}, allowed are integers from 1; give --num_samples 32, say")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise UserError(f"seed is {seed!r}, allowed are integers from 0; give --seed 0, say")
        self.cases = list(cases)
        self.image_size = tuple(image_size)
        self.num_labels = num_labels
        self.resize_maps = resize_maps
        self.data = []
        for i in range(process[0], num_samples, process[1]):
            case = i % len(self.cases)
            name = f"{self.cases[case]['case_id']}_s{seed + i:06d}"
            if is_done is None or not is_done(name):
                self.data.append({"case_id": name, "case": case, "seed": seed + i})

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        case = self.cases[item["case"]]
        array = read_label_file(case["label"])
        check_labels(array, self.num_labels, str(case["label"]))
        fits = array.shape == self.image_size
        if not fits and case["source"] == "label_dir" and not self.resize_maps:
            msg = (
                f"label map {case['label']} is {array.shape[0]}x{array.shape[1]}, the model makes "
                f"{self.image_size[0]}x{self.image_size[1]}; give maps of that size, or --resize_maps True"
            )
            raise UserError(msg)
        label = resize_semantic(torch.from_numpy(array.astype(np.uint8))[None], self.image_size)
        scale = [new / old for new, old in zip(self.image_size, array.shape, strict=True)]
        nodules = None if case["nodules"] is None else [_scaled_nodule(n, scale) for n in case["nodules"]]
        spacing = [s / f for s, f in zip(case.get("spacing", (1.0, 1.0)), scale, strict=True)]
        conditioning = {"case": case["case_id"], "source": case["source"], "targets": case["targets"]}
        return {
            "label": label, "seed": item["seed"], "case_id": item["case_id"], "nodules": nodules,
            "targets": case["targets"], "spacing": spacing, "conditioning": conditioning,
        }  # fmt: skip


def _scaled_nodule(nodule: Mapping[str, Any], scale: Sequence[float]) -> dict[str, Any]:
    """Nodule entry with centre and box in pixels of the resized map."""
    (row, col), (top, left, bottom, right) = nodule["center"], nodule["bbox"]
    center = [(row + 0.5) * scale[0] - 0.5, (col + 0.5) * scale[1] - 0.5]
    bbox = [
        math.floor(top * scale[0]),
        math.floor(left * scale[1]),
        math.ceil(bottom * scale[0]),
        math.ceil(right * scale[1]),
    ]
    return dict(nodule, center=center, bbox=bbox)


def collate_cases(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack the maps and keep everything else as lists."""
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    batch["label"] = torch.stack(batch["label"])
    return batch


class SamplingPrepareBatch(PrepareBatch):
    """Batch of :class:`SamplingDataset` -> (label maps, None, (), {seeds, nodules, targets})."""

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, tuple, dict[str, Any]]:
        label = batchdata["label"].to(device, non_blocking=non_blocking)
        options = {
            "seeds": batchdata["seed"],
            "nodules": batchdata["nodules"],
            "targets": batchdata["targets"],
        }
        return label, None, (), options

# SPDX-License-Identifier: Apache-2.0
"""The images of the classifier experiment: packed once as files that all processes map, and which of them a row takes.

Every choice depends on the seed alone, so all rows of one seed see the same tenth of the real images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_synth.data.class_images import ClassImages
from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.errors import UserError
from monai_synth.experiments.classifier_rows import Row

HELD_OUT = 0.1  # of the synthetic images, to select epochs on them
SETS = ("training", "validation", "test", "synthetic")
_ON_DEVICE = 4 << 30  # bytes of images that may lie on a GPU


@dataclass(frozen=True)
class Source:
    """Real and synthetic images that fit each other.

    Attributes:
        classes: name -> number.
        image_channels: 1 or 3.
        image_size: (H, W) that the classifiers see.
        cases: of each of ``SETS``.
        fingerprints: of the two datasets.
    """

    classes: dict[str, int]
    image_channels: int
    image_size: tuple[int, int]
    cases: dict[str, list[dict[str, Any]]]
    fingerprints: dict[str, str]

    def labels(self, name: str) -> np.ndarray:
        """Class of each image of a set, int (N,)."""
        return np.array([case["class"] for case in self.cases[name]], dtype=np.int64)


def read_source(real: str | Path, synthetic: str | Path | None, image_size: Sequence[int] | None) -> Source:
    """Read both datasets and check that they fit.

    Args:
        real: prepared dataset of classes.
        synthetic: folder that the sampling of a class-conditional bundle wrote; None where no row needs it.
        image_size: (H, W) to which all images are resized. Default: theirs.

    Raises:
        UserError: they do not fit each other, or a split has no image.
    """
    dataset = read_dataset(real, task="classes")
    classes = dataset.classes
    if len(classes) < 2:
        raise UserError(f"{dataset.root} has the class(es) {', '.join(classes)}; two or more are needed to classify")
    cases = {split: dataset.datalist(split) for split in ("training", "validation", "test")}
    for split in cases:
        missing = [name for name, k in classes.items() if all(case["class"] != k for case in cases[split])]
        if not cases[split] or (missing and split != "validation"):
            what = "no image" if not cases[split] else f"no image of {', '.join(missing)}"
            raise UserError(f"the {split} split of {dataset.root} has {what}; prepare it again with other --splits")
    shapes = {"real": dataset.content["spatial_shape"]}
    fingerprints, cases["synthetic"] = {"real": dataset.fingerprint}, []
    if synthetic is not None:
        other = _read_synthetic(synthetic)
        _require_alike(dataset, other)
        cases["synthetic"] = other.datalist("training")
        shapes["synthetic"] = other.content["spatial_shape"]
        fingerprints["synthetic"] = other.fingerprint
    return Source(classes, int(dataset.content["image_channels"]), _size(shapes, image_size), cases, fingerprints)


def pack(source: Source, folder: Path) -> None:
    """Write each set as one array ``<set>.npy``, uint8 (N, C, H, W)."""
    for name in SETS:
        cases = [{**case, "index": k} for k, case in enumerate(source.cases[name])]
        images = np.zeros((0, source.image_channels, *source.image_size), np.uint8)
        if cases:
            packed = ClassImages(
                cases, image_size=source.image_size, image_channels=source.image_channels, max_bytes=1 << 62
            ).images
            images = packed.numpy()
        np.save(folder / f"{name}.npy", images)
        np.save(folder / f"{name}_classes.npy", source.labels(name))


class Images:
    """Chosen images of packed sets, in batches of any order.

    Args:
        folder: of `pack`.
        parts: for each set the indices of its images.
        device: where the batches shall be.
    """

    def __init__(self, folder: Path, parts: dict[str, np.ndarray], device: torch.device) -> None:
        self.device = device
        self._parts = []
        labels = []
        for name, indices in parts.items():
            images = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))
            chosen = torch.from_numpy(np.asarray(indices, dtype=np.int64))
            if device.type != "cpu" and images.numel() <= _ON_DEVICE:
                images, chosen = images[chosen].to(device), torch.arange(len(chosen))
            self._parts.append((images, chosen))
            labels.append(np.load(folder / f"{name}_classes.npy")[indices])
        self.labels = torch.from_numpy(np.concatenate(labels))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images float (B, C, H, W) in [0, 1] and classes (B,); those of the first set come first."""
        images, order, first = [], [], 0
        for packed, chosen in self._parts:
            here = indices[(indices >= first) & (indices < first + len(chosen))]
            rows = chosen[here - first]
            images.append(packed[rows.to(packed.device)].to(self.device))
            order.append(here)
            first += len(chosen)
        return torch.cat(images).float().div_(255), self.labels[torch.cat(order)].to(self.device)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Per channel, of the values in [0, 1]."""
        total, square, count = 0.0, 0.0, 0
        for indices in torch.arange(len(self)).split(1024):
            images = self.batch(indices)[0].double()
            total = total + images.sum((0, 2, 3))
            square = square + images.square().sum((0, 2, 3))
            count += images[:, 0].numel()
        mean = total / count
        std = (square / count - mean.square()).clamp_min(0).sqrt()
        return [round(float(v), 6) for v in mean], [round(max(float(v), 1e-3), 6) for v in std]


def training_parts(row: Row, labels: dict[str, np.ndarray], seed: int, *, hold_out: bool) -> dict[str, np.ndarray]:
    """Which images a row trains on.

    Args:
        row: the row.
        labels: class of each image of "training" and "synthetic".
        seed: the run's.
        hold_out: synthetic only: leave out those of `held_out`.

    Returns:
        Indices of each set.
    """
    if row.mode == "synthetic":
        everything = np.arange(len(labels["synthetic"]))
        left_out = held_out(labels["synthetic"], seed) if hold_out else np.zeros(0, np.int64)
        return {"synthetic": np.setdiff1d(everything, left_out)}
    real = stratified(labels["training"], row.fraction, seed)
    if row.mode not in ("mix", "oversample"):
        return {"training": real}
    wanted = synthetic_counts(row, np.bincount(labels["training"][real], minlength=labels["training"].max() + 1))
    order = _shuffled(labels["synthetic"], seed, "synthetic")
    return {"training": real, "synthetic": np.sort(np.concatenate([order[k][:n] for k, n in enumerate(wanted)]))}


def synthetic_counts(row: Row, real: np.ndarray) -> list[int]:
    """How many synthetic images of each class a row adds to ``real`` images of each class."""
    if row.mode == "oversample":
        return [int(real.max() - n) for n in real]
    total = int(real.sum()) * int(row.ratio or 0) // 100
    return [total // len(real) + (k < total % len(real)) for k in range(len(real))]


def require_synthetic(rows: Sequence[Row], labels: dict[str, np.ndarray], classes: dict[str, int]) -> None:
    """Refuse rows that need more synthetic images than there are.

    Raises:
        UserError: names the row, the class and the numbers.
    """
    there = np.bincount(labels["synthetic"], minlength=len(classes))
    for row in rows:
        if row.mode not in ("mix", "oversample"):
            continue
        real = np.bincount(labels["training"][stratified(labels["training"], row.fraction, 0)], minlength=len(classes))
        for (name, k), needed in zip(classes.items(), synthetic_counts(row, real), strict=True):
            if needed > there[k]:
                msg = (
                    f"row {row.name} needs {needed} synthetic images of {name}, there are {there[k]}; sample more "
                    "(--per_class of the bundle's inference), or leave the row out"
                )
                raise UserError(msg)


def stratified(labels: np.ndarray, percent: int, seed: int) -> np.ndarray:
    """Sorted indices of so many percent of each class, rounded, at least one; smaller parts lie in larger ones."""
    order = _shuffled(labels, seed, "subset")
    return np.sort(np.concatenate([index[: max(1, round(len(index) * percent / 100))] for index in order]))


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Sorted indices of a tenth of each class."""
    order = _shuffled(labels, seed, "held out")
    return np.sort(np.concatenate([index[: max(1, round(len(index) * HELD_OUT))] for index in order]))


def require_held_out(labels: np.ndarray, classes: Mapping[str, int]) -> None:
    """Refuse synthetic images of which none would be left to train on.

    Raises:
        UserError: a class has fewer than two.
    """
    for name, number in classes.items():
        count = int((labels == number).sum())
        if count < 2:
            msg = f"--select-on synthetic holds out a part of each class, and there are {count} synthetic images of "
            raise UserError(f"{msg}{name!r}; sample 2 or more (--per_class), or choose the epoch on real images")


def derived_seed(*parts: object) -> int:
    """A seed of its own for each purpose."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _shuffled(labels: np.ndarray, seed: int, purpose: str) -> list[np.ndarray]:
    """Indices of each class in an order of its own."""
    rng = np.random.default_rng(derived_seed(seed, purpose))
    return [rng.permutation(np.flatnonzero(labels == k)) for k in range(int(labels.max()) + 1)]


def _read_synthetic(folder: str | Path) -> PreparedDataset:
    path = Path(folder).expanduser().absolute()
    if path.is_dir() and not (path / "dataset.json").is_file() and any(path.rglob("*.png")):
        msg = f"{path} holds images and no dataset.json, so its sampling is not done; run the same sampling again"
        raise UserError(f"{msg} to finish it")
    return read_dataset(path, task="classes")


def _require_alike(real: PreparedDataset, synthetic: PreparedDataset) -> None:
    if real.classes != synthetic.classes:
        msg = (
            f"the classes differ: real {real.classes} ({real.root}), synthetic {synthetic.classes} "
            f"({synthetic.root}); sample from a model that was trained on this real dataset"
        )
        raise UserError(msg)
    channels = [int(dataset.content["image_channels"]) for dataset in (real, synthetic)]
    if channels[0] != channels[1]:
        msg = f"real images have {channels[0]} channel(s), synthetic {channels[1]}; prepare the real ones again "
        raise UserError(msg + ("with --grey" if channels[0] == 3 else "in colour (without --grey)"))
    missing = [n for n, k in synthetic.classes.items() if all(c["class"] != k for c in synthetic.content["training"])]
    if missing:
        raise UserError(f"{synthetic.root} has no image of {', '.join(missing)}; sample images of all classes")


def _size(shapes: dict[str, Any], wanted: Sequence[int] | None) -> tuple[int, int]:
    if wanted is not None:
        if len(wanted) != 2 or min(wanted) < 8:
            raise UserError(f"image size {list(wanted)}; give height and width, each 8 or more (--image-size)")
        return int(wanted[0]), int(wanted[1])
    unsized = [name for name, shape in shapes.items() if shape is None]
    if unsized:
        raise UserError(f"the {unsized[0]} images differ in size; give --image-size H W to resize all")
    if any(len(shape) != 2 for shape in shapes.values()):
        raise UserError(f"the images have sizes {shapes}; classifiers take images of two axes")
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        text = ", ".join(f"{name} {shape[0]}x{shape[1]}" for name, shape in shapes.items())
        height, width = shapes["synthetic"]
        raise UserError(f"the images differ in size: {text}; give --image-size {height} {width} to resize all")
    height, width = shapes["real"]
    return int(height), int(width)

# SPDX-License-Identifier: Apache-2.0
"""Images with one class each, in memory as one tensor where they fit, whose batches are one indexing operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.data.pair_files import read_image, resize_image
from monai_synth.errors import UserError

_READERS = 8  # threads; decoding leaves Python's lock


def class_list(dataset_dir: str, split: str) -> list[dict[str, Any]]:
    """Cases of a split with absolute paths and their ``index``; a dataset without validation validates on training.

    Raises:
        UserError: the training split is empty or lacks a class, or see ``read_dataset``.
    """
    dataset = read_dataset(dataset_dir, task="classes")
    cases = dataset.indexed(split)
    if split == "training":
        there = {case["class"] for case in cases}
        lacking = [name for name, number in dataset.classes.items() if number not in there]
        if lacking or len(dataset.classes) < 2:
            got = f"no image of {', '.join(lacking)}" if lacking else f"one class only ({', '.join(dataset.classes)})"
            msg = f"split 'training' of {dataset.root} has {got}; a model that is told the class needs two or more, "
            raise UserError(msg + "each with images: prepare the dataset again with other --classes or --splits")
    return cases


def some_of(cases: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """At most ``number`` cases, evenly spaced through those of each class, the classes in their own proportions."""
    if len(cases) <= number:
        return list(cases)
    by_class = sorted(cases, key=lambda case: case["class"])  # stable: within a class the order stays
    return [by_class[i * len(cases) // number] for i in range(number)]


def class_image_size(dataset: PreparedDataset) -> list[int]:
    """Size of a dataset's images.

    Raises:
        UserError: they differ in size.
    """
    shape = dataset.content["spatial_shape"]
    if shape is None:
        msg = f"the images of {dataset.root} differ in size; give --image_size '[64, 64]', say, to which they are "
        raise UserError(msg + "resized, or prepare them with --size")
    return [int(side) for side in shape]


class ClassImages(torch.utils.data.Dataset):
    """Images of equal size with their class; batches come ready from ``__getitems__``.

    Args:
        cases: of :func:`class_list`.
        image_size: spatial size; others are resized to it.
        image_channels: C.
        max_bytes: images are kept in memory up to this size; beyond it they are read when they are needed.
        progress: show a bar while they are read into memory.

    Items: ``image`` uint8 (C, *S), ``class`` and ``index``; a batch of them has a first axis more.

    Raises:
        UserError: an image is unreadable, or of another number of channels or axes.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        *,
        image_size: Sequence[int],
        image_channels: int,
        max_bytes: int = 4 << 30,
        progress: bool = True,
    ) -> None:
        self.cases = list(cases)
        self.image_size, self.image_channels = tuple(image_size), int(image_channels)
        self.classes = torch.tensor([case["class"] for case in cases], dtype=torch.long)
        self.indices = torch.tensor([case["index"] for case in cases], dtype=torch.long)
        num_bytes = len(cases) * self.image_channels * int(np.prod(self.image_size))
        self.images: torch.Tensor | None = None
        if num_bytes <= max_bytes:
            everything = tqdm(range(len(cases)), desc="reading images", unit="image", disable=not progress, leave=False)
            self.images = self._read(everything)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A batch."""
        chosen = torch.as_tensor(list(indices))
        images = self._read(indices) if self.images is None else self.images[chosen]
        return {"image": images, "class": self.classes[chosen], "index": self.indices[chosen]}

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        with ThreadPoolExecutor(_READERS) as pool:
            arrays = list(pool.map(self._load, indices))
        return torch.from_numpy(np.stack(arrays))

    def _load(self, index: int) -> np.ndarray:
        path = self.cases[index]["image"]
        image = read_image(path)
        if len(image) != self.image_channels or image.ndim - 1 != len(self.image_size):
            msg = (
                f"{path} has shape {image.shape}; needed are {self.image_channels} channel(s) and "
                f"{len(self.image_size)} spatial axes: prepare the dataset again (--grey makes RGB grey)"
            )
            raise UserError(msg)
        return resize_image(image, self.image_size)


def ready_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The collate function of :class:`ClassImages`, whose batches are ready."""
    return batch


def class_counts(cases: Sequence[Mapping[str, Any]], classes: Mapping[str, int]) -> dict[str, int]:
    """Images of each class by name."""
    numbers = [case["class"] for case in cases]
    return {name: numbers.count(number) for name, number in classes.items()}

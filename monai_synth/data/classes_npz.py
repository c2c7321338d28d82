# SPDX-License-Identifier: Apache-2.0
"""Archives of MedMNIST: ``{train,val,test}_{images,labels}`` in one npz file, read image by image.

An archive is never unpickled, and only one image of it is in memory at a time.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from monai_synth.data.classes_source import ClassSource, Item
from monai_synth.data.pictures_read import Form
from monai_synth.data.problems import Problem
from monai_synth.errors import UserError

_PARTS = {"training": "train", "validation": "val", "test": "test"}
_KNOWN = {"pneumoniamnist": (["normal", "pneumonia"], "X-ray")}
_DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


def find_in_npz(path: Path, classes: Sequence[str] | None = None) -> tuple[ClassSource, Form]:
    """Labels and form of an archive's images.

    Args:
        path: the archive.
        classes: names in the order of their numbers. Default: known ones, else the numbers.

    Returns:
        Items named ``train_00000``, ...; labels out of range are problems; the form of every image.

    Raises:
        UserError: it cannot be read, lacks an array, or they have other forms than MedMNIST's.
    """
    if not path.is_file():
        raise UserError(f"source {path} is not there; give an npz file of MedMNIST, or a folder")
    names, modality = next((known for word, known in _KNOWN.items() if word in path.name.lower()), (None, None))
    found = ClassSource("MedMNIST", modality=modality)
    try:
        with zipfile.ZipFile(path) as archive:
            has = sorted(name.removesuffix(".npy") for name in archive.namelist())
            parts = {split: part for split, part in _PARTS.items() if f"{part}_images" in has}
            missing = [f"{part}_labels" for part in parts.values() if f"{part}_labels" not in has]
            missing += [] if "training" in parts else ["train_images"]
            if missing:
                needed = "train_images, train_labels and the same with val and test"
                raise UserError(f"{path} lacks {', '.join(missing)} (it has {', '.join(has)}); needed are {needed}")
            shapes = {part: _image_shape(archive, part, path) for part in parts.values()}
            labels = {part: _labels(archive, part, shapes[part][0], path) for part in parts.values()}
    except _DAMAGED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_unreadable(path, error)) from error
    if len({shape[1:] for shape in shapes.values()}) > 1:
        got = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
        raise UserError(f"{path}: images of different form ({got}); prepare them apart")
    top = max((int(values.max()) for values in labels.values() if values.size), default=0)
    if top >= sum(len(values) for values in labels.values()):
        raise UserError(f"{path}: a label is {top}, more than there are images; number the classes 0, 1, ...")
    found.classes = list(classes or names or [str(number) for number in range(top + 1)])
    found.given_splits = tuple(split for split in parts if split != "training")
    for split, part in parts.items():
        for index, label in enumerate(labels[part].tolist()):
            name = f"{part}_{index:05d}"
            if 0 <= label < len(found.classes):
                found.items.append(Item(name, str(path), label, split))
            else:
                got = f"{path}: {part}_labels[{index}] is {label}"
                msg = f"{got}; allowed are 0 to {len(found.classes) - 1} ({', '.join(found.classes)})"
                found.problems.append(Problem("unknown_class", msg))
    shape = shapes["train"]
    return found, Form(2, 3 if len(shape) == 4 else 1, eight_bit=True)


def read_images(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names as :func:`find_in_npz` gives them, and images uint8 (C, H, W), one after the other.

    Raises:
        UserError: the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for part in [part for part in _PARTS.values() if f"{part}_images.npy" in archive.namelist()]:
                with archive.open(f"{part}_images.npy") as file:
                    num, *shape = _header(file, f"{part}_images", path)[0]
                    for index in range(num):
                        data = file.read(int(np.prod(shape)))
                        image = np.frombuffer(data, np.uint8).reshape(shape)
                        yield f"{part}_{index:05d}", image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
    except _DAMAGED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_unreadable(path, error)) from error


def _image_shape(archive: zipfile.ZipFile, part: str, path: Path) -> tuple[int, ...]:
    with archive.open(f"{part}_images.npy") as file:
        shape, dtype = _header(file, f"{part}_images", path)
    if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[-1] != 3) or 0 in shape[1:]:
        allowed = "uint8 (N, H, W) and (N, H, W, 3)"
        raise UserError(f"{path}: {part}_images is {dtype} {shape}; allowed are {allowed}")
    return shape


def _labels(archive: zipfile.ZipFile, part: str, num: int, path: Path) -> np.ndarray:
    with archive.open(f"{part}_labels.npy") as file:
        shape, dtype = _header(file, f"{part}_labels", path)
        if dtype.kind not in "iu" or shape not in ((num,), (num, 1)):
            allowed = f"whole numbers, one for each of its {num} images: ({num},) or ({num}, 1)"
            raise UserError(f"{path}: {part}_labels is {dtype} {shape}; allowed are {allowed}")
        data = file.read(num * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(num)


def _header(file: IO[bytes], name: str, path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise UserError(f"{path}: {name} holds Python objects, which may run code; save plain numbers")
    if fortran and len(shape) > 1 and np.prod(shape) != max(shape):
        raise UserError(f"{path}: {name} is in Fortran order; save numpy.ascontiguousarray of it")
    return shape, dtype


def _unreadable(path: Path, error: Exception) -> str:
    return f"{path} cannot be read ({str(error) or type(error).__name__}); it is damaged or no npz file, fetch it again"

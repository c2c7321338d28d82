# SPDX-License-Identifier: Apache-2.0
"""What a user uploads: believed only after its type, its size and its content were checked."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image

from monai_synth.atomic import write_bytes
from monai_synth.data.pair_files import channels_last, read_image, read_label, resize_image, resize_label
from monai_synth.data.semantic import LABELS
from monai_synth.data.slices import check_labels, resize_semantic
from monai_synth.errors import UserError
from monai_synth.inference.pairs import read_given_image, read_given_mask

MAX_BYTES = 32 * 2**20
MAX_PIXELS = 2**24  # 4096 x 4096; a small file can hold many more

_MAGIC = {".png": (b"\x89PNG\r\n\x1a\n",), ".nii.gz": (b"\x1f\x8b",), ".nii": (struct.pack("<i", 348), b"\0\0\1\x5c")}


def read_map(
    path: str | Path, folder: Path, *, labels: Mapping[str, int], size: Sequence[int], resize: bool = False
) -> np.ndarray:
    """The label map of an uploaded file.

    Args:
        path: where the server put the file; its name is the user's, and is used for its ending and messages only.
        folder: of the session; the file is read from a copy there whose name is ours.
        labels: the model's.
        size: (H, W) of the model.
        resize: take a map of another size; nodules are kept, see ``resize_semantic``.

    Returns:
        uint8 (H, W) of the model's size.

    Raises:
        UserError: another type, too large, damaged, unknown labels, or of another size without ``resize``.
    """
    array, name = _read(Path(path), folder, partial(read_given_mask, dims=2, num_labels=len(labels)))
    if not np.isfinite(array).all():
        raise UserError(f"{name!r} holds NaN or infinite values; label maps hold the integers 0..{len(labels) - 1}")
    check_labels(array, len(labels), repr(name))
    label = array.astype(np.uint8)
    _check_size(name, label.shape, size, resize)
    return fitted(label, labels, size)


def read_picture(
    path: str | Path, folder: Path, *, channels: int, size: Sequence[int], resize: bool = False
) -> np.ndarray:
    """The image of an uploaded file, uint8 (C, H, W) of the model's size; see :func:`read_map`.

    Raises:
        UserError: another type, too large, damaged, of other channels or values, or of another size without ``resize``.
    """
    array, name = _read(Path(path), folder, partial(read_given_image, dims=2))
    if len(array) != channels:
        kinds = {1: "grey (1 channel)", 3: "colour (3 channels)"}
        got, wanted = (kinds.get(number, f"of {number} channels") for number in (len(array), channels))
        raise UserError(f"{name!r} is {got}, the model's images are {wanted}; convert it")
    _check_size(name, array.shape[1:], size, resize)
    return resize_image(array, size)


def _read(path: Path, folder: Path, reader: Callable[[Path], np.ndarray]) -> tuple[np.ndarray, str]:
    """What a reader makes of an upload, and the upload's name."""
    copy = _copied(path, folder)
    try:
        return reader(copy), path.name
    except UserError as error:
        raise UserError(str(error).replace(str(copy), repr(path.name))) from error
    finally:
        copy.unlink(missing_ok=True)


def _check_size(name: str, got: Sequence[int], wanted: Sequence[int], resize: bool) -> None:
    if tuple(got) != tuple(wanted) and not resize:
        had, has = ("x".join(map(str, shape)) for shape in (got, wanted))
        raise UserError(f"{name!r} is {had}, the model makes {has}; tick 'resize', or give one of that size")


def fitted(label: np.ndarray, labels: Mapping[str, int], size: Sequence[int]) -> np.ndarray:
    """A map (H, W) at the model's size, as the bundles resize it."""
    if dict(labels) == LABELS:
        return resize_semantic(torch.from_numpy(label.astype(np.uint8)), tuple(size)).numpy()
    return resize_label(label.astype(np.uint8), size, len(labels))


def read_pair(case: Mapping[str, str], labels: Mapping[str, int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Image, uint8 (H, W) or (H, W, 3), and map of a case of a prepared dataset at the model's size."""
    image = resize_image(read_image(case["image"]), size)
    return channels_last(image), fitted(read_label(case["label"]), labels, size)


def ending_of(name: str) -> str:
    """Ending of a file's name, in lower case.

    Raises:
        UserError: it is none of those that are read.
    """
    for ending in (".nii.gz", ".nii", ".png"):
        if name.lower().endswith(ending):
            return ending
    raise UserError(f"{name!r} is no PNG or NIfTI file; allowed are the endings {', '.join(_MAGIC)}")


def _copied(path: Path, folder: Path) -> Path:
    """A copy within the session's folder, once ending, bytes and pixels are allowed."""
    ending, name = ending_of(path.name), repr(path.name)
    try:
        bytes_ = path.stat().st_size
        if bytes_ > MAX_BYTES:
            raise UserError(
                f"{name} has {bytes_ / 2**20:.0f} MB, allowed are {MAX_BYTES // 2**20}; give one map in one file"
            )
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); upload it again") from error
    if not content.startswith(_MAGIC[ending]):
        raise UserError(f"{name} is not what its ending {ending} says; give a PNG or a NIfTI file")
    copy = folder / f"upload{ending}"
    write_bytes(copy, content)
    try:
        pixels = _pixels(copy, ending)
    except Exception as error:  # pillow and nibabel raise many kinds for damaged files
        copy.unlink(missing_ok=True)
        raise UserError(f"{name} is damaged and cannot be read; write it again and upload it") from error
    if pixels > MAX_PIXELS:
        copy.unlink(missing_ok=True)
        raise UserError(f"{name} has {pixels} pixels, allowed are {MAX_PIXELS}; give one two-dimensional map")
    return copy


def _pixels(path: Path, ending: str) -> int:
    """Pixels that a file says it has; they are not read."""
    if ending == ".png":
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.width * picture.height
    return int(np.prod(nib.load(path).shape, dtype=np.int64))

# SPDX-License-Identifier: Apache-2.0
"""Image and label files of a prepared dataset of pairs, and how pairs are resized, the same for every stage.

In memory an image is uint8 (C, *S) and a label map uint8 (*S). On disk they are

- 2-D: PNG, S = (rows, columns); C is 1 (grey) or 3 (RGB);
- 3-D: NIfTI, S = (X, Y, Z); several channels are the fourth axis.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from monai_synth.atomic import write_bytes
from monai_synth.errors import UserError

FILE_ENDINGS = {2: ".png", 3: ".nii.gz"}


def read_image(path: str | Path) -> np.ndarray:
    """uint8 (C, *S) of a prepared image.

    Raises:
        UserError: missing, damaged, or not of the form that ``prepare`` writes.
    """
    array = _read(path)
    if str(path).endswith(".png"):
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return array[None] if array.ndim == 3 else np.moveaxis(array, -1, 0)


def read_label(path: str | Path) -> np.ndarray:
    """uint8 (*S) of a prepared label map.

    Raises:
        UserError: missing, damaged, or more than one channel.
    """
    array = _read(path)
    if array.ndim != (2 if str(path).endswith(".png") else 3):
        raise UserError(f"{path} has shape {array.shape}, a label map has one value per pixel; prepare it again")
    return array


def write_image(path: str | Path, image: np.ndarray, spacing: Sequence[float] | None = None) -> None:
    """Write uint8 (C, *S), whole or not at all; the same array gives the same bytes.

    Args:
        path: ends with ``.png`` (C 1 or 3) or ``.nii.gz``.
        image: the array.
        spacing: mm along each spatial axis, for NIfTI. Default: 1.
    """
    write_bytes(path, _encoded(path, channels_last(image), spacing))


def channels_last(image: np.ndarray) -> np.ndarray:
    """(C, *S) as picture libraries want it: (*S) of one channel, else (*S, C)."""
    return image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)


def write_label(path: str | Path, label: np.ndarray, spacing: Sequence[float] | None = None) -> None:
    """Write uint8 (*S), whole or not at all; see :func:`write_image`."""
    write_bytes(path, _encoded(path, label, spacing))


def resize_image(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """uint8 (C, *S) -> uint8 (C, *size), linear, with a low-pass filter where it shrinks."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    x = torch.tensor(image, dtype=torch.float32)[None]
    if len(size) == 2:
        x = F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True)
    else:
        shrinks = any(new < old for new, old in zip(size, image.shape[1:], strict=True))
        x = F.interpolate(x, size=tuple(size), mode="area" if shrinks else "trilinear")
    return x[0].round().clamp(0, 255).to(torch.uint8).numpy()


def resize_label(label: np.ndarray, size: Sequence[int], num_labels: int) -> np.ndarray:
    """uint8 (*S) -> uint8 (*size): the label that covers most of each new pixel (for two labels: more than half)."""
    if tuple(label.shape) == tuple(size):
        return label
    x = torch.tensor(label, dtype=torch.long)
    shares = [F.adaptive_avg_pool2d, F.adaptive_avg_pool3d][len(size) - 2]
    if any(new > old for new, old in zip(size, label.shape, strict=True)):
        out = F.interpolate(x[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0]
    else:
        out = torch.stack([shares((x == k).float()[None], tuple(size))[0] for k in range(num_labels)]).argmax(0)
    return out.to(torch.uint8).numpy()


def _read(path: str | Path) -> np.ndarray:
    remedy = "write its dataset again (monai-synth prepare ..., or the bundle's sampling)"
    try:
        if str(path).endswith(".png"):
            with Image.open(path) as picture:
                if picture.mode not in ("L", "RGB"):
                    raise UserError(f"{path} has mode {picture.mode}, allowed are L and RGB with 8 bits; {remedy}")
                return np.array(picture)
        array = np.asarray(nib.load(path).dataobj).copy()
    except UserError:
        raise
    except Exception as error:  # PIL and nibabel raise many kinds for damaged files
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    if array.dtype != np.uint8 or array.ndim not in (3, 4):
        raise UserError(f"{path} is {array.dtype} of shape {array.shape}, allowed is uint8 (X, Y, Z[, C]); {remedy}")
    return array


def _encoded(path: str | Path, array: np.ndarray, spacing: Sequence[float] | None) -> bytes:
    if str(path).endswith(".png"):
        buffer = io.BytesIO()
        # level 3 takes a third of the default's time for a tenth more bytes
        Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", compress_level=3)
        return buffer.getvalue()
    image = nib.Nifti1Image(array, np.diag([*(spacing or (1.0, 1.0, 1.0)), 1.0]))
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)

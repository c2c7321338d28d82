# SPDX-License-Identifier: Apache-2.0
"""A given map on its way to a model and the image on its way back: same grid, same place in the patient.

Models of CT slices know pictures whose columns run to the patient's left and whose rows run to the back. Maps whose
axes run otherwise are turned for the model, and the image is turned back. Pictures of other kinds (and files without
a place in the patient) are taken as they are.
"""

from __future__ import annotations

import gzip
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from PIL import Image

from monai_synth.data.semantic import window_to_uint8
from monai_synth.errors import UserError
from monai_synth.inference.cases import MAP_ENDINGS

NIFTI = ".nii.gz"
PICTURES = (".png", ".jpg", ".tif")
MAX_VOXELS = 2**28  # 1024 slices of 512 x 512; a small file may claim any number
AXIAL = "LPS"


@dataclass(frozen=True)
class GivenMap:
    """A label map as the model takes it, and how to go back to the file's own grid.

    Attributes:
        labels: uint8 (rows, columns), or (X, Y, Z) for a model of volumes.
        header: of the NIfTI file; None for PNG.
        affine: of the NIfTI file, of the slice that was taken.
        shape: of the file's array, of the slice that was taken.
        back: turns an array of the model back to the file's axes; None where nothing was turned.
    """

    labels: np.ndarray
    header: Any = None
    affine: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    back: np.ndarray | None = None

    @property
    def ending(self) -> str:
        """Of the files that are given back."""
        return ".png" if self.header is None else NIFTI

    def write_for_model(self, path: Path) -> None:
        """The map as a file that the bundles read: PNG of a picture, NIfTI of a volume."""
        if self.labels.ndim == 2:
            Image.fromarray(self.labels).save(path.with_name(path.name + ".png"))
        else:
            nib.save(nib.Nifti1Image(self.labels, np.eye(4)), path.with_name(path.name + NIFTI))

    def encode(self, array: np.ndarray) -> bytes:
        """File of an array that the model made, on the grid of the given map.

        Args:
            array: (rows, columns), (rows, columns, 3) or (X, Y, Z); another size is resampled, linearly.
        """
        size = self.labels.shape
        if array.shape[: len(size)] != size:
            array = _resampled(array, size)
        if self.header is None:
            return _png(array)
        array = self.on_grid(array)
        image = nib.Nifti1Image(array, self.affine)
        for set_form, form in ((image.set_sform, "sform_code"), (image.set_qform, "qform_code")):
            set_form(self.affine, int(self.header[form]))
        image.header.set_xyzt_units("mm")
        return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)

    def on_grid(self, array: np.ndarray) -> np.ndarray:
        """An array of the model's axes in those of the given NIfTI file."""
        if self.labels.ndim == 2:
            array = np.swapaxes(array, 0, 1)[:, :, None]
        if self.back is not None:
            array = apply_orientation(array, self.back)
        return np.ascontiguousarray(array.reshape(*self.shape, *array.shape[3:]))


def read_map(path: str | Path, *, dims: int, num_labels: int, axial: bool, slice_index: int | None = None) -> GivenMap:
    """Read a label map.

    Args:
        path: PNG or NIfTI.
        dims: of the model, 2 or 3.
        num_labels: of the model; for two, 0/255 is read as 0/1.
        axial: turn it so that columns run to the left and rows to the back.
        slice_index: slice of a volume that a model of pictures takes, along the file's third axis.

    Raises:
        UserError: not such a file, damaged, a volume without a slice, or values that are no labels of the model.
    """
    path = Path(path)
    if not path.name.endswith(MAP_ENDINGS):
        raise UserError(f"the map {path.name} is no label map; allowed are {', '.join(MAP_ENDINGS)} files")
    if path.name.endswith(".png"):
        if dims == 3:
            raise UserError(f"the map {path.name} is a picture, the model makes volumes; give a {NIFTI} file")
        if slice_index is not None:
            raise UserError(f"slice is {slice_index}, but the map {path.name} is a picture; leave it out")
        return GivenMap(_labels(_read_grey(path, "map"), num_labels, path.name))
    image, array = _read_nifti(path, "map")
    affine, shape = image.affine, tuple(array.shape)
    if dims == 3:
        if array.ndim != 3:
            raise UserError(f"the map {path.name} has shape {shape}; the model takes (X, Y, Z)")
        return GivenMap(_labels(array, num_labels, path.name), image.header, affine, shape)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise UserError(f"the map {path.name} has shape {shape}; allowed are (X, Y) and (X, Y, Z)")
    if array.shape[2] > 1 or slice_index is not None:
        array, affine = _one_slice(array, affine, slice_index, path.name)
        shape = array.shape
    labels = _labels(array, num_labels, path.name)
    back = None
    if axial and _is_placed(image.header):
        labels, back = _turned(labels, affine, path.name)
    return GivenMap(np.ascontiguousarray(labels[:, :, 0].T), image.header, affine, shape, back)


def read_slice(path: str | Path) -> tuple[np.ndarray, list[float]]:
    """A CT slice as prepared datasets hold it.

    Args:
        path: NIfTI of one slice in HU, or PNG of 8-bit grey values.

    Returns:
        uint8 (rows, columns), turned as by :func:`read_map`, and mm per pixel along each.

    Raises:
        UserError: not such a file, damaged, or more than one slice.
    """
    path = Path(path)
    if path.name.endswith(".png"):
        array = _read_grey(path, "image")
        if array.dtype != np.uint8:
            raise UserError(f"the image {path.name} is {array.dtype}; give 8-bit grey values, or NIfTI in HU")
        return array, [1.0, 1.0]
    if not path.name.endswith(MAP_ENDINGS):
        raise UserError(f"the image {path.name} is no CT slice; allowed are {', '.join(MAP_ENDINGS)} files")
    image, array = _read_nifti(path, "image")
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] != 1:
        raise UserError(f"the image {path.name} has shape {array.shape}; training takes single slices, (X, Y, 1)")
    zooms = [float(mm) for mm in image.header.get_zooms()[:2]]
    if _is_placed(image.header):
        array, back = _turned(array, image.affine, path.name)
        zooms = zooms if int(back[0, 0]) == 0 else zooms[::-1]
    return window_to_uint8(array[:, :, 0].T), [zooms[1], zooms[0]]


def check_image(path: str | Path) -> None:
    """Check that a file is an image or a label map that a datastore may hold.

    Raises:
        UserError: of a kind that no bundle takes, or damaged.
    """
    path = Path(path)
    if path.name.endswith((".nii", NIFTI)):
        _read_nifti(path, "file")
    elif path.name.endswith(PICTURES):
        _read_picture(path, "file")
    else:
        raise UserError(f"the file ends in {path.suffix[:20]!r}; allowed are {', '.join(('.nii', NIFTI, *PICTURES))}")


def _is_placed(header: Any) -> bool:
    """Whether a file says where in the patient it lies."""
    return bool(int(header["sform_code"]) or int(header["qform_code"]))


def _turned(array: np.ndarray, affine: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, 1) with columns to the left and rows to the back, and what turns it back."""
    there, wanted = io_orientation(affine), axcodes2ornt(AXIAL)
    if int(there[2, 0]) != 2:
        raise UserError(f"{name} is no axial slice; give one whose third axis runs along the patient")
    return apply_orientation(array, ornt_transform(there, wanted)), ornt_transform(wanted, there)


def _one_slice(array: np.ndarray, affine: np.ndarray, index: int | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Slice (X, Y, 1) of a volume and its affine."""
    num = array.shape[2]
    if index is None:
        raise UserError(f"the map {name} has {num} slices, the model makes one; say which with slice, 0 to {num - 1}")
    if not 0 <= index < num:
        raise UserError(f"slice is {index}; the map {name} has 0 to {num - 1}")
    moved = affine.copy()
    moved[:3, 3] += index * affine[:3, 2]
    return array[:, :, index : index + 1], moved


def _labels(array: np.ndarray, num_labels: int, name: str) -> np.ndarray:
    """The map as uint8, if every value is a label."""
    if array.dtype.kind not in "iubf" or array.size == 0:
        raise UserError(f"the map {name} holds {array.dtype} of shape {array.shape}; give one whole number per pixel")
    values = np.unique(array)
    if num_labels == 2 and values.max() == 255 and set(values.tolist()) <= {0, 255}:
        return (array == 255).astype(np.uint8)
    bad = [v for v in values.tolist() if not (0 <= v < num_labels and v == int(v))]
    if bad:
        shown = ", ".join(f"{v:g}" for v in bad[:4])
        raise UserError(f"the map {name} has the values {shown}; the model knows the labels 0 to {num_labels - 1}")
    return array.astype(np.uint8)


def _read_nifti(path: Path, what: str) -> tuple[Any, np.ndarray]:
    """Header and array of a NIfTI file; its header is asked first how much there is to read."""
    try:
        image = nib.load(path)
        num = math.prod(image.shape)
        array = np.asarray(image.dataobj) if num <= MAX_VOXELS else None
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise UserError(f"the {what} {path.name} cannot be read as NIfTI ({error}); write it again") from error
    if array is None:
        raise UserError(f"the {what} {path.name} has {num} voxels; allowed are {MAX_VOXELS}, cut it into parts")
    return image, array


def _read_picture(path: Path, what: str) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture)
    except Exception as error:  # Pillow raises many kinds for damaged files
        ending = path.suffix[1:].upper()
        raise UserError(f"the {what} {path.name} cannot be read as {ending} ({error}); write it again") from error


def _read_grey(path: Path, what: str) -> np.ndarray:
    array = _read_picture(path, what)
    if array.ndim != 2:
        raise UserError(f"the {what} {path.name} has shape {array.shape}; give one grey value per pixel")
    return array


def read_made(path: Path) -> np.ndarray:
    """Array of a file that an export wrote: (rows, columns), (rows, columns, 3) or (X, Y, Z)."""
    if path.name.endswith(".png"):
        with Image.open(path) as picture:
            return np.asarray(picture)
    array = np.asarray(nib.load(path).dataobj)
    return array[:, :, 0].T if array.ndim == 3 and array.shape[2] == 1 else array


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
    return buffer.getvalue()


def _resampled(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    dims = len(size)
    channels = torch.from_numpy(array.astype(np.float32)).reshape(*array.shape[:dims], -1).movedim(-1, 0)[None]
    mode = "bilinear" if dims == 2 else "trilinear"
    out = torch.nn.functional.interpolate(channels, size=size, mode=mode, align_corners=False)[0].movedim(0, -1)
    out = out.reshape(*size, *array.shape[dims:]).numpy()
    return np.round(out).astype(array.dtype) if array.dtype.kind in "iu" else out

# SPDX-License-Identifier: Apache-2.0
"""Arrays to the bytes of PNG and NIfTI files as nnU-Net reads them, and the checks that make this lossless.

Axis order. 2-D arrays are pictures: (rows, columns). As NIfTI they become volumes (X = columns, Y = rows, Z =
1), which nnU-Net reads back as (1, rows, columns); the third spacing is 999 mm, as nnU-Net itself sets it for
2-D images, because its planner takes the axis of the largest spacing as the one not to convolve over. 3-D
arrays are indexed (X, Y, Z) as MONAI and nibabel index them, and are written as they are.

The same array and spacing give the same bytes: no time stamp enters a file.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping, Sequence

import numpy as np

from monai_synth.errors import UserError

SLICE_SPACING = 999.0  # mm between "slices" of a 2-D image; see the module's text


def checked_image(case: str, image: np.ndarray, *, file_ending: str, num_channels: int) -> np.ndarray:
    """The image in the type that goes to disk.

    Args:
        case: name of the case, for messages.
        image: PNG: uint8 (H, W) or (H, W, 3). NIfTI: (H, W) or (X, Y, Z), with several channels as one more axis
            at the end, of finite floats or of integers that fit int16.
        file_ending: ".png" or ".nii.gz".
        num_channels: channel names; 1, or 3 for RGB, in PNG.

    Returns:
        uint8 for PNG; uint8, int16 or float32 for NIfTI.

    Raises:
        UserError: the image cannot be stored without changing it, or nnU-Net would misread it.
    """
    if image.size == 0:
        msg = f"case {case!r}: the image is empty, shape {image.shape}; give an image with at least one pixel"
        raise UserError(msg)
    if file_ending == ".png":
        got = 1 if image.ndim == 2 else image.shape[-1] if image.ndim == 3 else 0
        if got != num_channels or (image.ndim == 3) != (num_channels == 3):
            msg = (
                f"case {case!r}: image of shape {image.shape} for {num_channels} channel name(s); "
                "PNG takes (H, W) for one channel name and (H, W, 3) for three"
            )
            raise UserError(msg)
        if image.dtype != np.uint8:
            msg = f"case {case!r}: image is {image.dtype}, PNG takes uint8; scale to 0..255 or use '.nii.gz'"
            raise UserError(msg)
        return image
    spatial = image.shape if num_channels == 1 else image.shape[:-1]
    if len(spatial) not in (2, 3) or (num_channels > 1 and image.shape[-1] != num_channels):
        form = "(H, W) or (X, Y, Z)" if num_channels == 1 else f"(H, W, {num_channels}) or (X, Y, Z, {num_channels})"
        msg = f"case {case!r}: image of shape {image.shape} for {num_channels} channel name(s); NIfTI takes {form}"
        raise UserError(msg)
    if image.dtype.kind == "f":
        if not np.isfinite(image).all():
            msg = f"case {case!r}: the image holds NaN or infinite values; replace them before the export"
            raise UserError(msg)
        return image.astype(np.float32)
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind in "iu" and image.min() >= -(2**15) and image.max() < 2**15:
        return image.astype(np.int16)
    msg = f"case {case!r}: image is {image.dtype}; NIfTI takes floats, or integers within -32768..32767"
    raise UserError(msg)


def checked_label(
    case: str, label: np.ndarray, *, spatial_shape: tuple[int, ...], labels: Mapping[str, int]
) -> np.ndarray:
    """The label map as uint8.

    Args:
        case: name of the case, for messages.
        label: integers (or booleans) of the image's spatial shape.
        spatial_shape: of the image.
        labels: name -> value of the labels that may occur.

    Raises:
        UserError: another shape, not integers, or a value that is not in ``labels``.
    """
    if label.shape != spatial_shape:
        msg = (
            f"case {case!r}: label of shape {label.shape}, image of spatial shape {spatial_shape}; "
            "give one integer per pixel (an RGB mask has to be turned into label values first)"
        )
        raise UserError(msg)
    if label.dtype.kind not in "iub":
        msg = f"case {case!r}: label is {label.dtype}; give integers"
        raise UserError(msg)
    allowed = set(labels.values())
    unknown = sorted(set(np.unique(label).tolist()) - allowed)
    if unknown:
        msg = (
            f"case {case!r}: label map has values {unknown[:8]}, allowed are 0..{max(allowed)} "
            f"({', '.join(labels)}); map them to these values before the export"
        )
        raise UserError(msg)
    return label.astype(np.uint8)


def checked_spacing(case: str, spacing: Sequence[float] | None, *, num_dims: int) -> tuple[float, ...]:
    """The spacing in mm along each axis of the array; 1 mm where none is given.

    Raises:
        UserError: another number of lengths than ``num_dims``, or one that is not positive and finite.
    """
    if spacing is None:
        return (1.0,) * num_dims
    values = tuple(float(value) for value in spacing)
    if len(values) != num_dims or not all(0 < value < float("inf") for value in values):
        msg = f"case {case!r}: spacing is {values}; give {num_dims} positive lengths in mm, one per array axis"
        raise UserError(msg)
    return values


def encode(array: np.ndarray, *, file_ending: str, spacing: tuple[float, ...]) -> bytes:
    """The bytes of a file that holds a checked image or label map.

    Args:
        array: what `checked_image` or `checked_label` returned.
        file_ending: ".png" or ".nii.gz".
        spacing: mm along each spatial axis of the array; PNG has no place for it.
    """
    return _png_bytes(array) if file_ending == ".png" else _nifti_bytes(array, spacing)


def _png_bytes(array: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG")
    return buffer.getvalue()


def _nifti_bytes(array: np.ndarray, spacing: tuple[float, ...]) -> bytes:
    import nibabel as nib

    if array.ndim == 2:
        # An axial DICOM picture runs to the patient's left along columns, to the back along rows: -x, -y in
        # RAS.
        array = array.T[:, :, None]
        affine = np.diag([-spacing[1], -spacing[0], SLICE_SPACING, 1.0])
    else:
        affine = np.diag([*spacing, 1.0])
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)

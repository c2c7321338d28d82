# SPDX-License-Identifier: Apache-2.0
"""Image and mask files as users have them, read into arrays: PNG, JPEG, TIFF, BMP, NIfTI and DICOM.

Two-dimensional arrays are (rows, columns), three-dimensional ones (X, Y, Z) in the order right, anterior, superior.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import tifffile
from PIL import Image, ImageOps, UnidentifiedImageError

from monai_synth.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".nii.gz", ".nii", ".dcm")
_LOSSY = (".jpg", ".jpeg")
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_FLATTEN = "lay it on a plain background first, for example: magick IN -background white -flatten OUT"
_COLOUR_CODED = (
    "turn its colours into numbers first, for example label[(mask == (255, 0, 0)).all(-1)] = 1 for every colour, "
    "and save label as 8-bit grey PNG"
)


@dataclass(frozen=True)
class Form:
    """What the header of an image says.

    Attributes:
        spatial_dims: 2 or 3.
        channels: C.
        eight_bit: whether the values are uint8 without a scale.
        modality: of a DICOM file; else "".
        patient: PatientID of a DICOM file, to keep a patient's images together; else "". Never written.
    """

    spatial_dims: int
    channels: int
    eight_bit: bool
    modality: str = ""
    patient: str = ""


@dataclass(frozen=True)
class Picture:
    """An image in memory.

    Attributes:
        values: (C, *S), uint8 or float32.
        spacing: mm along each spatial axis; 1 where the file does not say.
        affine: of a 3-D NIfTI; else None.
        inverted: whether low values are bright (MONOCHROME1).
    """

    values: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray | None = None
    inverted: bool = False


@dataclass(frozen=True)
class Mask:
    """A mask in memory.

    Attributes:
        values: numbers (*S), as stored.
        affine: of a 3-D NIfTI; else None.
        lossy: whether its values went through JPEG.
        deep: whether a picture has more than 8 bits.
    """

    values: np.ndarray
    affine: np.ndarray | None = None
    lossy: bool = False
    deep: bool = False


def ending_of(path: str) -> str | None:
    """The ending of a file that can be read, as spelled; "" for DICOM without one; None for others."""
    for ending in ENDINGS:
        if path.lower().endswith(ending):
            return path[-len(ending) :]
    with open(path, "rb") as file:
        return "" if file.read(132)[128:] == b"DICM" else None


def inspect_image(path: str) -> Form:
    """Read the header only.

    Raises:
        UserError: damaged, or of a form that cannot be used.
    """
    with _told(path):
        kind = _kind(path)
        if kind == "nifti":
            image = nib.load(path)
            array_shape = _nifti_shape(image.shape, path)
            return Form(len(array_shape[0]), array_shape[1], _is_plain_uint8(image))
        if kind == "dicom":
            header = pydicom.dcmread(path, stop_before_pixels=True)
            channels = int(header.get("SamplesPerPixel", 1))
            return Form(
                2, channels, channels == 3, str(header.get("Modality", "") or "OT"), str(header.get("PatientID", ""))
            )
        with _open_picture(path) as picture:
            if picture is None:
                with tifffile.TiffFile(path) as file:
                    shape = file.series[0].shape
                return Form(2, 3 if len(shape) == 3 else 1, False)
            channels = 1 if picture.mode in ("1", "L", "LA", *_DEEP_MODES) else 3
            return Form(2, channels, picture.mode not in _DEEP_MODES)


def read_picture(paths: Sequence[str]) -> Picture:
    """Read an image, of one file or of one per channel.

    Raises:
        UserError: damaged, of a form that cannot be used, holds NaN, or its channels differ in size.
    """
    pictures = []
    for path in paths:
        with _told(path):
            picture = {"nifti": _nifti_picture, "dicom": _dicom_picture, "picture": _plain_picture}[_kind(path)](path)
        _finite(picture.values, path)
        if pictures and picture.values.shape[1:] != pictures[0].values.shape[1:]:
            got, first = _size(picture.values.shape[1:]), _size(pictures[0].values.shape[1:])
            raise UserError(f"{path}: its size {got} differs from that of channel 0, {first}")
        pictures.append(picture)
    if len(pictures) == 1:
        return pictures[0]
    values = np.concatenate([p.values for p in pictures])
    return Picture(values, pictures[0].spacing, pictures[0].affine, pictures[0].inverted)


def read_mask(path: str) -> Mask:
    """Read a mask as it is stored.

    Raises:
        UserError: damaged, colour-coded, or holds NaN.
    """
    with _told(path):
        kind = _kind(path)
        if kind == "nifti":
            values, _, affine = _nifti_values(path)
            if values.shape[0] != 1:
                raise UserError(f"{path}: a mask with {values.shape[0]} channels; write one label per pixel")
            return Mask(_finite(values[0], path), affine)
        if kind == "dicom":
            dataset = _dicom_dataset(path)
            if int(dataset.get("SamplesPerPixel", 1)) != 1:
                raise UserError(f"{path}: a colour mask; {_COLOUR_CODED}")
            return Mask(_dicom_pixels(dataset))
        with _open_picture(path) as picture:
            if picture is None or picture.mode in _DEEP_MODES:
                values = tifffile.imread(path) if picture is None else np.asarray(picture)
                if values.ndim != 2:
                    raise UserError(f"{path}: a mask of shape {values.shape}; {_COLOUR_CODED}")
                return Mask(_finite(values, path), deep=True)
            return Mask(_grey_mask(picture, path), lossy=path.lower().endswith(_LOSSY))


class _told:  # noqa: N801  (used as a statement)
    """Turn whatever a reader raises for a damaged file into one message."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return
        if isinstance(error, MemoryError):
            msg = f"{self.path}: too large for the memory; cut it into pieces first"
        elif isinstance(error, Image.DecompressionBombError):
            msg = f"{self.path}: {error}; cut it into pieces first"
        else:
            said = " ".join(str(error).replace(self.path, "the file").split()) or type(error).__name__
            msg = f"{self.path}: cannot be read ({said[:160]}); the file is damaged or not what its name says"
        raise UserError(msg) from error


def _kind(path: str) -> str:
    ending = (ending_of(path) or "").lower()
    return {".nii": "nifti", ".nii.gz": "nifti", ".dcm": "dicom", "": "dicom"}.get(ending, "picture")


class _open_picture:  # noqa: N801  (used as a statement)
    """PIL's picture, turned upright; None for a TIFF that only tifffile reads (16-bit or float colours)."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Image.Image | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                self.picture = Image.open(self.path)
            except UnidentifiedImageError:
                if not self.path.lower().endswith((".tif", ".tiff")):
                    raise
                return None
        frames = getattr(self.picture, "n_frames", 1)
        if frames > 1 and self.picture.format != "MPO":  # a camera's JPEG with previews behind the picture
            self.picture.close()
            raise UserError(f"{self.path}: {frames} pages or frames; save each as a file of its own")
        if self.picture.mode in ("RGB", "RGBA") and any(";16" in str(tile[-1]) for tile in self.picture.tile):
            self.picture.close()  # PIL would take 8 of the 16 bits
            if self.picture.format == "TIFF":
                return None
            raise UserError(f"{self.path}: colours of 16 bits; save it as TIFF or with 8 bits")
        return self.picture

    def __exit__(self, *_: Any) -> None:
        if hasattr(self, "picture"):
            self.picture.close()


def _plain_picture(path: str) -> Picture:
    with _open_picture(path) as picture:
        array = tifffile.imread(path) if picture is None else _picture_array(ImageOps.exif_transpose(picture), path)
    if array.ndim == 3 and array.shape[-1] == 4:
        if (array[..., 3] != np.iinfo(array.dtype).max).any():
            raise UserError(f"{path}: parts of it are transparent; {_FLATTEN}")
        array = array[..., :3]
    if array.ndim == 3 and array.shape[-1] != 3:
        raise UserError(f"{path}: shape {array.shape}; allowed are grey (rows, columns) and RGB (rows, columns, 3)")
    channels_first = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return Picture(channels_first if array.dtype == np.uint8 else channels_first.astype(np.float32), (1.0, 1.0))


def _picture_array(picture: Image.Image, path: str) -> np.ndarray:
    """uint8 (rows, columns) or (rows, columns, 3 or 4); deeper grey values as they are."""
    mode = picture.mode
    if mode in _DEEP_MODES:
        return np.asarray(picture).astype(np.float32)
    if mode == "1":
        return np.asarray(picture.convert("L"))
    if mode in ("L", "LA"):
        if mode == "L" and "transparency" not in picture.info:
            return np.asarray(picture)
        rgba = np.asarray(picture.convert("RGBA"))
        if (rgba[..., 3] != 255).any():
            raise UserError(f"{path}: parts of it are transparent; {_FLATTEN}")
        return rgba[..., 0]
    if mode in ("RGB", "RGBA", "P", "PA"):
        clear = mode.endswith("A") or "transparency" in picture.info
        return np.asarray(picture.convert("RGBA" if clear else "RGB"))
    raise UserError(f"{path}: its colours are {mode}; allowed are grey and RGB, save it as RGB PNG")


def _grey_mask(picture: Image.Image, path: str) -> np.ndarray:
    """uint8 (rows, columns): grey values; of a palette with colours the numbers in it."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if picture.mode == "P":
        numbers = np.asarray(picture)
        palette = np.array(picture.getpalette()).reshape(-1, 3)
        used = palette[np.unique(numbers)]
        is_grey = (used == used[:, :1]).all()
        return palette[:, 0].astype(np.uint8)[numbers] if is_grey else numbers
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise UserError(f"{path}: a mask of mode {picture.mode}; save it as 8-bit grey PNG")
    if array.ndim == 2:
        return array
    if array.shape[-1] in (2, 4):
        if (array[..., -1] != 255).any():
            raise UserError(f"{path}: parts of the mask are transparent; {_FLATTEN.replace('white', 'black')}")
        array = array[..., :-1]
    if (array != array[..., :1]).any():
        raise UserError(f"{path}: a colour-coded mask; {_COLOUR_CODED}")
    return array[..., 0]


def _nifti_shape(shape: Sequence[int], path: str) -> tuple[tuple[int, ...], int]:
    """Spatial shape without a third axis of length 1, and number of channels."""
    shape = (*shape, *[1] * (4 - len(shape)))
    if len(shape) > 4 or min(shape) < 1:
        raise UserError(f"{path}: shape {tuple(shape)}; allowed are (X, Y), (X, Y, Z) and (X, Y, Z, channels)")
    return tuple(shape[:2] if shape[2] == 1 else shape[:3]), int(shape[3])


def _is_plain_uint8(image: Any) -> bool:
    slope, offset = getattr(image.dataobj, "slope", 1), getattr(image.dataobj, "inter", 0)
    return image.get_data_dtype() == np.uint8 and (slope, offset) == (1, 0)


def _nifti_values(path: str) -> tuple[np.ndarray, tuple[float, ...], np.ndarray | None]:
    """Values (C, *S), spacing and affine (None in 2-D)."""
    image = nib.load(path)
    spatial, channels = _nifti_shape(image.shape, path)
    if image.get_data_dtype().kind not in "uif":
        raise UserError(f"{path}: values of type {image.get_data_dtype()}; allowed are whole and real numbers")
    if len(spatial) == 3:
        image = nib.as_closest_canonical(image)
        spatial = image.shape[:3]
    values = np.asanyarray(image.dataobj).reshape(*spatial, channels)
    spacing = tuple(float(z) if z > 0 else 1.0 for z in image.header.get_zooms()[: len(spatial)])
    if len(spatial) == 2:  # NIfTI's first axis runs along the rows
        return values.transpose(2, 1, 0), spacing[::-1], None
    return np.moveaxis(values, -1, 0), spacing, image.affine


def _nifti_picture(path: str) -> Picture:
    values, spacing, affine = _nifti_values(path)
    return Picture(values if values.dtype == np.uint8 else values.astype(np.float32), spacing, affine)


def _dicom_dataset(path: str) -> Any:
    dataset = pydicom.dcmread(path)
    frames = int(dataset.get("NumberOfFrames", None) or 1)
    if frames != 1:
        raise UserError(f"{path}: {frames} frames; save each as a file of its own")
    return dataset


def _dicom_picture(path: str) -> Picture:
    dataset = _dicom_dataset(path)
    if str(dataset.get("BurnedInAnnotation", "")).upper() == "YES":
        raise UserError(f"{path}: BurnedInAnnotation is YES, so its pixels may name the patient; black them out first")
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        raise UserError(f"{path}: palette colours; save it as RGB PNG")
    pixels = _dicom_pixels(dataset)
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or (1.0, 1.0)
    spacing = tuple(float(s) for s in spacing)
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            raise UserError(f"{path}: colours of {pixels.dtype}; allowed are 8 bits")
        return Picture(np.moveaxis(pixels, -1, 0), spacing)
    slope, offset = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    values = (pixels.astype(np.float64) * slope + offset).astype(np.float32)
    return Picture(values[None], spacing, inverted=photometric == "MONOCHROME1")


def _finite(values: np.ndarray, path: str) -> np.ndarray:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"{path}: holds values that are no numbers (NaN or infinite); replace them")
    return values


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)


def _dicom_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    # here, so that all else can be imported beside MONAI Label, which needs pydicom 2
    from pydicom.pixels import pixel_array

    return pixel_array(dataset)

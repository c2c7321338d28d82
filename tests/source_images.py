# SPDX-License-Identifier: Apache-2.0
"""Small image files as users have them, and what was prepared from them, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from monai_synth.data.datalist import SPLITS
from monai_synth.errors import UserError


def picture(number: int, shape: tuple[int, ...] = (12, 16)) -> np.ndarray:
    """Noise uint8 that no other number gives."""
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray) -> Path:
    """Save as the ending says; NIfTI has a spacing of 0.5, 0.75 and 2 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(array, np.diag([0.5, 0.75, 2.0, 1.0])), path)
    else:
        Image.fromarray(array).save(path)
    return path


def dicom(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
    """A DICOM file of one frame, grey or RGB (H, W, 3), of Miller^Ann; ``elements`` are set last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.PatientName, dataset.PatientID, dataset.Modality = "Miller^Ann", "ID77", "DX"
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if pixels.ndim == 3 else "MONOCHROME2"
    dataset.PlanarConfiguration = 0
    bits = 8 * pixels.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in elements.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def cases_of(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {case["case_id"]: case for split in SPLITS for case in content[split]}


def refusal_of(prepare: Callable[..., Any], source: Path, tmp_path: Path, **options: Any) -> str:
    """What is said to a source that is refused, with nothing left behind."""
    before = {p.name for p in tmp_path.iterdir()}
    with pytest.raises(UserError) as caught:
        prepare(source, tmp_path / "out", **options)
    assert {p.name for p in tmp_path.iterdir()} == before
    return str(caught.value)


def shades(folder: Path, names: Sequence[str], *, channels: int = 1, step: float = 110.0) -> Path:
    """Twelve noisy pictures of 16 x 16 in a folder for each class, which is lighter by ``step`` than the last."""
    rng = np.random.default_rng(0)
    shape = (16, 16) if channels == 1 else (16, 16, channels)
    for k, name in enumerate(names):
        for i in range(12):
            save(folder / name / f"{i}.png", rng.normal(55 + step * k, 12, shape).clip(0, 255).astype(np.uint8))
    return folder

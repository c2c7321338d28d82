# SPDX-License-Identifier: Apache-2.0
"""Tiny CT series and annotation files in LIDC's form, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from monai_synth.data.semantic import FEATURES

UID = "1.2.826.0.1.3680043.8.498.7"
SIZE = 40
RATINGS = dict.fromkeys(FEATURES, 3) | {"internal_structure": 1, "calcification": 6}


def series_uid(number: int) -> str:
    return f"{UID}.{number}"


def sop_uid(number: int, z: int) -> str:
    return f"{UID}.{number}.{z + 1}"


def stored_image(z: int, size: int = SIZE) -> np.ndarray:
    """A square body with two lungs; int16 for slope 1 and intercept -1024."""
    hu = np.full((size, size), -1000, np.int16)
    hu[4:-4, 2:-2] = 40
    hu[10:-10, 6 : size // 2 - 3] = -850
    hu[10:-10, size // 2 + 3 : -6] = -850
    hu[5, 5 + z % 8] = 300  # tells the slices apart
    return hu + 1024


def ct_slice(number: int = 1, z: int = 0, *, patient: str = "SECRET-0001", size: int = SIZE) -> FileDataset:
    """One slice of series ``number`` at index ``z``; 2 mm apart, 4 mm pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = sop_uid(number, z)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, sop_uid(number, z)
    data.Modality, data.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SeriesInstanceUID, data.StudyInstanceUID = series_uid(number), f"{UID}.99.{number}"
    data.PatientID, data.PatientName, data.StudyDate = patient, "Doe^Jane", "19991231"
    data.ImagePositionPatient, data.ImageOrientationPatient = [-80, -80, -100 + 2 * z], [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [4, 4], 2, 1000 - z
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    put_pixels(data, stored_image(z, size))
    return data


def put_pixels(data: FileDataset, stored: np.ndarray) -> None:
    data.Rows, data.Columns = stored.shape
    data.PixelData = stored.astype("<i2").tobytes()


def other_dicom(modality: str) -> FileDataset:
    data = ct_slice(90)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    data.Modality = modality
    return data


def write_series(
    folder: Path, number: int = 1, *, patient: str = "SECRET-0001", num_slices: int = 10, xml: str | None = ""
) -> Path:
    """A series whose file names are in no order; ``xml`` None leaves the reading out."""
    folder.mkdir(parents=True, exist_ok=True)
    for z in range(num_slices):
        ct_slice(number, z, patient=patient).save_as(folder / f"{(7 * z) % num_slices:03d}-x.bin")
    if xml is not None:
        (folder / "reading.xml").write_text(xml or reading_xml(number), encoding="utf-8")
    return folder


def square(row: int, col: int, side: int) -> list[tuple[int, int]]:
    """Outline around ``side`` x ``side`` pixels from (row, col) on, as (column, row), step by step."""
    r0, c0, r1, c1 = row - 1, col - 1, row + side, col + side
    top = [(c, r0) for c in range(c0, c1)]
    right = [(c1, r) for r in range(r0, r1)]
    bottom = [(c, r1) for c in range(c1, c0, -1)]
    left = [(c0, r) for r in range(r1, r0, -1)]
    return [*top, *right, *bottom, *left, top[0]]


def roi_xml(number: int, z: int, xy: Sequence[tuple[int, int]], *, inclusion: bool = True) -> str:
    points = "".join(f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in xy)
    return (
        f"<roi><imageZposition>{-100 + 2 * z}.0 </imageZposition>"
        f"<imageSOP_UID>{sop_uid(number, z)}</imageSOP_UID>"
        f"<inclusion>{str(inclusion).upper()}</inclusion>{points}</roi>"
    )


def nodule_xml(rois: str, ratings: dict[str, int] | None = RATINGS, name: str = "N1") -> str:
    def camel(feature: str) -> str:
        head, *tail = feature.split("_")
        return head + "".join(t.capitalize() for t in tail)

    rated = "".join(f"<{camel(k)}>{v}</{camel(k)}>" for k, v in (ratings or {}).items())
    characteristics = "" if ratings is None else f"<characteristics>{rated}</characteristics>"
    inside = f"<noduleID>{name}</noduleID>{characteristics}{rois}"
    return f"<unblindedReadNodule>{inside}</unblindedReadNodule>"


def message_xml(number: int, sessions: Sequence[str], *, root: str = "LidcReadMessage") -> str:
    body = "".join(f"<readingSession>{session}</readingSession>" for session in sessions)
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="http://www.nih.gov"><ResponseHeader>'
        f"<SeriesInstanceUid>{series_uid(number)}</SeriesInstanceUid></ResponseHeader>{body}</{root}>"
    )


def reading_xml(number: int) -> str:
    """Two readers draw a nodule in slices 4 and 5, 4 x 4 and shifted; a third marks a point in slice 7."""
    drawings = []
    for shift in (0, 1):
        rois = "".join(roi_xml(number, z, square(20, 26 + shift, 4)) for z in (4, 5))
        drawings.append(nodule_xml(rois, RATINGS | {"malignancy": 4 + shift}))
    return message_xml(number, [*drawings, nodule_xml(roi_xml(number, 7, [(12, 20)]), None), ""])


def rewrite(path: Path, **values: object) -> None:
    """Change header values of a file."""
    data = pydicom.dcmread(path)
    for name, value in values.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(path)

# SPDX-License-Identifier: Apache-2.0
"""Writes a phantom patient as LIDC-IDRI is published: a CT series and the XML of its four readers."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from monai_synth.data.phantom_nodules import RATINGS, Reading
from monai_synth.data.phantom_shapes import FIELD_OF_VIEW_MM, SLICE_MM, Array

RESCALE_INTERCEPT = -1024
PADDING = -2000  # stored value outside the scanner's circular field of view
_XML_NAMES = {"internal_structure": "internalStructure"}


def make_uid(*parts: object) -> str:
    """A UID under the root 2.25 that depends on nothing but `parts`."""
    digest = hashlib.sha256("/".join(["monai_synth phantom", *map(str, parts)]).encode()).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}"


def write_series(
    folder: Path, image_hu: Array, z_mm: Array, key: tuple[object, ...], patient_id: str, contrast: bool
) -> list[str]:
    """Write one CT series.

    Args:
        folder: existing folder for `1-001.dcm`, `1-002.dcm`, ...
        image_hu: densities (D, H, W), int16; the value PADDING + RESCALE_INTERCEPT stands for padding.
        z_mm: position (D,) of every slice along the body axis in mm.
        key: what the UIDs are derived from.
        patient_id: PatientID, also used as the name.
        contrast: whether a contrast agent was given.

    Returns:
        SOPInstanceUID of every slice.
    """
    stored = (image_hu.astype(np.int32) - RESCALE_INTERCEPT).astype("<i2")
    matrix = image_hu.shape[-1]
    pixel = FIELD_OF_VIEW_MM / matrix
    corner = -(matrix - 1) / 2 * pixel
    uids = []
    for k, plane in enumerate(stored):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = make_uid(*key, "image", k)
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.ImplementationClassUID = make_uid("implementation")
        meta.ImplementationVersionName = "MONAI_SYNTH"
        d = FileDataset(None, Dataset(), file_meta=meta, preamble=b"\0" * 128)
        d.SpecificCharacterSet = "ISO_IR 100"
        d.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
        d.SOPClassUID, d.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        d.StudyDate = d.StudyTime = d.AccessionNumber = d.ReferringPhysicianName = ""
        d.Modality, d.Manufacturer, d.ManufacturerModelName = "CT", "monai_synth", "thorax phantom"
        d.StudyDescription, d.SeriesDescription = "Synthetic thorax", "Computed phantom, not a patient"
        d.PatientName = d.PatientID = patient_id
        d.PatientBirthDate = d.PatientSex = ""
        d.PatientIdentityRemoved = "YES"
        d.DeidentificationMethod = "Synthetic: no person was scanned"
        if contrast:
            d.ContrastBolusAgent = "IV"
        d.BodyPartExamined, d.PatientPosition = "CHEST", "HFS"
        d.SliceThickness, d.KVP, d.ConvolutionKernel = f"{SLICE_MM:.6f}", "120", "STANDARD"
        d.ReconstructionDiameter = f"{FIELD_OF_VIEW_MM:.6f}"
        d.StudyInstanceUID, d.SeriesInstanceUID = make_uid(*key, "study"), make_uid(*key, "series")
        d.FrameOfReferenceUID, d.PositionReferenceIndicator = make_uid(*key, "frame"), "SN"
        d.StudyID, d.SeriesNumber, d.InstanceNumber = "1", 1, k + 1
        d.ImagePositionPatient = [f"{corner:.6f}", f"{corner:.6f}", f"{z_mm[k]:.6f}"]
        d.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        d.SliceLocation = f"{z_mm[k]:.6f}"
        d.SamplesPerPixel, d.PhotometricInterpretation = 1, "MONOCHROME2"
        d.Rows = d.Columns = matrix
        d.PixelSpacing = [f"{pixel:.6f}", f"{pixel:.6f}"]
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
        d.add_new("PixelPaddingValue", "SS", PADDING)
        d.WindowCenter, d.WindowWidth = "-600", "1600"
        d.RescaleIntercept, d.RescaleSlope, d.RescaleType = str(RESCALE_INTERCEPT), "1", "HU"
        d.PixelData = plane.tobytes()
        d["PixelData"].VR = "OW"
        d.save_as(folder / f"1-{k + 1:03d}.dcm", enforce_file_format=True)
        uids.append(d.SOPInstanceUID)
    return uids


def lidc_xml(
    readings: list[list[Reading]],
    others: list[list[tuple[int, int, int]]],
    uids: list[str],
    z_mm: Array,
    key: tuple[object, ...],
) -> str:
    """The readers' opinions in the form of LIDC's `LidcReadMessage`.

    As in LIDC, nothing says which readings of two readers mean the same nodule.

    Args:
        readings: per reader, the nodules marked.
        others: per reader, the places (slice, row, column) marked as something else than a nodule.
        uids: SOPInstanceUID of every slice.
        z_mm: position of every slice.
        key: what the series' UIDs were derived from.

    Returns:
        The XML text.
    """
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<LidcReadMessage uid="{make_uid(*key, "message")}" xmlns="http://www.nih.gov"'
        ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"'
        ' xsi:schemaLocation="http://www.nih.gov  http://troll.rad.med.umich.edu/lidc/LidcReadMessage.xsd">',
        "<ResponseHeader>",
        "<Version>1.8.1</Version>",
        "<TaskDescription>Second unblinded read</TaskDescription>",
        f"<SeriesInstanceUid>{make_uid(*key, 'series')}</SeriesInstanceUid>",
        "<ResponseDescription>1 - Reading complete</ResponseDescription>",
        f"<StudyInstanceUID>{make_uid(*key, 'study')}</StudyInstanceUID></ResponseHeader>",
    ]

    def place(k: int) -> list[str]:
        return [
            f"      <imageZposition>{z_mm[k]:.6f} </imageZposition>",
            f"      <imageSOP_UID>{uids[k]}</imageSOP_UID>",
        ]

    for reader, marked in enumerate(readings):
        lines += [
            "<readingSession>",
            "  <annotationVersion>3.12</annotationVersion>",
            f"  <servicingRadiologistID>phantom-reader-{reader + 1}</servicingRadiologistID>",
        ]
        for number, reading in enumerate(marked):
            lines += ["  <unblindedReadNodule>", f"    <noduleID>Nodule {number + 1:03d}</noduleID>"]
            if reading.ratings:
                lines.append("    <characteristics>")
                for name in RATINGS:
                    tag = _XML_NAMES.get(name, name)
                    lines.append(f"      <{tag}>{reading.ratings[name]}</{tag}>")
                lines.append("    </characteristics>")
            for k, outline in sorted(reading.contours.items(), reverse=True):
                lines += ["    <roi>", *place(k), "      <inclusion>TRUE</inclusion>"]
                lines += [
                    f"      <edgeMap><xCoord>{col}</xCoord><yCoord>{row}</yCoord></edgeMap>" for row, col in outline
                ]
                lines.append("    </roi>")
            lines.append("  </unblindedReadNodule>")
        for number, (k, row, col) in enumerate(others[reader]):
            lines += [
                "  <nonNodule>",
                f"    <nonNoduleID>Non-nodule {number + 1:03d}</nonNoduleID>",
                *place(k),
            ]
            lines += [f"      <locus><xCoord>{col}</xCoord><yCoord>{row}</yCoord></locus>", "  </nonNodule>"]
        lines.append("</readingSession>")
    lines.append("</LidcReadMessage>")
    return "\n".join(lines) + "\n"

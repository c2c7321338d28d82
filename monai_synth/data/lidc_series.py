# SPDX-License-Identifier: Apache-2.0
"""CT series from a folder of DICOM files, whatever its nesting and file names.

Files are known by their content. Every fault of a file or a series becomes a :class:`Problem` with one
message, so that a folder can be reported in full before anything is written.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder

from monai_synth.data.lidc_xml import read_lidc_xml
from monai_synth.data.problems import Problem
from monai_synth.data.semantic import HU_MIN
from monai_synth.errors import UserError

_HEADER_TAGS = [
    *(
        "SOPClassUID",
        "SOPInstanceUID",
        "SeriesInstanceUID",
        "StudyInstanceUID",
        "PatientID",
        "Modality",
        "ImageType",
    ),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "Rows", "Columns"),
    *("PhotometricInterpretation", "SamplesPerPixel", "NumberOfFrames", "BitsAllocated"),
    *("RescaleSlope", "RescaleIntercept"),
]
_NEEDED_TAGS = [
    *("Rows", "Columns", "BitsAllocated", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient"),
    *("RescaleSlope", "RescaleIntercept"),
]
_MEND = "copy it again from its source, or leave its series out (--skip-bad)"


@dataclass(frozen=True, slots=True)
class SliceFile:
    """Header of one CT image file; ``problem`` says why its pixels cannot be used."""

    path: str
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    position: tuple[float, float, float]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    shape: tuple[int, int]
    thickness: float | None
    problem: Problem | None = None


@dataclass(frozen=True)
class ReadingFile:
    """An annotation file of a CT series."""

    path: str
    series_uid: str


@dataclass(frozen=True)
class Series:
    """A CT series in order of position along its normal (feet to head for a usual axial series).

    Attributes:
        slices: at least one.
        spacing: (slice, row, column) spacing in mm; the first is the median distance of neighbours.
        num_copies: identical copies of its files that were left out.
    """

    uid: str
    study_uid: str
    patient_id: str
    slices: tuple[SliceFile, ...]
    spacing: tuple[float, float, float]
    shape: tuple[int, int]
    num_copies: int = 0


def inspect_file(path: str) -> SliceFile | ReadingFile | Problem | str | None:
    """Say what a file is.

    Returns:
        A CT slice, a CT reading, a problem, the reason why it is rightly skipped (``not_ct``, ``localizer``,
        ``xray_reading``, ``other_xml``), or None for a file that is neither DICOM nor XML.
    """
    try:
        with open(path, "rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        return Problem("unreadable", f"{path}: cannot be read ({error.strerror}); mend its permissions or {_MEND}")
    if head[128:132] == b"DICM" or head[:6] in (
        b"\x08\x00\x00\x00\x04\x00",
        b"\x08\x00\x05\x00CS",
        b"\x08\x00\x08\x00CS",
    ):
        return _inspect_dicom(path)
    if path.lower().endswith(".dcm"):
        got = "an empty file" if not head else "no DICOM header"
        return Problem("unreadable", f"{path}: got {got}, a DICOM file is needed; {_MEND}")
    text = head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").replace(b"\x00", b"")
    if path.lower().endswith(".xml") or (text.startswith(b"<") and b"ReadMessage" in text):
        try:
            reading = read_lidc_xml(path)
        except UserError as error:
            return Problem("bad_xml", str(error))
        names = {"xray": "xray_reading", "other": "other_xml"}
        return ReadingFile(path, reading.series_uid) if reading.kind == "ct" else names[reading.kind]
    return None


def _inspect_dicom(path: str) -> SliceFile | Problem | str:
    try:
        with open(path, "rb") as stream:
            header = pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=_HEADER_TAGS)
            left = Path(path).stat().st_size - stream.tell()
        modality = str(header.get("Modality", ""))
        if not modality and "SOPClassUID" not in header:
            if "MediaStorageSOPClassUID" in header.file_meta and header.file_meta.MediaStorageSOPClassUID.endswith(
                ".1.3.10"
            ):
                return "not_ct"  # DICOMDIR
            return Problem("truncated", f"{path}: the DICOM header ends before the modality; {_MEND}")
        if modality != "CT":
            return "not_ct"
        if "LOCALIZER" in (header.get("ImageType") or []):
            return "localizer"
        missing = [t for t in ("SOPInstanceUID", "SeriesInstanceUID") if not header.get(t)]
        if missing:
            return Problem("incomplete_header", f"{path}: the CT header has no {' and no '.join(missing)}; {_MEND}")
        thickness = header.get("SliceThickness")
        problem = _pixel_problem(path, header, left)
        geometry = {} if problem else _geometry(header)
    except Exception as error:  # pydicom raises whatever a broken file leads it to
        return Problem("unreadable", f"{path}: is broken DICOM ({_first_line(error)}); {_MEND}")
    return SliceFile(
        path=path,
        sop_uid=str(header.SOPInstanceUID),
        series_uid=_shared(str(header.SeriesInstanceUID)),
        study_uid=_shared(str(header.get("StudyInstanceUID") or "")),
        patient_id=_shared(str(header.get("PatientID") or "")),
        position=geometry.get("position", (0.0, 0.0, 0.0)),
        orientation=_shared(geometry.get("orientation", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))),
        spacing=_shared(geometry.get("spacing", (1.0, 1.0))),
        shape=(int(header.get("Rows") or 0), int(header.get("Columns") or 0)),
        thickness=float(thickness) if thickness not in (None, "") else None,
        problem=problem,
    )


@lru_cache(maxsize=4096)
def _shared(value: Any) -> Any:
    """One object for equal values: the slices of a series have most of their header in common."""
    return value


def _geometry(header: pydicom.Dataset) -> dict[str, tuple[float, ...]]:
    return {
        "position": tuple(float(v) for v in header.ImagePositionPatient),
        "orientation": tuple(float(v) for v in header.ImageOrientationPatient),
        "spacing": tuple(float(v) for v in header.PixelSpacing),
    }


def _pixel_problem(path: str, header: pydicom.Dataset, left: int) -> Problem | None:
    """Why the pixels of a CT file cannot be used; ``left`` is the number of bytes from the pixel data on."""
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    if left < 8 and not (syntax and syntax.is_deflated):
        return Problem("no_pixel_data", f"{path}: has no pixel data, or ends before it; {_MEND}")
    frames, samples = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
    if frames != 1 or samples != 1:
        got = f"{frames} frames and {samples} samples per pixel"
        mend = "convert it to classic CT images (one frame, grey) or leave its series out (--skip-bad)"
        return Problem("not_single_grey_frame", f"{path}: has {got}, one of each is allowed; {mend}")
    missing = [t for t in _NEEDED_TAGS if header.get(t) in (None, "")]
    if missing:
        return Problem("incomplete_header", f"{path}: the CT header has no {', no '.join(missing)}; {_MEND}")
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    if photometric != "MONOCHROME2":
        mend = "its values may not be HU, so convert it to MONOCHROME2 or leave its series out (--skip-bad)"
        return Problem("photometric", f"{path}: is {photometric}, MONOCHROME2 is allowed; {mend}")
    if syntax is not None and syntax.is_compressed and not syntax.is_deflated:
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            available = False
        if not available:
            mend = "install one: pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg (or python-gdcm)"
            msg = f"{path}: is compressed as {syntax.name}, and no decoder for that is installed; {mend}"
            return Problem("no_decoder", msg)
    elif syntax is None or not syntax.is_deflated:
        expected = int(header.Rows) * int(header.Columns) * (int(header.BitsAllocated) // 8)
        element = 8 if syntax is not None and syntax.is_implicit_VR else 12  # bytes of tag, type and length
        if syntax is not None and left < expected + element:
            got = f"{max(left - element, 0)} bytes of pixel data, {expected} are needed"
            return Problem("truncated", f"{path}: is cut off ({got}); {_MEND}")
    return None


def group_series(files: Iterable[SliceFile]) -> dict[str, list[SliceFile]]:
    """Slices by SeriesInstanceUID, each list in order of path."""
    groups: dict[str, list[SliceFile]] = defaultdict(list)
    for file in sorted(files, key=lambda f: f.path):
        groups[file.series_uid].append(file)
    return dict(sorted(groups.items()))


def slice_thickness(files: Sequence[SliceFile]) -> float | None:
    """Median SliceThickness in mm of a series, None where no file has one."""
    values = [f.thickness for f in files if f.thickness is not None]
    return float(np.median(values)) if values else None


def is_axial(files: Sequence[SliceFile]) -> bool:
    """Whether the slices lie within about 35 degrees of the axial plane; with gantry tilt they do."""
    return all(abs(_normal(f)[2]) > 0.8 for f in files)


def order_series(files: Sequence[SliceFile]) -> Series | list[Problem]:
    """Put the slices of a series in order, or say everything that is wrong with them.

    Files that are the same byte for byte count as one.
    """
    problems = _once_per_code([f.problem for f in files if f.problem is not None])
    if problems:
        return problems
    unique: dict[str, SliceFile] = {}
    for file in files:
        other = unique.setdefault(file.sop_uid, file)
        if other is not file and _digest(other.path) != _digest(file.path):
            got = f"has the SOPInstanceUID of {other.path} but other content"
            problems.append(Problem("duplicate_slice", f"{file.path}: {got}; remove the one that is wrong"))
    slices, first = list(unique.values()), files[0]
    for name, code, mend in (
        ("shape", "mixed_sizes", "one size (rows, columns)"),
        ("orientation", "mixed_orientation", "one orientation"),
        ("spacing", "mixed_spacing", "one pixel spacing"),
        ("patient_id", "mixed_patients", "one PatientID"),
    ):
        for file in slices:
            if not _same(getattr(file, name), getattr(first, name)):
                got = f"its {name} differs from that of {first.path}"
                if name != "patient_id":
                    got += f" ({getattr(file, name)} and {getattr(first, name)})"
                msg = f"{file.path}: {got}; a series has {mend}. Remove the files that do not belong to it"
                problems.append(Problem(code, msg))
                break
    if problems:
        return problems
    normal = _normal(first)
    places = {f.path: round(float(np.dot(f.position, normal)), 4) for f in slices}
    slices.sort(key=lambda f: (places[f.path], f.path))
    steps = np.diff([places[f.path] for f in slices])
    step = float(np.median(steps)) if len(steps) else (first.thickness or 1.0)
    for i, gap in enumerate(steps):
        here, after = slices[i], slices[i + 1]
        if gap < 1e-3:
            got = f"lies at the same position as {here.path} ({places[here.path]:g} mm)"
            problems.append(Problem("duplicate_slice", f"{after.path}: {got}; remove one of them"))
        elif gap > 1.5 * step:
            got = f"{gap:g} mm between it and {here.path}, {step:g} mm is usual in this series"
            num = max(round(gap / step) - 1, 1) if step > 0 else 1
            mend = f"add the {num} missing slice(s), or leave the series out (--skip-bad)"
            problems.append(Problem("missing_slice", f"{after.path}: {got}; {mend}"))
    if problems:
        return problems
    return Series(
        uid=first.series_uid,
        study_uid=first.study_uid,
        patient_id=first.patient_id,
        slices=tuple(slices),
        spacing=(step, *first.spacing),
        shape=first.shape,
        num_copies=len(files) - len(unique),
    )


def _once_per_code(problems: Sequence[Problem]) -> list[Problem]:
    """The first problem of each kind in a series, saying how many files more have it."""
    by_code: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_code[problem.code].append(problem)
    return [
        Problem(
            code,
            same[0].message + (f" [{len(same) - 1} more files of this series alike]" if same[1:] else ""),
        )
        for code, same in by_code.items()
    ]


def read_hu(file: SliceFile) -> np.ndarray:
    """Pixels of a slice in HU, float32, shape (rows, columns); padding and everything below -1024 is -1024.

    Raises:
        UserError: the pixels cannot be decoded or have another shape than the header says.
    """
    try:
        data = pydicom.dcmread(file.path, force=True)
        stored = data.pixel_array
        slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
        padding = data.get("PixelPaddingValue")
        limit = data.get("PixelPaddingRangeLimit")
    except Exception as error:  # decoders raise whatever broken pixels lead them to
        raise UserError(f"{file.path}: its pixels cannot be decoded ({_first_line(error)}); {_MEND}") from error
    if stored.shape != file.shape:
        raise UserError(f"{file.path}: decodes to {stored.shape}, its header says {file.shape}; {_MEND}")
    hu = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if padding not in (None, ""):
        # The header may hold the value with the other sign convention than the pixels (63536 for -2000).
        low = high = int(np.array(int(padding)).astype(stored.dtype))
        if limit not in (None, ""):
            low, high = sorted((low, int(np.array(int(limit)).astype(stored.dtype))))
        hu[(stored >= low) & (stored <= high)] = HU_MIN
    return np.maximum(hu, np.float32(HU_MIN))


def _normal(file: SliceFile) -> np.ndarray:
    return np.cross(file.orientation[:3], file.orientation[3:])


def _same(a: object, b: object) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=1e-3))  # type: ignore[arg-type]
    return a == b


def _digest(path: str) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

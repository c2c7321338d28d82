# SPDX-License-Identifier: Apache-2.0
"""One scan from DICOM and XML to PNG images, label maps and nodule tables."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monai_synth.data.lidc_nodules import join_nodules, nodules_on_slice, slice_areas
from monai_synth.data.lidc_series import Series, SliceFile, read_hu
from monai_synth.data.lidc_xml import read_lidc_xml
from monai_synth.data.lungs import LungPrior
from monai_synth.data.semantic import semantic_map, window_to_uint8
from monai_synth.errors import UserError


@dataclass(frozen=True)
class ScanTask:
    """What a worker needs to prepare one scan.

    Attributes:
        patient: serial name such as ``p0001``.
        scan: serial number of the scan of that patient, from 1.
    """

    patient: str
    scan: int
    series: Series
    xml_path: str
    consensus: float
    slice_fraction: float
    min_nodule_area: int


@dataclass(frozen=True)
class ScanResult:
    """Cases of one scan as ``dataset.json`` lists them, and its counts."""

    patient: str
    scan: int
    cases: list[dict[str, Any]]
    counts: dict[str, int] = field(default_factory=dict)


def evenly(num: int, wanted: int) -> list[int]:
    """``wanted`` of ``num`` places at uniform spacing, each in the middle of an equal part."""
    wanted = min(num, wanted)
    return [int((i + 0.5) * num / wanted) for i in range(wanted)]


def select_slices(areas: np.ndarray, slice_fraction: float, min_area: int) -> list[int]:
    """Slices of a scan that go into the dataset (LSDM thesis, Sec 4.1).

    The quota is the fraction of all slices, rounded, at least one. Slices with a nodule of ``min_area``
    pixels or more come first, thinned evenly where they exceed the quota; slices without any nodule pixel
    fill it up at uniform spacing. Slices where every nodule is smaller than that are neither and are not
    taken.

    Args:
        areas: pixels of each nodule in each slice, shape (num_nodules, num_slices).
        slice_fraction: in (0, 1].
        min_area: pixels.

    Returns:
        Slice indices, ascending.
    """
    num_slices = areas.shape[1]
    quota = max(int(np.floor(slice_fraction * num_slices + 0.5)), 1)
    bearing = np.flatnonzero((areas >= max(min_area, 1)).any(0))
    free = np.flatnonzero((areas == 0).all(0))
    chosen = bearing[evenly(len(bearing), quota)].tolist() if len(bearing) else []
    if quota > len(chosen) and len(free):
        chosen += free[evenly(len(free), quota - len(chosen))].tolist()
    return sorted(chosen)


def prepare_scan(task: ScanTask, out: Path, stopped: Callable[[], bool] = lambda: False) -> ScanResult:
    """Prepare one scan and write its PNG files below ``out``.

    Nothing is written before all slices of the scan are done; one slice is held at a time.

    Args:
        task: the scan.
        out: folder with ``images`` and ``labels``.
        stopped: asked between slices.

    Raises:
        UserError: a slice cannot be decoded, or the run is given up.
        OSError: a file cannot be written, as on a full disk.
    """
    series = task.series
    slices = {s.sop_uid: i for i, s in enumerate(series.slices)}
    positions = [s.position[2] for s in series.slices]
    joined = join_nodules(
        read_lidc_xml(task.xml_path),
        slices,
        positions,
        series.shape,
        series.spacing,
        consensus=task.consensus,
    )
    areas = slice_areas(joined.nodules, len(series.slices))
    prior = LungPrior((_read_unless(s, stopped) for s in series.slices), series.spacing)
    cases, files = [], []
    for z in select_slices(areas, task.slice_fraction, task.min_nodule_area):
        image_hu = _read_unless(series.slices[z], stopped)
        nodule_label, table = nodules_on_slice(joined.nodules, z, series.shape, task.min_nodule_area)
        label = semantic_map(image_hu, nodule_label, series.spacing[1:], prior=prior.on_slice(z, series.shape))
        case_id = f"{task.patient}-s{task.scan}-z{z:04d}"
        case = {
            "image": f"images/{case_id}.png",
            "label": f"labels/{case_id}.png",
            "case_id": case_id,
            "patient_id": task.patient,
            "spacing": [round(v, 6) for v in series.spacing[1:]],
            "nodules": table,
        }
        cases.append(case)
        files += [(case["image"], _png(window_to_uint8(image_hu))), (case["label"], _png(label))]
    for name, content in files:
        (out / name).write_bytes(content)
    counts = {
        "num_slices_in_scans": len(series.slices),
        "num_nodules": len(joined.nodules),
        "num_nodules_in_slices": len({row["nodule_id"] for case in cases for row in case["nodules"]}),
        "num_small_nodule_marks": joined.num_small,
        "num_non_nodule_marks": joined.num_non_nodules,
        "num_nodules_without_rating": joined.num_unrated,
        "num_outlines_without_area": joined.num_empty,
        "num_outlines_outside_the_series": joined.num_outside,
        "num_copied_files": series.num_copies,
    }
    return ScanResult(task.patient, task.scan, cases, counts)


def _read_unless(file: SliceFile, stopped: Callable[[], bool]) -> np.ndarray:
    if stopped():
        raise UserError("the run is being given up")
    return read_hu(file)


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=6)
    return stream.getvalue()

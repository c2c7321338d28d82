# SPDX-License-Identifier: Apache-2.0
"""What a folder of DICOM and XML holds for ``monai-synth prepare lidc``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from monai_synth.data.lidc_series import (
    ReadingFile,
    Series,
    SliceFile,
    group_series,
    inspect_file,
    is_axial,
    order_series,
    slice_thickness,
)
from monai_synth.data.lidc_xml import read_lidc_xml
from monai_synth.data.problems import Problem
from monai_synth.data.source_files import files_below
from monai_synth.data.workers import map_unordered, stopped
from monai_synth.errors import UserError


@dataclass
class Source:
    """What a folder holds.

    Attributes:
        scans: usable series with the path of their reading, in order of (PatientID, SeriesInstanceUID).
        problems: everything unusable.
        skipped: what is rightly left out, counted by reason.
    """

    scans: list[tuple[Series, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    num_files: int = 0


def find_scans(
    source: Path,
    *,
    max_slice_thickness: float = 2.5,
    leave_out: Sequence[Path] = (),
    num_workers: int = 1,
    progress: bool = False,
) -> Source:
    """Look through a folder by the content of its files.

    Args:
        source: folder.
        max_slice_thickness: mm; thicker series are counted as skipped.
        leave_out: folders not to look into, such as the output where it lies in the source.
        num_workers: processes; a few thousand files are read faster without any.
        progress: show a progress bar.

    Raises:
        UserError: it is no folder, or holds no file.
    """
    if not source.is_dir():
        raise UserError(f"source {source} is not a folder; give the folder that holds LIDC-IDRI (DICOM and XML)")
    found = Source()
    paths = sorted(files_below(source, leave_out, found.problems))
    if not paths and not found.problems:
        raise UserError(f"source {source} holds no file; give the folder that holds LIDC-IDRI (DICOM and XML)")
    chunks = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    found.num_files, slices, readings = len(paths), [], []
    workers = num_workers if len(chunks) > 8 else 1
    with (
        tqdm(total=len(paths), desc="reading headers", unit="file", disable=not progress) as bar,
        closing(map_unordered(_inspect_files, chunks, workers)) as results,
    ):
        for items in results:
            bar.update(len(items))
            for item in items:
                if isinstance(item, SliceFile):
                    slices.append(item)
                elif isinstance(item, ReadingFile):
                    readings.append(item)
                elif isinstance(item, Problem):
                    found.problems.append(item)
                else:
                    found.skipped[item or "no_dicom_or_xml"] += 1
    _match(found, group_series(slices), _one_reading_per_series(found, readings), max_slice_thickness)
    found.problems.sort(key=lambda p: p.message)
    return found


def _inspect_files(paths: list[str]) -> list[SliceFile | ReadingFile | Problem | str | None]:
    return [] if stopped() else [inspect_file(path) for path in paths]


def _one_reading_per_series(found: Source, readings: list[ReadingFile]) -> dict[str, str]:
    """Path of the reading by series; the same reading twice is fine, two different ones are a problem."""
    paths: dict[str, str] = {}
    for reading in sorted(readings, key=lambda r: r.path):
        first = paths.setdefault(reading.series_uid, reading.path)
        if first == reading.path:
            continue
        if read_lidc_xml(first) == read_lidc_xml(reading.path):
            found.skipped["copied_reading"] += 1
        else:
            got = f"reads the same series as {first} but says something else"
            msg = f"{reading.path}: {got}; remove the one that is wrong"
            found.problems.append(Problem("two_readings", msg))
    return paths


def _match(found: Source, groups: dict[str, list[SliceFile]], readings: dict[str, str], thickest: float) -> None:
    found.skipped["reading_without_series"] += len(readings.keys() - groups.keys())
    for uid, files in groups.items():
        thickness = slice_thickness(files)
        if uid not in readings:
            found.skipped["series_without_reading"] += 1
        elif thickness is not None and thickness > thickest + 1e-6:
            found.skipped["series_too_thick"] += 1
        elif all(f.problem is None for f in files) and not is_axial(files):
            found.skipped["series_not_axial"] += 1
        else:
            series = order_series(files)
            if isinstance(series, list):
                found.problems += series
            elif thickness is None and len(series.slices) > 1 and series.spacing[0] > thickest + 1e-6:
                found.skipped["series_too_thick"] += 1
            else:
                found.scans.append((series, readings[uid]))
    found.scans.sort(key=lambda s: (s[0].patient_id or s[0].study_uid, s[0].uid))
    if found.scans:
        shapes = Counter(s[0].shape for s in found.scans)
        usual = max(shapes, key=lambda s: (shapes[s], s))
        for series, _ in [s for s in found.scans if s[0].shape != usual]:
            got = f"its slices are {series.shape}, those of the other scans {usual}"
            msg = f"{series.slices[0].path}: {got}; prepare scans of another size into a dataset of their own"
            found.problems.append(Problem("other_size", msg))
        found.scans = [s for s in found.scans if s[0].shape == usual]

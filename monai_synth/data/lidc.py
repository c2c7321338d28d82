# SPDX-License-Identifier: Apache-2.0
"""``monai-synth prepare lidc``: LIDC-IDRI as published to labelled CT slices (LSDM thesis, Ch 4)."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from monai_synth import __version__
from monai_synth.data.lidc_scan import ScanResult, ScanTask, prepare_scan
from monai_synth.data.lidc_series import Series
from monai_synth.data.lidc_source import Source, find_scans
from monai_synth.data.problems import Problem
from monai_synth.data.semantic import HU_MAX, HU_MIN, LABELS
from monai_synth.data.whole_folder import check_output, partial_folder, whole_dataset
from monai_synth.data.workers import map_unordered, stopped, worker_count
from monai_synth.errors import UserError

_LOG = logging.getLogger(__name__)
_SPLITS = ("training", "validation", "test")
_MAX_REPORTED = 50


def prepare_lidc(
    source: str | Path,
    out: str | Path,
    *,
    max_slice_thickness: float = 2.5,
    slice_fraction: float = 0.2,
    consensus: float = 0.5,
    min_nodule_area: int = 8,
    splits: Sequence[float] = (0.86, 0.03, 0.11),
    seed: int = 0,
    num_workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    link_table: str | Path | None = None,
    progress: bool = True,
    name: str = "lidc",
) -> dict[str, Any]:
    """Prepare CT slices, semantic maps and nodule tables from LIDC-IDRI.

    ``source`` may be nested in any way; series are matched with their XML by SeriesInstanceUID wherever both
    lie. The same source and settings give the same bytes, whatever ``num_workers`` is. Neither identifiers
    nor dates of the source reach ``out``; patients, scans and slices are serial numbers in order of
    PatientID, SeriesInstanceUID and position.

    Args:
        source: folder with DICOM and XML.
        out: folder to write; it must not exist unless ``overwrite``.
        max_slice_thickness: mm; thicker scans are dropped and counted.
        slice_fraction: share of the slices of a scan to take, see
            :func:`~monai_synth.data.lidc_scan.select_slices`.
        consensus: share of the readers who drew a nodule that has to include a pixel.
        min_nodule_area: smallest area in a slice, in pixels, for a nodule to be drawn and listed there.
        splits: shares of patients for training, validation and test, see :func:`split_patients`.
        seed: of the split.
        num_workers: processes; None takes one per core.
        skip_bad: prepare what is usable and only count the rest; otherwise anything unusable refuses the
            whole source.
        overwrite: replace a dataset that was prepared before.
        link_table: CSV file outside ``out`` to write PatientID and SeriesInstanceUID of the serial numbers
            to.
        progress: show progress bars.
        name: name of the dataset.

    Returns:
        The content of ``dataset.json``.

    Raises:
        UserError: a setting is out of range, the source has nothing usable or something unusable, the output
            may not be written, or the disk is full.
    """
    source, out = Path(source).expanduser().absolute(), Path(os.path.abspath(Path(out).expanduser()))
    settings = {
        "max_slice_thickness": float(max_slice_thickness),
        "slice_fraction": float(slice_fraction),
        "consensus": float(consensus),
        "min_nodule_area": int(min_nodule_area),
        "splits": [float(s) for s in splits],
        "seed": int(seed),
    }
    _check_settings(settings)
    workers = worker_count(num_workers)
    table = _check_places(source, out, link_table, overwrite)
    found = find_scans(
        source,
        max_slice_thickness=max_slice_thickness,
        leave_out=(out, partial_folder(out)),
        num_workers=workers,
        progress=progress,
    )
    _refuse_or_count(found, source, skip_bad)
    if not found.scans:
        raise UserError(_nothing_usable(found, source))
    tasks = _tasks(found.scans, settings)
    with whole_dataset(out, overwrite=overwrite) as folder:
        results = _prepare_scans(tasks, folder, workers, found, source, skip_bad, progress)
        content = _content(name, results, found, settings)
        text = json.dumps(content, indent=1) + "\n"
        (folder / "dataset.json").write_text(text, encoding="utf-8")
    if table is not None:
        _write_link_table(table, tasks, {(r.patient, r.scan) for r in results})
    return content


def split_patients(patients: Sequence[str], splits: Sequence[float], seed: int) -> dict[str, str]:
    """Split by patient, deterministic by seed.

    With three patients or more every split with a share above 0 gets at least one, and training takes the
    rest after rounding. Two patients make training and test, one makes training only.

    Args:
        patients: serial names.
        splits: shares for training, validation and test that add up to 1.
        seed: of the random order.

    Returns:
        Split name by patient.
    """
    order = [sorted(patients)[i] for i in np.random.default_rng(seed).permutation(len(patients))]
    num = len(order)
    if num < 3:
        wanted = {"test": 1} if num == 2 and splits[2] > 0 else {}
    else:
        wanted = {
            s: max(int(np.floor(share * num + 0.5)), 1) for s, share in zip(_SPLITS, splits, strict=True) if share > 0
        }
    result, left = {}, num
    for split in ("test", "validation"):
        take = min(wanted.get(split, 0), max(left - 1 - (split == "test" and "validation" in wanted), 0))
        result |= {p: split for p in order[left - take : left]}
        left -= take
    return result | {p: "training" for p in order[:left]}


def _check_settings(settings: dict[str, Any]) -> None:
    checks = (
        ("max_slice_thickness", "above 0 (mm)", lambda v: v > 0),
        ("slice_fraction", "above 0 and at most 1", lambda v: 0 < v <= 1),
        ("consensus", "above 0 and at most 1", lambda v: 0 < v <= 1),
        ("min_nodule_area", "1 or more (pixels)", lambda v: v >= 1),
        ("seed", "0 or more", lambda v: v >= 0),
        (
            "splits",
            "three shares of 0 or more that add up to 1, the first above 0",
            lambda v: len(v) == 3 and min(v) >= 0 and v[0] > 0 and abs(sum(v) - 1) < 1e-6,
        ),
    )
    for key, allowed, is_right in checks:
        if not is_right(settings[key]):
            raise UserError(f"{key} is {settings[key]}; allowed is {allowed}. Change --{key}")


def _check_places(source: Path, out: Path, link_table: str | Path | None, overwrite: bool) -> Path | None:
    check_output(out, overwrite=overwrite)
    real_source, real_out = source.resolve(), out.resolve()
    if real_source == real_out or real_out in real_source.parents:
        raise UserError(f"output {out} is or holds the source {source}; name a folder outside it")
    if link_table is None:
        return None
    table = Path(link_table).expanduser().absolute()
    if real_out == table.resolve() or real_out in table.resolve().parents:
        raise UserError(
            f"link_table {table} lies in the output, which must stay free of identifiers; name another place"
        )
    if table.exists() and not overwrite:
        raise UserError(f"link_table {table} exists; name another file, or replace it with --overwrite")
    if not table.parent.is_dir():
        raise UserError(f"link_table {table}: its folder is not there; make it first")
    return table


def _refuse_or_count(found: Source, source: Path, skip_bad: bool) -> None:
    if found.problems and not skip_bad:
        lines = [p.message for p in found.problems]
        if len(lines) > _MAX_REPORTED:
            lines = [*lines[:_MAX_REPORTED], f"... and {len(lines) - _MAX_REPORTED} more"]
        head = f"source {source} has {len(found.problems)} unusable file(s) or series, so nothing is written; "
        head += "mend them, or prepare the rest with --skip_bad:"
        raise UserError("\n  ".join([head, *lines]))
    for problem in found.problems:
        _LOG.warning("left out: %s", problem.message)


def _nothing_usable(found: Source, source: Path) -> str:
    got = Counter(found.skipped) + Counter(p.code for p in found.problems)
    counts = ", ".join(f"{k} {v}" for k, v in sorted(got.items()) if v) or "nothing"
    need = "CT series with the LidcReadMessage XML of the same SeriesInstanceUID are needed, anywhere below it"
    return f"source {source} holds no usable scan; got {found.num_files} files ({counts}). {need}"


def _tasks(scans: list[tuple[Series, str]], settings: dict[str, Any]) -> list[ScanTask]:
    by_patient: dict[str, list[tuple[Series, str]]] = defaultdict(list)
    for series, xml in scans:
        by_patient[series.patient_id or series.study_uid].append((series, xml))
    keys = ("consensus", "slice_fraction", "min_nodule_area")
    return [
        ScanTask(f"p{p:04d}", s, series, xml, **{k: settings[k] for k in keys})
        for p, group in enumerate(by_patient.values(), 1)
        for s, (series, xml) in enumerate(group, 1)
    ]


def _prepare_one(task: ScanTask, folder: Path) -> ScanResult | Problem:
    try:
        return prepare_scan(task, folder, stopped)
    except UserError as error:
        return Problem("not_decodable", str(error))


def _prepare_scans(
    tasks: list[ScanTask],
    folder: Path,
    workers: int,
    found: Source,
    source: Path,
    skip_bad: bool,
    progress: bool,
) -> list[ScanResult]:
    for part in ("images", "labels"):
        (folder / part).mkdir()
    results = []
    with tqdm(total=len(tasks), desc="preparing scans", unit="scan", disable=not progress) as bar:
        late = Source()
        with closing(map_unordered(partial(_prepare_one, folder=folder), tasks, workers)) as items:
            for item in items:
                bar.update()
                late.problems.append(item) if isinstance(item, Problem) else results.append(item)
    late.problems.sort(key=lambda p: p.message)
    _refuse_or_count(late, source, skip_bad)
    found.problems += late.problems
    if not results:
        raise UserError(_nothing_usable(found, source))
    return sorted(results, key=lambda r: (r.patient, r.scan))


def _content(name: str, results: list[ScanResult], found: Source, settings: dict[str, Any]) -> dict[str, Any]:
    split_of = split_patients(sorted({r.patient for r in results}), settings["splits"], settings["seed"])
    cases = [case for result in results for case in result.cases]
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    skipped = {k: v for k, v in sorted(found.skipped.items()) if v}
    bad = dict(sorted(Counter(p.code for p in found.problems).items()))
    return {
        "name": name,
        "task": "lidc",
        "modality": "CT",
        "image_channels": 1,
        "spatial_shape": list(found.scans[0][0].shape),
        "intensity": {"unit": "HU", "min": HU_MIN, "max": HU_MAX, "stored": "uint8 0..255"},
        "labels": LABELS,
        "source": {
            "num_patients": len(split_of),
            "num_scans": len(results),
            "num_slices": len(cases),
            "num_slices_with_nodule": sum(bool(c["nodules"]) for c in cases),
            **dict(counts),
            "skipped": skipped,
            "bad": bad,
        },
        "created_with": {"monai_synth": __version__, "settings": settings},
        **{s: [c for c in cases if split_of[c["patient_id"]] == s] for s in _SPLITS},
    }


def _write_link_table(path: Path, tasks: list[ScanTask], done: set[tuple[str, int]]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["patient_id", "scan", "PatientID", "SeriesInstanceUID"])
    for task in tasks:
        if (task.patient, task.scan) in done:
            writer.writerow([task.patient, f"s{task.scan}", task.series.patient_id, task.series.uid])
    partial_path = path.with_name(path.name + ".partial")
    try:
        partial_path.write_text(stream.getvalue(), encoding="utf-8")
        os.replace(partial_path, path)
    except OSError as error:
        partial_path.unlink(missing_ok=True)
        raise UserError(f"link_table {path} cannot be written ({error.strerror}); the dataset is complete") from error

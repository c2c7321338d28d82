# SPDX-License-Identifier: Apache-2.0
"""A synthetic dataset without its near copies: of the same form, written beside the source, which is left alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_synth.atomic import write_bytes, write_json
from monai_synth.data.pair_files import read_image
from monai_synth.data.whole_folder import whole_dataset
from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import Case, CaseSet
from monai_synth.evaluate.folders import read_dataset_json
from monai_synth.export.nnunet import sanitize_case_id
from monai_synth.export.provenance import iter_provenance
from monai_synth.export.run_folder import SETTINGS_FILE

RECORD = "removed.json"
_PROVENANCE = "provenance.jsonl"
_SHEET = 12  # columns of samples.png


def target_of(target: str | Path, cases: CaseSet) -> Path:
    """Folder of the cleaned dataset; nnU-Net finds raw datasets by their name, so it is kept inside ``target``.

    Args:
        target: as the user gave it.
        cases: the synthetic set.
    """
    path = Path(target).expanduser().absolute()
    if cases.form == "nnunet" and not re.fullmatch(r"Dataset\d{3}_\w+", path.name):
        path = path / cases.root.name
    return path


def check_target(path: Path, cases: CaseSet, *, overwrite: bool) -> None:
    """Refuse a place where nothing may be written, before any work.

    Raises:
        UserError: it is the source, lies in it, or holds something else than a cleaned dataset that may be replaced.
    """
    source = cases.root.resolve()
    if path.resolve() == source or source in path.resolve().parents or path.resolve() in source.parents:
        raise UserError(f"--remove {path} and --synthetic {source} lie in each other; name a folder elsewhere")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / RECORD).is_file():
        msg = f"--remove {path} exists and is no cleaned dataset of this command (it has no {RECORD}); "
        raise UserError(msg + "nothing is removed there, name another folder")
    if not overwrite:
        raise UserError(f"--remove {path} holds a cleaned dataset; name another folder, or replace it with --overwrite")


def write_cleaned(
    path: Path, cases: CaseSet, removed: Mapping[str, Mapping[str, Any]], record: Mapping[str, Any], *, overwrite: bool
) -> int:
    """Write all cases but those that are removed.

    Args:
        path: of `target_of`.
        cases: the whole synthetic set.
        removed: why, by the id of each case that is left out.
        record: what ``removed.json`` says on top.
        overwrite: replace an earlier cleaned dataset.

    Returns:
        How many cases are left.

    Raises:
        UserError: fewer than 2 cases would be left, see also `check_target`; the disk is full.
    """
    check_target(path, cases, overwrite=overwrite)
    kept = [case for case in cases.cases if case.case_id not in removed]
    if len(kept) < 2:
        msg = (
            f"{len(removed)} of {len(cases)} synthetic images are near copies, so no dataset is left to write to {path}"
        )
        raise UserError(msg + "; train on more patients, or for fewer steps, and sample again")
    if path.is_dir():
        shutil.rmtree(path)
    with whole_dataset(path, overwrite=False) as work:
        for case in kept:
            for file in _files(cases, case):
                target = work / file.relative_to(cases.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        _write_head(work, cases, kept)
        _write_provenance(work, cases, kept)
        if cases.form == "prepared" and cases.kind == "classes":
            _write_sheet(work, kept, cases)
        write_json(work / RECORD, {**record, "num_kept": len(kept), "removed": [
            {"case_id": case_id, **why} for case_id, why in sorted(removed.items())
        ]})  # fmt: skip
    return len(kept)


def _files(cases: CaseSet, case: Case) -> list[Path]:
    files = [*case.image, *([case.label] if case.label else [])]
    if cases.form == "nnunet" and (cases.root / "ensemble").is_dir():
        files += [
            path
            for path in sorted((cases.root / "ensemble").glob(f"{case.case_id}_*"))
            if re.fullmatch(r"(mean|std)(_\d+)?\..*", path.name[len(case.case_id) + 1 :])
        ]
    return files


def _write_head(work: Path, cases: CaseSet, kept: Sequence[Case]) -> None:
    """dataset.json with the cases that are left, and the settings of the run as they were."""
    settings = cases.root / SETTINGS_FILE
    if settings.is_file():
        shutil.copyfile(settings, work / SETTINGS_FILE)
    if cases.form == "plain":
        return
    content = dict(read_dataset_json(cases.root))
    if cases.form == "nnunet":
        content["numTraining"] = len(kept)
    else:
        ids = {case.case_id for case in kept}
        for split in ("training", "validation", "test"):
            entries = content.get(split, [])
            content[split] = [e for e in entries if str(e["case_id"]) in ids] if split == cases.split else []
    write_json(work / "dataset.json", content)


def _write_provenance(work: Path, cases: CaseSet, kept: Sequence[Case]) -> None:
    source = cases.root / _PROVENANCE
    if not source.is_file():
        return
    ids = {case.case_id for case in kept}
    lines = (line for line in iter_provenance(source) if sanitize_case_id(str(line["case_id"])) in ids)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_bytes(work / _PROVENANCE, text.encode("utf-8"))


def _write_sheet(work: Path, kept: Sequence[Case], cases: CaseSet) -> None:
    """samples.png anew: that of the source may show what was removed."""
    if not (cases.root / "samples.png").is_file() or len(cases.sizes) > 1:
        return
    from monai_synth.training.pictures import middle_picture, picture_grid

    rows: dict[str, list[Path]] = {}
    for case in kept:
        rows.setdefault(str(case.class_name), []).append(case.image[0])
    picture_grid([[middle_picture(read_image(p)) for p in row[:_SHEET]] for row in rows.values()], work / "samples.png")

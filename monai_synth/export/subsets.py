# SPDX-License-Identifier: Apache-2.0
"""Parts of one pool of cases as nnU-Net raw datasets of their own, the smaller ones inside the larger ones.

Every part takes the first cases of one fixed order: that of sampling (the seeds in ``provenance.jsonl``), in which
source cases take turns, or else that of the case ids. Files are hard links into the pool where the file system
allows that, so that ten ratios take the room of the largest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from monai_synth.atomic import write_bytes
from monai_synth.data.whole_folder import partial_folder, whole_folder
from monai_synth.errors import UserError
from monai_synth.export.nnunet import SETTINGS_FILE, sanitize_case_id
from monai_synth.export.provenance import iter_provenance

PROVENANCE_FILE = "provenance.jsonl"


def subset_size(ratio: int, num_real: int) -> int:
    """Cases of the subset that is ``ratio`` percent of ``num_real`` cases.

    Raises:
        UserError: the ratio is no positive whole number, or the subset would be empty.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
        msg = f"a ratio is {ratio!r}; give whole percents of the real training set from 1, e.g. [100, 250, 500]"
        raise UserError(msg)
    size = round(ratio / 100 * num_real)
    if size < 1:
        msg = f"{ratio} % of {num_real} real training cases is no case; give a larger ratio"
        raise UserError(msg)
    return size


def write_subset(pool: Path, folder: Path, *, dataset_id: int, name: str, num_cases: int) -> Path:
    """Write the first cases of a pool as a dataset of their own.

    Args:
        pool: finished nnU-Net raw dataset of `monai_synth.export.nnunet.NNUNetRawWriter`.
        folder: parent of the new dataset.
        dataset_id: 1 to 999, of the new dataset.
        name: letters, digits and ``_``; the new dataset is ``folder/DatasetNNN_<name>``.
        num_cases: how many cases it takes.

    Returns:
        The new dataset's folder. One that holds the same already is left alone.

    Raises:
        UserError: the pool is unfinished or too small, or something else is where the dataset would be.
    """
    pool, folder = Path(pool), Path(folder)
    if isinstance(dataset_id, bool) or not isinstance(dataset_id, int) or not 1 <= dataset_id <= 999:
        raise UserError(f"dataset_id is {dataset_id!r}; nnU-Net takes a whole number from 1 to 999")
    content = _dataset_json(pool)
    cases = _cases(pool, content)
    if not 1 <= num_cases <= len(cases):
        msg = (
            f"{pool} holds {len(cases)} cases, the subset {name} needs {num_cases}; "
            f"sample more first (--num_samples {num_cases} or more), or choose smaller ratios"
        )
        raise UserError(msg)
    cases = cases[:num_cases]
    out = folder / f"Dataset{dataset_id:03d}_{name}"
    content = content | {"name": name, "numTraining": num_cases}
    texts = {"dataset.json": json.dumps(content, indent=4, ensure_ascii=False) + "\n"}
    for file, text in ((SETTINGS_FILE, _settings(pool)), (PROVENANCE_FILE, _provenance(pool, cases))):
        if text is not None:
            texts[file] = text
    links = [path.relative_to(pool) for case in cases for path in _files(pool, case, content)]
    _refuse_taken_id(folder, out, dataset_id)
    if out.exists():
        _require_same(out, pool, texts, links)
        return out
    with whole_folder(out, overwrite=False) as work:
        for sub in ("imagesTr", "labelsTr"):
            (work / sub).mkdir()
        for link in links:
            _link(pool / link, work / link)
        for file, text in texts.items():
            write_bytes(work / file, text.encode("utf-8"))
    return out


def write_ratio_subsets(
    pool: Path, folder: Path, *, ratios: Sequence[int], num_real: int, first_id: int, name: str
) -> list[Path]:
    """Write one subset per ratio of synthetic to real cases; a smaller one is a part of every larger one.

    Args:
        pool: see :func:`write_subset`.
        folder: see :func:`write_subset`.
        ratios: percents of the real training set.
        num_real: cases of the real training set.
        first_id: nnU-Net's number of the first ratio's dataset; the others follow.
        name: the datasets are called ``<name>_<ratio>pct``.

    Returns:
        The subsets' folders in the order of ``ratios``.

    Raises:
        UserError: see :func:`write_subset` and :func:`subset_size`; a ratio given twice. The pool's size is checked
            before anything is written.
    """
    sizes = [subset_size(ratio, num_real) for ratio in ratios]
    if len(set(ratios)) != len(ratios):
        raise UserError(f"ratios are {list(ratios)}; give each once")
    have = len(_cases(Path(pool), _dataset_json(Path(pool))))
    if max(sizes, default=0) > have:
        msg = (
            f"{max(ratios)} % of {num_real} real training cases are {max(sizes)}, and {pool} holds {have}; "
            f"sample more (--num_samples {max(sizes)}), or leave out the larger ratios"
        )
        raise UserError(msg)
    return [
        write_subset(pool, folder, dataset_id=first_id + k, name=f"{name}_{ratio}pct", num_cases=size)
        for k, (ratio, size) in enumerate(zip(ratios, sizes, strict=True))
    ]


def _dataset_json(pool: Path) -> dict[str, Any]:
    path = pool / "dataset.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{pool} is no finished nnU-Net raw dataset ({error}); let the run that samples it end first"
        raise UserError(msg) from error


def _files(pool: Path, case: str, content: dict[str, Any]) -> list[Path]:
    """Image files and label file of a case; PNG holds all channels in one file."""
    ending = content["file_ending"]
    channels = 1 if ending == ".png" else len(content["channel_names"])
    images = [pool / "imagesTr" / f"{case}_{k:04d}{ending}" for k in range(channels)]
    return [*images, pool / "labelsTr" / f"{case}{ending}"]


def _cases(pool: Path, content: dict[str, Any]) -> list[str]:
    """Ids of the whole cases in the order in which subsets take them."""
    ending = content["file_ending"]
    ids = sorted(path.name[: -len(ending)] for path in (pool / "labelsTr").glob(f"[!.]*{ending}"))
    whole = [case for case in ids if all(path.is_file() for path in _files(pool, case, content))]
    seeds = {case: _first_seed(line) for case, line in _lines(pool)}
    return sorted(whole, key=lambda case: seeds.get(case, 0))


def _first_seed(line: dict[str, Any]) -> int:
    """Seed of a case's first attempt, which is its place in the order of sampling."""
    refused = line["filters"].get("refused")
    return refused[0]["seed"] if refused else line["seed"]


def _lines(pool: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The case's name on disk and its provenance line, for each line."""
    path = pool / PROVENANCE_FILE
    for line in iter_provenance(path) if path.is_file() else ():
        yield sanitize_case_id(line["case_id"]), line


def _provenance(pool: Path, cases: Sequence[str]) -> str | None:
    """The provenance lines of these cases in their order; None where the pool has none."""
    if next(_lines(pool), None) is None:
        return None
    wanted = set(cases)
    lines = {case: json.dumps(line, ensure_ascii=False) + "\n" for case, line in _lines(pool) if case in wanted}
    return "".join(lines[case] for case in cases if case in lines)


def _settings(pool: Path) -> str | None:
    path = pool / SETTINGS_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _refuse_taken_id(folder: Path, out: Path, dataset_id: int) -> None:
    """nnU-Net finds datasets by their number, so a folder may hold each once."""
    for other in sorted(folder.glob(f"Dataset{dataset_id:03d}_*")):
        if other.is_dir() and other not in (out, partial_folder(out)):
            msg = (
                f"{folder} already holds {other.name}, and nnU-Net allows one dataset per id; "
                f"choose another dataset_id than {dataset_id}, or another folder"
            )
            raise UserError(msg)


def _require_same(out: Path, pool: Path, texts: dict[str, str], links: Sequence[Path]) -> None:
    """Refuse to replace a dataset that is not the one that would be written."""
    there = {path.relative_to(out) for path in out.rglob("*") if path.is_file()} if out.is_dir() else set()
    same = there == {*links, *map(Path, texts)}
    same = same and all((out / file).read_text(encoding="utf-8") == text for file, text in texts.items())
    if not same or not all(_equal(pool / link, out / link) for link in links):
        msg = f"{out} holds something else than this subset of {pool.name}; remove it, or choose another id"
        raise UserError(msg)


def _equal(a: Path, b: Path) -> bool:
    return os.path.samefile(a, b) or a.read_bytes() == b.read_bytes()


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

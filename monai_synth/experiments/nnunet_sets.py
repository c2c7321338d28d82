# SPDX-License-Identifier: Apache-2.0
"""The data of an experiment as nnU-Net reads them: the real set, test sets, folds, and real and synthetic mixed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.atomic import write_json
from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.data.pair_files import (
    FILE_ENDINGS,
    channels_last,
    read_image,
    read_label,
    resize_image,
    resize_label,
    write_image,
)
from monai_synth.data.whole_folder import whole_folder
from monai_synth.errors import UserError
from monai_synth.export.nnunet import NNUNetRawWriter, sanitize_case_id


@dataclass(frozen=True)
class Pool:
    """A synthetic nnU-Net raw dataset.

    Attributes:
        folder: ``DatasetNNN_Name``.
        case_ids: of the whole cases.
        channel_names, labels, file_ending: of its dataset.json.
        image_size: (*S) of the first image.
    """

    folder: Path
    case_ids: tuple[str, ...]
    channel_names: tuple[str, ...]
    labels: dict[str, int]
    file_ending: str
    image_size: tuple[int, ...]


@dataclass(frozen=True)
class TestSet:
    """Images that no training saw.

    Attributes:
        name: as in the tables.
        cases: "case_id", "images" (files to predict from), "original" and "label" (of native size), "group" (patient).
    """

    __test__ = False  # no test case of pytest

    name: str
    cases: tuple[dict[str, Any], ...]


def read_pool(path: str | Path) -> Pool:
    """Read a synthetic dataset.

    Args:
        path: nnU-Net raw dataset, or a folder that holds just one.

    Raises:
        UserError: there is none, several, or it is unfinished or empty.
    """
    folder = Path(path).expanduser().absolute()
    if not (folder / "dataset.json").is_file():
        found = sorted(p.parent for p in folder.glob("Dataset[0-9][0-9][0-9]_*/dataset.json"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            msg = (
                f"synthetic dataset {folder}: no dataset.json in it, and it holds {names} as finished datasets below; "
                "give the folder DatasetNNN_Name of one nnU-Net raw dataset (let the run that samples it end first)"
            )
            raise UserError(msg)
        folder = found[0]
    try:
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        names = tuple(str(content["channel_names"][str(k)]) for k in range(len(content["channel_names"])))
        labels = {str(key): int(value) for key, value in content["labels"].items()}
        ending = str(content["file_ending"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{folder / 'dataset.json'} is no dataset.json of nnU-Net v2 ({error!r}); sample the dataset again"
        raise UserError(msg) from error
    if ending not in FILE_ENDINGS.values():
        msg = f"{folder} has files {ending!r}; the experiment takes {' and '.join(FILE_ENDINGS.values())}"
        raise UserError(msg)
    ids = {p.name[: -len(ending)] for p in (folder / "labelsTr").glob(f"[!.]*{ending}")}
    cases = tuple(sorted(case for case in ids if (folder / "imagesTr" / f"{case}_0000{ending}").is_file()))
    if not cases:
        raise UserError(f"{folder} has no case with image and label; sample the dataset again")
    size = read_image(folder / "imagesTr" / f"{cases[0]}_0000{ending}").shape[1:]
    return Pool(folder, cases, names, labels, ending, tuple(size))


def pool_fingerprint(pool: Pool) -> str:
    """SHA-256 over the dataset's head and its cases with the sizes of their files."""
    digest = hashlib.sha256((pool.folder / "dataset.json").read_bytes())
    for case in pool.case_ids:
        image = pool.folder / "imagesTr" / f"{case}_0000{pool.file_ending}"
        label = pool.folder / "labelsTr" / f"{case}{pool.file_ending}"
        digest.update(f"{case} {image.stat().st_size} {label.stat().st_size}\n".encode())
    return digest.hexdigest()


def read_real(path: str | Path) -> PreparedDataset:
    """Read a prepared dataset of pairs. Raises `UserError`."""
    return read_dataset(path, task="pairs")


def channel_names(dataset: PreparedDataset) -> tuple[str, ...]:
    """Channel names by which nnU-Net chooses the normalisation; "CT" means HU, which PNG cannot hold."""
    names = [str(name) for name in dataset.content["channel_names"]]
    if file_ending(dataset) == ".png":
        names = ["L" if name.casefold() == "ct" else name for name in names]
    return tuple(names)


def file_ending(dataset: PreparedDataset) -> str:
    return str(dataset.content["file_ending"])


def require_alike(name: str, dataset: PreparedDataset, pool: Pool) -> None:
    """Refuse a prepared dataset whose pairs are of another kind than the synthetic ones.

    Raises:
        UserError: names both.
    """
    here, there = (
        {"channels": channel_names(dataset), "labels": dataset.labels, "files": file_ending(dataset)},
        {"channels": pool.channel_names, "labels": pool.labels, "files": pool.file_ending},
    )
    for what, mine in here.items():
        if mine != there[what]:
            msg = (
                f"{name} dataset {dataset.root} has {what} {_text(mine)}, synthetic dataset {pool.folder} has "
                f"{_text(there[what])}; both have to be equal, in this order: prepare or sample one of them again"
            )
            raise UserError(msg)


def training_cases(dataset: PreparedDataset) -> list[dict[str, Any]]:
    """Cases of the training and validation split, which nnU-Net splits anew; ids are safe as file names."""
    return [_safe(case) for split in ("training", "validation") for case in dataset.datalist(split)]


def test_cases(dataset: PreparedDataset, *, all_if_empty: bool) -> list[dict[str, Any]]:
    """Cases of the test split.

    Args:
        dataset: prepared dataset.
        all_if_empty: take every case of a dataset that has no test split.

    Raises:
        UserError: there is none.
    """
    splits = ("test",)
    if all_if_empty and not dataset.content.get("test"):
        splits = ("training", "validation", "test")
    cases = [_safe(case) for split in splits for case in dataset.datalist(split)]
    if not cases:
        msg = (
            f"{dataset.root} has no case in its test split, and only images that no stage saw show what synthetic data "
            "bring; prepare it with a test split (--splits)"
        )
        raise UserError(msg)
    return cases


def write_real(
    dataset: PreparedDataset, raw: Path, *, dataset_id: int, image_size: Sequence[int] | None
) -> tuple[Path, list[str], list[str]]:
    """Write the training cases as a raw dataset.

    Args:
        dataset: prepared dataset.
        raw: folder of raw datasets.
        dataset_id: of the new one.
        image_size: (*S) of its images. None: as they are.

    Returns:
        Its folder, and per case the id and the patient.
    """
    writer = NNUNetRawWriter(
        raw,
        dataset_id=dataset_id,
        name="Real",
        channel_names=channel_names(dataset),
        labels=dataset.labels,
        file_ending=file_ending(dataset),
        settings={"prepared": dataset.fingerprint, "image_size": list(image_size) if image_size else None},
    )
    cases = training_cases(dataset)
    for case in cases:
        if not writer.has(case["case_id"]):
            image, label = read_image(case["image"]), read_label(case["label"])
            spacing = _spacing(case, image, image_size)
            if image_size is not None:
                image = resize_image(image, image_size)
                label = resize_label(label, image_size, len(dataset.labels))
            writer.add(case["case_id"], channels_last(image), label, spacing=spacing)
    return writer.finish(), [case["case_id"] for case in cases], [case["patient_id"] for case in cases]


def write_test(
    name: str, dataset: PreparedDataset, cases: Sequence[dict[str, Any]], folder: Path, image_size: Sequence[int] | None
) -> TestSet:
    """Write test images as nnU-Net reads them; labels stay where they are, at native size.

    Args:
        name: of the test set.
        dataset: the prepared dataset of the cases.
        cases: what `test_cases` gives.
        folder: for the images.
        image_size: (*S) of the images. None: as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    num_files = 1 if file_ending(dataset) == ".png" else len(channel_names(dataset))
    for case in cases:
        paths = [folder / f"{case['case_id']}_{k:04d}{file_ending(dataset)}" for k in range(num_files)]
        if not all(path.is_file() for path in paths):
            image = read_image(case["image"])
            spacing = _spacing(case, image, image_size)
            image = image if image_size is None else resize_image(image, image_size)
            for k, path in enumerate(paths):
                write_image(path, image if num_files == 1 else image[k : k + 1], spacing)
        listed.append(
            {
                "case_id": case["case_id"],
                "images": [str(path) for path in paths],
                "original": case["image"],
                "label": case["label"],
                "group": case["patient_id"],
            }
        )
    return TestSet(name, tuple(listed))


def grouped_folds(
    case_ids: Sequence[str], groups: Sequence[str], *, num_folds: int, seed: int
) -> list[dict[str, list[str]]]:
    """Folds of about equal size in which no patient is on both sides: content of ``splits_final.json``.

    Args:
        case_ids: the cases.
        groups: patient of each.
        num_folds: 2 or more.
        seed: of the order in which patients are dealt.

    Raises:
        UserError: fewer patients than folds.
    """
    names = sorted(set(groups))
    if not 2 <= num_folds <= len(names):
        msg = (
            f"{num_folds} folds of {len(case_ids)} real training cases of {len(names)} patients; "
            f"allowed are 2 to {len(names)} folds (--folds)"
        )
        raise UserError(msg)
    members = {name: [case for case, group in zip(case_ids, groups, strict=True) if group == name] for name in names}
    order = [names[k] for k in np.random.default_rng(seed).permutation(len(names))]
    order.sort(key=lambda name: -len(members[name]))
    held_out: list[list[str]] = [[] for _ in range(num_folds)]
    for name in order:
        min(held_out, key=len).extend(members[name])
    return [{"train": sorted(set(case_ids) - set(out)), "val": sorted(out)} for out in held_out]


def write_mix(real: Path, synthetic: Path, raw: Path, *, dataset_id: int, name: str) -> tuple[Path, list[str]]:
    """Write all real and synthetic cases as one raw dataset of links.

    Args:
        real: raw dataset; its cases become ``real_<id>``.
        synthetic: raw dataset; its cases become ``syn_<id>``.
        raw: folder of raw datasets.
        dataset_id: of the new one.
        name: of the new one.

    Returns:
        Its folder and the ids of its synthetic cases.
    """
    out = raw / f"Dataset{dataset_id:03d}_{name}"
    content = json.loads((real / "dataset.json").read_text(encoding="utf-8"))
    ending = content["file_ending"]
    ids = {
        prefix: sorted(path.name[: -len(ending)] for path in (source / "labelsTr").glob(f"[!.]*{ending}"))
        for prefix, source in (("real", real), ("syn", synthetic))
    }
    if not (out / "dataset.json").is_file():
        with whole_folder(out, overwrite=False) as work:
            for sub in ("imagesTr", "labelsTr"):
                (work / sub).mkdir()
                for prefix, source in (("real", real), ("syn", synthetic)):
                    for path in (source / sub).glob(f"[!.]*{ending}"):
                        link(path, work / sub / f"{prefix}_{path.name}")
            write_json(work / "dataset.json", content | {"name": name, "numTraining": sum(map(len, ids.values()))})
    return out, [f"syn_{case}" for case in ids["syn"]]


def mixed_folds(folds: Sequence[dict[str, list[str]]], synthetic_ids: Sequence[str]) -> list[dict[str, list[str]]]:
    """Folds of the mixed set: all synthetic cases are trained on, validation is the real one."""
    real = [{part: [f"real_{case}" for case in cases] for part, cases in fold.items()} for fold in folds]
    return [{"train": [*fold["train"], *synthetic_ids], "val": fold["val"]} for fold in real]


def refuse_taken_ids(folders: Sequence[Path], wanted: dict[int, str]) -> None:
    """Refuse dataset ids that another dataset has.

    Args:
        folders: where nnU-Net looks for datasets.
        wanted: name by id.

    Raises:
        UserError: an id is taken or out of range.
    """
    for number, name in wanted.items():
        if not 1 <= number <= 999:
            raise UserError(f"dataset id {number} for {name}; nnU-Net takes 1 to 999 (--dataset-id is the first)")
        for folder in folders:
            for other in sorted(folder.glob(f"Dataset{number:03d}_*")):
                if other.name != f"Dataset{number:03d}_{name}":
                    msg = f"dataset id {number} is taken by {other}; give another --dataset-id or another --out"
                    raise UserError(msg)


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _safe(case: dict[str, Any]) -> dict[str, Any]:
    name = str(case["case_id"])
    return {**case, "case_id": sanitize_case_id(name), "patient_id": str(case.get("patient_id", name))}


def _spacing(case: dict[str, Any], image: np.ndarray, size: Sequence[int] | None) -> list[float] | None:
    """mm along each axis after resizing; None for PNG."""
    if image.ndim == 3 or case.get("spacing") is None:
        return None
    new = size or image.shape[1:]
    return [float(mm) * old / n for mm, old, n in zip(case["spacing"], image.shape[1:], new, strict=True)]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else ", ".join(value) if isinstance(value, tuple) else value

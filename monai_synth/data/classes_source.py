# SPDX-License-Identifier: Apache-2.0
"""Which image is of which class: the forms of a source of ``monai-synth prepare classes``.

Known are a folder per class, a CSV file, the CSV files of CheXpert and the archives of MedMNIST
(``classes_npz``). Files are told by their names here; what is in them is read by ``pictures_read``.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from monai_synth.data.datalist import SPLITS
from monai_synth.data.pictures_read import ending_of
from monai_synth.data.problems import Problem
from monai_synth.data.source_files import SPLIT_FOLDERS, image_files, plain, split_folders
from monai_synth.errors import UserError

_SPLIT_OF_WORD = {word: split for split, words in SPLIT_FOLDERS.items() for word in words}
_COLUMNS = {"path": "path", "label": "label", "patient": "patient", "split": "split"}
_CHEXPERT_VIEW = "Frontal/Lateral"
_CHEXPERT_PATIENT = re.compile(r"patient\d+")
UNCERTAIN = ("zeros", "ones", "ignore")


@dataclass(frozen=True)
class Item:
    """One image and its class.

    Attributes:
        name: that no other image of the source has: a path without its ending, with "/".
        path: of the file.
        label: number of its class.
        split: the source's; "training" where it gives none.
        patient: as the source says, or "".
    """

    name: str
    path: str
    label: int
    split: str = "training"
    patient: str = ""


@dataclass
class ClassSource:
    """What a source holds.

    Attributes:
        form: "folders", "CSV", "CheXpert" or "MedMNIST".
        classes: names in order of their numbers.
        items: by name.
        problems: everything that is not an image of a known class.
        given_splits: which the source gives, beside the training images.
        ignored: what is rightly left out, counted by reason.
        modality: of the images, where the source's kind says it.
    """

    form: str
    classes: list[str] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    given_splits: tuple[str, ...] = ()
    ignored: Counter[str] = field(default_factory=Counter)
    modality: str | None = None


def find_in_folders(source: Path, classes: Sequence[str] | None = None) -> ClassSource:
    """A folder per class, in ``source`` or in its folders ``train``, ``val`` and ``test``.

    Args:
        source: folder.
        classes: names of the folders in the order of their numbers. Default: all, sorted.

    Raises:
        UserError: it is no folder, or has no folder of a class.
    """
    if not source.is_dir():
        raise UserError(f"source {source} is not a folder; give the folder that holds one folder for each class")
    found = ClassSource("folders")
    parts = dict(split_folders(source))
    if len(parts) != len(split_folders(source)):
        several = ", ".join(name for _, name in split_folders(source))
        raise UserError(f"source {source} has two folders for one split: {several}; keep one")
    if "training" not in parts:
        parts = {"training": ""}
    elif len(parts) > 1:
        found.given_splits = tuple(split for split in parts if split != "training")
    if parts["training"]:
        _tell_strangers(source, set(parts.values()), found)
    seen = {p.name for part in parts.values() for p in _visible(source / part) if p.is_dir()}
    found.classes = list(classes or sorted(seen))
    if not seen:
        raise UserError(
            f"source {source} has no folder with images of a class; put each class into a folder of its own"
        )
    items = []
    for split, part in parts.items():
        _tell_strangers(source / part, set(found.classes), found)
        for label, name in enumerate(found.classes):
            if (source / part / name).is_dir():  # a split may lack a class
                for key, path in image_files(source / part / name, found.problems):
                    items.append((part, Item(f"{name}/{key}", path, label, split)))
    twice = len({(part, item.name) for part, item in items}) > len({item.name for _, item in items})
    found.items = [replace(item, name=f"{part}/{item.name}") if twice else item for part, item in items]
    for label, name in enumerate(found.classes):
        if not any(item.label == label for item in found.items):
            msg = f"{source / parts['training'] / name}: no image of class {name}; add some, or take the class away"
            found.problems.append(Problem("empty_class", msg))
    return _checked(found)


def _visible(folder: Path) -> list[Path]:
    hidden = ("thumbs.db", "desktop.ini", "__macosx")
    return [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and p.name.lower() not in hidden]


def _tell_strangers(folder: Path, known: set[str], found: ClassSource) -> None:
    for path in _visible(folder):
        if not path.is_dir():
            msg = f"{path}: lies in no folder of a class; move it into one, or away"
            found.problems.append(Problem("no_class", msg))
        elif path.name not in known:
            msg = f"{path}: no class or split has this name; allowed are {', '.join(sorted(known))} (--classes)"
            found.problems.append(Problem("unknown_class", msg))


def find_in_csv(
    source: Path,
    table: Path,
    classes: Sequence[str] | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> ClassSource:
    """A CSV file with a line for each image.

    Args:
        source: folder that the paths start from.
        table: the CSV file.
        classes: values of the labels in the order of their numbers. Default: all, sorted (numbers as numbers).
        columns: names of the columns "path", "label", "patient" and "split". Default: these words; the last two
            need not be there.

    Raises:
        UserError: the file cannot be read or lacks a column.
    """
    found = ClassSource("CSV")
    given = {key: name for key, name in (columns or {}).items() if name is not None}
    names = {**_COLUMNS, **given}
    rows, header = _read_csv(table)
    _need_columns(table, header, [names[key] for key in _COLUMNS if key in ("path", "label", *given)])
    labels = {row[names["label"]] for _, row in rows} - {""}
    number = float if all(re.fullmatch(r"-?\d+", label) for label in labels) else str
    found.classes = list(classes or sorted(labels, key=number))
    splits = set()
    for line, row in rows:
        place = f"{table}, line {line}"
        path = _path_below(source, row[names["path"]], place, found.problems)
        if path is None:
            continue
        label, split = row[names["label"]], row.get(names["split"], "")
        if label not in found.classes:
            got = f"label {label!r}" if label else "no label"
            msg = f"{place}: {got}; allowed are {', '.join(found.classes)}"
            found.problems.append(Problem("unknown_class" if label else "no_label", msg))
        elif names["split"] in header and split.lower() not in _SPLIT_OF_WORD:
            got = f"split {split!r}" if split else "no split"
            found.problems.append(Problem("unknown_split", f"{place}: {got}; allowed are {', '.join(_SPLIT_OF_WORD)}"))
        else:
            split = _SPLIT_OF_WORD.get(split.lower(), "training")
            splits.add(split)
            patient = row.get(names["patient"], "")
            found.items.append(Item(_name(row[names["path"]], path), path, found.classes.index(label), split, patient))
    if len(splits) > 1:
        found.given_splits = tuple(split for split in SPLITS[1:] if split in splits)
    return _checked(found)


def find_in_chexpert(
    source: Path, tables: Sequence[Path] = (), observation: str = "Pneumonia", uncertain: str = "zeros"
) -> ClassSource:
    """CheXpert: the frontal images of ``train.csv`` and ``valid.csv``, with one observation present or not.

    A blank, which says that the report does not mention it, is taken as not present.

    Args:
        source: folder that the paths start from, or the one that their first part names.
        tables: CSV files. Default: ``train.csv`` and ``valid.csv`` in ``source``; images below a folder ``valid`` or
            ``test`` are of that split.
        observation: column, such as "Pneumonia".
        uncertain: what -1 means: "zeros" not present, "ones" present, "ignore" leaves the image out.

    Raises:
        UserError: no CSV file, or it cannot be read or lacks a column.
    """
    if uncertain not in UNCERTAIN:
        raise UserError(f"uncertain is {uncertain!r}; allowed are {', '.join(UNCERTAIN)}. Change --uncertain")
    tables = list(tables) or [source / name for name in ("train.csv", "valid.csv") if (source / name).is_file()]
    if not tables:
        raise UserError(f"source {source} holds no train.csv or valid.csv of CheXpert; name the file with --csv")
    found = ClassSource("CheXpert", [f"no {observation.lower()}", observation.lower()], modality="X-ray")
    meaning = {"": 0, "0": 0, "1": 1, "-1": {"zeros": 0, "ones": 1, "ignore": None}[uncertain]}
    for table in tables:
        rows, header = _read_csv(table)
        _need_columns(table, header, ["Path", observation])
        for line, row in rows:
            place, value = f"{table}, line {line}", row[observation].removesuffix(".0")
            view = row.get(_CHEXPERT_VIEW) or ("Frontal" if "frontal" in row["Path"].lower() else "Lateral")
            if view != "Frontal":
                found.ignored["lateral"] += 1
                continue
            if value not in meaning:
                msg = f"{place}: {observation} is {row[observation]!r}; allowed are 1, 0, -1 and blank"
                found.problems.append(Problem("unknown_class", msg))
                continue
            if meaning[value] is None:
                found.ignored["uncertain"] += 1
                continue
            item = _chexpert_item(source, row["Path"], place, meaning[value], found.problems)
            if item is not None:
                found.items.append(item)
    splits = {item.split for item in found.items}
    found.given_splits = tuple(split for split in SPLITS[1:] if split in splits) if "training" in splits else ()
    return _checked(found)


def _chexpert_item(source: Path, text: str, place: str, label: int, problems: list[Problem]) -> Item | None:
    parts = Path(text).parts
    patient = _CHEXPERT_PATIENT.search(text)
    if patient is None:
        problems.append(Problem("no_patient", f"{place}: {text} has no part patientNNNNN; CheXpert's paths have one"))
        return None
    inside = text if (source / text).is_file() or len(parts) < 2 else "/".join(parts[1:])
    path = _path_below(source, inside, place, problems)
    if path is None:
        return None
    split = next((_SPLIT_OF_WORD[part] for part in parts if part in _SPLIT_OF_WORD), "training")
    return Item(_name(inside, path), path, label, split, patient[0])


def _read_csv(table: Path) -> tuple[list[tuple[int, dict[str, str]]], list[str]]:
    """Lines with their numbers, values stripped, and the header."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = [
                (reader.line_num, {key: (value or "").strip() for key, value in row.items() if isinstance(key, str)})
                for row in reader
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"{table} cannot be read ({said}); give a CSV file in UTF-8 with a line of names") from error
    if not rows:
        raise UserError(f"{table} holds no line beside its header; give a CSV file with a line for each image")
    return [(line, {key: row.get(key, "") for key in header}) for line, row in rows], header


def _need_columns(table: Path, header: Sequence[str], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in header]
    if missing:
        got = ", ".join(header[:12]) + (", ..." if len(header) > 12 else "")
        remedy = "name them with --path-column, --label-column, --patient-column, --split-column or --observation"
        raise UserError(f"{table} lacks the column(s) {', '.join(missing)} (it has {got}); {remedy}")


def _path_below(source: Path, text: str, place: str, problems: list[Problem]) -> str | None:
    """Path of an image that is there, in ``source``, and of a kind that can be read; else it becomes a problem."""
    path = Path(text)
    if not text or path.is_absolute() or ".." in path.parts:
        msg = f"{place}: path {text!r}; allowed are paths below {source}, without .."
        problems.append(Problem("bad_path", msg))
    elif not (source / path).is_file():
        problems.append(Problem("no_file", f"{place}: {text} is not there in {source}"))
    elif ending_of(str(source / path)) is None:
        problems.append(Problem("unknown_ending", f"{place}: {text} is no image that can be read; use PNG or JPEG"))
    else:
        return str(source / path)
    return None


def _name(text: str, path: str) -> str:
    relative = Path(text).as_posix()
    return relative[: len(relative) - len(ending_of(path) or "")]


def _checked(found: ClassSource) -> ClassSource:
    """Items by name; two of one name, or whose files would get the same name, become problems."""
    first: dict[str, Item] = {}
    for item in _sorted(found.items):
        other = first.setdefault(plain(item.name).casefold(), item)
        if other is not item:
            what = (
                "is listed twice" if other.path == item.path else f"its name becomes that of {other.path}; rename one"
            )
            found.problems.append(Problem("duplicate_name", f"{item.path}: {what}"))
    found.items = list(first.values())
    found.problems.sort(key=lambda problem: problem.message)
    return found


def _sorted(items: Sequence[Item]) -> Iterator[Item]:
    yield from sorted(items, key=lambda item: (item.name, item.path, item.label))

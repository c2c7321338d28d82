# SPDX-License-Identifier: Apache-2.0
"""``monai-synth prepare classes``: images with one class each, in the forms that users have, to one dataset."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.data.classes_npz import find_in_npz, read_images
from monai_synth.data.classes_source import ClassSource, Item, find_in_chexpert, find_in_csv, find_in_folders
from monai_synth.data.classes_split import split_by_class
from monai_synth.data.datalist import SPLITS
from monai_synth.data.intensity import intensity_entry, percentiles_for, to_uint8
from monai_synth.data.pair_files import resize_image, write_image
from monai_synth.data.pictures_read import Form, Picture, read_picture
from monai_synth.data.prepare_shared import (
    case_ids,
    check_places,
    check_settings,
    gather,
    groups_by_regex,
    inspect_forms,
    kind_of,
    listed,
    shared_settings,
    source_entry,
    write_dataset,
)
from monai_synth.data.problems import Problem, refuse_or_count
from monai_synth.data.source_files import plain
from monai_synth.data.whole_folder import whole_dataset
from monai_synth.data.workers import map_unordered, stopped, worker_count
from monai_synth.errors import UserError

_LOG = logging.getLogger(__name__)
_IMAGES_PER_WORKER = 200  # a worker's start costs about as much
_WRITERS, _BATCH = 8, 64  # threads and images in memory for an npz file: its time goes into waiting for the disk
_TEXT_SIDE, _TEXT_CROP, _TEXT_SIZE = 256, 224, (28, 28)


@dataclass(frozen=True)
class ClassRecipe:
    """What is done to every image.

    Attributes:
        channels: C of every image, after ``grey``.
        window: values that become 0 and 255; None for percentiles or to keep 8-bit values.
        percentiles: per image, that become 0 and 255; None for a window or to keep 8-bit values.
        grey: make RGB grey.
        size: (rows, columns) of the result; None keeps the size.
        text_transform: first scale the short side to 256 and cut the centre 224 x 224.
    """

    channels: int
    window: tuple[float, float] | None = None
    percentiles: tuple[float, float] | None = None
    grey: bool = False
    size: tuple[int, int] | None = None
    text_transform: bool = False


@dataclass(frozen=True)
class ClassTask:
    """An image under the names it gets in the dataset."""

    item: Item
    case_id: str
    patient_id: str
    recipe: ClassRecipe


@dataclass(frozen=True)
class ClassResult:
    """An image that was written: its entry of ``dataset.json``, its (rows, columns), and the digest of its pixels."""

    task: ClassTask
    case: dict[str, Any]
    shape: tuple[int, ...]
    digest: str


def prepare_classes(
    source: str | Path,
    out: str | Path,
    *,
    classes: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    table: str | Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
    chexpert: bool = False,
    observation: str = "Pneumonia",
    uncertain: str = "zeros",
    size: Sequence[int] | None = None,
    text_transform: bool = False,
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    grey: bool = False,
    modality: str | None = None,
    group_regex: str | None = None,
    anonymize_ids: bool = False,
    splits: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    num_workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    name: str | None = None,
) -> dict[str, Any]:
    """Prepare images with one class each.

    ``source`` is an npz file of MedMNIST, or a folder: one that holds a folder per class (also below ``train/``,
    ``val/`` and ``test/``), or one that the paths of a CSV file start from. Images are PNG, JPEG, TIFF, BMP, 2-D
    NIfTI or DICOM (one frame). The same source and settings give the same bytes.

    Args:
        source: npz file or folder.
        out: folder to write, outside ``source``; it must not exist unless ``overwrite``.
        classes: the source's classes in order of their numbers: names of folders or values of the labels; for an npz
            file, which has numbers only, their names. Default: all, sorted.
        class_names: other names for them, in the same order. Default: the source's.
        table: CSV file with a line for each image.
        path_column: its column of paths, below ``source``. Default: "path".
        label_column: its column of classes. Default: "label".
        patient_column: its column of patients. Default: "patient", where it is there.
        split_column: its column of train, val and test. Default: "split", where it is there.
        chexpert: the source is CheXpert; lateral images are left out.
        observation: column of CheXpert; the classes are without and with it.
        uncertain: what CheXpert's -1 means: "zeros" without, "ones" with, "ignore" leaves the image out.
        size: (rows, columns), or one number for both: the image is scaled to cover this and its centre cut.
            Default: keep; (28, 28) with ``text_transform``.
        text_transform: as the X-ray text: short side to 256, centre 224 x 224, and this to ``size``.
        window: values that become 0 and 255. Default: 8-bit images are kept, others get ``percentiles``.
        percentiles: of each image, that become 0 and 255. Default: (0.5, 99.5) unless every image has 8 bits.
        grey: make RGB images grey.
        modality: word for the head. Default: as the source says.
        group_regex: where it matches the path of an image below the source (without its ending), its first group,
            or all of it, names the patient. Default: as the CSV or DICOM file says, else each image is its own.
        anonymize_ids: serial numbers instead of the source's names, as DICOM always gets.
        splits: shares of images for training, validation and test; those that the source gives are kept.
        seed: of the split.
        num_workers: processes; None takes up to one per core. An npz file is read by one.
        skip_bad: prepare what is usable and count the rest; otherwise anything unusable refuses the source.
        overwrite: replace a dataset that was prepared before.
        progress: show progress bars.
        name: of the dataset. Default: that of the source.

    Returns:
        The content of ``dataset.json``.

    Raises:
        UserError: a setting is out of range, the source has nothing usable or something unusable, the output may
            not be written, or the disk is full.
    """
    source, out = Path(source).expanduser().absolute(), Path(os.path.abspath(Path(out).expanduser()))
    columns = {"path": path_column, "label": label_column, "patient": patient_column, "split": split_column}
    settings = {
        "classes": listed(classes, str),
        "class_names": listed(class_names, str),
        "columns": {key: value for key, value in columns.items() if value is not None},
        "observation": observation if chexpert else None,
        "uncertain": uncertain if chexpert else None,
        "size": listed(size, int),
        "text_transform": bool(text_transform),
        **shared_settings(
            window=window,
            percentiles=percentiles,
            grey=grey,
            group_regex=group_regex,
            anonymize_ids=anonymize_ids,
            splits=splits,
            seed=seed,
        ),
    }
    _check_settings(settings)
    check_places([source], out, overwrite)
    found, forms = _find(source, None if table is None else Path(table).expanduser().absolute(), settings, progress)
    _refuse_nothing(found, source)
    _rename(found, settings["class_names"])
    recipe = _recipe(settings, forms)
    group_of = _groups(found, forms, group_regex)
    if skip_bad or not found.problems:  # else these are told first, with those that are found on the way
        split_by_class(found, group_of, settings["splits"], seed)  # what cannot be split is told before the work
    tasks = _tasks(found, group_of, recipe, anonymize_ids or any(form.modality for form in forms.values()))
    workers = worker_count(num_workers, useful=-(-len(tasks) // _IMAGES_PER_WORKER))
    with whole_dataset(out, overwrite=overwrite) as folder:
        results = _prepare_all(tasks, folder, workers, found, progress)
        refuse_or_count(found.problems, found.ignored, source, skip_bad)
        _refuse_nothing(found, source)
        split_of = split_by_class(found, group_of, settings["splits"], seed)
        head = _head(name or source.name.removesuffix(".npz"), modality, found, forms, recipe, results)
        about = _source(found, group_of, split_of, results)
        cases = ((split_of[result.task.item.name], result.case) for result in results)
        return write_dataset(folder, head, about, settings, cases)


def prepare_image(task: ClassTask, folder: Path, picture: Picture | None = None) -> ClassResult | Problem | None:
    """Read, convert, cut and write one image.

    Args:
        task: the image.
        folder: dataset with ``images/``.
        picture: the image, where it is no file of its own.

    Returns:
        What was written; a problem with the image; None where the run is being given up.
    """
    if stopped():
        return None
    recipe, path = task.recipe, task.item.path
    try:
        picture = picture or read_picture([path])
        image = to_uint8(picture, recipe.window, recipe.percentiles, recipe.grey)
        if image.ndim != 3 or len(image) != recipe.channels:
            raise UserError(f"{path}: its header and its pixels differ in form; write the file again")
    except UserError as error:
        return Problem("unusable", str(error))
    digest = hashlib.sha256(repr(picture.values.shape).encode() + picture.values.tobytes()).hexdigest()
    if recipe.text_transform:
        image = centre_crop(scale_short_side(image, _TEXT_SIDE), (_TEXT_CROP, _TEXT_CROP))
    if recipe.size is not None:
        image = cover(image, recipe.size)
    case = {"image": f"images/{task.case_id}.png", "class": task.item.label}
    write_image(folder / case["image"], image)
    case |= {"case_id": task.case_id, "patient_id": task.patient_id}
    return ClassResult(task, case, image.shape[1:], digest)


def scale_short_side(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (C, H, W) with ``side`` pixels along its shorter axis and the same proportions (the longer cut down)."""
    height, width = image.shape[1:]
    short = min(height, width)
    return resize_image(image, (height * side // short, width * side // short))


def centre_crop(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Middle (rows, columns) of uint8 (C, H, W); where it cannot be the very middle, half a pixel below it."""
    top, left = (round((n - m) / 2) for n, m in zip(image.shape[1:], size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def cover(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """uint8 (C, H, W) -> (C, *size): scaled with its proportions until it covers ``size``, then its centre."""
    height, width = image.shape[1:]
    if height * size[1] <= width * size[0]:  # the rows just fit
        scaled = size[0], width * size[0] // height
    else:
        scaled = height * size[1] // width, size[1]
    return centre_crop(resize_image(image, scaled), size)


def _check_settings(settings: dict[str, Any]) -> None:
    def names_ok(v: list[str]) -> bool:
        return len(v) >= 2 and len(set(v)) == len(v) and all(v)

    checks = (
        ("classes", "two or more different names", names_ok),
        ("class_names", "two or more different names", names_ok),
        ("size", "one or two numbers of pixels, 1 or more", lambda v: len(v) in (1, 2) and min(v) >= 1),
    )
    check_settings(settings, checks)


def _find(
    source: Path, table: Path | None, settings: Mapping[str, Any], progress: bool
) -> tuple[ClassSource, dict[str, Form]]:
    """What the source holds, and the form of each image by name."""
    classes, columns = settings["classes"], settings["columns"]
    chexpert = settings["observation"] is not None
    archive = source.suffix.lower() == ".npz" or source.is_file()
    if columns and (table is None or chexpert):
        raise UserError(f"column(s) {', '.join(columns)} are named, but no CSV file is; give it with --csv")
    if archive:
        if table is not None or chexpert or settings["group_regex"] is not None:
            raise UserError(f"source {source} is one file; --csv, --chexpert and --group-regex are for folders")
        found, form = find_in_npz(source, classes)
        grey = settings["grey"] and form.channels == 3
        form = Form(2, 1, eight_bit=True) if grey else form
        return found, {item.name: form for item in found.items}
    if chexpert:
        if classes is not None:
            raise UserError("classes are given, but those of CheXpert are without and with --observation; leave it out")
        tables = [] if table is None else [table]
        found = find_in_chexpert(source, tables, settings["observation"], settings["uncertain"])
    elif table is not None:
        found = find_in_csv(source, table, classes, columns)
    else:
        found = find_in_folders(source, classes)
    files = {item.name: (item.path,) for item in found.items}
    forms = inspect_forms(files, settings["grey"], found.problems, progress)
    found.items = [item for item in found.items if item.name in forms]
    return found, forms


def _refuse_nothing(found: ClassSource, source: Path) -> None:
    if not found.items:
        refuse_or_count(found.problems, found.ignored, source, skip_bad=False)
        raise UserError(f"source {source} holds no image of a class")
    if len(found.classes) < 2:
        remedy = "a model that is told the class needs two or more"
        raise UserError(f"source {source} has one class only ({', '.join(found.classes)}); {remedy}")


def _rename(found: ClassSource, names: Sequence[str] | None) -> None:
    if names is None:
        return
    if len(names) != len(found.classes):
        got = f"{len(names)} class_names for {len(found.classes)} classes ({', '.join(found.classes)})"
        raise UserError(f"{got}; give one for each, in this order. Change --class-names")
    found.classes = list(names)


def _recipe(settings: Mapping[str, Any], forms: Mapping[str, Form]) -> ClassRecipe:
    dims, channels = kind_of(next(iter(forms.values())))
    if dims != 2 or channels not in (1, 3):
        raise UserError(f"the images are {dims}-D with {channels} channel(s); allowed are 2-D, grey (1) and RGB (3)")
    size = settings["size"] or (_TEXT_SIZE if settings["text_transform"] else None)
    return ClassRecipe(
        channels=channels,
        window=settings["window"] and tuple(settings["window"]),
        percentiles=percentiles_for(settings["window"], settings["percentiles"], forms.values()),
        grey=settings["grey"],
        size=size and (size[0], size[-1]),
        text_transform=settings["text_transform"],
    )


def _groups(found: ClassSource, forms: Mapping[str, Form], regex: str | None) -> dict[str, str]:
    """Patient by name of the image."""
    if regex is not None:
        groups = groups_by_regex({item.name: item.name for item in found.items}, regex)
    else:
        groups = {item.name: item.patient or forms[item.name].patient or item.name for item in found.items}
    return {name: plain(group) for name, group in groups.items()}


def _tasks(found: ClassSource, group_of: Mapping[str, str], recipe: ClassRecipe, serial: bool) -> list[ClassTask]:
    ids = case_ids({item.name: group_of[item.name] for item in found.items}, serial=serial, digits=5)
    return [ClassTask(item, *ids[item.name], recipe) for item in found.items]


def _prepare_all(
    tasks: Sequence[ClassTask], folder: Path, workers: int, found: ClassSource, progress: bool
) -> list[ClassResult]:
    """Results in order of the case ids; problems go to ``found``, which keeps the images that are well."""
    (folder / "images").mkdir()
    if found.form == "MedMNIST":
        made = _from_archive(tasks, folder)
    else:
        made = map_unordered(partial(prepare_image, folder=folder), tasks, workers)
    results = gather(made, len(tasks), "image", found.problems, progress)
    done = {result.task.item.name for result in results}
    found.items = [item for item in found.items if item.name in done]
    return results


def _from_archive(tasks: Sequence[ClassTask], folder: Path) -> Generator[ClassResult | Problem | None]:
    by_name = {task.item.name: task for task in tasks}
    images = ((by_name[name], image) for name, image in read_images(Path(tasks[0].item.path)) if name in by_name)
    with ThreadPoolExecutor(_WRITERS) as pool:
        while batch := list(islice(images, _BATCH)):
            yield from pool.map(lambda pair: prepare_image(pair[0], folder, Picture(pair[1], (1.0, 1.0))), batch)


def _head(
    name: str,
    modality: str | None,
    found: ClassSource,
    forms: Mapping[str, Form],
    recipe: ClassRecipe,
    results: Sequence[ClassResult],
) -> dict[str, Any]:
    shapes = {result.shape for result in results}
    said = {form.modality for form in forms.values()}
    modality = modality or found.modality or (said.pop() if len(said) == 1 else "")
    return {
        "name": name,
        "task": "classes",
        "modality": modality or ("RGB" if recipe.channels == 3 else "L"),
        "image_channels": recipe.channels,
        "channel_names": ["R", "G", "B"] if recipe.channels == 3 else [modality or "L"],
        "spatial_shape": list(shapes.pop()) if len(shapes) == 1 else None,
        "intensity": intensity_entry(recipe.window, recipe.percentiles),
        "classes": {name: number for number, name in enumerate(found.classes)},
    }


def _source(
    found: ClassSource, group_of: Mapping[str, str], split_of: Mapping[str, str], results: Sequence[ClassResult]
) -> dict[str, Any]:
    numbers = Counter((split_of[item.name], item.label) for item in found.items)
    for split in SPLITS[1:]:
        absent = [name for label, name in enumerate(found.classes) if not numbers[split, label]]
        if absent and split in split_of.values():
            _LOG.warning("no image of %s in %s", ", ".join(absent), split)
    counts = {"num_cases": {s: {name: numbers[s, k] for k, name in enumerate(found.classes)} for s in SPLITS}}
    return source_entry(found, group_of, {r.task.item.name: r.digest for r in results}, counts)

# SPDX-License-Identifier: Apache-2.0
"""Evaluation of folders: pairs of map and image from a prepared dataset or an nnU-Net raw dataset."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.atomic import write_json
from monai_synth.data.datalist import read_dataset
from monai_synth.data.semantic import LABELS, uint8_to_hu
from monai_synth.errors import UserError
from monai_synth.evaluate.semantic_fidelity import class_dice, summarize


@dataclass(frozen=True)
class CtPair:
    """Files of one map and its image.

    Attributes:
        image: 8-bit PNG of the window, or NIfTI in HU.
        label: semantic map in the same format.
        group: patient, or the case itself where no patient is known.
        spacing: (row, column) in mm; None where it is not known.
    """

    image: Path
    label: Path
    group: str
    spacing: tuple[float, float] | None


def list_pairs(folder: str | os.PathLike[str], *, split: str = "test") -> tuple[list[CtPair], dict[str, int]]:
    """Pairs of a folder and the names of its label values.

    Args:
        folder: a prepared CT dataset, or an nnU-Net raw dataset ``DatasetNNN_Name`` whose labels are semantic
            maps.
        split: of a prepared dataset: training, validation or test. nnU-Net raw datasets have one split only.

    Returns:
        The pairs in the order of the dataset (by case id for nnU-Net), and label name -> value.

    Raises:
        UserError: the folder is neither, is unfinished, has no pair, or has labels other than the semantic
        ones.
    """
    folder = Path(folder)
    content = read_dataset_json(folder)
    if "numTraining" in content:
        pairs, labels = _nnunet_pairs(folder, content), content.get("labels", {})
    else:
        dataset = read_dataset(folder)
        labels = dataset.labels
        pairs = [
            CtPair(
                Path(case["image"]),
                Path(case["label"]),
                str(case["patient_id"]),
                tuple(case["spacing"]) if "spacing" in case else None,
            )
            for case in dataset.datalist(split)
            if "label" in case
        ]
    missing = [name for name in ("lung", "high_dense") if name not in labels]
    if missing:
        msg = (
            f"{folder} has the labels {', '.join(labels) or 'none'}, without {' and '.join(missing)}; "
            "semantic fidelity needs the whole semantic map as label"
        )
        raise UserError(msg)
    strange = [name for name in labels if name not in LABELS]
    if strange:
        msg = f"{folder} has the labels {', '.join(strange)}; those of a semantic map are {', '.join(LABELS)}"
        raise UserError(msg)
    if not pairs:
        msg = f"{folder} has no pair of image and map in split {split!r}; choose another split or folder"
        raise UserError(msg)
    return pairs, labels


def read_dataset_json(folder: Path) -> Mapping[str, Any]:
    """The parsed dataset.json of a folder.

    Raises:
        UserError: missing, unfinished, or no JSON object.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        unfinished = (folder / "export.json").is_file()
        why = " (the run that samples it has not finished; run it again to resume)" if unfinished else ""
        msg = (
            f"{folder} holds no dataset.json{why}; give the folder of a prepared dataset or of an "
            "nnU-Net raw dataset (DatasetNNN_Name)"
        )
        raise UserError(msg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not valid JSON ({error}); write the dataset again"
        raise UserError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} holds a {type(content).__name__}, a JSON object is needed; write the dataset again"
        raise UserError(msg)
    return content


def _nnunet_pairs(folder: Path, content: Mapping[str, Any]) -> list[CtPair]:
    ending = str(content.get("file_ending"))
    pairs = []
    for label in sorted((folder / "labelsTr").glob(f"[!.]*{ending}")):
        case = label.name[: -len(ending)]
        image = folder / "imagesTr" / f"{case}_0000{ending}"
        if not image.is_file():
            msg = f"{label} has no image {image.name} in imagesTr; write the dataset again"
            raise UserError(msg)
        pairs.append(CtPair(image, label, case, None))
    return pairs


def read_pair(pair: CtPair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slices of a pair: label map (H, W) and image (H, W) in HU; one of a PNG, one per Z of a NIfTI volume.

    Raises:
        UserError: a file cannot be read, or is no picture or volume.
    """
    if pair.image.suffix == ".png":
        yield _read_png(pair.label), uint8_to_hu(_read_png(pair.image))
        return
    label, image_hu = _read_nifti(pair.label).astype(np.int64), _read_nifti(pair.image)
    if label.shape != image_hu.shape:
        msg = f"{pair.label} has shape {label.shape}, its image {image_hu.shape}; write the dataset again"
        raise UserError(msg)
    for z in range(image_hu.shape[2]):
        yield label[:, :, z].T, image_hu[:, :, z].T


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError) as error:  # PIL's words for a broken PNG
        msg = f"{path} cannot be read ({error}); write the dataset again"
        raise UserError(msg) from error
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        msg = f"{path} holds {pixels.dtype} of shape {pixels.shape}; 8-bit grey is needed, so write it again"
        raise UserError(msg)
    return pixels


def _read_nifti(path: Path) -> np.ndarray:
    import nibabel as nib

    try:
        volume = np.asarray(nib.load(path).dataobj)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        msg = f"{path} cannot be read ({error}); write the dataset again"
        raise UserError(msg) from error
    if volume.ndim != 3:
        msg = f"{path} has shape {volume.shape}; a volume (X, Y, Z) is needed, so write the dataset again"
        raise UserError(msg)
    return volume


def evaluate_folder(
    folder: str | os.PathLike[str],
    *,
    split: str = "test",
    max_cases: int | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Semantic fidelity of the images of a folder to their maps.

    Of a prepared dataset, whose images are real, this is the ceiling that generated images can be held
    against.

    Args:
        folder: see `list_pairs`.
        split: see `list_pairs`.
        max_cases: evaluate the first so many only.
        num_bootstrap: resamplings for the interval.
        seed: of the resampling.

    Returns:
        See `semantic_fidelity`, with the folder's name as ``source`` and what its images are as ``kind``.

    Raises:
        UserError: see `list_pairs` and `semantic_fidelity`.
    """
    if max_cases is not None and max_cases < 1:
        msg = f"max_cases is {max_cases}; give a whole number of at least 1, or leave it out for all"
        raise UserError(msg)
    pairs, names = list_pairs(folder, split=split)
    scores, groups = [], []
    for pair in pairs[:max_cases]:
        for label, image_hu in read_pair(pair):
            scores.append(class_dice(_to_semantic(label, names, pair), image_hu, spacing=pair.spacing))
            groups.append(pair.group)
    summary = summarize(scores, groups=groups, num_bootstrap=num_bootstrap, seed=seed)
    kind = "generated" if (Path(folder) / "imagesTr").is_dir() else "the dataset's own images: the ceiling"
    return {"source": Path(folder).resolve().name, "kind": kind, **summary}


def evaluate_folders(
    folders: Sequence[str | os.PathLike[str]],
    *,
    split: str = "test",
    max_cases: int | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
    report: str | os.PathLike[str] | None = None,
) -> Iterator[str]:
    """`evaluate_folder` for one folder after the other, as text for a console.

    Args:
        folders: see `evaluate_folder`; the other arguments too.
        split: see `list_pairs`.
        max_cases: see `evaluate_folder`.
        num_bootstrap: see `evaluate_folder`.
        seed: see `evaluate_folder`.
        report: JSON file for all results, written when the last folder is done.

    Yields:
        Text for each folder. A class that no map has is named as such, without a number.

    Raises:
        UserError: see `evaluate_folder`; or there is no folder to hold the report.
    """
    if report is not None and not Path(report).absolute().parent.is_dir():
        msg = f"there is no folder for the report {report}; create {Path(report).absolute().parent} first"
        raise UserError(msg)
    results = []
    for folder in folders:
        result = evaluate_folder(folder, split=split, max_cases=max_cases, num_bootstrap=num_bootstrap, seed=seed)
        results.append(result)
        yield format_result(result)
    if report is not None:
        write_json(report, results)


def format_result(result: Mapping[str, Any]) -> str:
    """A result as a few lines of text: value, 95 % interval and n per class."""
    lines = [f"{result['source']}: Dice of map and image, {result['num_images']} images ({result['kind']})"]
    for name, score in result["classes"].items():
        if not score["n"]:
            lines.append(f"  {name:<12} not measured: no map has enough of it")
            continue
        interval = "[{:.3f}, {:.3f}]".format(*score["ci"]) if score["ci"] else "no interval"
        patients = f" of {score['num_groups']} patients" if score["num_groups"] != score["n"] else ""
        lines.append(f"  {name:<12} {score['value']:.3f}  {interval}  n={score['n']}{patients}")
    return "\n".join(lines)


def _to_semantic(label: np.ndarray, names: Mapping[str, int], pair: CtPair) -> np.ndarray:
    """A dataset's own label values as those of ``LABELS``, by name."""
    unknown = sorted(set(np.unique(label).tolist()) - set(names.values()))
    if unknown:
        msg = f"{pair.label} has values {unknown[:8]}, dataset.json has {dict(names)}; write the dataset again"
        raise UserError(msg)
    table = np.zeros(max(names.values()) + 1, np.uint8)
    for name, value in names.items():
        table[value] = LABELS[name]
    return table[label]

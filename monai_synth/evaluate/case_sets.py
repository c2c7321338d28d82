# SPDX-License-Identifier: Apache-2.0
"""Sets of cases that evaluations compare, whatever form of folder they lie in; images are read one at a time.

Four forms are known: a dataset of ``monai-synth prepare``, samples in a folder for each class (which is such a dataset
too), an nnU-Net raw dataset, and a plain folder of images, with or without a folder for each class.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from monai_synth.data.datalist import SPLITS, read_dataset
from monai_synth.data.intensity import PERCENTILES, to_uint8
from monai_synth.data.pair_files import resize_image
from monai_synth.data.pictures_read import Form, inspect_image, read_mask, read_picture
from monai_synth.data.problems import Problem
from monai_synth.data.semantic import HU_MAX, HU_MIN, LABELS
from monai_synth.data.source_files import image_files
from monai_synth.errors import UserError
from monai_synth.evaluate.folders import read_dataset_json
from monai_synth.export.run_folder import SETTINGS_FILE

CT_WINDOW = (float(HU_MIN), float(HU_MAX))
_NO_IMAGES = {"masks", "mask", "labels", "label", "labelsTr", "labelsTs"}  # folders that hold no images
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap rows and columns


@dataclass(frozen=True)
class Case:
    """Files of one case.

    Attributes:
        case_id: its name in the set; of a plain folder the path below it without the ending.
        patient_id: whose it is; the case itself where that is not known.
        image: one file, or one for each channel.
        label: file of the label map; None without one.
        class_name: None without one.
    """

    case_id: str
    patient_id: str
    image: tuple[Path, ...]
    label: Path | None = None
    class_name: str | None = None


@dataclass(frozen=True)
class CaseSet:
    """Cases of one folder.

    Attributes:
        root: the folder, absolute.
        name: of the dataset, or of the folder.
        fingerprint: SHA-256 of ``dataset.json`` of a prepared dataset; else of the names and sizes of the files.
        kind: "classes", "pairs" or "ct".
        split: of a prepared dataset; "all" for other forms.
        cases: in the order of the dataset; by case id in other forms.
        channels: 1 or 3.
        labels: name -> value of label maps; empty without.
        unit: "HU" or "8-bit", of what `image` returns.
        form: "prepared", "nnunet" or "plain".
        window: HU that `picture` maps to 0 and 255; None where the unit is 8-bit.
        sizes: (H, W) -> number of cases.
        num_available: cases before some were drawn.
        synthetic: whether the folder says that its images are computed by a model.
    """

    root: Path
    name: str
    fingerprint: str
    kind: str
    split: str
    cases: tuple[Case, ...]
    channels: int
    labels: Mapping[str, int] = field(default_factory=dict)
    unit: str = "8-bit"
    form: str = "plain"
    window: tuple[float, float] | None = None
    sizes: Mapping[tuple[int, int], int] = field(default_factory=dict)
    num_available: int = 0
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of all images.

        Raises:
            UserError: there are several.
        """
        if len(self.sizes) > 1:
            few = ", ".join(f"{n} of {h} x {w}" for (h, w), n in sorted(self.sizes.items())[:4])
            msg = f"{self.root} holds images of {len(self.sizes)} sizes ({few}); prepare them with one --size"
            raise UserError(msg)
        return next(iter(self.sizes))

    def image(self, i: int) -> np.ndarray:
        """Image i, (C, H, W): int16 HU where `unit` is "HU", else uint8.

        HU come from the file, or from the 8-bit window that a dataset stores, exact to half a step. Values of more
        than 8 bits that are no HU are spread between their percentiles 0.5 and 99.5.

        Raises:
            UserError: damaged, NaN, a volume, or other channels than the first image.
        """
        case = self.cases[i]
        picture = read_picture([str(path) for path in case.image])
        values = picture.values
        if values.ndim != 3 or values.shape[0] != self.channels:
            msg = f"{case.image[0]} has shape {values.shape}, the others of {self.root} are 2-D with {self.channels} "
            raise UserError(msg + "channel(s); give images of one kind")
        if self.unit == "HU":
            if values.dtype == np.uint8:
                low, high = self.window or CT_WINDOW
                values = low + values.astype(np.float32) * ((high - low) / 255)
            return np.clip(np.rint(values), -(2**15), 2**15 - 1).astype(np.int16)
        percentiles = None if values.dtype == np.uint8 else PERCENTILES
        return np.ascontiguousarray(to_uint8(picture, percentiles=percentiles))

    def label(self, i: int) -> np.ndarray | None:
        """Label map of case i, uint8 (H, W); None without one.

        Raises:
            UserError: damaged, or not one whole number from 0 to 255 per pixel.
        """
        path = self.cases[i].label
        if path is None:
            return None
        values = read_mask(str(path)).values
        whole = values if values.dtype.kind in "uib" else np.rint(values)
        if values.ndim != 2 or (whole != values).any() or (values.size and (values.min() < 0 or values.max() > 255)):
            msg = f"{path} is no label map: {values.dtype} of shape {values.shape}, "
            raise UserError(msg + "needed is one whole number from 0 to 255 per pixel; write its dataset again")
        return values.astype(np.uint8)

    def picture(self, i: int, size: Sequence[int] | None = None) -> np.ndarray:
        """Image i as features and similarities take it, uint8 (C, H, W); HU through the dataset's window.

        Args:
            i: which.
            size: (H, W) to resize to: linear, with a low-pass filter where it shrinks. Default: as it is.

        Raises:
            UserError: see `image`.
        """
        values = self.image(i)
        if self.unit == "HU":
            low, high = self.window or CT_WINDOW
            scaled = (np.clip(values.astype(np.float32), low, high) - low) * (255 / (high - low))
            values = np.rint(scaled).astype(np.uint8)
        return values if size is None else resize_image(values, size)

    def subset(self, indices: Sequence[int]) -> CaseSet:
        """The set with these cases only, in this order."""
        return replace(self, cases=tuple(self.cases[i] for i in indices))


def read_case_set(
    folder: str | Path,
    *,
    option: str,
    split: str | None = None,
    max_cases: int | None = None,
    seed: int = 0,
) -> CaseSet:
    """List the cases of a folder and read the headers of their images.

    Args:
        folder: see the module's text.
        option: by which the user gave it, such as ``--synthetic``; for messages.
        split: of a prepared dataset; None is "training". Other forms have one part only.
        max_cases: where there are more, a random choice of so many, which depends on case ids and not on their order.
        seed: of that choice.

    Raises:
        UserError: no folder, an unfinished run, no image, fewer than 2, volumes, or channels other than 1 and 3.
    """
    root = Path(folder).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"{option} {root} is not a folder; give a dataset, a folder of samples or one of images")
    if max_cases is not None and (max_cases < 2 or seed < 0):
        raise UserError(f"max_cases is {max_cases}, seed {seed}; allowed are 2 or more and 0 or more")
    if not (root / "dataset.json").is_file():
        if (root / SETTINGS_FILE).is_file():
            raise UserError(f"{option} {root}: the run that samples it has not finished; run it again to resume")
        found = _plain_set(root, option)
    elif "numTraining" in read_dataset_json(root):
        found = _nnunet_set(root, option)
    else:
        found = _prepared_set(root, split or "training", option)
    if found.form != "prepared" and split not in (None, "training"):
        raise UserError(f"{option} {root} has no splits, got {split!r}; give a prepared dataset or leave the split out")
    num_available = len(found)
    if max_cases is not None and max_cases < num_available:
        found = found.subset(_drawn([case.case_id for case in found.cases], max_cases, seed))
    if len(found) < 2:
        part = f"split {found.split!r} of {root}" if found.form == "prepared" else f"{root}"
        raise UserError(f"{option}: {part} has {len(found)} image(s), needed are 2 or more; give another folder")
    channels, sizes = _forms(found, option)
    return replace(found, channels=channels, sizes=sizes, num_available=num_available)


def _drawn(ids: Sequence[str], num: int, seed: int) -> list[int]:
    """Numbers of the drawn cases in their old order."""
    order = sorted(range(len(ids)), key=lambda i: hashlib.sha256(f"{seed} {ids[i]}".encode()).digest())
    return sorted(order[:num])


def _prepared_set(root: Path, split: str, option: str) -> CaseSet:
    dataset = read_dataset(root)
    content = dataset.content
    if len(content["spatial_shape"] or (0, 0)) != 2:
        raise UserError(f"{option} {root} holds volumes; this works on images, prepare slices or tiles instead")
    if split not in SPLITS:
        raise UserError(f"{option}: unknown split {split!r}; allowed are {', '.join(SPLITS)}")
    names = {number: name for name, number in dataset.classes.items()}
    cases = tuple(
        Case(
            case_id=str(case["case_id"]),
            patient_id=str(case.get("patient_id", case["case_id"])),
            image=(Path(case["image"]),),
            label=Path(case["label"]) if "label" in case else None,
            class_name=names.get(case.get("class")),
        )
        for case in dataset.datalist(split)
    )
    if not cases:
        sizes = ", ".join(f"{s} {len(content.get(s, []))}" for s in SPLITS)
        raise UserError(f"{option}: split {split!r} of {root} has no case (cases: {sizes}); give another folder")
    intensity = content["intensity"]
    is_ct = intensity.get("unit") == "HU" or (content["modality"] == "CT" and intensity.get("unit") == "window")
    return CaseSet(
        root=root,
        name=dataset.name,
        fingerprint=dataset.fingerprint,
        kind="classes" if content["task"] == "classes" else "ct" if content["task"] == "lidc" or is_ct else "pairs",
        split=split,
        cases=cases,
        channels=int(content["image_channels"]),
        labels=dataset.labels,
        unit="HU" if is_ct else "8-bit",
        form="prepared",
        window=(float(intensity["min"]), float(intensity["max"])) if is_ct else None,
        synthetic="synthetic" in content,
    )


def _nnunet_set(root: Path, option: str) -> CaseSet:
    content = read_dataset_json(root)
    ending, names = str(content.get("file_ending")), content.get("channel_names") or {}
    num_files = 1 if ending in (".png", ".bmp", ".tif") else len(names)
    cases = []
    for first in sorted((root / "imagesTr").glob(f"[!.]*_0000{ending}")):
        case = first.name[: -len(f"_0000{ending}")]
        files = tuple(first.with_name(f"{case}_{k:04d}{ending}") for k in range(num_files))
        label = root / "labelsTr" / f"{case}{ending}"
        missing = [path for path in (*files, label) if not path.is_file()]
        if missing:
            raise UserError(f"{option}: {missing[0]} is missing; write the dataset again")
        cases.append(Case(case, case, files, label))
    if not cases:
        raise UserError(f"{option}: {root} has no image in imagesTr; let the run that samples it end first")
    record = _run_settings(root)
    labels = {str(k): v for k, v in content.get("labels", {}).items() if type(v) is int}
    semantic = "lung" in labels and set(labels) <= set(LABELS)
    is_ct = any(str(n).casefold() == "ct" for n in names.values()) or semantic or "label_kind" in record
    return CaseSet(
        root=root,
        name=str(content.get("name", root.name)),
        fingerprint=_listing_hash(root, cases),
        kind="ct" if is_ct else "pairs",
        split="all",
        cases=tuple(cases),
        channels=len(names),
        labels=labels,
        unit="HU" if is_ct else "8-bit",
        form="nnunet",
        window=CT_WINDOW if is_ct else None,
        synthetic=bool(record) or (root / "provenance.jsonl").is_file(),
    )


def _run_settings(root: Path) -> Mapping[str, Any]:
    """Settings of the run that sampled a raw dataset; empty without one."""
    try:
        record = json.loads((root / SETTINGS_FILE).read_text(encoding="utf-8")).get("settings", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return record if isinstance(record, dict) else {}


def _plain_set(root: Path, option: str) -> CaseSet:
    inner = sorted(p.parent.name for p in root.glob("*/dataset.json"))
    if inner:
        raise UserError(f"{option} {root} holds the dataset {inner[0]}; give {root / inner[0]}")
    for sub in sorted(_NO_IMAGES):
        if (root / sub).is_dir():
            msg = f"{option} {root} holds a folder {sub!r} beside its images; prepare it first (monai-synth prepare "
            raise UserError(msg + "pairs), or give the folder of the images")
    problems: list[Problem] = []
    found = list(image_files(root, problems))
    unreadable = [p for p in problems if p.code == "unreadable"]
    if unreadable:
        raise UserError(f"{option}: {unreadable[0].message}")
    if not found:
        raise UserError(f"{option} {root} holds no image (PNG, JPEG, TIFF, BMP, NIfTI, DICOM); give another folder")
    has_classes = all("/" in key for key, _ in found)
    taken = Counter(key for key, _ in found)
    cases = []
    for key, path in sorted(found):
        case_id = key if taken[key] == 1 else Path(path).relative_to(root).as_posix()
        cases.append(Case(case_id, case_id, (Path(path),), None, key.split("/")[0] if has_classes else None))
    first = inspect_image(str(cases[0].image[0]))
    is_ct = _holds_hu(first, cases[0].image[0])
    return CaseSet(
        root=root,
        name=root.name,
        fingerprint=_listing_hash(root, cases),
        kind="ct" if is_ct else "classes",
        split="all",
        cases=tuple(cases),
        channels=first.channels,
        unit="HU" if is_ct else "8-bit",
        window=CT_WINDOW if is_ct else None,
    )


def _holds_hu(form: Form, path: Path) -> bool:
    """Whether an image of a plain folder is in HU: CT by DICOM; NIfTI of signed integers that reach air."""
    if form.modality:
        return form.modality == "CT"
    if form.eight_bit or form.spatial_dims != 2 or not path.name.endswith((".nii", ".nii.gz")):
        return False
    return nib.load(path).get_data_dtype().kind == "i" and float(read_picture([str(path)]).values.min()) <= -200


def _listing_hash(root: Path, cases: Sequence[Case]) -> str:
    """SHA-256 of the names and sizes of all files."""
    files = [path for case in cases for path in (*case.image, *([case.label] if case.label else []))]
    text = "".join(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n" for path in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _forms(found: CaseSet, option: str) -> tuple[int, dict[tuple[int, int], int]]:
    """Channels that all images have, and how many have which size, from the headers."""
    sizes: Counter[tuple[int, int]] = Counter()
    first: int | None = None
    for case in found.cases:
        path = case.image[0]
        form = inspect_image(str(path))
        if form.spatial_dims != 2:
            raise UserError(f"{option}: {path} is a volume; this works on images, give slices or tiles")
        channels = form.channels * len(case.image)
        if channels not in (1, 3):
            raise UserError(f"{option}: {path} has {channels} channels; allowed are 1 (grey) and 3 (RGB)")
        if first not in (None, channels):
            msg = f"{option}: {path} has {channels} channel(s), {found.cases[0].image[0].name} has {first}; "
            raise UserError(msg + "give images of one mode (all grey, or all RGB)")
        first = channels
        sizes[_size_of(path, form)] += 1
    return int(first or 1), dict(sizes)


def _size_of(path: Path, form: Form) -> tuple[int, int]:
    """(rows, columns) by the header."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        columns, rows = nib.load(path).shape[:2]
        return int(rows), int(columns)
    if not form.modality:
        try:
            with Image.open(path) as picture:
                columns, rows = picture.size
                return (columns, rows) if picture.getexif().get(274) in _SIDEWAYS else (rows, columns)
        except OSError:  # a TIFF that only tifffile reads
            pass
    values = read_picture([str(path)]).values
    return int(values.shape[1]), int(values.shape[2])

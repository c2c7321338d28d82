# SPDX-License-Identifier: Apache-2.0
"""Sets of images that fidelity compares, from any form of folder: classes, pairs, CT slices or plain images.

Datasets of classes go the way of `image_sets`, which knows their splits and labels; all others that of `case_sets`.
Either way an image comes at the form of the synthetic ones, and is never stretched.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from monai_synth.data.pair_files import resize_image
from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet, read_case_set
from monai_synth.evaluate.image_sets import NAMES, STRETCH, ComparedSet, ImageSet, read_sets

NO_CLASS = "all"
_SEED = re.compile(r"_s\d+(_\d+)?$")  # what sampling appends to the case whose map or image it took


@dataclass(frozen=True)
class CaseImages(ComparedSet):
    """A `CaseSet` as a set of images of one form; see `image_sets.ImageSet` for the members.

    Attributes:
        key: of ``NAMES``.
        cases: the cases.
        form: (C, H, W) to which `readers` bring the images.
    """

    key: str
    cases: CaseSet
    form: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def dataset(self) -> str:
        return self.cases.name

    @property
    def fingerprint(self) -> str:
        return self.cases.fingerprint

    @property
    def num_available(self) -> int:
        return self.cases.num_available

    @property
    def patients(self) -> tuple[str, ...]:
        return tuple(case.patient_id for case in self.cases.cases)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(case.class_name or NO_CLASS for case in self.cases.cases)

    @property
    def sizes(self) -> Mapping[tuple[int, int], int]:
        return self.cases.sizes

    @property
    def channels(self) -> int:
        return self.cases.channels

    def readers(self) -> list[Callable[[], np.ndarray]]:
        """Functions that read an image each, uint8 of shape `form`."""
        return [functools.partial(_picture, self.cases, i, self.form) for i in range(len(self.cases))]


AnySet = ImageSet | CaseImages


def read_any_sets(
    real: str | Path,
    synthetic: str | Path,
    control: str | Path | None = None,
    *,
    max_images: int = 1000,
    seed: int = 0,
) -> tuple[str, dict[str, AnySet], list[str]]:
    """Draw images of each set.

    Args:
        real: dataset of ``monai-synth prepare``, an nnU-Net raw dataset, or a folder of images.
        synthetic: folder of sampled images, finished; any of these forms.
        control: another one, whatever it shows.
        max_images: of each set; where there are more, a random choice.
        seed: of that choice, which depends on case ids and not on their order.

    Returns:
        "classes", "pairs" or "ct"; key -> set; and warnings. ``real_test`` is missing where the real folder has no test
        split.

    Raises:
        UserError: both are one folder, forms that do not go together, or see `read_sets` and `read_case_set`.
    """
    paths = [Path(folder).expanduser().resolve() for folder in (real, synthetic)]
    if paths[0] == paths[1]:
        msg = f"--real and --synthetic are the same folder {paths[0]}; give the synthetic images and the real ones "
        raise UserError(msg + "that they are to be compared with")
    if _task(paths[0]) == "classes" and _task(paths[1]) in ("classes", "unfinished"):
        sets, warnings = read_sets(real, synthetic, control, max_images=max_images, seed=seed)
        return "classes", dict(sets), warnings
    options = {"max_cases": max_images, "seed": seed}
    made = read_case_set(synthetic, option="--synthetic", **options)
    train = read_case_set(real, option="--real", split="training", **options)
    found = {"real_train": train}
    warnings = []
    if train.form == "prepared" and _num_cases(train.root, "test") >= 2:
        found["real_test"] = read_case_set(real, option="--real", split="test", **options)
    else:
        why = "the real folder has no test split" if train.form == "prepared" else "the real folder has no splits"
        warnings.append(f"{why}: how far two sets of real images are apart is unknown; give a prepared dataset for it")
    found["synthetic"] = made
    if control is not None:
        found["control"] = read_case_set(control, option="--control", **options)
    if not made.synthetic:
        warnings.append("the folder given as --synthetic does not say that its images are synthetic")
    if train.synthetic:
        warnings.append("the folder given as --real says that its images are synthetic")
    _check_kinds(train, made)
    form = (made.channels, *made.size)
    sets = {key: CaseImages(key, cases, form) for key, cases in found.items()}
    for key, image_set in sets.items():
        _check_stretch(NAMES[key], image_set)
        warnings += [f"{NAMES[key]}: {text}" for text in image_set.changes]
    kind = train.kind if train.kind != "classes" else made.kind if made.kind == "ct" else "classes"
    return kind, dict(sets), warnings


def matched(synthetic: CaseImages, real: CaseImages) -> tuple[list[tuple[int, int]], CaseSet]:
    """Synthetic images and the real images of the same map: the case whose name a synthetic image carries.

    Where both have label maps of one size, these must be equal too, else the image was made for another map. Two
    folders may hold files of one name by chance: without maps only names that sampling gave (``CASE_s000000``) count.

    Returns:
        Pairs (number in ``synthetic``, number in the returned set), and all real cases of all splits.
    """
    every = real.cases
    if every.form == "prepared":
        parts = [
            read_case_set(every.root, option="--real", split=split)
            for split in ("training", "validation", "test")
            if _num_cases(every.root, split) >= 2
        ]
        every = replace(parts[0], cases=tuple(case for part in parts for case in part.cases))
    by_id = {case.case_id: i for i, case in enumerate(every.cases)}
    pairs = []
    for i, case in enumerate(synthetic.cases.cases):
        source = _SEED.sub("", case.case_id)
        j = by_id.get(source)
        if j is not None and _same_map(synthetic.cases, i, every, j, sampled=source != case.case_id):
            pairs.append((i, j))
    return pairs, every


def _same_map(a: CaseSet, i: int, b: CaseSet, j: int, *, sampled: bool) -> bool:
    """Whether two images of one name have one map; without maps to compare, a name that sampling gave decides."""
    if dict(a.labels) != dict(b.labels):
        return sampled  # maps in other words, such as nodules only
    first, second = a.label(i), b.label(j)
    if first is None or second is None or first.shape != second.shape:
        return sampled
    return bool((first == second).all())


def _task(folder: Path) -> str:
    """Of a prepared dataset; "unfinished" without a readable dataset.json where none can be expected."""
    path = folder / "dataset.json"
    if not folder.is_dir() or (not path.is_file() and (folder / "export.json").is_file()):
        return "unfinished"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(content.get("task", "")) if isinstance(content, Mapping) else ""


def _num_cases(root: Path, split: str) -> int:
    return len(json.loads((root / "dataset.json").read_text(encoding="utf-8")).get(split, []))


def _check_kinds(real: CaseSet, synthetic: CaseSet) -> None:
    if real.channels != synthetic.channels:
        kinds = {1: "grey", 3: "RGB"}
        msg = f"--real has {kinds[real.channels]} images, --synthetic {kinds[synthetic.channels]} ones; "
        raise UserError(msg + "give the dataset that the synthetic images were trained on, or prepare with --grey")
    if {real.unit, synthetic.unit} == {"HU", "8-bit"}:
        side = "--real" if real.unit == "HU" else "--synthetic"
        msg = f"{side} holds CT in HU, the other one 8-bit images; give both as CT, or both as pictures"
        raise UserError(msg)


def _check_stretch(name: str, image_set: CaseImages) -> None:
    _, height, width = image_set.form
    for h, w in image_set.cases.sizes:
        if abs(h * width / (w * height) - 1) > STRETCH:
            msg = f"the set {name!r} has images of {h} x {w}, the synthetic ones are {height} x {width}: "
            raise UserError(msg + f"resizing would stretch them; prepare it with --size {height} {width}")


def _picture(cases: CaseSet, i: int, form: tuple[int, int, int]) -> np.ndarray:
    image = cases.picture(i)
    if len(image) == 3 and form[0] == 1:
        image = np.asarray(Image.fromarray(np.moveaxis(image, 0, -1)).convert("L"))[None]
    image = resize_image(image, form[1:])
    return np.repeat(image, 3, axis=0) if len(image) < form[0] else image

# SPDX-License-Identifier: Apache-2.0
"""Reading a prepared dataset: ``dataset.json`` beside ``images/`` and ``labels/``.

The file is a MONAI datalist (``training``, ``validation``, ``test``) with a head that says what the images are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_synth.errors import UserError

SPLITS = ("training", "validation", "test")
HEAD_KEYS = ("name", "task", "modality", "image_channels", "spatial_shape", "intensity")


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset on disk.

    Attributes:
        root: absolute folder that holds ``dataset.json``.
        content: the parsed file.
        fingerprint: SHA-256 of the file; it names every case, its labels and how it was made.
    """

    root: Path
    content: dict[str, Any]
    fingerprint: str

    @property
    def name(self) -> str:
        return str(self.content["name"])

    @property
    def labels(self) -> dict[str, int]:
        return {str(k): int(v) for k, v in self.content.get("labels", {}).items()}

    @property
    def classes(self) -> dict[str, int]:
        return {str(k): int(v) for k, v in self.content.get("classes", {}).items()}

    def datalist(self, split: str) -> list[dict[str, Any]]:
        """Cases of a split with absolute paths.

        Raises:
            UserError: unknown split, or a case whose files are not there.
        """
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; allowed are {', '.join(SPLITS)}")
        cases = []
        for case in self.content.get(split, []):
            case = dict(case)
            for key in ("image", "label"):
                if key in case:
                    path = self.root / case[key]
                    if not path.is_file():
                        msg = (
                            f"{self.root / 'dataset.json'} lists {case[key]}, which is not there; "
                            "prepare the dataset again (monai-synth prepare ... --overwrite)"
                        )
                        raise UserError(msg)
                    case[key] = str(path)
            cases.append(case)
        return cases

    def indexed(self, split: str) -> list[dict[str, Any]]:
        """`datalist` with an ``index`` for each case; without validation cases a training validates on its own.

        Raises:
            UserError: the split has no case, or see `datalist`.
        """
        cases = self.datalist(split)
        if not cases and split == "validation":
            cases = self.datalist("training")
        if not cases:
            raise UserError(f"split {split!r} of {self.root} has no case; prepare it with other --splits")
        return [{**case, "index": i} for i, case in enumerate(cases)]


def read_dataset(dataset_dir: str | Path, *, task: str | None = None) -> PreparedDataset:
    """Read and check ``dataset_dir/dataset.json``.

    Args:
        dataset_dir: folder written by ``monai-synth prepare``.
        task: refuse a dataset that was prepared for another task.

    Raises:
        UserError: the folder is missing, empty, not a prepared dataset, unreadable, or of another task.
    """
    root = Path(dataset_dir).expanduser().absolute()
    path = root / "dataset.json"
    command = f"monai-synth prepare {task or 'lidc|pairs|classes'} SRC OUT"
    remedy = f"write one with `{command}` and give its folder as --dataset_dir"
    if not root.is_dir():
        raise UserError(f"dataset_dir {root} is not a folder; {remedy}")
    if not path.is_file():
        raw = " (it looks like DICOM: prepare it first)" if any(root.rglob("*.dcm")) else ""
        raise UserError(f"dataset_dir {root} holds no dataset.json{raw}; {remedy}")
    raw_bytes = path.read_bytes()
    try:
        content = json.loads(raw_bytes)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from error
    missing = [key for key in HEAD_KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, so it is no prepared dataset; {remedy}")
    if task is not None and content["task"] != task:
        raise UserError(f"{path} was prepared for task {content['task']!r}, this bundle needs {task!r}; {remedy}")
    if task == "classes":
        _check_classes(path, content, remedy)
    return PreparedDataset(root, content, hashlib.sha256(raw_bytes).hexdigest())


def _check_classes(path: Path, content: dict[str, Any], remedy: str) -> None:
    """Refuse class numbers that a model cannot count by, and images outside the dataset."""
    classes = content.get("classes")
    numbers = list(classes.values()) if isinstance(classes, dict) else None
    if numbers is None or numbers != list(range(len(numbers))):
        raise UserError(f"{path} has the classes {classes!r}, needed are names with the numbers 0, 1, ...; {remedy}")
    for split in SPLITS:
        for case in content.get(split, []):
            number, image = case.get("class"), str(case.get("image", ""))
            if type(number) is not int or number not in numbers:
                msg = f"{path}: case {case.get('case_id')!r} has the class {number!r}, allowed are {numbers}"
                raise UserError(f"{msg}; {remedy}")
            if not image or Path(image).is_absolute() or ".." in Path(image).parts:
                msg = f"{path}: the image {image!r} of case {case.get('case_id')!r} lies outside the dataset"
                raise UserError(f"{msg}; {remedy}")


def load_datalist(dataset_dir: str | Path, split: str, *, required: bool = True) -> list[dict[str, Any]]:
    """Cases of one split with absolute paths, as MONAI datasets take them.

    Raises:
        UserError: see :func:`read_dataset`; also an empty split where one is ``required``.
    """
    dataset = read_dataset(dataset_dir)
    cases = dataset.datalist(split)
    if required and not cases:
        sizes = ", ".join(f"{s} {len(dataset.content.get(s, []))}" for s in SPLITS)
        raise UserError(f"split {split!r} of {dataset.root} has no case (cases: {sizes}); choose another split")
    return cases

# SPDX-License-Identifier: Apache-2.0
"""Writes sampled images of classes: a folder for each class, and the dataset.json of a prepared dataset.

On disk::

    FOLDER/<class>/<case_id>.png   8-bit grey or RGB
           provenance.jsonl        a line for each image
           export.json             settings, by which a run is resumed
           dataset.json            written last: all images as ``training`` of a dataset of task "classes"
           samples.png             some of each class, a row each

So the folder is read by whatever reads a prepared dataset.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine

from monai_synth import __version__
from monai_synth.atomic import remove_leftovers, write_json
from monai_synth.data.joint import check_value_range, to_image
from monai_synth.data.pair_files import read_image, write_image
from monai_synth.errors import UserError
from monai_synth.export.handler import SampleExport
from monai_synth.export.nnunet import sanitize_case_id
from monai_synth.export.run_folder import SETTINGS_FILE, open_run_folder
from monai_synth.training.pictures import middle_picture, picture_grid

_SHEET = 12  # columns of samples.png


class ClassFolderWriter:
    """Writes images into a folder for each class; a stopped run goes on where it stopped.

    Args:
        folder: created if missing.
        classes: name -> number of all classes of the model.
        head: of ``dataset.json``: ``name``, ``modality``, ``image_channels``, ``spatial_shape``, ``intensity``.
        overwrite: remove a run that is there first.
        resume: go on with a run of the same settings; False refuses it.
        settings: what must be equal when it is resumed; JSON values, no paths.

    Raises:
        UserError: something is there that may not be touched or does not agree.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        classes: Mapping[str, int],
        head: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(folder).expanduser().absolute()
        self.classes = dict(classes)
        self.head = dict(head)
        self.folders = class_folders(classes)
        content = {"classes": self.classes, "head": self.head, "settings": dict(settings or {})}
        self._settings = json.loads(json.dumps(content, allow_nan=False))
        open_run_folder(
            self.path,
            self._settings,
            overwrite=overwrite,
            resume=resume,
            remove=self._remove,
            elsewhere="another --output_dir",
        )
        for place in self.folders.values():
            (self.path / place).mkdir(exist_ok=True)

    @property
    def provenance_path(self) -> Path:
        """Where the run's `ProvenanceWriter` belongs."""
        return self.path / "provenance.jsonl"

    def image_path(self, case_id: str) -> Path:
        """Where an image is, or would be; its id is the folder of its class, "_" and its seed."""
        return self.path / case_id.rpartition("_")[0] / f"{case_id}.png"

    def has(self, case_id: str) -> bool:
        """Whether an image is there."""
        return self.image_path(case_id).is_file()

    def add(self, case_id: str, image: np.ndarray) -> str:
        """Write one image, uint8 (C, H, W); one of an earlier, stopped run is replaced, to the same bytes.

        Raises:
            OSError: the disk is full; nothing half-written is left.
        """
        write_image(self.image_path(case_id), image)
        return case_id

    def cases(self) -> list[str]:
        """Ids of the images that are there, class by class."""
        return [path.stem for place in self.folders.values() for path in self._images(place)]

    def _images(self, place: str) -> list[Path]:
        return sorted((self.path / place).glob("[!.]*.png"))

    def finish(self) -> Path:
        """Write dataset.json and samples.png for the images that are there; may be called again after more were added.

        Raises:
            UserError: there is no image.
        """
        cases = [
            {"image": f"{place}/{path.name}", "class": number, "case_id": path.stem, "patient_id": path.stem}
            for place, number in zip(self.folders.values(), self.classes.values(), strict=True)
            for path in self._images(place)
        ]
        if not cases:
            raise UserError(f"{self.path} has no image; sample some before finishing it")
        for place in (".", *self.folders.values()):
            remove_leftovers(self.path / place)
        content = {
            "name": self.head["name"],
            "task": "classes",
            **{key: value for key, value in self.head.items() if key != "name"},
            "classes": self.classes,
            "synthetic": self._settings["settings"],
            "created_with": {"monai_synth": __version__},
            "training": cases,
            "validation": [],
            "test": [],
        }
        rows = [self._images(place)[:_SHEET] for place in self.folders.values()]
        pictures = [[middle_picture(read_image(path)) for path in row] for row in rows if row]
        picture_grid(pictures, self.path / "samples.png")
        write_json(self.path / "dataset.json", content)
        return self.path

    def _remove(self, path: Path) -> None:
        """Remove what this writer writes, its settings last; a folder of anything else is left alone."""
        there = sorted(p.name for p in path.glob("*") if not p.name.startswith("."))
        if there and SETTINGS_FILE not in there:
            msg = f"{path} holds {there[0]!r} and was not begun by this writer, so nothing is removed; "
            raise UserError(msg + "give another --output_dir")
        if not there:
            return
        for file in ("dataset.json", "samples.png", "provenance.jsonl"):
            (path / file).unlink(missing_ok=True)
        try:
            before = json.loads((path / SETTINGS_FILE).read_text(encoding="utf-8"))["classes"]
        except (ValueError, KeyError, TypeError):
            before = {}
        for place in {*self.folders.values(), *map(sanitize_case_id, before)}:
            if (path / place).is_dir():
                shutil.rmtree(path / place)
        (path / SETTINGS_FILE).unlink()


def class_folders(classes: Iterable[str]) -> dict[str, str]:
    """Folder of each class by its name, safe on every system."""
    return {name: sanitize_case_id(name) for name in classes}


class ClassExport(SampleExport):
    """Handler that writes each sampled image into the folder of its class.

    Args:
        output_dir: the folder.
        contract: of the model: ``classes``, ``image_channels``, ``image_size``, ``modality``,
            ``intensity``, ``value_range``.
        name: of the dataset.
        seed: of the run; a run of another seed does not go on with it, since classes would share noise.
        record: what every provenance line says: ``checkpoints``, ``sampler``, ``num_steps``, ``precision``,
            ``guidance``, ``settings``.
        overwrite: replace a run that is there.
        resume: go on with a run of the same settings.

    Raises:
        UserError: a folder that is there and must not be touched.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        contract: Mapping[str, Any],
        name: str,
        seed: int,
        record: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = True,
    ) -> None:
        self.folders = class_folders(contract["classes"])
        self.value_range = check_value_range(contract["value_range"])
        head = {
            "name": name,
            "modality": contract["modality"],
            "image_channels": contract["image_channels"],
            "spatial_shape": list(contract["image_size"]),
            "intensity": contract["intensity"],
        }
        super().__init__(
            partial(ClassFolderWriter, output_dir, classes=contract["classes"], head=head),
            record=record,
            settings={"seed": seed},
            overwrite=overwrite,
            resume=resume,
        )

    def case_id_of(self, class_name: str, seed: int) -> str:
        """Id of the image of a class and seed."""
        return f"{self.folders[class_name]}_{seed:07d}"

    def write(self, engine: Engine) -> None:
        """Write the batch that was just sampled."""
        batch, pred = engine.state.batch, engine.state.output["pred"].detach().cpu()
        for i, image in enumerate(to_image(pred, self.value_range).numpy()):
            self.add(batch, i, image)

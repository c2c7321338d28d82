# SPDX-License-Identifier: Apache-2.0
"""Writer of nnU-Net v2 raw datasets: case by case, resumable, refusing what nnU-Net would choke on.

On disk (nnU-Net's dataset format)::

    FOLDER/DatasetNNN_Name/dataset.json                  written last, by `NNUNetRawWriter.finish`
                           imagesTr/<case_id>_0000.png   8-bit grey, or RGB in one file; or .nii.gz,
                                                         one file per channel: _0000, _0001, ...
                           labelsTr/<case_id>.png        8-bit label values; or .nii.gz
                           export.json                   this writer's settings, by which a run is resumed

Axis orders and data types are those of `monai_synth.export.encode`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.atomic import remove_leftovers, write_bytes, write_json
from monai_synth.errors import UserError
from monai_synth.export.encode import checked_image, checked_label, checked_spacing, encode
from monai_synth.export.run_folder import SETTINGS_FILE, open_run_folder

READER_WRITERS = {".png": "NaturalImage2DIO", ".nii.gz": "SimpleITKIO"}
MAX_CASE_ID = 150  # characters; file systems allow 255 for the whole name


def sanitize_case_id(case_id: str) -> str:
    """Turn any text into a case id that is safe as a file name on every system.

    Ids of letters, digits, ``_``, ``.`` and ``-`` come back as they are. In others, each run of other
    characters becomes ``-`` and a hash of the original is appended, so that different ids stay different.

    Raises:
        UserError: the id is empty.
    """
    if not case_id:
        msg = "a case id is empty; give each case a name of letters, digits, '_', '.' or '-'"
        raise UserError(msg)
    if len(case_id) <= MAX_CASE_ID and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", case_id):
        return case_id
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", case_id).strip(".-")[: MAX_CASE_ID - 9]
    return f"{safe or 'case'}-{hashlib.sha256(case_id.encode('utf-8')).hexdigest()[:8]}"


class NNUNetRawWriter:
    """Writes one nnU-Net v2 raw dataset; nnU-Net itself need not be installed.

    A case counts as written when both its files are there; both appear whole or not at all. A stopped run is
    resumed by opening the same folder with the same settings and adding the cases for which `has` is false.
    Several processes may write different cases of one dataset; then one of them opens it first (alone with
    ``overwrite``) and one calls `finish` when all are done.

    Args:
        folder: parent of the dataset folder, what nnU-Net calls ``nnUNet_raw``. Created if missing.
        dataset_id: 1 to 999.
        name: letters, digits and ``_``; the folder becomes ``DatasetNNN_<name>``.
        channel_names: one name per channel. They choose nnU-Net's normalisation: "CT" for HU (NIfTI only),
            anything else ("L", "R", "G", "B") for a z-score per image.
        labels: name -> value; consecutive from ``"background": 0``.
        file_ending: ".png" (uint8, lossless; one or three channels) or ".nii.gz" (one file per channel).
        overwrite: remove an existing dataset of this id and name first.
        resume: go on with an existing dataset; False refuses it.
        settings: anything else that must be equal when the dataset is resumed (checkpoint hash, sampler,
            guidance); JSON values, no paths.

    Raises:
        UserError: settings that nnU-Net would not accept, or that differ from those of the existing dataset.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        dataset_id: int,
        name: str,
        channel_names: Sequence[str],
        labels: Mapping[str, int],
        file_ending: str = ".png",
        overwrite: bool = False,
        resume: bool = True,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        _check_settings(dataset_id, name, channel_names, labels, file_ending)
        self.labels = {str(key): int(value) for key, value in sorted(labels.items(), key=lambda item: item[1])}
        self.channel_names = [str(channel) for channel in channel_names]
        self.file_ending = file_ending
        self.name = name
        self.path = Path(folder) / f"Dataset{dataset_id:03d}_{name}"
        self._added: set[str] = set()
        self._settings = {
            "channel_names": self.channel_names,
            "labels": self.labels,
            "file_ending": file_ending,
            "settings": json.loads(json.dumps(dict(settings or {}), allow_nan=False)),
        }
        self._open(overwrite=overwrite, resume=resume)

    def _open(self, *, overwrite: bool, resume: bool) -> None:
        """Start the folder, or go on with it when that is allowed and its settings agree."""
        prefix = self.path.name.split("_")[0] + "_"
        others = sorted(p.name for p in self.path.parent.glob(f"{prefix}*") if p.is_dir() and p != self.path)
        if others:
            msg = (
                f"{self.path.parent} already holds {others[0]}, and nnU-Net allows one dataset per id; "
                f"choose another dataset_id than {int(prefix[7:-1])}, or another folder"
            )
            raise UserError(msg)
        open_run_folder(
            self.path,
            self._settings,
            overwrite=overwrite,
            resume=resume,
            remove=_remove_dataset,
            elsewhere="another id or folder",
        )
        for sub in ("imagesTr", "labelsTr"):
            (self.path / sub).mkdir(exist_ok=True)

    def image_path(self, case_id: str, channel: int = 0) -> Path:
        """Where the image of a case is, or would be; PNG holds all channels in one file, NIfTI one in each."""
        return self.path / "imagesTr" / f"{sanitize_case_id(case_id)}_{channel:04d}{self.file_ending}"

    @property
    def _num_files(self) -> int:
        """Files of one image."""
        return 1 if self.file_ending == ".png" else len(self.channel_names)

    def _image_paths(self, case_id: str) -> list[Path]:
        return [self.image_path(case_id, channel) for channel in range(self._num_files)]

    def label_path(self, case_id: str) -> Path:
        """Where the label map of a case is, or would be."""
        return self.path / "labelsTr" / f"{sanitize_case_id(case_id)}{self.file_ending}"

    @property
    def provenance_path(self) -> Path:
        """Where the dataset's `ProvenanceWriter` belongs."""
        return self.path / "provenance.jsonl"

    def has(self, case_id: str) -> bool:
        """Whether all files of a case are there."""
        return all(path.is_file() for path in (*self._image_paths(case_id), self.label_path(case_id)))

    def add(self, case_id: str, image: np.ndarray, label: np.ndarray, *, spacing: Sequence[float] | None = None) -> str:
        """Write one case; one of an earlier, stopped run is replaced, to the same bytes for the same input.

        Args:
            case_id: see `sanitize_case_id`; once per run.
            image: PNG: uint8 (H, W), or (H, W, 3) for three channel names. NIfTI: (H, W) or (X, Y, Z),
                with one more axis at the end for several channel names, integer values that fit int16 (e.g. HU),
                or finite floats, stored as float32.
            label: integers of the image's spatial shape, each one of the values in ``labels``.
            spacing: mm per pixel along each spatial axis of the array: (row, column) or (x, y, z). NIfTI only
                (PNG has no spacing, and nnU-Net takes 1). Default: 1 mm.

        Returns:
            The case id as written.

        Raises:
            UserError: something that nnU-Net would refuse or misread; nothing is written.
            OSError: the disk is full; nothing half-written is left.
        """
        safe = sanitize_case_id(case_id)
        if safe in self._added:
            msg = f"case {safe!r} was already added in this run; give each case its own id"
            raise UserError(msg)
        num_channels = len(self.channel_names)
        image = checked_image(safe, np.asarray(image), file_ending=self.file_ending, num_channels=num_channels)
        spatial_shape = image.shape[:-1] if num_channels > 1 else image.shape
        label = checked_label(safe, np.asarray(label), spatial_shape=spatial_shape, labels=self.labels)
        spacing = checked_spacing(safe, spacing, num_dims=len(spatial_shape))

        paths = self._image_paths(safe)
        images = [image] if len(paths) == 1 else np.moveaxis(image, -1, 0)
        for path, array in (*zip(paths, images, strict=True), (self.label_path(safe), label)):
            write_bytes(path, encode(array, file_ending=self.file_ending, spacing=spacing))
        self._added.add(safe)
        return safe

    def cases(self) -> list[str]:
        """Ids of the cases whose files are all there, sorted."""
        return sorted(self._files()[0])

    def _files(self) -> tuple[set[str], set[str]]:
        """Ids of which every file is there, and ids of which any is."""
        names = [p.name for p in (self.path / "imagesTr").glob(f"[!.]*{self.file_ending}")]
        ends = [f"_{channel:04d}{self.file_ending}" for channel in range(self._num_files)]
        parts = [{name[: -len(end)] for name in names if name.endswith(end)} for end in ends]
        parts.append(
            {p.name[: -len(self.file_ending)] for p in (self.path / "labelsTr").glob(f"[!.]*{self.file_ending}")}
        )
        return set.intersection(*parts), set.union(*parts)

    def finish(self) -> Path:
        """Write dataset.json for the cases that are there; may be called again after more were added.

        Halves of cases and temporary files, which only a killed run leaves, are removed.

        Returns:
            The dataset folder.

        Raises:
            UserError: there is no case.
        """
        whole, begun = self._files()
        if not whole:
            msg = f"{self.path} has no case and nnU-Net needs one; add cases before finishing the dataset"
            raise UserError(msg)
        for case in begun - whole:
            for path in (*self._image_paths(case), self.label_path(case)):
                path.unlink(missing_ok=True)
        for sub in ("imagesTr", "labelsTr", "."):
            remove_leftovers(self.path / sub)
        content = {
            "name": self.name,
            "channel_names": {str(index): channel for index, channel in enumerate(self.channel_names)},
            "labels": self.labels,
            "numTraining": len(whole),
            "file_ending": self.file_ending,
            "overwrite_image_reader_writer": READER_WRITERS[self.file_ending],
        }
        write_json(self.path / "dataset.json", content)
        return self.path


def _check_settings(
    dataset_id: int, name: str, channel_names: Sequence[str], labels: Mapping[str, int], file_ending: str
) -> None:
    """Refuse settings by which nnU-Net could not read the dataset."""
    if isinstance(dataset_id, bool) or not isinstance(dataset_id, int) or not 1 <= dataset_id <= 999:
        msg = f"dataset_id is {dataset_id!r}; nnU-Net takes a whole number from 1 to 999"
        raise UserError(msg)
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        msg = f"dataset name is {name!r}; use letters, digits and '_' only"
        raise UserError(msg)
    if file_ending not in READER_WRITERS:
        allowed_endings = ", ".join(READER_WRITERS)
        msg = f"file_ending is {file_ending!r}; allowed are {allowed_endings} (JPEG would change label values)"
        raise UserError(msg)
    fits = len(channel_names) in (1, 3) if file_ending == ".png" else len(channel_names) > 0
    if isinstance(channel_names, str) or not fits:
        count = "1 or 3 names" if file_ending == ".png" else "names, one per channel"
        msg = f"channel_names is {channel_names!r}; {file_ending} takes a list of {count}"
        raise UserError(msg)
    if file_ending == ".png" and any(channel.casefold() == "ct" for channel in channel_names):
        msg = (
            "channel name 'CT' tells nnU-Net that values are Hounsfield units, which 8-bit PNG cannot hold; "
            "use 'L', or '.nii.gz' with HU"
        )
        raise UserError(msg)
    values = sorted(labels.values()) if all(type(v) is int for v in labels.values()) else None
    if not labels or values != list(range(len(labels))) or labels.get("background") != 0 or len(labels) > 256:
        msg = (
            f"labels are {dict(labels)}; nnU-Net takes 'background': 0 and then 1, 2, 3 ... without a gap "
            "or a repeat (at most 256 labels); renumber them"
        )
        raise UserError(msg)


def _remove_dataset(path: Path) -> None:
    """Remove what this writer writes, its settings last: a stopped removal is not mixed with another run."""
    (path / "dataset.json").unlink(missing_ok=True)
    for sub in ("imagesTr", "labelsTr", "ensemble"):
        if (path / sub).is_dir():
            shutil.rmtree(path / sub)
    for file in ("provenance.jsonl", "filters.json"):
        (path / file).unlink(missing_ok=True)
    (path / SETTINGS_FILE).unlink(missing_ok=True)

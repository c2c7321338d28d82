# SPDX-License-Identifier: Apache-2.0
"""Provenance of generated images: ``provenance.jsonl``, one JSON line per image, written as the images are.

A line says from what an image came and how to make it again: seed, checkpoints by their SHA-256,
conditioning, guidance, sampler, steps, precision, filter decisions, versions. It holds no path of the
machine, nothing that could identify a patient, and no time, so that the same run gives the same file.

Order for a run that can be stopped at any moment: write the image, then its line, and count a case as done
only when both are there. A line that a killed process left unfinished is dropped when the file is opened
again, and its image is made again, to the same bytes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.errors import UserError

PACKAGES = ("monai_synth", "monai", "torch", "diffusers", "numpy")

# An absolute path: POSIX (anywhere in a text from two steps on), home, Windows drive or share, file URI.
_PATH = re.compile(
    r"^~?/|^~|(?:[\s\"'=:,(\[])~?/[^/\s]+/[^/\s]|(?:^|[\s\"'=:,(\[])(?:[A-Za-z]:[\\/](?!/)|\\\\\w)|file://"
)
_UID = re.compile(r"(?<![\d.])[012](?:\.\d+){5,}(?![\d.])")  # a DICOM UID; versions have fewer parts
_IDENTIFIERS = frozenset(
    {
        "PatientID",
        "PatientName",
        "PatientBirthDate",
        "AccessionNumber",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SOPInstanceUID",
        "StudyDate",
        "SeriesDate",
        "AcquisitionDate",
        "InstitutionName",
    }
)


class ProvenanceWriter:
    """Appends one line per image; opened again it goes on after the last whole line.

    Several processes may append to one file when the file system appends atomically, as local ones do; then
    one process opens it before the others. Of a line that is there only a hash is kept in memory, 0.2 kB a case.

    Args:
        path: the file; its folder is created if missing.

    Raises:
        UserError: the file holds a line, other than the last, that is no provenance line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = self._repaired()

    def _repaired(self) -> dict[str, bytes]:
        """Hashes of the lines by case id, after dropping an unfinished last one from the file."""
        if not self.path.is_file():
            return {}
        end = _end_of_lines(self.path)
        if end != self.path.stat().st_size:
            os.truncate(self.path, end)
        return {str(record["case_id"]): _hash(_line(record)) for record in iter_provenance(self.path)}

    def __len__(self) -> int:
        return len(self._lines)

    def has(self, case_id: str) -> bool:
        """Whether the file has the line of a case."""
        return case_id in self._lines

    def append(
        self,
        *,
        case_id: str,
        seed: int,
        checkpoints: Mapping[str, str],
        sampler: str,
        num_steps: int,
        precision: str,
        conditioning: Mapping[str, Any] | None = None,
        guidance: Mapping[str, Any] | None = None,
        filters: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write the line of one image, through to the disk.

        Args:
            case_id: as in the dataset that the image belongs to.
            seed: that gives this image, whatever the batch.
            checkpoints: role -> SHA-256 (`monai_synth.checkpoint.sha256_of`) of each file that took part.
            sampler: name of the sampler.
            num_steps: of the sampler.
            precision: e.g. "float32", "bfloat16".
            conditioning: the case whose map was used, and requested features; JSON values.
            guidance: scale per classifier; empty for none.
            filters: filter -> decision and score; empty for none.
            settings: anything else that the image depends on.

        Returns:
            True if the line was written, False if the same line is there already.

        Raises:
            UserError: another line is there for this case, or a value holds a path, a UID or a patient's
                identifier.
            OSError: the disk is full; the file still ends with a whole line, at the latest when opened again.
        """
        record = {
            "case_id": case_id,
            "seed": int(seed),
            "checkpoints": dict(checkpoints),
            "conditioning": dict(conditioning or {}),
            "guidance": dict(guidance or {}),
            "sampler": sampler,
            "num_steps": int(num_steps),
            "precision": precision,
            "filters": dict(filters or {}),
            "settings": dict(settings or {}),
            "versions": package_versions(),
        }
        for role, digest in checkpoints.items():
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                msg = f"checkpoint {role!r} is {digest!r}; give its SHA-256, 64 hexadecimal digits (sha256_of)"
                raise UserError(msg)
        line = _line(record)
        _refuse_private(json.loads(line), case_id)
        if case_id in self._lines:
            if self._lines[case_id] == _hash(line):
                return False
            there = next(record for record in iter_provenance(self.path) if record["case_id"] == case_id)
            raise UserError(_difference(self.path, there, json.loads(line)))
        self._write(line.encode("utf-8") + b"\n")
        self._lines[case_id] = _hash(line)
        return True

    def _write(self, data: bytes) -> None:
        """Append in one write, which on a local disk is whole, or torn by a full one and then taken back."""
        with open(self.path, "ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    if before < file.seek(0, os.SEEK_END) <= before + len(data):  # nobody appended meanwhile
                        file.truncate(before)
                raise


def iter_provenance(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a provenance file, one after the other; an unfinished last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: a line, other than an unfinished last one, is no provenance line.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path} is not there; sampling writes it beside the images"
        raise FileNotFoundError(msg)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                record = {"case_id": record.pop("case_id"), **record}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                msg = f"{path}, line {number} is no provenance line; restore it, or sample to another folder"
                raise UserError(msg) from error
            yield record


def read_provenance(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of :func:`iter_provenance`, in the order in which they were written."""
    return list(iter_provenance(path))


def _end_of_lines(path: Path) -> int:
    """Bytes of a file up to its last newline."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _hash(line: str) -> bytes:
    return hashlib.blake2b(line.encode("utf-8"), digest_size=16).digest()


@functools.lru_cache(maxsize=1)
def _package_versions() -> tuple[tuple[str, str], ...]:
    versions = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            versions.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(versions)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that an image depends on, of those that are installed."""
    return dict(_package_versions())


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays, and 0-d tensors, as JSON values."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if hasattr(value, "item"):
        return value.item()
    msg = f"a {type(value).__name__} ({value!r}) cannot go into provenance; give numbers, texts, lists, dicts"
    raise UserError(msg)


def _refuse_private(value: Any, case_id: str, where: str = "") -> None:
    """Refuse paths of the machine and what identifies a patient, anywhere in a record."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in _IDENTIFIERS:
                msg = f"provenance of {case_id!r}: {where}{key} identifies a patient; leave it out"
                raise UserError(msg)
            _refuse_private(key, case_id, where)
            _refuse_private(item, case_id, f"{where}{key}.")
    elif isinstance(value, list):
        for item in value:
            _refuse_private(item, case_id, where)
    elif isinstance(value, str):
        found = _PATH.search(value) or _UID.search(value)
        if found:
            msg = (
                f"provenance of {case_id!r}: {where[:-1]} is {value!r}, which holds a path or a UID; "
                "give a file's name or hash, and serial numbers for patients"
            )
            raise UserError(msg)


def _difference(path: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    key = sorted(keys)[0]
    return (
        f"{path} has case {old['case_id']!r} with {key} = {old.get(key)!r}, now {key} = {new.get(key)!r}; "
        "resume with the same settings, or write to another folder"
    )

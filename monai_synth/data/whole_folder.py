# SPDX-License-Identifier: Apache-2.0
"""An output folder that is there in full or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from monai_synth.errors import UserError

try:
    import fcntl
except ImportError:  # no such locks on this platform: two runs into one folder are not told apart there
    fcntl = None  # type: ignore[assignment]

_OWN_ENTRIES = {"dataset.json", "images", "labels"}
_LOCK = ".lock"


def partial_folder(out: Path) -> Path:
    """Folder beside ``out`` that holds the data while they are written."""
    return out.with_name(f"{out.name}.partial-monai-synth")


def check_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that must not be replaced.

    Raises:
        UserError: it exists and ``overwrite`` is not set, is no folder, or holds anything but a prepared
        dataset.
    """
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir() or out.is_symlink():
        raise UserError(f"output {out} exists and is no plain folder; name a folder that is not there yet")
    entries = sorted(p.name for p in out.iterdir())
    if not entries:
        return
    if not overwrite:
        raise UserError(f"output {out} exists and is not empty; name another folder, or replace it with --overwrite")
    foreign = [name for name in entries if name not in _OWN_ENTRIES]
    for folder in ("images", "labels"):
        inside = sorted((out / folder).iterdir()) if (out / folder).is_dir() else []
        ours = (".png", ".nii.gz")
        foreign += [f"{folder}/{p.name}" for p in inside if not p.name.endswith(ours) or not p.is_file()]
    if "dataset.json" not in entries or foreign:
        what = f"{foreign[0]}, which is no part of one" if foreign else "no dataset.json"
        raise UserError(
            f"output {out} is no prepared dataset: it holds {what}. Nothing is removed; name another folder"
        )


@contextmanager
def whole_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Write into a folder beside ``out`` that takes its place when the block ends well.

    After an error or Ctrl-C nothing is left. After a kill the folder :func:`partial_folder` is left, and the
    next run into the same ``out`` removes it. A lock keeps two runs apart.

    Yields:
        Folder to write into.

    Raises:
        UserError: see :func:`check_output`; another run is writing the same folder; the place cannot be
        written to.
    """
    check_output(out, overwrite=overwrite)
    partial = partial_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = open(partial / _LOCK, "w")  # noqa: SIM115  (held until the folder is in place)
    except OSError as error:
        raise UserError(f"output {out} cannot be written ({error.strerror}); name a folder you may write to") from error
    with lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                msg = f"another run is writing {out} at this moment; wait for it or name another folder"
                raise UserError(msg) from None
        work, replaced = partial / "dataset", partial / "replaced"
        try:
            _put_back(replaced, out)  # a run killed between the two renames below
            for entry in partial.iterdir():  # what a killed run left
                if entry.name != _LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            work.mkdir()
            yield work
            check_output(out, overwrite=overwrite)
            if out.exists():
                os.rename(out, replaced)
            os.rename(work, out)
        finally:
            _put_back(replaced, out)
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_dataset(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """:func:`whole_folder`, where a disk that is full or cannot be written is told as the user's to mend.

    Yields:
        Folder to write into.

    Raises:
        UserError: see :func:`whole_folder`; the block could not write.
    """
    with whole_folder(out, overwrite=overwrite) as folder:
        try:
            yield folder
        except OSError as error:
            raise UserError(_cannot_write(out, error)) from error


def _put_back(replaced: Path, out: Path) -> None:
    if replaced.is_dir() and not out.exists():
        os.rename(replaced, out)


def _cannot_write(out: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"output {out}: the disk is full and nothing was left on it; free space or name another disk"
    return f"output {out} cannot be written ({error.strerror or error}); nothing was left there"

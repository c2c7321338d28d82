# SPDX-License-Identifier: Apache-2.0
"""The files of a source folder: which there are, which are images, and which folders are splits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from monai_synth.data.pictures_read import ENDINGS, ending_of
from monai_synth.data.problems import Problem

SPLIT_FOLDERS = {
    "training": ("train", "training"),
    "validation": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}


def files_below(source: Path, leave_out: Sequence[Path], problems: list[Problem]) -> Iterator[str]:
    """Paths of all files; folders that are linked twice, or into themselves, are looked into once."""
    seen = {(info.st_dev, info.st_ino) for info in (p.stat() for p in leave_out if p.is_dir())}

    def refuse(error: OSError) -> None:
        msg = f"{error.filename}: the folder cannot be read ({error.strerror}); mend its permissions"
        problems.append(Problem("unreadable", msg))

    for root, folders, files in os.walk(source, followlinks=True, onerror=refuse):
        info = os.stat(root)
        if (info.st_dev, info.st_ino) in seen:
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders.sort()
        yield from (os.path.join(root, name) for name in files)


def image_files(folder: Path, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Key (path below ``folder`` without its ending, with "/") and path of all images; unknown kinds are problems."""
    for path in sorted(files_below(folder, (), problems)):
        name = os.path.basename(path)
        if name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini"):
            continue
        ending = ending_of(path)
        if ending is None:
            allowed = ", ".join(ENDINGS)
            problems.append(Problem("unknown_ending", f"{path}: no image that can be read; allowed are {allowed}"))
            continue
        relative = Path(path).relative_to(folder).as_posix()
        yield relative[: len(relative) - len(ending)], path


def split_folders(folder: Path) -> list[tuple[str, str]]:
    """Splits with the names of their folders in ``folder``."""
    return [(split, name) for split, names in SPLIT_FOLDERS.items() for name in names if (folder / name).is_dir()]


def plain(name: str) -> str:
    """``name`` with letters, digits, "-", "_" and "." only, as file names and nnU-Net take it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)

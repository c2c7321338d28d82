# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, whatever stops the process that writes them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

TMP_SUFFIX = ".part"


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that its name never shows a part of it.

    The bytes go to a sibling file, reach the disk, and take the final name in one step. A full disk or an
    interrupt removes the sibling; after ``kill -9`` it stays behind under a name ending in ``.part`` (see
    `remove_leftovers`).

    Args:
        path: the final name; an existing file is replaced. Its folder must exist.
        data: the whole content.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file, if any, is untouched.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}{TMP_SUFFIX}")
    try:
        with open(tmp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name on an empty file
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON with a fixed layout (4 spaces, keys as given, final newline) through `write_bytes`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON has no word for.
        OSError: see `write_bytes`.
    """
    text = json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-8"))


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Remove what killed writers left in a folder; call it only when no writer is at work there.

    Returns:
        How many files were removed.
    """
    leftovers = [path for path in Path(folder).glob(f".*{TMP_SUFFIX}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)

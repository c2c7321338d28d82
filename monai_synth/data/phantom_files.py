# SPDX-License-Identifier: Apache-2.0
"""What the writers of all computed data share: limits, a folder whole or not at all, several processes, progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from monai_synth.data.whole_folder import whole_folder
from monai_synth.data.workers import map_unordered
from monai_synth.errors import UserError

Limits = Mapping[str, tuple[int, int]]
Pictures = Iterable[tuple[str, np.ndarray]]

_COMMON = {"seed": (0, 2**32 - 1), "num_workers": (1, 4096)}
_CHUNK = 25  # pictures that a process computes at a time
_PAYS_OFF = 200  # pictures that take longer than the start of another process


def check_limits(limits: Limits, *, num_workers: int | None = None, **given: Any) -> None:
    """Refuse numbers out of range.

    Args:
        limits: least and largest value of each name; those of ``seed`` and ``num_workers`` are known.
        num_workers: None is allowed.
        given: numbers by name.

    Raises:
        UserError: the first that is no whole number or out of its range.
    """
    limits = {**_COMMON, **limits}
    for name, value in {**given, "num_workers": 1 if num_workers is None else num_workers}.items():
        low, high = limits[name]
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise UserError(f"{name} is {value!r}; give a whole number from {low} to {high}")


def write_whole(
    out: Path,
    write: Callable[[Any], int],
    jobs: Callable[[Path], Sequence[Any]],
    *,
    num_workers: int,
    total: int,
    unit: str,
    progress: bool,
) -> Path:
    """Fill a folder that appears complete or not at all.

    Args:
        out: folder to make; it may exist if it is empty.
        write: writes what one job asks for and returns how many things that were; a function that processes can be
            started with.
        jobs: makes them for the folder to write into.
        num_workers: processes.
        total: things in all.
        unit: name of one, for the progress bar.
        progress: show it.

    Returns:
        The folder.

    Raises:
        UserError: ``out`` holds something, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"output {out} exists and is not an empty folder; name another folder or empty this one")
    try:
        with (
            whole_folder(out, overwrite=False) as work,
            tqdm(total=total, desc="phantom", unit=unit, disable=not progress) as bar,
        ):
            for done in map_unordered(write, jobs(work), num_workers):
                bar.update(done)
    except OSError as error:
        msg = f"phantom {out} cannot be written ({error}); free space or name a folder you may write to"
        raise UserError(msg) from error
    return out


def write_pictures(
    out: str | os.PathLike[str],
    draw: Callable[..., Pictures],
    asked: Sequence[tuple[Any, ...]],
    *,
    folders: Sequence[str],
    num_workers: int | None,
    progress: bool,
) -> Path:
    """Write computed pictures as PNG.

    Args:
        out: folder to write; it must not exist or be empty.
        draw: function of a module that computes the pictures for one item of ``asked``: their paths in ``out``
            without the ending, and their values, uint8 (H, W) or (H, W, 3).
        asked: its positional arguments for each picture.
        folders: within ``out``, into which the paths lead.
        num_workers: processes; None takes as many as pay off. The files do not depend on it.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: ``out`` holds something, or cannot be written.
    """

    def jobs(work: Path) -> list[tuple[Path, Callable[..., Pictures], Sequence[tuple[Any, ...]]]]:
        for folder in folders:
            (work / folder).mkdir()
        return [(work, draw, asked[at : at + _CHUNK]) for at in range(0, len(asked), _CHUNK)]

    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, max(1, len(asked) // _PAYS_OFF))
    out = Path(out).expanduser().absolute()
    return write_whole(
        out, _write_chunk, jobs, num_workers=num_workers, total=len(asked), unit="picture", progress=progress
    )


def _write_chunk(job: tuple[Path, Callable[..., Pictures], Sequence[tuple[Any, ...]]]) -> int:
    work, draw, asked = job
    for arguments in asked:
        for name, values in draw(*arguments):
            Image.fromarray(values).save(work / f"{name}.png")
    return len(asked)

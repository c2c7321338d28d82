# SPDX-License-Identifier: Apache-2.0
"""A folder of samples that is begun once and gone on with only by a run of the same settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from monai_synth.atomic import write_json
from monai_synth.errors import UserError

SETTINGS_FILE = "export.json"


def open_run_folder(
    path: Path,
    settings: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: bool,
    remove: Callable[[Path], None],
    elsewhere: str,
) -> None:
    """Start the folder, or go on with it when that is allowed and its settings agree.

    Args:
        path: the folder.
        settings: what must be equal when it is resumed; JSON values, kept in ``export.json``.
        overwrite: remove what is there first.
        resume: go on with a run of the same settings; False refuses it.
        remove: removes what a run of this kind wrote, its settings last.
        elsewhere: what to choose instead, for messages.

    Raises:
        UserError: something is there that may not be touched or does not agree.
    """
    if path.exists() and not path.is_dir():
        msg = f"{path} is a file, a folder is needed there; move it away or choose {elsewhere}"
        raise UserError(msg)
    record = path / SETTINGS_FILE
    if overwrite and path.is_dir():
        remove(path)
    if record.is_file():
        if not resume:
            msg = f"{path} already exists; resume it, or overwrite it, or choose {elsewhere}"
            raise UserError(msg)
        _compare(record, settings, elsewhere)
        return
    foreign = sorted(p.name for p in path.glob("*") if not p.name.startswith("."))
    if foreign and not overwrite:
        msg = (
            f"{path} exists and was not begun by this writer (it holds {foreign[0]!r} but no "
            f"{SETTINGS_FILE}); choose {elsewhere}, or overwrite it"
        )
        raise UserError(msg)
    path.mkdir(parents=True, exist_ok=True)
    write_json(record, settings)


def _compare(record: Path, settings: Mapping[str, Any], elsewhere: str) -> None:
    """Refuse to go on with what was begun with other settings."""
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{record} is not JSON ({error}); overwrite the dataset or choose {elsewhere}"
        raise UserError(msg) from error
    old, new = _flatten(recorded), _flatten(settings)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            msg = (
                f"{record.parent} was begun with {key} = {old.get(key)!r}, now {key} = {new.get(key)!r}; "
                f"use the same value to resume, or overwrite the dataset, or choose {elsewhere}"
            )
            raise UserError(msg)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat

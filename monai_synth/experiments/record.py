# SPDX-License-Identifier: Apache-2.0
"""The record of an experiment's settings, by which it is resumed and by which other settings are refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from monai_synth.atomic import write_json
from monai_synth.errors import UserError


def require_own_folder(out: Path, *, folders: Collection[str] = (), record: str = "experiment.json") -> None:
    """Refuse a folder that holds something else, such as the samples themselves.

    Args:
        out: folder of the experiment, which need not be there.
        folders: in it that may be there before the record is.
        record: name of the record, by which an experiment is known.

    Raises:
        UserError: it holds other entries and no record.
    """
    entries = [path.name for path in out.iterdir()] if out.is_dir() else []
    there = sorted(name for name in entries if name not in folders and not name.startswith("."))
    if there and not (out / record).is_file():
        raise UserError(f"--out {out} holds {there[0]!r} and no experiment; give a folder that is new or empty")


def record_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, or compare them with those that are there.

    Args:
        path: ``experiment.json``.
        settings: JSON values.

    Raises:
        UserError: others are there; names what differs.
    """
    new = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, new)
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); give another --out") from error
    different = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if different:
        text = "; ".join(f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in different)
        msg = f"{path.parent} was begun with other settings: {text}; give the same to resume it, or another --out"
        raise UserError(msg)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

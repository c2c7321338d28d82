# SPDX-License-Identifier: Apache-2.0
"""How the rows of a run are printed, kept as JSON, and compared with those of an older run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmark_rows.measure import Row
from monai_synth.atomic import write_json
from monai_synth.errors import UserError

FORMAT = 1
PACKAGES = ("torch", "monai", "diffusers", "denoising-diffusion-pytorch", "numpy", "monai_synth")
MARGIN = 0.05  # a row is slower only beyond this, however small its spread


def describe_machine(device: str) -> dict[str, Any]:
    """What the figures belong to: processor, cores, threads, card, versions."""
    info: dict[str, Any] = {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(), "device": device,
    }  # fmt: skip
    if device != "cpu":
        info["card"] = torch.cuda.get_device_name(device)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return info | {"versions": versions}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def figure(value: float | None) -> str:
    """Three digits, without an exponent from 0.001 to 1e6."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text else text


def line_of(row: Row, *, judged: bool = True) -> list[str]:
    """The cells of a row: work, ours, peer, ratio with its spread, goal, met."""
    peer = row.peer if row.theirs is None else f"{row.peer}: {figure(row.theirs)} {row.unit}"
    if row.skipped:
        return [row.work, "-", row.peer or "-", "-", str(row.goal or "-"), f"skipped: {row.skipped}"]
    ratio = "-"
    if row.ratio is not None:
        times = " x" if row.times_faster else ""
        ratio = f"{figure(row.ratio)}{times} ({figure(min(row.ratios))} .. {figure(max(row.ratios))})"
    met = {True: "yes", False: "no", None: "-"}[row.met if judged else None]
    goal = "-" if row.goal is None else f"{row.goal}{f' {row.unit}' if row.goal.of == 'ours' else ''}"
    return [row.work, f"{figure(row.ours)} {row.unit}".strip(), peer, ratio, goal, met]


def table(rows: Sequence[Row], *, judged: bool = True) -> str:
    """All rows as a Markdown table with the notes below it.

    Args:
        rows: what was measured.
        judged: False leaves "met" open, where the sizes are not those that the goals are about.
    """
    head = ["work", "ours", "peer", "ratio (spread)", "goal", "met"]
    lines, notes = [], []
    for row in rows:
        cells = line_of(row, judged=judged)
        if row.note:
            if row.note not in notes:
                notes.append(row.note)
            cells[0] += f" [{notes.index(row.note) + 1}]"
        lines.append(cells)
    out = [head, ["---"] * len(head), *lines]
    text = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in out)
    return text + "".join(f"\n{'' if i else chr(10)}[{i + 1}] {note}  " for i, note in enumerate(notes))


def save(path: str | Path, rows: Sequence[Row], machine: dict[str, Any], options: dict[str, Any]) -> None:
    """Write a run as JSON.

    Raises:
        UserError: the file cannot be written.
    """
    content = {"format": FORMAT, "machine": machine, "options": options, "rows": [row.to_json() for row in rows]}
    try:
        write_json(path, content)
    except OSError as error:
        raise UserError(f"cannot write --json {path} ({error}); give a file in a folder that is there") from error


def load(path: str | Path) -> list[Row]:
    """The rows of a run that :func:`save` wrote.

    Raises:
        UserError: no such file, or none of ours.
    """
    try:
        content = json.loads(Path(path).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this is {FORMAT}")
        return [Row.from_json(row) for row in content["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"cannot compare with {path} ({error}); give a file that `benchmark.py --json FILE` wrote"
        raise UserError(msg) from error


@dataclass(frozen=True)
class Change:
    """What became of a row since an older run.

    Attributes:
        key: of the row.
        verdict: "slower", "faster", "same", "not comparable" or "gone".
        factor: how many times worse the figure is now; below 1 it is better.
        text: the line to print.
    """

    key: str
    verdict: str
    factor: float | None
    text: str


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """What became slower or faster.

    A ratio to a peer of the same run hardly depends on the machine's mood; so ratios are compared, not seconds. A row
    is slower where its figure is worse by more than 5 % and the ranges of the rounds' ratios do not meet.

    Args:
        old: rows of the older run.
        new: rows of this one; those that were not run now are left out.
    """
    before = {row.key: row for row in old}
    return [_change(before[row.key], row) for row in new if row.key in before]


def _change(old: Row, new: Row) -> Change:
    if old.skipped:
        return Change(new.key, "not comparable", None, f"{new.key}: was skipped then ({old.skipped})")
    if new.skipped:
        return Change(new.key, "gone", None, f"{new.key}: was measured then, now skipped: {new.skipped}")
    if json.loads(json.dumps(old.sizes)) != json.loads(json.dumps(new.sizes)):
        return Change(new.key, "not comparable", None, f"{new.key}: ran with other sizes then")
    a, b = old.ratios or [old.ours], new.ratios or [new.ours]
    a_mid, b_mid = (old.ratio or old.ours), (new.ratio or new.ours)
    up = new.times_faster if new.ratios else bool(new.goal and new.goal.at_least)  # more is better
    factor = a_mid / b_mid if up else b_mid / a_mid
    apart = max(a) < min(b) or max(b) < min(a)
    verdict = "same"
    if apart and factor > 1 + MARGIN:
        verdict = "slower"
    elif apart and factor < 1 / (1 + MARGIN):
        verdict = "faster"
    text = f"{new.key}: {figure(a_mid)} ({figure(min(a))} .. {figure(max(a))}) then, "
    text += f"{figure(b_mid)} ({figure(min(b))} .. {figure(max(b))}) now: {verdict}, {factor:.2f} times as slow"
    return Change(new.key, verdict, factor, text)

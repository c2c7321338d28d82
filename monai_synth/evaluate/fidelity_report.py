# SPDX-License-Identifier: Apache-2.0
"""The files of a fidelity report: ``fidelity.json``, ``fidelity.csv`` and the self-contained page ``report.html``.

Synthetic images are shown, real ones only where that was asked for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from monai_synth.atomic import remove_leftovers, write_bytes, write_json
from monai_synth.errors import UserError
from monai_synth.evaluate.fidelity_figures import strips
from monai_synth.evaluate.fidelity_page import fidelity_page
from monai_synth.evaluate.fidelity_sets import AnySet

FILES = ("fidelity.json", "fidelity.csv", "report.html")
_OWN_ENTRIES = {*FILES, "features"}


def check_report(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder whose report may not be replaced.

    Raises:
        UserError: a report is there and ``overwrite`` is not set, or the folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    entries = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()
    foreign = sorted(entries - _OWN_ENTRIES)
    if foreign:
        raise UserError(f"--out {out} holds {foreign[0]!r}, which is no part of a fidelity report; name another folder")
    if entries & set(FILES) and not overwrite:
        raise UserError(f"--out {out} holds a report; name another folder, or replace it with --overwrite")


def write_report(
    out: Path, content: Mapping[str, Any], sets: Mapping[str, AnySet], figures: Mapping[str, Any], *, show_real: bool
) -> None:
    """Write the three files, the JSON last.

    Args:
        out: folder, created if missing.
        content: of ``fidelity.json``.
        sets: where the pictures come from.
        figures: of `fidelity_parts`.
        show_real: show real images and the control's too.
    """
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    (out / "fidelity.json").unlink(missing_ok=True)
    shown = ("synthetic", "real_train", "control") if show_real else ("synthetic",)
    pictures = {key: strips(sets[key]) for key in shown if key in sets}
    write_bytes(out / "report.html", fidelity_page(content, pictures, figures).encode("utf-8"))
    write_bytes(out / "fidelity.csv", _csv(content).encode("utf-8"))
    write_json(out / "fidelity.json", content)


def _csv(content: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("a", "b", "class", "metric", "value", "low", "high", "standard_error", "n_a", "n_b", "num_pairs", "text")
    writer.writerow(head)
    for a, b, name, key, number, text in _rows(content):
        low, high = number["ci"] or ("", "")
        n = (*number["n"], "") if isinstance(number["n"], list) else ("", "", number["n"])
        writer.writerow([a, b, name, key, number["value"], low, high, number["standard_error"], *n, text])
    return buffer.getvalue()


def _rows(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, Mapping[str, Any], Any]]:
    for e in content["pairs"]:
        for key, number in e["metrics"].items():
            yield e["a"], e["b"], e["class"] or "", key, number, (e["text"] or {}).get(key, "")
        for label, rows in e.get("hu", {}).items():
            for key, number in rows.items():
                yield e["a"], e["b"], "", f"hu_{key} ({label})", number, ""
        for label, statistics in e.get("masks", {}).items():
            for statistic, rows in statistics.items():
                for key, number in rows.items():
                    yield e["a"], e["b"], "", f"mask_{statistic}_{key} ({label})", number, ""
    for key, record in content["sets"].items():
        for name, number in record["within"].items():
            yield key, key, "", f"within_{name}", number, ""
    for key, number in ((content.get("paired") or {}).get("metrics") or {}).items():
        yield "synthetic", "real image of the same map", "", f"paired_{key}", number, ""
    for label, rows in (content.get("consistency") or {}).get("labels", {}).items():
        for key, number in rows.items():
            yield "synthetic", "real", "", f"dice_{key} ({label})", number, ""

# SPDX-License-Identifier: Apache-2.0
"""Results of an experiment: ``results.json``, ``results.csv`` and the page ``report.html``.

Tables in the form of the text's Tables 5.1 to 5.6, plots in that of its Figures 5.4 and 5.5.
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.atomic import write_bytes, write_json
from monai_synth.experiments import nnunet_scores as scores
from monai_synth.experiments.nnunet_jobs import Markers, Outcome
from monai_synth.experiments.nnunet_pictures import disagreement_png
from monai_synth.experiments.nnunet_sets import TestSet
from monai_synth.experiments.nnunet_text import reported_html
from monai_synth.experiments.page import image_html, page, settings_html
from monai_synth.export.provenance import package_versions
from monai_synth.figures import new_figure, png

NAMES = {
    "real": "real only",
    "control": "real, then real again",
    "synthetic-only": "synthetic only",
    "pretrain": "synthetic, then real",
    "mix": "real and synthetic mixed",
}
CAPTIONS = {
    "synthetic-only": "Trained on synthetic pairs only (form of Tables 5.1 to 5.3)",
    "pretrain": "Trained on synthetic pairs, then on real ones (form of Tables 5.4 to 5.6)",
    "mix": "Trained on real and synthetic pairs together",
}
SEED = 0  # of the bootstrap


@dataclass(frozen=True)
class Row:
    """One row of the tables.

    Attributes:
        mode: "real", "control", "synthetic-only", "pretrain" or "mix".
        ratio: synthetic pairs in percent of the real training set; None for real only and control.
        runs: names of its networks, one per seed and fold.
        num_steps: optimiser steps behind each network.
    """

    mode: str
    ratio: int | None
    runs: tuple[str, ...]
    num_steps: int

    @property
    def text(self) -> str:
        return NAMES[self.mode] + ("" if self.ratio is None else f" {self.ratio} %")


def write_results(
    out: Path,
    rows: Sequence[Row],
    tests: Sequence[TestSet],
    markers: Markers,
    *,
    labels: Mapping[str, int],
    record: Mapping[str, Any],
    num_bootstrap: int,
    show_real: bool,
    outcome: Outcome,
) -> dict[str, Any]:
    """Score what is done and write the three files.

    Args:
        out: folder of the experiment.
        rows: real only first.
        tests: the test sets.
        markers: where the networks' counts are.
        labels: name -> value.
        record: settings to print.
        num_bootstrap: draws for the intervals.
        show_real: put real test images into the page.
        outcome: what failed.

    Returns:
        The content of ``results.json``.
    """
    results = [
        entry for test in tests for entry in _scored(test, rows, markers, num_bootstrap=num_bootstrap, record=record)
    ]
    content = {
        "labels": dict(labels),
        "results": results,
        "failed": outcome.failed,
        "skipped": outcome.skipped,
        "recipe": scores.RECIPE,
        "versions": _versions(),
        "settings": dict(record),
    }
    write_json(out / "results.json", content)
    write_bytes(out / "results.csv", _csv(results).encode("utf-8"))
    pictures = _pictures(out, rows, tests, results, len(labels)) if show_real else {}
    write_bytes(out / "report.html", report_html(content, pictures).encode("utf-8"))
    return content


def report_html(content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page, with everything in it.

    Args:
        content: of ``results.json``.
        pictures: PNG of real test images per test set.
    """
    settings = content["settings"]
    parts = [
        f"<p>{settings['num_real']} real training images, {settings['folds']} folds. Scores in percent with 95 % "
        f"intervals over the test images; differences are to real only on the same images. "
        f"{html.escape(content['recipe'])}</p>",
        "<p>Every ratio is shown: the best of several, chosen on test images, would promise too much. Pretrained "
        "networks saw more steps than real only; the row <i>real, then real again</i> (mode control) has as many.</p>",
    ]
    if content["failed"] or content["skipped"]:
        lines = [f"{name}: {text}" for name, text in content["failed"].items()]
        lines += [f"{name}: skipped, it needs {needed}" for name, needed in content["skipped"].items()]
        parts.append(f"<h2>Incomplete</h2><pre class='bad'>{html.escape(chr(10).join(lines))}</pre>")
    tests = list(dict.fromkeys(entry["test"] for entry in content["results"]))
    for mode, caption in CAPTIONS.items():
        if any(entry["mode"] == mode for entry in content["results"]):
            parts.append(f"<h2>{html.escape(caption)}</h2>{_table(content['results'], tests, mode)}")
    for test in tests:
        plot = image_html(_plot(content["results"], test))
        parts.append(f"<h2>{html.escape(test)}: score against ratio</h2>{plot}")
        if test in pictures:
            parts.append(
                "<p>Image, truth, real only and the best pretrained network (chosen on these images); the box holds "
                f"the largest connected disagreement of the two.</p>{image_html(pictures[test])}"
            )
        parts.append(reported_html(test))
    parts.append(settings_html({**settings, "versions": content["versions"]}))
    return page("nnU-Net on real and synthetic pairs", parts)


def counts_of(row: Row, test: TestSet, markers: Markers) -> tuple[np.ndarray, list[str]]:
    """Pixels of a row's finished runs, int (runs, images, labels, 3), and the names of those runs."""
    found, names = [], []
    for run in row.runs:
        marker = markers.read(f"{run}.{test.name}")
        if marker is not None:
            found.append([marker["cases"][case["case_id"]] for case in test.cases])
            names.append(run)
    return np.asarray(found), names


def _scored(
    test: TestSet, rows: Sequence[Row], markers: Markers, *, num_bootstrap: int, record: Mapping[str, Any]
) -> list[dict[str, Any]]:
    weights = scores.draws([case["group"] for case in test.cases], num_bootstrap, SEED)
    reference: np.ndarray | None = None
    entries = []
    for row in rows:
        counts, runs = counts_of(row, test, markers)
        if not runs:
            continue
        common = {
            "recipe": scores.RECIPE,
            "seed": SEED,
            "versions": _versions(),
            "settings": {"num_bootstrap": num_bootstrap, "mode": row.mode, "ratio": row.ratio, "num_runs": len(runs)},
        }
        values = scores.numbers(counts, weights=weights)
        entry = {
            "test": test.name,
            "mode": row.mode,
            "ratio": row.ratio,
            "num_synthetic": None if row.ratio is None else record["sizes"][row.ratio],
            "num_steps": row.num_steps,
            "num_runs": len(runs),
            "num_runs_planned": len(row.runs),
            "num_images": len(test.cases),
            "num_patients": len({case["group"] for case in test.cases}),
            "numbers": {metric: number | common for metric, number in values.items()},
            "difference": None,
            "per_run": {
                run: dict(zip(scores.METRICS, _plain(scores.score(counts[k : k + 1])[0]), strict=True))
                for k, run in enumerate(runs)
            },
        }
        if row.mode == "real":
            reference = counts
        elif reference is not None:
            differences = scores.numbers(counts, weights=weights, minus=reference)
            entry["difference"] = {metric: number | common for metric, number in differences.items()}
        entries.append(entry)
    return entries


def _table(results: Sequence[Mapping[str, Any]], tests: Sequence[str], mode: str) -> str:
    head = "".join(f"<th colspan='4'>{html.escape(test)} (n = {_images(results, test)})</th>" for test in tests)
    second = "<th>mDice</th><th>difference</th><th>mIoU</th><th>difference</th>" * len(tests)
    shown = ("real", "control", mode) if mode == "pretrain" else ("real", mode)
    keys = list(dict.fromkeys((e["mode"], e["ratio"]) for e in results if e["mode"] in shown))
    body = []
    for key in keys:
        cells = []
        for test in tests:
            entry = next((e for e in results if (e["mode"], e["ratio"], e["test"]) == (*key, test)), None)
            for metric in ("mDice", "mIoU"):
                cells.append(f"<td>{'' if entry is None else _number(entry['numbers'][metric])}</td>")
                change = entry["difference"][metric] if entry and entry["difference"] else None
                cells.append(f"<td>{'' if change is None else _number(change, sign=True)}</td>")
        some = next(e for e in results if (e["mode"], e["ratio"]) == key)
        name = Row(key[0], key[1], (), 0).text
        runs = f"{some['num_runs']}" + (
            "" if some["num_runs"] == some["num_runs_planned"] else f" of {some['num_runs_planned']}"
        )
        pairs = "" if some["num_synthetic"] is None else some["num_synthetic"]
        body.append(
            f"<tr><td>{html.escape(name)}</td><td>{pairs}</td><td>{some['num_steps']}</td><td>{runs}</td>"
            f"{''.join(cells)}</tr>"
        )
    first = "".join(f"<th rowspan='2'>{text}</th>" for text in ("trained on", "synthetic pairs", "steps", "networks"))
    return f"<table><thead><tr>{first}{head}</tr><tr>{second}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _plot(results: Sequence[Mapping[str, Any]], test: str) -> bytes:
    """mDice and mIoU against ratio, the real-only score as a dashed line with its interval."""
    figure = new_figure(9, 3.6)
    for axes, metric in zip(figure.subplots(1, 2), ("mDice", "mIoU"), strict=True):
        ratios = sorted({e["ratio"] for e in results if e["ratio"]})
        span = max(ratios, default=0)
        for k, (mode, colour) in enumerate(zip(CAPTIONS, ("tab:blue", "tab:orange", "tab:green"), strict=True)):
            entries = [e for e in results if e["test"] == test and e["mode"] == mode]
            entries = [e for e in entries if e["numbers"][metric]["value"] is not None]
            if not entries:
                continue
            y = np.array([100 * e["numbers"][metric]["value"] for e in entries])
            edges = np.array([e["numbers"][metric]["ci"] or [e["numbers"][metric]["value"]] * 2 for e in entries]) * 100
            x = [e["ratio"] + (k - 1) * span / 100 for e in entries]  # side by side
            axes.errorbar(
                x, y, np.maximum(0, [y - edges[:, 0], edges[:, 1] - y]),
                marker="o", capsize=3, color=colour, label=NAMES[mode],
            )  # fmt: skip
        for mode, style in (("real", "--"), ("control", ":")):
            line = next((e["numbers"][metric] for e in results if (e["test"], e["mode"]) == (test, mode)), None)
            if line is not None and line["value"] is not None:
                axes.axhline(100 * line["value"], linestyle=style, color="black", label=NAMES[mode])
                if line["ci"] and mode == "real":
                    axes.axhspan(100 * line["ci"][0], 100 * line["ci"][1], color="black", alpha=0.08)
        axes.set(xlabel="synthetic pairs, % of the real training set", ylabel=f"{metric}, %")
        axes.set_xticks(ratios)
        if ratios:
            axes.set_xlim(ratios[0] - span / 10, span + span / 10)
        axes.legend(fontsize=7)
    return png(figure)


def _pictures(
    out: Path, rows: Sequence[Row], tests: Sequence[TestSet], results: Sequence[Mapping[str, Any]], num_labels: int
) -> dict[str, bytes]:
    """Per test set, where real only and the best pretrained network differ most."""
    pictures = {}
    for test in tests:
        tuned = [e for e in results if e["test"] == test.name and e["mode"] == "pretrain"]
        real = next((e for e in results if e["test"] == test.name and e["mode"] == "real"), None)
        if not tuned or real is None:
            continue
        best = max(tuned, key=lambda e: e["numbers"]["mDice"]["value"] or 0.0)
        folders = [out / "predictions" / next(iter(entry["per_run"])) / test.name for entry in (real, best)]
        titles = ("image", "truth", NAMES["real"], Row("pretrain", best["ratio"], (), 0).text)
        pictures[test.name] = disagreement_png(test.cases, *folders, num_labels=num_labels, titles=titles)
    return pictures


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("test", "mode", "ratio", "num_synthetic", "num_steps", "num_runs")
    writer.writerow([*head, "n", "metric", "value", "low", "high", "difference", "difference_low", "difference_high"])
    for entry in results:
        for metric, number in entry["numbers"].items():
            change = (entry["difference"] or {}).get(metric) or {"value": None, "ci": None}
            cells = [*(entry[key] for key in head), number["n"], metric]
            for item in (number, change):
                cells += [item["value"], *(item["ci"] or ("", ""))]
            writer.writerow(cells)
    return buffer.getvalue()


def _number(number: Mapping[str, Any], *, sign: bool = False) -> str:
    if number["value"] is None:
        return "-"
    form = "{:+.2f}" if sign else "{:.2f}"
    text = form.format(100 * number["value"])
    if number["ci"]:
        text += " <small>[{}, {}]</small>".format(*(form.format(100 * edge) for edge in number["ci"]))
    return text


def _images(results: Sequence[Mapping[str, Any]], test: str) -> int:
    return next(entry["num_images"] for entry in results if entry["test"] == test)


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = package_versions()
    with contextlib.suppress(PackageNotFoundError):
        versions["nnunetv2"] = version("nnunetv2")
    return versions

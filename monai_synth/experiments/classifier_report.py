# SPDX-License-Identifier: Apache-2.0
"""Results of the classifier experiment: what is done is scored and compared; ``results.json`` and ``results.csv``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.atomic import write_bytes, write_json
from monai_synth.experiments import classifier_scores as scores
from monai_synth.experiments.classifier_rows import Row
from monai_synth.experiments.classifier_sets import Source
from monai_synth.experiments.classifier_train import run_name
from monai_synth.experiments.nnunet_scores import draws
from monai_synth.export.provenance import package_versions

SEED = 0  # of the bootstrap


def write_results(
    out: Path,
    rows: Sequence[Row],
    source: Source,
    *,
    num_seeds: int,
    positive: int | None,
    record: Mapping[str, Any],
    num_bootstrap: int,
    show_real: bool,
) -> dict[str, Any]:
    """Score what is done and write the three files.

    Args:
        out: folder of the experiment.
        rows: in the order of the table.
        source: the images.
        num_seeds: that were asked for.
        positive: class of the binary scores, or None.
        record: settings to print.
        num_bootstrap: draws for the intervals.
        show_real: put real test images into the page.

    Returns:
        The content of ``results.json``.
    """
    runs = {row: _runs(out, row, num_seeds) for row in rows}
    content = {
        "classes": source.classes,
        "positive": None if positive is None else list(source.classes)[positive],
        "num_test": {name: int((source.labels("test") == k).sum()) for name, k in source.classes.items()},
        "num_patients": len(set(_patients(source))),
        "num_seeds": num_seeds,
        "results": _results(rows, runs, source, positive, num_bootstrap),
        "recipe": scores.RECIPE,
        "seed": SEED,
        "num_bootstrap": num_bootstrap,
        "versions": package_versions(),
        "settings": json.loads(json.dumps(dict(record))),
    }
    write_json(out / "results.json", content)
    write_bytes(out / "results.csv", results_csv(content["results"]).encode("utf-8"))
    return content


def results_csv(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row, metric and comparison."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("row", "mode", "fraction", "geo", "weighted", "ratio", "num_seeds")
    writer.writerow([*head, "minus_row", "n", "metric", "value", "sd", "low", "high"])
    for entry in results:
        blocks = [("", entry["numbers"])]
        blocks += [(found["row"], found["numbers"]) for found in entry["differences"].values()]
        for other, block in blocks:
            for metric, number in block.items():
                ends = number["ci"] or ("", "")
                cells = [entry[key] for key in head]
                writer.writerow([*cells, other, number["n"], metric, number["value"], number["sd"], *ends])
    return buffer.getvalue()


def _runs(out: Path, row: Row, num_seeds: int) -> dict[int, dict[str, Any]]:
    """Markers of a row's finished runs by seed."""
    paths = {seed: out / "runs" / f"{run_name(row, seed)}.json" for seed in range(num_seeds)}
    return {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.is_file()}


def _patients(source: Source) -> list[str]:
    return [str(case.get("patient_id", case["case_id"])) for case in source.cases["test"]]


def _results(
    rows: Sequence[Row],
    runs: Mapping[Row, Mapping[int, Mapping[str, Any]]],
    source: Source,
    positive: int | None,
    num_bootstrap: int,
) -> list[dict[str, Any]]:
    truth = source.labels("test")
    names = scores.metric_names(list(source.classes), positive)
    weights = draws(_patients(source), num_bootstrap, SEED)
    # (metrics,) and (draws, metrics) of each seed, so that differences take the same seeds
    scored = {
        row: {
            seed: scores.score_seeds(truth, np.array([run["test"]]), positive, weights)
            for seed, run in runs[row].items()
        }
        for row in rows
    }

    def block(row: Row, minus: Row | None = None) -> dict[str, Any]:
        seeds = [seed for seed in scored[row] if minus is None or seed in scored[minus]]
        values = np.concatenate([scored[row][seed][0] for seed in seeds])
        drawn = None if weights is None else np.mean([scored[row][seed][1] for seed in seeds], axis=0)
        if minus is not None:
            values = values - np.concatenate([scored[minus][seed][0] for seed in seeds])
            drawn = None if drawn is None else drawn - np.mean([scored[minus][seed][1] for seed in seeds], axis=0)
        return scores.numbers(names, values, drawn, len(truth))

    results = []
    for row in rows:
        if not runs[row]:
            continue
        some = next(iter(runs[row].values()))
        twins = {what: other for what, other in row.twins.items() if set(scored.get(other, {})) & set(scored[row])}
        results.append(
            {
                "row": row.name,
                "number": row.number,
                "mode": row.mode,
                "text": row.text,
                "fraction": row.fraction,
                "geo": row.geo,
                "weighted": row.weighted,
                "ratio": row.ratio,
                "start": row.start.name if row.start is not None else some["start"],
                "num_images": some["num_images"],
                "num_steps": some["num_steps"],
                "num_seeds": len(runs[row]),
                "num_test": len(truth),
                "numbers": block(row),
                "differences": {
                    what: {
                        "row": other.name,
                        "num_seeds": len(set(scored[other]) & set(scored[row])),
                        "numbers": block(row, other),
                    }
                    for what, other in twins.items()
                },
                "per_seed": {
                    str(seed): dict(zip(names, map(_plain, scored[row][seed][0][0]), strict=True)) for seed in runs[row]
                },
                "confusion": np.mean(
                    [scores.confusion(truth, np.array(run["test"]))[0] for run in runs[row].values()], axis=0
                ).tolist(),
                "curves": {str(seed): run["curves"] for seed, run in runs[row].items()},
                "best_epoch": {str(seed): run["best_epoch"] for seed, run in runs[row].items()},
                "seconds": round(sum(run["seconds"] for run in runs[row].values()), 1),
            }
        )
    return results


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

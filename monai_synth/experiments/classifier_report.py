# SPDX-License-Identifier: Apache-2.0
"""Results of the classifier experiment: what is done is scored, compared and written."""

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
from monai_synth.experiments.classifier_page import report_html
from monai_synth.experiments.classifier_pictures import hardest_png
from monai_synth.experiments.classifier_rows import Row
from monai_synth.experiments.classifier_sets import Source
from monai_synth.experiments.classifier_train import run_name
from monai_synth.experiments.nnunet_scores import draws
from monai_synth.export.provenance import package_versions

SEED = 0  # of the bootstrap
_DRAWN_TOGETHER = 4_000_000  # images in all draws, which bounds the memory


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
    truth = source.labels("test")
    names = scores.metric_names(list(source.classes), positive)
    scored = _Scored(truth, runs, names, positive, draws(_patients(source), num_bootstrap, SEED))
    recalls = ["recall", *(name for name in names if name.startswith("recall ("))]
    content = {
        "classes": source.classes,
        "positive": None if positive is None else list(source.classes)[positive],
        "num_test": {name: int((source.labels("test") == k).sum()) for name, k in source.classes.items()},
        "num_patients": len(set(_patients(source))),
        "num_seeds": num_seeds,
        "results": _results(rows, runs, scored, truth),
        "claims": _claims(rows, scored, recalls),
        "recipe": scores.RECIPE,
        "seed": SEED,
        "num_bootstrap": num_bootstrap,
        "versions": package_versions(),
        "settings": json.loads(json.dumps(dict(record))),
    }
    write_json(out / "results.json", content)
    write_bytes(out / "results.csv", results_csv(content["results"]).encode("utf-8"))
    shown = hardest_png(source, [run for by_seed in runs.values() for run in by_seed.values()]) if show_real else None
    write_bytes(out / "report.html", report_html(content, shown).encode("utf-8"))
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


class _Scored:
    """Scores of all finished runs, and the numbers that follow for a row or for a difference of rows.

    Args:
        truth: int (N,), class of each test image.
        runs: markers by row and seed.
        names: of the metrics.
        positive: class of the binary scores, or None.
        weights: bootstrap draws, or None.
    """

    def __init__(
        self,
        truth: np.ndarray,
        runs: Mapping[Row, Mapping[int, Mapping[str, Any]]],
        names: Sequence[str],
        positive: int | None,
        weights: np.ndarray | None,
    ) -> None:
        self.names, self.num = names, len(truth)
        # (metrics,) of each seed and its draws (draws, metrics): differences take the seeds that both have
        self.values: dict[Row, dict[int, np.ndarray]] = {}
        self.drawn: dict[Row, dict[int, np.ndarray | None]] = {}
        for row, by_seed in runs.items():
            self.values[row], self.drawn[row] = {}, {}
            for seed, run in by_seed.items():
                probabilities = np.array(run["test"])
                self.values[row][seed] = scores.score(truth, probabilities, positive)[0]
                self.drawn[row][seed] = None
                if weights is not None:
                    parts = np.array_split(weights, max(1, weights.size // _DRAWN_TOGETHER))
                    drawn = [scores.score(truth, probabilities, positive, part) for part in parts]
                    self.drawn[row][seed] = np.concatenate(drawn)

    def seeds(self, *rows: Row) -> list[int]:
        """Seeds that all rows have."""
        return sorted(set.intersection(*(set(self.values.get(row, {})) for row in rows)))

    def numbers(self, plus: Sequence[Row], minus: Sequence[Row] = ()) -> dict[str, dict[str, Any]]:
        """Mean over rows, less that over other rows."""
        seeds = self.seeds(*plus, *minus)
        values, drawn = self._mean(plus, seeds)
        if minus:
            less, drawn_less = self._mean(minus, seeds)
            values, drawn = values - less, None if drawn is None else drawn - drawn_less
        return scores.numbers(self.names, values, drawn, self.num)

    def _mean(self, rows: Sequence[Row], seeds: Sequence[int]) -> tuple[np.ndarray, Any]:
        """Mean over rows, (seeds, metrics) and (seeds, draws, metrics)."""
        values = np.mean([[self.values[row][seed] for seed in seeds] for row in rows], axis=0)
        if self.drawn[rows[0]][seeds[0]] is None:
            return values, None
        return values, np.mean([[self.drawn[row][seed] for seed in seeds] for row in rows], axis=0)


def _results(
    rows: Sequence[Row], runs: Mapping[Row, Mapping[int, Mapping[str, Any]]], scored: _Scored, truth: np.ndarray
) -> list[dict[str, Any]]:
    results = []
    for row in rows:
        if not runs[row]:
            continue
        some = next(iter(runs[row].values()))
        twins = {what: other for what, other in row.twins.items() if scored.seeds(row, other)}
        counts = [scores.confusion(truth, np.array(run["test"]))[0] for run in runs[row].values()]
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
                "numbers": scored.numbers([row]),
                "differences": {
                    what: {
                        "row": other.name,
                        "num_seeds": len(scored.seeds(row, other)),
                        "numbers": scored.numbers([row], [other]),
                    }
                    for what, other in twins.items()
                },
                "per_seed": {
                    str(seed): dict(zip(scored.names, map(_plain, values), strict=True))
                    for seed, values in scored.values[row].items()
                },
                "confusion": np.mean(counts, axis=0).tolist(),
                "curves": {str(seed): run["curves"] for seed, run in runs[row].items()},
                "best_epoch": {str(seed): run["best_epoch"] for seed, run in runs[row].items()},
                "devices": sorted({run["device"] for run in runs[row].values()}),
                "seconds": round(sum(run["seconds"] for run in runs[row].values()), 1),
            }
        )
    return results


def _claims(rows: Sequence[Row], scored: _Scored, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Per fraction and metric, whether the best row has synthetic pretraining, as the text claims of the recall."""
    claims = []
    for fraction in sorted({row.fraction for row in rows if row.fraction}, reverse=True):
        here = [row for row in rows if row.fraction == fraction and scored.values.get(row)]
        tuned, others = ([row for row in here if row.mode == mode] for mode in ("pretrain", "real"))
        pairs = [(row, row.twins["no synthetic images"]) for row in tuned]
        pairs = [(row, twin) for row, twin in pairs if scored.seeds(row, twin)]
        if not pairs:
            continue
        for metric in metrics:

            def value(row: Row, metric: str = metric) -> float:
                found = scored.numbers([row])[metric]["value"]
                return -1.0 if found is None else found

            first, second = max(tuned, key=value), max(others, key=value)
            if not scored.seeds(first, second):
                continue
            plus, minus = ([pair[k] for pair in pairs] for k in (0, 1))
            everything = bool(scored.seeds(*plus, *minus))
            claims.append(
                {
                    "fraction": fraction,
                    "metric": metric,
                    "best_pretrain": first.name,
                    "best_other": second.name,
                    "num_rows": len(tuned) + len(others),
                    "holds": value(first) > value(second),
                    "difference": scored.numbers([first], [second])[metric],
                    "pairs": [[a.name, b.name] for a, b in pairs],
                    "mean_difference": scored.numbers(plus, minus)[metric] if everything else None,
                }
            )
    return claims


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

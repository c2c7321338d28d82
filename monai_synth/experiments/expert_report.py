# SPDX-License-Identifier: Apache-2.0
"""Results of the expert experiment: what is done is judged, and written as JSON, CSV and a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from monai_synth.atomic import write_bytes, write_json
from monai_synth.experiments import expert_results as results
from monai_synth.experiments.expert_page import report_html
from monai_synth.experiments.expert_results import Comparison, Done
from monai_synth.experiments.expert_scores import RECIPE, Bootstrap
from monai_synth.experiments.expert_source import REAL, told_apart
from monai_synth.export.provenance import package_versions

SEED = 0  # of the bootstrap
_COLUMNS = 18  # of all arms' images together


def write_results(given: Comparison, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Judge what is done and write the three files.

    Args:
        given: what is compared.
        report: takes one line of progress each.

    Returns:
        The content of ``results.json``.
    """
    done = Done(given)
    bootstrap = Bootstrap(given.num_bootstrap, SEED)
    content: dict[str, Any] = {
        "classes": dict(given.classes),
        "left": list(given.left),
        "sampled": list(given.plan.classes),
        "baseline": given.baseline,
        "arms": {
            arm: {
                "models": [{"file": f"{m.path.parent.name}/{m.path.name}", "sha256": m.sha256} for m in models],
                "num_seeds": len(done.seeds(arm)),
                "alignment": models[0].contract.get("alignment"),
            }
            for arm, models in given.arms.items()
        },
        "num_seeds": given.num_seeds,
        "per_class": given.plan.per_class,
        "image_size": list(given.real.image_size),
        "same_model": results.same_models(given.arms),
        "differ_by": told_apart(given.arms, given.baseline),
        "experts": [],
    }
    for judge in given.judges:
        report(f"judging by the {judge.name}")
        content["experts"].append(results.judged(given, done, judge, bootstrap, report))
    report("comparing images by SSIM")
    content["similarity"] = results.similarity(given, done, bootstrap)
    content["filter"] = results.filtered(given, done)
    content |= {
        "recipe": RECIPE,
        "seed": SEED,
        "num_bootstrap": given.num_bootstrap,
        "versions": package_versions(),
        "settings": {**json.loads(json.dumps(dict(given.settings))), "device": given.device},
    }
    write_json(given.out / "results.json", content)
    write_bytes(given.out / "results.csv", results_csv(content).encode("utf-8"))
    write_bytes(given.out / "report.html", report_html(content, grids(given, done)).encode("utf-8"))
    return content


def results_csv(content: Mapping[str, Any]) -> str:
    """A line for each number: accuracy, recall of each class, shares taken for others, and similarity."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    keys = ("n", "num_seeds", "num_trainings", "value", "sd")
    writer.writerow(["expert", "arm", "minus_arm", "metric", "class", "taken_for", *keys, "low", "high", "p"])
    for expert, arm, minus, metric, name, other, number in _lines(content):
        p = (number.get("wilcoxon") or {}).get("p", "")
        cells = [number.get(key) for key in keys]
        writer.writerow([expert, arm, minus, metric, name, other, *cells, *(number.get("ci") or ("", "")), p])
    return buffer.getvalue()


def grids(given: Comparison, done: Done) -> dict[str, np.ndarray]:
    """Images of the first seed and training by arm, uint8 (K', columns, C, H, W); real ones where they are shown."""
    columns = max(3, min(8, _COLUMNS // (len(given.arms) + given.show_real)))
    shown = {
        arm: done.samples(models[0], done.seeds(arm)[0]).images[:, :columns]
        for arm, models in given.arms.items()
        if done.seeds(arm)
    }
    if given.show_real and shown:
        rows = [given.real.drawn(0, name, columns) for name in given.plan.classes]
        shape = next(iter(shown.values())).shape
        found = np.full((len(rows), shape[1], *shape[2:]), 255, np.uint8)
        for row, images in zip(found, rows, strict=True):
            row[: len(images)] = images[: shape[1]]
        shown[REAL] = found
    return shown


def _lines(content: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for expert in content["experts"]:
        for arm, entry in expert["arms"].items():
            for minus, block in (("", entry), (content["baseline"], entry["difference"])):
                if block is None:
                    continue
                yield expert["name"], arm, minus, "accuracy", "", "", block["accuracy"]
                for name, number in block["recall"].items():
                    yield expert["name"], arm, minus, "accuracy", name, "", number
                for name, others in block["taken_for"].items():
                    for other, number in others.items():
                        if other != name:
                            yield expert["name"], arm, minus, "taken for", name, other, number
        for key, real in expert["real"].items():
            for metric, n in (("accuracy", "n"), ("accuracy_left", "n_left")):
                name = "accuracy" if metric == "accuracy_left" else "accuracy of all classes"
                yield expert["name"], f"real test ({key})", "", name, "", "", {"n": real[n], "value": real[metric]}
    for arm, entry in content["similarity"].items():
        for minus, block in (("", entry), (content["baseline"], entry["difference"])):
            if block is not None:
                yield "", arm, minus, "ssim", "", "", block["mean"]
                for name, number in block["classes"].items():
                    yield "", arm, minus, "ssim", name, "", number

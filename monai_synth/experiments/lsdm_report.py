# SPDX-License-Identifier: Apache-2.0
"""Results of the lung CT experiment: what is done is measured, and written as a page, CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from monai_synth import __version__
from monai_synth.atomic import write_bytes, write_json
from monai_synth.checkpoint import classifier_file, load_file
from monai_synth.evaluate.features import Extractor
from monai_synth.evaluate.perceptual import Perceptual
from monai_synth.evaluate.similarity import ms_ssim_recipe
from monai_synth.evaluate.tracking import log_report
from monai_synth.experiments import lsdm_gradients as gradients
from monai_synth.experiments import lsdm_reconstruction as reconstruction
from monai_synth.experiments.lsdm_convergence import Convergence
from monai_synth.experiments.lsdm_page import report_html
from monai_synth.experiments.lsdm_pictures import Pictures
from monai_synth.experiments.lsdm_sampling import Samples, to_tensor
from monai_synth.experiments.lsdm_scores import RECIPE, SEED, Scorer
from monai_synth.experiments.lsdm_source import Arm, Cases, Model
from monai_synth.experiments.lsdm_sweeps import Sweeps
from monai_synth.experiments.lsdm_tables import text_column
from monai_synth.export.provenance import package_versions
from monai_synth.inference.guidance import MALIGNANCY

_NOISE = 4_100_000_000  # seeds of the gradients' noise, above those of all samples: none may meet its own noise again
_PRIVATE = ("dataset", "models", "out", "inception", "radimagenet", "extractor", "lpips", "mlflow")  # paths


@dataclass(frozen=True)
class Comparison:
    """What is compared, checked.

    Attributes:
        settings: as given.
        out: folder of the experiment.
        cases: held-out slices.
        arms: models, and the guided one with each guidance.
        baseline: that the others are compared with.
        guided: the model of sweeps, gradients and convergence; None without a diffusion model.
        samples: images of the arms.
        extractors: for distances.
        perceptual: LPIPS.
        device: "cpu" or "cuda".
        tracking: MLflow's address.
    """

    settings: Any
    out: Path
    cases: Cases
    arms: Sequence[Arm]
    baseline: Arm
    guided: Model | None
    samples: Samples
    extractors: Sequence[Extractor]
    perceptual: Perceptual | None
    device: str
    tracking: str | None

    @cached_property
    def shown(self) -> list[int]:
        """Slices for pictures: with the largest, the median and the smallest nodule area."""
        ordered = self.cases.by_nodule_area()
        return list(dict.fromkeys((ordered[0], ordered[len(ordered) // 2], ordered[-1])))

    @cached_property
    def sweeps(self) -> Sweeps | None:
        chosen = self.cases.by_nodule_area()[: self.settings.sweep_cases]
        if self.guided is None or not self.guided.features or not chosen:
            return None
        s = self.settings
        return Sweeps(self.guided, self.samples, self.out / "sweeps", chosen, s.sweep_scales, s.scale)

    @cached_property
    def convergence(self) -> Convergence | None:
        steps = self.settings.convergence_steps
        if self.guided is None or not steps:
            return None
        codec = self.samples.loaded.diffusion(self.guided).codec
        folder = self.out / "convergence"
        return Convergence(self.guided, self.cases, folder, steps=steps, codec=codec, device=self.device)

    def num_seeds(self, arm: Arm) -> int:
        """Leading seeds that are done."""
        for seed in range(self.settings.seeds):
            if not self.samples.is_done(arm, seed, self.cases.indices):
                return seed
        return int(self.settings.seeds)


def write_results(given: Comparison, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what is done and write the three files, JSON last.

    Args:
        given: what is compared.
        report: takes one line of progress each.

    Returns:
        The content of ``results.json``.
    """
    done = {arm.name: given.num_seeds(arm) for arm in given.arms}
    content = _head(given, done)
    pictures = Pictures(given.settings.show_real)
    num_seeds = min(done.values())
    if num_seeds:
        content |= _tables(given, num_seeds, report)
        pictures.comparison(given.cases, given.shown, given.arms, given.samples, given.settings.crop)
    if given.guided is not None:
        loaded = given.samples.loaded.diffusion(given.guided)
        report("reconstructing real slices by the autoencoder")
        content["reconstruction"] = reconstruction.measure(loaded, given.cases, given.perceptual)
        pictures.reconstruction(loaded, given.cases, given.shown)
        if num_seeds:
            content["gradients"] = _gradients(given, pictures, report)
    if given.sweeps is not None and given.sweeps.is_done():
        report("measuring the sweeps")
        content["sweeps"] = given.sweeps.measure()
        pictures.scale_sweep(given.sweeps, given.settings.crop)
        pictures.feature_sweep(given.sweeps, given.settings.crop)
        pictures.side_by_side(given.sweeps)
    if given.convergence is not None and given.convergence.is_done():
        content["convergence"] = given.convergence.run(report)
        pictures.convergence(content["convergence"])
    write_bytes(given.out / "results.csv", results_csv(content).encode("utf-8"))
    write_bytes(given.out / "report.html", report_html(content, pictures.found).encode("utf-8"))
    write_json(given.out / "results.json", content)
    values = {key: content[key] for key in ("table_5_1", "table_5_2", "reconstruction") if key in content}
    log_report(
        given.tracking,
        experiment="lsdm",
        run=given.out.name,
        values={k: _results_only(v) for k, v in values.items()},
        params=content["settings"],
        files=[given.out / "report.html", given.out / "results.json"],
    )
    return content


def _head(given: Comparison, done: Mapping[str, int]) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(given.settings).items() if key not in _PRIVATE}
    fingerprint = given.cases.dataset.fingerprint
    return {
        "arms": {
            arm.name: {
                **arm.record(),
                "bundle": arm.model.kind,
                "file": f"{arm.model.path.parent.name}/{arm.model.path.name}",
                "guidance": arm.guidance,
                "num_seeds": done[arm.name],
                "text_column": text_column(arm),
                "same_dataset": (arm.model.contract.get("dataset") or {}).get("fingerprint") == fingerprint,
                "map_tells_malignancy": not arm.model.contract.get("collapse_nodule_labels", False),
            }
            for arm in given.arms
        },
        "baseline": given.baseline.name,
        "guided": given.guided.name if given.guided else None,
        "classifiers": _classifiers(given.guided),
        "num_slices": len(given.cases),
        "num_slices_found": given.cases.num_found,
        "num_patients": len({given.cases.patient(i) for i in given.cases.indices}),
        "num_nodules": sum(len(given.cases.item(i)["nodules"]) for i in given.cases.indices),
        "num_seeds": given.settings.seeds,
        "image_size": list(given.cases.model.image_size),
        "crop": given.settings.crop,
        "dataset": {"name": given.cases.dataset.name, "fingerprint": fingerprint},
        "extractors": {
            e.key: {"title": e.title, "recipe": e.recipe, "sha256": e.weights_sha256, "warnings": list(e.warnings)}
            for e in given.extractors
        },
        "lpips": None if given.perceptual is None else given.perceptual.recipe,
        "recipe": f"{RECIPE} {ms_ssim_recipe(given.cases.model.image_size)}",
        "seed": SEED,
        "versions": {"monai_synth": __version__, **package_versions()},
        "settings": settings | {"device": given.device},
    }


def _classifiers(model: Model | None) -> dict[str, Any]:
    """What the training of each guiding classifier said of its convergence; None where its file does not tell."""
    if model is None:
        return {}
    schedule = model.contract.get("schedule", {})
    paths = {feature: model.path.parent / classifier_file(feature, schedule) for feature in model.features}
    return {feature: load_file(path, stage="classifier").get("report") for feature, path in paths.items()}


def _tables(given: Comparison, num_seeds: int, report: Callable[[str], None]) -> dict[str, Any]:
    scorer = Scorer(
        given.samples,
        given.cases.indices,
        num_seeds,
        crop=given.settings.crop,
        extractors=given.extractors,
        perceptual=given.perceptual,
        cache=given.out / "cache",
    )
    whole: dict[str, Any] = {}
    crops: dict[str, Any] = {}
    for arm in given.arms:
        report(f"measuring {arm.name}")
        whole[arm.name], crops[arm.name] = scorer.scores(arm)
    for arm in given.arms:
        for table in (whole, crops):
            for metric, result in table[arm.name].items():
                compared = arm is not given.baseline and result["value"] is not None
                result["difference"] = scorer.difference(arm, given.baseline, metric) if compared else None
    guided = _guided_differences(given, scorer, crops)
    return {
        "table_5_1": whole,
        "table_5_2": crops,
        "guided_minus_unguided": guided,
        "real": scorer.real(),
        "num_seeds_compared": num_seeds,
    }


def _guided_differences(given: Comparison, scorer: Scorer, crops: Mapping[str, Any]) -> dict[str, Any]:
    """What each guidance changed at the nodules against the same model without it, as Table 5.2 is read."""
    plain = next((arm for arm in given.arms if arm.model is given.guided and arm.guidance == "none"), None)
    if plain is None:
        return {}
    return {
        arm.name: {metric: scorer.difference(arm, plain, metric) for metric in crops[arm.name]}
        for arm in given.arms
        if arm.model is given.guided and arm.guidance != "none"
    }


def _gradients(given: Comparison, pictures: Pictures, report: Callable[[str], None]) -> dict[str, Any] | None:
    number = given.settings.gradient_cases
    if not number or MALIGNANCY not in given.guided.features:
        return None
    report("drawing the gradients of the malignancy classifier")
    model = given.samples.loaded.diffusion(given.guided)
    steps = int(given.guided.contract["schedule"]["num_train_timesteps"])
    times = [min(steps - 1, round(share * steps)) for share in given.settings.gradient_times]
    chosen = given.cases.by_nodule_area()[:number]
    source = next((a for a in given.arms if a.model is given.guided), given.arms[0])
    generated = {} if given.settings.show_real else dict(given.samples.load(source, 0, given.cases.indices))
    views, patients = [], []
    for i in chosen:
        item = given.cases.item(i)
        image = to_tensor(given.cases.real(i) if given.settings.show_real else generated[i]).to(given.device)
        nodule = max(item["nodules"], key=lambda n: n.get("area", 0))
        views.append([gradients.view_nodule(model, image, item["label"], nodule, t, seed=_NOISE + i) for t in times])
        patients.append(given.cases.patient(i))
    shown = views[:: max(1, len(views) // 3)][:3]
    pictures.image_gradients(shown)
    pictures.latent_gradients(shown)
    return {
        "of": "real test slices" if given.settings.show_real else f"slices generated by {source.name}, seed 0",
        "n": len(views),
        "times": gradients.summarize(views, patients),
    }


def results_csv(content: Mapping[str, Any]) -> str:
    """A line for each number, with n."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["part", "arm", "metric", "value", "n", "num_patients", "sd", "ci_low", "ci_high", "minus"])
    for part, arm, metric, result in _lines(content):
        low, high = result.get("ci") or ("", "")
        numbers = [result["value"], result["n"], result.get("num_patients", ""), result.get("sd", ""), low, high]
        row = [part, arm, metric, *("" if v is None else v for v in numbers), result.get("minus", "")]
        writer.writerow(row)
    return buffer.getvalue()


def _lines(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    for part in ("table_5_1", "table_5_2"):
        for arm, metrics in content.get(part, {}).items():
            for metric, result in metrics.items():
                yield part, arm, metric, result
                if result.get("difference"):
                    yield f"{part}_difference", arm, metric, result["difference"]
    for arm, metrics in content.get("guided_minus_unguided", {}).items():
        for metric, result in metrics.items():
            yield "guided_minus_unguided", arm, metric, result
    for metric, result in content.get("real", {}).items():
        yield "real", "real", metric, result
    for metric, result in content.get("reconstruction", {}).items():
        yield "reconstruction", "autoencoder", metric, result
    for feature, entry in (content.get("convergence") or {}).get("features", {}).items():
        if entry["skill"]:
            yield "convergence", feature, "skill", entry["skill"]
        for band, found in zip(content["convergence"]["bands"], entry["bands"], strict=False):
            yield "convergence", feature, f"skill t {band[0]}-{band[1]}", found["skill"]


def _results_only(table: Mapping[str, Any]) -> dict[str, Any]:
    """Without differences, whose names would collide in MLflow."""
    return {
        key: {k: v for k, v in value.items() if k != "difference"} if "value" in value else _results_only(value)
        for key, value in table.items()
    }

# SPDX-License-Identifier: Apache-2.0
"""The experiments of the lung CT text (its chapter 5) on models trained here: the order in which all is done.

Every model makes an image of each held-out slice with a nodule, all from the same noise; the latent diffusion model
also with each classifier's guidance. They are compared with the real slices of the same maps, whole (Table 5.1) and at
the nodules (Table 5.2). Sweeps, gradients, reconstructions and the check of all nine features go with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.checks import check_numbers, chosen_device
from monai_synth.errors import UserError
from monai_synth.experiments.choices import chosen_baseline, chosen_batch_size
from monai_synth.experiments.nnunet_jobs import locked, terminated_as_interrupt
from monai_synth.experiments.record import record_settings, require_own_folder

_FOLDERS = ("samples", "sweeps", "cache", "convergence")
_BATCH_SIZE = {"cpu": 8, "cuda": 16}


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
        dataset: prepared LIDC dataset; its test split is used.
        models: (name, file of a model or folder with model.pt) of bundles lsdm and spade_gan.
        out: folder of the experiment.
        guidance: of "none", "mali", "lobu", "spic", "text", "all". None: "none", and each whose classifier is there.
        guided: name of the model that is guided. None: the last diffusion model with SPADE.
        scale: s of the tables and of the feature sweep; 1 in the text.
        seeds: 0, 1, ... of the noise.
        max_cases: take so many slices, evenly spread. None: all that show a nodule (770 in the text).
        baseline: the model that the others are compared with. None: the first.
        crop: side of a nodule crop in pixels; 64 in the text, at 512 x 512.
        inception: file of Inception weights.
        radimagenet: file of RadImageNet's ResNet-50.
        extractor: file of a classifier trained here.
        lpips: file of LPIPS's trunk.
        allow_unknown_weights: take weights with another hash too.
        sampler: of ``LSDMInferer``.
        num_steps: calls of the network for an image.
        sweep_cases: nodule slices of the sweeps; 0 leaves them out.
        sweep_scales: s of Fig 5.8.
        gradient_cases: nodule slices of the gradients; 0 leaves them out.
        gradient_times: timesteps of the gradients, as shares of the schedule.
        convergence_steps: training steps for each of the nine features; 0 leaves the check out.
        show_real: put real slices into the page.
        mlflow: tracking address. None: that of ``MLFLOW_TRACKING_URI``, if any.
        batch_size: images at once. None: 8, or 16 on a GPU.
        device: "cpu" or "cuda". None: a GPU where there is one.
    """

    dataset: str
    models: Sequence[tuple[str, str]]
    out: str
    guidance: Sequence[str] | None = None
    guided: str | None = None
    scale: float = 1.0
    seeds: int = 3
    max_cases: int | None = None
    baseline: str | None = None
    crop: int = 64
    inception: str | None = None
    radimagenet: str | None = None
    extractor: str | None = None
    lpips: str | None = None
    allow_unknown_weights: bool = False
    sampler: str = "dpm++"
    num_steps: int = 20
    sweep_cases: int = 2
    sweep_scales: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    gradient_cases: int = 16
    gradient_times: Sequence[float] = (0.05, 0.2, 0.5, 0.8)
    convergence_steps: int = 0
    show_real: bool = False
    mlflow: str | None = None
    batch_size: int | None = None
    device: str | None = None


def run_experiment(settings: Settings, *, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and write its results.

    ``OUT/experiment.json`` records what decides all images, ``OUT/samples`` has them by arm and seed with the hashes of
    the models, ``OUT/cache`` features and scores. So more seeds, models and guidances go into the same folder.
    ``results.json``, ``results.csv`` and ``report.html`` are written from what is done, also after an interrupt.

    Args:
        settings: what to compare.
        report: takes one line of progress each.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: something the user can mend; before anything is sampled.
    """
    from monai_synth.evaluate.tracking import tracking_uri
    from monai_synth.experiments import lsdm_source as source
    from monai_synth.experiments.lsdm_report import Comparison, write_results
    from monai_synth.experiments.lsdm_sampling import Loaded, Samples
    from monai_synth.experiments.lsdm_source import Arm

    device = chosen_device(settings.device)
    batch_size = chosen_batch_size(settings.batch_size, device, _BATCH_SIZE)
    _check(settings, batch_size)
    models = source.read_models(settings.models)
    guidance = _guidance(settings, models)
    arms, guided = source.chosen_arms(models, guidance, settings.guided, settings.scale)
    by_name = {arm.name: arm for arm in arms}
    baseline = by_name[chosen_baseline(by_name, settings.baseline)]
    cases = source.read_cases(settings.dataset, models, settings.max_cases)
    if settings.crop > min(models[0].image_size):
        size = min(models[0].image_size)
        raise UserError(f"crop is {settings.crop}, but images are {size} pixels wide; give at most {size} (--crop)")
    extractors, perceptual = _extractors(settings, device)
    uri = tracking_uri(settings.mlflow)
    guidable = [Arm(guided.name, guided, "all", guided.features)] if guided else []  # sweeps and gradients need them
    loaded = Loaded([*arms, *guidable], sampler=settings.sampler, num_steps=settings.num_steps, device=device)

    out = Path(settings.out).expanduser().absolute()
    require_own_folder(out, folders=_FOLDERS)
    with locked(out), terminated_as_interrupt():
        shared = {"dataset": cases.dataset.fingerprint, "sampler": settings.sampler, "num_steps": settings.num_steps}
        record_settings(out / "experiment.json", shared)
        samples = Samples(out / "samples", cases, loaded, batch_size=batch_size)
        total = len(arms) * settings.seeds * len(cases)
        report(
            f"{len(arms)} arms ({', '.join(arm.name for arm in arms)}) x {settings.seeds} seeds x {len(cases)} slices "
            f"= {total} images, {settings.sampler} with {settings.num_steps} steps, on {device}"
        )
        comparison = Comparison(
            settings=settings, out=out, cases=cases, arms=arms, baseline=baseline, guided=guided, samples=samples,
            extractors=extractors, perceptual=perceptual, device=device, tracking=uri,
        )  # fmt: skip
        try:
            for seed in range(settings.seeds):  # so that a stopped run can be compared
                for arm in arms:
                    samples.make(arm, [seed], cases.indices, report)
            if comparison.sweeps is not None:
                comparison.sweeps.make(report)
            if comparison.convergence is not None:
                comparison.convergence.run(report)
        finally:
            content = write_results(comparison, report)
        report(f"results: {out / 'results.json'}, {out / 'results.csv'}, {out / 'report.html'}")
    return content


def _check(settings: Settings, batch_size: int) -> None:
    check_numbers(batch_size=batch_size, num_steps=settings.num_steps)
    from monai_synth.experiments.lsdm_sampling import MOST_SEEDS

    if not 1 <= settings.seeds <= MOST_SEEDS:
        raise UserError(f"seeds is {settings.seeds}; allowed are 1 to {MOST_SEEDS} (--seeds)")
    for name, value, least in (
        ("sweep-cases", settings.sweep_cases, 0),
        ("gradient-cases", settings.gradient_cases, 0),
        ("convergence-steps", settings.convergence_steps, 0),
        ("crop", settings.crop, 11),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; allowed are whole numbers from {least} (--{name})")
    if not settings.sweep_scales or any(not np.isfinite(s) or s <= 0 for s in settings.sweep_scales):
        raise UserError(f"sweep scales {list(settings.sweep_scales)}; allowed are numbers above 0 (--sweep-scales)")
    if any(not 0 <= t < 1 for t in settings.gradient_times) or not settings.gradient_times:
        msg = f"gradient times {list(settings.gradient_times)}; allowed are shares of the schedule from 0 to below 1"
        raise UserError(f"{msg} (--gradient-times)")


def _guidance(settings: Settings, models: Sequence[Any]) -> tuple[str, ...]:
    """What was asked for, or all that the classifiers beside the guided model allow."""
    from monai_synth.experiments.lsdm_source import FEATURE_OF, chosen_arms

    if settings.guidance is not None:
        return tuple(settings.guidance)
    _, guided = chosen_arms(models, ("none",), settings.guided, 1.0)
    there = guided.features if guided else ()
    words = tuple(word for word, feature in FEATURE_OF.items() if feature in there)
    return ("none", *words, *(("all",) if len(words) == len(FEATURE_OF) else ()))


def _extractors(settings: Settings, device: str) -> tuple[list[Any], Any]:
    from monai_synth.evaluate.features import inception, trained_classifier
    from monai_synth.evaluate.perceptual import lpips_distance
    from monai_synth.evaluate.radimagenet import radimagenet

    options = {"device": device, "allow_unknown_weights": settings.allow_unknown_weights}
    found = []
    if settings.inception:
        found.append(inception(settings.inception, **options))
    if settings.radimagenet:
        found.append(radimagenet(settings.radimagenet, **options))
    if settings.extractor:
        found.append(trained_classifier(settings.extractor, device=device))
    return found, lpips_distance(settings.lpips, **options) if settings.lpips else None

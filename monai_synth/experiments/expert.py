# SPDX-License-Identifier: Apache-2.0
"""The experiment that asks an expert what generated images show (feature-aligned diffusion, Sec V-C and Tab I).

For every seed each model makes as many images of each class, all models from the same noise, and a trained classifier
says which class each image shows. The share it gets right is compared between the arms, such as a baseline and a model
whose training was aligned with an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from monai_synth.checks import check_numbers, chosen_device
from monai_synth.errors import UserError
from monai_synth.experiments.choices import chosen_baseline, chosen_batch_size
from monai_synth.experiments.nnunet_jobs import locked, terminated_as_interrupt
from monai_synth.experiments.record import record_settings, require_own_folder

_BATCH_SIZE = {"cpu": 64, "cuda": 256}
_FOLDERS = ("samples", "logits")


@dataclass(frozen=True)
class Settings:
    """What to compare.

    Attributes:
        expert: file of a trained classifier.
        real: prepared dataset that the models were trained on.
        models: (arm, files or folders with model.pt); several files are several trainings of the arm.
        out: folder of the experiment.
        second_expert: file of another classifier, best one that steered no training.
        seeds: seeds 0, 1, ...; the text has 15.
        per_class: images of each class for each seed; the text has 10.
        exclude: classes that are neither sampled nor answers of the expert; the text leaves out "empty".
        only: sample these classes only; the others stay answers of the expert. For DreamBooth: "tumor".
        mean_filter: redraw images that are too dark for their class, as the text's code does and the text does not say.
        sampler: of ``ClassInferer``.
        num_steps: calls of the network. None: 20, or all of the schedule for "ddpm".
        guidance_scale: 1 is none.
        baseline: the arm that others are compared with. None: the first.
        num_bootstrap: draws for the intervals.
        show_real: put real images into the page.
        batch_size: images at once. None: 64, or 256 on a GPU.
        device: "cpu" or "cuda". None: a GPU where there is one.
    """

    expert: str
    real: str
    models: Sequence[tuple[str, Sequence[str]]]
    out: str
    second_expert: str | None = None
    seeds: int = 15
    per_class: int = 10
    exclude: Sequence[str] = ()
    only: Sequence[str] = ()
    mean_filter: bool = False
    sampler: str = "dpm++"
    num_steps: int | None = None
    guidance_scale: float = 1.0
    baseline: str | None = None
    num_bootstrap: int = 2000
    show_real: bool = False
    batch_size: int | None = None
    device: str | None = None


def run_experiment(settings: Settings, *, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run an experiment, or what is left of it, and write its results.

    ``OUT/experiment.json`` records what decides the images, ``OUT/samples`` has them by model and seed with the hash
    of the model, ``OUT/logits`` what experts said. So more seeds, further arms and other experts go into the same
    folder.
    ``results.json``, ``results.csv`` and ``report.html`` are written from what is done, also after an interrupt.

    Args:
        settings: what to compare.
        report: takes one line of progress each.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: something the user can mend; before anything is sampled.
    """
    from monai_synth.experiments import expert_sampling as sampling
    from monai_synth.experiments import expert_source as source
    from monai_synth.experiments.expert_real import RealImages
    from monai_synth.experiments.expert_report import Comparison, write_results

    device = chosen_device(settings.device)
    batch_size = chosen_batch_size(settings.batch_size, device, _BATCH_SIZE)
    check_numbers(batch_size=batch_size, **({} if settings.num_steps is None else {"num_steps": settings.num_steps}))
    if settings.num_bootstrap < 1:
        raise UserError(f"bootstrap is {settings.num_bootstrap}; 1 or more is needed (--bootstrap)")
    arms = source.read_models(settings.models)
    baseline = chosen_baseline(arms, settings.baseline)
    models = [model for found in arms.values() for model in found]
    classes = dict(models[0].contract["classes"])
    left, sampled = source.chosen_classes(classes, settings.exclude, settings.only)
    judges = source.read_judges([settings.expert, settings.second_expert], models[0])
    dataset = source.read_real(settings.real, models[0], sampled)
    real = RealImages(dataset, models[0].contract)
    plan = sampling.Plan(
        sampled,
        len(classes),
        settings.per_class,
        sampler=settings.sampler,
        num_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        floors={} if settings.mean_filter else None,
    )
    sampling.check_plan(plan, settings.seeds)
    for model in models:
        sampling.make_inferer(model, plan)

    out = Path(settings.out).expanduser().absolute()
    require_own_folder(out, folders=_FOLDERS)
    if settings.mean_filter:
        means = real.class_means(sampled)
        plan = replace(plan, floors={name: mean - sampling.FILTER_REACH for name, mean in means.items()})
    with locked(out), terminated_as_interrupt():
        shared = {
            "classes": classes,
            "sampled": sampled,
            "per_class": plan.per_class,
            "sampler": plan.sampler,
            "num_steps": plan.num_steps,
            "guidance_scale": plan.guidance_scale,
            "mean_filter": settings.mean_filter,
            "dataset": dataset.fingerprint,
        }
        record_settings(out / "experiment.json", shared)
        for model in models:
            (out / "samples" / model.folder).mkdir(parents=True, exist_ok=True)
            record_settings(out / "samples" / model.folder / "model.json", {"sha256": model.sha256})
        report(
            f"{len(models)} models x {settings.seeds} seeds x {len(sampled)} classes x {plan.per_class} images = "
            f"{len(models) * settings.seeds * plan.per_seed} images, {plan.sampler}, on {device}"
        )
        comparison = Comparison(
            out=out,
            arms=arms,
            baseline=baseline,
            judges=judges,
            classes=classes,
            left=left,
            plan=plan,
            num_seeds=settings.seeds,
            real=real,
            num_bootstrap=settings.num_bootstrap,
            show_real=settings.show_real,
            device=device,
            settings=shared,
        )
        try:
            sampling.sample_all(models, settings.seeds, plan, out, batch_size=batch_size, device=device, report=report)
        finally:
            content = write_results(comparison, report)
        report(f"results: {out / 'results.json'}, {out / 'results.csv'}, {out / 'report.html'}")
    return content


def _require_own_folder(out: Path) -> None:
    """Refuse a folder that holds something else."""
    entries = [path.name for path in out.iterdir()] if out.is_dir() else []
    there = sorted(name for name in entries if name not in _FOLDERS and not name.startswith("."))
    if there and not (out / "experiment.json").is_file():
        raise UserError(f"--out {out} holds {there[0]!r} and no experiment; give a folder that is new or empty")

# SPDX-License-Identifier: Apache-2.0
"""The experiment that tells whether synthetic images help to classify: the 18 rows of the text's Table 2, and more.

Every row is trained once per seed and classifies the same real test images. Synthetic-only classifiers (rows 17, 18)
are trained first; rows with synthetic pretraining start from those of the same seed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monai_synth.checks import chosen_device
from monai_synth.data.workers import map_unordered, worker_count
from monai_synth.errors import UserError
from monai_synth.experiments.classifier_rows import Row, all_rows, chosen_rows
from monai_synth.experiments.nnunet_jobs import locked, terminated_as_interrupt
from monai_synth.experiments.record import record_settings, require_own_folder

# The text's values. The demo only shows that every part works.
_PAPER: dict[str, Any] = {
    "seeds": 5, "rows": None, "epochs": 20, "batch_size": 32, "lr": 1e-3, "momentum": 0.9, "lr_step": 7,
    "lr_gamma": 0.1, "backbone": "resnet18", "max_steps": None,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "demo": _PAPER | {"seeds": 1, "rows": ("1", "3"), "epochs": 8, "lr": 3e-3, "lr_step": 3, "max_steps": 30},
}
SELECT_ON = ("real", "synthetic")
GEO = ("paper", "seed-code")
_MOST_WORKERS = 16


@dataclass(frozen=True)
class Settings:
    """What to run; None takes the preset's value.

    Attributes:
        real: prepared dataset of classes.
        synthetic: folder that the sampling of a class-conditional bundle wrote.
        out: folder of the experiment.
        preset: of ``PRESETS``.
        seeds: repetitions with other initial weights, order, augmentation and subsets.
        rows: numbers of Table 2 or names of further rows; those that they start from come with them.
        fractions: percents of the real training images.
        mix: further rows, synthetic images in percent of the real ones.
        oversample: further rows whose rarer classes are filled up with synthetic images.
        control: further rows with as many steps on real images as synthetic pretraining takes.
        backbone: of `monai_synth.networks.image_classifier.BACKBONES`.
        weights: its ImageNet weights. None: training starts from scratch.
        epochs, batch_size, lr: of every training.
        image_size: (H, W) of all images. None: theirs.
        select_on: where synthetic only chooses its epoch: "real" validation images, as the text's code does, or a held
            out tenth of the "synthetic" ones.
        geo: "paper" or "seed-code", which also cuts out parts of real images at random.
        positive: class whose precision, recall and F1 are given. None: the last one where there are two.
        device: "cpu" or "cuda". None: a GPU where there is one.
        workers: processes. None: one per core, one beside a GPU.
        num_bootstrap: draws for the intervals.
        show_real: put real test images into the report.
    """

    real: str
    synthetic: str
    out: str
    preset: str = "paper"
    seeds: int | None = None
    rows: Sequence[str] | None = None
    fractions: Sequence[int] = (100, 10)
    mix: Sequence[int] = ()
    oversample: bool = False
    control: bool = False
    backbone: str | None = None
    weights: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    image_size: Sequence[int] | None = None
    select_on: str = "real"
    geo: str = "paper"
    positive: str | None = None
    device: str | None = None
    workers: int | None = None
    num_bootstrap: int = 2000
    show_real: bool = False


def run_experiment(settings: Settings, *, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Run an experiment, or what is left of it, and write its results.

    ``OUT/experiment.json`` records the settings, ``OUT/runs`` has a file per row and seed, ``OUT/classifiers`` the
    classifiers that others start from and the plain real ones; ``results.json``, ``results.csv`` and ``report.html``
    are written from what is done, also after an interrupt.

    Args:
        settings: what to run.
        report: takes one line of progress each.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: something the user can mend.
    """
    values = _checked(settings)
    rows = all_rows(settings.fractions, mix=settings.mix, oversample=settings.oversample, control=settings.control)
    names = values.pop("rows")
    if settings.rows is None and names is not None:  # a preset's rows leave out none that was asked for
        names = [*names, *(row.name for row in rows if row.mode not in ("real", "pretrain", "synthetic"))]
    rows = chosen_rows(rows, names)
    from monai_synth.experiments import classifier_sets as sets
    from monai_synth.experiments.classifier_report import write_results
    from monai_synth.experiments.classifier_train import Job

    source = sets.read_source(settings.real, settings.synthetic, settings.image_size)
    if values["select_on"] == "synthetic":
        sets.require_held_out(source.labels("synthetic"), source.classes)
    sets.require_synthetic(rows, {name: source.labels(name) for name in ("training", "synthetic")}, source.classes)
    positive = _positive(settings.positive, source.classes)
    values |= {
        "classes": source.classes,
        "image_channels": source.image_channels,
        "image_size": source.image_size,
        "fingerprints": source.fingerprints,
    }
    _require_network(values)
    num_seeds, workers, device = values.pop("seeds"), values.pop("workers"), values["device"]

    out = Path(settings.out).expanduser().absolute()
    require_own_folder(out, folders=("runs", "classifiers"))
    with locked(out), terminated_as_interrupt():
        record = {key: value for key, value in values.items() if key not in ("device", "weights")}
        record_settings(out / "experiment.json", record)
        with _packed(source, out, report) as images:
            keep = _kept(rows)
            # The order of training: synthetic only first, then what needs nothing, then what starts from others.
            jobs = [
                Job(row, seed, values, str(images), str(out), row in keep)
                for seed in range(num_seeds)
                for row in sorted(rows, key=lambda row: (row.start is not None, row.mode not in ("synthetic", "long")))
            ]
            text = "from published weights" if values["weights"] else "from scratch (no --weights)"
            report(
                f"{len(rows)} rows x {num_seeds} seeds = {len(jobs)} trainings of {values['backbone']} {text}, "
                f"{workers} at a time on {device}"
            )
            try:
                _run_all(jobs, source, workers, report)
            finally:
                content = write_results(
                    out,
                    rows,
                    source,
                    num_seeds=num_seeds,
                    positive=positive,
                    record=record | {"weights": values["weights"] is not None, "device": device},
                    num_bootstrap=settings.num_bootstrap,
                    show_real=settings.show_real,
                )
        report(f"results: {out / 'results.json'}, {out / 'results.csv'}, {out / 'report.html'}")
    return content


def _run_all(jobs: Sequence[Any], source: Any, workers: int, report: Callable[[str], None]) -> None:
    """Train what is not done, first what starts from nothing."""
    from monai_synth.experiments.classifier_sets import training_parts
    from monai_synth.experiments.classifier_train import classifier_path, run_job

    labels = {name: source.labels(name) for name in ("training", "synthetic")}

    def cost(job: Any) -> float:
        """Images that are trained on, in all epochs."""
        if job.row.mode == "long":
            images = len(labels["synthetic"])
        else:
            images = sum(map(len, training_parts(job.row, labels, job.seed, hold_out=False).values()))
        steps = job.values["max_steps"]
        return job.values["epochs"] * min(images, steps * job.values["batch_size"] if steps else images)

    def done(job: Any) -> bool:
        return job.marker.is_file() and (not job.keep or classifier_path(job.out, job.row, job.seed).is_file())

    waiting = [job for job in jobs if not done(job)]
    if len(waiting) < len(jobs):
        report(f"{len(jobs) - len(waiting)} of {len(jobs)} trainings are done already")
    left = {job.name: cost(job) for job in waiting}
    begin, total, number = time.monotonic(), sum(left.values()), len(jobs) - len(waiting)
    for phase in (False, True):
        now = [job for job in waiting if (job.row.start is not None) == phase]
        # Long ones first, so that no process is left with one at the end.
        now.sort(key=lambda job: (job.row.mode not in ("synthetic", "long"), -left[job.name]))
        for content in map_unordered(run_job, now, workers):
            if content is None:
                continue
            number += 1
            left.pop(f"{content['row']}_seed{content['seed']}")
            rest = sum(left.values())
            seconds = (time.monotonic() - begin) * rest / (total - rest)
            right = sum(
                max(range(len(p)), key=p.__getitem__) == k
                for p, k in zip(content["test"], content["test_labels"], strict=True)
            )
            accuracy = right / len(content["test_labels"])
            val = content["curves"]["val_accuracy"][content["best_epoch"] - 1]
            report(
                f"[{number}/{len(jobs)}] row {content['row']} seed {content['seed']}: validation {val:.3f} (epoch "
                f"{content['best_epoch']}), test {accuracy:.3f}, {content['seconds']:.0f} s{_left(seconds)}"
            )


def _left(seconds: float) -> str:
    if seconds < 1:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def _kept(rows: Sequence[Row]) -> set[Row]:
    """Rows whose classifiers are kept: those that others start from, and the plain ones of all real images."""
    most = max((row.fraction for row in rows), default=0)
    plain = {row for row in rows if row.mode == "real" and row.fraction == most and not row.weighted}
    return plain | {row for row in rows if row.mode in ("synthetic", "long")}


def _checked(settings: Settings) -> dict[str, Any]:
    """Every value that the preset or the machine decides."""
    if settings.preset not in PRESETS:
        raise UserError(f"preset {settings.preset!r}; allowed are {', '.join(PRESETS)}")
    for name, allowed in (("select_on", SELECT_ON), ("geo", GEO)):
        if getattr(settings, name) not in allowed:
            raise UserError(f"{name} is {getattr(settings, name)!r}; allowed are {', '.join(allowed)}")
    values = dict(PRESETS[settings.preset])
    values |= {key: value for key, value in asdict(settings).items() if key in values and value is not None}
    for key, least in (("epochs", 1), ("batch_size", 2), ("seeds", 1)):
        if values[key] < least:
            raise UserError(f"{key} is {values[key]}; {least} or more is needed (--{key.replace('_', '-')})")
    if not values["lr"] > 0:
        raise UserError(f"lr is {values['lr']}; more than 0 is needed (--lr)")
    if settings.num_bootstrap < 1:
        raise UserError(f"bootstrap is {settings.num_bootstrap}; 1 or more is needed (--bootstrap)")
    for key, most in (("fractions", 100), ("mix", 10_000)):
        given = list(getattr(settings, key))
        if len(set(given)) != len(given) or any(not 1 <= percent <= most for percent in given):
            raise UserError(f"{key} are {given}; give different whole percents from 1 to {most} (--{key})")
    if not settings.fractions:
        raise UserError("no fraction of the real images is given; give one or more, such as --fractions 100 10")
    values |= {"select_on": settings.select_on, "geo": settings.geo, "weights": None, "weights_sha256": None}
    if settings.weights is not None:
        from monai_synth.checkpoint import sha256_of

        path = Path(settings.weights).expanduser().absolute()
        values["weights"] = str(path)
        values["weights_sha256"] = sha256_of(path) if path.is_file() else None  # `_require_network` tells what is wrong
    values["device"] = chosen_device(settings.device)
    if settings.workers is None:
        values["workers"] = 1 if values["device"] == "cuda" else min(_MOST_WORKERS, os.cpu_count() or 1)
    else:
        values["workers"] = worker_count(settings.workers)
    return values


def _positive(name: str | None, classes: dict[str, int]) -> int | None:
    if name is None:
        return len(classes) - 1 if len(classes) == 2 else None
    if name not in classes:
        raise UserError(f"there is no class {name!r}; allowed are {', '.join(classes)} (--positive)")
    return classes[name]


def _require_network(values: dict[str, Any]) -> None:
    """Refuse a backbone or weights that could not train on these images, before anything is trained."""
    import torch

    from monai_synth.experiments.classifier_train import initial_network

    with torch.random.fork_rng(devices=[]):
        network = initial_network(values, 0, [0.5], [0.25]).train()
        size = tuple(values["image_size"])
        try:
            with torch.no_grad():
                network(torch.zeros(2, values["image_channels"], *size))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            msg = f"images of {size[0]}x{size[1]} do not go through {values['backbone']} ({reason}); "
            raise UserError(msg + "give a larger --image-size such as 64 64, or another --backbone") from error


@contextmanager
def _packed(source: Any, out: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """The packed images, which hold real ones and are removed in the end."""
    from monai_synth.experiments.classifier_sets import pack

    folder = out / "images.part"
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    folder.mkdir()
    try:
        pack(source, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

# SPDX-License-Identifier: Apache-2.0
"""A sweep over the weights of feature alignment: trainings of each setting, then what an expert says of their samples.

The text leaves the study of w1 and w2 to later work (feature-aligned diffusion, Sec VI). Trainings are those of the
bundle's own command, so what is compared is what users get.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from monai_synth.atomic import write_bytes
from monai_synth.checks import whole
from monai_synth.errors import UserError
from monai_synth.experiments.nnunet_jobs import locked, terminated_as_interrupt
from monai_synth.experiments.record import record_settings, require_own_folder

BASELINE = "baseline"
ALIGN_ON = ("noisy", "clean")
_ERROR = "monai_synth: error: "
_OWN = ("w1", "w2", "align_on", "seed", "expert", "dataset_dir", "ckpt_dir", "output_dir", "latest_dir", "model_file")


@dataclass(frozen=True)
class Settings:
    """What to train and compare.

    Attributes:
        real: prepared dataset of classes.
        expert: file of a trained classifier, which steers every training but the baseline's, and judges.
        out: folder of the experiment.
        second_expert: file of another classifier, which only judges.
        bundle: folder of the bundle that is trained.
        w1: weights of the denoising loss.
        w2: weights of the alignment; 0, the baseline, always comes with them.
        align_on: what the expert sees in training, "noisy" images, "clean" ones, or both in turn.
        trainings: of each setting, with the seeds 0, 1, ...
        options: further keys of the bundle as "key=value", e.g. "preset=demo".
        seeds: of sampling, see the expert experiment.
        per_class: images of each class for each seed.
        exclude: classes left out.
        num_steps: calls of the network. None: 20.
        num_bootstrap: draws for the intervals.
        show_real: put real images into the page.
        device: "cpu" or "cuda". None: a GPU where there is one.
    """

    real: str
    expert: str
    out: str
    second_expert: str | None = None
    bundle: str = "bundles/fad"
    w1: Sequence[float] = (1.0,)
    w2: Sequence[float] = (0.5, 1.0, 2.0)
    align_on: Sequence[str] = ("noisy",)
    trainings: int = 1
    options: Sequence[str] = ()
    seeds: int = 5
    per_class: int = 10
    exclude: Sequence[str] = ()
    num_steps: int | None = None
    num_bootstrap: int = 2000
    show_real: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Arm:
    """One setting.

    Attributes:
        name: of its models.
        w1: weight of the denoising loss.
        w2: weight of the alignment, 0 is none.
        align_on: "noisy", "clean", or "" for the baseline.
    """

    name: str
    w1: float
    w2: float
    align_on: str

    @property
    def keys(self) -> dict[str, str]:
        """What its training is told besides."""
        return {"w1": str(self.w1), "w2": str(self.w2), "align_on": self.align_on} if self.align_on else {}


def run_experiment(settings: Settings, *, report: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Train what is not trained, sample and judge.

    ``OUT/models`` has the trained files and the logs of their trainings, ``OUT/compared`` what the expert experiment
    writes of them, ``OUT/sweep.csv`` and ``OUT/sweep.png`` accuracy and similarity by weight. The same command goes on
    with one that was stopped.

    Args:
        settings: what to do.
        report: takes one line of progress each.

    Returns:
        The lines of ``sweep.csv``.

    Raises:
        UserError: something the user can mend.
    """
    from monai_synth.checkpoint import sha256_of
    from monai_synth.data.datalist import read_dataset
    from monai_synth.experiments import expert

    arms, options = _arms(settings), _options(settings.options)
    whole("trainings", settings.trainings)
    configs = Path(settings.bundle).expanduser().absolute() / "configs"
    for name in ("train.json", "baseline.json"):
        if not (configs / name).is_file():
            raise UserError(f"there is no {configs / name}; give the folder of the bundle fad (--bundle bundles/fad)")
    if not Path(settings.expert).is_file():
        msg = f"there is no expert {settings.expert}; train one with {configs / 'train_expert.json'} and give its file"
        raise UserError(f"{msg} (--expert)")
    dataset = read_dataset(settings.real, task="classes")
    out = Path(settings.out).expanduser().absolute()
    require_own_folder(out, record="alignment.json")
    with locked(out), terminated_as_interrupt():
        shared = {"expert": sha256_of(settings.expert), "dataset": dataset.fingerprint, "options": options}
        record_settings(out / "alignment.json", shared)
        jobs = [(arm, t) for t in range(settings.trainings) for arm in arms]
        models = {arm.name: [out / "models" / f"{arm.name}_{t}.pt" for t in range(settings.trainings)] for arm in arms}
        for number, (arm, t) in enumerate(jobs, 1):
            path, what = models[arm.name][t], f"[{number}/{len(jobs)}] {arm.name}, training {t + 1}"
            if path.is_file():
                report(f"{what}: done already")
                continue
            begin = time.monotonic()
            report(f"{what}: its log is {path.with_suffix('.log')}")
            values = {**options, **arm.keys} | ({"expert": str(Path(settings.expert).absolute())} if arm.keys else {})
            values |= {"dataset_dir": str(dataset.root), "seed": str(t), "model_file": path.name}
            values |= {"ckpt_dir": str(path.parent), "output_dir": str(out / "training" / path.stem)}
            values |= {"latest_dir": str(out)} | ({"device": settings.device} if settings.device else {})
            _train([configs / "train.json"] + ([] if arm.keys else [configs / "baseline.json"]), values, path)
            report(f"{what}: {time.monotonic() - begin:.0f} s")
        content = expert.run_experiment(
            expert.Settings(
                expert=settings.expert,
                real=settings.real,
                models=[(name, [str(path) for path in paths]) for name, paths in models.items()],
                out=str(out / "compared"),
                second_expert=settings.second_expert,
                seeds=settings.seeds,
                per_class=settings.per_class,
                exclude=settings.exclude,
                num_steps=settings.num_steps,
                num_bootstrap=settings.num_bootstrap,
                show_real=settings.show_real,
                device=settings.device,
                baseline=BASELINE,
            ),
            report=report,
        )
        lines = sweep_lines(arms, content)
        _write(out, lines)
        report(f"sweep: {out / 'sweep.csv'}, {out / 'sweep.png'}")
    return lines


def _arms(settings: Settings) -> list[Arm]:
    """The baseline and every combination."""
    for name in ("w1", "w2"):
        given = list(getattr(settings, name))
        if len(set(given)) < len(given) or not given or not all(0 <= value < 1e9 for value in given):
            raise UserError(f"{name} are {given}; give different numbers from 0, such as --{name} 0.5 1 2")
    unknown = [word for word in settings.align_on if word not in ALIGN_ON]
    if unknown or not settings.align_on or len(set(settings.align_on)) < len(settings.align_on):
        raise UserError(f"align_on is {' '.join(settings.align_on)!r}; allowed are {', '.join(ALIGN_ON)}, each once")
    arms = [Arm(BASELINE, 1.0, 0.0, "")]
    for on, w1, w2 in product(settings.align_on, settings.w1, settings.w2):
        if w2:
            name = f"{on}_w1_{w1:g}_w2_{w2:g}".replace(".", "p").replace("+", "")
            arms.append(Arm(name, float(w1), float(w2), on))
    return arms


def _options(given: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"the option {text!r} is not KEY=VALUE; give one such as --set preset=demo")
        if key in _OWN:
            raise UserError(f"the option {key!r} is this experiment's own; drop it from --set")
        options[key] = value
    return options


def _train(configs: Sequence[Path], values: Mapping[str, str], path: Path) -> None:
    """One training by the bundle's runner.

    Raises:
        UserError: it failed; with its own message where it has one.
    """
    files = "[" + ",".join(f"'{config}'" for config in configs) + "]"
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", files]
    command += [part for key, value in values.items() for part in (f"--{key}", value)]
    log = path.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code or not path.is_file():
        told = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if _ERROR in line]
        reason = told[-1].partition(_ERROR)[2] if told else f"exit status {code}"
        raise UserError(f"the training of {path.name} failed: {reason} (log: {log}); mend it and run the command again")


def sweep_lines(arms: Sequence[Arm], content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each arm and expert: weights, accuracy, its difference to the baseline, and similarity.

    Args:
        arms: the settings.
        content: of the expert experiment's ``results.json``.
    """
    lines = []
    for judge, arm in product(content["experts"], arms):
        found = judge["arms"].get(arm.name)
        if found is None:
            continue
        line: dict[str, Any] = {"expert": judge["name"], "arm": arm.name, "w1": arm.w1, "w2": arm.w2}
        line |= {"align_on": arm.align_on, **_number("accuracy", found["accuracy"])}
        less = found["difference"]
        line |= _number("accuracy_difference", None if less is None else less["accuracy"])
        line |= _number("ssim", content["similarity"][arm.name]["mean"])
        lines.append(line)
    return lines


def _number(name: str, number: Mapping[str, Any] | None) -> dict[str, Any]:
    if number is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    # over trainings too, where there are several: seeds of one training share its luck
    low, high = number.get("ci_trainings") or number["ci"] or (None, None)
    return {name: number["value"], f"{name}_low": low, f"{name}_high": high}


def _write(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_bytes(out / "sweep.csv", buffer.getvalue().encode())
    write_bytes(out / "sweep.png", sweep_png(lines))


def sweep_png(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Accuracy and similarity against w2, a line for each expert, w1 and what the expert saw."""
    from monai_synth.figures import new_figure, png

    figure = new_figure(9.5, 3.4)
    accuracy, ssim = figure.subplots(1, 2)
    kinds = {(line["expert"], line["w1"], line["align_on"]): None for line in lines if line["align_on"]}
    for kind in kinds:
        judge, w1, on = kind
        own = [line for line in lines if (line["expert"], line["w1"], line["align_on"]) == kind]
        own = sorted([line for line in lines if line["expert"] == judge and not line["align_on"]] + own, key=_w2)
        for axes, key in ((accuracy, "accuracy"), (ssim, "ssim")):
            if key == "ssim" and judge != lines[0]["expert"]:
                continue  # the same for every expert
            values = [line[key] for line in own]
            ends = [[line[f"{key}_low"], line[f"{key}_high"]] for line in own]
            error = [
                [abs((e[i] if e[i] is not None else v) - v) for v, e in zip(values, ends, strict=True)] for i in (0, 1)
            ]
            label = f"w1 {w1:g}, {on}" + (f", {judge}" if key == "accuracy" else "")
            axes.errorbar([_w2(line) for line in own], values, yerr=error, marker="o", capsize=3, label=label)
    for axes, text in ((accuracy, "called the class asked for"), (ssim, "SSIM of pairs (lower: more varied)")):
        axes.set_xlabel("w2 (0: baseline)", fontsize=9)
        axes.set_title(text, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if kinds:
            axes.legend(fontsize=7)
    return png(figure, dpi=100)


def _w2(line: Mapping[str, Any]) -> float:
    return float(line["w2"])

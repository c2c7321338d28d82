# SPDX-License-Identifier: Apache-2.0
"""The experiment that tells whether synthetic pairs help to segment: nnU-Net on real, synthetic and both.

Protocol of the text's Tables 5.1 to 5.6 [J-20 to J-25]: the real set plans for all sets; real only is trained in folds;
synthetic only once per ratio; pretrain continues each of those on the real folds from all its weights; mix trains on
the real fold and the synthetic subset together. Since pretrain takes more steps than real only, control (not in the
text) continues real only by as many. Every network segments the same test images, scored at their native size.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from monai_synth.atomic import write_json
from monai_synth.checks import chosen_device
from monai_synth.errors import UserError
from monai_synth.experiments import nnunet_sets as sets
from monai_synth.experiments.nnunet_jobs import Markers, Outcome, Task, locked, run_tasks
from monai_synth.experiments.nnunet_report import Row, write_results
from monai_synth.experiments.nnunet_steps import PLANS, TRAINER
from monai_synth.experiments.record import record_settings
from monai_synth.export.subsets import subset_size, write_subset

MODES = ("synthetic-only", "pretrain", "control", "mix")
MAX_RATIOS = 20
COMPILE_FROM = 10_000  # steps; below it torch.compile costs more than it brings

# The text's values; nuclei differ by their length and rate. The demo only shows that every part works.
_PAPER = {
    "epochs": 400, "iterations": 250, "val_iterations": 50, "lr": 1e-2, "finetune_epochs": 150, "finetune_lr": 1e-2,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "paper-nuclei": _PAPER | {"epochs": 1000, "finetune_epochs": 100, "finetune_lr": 5e-6},
    "demo": {
        "epochs": 2, "iterations": 10, "val_iterations": 2, "lr": 1e-2, "finetune_epochs": 2, "finetune_lr": 1e-2,
        "batch_size": 4, "num_features": 8, "patch_edge": {2: 64, 3: 32}, "fold_list": (0,), "num_processes": 1,
        "disable_tta": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What to run; None takes the preset's value, or nnU-Net's own where the preset has none.

    Attributes:
        real: prepared dataset of pairs.
        synthetic: nnU-Net raw dataset, or a folder that holds just one.
        out: folder of the experiment.
        ratios: percents of the number of real training cases.
        modes: of ``MODES``; real only is always run, control brings pretrain, and pretrain synthetic-only.
        tests: further test sets, prepared datasets by name.
        preset: of ``PRESETS``.
        folds: folds of the real set.
        fold_list: those that are run. Default: all.
        num_seeds: repetitions with other initial weights and another order of data. A seed gives the same network
            again where one process loads the data; nnU-Net's own loading processes draw as they like.
        image_size: (*S) of all images that nnU-Net sees; () keeps real images as they are. None: that of the
            synthetic set.
        epochs, iterations, val_iterations, lr: of every training from scratch.
        finetune_epochs, finetune_lr: of pretrain's second part.
        batch_size, patch_size, num_features: instead of those in the real set's plans.
        device: "cpu" or "cuda". None: a GPU where there is one.
        num_gpus: jobs at a time, one per GPU.
        num_processes: of nnU-Net's preprocessing and data loading, per job. None: 2, and more beside a GPU.
        disable_tta: predict without mirrored images.
        show_real: put real test images into the report.
        dataset_id: of the real set; synthetic sets are 10, mixed ones 30 higher and more.
        num_bootstrap: draws for the intervals.
    """

    real: str
    synthetic: str
    out: str
    ratios: Sequence[int] = (100, 250, 500, 1000)
    modes: Sequence[str] = ("synthetic-only", "pretrain")
    tests: Mapping[str, str] = field(default_factory=dict)
    preset: str = "paper"
    folds: int = 5
    fold_list: Sequence[int] | None = None
    num_seeds: int = 1
    image_size: Sequence[int] | None = None
    epochs: int | None = None
    iterations: int | None = None
    val_iterations: int | None = None
    lr: float | None = None
    finetune_epochs: int | None = None
    finetune_lr: float | None = None
    batch_size: int | None = None
    patch_size: Sequence[int] | None = None
    num_features: int | None = None
    device: str | None = None
    num_gpus: int | None = None
    num_processes: int | None = None
    disable_tta: bool | None = None
    show_real: bool = False
    dataset_id: int = 501
    num_bootstrap: int = 2000


@dataclass(frozen=True)
class _Data:
    """The sets of an experiment, written."""

    real: Path
    num_real: int
    tests: tuple[sets.TestSet, ...]
    labels: dict[str, int]
    configuration: str


def run_experiment(settings: Settings, *, report: Callable[[str], None] = print) -> Outcome:
    """Run an experiment, or what is left of it, and write its results.

    ``OUT/experiment.json`` records the settings, ``OUT/logs`` has a log per job, and ``results.json``, ``results.csv``
    and ``report.html`` are written from what is done, also when a job failed.

    Args:
        settings: what to run.
        report: takes one line of progress each.

    Returns:
        What failed and what was skipped for it.

    Raises:
        UserError: something the user can mend, found before anything is trained.
    """
    settings, values = _checked(settings)
    _require_nnunet()
    pool = sets.read_pool(settings.synthetic)
    real = sets.read_real(settings.real)
    tests = {real.name: real} | {name: sets.read_real(path) for name, path in settings.tests.items()}
    if len(tests) != len(settings.tests) + 1:
        raise UserError(f"a further test set is called {real.name!r} like the real set; give it another name (--test)")
    for name, dataset in tests.items():
        sets.require_alike("real" if dataset is real else f"test ({name})", dataset, pool)
    cases = {name: sets.test_cases(dataset, all_if_empty=dataset is not real) for name, dataset in tests.items()}
    num_real = len(sets.training_cases(real))
    sizes = {ratio: subset_size(ratio, num_real) for ratio in settings.ratios}
    _require_pool(pool, sizes, num_real)
    size = pool.image_size if settings.image_size is None else tuple(settings.image_size) or None
    if size is not None and len(size) != len(pool.image_size):
        raise UserError(f"image size {list(size)} for images of {len(pool.image_size)} axes; give one length per axis")
    values |= _plan_values(values, len(pool.image_size))

    out = Path(settings.out).expanduser().absolute()
    with locked(out):
        raw, preprocessed = out / "nnunet" / "raw", out / "nnunet" / "preprocessed"
        for folder in (raw, preprocessed):
            folder.mkdir(parents=True, exist_ok=True)
        if any(name in os.environ for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")):
            report(f"nnU-Net's folders of this experiment are in {out / 'nnunet'}; those of your variables stay as is")
        ids = _dataset_ids(settings)
        sets.refuse_taken_ids((raw, preprocessed), {number: name for name, number in ids.items()})
        record = {
            "real": real.fingerprint,
            "tests": {name: dataset.fingerprint for name, dataset in tests.items()},
            "synthetic": sets.pool_fingerprint(pool),
            "ratios": list(settings.ratios),
            "folds": settings.folds,
            "image_size": None if size is None else list(size),
            "dataset_id": settings.dataset_id,
            **{key: value for key, value in values.items() if key not in _FREE},
        }
        record_settings(out / "experiment.json", record)

        folder, case_ids, patients = sets.write_real(real, raw, dataset_id=ids["Real"], image_size=size)
        folds = sets.grouped_folds(case_ids, patients, num_folds=settings.folds, seed=0)
        _write_folds(preprocessed, folder.name, folds)
        places = {name: out / "nnunet" / "tests" / name for name in tests} | {real.name: folder / "imagesTs"}
        written = tuple(sets.write_test(name, tests[name], cases[name], places[name], size) for name in tests)
        for ratio, num in sizes.items():
            name = f"Synthetic{ratio}"
            part = write_subset(pool.folder, raw, dataset_id=ids[name], name=name, num_cases=num)
            if "mix" in settings.modes:
                mixed, new = sets.write_mix(folder, part, raw, dataset_id=ids[f"Mix{ratio}"], name=f"Mix{ratio}")
                _write_folds(preprocessed, mixed.name, sets.mixed_folds(folds, new))

        data = _Data(folder, num_real, written, real.labels, "2d" if len(pool.image_size) == 2 else "3d_fullres")
        tasks, rows = _tasks(settings, values, ids, data, out)
        outcome = run_tasks(tasks, out, slots=_slots(values), report=report)
        write_results(
            out,
            rows,
            data.tests,
            Markers(out / "jobs"),
            labels=real.labels,
            record=record | {"num_real": num_real, "sizes": sizes},
            num_bootstrap=settings.num_bootstrap,
            show_real=settings.show_real,
            outcome=outcome,
        )
        report(f"results: {out / 'results.json'}, {out / 'results.csv'}, {out / 'report.html'}")
    return outcome


_FREE = ("device", "num_gpus", "num_processes", "fold_list", "patch_edge")  # may differ when it is resumed


def _checked(settings: Settings) -> tuple[Settings, dict[str, Any]]:
    """The settings with their modes in order, and every value that the preset or the machine decides."""
    unknown = [mode for mode in settings.modes if mode not in MODES]
    if unknown or not settings.modes:
        raise UserError(f"unknown mode {', '.join(unknown)!r}; allowed are {', '.join(MODES)} (real only always runs)")
    if settings.preset not in PRESETS:
        raise UserError(f"preset {settings.preset!r}; allowed are {', '.join(PRESETS)}")
    if not settings.ratios or len(set(settings.ratios)) != len(settings.ratios) or len(settings.ratios) > MAX_RATIOS:
        raise UserError(f"ratios are {list(settings.ratios)}; give 1 to {MAX_RATIOS} different whole percents")
    chosen = set(settings.modes) | ({"pretrain"} if "control" in settings.modes else set())
    chosen |= {"synthetic-only"} if "pretrain" in chosen else set()
    modes = tuple(mode for mode in MODES if mode in chosen)
    values: dict[str, Any] = {"batch_size": None, "patch_size": None, "num_features": None, "disable_tta": False}
    values |= {"num_processes": None, "num_gpus": 1, "fold_list": None, "device": None} | PRESETS[settings.preset]
    given = {key: value for key, value in asdict(settings).items() if key in values and value is not None}
    values |= given
    values["fold_list"] = tuple(values["fold_list"] if values["fold_list"] is not None else range(settings.folds))
    values |= _device(values["device"], values["num_gpus"])
    if values["num_processes"] is None:
        share = (os.cpu_count() or 1) // max(1, values["num_gpus"])
        values["num_processes"] = 2 if values["device"] == "cpu" else max(2, min(8, share))
    for key in ("epochs", "iterations", "val_iterations", "finetune_epochs", "num_gpus", "num_processes"):
        if values[key] < 1:
            raise UserError(f"{key} is {values[key]}; 1 or more is needed (--{key.replace('_', '-')})")
    for key in ("lr", "finetune_lr"):
        if not values[key] > 0:
            raise UserError(f"{key} is {values[key]}; more than 0 is needed (--{key.replace('_', '-')})")
    for key in ("batch_size", "num_features"):
        if values[key] is not None and values[key] < 1:
            raise UserError(f"{key} is {values[key]}; 1 or more is needed (--{key.replace('_', '-')})")
    if settings.num_seeds < 1 or settings.num_bootstrap < 1:
        raise UserError(f"seeds are {settings.num_seeds}, bootstrap {settings.num_bootstrap}; each takes 1 or more")
    wrong = [fold for fold in values["fold_list"] if not 0 <= fold < settings.folds]
    if wrong or not values["fold_list"]:
        msg = f"fold list {list(values['fold_list'])} of {settings.folds} folds; allowed are 0 to {settings.folds - 1}"
        raise UserError(msg)
    return Settings(**{**asdict(settings), "modes": modes}), values


def _device(device: str | None, num_gpus: int) -> dict[str, Any]:
    import torch

    device = chosen_device(device)
    count = torch.cuda.device_count() if device == "cuda" else 0
    if num_gpus > max(count, 1):
        raise UserError(f"{num_gpus} GPUs asked for, {count} here for device {device}; give fewer (--num-gpus)")
    return {"device": device}


def _require_nnunet() -> None:
    """Refuse to start where a training could not."""
    if importlib.util.find_spec("nnunetv2") is None:
        raise UserError("nnU-Net is not installed; install it with the extra: pip install 'monai_synth[nnunet]'")
    try:
        import torchvision  # noqa: F401  (nnU-Net's networks import it)
    except (ImportError, RuntimeError) as error:
        msg = (
            f"torchvision does not fit PyTorch here ({error}), and nnU-Net's training needs it; install both from the "
            "same source (the CPU builds of some versions clash: take the ordinary build, which runs on the CPU too)"
        )
        raise UserError(msg) from error


def _require_pool(pool: sets.Pool, sizes: Mapping[int, int], num_real: int) -> None:
    ratio, needed = max(sizes.items(), key=lambda item: item[1])
    if needed > len(pool.case_ids):
        msg = (
            f"{ratio} % of {num_real} real training cases are {needed}, and {pool.folder} holds {len(pool.case_ids)}; "
            f"sample more (--num_samples {needed} of the bundle's inference), or leave out the larger ratios"
        )
        raise UserError(msg)


def _plan_values(values: Mapping[str, Any], num_dims: int) -> dict[str, Any]:
    """The patch size of a preset is given by its edge."""
    patch = values["patch_size"]
    if patch is None and "patch_edge" in values:
        patch = (values["patch_edge"][num_dims],) * num_dims
    if patch is not None and (len(patch) != num_dims or min(patch) < 8):
        raise UserError(f"patch size {list(patch)}; give {num_dims} lengths of 8 or more (--patch-size)")
    return {"patch_size": None if patch is None else list(patch)}


def _dataset_ids(settings: Settings) -> dict[str, int]:
    """nnU-Net's number of each set, by its name."""
    base = settings.dataset_id
    ids = {"Real": base}
    ids |= {f"Synthetic{ratio}": base + 10 + k for k, ratio in enumerate(settings.ratios)}
    return ids | {f"Mix{ratio}": base + 30 + k for k, ratio in enumerate(settings.ratios)}


def _write_folds(preprocessed: Path, name: str, folds: Sequence[Mapping[str, Sequence[str]]]) -> None:
    (preprocessed / name).mkdir(exist_ok=True)
    write_json(preprocessed / name / "splits_final.json", folds)


def _slots(values: Mapping[str, Any]) -> list[dict[str, str]]:
    if values["device"] == "cpu" or values["num_gpus"] == 1:
        return [{}]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(k) for k in range(values["num_gpus"])]
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names[: values["num_gpus"]]]


def _tasks(
    settings: Settings, values: Mapping[str, Any], ids: Mapping[str, int], data: _Data, out: Path
) -> tuple[list[Task], list[Row]]:
    """All processes in an order in which each comes after those that it needs, and the rows of the tables."""
    moved = f"{PLANS}_from{settings.dataset_id}"
    common = {
        "nnUNet_raw": str(out / "nnunet" / "raw"),
        "nnUNet_preprocessed": str(out / "nnunet" / "preprocessed"),
        "nnUNet_results": str(out / "nnunet" / "results"),
        "nnUNet_extTrainer": str(Path(__file__).parent / "nnunet_trainer"),
        "nnUNet_def_n_proc": str(values["num_processes"]),
        "nnUNet_n_proc_DA": str(max(1, values["num_processes"])),
        "nnUNet_compile": "f",
    }
    overrides = {key: values[key] for key in ("batch_size", "patch_size", "num_features")}
    plan = {"dataset_id": ids["Real"], "configuration": data.configuration, "overrides": overrides}
    tasks = [Task("plan", "prepare", ({"name": "plan", "kind": "plan", "args": plan},), environment=common)]
    for name, number in ids.items():
        kind = name.rstrip("0123456789")
        if kind == "Synthetic" or (kind == "Mix" and "mix" in settings.modes):
            args = {
                "dataset_id": number, "source_id": ids["Real"], "plans": moved, "configuration": data.configuration,
            }  # fmt: skip
            step = {"name": f"prepare_{name}", "kind": "preprocess", "args": args}
            tasks.append(Task(step["name"], "prepare", (step,), ("plan",), common))

    rows: dict[tuple[str, int | None], list[str]] = {}
    checkpoints: dict[str, str] = {}

    def add(mode: str, ratio: int | None, seed: int, fold: int | str, weights_of: str | None = None) -> str:
        """One network: its training and its predictions in one process. Returns the task's name."""
        set_name = {"synthetic-only": f"Synthetic{ratio}", "mix": f"Mix{ratio}"}.get(mode, "Real")
        plans = PLANS if set_name == "Real" else moved
        name = f"seed{seed}_{mode}{'' if ratio is None else ratio}" + ("" if fold == "all" else f"_fold{fold}")
        tuned = mode in ("pretrain", "control")
        length = values["finetune_epochs"] if tuned else values["epochs"]
        steps_in_all = length * values["iterations"]
        environment = common | {
            "nnUNet_results": str(out / "nnunet" / "results" / name),
            "MONAI_SYNTH_EPOCHS": str(length),
            "MONAI_SYNTH_ITERATIONS": str(values["iterations"]),
            "MONAI_SYNTH_VAL_ITERATIONS": str(values["val_iterations"]),
            "MONAI_SYNTH_LR": str(values["finetune_lr"] if tuned else values["lr"]),
            "MONAI_SYNTH_SEED": str(seed),
            "MONAI_SYNTH_WEIGHTS": "" if weights_of is None else checkpoints[weights_of],
            "nnUNet_n_proc_DA": str(0 if values["num_processes"] == 1 else values["num_processes"]),
            "nnUNet_compile": "t" if values["device"] == "cuda" and steps_in_all >= COMPILE_FROM else "f",
        }
        needs = ["plan" if set_name == "Real" else f"prepare_{set_name}"]
        if weights_of is not None:
            needs.append(weights_of)
        args = {
            "dataset_id": ids[set_name], "configuration": data.configuration, "fold": fold, "plans": plans,
            "device": values["device"],
        }  # fmt: skip
        steps = [{"name": f"{name}.train", "kind": "train", "args": args}]
        for test in data.tests:
            more = {
                "cases": [{key: case[key] for key in ("case_id", "images", "label")} for case in test.cases],
                "out": str(out / "predictions" / name / test.name),
                "num_labels": len(data.labels),
                "mirror": not values["disable_tta"],
            }
            steps.append({"name": f"{name}.{test.name}", "kind": "predict", "args": args | more})
        tasks.append(Task(name, mode, tuple(steps), tuple(needs), environment))
        rows.setdefault((mode, ratio), []).append(name)
        trained = Path(environment["nnUNet_results"], f"Dataset{ids[set_name]:03d}_{set_name}")
        trained = trained / f"{TRAINER}__{plans}__{data.configuration}" / f"fold_{fold}"
        checkpoints[name] = str(trained / "checkpoint_final.pth")
        return name

    for seed in range(settings.num_seeds):
        for fold in values["fold_list"]:
            first = add("real", None, seed, fold)
            if "control" in settings.modes:
                add("control", None, seed, fold, first)
        for ratio in settings.ratios:
            first = add("synthetic-only", ratio, seed, "all") if "synthetic-only" in settings.modes else None
            for fold in values["fold_list"]:
                if "pretrain" in settings.modes:
                    add("pretrain", ratio, seed, fold, first)
                if "mix" in settings.modes:
                    add("mix", ratio, seed, fold)
    short, long = (values["iterations"] * length for length in (values["epochs"], values["finetune_epochs"]))
    steps = {"real": short, "control": short + long, "synthetic-only": short, "pretrain": short + long, "mix": short}
    ordered = sorted(rows, key=lambda row: (list(steps).index(row[0]), row[1] or 0))
    return tasks, [Row(mode, ratio, tuple(rows[mode, ratio]), steps[mode]) for mode, ratio in ordered]

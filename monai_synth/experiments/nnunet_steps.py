# SPDX-License-Identifier: Apache-2.0
"""One process of an experiment: it plans, preprocesses, trains or predicts with nnU-Net, step by step.

``python -m monai_synth.experiments.nnunet_steps job.json`` runs the steps of a job file that
`monai_synth.experiments.nnunet_jobs` wrote. A step is done when its file in the folder of markers is there; steps
that are done are skipped.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.pool
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.atomic import write_json
from monai_synth.data.pair_files import read_label, write_label
from monai_synth.experiments.nnunet_scores import confusion, resize_nearest

TRAINER = "MonaiSynthTrainer"
PLANS = "nnUNetPlans"


def main(arguments: Sequence[str]) -> None:
    """Run the steps of a job file that are not done."""
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    os.environ.update(job["environment"])
    _end_with_parent()
    if _num_processes() == 1:
        _pools_of_threads()
    for step in job["steps"]:
        marker = Path(job["markers"]) / f"{step['name']}.json"
        if marker.is_file():
            continue
        start, cpu = time.perf_counter(), _cpu_seconds()
        print(f"== {step['name']}", flush=True)
        result = STEPS[step["kind"]](**step["args"])
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}
        write_json(marker, {"name": step["name"], "kind": step["kind"], **seconds, **result})


def plan(*, dataset_id: int, configuration: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Check, plan and preprocess the real set, as ``nnUNetv2_plan_and_preprocess`` does.

    Args:
        dataset_id: of the real set.
        configuration: "2d" or "3d_fullres".
        overrides: see `override_plans`.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprint_dataset,
        plan_experiment_dataset,
    )

    extract_fingerprint_dataset(dataset_id, num_processes=_num_processes(), check_dataset_integrity=True)
    plan_experiment_dataset(dataset_id)
    path = _preprocessed(dataset_id) / f"{PLANS}.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    override_plans(plans, configuration, **overrides)
    write_json(path, plans)
    _preprocess(dataset_id, PLANS, configuration)
    chosen = plans["configurations"][configuration]
    return {key: chosen[key] for key in ("batch_size", "patch_size", "spacing", "normalization_schemes")}


def preprocess(*, dataset_id: int, source_id: int, plans: str, configuration: str) -> dict[str, Any]:
    """Check another set and preprocess it by the plans of the real set.

    The order is that of ``nnUNetv2_extract_fingerprint``, ``_move_plans_between_datasets``, a copy of dataset.json,
    which nnU-Net's own instructions lack and without which preprocessing fails, and ``nnUNetv2_preprocess``.

    Args:
        dataset_id: of this set.
        source_id: of the real set.
        plans: name of the moved plans.
        configuration: "2d" or "3d_fullres".
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset
    from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import (
        move_plans_between_datasets,
    )
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    class FewSamples(DatasetFingerprintExtractor):
        """Moved plans bring the real set's statistics, so these are read by nobody and need no 100 million values."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.num_foreground_voxels_for_intensitystats = 100_000

    extract_fingerprint_dataset(dataset_id, FewSamples, _num_processes(), check_dataset_integrity=True)
    move_plans_between_datasets(source_id, dataset_id, PLANS, plans)
    raw = Path(_variable("raw")) / convert_id_to_dataset_name(dataset_id)
    shutil.copyfile(raw / "dataset.json", _preprocessed(dataset_id) / "dataset.json")
    _preprocess(dataset_id, plans, configuration)
    return {}


def train(*, dataset_id: int, configuration: str, fold: int | str, plans: str, device: str) -> dict[str, Any]:
    """Train, or go on with a training that was stopped.

    Args:
        dataset_id: of the set to train on.
        configuration: "2d" or "3d_fullres".
        fold: number, or "all".
        plans: name of the plans.
        device: "cpu" or "cuda".

    Returns:
        Digests of the weights at the start and the end, and the loss of each epoch.
    """
    import torch
    from nnunetv2.run.run_training import run_training

    folder = model_folder(dataset_id, configuration, plans) / f"fold_{fold}"
    begun = any((folder / f"checkpoint_{name}.pth").is_file() for name in ("latest", "final"))
    run_training(
        str(dataset_id),
        configuration,
        fold,
        trainer_class_name=TRAINER,
        plans_identifier=plans,
        continue_training=begun,
        device=torch.device(device),
    )
    from monai_synth.experiments.nnunet_trainer.monai_synth_trainer import START_FILE, state_sha256

    checkpoint = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    start = json.loads((folder / START_FILE).read_text(encoding="utf-8"))
    return {
        "start_sha256": start["sha256"],
        "final_sha256": state_sha256(checkpoint["network_weights"]),
        "train_losses": [float(loss) for loss in checkpoint["logging"]["train_losses"]],
        "mean_fg_dice": [float(value) for value in np.nan_to_num(checkpoint["logging"]["mean_fg_dice"])],
    }


def predict(
    *,
    dataset_id: int,
    configuration: str,
    fold: int | str,
    plans: str,
    device: str,
    cases: Sequence[Mapping[str, Any]],
    out: str,
    num_labels: int,
    mirror: bool,
) -> dict[str, Any]:
    """Segment test images and count right and wrong pixels at their native size.

    Args:
        dataset_id: of the set that was trained on.
        configuration: "2d" or "3d_fullres".
        fold: number, or "all".
        plans: name of the plans.
        device: "cpu" or "cuda".
        cases: each with "case_id", "images" (the files nnU-Net reads) and "label" (of native size).
        out: folder for the predicted labels of native size.
        num_labels: with the background.
        mirror: average over mirrored images.

    Returns:
        ``{"cases": {case_id: [[tp, fp, fn] per foreground label]}}``.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=mirror, device=torch.device(device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(
        str(model_folder(dataset_id, configuration, plans)), (fold,), "checkpoint_final.pth"
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    counts = {}
    for case in cases:
        found = predictor.predict_from_files_sequential([list(case["images"])], None)[0]
        truth = read_label(case["label"])
        # nnU-Net's arrays are (1, row, column) for PNG and (z, y, x) for NIfTI.
        label = found[0] if case["label"].endswith(".png") else found.transpose(2, 1, 0)
        label = resize_nearest(label.astype(np.uint8), truth.shape)
        counts[case["case_id"]] = confusion(truth, label, num_labels).tolist()
        write_label(Path(out) / Path(case["label"]).name, label)
    return {"cases": counts}


def override_plans(
    plans: dict[str, Any],
    configuration: str,
    *,
    batch_size: int | None = None,
    patch_size: Sequence[int] | None = None,
    num_features: int | None = None,
) -> None:
    """Change plans in place; the network's depth follows the patch by nnU-Net's own rule.

    Args:
        plans: content of a plans file.
        configuration: "2d" or "3d_fullres".
        batch_size: images per step.
        patch_size: (rows, columns), or (X, Y, Z); each axis is raised to what the network can halve.
        num_features: channels of the first level, 32 in nnU-Net.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props

    chosen = plans["configurations"][configuration]
    network = chosen["architecture"]["arch_kwargs"]
    if batch_size is not None:
        chosen["batch_size"] = batch_size
    if patch_size is not None:
        patch = list(patch_size)
        if len(patch) == 3:  # nnU-Net reads NIfTI as (z, y, x), then puts the coarsest axis first
            patch = [patch[::-1][axis] for axis in plans["transpose_forward"]]
        _, strides, kernels, patch, _ = get_pool_and_conv_props(chosen["spacing"], patch, 4, 999999)
        chosen["patch_size"] = [int(edge) for edge in patch]
        network["n_stages"] = len(strides)
        network["strides"] = [[int(value) for value in stride] for stride in strides]
        network["kernel_sizes"] = [[int(value) for value in kernel] for kernel in kernels]
        network["n_conv_per_stage"] = [2] * len(strides)
        network["n_conv_per_stage_decoder"] = [2] * (len(strides) - 1)
    limit = 512 if len(chosen["patch_size"]) == 2 else 320  # nnU-Net's own
    first = num_features or network["features_per_stage"][0]
    network["features_per_stage"] = [min(limit, first * 2**level) for level in range(network["n_stages"])]


def model_folder(dataset_id: int, configuration: str, plans: str) -> Path:
    """Where nnU-Net keeps what it trained; reads ``nnUNet_results``."""
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    name = convert_id_to_dataset_name(dataset_id)
    return Path(_variable("results")) / name / f"{TRAINER}__{plans}__{configuration}"


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "plan": plan,
    "preprocess": preprocess,
    "train": train,
    "predict": predict,
}


def _preprocess(dataset_id: int, plans: str, configuration: str) -> None:
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    preprocess_dataset(dataset_id, plans, [configuration], [_num_processes()])


def _preprocessed(dataset_id: int) -> Path:
    from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

    return Path(_variable("preprocessed")) / convert_id_to_dataset_name(dataset_id)


def _variable(name: str) -> str:
    return os.environ[f"nnUNet_{name}"]


def _num_processes() -> int:
    return int(_variable("def_n_proc"))


def _pools_of_threads() -> None:
    """Let nnU-Net's pools of one process be threads: starting a process anew costs seconds each time."""

    class _Threads:
        @staticmethod
        def Pool(processes: int | None = None) -> multiprocessing.pool.ThreadPool:  # noqa: N802  (the original's name)
            return multiprocessing.pool.ThreadPool(processes)

    from nnunetv2.utilities import utils

    utils.Pool = _Threads.Pool  # where files are listed
    original = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: _Threads if method == "spawn" else original(method)


def _end_with_parent() -> None:
    """End this process and its workers when the one that started it is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        with contextlib.suppress(OSError):
            os.killpg(os.getpgid(0), 9)

    threading.Thread(target=watch, daemon=True).start()


def _cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


if __name__ == "__main__":
    main(sys.argv[1:])

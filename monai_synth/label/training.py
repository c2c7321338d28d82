# SPDX-License-Identifier: Apache-2.0
"""Training from annotated cases: a prepared dataset of them, and the bundle's own train.json on it.

Nothing of the bundle is touched: data and models go to the app's folder, each training into a folder that is named by
what it was made from, so that a stopped one goes on and another one begins anew.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from monai_synth.bundle import remember_run
from monai_synth.data.pairs import prepare_pairs
from monai_synth.data.prepare_shared import write_dataset
from monai_synth.data.semantic import HU_MAX, HU_MIN
from monai_synth.data.slices import NODULE_LABEL_MIN
from monai_synth.errors import UserError
from monai_synth.label.maps import read_map, read_slice
from monai_synth.label.parameters import MAPS, check_plain
from monai_synth.label.served import Served, run_workflow

LEAST_CASES = 4

# Keys of train.json that a request may set, where the bundle has them: numbers and names, never places or code.
_ALLOWED = (
    "preset", "seed", "image_size", "max_epochs", "num_iterations", "iterations_per_epoch", "batch_size",
    "learning_rate", "ema_decay", "val_interval", "save_interval", "num_res_blocks", "features", "factor",
    "autoencoder_epochs", "classifier_epochs", "patches", "patch_scale", "flips", "amp", "accumulate", "z_dim",
)  # fmt: skip
_THEIRS = (
    "model", "device", "images", "bundle_path", "client_id", "name", "multi_gpu", "gpus", "local_rank", "val_split",
    "pretrained",
)  # fmt: skip


def train_on_cases(
    served: Served, cases: Sequence[tuple[str, Path, Path]], request: Mapping[str, Any], *, app_dir: Path, device: str
) -> dict[str, Any]:
    """Prepare the cases and train the bundle on them.

    Args:
        served: the bundle.
        cases: id, image and label of each.
        request: values for keys of the bundle's train.json, and ``images``, ids of the cases to train on (default:
            all); paths and code are refused.
        app_dir: data/, logs/ and model/ in it are written.
        device: where to train.

    Returns:
        What was trained on, and where the model lies.

    Raises:
        UserError: too few cases, files that do not fit, or a key that must not be set.
    """
    overrides = _overrides(served, request)
    cases = _chosen(cases, request.get("images"))
    if len(cases) < LEAST_CASES:
        msg = f"{len(cases)} cases have a final label, training takes {LEAST_CASES} or more"
        raise UserError(f"{msg}; annotate and submit more, or make some and review them")
    dataset = app_dir / "data" / served.name
    shutil.rmtree(dataset, ignore_errors=True)
    dataset.parent.mkdir(parents=True, exist_ok=True)
    labels = {str(k): int(v) for k, v in served.contract()["labels"].items()}
    seed = overrides.get("seed", 0)
    content = (_slices if served.name in MAPS else _pairs)(cases, dataset, labels, seed)
    made_from = (dataset / "dataset.json").read_bytes() + json.dumps(overrides, sort_keys=True).encode()
    run = hashlib.sha256(made_from).hexdigest()[:12]
    models, logs = served.app_models / run, app_dir / "logs" / f"{served.name}_{run}"
    places = {"dataset_dir": dataset, "ckpt_dir": models, "output_dir": logs, "latest_dir": served.app_models}
    configs = served.folder / "configs"
    values = {**overrides, **{k: str(v) for k, v in places.items()}, "device": device}
    run_workflow(configs / "train.json", configs / "metadata.json", "train", **values)
    remember_run(str(served.app_models), str(models), str(dataset))
    sizes = {split: len(content[split]) for split in ("training", "validation", "test")}
    return {"model": served.name, "cases": [case for case, _, _ in cases], "run": run, **sizes}


def _chosen(cases: Sequence[tuple[str, Path, Path]], images: Any) -> list[tuple[str, Path, Path]]:
    """The cases that a request names, or all."""
    if images in (None, "all"):
        return list(cases)
    there = {case[0]: case for case in cases}
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"images is {str(images)[:80]!r}; give a list of ids of cases")
    lacking = [image for image in images if image not in there]
    if lacking:
        raise UserError(f"the case {lacking[0][:80]!r} has no final label; annotate and submit it, or leave it out")
    return [there[image] for image in dict.fromkeys(images)]


def _overrides(served: Served, request: Mapping[str, Any]) -> dict[str, Any]:
    config = json.loads((served.folder / "configs" / "train.json").read_text(encoding="utf-8"))
    allowed = [name for name in _ALLOWED if name in config]
    overrides = {"preset": "demo", "features": []} if served.name == "lsdm" else {"preset": "demo"}
    for name, value in request.items():
        if name in _THEIRS:
            continue
        if name not in allowed:
            raise UserError(f"training takes no parameter {name!r}; {served.name} takes {', '.join(allowed)}")
        if value is not None:
            overrides[name] = check_plain(name, value)
    return overrides


def _pairs(cases: Sequence[tuple[str, Path, Path]], out: Path, labels: Mapping[str, int], seed: int) -> dict[str, Any]:
    """The dataset of task "pairs" that bundle jdm trains on."""
    source = out.with_name(f"{out.name}_source")
    shutil.rmtree(source, ignore_errors=True)
    try:
        for folder, place in (("images", 1), ("masks", 2)):
            (source / folder).mkdir(parents=True)
            for case in cases:
                path = case[place]
                ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
                shutil.copyfile(path, source / folder / f"{case[0]}{ending}")
        names = [name for name, value in sorted(labels.items(), key=lambda item: item[1]) if value]
        return prepare_pairs(
            source, out, labels=names, label_values=None if len(names) == 1 else [labels[n] for n in names],
            splits=(1 - 1 / len(cases), 1 / len(cases), 0.0) if len(cases) < 10 else (0.9, 0.1, 0.0),
            seed=seed, num_workers=1, progress=False, name="annotated",
        )  # fmt: skip
    finally:
        shutil.rmtree(source, ignore_errors=True)


def _slices(cases: Sequence[tuple[str, Path, Path]], out: Path, labels: Mapping[str, int], seed: int) -> dict[str, Any]:
    """The dataset of task "lidc" that bundles lsdm and spade_gan train on.

    A map tells of a nodule where it is and, in classes, its malignancy; nothing else, so other features have no
    classifier.
    """
    for folder in ("images", "labels"):
        (out / folder).mkdir(parents=True)
    entries, shape = [], None
    for case, image_path, label_path in cases:
        image, spacing = read_slice(image_path)
        label = read_map(label_path, dims=2, num_labels=len(labels), axial=True).labels
        if image.shape != label.shape:
            raise UserError(f"case {case}: the image is {image.shape}, its label {label.shape}; draw it on the image")
        for folder, array in (("images", image), ("labels", label)):
            Image.fromarray(array).save(out / folder / f"{case}.png")
        shape = shape or image.shape
        files = {"image": f"images/{case}.png", "label": f"labels/{case}.png"}
        entries.append({**files, "case_id": case, "patient_id": case, "spacing": spacing, "nodules": _nodules(label)})
    random.Random(seed).shuffle(entries)
    num_val = max(1, len(entries) // 10)
    head = {
        "name": "annotated", "task": "lidc", "modality": "CT", "image_channels": 1, "spatial_shape": list(shape or ()),
        "intensity": {"unit": "HU", "min": HU_MIN, "max": HU_MAX, "stored": "uint8 0..255"}, "labels": dict(labels),
    }  # fmt: skip
    splits = [("validation" if i < num_val else "training", entry) for i, entry in enumerate(entries)]
    return write_dataset(out, head, {"num_slices": len(entries)}, {"seed": seed}, splits)


def _nodules(label: np.ndarray) -> list[dict[str, Any]]:
    """An entry for each connected region of nodule labels."""
    found, count = ndimage.label(label >= NODULE_LABEL_MIN, structure=np.ones((3, 3)))
    nodules = []
    for number in range(1, count + 1):
        rows, cols = np.nonzero(found == number)
        value = int(label[rows, cols].max())
        nodules.append(
            {
                "nodule_id": number, "center": [float(rows.mean()), float(cols.mean())], "area": len(rows),
                "bbox": [int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1],
                "label": value, "malignant": int(value > NODULE_LABEL_MIN),
            }
        )  # fmt: skip
    return nodules

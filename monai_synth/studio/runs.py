# SPDX-License-Identifier: Apache-2.0
"""Runs a job: tells how far it is after each step, stops within one, and writes what was made as often as asked."""

from __future__ import annotations

import io
import math
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator
from torch.utils.data import DataLoader

from monai_synth.atomic import write_bytes
from monai_synth.data.joint import split_joint, to_image, to_label
from monai_synth.data.pair_files import channels_last
from monai_synth.errors import UserError
from monai_synth.export.pairs import PairExport
from monai_synth.inference.sampler import watched
from monai_synth.studio.jobs import Job
from monai_synth.studio.places import Place
from monai_synth.training.pictures import to_uint8

FORMS = {
    "PNG": ("png", False),
    "NIfTI": ("nii.gz", False),
    "nnU-Net dataset (PNG)": ("png", True),
    "nnU-Net dataset (NIfTI)": ("nii.gz", True),
    "class folders (PNG)": ("png", True),
}
Progress = Callable[[int, int], None]  # (done, in all)


class CancelledError(Exception):
    """The user wants no more of it."""


@dataclass
class Sample:
    """One image.

    Attributes:
        case_id: its id.
        seed: its seed.
        image: uint8 (H, W) or (H, W, 3).
        label: uint8 (H, W); None for models of classes.
        spacing: (row, column) in mm; None where it is not known.
        nodules: the table of its map, where the map is a dataset's.
    """

    case_id: str
    seed: int
    image: np.ndarray
    label: np.ndarray | None = None
    spacing: tuple[float, ...] | None = None
    nodules: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """What a job made.

    Attributes:
        place: the bundle.
        job: what was asked.
        batches: as its dataset gave them.
        preds: as its inferer gave them.
    """

    place: Place
    job: Job
    batches: list[dict[str, Any]] = field(default_factory=list)
    preds: list[Any] = field(default_factory=list)

    @property
    def forms(self) -> tuple[str, ...]:
        """In which it can be downloaded."""
        if "classes" in self.place.contract:
            return ("PNG", "class folders (PNG)")
        return tuple(FORMS)[:4]

    def samples(self) -> Iterator[Sample]:
        """The images, to be shown."""
        for batch, pred in zip(self.batches, self.preds, strict=True):
            for i, case_id in enumerate(batch["case_id"]):
                image, label = self._arrays(batch, pred, i)
                spacing = tuple(batch["spacing"][i]) if "spacing" in batch else None
                nodules = (batch.get("nodules") or [None] * (i + 1))[i] or []
                yield Sample(case_id, int(batch["seed"][i]), image, label, spacing, nodules)

    def _arrays(self, batch: dict[str, Any], pred: Any, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        contract = self.place.contract
        if isinstance(pred, dict):  # of jdm
            image, label = split_joint(pred["x_0"][i : i + 1], contract["image_channels"])
            picture = to_image(image, contract["value_range"])[0].numpy()
            return channels_last(picture), to_label(label, contract["value_range"])[0].numpy()
        if "classes" in contract:
            return channels_last(to_image(pred[i : i + 1], contract["value_range"])[0].numpy()), None
        return to_uint8(pred[i]), batch["label"][i, 0].numpy()


def run_job(
    place: Place,
    job: Job,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Run:
    """Sample.

    Args:
        place: the bundle.
        job: what is asked for.
        device: of the network.
        progress: called after each step of each batch.
        cancel: once it is set, sampling ends with the step that is being made.

    Raises:
        CancelledError: ``cancel`` was set.
    """
    run = Run(place, job)
    batches = math.ceil(len(job.dataset) / job.batch_size)
    steps = max(1, job.num_steps)

    def step(number: int, *_: Any) -> None:
        if cancel is not None and cancel.is_set():
            raise CancelledError
        if progress is not None:
            progress(min(len(run.batches) * steps + number + 1, batches * steps), batches * steps)

    def keep(engine: Engine) -> None:
        run.batches.append(engine.state.batch)
        run.preds.append(_on_cpu(engine.state.output["pred"]))
        if not job.num_steps:
            step(-1)

    evaluator = SupervisedEvaluator(
        device=torch.device(device),
        val_data_loader=DataLoader(job.dataset, batch_size=job.batch_size, collate_fn=job.collate),
        network=job.network,
        inferer=job.inferer,
        prepare_batch=job.prepare_batch,
        decollate=False,
    )
    evaluator.logger.disabled = True  # cancelling is no failure that is to be told
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, keep)
    if cancel is not None and cancel.is_set():
        raise CancelledError
    with watched(step):
        evaluator.run()
    return run


def _on_cpu(pred: Any) -> Any:
    if isinstance(pred, dict):
        return {key: None if value is None else value.detach().cpu() for key, value in pred.items()}
    return pred.detach().cpu()


def write_dataset(run: Run, out: Path, form: str) -> Path:
    """Write a run by its bundle's own writer.

    Args:
        run: what was made.
        out: a new folder.
        form: "png" or "nii.gz".

    Returns:
        The folder of the dataset, with ``provenance.jsonl``.

    Raises:
        UserError: no image can be written, e.g. as all masks are empty.
    """
    export, preds = run.job.export(out, form), iter(run.preds)
    writer = Engine(lambda engine, batch: {"pred": next(preds)})
    export.attach(writer)
    if isinstance(export, PairExport):
        export.begin_pass()
    writer.run(run.batches)
    if not export.writer.cases():
        raise UserError("no image can be downloaded: all masks are empty or cover everything; take another seed")
    return export.finish()


def write_zip(run: Run, folder: Path, form: str) -> Path:
    """Write a run as a zip; the same run gives the same bytes.

    Args:
        run: what was made.
        folder: of the session.
        form: one of the run's ``forms``. Datasets are as the bundle's own sampling writes them; the others have
            ``images`` and ``labels`` with plain names, and the provenance.

    Raises:
        UserError: an unknown form, or see :func:`write_dataset`.
    """
    if form not in run.forms:
        raise UserError(f"download {form!r} is unknown; allowed are {', '.join(run.forms)}")
    ending, whole = FORMS[form]
    out = folder / "dataset"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    try:
        dataset = write_dataset(run, out, ending)
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(p for p in dataset.rglob("*") if p.is_file()):
                place = path.relative_to(dataset).as_posix()
                name = f"{dataset.name}/{place}" if whole else _plain(place)
                if name is not None:
                    archive.writestr(zipfile.ZipInfo(name), path.read_bytes())
        short = form.lower().replace(" ", "_").replace("(", "").replace(")", "").replace("-", "")
        target = folder / f"monai_synth_{run.place.bundle}_{short}.zip"
        write_bytes(target, content.getvalue())
        return target
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _plain(place: str) -> str | None:
    """Name of a dataset's file in a plain download; None leaves it out."""
    if place in ("dataset.json", "export.json", "samples.png"):
        return None
    head, _, name = place.rpartition("/")
    if head == "imagesTr":
        return f"images/{name.replace('_0000.', '.')}"
    return {"labelsTr": f"labels/{name}", "": name}.get(head, f"images/{name}")

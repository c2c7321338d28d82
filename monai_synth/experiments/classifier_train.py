# SPDX-License-Identifier: Apache-2.0
"""One classifier of the experiment: a function of its row, its seed and the settings, whatever runs beside it.

A run that is done has ``runs/<row>_seed<k>.json`` with its probabilities and curves. One that was stopped goes on from
``runs/<row>_seed<k>.state.pt``, which is written at most once a minute.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_synth.atomic import write_json
from monai_synth.checkpoint import load_file, restore_network, save_atomic, trained_file
from monai_synth.data.workers import stopped
from monai_synth.errors import UserError
from monai_synth.experiments.classifier_augment import apply_geometry, draw_geometry
from monai_synth.experiments.classifier_rows import Row
from monai_synth.experiments.classifier_sets import Images, derived_seed, held_out, training_parts
from monai_synth.networks import ImageClassifier

STAGE = "image_classifier"
_SAVE_EVERY = 60.0  # seconds
_EVALUATED_TOGETHER = 256  # images
_LARGE = 1_000_000  # parameters


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        row: what to train.
        seed: of everything random in it.
        values: epochs, batch_size, lr, momentum, lr_step, lr_gamma, max_steps, backbone, weights, geo, select_on,
            device, classes, image_channels, image_size.
        images: folder of the packed sets.
        out: folder of the experiment.
        keep: write the classifier to ``OUT/classifiers``.
    """

    row: Row
    seed: int
    values: Mapping[str, Any]
    images: str
    out: str
    keep: bool

    @property
    def name(self) -> str:
        return run_name(self.row, self.seed)

    @property
    def marker(self) -> Path:
        return Path(self.out) / "runs" / f"{self.name}.json"


def run_name(row: Row, seed: int) -> str:
    """Name of a run's files."""
    return f"{row.name}_seed{seed}"


def classifier_path(out: str | Path, row: Row, seed: int) -> Path:
    """Where the classifier of a run is kept."""
    return Path(out) / "classifiers" / f"{run_name(row, seed)}.pt"


def run_job(job: Job) -> dict[str, Any] | None:
    """Train, choose the epoch, classify the test images, and write the marker.

    Returns:
        The marker's content; None where the run was given up.

    Raises:
        UserError: the training diverged, or its start is missing.
    """
    device = torch.device(job.values["device"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small images: two processes are faster than two threads, and sums keep their order
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
        ):
            return _run(job, device)
    finally:
        torch.set_num_threads(threads)


def initial_network(values: Mapping[str, Any], seed: int, mean: list[float], std: list[float]) -> ImageClassifier:
    """The classifier before training: random by the seed, or with published weights and a random last layer."""
    torch.manual_seed(derived_seed(seed, "initial weights"))
    network = ImageClassifier(
        values["backbone"], len(values["classes"]), values["image_channels"], mean, std, values["image_size"]
    )
    if values["weights"] is not None:
        network.load_backbone_weights(values["weights"])
    return network


def predict(network: nn.Module, images: Images) -> Tensor:
    """Logits (N, K) in evaluation mode, on the processor."""
    training = network.training
    network.eval()
    with torch.inference_mode():
        parts = [
            network(images.batch(i)[0]).float().cpu() for i in torch.arange(len(images)).split(_EVALUATED_TOGETHER)
        ]
    network.train(training)
    return torch.cat(parts)


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Digest of weights."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Inverse class proportions with mean 1 over the images: N / (K n_k), 0 for a class without image."""
    counts = torch.bincount(labels, minlength=num_classes).float()
    return torch.where(counts > 0, len(labels) / (num_classes * counts.clamp_min(1)), 0.0)


class Batches:
    """Batches of an epoch: every image once in a shuffled order, augmented; the last batch may be smaller.

    Args:
        images: the training images.
        batch_size: B.
        seeds: of order and augmentation, with the epoch.
        geo: None, "paper" or "seed-code" (which also crops real images).
        num_steps: batches of an epoch; the images come again in another order as often as needed. Default: once.
    """

    def __init__(
        self, images: Images, batch_size: int, seeds: tuple[object, ...], geo: str | None, num_steps: int | None = None
    ) -> None:
        self.images, self.batch_size, self.seeds, self.geo = images, batch_size, seeds, geo
        self.epoch = 0
        # A batch of one image has no variance to normalise by, so a last one joins the batch before.
        self.per_pass = max(1, math.ceil(len(images) / batch_size) - (len(images) % batch_size == 1))
        self.num_steps = num_steps or self.per_pass

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.Generator().manual_seed(derived_seed(*self.seeds, "order", self.epoch))
        geometry = torch.Generator().manual_seed(derived_seed(*self.seeds, "geometry", self.epoch))
        for step in range(self.num_steps):
            at = step % self.per_pass
            if at == 0:
                permutation = torch.randperm(len(self.images), generator=order)
            end = None if at == self.per_pass - 1 else (at + 1) * self.batch_size
            images, labels = self.images.batch(permutation[at * self.batch_size : end])
            if self.geo is not None:
                drawn = draw_geometry(len(images), images.shape[-2:], geometry, crop=self.geo == "seed-code")
                images = apply_geometry(images, drawn)
            yield {"image": images, "label": labels}


class _Progress:
    """What a training knows at the end of each epoch: curves and the best weights so far."""

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {
            key: [] for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
        }
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.best_key, self.seconds = 0, (-1.0, -math.inf), 0.0

    @property
    def epoch(self) -> int:
        return len(self.curves["val_loss"])

    def add(self, values: Mapping[str, float], network: nn.Module) -> None:
        """Take an epoch; of equal accuracies the lower loss is better, of equal losses the earlier epoch."""
        for key, curve in self.curves.items():
            curve.append(round(float(values[key]), 6))
        key = (values["val_accuracy"], -values["val_loss"])
        if key > self.best_key:
            self.best_key, self.best_epoch = key, self.epoch
            self.best = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def _run(job: Job, device: torch.device) -> dict[str, Any] | None:
    begin, values, folder = time.monotonic(), job.values, Path(job.images)
    labels = {name: np.load(folder / f"{name}_classes.npy") for name in ("training", "synthetic", "validation", "test")}
    on_synthetic = values["select_on"] == "synthetic" and job.row.mode == "synthetic"
    parts = training_parts(job.row, labels, job.seed, hold_out=on_synthetic)
    images = Images(folder, parts, device)
    chosen = {"synthetic": held_out(labels["synthetic"], job.seed)} if on_synthetic else _all(labels, "validation")
    validation = Images(folder, chosen, device)

    network, start = _start(job, images)
    network.to(device)
    start_sha256 = state_sha256(network.state_dict())
    num_steps = math.ceil(len(labels["synthetic"]) / values["batch_size"]) if job.row.mode == "long" else None
    geo = values["geo"] if job.row.geo else None
    if geo == "seed-code" and "training" not in parts:
        geo = "paper"  # the text's code crops real images only
    stage = "fine-tuning" if job.row.start is not None else "training"
    batches = Batches(images, values["batch_size"], (job.seed, stage), geo, num_steps)
    if values["max_steps"] is not None:
        batches.num_steps = min(batches.num_steps, values["max_steps"])
    progress = _train(job, network, batches, validation, device, begin)
    if sum(parameter.numel() for parameter in network.parameters()) > _LARGE:
        gc.collect()  # the engine refers to itself and so would keep the optimiser's tensors and the best weights
    if progress is None:
        return None

    network.load_state_dict(progress.best)
    test = Images(folder, _all(labels, "test"), device)
    if job.keep:
        _keep(job, network, progress)
    content = {
        "row": job.row.name,
        "seed": job.seed,
        "mode": job.row.mode,
        "start": start,
        "start_sha256": start_sha256,
        "final_sha256": state_sha256(progress.best),
        "num_images": {name: len(index) for name, index in parts.items()},
        "num_steps": len(batches) * values["epochs"],
        "best_epoch": progress.best_epoch,
        "curves": progress.curves,
        "validation_labels": validation.labels.tolist(),
        "validation": _probabilities(network, validation),
        "test_labels": test.labels.tolist(),
        "test": _probabilities(network, test),
        "device": device.type,
        "seconds": round(progress.seconds + time.monotonic() - begin, 2),
    }
    job.marker.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.marker, content)
    _state_path(job).unlink(missing_ok=True)
    return content


def _start(job: Job, images: Images) -> tuple[ImageClassifier, str]:
    """The classifier that training begins with, and what it is in words."""
    if job.row.start is not None:
        path = classifier_path(job.out, job.row.start, job.seed)
        return restore_network(load_file(path, stage=STAGE), path), path.stem
    network = initial_network(job.values, job.seed, *images.mean_and_std())
    return network, "scratch" if job.values["weights"] is None else "weights"


def _train(
    job: Job, network: nn.Module, batches: Batches, validation: Images, device: torch.device, begin: float
) -> _Progress | None:
    values = job.values
    num_classes = len(values["classes"])
    optimizer = torch.optim.SGD(network.parameters(), lr=values["lr"], momentum=values["momentum"], fused=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, values["lr_step"], values["lr_gamma"])
    weight = class_weights(batches.images.labels, num_classes).to(device) if job.row.weighted else None
    loss_function = nn.CrossEntropyLoss(weight)
    progress = _Progress()
    _resume(job, progress, network, optimizer, schedule)
    if progress.epoch >= values["epochs"]:
        return progress

    trainer = SupervisedTrainer(
        device=device,
        max_epochs=values["epochs"] - progress.epoch,
        train_data_loader=batches,
        epoch_length=len(batches),
        network=network,
        optimizer=optimizer,
        loss_function=loss_function,
        decollate=False,
    )
    sums = torch.zeros(3, device=device, dtype=torch.float64)  # loss, right, images
    told = saved = time.monotonic()
    earlier = progress.seconds

    @trainer.on(Events.EPOCH_STARTED)
    def _begin_epoch(engine: Engine) -> None:
        sums.zero_()
        torch.manual_seed(derived_seed(job.seed, "dropout", progress.epoch))

    @trainer.on(Events.GET_BATCH_STARTED)
    def _set_epoch(engine: Engine) -> None:
        batches.epoch = progress.epoch

    @trainer.on(Events.ITERATION_COMPLETED)
    def _count(engine: Engine) -> None:
        output = engine.state.output
        right = (output["pred"].argmax(1) == output["label"]).sum()
        num = len(output["label"])
        sums.add_(torch.stack([output["loss"].detach().double() * num, right.double(), right.new_tensor(num).double()]))
        if stopped():
            engine.terminate()

    @trainer.on(Events.EPOCH_COMPLETED)
    def _end_epoch(engine: Engine) -> None:
        nonlocal told, saved
        if stopped():
            return
        schedule.step()
        loss, right, num = sums.tolist()
        if not math.isfinite(loss):
            msg = f"row {job.row.name}, seed {job.seed}: the loss is not finite after epoch {progress.epoch + 1}"
            raise UserError(f"{msg}; give a smaller --lr than {values['lr']}, and another --out")
        logits = predict(network, validation)
        val_loss = nn.functional.cross_entropy(logits, validation.labels, None if weight is None else weight.cpu())
        val_right = (logits.argmax(1) == validation.labels).double().mean()
        epoch = {"train_loss": loss / num, "train_accuracy": right / num, "val_loss": float(val_loss)}
        progress.add(epoch | {"val_accuracy": float(val_right)}, network)
        now = time.monotonic()
        progress.seconds = earlier + now - begin
        if now - told >= _SAVE_EVERY and progress.epoch < values["epochs"]:
            told = now
            text = f"    row {job.row.name} seed {job.seed}: epoch {progress.epoch} of {values['epochs']}"
            print(f"{text}, validation accuracy {float(val_right):.3f}", flush=True)
        if now - saved >= _SAVE_EVERY and progress.epoch < values["epochs"]:
            saved = now
            _save(job, progress, network, optimizer, schedule)

    network.train()
    trainer.run()
    progress.seconds = earlier
    return None if progress.epoch < values["epochs"] else progress


def _all(labels: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {name: np.arange(len(labels[name]))}


def _probabilities(network: nn.Module, images: Images) -> list[list[float]]:
    return np.round(predict(network, images).double().softmax(1).numpy(), 7).tolist()


def _keep(job: Job, network: ImageClassifier, progress: _Progress) -> None:
    values = job.values
    args = {
        "backbone": values["backbone"],
        "num_classes": len(values["classes"]),
        "image_channels": values["image_channels"],
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "image_size": list(values["image_size"]),
    }
    contract = {
        "classes": dict(values["classes"]),
        "image_channels": values["image_channels"],
        "image_size": list(values["image_size"]),
        "value_range": [0, 1],
        "trained_on": job.row.text,
        "row": job.row.name,
        "seed": job.seed,
        "fingerprints": dict(values["fingerprints"]),
        "initial_weights": "random" if values["weights"] is None else f"sha256 {values['weights_sha256']}",
        "best_epoch": progress.best_epoch,
        "val_accuracy": progress.best_key[0],
    }
    arch = {"target": "monai_synth.networks.ImageClassifier", "args": args}
    save_atomic(trained_file(STAGE, network, arch, contract), classifier_path(job.out, job.row, job.seed))


def _state_path(job: Job) -> Path:
    return job.marker.with_name(f"{job.name}.state.pt")


def _save(job: Job, progress: _Progress, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    content = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "curves": progress.curves,
        "best": progress.best,
        "best_epoch": progress.best_epoch,
        "best_key": list(progress.best_key),
        "seconds": progress.seconds,
    }
    save_atomic({"format": "monai_synth/1", "stage": f"{STAGE}_state", **content}, _state_path(job))


def _resume(job: Job, progress: _Progress, network: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Take over what a stopped run left; a damaged file is removed and the run starts again."""
    if not _state_path(job).is_file():
        return
    try:
        content = load_file(_state_path(job), stage=f"{STAGE}_state")
        network.load_state_dict(content["network"])
        optimizer.load_state_dict(content["optimizer"])
        schedule.load_state_dict(content["schedule"])
    except UserError:
        _state_path(job).unlink(missing_ok=True)
        return
    progress.curves = {key: list(curve) for key, curve in content["curves"].items()}
    progress.best, progress.best_epoch = content["best"], content["best_epoch"]
    progress.best_key, progress.seconds = tuple(content["best_key"]), content["seconds"]

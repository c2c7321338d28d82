# SPDX-License-Identifier: Apache-2.0
"""Training of the classifiers that steer and judge feature-aligned diffusion (Sec V-A), and the choice among them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Engine, Events
from monai.engines import PrepareBatch
from torch import Tensor, nn

from monai_synth.atomic import write_bytes
from monai_synth.checkpoint import build_network, load_file, sha256_of
from monai_synth.data.class_images import ClassImages, class_counts
from monai_synth.errors import UserError
from monai_synth.figures import new_figure, png
from monai_synth.networks.image_classifier import BACKBONES, ImageClassifier, require_published, weights_source
from monai_synth.training.classes import random_flips
from monai_synth.training.expert import STAGE
from monai_synth.training.handlers import MLflowRun, make_folder, rank
from monai_synth.training.loss_plot import LossPlot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

RANDOM = "random"  # the word that asks for a training from scratch
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CURVES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
EXPERTS = "expert_*.pt"
_READ_TOGETHER = 64  # images
_COMMAND = "`python -m monai.bundle run training --config_file bundles/fad/configs/train_expert.json --dataset_dir D`"


# What is trained


def check_start(backbone: str, weights: str | None, image_size: Sequence[int]) -> None:
    """Refuse, before any data are read, a training that has nothing to start from.

    Args:
        backbone: of ``BACKBONES``.
        weights: file of its published ImageNet weights, or "random" for a training from scratch.
        image_size: H, W.

    Raises:
        UserError: unknown backbone, no weights, no such file, or images that have not two axes.
    """
    if backbone not in BACKBONES:
        raise UserError(f"backbone {backbone!r}; allowed are {', '.join(BACKBONES)}")
    if len(image_size) != 2:
        raise UserError(f"image_size is {list(image_size)}; experts take images of two axes, e.g. '[224, 224]'")
    if weights == RANDOM:
        return
    try:
        require_published(backbone)
    except UserError as error:
        raise UserError(f"{error}: give --weights {RANDOM}") from error
    if weights is None or not Path(weights).expanduser().is_file():
        what = "no --weights were given" if weights is None else f"there is no weights file {weights}"
        msg = (
            f"{what}; download the ImageNet weights of {backbone} from {weights_source(backbone)} and give the file's "
            f"path as --weights, or give --weights {RANDOM} to train from scratch"
        )
        raise UserError(msg)


def initial_weights(weights: str) -> str:
    """What a contract says of the start: "random", or the SHA-256 of the weights file."""
    return RANDOM if weights == RANDOM else f"sha256 {sha256_of(Path(weights).expanduser())}"


def normalisation(dataset: ClassImages, weights: str | None) -> dict[str, list[float]]:
    """``mean`` and ``std`` of each channel in [0, 1], by which the expert normalises what it sees.

    Published weights want ImageNet's, of which grey images take the means over the channels; a training from scratch
    takes those of its own training images.

    Args:
        dataset: the training images.
        weights: see :func:`check_start`.
    """
    channels = dataset.image_channels
    if weights != RANDOM:
        mean, std = (
            list(values) if channels == 3 else [round(sum(values) / 3, 6)] for values in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return {"mean": mean, "std": std}
    # counts of the 256 values, so that the result is exact and has no order of summation
    counts = torch.zeros(channels, 256, dtype=torch.long)
    for indices in torch.arange(len(dataset)).split(_READ_TOGETHER):
        images = dataset.__getitems__(indices.tolist())["image"]
        counts += torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(channels)])
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * values).sum(1)
    std = (share * (values - mean[:, None]).square()).sum(1).sqrt().clamp_min(1e-3)
    return {"mean": [round(m, 6) for m in mean.tolist()], "std": [round(s, 6) for s in std.tolist()]}


def initial_expert(arch: Mapping[str, Any], weights: str | None, seed: int) -> ImageClassifier:
    """The classifier before training: random by the seed, or with published weights and a random last layer.

    Args:
        arch: of ``build_network``.
        weights: see :func:`check_start`.
        seed: of what is random.

    Raises:
        UserError: the weights do not fit the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(arch)
    if weights is not None and weights != RANDOM:
        network.load_backbone_weights(weights)
    return network


class ExpertPrepareBatch(PrepareBatch):
    """Images with classes -> (image float (B, C, H, W) in [0, 1], class (B,)).

    Args:
        flips: flip at random (Sec V-A), for training images only.

    Raises:
        UserError: ``flips`` is neither true nor false.
    """

    def __init__(self, *, flips: bool) -> None:
        if not isinstance(flips, bool):
            raise UserError(f"flips is {flips!r}; allowed are true and false")
        self.flips = flips

    def __call__(
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        image = batchdata["image"].to(device, non_blocking=non_blocking)
        if self.flips:
            image = random_flips(image)
        return image.float() / 255, batchdata["class"].to(device, non_blocking=non_blocking)


# What is kept


class BestEpoch:
    """Keeps the weights of the epoch of highest validation accuracy, and the curves of all epochs.

    Of epochs with equal accuracies the one of lower validation loss is better, of equal losses the earlier one. Save it
    with the training (it has a ``state_dict``) and export ``network``.

    Args:
        network: what is trained, without a wrapper for distributed training.
        evaluator: the validator, which has run in every epoch before this is called; its metrics and the trainer's
            together are those of ``CURVES``.

    Attributes:
        network: a copy with the best weights, on the processor.
        curves: value of each epoch by the names of ``CURVES``.
        epoch: the best, from 1; 0 before the first.
    """

    def __init__(self, network: nn.Module, evaluator: Engine) -> None:
        self.source, self.evaluator = network, evaluator
        self.network = copy.deepcopy(network).cpu().eval()
        self.curves: dict[str, list[float]] = {key: [] for key in CURVES}
        self.epoch = 0

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Take the epoch that has ended.

        Raises:
            UserError: a loss is not finite.
        """
        metrics = {**engine.state.metrics, **self.evaluator.state.metrics}
        values = {key: float(metrics[key]) for key in CURVES}
        number = engine.state.epoch
        if not (math.isfinite(values["train_loss"]) and math.isfinite(values["val_loss"])):
            msg = f"the loss is not finite after epoch {number}; give a smaller --learning_rate, and another --ckpt_dir"
            raise UserError(msg)
        for key, curve in self.curves.items():
            curve.append(values[key])
        better = not self.epoch or self._key(number) > self._key(self.epoch)
        if better:
            self.epoch = number
            self.network.load_state_dict(self.source.state_dict())
        if rank() == 0:
            logger.info(
                f"epoch {number} of {engine.state.max_epochs}: training loss {values['train_loss']:.4f}, validation "
                f"loss {values['val_loss']:.4f}, accuracy {values['val_accuracy']:.4f}{' (best)' if better else ''}"
            )

    def _key(self, epoch: int) -> tuple[float, float]:
        return self.curves["val_accuracy"][epoch - 1], -self.curves["val_loss"][epoch - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "curves": self.curves, "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.curves = {key: list(state["curves"][key]) for key in CURVES}
        self.epoch = int(state["epoch"])


class ExpertReport:
    """What the trained file says of how good the expert is, with a warning where it is no good.

    Args:
        best: of the training.
        classes: class table.
        training: cases that it was trained on.
        validation: cases by which the epoch was chosen.
    """

    def __init__(
        self,
        best: BestEpoch,
        *,
        classes: Mapping[str, int],
        training: Sequence[Mapping[str, Any]],
        validation: Sequence[Mapping[str, Any]],
    ) -> None:
        self.best, self.num_validation = best, len(validation)
        counts = class_counts(validation, classes)
        self.most_frequent = max(counts, key=lambda name: counts[name])
        self.chance = counts[self.most_frequent] / len(validation)
        self.held_out = {case["image"] for case in training}.isdisjoint(case["image"] for case in validation)

    def __call__(self) -> dict[str, Any]:
        """``val_accuracy`` and ``val_loss`` of the best epoch, ``best_epoch``, ``num_validation``, ``held_out``,
        ``most_frequent`` (its class), ``most_frequent_share`` and ``curves``.
        """
        at = self.best.epoch - 1
        accuracy = self.best.curves["val_accuracy"][at]
        if rank() == 0:
            logger.info(
                f"epoch {self.best.epoch} is kept: validation accuracy {accuracy:.4f} (n {self.num_validation} images)"
            )
            if not self.held_out:
                logger.warning(
                    "the dataset has no validation images, so the accuracy is that on training images and says little; "
                    "prepare it with a share for validation in --splits"
                )
            if accuracy <= self.chance:
                logger.warning(
                    f"the expert is right on {accuracy:.1%} of the validation images, no more than if it always said "
                    f"{self.most_frequent!r} ({self.chance:.1%}): it has learned nothing that could steer or judge; "
                    "train longer, from ImageNet weights, or with another --learning_rate"
                )
        return {
            "val_accuracy": accuracy,
            "val_loss": self.best.curves["val_loss"][at],
            "best_epoch": self.best.epoch,
            "num_validation": self.num_validation,
            "held_out": self.held_out,
            "most_frequent": self.most_frequent,
            "most_frequent_share": self.chance,
            "curves": {key: list(curve) for key, curve in self.best.curves.items()},
        }


# Pictures and the choice


class ExpertPlot(LossPlot):
    """A :class:`LossPlot` whose table and picture, ``<name>_curves``, have the accuracies too.

    Args:
        output_dir: where both go.
        name: of what is trained.
        evaluator: the validator, which runs after each epoch.
        mlflow: the run.
    """

    def __init__(self, output_dir: str | Path, *, name: str, evaluator: Engine, mlflow: MLflowRun) -> None:
        super().__init__(output_dir, name=name, evaluator=evaluator, mlflow=mlflow, interval=1)
        self.table = Path(output_dir) / f"{name}_curves.csv"
        self.picture = self.table.with_suffix(".png")

    def _draw(self, names: Iterable[str]) -> None:
        figure = new_figure(10, 4)
        names = list(names)
        for axes, kind in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for name in names:
                if name.endswith(f"_{kind}"):
                    axes.plot([line["epoch"] for line in self.lines], [line[name] for line in self.lines], label=name)
            _epoch_axes(axes, kind)
        write_bytes(self.picture, png(figure, dpi=100))


def read_experts(ckpt_dir: str | Path, fingerprint: str | None = None) -> dict[str, dict[str, Any]]:
    """Contract and report of each expert of a folder by its file's name; files that are none are left out, with a word.

    Args:
        ckpt_dir: folder of ``expert_*.pt``.
        fingerprint: of the dataset that experts must have been trained on; None takes any.
    """
    found = {}
    for path in sorted(Path(ckpt_dir).expanduser().glob(EXPERTS)):
        try:
            content = load_file(path, stage=STAGE)
        except UserError as error:
            reason: str | None = str(error)
        else:
            report = content.get("report") or {}
            reason = None
            if "curves" not in report:
                reason = "it has no record of its validation accuracy"
            elif fingerprint is not None and content["contract"]["dataset"]["fingerprint"] != fingerprint:
                reason = f"it was trained on another dataset, {content['contract']['dataset']['name']}"
        if reason is None:
            found[path.name] = {"contract": content["contract"], "report": report}
        else:
            logger.warning(f"{path} is left out of the experts: {reason}")
    return found


def best_expert(ckpt_dir: str | Path, fingerprint: str | None = None) -> str:
    """Path of the expert of highest validation accuracy; of equal ones the first by name.

    Args:
        ckpt_dir: see :func:`read_experts`.
        fingerprint: see :func:`read_experts`.

    Raises:
        UserError: there is none.
    """
    experts = read_experts(ckpt_dir, fingerprint)
    if not experts:
        of_data = "" if fingerprint is None else " of this dataset"
        raise UserError(f"{ckpt_dir} holds no expert{of_data} ({EXPERTS}); train one first with {_COMMAND}")
    return str(Path(ckpt_dir) / _best(experts))


def compare_experts(
    ckpt_dir: str | Path, output_dir: str | Path, fingerprint: str | None = None, *, mlflow: MLflowRun | None = None
) -> None:
    """Write ``experts.png``, the validation accuracy per epoch of every expert (Fig 2), and log which is the best.

    Args:
        ckpt_dir: see :func:`read_experts`.
        output_dir: where the picture goes.
        fingerprint: see :func:`read_experts`.
        mlflow: the run, which gets the picture.
    """
    if rank():
        return
    experts = read_experts(ckpt_dir, fingerprint)
    if not experts:
        logger.warning(f"no {EXPERTS} in {ckpt_dir}, so there is nothing to compare")
        return
    picture = Path(output_dir) / "experts.png"
    make_folder(picture.parent, "output_dir")
    write_bytes(picture, png(experts_figure(experts), dpi=100))
    if mlflow is not None:
        mlflow.log_file(picture)
    best = _best(experts)
    others = [f"{name} {entry['report']['val_accuracy']:.4f}" for name, entry in experts.items() if name != best]
    report = experts[best]["report"]
    logger.info(
        f"best expert: {Path(ckpt_dir) / best}, validation accuracy {report['val_accuracy']:.4f} in epoch "
        f"{report['best_epoch']} (n {report['num_validation']} images){'; ' if others else ''}{', '.join(others)}"
    )


def experts_figure(experts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Validation accuracy per epoch, a line for each expert, whose best epoch is marked.

    Args:
        experts: of :func:`read_experts`.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for name, entry in experts.items():
        report = entry["report"]
        curve, best = report["curves"]["val_accuracy"], report["best_epoch"]
        label = f"{name.removeprefix('expert_').removesuffix('.pt')}: {report['val_accuracy']:.3f} in epoch {best}"
        axes.plot(range(1, len(curve) + 1), curve, marker="o", markevery=[best - 1], label=label)
    axes.set_ylim(0, 1.02)
    _epoch_axes(axes, "validation accuracy")
    return figure


def _best(experts: Mapping[str, Mapping[str, Any]]) -> str:
    return max(sorted(experts), key=lambda name: experts[name]["report"]["val_accuracy"])


def _epoch_axes(axes: Axes, what: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="epoch", ylabel=what)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()

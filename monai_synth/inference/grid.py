# SPDX-License-Identifier: Apache-2.0
"""Sample grids during training: the same cases and seeds every time, so that progress can be seen."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_synth.data.class_images import ClassImages
from monai_synth.data.joint import split_joint, to_image, to_label
from monai_synth.data.slices import slice_preprocessing
from monai_synth.inference.classes import ClassInferer
from monai_synth.inference.joint import JointInferer
from monai_synth.inference.lsdm import LSDMInferer
from monai_synth.inference.spade_gan import SPADEGANInferer
from monai_synth.training.handlers import MLflowRun, rank
from monai_synth.training.latents import LatentCache
from monai_synth.training.pictures import colour_label, middle_picture, picture_grid, to_uint8

logger = logging.getLogger(__name__)

Rows = list[list[np.ndarray]]


class GridHandler(ABC):
    """Draws a sheet of samples every ``interval`` epochs and at the end, and records it in MLflow.

    Args:
        network: the network to sample from, the EMA usually.
        mlflow: the run.
        output_dir: the sheets are ``output_dir/samples/epoch_NNNN.png`` and ``output_dir/samples.png``.
        interval: epochs between two sheets.
        num_samples: columns.
        device: where to sample.
        seed: seeds are ``seed``, ``seed + 1``, ...
    """

    rows_are = ""  # what the rows show, from top to bottom

    def __init__(
        self,
        network: nn.Module,
        mlflow: MLflowRun,
        *,
        output_dir: str | Path,
        interval: int,
        num_samples: int,
        device: str,
        seed: int = 0,
    ) -> None:
        self.network = network
        self.mlflow = mlflow
        self.output_dir = Path(output_dir)
        self.interval = interval
        self.num_samples = num_samples
        self.device = device
        self.seeds = [seed + i for i in range(num_samples)]

    def attach(self, engine: Engine) -> None:
        if rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    @abstractmethod
    def rows(self) -> Rows:
        """Sample, and give the pictures row by row."""

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % self.interval and epoch != engine.state.max_epochs:
            return
        training = self.network.training
        self.network.eval()
        rows = self.rows()
        self.network.train(training)
        path = picture_grid(rows, self.output_dir / "samples" / f"epoch_{epoch:04d}.png")
        self.mlflow.log_file(path, "samples")
        if epoch == engine.state.max_epochs:
            final = picture_grid(rows, self.output_dir / "samples.png")
            logger.info(f"wrote {final}: {self.rows_are} from top to bottom")


@dataclass(frozen=True)
class SliceCases:
    """Cases of a split and the size to which their slices and maps are brought."""

    cases: Sequence[Mapping[str, Any]]
    image_size: Sequence[int]

    def __len__(self) -> int:
        return len(self.cases)


class SampleGrid(GridHandler):
    """Map above sample above real slice.

    Args:
        caches: where the maps come from; the first that has cases. A list of cases and the size of its slices is
            enough, see :class:`SliceCases`.
        inferer: samples images from maps.
        network: see :class:`GridHandler`, as all others.
        mlflow: the run.
        options: the options of :class:`GridHandler`.
    """

    rows_are = "maps, samples and real slices"

    def __init__(
        self,
        caches: Sequence[LatentCache | SliceCases],
        inferer: LSDMInferer | SPADEGANInferer,
        network: nn.Module,
        mlflow: MLflowRun,
        **options: Any,
    ) -> None:
        super().__init__(network, mlflow, **options)
        self.cache = next((c for c in caches if len(c)), caches[0])
        self.inferer = inferer

    def _cases(self) -> list[dict]:
        """Evenly spaced cases, those with nodules first."""
        cases = [c for c in self.cache.cases if c.get("nodules")] or self.cache.cases
        n = min(self.num_samples, len(cases))
        return [cases[i * len(cases) // n] for i in range(n)]

    def rows(self) -> Rows:
        transform = slice_preprocessing(self.cache.image_size, num_labels=self.inferer.num_labels)
        items = [transform(case) for case in self._cases()]
        label = torch.stack([item["label"] for item in items]).to(self.device)
        images = self.inferer(label, self.network, seeds=self.seeds[: len(items)])
        return [
            [colour_label(item["label"]) for item in items],
            [to_uint8(image) for image in images],
            [to_uint8(item["image"]) for item in items],
        ]


class PairGrid(GridHandler):
    """Sampled images above their sampled labels; the middle slice where they are volumes.

    Args:
        inferer: samples the joint variable.
        contract: of the model: ``image_size``, ``image_channels``, ``labels``, ``value_range``.
        network: see :class:`GridHandler`, as all others.
        mlflow: the run.
        options: the options of :class:`GridHandler`.
    """

    rows_are = "sampled images and their labels"

    def __init__(
        self,
        inferer: JointInferer,
        contract: Mapping[str, Any],
        network: nn.Module,
        mlflow: MLflowRun,
        **options: Any,
    ) -> None:
        super().__init__(network, mlflow, **options)
        self.inferer = inferer
        self.contract = contract

    def rows(self) -> Rows:
        channels = self.contract["image_channels"] + len(self.contract["labels"]) - 1
        nothing = torch.zeros(self.num_samples, channels, *self.contract["image_size"], device=self.device)
        x_0 = self.inferer(nothing, self.network, is_known=None, seeds=self.seeds)["x_0"]
        image, label = split_joint(x_0, self.contract["image_channels"])
        images = to_image(image, self.contract["value_range"])
        labels = to_label(label, self.contract["value_range"]).long()
        labels = (labels * (255 // (len(self.contract["labels"]) - 1))).to(torch.uint8)
        return [_pictures(images), _pictures(labels[:, None])]


class ClassGrid(GridHandler):
    """A row of samples for each class, the same seeds in every row; below them real images where asked for.

    Args:
        inferer: samples images of classes.
        classes: name -> number.
        real: images of which the first of each class are shown below; None shows none.
        network: see :class:`GridHandler`, as all others.
        mlflow: the run.
        options: the options of :class:`GridHandler`.
    """

    def __init__(
        self,
        inferer: ClassInferer,
        classes: Mapping[str, int],
        network: nn.Module,
        mlflow: MLflowRun,
        real: ClassImages | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, mlflow, **options)
        self.inferer = inferer
        self.classes = dict(classes)
        self.real = real
        names = ", ".join(self.classes)
        self.rows_are = f"samples of {names}" + (f", and real images of {names}," if real is not None else "")

    def rows(self) -> Rows:
        labels = torch.tensor([number for number in self.classes.values() for _ in self.seeds], device=self.device)
        x_0 = self.inferer(labels, self.network, seeds=self.seeds * len(self.classes))
        images = to_image(x_0, self.inferer.value_range).view(len(self.classes), len(self.seeds), *x_0.shape[1:])
        rows = [_pictures(row) for row in images]
        if self.real is not None:
            for number in self.classes.values():
                members = (self.real.classes == number).nonzero().flatten().tolist()
                rows.append(_pictures(self.real.__getitems__(members[: self.num_samples])["image"]))
        return rows


def _pictures(images: torch.Tensor) -> Sequence[np.ndarray]:
    return [middle_picture(image.cpu().numpy()) for image in images]

# SPDX-License-Identifier: Apache-2.0
"""Sample grids during training: the same maps and seeds every time, so that progress can be seen."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import nn

from monai_synth.data.slices import slice_preprocessing
from monai_synth.inference.lsdm import LSDMInferer
from monai_synth.training.handlers import MLflowRun, rank
from monai_synth.training.latents import LatentCache
from monai_synth.training.pictures import colour_label, picture_grid, to_uint8

logger = logging.getLogger(__name__)


class SampleGrid:
    """Draws map above sample above real slice, every ``interval`` epochs and at the end, and records it in MLflow.

    Args:
        caches: where the maps come from; the first that has cases.
        inferer: samples images from maps.
        network: the network to sample from, the EMA usually.
        mlflow: the run.
        output_dir: the sheets are ``output_dir/samples/epoch_NNNN.png`` and ``output_dir/samples.png``.
        interval: epochs between two sheets.
        num_samples: columns.
        device: where to sample.
        seed: seeds are ``seed``, ``seed + 1``, ...
    """

    def __init__(
        self,
        caches: list[LatentCache],
        inferer: LSDMInferer,
        network: nn.Module,
        mlflow: MLflowRun,
        *,
        output_dir: str | Path,
        interval: int,
        num_samples: int,
        device: str,
        seed: int = 0,
    ) -> None:
        self.cache = next((c for c in caches if len(c)), caches[0])
        self.inferer = inferer
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

    def _cases(self) -> list[dict]:
        """Evenly spaced cases, those with nodules first."""
        cases = [c for c in self.cache.cases if c.get("nodules")] or self.cache.cases
        n = min(self.num_samples, len(cases))
        return [cases[i * len(cases) // n] for i in range(n)]

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch % self.interval and epoch != engine.state.max_epochs:
            return
        transform = slice_preprocessing(self.cache.image_size, num_labels=self.inferer.codec.num_labels)
        items = [transform(case) for case in self._cases()]
        label = torch.stack([item["label"] for item in items]).to(self.device)
        training = self.network.training
        self.network.eval()
        images = self.inferer(label, self.network, seeds=self.seeds[: len(items)])
        self.network.train(training)
        rows = [
            [colour_label(item["label"]) for item in items],
            [to_uint8(image) for image in images],
            [to_uint8(item["image"]) for item in items],
        ]
        path = picture_grid(rows, self.output_dir / "samples" / f"epoch_{epoch:04d}.png")
        self.mlflow.log_file(path, "samples")
        if epoch == engine.state.max_epochs:
            final = picture_grid(rows, self.output_dir / "samples.png")
            logger.info(f"wrote {final}: maps, samples and real slices from top to bottom")

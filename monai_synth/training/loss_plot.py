# SPDX-License-Identifier: Apache-2.0
"""The losses of a training as a table and a picture, which go on where a resumed training left them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from ignite.engine import Engine, Events

from monai_synth.atomic import write_bytes
from monai_synth.figures import new_figure, png
from monai_synth.training.handlers import MLflowRun, rank


class LossPlot:
    """After each epoch a line of ``<name>_loss.csv``; every ``interval`` epochs and at the end ``<name>_loss.png``.

    Args:
        output_dir: where both go.
        name: of what is trained.
        evaluator: the validator; its metrics are validation losses.
        mlflow: the run, which gets both files.
        interval: epochs between two pictures, and between two validations.
        scale: of the picture's losses: "log", or "symlog" where they may be negative.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        name: str,
        evaluator: Engine,
        mlflow: MLflowRun,
        interval: int,
        scale: str = "log",
    ) -> None:
        self.table = Path(output_dir) / f"{name}_loss.csv"
        self.picture = self.table.with_suffix(".png")
        self.evaluator, self.mlflow, self.interval, self.scale = evaluator, mlflow, interval, scale
        self.lines: list[dict[str, float]] = []

    def attach(self, engine: Engine) -> None:
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self._go_on)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _go_on(self, engine: Engine) -> None:
        """Take the lines of the epochs that a resumed training has behind it."""
        self.lines = []
        if engine.state.epoch and self.table.is_file():
            lines = csv.DictReader(io.StringIO(self.table.read_text(encoding="utf-8")))
            read = [{key: float(value) for key, value in line.items() if value} for line in lines]
            self.lines = [line for line in read if line["epoch"] <= engine.state.epoch]

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        shown = {k: float(torch.as_tensor(v)) for k, v in engine.state.metrics.items()}
        if epoch % self.interval == 0:
            shown |= {k: float(torch.as_tensor(v)) for k, v in self.evaluator.state.metrics.items()}
        self.lines.append({"epoch": epoch} | shown)
        names = list(dict.fromkeys(key for line in self.lines for key in line))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.lines)
        self.table.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.table, buffer.getvalue().encode())
        if epoch % self.interval == 0 or epoch == engine.state.max_epochs:
            self._draw(names[1:])
            self.mlflow.log_file(self.table)
            self.mlflow.log_file(self.picture)

    def _draw(self, names: list[str]) -> None:
        from matplotlib.ticker import MaxNLocator, ScalarFormatter

        figure = new_figure(7, 4)
        axes = figure.subplots()
        for name in names:
            points = [(line["epoch"], line[name]) for line in self.lines if name in line]
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set(xlabel="epoch", ylabel="loss", yscale=self.scale)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
        axes.legend()
        write_bytes(self.picture, png(figure, dpi=100))

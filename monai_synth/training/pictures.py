# SPDX-License-Identifier: Apache-2.0
"""Pictures of a training, written beside it and recorded in MLflow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

from monai_synth.atomic import write_bytes
from monai_synth.training.handlers import MLflowRun, rank

# background, body, soft tissue, high dense, lung, benign, indeterminate and malignant nodule
LABEL_COLOURS = np.array(
    [
        [0, 0, 0],
        [90, 70, 60],
        [170, 90, 80],
        [240, 235, 215],
        [70, 120, 190],
        [90, 220, 90],
        [250, 200, 40],
        [240, 40, 40],
    ],
    dtype=np.uint8,
)


def to_uint8(image_pm1: torch.Tensor) -> np.ndarray:
    """[-1, 1] -> 0..255, clipped; the last two axes are kept, all others must be 1."""
    image = image_pm1.detach().float().cpu().reshape(image_pm1.shape[-2:])
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()


def colour_label(label: torch.Tensor) -> np.ndarray:
    """Label map (..., H, W) -> RGB (H, W, 3)."""
    return LABEL_COLOURS[label.detach().cpu().reshape(label.shape[-2:]).long().numpy()]


def middle_picture(image: np.ndarray) -> np.ndarray:
    """uint8 (C, *S) -> picture (H, W) or (H, W, 3); of a volume (X, Y, Z) the middle slice, as radiologists see it."""
    if image.ndim == 4:
        image = np.swapaxes(image[..., image.shape[-1] // 2], 1, 2)[:, ::-1]
    return np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]


def picture_grid(rows: Sequence[Sequence[np.ndarray]], path: str | Path, gap: int = 2) -> Path:
    """Write rows of equally large pictures, grey (H, W) or RGB (H, W, 3), as one PNG."""
    cells = [[np.repeat(c[..., None], 3, 2) if c.ndim == 2 else c for c in row] for row in rows]
    h, w = cells[0][0].shape[:2]
    width = max(len(row) for row in cells)
    sheet = np.full((len(cells) * (h + gap) - gap, width * (w + gap) - gap, 3), 255, np.uint8)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            sheet[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = cell
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.fromarray(sheet).save(content, format="PNG")
    write_bytes(path, content.getvalue())
    return path


class ValidationRecord:
    """After a validation, hand its metrics to MLflow and write a sheet of inputs above outputs.

    Args:
        evaluator: the validator; its last batch is drawn.
        mlflow: the run.
        output: path of the sheet; None where outputs are no pictures.
        interval: epochs between validations.
        num_pictures: columns at most.
    """

    def __init__(
        self,
        evaluator: Engine,
        mlflow: MLflowRun,
        interval: int,
        output: str | None = None,
        num_pictures: int = 6,
    ) -> None:
        self.evaluator = evaluator
        self.mlflow = mlflow
        self.interval = interval
        self.output = output
        self.num_pictures = num_pictures

    def attach(self, engine: Engine) -> None:
        if rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: Engine) -> None:
        metrics = {k: float(v) for k, v in self.evaluator.state.metrics.items()}
        if metrics:
            self.mlflow.log_metrics(metrics, step=engine.state.epoch)
        shown: Any = self.evaluator.state.output
        if self.output is None or not isinstance(shown, dict):
            return
        n = min(self.num_pictures, len(shown["pred"]))
        rows = [[to_uint8(shown[key][i, :1]) for i in range(n)] for key in ("label", "pred")]
        self.mlflow.log_file(picture_grid(rows, self.output))

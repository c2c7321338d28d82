# SPDX-License-Identifier: Apache-2.0
"""Writes what an evaluator samples, image by image, with its provenance."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events

from monai_synth.data.slices import NODULE_LABEL_MIN
from monai_synth.errors import UserError
from monai_synth.export.nnunet import NNUNetRawWriter
from monai_synth.export.provenance import ProvenanceWriter

logger = logging.getLogger(__name__)

LABEL_KINDS = ("semantic", "nodule")
IMAGE_FORMATS = {"png": (".png", "L"), "nii.gz": (".nii.gz", "CT")}


class SampleWriter(Protocol):
    """What a :class:`SampleExport` writes with, e.g. :class:`monai_synth.export.nnunet.NNUNetRawWriter`."""

    path: Path
    provenance_path: Path

    def has(self, case_id: str) -> bool: ...

    def add(self, case_id: str, *content: Any, **options: Any) -> str: ...

    def cases(self) -> list[str]: ...

    def finish(self) -> Path: ...


class SampleExport(ABC):
    """Handler that writes each sample; a stopped run goes on where it stopped.

    Subclasses say by `write` how a batch becomes files.

    Args:
        writer: makes the writer, given ``overwrite``, ``resume`` and ``settings``.
        record: what every provenance line says: ``checkpoints``, ``sampler``, ``num_steps``, ``precision``,
            ``guidance``, ``settings``.
        settings: what else must be equal when the run is resumed.
        overwrite: replace an existing dataset.
        resume: go on with an existing dataset of the same settings.

    Raises:
        UserError: a dataset that is there and must not be touched, or settings that the writer refuses.
    """

    def __init__(
        self,
        writer: Callable[..., SampleWriter],
        *,
        record: Mapping[str, Any],
        settings: Mapping[str, Any],
        overwrite: bool,
        resume: bool,
    ) -> None:
        self.record = dict(record)
        self.distributed = dist.is_available() and dist.is_initialized()
        self.is_main = not self.distributed or dist.get_rank() == 0
        self._make_writer = partial(
            writer,
            overwrite=overwrite and self.is_main,
            resume=resume or not self.is_main,
            settings={**self.record, **settings},
        )

    @property
    def writer(self) -> SampleWriter:
        """The writer; its folder is begun, or cleared, only now, after all settings of the run have been checked."""
        return self._opened[0]

    @property
    def provenance(self) -> ProvenanceWriter:
        """Writer of the lines."""
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[SampleWriter, ProvenanceWriter]:
        # rank 0 clears and begins the folder, the others then go on with it
        if not self.is_main:
            dist.barrier()
        try:
            writer = self._make_writer()
            provenance = ProvenanceWriter(writer.provenance_path)
        except OSError as error:
            msg = f"cannot write to {error.filename} ({error.strerror}); give an --output_dir that can be written"
            raise UserError(msg) from error
        if self.distributed and self.is_main:
            dist.barrier()
        return writer, provenance

    def is_done(self, case_id: str) -> bool:
        """Whether the image of this id and its line are there."""
        return self.writer.has(case_id) and self.provenance.has(case_id)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.write)

    @abstractmethod
    def write(self, engine: Engine) -> None:
        """Write the batch that was just sampled."""

    def add(
        self,
        batch: Mapping[str, Any],
        i: int,
        *content: Any,
        filters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Write one sample of a batch and its provenance.

        Args:
            batch: with ``case_id``, ``seed`` and ``conditioning`` per sample.
            i: which sample.
            content: as the writer takes it after the case id.
            filters: decisions of the filters, for the provenance.
            options: of the writer.

        Raises:
            UserError: it cannot be written, or the writer refuses it.
        """
        try:
            self.writer.add(batch["case_id"][i], *content, **options)
            self.provenance.append(
                case_id=batch["case_id"][i],
                seed=batch["seed"][i],
                conditioning=batch["conditioning"][i],
                filters=filters,
                **self.record,
            )
        except OSError as error:
            raise self.no_room(batch["case_id"][i], error) from error

    def no_room(self, case_id: str, error: OSError) -> UserError:
        """What to say when a file cannot be written."""
        return UserError(
            f"cannot write {case_id} to {self.writer.path} ({error}); free some space, then start "
            "the same command again: finished images are kept"
        )

    def finish(self) -> Path:
        """Write ``dataset.json`` once all processes are done."""
        if self.distributed:
            dist.barrier()
        if self.is_main:
            self.writer.finish()
            logger.info(f"{self.writer.path} holds {len(self.writer.cases())} labelled images")
        return self.writer.path


class LabelledImageExport(SampleExport):
    """Handler that writes each sampled CT slice with its map.

    Args:
        output_dir: parent of ``DatasetNNN_Name``.
        dataset_id: nnU-Net's number, 1 to 999.
        dataset_name: nnU-Net's name.
        labels: label table of the model.
        intensity: ``min`` and ``max`` HU of the image range.
        image_format: ``png`` (8-bit window) or ``nii.gz`` (HU).
        label_kind: ``semantic`` (all labels) or ``nodule`` (background and nodule).
        record: what every provenance line says: ``checkpoints``, ``sampler``, ``num_steps``, ``guidance``,
            ``settings``.
        overwrite: replace an existing dataset.
        resume: go on with an existing dataset of the same settings.

    Raises:
        UserError: unknown format or kind, or a dataset that is there and must not be touched.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        dataset_id: int,
        dataset_name: str,
        labels: Mapping[str, int],
        intensity: Mapping[str, Any],
        record: Mapping[str, Any],
        image_format: str = "png",
        label_kind: str = "semantic",
        overwrite: bool = False,
        resume: bool = True,
    ) -> None:
        if image_format not in IMAGE_FORMATS:
            raise UserError(f"image_format is {image_format!r}; allowed are {', '.join(IMAGE_FORMATS)}")
        if label_kind not in LABEL_KINDS:
            raise UserError(f"label_kind is {label_kind!r}; allowed are {', '.join(LABEL_KINDS)}")
        file_ending, channel = IMAGE_FORMATS[image_format]
        self.as_hu = image_format == "nii.gz"
        self.label_kind = label_kind
        self.intensity = dict(intensity)
        super().__init__(
            partial(
                NNUNetRawWriter,
                output_dir,
                dataset_id=dataset_id,
                name=dataset_name,
                channel_names=[channel],
                labels=dict(labels) if label_kind == "semantic" else {"background": 0, "nodule": 1},
                file_ending=file_ending,
            ),
            record=record,
            settings={"label_kind": label_kind},
            overwrite=overwrite,
            resume=resume,
        )

    def write(self, engine: Engine) -> None:
        """Write the batch that was just sampled."""
        batch = engine.state.batch
        for i, image in enumerate(engine.state.output["pred"]):
            label = batch["label"][i, 0].cpu().numpy()
            if self.label_kind == "nodule":
                label = (label >= NODULE_LABEL_MIN).astype(np.uint8)
            self.add(batch, i, self._pixels(image), label, spacing=batch["spacing"][i])

    def _pixels(self, image_pm1: torch.Tensor) -> np.ndarray:
        """(1, H, W) in [-1, 1] -> 8-bit grey values, or HU as int16."""
        unit = (image_pm1[0].detach().float().cpu().clamp(-1, 1).numpy() + 1) / 2
        if not self.as_hu:
            return np.round(unit * 255).astype(np.uint8)
        low, high = float(self.intensity["min"]), float(self.intensity["max"])
        return np.round(low + unit * (high - low)).astype(np.int16)

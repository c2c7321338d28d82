# SPDX-License-Identifier: Apache-2.0
"""Writes sampled pairs of image and label as an nnU-Net raw dataset; refuses bad pairs and has them made again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine

from monai_synth.atomic import write_bytes, write_json
from monai_synth.data.joint import check_value_range, split_joint, to_image, to_label
from monai_synth.errors import UserError
from monai_synth.export.encode import checked_spacing, encode
from monai_synth.export.handler import SampleExport
from monai_synth.export.nnunet import NNUNetRawWriter, sanitize_case_id
from monai_synth.export.provenance import iter_provenance
from monai_synth.export.subsets import subset_size, write_ratio_subsets
from monai_synth.inference.pairs import PairSamplingDataset

logger = logging.getLogger(__name__)

FILTERS = {"min_foreground": 0.0, "max_foreground": 1.0}
FILTERED = (None, "region")  # conditions under which the model makes the mask that is trained on
MOST_ATTEMPTS = 256  # more would reach the seeds of an ensemble's members
DEFAULT_SAMPLES = 32


class PairExport(SampleExport):
    """Handler that writes each sampled pair, or counts it as refused; a stopped run goes on where it stopped.

    Where the model makes the mask (whole pairs and regions), a mask that is empty or covers everything is always
    refused, and one outside ``filters`` too. :func:`sample_pairs` has refused pairs made again.

    Args:
        output_dir: parent of ``DatasetNNN_Name``.
        dataset_id: nnU-Net's number, 1 to 999.
        dataset_name: nnU-Net's name.
        labels: name -> value of the model.
        channel_names: of the model's images; "CT" becomes "L" in PNG, which holds no HU.
        value_range: of the model.
        image_channels: of the model.
        record: what every provenance line says: ``checkpoints``, ``sampler``, ``num_steps``, ``precision``,
            ``settings``.
        file_ending: ``.png`` for 2-D, ``.nii.gz`` for 3-D.
        filters: ``min_foreground`` and ``max_foreground``, shares of the pixels that are not background.
        max_attempts: seeds that a pair is tried with.
        ratios: percents of ``num_real``; for each, a dataset of so many pairs is written beside the whole one.
        num_real: cases of the real training set.
        keep_ensemble: write mean and standard deviation of the label channels where an ensemble segmented given
            images, as 8-bit share of the value range (``ensemble/<case>_mean.png`` and ``_std.png``; with several
            labels ``_mean_1.png`` and so on).
        condition: see `monai_synth.inference.pairs.PairSamplingDataset`.
        overwrite: replace an existing dataset.
        resume: go on with an existing dataset of the same settings.

    Attributes:
        refused: ids of the pairs that were refused since the last `begin_pass`.

    Raises:
        UserError: filters, attempts or ratios that make no sense, or a dataset that is there and must not be
            touched.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        dataset_id: int,
        dataset_name: str,
        labels: Mapping[str, int],
        channel_names: Sequence[str],
        value_range: Sequence[float],
        image_channels: int,
        record: Mapping[str, Any],
        file_ending: str = ".png",
        filters: Mapping[str, float] | None = None,
        max_attempts: int = 10,
        ratios: Sequence[int] | None = None,
        num_real: int | None = None,
        keep_ensemble: bool = True,
        condition: str | None = None,
        overwrite: bool = False,
        resume: bool = True,
    ) -> None:
        self.filters = check_filters(filters) if condition in FILTERED else {}
        if (
            isinstance(max_attempts, bool)
            or not isinstance(max_attempts, int)
            or not 1 <= max_attempts <= MOST_ATTEMPTS
        ):
            raise UserError(f"max_attempts is {max_attempts!r}; allowed are integers from 1 to {MOST_ATTEMPTS}")
        num_samples_for(ratios, num_real)  # refuse wrong ratios before any work
        self.max_attempts = max_attempts
        self.ratios = list(ratios or [])
        self.num_real = num_real
        self.dataset_id = dataset_id
        self.value_range = check_value_range(value_range)
        self.image_channels = int(image_channels)
        self.keep_ensemble = keep_ensemble and condition == "image"
        self.refused: list[str] = []
        self._num_made = 0
        self._reasons: dict[str, list[dict[str, Any]]] = {}
        png = file_ending == ".png"
        super().__init__(
            partial(
                NNUNetRawWriter,
                output_dir,
                dataset_id=dataset_id,
                name=dataset_name,
                channel_names=["L" if png and name.casefold() == "ct" else name for name in channel_names],
                labels=labels,
                file_ending=file_ending,
            ),
            record=record,
            settings={"condition": condition, "filters": self.filters},
            overwrite=overwrite,
            resume=resume,
        )

    def begin_pass(self) -> None:
        """Forget which pairs the last pass over the dataset refused; their reasons are kept."""
        self.refused = []

    def write(self, engine: Engine) -> None:
        """Write the pairs of the batch that was just sampled, but for those that are refused."""
        batch, pred = engine.state.batch, engine.state.output["pred"]
        image_part, label_part = split_joint(pred["x_0"].detach().cpu(), self.image_channels)
        images = to_image(image_part, self.value_range).numpy()
        labels = to_label(label_part, self.value_range).numpy()
        self._num_made += len(images)
        for i, case in enumerate(batch["case_id"]):
            share = float((labels[i] > 0).mean())
            reason = refusal(share, self.filters) if self.filters else None
            if reason is not None:
                self.refused.append(case)
                self._reasons.setdefault(case, []).append({"seed": batch["seed"][i], "reason": reason})
                continue
            if self.keep_ensemble and pred["std"] is not None:
                self._write_ensemble(case, label_part[i], pred["std"][i, self.image_channels :], batch["spacing"][i])
            image = images[i, 0] if self.image_channels == 1 else np.moveaxis(images[i], 0, -1)
            spacing = batch["spacing"][i]
            self.add(batch, i, image, labels[i], spacing=spacing, filters=self._decision(case, share))

    def _decision(self, case: str, share: float) -> dict[str, Any]:
        """What the provenance of a kept pair says about the filters."""
        if not self.filters:
            return {}
        return {
            "foreground": {"share": share, "kept": True, **self.filters},
            "refused": self._reasons.get(case, []),
        }

    def _write_ensemble(self, case: str, mean: torch.Tensor, std: torch.Tensor, spacing: Sequence[float]) -> None:
        """Mean and spread of the label channels (K - 1, *S), as 8-bit shares of the value range."""
        low, high = self.value_range
        folder = self.writer.path / "ensemble"
        folder.mkdir(exist_ok=True)
        safe, ending = sanitize_case_id(case), self.writer.file_ending
        for kind, values in (("mean", (mean - low) / (high - low)), ("std", std.detach().cpu() / (high - low))):
            for k, channel in enumerate((values.float() * 255).round().clamp(0, 255).to(torch.uint8).numpy(), start=1):
                name = f"{safe}_{kind}{ending}" if len(values) == 1 else f"{safe}_{kind}_{k}{ending}"
                mm = checked_spacing(safe, spacing, num_dims=channel.ndim)
                try:
                    write_bytes(folder / name, encode(channel, file_ending=ending, spacing=mm))
                except OSError as error:
                    raise self.no_room(case, error) from error

    def require_all(self, waiting: Sequence[str]) -> None:
        """Refuse to end a run of which pairs are still missing after the last attempt; all processes end together.

        Args:
            waiting: ids of the missing pairs of this process.

        Raises:
            UserError: there are some; with the rate of each reason and what to change.
        """
        given = [refusal["reason"] for refusals in self._reasons.values() for refusal in refusals]
        own = (list(waiting), given, self._num_made)
        shares = [own]
        if self.distributed:
            shares = [own] * dist.get_world_size()
            dist.all_gather_object(shares, own)
        missing = [case for share in shares for case in share[0]]
        if not missing:
            return
        reasons = Counter(reason for share in shares for reason in share[1])
        num_made = sum(share[2] for share in shares)
        rates = ", ".join(f"{name} {100 * count / num_made:.0f} %" for name, count in reasons.most_common())
        msg = (
            f"{len(missing)} pairs were refused {self.max_attempts} times each (e.g. {missing[0]}). Refused were, of "
            f"{num_made} pairs made: {rates}. Look at the training's sample grids and train longer, widen "
            f"--filters {self.filters}, or raise --max_attempts; finished pairs are kept"
        )
        raise UserError(msg)

    def finish(self) -> Path:
        """Write ``dataset.json``, the count of refusals and the ratio subsets once all processes are done."""
        path = super().finish()
        if not self.is_main:
            return path
        if self.filters:
            summary = refusal_summary(path, self.filters)
            write_json(path / "filters.json", summary)
            logger.info(f"filters refused {summary['num_refused']} of {summary['num_sampled']} pairs: {summary}")
        if self.ratios:
            parts = write_ratio_subsets(
                path,
                path.parent,
                ratios=self.ratios,
                num_real=self.num_real,
                first_id=self.dataset_id + 1,
                name=self.writer.name,
            )
            logger.info(f"wrote {', '.join(part.name for part in parts)} beside it")
        return path


def check_filters(filters: Mapping[str, float] | None) -> dict[str, float]:
    """The filters with their defaults.

    Raises:
        UserError: an unknown filter, or no shares that leave something between them.
    """
    unknown = sorted(set(filters or {}) - set(FILTERS))
    if unknown:
        raise UserError(f"unknown filter {unknown[0]!r}; allowed are {', '.join(FILTERS)}")
    out = FILTERS | dict(filters or {})
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in out.values())
    if not numbers or not 0 <= out["min_foreground"] < out["max_foreground"] <= 1:
        raise UserError(f"filters are {out}; give shares of the pixels, 0 <= min_foreground < max_foreground <= 1")
    return {name: float(value) for name, value in out.items()}


def refusal(share: float, filters: Mapping[str, float]) -> str | None:
    """Why a pair with this share of foreground is refused; None if it is kept."""
    if share in (0.0, 1.0):
        return "empty" if share == 0.0 else "full"
    if share < filters["min_foreground"]:
        return "min_foreground"
    return "max_foreground" if share > filters["max_foreground"] else None


def refusal_summary(dataset: Path, filters: Mapping[str, float]) -> dict[str, Any]:
    """How many pairs were refused on the way to those of a dataset, by its provenance.

    Returns:
        ``filters``, ``num_kept``, ``num_refused``, ``num_sampled``, ``refusal_rate`` and ``reasons``.
    """
    kept, reasons = 0, Counter[str]()
    for line in iter_provenance(dataset / "provenance.jsonl"):
        kept += 1
        reasons.update(given["reason"] for given in line["filters"]["refused"])
    refused = reasons.total()
    return {
        "filters": dict(filters),
        "num_kept": kept,
        "num_refused": refused,
        "num_sampled": kept + refused,
        "refusal_rate": refused / (kept + refused),
        "reasons": dict(sorted(reasons.items())),
    }


def num_samples_for(ratios: Sequence[int] | None, num_real: int | None) -> int:
    """Pairs that the largest ratio needs; without ratios a few to look at.

    Args:
        ratios: percents of the real training set.
        num_real: cases of the real training set.

    Raises:
        UserError: see `monai_synth.export.subsets.subset_size`.
    """
    if not ratios:
        return DEFAULT_SAMPLES
    if num_real is None:
        raise UserError("ratios are given, but not how many real training cases 100 % are; give num_real")
    return max(subset_size(ratio, num_real) for ratio in ratios)


def sample_pairs(dataset: PairSamplingDataset, evaluator: Engine, export: PairExport) -> None:
    """Sample what is not there yet, and sample refused pairs again with their next seeds.

    Args:
        dataset: what to sample.
        evaluator: samples the dataset's batches; ``export`` is one of its handlers.
        export: writes or refuses.

    Raises:
        UserError: fewer pairs are asked for than the ratios need, or pairs were refused ``export.max_attempts`` times.
    """
    needed = num_samples_for(export.ratios, export.num_real) if export.ratios else 0
    if needed > max(dataset.num_samples, len(export.writer.cases())):
        msg = (
            f"ratios {export.ratios} of {export.num_real} real training cases need {needed} pairs, num_samples is "
            f"{dataset.num_samples}; give --num_samples {needed}, or leave it out, or choose smaller ratios"
        )
        raise UserError(msg)
    if not len(dataset):
        logger.info("all pairs that were asked for are there already; raise --num_samples for more")
    for _ in range(export.max_attempts):
        if not len(dataset):
            break
        logger.info(f"sampling {len(dataset)} pairs")
        export.begin_pass()
        evaluator.state.epoch_length = len(evaluator.data_loader)
        evaluator.run()
        dataset.retry(export.refused)
    export.require_all([item["case_id"] for item in dataset.data])

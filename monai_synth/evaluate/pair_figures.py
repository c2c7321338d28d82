# SPDX-License-Identifier: Apache-2.0
"""Figures of sampled pairs: grids, nearest training samples, samples of one mask (JDM thesis, Fig 5.1 to 5.3).

They are drawn from a written nnU-Net dataset, so that they can be drawn again at any time. Real images are shown only
where that is asked for. Of volumes the middle slice is drawn.
"""

from __future__ import annotations

import colorsys
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.atomic import write_json
from monai_synth.data.datalist import SPLITS, PreparedDataset, read_dataset
from monai_synth.data.pair_files import read_image, read_label, resize_image, resize_label
from monai_synth.errors import UserError
from monai_synth.evaluate.mutual_information import nearest_by_mutual_information
from monai_synth.export.provenance import iter_provenance
from monai_synth.training.handlers import rank
from monai_synth.training.pictures import middle_picture, picture_grid

logger = logging.getLogger(__name__)

COLUMNS = 8  # of the grid of pairs
NEAREST_SHOWN = 8  # rows of the nearest training samples
SEEDS_SHOWN = 4  # samples of one mask, as in Fig 5.3
CELL = 128  # smaller pictures are enlarged by whole factors up to this side


@dataclass(frozen=True)
class WrittenPairs:
    """A finished nnU-Net raw dataset of `monai_synth.export.pairs.PairExport`.

    Attributes:
        path: its folder.
        cases: case ids, sorted.
        labels: name -> value.
        num_channels: C.
        file_ending: ".png" or ".nii.gz".
    """

    path: Path
    cases: list[str]
    labels: dict[str, int]
    num_channels: int
    file_ending: str

    def image(self, case: str) -> np.ndarray:
        """uint8 (C, *S)."""
        files = 1 if self.file_ending == ".png" else self.num_channels
        names = [f"{case}_{channel:04d}{self.file_ending}" for channel in range(files)]
        return np.concatenate([read_image(self.path / "imagesTr" / name) for name in names])

    def label(self, case: str) -> np.ndarray:
        """uint8 (*S)."""
        return read_label(self.path / "labelsTr" / f"{case}{self.file_ending}")


def open_pairs(folder: str | Path) -> WrittenPairs:
    """Read the head of a written dataset.

    Raises:
        UserError: it is not there or not finished.
    """
    folder = Path(folder)
    try:
        head = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        ending = head["file_ending"]
        labels, channels = dict(head["labels"]), len(head["channel_names"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{folder} is no finished nnU-Net raw dataset ({error}); let the run that samples it end first"
        raise UserError(msg) from error
    cases = sorted(path.name[: -len(ending)] for path in (folder / "labelsTr").glob(f"[!.]*{ending}"))
    return WrittenPairs(folder, cases, labels, channels, ending)


def write_pair_figures(
    dataset_folder: str | Path,
    *,
    out: str | Path,
    num: int = 16,
    real: str | Path | None = None,
    show_real: bool = False,
    condition: str | None = None,
    seed: int = 0,
) -> list[Path]:
    """Draw what a dataset of sampled pairs looks like; only the first of several processes does.

    ``pairs.png`` has images above masks above images with the masks' outlines. ``nearest.png`` (with ``show_real``)
    has, for the first of them, synthetic image and mask beside the training image and mask of the highest mutual
    information; ``nearest.json`` names those of all drawn pairs with the value. ``masks.png`` (for ``condition``
    "mask") has, per row, a given mask, the image it comes from (with ``show_real``), and images sampled for it.

    Args:
        dataset_folder: nnU-Net raw dataset that the sampling wrote.
        out: folder for the figures.
        num: pairs to draw; chosen by ``seed``.
        real: prepared dataset that the model was trained on.
        show_real: draw real images; for conditions "image" and "region" nothing is drawn without it, since what is
            written there holds real images.
        condition: what the pairs were sampled under.
        seed: of the choice.

    Returns:
        The figures' files.

    Raises:
        UserError: the dataset is not finished, or ``num`` is below 1, or ``real`` has other labels or channels.
    """
    if rank() != 0:
        return []
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise UserError(f"num is {num!r}; give how many pairs to draw, from 1")
    if condition in ("image", "region") and not show_real:
        logger.info(
            f"no figures: pairs of condition {condition!r} hold real images; give --show_real True to draw them"
        )
        return []
    pairs, out = open_pairs(dataset_folder), Path(out)
    if not pairs.cases:
        raise UserError(f"{dataset_folder} has no case; sample pairs first")
    chosen = _choose(pairs.cases, num, seed)
    files = [_draw_pairs(pairs, chosen, out)]
    dataset = read_dataset(real, task="pairs") if real is not None and show_real else None
    if dataset is not None:
        files.append(_draw_nearest(pairs, chosen, dataset, out))
    if condition == "mask":
        files.append(_draw_masks(pairs, num, seed, dataset, out))
    logger.info(f"wrote {', '.join(path.name for path in files)} in {out}")
    return files


def _choose(names: Sequence[str], num: int, seed: int) -> list[str]:
    """At most ``num`` of the names, by the seed, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(names))[:num]
    return [names[i] for i in sorted(chosen)]


# The figures


def _draw_pairs(pairs: WrittenPairs, cases: Sequence[str], out: Path) -> Path:
    """Fig 5.1: blocks of three rows, image, mask and outline."""
    rows = []
    for first in range(0, len(cases), COLUMNS):
        drawn = [(pairs.image(case), pairs.label(case)) for case in cases[first : first + COLUMNS]]
        rows.append([picture(image) for image, _ in drawn])
        rows.append([label_picture(label, len(pairs.labels)) for _, label in drawn])
        rows.append([outlined(image, label, len(pairs.labels)) for image, label in drawn])
    return picture_grid(rows, out / "pairs.png")


def _draw_nearest(pairs: WrittenPairs, cases: Sequence[str], real: PreparedDataset, out: Path) -> Path:
    """Fig 5.2: synthetic image and mask, and the training image and mask of the highest mutual information."""
    if (real.labels, real.content["image_channels"]) != (pairs.labels, pairs.num_channels):
        msg = (
            f"{real.root} has labels {real.labels} and {real.content['image_channels']} channel(s), {pairs.path} has "
            f"{pairs.labels} and {pairs.num_channels}; give the dataset that the model was trained on"
        )
        raise UserError(msg)
    labels = [pairs.label(case) for case in cases]
    size, num_labels = labels[0].shape, len(pairs.labels)
    known = real.datalist("training")
    maps = [resize_label(read_label(entry["label"]), size, num_labels) for entry in known]
    references = np.stack(maps) if maps else np.empty((0, *size), np.uint8)
    index, value = nearest_by_mutual_information(np.stack(labels), references, num_labels)
    rows, table = [], []
    for case, label, i, mi in zip(cases, labels, index, value, strict=True):
        image = resize_image(read_image(known[i]["image"]), size)
        rows.append(
            [
                picture(pairs.image(case)), label_picture(label, num_labels),
                picture(image), label_picture(references[i], num_labels),
            ]
        )  # fmt: skip
        table.append({"case_id": case, "nearest": known[i]["case_id"], "mutual_information": round(float(mi), 6)})
    path = picture_grid(rows[:NEAREST_SHOWN], out / "nearest.png")
    write_json(out / "nearest.json", table)
    return path


def _draw_masks(pairs: WrittenPairs, num: int, seed: int, real: PreparedDataset | None, out: Path) -> Path:
    """Fig 5.3: a given mask, the real image of it, and samples for it."""
    lines = iter_provenance(pairs.path / "provenance.jsonl")
    samples: dict[str, list[str]] = {}
    for _, source, case in sorted((line["seed"], line["conditioning"]["case"], line["case_id"]) for line in lines):
        samples.setdefault(source, []).append(case)
    images = _real_images(real)
    rows = []
    for source in _choose(sorted(samples), num, seed):
        shown = samples[source][:SEEDS_SHOWN]
        label = pairs.label(shown[0])
        row = [label_picture(label, len(pairs.labels))]
        if images:
            file = images.get(source)
            blank = np.full((pairs.num_channels, *label.shape), 255, np.uint8)
            row.append(picture(blank if file is None else resize_image(read_image(file), label.shape)))
        rows.append(row + [picture(pairs.image(case)) for case in shown])
    return picture_grid(rows, out / "masks.png")


def _real_images(real: PreparedDataset | None) -> dict[str, str]:
    """Image files of all splits by case id."""
    if real is None:
        return {}
    entries: list[Mapping[str, Any]] = [entry for split in SPLITS for entry in real.datalist(split)]
    return {entry["case_id"]: entry["image"] for entry in entries}


# Pictures


def picture(image: np.ndarray) -> np.ndarray:
    """uint8 (C, *S) -> (H, W), or (H, W, 3) for three channels; of other numbers of channels the first."""
    return _enlarged(middle_picture(image))


def label_picture(label: np.ndarray, num_labels: int) -> np.ndarray:
    """Label map (*S) -> (H, W, 3): black background, one colour per label, white where there is only one."""
    colours = label_colours(num_labels) if num_labels > 2 else np.array([[0] * 3, [255] * 3], np.uint8)
    return colours[_enlarged(middle_picture(label[None]))]


def outlined(image: np.ndarray, label: np.ndarray, num_labels: int) -> np.ndarray:
    """The picture of an image (C, *S) with the outlines of a label map (*S), each in the label's colour."""
    drawn = picture(image)
    drawn = np.repeat(drawn[..., None], 3, axis=2) if drawn.ndim == 2 else drawn.copy()
    flat = _enlarged(middle_picture(label[None]))
    framed = np.pad(flat, 1, mode="edge")
    edge = np.zeros(flat.shape, bool)
    for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edge |= flat != framed[rows : rows + flat.shape[0], columns : columns + flat.shape[1]]
    edge &= flat > 0
    drawn[edge] = label_colours(num_labels)[flat[edge]]
    return drawn


def label_colours(num_labels: int) -> np.ndarray:
    """uint8 (K, 3): black, then hues a golden angle apart from green on, so that neighbours differ for any K."""
    hues = [(1 / 3 + k * 0.381966) % 1 for k in range(num_labels - 1)]
    colours = [(0.0, 0.0, 0.0), *(colorsys.hsv_to_rgb(hue, 0.85, 1.0) for hue in hues)]
    return np.round(255 * np.array(colours)).astype(np.uint8)


def _enlarged(flat: np.ndarray) -> np.ndarray:
    factor = max(1, CELL // max(flat.shape[:2]))
    return flat.repeat(factor, axis=0).repeat(factor, axis=1)

# SPDX-License-Identifier: Apache-2.0
"""The pictures of a fidelity report: strips of images, bars with intervals, histograms of HU and of masks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from monai_synth.evaluate.fidelity_sets import AnySet, CaseImages
from monai_synth.evaluate.fidelity_text import label_of
from monai_synth.evaluate.image_sets import NAMES
from monai_synth.evaluate.mask_fidelity import STATISTICS
from monai_synth.figures import new_figure, png

COLOURS = {"synthetic": "#c8651b", "real_train": "#7a8a99", "real_test": "#34495e", "control": "#b9a3c9"}
_COLUMNS, _LEAST, _MOST = 12, 72, 128  # pictures in a row, pixels of each
_OUTLINES = np.asarray([[255, 214, 0], [0, 200, 255], [255, 80, 80], [120, 230, 90], [220, 120, 255]], np.uint8)
_HU_STEP = 2 * 1824 / 255  # two of the 256 steps that prepared slices keep; else a curve of them is a comb
_CLASSES = 16  # at most in one page


def strips(image_set: AnySet) -> dict[str, bytes]:
    """PNG of the first images of each class of a set, by class; with the outlines of their masks where they have."""
    readers = image_set.readers()
    pictures = {}
    for name in sorted(set(image_set.labels))[:_CLASSES]:
        cells = []
        for i in image_set.of_class(name)[:_COLUMNS]:
            cell = _cell(readers[i]())
            cells.append(cell)
            label = image_set.cases.label(int(i)) if isinstance(image_set, CaseImages) else None
            if label is not None:
                cells.append(outlined(cell, np.where(np.isin(label, _drawn(image_set.cases.labels)), label, 0)))
        pictures[name] = row_png(cells, per_row=_COLUMNS)
    return pictures


def _drawn(labels: Mapping[str, int]) -> list[int]:
    """Values of the labels whose outlines are drawn: all of few, of many those that are looked for."""
    found = [value for name, value in labels.items() if value]
    wanted = [value for name, value in labels.items() if "nodule" in name or name == "lung"]
    return (wanted or found) if len(found) > 3 else found or list(range(1, 256))


def _cell(image: np.ndarray) -> np.ndarray:
    """uint8 (C, H, W) -> (h, w, 3) of a size that is seen."""
    rgb = np.moveaxis(np.repeat(image, 3 // len(image), axis=0), 0, -1)
    height, width = rgb.shape[:2]
    factor = -(-_LEAST // height) if height < _LEAST else min(1, _MOST / height)
    if factor == 1:
        return rgb
    resample = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).resize(size, resample))


def outlined(cell: np.ndarray, label: np.ndarray, colour: int | None = None) -> np.ndarray:
    """A picture (h, w, 3) with the outline of each label of a map (H, W)."""
    zoom = Image.fromarray(label).resize(cell.shape[1::-1], Image.Resampling.NEAREST)
    label = np.asarray(zoom)
    out = cell.copy()
    for value in np.unique(label[label > 0]):
        mask = label == value
        out[mask & ~ndimage.binary_erosion(mask)] = _OUTLINES[(value - 1 if colour is None else colour) % 5]
    return out


def row_png(cells: Sequence[np.ndarray], *, per_row: int) -> bytes:
    """Pictures of one size (h, w, 3) side by side, in as many rows as they need."""
    height, width = cells[0].shape[:2]
    gap = max(2, width // 14)
    rows = -(-len(cells) // per_row)
    sheet = np.full((rows * (height + gap) - gap, min(per_row, len(cells)) * (width + gap) - gap, 3), 255, np.uint8)
    for k, cell in enumerate(cells):
        top, left = (k // per_row) * (height + gap), (k % per_row) * (width + gap)
        sheet[top : top + height, left : left + width] = cell
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG")
    return buffer.getvalue()


def consistency_png(found: Mapping[str, np.ndarray]) -> bytes:
    """Synthetic images from the worst to the best: as they are, and with the given mask and the one that was found."""
    plain = [_cell(image) for image in found["images"]]
    drawn = [
        outlined(outlined(cell, mask, 0), seen, 1)
        for cell, mask, seen in zip(plain, found["masks"], found["found"], strict=True)
    ]
    return row_png([*plain, *drawn], per_row=len(plain))


def neighbours_png(entries: Sequence[Mapping[str, Any]], extractor: str) -> bytes | None:
    """Precision, recall, density and coverage of each pair of sets, with intervals."""
    keys = ("precision", "recall", "density", "coverage")
    entries = [e for e in entries if e["metrics"].get(f"recall_{extractor}", {}).get("value") is not None]
    if not entries:
        return None
    figure = new_figure(9, 2.9)
    axes = figure.add_subplot()
    width = 0.8 / len(entries)
    for k, entry in enumerate(entries):
        numbers = [entry["metrics"][f"{key}_{extractor}"] for key in keys]
        x = np.arange(len(keys)) + (k - (len(entries) - 1) / 2) * width
        values = np.asarray([number["value"] for number in numbers])
        edges = np.asarray([number["ci"] or [number["value"]] * 2 for number in numbers])
        error = np.abs(np.stack([values - edges[:, 0], edges[:, 1] - values])).clip(0)
        axes.bar(x, values, width * 0.92, color=_colour(entry), label=label_of(entry))
        axes.errorbar(x, values, error, fmt="none", ecolor="#222222", elinewidth=1.2, capsize=2)
    axes.set_xticks(range(len(keys)), keys)
    axes.axhline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, max(1.1, axes.get_ylim()[1]))
    _tidy(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def _colour(entry: Mapping[str, Any]) -> str:
    if "control" in (entry["a"], entry["b"]):
        return COLOURS["control"]
    if entry["a"] == "real_train":
        return COLOURS["real_train"]
    return COLOURS["synthetic"] if entry["b"] == "real_train" else "#e8a87c"


def hu_png(found: Mapping[str, Any]) -> bytes:
    """Shares of HU of each set, whole and under each label, drawn in steps of 14 HU."""
    names = list(dict.fromkeys(name for histograms in found.values() for name in histograms.names))
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.4 * columns, 2.1 * rows + 0.3)
    for k, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, k + 1)
        low, high = np.inf, -np.inf
        for key, histograms in found.items():
            total = histograms.having(name)[0].sum(0, dtype=np.float64)
            if total.sum():
                levels = histograms.low + np.arange(len(total))
                edges = np.arange(levels[0] - _HU_STEP / 4, levels[-1] + _HU_STEP, _HU_STEP)
                whole = np.histogram(levels, edges, weights=total / total.sum() * 100)[0]
                x = edges[:-1] + _HU_STEP / 2
                axes.plot(x, whole, color=COLOURS[key], linewidth=1.3, label=NAMES[key])
                share = np.cumsum(total) / total.sum()
                low = min(low, histograms.low + np.searchsorted(share, 0.002))
                high = max(high, histograms.low + np.searchsorted(share, 0.998))
        axes.set_title(name.replace("_", " "), fontsize=9)
        if high > low:
            axes.set_xlim(low - 20, high + 20)
        axes.set_ylim(0)
        _tidy(axes)
        if k % columns == 0:
            axes.set_ylabel("% of pixels", fontsize=8)
        if k >= len(names) - columns:
            axes.set_xlabel("HU", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return png(figure)


def masks_png(found: Mapping[str, Any], name: str) -> bytes | None:
    """Histograms of area, number and shape of a label's objects in each set."""
    keys = [key for key in STATISTICS if any(len(s.values(name, key)) for s in found.values())]
    if not keys:
        return None
    figure = new_figure(2.05 * len(keys), 2.2)
    for k, key in enumerate(keys):
        axes = figure.add_subplot(1, len(keys), k + 1)
        values = {set_key: s.values(name, key) for set_key, s in found.items()}
        every = np.concatenate(list(values.values()))
        low, high = (0.0, 1.0) if key in ("eccentricity", "solidity") else (0.0, float(np.percentile(every, 99)) or 1.0)
        if key == "count":
            low, high = -0.5, float(np.ceil(high)) + 0.5
        bins = np.linspace(low, high, int(high - low) + 1 if key == "count" and high < 16 else 16)
        for set_key, v in values.items():
            if len(v):
                weights = np.full(len(v), 100 / len(v))
                v = v.clip(low, high)
                axes.hist(v, bins, weights=weights, histtype="step", linewidth=1.5, color=COLOURS[set_key])
                axes.plot([], [], color=COLOURS[set_key], label=NAMES[set_key])
        unit = STATISTICS[key][0]
        axes.set_title(key.replace("_", " ") + (f" ({unit})" if unit and unit != "objects" else ""), fontsize=7.5)
        _tidy(axes)
        if not k:
            axes.set_ylabel("% of images or objects", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return png(figure)


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)

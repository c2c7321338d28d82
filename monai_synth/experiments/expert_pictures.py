# SPDX-License-Identifier: Apache-2.0
"""Pictures of the expert experiment, in the form of the text's Figures 4 to 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_synth.experiments.expert_source import REAL
from monai_synth.figures import new_figure, png

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_REAL_COLOUR = "#999999"
_REAL_TEXT = "original"


def colours(arms: Sequence[str]) -> dict[str, str]:
    """A colour for each arm, and one for real images."""
    return {arm: _COLOURS[k % len(_COLOURS)] for k, arm in enumerate(arms)} | {REAL: _REAL_COLOUR}


def accuracy_png(content: Mapping[str, Any]) -> bytes:
    """Fig 4: accuracy of each seed as a box plot with a dotted mean line; beside it the differences to the baseline."""
    experts = content["experts"]
    compared = [arm for arm in content["arms"] if any(e["arms"].get(arm, {}).get("difference") for e in experts)]
    colour = colours(list(content["arms"]))
    widths = [1.0 + 0.75 * len(content["arms"])] + ([1.0 + 0.7 * len(compared)] if compared else [])
    figure = new_figure(1.3 * sum(widths) + 1.2, 3.3 * len(experts) + 0.2)
    grid = figure.subplots(len(experts), len(widths), squeeze=False, width_ratios=widths)
    for row, expert in zip(grid, experts, strict=True):
        arms = list(expert["arms"])
        _boxes(row[0], [_points(expert["arms"][arm]) for arm in arms], arms, [colour[arm] for arm in arms])
        row[0].set_ylabel("generation accuracy", fontsize=9)
        row[0].set_title(f"{expert['name']}, each seed", fontsize=9)
        chance = 1 / len(content["left"])
        row[0].axhline(chance, color="#888888", linewidth=0.8)
        beside = {"xycoords": ("axes fraction", "data"), "fontsize": 7, "va": "center", "ha": "left"}
        row[0].annotate("chance", (1.005, chance), **beside)
        real = next(iter(expert["real"].values()))["accuracy_left"]
        if real is not None:
            row[0].axhline(real, color="#888888", linewidth=0.8, linestyle="--")
            row[0].annotate("real", (1.005, real), **beside)
        if compared:
            found = [expert["arms"].get(arm, {}).get("difference") for arm in compared]
            _differences(row[1], found, compared, [colour[arm] for arm in compared])
            row[1].set_title(f"minus {content['baseline']}, same noise", fontsize=9)
    return png(figure)


def confusion_png(content: Mapping[str, Any], expert: Mapping[str, Any]) -> bytes:
    """Fig 5: what the images of each class (rows) are taken for (columns), for each arm and for real test images."""
    panels = [(arm, np.array(e["confusion"]), content["sampled"], content["left"]) for arm, e in expert["arms"].items()]
    real = next(iter(expert["real"].values()))
    every = list(content["classes"])
    panels.append((f"{_REAL_TEXT} test images", np.array(real["confusion"]), every, every))
    columns = min(len(panels), 2 if len(every) > 4 else 3)
    rows = -(-len(panels) // columns)
    side = 1.3 + 0.42 * len(every)
    figure = new_figure(columns * (side + 0.5), rows * side + 0.2)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (title, counts, truth, found) in zip(grid.flat, panels, strict=False):
        axes.set_axis_on()
        total = counts.sum(1, keepdims=True)
        share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto" if len(truth) < 3 else "equal")
        for (i, j), value in np.ndenumerate(share):
            shade = "white" if value > 0.5 else "#888888" if counts[i, j] == 0 else "black"
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=shade, fontsize=7)
        axes.set_xticks(range(len(found)), [_short(name) for name in found], fontsize=7, rotation=90)
        labels = [f"{_short(name)} (n={int(t)})" for name, t in zip(truth, total[:, 0], strict=True)]
        axes.set_yticks(range(len(truth)), labels, fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("taken for (% of the row)", fontsize=7)
    return png(figure)


def similarity_png(content: Mapping[str, Any]) -> bytes:
    """Fig 6: mean SSIM of the images of a class with each other, with its interval over seeds."""
    entries = content["similarity"]
    groups = [*content["sampled"], "all"] if len(content["sampled"]) > 1 else list(content["sampled"])
    colour = colours(list(content["arms"]))
    width = 0.8 / len(entries)
    figure = new_figure(min(13.0, 2.2 + 0.42 * len(groups) * max(2, len(entries))), 3.2)
    axes = figure.subplots()
    for k, (arm, entry) in enumerate(entries.items()):
        numbers = [entry["mean"] if name == "all" else entry["classes"][name] for name in groups]
        at = np.arange(len(groups)) + (k - (len(entries) - 1) / 2) * width
        values = np.array([number["value"] for number in numbers])
        ends = [_interval(number) or (v, v) for number, v in zip(numbers, values, strict=True)]
        reach = np.array([[v - low, high - v] for v, (low, high) in zip(values, ends, strict=True)]).T.clip(0)
        label = _REAL_TEXT if arm == REAL else arm
        axes.bar(at, values, width * 0.92, color=colour[arm], label=label, yerr=reach, capsize=2, ecolor="#333333")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(groups)), [_short(name) for name in groups], fontsize=8)
    axes.set_ylabel("mean SSIM of pairs", fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return png(figure)


def grid_png(grids: Mapping[str, np.ndarray], classes: Sequence[str]) -> bytes:
    """Figs 7 and 8: a row for each class, a block for each arm.

    Args:
        grids: uint8 (K', n, C, H, W) by arm.
        classes: K' names.
    """
    size = 0.72
    counts = [images.shape[1] for images in grids.values()]
    figure = new_figure(1.1 + size * sum(counts) + 0.25 * len(counts), size * len(classes) + 0.35)
    blocks = figure.subplots(1, len(grids), squeeze=False, width_ratios=counts)[0]
    for k, (axes, (arm, images)) in enumerate(zip(blocks, grids.items(), strict=True)):
        rows = [np.concatenate(list(np.pad(row, _GAP, constant_values=255)), axis=2) for row in images]
        sheet = np.moveaxis(np.concatenate(rows, axis=1), 0, -1)
        axes.imshow(sheet[..., 0] if sheet.shape[-1] == 1 else sheet, cmap="gray", vmin=0, vmax=255)
        axes.set_title(_REAL_TEXT if arm == REAL else arm, fontsize=9)
        step = images.shape[3] + 2
        names = [_short(name) for name in classes] if k == 0 else []
        axes.set_yticks([step * (i + 0.5) for i in range(len(names))], names, fontsize=8)
        axes.set_xticks([])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return png(figure, dpi=130)


_GAP = ((0, 0), (0, 0), (1, 1), (1, 1))  # white, in pixels


def _points(entry: Mapping[str, Any]) -> list[list[float]]:
    """Values by training, of each seed."""
    return [list(values) for values in zip(*entry["accuracy"]["per_seed"].values(), strict=True)]


def _boxes(axes: Any, values: Sequence[Sequence[Sequence[float]]], names: Sequence[str], shades: Sequence[str]) -> None:
    for k, (trainings, shade) in enumerate(zip(values, shades, strict=True)):
        flat = [value for training in trainings for value in training]
        axes.boxplot(
            [flat],
            positions=[k],
            widths=0.5,
            showmeans=True,
            meanline=True,
            showfliers=False,
            meanprops={"color": "black", "linestyle": ":", "linewidth": 1.4},
            medianprops={"color": shade, "linewidth": 1.6},
            boxprops={"color": shade},
            whiskerprops={"color": shade},
            capprops={"color": shade},
        )
        _scatter(axes, k, trainings, shade)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", labelsize=8)


def _scatter(axes: Any, at: float, trainings: Sequence[Sequence[float]], shade: str) -> None:
    """Points side by side where they are equal; each training has a marker of its own."""
    for t, values in enumerate(trainings):
        spread = np.linspace(-0.14, 0.14, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(at + spread, values, "osD^v"[t % 5], color=shade, markersize=3.2, alpha=0.7, linestyle="none")


def _differences(
    axes: Any, found: Sequence[Mapping[str, Any] | None], names: Sequence[str], shades: Sequence[str]
) -> None:
    axes.axhline(0, color="black", linewidth=0.8)
    for k, (entry, shade) in enumerate(zip(found, shades, strict=True)):
        if entry is None:
            continue
        number = entry["accuracy"]
        _scatter(axes, k - 0.12, _points(entry), shade)
        low, high = _interval(number) or (number["value"], number["value"])
        axes.plot([k + 0.25, k + 0.25], [low, high], color="black", linewidth=1.6)
        axes.plot([k + 0.25], [number["value"]], "_", color="black", markersize=10)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", labelsize=8)


def _interval(number: Mapping[str, Any]) -> Sequence[float] | None:
    """Over trainings and seeds where there are several trainings."""
    return number["ci_trainings"] or number["ci"]


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "."

# SPDX-License-Identifier: Apache-2.0
"""Pictures of the classifier experiment, in the form of the text's Figures 9 to 12."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_synth.data.pair_files import read_image
from monai_synth.experiments.classifier_sets import Source
from monai_synth.figures import new_figure, png

_COLUMNS = 10


def row_png(entry: Mapping[str, Any], classes: Sequence[str]) -> bytes:
    """Confusion matrix (mean over seeds) and the curves of every seed.

    Args:
        entry: of ``results`` in results.json.
        classes: names in their order.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9.5, 2.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.35, 1.35))
    counts = np.array(entry["confusion"])
    share = counts / counts.sum(1, keepdims=True)
    left.imshow(share, cmap="Blues", vmin=0, vmax=1)
    form = "{:.0f}" if entry["num_seeds"] == 1 else "{:.1f}"
    if len(classes) <= 10:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.5 else "black"
            left.text(
                j, i, form.format(count), ha="center", va="center", color=colour, fontsize=9 if len(classes) < 5 else 6
            )
    short = [name if len(name) <= 12 else name[:11] + "." for name in classes]
    size = 8 if len(classes) < 5 else 6
    left.set_xticks(range(len(classes)), short, fontsize=size, rotation=0 if len(classes) < 4 else 90)
    left.set_yticks(range(len(classes)), short, fontsize=size, rotation=90 if len(classes) < 4 else 0, va="center")
    left.set_xlabel("found", fontsize=8)
    left.set_ylabel("truth", fontsize=8)
    for axes, key in ((middle, "loss"), (right, "accuracy")):
        for seed, curves in entry["curves"].items():
            epochs = range(1, len(curves["train_loss"]) + 1)
            for part, colour in (("train", "tab:blue"), ("val", "tab:orange")):
                axes.plot(epochs, curves[f"{part}_{key}"], color=colour, linewidth=1.1, alpha=0.8)
            best = entry["best_epoch"][seed]
            axes.plot(best, curves[f"val_{key}"][best - 1], "o", color="tab:orange", markersize=4)
        axes.set_xlabel("epoch", fontsize=8)
        axes.set_title(key, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lines = [Line2D([], [], color="tab:blue"), Line2D([], [], color="tab:orange", marker="o", markersize=4)]
    right.legend(lines, ["training", "validation; chosen epoch"], fontsize=7, loc="lower right")
    return png(figure, dpi=90)


def hardest_png(source: Source, runs: Sequence[Mapping[str, Any]]) -> bytes | None:
    """Real test images of each class to which the classifiers gave the least probability, mean over all of them."""
    if not runs:
        return None
    truth = source.labels("test")
    given = np.mean([np.array(run["test"])[np.arange(len(truth)), truth] for run in runs], axis=0)
    figure = new_figure(10, 1.35 * len(source.classes) + 0.2)
    grid = figure.subplots(len(source.classes), _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for (name, k), line in zip(source.classes.items(), grid, strict=True):
        members = np.flatnonzero(truth == k)
        for axes, index in zip(line, members[np.argsort(given[members], kind="stable")][:_COLUMNS], strict=False):
            image = np.moveaxis(read_image(source.cases["test"][index]["image"]), 0, -1)
            axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
            axes.set_title(f"{name} {given[index]:.2f}", fontsize=7)
    return png(figure, dpi=100)

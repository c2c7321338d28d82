# SPDX-License-Identifier: Apache-2.0
"""Pictures of segmentations side by side, in the form of the text's Figure 5.6."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from monai_synth.data.pair_files import read_image, read_label
from monai_synth.figures import new_figure, png

MAX_ROWS = 4
LEAST_WINDOW = 128  # pixels shown around a box; of a large image the rest would hide what differs


def disagreement_png(
    cases: Sequence[Mapping[str, str]], first: Path, second: Path, *, num_labels: int, titles: Sequence[str]
) -> bytes:
    """Image, truth and two segmentations of the cases on which these differ most, as one PNG.

    Args:
        cases: with "original" and "label", the files of native size.
        first: folder with the predicted labels of one network.
        second: of another.
        num_labels: with the background.
        titles: of the four columns.
    """
    from matplotlib.patches import Rectangle

    def differing(case: Mapping[str, str]) -> float:
        name = Path(case["label"]).name
        return float((read_label(first / name) != read_label(second / name)).mean())

    chosen = sorted(cases, key=differing, reverse=True)[:MAX_ROWS]
    figure = new_figure(10, 2.6 * len(chosen))
    for row, case in zip(figure.subplots(len(chosen), 4, squeeze=False), chosen, strict=True):
        name = Path(case["label"]).name
        image = read_image(case["original"])
        maps = [read_label(path) for path in (case["label"], first / name, second / name)]
        box = disagreement_box(maps[1], maps[2])
        if image.ndim == 4:  # the slice through the middle of the box
            z = (box[-1].start + box[-1].stop) // 2 if box else image.shape[-1] // 2
            image, maps = image[..., z], [label[..., z] for label in maps]
        shown = np.moveaxis(image, 0, -1) if len(image) == 3 else image[0]
        row[0].imshow(shown, cmap="gray")
        for axes, label in zip(row[1:], maps, strict=True):
            axes.imshow(label, cmap="viridis", vmin=0, vmax=max(1, num_labels - 1), interpolation="nearest")
        for axes in row:
            axes.set_axis_off()
            if box:
                rows, columns = box[:2]
                corner = (columns.start - 1.5, rows.start - 1.5)
                size = (columns.stop - columns.start + 2, rows.stop - rows.start + 2)
                axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="red", linewidth=1.5))
                top, bottom = _window(rows, maps[0].shape[0])
                left, right = _window(columns, maps[0].shape[1])
                axes.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
    for axes, title in zip(figure.axes[:4], titles, strict=True):
        axes.set_title(title, fontsize=9)
    return png(figure, dpi=100)


def disagreement_box(first: np.ndarray, second: np.ndarray) -> tuple[slice, ...] | None:
    """Bounds of the largest connected region in which two label maps differ; None where they are equal."""
    parts, count = ndimage.label(first != second)
    if count == 0:
        return None
    largest = int(np.bincount(parts.ravel())[1:].argmax())
    return ndimage.find_objects(parts)[largest]


def _window(box: slice, length: int) -> tuple[int, int]:
    """What is shown along an axis: the box in the middle of a window, moved inside the image."""
    width = min(length, max(LEAST_WINDOW, 4 * (box.stop - box.start)))
    start = min(max((box.start + box.stop - width) // 2, 0), length - width)
    return start, start + width

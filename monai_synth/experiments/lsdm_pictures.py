# SPDX-License-Identifier: Apache-2.0
"""Pictures of the lung CT experiment, in the form of the text's Figures 5.1 to 5.9; real slices only where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from monai_synth.evaluate.hu_fidelity import crop_at
from monai_synth.experiments import lsdm_reconstruction as reconstruction
from monai_synth.experiments.lsdm_gradients import LABELS, View, as_rgb
from monai_synth.experiments.lsdm_sampling import Samples
from monai_synth.experiments.lsdm_source import Arm, Cases
from monai_synth.experiments.lsdm_sweeps import RATINGS, Sweeps
from monai_synth.figures import new_figure, png
from monai_synth.inference.guidance import MALIGNANCY
from monai_synth.inference.model import LSDMModel
from monai_synth.training.pictures import LABEL_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL = 1.45  # inches of a picture
_BOX = "#ff5533"
_ZOOM = 4  # how much smaller a zoomed part is than the slice, at most


class Pictures:
    """Collects PNGs by name.

    Args:
        show_real: real slices may be shown.
    """

    def __init__(self, show_real: bool) -> None:
        self.show_real = show_real
        self.found: dict[str, bytes] = {}

    def comparison(
        self, cases: Cases, indices: Sequence[int], arms: Sequence[Arm], samples: Samples, crop: int
    ) -> None:
        """Fig 5.2, 5.3 and 5.6: the same maps and noise for every arm; below each slice its nodule."""
        images = {arm.name: _chosen(samples, arm, cases, indices) for arm in arms}
        columns = ["label map", *(["real"] if self.show_real else []), *images]
        figure, grid = _sheet(2 * len(indices), len(columns))
        for row, i in enumerate(indices):
            item = cases.item(i)
            nodule = max(item["nodules"], key=lambda n: n.get("area", 0))
            side = _side(cases, crop)
            cells: list[np.ndarray] = [np.moveaxis(LABEL_COLOURS[item["label"][0].numpy()], -1, 0)]
            cells += [cases.real(i)[None]] if self.show_real else []
            cells += [found[i][None] for found in images.values()]
            for axes, below, cell, name in zip(grid[2 * row], grid[2 * row + 1], cells, columns, strict=True):
                _show(axes, cell)
                _box(axes, nodule["center"], side)
                _show(below, crop_at(cell, nodule["center"], side))
                if row == 0:
                    axes.set_title(name, fontsize=8)
        self.found["comparison"] = png(figure)

    def reconstruction(self, model: LSDMModel, cases: Cases, indices: Sequence[int]) -> None:
        """Fig 5.1: real slices and what the autoencoder keeps of them, with a part enlarged."""
        if not self.show_real:
            return
        figure, grid = _sheet(len(indices), 5)
        for row, (axes, i) in enumerate(zip(grid, indices, strict=True)):
            real = cases.real(i)
            made = reconstruction.reconstruct(model, real)
            center = max(cases.item(i)["nodules"], key=lambda n: n.get("area", 0))["center"]
            side = max(16, min(real.shape) // _ZOOM)
            change = np.abs(made.astype(int) - real).astype(float)
            parts = [real[None], made[None], crop_at(real[None], center, side), crop_at(made[None], center, side)]
            for cell, part in zip(axes, parts, strict=False):
                _show(cell, part)
            for cell in axes[:2]:
                _box(cell, center, side)
            axes[4].imshow(change, cmap="magma", vmin=0, vmax=25)
            if row == 0:
                titles = ("real", "reconstruction", "real, part", "reconstruction, part", "difference (0 to 25 of 255)")
                for cell, text in zip(axes, titles, strict=True):
                    cell.set_title(text, fontsize=8)
        self.found["reconstruction"] = png(figure)

    def image_gradients(self, rows: Sequence[Sequence[View]]) -> None:
        """Fig 5.4: x_t, and d log p / d x_t towards benign and malignant, at each timestep."""
        titles = ["x_t", *(f"towards {name}" for name in LABELS)]
        figure, grid = _sheet(len(rows) * len(titles), len(rows[0]))
        for number, views in enumerate(rows):
            block = grid[number * len(titles) : (number + 1) * len(titles)]
            for column, view in enumerate(views):
                _show(block[0][column], to_uint8(view.noisy)[None])
                _outline(block[0][column], view.inside)
                block[0][column].set_title(f"t = {view.t}, p(mal.) = {view.probability:.2f}", fontsize=7)
                for axes, name in zip(block[1:, column], LABELS, strict=True):
                    gradient = view.image[name]
                    reach = float(np.abs(gradient).max()) or 1.0
                    axes.imshow(gradient, cmap="RdBu_r", vmin=-reach, vmax=reach)
                    _outline(axes, view.inside)
            for axes, title in zip(block[:, 0], titles, strict=True):
                _side_title(axes, title)
        self.found["image_gradients"] = png(figure)

    def latent_gradients(self, rows: Sequence[Sequence[View]]) -> None:
        """Fig 5.5: what guidance adds to the latent, its first three channels as colours; grey is none."""
        figure, grid = _sheet(len(rows) * len(LABELS), len(rows[0]))
        for number, views in enumerate(rows):
            for k, name in enumerate(LABELS):
                for axes, view in zip(grid[number * len(LABELS) + k], views, strict=True):
                    axes.imshow(as_rgb(view.latent[name]))
                    if k == 0:
                        axes.set_title(f"t = {view.t}", fontsize=7)
                _side_title(grid[number * len(LABELS) + k][0], name)
        self.found["latent_gradients"] = png(figure)

    def scale_sweep(self, sweeps: Sweeps, crop: int) -> None:
        """Fig 5.8: a nodule with growing s, towards benign and malignant."""
        if not sweeps.scale_arms:
            return
        scales = list(dict.fromkeys(s for _, s in sweeps.scale_arms))
        labels = list(dict.fromkeys(label for label, _ in sweeps.scale_arms))
        rows = [(i, label) for i in sweeps.indices for label in labels]
        figure, grid = _sheet(len(rows), 1 + len(scales))
        for axes, (i, label) in zip(grid, rows, strict=True):
            arms = [sweeps.unguided, *(sweeps.scale_arms[label, s] for s in scales)]
            self._nodules(axes, sweeps, arms, i, crop)
            _side_title(axes[0], label)
        for axes, text in zip(grid[0], ["unguided", *(f"s = {s:g}" for s in scales)], strict=True):
            axes.set_title(text, fontsize=8)
        self.found["scale_sweep"] = png(figure)

    def feature_sweep(self, sweeps: Sweeps, crop: int) -> None:
        """Fig 5.7: a nodule with each value of each feature."""
        features = list(dict.fromkeys(feature for feature, _ in sweeps.feature_arms))
        if not features:
            return
        i = sweeps.indices[0]
        figure, grid = _sheet(len(features), 1 + len(RATINGS))
        for axes, feature in zip(grid, features, strict=True):
            found = {value: arm for (f, value), arm in sweeps.feature_arms.items() if f == feature}
            self._nodules(axes, sweeps, [sweeps.unguided, *found.values()], i, crop)
            names = ("benign", "malignant") if feature == MALIGNANCY else [f"{value:g}" for value in found]
            for cell, name in zip(axes, ["unguided", *names], strict=False):
                cell.set_title(name, fontsize=8)
            _side_title(axes[0], feature)
        self.found["feature_sweep"] = png(figure)

    def side_by_side(self, sweeps: Sweeps) -> None:
        """Fig 5.9: whole slices at the scale nearest to 8."""
        scales = sorted({s for _, s in sweeps.scale_arms}, key=lambda s: abs(s - 8))
        if not scales:
            return
        labels = list(dict.fromkeys(label for label, _ in sweeps.scale_arms))
        arms = [sweeps.unguided, *(sweeps.scale_arms[label, scales[0]] for label in labels)]
        figure, grid = _sheet(1, 3, cell=2.2)
        i = sweeps.indices[0]
        for axes, arm, text in zip(grid[0], arms, ["unguided", *labels], strict=True):
            _show(axes, sweeps.images(arm)[i][None])
            axes.set_title(text if arm is arms[0] else f"{text}, s = {scales[0]:g}", fontsize=8)
        self.found["side_by_side"] = png(figure)

    def convergence(self, found: dict[str, Any]) -> None:
        """Skill of each feature by band of timesteps."""
        shown = {f: e for f, e in found["features"].items() if e["skill"]}
        if not shown:
            return
        figure = new_figure(7.5, 3.4)
        axes = figure.subplots()
        x = np.arange(len(found["bands"]))
        for k, (feature, entry) in enumerate(shown.items()):
            values = [band["skill"]["value"] for band in entry["bands"]]
            style = "-" if entry["learned"] else ":"
            axes.plot(x, values, style, marker="o", markersize=3, color=f"C{k}", label=feature.replace("_", " "))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(x, [f"t {a} to {b}" for a, b in found["bands"]], fontsize=8)
        axes.set_ylabel("skill (0 is chance, 1 perfect)", fontsize=8)
        low = min(-0.2, axes.get_ylim()[0])
        axes.set_ylim(max(low, -1.5), 1.0)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        self.found["convergence"] = png(figure)

    def _nodules(self, axes: Sequence[Any], sweeps: Sweeps, arms: Sequence[Arm], index: int, crop: int) -> None:
        item = sweeps.cases.item(index)
        nodule = max(item["nodules"], key=lambda n: n.get("area", 0))
        side = _side(sweeps.cases, crop)
        for cell, arm in zip(axes, arms, strict=False):
            _show(cell, crop_at(sweeps.images(arm)[index][None], nodule["center"], side))


def to_uint8(image_pm1: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255, clipped."""
    return np.round((image_pm1.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def _side(cases: Cases, crop: int) -> int:
    """Of a zoomed part: the tables' crop, but never so large that it shows nearly the whole slice."""
    return min(crop, max(32, min(cases.model.image_size) // _ZOOM))


def _chosen(samples: Samples, arm: Arm, cases: Cases, indices: Sequence[int]) -> dict[int, np.ndarray]:
    return {i: image for i, image in samples.load(arm, 0, cases.indices) if i in indices}


def _sheet(rows: int, columns: int, cell: float = _CELL) -> tuple[Any, np.ndarray]:
    figure = new_figure(cell * columns + 0.35, cell * 1.06 * rows + 0.25)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        for edge in axes.spines.values():
            edge.set_visible(False)
    return figure, grid


def _show(axes: Axes, image: np.ndarray) -> None:
    """uint8 (1 or 3, H, W)."""
    axes.imshow(image[0] if len(image) == 1 else np.moveaxis(image, 0, -1), cmap="gray", vmin=0, vmax=255)


def _box(axes: Axes, center: Sequence[float], side: int) -> None:
    from matplotlib.patches import Rectangle

    row, column = (float(c) - side / 2 for c in center)
    axes.add_patch(Rectangle((column, row), side, side, fill=False, edgecolor=_BOX, linewidth=0.8))


def _outline(axes: Axes, inside: np.ndarray) -> None:
    if inside.any() and not inside.all():
        axes.contour(inside, levels=[0.5], colors="#229944", linewidths=0.7)


def _side_title(axes: Axes, text: str) -> None:
    axes.set_ylabel(text, fontsize=8)

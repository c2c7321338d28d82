# SPDX-License-Identifier: Apache-2.0
"""Pictures of the lung CT experiment, in the form of the text's Figures 5.1 to 5.9; real slices only where asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from monai_synth.data.semantic import MALIGNANCY
from monai_synth.evaluate.hu_fidelity import crop_at
from monai_synth.experiments import lsdm_reconstruction as reconstruction
from monai_synth.experiments.lsdm_gradients import LABELS, View, as_rgb
from monai_synth.experiments.lsdm_sampling import Samples
from monai_synth.experiments.lsdm_source import Arm, Cases
from monai_synth.experiments.lsdm_sweeps import RATINGS, Sweeps
from monai_synth.figures import new_figure, png
from monai_synth.inference.model import LSDMModel
from monai_synth.training.pictures import LABEL_COLOURS

_CELL = 1.45  # inches of a picture
_PIXELS, _GAP = 192, 6  # of a picture on the sheet, and between two
_BOX, _OUTLINE = "#ff5533", "#229944"
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
        sheet = _Sheet(["label map", *(["real"] if self.show_real else []), *images])
        side = _side(cases, crop)
        for i in indices:
            item = cases.item(i)
            center = _largest(item["nodules"])["center"]
            cells: list[np.ndarray] = [np.moveaxis(LABEL_COLOURS[item["label"][0].numpy()], -1, 0)]
            cells += [cases.real(i)[None]] if self.show_real else []
            cells += [found[i][None] for found in images.values()]
            sheet.row([_picture(cell) for cell in cells], box=(center, side))
            sheet.row([_picture(crop_at(cell, center, side)) for cell in cells])
        self.found["comparison"] = sheet.png()

    def reconstruction(self, model: LSDMModel, cases: Cases, indices: Sequence[int]) -> None:
        """Fig 5.1: real slices and what the autoencoder keeps of them, with a part enlarged."""
        if not self.show_real:
            return
        sheet = _Sheet(["real", "reconstruction", "real, part", "reconstruction, part", "difference, 0 to 25 of 255"])
        for i in indices:
            real = cases.real(i)
            made = reconstruction.reconstruct(model, real)
            center = _largest(cases.item(i)["nodules"])["center"]
            side = max(16, min(real.shape) // _ZOOM)
            parts = [crop_at(image[None], center, side) for image in (real, made)]
            change = _coloured(np.abs(made.astype(float) - real) / 25, "magma")
            sheet.row([*(_picture(x) for x in (real[None], made[None], *parts)), change], box=(center, side), boxed=2)
        self.found["reconstruction"] = sheet.png()

    def image_gradients(self, rows: Sequence[Sequence[View]]) -> None:
        """Fig 5.4: x_t, and d log p / d x_t towards benign and malignant, at each timestep."""
        sheet = _Sheet([f"t = {view.t}" for view in rows[0]])
        for views in rows:
            inside = [view.inside for view in views]
            sheet.row([_picture(to_uint8(view.noisy)[None]) for view in views], "x_t", outlines=inside)
            for name in LABELS:
                pictures = [_signed(view.image[name]) for view in views]
                sheet.row(pictures, f"to {name}", outlines=inside)
        self.found["image_gradients"] = sheet.png()

    def latent_gradients(self, rows: Sequence[Sequence[View]]) -> None:
        """Fig 5.5: what guidance adds to the latent, its first three channels as colours; grey is none."""
        sheet = _Sheet([f"t = {view.t}" for view in rows[0]])
        for views in rows:
            for name in LABELS:
                pictures = [np.round(255 * as_rgb(view.latent[name])).astype(np.uint8) for view in views]
                sheet.row(pictures, f"to {name}")
        self.found["latent_gradients"] = sheet.png()

    def scale_sweep(self, sweeps: Sweeps, crop: int) -> None:
        """Fig 5.8: a nodule with growing s, towards benign and malignant."""
        if not sweeps.scale_arms:
            return
        scales = list(dict.fromkeys(s for _, s in sweeps.scale_arms))
        labels = list(dict.fromkeys(label for label, _ in sweeps.scale_arms))
        sheet = _Sheet(["unguided", *(f"s = {s:g}" for s in scales)])
        for i in sweeps.indices:
            for label in labels:
                arms = [sweeps.unguided, *(sweeps.scale_arms[label, s] for s in scales)]
                sheet.row(self._nodules(sweeps, arms, i, crop), label)
        self.found["scale_sweep"] = sheet.png()

    def feature_sweep(self, sweeps: Sweeps, crop: int) -> None:
        """Fig 5.7: a nodule with each value of each feature."""
        features = list(dict.fromkeys(feature for feature, _ in sweeps.feature_arms))
        if not features:
            return
        sheet = _Sheet(["unguided", *(f"{value:g}" for value in RATINGS)])
        for feature in features:
            arms = [arm for (f, _), arm in sweeps.feature_arms.items() if f == feature]
            cells = self._nodules(sweeps, [sweeps.unguided, *arms], sweeps.indices[0], crop)
            if feature == MALIGNANCY:  # benign and malignant stand under the ends of the scale
                cells = [*cells[:2], *[np.full_like(cells[0], 255)] * (len(RATINGS) - 2), cells[2]]
            sheet.row(cells, feature)
        self.found["feature_sweep"] = sheet.png()

    def side_by_side(self, sweeps: Sweeps) -> None:
        """Fig 5.9: whole slices at the scale nearest to 8."""
        scales = sorted({s for _, s in sweeps.scale_arms}, key=lambda s: abs(s - 8))
        if not scales:
            return
        labels = list(dict.fromkeys(label for label, _ in sweeps.scale_arms))
        arms = [sweeps.unguided, *(sweeps.scale_arms[label, scales[0]] for label in labels)]
        sheet = _Sheet(["unguided", *(f"{label}, s = {scales[0]:g}" for label in labels)], cell=2.2)
        sheet.row([_picture(sweeps.images(arm)[sweeps.indices[0]][None]) for arm in arms])
        self.found["side_by_side"] = sheet.png()

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

    def _nodules(self, sweeps: Sweeps, arms: Sequence[Arm], index: int, crop: int) -> list[np.ndarray]:
        center = _largest(sweeps.cases.item(index)["nodules"])["center"]
        side = _side(sweeps.cases, crop)
        return [_picture(crop_at(sweeps.images(arm)[index][None], center, side)) for arm in arms]


class _Sheet:
    """Pictures in rows and columns, drawn as one: a plot for each of them would take a hundred times as long.

    Args:
        titles: of the columns.
        cell: inches of a picture.
    """

    def __init__(self, titles: Sequence[str], cell: float = _CELL) -> None:
        self.titles, self.cell = list(titles), cell
        self.rows: list[list[np.ndarray]] = []
        self.sides: list[str] = []
        self.boxes: list[tuple[float, float, float]] = []  # left, top, side in pixels of the sheet
        self.outlines: list[tuple[int, int, np.ndarray]] = []  # row, column, mask

    def row(
        self,
        pictures: Sequence[np.ndarray],
        side: str = "",
        *,
        box: tuple[Sequence[float], int] | None = None,
        boxed: int | None = None,
        outlines: Sequence[np.ndarray] = (),
    ) -> None:
        """Add a row of RGB pictures (H, W, 3), with a box (centre, side) in the first ``boxed``, or outlined masks."""
        number = len(self.rows)
        self.rows.append([_enlarged(picture) for picture in pictures])
        self.sides.append(side)
        if box is not None:
            for column, picture in enumerate(pictures[:boxed]):
                factor = _PIXELS / picture.shape[1]
                top, left = ((float(c) - box[1] / 2 + 0.5) * factor for c in box[0])
                pitch = _PIXELS + _GAP
                self.boxes.append((column * pitch + left, number * pitch + top, box[1] * factor))
        self.outlines += [(number, column, mask) for column, mask in enumerate(outlines)]

    def png(self) -> bytes:
        pitch, columns = _PIXELS + _GAP, len(self.titles)
        sheet = np.full((len(self.rows) * pitch - _GAP, columns * pitch - _GAP, 3), 255, np.uint8)
        for i, row in enumerate(self.rows):
            for j, picture in enumerate(row):
                sheet[i * pitch : i * pitch + _PIXELS, j * pitch : j * pitch + _PIXELS] = picture
        figure = new_figure(self.cell * columns + 0.5, self.cell * len(self.rows) + 0.4)
        axes = figure.subplots()
        axes.imshow(sheet, interpolation="antialiased")
        axes.set_axis_off()
        for j, title in enumerate(self.titles):
            axes.text(j * pitch + _PIXELS / 2, -6, title, ha="center", va="bottom", fontsize=8)
        for i, title in enumerate(self.sides):
            axes.text(-6, i * pitch + _PIXELS / 2, title, ha="right", va="center", rotation=90, fontsize=8)
        for left, top, side in self.boxes:
            x, y = [left, left + side, left + side, left, left], [top, top, top + side, top + side, top]
            axes.plot(x, y, color=_BOX, linewidth=0.8, scalex=False, scaley=False)
        for i, j, mask in self.outlines:
            if mask.any() and not mask.all():
                factor = _PIXELS / mask.shape[1]
                rows, across = ((np.arange(n) + 0.5) * factor for n in mask.shape)
                axes.contour(across + j * pitch, rows + i * pitch, mask, levels=[0.5], colors=_OUTLINE, linewidths=0.7)
        return png(figure)


def to_uint8(image_pm1: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255, clipped."""
    return np.round((image_pm1.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def _picture(image: np.ndarray) -> np.ndarray:
    """uint8 (1 or 3, H, W) -> (H, W, 3)."""
    return np.moveaxis(np.repeat(image, 3, axis=0) if len(image) == 1 else image, 0, -1)


def _enlarged(picture: np.ndarray) -> np.ndarray:
    how = Image.Resampling.NEAREST if picture.shape[1] < _PIXELS else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(np.ascontiguousarray(picture)).resize((_PIXELS, _PIXELS), how))


def _coloured(values: np.ndarray, colours: str) -> np.ndarray:
    """Values in [0, 1] -> RGB."""
    from matplotlib import colormaps

    return np.round(255 * colormaps[colours](values.clip(0, 1))[..., :3]).astype(np.uint8)


def _signed(gradient: np.ndarray) -> np.ndarray:
    """Red above 0, blue below, scaled by itself."""
    return _coloured(gradient / (2 * (float(np.abs(gradient).max()) or 1.0)) + 0.5, "RdBu_r")


def _largest(nodules: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(nodules, key=lambda nodule: nodule.get("area", 0))


def _side(cases: Cases, crop: int) -> int:
    """Of a zoomed part: the tables' crop, but never so large that it shows nearly the whole slice."""
    return min(crop, max(32, min(cases.model.image_size) // _ZOOM))


def _chosen(samples: Samples, arm: Arm, cases: Cases, indices: Sequence[int]) -> dict[int, np.ndarray]:
    return {i: image for i, image in samples.load(arm, 0, cases.indices) if i in indices}

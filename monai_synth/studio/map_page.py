# SPDX-License-Identifier: Apache-2.0
"""The part of a tab where a map is taken, uploaded, stamped and painted, and its resolution chosen."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np

from monai_synth.studio.canvas import from_text, map_canvas, to_text
from monai_synth.studio.jobs import Drawing
from monai_synth.studio.places import OTHER_SIZES, WHY_ONE_SIZE, Place
from monai_synth.studio.session import Session, Studio
from monai_synth.studio.shown import status, told
from monai_synth.studio.uploads import MAX_BYTES

MOST_CHOICES = 500  # maps of a dataset that are offered


def by(size: tuple[int, ...]) -> str:
    """A size in words."""
    return " x ".join(map(str, size))


def size_line(place: Place) -> str:
    """What is said of a model's resolution."""
    line = f"Images of {by(place.size)} pixels"
    if place.bundle in WHY_ONE_SIZE:
        return f"{line}, and of no other size: {WHY_ONE_SIZE[place.bundle]}."
    return f"{line}; other resolutions below."


class MapPart:
    """Controls of a map.

    Args:
        studio: models and sessions.
        place: the bundle.
    """

    def __init__(self, studio: Studio, place: Place) -> None:
        self.studio, self.place, self.bundle = studio, place, place.bundle
        names, largest = list(place.labels), max(2, max(place.size) // 2)
        if len(place.sizes) > 1:
            choices = [by(size) for size in place.sizes]
            self.size = gr.Dropdown(
                [(f"{choices[0]} (trained)", choices[0]), *((c, c) for c in choices[1:])], value=choices[0],
                label="Resolution (rows x columns)", elem_id=f"{self.bundle}-size",
                info=OTHER_SIZES.get(self.bundle),
            )  # fmt: skip
        with gr.Row() as self.row_of_map:
            with gr.Column(scale=1, min_width=280):
                cases = list(place.cases())[:MOST_CHOICES]
                if cases:
                    self.case = gr.Dropdown(cases, value=cases[0], label="Map of the dataset")
                    self.take = gr.Button("Take this map", elem_id=f"{self.bundle}-take")
                self.upload = gr.File(
                    label=f"Upload a map: PNG, NIfTI, up to {MAX_BYTES // 2**20} MB",
                    file_types=[".png", ".nii", ".gz"], type="filepath", height=160, elem_id=f"{self.bundle}-upload",
                )  # fmt: skip
                self.resize = gr.Checkbox(False, label="Resize what I upload to the resolution above")
                with gr.Accordion("Stamp: a disc by numbers", open=True):
                    self.label = gr.Dropdown(names, value=names[-1], label="Label")
                    middle = [(side - 1) // 2 for side in place.size]
                    self.row = gr.Slider(
                        0, place.size[0] - 1, value=middle[0], step=1, label="Row of the centre (0 is the top)"
                    )
                    self.column = gr.Slider(
                        0, place.size[1] - 1, value=middle[1], step=1, label="Column of the centre (0 is the left)"
                    )
                    self.diameter = gr.Slider(1, largest, value=max(2, largest // 8), step=1, label="Diameter (pixels)")
                    self.press = gr.Button("Stamp", elem_id=f"{self.bundle}-stamp")
                self.clear = gr.Button("Empty the map", elem_id=f"{self.bundle}-empty")
            with gr.Column(scale=2, min_width=280):
                blank = np.zeros(place.size, np.uint8)
                self.field = map_canvas(f"{self.bundle}-map", names, studio.colours(self.bundle), blank)
                self.line = gr.HTML(
                    status("The map is empty."), elem_classes="status", elem_id=f"{self.bundle}-map-status"
                )
        self._wire()

    def _wire(self) -> None:
        shown = [self.field, self.line]
        if len(self.place.sizes) > 1:
            sliders = [self.row, self.column, self.diameter]
            self.size.change(
                told(self._resize, 5, 1), [self.field, self.size], [*shown, *sliders], queue=False, api_name=False
            )
        if self.place.cases():
            self.take.click(told(self._take, 2, 1), [self.case], shown, api_name=False)
        self.upload.upload(told(self._upload, 2, 1), [self.upload, self.resize], shown, api_name=False)
        places = [self.field, self.label, self.row, self.column, self.diameter]
        self.press.click(told(self._stamp, 2, 1), places, shown, api_name=False)
        self.clear.click(told(self._empty, 2, 1), None, shown, api_name=False)

    def _session(self, request: gr.Request) -> Session:
        return self.studio.session(str(request.session_hash))

    def read(self, session: Session, drawn: str) -> Drawing:
        """Take what was painted.

        Raises:
            UserError: what the browser sent is no map.
        """
        label = from_text(drawn, self.studio.size(session, self.bundle), len(self.place.labels))
        return self.studio.take_drawn(session, self.bundle, label)

    def _shown(self, drawing: Drawing, text: str) -> tuple[str, str]:
        return to_text(drawing.label), status(text)

    def _resize(self, drawn: str, choice: str, request: gr.Request) -> tuple[Any, ...]:
        session = self._session(request)
        self.read(session, drawn)
        size = next((size for size in self.place.sizes if by(size) == choice), ())
        self.studio.take_size(session, self.bundle, size)
        rows, columns = (gr.update(maximum=side - 1, value=(side - 1) // 2) for side in size)
        shown = self._shown(self.studio.drawing(session, self.bundle), f"Images will have {choice} pixels.")
        return (*shown, rows, columns, gr.update(maximum=max(2, max(size) // 2)))

    def _take(self, name: str, request: gr.Request) -> tuple[str, str]:
        return self._shown(self.studio.take_case(self._session(request), self.bundle, name), f"Map of {name}.")

    def _upload(self, path: str, resize: bool, request: gr.Request) -> tuple[str, str]:
        drawing = self.studio.take_upload(self._session(request), self.bundle, path, resize=resize)
        return self._shown(drawing, "Your map was read.")

    def _stamp(
        self, drawn: str, label: str, row: float, column: float, diameter: float, request: gr.Request
    ) -> tuple[str, str]:
        session = self._session(request)
        self.read(session, drawn)
        drawing = self.studio.stamp(session, self.bundle, label, row=row, column=column, diameter=diameter)
        return self._shown(drawing, f"Stamped {label} at row {row:g}, column {column:g}.")

    def _empty(self, request: gr.Request) -> tuple[str, str]:
        session = self._session(request)
        session.drawings.pop(self.bundle, None)
        return self._shown(self.studio.drawing(session, self.bundle), "The map was emptied.")

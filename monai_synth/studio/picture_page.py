# SPDX-License-Identifier: Apache-2.0
"""The part of jdm's tab where an image is given whose mask is wanted."""

from __future__ import annotations

import gradio as gr
import numpy as np
from PIL import Image

from monai_synth.data.pair_files import channels_last
from monai_synth.studio import maps
from monai_synth.studio.map_page import MOST_CHOICES
from monai_synth.studio.places import Place
from monai_synth.studio.session import Studio
from monai_synth.studio.shown import status, told
from monai_synth.studio.uploads import MAX_BYTES


class PicturePart:
    """Controls of an image.

    Args:
        studio: models and sessions.
        place: the bundle.
    """

    def __init__(self, studio: Studio, place: Place) -> None:
        self.studio, self.bundle = studio, place.bundle
        cases = list(place.cases())[:MOST_CHOICES]
        with gr.Row(visible=False) as self.row:
            with gr.Column(scale=1, min_width=280):
                if cases:
                    case = gr.Dropdown(cases, value=cases[0], label="Image of the dataset")
                    take = gr.Button("Take this image", elem_id=f"{self.bundle}-take-image")
                upload = gr.File(
                    label=f"Upload an image: PNG, NIfTI, up to {MAX_BYTES // 2**20} MB",
                    file_types=[".png", ".nii", ".gz"], type="filepath", height=160,
                    elem_id=f"{self.bundle}-upload-image",
                )  # fmt: skip
                resize = gr.Checkbox(False, label="Resize what I upload to the resolution above")
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(
                    label="Image whose mask is wanted", type="pil", format="png", interactive=False, buttons=[],
                    sources=(), height=400, elem_id=f"{self.bundle}-image",
                )  # fmt: skip
                line = gr.HTML(
                    status("There is no image yet."), elem_classes="status", elem_id=f"{self.bundle}-image-status"
                )
        shown = [picture, line]
        if cases:
            take.click(told(self._take, 2, 1), [case], shown, api_name=False)
        upload.upload(told(self._upload, 2, 1), [upload, resize], shown, api_name=False)

    def _take(self, name: str, request: gr.Request) -> tuple[Image.Image, str]:
        session = self.studio.session(str(request.session_hash))
        return _shown(self.studio.take_case_picture(session, self.bundle, name), f"Image of {name}.")

    def _upload(self, path: str, resize: bool, request: gr.Request) -> tuple[Image.Image, str]:
        session = self.studio.session(str(request.session_hash))
        return _shown(self.studio.take_picture(session, self.bundle, path, resize=resize), "Your image was read.")


def _shown(image: np.ndarray, text: str) -> tuple[Image.Image, str]:
    return maps.enlarged(channels_last(image), 400), status(text)

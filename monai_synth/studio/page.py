# SPDX-License-Identifier: Apache-2.0
"""The page: a tab for each bundle with trained files, and one for readers. It decides what is where, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from monai_synth.data.semantic import FEATURES, MALIGNANCY
from monai_synth.errors import UserError
from monai_synth.precision import PRECISIONS
from monai_synth.studio import maps
from monai_synth.studio.jobs import MOST_AT_ONCE, MOST_GUIDANCE, MOST_IMAGES, MOST_SEED, Request
from monai_synth.studio.map_page import MapPart, size_line
from monai_synth.studio.picture_page import PicturePart
from monai_synth.studio.places import BUNDLES, Place
from monai_synth.studio.reader_page import reader_tab
from monai_synth.studio.runs import CancelledError, Run, write_zip
from monai_synth.studio.session import Session, Studio
from monai_synth.studio.shown import status, told

KEPT = (600, 86400)  # every 10 minutes, what was sent or shown a day ago is removed
CSS = """
.status p { font-size: 1rem; margin: 0.25rem 0; }
.status [role=alert] { border-left: 4px solid #dc2626; padding-left: 0.6rem; }
@media (min-width: 768px) {  /* the case beside what is chosen and answered; where there is little room, between them */
  #reading-parts { display: grid; grid-template: auto 1fr / minmax(280px, 1fr) 2fr; }
  #reading-case { grid-area: 1 / 2 / 3 / 3; }
}
.grid-wrap { max-height: none !important; }
button[role=tab][aria-selected=true] { color: var(--primary-700) !important; }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300) !important; }
*:focus-visible { outline: 3px solid #1d4ed8 !important; outline-offset: 1px; }
"""
# Words and their ground differ by a factor of 4.5 at least; some of Gradio's own colours do not.
COLOURS = {
    "block_info_text_color": "*neutral_600",
    "block_label_text_color": "*neutral_700",
    "block_title_text_color": "*neutral_700",
    "body_text_color_subdued": "*neutral_600",
    "input_placeholder_color": "*neutral_600",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_cancel_background_fill": "#b91c1c",
    "button_cancel_background_fill_hover": "#991b1b",
}
# what changes is read out to those who do not see it
LIVE = "() => document.querySelectorAll('.status').forEach(e => e.setAttribute('aria-live', 'polite'))"
NO_MODELS = """## No trained model is here yet

The studio shows each bundle whose training has left a `model.pt` in `bundles/NAME/models`. A demo model is trained on a
phantom that is computed first; nothing is downloaded. In a clone of the repository, in the folder that holds `bundles`:

```
{commands}
```

Each takes some minutes on a CPU (lsdm, with its autoencoder and classifiers, about 7 on two cores). Then start
`monai-synth studio` again there. Models elsewhere: `monai-synth studio --ckpt-dir lsdm=DIR`.
"""
DEMO = {
    "lung CT from label maps": "python -m monai.bundle run training --config_file bundles/lsdm/configs/train.json",
    "stained nuclei with masks": "python -m monai.bundle run training --config_file bundles/jdm/configs/train.json",
}


def theme() -> gr.themes.Base:
    """Colours and fonts; no font is loaded from elsewhere."""
    base = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return base.set(**COLOURS)


def build_page(studio: Studio) -> gr.Blocks:
    """The whole page.

    Args:
        studio: models and sessions.
    """
    with gr.Blocks(title="monai_synth studio", analytics_enabled=False, delete_cache=KEPT) as page:
        gr.Markdown("# monai_synth studio\nSynthetic images; not for diagnosis. Everything stays on this machine.")
        if not studio.places:
            gr.Markdown(NO_MODELS.format(commands="\n".join(f"# {name}\n{line}" for name, line in DEMO.items())))
        else:
            with gr.Tabs():
                for bundle, place in studio.places.items():
                    with gr.Tab(bundle, id=bundle):
                        gr.Markdown(f"{BUNDLES[bundle]}. {size_line(place)}")
                        if len(place.size) == 2:
                            BundleTab(studio, place)
                        else:
                            gr.Markdown("This model makes volumes; sample them by `python -m monai.bundle run`.")
                if any(place.labels and len(place.size) == 2 for place in studio.places.values()):
                    with gr.Tab("reader training", id="reading"):
                        reader_tab(studio)
        page.load(None, js=LIVE)
        page.unload(_leave(studio))
    return page


def _leave(studio: Studio) -> Callable[[gr.Request], None]:
    def leave(request: gr.Request) -> None:
        studio.close(str(request.session_hash))

    return leave


def _parts(what: str) -> tuple[Any, Any]:
    """Show the part that gives the model what it is to get."""
    return gr.update(visible=what == "map"), gr.update(visible=what == "image")


class BundleTab:
    """The controls of one bundle.

    Args:
        studio: models and sessions.
        place: the bundle.
    """

    def __init__(self, studio: Studio, place: Place) -> None:
        self.studio, self.place, self.bundle = studio, place, place.bundle
        self.names: list[str] = []  # of the inputs that a request is made of
        self.inputs: list[Any] = []
        self.whole: gr.Radio | None = None
        if self.bundle == "jdm":
            choices = [("images for a mask", "map"), ("masks for an image", "image"), ("whole pairs", "nothing")]
            self.whole = gr.Radio(choices, value="map", label="What to make", elem_id="jdm-what")
        self.map = MapPart(studio, place) if place.labels else None
        if self.whole is not None and self.map is not None:
            picture = PicturePart(studio, place)
            shown = [self.map.row_of_map, picture.row]
            self.whole.change(_parts, [self.whole], shown, queue=False, api_name=False)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                self._settings()
            with gr.Column(scale=2, min_width=280):
                self._results()
        self._wire()

    def _session(self, request: gr.Request) -> Session:
        return self.studio.session(str(request.session_hash))

    # The settings

    def _input(self, name: str, component: Any) -> Any:
        self.names.append(name)
        self.inputs.append(component)
        return component

    def _settings(self) -> None:
        place, contract = self.place, self.place.contract
        if "classes" in contract:
            names = list(contract["classes"])
            self._input("classes", gr.CheckboxGroup(names, value=names[:1], label="Classes"))
        if place.features:
            with gr.Accordion("Nodule features, for all nodules of the map", open=True):
                for feature in place.features:
                    text = feature.replace("_", " ").capitalize()
                    if feature == MALIGNANCY:
                        choices = [("as the map says", "own"), ("benign", "0"), ("malignant", "1")]
                    else:
                        choices = [("as the map says", "own"), *((str(n), str(n)) for n in range(1, 6))]
                    self._input(feature, gr.Radio(choices, value="own", label=text))
        if place.features or self.bundle == "cfg_ddpm":
            value, note = (1.0, "0 is none") if place.features else (3.0, "1 is none")
            self._input(
                "guidance_scale",
                gr.Number(value, label=f"Guidance scale ({note})", minimum=-MOST_GUIDANCE, maximum=MOST_GUIDANCE),
            )
        what = "Images of each class" if "classes" in contract else "Images"
        self._input("num_images", gr.Slider(1, MOST_IMAGES, value=4, step=1, label=what))
        self._input("seed", gr.Number(0, label="Seed of the first", precision=0, minimum=0, maximum=MOST_SEED))
        with gr.Accordion("Sampler", open=False):
            if place.samplers:
                self._input("sampler", gr.Dropdown(list(place.samplers), value=place.samplers[0], label="Sampler"))
                steps = 10 if self.bundle == "lsdm" else 20
                most = min(1000, place.most_steps)
                self._input("num_steps", gr.Slider(1, most, value=min(steps, most), step=1, label="Steps"))
                self._input("precision", gr.Dropdown(list(PRECISIONS)[::-1], value="auto", label="Precision"))
            self._input("batch_size", gr.Slider(1, MOST_AT_ONCE, value=4, step=1, label="Images at once"))

    def request(self, values: Sequence[Any]) -> Request:
        """What the controls say.

        Raises:
            UserError: a number that is none, or out of range.
        """
        given = dict(zip(self.names, values, strict=True))
        targets = {name: float(given.pop(name)) for name in list(given) if name in FEATURES and given[name] != "own"}
        given = {name: value for name, value in given.items() if name not in FEATURES}
        for name in ("num_images", "seed", "num_steps", "batch_size"):
            if isinstance(given.get(name), float) and given[name].is_integer():
                given[name] = int(given[name])
        return Request(**given, targets=targets)

    # The results

    def _results(self) -> None:
        with gr.Row():
            self.go = gr.Button("Generate", variant="primary", elem_id=f"{self.bundle}-generate")
            self.stop = gr.Button("Cancel", variant="stop", elem_id=f"{self.bundle}-cancel")
        self.told = gr.HTML(
            status("Nothing was generated yet."), elem_classes="status", elem_id=f"{self.bundle}-status"
        )
        self.show_map = gr.Checkbox(True, label="Lay the map over the images", visible=bool(self.place.labels))
        self.gallery = gr.Gallery(
            label="Images", columns=2, object_fit="contain", format="png", interactive=False,
            height=None, buttons=["fullscreen"], elem_id=f"{self.bundle}-gallery",
        )  # fmt: skip
        with gr.Row():
            forms = Run(self.place, None).forms
            self.form = gr.Dropdown(list(forms), value=forms[0], label="Download as")
            self.pack = gr.Button("Prepare the download", elem_id=f"{self.bundle}-pack")
        self.file = gr.File(label="Download", interactive=False, visible=False, elem_id=f"{self.bundle}-download")

    def pictures(self, run: Run | None, with_map: bool) -> list[tuple[Any, str]]:
        """Images with captions."""
        shown = []
        for sample in run.samples() if run is not None else ():
            image, text = sample.image, f"seed {sample.seed}"
            if "classes" in self.place.contract:
                text = f"{sample.case_id.rpartition('_')[0]}, {text}"
            if with_map and sample.label is not None:
                image = maps.overlay(image, sample.label, self.studio.colours(self.bundle))
            shown.append((maps.enlarged(image), text))
        return shown

    # What happens

    def _wire(self) -> None:
        before = [self.map.field, self.whole] if self.map is not None else []
        before = [x for x in before if x is not None]
        begun = self.go.click(told(self._begin, 1, 0), [*before], [self.told], queue=False, api_name=False)
        begun.success(
            told(self._generate, 3, 1), [*([self.whole] if self.whole else []), self.show_map, *self.inputs],
            [self.gallery, self.told, self.file], concurrency_id="sampling", concurrency_limit=1,
            api_name=False, show_progress_on=self.gallery,
        )  # fmt: skip
        # told first: the answer to what cancels may come after the sampling's own, and would stand over it
        stopping = self.stop.click(self._cancelling, None, [self.told], queue=False, api_name=False)
        stopping.then(self._cancel, None, [self.told], queue=False, api_name=False)
        self.show_map.change(self._show, [self.show_map], [self.gallery], queue=False, api_name=False)
        self.pack.click(told(self._pack, 2, 1), [self.form], [self.file, self.told], api_name=False)

    def _begin(self, request: gr.Request, *values: Any) -> str:
        session = self._session(request)
        needs_map = self.map is not None and (self.whole is None or values[-1] == "map")
        if needs_map and not self.map.read(session, values[0]).label.any():
            raise UserError("the label map is empty; take one of the dataset, upload one, or draw one")
        session.begin()
        return status("Waiting for your turn, or sampling. Cancel stops it.")

    def _generate(
        self,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - this is how gradio hands it in
        *given: Any,
    ) -> tuple[Any, ...]:
        session, values = self.studio.known(str(request.session_hash)), list(given)
        if session is None or not session.take_turn():  # the user is gone, or clicked twice
            return gr.skip(), gr.skip(), gr.skip()
        what = values.pop(0) if self.whole is not None else "map"
        show_map = values.pop(0)
        try:
            asked = self.request(values)
        except UserError:
            session.end()
            raise

        def tell(done: int, total: int) -> None:
            progress((done, total), desc="sampling", unit="steps")

        try:
            run = self.studio.generate(session, self.bundle, asked, given=what, progress=tell)
        except CancelledError:
            return gr.skip(), status("Cancelled. Nothing was kept of it."), gr.skip()
        pictures = self.pictures(run, show_map)
        text = f"{len(pictures)} images, seeds from {asked.seed}. Download them below."
        return pictures, status(text), gr.update(value=None, visible=False)

    def _cancelling(self) -> str:
        return status("Cancelling at the next step ...")

    def _cancel(self, request: gr.Request) -> Any:
        return gr.skip() if self._session(request).cancel() else status("Nothing is running.")

    def _show(self, with_map: bool, request: gr.Request) -> list[tuple[Any, str]]:
        return self.pictures(self._session(request).runs.get(self.bundle), with_map)

    def _pack(self, form: str, request: gr.Request) -> Any:
        session = self._session(request)
        run = session.runs.get(self.bundle)
        if run is None:
            raise UserError("nothing was generated yet; press Generate first")
        path = write_zip(run, session.folder, form)
        return gr.update(value=str(path), visible=True), status(f"{path.name} is ready.")

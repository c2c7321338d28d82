# SPDX-License-Identifier: Apache-2.0
"""The tab for readers: a case, a mark, a rating, and only then the truth."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
import numpy as np

from monai_synth.errors import UserError
from monai_synth.studio import maps
from monai_synth.studio.reading import Case, Reading
from monai_synth.studio.session import Session, Studio
from monai_synth.studio.shown import told

LEAST = 512  # pixels of the longer side of a case on the page
_MARK = (255, 235, 59)
_TRUTH = (0, 229, 255)
_RATINGS = [
    ("1 surely benign", 1), ("2 rather benign", 2), ("3 undecided", 3), ("4 rather malignant", 4),
    ("5 surely malignant", 5),
]  # fmt: skip


def reader_tab(studio: Studio) -> None:
    """Build it.

    Args:
        studio: models and sessions.
    """
    gr.Markdown(
        "Find the nodule (of jdm, what its masks mark): click on it, or give its row and column, and rate it. The "
        "truth is shown after your answer. Some cases have none; some may be synthetic. This trains the eye and is no "
        "test of a reader."
    )
    bundles = [name for name, place in studio.places.items() if place.labels and len(place.size) == 2]
    with gr.Row(elem_id="reading-parts"):
        with gr.Column(scale=1, min_width=280, elem_id="reading-choice"):
            bundle = gr.Dropdown(bundles, value=bundles[0], label="Images of")
            choices = [
                ("what I generated", "generated"), ("test split of the dataset", "dataset"), ("both, mixed", "both")
            ]  # fmt: skip
            source = gr.Radio(choices, value="dataset", label="Cases")
            seed = gr.Number(0, label="Seed of the order", precision=0, minimum=0)
            start = gr.Button("Start", variant="primary", elem_id="reading-start")
        with gr.Column(scale=2, min_width=280, elem_id="reading-case"):
            told_line = gr.HTML("<p>Press Start.</p>", elem_classes="status", elem_id="reading-status")
            picture = gr.Image(
                label="Case", type="numpy", format="png", interactive=False, buttons=[], elem_id="reading-image",
                sources=(),
            )  # fmt: skip
            totals = gr.HTML("", elem_classes="status", elem_id="reading-totals")
        with gr.Column(scale=1, min_width=280, elem_id="reading-mark"):
            row = gr.Number(None, label="Row of the mark", precision=0, minimum=0, elem_id="reading-row")
            column = gr.Number(None, label="Column of the mark", precision=0, minimum=0, elem_id="reading-column")
            rating = gr.Radio(_RATINGS, label="Malignancy", elem_id="reading-rating")
            with gr.Row():
                answer = gr.Button("Here it is", elem_id="reading-answer")
                none = gr.Button("There is none", elem_id="reading-none")
            onward = gr.Button("Next case", elem_id="reading-next")

    def session(request: gr.Request) -> Session:
        return studio.session(str(request.session_hash))

    def begin(name: str, where: str, number: float | None, request: gr.Request) -> tuple[Any, ...]:
        reading = studio.start_reading(session(request), name, where, int(number or 0))
        return (*_shown(reading), None, None, None)

    def mark(event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        reading = _reading(session(request))
        case = reading.current
        if case is None or _answered(session(request)):
            raise UserError("this case is answered; press Next case")
        factor = _factor(case)
        place = (int(event.index[1] // factor), int(event.index[0] // factor))
        return _drawn(case, place), *place, gr.skip()

    def decide(
        at_row: float | None, at_column: float | None, rated: int | None, request: gr.Request
    ) -> tuple[Any, ...]:
        if at_row is None or at_column is None:
            raise UserError("mark the nodule first: click on the picture, or give row and column")
        return _told(session(request), (float(at_row), float(at_column)), rated)

    def reject(request: gr.Request) -> tuple[Any, ...]:
        return _told(session(request), None, None)

    def following(request: gr.Request) -> tuple[Any, ...]:
        user = session(request)
        reading = _reading(user)
        if not _answered(user):
            raise UserError("answer this case first: mark it, or press 'There is none'")
        user.mark = None
        return (*_shown(reading), None, None, None)

    shown = [picture, told_line, totals]
    fields = [row, column, rating]
    start.click(told(begin, 6, 1), [bundle, source, seed], [*shown, *fields], api_name=False)
    picture.select(told(mark, 4, 3), None, [picture, row, column, told_line], api_name=False)
    answer.click(told(decide, 3, 1), fields, shown, api_name=False)
    none.click(told(reject, 3, 1), None, shown, api_name=False)
    onward.click(told(following, 6, 1), None, [*shown, *fields], api_name=False)


_DONE = (-1.0, -1.0)  # in place of a session's mark once its case is answered


def _answered(user: Session) -> bool:
    return user.mark == _DONE


def _reading(user: Session) -> Reading:
    if user.reading is None:
        raise UserError("no reading has begun; press Start")
    return user.reading


def _told(user: Session, place: tuple[float, float] | None, rated: int | None) -> tuple[Any, ...]:
    reading = _reading(user)
    if _answered(user):
        raise UserError("this case is answered; press Next case")
    case, given = reading.answer(place, rated)
    user.mark = _DONE
    kind = "a synthetic image" if case.synthetic else "a case of the dataset"
    text = f"{given.text()} It was {kind} ({case.name})."
    return _drawn(case, place, truth=True), f"<p>{html.escape(text)}</p>", _totals(reading)


def _shown(reading: Reading) -> tuple[Any, ...]:
    case = reading.current
    if case is None:
        return None, "<p>All cases are read. Press Start for another round.</p>", _totals(reading)
    text = f"Case {len(reading.answers) + 1} of {len(reading.cases)}."
    return _drawn(case), f"<p>{text}</p>", _totals(reading)


def _totals(reading: Reading) -> str:
    of = reading.totals()
    return (
        f"<p>Read {of['num_read']} of {of['num_cases']}. Found {of['num_found']} of {of['num_present']}. "
        f"False alarms {of['num_false_alarms']} of {of['num_absent']} without. "
        f"Ratings right {of['num_rated_right']} of {of['num_rated']}.</p>"
    )


def _factor(case: Case) -> int:
    return max(1, -(-LEAST // max(case.label.shape)))


def _drawn(case: Case, place: tuple[float, float] | None = None, *, truth: bool = False) -> np.ndarray:
    """RGB picture of a case, with a cross at the mark and, as the truth, the outline of what was to be found."""
    picture = np.asarray(maps.enlarged(case.image, LEAST).convert("RGB")).copy()
    factor = _factor(case)
    if truth:
        target = case.target.repeat(factor, axis=0).repeat(factor, axis=1)
        picture[maps.outline(target, 2)] = _TRUTH
    if place is not None:
        row, column = (int((at + 0.5) * factor) for at in place)
        picture[max(0, row - 1) : row + 2, max(0, column - 12) : column + 13] = _MARK
        picture[max(0, row - 12) : row + 13, max(0, column - 1) : column + 2] = _MARK
    return picture

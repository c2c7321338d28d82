# SPDX-License-Identifier: Apache-2.0
"""The field on which maps are painted: its words, its script, and how a map travels to it and back.

Gradio's own image editor paints blurred colours, needs WebGL, leaves no mark at the width of a phone and cannot be used
by keyboard; a label map needs none of what it can do beyond a brush.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import gradio as gr
import numpy as np

from monai_synth.errors import UserError
from monai_synth.studio.maps import hex_of

SCRIPT = Path(__file__).with_name("canvas.js")
_CSS = """
& { width: 100%; color: var(--body-text-color); }
& input[type=radio], & input[type=range] { appearance: auto; accent-color: #1d4ed8; }
& input[type=radio] { width: 1rem; height: 1rem; margin: 0; }
& label:has(input:checked) { font-weight: 700; }
& .field { position: relative; overflow: hidden; max-width: 560px; line-height: 0; }
& canvas { width: 100%; image-rendering: pixelated; touch-action: none; cursor: crosshair; border: 1px solid #767676; }
& .ring { position: absolute; border: 1px solid #fff; outline: 1px solid #000; border-radius: 50%; }
& .ring { pointer-events: none; }
& fieldset { border: 0; padding: 0; margin: 0 0 0.5rem 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; }
& legend, & .line { font-size: 0.95rem; margin-bottom: 0.3rem; }
& label { display: inline-flex; align-items: center; gap: 0.4em; min-height: 24px; }
& label i { width: 1.1em; height: 1.1em; border: 1px solid #767676; display: inline-block; }
& .line { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 1rem; }
& .undo { border: 1px solid #767676; border-radius: 6px; padding: 0.25rem 0.8rem; min-height: 32px; }
& .help, & .place { font-size: 0.9rem; margin: 0.4rem 0; line-height: 1.4; }
"""


def map_canvas(name: str, labels: Sequence[str], colours: np.ndarray, label: np.ndarray) -> gr.HTML:
    """The field.

    Args:
        name: begins the ids of its parts.
        labels: name of each value.
        colours: of each value, uint8 (K, 3).
        label: first map, uint8 (H, W).
    """

    def checked(value: int) -> str:
        return " checked" if value == len(labels) - 1 else ""

    brushes = "".join(
        f'<label><input type="radio" name="{name}-brush" value="{value}"{checked(value)}>'
        f'<i style="background:{hex_of(colours[value])}"></i>{_safe(word)}</label>'
        for value, word in enumerate(labels)
    )
    largest = max(2, max(label.shape) // 4)
    template = (
        f"<fieldset><legend>Brush</legend>{brushes}</fieldset>"
        f'<div class="line"><label>Width <input type="range" min="1" max="{largest}" value="{max(1, largest // 4)}" '
        f'aria-label="Width of the brush in pixels"></label><button type="button" class="undo">Undo</button></div>'
        f'<div class="field"><canvas tabindex="0" role="application" aria-label="Label map" '
        f'aria-describedby="{name}-help" data-colours="{_safe(json.dumps(colours.tolist()))}" '
        f'data-names="{_safe(json.dumps(list(labels)))}"></canvas><div class="ring"></div></div>'
        f'<p class="place" aria-live="polite"></p>'
        f'<p class="help" id="{name}-help">Paint with mouse or finger. By keyboard: arrow keys move (with Shift by 8), '
        f"Space paints, Ctrl+Z undoes.</p>"
    )
    return gr.HTML(
        to_text(label), html_template=template, css_template=_CSS, js_on_load=SCRIPT.read_text(encoding="utf-8"),
        apply_default_css=False, elem_id=name,
    )  # fmt: skip


def _safe(text: str) -> str:
    """As part of a template, in which also backticks, $ and braces mean something."""
    escaped = html.escape(text)
    return "".join(f"&#{ord(c)};" if c in "`${}\\" else c for c in escaped)


def to_text(label: np.ndarray) -> str:
    """A map, uint8 (H, W), as the field takes it."""
    runs = [[int(value), len(list(same))] for value, same in groupby(label.ravel().tolist())]
    return json.dumps({"size": list(label.shape), "runs": runs}, separators=(",", ":"))


def from_text(text: str, size: Sequence[int], num_labels: int) -> np.ndarray:
    """The map that the field holds.

    Args:
        text: what the browser sent.
        size: (H, W) that it must have.
        num_labels: of the model.

    Returns:
        uint8 (H, W).

    Raises:
        UserError: it is no map of that size and of those labels.
    """
    try:
        content = json.loads(text)
        runs = np.array(content["runs"], dtype=np.int64).reshape(-1, 2)
        values, counts = runs[:, 0], runs[:, 1]
        total = int(np.prod(size))
        fits = (
            list(content["size"]) == list(size) and ((counts > 0) & (counts <= total)).all() and counts.sum() == total
        )
        known = ((values >= 0) & (values < num_labels)).all()
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UserError("the drawing cannot be read; load the page again") from error
    if not (fits and known):
        wanted = "x".join(map(str, size))
        raise UserError(f"the drawing is no map of {wanted} pixels of {num_labels} labels; load the page again")
    return np.repeat(values.astype(np.uint8), counts).reshape(tuple(size))

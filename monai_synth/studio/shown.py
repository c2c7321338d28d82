# SPDX-License-Identifier: Apache-2.0
"""Lines of text on the page: what went on, and what a user can mend."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr

from monai_synth.errors import UserError


def status(text: str) -> str:
    """A line of text for what went on."""
    return f"<p>{html.escape(text)}</p>"


def told(action: Callable[..., Any], outputs: int, line: int) -> Callable[..., Any]:
    """Show what a user can mend in a line of the page, where it stays and is read out; all else stays as it is.

    Args:
        action: of an event.
        outputs: how many it has.
        line: which of them is the line of text.
    """

    @functools.wraps(action)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return action(*args, **options)
        except (UserError, OSError) as error:
            text = html.escape(" ".join(str(error).split()))
            given = [gr.skip() for _ in range(outputs)]
            given[line] = f'<p role="alert"><strong>Error:</strong> {text}</p>'
            return given[0] if outputs == 1 else tuple(given)

    return call

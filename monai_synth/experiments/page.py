# SPDX-License-Identifier: Apache-2.0
"""The pages that experiments write: one file with its pictures inside, that needs nothing else to be read."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = (
    "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #bbb;padding:.25em .6em;text-align:right}"
    "td:first-child,th{text-align:left}small{color:#555}img{max-width:100%}.bad{background:#fee;padding:1em}"
    ".settings td{text-align:left}"
)


def page(title: str, parts: Sequence[str], style: str = "") -> str:
    """A page of HTML parts.

    Args:
        title: text.
        parts: HTML.
        style: CSS on top.
    """
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}{style}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def image_html(png: bytes, alt: str = "") -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode("ascii")
    return f"<img alt='{html.escape(alt)}' src='data:image/png;base64,{data}'>"


def settings_html(settings: Mapping[str, Any]) -> str:
    """Settings and versions as a table with its heading."""
    shown = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    return f"<h2>Settings</h2><table class='settings'>{shown}</table>"

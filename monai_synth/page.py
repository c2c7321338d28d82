# SPDX-License-Identifier: Apache-2.0
"""The pages that evaluations and experiments write: one look, one file with its pictures inside, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = (
    "body{font:15px/1.5 sans-serif;color:#222;margin:2em auto;max-width:75em;padding:0 1em}"
    "h2{margin-top:1.8em;border-bottom:1px solid #ddd;padding-bottom:.2em}h3{margin:1.2em 0 .3em}"
    "table{border-collapse:collapse;margin:1em 0}th,td{border:1px solid #bbb;padding:.25em .6em;text-align:right}"
    "th{background:#f3f3f3}td:first-child,th{text-align:left}small{color:#555}img,svg{max-width:100%}"
    ".bad{background:#fee;padding:1em}.settings td{text-align:left}"
    ".warn{background:#fff4e0;border-left:4px solid #e09000;padding:.5em 1em;margin:1em 0}.warn li{margin:.3em 0}"
    ".answer{border-left:6px solid #8a97a3;background:#f6f7f8;padding:.5em 1em;margin:.7em 0}"
    ".answer b{display:block}.answer.good{border-color:#2f8f4e}.answer.poor{border-color:#c8651b}"
    ".wide{overflow-x:auto}"
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


def answer_html(question: str, answer: str, tone: str = "") -> str:
    """A question and its answer in a sentence or two.

    Args:
        question: text.
        answer: text.
        tone: "good", "poor", or "" where there is nothing to judge.
    """
    return f"<div class='answer {tone}'><b>{html.escape(question)}</b>{html.escape(answer)}</div>"


def warnings_html(texts: Sequence[str]) -> str:
    """What a reader must know before the numbers; nothing without any."""
    if not texts:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in texts)
    return f"<div class='warn'><b>Read with care</b><ul>{items}</ul></div>"


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], *, css: str = "") -> str:
    """A table of HTML cells.

    Args:
        head: cells of the head, HTML.
        rows: cells, HTML.
        css: class of the table.
    """
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    css = f" class='{css}'" if css else ""
    return f"<div class='wide'><table{css}><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"


def settings_html(settings: Mapping[str, Any]) -> str:
    """Settings and versions as a table with its heading."""
    shown = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    return f"<h2>Settings</h2><table class='settings'>{shown}</table>"

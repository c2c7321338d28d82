# SPDX-License-Identifier: Apache-2.0
"""The fidelity report: ``fidelity.json``, ``fidelity.csv`` and the self-contained page ``report.html``.

Synthetic images are shown, real ones only where that was asked for.
"""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monai_synth.atomic import remove_leftovers, write_bytes, write_json
from monai_synth.data.pair_files import read_image
from monai_synth.errors import UserError
from monai_synth.evaluate.image_sets import NAMES, ImageSet

FILES = ("fidelity.json", "fidelity.csv", "report.html")
_OWN_ENTRIES = {*FILES, "features"}
_COLUMNS, _THUMBNAIL = 12, 72  # pictures in a row, pixels of each at least

# Name of a metric as printed, and one sentence that says what it means.
MEANINGS = {
    "fid": (
        "FID ↓",
        "Distance of the two sets as a network trained on photographs sees them: 0 for equal sets, smaller is closer; "
        "it is larger the fewer images there are, so compare only values with equal n.",
    ),
    "kid": (
        "KID ↓",
        "The same comparison without the error for few images: around 0 (also a little below) where the sets cannot be "
        "told apart.",
    ),
    "frechet_classifier": (
        "Fréchet distance of classifier features ↓",
        "Distance of the two sets as a classifier trained on these data sees them; it is not FID, and only values "
        "from the same classifier file can be compared.",
    ),
    "kernel_classifier": (
        "Kernel distance of classifier features ↓",
        "The same comparison without the error for few images: around 0 (also a little below) where the sets cannot be "
        "told apart; not KID.",
    ),
    "frechet_unknown_inception": (
        "Fréchet distance, unknown Inception weights ↓",
        "Distance of the two sets by a network of unknown origin; it is not FID and cannot be compared with any.",
    ),
    "kernel_unknown_inception": (
        "Kernel distance, unknown Inception weights ↓",
        "The same comparison without the error for few images; not KID.",
    ),
    "ssim": (
        "SSIM",
        "How alike an image of one set and a random image of the other are, pixel by pixel: 1 for equal images, near 0 "
        "for unrelated ones. Two sets of real images show what to expect; more than that can mean too little variety.",
    ),
    "ms_ssim": ("MS-SSIM", "SSIM at several resolutions, so that fine grain counts less and the large forms more."),
}
_STYLE = """
body{font-family:sans-serif;max-width:76em;margin:2em auto;padding:0 1em;color:#222;line-height:1.4}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:right}
th{background:#f3f3f3}td:first-child,th:first-child,.settings td{text-align:left}
small{color:#666}td small{white-space:nowrap}
td.text{color:#777;background:#fafafa}.warn{background:#fff4e0;border-left:4px solid #e09000;padding:.5em 1em}
.warn li{margin:.3em 0}img{image-rendering:pixelated;max-width:100%}.own{font-weight:bold}h2{margin-top:1.6em}
"""


def check_report(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder whose report may not be replaced.

    Raises:
        UserError: a report is there and ``overwrite`` is not set, or the folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    entries = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()
    foreign = sorted(entries - _OWN_ENTRIES)
    if foreign:
        raise UserError(f"--out {out} holds {foreign[0]!r}, which is no part of a fidelity report; name another folder")
    if entries & set(FILES) and not overwrite:
        raise UserError(f"--out {out} holds a report; name another folder, or replace it with --overwrite")


def write_report(out: Path, content: Mapping[str, Any], sets: Mapping[str, ImageSet], *, show_real: bool) -> None:
    """Write the three files, the JSON last.

    Args:
        out: folder, created if missing.
        content: of ``fidelity.json``.
        sets: where the pictures come from.
        show_real: show real images and the control's too.
    """
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    (out / "fidelity.json").unlink(missing_ok=True)
    shown = ("synthetic", "real_train", "control") if show_real else ("synthetic",)
    pictures = {key: strips(sets[key]) for key in shown if key in sets}
    write_bytes(out / "report.html", page(content, pictures).encode("utf-8"))
    write_bytes(out / "fidelity.csv", _csv(content).encode("utf-8"))
    write_json(out / "fidelity.json", content)


def strips(image_set: ImageSet) -> dict[str, bytes]:
    """PNG of the first images of each class of a set, by class."""
    pictures = {}
    for name in sorted(set(image_set.labels)):
        cells = [read_image(image_set.paths[i]) for i in image_set.of_class(name)[:_COLUMNS]]
        height, width = cells[0].shape[1:]
        cells = [c for c in cells if c.shape == cells[0].shape]
        gap = np.full((height, max(1, width // 14), len(cells[0])), 255, np.uint8)
        row = [part for cell in cells for part in (np.moveaxis(cell, 0, -1), gap)][:-1]
        picture = Image.fromarray(np.concatenate(row, axis=1).squeeze())
        factor = -(-_THUMBNAIL // height)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        pictures[name] = buffer.getvalue()
    return pictures


def page(content: Mapping[str, Any], pictures: Mapping[str, Mapping[str, bytes]]) -> str:
    """The page, with everything in it.

    Args:
        content: of ``fidelity.json``.
        pictures: set -> class -> PNG.
    """
    whole = [e for e in content["pairs"] if e["class"] is None]
    by_class = [e for e in content["pairs"] if e["class"] is not None]
    keys = list(whole[0]["metrics"])
    parts = [
        "<p>How close are the synthetic images to real ones? Each row compares two sets of images. The first row, real "
        "against real, is what perfect synthetic images would reach; the control, where there is one, shows images "
        "that have nothing to do with them.</p>",
        _warnings(content),
        _table(whole, keys),
        _verdicts(whole),
        "".join(_chart(whole, key) for key in keys if key.startswith(("fid", "frechet"))),
    ]
    if any(e["text"] for e in whole):
        parts.append(
            "<p><small>Grey columns: Table 1 of the text on class-conditional chest X-rays (28 x 28, FID with "
            "pytorch-fid, SSIM by order of files), other images than here. Its FID can be compared with FID only, and "
            "some of its sets had about 100 images.</small></p>"
        )
    meanings = "".join(f"<li><b>{_name(key)}</b>: {html.escape(_meaning(key)[1])}</li>" for key in keys)
    parts.append(
        f"<h2>What the numbers mean</h2><ul>{meanings}<li><b>[a, b]</b>: 95 % interval, how far the number would move "
        "with other images, as many and of the same kind; <b>n</b>: images of each set, or pairs of images.</li></ul>"
    )
    if by_class:
        parts.append("<h2>Each class by itself</h2>" + _table(by_class, keys))
    parts.append("<h2>The sets</h2>" + _sets(content["sets"]))
    for key, rows in pictures.items():
        parts.append(f"<h2>Images: {html.escape(NAMES[key])}</h2>")
        for name, data in rows.items():
            encoded = base64.b64encode(data).decode("ascii")
            title = html.escape(name) if key != "control" else ""
            parts.append(f"<p>{title}<br><img alt='{title}' src='data:image/png;base64,{encoded}'></p>")
            if key == "control":
                break  # its classes do not matter
    details = {**content["settings"], "seed": content["seed"], "versions": content["versions"]}
    details |= {f"recipe of {key}": text for key, text in content["recipe"].items()}
    details |= {f"weights of {key}": f"SHA-256 {e['weights_sha256']}" for key, e in content["extractors"].items()}
    rows_html = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>" for key, value in details.items()
    )
    parts.append(f"<h2>Settings</h2><table class='settings'>{rows_html}</table>")
    title = f"Fidelity of synthetic images: {content['sets']['synthetic']['dataset']}"
    return (
        f"<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _warnings(content: Mapping[str, Any]) -> str:
    lines, places = list(content["warnings"]), {}
    for entry in content["pairs"]:
        for key, number in entry["metrics"].items():
            for text in number["warnings"]:
                places.setdefault((_meaning(key)[0].rstrip(" ↓"), text), []).append(_label(entry))
    lines += [f"{name} of {', '.join(labels)}: {text}" for (name, text), labels in places.items()]
    if not lines:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in lines)
    return f"<div class='warn'><b>Read with care</b><ul>{items}</ul></div>"


def _table(entries: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    quoted = {key for key in ("fid", "ssim") if any(e["text"] for e in entries)}
    if "fid" in quoted and "fid" not in keys:
        quoted.remove("fid")
    head = "".join(
        f"<th>{_name(key)}</th>" + ("<th><small>the text</small></th>" if key in quoted else "") for key in keys
    )
    body = []
    for entry in entries:
        cells = []
        for key in keys:
            cells.append(f"<td>{_number(key, entry['metrics'][key])}</td>")
            if key in quoted:
                cells.append(f"<td class='text'>{entry['text'][key]:g}</td>")
        own = " class='own'" if {entry["a"], entry["b"]} & {"synthetic"} and "control" not in entry["b"] else ""
        body.append(f"<tr><td{own}>{html.escape(_label(entry))}</td>{''.join(cells)}</tr>")
    return f"<table><thead><tr><th>sets</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _verdicts(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the kernel distances say of the synthetic images, in words; they alone are 0 for equal distributions."""
    lines = []
    for entry in entries:
        numbers = [n for key, n in entry["metrics"].items() if key.startswith(("kid", "kernel")) and n["ci"]]
        if "control" not in (entry["a"], entry["b"]) and numbers:
            apart = any(number["ci"][0] > 0 for number in numbers)
            what = (
                "differ by more than chance" if apart else "cannot be told apart by these features and so many images"
            )
            lines.append(f"<li>{html.escape(_label(entry))}: they {what}.</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _chart(entries: Sequence[Mapping[str, Any]], key: str) -> str:
    """Bars with intervals, as SVG; without the control, beside which all others would vanish."""
    entries = [e for e in entries if e["b"] != "control"]
    numbers = [(e, e["metrics"][key]) for e in entries if e["metrics"][key]["value"] is not None]
    if not numbers:
        return ""
    top = max([n["ci"][1] if n["ci"] else n["value"] for _, n in numbers] + [1e-12])
    left, width, step = 230, 460, 26
    rows = []
    for i, (entry, number) in enumerate(numbers):
        y = i * step + 4
        colour = "#c8651b" if "synthetic" in (entry["a"], entry["b"]) else "#7a8a99"
        x = left + width * number["value"] / top
        rows.append(f"<text x='{left - 8}' y='{y + 13}' text-anchor='end'>{html.escape(_label(entry))}</text>")
        rows.append(f"<rect x='{left}' y='{y}' width='{x - left:.1f}' height='17' fill='{colour}'/>")
        if number["ci"]:
            low, high = (left + width * max(0.0, edge) / top for edge in number["ci"])
            rows.append(f"<path d='M{low:.1f} {y + 8}H{high:.1f}' stroke='#222' stroke-width='2'/>")
            x = max(x, high)
        rows.append(f"<text x='{x + 6:.1f}' y='{y + 13}'>{_shown(key, number['value'], 4)}</text>")
    size = f"width='{left + width + 80}' height='{len(numbers) * step + 4}'"
    style = "font-family='sans-serif' font-size='13'"
    return f"<h3>{_name(key)}</h3><svg xmlns='http://www.w3.org/2000/svg' {size} {style}>{''.join(rows)}</svg>"


def _sets(sets: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for key, record in sets.items():
        # A control may have many classes, which do not matter.
        classes = ", ".join(f"{name} {num}" for name, num in record["classes"].items()) if key != "control" else "-"
        cells = (record["dataset"], f"{record['n']} of {record['num_available']}", record["num_patients"], classes)
        changes = "; ".join(record["changes"]) or "none"
        texts = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in (*cells, changes))
        rows.append(f"<tr><td>{html.escape(NAMES[key])}</td>{texts}</tr>")
    head = "".join(f"<th>{text}</th>" for text in ("set", "dataset", "images", "patients", "classes", "changed by"))
    return f"<table class='settings'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _csv(content: Mapping[str, Any]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("a", "b", "class", "metric", "value", "low", "high", "standard_error", "n_a", "n_b", "num_pairs", "text")
    writer.writerow(head)
    for entry in content["pairs"]:
        for key, number in entry["metrics"].items():
            low, high = number["ci"] or ("", "")
            n = (*number["n"], "") if isinstance(number["n"], list) else ("", "", number["n"])
            text = (entry["text"] or {}).get(key, "")
            cells = (number["value"], low, high, number["standard_error"], *n, text)
            writer.writerow([entry["a"], entry["b"], entry["class"] or "", key, *cells])
    return buffer.getvalue()


def _label(entry: Mapping[str, Any]) -> str:
    text = f"{NAMES[entry['a']]} | {NAMES[entry['b']]}"
    return text if entry["class"] is None else f"{entry['class']}: {text}"


def _meaning(key: str) -> tuple[str, str]:
    return MEANINGS.get(key, (key, ""))


def _name(key: str) -> str:
    return html.escape(_meaning(key)[0])


def _number(key: str, number: Mapping[str, Any]) -> str:
    n = f"{number['n']} pairs" if isinstance(number["n"], int) else " / ".join(map(str, number["n"]))
    if number["value"] is None:
        return f"-<br><small>n = {n}</small>"
    interval = "<br>[{}, {}]".format(*(_shown(key, edge, 3) for edge in number["ci"])) if number["ci"] else ""
    return f"{_shown(key, number['value'], 4)}<small>{interval}<br>n = {n}</small>"


def _shown(key: str, value: float, digits: int) -> str:
    if key.endswith("ssim"):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"

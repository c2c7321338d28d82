# SPDX-License-Identifier: Apache-2.0
"""What the memorization audit writes: a page for a reader, a list of all images, and the numbers as JSON.

A near copy shows what a real patient's image shows. So without ``--show-real`` the page holds neither real images nor
near copies; then it has no picture of a patient at all.
"""

from __future__ import annotations

import csv
import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monai_synth.atomic import write_bytes, write_json
from monai_synth.data.pair_files import channels_last
from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet
from monai_synth.evaluate.memorization_pictures import posed
from monai_synth.figures import new_figure, png
from monai_synth.page import answer_html, image_html, page, settings_html, table_html, warnings_html

FILES = ("memorization.json", "memorization.csv", "report.html")
_COLOURS = {"held_out": "#7a8a99", "synthetic": "#c8651b"}
_LISTED = 50  # near copies in the table of the page
_NOT_LISTED = ("nearest_index", "pose")
_PICTURE = 192  # pixels of the longer side on the page
_STYLE = (
    ".pairs{display:flex;flex-wrap:wrap;gap:1em}.pairs figure{margin:0;border:1px solid #ccc;padding:.5em}"
    ".pairs figure.copy{border:3px solid #c8651b}.pairs figcaption{font-size:12px;max-width:400px}"
    ".pairs .both{display:flex;gap:4px}"
)


def check_report(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder whose report may not be replaced.

    Raises:
        UserError: a report is there and ``overwrite`` is not set, or the folder holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    entries = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.is_dir() else set()
    foreign = sorted(entries - set(FILES))
    if foreign:
        msg = f"--out {out} holds {foreign[0]!r}, which is no part of a memorization report; name another folder"
        raise UserError(msg)
    if entries and not overwrite:
        raise UserError(f"--out {out} holds a report; name another folder, or replace it with --overwrite")


def write_report(
    out: Path, content: Mapping[str, Any], sets: Mapping[str, Any], *, num_pictures: int, show_real: bool
) -> None:
    """Write the three files, the JSON last.

    Args:
        out: folder, created if missing.
        content: of ``memorization.json``.
        sets: ``train`` and ``synthetic`` (`CaseSet`), and the ``size`` at which they were compared.
        num_pictures: pairs on the page.
        show_real: put pictures into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / FILES[0]).unlink(missing_ok=True)  # the JSON says that the report is whole
    write_bytes(out / FILES[1], _csv(content["cases"]).encode("utf-8"))
    write_bytes(out / FILES[2], _page(content, sets, num_pictures, show_real).encode("utf-8"))
    write_json(out / FILES[0], content)


def _page(content: Mapping[str, Any], sets: Mapping[str, Any], num_pictures: int, show_real: bool) -> str:
    parts = [
        "<p>Does the model hand out its training patients? Every synthetic image was compared with every training "
        "image, mirrored, turned and shifted, whatever its brightness and contrast. How much <i>other</i> real "
        "patients resemble the training images, scored in the same way, is what chance looks like.</p>",
        _answers(content),
        warnings_html(content["warnings"]),
        _numbers(content),
        "<h2>How close is close?</h2><p>Each image's resemblance to its nearest training image. Near copies lie right "
        "of the line, where real patients do not reach.</p>",
        image_html(_histograms(content), "distributions of the scores"),
        _pictures(content, sets, num_pictures, show_real),
        _list(content),
        "<h2>What was compared</h2>" + _sets(content["sets"]),
        settings_html(
            {**{f"recipe: {k}": v for k, v in content["recipe"].items()}, **content["settings"], **content["versions"]}
        ),
    ]
    return page("Memorization audit", parts, _STYLE)


def _answers(content: Mapping[str, Any]) -> str:
    copies, leak = content["near_copies"], content["membership"]
    k, n, (low, high) = copies["count"], copies["n"], copies["ci"]
    few = not all(number["has_tail"] for key, number in content["scores"].items() if key != "mask")
    if k:
        text = (
            f"Yes: {k} of {n} ({k / n:.1%}; 95 % interval {low:.1%} to {high:.1%}) resemble a training image more than "
            "other real patients do. Do not share them; --remove writes the dataset without them."
        )
    else:
        text = f"None of {n} is one. After so many images a rate of up to {high:.2%} cannot be ruled out (95 %)."
    if few:
        num = content["sets"]["held_out"]["num_patients"]
        who = "1 held-out patient is" if num == 1 else f"{num} held-out patients are"
        text += (
            f" Only copies nearly to the pixel were looked for, since {who} too few to show what chance looks like; "
            "there may be looser copies."
        )
    colour = "poor" if k else "" if few else "good"
    answers = [answer_html("Are there copies of training images?", text, colour)]
    if "mask_copies" in content:
        masks = content["mask_copies"]
        text = f"{masks['count']} of {masks['n']} masks are near copies of training masks. "
        text += "Expected where masks were given to the model; otherwise the model remembers shapes."
        answers.append(answer_html("And copies of masks?", text, "poor" if masks["count"] else "good"))
    interval = "[{:.2f}, {:.2f}]".format(*leak["ci"]) if leak["ci"] else "none, too few patients"
    tells = bool(leak["ci"]) and leak["ci"][0] > 0.5
    text = (
        f"Area under the curve {leak['value']:.2f} (0.5: not at all, 1: of every one; 95 % interval {interval}; "
        f"n = {leak['n'][0]} training and {leak['n'][1]} held-out images). "
    )
    if tells:
        text += "Training images lie closer to the synthetic ones than held-out ones do."
    elif leak["ci"]:
        apart = leak["ci"][1] < 0.5
        text += "Held-out images lie even closer to them." if apart else "No difference beyond chance."
    answers.append(
        answer_html(
            "Can one tell who was in the training set?", text, "poor" if tells else "good" if leak["ci"] else ""
        )
    )
    return "".join(answers)


def _numbers(content: Mapping[str, Any]) -> str:
    rows = []
    for number in content["scores"].values():
        cells = [html.escape(number["title"])]
        cells += [f"{number[k]:.3f}" for k in ("held_out_median", "held_out_max")]
        cells += [f"{number['threshold']:.4f}", str(number["held_out_above"]), str(number["num_patients"])]
        rows.append([*cells, f"{number['level']:.2%}", f"{number['supported_level']:.2%}"])
    head = ("score", "held-out median", "held-out largest", "near copy above", "held-out above", "patients", "level",
            "level by counting")  # fmt: skip
    return table_html(head, rows)


def _histograms(content: Mapping[str, Any]) -> bytes:
    keys = list(content["scores"])
    figure = new_figure(4.6 * len(keys), 3.0)
    for i, key in enumerate(keys, start=1):
        axes = figure.add_subplot(1, len(keys), i)
        name = "mask_mi_share" if key == "mask" else key
        values = {
            "held_out": [v for v in content["held_out_scores"][key] if v is not None],
            "synthetic": [row[name] for row in content["cases"] if row.get(name) is not None],
        }
        everything = np.concatenate([np.asarray(v, float) for v in values.values()])
        bins = np.linspace(everything.min(), max(1.0, everything.max()), 41)
        for which, label in (("held_out", "held-out patients"), ("synthetic", "synthetic")):
            weights = np.full(len(values[which]), 100 / max(1, len(values[which])))
            axes.hist(
                values[which], bins, weights=weights, label=f"{label} (n = {len(values[which])})",
                color=_COLOURS[which], alpha=0.55,
            )  # fmt: skip
        axes.axvline(min(1.0, content["scores"][key]["threshold"]), color="#222", linestyle="--", linewidth=1)
        axes.set(
            title=textwrap.fill(content["scores"][key]["title"], 40),
            xlabel="to the nearest training image",
            ylabel="% of images",
        )
        axes.legend(fontsize=7)
    return png(figure)


def _pictures(content: Mapping[str, Any], sets: Mapping[str, Any], num: int, show_real: bool) -> str:
    head = "<h2>The nearest pairs</h2>"
    if not show_real:
        return head + (
            "<p>Not shown: a near copy shows what a real patient's image shows. <code>--show-real</code> puts the "
            "nearest pairs here; such a page is as private as the training images.</p>"
        )
    train: CaseSet = sets["train"]
    synthetic: CaseSet = sets["synthetic"]
    order = sorted(range(len(content["cases"])), key=lambda i: _order(content["cases"][i]))[:num]
    figures = []
    for i in order:
        row = content["cases"][i]
        made = posed(synthetic.picture(i, sets["size"]), row["pose"])
        real = train.picture(row["nearest_index"], sets["size"])
        caption = (
            f"<b>{row['verdict']}</b> {html.escape(row['synthetic_id'])} ({row['pose_name']}), beside training image "
            f"{html.escape(row['nearest_id'])}; {_scores(row, content)}"
        )
        caption += "" if row["tail_p_value"] is None else f", p = {row['p_value']:.2g}"
        both = "".join(image_html(_png(image), alt) for image, alt in ((made, "synthetic"), (real, "training")))
        css = " class='copy'" if row["verdict"] == "near copy" else ""
        figures.append(f"<figure{css}><div class='both'>{both}</div><figcaption>{caption}</figcaption></figure>")
    text = "<p>Left the synthetic image, brought to the pose in which it resembles most; right the training image.</p>"
    return f"{head}{text}<div class='pairs'>{''.join(figures)}</div>"


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    tail = row["p_value"] if row["tail_p_value"] is None else row["tail_p_value"]
    return row["verdict"] != "near copy", tail, row["p_value"], -row["features"]


def _list(content: Mapping[str, Any]) -> str:
    copies = sorted((row for row in content["cases"] if row["verdict"] == "near copy"), key=_order)
    if not copies:
        return ""
    scores = {key: number["title"] for key, number in content["scores"].items() if key != "mask"}
    cells = [
        [
            html.escape(row["synthetic_id"]), html.escape(row["nearest_id"]), row["pose_name"],
            *(_decimals(row[key]) for key in scores),
            *([] if row["tail_p_value"] is None else [f"{row['p_value']:.2g}", f"{row['tail_p_value']:.2g}"]),
        ]
        for row in copies[:_LISTED]
    ]  # fmt: skip
    head = ["synthetic image", "nearest training image", "pose", *map(html.escape, scores.values())]
    head += [] if copies[0]["tail_p_value"] is None else ["p by counting", "p by tail"]  # none where a mark decides
    more = f"<p>The first {_LISTED} of {len(copies)}; all are in memorization.csv.</p>" if len(copies) > _LISTED else ""
    return f"<h2>Near copies</h2>{table_html(head, cells)}{more}"


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _scores(row: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    shown = [
        f"{html.escape(number['title'])} {row[key]:.3f}"
        for key, number in content["scores"].items()
        if row.get(key) is not None
    ]
    return ", ".join(shown)


def _png(image: np.ndarray) -> bytes:
    picture = Image.fromarray(np.ascontiguousarray(channels_last(image)))
    scale = _PICTURE / max(picture.size)
    picture = picture.resize([max(1, round(n * scale)) for n in picture.size], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _sets(sets: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [key.replace("_", "-"), html.escape(r["dataset"]), r["split"], str(r["n"]), str(r["num_available"]),
         str(r["num_patients"])]
        for key, r in sets.items()
    ]  # fmt: skip
    return table_html(("set", "dataset", "split", "images", "available", "patients"), rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    names = [name for name in rows[0] if name not in _NOT_LISTED]
    writer = csv.DictWriter(buffer, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        shift = "{} {}".format(*row["shift"])
        writer.writerow({**row, "shift": shift})
    return buffer.getvalue()

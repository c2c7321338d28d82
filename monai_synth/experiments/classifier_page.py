# SPDX-License-Identifier: Apache-2.0
"""The page of the classifier experiment: the table in the text's order beside its numbers, and the figures."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from monai_synth.experiments import classifier_text as text
from monai_synth.experiments.classifier_pictures import row_png
from monai_synth.experiments.page import image_html, page, settings_html

_SHORT = {"accuracy": "Acc.", "precision": "P", "recall": "R", "f1": "F1", "auroc": "AUROC"}
_COMPARED = ("accuracy", "recall", "f1", "auroc")
_PRETRAINED = {"synthetic": "✓", "pretrain": "✓", "real": "x"}
_STYLE = (
    "body{max-width:110em}small{display:block;white-space:nowrap}td,th{white-space:nowrap}"
    "td.text,th.text{color:#666;background:#f6f6f6}tr.best td{background:#eaf4e4}tr.rule td{border-top:3px solid #888}"
    ".wide{overflow-x:auto}.wide table{font-size:12.5px}.wide td,.wide th{padding:.2em .4em}"
    "h3{margin-bottom:0}figure{margin:0 0 1em}"
)


def report_html(content: Mapping[str, Any], hardest: bytes | None = None) -> str:
    """The page, with everything in it.

    Args:
        content: of ``results.json``.
        hardest: PNG of real test images, or None.
    """
    parts = [_introduction(content)]
    if content["results"]:
        parts += [f"<h2>Scores on the real test images</h2>{_table(content)}", _notes(content)]
        parts += ["<h2>Does synthetic pretraining help?</h2>", _claims(content)]
        parts += [f"<h2>What one change brings</h2>{_differences(content)}"]
        parts += ["<h2>Confusion matrices and curves</h2>", *_pictures(content)]
    if hardest is not None:
        parts.append(
            "<h2>Hardest test images</h2><p>Real test images with the probability that the classifiers gave to their "
            f"class, mean over all rows and seeds.</p>{image_html(hardest, 'test images')}"
        )
    parts.append(settings_html({**content["settings"], "versions": content["versions"]}))
    return page("Classifiers on real and synthetic images", parts, _STYLE)


def beside_text(content: Mapping[str, Any]) -> bool:
    """Whether the text's numbers are of these classes."""
    return tuple(name.lower() for name in content["classes"]) == text.CLASSES


def _introduction(content: Mapping[str, Any]) -> str:
    settings = content["settings"]
    counts = ", ".join(f"{number} {html.escape(name)}" for name, number in content["num_test"].items())
    total = sum(content["num_test"].values())
    started = (
        f"started from ImageNet weights (sha256 {settings['weights_sha256'][:12]}...)"
        if settings["weights_sha256"]
        else "<b>started from scratch</b>, without ImageNet weights (the text starts from them; --weights FILE)"
    )
    size = "x".join(map(str, settings["image_size"]))
    select = (
        "<p>Rows without real training images choose their epoch by the real validation images, as the text's code "
        "does, so they are not without any real data (--select-on synthetic changes that).</p>"
        if settings["select_on"] == "real"
        else "<p>Rows without real training images choose their epoch by synthetic images that were held out.</p>"
    )
    unfinished = [e for e in content["results"] if e["num_seeds"] < content["num_seeds"]]
    missing = (
        f"<p class='bad'>Unfinished: {len(unfinished)} rows have fewer than {content['num_seeds']} seeds; the same "
        "command goes on.</p>"
        if unfinished
        else ""
    )
    return (
        f"<p>{total} real test images ({counts}) of {content['num_patients']} patients. {settings['backbone']} "
        f"{started}; images {size}; {settings['epochs']} epochs; {content['num_seeds']} seed(s). {content['recipe']}"
        f"</p>{select}{missing}"
    )


def _table(content: Mapping[str, Any]) -> str:
    shown = beside_text(content)
    # The recall of the positive class is its accuracy, which has a column.
    metrics = [name for name in content["results"][0]["numbers"] if not name.startswith("recall (")]
    heads = [_head(metric) for metric in metrics]
    columns = ["#", "Geo aug", "Synthetic PT", "Real %", "Weighted"]
    further = any(entry["number"] is None for entry in content["results"])
    columns += ["trained on"] * further + ["seeds"]
    top = "".join(f"<th>{name}</th>" for name in columns)
    for metric, head in zip(metrics, heads, strict=True):
        top += f"<th>{html.escape(head)}</th>" + ("<th class='text'>text</th>" if shown and _of_text(metric) else "")
    results = content["results"]
    best = {
        (fraction, metric): max(
            (e["numbers"][metric]["value"] or 0.0 for e in results if e["fraction"] == fraction), default=None
        )
        for fraction in {e["fraction"] for e in results}
        for metric in metrics
    }
    body, before = [], None
    for entry in results:
        values = [
            html.escape(entry["row"]),
            "✓" if entry["geo"] else "x",
            _PRETRAINED.get(entry["mode"], "-"),
            str(entry["fraction"]),
            "✓" if entry["weighted"] else "x",
            *([html.escape(entry["text"])] * further),
            str(entry["num_seeds"]),
        ]
        cells = "".join(f"<td>{value}</td>" for value in values)
        reported = text.reported(entry["number"]) if shown and entry["number"] else None
        for metric in metrics:
            number = entry["numbers"][metric]
            bold = number["value"] is not None and number["value"] == best[entry["fraction"], metric]
            cells += f"<td>{_number(number, bold=bold)}</td>"
            if shown and _of_text(metric):
                cells += f"<td class='text'>{'' if reported is None else _reported(reported, metric, content)}</td>"
        kind = ["best"] * (entry["numbers"]["recall"]["value"] == best[entry["fraction"], "recall"])
        kind += ["rule"] * (before is not None and before != entry["fraction"])
        before = entry["fraction"]
        body.append(f"<tr class='{' '.join(kind)}'>{cells}</tr>")
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _notes(content: Mapping[str, Any]) -> str:
    notes = [
        "Mean over seeds ± standard deviation, below it the 95 % interval. Bold: highest of its column among the rows "
        "with the same real fraction; green: highest macro recall there, by which the text chooses. Both are chosen "
        "on the test images, so they promise too much."
    ]
    if beside_text(content):
        notes.append(
            "Grey: Table 2 of the text (one training each, from ImageNet weights, with its own split into training and "
            "validation, BatchNorm left in training mode at test). Corrected (*): rows 17 and 18 print the accuracies "
            "of the two classes interchanged, and row 1's recall is .756, not .753; only so do the rows' numbers agree."
        )
    return "".join(f"<p>{note}</p>" for note in notes)


def _claims(content: Mapping[str, Any]) -> str:
    if not content["claims"]:
        return "<p>There are no rows with and without synthetic pretraining to compare.</p>"
    parts = [
        "<p>The text: in both settings (10 % and 100 % of the real images) synthetic pretraining gives the classifier "
        "with the highest recall. Here:</p><ul>"
    ]
    for claim in content["claims"]:
        name = "macro recall" if claim["metric"] == "recall" else claim["metric"]
        verdict = "yes" if claim["holds"] else "no"
        certain = "" if _apart(claim["difference"]) else ", which these seeds and test images cannot tell from 0"
        parts.append(
            f"<li><b>{claim['fraction']} % real, highest {html.escape(name)}: {verdict}.</b> Row "
            f"{claim['best_pretrain']} is the best of those with pretraining, row {claim['best_other']} of those "
            f"without; their difference is {_inline(claim['difference'])}{certain}."
        )
        mean = claim["mean_difference"]
        if mean is not None:
            certain = "" if _apart(mean) else " These seeds and test images cannot tell it from 0."
            parts.append(
                f" Over all {len(claim['pairs'])} pairs of rows that differ by pretraining only, which nobody chose on "
                f"the test images, it brings {_inline(mean)}.{certain}"
            )
        parts.append("</li>")
    return "".join([*parts, "</ul>"])


def _differences(content: Mapping[str, Any]) -> str:
    shown = [(e, what, d) for e in content["results"] for what, d in e["differences"].items() if what != "plain"]
    plain = [(e, what, d) for e in content["results"] for what, d in e["differences"].items() if what == "plain"]
    parts = [
        "<p>Differences of rows on the same seeds and test images, ± standard deviation over seeds, below the "
        "interval over test patients; bold where it and the interval over patients and seeds leave out 0.</p>"
    ]
    for heading, found in (
        ("Each row less its twin", shown),
        ("Each row less the plain one of the same real fraction (rows 1 and 9)", plain),
    ):
        if not found:
            continue
        named = heading == "Each row less its twin"
        top = "<th>row</th><th>less row</th>" + "<th>that has</th>" * named + "<th>seeds</th>"
        top += "".join(f"<th>{_SHORT[metric]}</th>" for metric in _COMPARED)
        body = []
        for entry, what, difference in found:
            numbers = difference["numbers"]
            cells = "".join(f"<td>{_number(numbers[m], bold=_apart(numbers[m]), sign=True)}</td>" for m in _COMPARED)
            body.append(
                f"<tr><td>{html.escape(entry['row'])}</td><td>{html.escape(difference['row'])}</td>"
                f"{f'<td>{what}</td>' * named}<td>{difference['num_seeds']}</td>{cells}</tr>"
            )
        parts.append(f"<h3>{heading}</h3><table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>")
    return "".join(parts)


def _pictures(content: Mapping[str, Any]) -> list[str]:
    parts = []
    for entry in content["results"]:
        images = " + ".join(f"{n} {'real' if k == 'training' else k}" for k, n in entry["num_images"].items())
        title = f"Row {entry['row']}: {entry['text']}, {entry['fraction']} % real"
        title += ", geo aug" * entry["geo"] + ", weighted loss" * entry["weighted"]
        start = f"row {entry['start']}" if entry["start"] not in ("scratch", "weights") else entry["start"]
        picture = image_html(row_png(entry, list(content["classes"])), title)
        parts.append(
            f"<h3>{html.escape(title)}</h3><p>{images} images, {entry['num_steps']} steps from {html.escape(start)}, "
            f"{entry['seconds']:.0f} s for all seeds</p><figure>{picture}</figure>"
        )
    return parts


def _head(metric: str) -> str:
    name, _, rest = metric.partition(" (")
    return _SHORT[name] + (f" ({rest}" if rest else "")


def _of_text(metric: str) -> bool:
    return metric in ("accuracy", "precision", "recall", "f1") or metric.startswith("accuracy (")


def _reported(row: text.Reported, metric: str, content: Mapping[str, Any]) -> str:
    if metric.startswith("accuracy ("):
        value = row.per_class[list(content["classes"]).index(metric[len("accuracy (") : -1])]
    else:
        value = getattr(row, metric)
    corrected = row.note and (metric == "recall" if "recall" in row.note else metric.startswith("accuracy ("))
    return f"{value:.3f}" + (f"<span title='{html.escape(row.note)}'>*</span>" if corrected else "")


def _apart(number: Mapping[str, Any]) -> bool:
    """Whether a difference is one: its intervals, over patients and over patients and seeds, leave out 0."""
    ends = [number[key] for key in ("ci", "ci_seeds")]
    return all(ends) and (all(low > 0 for low, _ in ends) or all(high < 0 for _, high in ends))


def _number(number: Mapping[str, Any], *, bold: bool = False, sign: bool = False) -> str:
    if number["value"] is None:
        return "-"
    form = "{:+.3f}" if sign else "{:.3f}"
    value = form.format(number["value"])
    shown = f"<b>{value}</b>" if bold else value
    shown += "" if number["sd"] is None else f" ± {number['sd']:.3f}"
    if number["ci"]:
        shown += "<small>[{}, {}]</small>".format(*(form.format(edge) for edge in number["ci"]))
    return shown


def _inline(number: Mapping[str, Any]) -> str:
    if number["value"] is None:
        return "undefined"
    ends = " [{:+.3f}, {:+.3f}]".format(*number["ci"]) if number["ci"] else ""
    return f"{number['value']:+.3f}{ends} (n = {number['n']})"

# SPDX-License-Identifier: Apache-2.0
"""Tables of the expert experiment's page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_synth.experiments.expert_source import REAL


def accuracies(content: Mapping[str, Any]) -> str:
    """Accuracy of each arm, its difference to the baseline and the test."""
    several = num_trainings(content) > 1
    heads = ["expert", "arm", "accuracy", "sd over seeds", "seeds", "images", f"minus {content['baseline']}"]
    heads += ["each training"] * several + ["better / equal / worse seeds", "Wilcoxon p"]
    rows = []
    for expert in content["experts"]:
        for arm, entry in expert["arms"].items():
            number, difference = entry["accuracy"], entry["difference"]
            cells = [
                html.escape(expert["name"]) + " (steered it)" * entry["steered"],
                html.escape(arm),
                _number(number),
            ]
            cells += ["-" if number["sd"] is None else f"{number['sd']:.3f}", number["num_seeds"], number["n"]]
            if difference is None:
                cells += ["-"] * (3 + several)
            else:
                change, test = difference["accuracy"], difference["accuracy"]["wilcoxon"]
                cells.append(_number(change, sign=True))
                if several:
                    cells.append(", ".join(f"{value:+.3f}" for value in change["per_training"]))
                cells.append(f"{test['num_higher']} / {test['num_equal']} / {test['num_lower']}")
                cells.append("-" if test["p"] is None else f"{p_text(test['p'])} (n = {test['n']}, {test['method']})")
            rows.append(row(cells, escape=False))
    return f"<div class='wide'><table>{row(heads, 'th')}{''.join(rows)}</table></div>"


def by_class(content: Mapping[str, Any], expert: Mapping[str, Any]) -> str:
    """Share of the images of each class that are taken for it."""
    arms = expert["arms"]
    compared = [arm for arm, entry in arms.items() if entry["difference"]]
    heads = ["class", *arms, *(f"{arm} minus {content['baseline']}" for arm in compared), "real test"]
    real = next(iter(expert["real"].values()))["recall_left"]
    rows = []
    for name in content["sampled"]:
        cells = [html.escape(name), *(_number(entry["recall"][name]) for entry in arms.values())]
        cells += [_number(arms[arm]["difference"]["recall"][name], sign=True, bold=True) for arm in compared]
        rows.append(row([*cells, "-" if real[name] is None else f"{real[name]:.3f}"], escape=False))
    numbers = sorted({entry["recall"][content["sampled"][0]]["n"] for entry in arms.values()})
    n = " or ".join(map(str, numbers))
    return (
        f"<p>{title(expert)}: share of the {n} images of each class and arm that are taken for it. Bold: the interval "
        "leaves out 0, without regard to how many there are.</p>"
        f"<div class='wide'><table>{row(heads, 'th')}{''.join(rows)}</table></div>"
    )


def taken_for_table(content: Mapping[str, Any], expert: Mapping[str, Any]) -> str:
    """By class what it is most often mistaken for, and how that differs between the arms."""
    arms = expert["arms"]
    compared = [arm for arm, entry in arms.items() if entry["difference"]]
    heads = ["images of", "taken for", *arms, *(f"{arm} minus {content['baseline']}" for arm in compared)]
    rows = []
    for name in content["sampled"]:
        wrong = list(dict.fromkeys(entry["most_taken_for"][name] for entry in arms.values()))
        for other in [w for w in wrong if w is not None]:
            cells = [html.escape(name), html.escape(other)]
            for entry in arms.values():
                first = entry["most_taken_for"][name] == other
                cells.append(_number(entry["taken_for"][name][other]) + " (most frequent)" * first)
            cells += [
                _number(arms[arm]["difference"]["taken_for"][name][other], sign=True, bold=True) for arm in compared
            ]
            rows.append(row(cells, escape=False))
    if not rows:
        return "<p>No image was taken for another class.</p>"
    return (
        "<p>The class that each one's images are most often mistaken for, as share of its images, with the difference "
        f"between the arms.</p><div class='wide'><table>{row(heads, 'th')}{''.join(rows)}</table></div>"
    )


def called(content: Mapping[str, Any], expert: Mapping[str, Any]) -> str:
    """The answer that takes in most images of other classes, as the text saw with debris."""
    if len(content["sampled"]) < 2 or not expert["arms"]:
        return ""
    texts = []
    for arm, entry in expert["arms"].items():
        counts = np.array(entry["confusion"])
        wrong = counts.sum(0)
        for i, name in enumerate(content["sampled"]):
            wrong[content["left"].index(name)] -= counts[i, content["left"].index(name)]
        if wrong.sum() == 0:
            continue
        most = int(wrong.argmax())
        texts.append(
            f"{html.escape(arm)}: {wrong[most]} of its {wrong.sum()} wrong images are taken for "
            f"<b>{html.escape(content['left'][most])}</b>"
        )
    return f"<p>The answer that takes in most wrong images. {'; '.join(texts)}.</p>" if texts else ""


def similarity_table(content: Mapping[str, Any]) -> str:
    """Mean SSIM of the pairs of each arm and of real images."""
    entries = content["similarity"]
    rows = []
    for arm, entry in entries.items():
        difference = entry["difference"]
        cells = ["original (real training images)" if arm == REAL else arm, _number(entry["mean"]), entry["mean"]["n"]]
        if difference is None:
            cells += ["-", "-"]
        else:
            test = difference["mean"]["wilcoxon"]
            cells.append(_number(difference["mean"], sign=True, bold=True))
            cells.append("-" if test["p"] is None else f"{p_text(test['p'])} (n = {test['n']})")
        rows.append(row(cells, escape=False))
    few = [
        f"{html.escape(k)} {n}"
        for k, n in entries.get(REAL, {}).get("num_images", {}).items()
        if n < content["per_class"]
    ]
    note = " The interval of real images is over draws of those that there are."
    note += f" Of these classes there are fewer: {', '.join(few)}." if few else ""
    heads = row(["", "mean SSIM of pairs", "pairs", f"minus {content['baseline']}", "Wilcoxon p"], "th")
    return (
        f"<p>Mean over classes and seeds; lower is more "
        f"varied. Real images are drawn anew for each seed, as many as are generated.{note}</p>"
        f"<table>{heads}{''.join(rows)}</table>"
    )


def title(expert: Mapping[str, Any]) -> str:
    """Which expert, as HTML."""
    size = "x".join(map(str, expert["image_size"]))
    known = "" if expert["val_accuracy"] is None else f", validation accuracy {expert['val_accuracy']:.3f}"
    return html.escape(f"{expert['name'].capitalize()} ({expert['backbone']} at {size}{known})")


def num_trainings(content: Mapping[str, Any]) -> int:
    """Trainings of each arm."""
    return len(next(iter(content["arms"].values()))["models"])


def side_of(number: Mapping[str, Any]) -> int:
    """1 or -1 where the interval leaves out 0, the one over trainings too where there is one."""
    ends = [number["ci"]] + [number["ci_trainings"]] * (number["ci_trainings"] is not None)
    if not all(ends):
        return 0
    return int(all(low > 0 for low, _ in ends)) - int(all(high < 0 for _, high in ends))


def p_text(value: float, name: str = "") -> str:
    """A p value, with its name where that is given."""
    sign = "= " if name else ""
    return f"{name}< 0.001" if value < 0.001 else f"{name}{sign}{value:.3f}"


def _ends(number: Mapping[str, Any], form: str) -> str:
    return "[{}, {}]".format(*(form.format(end) for end in number["ci"])) if number["ci"] else ""


def inline(number: Mapping[str, Any], *, sign: bool = False) -> str:
    form = "{:+.3f}" if sign else "{:.3f}"
    ends = f" {_ends(number, form)}" if number["ci"] else ""
    if number["ci_trainings"]:
        ends += ", over trainings too [{}, {}]".format(*(form.format(end) for end in number["ci_trainings"]))
    return f"{form.format(number['value'])}{ends}"


def _number(number: Mapping[str, Any], *, sign: bool = False, bold: bool = False) -> str:
    form = "{:+.3f}" if sign else "{:.3f}"
    shown = form.format(number["value"])
    shown = f"<b>{shown}</b>" if bold and side_of(number) else shown
    if number["ci"]:
        shown += f"<small>{_ends(number, form)}</small>"
    if number["ci_trainings"]:
        low, high = (form.format(end) for end in number["ci_trainings"])
        shown += f"<small>trainings too [{low}, {high}]</small>"
    return shown


def row(cells: Sequence[Any], tag: str = "td", *, escape: bool = True) -> str:
    shown = (html.escape(str(cell)) if escape else str(cell) for cell in cells)
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in shown) + "</tr>"

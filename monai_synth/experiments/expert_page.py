# SPDX-License-Identifier: Apache-2.0
"""The page of the expert experiment: what was found, how sure it is, and what it cannot show."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from monai_synth.experiments import expert_pictures as pictures
from monai_synth.experiments import expert_tables as tables
from monai_synth.experiments.expert_source import REAL
from monai_synth.experiments.page import image_html, page, settings_html

_STYLE = (
    "body{max-width:92em}.settings td{white-space:normal;overflow-wrap:anywhere}"
    "small{display:block;white-space:nowrap}td,th{white-space:nowrap}"
    ".note{background:#fff6e0;padding:.6em 1em}"
    "ul{margin-top:.3em}.wide{overflow-x:auto}"
)
_FEW_SEEDS = 6  # below, no signed rank test can give p < 0.05


def report_html(content: Mapping[str, Any], grids: Mapping[str, np.ndarray]) -> str:
    """The page, with everything in it.

    Args:
        content: of ``results.json``.
        grids: images to show, uint8 (K', n, C, H, W) by arm.
    """
    parts = [_introduction(content), _filter(content)]
    if any(expert["arms"] for expert in content["experts"]):
        parts += ["<h2>What was found</h2>", _findings(content), "<h2>What this cannot show</h2>", _limits(content)]
        parts.append("<h2>Generation accuracy</h2>")
        parts.append(image_html(pictures.accuracy_png(content), "accuracy of each seed, and differences"))
        several = tables.num_trainings(content) > 1
        parts.append(
            f"<p><small>Left: box of the seeds with their median, dotted: mean, points: seeds"
            f"{' (a marker for each training)' * several}; dashed: real test images. Right: difference of each seed; "
            f"bar: mean and 95 % interval over {'trainings and ' * several}seeds.</small></p>"
        )
        parts += [
            tables.accuracies(content),
            "<h3>By class</h3>",
            *[tables.by_class(content, e) for e in content["experts"]],
        ]
        parts.append("<h2>What classes are taken for</h2>")
        for expert in content["experts"]:
            parts.append(f"<h3>{tables.title(expert)}</h3>")
            parts.append(image_html(pictures.confusion_png(content, expert), f"confusion matrices, {expert['name']}"))
            parts += [tables.taken_for_table(content, expert), tables.called(content, expert)]
        similar = image_html(pictures.similarity_png(content), "mean SSIM")
        parts += ["<h2>How alike the images of a class are</h2>", similar, tables.similarity_table(content)]
        parts += ["<h2>Images</h2>", image_html(pictures.grid_png(grids, content["sampled"]), "samples"), _shown(grids)]
    parts.append(f"<h2>How it was computed</h2><p>{html.escape(content['recipe'])}</p>")
    parts.append(settings_html({**content["settings"], "models": _files(content), "versions": content["versions"]}))
    return page("What an expert sees in generated images", parts, _STYLE)


def _introduction(content: Mapping[str, Any]) -> str:
    settings, per_class = content["settings"], content["per_class"]
    unfinished = {arm: e["num_seeds"] for arm, e in content["arms"].items() if e["num_seeds"] < content["num_seeds"]}
    missing = ", ".join(f"{html.escape(arm)} {number}" for arm, number in unfinished.items())
    warning = (
        f"<p class='bad'>Unfinished: of {content['num_seeds']} seeds there are {missing}; the same command goes on.</p>"
    )
    sampled = ", ".join(map(html.escape, content["sampled"]))
    out = [name for name in content["classes"] if name not in content["left"]]
    left_out = f" Left out: {', '.join(map(html.escape, out))}." if out else ""
    size = "x".join(map(str, content["image_size"]))
    steps = settings["num_steps"] or ("all" if settings["sampler"] == "ddpm" else 20)
    trainings = tables.num_trainings(content)
    return (
        f"<p>{len(content['arms'])} arm(s) ({', '.join(map(html.escape, content['arms']))}), {trainings} trained "
        f"model(s) each. For each of {content['num_seeds']} seeds every model makes {per_class} images of {size} of "
        f"each of {len(content['sampled'])} class(es) ({sampled}), all models from the same noise; sampler "
        f"{settings['sampler']} with {steps} steps. The expert chooses from {len(content['left'])} classes, so chance "
        f"is {1 / len(content['left']):.3f}.{left_out}</p>{warning if unfinished else ''}"
    )


def _filter(content: Mapping[str, Any]) -> str:
    found = content["filter"]
    if found is None:
        return ""
    rows = []
    for arm, classes in found["arms"].items():
        for name, e in classes.items():
            cells = [
                arm,
                name,
                f"{found['lowest_mean'][name]:.3f}",
                e["n"],
                e["num_redrawn"],
                e["redraws"],
                e["kept_below"],
            ]
            rows.append(tables.row(cells))
    head = tables.row(["arm", "class", "lowest mean", "images", "redrawn", "redraws", "kept too dark"], "th")
    totals = ", ".join(
        f"{html.escape(arm)} {sum(e['redraws'] for e in classes.values())}" for arm, classes in found["arms"].items()
    )
    return (
        "<div class='note'><p><b>Images were filtered by their mean.</b> An image whose mean is below that of the real "
        f"training images of its class less {found['reach']} (values 0 to 1) was drawn again from other noise, at most "
        f"{found['most_attempts'] - 1} times, in all arms alike. The text's code does so and the text does not say it. "
        f"It raises accuracy and changes similarity, so these numbers are not those of the models alone. Redraws: "
        f"{totals}.</p><table>{head}{''.join(rows)}</table></div>"
    )


def _findings(content: Mapping[str, Any]) -> str:
    items = []
    for expert in content["experts"]:
        for arm, entry in expert["arms"].items():
            number, difference = entry["accuracy"], entry["difference"]
            text = f"<b>{html.escape(arm)}</b>, by the {expert['name']}: accuracy {tables.inline(number)}"
            if difference is not None:
                change, test = difference["accuracy"], difference["accuracy"]["wilcoxon"]
                text += (
                    f"; {tables.inline(change, sign=True)} against {html.escape(content['baseline'])} ({_moved(test)})"
                )
                text += f". {_verdict(change, expert, arm)}"
            items.append(f"<li>{text}</li>")
        real = next(iter(expert["real"].values()))
        if real["accuracy_left"] is not None:
            items.append(
                f"<li>Real test images, by the {expert['name']}: accuracy {real['accuracy_left']:.3f} "
                f"(n = {real['n_left']}), which is what perfect images would come to.</li>"
            )
    return f"<ul>{''.join(items)}</ul>"


def _verdict(change: Mapping[str, Any], expert: Mapping[str, Any], arm: str) -> str:
    side = tables.side_of(change)
    if change["num_seeds"] < _FEW_SEEDS:
        return "Too few seeds to tell the two apart."
    if side == 0:
        return "The interval has 0 in it: this many images cannot tell the two apart."
    word = "Higher" if side > 0 else "Lower"
    circular = ", in the eyes of the expert that steered it" * expert["arms"][arm]["steered"]
    return f"{word}{circular}: the interval leaves out 0."


def _limits(content: Mapping[str, Any]) -> str:
    items = []
    for expert in content["experts"]:
        steered = [arm for arm, entry in expert["arms"].items() if entry["steered"]]
        if steered:
            items.append(
                f"<b>Circular:</b> the {expert['name']} steered the training of {', '.join(map(html.escape, steered))} "
                "and judges them here, so a gain may be what this expert likes to see rather than better images."
                + ("" if len(content["experts"]) > 1 else " Give an independent one as --second-expert.")
            )
        elif expert["arms"]:
            items.append(f"The {expert['name']} steered none of these trainings, so it judges from outside.")
        if expert["same_dataset"] is False:
            items.append(
                f"The {expert['name']} was trained on another prepared dataset, so it may know the test images; its "
                "accuracy on them may promise too much."
            )
    aligned = [arm for arm, e in content["arms"].items() if e["alignment"]]
    known = {arm for expert in content["experts"] for arm, entry in expert["arms"].items() if entry["steered"]}
    if others := [arm for arm in aligned if arm not in known]:
        items.append(
            f"{', '.join(map(html.escape, others))}: aligned with an expert that is not among those that judge."
        )
    trainings = tables.num_trainings(content)
    if trainings == 1:
        items.append(
            "<b>One training of each arm.</b> Seeds are repetitions of the noise, not of the training: images of one "
            "trained model say nothing about how another training of the same arm would turn out. Intervals and p "
            "values are about these very models. Give several trainings of each arm (files separated by commas) for "
            "more."
        )
    else:
        items.append(
            f"{trainings} trainings of each arm. Seeds of one training are not independent trainings: the test and the "
            "first interval are about these models; the interval over trainings and seeds is about the method, and "
            f"rests on {trainings} trainings."
        )
    least = min(entry["num_seeds"] for entry in content["arms"].values())
    if least < _FEW_SEEDS:
        items.append(
            f"With {least} seed(s) the signed rank test cannot give p below 0.05 (6 or more can), and "
            "an interval over so few is too narrow."
        )
    chance, best = 1 / len(content["left"]), _best(content)
    if best is not None and best < chance + 0.1:
        items.append(
            f"No arm is much above chance ({chance:.3f}), so the models are not trained well enough to compare them."
        )
    items.append("Similarity is low for varied images and for noisy ones alike; look at the images below.")
    if content["same_model"]:
        text = ", ".join(f"{html.escape(a)} and {html.escape(b)}" for a, b in content["same_model"])
        items.append(f"<b>Arms share a model file:</b> {text}.")
    for arm, found in content["differ_by"].items():
        told = "; ".join(map(html.escape, found)) or "nothing that their files tell"
        items.append(f"{html.escape(arm)} differs from {html.escape(content['baseline'])} in: {told}.")
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _shown(grids: Mapping[str, np.ndarray]) -> str:
    real = "" if REAL in grids else " Real images are left out (--show-real puts them in)."
    return f"<p>The first images of the first seed, one training of each arm; equal places have equal noise.{real}</p>"


def _files(content: Mapping[str, Any]) -> str:
    models = [
        f"{arm}: {', '.join(model['file'] + ' ' + model['sha256'][:12] for model in entry['models'])}"
        for arm, entry in content["arms"].items()
    ]
    return "; ".join([*models, *(f"{e['name']}: {e['file']} {e['sha256'][:12]}" for e in content["experts"])])


def _best(content: Mapping[str, Any]) -> float | None:
    values = [entry["accuracy"]["value"] for e in content["experts"] for entry in e["arms"].values()]
    return max(values, default=None)


def _moved(test: Mapping[str, Any]) -> str:
    p = (
        "no difference to test"
        if test["p"] is None
        else f"Wilcoxon {tables.p_text(test['p'], name='p ')}, n = {test['n']}"
    )
    return f"higher in {test['num_higher']}, equal in {test['num_equal']}, lower in {test['num_lower']} seeds; {p}"

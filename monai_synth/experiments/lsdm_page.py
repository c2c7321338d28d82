# SPDX-License-Identifier: Apache-2.0
"""The page of the lung CT experiment: what was found in plain sentences, what it cannot show, tables and figures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from monai_synth.experiments import lsdm_tables as tables
from monai_synth.experiments import lsdm_text as text
from monai_synth.page import image_html, page, settings_html, warnings_html

_STYLE = (
    "body{max-width:92em}td,th{vertical-align:top}small{display:block;white-space:nowrap}"
    "small.caption{white-space:normal}.settings td{white-space:normal;overflow-wrap:anywhere}"
)


def report_html(content: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page, with everything in it.

    Args:
        content: of ``results.json``.
        pictures: PNGs by name.
    """
    parts = [_introduction(content), warnings_html(text.warnings(content))]
    found = text.findings(content)
    if found:
        parts.append("<h2>What was found</h2>" + _list(found))
    parts.append("<h2>What this cannot show</h2>" + _list(text.limits(content)))
    if "table_5_1" in content:
        parts.append("<h2>Whole slices (Table 5.1)</h2>" + _table_note(content))
        parts.append(tables.main_table(content["table_5_1"], content["arms"], content["real"]))
        parts.append(f"<h2>Nodule crops of {content['crop']} x {content['crop']} pixels (Table 5.2)</h2>")
        parts.append(tables.main_table(content["table_5_2"], content["arms"]))
    parts += [_figure(pictures, name, *_CAPTIONS[name]) for name in ("comparison",)]
    if "reconstruction" in content:
        parts.append(
            "<h2>What the autoencoder keeps (Fig 5.1)</h2>" + tables.reconstruction_table(content["reconstruction"])
        )
        parts.append(_figure(pictures, "reconstruction", "", _CAPTIONS["reconstruction"][1]))
        if "reconstruction" not in pictures:
            parts.append("<p><small>Pictures of it are real slices and are drawn with --show-real only.</small></p>")
    if content.get("gradients"):
        parts.append(_figure(pictures, "image_gradients", *_CAPTIONS["image_gradients"]))
        parts.append(tables.gradient_table(content["gradients"]["times"]))
        parts.append(_figure(pictures, "latent_gradients", *_CAPTIONS["latent_gradients"]))
    if "sweeps" in content:
        sweeps = content["sweeps"]
        for part, names in (("scale", ("scale_sweep", "side_by_side")), ("feature", ("feature_sweep",))):
            if sweeps[part]:
                parts += [_figure(pictures, name, *_CAPTIONS[name]) for name in names]
                parts.append(tables.sweep_table(sweeps, part))
    if "convergence" in content:
        parts.append(_figure(pictures, "convergence", *_CAPTIONS["convergence"]))
        parts.append(tables.convergence_table(content["convergence"]))
    parts.append(f"<h2>How it was computed</h2><p>{html.escape(content['recipe'])}</p>")
    parts += [f"<p>{html.escape(e['title'])}: {html.escape(e['recipe'])}.</p>" for e in content["extractors"].values()]
    files = {arm: f"{e['file']} ({e['files']['model'][:12]})" for arm, e in content["arms"].items()}
    parts.append(settings_html({**content["settings"], "models": files, "versions": content["versions"]}))
    return page("Lung CT slices from label maps: models and guidance compared", parts, _STYLE)


_CAPTIONS = {
    "comparison": (
        "The same maps and the same noise (Figs 5.2, 5.3, 5.6)",
        "Slices with the largest, the median and the smallest nodule area, seed 0; below each its nodule, enlarged.",
    ),
    "reconstruction": ("", "Real slices, their reconstructions, a part enlarged, and the difference."),
    "image_gradients": (
        "What the malignancy classifier would change (Fig 5.4)",
        "Each block: the decoded noisy crop x_t, then the derivative of log p(benign) and of log p(malignant) "
        "by it; red "
        "asks for brighter, blue for darker, each picture scaled by itself; green: the nodule of the label map.",
    ),
    "latent_gradients": (
        "What guidance adds to the latent (Fig 5.5)",
        "The same nodules: gradient with respect to the latent inside the guided area, first three channels as "
        "colours, "
        "each picture scaled by itself; grey is zero.",
    ),
    "scale_sweep": (
        "Growing guidance of malignancy (Fig 5.8)",
        "Each row is one nodule with one noise; from left to right s grows.",
    ),
    "side_by_side": ("Whole slices under strong guidance (Fig 5.9)", "The same map and noise."),
    "feature_sweep": (
        "Each feature turned (Fig 5.7)",
        "One nodule, one noise; each row asks for one feature's values and for nothing else; of malignancy, "
        "benign stands under 1 and malignant under 5.",
    ),
    "convergence": (
        "Which features can be read from noisy nodules (Sec 4.2)",
        "Skill of a short training for each feature on held-out nodules, by band of timesteps: 1 minus loss "
        "over that of "
        "the best constant answer, labels weighted equally. Dotted: not told from chance over all timesteps.",
    ),
}  # fmt: skip


def _figure(pictures: Mapping[str, bytes], name: str, title: str, caption: str) -> str:
    if name not in pictures:
        return ""
    head = f"<h2>{html.escape(title)}</h2>" if title else ""
    note = f"<p><small class='caption'>{html.escape(caption)}</small></p>"
    return head + image_html(pictures[name], title or name) + note


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _introduction(content: Mapping[str, Any]) -> str:
    done = {arm: e["num_seeds"] for arm, e in content["arms"].items()}
    left = {arm: n for arm, n in done.items() if n < content["num_seeds"]}
    missing = ", ".join(f"{html.escape(arm)} {n}" for arm, n in left.items())
    bad = (
        f"<p class='bad'>Unfinished: of {content['num_seeds']} seeds there are {missing}; the same command goes on.</p>"
    )
    size = " x ".join(map(str, content["image_size"]))
    some = "" if content["num_slices"] == content["num_slices_found"] else f" of {content['num_slices_found']}"
    settings = content["settings"]
    return (
        f"<p>{len(done)} arms ({', '.join(map(html.escape, done))}) made a slice of {size} for each of "
        f"{content['num_slices']}{some} test slices with a nodule ({content['num_nodules']} nodules, "
        f"{content['num_patients']} patients of {html.escape(content['dataset']['name'])}), for each of "
        f"{content['num_seeds']} seed(s) from the same noise; {html.escape(settings['sampler'])} with "
        f"{settings['num_steps']} steps, guidance scale {settings['scale']:g}. Compared with "
        f"<b>{html.escape(content['baseline'])}</b>.</p>{bad if left else ''}"
    )


def _table_note(content: Mapping[str, Any]) -> str:
    return (
        f"<p>Value &plusmn; deviation (over images; for distances over {content['num_seeds_compared']} "
        "seed(s)), its 95 % "
        f"interval by patient, n; below it the paired difference to {html.escape(content['baseline'])}. In italics: "
        "the text's Tables 5.1 and 5.2.</p>"
    )

# SPDX-License-Identifier: Apache-2.0
"""Tables of the lung CT experiment as HTML, the text's numbers beside them."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from monai_synth.data.semantic import FEATURES
from monai_synth.experiments.lsdm_convergence import TEXT_CONVERGED
from monai_synth.experiments.lsdm_source import Arm
from monai_synth.inference.guidance import MALIGNANCY
from monai_synth.page import table_html

# LSDM thesis, Tables 5.1 and 5.2: mean and deviation
TEXT_5_1 = {
    "SPADE": {"fid": (29.86, 1.73), "ssim": (0.42, 0.04), "ms_ssim": (0.82, 0.03), "lpips": (0.09, 0.02)},
    "LDM": {"fid": (26.05, 1.89), "ssim": (0.28, 0.08), "ms_ssim": (0.83, 0.06), "lpips": (0.13, 0.05)},
    "LSDM": {"fid": (25.71, 1.66), "ssim": (0.41, 0.05), "ms_ssim": (0.86, 0.07), "lpips": (0.08, 0.04)},
    "LSDM with guidance": {"fid": (24.49, 1.70), "ssim": (0.34, 0.04), "ms_ssim": (0.83, 0.10), "lpips": (0.09, 0.03)},
}
TEXT_5_2 = {
    "SPADE": (49.83, 3.41), "LDM": (47.62, 2.95), "LSDM": (42.30, 4.02), "LSDM+mali": (61.77, 8.36),
    "LSDM+spic": (65.59, 6.58), "LSDM+lobu": (67.09, 9.94), "LSDM+text": (68.07, 7.59),
}  # fmt: skip
TITLES = {
    "fid": "FID", "kid": "KID", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "dice_lung": "Dice of lung",
    "dice_high_dense": "Dice of high-dense tissue", "crop_ssim": "SSIM of nodule crops",
    "mean_absolute_hu": "mean absolute error, HU",
}  # fmt: skip
HIGHER_IS_BETTER = ("ssim", "ms_ssim", "crop_ssim", "dice_lung", "dice_high_dense")


def text_column(arm: Arm) -> str | None:
    """The column of the text's tables that an arm is an example of."""
    if arm.model.kind == "spade_gan":
        return "SPADE"
    if arm.guidance == "none":
        return "LSDM" if arm.model.spade else "LDM"
    if not arm.model.spade:
        return None
    return "LSDM with guidance" if arm.guidance == "all" else f"LSDM+{arm.guidance}"


def title(metric: str) -> str:
    """Name of a metric for readers."""
    if metric in TITLES:
        return TITLES[metric]
    crops = " of nodule crops" if metric.startswith("crop_") else ""
    name = metric.removeprefix("crop_")
    if name in TITLES:
        return TITLES[name] + crops
    kind, _, extractor = name.partition("_")
    return f"{kind.capitalize()} distance ({extractor.replace('_', ' ')}){crops}"


def number(value: float | None) -> str:
    """Three or four digits that matter."""
    if value is None:
        return "not measured"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def spread(result: Mapping[str, Any]) -> str:
    """Value and standard deviation."""
    if result["value"] is None:
        return "not measured"
    sd = result.get("sd")
    return number(result["value"]) + (f" &plusmn; {number(sd)}" if sd is not None else "")


def interval(result: Mapping[str, Any]) -> str:
    """95 % interval as text."""
    if not result.get("ci"):
        return "no interval"
    return f"{number(result['ci'][0])} to {number(result['ci'][1])}"


def cell(result: Mapping[str, Any] | None) -> str:
    """One number with its interval, n and difference."""
    if result is None:
        return "&ndash;"
    known = f"{interval(result)}, " if result.get("ci") else ""
    lines = [f"<b>{spread(result)}</b>", f"<small>{known}n={result['n']}</small>"]
    difference = result.get("difference")
    if difference and difference["value"] is not None:
        minus = html.escape(difference["minus"])
        sign = "+" if difference["value"] > 0 else ""
        told = f" ({interval(difference)})" if difference["ci"] else ""
        lines.append(f"<small>vs {minus}: {sign}{number(difference['value'])}{told}</small>")
    return "".join(lines)


def main_table(table: Mapping[str, Any], arms: Mapping[str, Any], real: Mapping[str, Any] | None = None) -> str:
    """Table 5.1 or 5.2: a row for each arm, the text's numbers in it.

    Args:
        table: arm -> metric -> result.
        arms: of ``results.json``.
        real: metric -> result of real slices.
    """
    metrics = list(dict.fromkeys(metric for found in table.values() for metric in found))
    rows = []
    for arm, found in table.items():
        column = arms[arm]["text_column"]
        told = {metric: _text(metric, column) for metric in metrics}
        cells = [
            cell(found.get(metric)) + (f"<small><i>the text: {told[metric]}</i></small>" if told[metric] else "")
            for metric in metrics
        ]
        rows.append([f"{html.escape(arm)}<small>{html.escape(column or '')}</small>", *cells])
    if real is not None:
        rows.append(["real slices", *(cell(real[metric]) if metric in real else "&ndash;" for metric in metrics)])
    return table_html(["", *(html.escape(title(metric)) + _direction(metric) for metric in metrics)], rows)


def _direction(metric: str) -> str:
    return " &uarr;" if metric in HIGHER_IS_BETTER else " &darr;"


def _text(metric: str, column: str | None) -> str:
    found = TEXT_5_2.get(column or "") if metric == "crop_fid" else TEXT_5_1.get(column or "", {}).get(metric)
    return f"{found[0]:.2f} &plusmn; {found[1]:.2f}" if found else ""


def missing_columns(arms: Mapping[str, Any]) -> list[str]:
    """Columns of the text's tables that no arm is an example of."""
    there = {entry["text_column"] for entry in arms.values()}
    return [name for name in dict.fromkeys([*TEXT_5_1, *TEXT_5_2]) if name not in there]


def reconstruction_table(found: Mapping[str, Any]) -> str:
    """What the autoencoder loses."""
    return table_html(["real slice against its reconstruction", ""], [[title(k), cell(v)] for k, v in found.items()])


def sweep_table(found: Mapping[str, Any], part: str) -> str:
    """Measures of a sweep, a row for each setting."""
    head = [
        "asked of the nodule",
        "mean HU inside",
        "moved inside, HU",
        "moved outside, HU",
        "the classifier reads",
        "n",
    ]
    unguided = {f: e for f, e in found["unguided"].items() if part == "feature" or f == MALIGNANCY}
    rows = [[f"{html.escape(name)}, unguided", *_row(entry)] for name, entry in unguided.items()]
    rows += [[html.escape(name), *_row(entry)] for name, entry in found[part].items()]
    return table_html(head, rows)


def _row(entry: Mapping[str, Any]) -> list[str]:
    keys = ("mean_hu", "mean_change_hu", "change_outside_hu")
    return [*(f"{entry[key]:.1f}" for key in keys), f"{entry['reading']:.2f}", str(entry["n"])]


def gradient_table(times: Mapping[str, Any]) -> str:
    """Mean derivative in the nodule and around it, by timestep."""
    rows = []
    for t, entry in times.items():
        benign = entry["benign"]
        rows.append([t, cell(benign["centre"]), cell(benign["boundary"]), f"{entry['mean_probability_malignant']:.2f}"])
    head = ["t", "inside the nodule, towards benign", "ring around it, towards benign", "mean p(malignant)"]
    return table_html(head, rows)


def convergence_table(found: Mapping[str, Any]) -> str:
    """Skill of each feature by band of timesteps."""
    times = [f"t {first} to {last}" for first, last in found["bands"]]
    head = ["feature", "learned", "the text", "all t", *times, "held-out nodules"]
    rows = []
    for feature in _by_skill(found["features"]):
        entry = found["features"][feature]
        bands = [cell(band["skill"]) for band in entry["bands"]] or ["&ndash;"] * len(found["bands"])
        whole = cell(entry["skill"]) if entry["skill"] else html.escape(entry["why"])
        labels = ", ".join(f"{count} of {value}" for value, count in entry["labels"].items())
        verdict = {True: "yes", False: "no", None: "cannot tell"}[entry["learned"]]
        rows.append(
            [feature.replace("_", " "), verdict, "converged" if feature in TEXT_CONVERGED else "did not",
             whole, *bands, f"{entry['n']} <small>({labels})</small>"]
        )  # fmt: skip
    return table_html(head, rows)


def _by_skill(features: Mapping[str, Any]) -> Sequence[str]:
    return sorted(FEATURES, key=lambda f: -((features[f]["skill"] or {}).get("value") or -9.0))

# SPDX-License-Identifier: Apache-2.0
"""The fidelity page: answers in words first, then figures, then tables with what each number means."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from monai_synth.evaluate import fidelity_figures as figures_of
from monai_synth.evaluate.fidelity_text import absent_labels, label_of, meaning, shown
from monai_synth.evaluate.image_sets import NAMES
from monai_synth.evaluate.mask_fidelity import STATISTICS
from monai_synth.page import answer_html, image_html, page, settings_html, table_html, warnings_html

_STYLE = "td small{white-space:nowrap}.own{font-weight:bold}.note{color:#555;font-size:90%}"


def fidelity_page(
    content: Mapping[str, Any], pictures: Mapping[str, Mapping[str, bytes]], figures: Mapping[str, Any]
) -> str:
    """The page, with everything in it.

    Args:
        content: of ``fidelity.json``.
        pictures: set -> class -> PNG.
        figures: of `fidelity_parts`.
    """
    whole = [e for e in content["pairs"] if e["class"] is None]
    by_class = [e for e in content["pairs"] if e["class"] is not None]
    keys = list(dict.fromkeys(key for e in whole for key in e["metrics"]))
    parts = [answer_html(row["question"], row["answer"], row["tone"]) for row in content["answers"]]
    parts += [_warnings(content), _images(pictures, ("synthetic",)), _figures(content, whole, keys, figures)]
    parts.append(
        "<h2>Tables</h2><p>Each row compares two sets of images. Real against real, where it is there, is what perfect "
        "synthetic images would reach; a control shows images that have nothing to do with them.</p>"
    )
    parts += [_table(whole, keys), _verdicts(whole), _text_note(whole)]
    parts.append(_within(content))
    if content.get("paired"):
        parts.append(_paired(content["paired"]))
    parts += [_hu(content), _masks(content), _consistency(content)]
    parts.append(_meanings(content, keys))
    if by_class:
        parts.append("<h2>Each class by itself</h2>" + _table(by_class, keys))
    parts += ["<h2>The sets</h2>", _sets(content["sets"])]
    parts.append(_images(pictures, ("real_train", "control")))
    details = {**content["settings"], "seed": content["seed"], "versions": content["versions"]}
    details |= {f"recipe of {key}": text for key, text in content["recipe"].items()}
    details |= {f"weights of {key}": f"SHA-256 {e['weights_sha256']}" for key, e in content["extractors"].items()}
    parts.append(settings_html(details))
    return page(f"Fidelity of synthetic images: {content['sets']['synthetic']['dataset']}", parts, _STYLE)


def _warnings(content: Mapping[str, Any]) -> str:
    lines, places = list(content["warnings"]), {}
    for entry in content["pairs"]:
        for key, number in entry["metrics"].items():
            for text in number["warnings"]:
                name = meaning(key)[0].rstrip(" ↓↑").split(",")[0]
                found = places.setdefault((name, text), [])
                found += [label_of(entry)] if label_of(entry) not in found else []
    merged: dict[str, dict[str, list[str]]] = {}
    for (name, text), labels in places.items():
        merged.setdefault(text, {}).setdefault(", ".join(labels), []).append(name)
    for text, groups in merged.items():
        lines += [f"{', '.join(names)} of {labels}: {text}" for labels, names in groups.items()]
    return warnings_html(lines + list(content.get("notes", ())))


def _images(pictures: Mapping[str, Mapping[str, bytes]], keys: Sequence[str]) -> str:
    parts = []
    for key in keys:
        if key not in pictures:
            continue
        parts.append(f"<h2>Images: {html.escape(NAMES[key])}</h2>")
        for name, data in pictures[key].items():
            title = html.escape(name) if key != "control" and name != "all" else ""
            parts.append(f"<p>{title}{'<br>' if title else ''}{image_html(data, f'{NAMES[key]} {name}')}</p>")
            if key == "control":
                break  # its classes do not matter
    return "".join(parts)


def _figures(
    content: Mapping[str, Any], whole: Sequence[Mapping[str, Any]], keys: Sequence[str], figures: Mapping[str, Any]
) -> str:
    parts = [_chart(whole, key) for key in keys if key.startswith(("fid", "frechet", "nodule_f"))]
    for key in content["extractors"]:
        picture = figures_of.neighbours_png([e for e in whole if e["b"] != "control"], key)
        if picture:
            parts.append(f"<h3>Precision and recall: {html.escape(content['extractors'][key]['title'])}</h3>")
            parts.append(image_html(picture, "precision, recall, density and coverage with intervals"))
    if "hu" in figures:
        parts.append("<h3>Hounsfield units</h3>" + image_html(figures_of.hu_png(figures["hu"]), "shares of HU"))
    absent = absent_labels(content)
    for name in next(iter(figures["masks"].values())).rows if "masks" in figures else ():
        picture = None if name in absent else figures_of.masks_png(figures["masks"], name)
        if picture:
            parts.append(f"<h3>Objects of the masks: {html.escape(name.replace('_', ' '))}</h3>")
            parts.append(image_html(picture, f"area, number and shape of {name}"))
    if "consistency" in figures:
        found = figures["consistency"]
        numbers = ", ".join("-" if d != d else f"{d:.2f}" for d in found["dice"])
        parts.append(
            "<h3>Synthetic images and their masks</h3><p class='note'>From the worst to the best. Below: the mask that "
            "the image was made with or for (yellow) and what a segmenter trained on real pairs finds (blue). Dice: "
            f"{numbers}.</p>{image_html(figures_of.consistency_png(found), 'images with masks')}"
        )
    return f"<h2>Figures</h2>{''.join(parts)}" if any(parts) else ""


def _table(entries: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Few columns: one table for each network's features, one for similarities."""
    quoted = {key for key in ("fid", "ssim") if any(e["text"] for e in entries) and key in keys}
    groups: dict[str, list[str]] = {}
    for key in keys:
        nodule = "nodule " if key.startswith("nodule_") else ""
        _, _, extractor = key.removeprefix("nodule_").partition("_")
        name = "similarity" if key in ("ssim", "ms_ssim", "lpips") else nodule + (extractor or "inception")
        groups.setdefault(name, []).append(key)
    parts = []
    for columns in groups.values():
        head = ["sets"]
        for key in columns:
            head += [_name(key), *(["<small>the text</small>"] if key in quoted else [])]
        rows = []
        for entry in entries:
            own = "synthetic" in (entry["a"], entry["b"]) and "control" not in entry["b"]
            row = [f"<span class='own'>{html.escape(label_of(entry))}</span>" if own else html.escape(label_of(entry))]
            for key in columns:
                row.append(number_html(key, entry["metrics"][key]) if key in entry["metrics"] else "-")
                if key in quoted:
                    row.append(f"<small>{entry['text'][key]:g}</small>" if entry["text"] else "")
            rows.append(row)
        parts.append(table_html(head, rows))
    return "".join(parts)


def _text_note(entries: Sequence[Mapping[str, Any]]) -> str:
    if not any(e["text"] for e in entries):
        return ""
    return (
        "<p><small>“The text”: Table 1 of the text on class-conditional chest X-rays (28 x 28, FID with pytorch-fid, "
        "SSIM by order of files), other images than here. Its FID can be compared with FID only, and some of its sets "
        "had about 100 images.</small></p>"
    )


def _verdicts(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the kernel distances say of the sets, in words; they alone are 0 for equal distributions."""
    lines = []
    for entry in entries:
        numbers = [n for key, n in entry["metrics"].items() if key.startswith(("kid", "kernel")) and n["ci"]]
        if "control" not in (entry["a"], entry["b"]) and numbers:
            apart = any(number["ci"][0] > 0 for number in numbers)
            what = (
                "differ by more than chance" if apart else "cannot be told apart by these features and so many images"
            )
            lines.append(f"<li>{html.escape(label_of(entry))}: they {what}.</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _chart(entries: Sequence[Mapping[str, Any]], key: str) -> str:
    """Bars with intervals, as SVG; without the control, beside which all others would vanish."""
    entries = [e for e in entries if e["b"] != "control" and key in e["metrics"]]
    numbers = [(e, e["metrics"][key]) for e in entries if e["metrics"][key]["value"] is not None]
    if not numbers:
        return ""
    top = max([n["ci"][1] if n["ci"] else n["value"] for _, n in numbers] + [1e-12])
    left, width, step = 230, 460, 26
    rows = []
    for i, (entry, number) in enumerate(numbers):
        y = i * step + 4
        colour = figures_of.COLOURS["synthetic" if "synthetic" in (entry["a"], entry["b"]) else "real_train"]
        x = left + width * number["value"] / top
        rows.append(f"<text x='{left - 8}' y='{y + 13}' text-anchor='end'>{html.escape(label_of(entry))}</text>")
        rows.append(f"<rect x='{left}' y='{y}' width='{x - left:.1f}' height='17' fill='{colour}'/>")
        if number["ci"]:
            low, high = (left + width * max(0.0, edge) / top for edge in number["ci"])
            rows.append(f"<path d='M{low:.1f} {y + 8}H{high:.1f}' stroke='#222' stroke-width='2'/>")
            x = max(x, high)
        rows.append(f"<text x='{x + 6:.1f}' y='{y + 13}'>{shown(key, number['value'])}</text>")
    size = f"width='{left + width + 80}' height='{len(numbers) * step + 4}'"
    style = "font-family='sans-serif' font-size='13'"
    return f"<h3>{_name(key)}</h3><svg xmlns='http://www.w3.org/2000/svg' {size} {style}>{''.join(rows)}</svg>"


def _within(content: Mapping[str, Any]) -> str:
    records = {key: r["within"] for key, r in content["sets"].items() if key != "control"}
    keys = list(dict.fromkeys(key for within in records.values() for key in within))
    if not any(number["value"] is not None for within in records.values() for number in within.values()):
        return ""
    rows = [[html.escape(NAMES[key]), *(number_html(k, within[k]) for k in keys)] for key, within in records.items()]
    return (
        "<h3>Variety within each set</h3><p>How alike two random images of one set are, of two patients: the less "
        "(LPIPS: the more), the more varied the set.</p>" + table_html(["set", *(_name(key) for key in keys)], rows)
    )


def _paired(paired: Mapping[str, Any]) -> str:
    rows = []
    for key, number in paired["metrics"].items():
        sd = number.get("sd")
        rows.append([_name(key), number_html(key, number), "-" if sd is None else shown(key, sd, 3)])
    return (
        f"<h3>Paired: a synthetic image against the real image of the same map</h3><p>{paired['n']} of "
        f"{paired['num_synthetic']} synthetic images have one, of {paired['num_patients']} patients.</p>"
        + table_html(["metric", "mean", "sd of images"], rows)
    )


def _hu(content: Mapping[str, Any]) -> str:
    entries = [e for e in content["pairs"] if "hu" in e]
    if not entries:
        return ""
    keys = [key for key in ("synthetic", "real_train", "real_test", "control") if "hu" in content["sets"].get(key, {})]
    names = list(dict.fromkeys(name for e in entries for name in e["hu"]))
    rows = []
    for name in names:
        row = [html.escape(name.replace("_", " "))]
        for key in keys:
            s = content["sets"][key]["hu"].get(name)
            row.append(f"{s['mean']:.0f} ± {s['sd']:.0f}<br><small>n = {s['n']}</small>" if s and s["n"] else "-")
        row += [number_html("hu", e["hu"][name]["wasserstein"]) if name in e["hu"] else "-" for e in entries]
        rows.append(row)
    head = ["", *(f"{NAMES[key]}: mean ± sd" for key in keys), *(f"distance {label_of(e)}" for e in entries)]
    return (
        "<h3>Hounsfield units</h3><p>Mean and standard deviation of the pixels under each label, and how far the "
        "values of two sets are apart on average (Wasserstein-1): 0 for equal sets; n counts the images that have the "
        "label.</p>" + table_html(head, rows)
    )


def _masks(content: Mapping[str, Any]) -> str:
    entries = [e for e in content["pairs"] if "masks" in e]
    if not entries:
        return ""
    keys = [key for key in ("synthetic", "real_train", "real_test") if content["sets"].get(key, {}).get("masks")]
    rows, absent = [], absent_labels(content)
    for name in dict.fromkeys(name for e in entries for name in e["masks"] if name not in absent):
        for statistic, (unit, text) in STATISTICS.items():
            title = f"{name}: {statistic}".replace("_", " ")
            row = [f"{html.escape(title)}{f', {unit}' if unit else ''}<br><small>{text}</small>"]
            for key in keys:
                s = content["sets"][key]["masks"].get(name, {}).get(statistic, {"n": 0})
                sd = f" ± {s['sd']:.3g}" if s["n"] > 1 else ""
                row.append(f"{s['mean']:.3g}{sd}<br><small>n = {s['n']} {s['of']}</small>" if s["n"] else "-")
            for e in entries:
                found = e["masks"].get(name, {}).get(statistic)
                gap = found["kolmogorov_smirnov"]["value"] if found else None
                said = "" if gap is None else f"<br><small>gap {gap:.2f}</small>"
                row.append(number_html("mask", found["wasserstein"]) + said if found else "-")
            rows.append(row)
    head = ["", *(f"{NAMES[key]}: mean ± sd" for key in keys), *(f"distance {label_of(e)}" for e in entries)]
    missing = f" In no mask: {html.escape(', '.join(absent).replace('_', ' '))}." if absent else ""
    return (
        "<h3>Masks</h3><p>The distance (Wasserstein-1, in the unit of the row) says how far the values must be moved "
        "on average to become those of the other set; gap: the largest one of the cumulative shares (0 to 1, "
        f"Kolmogorov-Smirnov).{missing}</p>" + (table_html(head, rows) if rows else "")
    )


def _consistency(content: Mapping[str, Any]) -> str:
    found = content.get("consistency")
    if not found:
        return ""
    rows = [
        [
            html.escape(name.replace("_", " ")),
            *(number_html("dice", row[key]) for key in ("synthetic", "real", "difference")),
        ]
        for name, row in found["labels"].items()
    ]
    return (
        "<h3>Image and mask</h3><p>Dice of the mask and of what a segmenter finds in the image, which learned from "
        f"{found['n_training']} real pairs: of synthetic images with their masks, of real pairs that it has not seen, "
        "and the difference of the two. Equal numbers mean that synthetic images show their masks as real ones do.</p>"
        + table_html(["label", "synthetic", "real, unseen", "difference"], rows)
    )


def _meanings(content: Mapping[str, Any], keys: Sequence[str]) -> str:
    paired = list((content.get("paired") or {}).get("metrics", ()))
    items = "".join(
        f"<li><b>{_name(key)}</b>: {html.escape(meaning(key)[1])}</li>" for key in dict.fromkeys([*keys, *paired])
    )
    return (
        f"<h2>What the numbers mean</h2><ul>{items}<li><b>[a, b]</b>: 95 % interval, how far the number would move "
        "with other patients, as many and of the same kind; <b>n</b>: images of each set, or pairs of images.</li></ul>"
    )


def _sets(sets: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for key, record in sets.items():
        # A control may have many classes, which do not matter.
        classes = ", ".join(f"{name} {num}" for name, num in record["classes"].items())
        classes = "-" if key == "control" or set(record["classes"]) == {"all"} else classes
        cells = (record["dataset"], f"{record['n']} of {record['num_available']}", record["num_patients"], classes)
        changes = "; ".join(record["changes"]) or "none"
        rows.append([html.escape(NAMES[key]), *(html.escape(str(cell)) for cell in (*cells, changes))])
    head = ("set", "dataset", "images", "patients", "classes", "changed by")
    return table_html(head, rows, css="settings")


def _name(key: str) -> str:
    return html.escape(meaning(key)[0])


def number_html(key: str, number: Mapping[str, Any]) -> str:
    """Value, interval and n of a result."""
    n = f"{number['n']}" if isinstance(number["n"], int) else " / ".join(map(str, number["n"]))
    if number["value"] is None:
        return f"-<br><small>n = {n}</small>"
    interval = "<br>[{}, {}]".format(*(shown(key, edge, 3) for edge in number["ci"])) if number["ci"] else ""
    return f"{shown(key, number['value'])}<small>{interval}<br>n = {n}</small>"

# SPDX-License-Identifier: Apache-2.0
"""What the numbers of fidelity are called, what each means, and what they say of the synthetic images, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scipy import stats

from monai_synth.evaluate.image_sets import NAMES

_EXTRACTORS = {
    "classifier": ("classifier features", "as the classifier given sees them"),
    "inception": ("Inception features", "as a network trained on photographs sees them"),
    "inception_clean": ("Inception features, clean resize", "as a network trained on photographs sees them"),
    "unknown_inception": ("unknown Inception weights", "by a network of unknown origin"),
    "unknown_inception_clean": ("unknown Inception weights, clean resize", "by a network of unknown origin"),
    "radimagenet": ("RadImageNet features", "as a network trained on CT, MR and ultrasound sees them"),
    "unknown_radimagenet": ("unknown RadImageNet weights", "by a network of unknown origin"),
}
# Name of a metric as printed, and one sentence that says what it means. {} is what the extractor is.
_MEANINGS = {
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
    "frechet": (
        "Fréchet distance, {} ↓",
        "Distance of the two sets {}; it is not FID, and only values from the same weights file can be compared.",
    ),
    "kernel": (
        "Kernel distance, {} ↓",
        "The same comparison without the error for few images: around 0 (also a little below) where the sets cannot be "
        "told apart; not KID.",
    ),
    "precision": (
        "Precision, {} ↑",
        "Share of the synthetic images that look as real ones do, {}: each lies near a real image.",
    ),
    "recall": (
        "Recall, {} ↑",
        "Share of the real images that the synthetic set could have held, {}: each lies near a synthetic image.",
    ),
    "density": (
        "Density, {} ↑",
        "How densely real images surround the synthetic ones, {}: about 1 for sets of one kind; more means that they "
        "keep to the common looks.",
    ),
    "coverage": (
        "Coverage, {} ↑",
        "Share of the real images that have a synthetic one near them, {}; unlike recall it is not fooled by outliers.",
    ),
    "ssim": (
        "SSIM",
        "How alike an image of one set and a random image of the other are, pixel by pixel: 1 for equal images, near 0 "
        "for unrelated ones. Two sets of real images show what to expect; more than that can mean too little variety.",
    ),
    "ms_ssim": ("MS-SSIM", "SSIM at several resolutions, so that fine grain counts less and the large forms more."),
    "lpips": (
        "LPIPS",
        "How different two images look to a network that was calibrated on people: 0 for equal images, larger for more "
        "different ones.",
    ),
    "hu_error": ("HU error ↓", "Mean absolute difference of the two images, in HU."),
}


_SURE = 2.576  # standard errors, 99 %: a page asks several questions, and should not find one wrong each time
_ROUNDING = 2.0  # HU, of prepared slices
_LEARNED = 0.5  # Dice on real pairs below which a segmenter is no judge
_ENOUGH = 10  # real test images, for an answer that rests on them


def meaning(key: str) -> tuple[str, str]:
    """Printed name and meaning of a metric."""
    if key.startswith("nodule_"):
        name, text = meaning(key.removeprefix("nodule_"))
        return f"Nodule crops: {name}", f"On crops of 64 x 64 pixels around each nodule. {text}"
    if key in _MEANINGS:
        return _MEANINGS[key]
    kind, _, extractor = key.partition("_")
    if kind in _MEANINGS and extractor:
        name, seen = _EXTRACTORS.get(extractor, (extractor.replace("_", " "), f"by {extractor.replace('_', ' ')}"))
        title, text = _MEANINGS[kind]
        return title.format(name), text.format(seen)
    return key, ""


def shown(key: str, value: float, digits: int = 4) -> str:
    """A number as printed."""
    kind = key.removeprefix("nodule_").split("_")[0]
    if key.endswith("ssim") or kind in ("lpips", "precision", "recall", "density", "coverage", "dice"):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def label_of(entry: Mapping[str, Any]) -> str:
    """The two sets of an entry."""
    text = f"{NAMES[entry['a']]} | {NAMES[entry['b']]}"
    return text if entry["class"] is None else f"{entry['class']}: {text}"


def absent_labels(content: Mapping[str, Any]) -> list[str]:
    """Labels of which no mask of any set has a pixel: there is nothing to compare."""
    sets = [s["masks"] for s in content["sets"].values() if s.get("masks")]
    names = dict.fromkeys(name for s in sets for name in s)
    return [name for name in names if not any(s.get(name, {}).get("area", {}).get("mean") for s in sets)]


def console_lines(content: Mapping[str, Any]) -> list[str]:
    """The results as text."""
    lines, absent = [], absent_labels(content)
    for entry in content["pairs"]:
        of_class = f" ({entry['class']})" if entry["class"] is not None else ""
        lines.append(f"{NAMES[entry['a']]} | {NAMES[entry['b']]}{of_class}")
        rows = dict(entry["metrics"])
        rows |= {f"HU of {name}": r["wasserstein"] for name, r in entry.get("hu", {}).items()}
        rows |= {
            f"{name}: {key}": r["wasserstein"]
            for name, s in entry.get("masks", {}).items()
            for key, r in s.items()
            if name not in absent
        }
        lines += [_line(key, number) for key, number in rows.items()]
    if absent:
        lines.append(f"in no mask: {', '.join(absent)}")
    if content.get("paired"):
        lines.append("synthetic | real image of the same map")
        lines += [_line(key, number) for key, number in content["paired"]["metrics"].items()]
    if content.get("consistency"):
        lines.append("Dice of image and mask, by a segmenter trained on real pairs")
        for name, row in content["consistency"]["labels"].items():
            lines += [_line(f"{name}, {key}", number) for key, number in row.items()]
    for row in content["answers"]:
        lines.append(f"{row['question']} {row['answer']}")
    return lines + [f"warning: {text}" for text in content["warnings"]]


def _line(key: str, number: Mapping[str, Any]) -> str:
    n = number["n"] if isinstance(number["n"], int) else " and ".join(map(str, number["n"]))
    if number["value"] is None:
        return f"  {key:<18} not measured: {number['warnings'][0]}"
    interval = "[{:.4g}, {:.4g}]".format(*number["ci"]) if number["ci"] else "no interval"
    sd = f"  sd {number['sd']:.3g}" if number.get("sd") is not None else ""
    return f"  {key:<18} {number['value']:.4g}  {interval}{sd}  n={n}"


def answers(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """Questions of a reader and what the numbers answer: ``question``, ``answer`` and ``tone`` ("good", "poor", "")."""
    rows = [("Do the synthetic images look like the real ones?", *_alike(content))]
    rows.append(("Are they as varied?", *_varied(content)))
    if content.get("paired"):
        rows.append(("Does a synthetic image resemble the real image of the same map?", *_paired(content)))
    if any("hu" in e for e in content["pairs"]):
        rows.append(("Are the Hounsfield units right?", *_hu(content)))
    if any("masks" in e for e in content["pairs"]):
        rows.append(("Are objects as large, as many and of the same forms?", *_masks(content)))
    if content["kind"] == "pairs" or content.get("consistency"):
        rows.append(("Do masks and images agree?", *_agree(content)))
    return [dict(zip(("question", "answer", "tone"), row, strict=True)) for row in rows]


def _entry(content: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any] | None:
    found = (e for e in content["pairs"] if (e["a"], e["b"], e["class"]) == (a, b, None))
    return next(found, None)


def _main(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Synthetic against real images that no training saw, where there are enough; and real against real likewise."""
    enough = content["sets"].get("real_test", {"n": 0})["n"] >= _ENOUGH
    entry = _entry(content, "synthetic", "real_test" if enough else "real_train")
    assert entry is not None  # both sets are always there
    return entry, _entry(content, "real_train", "real_test") if enough else None


def _metrics(entry: Mapping[str, Any] | None, *starts: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, number in (entry["metrics"] if entry else {}).items():
        if key.startswith(starts) and number["value"] is not None:
            yield key, number


def _alike(content: Mapping[str, Any]) -> tuple[str, str]:
    entry, ceiling = _main(content)
    other = NAMES[entry["b"]]
    kernels = list(_metrics(entry, "kid", "kernel"))
    if not kernels:
        return "Not measured: that needs a network's features. Give --inception, --radimagenet or --extractor.", ""
    apart = any(number["ci"] and number["ci"][0] > 0 for _, number in kernels)
    measured = any(number["ci"] for _, number in kernels)
    text = f"They can be told from {other} images by more than chance." if apart else (
        f"They cannot be told from {other} images with so many images and these features."
        if measured else "There are too few images to say."
    )  # fmt: skip
    for key, number in _metrics(entry, "fid", "frechet"):
        text += f" {meaning(key)[0].rstrip(' ↓')}: {shown(key, number['value'], 3)}"
        reference = ceiling and ceiling["metrics"].get(key, {}).get("value")
        text += f", two sets of real images: {shown(key, reference, 3)}." if reference else "."
    return text, "poor" if apart else "good" if measured else ""


def _varied(content: Mapping[str, Any]) -> tuple[str, str]:
    entry, ceiling = _main(content)
    recalls = list(_metrics(entry, "recall"))
    text, tone = "", ""
    if recalls and recalls[0][1]["warnings"]:
        text = "There are too few images to say how much of the range of real ones they cover."
    elif recalls:
        key, number = recalls[0]
        cover = entry["metrics"][key.replace("recall", "coverage")]["value"]
        text = (
            f"{number['value']:.0%} of the real images lie within the range of the synthetic ones (recall), "
            f"{cover:.0%} have a synthetic one near them (coverage)"
        )
        reference = ceiling and ceiling["metrics"].get(key)
        if reference and reference["value"] is not None:
            text += f"; between two sets of real images it is {reference['value']:.0%} (recall)."
            if reference["ci"] and number["ci"]:
                less = reference["value"] - number["value"]
                tone = "poor" if less > max(_reach(reference, number), 0.05) else "good"
        else:
            text += "."
    made, real = (content["sets"][k].get("within", {}).get("ms_ssim") for k in ("synthetic", "real_train"))
    if made and real and made["value"] is not None and real["value"] is not None:
        text += (
            f" Two random synthetic images are {made['value']:.3f} alike (MS-SSIM), two real ones {real['value']:.3f}: "
        )
        gap = made["value"] - real["value"]
        reach = _reach(made, real)
        if not (made["ci"] and real["ci"]):
            text += "too few to compare."
        elif gap > reach:
            text += "the synthetic set repeats itself more."
            tone = "poor"
        else:
            text += "no less varied." if gap >= -reach else "more varied, which can also be noise."
            tone = tone or "good"
    return text.strip() or "Not measured: the images are too small, or too few.", tone


def _reach(*numbers: Mapping[str, Any]) -> float:
    """How far two numbers may differ by chance."""
    return _SURE * sum((number["standard_error"] or 0) ** 2 for number in numbers) ** 0.5


def _paired(content: Mapping[str, Any]) -> tuple[str, str]:
    paired = content["paired"]
    parts = [
        f"{meaning(key)[0].rstrip(' ↓')} {shown(key, r['value'], 3)} ± {shown(key, r['sd'], 3)}"
        for key, r in paired["metrics"].items()
        if r["value"] is not None and r.get("sd") is not None
    ]
    of = f"{paired['n']} image{'s' * (paired['n'] != 1)} of {paired['num_patients']} "
    of += f"patient{'s' * (paired['num_patients'] != 1)}"
    if not parts:
        return f"There are too few pairs to say: {of}.", ""
    ceiling = _entry(content, "real_train", "real_test")
    other = ceiling and ceiling["metrics"].get("ssim", {}).get("value")
    text = f"{', '.join(parts)} (mean ± sd of {of})."
    return text + (f" Two real images of different cases: SSIM {other:.3f}." if other is not None else ""), ""


def _hu(content: Mapping[str, Any]) -> tuple[str, str]:
    entry, ceiling = _main(content)
    if "hu" not in entry:
        return "Not measured.", ""
    whole = next(iter(entry["hu"]))
    number = entry["hu"][whole]["wasserstein"]
    text = f"On average they are {number['value']:.0f} HU from those of {NAMES[entry['b']]} images"
    tone = ""
    if ceiling and "hu" in ceiling:
        reference = ceiling["hu"][whole]["wasserstein"]
        text += f"; two sets of real images are {reference['value']:.0f} HU apart"
        high = (reference["ci"] or [0, reference["value"]])[1]
        tone = "good" if number["value"] <= max(high, _ROUNDING) else "poor"
    elif number["value"] > _ROUNDING:
        edges = entry["hu"][whole]["mean_difference"]["ci"]
        tone = "poor" if edges and (edges[0] > 0 or edges[1] < 0) else ""
    rest = {
        name: row["mean_difference"]["value"]
        for name, row in entry["hu"].items()
        if name != whole and row["mean_difference"]["value"] is not None
    }
    if rest:
        worst = max(rest, key=lambda name: abs(rest[name]))
        text += f". Farthest off in the mean is {worst.replace('_', ' ')} with {rest[worst]:+.0f} HU"
    return text + ".", tone


def _masks(content: Mapping[str, Any]) -> tuple[str, str]:
    entry, _ = _main(content)
    absent = absent_labels(content)
    rows = {
        f"{name}: {key}".replace("_", " "): row["mean_difference"]
        for name, found in entry.get("masks", {}).items()
        for key, row in found.items()
        # a standard error of 0 is that of a set whose values are all equal
        if name not in absent and row["mean_difference"]["standard_error"] is not None
    }
    num = len(rows)
    sure = float(stats.norm.ppf(1 - 0.025 / max(1, num)))  # all together are wrong in 5 of 100 reports
    off = [
        f"{name} {'larger' if row['value'] > 0 else 'smaller'}"
        for name, row in rows.items()
        if abs(row["value"]) > sure * row["standard_error"]
    ]
    if not num:
        return "There are too few masks to say; see the table.", ""
    if not off:
        return f"No difference of the means beyond chance in {num} statistics of the masks.", "good"
    return f"In {len(off)} of {num} statistics the means differ by more than chance: {'; '.join(off[:6])}.", "poor"


def _agree(content: Mapping[str, Any]) -> tuple[str, str]:
    found = content.get("consistency")
    if not found:
        return "Not measured: --consistency trains a segmenter on the real pairs that judges it.", ""
    row = found["labels"].get("all labels") or next(iter(found["labels"].values()))
    made, real, difference = row["synthetic"], row["real"], row["difference"]
    if made["value"] is None or real["value"] is None:
        return "Not measured: no mask has anything in it.", ""
    text = (
        f"A segmenter trained on real pairs finds the masks of synthetic images with Dice {made['value']:.2f}, those "
        f"of real ones that it has not seen with {real['value']:.2f}"
    )
    if real["value"] < _LEARNED:
        return text + ": it has learned too little to judge; give more --consistency-steps or --consistency-size.", ""
    if not difference["ci"]:
        return text + ".", ""
    if difference["ci"][1] < 0:
        return text + ": synthetic images show their masks less clearly than real ones.", "poor"
    if difference["ci"][0] > 0:
        return text + ": synthetic images are easier than real ones, perhaps too clear.", ""
    return text + ": as consistent as real pairs.", "good"

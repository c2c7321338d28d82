# SPDX-License-Identifier: Apache-2.0
"""Fidelity of synthetic images: every pair of sets of the X-ray text's Table 1, every metric that the inputs allow.

A distance between the real training and test images stands first: it is what a perfect generator would reach.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_synth.checks import chosen_device
from monai_synth.errors import UserError
from monai_synth.evaluate import features as door
from monai_synth.evaluate import similarity
from monai_synth.evaluate.distribution import frechet_result, kernel_result
from monai_synth.evaluate.feature_cache import FeatureCache
from monai_synth.evaluate.fidelity_report import check_report, write_report
from monai_synth.evaluate.image_sets import NAMES, ImageSet, read_sets
from monai_synth.export.provenance import package_versions

# Table 1 of the X-ray text: pairs in its order, with its FID and SSIM.
TEXT_PAIRS: dict[tuple[str, str], dict[str, float]] = {
    ("real_train", "real_test"): {"fid": 31.25, "ssim": 0.2996},
    ("synthetic", "real_train"): {"fid": 193.922, "ssim": 0.2713},
    ("synthetic", "real_test"): {"fid": 207.901, "ssim": 0.2833},
    ("real_train", "control"): {"fid": 176.893, "ssim": 0.0623},
    ("real_test", "control"): {"fid": 175.255, "ssim": 0.0757},
    ("synthetic", "control"): {"fid": 335.008, "ssim": 0.0424},
}
_MIX = 0.05  # difference of a class's share of two sets that is worth a warning
_MAX_VALUES = 1 << 22  # of a batch of images in double precision, of which SSIM holds about ten


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        real: prepared dataset of classes.
        synthetic: folder of sampled images.
        out: folder of the report.
        control: another prepared dataset, for comparison.
        inception: file of Inception weights.
        extractor: file of a classifier of ``experiment classifier``.
        allow_unknown_weights: take Inception weights of an unknown hash.
        max_images: of each set.
        num_pairs: pairs of images for the similarities.
        seed: of everything that is drawn.
        per_class: compare each class by itself too.
        device: "cpu" or "cuda". None: a GPU where there is one.
        batch_size: images at once.
        cache: folder of features. None: ``features`` in ``out``.
        overwrite: replace a report.
        show_real: put real images into the page.
    """

    real: str
    synthetic: str
    out: str
    control: str | None = None
    inception: str | None = None
    extractor: str | None = None
    allow_unknown_weights: bool = False
    max_images: int = 1000
    num_pairs: int = 1000
    seed: int = 0
    per_class: bool = False
    device: str | None = None
    batch_size: int = 64
    cache: str | None = None
    overwrite: bool = False
    show_real: bool = False


def evaluate_fidelity(settings: Settings, *, report: Callable[[str], object] = print) -> dict[str, Any]:
    """Compare the sets and write ``fidelity.json``, ``fidelity.csv`` and ``report.html``.

    Args:
        settings: what to compare.
        report: called with text for the console.

    Returns:
        The content of ``fidelity.json``.

    Raises:
        UserError: see `read_sets`, `features.inception` and `features.trained_classifier`; a report that is there;
        numbers out of their range.
    """
    if settings.num_pairs < 1 or settings.batch_size < 1:
        msg = f"num_pairs is {settings.num_pairs}, batch_size {settings.batch_size}; each must be 1 or more"
        raise UserError(msg)
    out = Path(settings.out).expanduser().absolute()
    check_report(out, overwrite=settings.overwrite)
    device = torch.device(chosen_device(settings.device))
    sets, warnings = read_sets(
        settings.real, settings.synthetic, settings.control, max_images=settings.max_images, seed=settings.seed
    )
    extractors = _extractors(settings, device)
    for extractor in extractors:
        if extractor.channels == 1 and sets["synthetic"].form[0] == 3:
            raise UserError(f"the {extractor.title} takes grey images, these are RGB; give one trained on RGB images")
        warnings += extractor.warnings
        if extractor.details.get("fingerprint") not in (None, sets["real_train"].fingerprint):
            warnings.append(f"the {extractor.title} was trained on another dataset than the one given as --real")
    if not extractors:
        warnings.append("no distance of distributions: give --inception (FID, KID) or --extractor for one")
    warnings += _mixes(sets, settings.per_class)
    cache = Path(settings.cache).expanduser() if settings.cache else out / "features"
    features = {extractor.key: _features(sets, extractor, cache, settings.batch_size) for extractor in extractors}
    classes = [None, *(_classes(sets) if settings.per_class else ())]
    plans = [
        (a, b, name)
        for name in classes
        for a, b in TEXT_PAIRS
        if a in sets and b in sets and not (name is not None and "control" in (a, b))
    ]
    entries = []
    with tqdm(total=len(plans), desc="pairs of sets", unit="pair") as bar:
        for a, b, name in plans:
            chosen = [np.arange(len(sets[k])) if name is None else sets[k].of_class(name) for k in (a, b)]
            metrics = _compare(sets[a], sets[b], chosen, features, extractors, settings, device)
            text = TEXT_PAIRS[a, b] if name is None else None
            entries.append({"a": a, "b": b, "class": name, "metrics": metrics, "text": text})
            bar.update()
    content = {
        "metric": "fidelity",
        "pairs": entries,
        "sets": {key: image_set.record() for key, image_set in sets.items()},
        "extractors": {
            e.key: {"title": e.title, "recipe": e.recipe, "weights_sha256": e.weights_sha256} for e in extractors
        },
        "recipe": {
            "ssim": similarity.SSIM_RECIPE,
            "ms_ssim": similarity.ms_ssim_recipe(sets["synthetic"].form[1:]),
            **{key: value for e in extractors for key, value in zip(metric_keys(e.key), [e.recipe] * 2, strict=True)},
        },
        "warnings": warnings,
        "seed": settings.seed,
        "versions": package_versions(),
        "settings": {k: v for k, v in asdict(settings).items() if k not in _PATHS} | {"device": str(device)},
    }
    write_report(out, content, sets, show_real=settings.show_real)
    for line in console_lines(content):
        report(line)
    report(f"report: {out / 'report.html'}")
    return content


_PATHS = ("real", "synthetic", "out", "control", "inception", "extractor", "cache", "overwrite", "device")


def metric_keys(extractor: str) -> tuple[str, str]:
    """Names of the Frechet and the kernel distance of an extractor; only Inception's published weights give FID."""
    return ("fid", "kid") if extractor == "inception" else (f"frechet_{extractor}", f"kernel_{extractor}")


def console_lines(content: Mapping[str, Any]) -> list[str]:
    """The results as text."""
    lines = []
    for entry in content["pairs"]:
        of_class = f" ({entry['class']})" if entry["class"] is not None else ""
        lines.append(f"{NAMES[entry['a']]} | {NAMES[entry['b']]}{of_class}")
        for key, number in entry["metrics"].items():
            n = number["n"] if isinstance(number["n"], int) else " and ".join(map(str, number["n"]))
            if number["value"] is None:
                lines.append(f"  {key:<18} not measured: {number['warnings'][0]}")
                continue
            interval = "[{:.4g}, {:.4g}]".format(*number["ci"]) if number["ci"] else "no interval"
            lines.append(f"  {key:<18} {number['value']:.4g}  {interval}  n={n}")
    return lines + [f"warning: {text}" for text in content["warnings"]]


def _extractors(settings: Settings, device: torch.device) -> list[door.Extractor]:
    found = []
    if settings.inception is not None:
        allow = settings.allow_unknown_weights
        found.append(door.inception(settings.inception, device=device, allow_unknown_weights=allow))
    if settings.extractor is not None:
        found.append(door.trained_classifier(settings.extractor, device=device))
    return found


def _features(
    sets: Mapping[str, ImageSet], extractor: door.Extractor, cache: Path, batch_size: int
) -> dict[str, np.ndarray]:
    store = FeatureCache(cache, extractor)
    total = sum(len(image_set) for image_set in sets.values())
    with tqdm(total=total, desc=f"features ({extractor.title})", unit="image") as bar:
        return {
            key: store.features(image_set.readers(), batch_size=batch_size, progress=bar.update)
            for key, image_set in sets.items()
        }


def _compare(
    a: ImageSet,
    b: ImageSet,
    chosen: Sequence[np.ndarray],
    features: Mapping[str, Mapping[str, np.ndarray]],
    extractors: Sequence[door.Extractor],
    settings: Settings,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """All metrics of the chosen images of two sets."""
    sizes = [len(c) for c in chosen]
    metrics: dict[str, dict[str, Any]] = {}
    patients = [np.asarray(s.patients)[c] for s, c in zip((a, b), chosen, strict=True)]
    for extractor in extractors:
        frechet, kernel = metric_keys(extractor.key)
        if min(sizes) < 2:
            metrics |= dict.fromkeys((frechet, kernel), _unmeasured(sizes, "2 images or more are needed on each side"))
            continue
        x, y = (features[extractor.key][s.key][c] for s, c in zip((a, b), chosen, strict=True))
        metrics[frechet] = frechet_result(x, y, *patients, seed=settings.seed)
        metrics[kernel] = kernel_result(x, y, *patients, seed=settings.seed)
    names = ("ssim", "ms_ssim")
    if min(a.form[1:]) < similarity.WINDOW:
        why = f"images of {a.form[1]} x {a.form[2]} are smaller than the window of {similarity.WINDOW} pixels"
        return metrics | dict.fromkeys(names, _unmeasured(0, why))
    if min(sizes) < 1:
        return metrics | dict.fromkeys(names, _unmeasured(0, "a side has no image"))
    seed = [settings.seed, zlib.crc32(f"{a.key} {b.key}".encode())]
    pairs = similarity.random_pairs(*sizes, settings.num_pairs, seed)
    values = _similarities(a, b, [c[p] for c, p in zip(chosen, pairs.T, strict=True)], settings.batch_size, device)
    groups = [p[i] for p, i in zip(patients, pairs.T, strict=True)]
    for name, column in zip(names, values, strict=True):
        metrics[name] = similarity.mean_of_pairs(column, *groups) | {"warnings": []}
    return metrics


def _similarities(
    a: ImageSet, b: ImageSet, chosen: Sequence[np.ndarray], batch_size: int, device: torch.device
) -> np.ndarray:
    """SSIM and MS-SSIM of pairs, (2, P)."""
    readers = a.readers(), b.readers()
    rows = []
    step = max(1, min(batch_size, _MAX_VALUES // int(np.prod(a.form))))
    for start in range(0, len(chosen[0]), step):
        x, y = (
            torch.from_numpy(np.stack([read[i]() for i in c[start : start + step]])).to(device).double() / 255
            for read, c in zip(readers, chosen, strict=True)
        )
        rows.append(torch.stack([similarity.ssim(x, y), similarity.ms_ssim(x, y)]).cpu().numpy())
    return np.concatenate(rows, axis=1)


def _unmeasured(n: Any, why: str) -> dict[str, Any]:
    return {"value": None, "n": n, "ci": None, "standard_error": None, "warnings": [why]}


def _classes(sets: Mapping[str, ImageSet]) -> list[str]:
    """Of all sets but the control, whose classes do not matter."""
    return sorted({name for key, image_set in sets.items() if key != "control" for name in image_set.labels})


def _mixes(sets: Mapping[str, ImageSet], per_class: bool) -> list[str]:
    """Warnings where two sets hold the classes in other shares: part of their distance is just that."""
    shares = {
        key: {name: len(sets[key].of_class(name)) / len(sets[key]) for name in _classes(sets)}
        for key in ("synthetic", "real_train", "real_test")
        if key in sets
    }
    first = shares["synthetic"]
    off = [
        f"{name} {first[name]:.0%} against {other[name]:.0%} ({NAMES[key]})"
        for key, other in shares.items()
        for name in first
        if abs(first[name] - other[name]) > _MIX
    ]
    if not off:
        return []
    text = f"the synthetic set holds the classes in other shares than the real ones: {', '.join(off)}; part of the "
    remedy = "the classes stand by themselves below" if per_class else "--per-class compares each class by itself"
    return [text + "distances is this mix, " + remedy]

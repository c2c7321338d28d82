# SPDX-License-Identifier: Apache-2.0
"""Fidelity of synthetic images: every pair of sets of the X-ray text's Table 1, every metric that the inputs allow.

A distance between the real training and test images stands first: it is what a perfect generator would reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_synth.checks import chosen_device
from monai_synth.errors import UserError
from monai_synth.evaluate import features as door
from monai_synth.evaluate import hu_fidelity, mask_fidelity, neighbours, similarity
from monai_synth.evaluate.consistency import SegmenterOptions
from monai_synth.evaluate.feature_cache import FeatureCache, content_hash
from monai_synth.evaluate.fidelity_compare import Measures, metric_keys, neighbour_keys
from monai_synth.evaluate.fidelity_parts import judge_consistency, judge_hu, judge_masks, judge_nodules, judge_paired
from monai_synth.evaluate.fidelity_report import check_report, write_report
from monai_synth.evaluate.fidelity_sets import AnySet, CaseImages, read_any_sets
from monai_synth.evaluate.fidelity_text import answers, console_lines
from monai_synth.evaluate.image_sets import NAMES
from monai_synth.evaluate.perceptual import lpips_distance
from monai_synth.evaluate.radimagenet import radimagenet
from monai_synth.evaluate.tracking import log_report, tracking_uri
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


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        real: prepared dataset, nnU-Net raw dataset or folder of images.
        synthetic: folder of sampled images; any of these forms.
        out: folder of the report.
        control: another one, for comparison.
        inception: file of Inception weights.
        inception_resize: of ``features.INCEPTION_RESIZES``.
        radimagenet: file of RadImageNet's ResNet-50.
        lpips: file of the trunk of LPIPS.
        extractor: file of a classifier of ``experiment classifier``.
        allow_unknown_weights: take weights of an unknown hash.
        max_images: of each set.
        num_pairs: pairs of images for the similarities.
        seed: of everything that is drawn.
        per_class: compare each class by itself too.
        device: "cpu" or "cuda". None: a GPU where there is one.
        batch_size: images at once.
        cache: folder of features. None: ``features`` in ``out``.
        overwrite: replace a report.
        show_real: put real images into the page.
        consistency: train a segmenter on real pairs and let it judge images against their masks.
        consistency_steps: of its training.
        consistency_size: pixels of the longer side that it sees.
        mlflow: where to log a copy of the results. None: ``MLFLOW_TRACKING_URI`` if that is set, else nowhere.
    """

    real: str
    synthetic: str
    out: str
    control: str | None = None
    inception: str | None = None
    inception_resize: str = "tensorflow"
    radimagenet: str | None = None
    lpips: str | None = None
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
    consistency: bool = False
    consistency_steps: int = 400
    consistency_size: int = 96
    mlflow: str | None = None


def evaluate_fidelity(settings: Settings, *, report: Callable[[str], object] = print) -> dict[str, Any]:
    """Compare the sets and write ``fidelity.json``, ``fidelity.csv`` and ``report.html``.

    Args:
        settings: what to compare.
        report: called with text for the console.

    Returns:
        The content of ``fidelity.json``.

    Raises:
        UserError: see `read_any_sets` and the feature door (`features`, `radimagenet`, `perceptual`); a report that is
        there; numbers out of their range.
    """
    if settings.num_pairs < 1 or settings.batch_size < 1:
        msg = f"num_pairs is {settings.num_pairs}, batch_size {settings.batch_size}; each must be 1 or more"
        raise UserError(msg)
    out = Path(settings.out).expanduser().absolute()
    check_report(out, overwrite=settings.overwrite)
    uri = tracking_uri(settings.mlflow)
    options = SegmenterOptions(settings.consistency_steps, settings.consistency_size, settings.seed)
    device = torch.device(chosen_device(settings.device))
    kind, sets, warnings = read_any_sets(
        settings.real, settings.synthetic, settings.control, max_images=settings.max_images, seed=settings.seed
    )
    extractors, perceptual = _extractors(settings, device)
    for extractor in extractors:
        if extractor.channels == 1 and sets["synthetic"].form[0] == 3:
            raise UserError(f"the {extractor.title} takes grey images, these are RGB; give one trained on RGB images")
        warnings += extractor.warnings
        if extractor.details.get("fingerprint") not in (None, sets["real_train"].fingerprint):
            warnings.append(f"the {extractor.title} was trained on another dataset than the one given as --real")
    warnings += perceptual.warnings if perceptual else ()
    if not extractors:
        warnings.append(
            "no distance of distributions: give --inception (FID, KID), --radimagenet or --extractor for one"
        )
    warnings += _mixes(sets, settings.per_class) + _copies(sets)
    cache = Path(settings.cache).expanduser() if settings.cache else out / "features"
    features = {extractor.key: _features(sets, extractor, cache, settings.batch_size) for extractor in extractors}
    measures = Measures(
        extractors, features, perceptual, settings.num_pairs, settings.batch_size, settings.seed, device
    )
    entries = _entries(sets, measures, _classes(sets) if settings.per_class else ())
    records = {key: image_set.record() | {"within": measures.within(image_set)} for key, image_set in sets.items()}
    content: dict[str, Any] = {"metric": "fidelity", "kind": kind, "answers": [], "pairs": entries, "sets": records}
    figures: dict[str, Any] = {}
    made, real = sets["synthetic"], sets["real_train"]
    if isinstance(made, CaseImages) and isinstance(real, CaseImages):
        content["paired"] = judge_paired(made, real, measures)
        if kind == "ct":
            judge_hu(sets, content, figures, seed=settings.seed)
            judge_nodules(sets, content, measures, cache)
        if kind in ("pairs", "ct"):
            judge_masks(sets, content, figures, seed=settings.seed)
            if settings.consistency:
                judge_consistency(sets, content, figures, options, device)
    if settings.consistency and "consistency" not in content:
        warnings.append("consistency was asked for, but these images have no masks; it is for pairs and CT slices")
    content |= {
        "extractors": {
            e.key: {"title": e.title, "recipe": e.recipe, "weights_sha256": e.weights_sha256} for e in extractors
        },
        "recipe": _recipes(content, measures, made.form),
        "warnings": warnings,
        "seed": settings.seed,
        "versions": package_versions(),
        "settings": {k: v for k, v in asdict(settings).items() if k not in _PATHS} | {"device": str(device)},
    }
    if perceptual:
        content["extractors"]["lpips"] = {
            "title": perceptual.title, "recipe": perceptual.recipe, "weights_sha256": perceptual.weights_sha256,
        }  # fmt: skip
    content["answers"] = answers(content)
    write_report(out, content, sets, figures, show_real=settings.show_real)
    for line in console_lines(content):
        report(line)
    report(f"report: {out / 'report.html'}")
    values = {f"{e['a']} to {e['b']}": e["metrics"] for e in entries if e["class"] is None}
    values |= {key: content[key] for key in ("paired", "consistency") if content.get(key)}
    values |= {f"{e['a']} to {e['b']}/{key}": e[key] for e in entries for key in ("hu", "masks") if e.get(key)}
    log_report(
        uri, experiment="fidelity", run=made.dataset, values=values, params=content["settings"],
        files=[out / "report.html", out / "fidelity.json"],
    )  # fmt: skip
    return content


_PATHS = (
    "real", "synthetic", "out", "control", "inception", "radimagenet", "lpips", "extractor", "cache", "overwrite",
    "device", "mlflow",
)  # fmt: skip


def _entries(sets: Mapping[str, AnySet], measures: Measures, classes: list[str] | tuple) -> list[dict[str, Any]]:
    """Each pair of sets, as a whole and by class."""
    plans = [
        (a, b, name)
        for name in (None, *classes)
        for a, b in TEXT_PAIRS
        if a in sets and b in sets and not (name is not None and "control" in (a, b))
    ]
    entries = []
    with tqdm(total=len(plans), desc="pairs of sets", unit="pair") as bar:
        for a, b, name in plans:
            pair = sets[a], sets[b]
            chosen = [np.arange(len(s)) if name is None else s.of_class(name) for s in pair]
            patients = [np.asarray(s.patients)[c] for s, c in zip(pair, chosen, strict=True)]
            metrics = measures.of_features(*pair, chosen, patients) | measures.of_random_pairs(*pair, chosen, patients)
            is_text = name is None and not isinstance(pair[0], CaseImages)
            text = TEXT_PAIRS[a, b] if is_text else None
            entries.append({"a": a, "b": b, "class": name, "metrics": metrics, "text": text})
            bar.update()
    return entries


def _extractors(settings: Settings, device: torch.device) -> tuple[list[door.Extractor], Any]:
    """Extractors of features, and LPIPS or None."""
    allow = {"device": device, "allow_unknown_weights": settings.allow_unknown_weights}
    found = []
    if settings.inception is not None:
        found.append(door.inception(settings.inception, resize=settings.inception_resize, **allow))
    if settings.radimagenet is not None:
        found.append(radimagenet(settings.radimagenet, **allow))
    if settings.extractor is not None:
        found.append(door.trained_classifier(settings.extractor, device=device))
    return found, None if settings.lpips is None else lpips_distance(settings.lpips, **allow)


def _recipes(content: Mapping[str, Any], measures: Measures, form: tuple[int, int, int]) -> dict[str, str]:
    recipes = {"ssim": similarity.SSIM_RECIPE, "ms_ssim": similarity.ms_ssim_recipe(form[1:])}
    for e in measures.extractors:
        recipes |= dict.fromkeys(metric_keys(e.key), e.recipe)
        recipes |= dict.fromkeys(neighbour_keys(e.key), f"{neighbours.RECIPE}; features: {e.recipe}")
    if measures.perceptual:
        recipes["lpips"] = measures.perceptual.recipe
    first = content["pairs"][0]
    if "hu" in first:
        recipes["hu"] = hu_fidelity.RECIPE.format(*hu_fidelity.CT_WINDOW)
    if "masks" in first:
        recipes["masks"] = mask_fidelity.RECIPE
    if "consistency" in content:
        recipes["consistency"] = content["consistency"]["recipe"]
    return recipes


def _features(
    sets: Mapping[str, AnySet], extractor: door.Extractor, cache: Path, batch_size: int
) -> dict[str, np.ndarray]:
    store = FeatureCache(cache, extractor)
    total = sum(len(image_set) for image_set in sets.values())
    with tqdm(total=total, desc=f"features ({extractor.title})", unit="image") as bar:
        return {
            key: store.features(image_set.readers(), batch_size=batch_size, progress=bar.update)
            for key, image_set in sets.items()
        }


def _copies(sets: Mapping[str, AnySet]) -> list[str]:
    """A warning where synthetic images equal real ones, pixel by pixel."""
    hashes = {key: [content_hash(read()) for read in s.readers()] for key, s in sets.items() if key != "control"}
    real = set().union(*(found for key, found in hashes.items() if key != "synthetic"))
    num = sum(found in real for found in hashes["synthetic"])
    if not num:
        return []
    total = len(hashes["synthetic"])
    what = "all synthetic images are" if num == total else f"{num} of {total} synthetic images are"
    return [f"{what} equal to a real one, pixel by pixel: copies, of which these numbers think too well"]


def _classes(sets: Mapping[str, AnySet]) -> list[str]:
    """Of all sets but the control, whose classes do not matter."""
    return sorted({name for key, image_set in sets.items() if key != "control" for name in image_set.labels})


def _mixes(sets: Mapping[str, AnySet], per_class: bool) -> list[str]:
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

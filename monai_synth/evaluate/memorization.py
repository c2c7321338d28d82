# SPDX-License-Identifier: Apache-2.0
"""The memorization audit: are synthetic images copies of training images, more than other patients' images are?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from monai_synth.checks import chosen_device
from monai_synth.data.workers import worker_count
from monai_synth.errors import UserError
from monai_synth.evaluate import features as door
from monai_synth.evaluate.case_sets import CaseSet
from monai_synth.evaluate.memorization_audit import ImageSearch, SmallSet, nearest_by_extractor, read_small
from monai_synth.evaluate.memorization_masks import MaskSearch
from monai_synth.evaluate.memorization_pictures import poses_of
from monai_synth.evaluate.memorization_record import (
    case_rows,
    console_lines,
    extractor_records,
    recipe_of,
    set_record,
    short,
    titles_of,
)
from monai_synth.evaluate.memorization_removal import check_target, target_of, write_cleaned
from monai_synth.evaluate.memorization_report import check_report, write_report
from monai_synth.evaluate.memorization_sets import common_size, read_sets, without_training_patients
from monai_synth.evaluate.memorization_verdict import (
    MIN_PATIENTS,
    counting_p,
    fit_null,
    judge,
    mark_of,
    membership,
    rate,
    suspicious_held_out,
    tail_p,
)
from monai_synth.evaluate.tracking import log_report, tracking_uri
from monai_synth.export.provenance import package_versions


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        train: the images that the model was trained on.
        synthetic: its samples.
        out: folder of the report.
        heldout: images of other patients. None: the test (or validation) split of ``train``.
        remove: folder for a dataset without the near copies.
        level: share of false alarms that is allowed.
        size: (H, W) that all images are resized to. None: their own, at most 256 on the longer side.
        max_heldout: held-out images that are scored; a random choice.
        max_membership: training and held-out images for the membership score.
        candidates: training images that the coarse search finds for each image.
        exact: of these, how many are compared pixel by pixel.
        extractor: file of a classifier of ``experiment classifier``.
        inception: file of Inception weights.
        allow_unknown_weights: take Inception weights of an unknown hash.
        device: of the extractors.
        cache: folder of features; None keeps none.
        num_pictures: pairs on the page.
        show_real: put real images, and near copies, which show the same, into the page.
        seed: of everything that is drawn.
        workers: processes. None: one per core.
        overwrite: replace a report and a cleaned dataset.
        mlflow: where results go too.
    """

    train: str
    synthetic: str
    out: str
    heldout: str | None = None
    remove: str | None = None
    level: float = 0.01
    size: tuple[int, ...] | None = None
    max_heldout: int = 2000
    max_membership: int = 2000
    candidates: int = 12
    exact: int = 3
    extractor: str | None = None
    inception: str | None = None
    allow_unknown_weights: bool = False
    device: str | None = None
    cache: str | None = None
    num_pictures: int = 12
    show_real: bool = False
    seed: int = 0
    workers: int | None = None
    overwrite: bool = False
    mlflow: str | None = None


_TOO_ALIKE = 0.995  # threshold of small pictures above which noise on a copy would hide it
_PATHS = ("train", "synthetic", "out", "heldout", "remove", "extractor", "inception", "cache", "overwrite", "mlflow")


def evaluate_memorization(settings: Settings, *, report: Callable[[str], object] = print) -> dict[str, Any]:
    """Audit a synthetic set; write ``memorization.json``, ``memorization.csv`` and ``report.html``.

    Args:
        settings: what to compare.
        report: called with text for the console.

    Returns:
        The content of ``memorization.json``.

    Raises:
        UserError: see `read_sets`; a report or dataset that is there; numbers out of their range; weights.
    """
    _check(settings)
    out = Path(settings.out).expanduser().absolute()
    uri = tracking_uri(settings.mlflow)
    check_report(out, overwrite=settings.overwrite)
    train, held, synthetic, warnings = read_sets(
        settings.train, settings.heldout, settings.synthetic, max_heldout=settings.max_heldout, seed=settings.seed
    )
    target = target_of(settings.remove, synthetic) if settings.remove else None
    if target is not None:
        check_target(target, synthetic, overwrite=settings.overwrite)
    size, resized = common_size(train, held, synthetic, settings.size)
    extractors = _extractors(settings, synthetic)
    titles = titles_of(extractors)
    held = without_training_patients(train, held, warnings)
    for text in warnings:
        report(f"note: {text}")
    noted = len(warnings)
    workers = worker_count(settings.workers)
    with _cache(settings.cache) as cache:
        small = {
            name: read_small(cases, size, cache, f"reading {name} images")
            for name, cases in {"training": train, "held-out": held, "synthetic": synthetic}.items()
        }
        small["held-out"] = _without_identical(small, warnings)
        held = small["held-out"].cases
        search = ImageSearch(small["training"], size=size, seed=settings.seed)
        found = {
            name: search.nearest(
                small[name], num_candidates=settings.candidates, keep=settings.exact, workers=workers, label=name
            )
            for name in ("synthetic", "held-out")
        }
        nearest: dict[str, dict[str, list[dict[str, Any]]]] = {
            name: {"features": [r["features"] for r in rows], "ssim": [r["ssim"] for r in rows]}
            for name, rows in found.items()
        }
        for key, extractor in extractors.items():
            for name, cases in (("synthetic", synthetic), ("held-out", held)):
                nearest[name][key] = nearest_by_extractor(cases, train, extractor, size=size, cache=cache, label=name)
        masks = _masks(train, held, synthetic, size, settings, warnings)
        leak = _membership(search, small, settings)
    image_scores = [k for k in nearest["synthetic"] if np.isfinite([r["value"] for r in nearest["held-out"][k]]).all()]
    results = _verdicts(nearest, image_scores, held, settings.level)
    identical = np.array([r["identical"] for r in found["synthetic"]])
    flagged = np.any([results[k]["flagged"] for k in image_scores], axis=0) | identical
    mask_result = _verdicts(masks, ["mask"], held, settings.level) if masks else {}
    _warn_of_null(results, titles, settings.level, warnings)
    for text in warnings[noted:]:
        report(f"note: {text}")
    rows = case_rows(
        synthetic, train, nearest["synthetic"], results, mask_result, masks, flagged, identical, image_scores
    )
    summary: dict[str, Any] = {"near_copies": rate(flagged), "identical": rate(identical), "membership": leak}
    if mask_result:
        summary["mask_copies"] = rate(mask_result["mask"]["flagged"])
    every = {**results, **mask_result}
    content = {
        "metric": "memorization",
        **summary,
        "scores": {k: {"title": titles[k], **v["null"]} for k, v in every.items()},
        "held_out_scores": {k: [short(x) for x in v["held_out"]] for k, v in every.items()},
        "sets": {k: set_record(v) for k, v in (("training", train), ("held_out", held), ("synthetic", synthetic))},
        "extractors": extractor_records(extractors),
        "recipe": recipe_of(size, resized, extractors, bool(mask_result)),
        "warnings": warnings,
        "seed": settings.seed,
        "versions": package_versions(),
        "settings": {k: v for k, v in asdict(settings).items() if k not in _PATHS},
        "cases": rows,
    }
    pairs = {"train": train, "synthetic": synthetic, "size": size}
    write_report(out, content, pairs, num_pictures=settings.num_pictures, show_real=settings.show_real)
    for line in console_lines(content):
        report(line)
    report(f"report: {out / 'report.html'}")
    if target is not None:
        kept = _remove(target, synthetic, rows, content, settings)
        report(f"cleaned dataset: {target} ({kept} of {len(synthetic)} images kept)")
    params = {**content["settings"], "recipe": content["recipe"]}
    log_report(uri, experiment="memorization", run=synthetic.name, values=summary, params=params,
               files=[out / "report.html", out / "memorization.json"])  # fmt: skip
    return content


def _check(settings: Settings) -> None:
    if not 0 < settings.level < 0.5:
        raise UserError(f"--level is {settings.level}; allowed are shares of more than 0 and less than 0.5, e.g. 0.01")
    for name in ("max_heldout", "max_membership"):
        if getattr(settings, name) < 2:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(settings, name)}; allowed is 2 or more")
    if not 1 <= settings.exact <= settings.candidates:
        msg = f"--exact is {settings.exact}, --candidates {settings.candidates}; allowed are 1 or more, and exact "
        raise UserError(msg + "at most as many as candidates")
    if settings.seed < 0 or settings.num_pictures < 0:
        raise UserError(f"--seed is {settings.seed}, --pictures {settings.num_pictures}; allowed are 0 or more")


@contextmanager
def _cache(folder: str | None):  # type: ignore[no-untyped-def]
    """The user's folder of features, or one that is gone afterwards: features are as private as the images."""
    if folder is not None:
        yield Path(folder).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="monai-synth-") as name:
        yield Path(name)


def _extractors(settings: Settings, synthetic: CaseSet) -> dict[str, door.Extractor]:
    device = torch.device(chosen_device(settings.device)) if settings.extractor or settings.inception else None
    found = {}
    if settings.inception is not None:
        allow = settings.allow_unknown_weights
        found["inception"] = door.inception(settings.inception, device=device, allow_unknown_weights=allow)
    if settings.extractor is not None:
        found["extractor"] = door.trained_classifier(settings.extractor, device=device)
    for extractor in found.values():
        if extractor.channels == 1 and synthetic.channels == 3:
            raise UserError(f"the {extractor.title} takes grey images, these are RGB; give one trained on RGB images")
    return found


def _without_identical(small: Mapping[str, SmallSet], warnings: list[str]) -> SmallSet:
    """Held-out images that are in no other set, pixel by pixel.

    Raises:
        UserError: a set is another one, or fewer than 2 held-out images are left.
    """
    hashes = {name: set(s.hashes) for name, s in small.items()}
    for a, b in (("training", "synthetic"), ("held-out", "synthetic"), ("training", "held-out")):
        if hashes[a] == hashes[b]:
            raise UserError(f"the {a} and the {b} images are the same, pixel by pixel; give the {b} images themselves")
    held = small["held-out"]
    new = [i for i, h in enumerate(held.hashes) if h not in hashes["training"]]
    if len(new) < len(held):
        warnings.append(
            f"{len(held) - len(new)} held-out images are training images, pixel by pixel; they are left out, but look "
            "for more that training and held-out set share"
        )
    if len(new) < 2:
        msg = f"{len(new)} held-out images are no training images, needed are 2 or more; give images of other patients"
        raise UserError(msg)
    return held.subset(new)


def _masks(
    train: CaseSet, held: CaseSet, synthetic: CaseSet, size: tuple[int, int], settings: Settings, warnings: list[str]
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Nearest masks of both sets; empty where one of the three has none."""
    sets = (train, held, synthetic)
    if not all(case.label for s in sets for case in s.cases):
        return {}
    if len({tuple(sorted(s.labels.items())) for s in sets}) > 1:
        warnings.append("the sets have different labels, so masks are not compared")
        return {}
    num_labels = max(max(train.labels.values(), default=1) + 1, 2)
    search = MaskSearch(train, size=size, poses=poses_of(size), num_labels=num_labels, seed=settings.seed)
    out = {}
    for name, cases in (("synthetic", synthetic), ("held-out", held)):
        with tqdm(total=len(cases), desc=f"{name}: masks", unit="mask") as bar:
            rows = search.nearest(cases, num_candidates=settings.candidates, exact=settings.exact, progress=bar.update)
        out[name] = {"mask": [{**row, "value": row["share"]} for row in rows]}
    if not any(np.isfinite(row["value"]) for row in out["held-out"]["mask"]):
        warnings.append("no held-out mask shows anything, so masks are not compared")
        return {}
    return out


def _verdicts(
    nearest: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], keys: Sequence[str], held: CaseSet, level: float
) -> dict[str, dict[str, Any]]:
    """Null, p-values and flags of each score; the level is shared between the scores."""
    results = {}
    for key in keys:
        scores, others = (np.array([r["value"] for r in nearest[name][key]]) for name in ("synthetic", "held-out"))
        null = fit_null(others, [case.patient_id for case in held.cases])
        flagged, record = judge(scores, null, level / len(keys), mark=mark_of(key))
        results[key] = {
            "flagged": flagged,
            "p": counting_p(scores, null),
            "tail": tail_p(scores, null),
            "null": record | {"suspicious_held_out": suspicious_held_out(null, level)},
            "held_out": others,
        }
    return results


def _warn_of_null(
    results: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], level: float, warnings: list[str]
) -> None:
    """What the held-out set cannot support."""
    first = next(iter(results.values()))["null"]
    num = first["num_patients"]
    if not first["has_tail"]:
        who = "1 held-out patient is" if num == 1 else f"{num} held-out patients are"
        marks = " or ".join(f"{titles[key]} above {r['null']['threshold']:.3f}" for key, r in results.items())
        warnings.append(
            f"{who} too few to show how much patients resemble each other by chance; needed are {MIN_PATIENTS} or "
            f"more. So only copies nearly to the pixel are called near copies ({marks}) and looser ones are missed: "
            "give more held-out patients"
        )
    elif 1 / (num + 1) > level / len(results):
        warnings.append(
            f"{num} held-out patients support a level of {1 / (num + 1):.1%} by counting, {level:.1%} was asked for; "
            "below that the verdict rests on the fitted tail: give more held-out patients"
        )
    alike = results["features"]["null"]
    if alike["threshold"] > _TOO_ALIKE and alike["held_out_max"] > mark_of("features"):
        warnings.append(
            "held-out images are almost as close to training images as copies are (neighbouring slices, frames of one "
            "video, one patient in both sets?), so only copies nearly to the pixel can be told from them; hold out "
            "whole patients"
        )
    bad = max(r["null"]["suspicious_held_out"] for r in results.values())
    if bad:
        warnings.append(
            f"{bad} held-out images resemble a training image as closely as copies do: training and held-out set may "
            "share patients, scans or videos. Near copies are found only where they exceed these, so the rate is a "
            "lower bound; name patients when preparing the data (--group-regex), or give a cleaner held-out set"
        )


def _membership(search: ImageSearch, small: Mapping[str, SmallSet], settings: Settings) -> dict[str, Any]:
    """Training against held-out images by their nearest synthetic image."""
    rng = np.random.default_rng([settings.seed, 3])
    sides = []
    for name in ("training", "held-out"):
        order = rng.permutation(len(small[name]))[: settings.max_membership]
        sides.append(small[name].subset(np.sort(order).tolist()))
    reverse = ImageSearch(small["synthetic"], size=search.size, seed=settings.seed, whitenings=search.whitenings)
    scores = [
        reverse.candidates(side, num_candidates=settings.candidates, keep=1, label="membership")[0].score[:, 0]
        for side in sides
    ]
    patients = tuple([case.patient_id for case in side.cases.cases] for side in sides)
    return membership(scores[0], scores[1], patients, seed=settings.seed)  # type: ignore[arg-type]


def _remove(
    target: Path, synthetic: CaseSet, rows: Sequence[Mapping[str, Any]], content: Mapping[str, Any], settings: Settings
) -> int:
    """The cleaned dataset; its record names no training image, so that it can go where the images go."""
    why = {
        row["synthetic_id"]: {
            "reason": "near copy of a training image",
            **{k: row[k] for k in ("by", "identical", "p_value", "tail_p_value", *content["scores"]) if k in row},
        }
        for row in rows
        if row["verdict"] == "near copy"
    }
    record = {
        "metric": "memorization",
        "near_copies": content["near_copies"],
        "level": settings.level,
        "seed": settings.seed,
        "source": {k: content["sets"]["synthetic"][k] for k in ("dataset", "fingerprint", "n")},
        "versions": content["versions"],
    }
    return write_cleaned(target, synthetic, why, record, overwrite=settings.overwrite)

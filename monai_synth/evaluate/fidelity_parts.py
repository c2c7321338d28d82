# SPDX-License-Identifier: Apache-2.0
"""The parts of a fidelity report that some kinds of data have: paired images, HU, nodules, masks, consistency.

Each part adds its results to the content of ``fidelity.json`` and what its pictures need to ``figures``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_synth.evaluate.consistency import Segmenter, SegmenterOptions, consistency_results, held_out
from monai_synth.evaluate.distribution import frechet_result, kernel_result
from monai_synth.evaluate.feature_cache import FeatureCache
from monai_synth.evaluate.fidelity_compare import Measures, metric_keys, unmeasured
from monai_synth.evaluate.fidelity_sets import AnySet, CaseImages, matched
from monai_synth.evaluate.hu_fidelity import CROP, HuHistograms, hu_distances, nodule_crops, nodule_labels
from monai_synth.evaluate.mask_fidelity import MaskStatistics, mask_distances
from monai_synth.evaluate.similarity import mean_of_pairs

_SHOWN = 8  # pictures of consistency


def judge_paired(made: CaseImages, real: CaseImages, measures: Measures) -> dict[str, Any] | None:
    """Synthetic images against the real images of the same maps (LSDM thesis, Table 5.1); None without any."""
    pairs, every = matched(made, real)
    if not pairs:
        return None
    real_images = CaseImages("real", every, made.form).readers()
    made_images = made.readers()
    patients = [every.cases[j].patient_id for _, j in pairs]
    x, y = [made_images[i] for i, _ in pairs], [real_images[j] for _, j in pairs]
    metrics = measures.of_given_pairs(x, y, patients, made.form)
    if made.cases.unit == "HU":
        sizes_agree = made.cases.sizes.keys() == every.sizes.keys()
        errors = [
            np.abs(made.cases.image(i).astype(np.float64) - every.image(j)).mean() for i, j in pairs if sizes_agree
        ]
        metrics["hu_error"] = (
            mean_of_pairs(np.asarray(errors), patients, patients) | {"warnings": []}
            if errors
            else unmeasured(0, "the images have other sizes")
        )
    return {"n": len(pairs), "num_synthetic": len(made), "num_patients": len(set(patients)), "metrics": metrics}


def judge_hu(sets: Mapping[str, AnySet], content: dict[str, Any], figures: dict[str, Any], *, seed: int) -> None:
    """HU of each set and their distances, whole and by label."""
    found = {key: HuHistograms(s.cases) for key, s in sets.items() if s.cases.unit == "HU"}
    for key, histograms in found.items():
        content["sets"][key]["hu"] = {name: histograms.summary(name) for name in histograms.names}
    for entry in _whole(content, found):
        entry["hu"] = hu_distances(found[entry["a"]], found[entry["b"]], seed=seed)
    figures["hu"] = found
    if any(s.cases.form == "prepared" for s in sets.values()):
        content.setdefault("notes", []).append(
            "Prepared CT slices keep 256 steps of 7.15 HU, so a distance of up to about 2 HU is rounding."
        )


def judge_nodules(sets: Mapping[str, AnySet], content: dict[str, Any], measures: Measures, cache: Path) -> None:
    """Frechet and kernel distance of crops around nodules (LSDM thesis, Table 5.2)."""
    crops = {
        key: nodule_crops(s.cases) for key, s in sets.items() if key != "control" and nodule_labels(s.cases.labels)
    }
    for key, (images, patients) in crops.items():
        content["sets"][key]["nodules"] = {"n": len(images), "num_patients": len(set(patients)), "size": CROP}
    for extractor in measures.extractors:
        features = {}
        for key, (images, _) in crops.items():
            if extractor.channels == 1 and images and len(images[0]) == 3:
                continue
            readers = [functools.partial(_given, image) for image in images]
            if len(readers) >= 2:
                features[key] = FeatureCache(cache, extractor).features(readers, batch_size=measures.batch_size)
        frechet, kernel = (f"nodule_{name}" for name in metric_keys(extractor.key))
        for entry in _whole(content, crops):
            a, b = entry["a"], entry["b"]
            if a in features and b in features:
                groups = crops[a][1], crops[b][1]
                entry["metrics"][frechet] = frechet_result(features[a], features[b], *groups, seed=measures.seed)
                entry["metrics"][kernel] = kernel_result(features[a], features[b], *groups, seed=measures.seed)
            else:
                n = [len(crops[a][0]), len(crops[b][0])]
                why = unmeasured(n, "2 nodules or more are needed on each side")
                entry["metrics"] |= {frechet: why, kernel: why}


def _given(image: np.ndarray) -> np.ndarray:
    return image


def judge_masks(sets: Mapping[str, AnySet], content: dict[str, Any], figures: dict[str, Any], *, seed: int) -> None:
    """Areas, numbers and shapes of the objects in the masks; of CT the nodules only."""
    found = {}
    for key, image_set in sets.items():
        cases = image_set.cases
        if key == "control" or not any(case.label for case in cases.cases):
            continue
        labels = dict(cases.labels) or {"background": 0, "label": 1}
        if content["kind"] == "ct":
            labels = {name: value for name, value in labels.items() if value in nodule_labels(labels)}
        found[key] = MaskStatistics(cases, labels)
        content["sets"][key]["masks"] = found[key].summary()
    if len(found) < 2 or "synthetic" not in found:
        return
    for entry in _whole(content, found):
        entry["masks"] = mask_distances(found[entry["a"]], found[entry["b"]], seed=seed)
    figures["masks"] = found


def judge_consistency(
    sets: Mapping[str, AnySet],
    content: dict[str, Any],
    figures: dict[str, Any],
    options: SegmenterOptions,
    device: torch.device,
) -> None:
    """Train a segmenter on real pairs; judge real pairs that it has not seen, and the synthetic ones."""
    made, train = sets["synthetic"], sets["real_train"].cases
    if not all(case.label for s in (made.cases, train) for case in s.cases):
        content.setdefault("notes", []).append("No consistency: not every image has a mask.")
        return
    if dict(made.cases.labels) != dict(train.labels):
        content.setdefault("notes", []).append(
            f"No consistency: the labels of the real pairs are {', '.join(train.labels)}, those of the synthetic ones "
            f"{', '.join(made.cases.labels)}."
        )
        return
    if "real_test" in sets:
        unseen = sets["real_test"].cases
    else:
        train, unseen = held_out(train, seed=options.seed)
    segmenter = Segmenter(train, options, shape=made.form[1:], device=device)
    judged = segmenter.judge(made.cases)
    results = consistency_results(judged, segmenter.judge(unseen), seed=options.seed)
    content["consistency"] = {"recipe": segmenter.recipe, "n_training": len(train), "labels": results}
    order = np.argsort(np.nan_to_num(judged["dice"], nan=2.0))
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().astype(int))]
    figures["consistency"] = {key: judged[key][chosen] for key in ("images", "masks", "found", "dice")}


def _whole(content: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries of whole sets whose both sides were found."""
    for entry in content["pairs"]:
        if entry["class"] is None and entry["a"] in found and entry["b"] in found:
            yield entry

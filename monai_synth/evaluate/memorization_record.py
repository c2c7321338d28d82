# SPDX-License-Identifier: Apache-2.0
"""What the audit writes of its findings: lines of text, a row for each synthetic image, the sets, the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from monai_synth.evaluate import features as door
from monai_synth.evaluate.case_sets import CaseSet
from monai_synth.evaluate.memorization_pictures import POSES, poses_of, small_extractor

TITLES = {
    "features": "resemblance of small pictures",
    "ssim": "SSIM",
    "mask": "mutual information of masks",
}


def titles_of(extractors: Mapping[str, door.Extractor]) -> dict[str, str]:
    """What each score is called: those of features by what gave them."""
    return TITLES | {
        k: f"resemblance of features of the {e.title}" + (", weights of unknown origin" if e.warnings else "")
        for k, e in extractors.items()
    }


def extractor_records(extractors: Mapping[str, door.Extractor]) -> dict[str, dict[str, Any]]:
    """What each extractor is, and of which weights."""
    return {
        k: {"title": e.title, "weights_sha256": e.weights_sha256, "num_features": e.num_features}
        for k, e in extractors.items()
    }


def console_lines(content: Mapping[str, Any]) -> list[str]:
    """The results as text."""

    def share(number: Mapping[str, Any]) -> str:
        low, high = number["ci"]
        return f"{number['count']} of {number['n']} ({number['value']:.2%}, 95 % interval {low:.2%} to {high:.2%})"

    lines = [f"near copies of training images: {share(content['near_copies'])}"]
    if content["identical"]["count"]:
        lines.append(f"  of these pixel for pixel: {content['identical']['count']}")
    if "mask_copies" in content:
        lines.append(f"near copies of training masks: {share(content['mask_copies'])}")
    leak = content["membership"]
    interval = "[{:.3f}, {:.3f}]".format(*leak["ci"]) if leak["ci"] else "no interval"
    lines.append(f"membership inference, area under the curve: {leak['value']:.3f} {interval} n={leak['n']}")
    for number in content["scores"].values():
        lines.append(
            f"  {number['title']}: held-out median {number['held_out_median']:.3f}, "
            f"largest {number['held_out_max']:.3f}, near copy above {number['threshold']:.4f} "
            f"(n={number['num_patients']} patients)"
        )
    return lines


def case_rows(
    synthetic: CaseSet,
    train: CaseSet,
    nearest: Mapping[str, Sequence[Mapping[str, Any]]],
    results: Mapping[str, Mapping[str, Any]],
    mask_result: Mapping[str, Mapping[str, Any]],
    masks: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    flagged: np.ndarray,
    identical: np.ndarray,
    image_scores: Sequence[str],
) -> list[dict[str, Any]]:
    """A row for each synthetic image; ``tail_p_value`` is None where no tail could be fitted."""
    has_tail = all(results[k]["null"]["has_tail"] for k in image_scores)
    rows = []
    for i, case in enumerate(synthetic.cases):
        p = {k: float(results[k]["p"][i]) for k in image_scores}
        tails = {k: float(results[k]["tail"][i]) for k in image_scores}
        by = min(image_scores, key=lambda k: (not results[k]["flagged"][i], tails[k]))
        at = nearest[by][i]
        row = {
            "synthetic_id": case.case_id,
            "verdict": "near copy" if flagged[i] else "no copy",
            "identical": bool(identical[i]),
            "by": by,
            "nearest_id": train.cases[at["index"]].case_id,
            "nearest_index": int(at["index"]),
            "pose": int(at["pose"]),
            "pose_name": POSES[at["pose"]],
            "shift": list(at.get("shift", (0, 0))),
            "p_value": min(1.0, min(p.values()) * len(p)),
            "tail_p_value": min(1.0, min(tails.values()) * len(tails)) if has_tail else None,
        }
        for key, found in nearest.items():
            row[key] = short(found[i]["value"])
            row[f"{key}_nearest_id"] = train.cases[found[i]["index"]].case_id
            if "distance" in found[i]:
                row[f"{key}_distance"] = short(found[i]["distance"])
        if mask_result:
            found = masks["synthetic"]["mask"][i]
            row |= {
                "mask_verdict": "near copy" if mask_result["mask"]["flagged"][i] else "no copy",
                "mask_nearest_id": train.cases[found["index"]].case_id,
                "mask_pose": POSES[found["pose"]],
                "mask_mi": short(found["mi"]),
                "mask_mi_share": short(found["share"]),
                "mask_p_value": float(mask_result["mask"]["p"][i]),
            }
        rows.append(row)
    return rows


def set_record(cases: CaseSet) -> dict[str, Any]:
    return {
        "dataset": cases.name,
        "fingerprint": cases.fingerprint,
        "split": cases.split,
        "n": len(cases),
        "num_available": cases.num_available,
        "num_patients": len({case.patient_id for case in cases.cases}),
    }


def recipe_of(
    size: tuple[int, int], resized: bool, extractors: Mapping[str, door.Extractor], masks: bool
) -> dict[str, str]:
    how = "resized to" if resized else "at their size of"
    text = {
        "images": f"{how} {size[0]} x {size[1]}; grey (luminance) ranks, so that monotone changes of brightness leave "
        f"no trace; over {len(poses_of(size))} poses and shifts of up to a 16th of the shorter side",
        "features": f"{small_extractor(size).recipe}, laid on each other to the pixel, cosine after whitening by the "
        "training images",
        "ssim": "SSIM (window 11 x 11, sigma 1.5) of ranks, over what both images show",
        "mask": "mutual information over the entropy of the mask (JDM thesis, Eq 5.1), same poses and shifts",
    }
    if not masks:
        del text["mask"]
    return text | {k: f"{e.recipe}; cosine about the training mean, images as they are" for k, e in extractors.items()}


def short(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None

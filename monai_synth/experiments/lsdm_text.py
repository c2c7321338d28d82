# SPDX-License-Identifier: Apache-2.0
"""The results of the lung CT experiment in plain sentences: what was found, and what it cannot show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from monai_synth.experiments import lsdm_tables as tables
from monai_synth.experiments.lsdm_convergence import TEXT_CONVERGED

_TOLD = {"ssim", "ms_ssim", "lpips", "crop_ssim"}


def warnings(content: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers."""
    texts = []
    if not content["extractors"]:
        texts.append(
            "No feature extractor was given, so there is no Fréchet distance and no FID: give --inception, "
            "--radimagenet "
            "or --extractor. What is left compares pixels, which favours blurred images."
        )
    if content["lpips"] is None:
        texts.append("No LPIPS: give --lpips with its trunk's weights.")
    if content["num_patients"] < 5:
        texts.append(f"Only {content['num_patients']} patients: no interval can be given.")
    for entry in content["extractors"].values():
        texts += entry["warnings"]
    distances = [r for t in ("table_5_1", "table_5_2") for a in content.get(t, {}).values() for r in a.values()]
    texts += dict.fromkeys(w for r in distances for w in r.get("warnings", []) if w not in texts)
    for feature, found in content["classifiers"].items():
        if found and found.get("converged") is False:
            texts.append(
                f"The guiding classifier of {feature} did not converge in its training (validation loss "
                f"{found['val_loss']:.3f}, best constant {found['constant_loss']:.3f}, n {found['n']} nodules): its "
                "guidance moves pixels, but not towards the feature."
            )
    other = [arm for arm, entry in content["arms"].items() if not entry["same_dataset"]]
    if other:
        texts.append(
            f"Trained on another dataset than this one: {', '.join(other)}; whether these test patients were held out "
            "from that training is not known here."
        )
    return texts


def findings(content: Mapping[str, Any]) -> list[str]:
    """What was found, a sentence or two each."""
    texts = []
    for key, what in (("table_5_1", "whole slices"), ("table_5_2", "nodule crops")):
        table = content.get(key, {})
        metrics = dict.fromkeys(m for found in table.values() for m in found)
        for metric in metrics:
            if len(table) > 1 and metric in _TOLD | {m for m in metrics if "frechet" in m or "fid" in m}:
                texts.append(_ranking(metric, what, table, content["baseline"]))
    if "real" in content:
        lung = content["real"]["dice_lung"]
        if lung["value"] is not None:
            reached = ", ".join(
                f"{arm} {tables.number(found['dice_lung']['value'])}" for arm, found in content["table_5_1"].items()
            )
            texts.append(
                f"Lung where the map asks for it (Dice): real slices reach {tables.number(lung['value'])}, "
                "which is the "
                f"ceiling; {reached} (n={lung['n']} slices)."
            )
    texts += _guidance(content)
    if "reconstruction" in content:
        error, similar = content["reconstruction"]["mean_absolute_hu"], content["reconstruction"]["ssim"]
        texts.append(
            f"The autoencoder alone, with no diffusion, moves a pixel of a real slice by {error['value']:.0f} HU on "
            f"average and reaches an SSIM of {similar['value']:.3f} (n={error['n']}). What is lost there "
            "no diffusion model with it can be expected to bring back."
        )
    texts += _of_gradients(content) + _of_sweeps(content) + _of_convergence(content)
    return texts


def _ranking(metric: str, what: str, table: Mapping[str, Any], baseline: str) -> str:
    higher = metric in tables.HIGHER_IS_BETTER
    values = {arm: found[metric]["value"] for arm, found in table.items() if found[metric]["value"] is not None}
    if not values:
        return f"{tables.title(metric)}, {what}: not measured."
    best = (max if higher else min)(values, key=values.get)  # type: ignore[arg-type]
    verdicts = []
    for arm, found in table.items():
        difference = found[metric].get("difference")
        if difference and difference["value"] is not None:
            verdicts.append(f"{arm} {_verdict(difference, higher)}")
    against = f"; against {baseline} on the same maps and noise: {', '.join(verdicts)}" if verdicts else ""
    n, extreme = table[best][metric]["n"], "highest" if higher else "lowest"
    value = tables.number(values[best])
    return f"{tables.title(metric)}, {what} (n={n}): {best} has the {extreme} mean, {value}{against}."


def _verdict(difference: Mapping[str, Any], higher: bool) -> str:
    shown = f"{difference['value']:+.3g}"
    if not difference["ci"]:
        return shown  # why there is no interval stands once among the warnings
    low, high = difference["ci"]
    if low <= 0 <= high:
        return f"{shown} (not told apart, {tables.interval(difference)})"
    better = (difference["value"] > 0) == higher
    return f"{shown} ({'better' if better else 'worse'}, {tables.interval(difference)})"


def _guidance(content: Mapping[str, Any]) -> list[str]:
    texts = []
    for metric in dict.fromkeys(m for found in content.get("guided_minus_unguided", {}).values() for m in found):
        if metric == "crop_ssim" or "kernel" in metric or "kid" in metric:
            continue
        verdicts = [
            f"{arm} {_verdict(found[metric], False)}"
            for arm, found in content["guided_minus_unguided"].items()
            if found[metric]["value"] is not None
        ]
        texts.append(
            f"Guidance against none, {tables.title(metric)}: {', '.join(verdicts)}. The text finds that each "
            "classifier "
            "raises this distance at the nodules (from 42 to 62 and more)."
        )
    return texts


def _of_gradients(content: Mapping[str, Any]) -> list[str]:
    found = content.get("gradients")
    if not found:
        return []
    times = found["times"]
    agree = [
        t
        for t, e in times.items()
        if (e["benign"]["centre"]["value"] or 0) > 0 > (e["benign"]["boundary"]["value"] or 0)
    ]
    means = {
        t: [tables.number(e["benign"][part]["value"]) for part in ("centre", "boundary")] for t, e in times.items()
    }
    told = "; ".join(f"t {t}: inside {centre}, ring {boundary}" for t, (centre, boundary) in means.items())
    verdict = f"at t {', '.join(agree)}" if agree else "at none of these timesteps"
    return [
        "The text sees that towards benign the classifier brightens a nodule's centre and darkens its "
        "boundary. Here the "
        f"mean derivatives of {found['n']} nodules ({found['of']}) have these signs {verdict} (in units of the crop's "
        f"mean absolute derivative: {told}; intervals in the table)."
    ]


def _of_sweeps(content: Mapping[str, Any]) -> list[str]:
    scale = content.get("sweeps", {}).get("scale")
    if not scale:
        return []
    texts = []
    for label in ("benign", "malignant"):
        entries = [e for name, e in scale.items() if name.startswith(f"{label} ")]
        first, last = entries[0], entries[-1]
        names = [name.split()[-1] for name in scale if name.startswith(f"{label} ")]
        texts.append(
            f"Asking for {label} from {names[0]} to {names[-1]} moves the nodules' mean from {first['mean_hu']:.0f} to "
            f"{last['mean_hu']:.0f} HU and the classifier's own p(malignant) from {first['reading']:.2f} to "
            f"{last['reading']:.2f} (n={first['n']} slices, one noise); pixels outside moved by "
            f"{last['change_outside_hu']:.1f} HU on average at the strongest."
        )
    return texts


def _of_convergence(content: Mapping[str, Any]) -> list[str]:
    found = content.get("convergence")
    if not found:
        return []
    learned = [f for f, e in found["features"].items() if e["learned"]]
    unknown = [f for f, e in found["features"].items() if e["learned"] is None]
    text = (
        f"Of LIDC's nine features, {len(learned)} were told better than chance from noisy held-out nodules after "
        f"{found['steps']} steps: {', '.join(learned) or 'none'}. The text has {', '.join(TEXT_CONVERGED)}."
    )
    return [text + (f" Cannot be judged here: {', '.join(unknown)}." if unknown else "")]


def limits(content: Mapping[str, Any]) -> list[str]:
    """What it cannot show."""
    missing = tables.missing_columns(content["arms"])
    texts = [
        "The text's numbers, where shown, come from 770 slices of 512 x 512 of LIDC-IDRI; others "
        "are comparable with them only with the same data, size, number of slices and Inception weights. It "
        "does not say "
        "what its deviations are over.",
        "SSIM and LPIPS ask whether an image equals one real slice of its map. A map leaves much open, so a good and "
        "different slice is punished.",
        "A small distance to test slices does not show that training patients were not copied: run the memorization "
        "audit (monai-synth evaluate memorization).",
        "Nothing here tells whether a radiologist would rate a nodule as was asked: the classifier's readings "
        "come from "
        "the network that guided.",
    ]
    if any(entry["map_tells_malignancy"] and entry["bundle"] == "lsdm" for entry in content["arms"].values()):
        texts.append(
            "The label map itself has three nodule labels by malignancy, so a request against the map competes "
            "with it; "
            "train with --collapse_nodule_labels True for guidance alone."
        )
    if content["extractors"]:
        texts.append(
            "Generated and real slices share their maps, which makes the two sets more alike than independent ones: a "
            "kernel distance can lie below 0 by more than its interval."
        )
    if missing:
        texts.append(f"Columns of the text's tables without a model here: {', '.join(missing)}.")
    gans = [arm for arm, entry in content["arms"].items() if entry["bundle"] == "spade_gan"]
    if gans and content["num_seeds"] > 1:
        texts.append(
            f"{', '.join(gans)}: a GAN without an encoder makes the same image of a map for every seed, so its "
            "deviation over seeds is 0; train bundle spade_gan with --z_dim 256 for several images of a map."
        )
    if content["num_seeds"] == 1:
        texts.append("One seed: how much the numbers move with the noise is not known.")
    if "convergence" not in content:
        texts.append("The check of all nine features was not run; --convergence-steps 2000 does it.")
    else:
        texts.append(
            "That a feature was not learned in a short training does not show that it cannot be learned in a long one."
        )
    return texts

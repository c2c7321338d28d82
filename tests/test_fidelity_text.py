# SPDX-License-Identifier: Apache-2.0
"""Sentences of the fidelity page where there is little to say: few images, equal values, nothing measured."""

from __future__ import annotations

from typing import Any

import pytest

from monai_synth.evaluate.fidelity_text import answers


def number(value: float | None, error: float | None = None) -> dict[str, Any]:
    interval = None if error is None else [value - 2 * error, value + 2 * error]
    return {"value": value, "n": [4, 4], "ci": interval, "standard_error": error, "sd": None, "warnings": []}


def report(**parts: Any) -> dict[str, Any]:
    """A report in which nothing is measured but what is given."""
    entry = {"a": "synthetic", "b": "real_train", "class": None, "metrics": {}, **parts.pop("entry", {})}
    sets = {"synthetic": {"n": 4, **parts.pop("synthetic", {})}, "real_train": {"n": 4, **parts.pop("real", {})}}
    return {"kind": "ct", "pairs": [entry], "sets": sets, **parts}


def answer(content: dict[str, Any], start: str) -> tuple[str, str]:
    (row,) = (row for row in answers(content) if row["question"].startswith(start))
    return row["answer"], row["tone"]


def test_without_a_networks_features_it_is_said_what_to_give() -> None:
    text, tone = answer(report(), "Do the synthetic images look")
    assert "Give --inception" in text
    assert tone == ""
    assert answer(report(), "Are they as varied") == ("Not measured: the images are too small, or too few.", "")


def test_too_few_images_are_not_called_too_few_of_one_set() -> None:
    text, tone = answer(report(entry={"metrics": {"kid": number(0.1), "fid": number(9.0)}}), "Do the synthetic")
    assert text == "There are too few images to say. FID: 9."
    assert tone == ""


@pytest.mark.parametrize("error", [None, 0.01])
def test_repetition_is_claimed_only_with_an_interval(error: float | None) -> None:
    within = [{"within": {"ms_ssim": number(value, error)}} for value in (0.9, 0.4)]
    text, tone = answer(report(synthetic=within[0], real=within[1]), "Are they as varied")
    assert ("repeats itself" in text, tone) == ((False, "") if error is None else (True, "poor"))
    assert ("too few to compare" in text) == (error is None)


def test_sets_of_equal_images_are_repetition_too() -> None:
    within = [{"within": {"ms_ssim": number(value, 0.0)}} for value in (1.0, 0.4)]
    assert answer(report(synthetic=within[0], real=within[1]), "Are they as varied")[1] == "poor"


def test_one_pair_is_too_few_and_is_no_sentence_without_a_beginning() -> None:
    paired = {"metrics": {"ssim": number(0.5)}, "n": 1, "num_patients": 1}
    text, tone = answer(report(paired=paired), "Does a synthetic image resemble")
    assert text == "There are too few pairs to say: 1 image of 1 patient."
    assert tone == ""


@pytest.mark.parametrize(("value", "error", "tone"), [(-1.0, 0.0, "poor"), (0.0, 0.0, "good"), (-1.0, None, "")])
def test_counts_that_are_all_equal_differ_surely_where_they_differ(
    value: float, error: float | None, tone: str
) -> None:
    masks = {"blob": {"count": {"mean_difference": number(value, error)}}}
    text, found = answer(report(entry={"masks": masks}), "Are objects as large")
    assert found == tone
    assert ("blob: count smaller" in text) == (tone == "poor")
    assert ("too few masks" in text) == (error is None)

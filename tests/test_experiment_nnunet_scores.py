# SPDX-License-Identifier: Apache-2.0
"""Scores, intervals and the report of the segmentation experiment, from made-up segmentations."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from nnunet_toy import disc_pair

from monai_synth.atomic import write_json
from monai_synth.data.pair_files import write_image, write_label
from monai_synth.experiments import nnunet_scores as scores
from monai_synth.experiments.nnunet_jobs import Markers, Outcome
from monai_synth.experiments.nnunet_pictures import disagreement_box
from monai_synth.experiments.nnunet_report import Row, write_results
from monai_synth.experiments.nnunet_sets import TestSet
from monai_synth.experiments.nnunet_text import reported, reported_html

TEXT_POLYPS = ("Kvasir", "ClinicDB", "ColonDB", "CVC-300", "ETIS")


def label_maps(num: int, num_labels: int, seed: int) -> list[np.ndarray]:
    """Label maps of a few squares; some lack some labels."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(num):
        label = np.zeros((24, 20), np.uint8)
        for value in range(1, num_labels):
            if rng.random() < 0.7:
                row, col = rng.integers(0, 12, 2)
                label[row : row + 8, col : col + 8] = value
        maps.append(label)
    return maps


def counts_of(truths: list[np.ndarray], found: list[np.ndarray], num_labels: int) -> np.ndarray:
    return np.stack([scores.confusion(a, b, num_labels) for a, b in zip(truths, found, strict=True)])[None]


# --- scores ---


def test_scores_agree_with_those_of_nnunet_on_the_same_files(tmp_path, monkeypatch):
    import multiprocessing.pool

    evaluation = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    truths, found = label_maps(7, 3, seed=0), label_maps(7, 3, seed=1)
    for name, maps in (("truth", truths), ("found", found)):
        (tmp_path / name).mkdir()
        for k, label in enumerate(maps):
            write_label(tmp_path / name / f"{k}.png", label)

    class Threads:  # in place of processes, whose start takes seconds
        Pool = multiprocessing.pool.ThreadPool

    monkeypatch.setattr(evaluation.multiprocessing, "get_context", lambda method: Threads)
    folders = [str(tmp_path / name) for name in ("truth", "found")]
    theirs = evaluation.compute_metrics_on_folder(*folders, None, NaturalImage2DIO(), ".png", [1, 2], num_processes=1)
    ours = scores.numbers(counts_of(truths, found, 3), weights=None)
    found_metrics = [metric for case in theirs["metric_per_case"] for metric in case["metrics"].values()]
    assert any(metric["n_pred"] + metric["n_ref"] == 0 for metric in found_metrics)  # absent in both
    assert ours["mDice"]["value"] == pytest.approx(theirs["foreground_mean"]["Dice"], abs=1e-12)
    assert ours["mIoU"]["value"] == pytest.approx(theirs["foreground_mean"]["IoU"], abs=1e-12)


def test_pooled_scores_agree_with_those_of_one_large_picture():
    truths, found = label_maps(6, 2, seed=2), label_maps(6, 2, seed=3)
    a, b = np.concatenate(truths) == 1, np.concatenate(found) == 1
    numbers = scores.numbers(counts_of(truths, found, 2), weights=None)
    assert numbers["pooled Dice"]["value"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-12)
    assert numbers["pooled IoU"]["value"] == pytest.approx((a & b).sum() / (a | b).sum(), abs=1e-12)
    assert numbers["pooled IoU"]["value"] != pytest.approx(numbers["mIoU"]["value"], abs=1e-3)


def test_half_covered_discs_have_the_dice_and_iou_of_pencil_and_paper():
    truth, found = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    truth[:4] = 1  # 40 pixels
    found[2:4] = 1  # 20 of them
    found[9:] = 1  # and 10 that are wrong
    assert scores.confusion(truth, found, 2).tolist() == [[20, 10, 20]]
    numbers = scores.numbers(counts_of([truth], [found], 2), weights=None)
    assert numbers["mDice"] == {"value": pytest.approx(40 / 70), "n": 1, "ci": None}
    assert numbers["mIoU"]["value"] == pytest.approx(20 / 50)


def test_images_without_a_label_do_not_count_and_none_at_all_is_no_number():
    empty, full = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    assert scores.numbers(counts_of([empty, full], [empty, full], 2), weights=None)["mDice"]["value"] == 1.0
    assert scores.numbers(counts_of([empty, full], [full, full], 2), weights=None)["mDice"]["value"] == 0.5
    assert scores.numbers(counts_of([empty], [empty], 2), weights=None)["mDice"]["value"] is None


def test_the_mean_over_runs_is_that_of_their_scores():
    truths = label_maps(5, 3, seed=4)
    runs = [counts_of(truths, label_maps(5, 3, seed=seed), 3) for seed in (5, 6, 7)]
    together = scores.score(np.concatenate(runs))[0]
    np.testing.assert_allclose(together, np.mean([scores.score(run)[0] for run in runs], axis=0))


def test_weights_count_images_as_often_as_they_say():
    truths, found = label_maps(4, 2, seed=8), label_maps(4, 2, seed=9)
    counts = counts_of(truths, found, 2)
    weighted = scores.score(counts, np.array([[2, 0, 1, 1]]))
    np.testing.assert_allclose(weighted, scores.score(counts[:, [0, 0, 2, 3]]))


# --- intervals ---


def test_images_of_a_patient_are_drawn_together():
    weights = scores.draws(["p", "q", "p", "r"], 500, seed=0)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert scores.draws(["p", "p"], 500, seed=0) is None


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    rng = np.random.default_rng(0)
    hits = rng.integers(20, 80, 400)  # Dice of 2h / (h + 100) with truth of 100 pixels all found of h
    counts = np.stack([hits, 0 * hits, 100 - hits], axis=-1)[None, :, None]
    dice = 2 * hits / (hits + 100)
    low, high = scores.numbers(counts, weights=scores.draws([str(k) for k in range(400)], 4000, 0))["mDice"]["ci"]
    error = dice.std(ddof=1) / 20
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert low < dice.mean() < high


def test_a_difference_is_paired_so_that_equal_gains_have_no_spread():
    rng = np.random.default_rng(1)
    truth_size = 100
    hits = rng.integers(20, 60, 50)
    weights = scores.draws([str(k) for k in range(50)], 1000, 0)

    def with_dice(dice: np.ndarray) -> np.ndarray:  # tp of a prediction inside its truth, in thousandths of a pixel
        tp = dice / (2 - dice) * truth_size
        return np.stack([tp, 0 * tp, truth_size - tp], axis=-1)[None, :, None]

    base = 2 * hits / (hits + truth_size)
    change = scores.numbers(with_dice(base + 0.05), weights=weights, minus=with_dice(base))["mDice"]
    assert change["value"] == pytest.approx(0.05)
    assert change["ci"] == pytest.approx([0.05, 0.05])


# --- sizes and pictures ---


@pytest.mark.parametrize("size", [(7, 11), (3, 5), (14, 22), (5, 30)])
def test_nearest_resizing_takes_the_pixel_that_holds_each_centre(size):
    label = np.random.default_rng(0).integers(0, 5, (7, 11)).astype(np.uint8)
    rows, cols = (((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(size, label.shape, strict=True))
    np.testing.assert_array_equal(scores.resize_nearest(label, size), label[np.ix_(rows, cols)])


def test_the_box_holds_the_largest_disagreement():
    first, second = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    first[1, 1] = 1
    second[10:14, 5:8] = 1
    assert disagreement_box(first, second) == (slice(10, 14), slice(5, 8))
    assert disagreement_box(first, first) is None


# --- report ---


@pytest.fixture
def finished(tmp_path) -> tuple[Path, tuple[TestSet, ...]]:
    """An experiment's folder with made-up predictions: real only errs most, pretraining least."""
    rng = np.random.default_rng(0)
    (tmp_path / "test").mkdir()
    cases = []
    markers = {run: {} for run in ("real_f0", "real_f1", "syn100", "syn250", "pre100_f0", "pre100_f1")}
    for k in range(6):
        image, label = disc_pair(rng, (32, 36), 3, 2)
        paths = {"original": tmp_path / f"test/{k}i.png", "label": tmp_path / f"test/{k}.png"}
        write_image(paths["original"], image)
        write_label(paths["label"], label)
        cases.append({"case_id": str(k), "group": str(k), "images": [], **{key: str(p) for key, p in paths.items()}})
        for run, found in markers.items():
            wrong = {"r": 0.10, "s": 0.15, "p": 0.04}[run[0]]
            guess = np.where(rng.random(label.shape) < wrong, 1 - label, label).astype(np.uint8)
            folder = tmp_path / "predictions" / run / "discs"
            folder.mkdir(parents=True, exist_ok=True)
            write_label(folder / f"{k}.png", guess)
            found[str(k)] = scores.confusion(label, guess, 2).tolist()
    (tmp_path / "jobs").mkdir()
    for run, found in markers.items():
        write_json(tmp_path / "jobs" / f"{run}.discs.json", {"cases": found})
    return tmp_path, (TestSet("discs", tuple(cases)),)


ROWS = [
    Row("real", None, ("real_f0", "real_f1"), 100),
    Row("synthetic-only", 100, ("syn100",), 100),
    Row("synthetic-only", 250, ("syn250",), 100),
    Row("pretrain", 100, ("pre100_f0", "pre100_f1"), 150),
    Row("pretrain", 250, ("pre250_f0", "pre250_f1"), 150),
]


def write(finished, *, show_real: bool = False, outcome: Outcome | None = None) -> dict:
    folder, tests = finished
    return write_results(
        folder, ROWS, tests, Markers(folder / "jobs"), labels={"background": 0, "disc": 1},
        record={"num_real": 8, "folds": 2, "sizes": {100: 8, 250: 20}}, num_bootstrap=200, show_real=show_real,
        outcome=outcome or Outcome({}, {}),
    )  # fmt: skip


def test_results_tell_value_n_interval_recipe_seed_versions_and_settings_of_every_number(finished):
    content = write(finished)
    stored = json.loads((finished[0] / "results.json").read_text())
    assert stored == json.loads(json.dumps(content))
    assert [(e["mode"], e["ratio"]) for e in stored["results"]] == [
        ("real", None), ("synthetic-only", 100), ("synthetic-only", 250), ("pretrain", 100),
    ]  # fmt: skip
    for entry in stored["results"]:
        numbers = [*entry["numbers"].values(), *(entry["difference"] or {}).values()]
        for number in numbers:
            assert set(number) == {"value", "n", "ci", "recipe", "seed", "versions", "settings"}
            assert number["n"] == 6
    real, *_, tuned = stored["results"]
    assert tuned["difference"]["mDice"]["value"] == pytest.approx(
        tuned["numbers"]["mDice"]["value"] - real["numbers"]["mDice"]["value"]
    )
    assert tuned["difference"]["mDice"]["ci"][0] > 0
    assert set(real["per_run"]) == {"real_f0", "real_f1"}


def test_the_table_file_has_a_line_per_row_and_metric(finished):
    write(finished)
    lines = list(csv.DictReader((finished[0] / "results.csv").open()))
    assert len(lines) == 4 * 4
    assert {line["metric"] for line in lines} == set(scores.METRICS)
    assert all(float(line["low"]) <= float(line["value"]) <= float(line["high"]) for line in lines)
    assert all((line["difference"] == "") == (line["mode"] == "real") for line in lines)


def test_the_page_needs_nothing_from_elsewhere_and_shows_real_images_only_when_asked(finished):
    write(finished)
    page = (finished[0] / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=['\"](?!data:)", page)
    assert "http" not in page
    assert page.count("<img") == 1  # the plot
    write(finished, show_real=True)
    assert (finished[0] / "report.html").read_text().count("<img") == 2


def test_the_page_tells_what_failed_and_escapes_it(finished):
    outcome = Outcome({"pre250_f0": "exit status 1, log <x>"}, {"pre250_f1": "pre250_f0"})
    write(finished, outcome=outcome)
    page = (finished[0] / "report.html").read_text()
    assert "log &lt;x&gt;" in page
    assert "pre250_f1: skipped, it needs pre250_f0" in page


def test_a_row_of_which_a_run_is_missing_says_so(finished):
    (finished[0] / "jobs/pre100_f1.discs.json").unlink()
    content = write(finished)
    entry = content["results"][-1]
    assert (entry["num_runs"], entry["num_runs_planned"]) == (1, 2)
    assert "<td>1 of 2</td>" in (finished[0] / "report.html").read_text()


def test_the_numbers_of_the_thesis_stand_beside_a_test_set_of_its_name() -> None:
    rows = {row: values for row, *values in reported("CVC-300")}
    assert rows["nnU-Net, real only"] == [85.35, 77.84]
    assert rows["pretrained on 250 %"] == [87.61, 81.09]
    assert "ResUNet++" not in rows  # it has no number there
    assert [row for row, *_ in reported("ClinicDB")][1] == "ResUNet++"
    assert dict((row, values) for row, *values in reported("MoNuSeg"))["pretrained on 1000 %"] == [82.31, 70.03]
    assert reported("hippocampus") == []
    assert reported_html("hippocampus") == ""
    best = [max(values[0] for row, *values in reported(t) if "pretrained" in row) for t in TEXT_POLYPS]
    real = [dict((row, values) for row, *values in reported(t))["nnU-Net, real only"][0] for t in TEXT_POLYPS]
    assert np.mean(np.subtract(best, real)) == pytest.approx(2.59, abs=0.01)  # its "+2.5 %" is best of several

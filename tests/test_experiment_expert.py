# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from classifier_toy import write_dataset
from expert_toy import CLASSES, models, narrow_resnet, plant, settings, write_all, write_expert, write_model
from sklearn.metrics import accuracy_score, confusion_matrix

from monai_synth.checkpoint import load_file, restore_network, save_atomic
from monai_synth.cli import main
from monai_synth.data.datalist import read_dataset
from monai_synth.errors import UserError
from monai_synth.experiments import expert_sampling
from monai_synth.experiments.expert import run_experiment


@pytest.fixture(scope="module", autouse=True)
def _small_backbone():
    with pytest.MonkeyPatch.context() as patch:
        narrow_resnet(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """An experiment of two arms and two experts, nothing planted, and what it reported."""
    lines = []
    content = run_experiment(settings(folder, second_expert=str(folder / "e2.pt"), show_real=True), report=lines.append)
    return content, lines


def quiet(line):
    pass


@pytest.fixture
def _without_page(monkeypatch):
    from monai_synth.experiments import expert_report

    monkeypatch.setattr(expert_report, "report_html", lambda content, grids: "")


def wrong_by_arm(name, seed, number, index):
    """Of 4 images of a class the baseline shows 2 others, the aligned model 1; the spotless class is the answer."""
    wrong = {"base": 2, "aligned": 1}[name.partition("_")[0]]
    return 2 if number != 2 and index < wrong else None


def test_planted_accuracies_and_their_difference_are_found(folder, tmp_path, monkeypatch):
    plant(monkeypatch, wrong_by_arm)
    content = run_experiment(settings(folder, tmp_path, per_class=4, seeds=6), report=quiet)
    arms = content["experts"][0]["arms"]
    assert arms["base"]["accuracy"]["value"] == pytest.approx((2 + 2 + 4) / 12)
    assert arms["aligned"]["accuracy"]["value"] == pytest.approx((3 + 3 + 4) / 12)
    assert arms["base"]["accuracy"]["n"] == 6 * 12
    assert arms["base"]["confusion"] == [[12, 0, 12], [0, 12, 12], [0, 0, 24]]
    assert arms["base"]["difference"] is None
    difference = arms["aligned"]["difference"]
    assert difference["accuracy"]["value"] == pytest.approx(2 / 12)
    assert difference["accuracy"]["ci"] == pytest.approx([2 / 12, 2 / 12])
    test = difference["accuracy"]["wilcoxon"]
    assert (test["p"], test["n"], test["num_higher"]) == (pytest.approx(2 / 2**6), 6, 6)
    assert arms["base"]["most_taken_for"] == {"01_LEFT": "03_EMPTY", "02_RIGHT": "03_EMPTY", "03_EMPTY": None}
    assert difference["taken_for"]["01_LEFT"]["03_EMPTY"]["value"] == pytest.approx(-0.25)
    assert difference["taken_for"]["01_LEFT"]["02_RIGHT"]["value"] == 0
    assert content["experts"][0]["real"]["as_generated"]["confusion"] == [[4, 0, 0], [0, 5, 0], [0, 0, 3]]
    text = (tmp_path / "report.html").read_text()
    assert "24 of its 24 wrong images are taken for <b>03_EMPTY</b>" in text


@pytest.mark.usefixtures("_without_page")
def test_without_a_class_the_others_are_sampled_and_the_only_answers(folder, tmp_path, monkeypatch):
    plant(monkeypatch, wrong_by_arm)
    content = run_experiment(settings(folder, tmp_path, per_class=4, seeds=2, exclude=["empty"]), report=quiet)
    base = content["experts"][0]["arms"]["base"]
    assert (content["sampled"], content["left"]) == (["01_LEFT", "02_RIGHT"], ["01_LEFT", "02_RIGHT"])
    assert np.shape(base["confusion"]) == (2, 2)
    assert np.sum(base["confusion"]) == 2 * 8
    assert np.shape(content["experts"][0]["real"]["as_generated"]["confusion"]) == (3, 3)  # Fig 5c shows all
    assert content["experts"][0]["real"]["as_generated"]["n_left"] == 9


def test_one_class_alone_is_sampled_and_judged_among_all(folder, tmp_path, monkeypatch):
    plant(monkeypatch, wrong_by_arm)
    content = run_experiment(settings(folder, tmp_path, per_class=4, seeds=2, only=["left"]), report=quiet)
    arms = content["experts"][0]["arms"]
    assert arms["base"]["confusion"] == [[4, 0, 4]]
    assert [arms[arm]["accuracy"]["value"] for arm in ("base", "aligned")] == [0.5, 0.75]
    assert (tmp_path / "report.html").is_file()


def test_several_trainings_are_compared_in_their_order(folder, tmp_path, monkeypatch):
    def wrong(name, seed, number, index):
        right = {"base_1": 1, "base_2": 3, "aligned_1": 2, "aligned_2": 4}[name]
        return 2 if number != 2 and index >= right else None

    plant(monkeypatch, wrong)
    arms = models(folder, base="base,base_b", aligned="aligned,aligned_b")
    content = run_experiment(settings(folder, tmp_path, models=arms, per_class=4), report=quiet)
    found = content["experts"][0]["arms"]
    assert found["base"]["accuracy"]["per_training"] == pytest.approx([6 / 12, 10 / 12])
    assert found["aligned"]["difference"]["accuracy"]["per_training"] == pytest.approx([2 / 12, 2 / 12])
    assert found["aligned"]["difference"]["accuracy"]["ci_trainings"] == pytest.approx([2 / 12, 2 / 12])
    low, high = found["base"]["accuracy"]["ci_trainings"]
    assert (low, high) == (pytest.approx(6 / 12), pytest.approx(10 / 12))
    assert "Seeds of one training are not independent trainings" in (tmp_path / "report.html").read_text()


def test_scores_are_those_of_scikit_learn_on_the_images_that_are_kept(finished, folder):
    content, _ = finished
    for expert, name in zip(content["experts"], ("e1", "e2"), strict=True):
        network = restore_network(load_file(folder / f"{name}.pt"))
        for arm, entry in expert["arms"].items():
            truth, found = [], []
            for seed in (0, 1):
                with np.load(folder / f"out/samples/{arm}/seed_{seed}.npz") as file:
                    images = torch.from_numpy(file["images"]).flatten(0, 1).float() / 255
                images = torch.nn.functional.interpolate(images, (24, 24), mode="bilinear", antialias=True)
                with torch.inference_mode():
                    found += network(images).argmax(1).tolist()
                truth += np.repeat([0, 1, 2], 3).tolist()
            assert entry["confusion"] == confusion_matrix(truth, found, labels=[0, 1, 2]).tolist()
            assert entry["accuracy"]["value"] == pytest.approx(accuracy_score(truth, found))
            assert entry["accuracy"]["n"] == 18


def test_results_csv_has_the_numbers_of_results_json(finished, folder):
    content, _ = finished
    assert json.loads((folder / "out/results.json").read_text()) == content
    rows = list(csv.DictReader((folder / "out/results.csv").open()))

    def value(**keys):
        found = [row for row in rows if all(row[key] == text for key, text in keys.items())]
        assert len(found) == 1
        return float(found[0]["value"])

    arms = content["experts"][1]["arms"]
    keys = {"expert": "second expert", "arm": "aligned", "metric": "accuracy", "class": ""}
    assert value(**keys, minus_arm="") == arms["aligned"]["accuracy"]["value"]
    assert value(**keys, minus_arm="base") == arms["aligned"]["difference"]["accuracy"]["value"]
    assert (
        value(arm="real", metric="ssim", **{"class": "01_LEFT"})
        == content["similarity"]["real"]["classes"]["01_LEFT"]["value"]
    )
    assert all(row["n"] for row in rows)


def test_the_expert_that_steered_an_arm_is_called_circular_and_another_is_not(finished, folder):
    content, _ = finished
    steered = [[e["arms"][arm]["steered"] for arm in ("base", "aligned")] for e in content["experts"]]
    assert steered == [[False, True], [False, False]]
    text = (folder / "out/report.html").read_text()
    assert "the expert steered the training of aligned" in text
    assert "The second expert steered none of these trainings" in text
    assert "alignment" in " ".join(content["differ_by"]["aligned"])


def test_the_page_needs_no_other_file_and_says_what_seeds_are(finished, folder):
    text = (folder / "out/report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:)", text)
    assert "One training of each arm" in text
    assert "signed rank test cannot give p below 0.05" in text
    assert "filtered by their mean" not in text


def test_real_images_are_in_the_page_only_where_they_are_shown(folder, monkeypatch):
    from monai_synth.experiments import expert_report

    shown = []
    monkeypatch.setattr(expert_report, "report_html", lambda content, grids: shown.append(list(grids)) or "")
    out = folder / "shown"
    for show_real in (False, True):
        run_experiment(settings(folder, out, show_real=show_real), report=quiet)
    assert shown == [["base", "aligned"], ["base", "aligned", "real"]]


@pytest.mark.usefixtures("_without_page")
def test_further_seeds_and_arms_leave_what_is_there(folder, tmp_path, monkeypatch):
    plant(monkeypatch, lambda *place: None)
    first = run_experiment(settings(folder, tmp_path, models=models(folder, base="base")), report=quiet)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").rglob("*.npz")}
    lines = []
    given = {"seeds": 3, "models": models(folder, base="base", clean="aligned")}
    more = run_experiment(settings(folder, tmp_path, **given), report=lines.append)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert any("2 of 6 sets of 9 images are there already" in line for line in lines)
    assert (first["arms"]["base"]["num_seeds"], more["arms"]["base"]["num_seeds"]) == (2, 3)
    again = run_experiment(settings(folder, tmp_path, **given), report=quiet)
    assert again == more


def test_an_interrupt_leaves_results_of_what_is_done(folder, tmp_path, monkeypatch):
    plant(monkeypatch, lambda *place: None)
    write, calls = expert_sampling._write, []

    def stop(path, samples):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(path)
        write(path, samples)

    monkeypatch.setattr(expert_sampling, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(settings(folder, tmp_path, batch_size=1), report=quiet)
    content = json.loads((tmp_path / "results.json").read_text())
    assert {arm: entry["num_seeds"] for arm, entry in content["arms"].items()} == {"base": 2, "aligned": 1}
    difference = content["experts"][0]["arms"]["aligned"]["difference"]
    assert (difference["accuracy"]["num_seeds"], difference["accuracy"]["n"]) == (1, 9)
    assert "Unfinished" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(expert_sampling, "_write", write)
    assert run_experiment(settings(folder, tmp_path), report=quiet)["arms"]["aligned"]["num_seeds"] == 2


def test_the_mean_filter_is_told_with_its_redraws(folder, tmp_path, monkeypatch):
    # a spotless image has the mean of its class's floor and below, whoever it is drawn for
    plant(monkeypatch, lambda name, seed, number, index: 2 if number == 0 and index < 1 and name == "base" else None)
    monkeypatch.setattr(expert_sampling, "FILTER_REACH", 0.02)
    content = run_experiment(settings(folder, tmp_path, mean_filter=True), report=quiet)
    assert content["filter"]["arms"]["base"]["01_LEFT"]["redraws"] == 2
    assert content["filter"]["arms"]["aligned"]["01_LEFT"]["redraws"] == 0
    assert content["experts"][0]["arms"]["base"]["accuracy"]["value"] == 1
    assert "Redraws: base 2, aligned 0" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def others(folder):
    """Files that do not fit."""
    real = read_dataset(folder / "real")
    splits = {"training": (6, 6, 6), "validation": (1, 1, 1), "test": (2, 2, 2)}
    other = read_dataset(write_dataset(folder / "other", splits, classes=tuple(CLASSES), seed=9))
    write_model(folder / "of_other.pt", other)
    write_model(folder / "larger.pt", real, size=(24, 24))
    write_model(folder / "small.pt", real, size=(8, 8))
    write_model(folder / "two.pt", real, classes={"a": 0, "b": 1})
    write_model(folder / "masks.pt", real, classes=None, bundle="jdm")
    write_expert(folder / "e_two.pt", real, classes={"a": 0, "b": 1})
    write_expert(folder / "e_rgb.pt", real, channels=3)
    shutil.copy(folder / "e1.pt", folder / "e1_copy.pt")
    (folder / "torn.pt").write_bytes((folder / "base.pt").read_bytes()[:2000])
    content = load_file(folder / "base.pt")
    content["state_dict"].popitem()
    save_atomic(content, folder / "lacking.pt")
    few = {"training": (6, 1, 6), "validation": (1, 1, 1), "test": (0, 0, 0)}
    write_dataset(folder / "few", few, classes=tuple(CLASSES))
    return folder


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": []}, "no model is given"),
        ({"models": [("a", ["base"]), ("a", ["aligned"])]}, "'a' is given twice"),
        ({"models": [("real", ["base"])]}, "no usable name"),
        ({"models": [("a/b", ["base"])]}, "no usable name"),
        ({"models": [("a", ["base", "base_b"]), ("b", ["aligned"])]}, r"different numbers of trainings \(a 2, b 1\)"),
        ({"models": [("a", ["base", "base"])]}, "same model twice"),
        ({"models": [("a", ["nowhere"])]}, "there is no trained file"),
        ({"models": [("a", ["torn"])]}, "cannot be read"),
        ({"models": [("a", ["lacking"])]}, "do not fit"),
        ({"models": [("a", ["e1"])]}, "stage 'image_classifier', needed is 'diffusion'"),
        ({"models": [("a", ["masks"])]}, "the bundle 'jdm' and tells no classes"),
        ({"models": [("a", ["small"])]}, "makes images of 8x8"),
        ({"models": [("a", ["base"]), ("b", ["two"])]}, "does not agree: classes"),
        ({"models": [("a", ["base"]), ("b", ["larger"])]}, "does not agree: image_size"),
        ({"models": [("a", ["base"]), ("b", ["of_other"])]}, "does not agree: dataset"),
        ({"models": [("a", ["of_other"])]}, "Give the prepared dataset"),
        ({"expert": "base"}, "stage 'diffusion', needed is 'image_classifier'"),
        ({"expert": "nowhere"}, "give the right --expert"),
        ({"expert": "e_two"}, "does not agree: classes"),
        ({"second_expert": "e_rgb"}, "does not agree: image_channels"),
        ({"second_expert": "e1_copy"}, "both experts are the same file"),
        ({"baseline": "best"}, "no arm 'best'; allowed are base, aligned"),
        ({"exclude": ["tumor"]}, r"unknown class 'tumor'.*\(--exclude\)"),
        ({"only": ["left"], "exclude": ["LEFT"]}, "to --only and to --exclude"),
        ({"exclude": ["left", "right"]}, "leave 2 or more"),
        ({"per_class": 1}, "give 2 or more"),
        ({"seeds": 0}, "seeds is 0"),
        ({"num_bootstrap": 0}, "bootstrap is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 101}, "101"),
        ({"sampler": "euler"}, "euler"),
        ({"guidance_scale": 3.0}, "without dropping the class"),
        ({"device": "tpu"}, "allowed are cpu and cuda"),
        ({"real": "nowhere"}, "is not a folder"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(others, tmp_path, given, message):
    if "models" in given:
        given["models"] = [(arm, [str(others / f"{name}.pt") for name in names]) for arm, names in given["models"]]
    for key in {"expert", "second_expert"} & set(given):
        given[key] = str(others / f"{given[key]}.pt")
    if "real" in given:
        given["real"] = str(others / given["real"])
    with pytest.raises(UserError, match=message):
        run_experiment(settings(others, tmp_path / "out", **given), report=quiet)
    assert not (tmp_path / "out").exists()


def test_a_dataset_without_test_images_or_with_too_few_of_a_class_is_refused(others, tmp_path):
    few = read_dataset(others / "few")
    write_model(others / "of_few.pt", few)
    arms = {"models": models(others, base="of_few"), "real": str(others / "few")}
    with pytest.raises(UserError, match="'test'"):
        run_experiment(settings(others, tmp_path / "out", **arms), report=quiet)
    content = json.loads((others / "few/dataset.json").read_text())
    content["test"] = content["validation"]
    (others / "few/dataset.json").write_text(json.dumps(content))
    write_model(others / "of_few.pt", read_dataset(others / "few"))
    with pytest.raises(UserError, match="fewer than 2 images of 02_RIGHT"):
        run_experiment(settings(others, tmp_path / "out", **arms), report=quiet)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_or_of_other_settings_is_left_alone(folder, finished, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'notes\.txt' and no experiment"):
        run_experiment(settings(folder, tmp_path), report=quiet)
    with pytest.raises(UserError, match="per_class was 3, is 2"):
        run_experiment(settings(folder, per_class=2), report=quiet)
    with pytest.raises(UserError, match="sha256 was"):
        run_experiment(settings(folder, models=models(folder, base="aligned")), report=quiet)


@pytest.mark.usefixtures("_without_page")
def test_the_command_passes_everything_on_and_takes_folders_of_models(folder, tmp_path, monkeypatch, capsys):
    plant(monkeypatch, wrong_by_arm)
    (tmp_path / "run").mkdir()
    shutil.copy(folder / "base.pt", tmp_path / "run/model.pt")
    arguments = ["--expert", str(folder / "e1.pt"), "--real", str(folder / "real"), "--out", str(tmp_path / "out")]
    arguments += ["--models", f"aligned={folder / 'aligned.pt'}", f"base={tmp_path / 'run'}", "--baseline", "base"]
    arguments += ["--seeds", "2", "--per-class", "4", "--exclude", "empty", "--only", "left"]
    arguments += ["--bootstrap", "20", "--device", "cpu", "--num-steps", "3"]
    assert main(["experiment", "expert", *arguments]) == 0
    assert "2 models x 2 seeds x 1 classes x 4 images = 16 images, dpm++, on cpu" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert (content["baseline"], content["sampled"], content["left"]) == ("base", ["01_LEFT"], ["01_LEFT", "02_RIGHT"])
    assert content["arms"]["base"]["models"][0]["file"] == "run/model.pt"
    assert main(["experiment", "expert", *arguments[:6], "--models", "a=" + str(tmp_path / "no.pt")]) == 2
    assert "there is no trained file" in capsys.readouterr().err

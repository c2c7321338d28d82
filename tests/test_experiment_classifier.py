# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import functools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from classifier_toy import settings, write_both, write_dataset
from monai.networks.nets import resnet

from monai_synth.checkpoint import load_file, restore_network
from monai_synth.data.pair_files import read_image
from monai_synth.errors import UserError
from monai_synth.experiments import classifier, classifier_train
from monai_synth.experiments.classifier import PRESETS, run_experiment
from monai_synth.experiments.classifier_train import Batches, class_weights, state_sha256
from monai_synth.networks import ImageClassifier, image_classifier


@pytest.fixture(scope="module", autouse=True)
def _small_backbone():
    """A narrow ResNet under the usual name; processes of their own train the usual one."""
    narrow = functools.partial(
        resnet.ResNet, "basic", [1, 1, 1, 1], [8, 8, 16, 16], spatial_dims=2, num_classes=1, conv1_t_stride=2
    )
    with pytest.MonkeyPatch.context() as patch:
        usual = image_classifier.BACKBONES["resnet18"]
        patch.setitem(image_classifier.BACKBONES, "resnet18", replace(usual, build=narrow))
        yield


@pytest.fixture
def data(tmp_path):
    write_both(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment with rows of every kind, two seeds, and what it reported."""
    folder = tmp_path_factory.mktemp("finished")
    write_both(folder)
    lines = []
    rows = ["1", "2", "3", "5", "7", "control-real100", "mix50-real100", "oversample-real100"]
    options = {"rows": rows, "seeds": 2, "mix": [50], "oversample": True, "control": True, "show_real": True}
    content = run_experiment(settings(folder, **options), report=lines.append)
    return folder, options, content, lines


def marker(folder, name, out="out"):
    return json.loads((folder / out / "runs" / f"{name}.json").read_text())


def test_the_papers_preset_has_the_texts_values():
    paper = PRESETS["paper"]
    keys = ("epochs", "batch_size", "lr", "momentum", "lr_step", "lr_gamma", "backbone")
    assert [paper[key] for key in keys] == [20, 32, 0.001, 0.9, 7, 0.1, "resnet18"]


def test_the_rate_falls_to_a_tenth_after_every_seven_epochs(data, monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    run_experiment(settings(data, rows=["1"], epochs=15, lr=None, batch_size=None), report=lambda line: None)
    assert rates == pytest.approx([0.001] * 7 + [0.0001] * 7 + [0.00001])


def test_a_presets_rows_leave_out_none_that_was_asked_for(data):
    lines = []
    options = {"preset": "demo", "mix": [50], "fractions": [100], "epochs": 1}
    content = run_experiment(settings(data, **options), report=lines.append)
    assert [entry["row"] for entry in content["results"]] == ["1", "3", "mix50-real100", "mix50-real100-geo", "17"]


def test_a_row_with_pretraining_starts_with_the_weights_of_its_synthetic_row(finished):
    folder = finished[0]
    for row, start in (("3", "17"), ("7", "18"), ("control-real100", "long-real100")):
        for seed in (0, 1):
            got, first = marker(folder, f"{row}_seed{seed}"), marker(folder, f"{start}_seed{seed}")
            assert got["start_sha256"] == first["final_sha256"] != first["start_sha256"]
            assert got["start"] == f"{start}_seed{seed}"
            assert got["final_sha256"] != got["start_sha256"]
    from_nothing = {marker(folder, f"{row}_seed0")["start"] for row in ("1", "2", "5", "17", "mix50-real100")}
    assert from_nothing == {"scratch"}


def test_rows_of_one_seed_on_the_same_images_start_alike_and_other_seeds_do_not(finished):
    starts = [marker(finished[0], f"{row}_seed{seed}")["start_sha256"] for seed in (0, 1) for row in ("1", "2", "5")]
    assert len(set(starts[:3])) == len(set(starts[3:])) == 1
    assert starts[0] != starts[3]
    ends = [marker(finished[0], f"{row}_seed{seed}")["final_sha256"] for seed in (0, 1) for row in ("1", "2", "5")]
    assert len(set(ends)) == 6  # weights of the loss and augmentation reach the training


def test_only_starts_and_plain_real_classifiers_are_kept_and_give_what_was_recorded(finished):
    folder = finished[0]
    kept = sorted(path.name for path in (folder / "out/classifiers").iterdir())
    assert kept == sorted(f"{row}_seed{seed}.pt" for row in ("1", "5", "17", "18", "long-real100") for seed in (0, 1))
    path = folder / "out/classifiers/17_seed1.pt"
    content = load_file(path, stage="image_classifier")
    contract = content["contract"]
    assert contract["classes"] == {"left": 0, "right": 1}
    assert (contract["image_channels"], contract["image_size"]) == (1, [16, 16])
    assert contract["trained_on"] == "synthetic images only"
    assert content["arch"]["target"] == "monai_synth.networks.ImageClassifier"
    recorded = marker(folder, "17_seed1")
    assert state_sha256(content["state_dict"]) == recorded["final_sha256"]
    cases = json.loads((folder / "real/dataset.json").read_text())["test"]
    x = torch.from_numpy(np.stack([read_image(folder / "real" / case["image"]) for case in cases])).float() / 255
    with torch.inference_mode():
        probabilities = restore_network(content, path)(x).softmax(1)
    np.testing.assert_allclose(probabilities.numpy(), recorded["test"], atol=1e-5)


def test_the_epoch_of_highest_validation_accuracy_is_taken(finished):
    for path in (finished[0] / "out/runs").glob("*.json"):
        run = json.loads(path.read_text())
        curves, best = run["curves"], run["best_epoch"] - 1
        assert curves["val_accuracy"][best] == max(curves["val_accuracy"])
        found = np.argmax(run["validation"], 1) == run["validation_labels"]
        assert found.mean() == pytest.approx(curves["val_accuracy"][best], abs=1e-6)


def test_a_second_call_trains_nothing_and_writes_the_same_results(finished):
    folder, options, content, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out/runs").iterdir()}
    lines = []
    again = run_experiment(settings(folder, **options), report=lines.append)
    assert again == content
    assert {path: path.stat().st_mtime_ns for path in (folder / "out/runs").iterdir()} == before
    assert any("22 of 22 trainings are done already" in line for line in lines)


def test_results_hold_each_row_with_its_differences(finished):
    folder, _, content, lines = finished
    assert json.loads((folder / "out/results.json").read_text()) == content
    by_row = {entry["row"]: entry for entry in content["results"]}
    assert [e["row"] for e in content["results"] if e["number"]] == ["1", "2", "3", "5", "7", "17", "18"]
    for entry in by_row.values():
        assert entry["num_seeds"] == 2
        assert np.sum(entry["confusion"]) == pytest.approx(14)
        for name, number in entry["numbers"].items():
            assert number["n"] == 14
            assert number["value"] == pytest.approx(np.mean([seed[name] for seed in entry["per_seed"].values()]))
            assert number["ci"][0] <= number["value"] + 1e-9 <= number["ci"][1] + 2e-9
    change = by_row["3"]["differences"]["no synthetic images"]
    assert (change["row"], change["num_seeds"]) == ("1", 2)
    for metric, number in change["numbers"].items():
        less = by_row["3"]["numbers"][metric]["value"] - by_row["1"]["numbers"][metric]["value"]
        assert number["value"] == pytest.approx(less)
    assert set(by_row["7"]["differences"]) == {"no synthetic images", "no geo aug", "plain"}
    steps = {name: by_row[name]["num_steps"] for name in ("17", "long-real100", "1")}
    assert steps == {"17": 6, "long-real100": 6, "1": 6}
    rows = list(csv.DictReader((folder / "out/results.csv").open()))
    assert {"accuracy", "recall (right)"} <= {row["metric"] for row in rows}
    claims = {(claim["fraction"], claim["metric"]): claim for claim in content["claims"]}
    assert set(claims) == {(100, "recall"), (100, "recall (right)")}
    assert claims[100, "recall"]["pairs"] == [["3", "1"], ["7", "5"]]
    done = [line for line in lines if line.startswith("[")]
    assert [line.split("]")[0] for line in done] == [f"[{i}/22" for i in range(1, 23)]
    result = r"validation [01]\.\d{3} \(epoch \d\), test [01]\.\d{3}"
    said = re.compile(rf"\[\d+/22\] row \S+ seed [01]: {result}, \d+ s(, about \d+ (s|min) left)?")
    assert all(said.fullmatch(line) for line in done), done


@pytest.mark.parametrize(("seconds", "said"), [(0.4, ""), (89, ", about 89 s left"), (150, ", about 2 min left")])
def test_the_time_that_is_left_is_told_unless_it_is_none(seconds, said):
    assert classifier._left(seconds) == said


def test_the_page_needs_nothing_else_and_tells_how_training_started(finished):
    page = (finished[0] / "out/report.html").read_text()
    assert "started from scratch" in page
    assert "14 real test images (6 left, 8 right)" in page
    assert page.count("data:image/png;base64,") == len(finished[2]["results"]) + 1
    assert not re.search(r"(src|href)='(?!data:)", page)
    assert "Table 2 of the text" not in page  # these are other classes


def test_the_images_packed_for_the_run_are_gone(finished):
    assert not list((finished[0] / "out").glob("images*"))


def test_a_run_does_not_depend_on_what_runs_beside_it_nor_changes_torchs_generator(finished, tmp_path):
    folder = finished[0]
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    run_experiment(settings(folder, out=tmp_path / "alone", rows=["5"], seeds=2), report=lambda line: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    alone = json.loads((tmp_path / "alone/runs/5_seed1.json").read_text())
    both = marker(folder, "5_seed1")
    assert {k: alone[k] for k in alone if k != "seconds"} == {k: both[k] for k in both if k != "seconds"}


def test_a_stopped_run_goes_on_from_its_last_epoch_and_ends_as_if_it_had_not_been(data, monkeypatch):
    options = {"rows": ["5"], "epochs": 4}
    run_experiment(settings(data, out="whole", **options), report=lambda line: None)
    whole = marker(data, "5_seed0", "whole")
    monkeypatch.setattr(classifier_train, "_SAVE_EVERY", 0)
    state = data / "out/runs/5_seed0.state.pt"
    monkeypatch.setattr(classifier_train, "stopped", state.is_file)
    run_experiment(settings(data, **options), report=lambda line: None)
    assert load_file(state)["best_epoch"] == 1
    assert len(load_file(state)["curves"]["val_loss"]) == 1
    monkeypatch.setattr(classifier_train, "stopped", lambda: False)
    epochs = []
    iterate = Batches.__iter__
    monkeypatch.setattr(Batches, "__iter__", lambda self: epochs.append(1) or iterate(self))
    run_experiment(settings(data, **options), report=lambda line: None)
    got = marker(data, "5_seed0")
    assert {k: got[k] for k in got if k != "seconds"} == {k: whole[k] for k in whole if k != "seconds"}
    assert not state.is_file()
    assert len(epochs) == 3


def test_a_folder_of_something_else_is_not_written_into(data):
    before = sorted(path.name for path in (data / "synthetic").iterdir())
    with pytest.raises(UserError, match=r"--out .*synthetic holds .* and no experiment; give a folder that is new"):
        run_experiment(settings(data, rows=["1"], out=str(data / "synthetic")), report=lambda line: None)
    assert sorted(path.name for path in (data / "synthetic").iterdir()) == before


def test_a_held_out_part_of_synthetic_images_needs_more_than_one(data):
    content = json.loads((data / "synthetic" / "dataset.json").read_text())
    content["training"] = [next(case for case in content["training"] if case["class"] == k) for k in (0, 1)]
    (data / "synthetic" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="there are 1 synthetic images of"):
        run_experiment(settings(data, rows=["17"], select_on="synthetic"), report=lambda line: None)


def test_a_damaged_state_is_trained_again(data):
    state = data / "out/runs/1_seed0.state.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"damaged")
    run_experiment(settings(data, rows=["1"]), report=lambda line: None)
    assert marker(data, "1_seed0")["best_epoch"] in (1, 2)


def test_a_classifier_that_others_need_is_trained_again_where_its_file_is_gone(data):
    run_experiment(settings(data, rows=["17"]), report=lambda line: None)
    (data / "out/classifiers/17_seed0.pt").unlink()
    run_experiment(settings(data, rows=["3"]), report=lambda line: None)
    assert marker(data, "3_seed0")["start_sha256"] == marker(data, "17_seed0")["final_sha256"]


def test_select_on_synthetic_leaves_a_tenth_out_and_needs_no_real_image(data):
    run_experiment(settings(data, rows=["17", "1"], select_on="synthetic"), report=lambda line: None)
    synthetic, real = marker(data, "17_seed0"), marker(data, "1_seed0")
    assert synthetic["num_images"] == {"synthetic": 22}
    assert len(synthetic["validation_labels"]) == 2
    assert len(real["validation_labels"]) == 8
    assert "synthetic images that were held out" in (data / "out/report.html").read_text()


def test_published_weights_are_the_start_and_the_page_says_so(data):
    torch.manual_seed(3)
    published = ImageClassifier("resnet18", 2, 3).backbone.state_dict()
    torch.save({**published, "fc.weight": torch.zeros(1000, 16), "fc.bias": torch.zeros(1000)}, data / "w.pth")
    run_experiment(settings(data, rows=["1"], weights=str(data / "w.pth"), seeds=2), report=lambda line: None)
    assert marker(data, "1_seed0")["start"] == "weights"
    assert marker(data, "1_seed0")["start_sha256"] != marker(data, "1_seed1")["start_sha256"]  # the last layer
    assert "started from ImageNet weights" in (data / "out/report.html").read_text()


def test_images_of_three_classes_in_colour_work(tmp_path):
    three = ("a", "b", "c")
    write_dataset(
        tmp_path / "real", dict.fromkeys(("training", "validation", "test"), (4, 4, 4)), classes=three, channels=3
    )
    write_dataset(tmp_path / "synthetic", {"training": (5, 5, 5)}, classes=three, channels=3)
    options = {"rows": ["mix50-real100", "2"], "mix": [50], "geo": "seed-code", "positive": "b", "image_size": [20, 24]}
    content = run_experiment(settings(tmp_path, **options), report=lambda line: None)
    assert {"recall (b)", "accuracy (c)"} <= set(content["results"][0]["numbers"])
    assert content["settings"]["image_size"] == [20, 24]


def test_a_last_batch_of_one_joins_the_batch_before():
    class Fake:
        labels = torch.zeros(9, dtype=torch.long)

        def __len__(self):
            return 9

        def batch(self, indices):
            return indices[:, None, None, None].float(), indices

    sizes = [len(batch["label"]) for batch in Batches(Fake(), 4, (0,), None)]
    assert sizes == [4, 5]
    again = Batches(Fake(), 4, (0,), None, num_steps=5)
    seen = [batch["label"].tolist() for batch in again]
    assert [len(labels) for labels in seen] == [4, 5, 4, 5, 4]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(9))
    assert seen[0] != seen[2]


def test_weights_of_the_loss_are_the_texts_for_two_classes():
    labels = torch.tensor([0] * 3 + [1] * 9)
    weights = class_weights(labels, 2)
    assert weights.tolist() == pytest.approx([12 / 6, 12 / 18])
    text = torch.tensor([9 / 12, 3 / 12])  # w_N = n_P / n, w_P = n_N / n
    assert (weights / text).tolist() == pytest.approx([8 / 3] * 2)
    assert weights[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": ["99"]}, "there is no row 99"),
        ({"backbone": "vgg16"}, "backbone 'vgg16'; allowed are resnet_small, resnet18"),
        ({"positive": "up"}, "no class 'up'; allowed are left, right"),
        ({"weights": "/nowhere.pth"}, r"no weights file /nowhere.pth; .*resnet18-f37072fd\.pth"),
        ({"device": "cuda"}, "finds no GPU"),
        ({"device": "tpu"}, "device 'tpu'; allowed are cpu and cuda"),
        ({"mix": [900]}, "needs .* synthetic images of left, there are 12"),
        ({"fractions": [0]}, "fractions are"),
        ({"fractions": [10, 10]}, "different whole percents"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"batch_size": 1}, "batch_size is 1; 2 or more"),
        ({"seeds": 0}, "seeds is 0"),
        ({"workers": 0}, "num_workers is 0"),
        ({"preset": "big"}, "preset 'big'"),
        ({"select_on": "test"}, "select_on is 'test'"),
        ({"image_size": [4, 4]}, "image size"),
        ({"backbone": "densenet121"}, "images of 16x16 do not go through densenet121.*--image-size"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(data, change, match, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=match):
        run_experiment(settings(data, **{"device": "cpu", **change}), report=lambda line: None)
    assert not (data / "out").exists()


def test_real_and_synthetic_images_that_do_not_fit_are_refused(data):
    def refused(match, **given):
        with pytest.raises(UserError, match=match):
            run_experiment(settings(data, **given), report=lambda line: None)

    def synthetic(name, numbers=(3, 3), **given):
        return str(write_dataset(data / name, {"training": numbers}, **given))

    refused("classes differ: real .*left.*up", synthetic=synthetic("s1", classes=("up", "down")))
    refused("real images have 1 channel.*synthetic 3", synthetic=synthetic("s2", channels=3))
    refused("real 16x16, synthetic 20x24; give --image-size 20 24", synthetic=synthetic("s3", size=(20, 24)))
    refused("no image of right; sample", synthetic=synthetic("s4", numbers=(3, 0)))
    unfinished = synthetic("s5")
    (data / "s5/dataset.json").unlink()
    refused("its sampling is not done", synthetic=unfinished)
    refused("is not a folder", synthetic=str(data / "none"))
    write_dataset(data / "r1", {"training": (3, 3), "validation": (2, 2)})
    refused("the test split of .* has no image", real=str(data / "r1"))
    write_dataset(data / "r2", {"training": (3, 3), "test": (2, 2)})
    refused("the validation split of .* has no image", real=str(data / "r2"))
    assert not (data / "out").exists()


def test_other_settings_in_the_same_folder_are_refused(data):
    run_experiment(settings(data, rows=["1"]), report=lambda line: None)
    with pytest.raises(UserError, match="epochs was 2, is 3; give the same to resume it"):
        run_experiment(settings(data, rows=["1"], epochs=3), report=lambda line: None)


def test_a_training_that_diverges_is_told(data):
    with pytest.raises(UserError, match="row 1, seed 0: the loss is not finite after epoch .* smaller --lr"):
        run_experiment(settings(data, rows=["1"], lr=1e30, epochs=4), report=lambda line: None)

# SPDX-License-Identifier: Apache-2.0
"""Sets, folds, jobs and errors of the segmentation experiment, without training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bundle_runs import started
from nnunet_toy import write_prepared, write_synthetic

from monai_synth.cli import main
from monai_synth.data.datalist import read_dataset
from monai_synth.data.pair_files import read_image, read_label
from monai_synth.errors import UserError
from monai_synth.experiments import nnunet_sets as sets
from monai_synth.experiments.nnunet import PRESETS, Settings, _checked, _tasks, run_experiment
from monai_synth.experiments.nnunet_jobs import Outcome, Task, locked, run_tasks
from monai_synth.experiments.record import record_settings


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    splits = {"training": 6, "validation": 2, "test": 3}
    return write_prepared(tmp_path_factory.mktemp("real") / "discs", splits=splits, per_patient=2)


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("synthetic"), num=12)


# --- sets ---


def test_real_set_takes_training_and_validation_at_the_asked_size(real, tmp_path):
    folder, cases, patients = sets.write_real(read_dataset(real), tmp_path, dataset_id=501, image_size=(32, 32))
    assert folder.name == "Dataset501_Real"
    assert cases == [f"c{k:03d}" for k in range(8)]
    assert patients == [f"p{k // 2}" for k in range(8)]
    content = json.loads((folder / "dataset.json").read_text())
    assert content["numTraining"] == 8
    assert list(content["channel_names"].values()) == ["R", "G", "B"]
    assert {read_image(path).shape for path in (folder / "imagesTr").glob("*.png")} == {(3, 32, 32)}
    assert {read_label(path).shape for path in (folder / "labelsTr").glob("*.png")} == {(32, 32)}


def test_native_size_copies_pixels_unchanged(real, tmp_path):
    folder, _, _ = sets.write_real(read_dataset(real), tmp_path, dataset_id=501, image_size=None)
    np.testing.assert_array_equal(read_image(folder / "imagesTr/c000_0000.png"), read_image(real / "images/c000.png"))
    np.testing.assert_array_equal(read_label(folder / "labelsTr/c000.png"), read_label(real / "labels/c000.png"))


def test_test_images_are_resized_but_their_truth_stays_native(real, tmp_path):
    dataset = read_dataset(real)
    test = sets.write_test("t", dataset, sets.test_cases(dataset, all_if_empty=False), tmp_path / "t", (32, 32))
    assert [case["case_id"] for case in test.cases] == ["c008", "c009", "c010"]
    assert read_image(test.cases[0]["images"][0]).shape == (3, 32, 32)
    assert read_label(test.cases[0]["label"]).shape == (40, 48)


def test_3d_real_set_keeps_the_extent_in_millimetres_when_resized(tmp_path):
    import nibabel as nib

    real = write_prepared(tmp_path / "real", splits={"training": 2, "test": 1}, shape=(16, 20, 12), channels=1)
    folder, _, _ = sets.write_real(read_dataset(real), tmp_path / "raw", dataset_id=501, image_size=(16, 16, 16))
    image = nib.load(folder / "imagesTr/c000_0000.nii.gz")
    assert image.shape == (16, 16, 16)
    np.testing.assert_allclose(image.header.get_zooms(), (1.0, 20 / 16, 12 / 16), rtol=1e-6)


def test_nnunet_reads_3d_test_images_with_axes_in_reverse(tmp_path):
    reader = pytest.importorskip("nnunetv2.imageio.simpleitk_reader_writer").SimpleITKIO()
    dataset = read_dataset(write_prepared(tmp_path / "real", splits={"test": 1}, shape=(5, 6, 7), channels=1))
    test = sets.write_test("t", dataset, sets.test_cases(dataset, all_if_empty=False), tmp_path / "t", None)
    read, _ = reader.read_images(test.cases[0]["images"])
    original = read_image(test.cases[0]["original"])
    np.testing.assert_array_equal(read[0].transpose(2, 1, 0), original[0])  # as predictions are turned back


def test_a_further_test_set_without_test_split_gives_all_its_cases(tmp_path):
    dataset = read_dataset(write_prepared(tmp_path / "other", splits={"training": 2, "validation": 1}))
    assert len(sets.test_cases(dataset, all_if_empty=True)) == 3
    with pytest.raises(UserError, match="no case in its test split"):
        sets.test_cases(dataset, all_if_empty=False)


def test_folds_hold_out_each_case_once_and_share_no_patient():
    rng = np.random.default_rng(0)
    groups = [f"p{k}" for k in rng.integers(0, 11, 60)]
    cases = [f"c{k}" for k in range(60)]
    folds = sets.grouped_folds(cases, groups, num_folds=5, seed=0)
    of = dict(zip(cases, groups, strict=True))
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(cases)
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == sorted(cases)
        assert not {of[c] for c in fold["train"]} & {of[c] for c in fold["val"]}
    sizes = [len(fold["val"]) for fold in folds]
    assert max(sizes) - min(sizes) <= max(groups.count(g) for g in set(groups))


def test_folds_follow_their_seed():
    cases = [f"c{k}" for k in range(10)]
    first, again, other = (sets.grouped_folds(cases, cases, num_folds=5, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert all(len(fold["val"]) == 2 for fold in first)


def test_fewer_patients_than_folds_are_refused():
    with pytest.raises(UserError, match="3 folds of 4 real training cases of 2 patients; allowed are 2 to 2"):
        sets.grouped_folds(list("abcd"), list("ppqq"), num_folds=3, seed=0)


def test_mix_holds_every_case_once_and_validates_on_real_ones_only(real, pool, tmp_path):
    folder, cases, patients = sets.write_real(read_dataset(real), tmp_path, dataset_id=501, image_size=(32, 32))
    mixed, new = sets.write_mix(folder, pool, tmp_path, dataset_id=531, name="Mix100")
    folds = sets.mixed_folds(sets.grouped_folds(cases, patients, num_folds=4, seed=0), new)
    there = {path.name[:-4] for path in (mixed / "labelsTr").iterdir()}
    assert len(there) == json.loads((mixed / "dataset.json").read_text())["numTraining"] == 8 + 12
    for fold in folds:
        assert set(fold["train"]) | set(fold["val"]) == there
        assert set(new) < set(fold["train"])
        assert all(case.startswith("real_") for case in fold["val"])
    assert os.path.samefile(mixed / "imagesTr/syn_s000_0000.png", pool / "imagesTr/s000_0000.png")


# --- errors, all before anything is trained ---


def run(real: Path, pool: Path, out: Path, **settings: object) -> list[str]:
    lines: list[str] = []
    values = {"preset": "demo", "device": "cpu", "folds": 4, "ratios": (100,)} | settings
    run_experiment(Settings(str(real), str(pool), str(out), **values), report=lines.append)
    return lines


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratios": (100, 250)}, r"250 % of 8 real training cases are 20, and .* holds 12; sample more"),
        ({"modes": ("pretain",)}, "unknown mode 'pretain'; allowed are synthetic-only, pretrain, control, mix"),
        ({"ratios": (0,)}, "whole percents"),
        ({"ratios": (100, 100)}, "different whole percents"),
        ({"folds": 5}, "5 folds of 8 real training cases of 4 patients"),
        ({"fold_list": (4,)}, "allowed are 0 to 3"),
        ({"epochs": 0}, "epochs is 0; 1 or more"),
        ({"finetune_lr": 0.0}, "finetune_lr is 0.0; more than 0"),
        ({"num_gpus": 2}, "2 GPUs asked for"),
        ({"preset": "fast"}, "allowed are paper, paper-nuclei, demo"),
        ({"dataset_id": 995}, "dataset id 1005 for Synthetic100; nnU-Net takes 1 to 999"),
        ({"image_size": (32,)}, "one length per axis"),
        ({"patch_size": (32, 32, 32)}, "give 2 lengths"),
    ],
)
def test_settings_that_cannot_work_are_refused(real, pool, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        run(real, pool, tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("jobs/*"))


def test_a_missing_gpu_is_told(real, pool, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch finds no GPU here; use --device cpu"):
        run(real, pool, tmp_path, device="cuda")


def test_a_missing_nnunet_is_told_with_the_extra_that_brings_it(real, pool, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'monai_synth\[nnunet\]'"):
        run(real, pool, tmp_path)


def test_a_torchvision_of_another_build_is_told(real, pool, tmp_path, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"torchvision does not fit PyTorch here \(operator torchvision::nms"):
        run(real, pool, tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"channels": 1}, "has channels R, G, B, synthetic dataset .* has L"),
        ({"num_labels": 3}, 'has labels .*"disc1": 1}, synthetic dataset .*"disc2": 2}'),
        ({"channels": 1, "shape": (8, 8, 8)}, "real dataset .* synthetic dataset"),
    ],
)
def test_synthetic_pairs_of_another_kind_are_refused_and_both_named(real, tmp_path, other, message):
    pool = write_synthetic(tmp_path / "pool", num=2, **other)
    with pytest.raises(UserError, match=message):
        run(real, pool, tmp_path / "out")


def test_an_empty_test_split_is_refused(pool, tmp_path):
    real = write_prepared(tmp_path / "real", splits={"training": 8})
    with pytest.raises(UserError, match="no case in its test split"):
        run(real, pool, tmp_path / "out")


def test_a_taken_dataset_id_is_refused(real, pool, tmp_path):
    (tmp_path / "nnunet/raw/Dataset511_Mine").mkdir(parents=True)
    with pytest.raises(UserError, match="dataset id 511 is taken by .*Dataset511_Mine; give another --dataset-id"):
        run(real, pool, tmp_path)


def test_a_folder_of_several_synthetic_datasets_is_refused_and_one_is_taken(pool, tmp_path):
    assert sets.read_pool(pool.parent).folder == pool
    for number in (1, 2):
        (tmp_path / f"Dataset00{number}_X").mkdir()
        (tmp_path / f"Dataset00{number}_X/dataset.json").write_text("{}")
    with pytest.raises(UserError, match="holds Dataset001_X, Dataset002_X"):
        sets.read_pool(tmp_path)
    with pytest.raises(UserError, match=r"no dataset.json of nnU-Net v2"):
        sets.read_pool(tmp_path / "Dataset001_X")


def test_the_command_line_tells_errors_in_one_line_with_status_2(real, pool, tmp_path, capsys):
    arguments = ["experiment", "nnunet", "--real", str(real), "--synthetic", str(pool), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--ratios", "1000", "--preset", "demo", "--device", "cpu", "--folds", "4"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "1000 % of 8 real training cases are 80" in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {}),
        (["--ratios", "100,250", "--mode", "pretrain,mix"], {"ratios": (100, 250), "modes": ("pretrain", "mix")}),
        (["--test", "A=x", "--test", "B=y=z"], {"tests": {"A": "x", "B": "y=z"}}),
        (["--image-size", "256", "320"], {"image_size": (256, 320)}),
        (["--image-size", "native"], {"image_size": ()}),
        (
            ["--preset", "demo", "--folds", "3", "--fold-list", "0,2"],
            {"preset": "demo", "folds": 3, "fold_list": (0, 2)},
        ),
        (["--seeds", "3", "--lr", "1e-3", "--disable-tta"], {"num_seeds": 3, "lr": 1e-3, "disable_tta": True}),
        (["--patch-size", "64", "96", "--show-real"], {"patch_size": [64, 96], "show_real": True}),
    ],
)
def test_options_of_the_command_line_become_settings(monkeypatch, options, expected):
    got = []
    monkeypatch.setattr(
        "monai_synth.experiments.nnunet.run_experiment",
        lambda settings, report: got.append(settings) or Outcome({}, {}),
    )
    assert main(["experiment", "nnunet", "--real", "r", "--synthetic", "s", "--out", "o", *options]) == 0
    assert got == [Settings("r", "s", "o", **expected)]


def test_a_failed_job_makes_the_exit_status_1_with_a_summary(monkeypatch, capsys):
    outcome = Outcome({"a": "exit status 1"}, {"b": "a"})
    monkeypatch.setattr("monai_synth.experiments.nnunet.run_experiment", lambda settings, report: outcome)
    assert main(["experiment", "nnunet", "--real", "r", "--synthetic", "s", "--out", "o"]) == 1
    assert "1 jobs failed (a), 1 that need them were skipped" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--image-size", "native", "64"], ["--test", "x"], ["--ratios", "a"]])
def test_options_of_another_form_are_a_usage_error(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["experiment", "nnunet", "--real", "r", "--synthetic", "s", "--out", "o", *options])
    assert "usage: monai-synth experiment nnunet" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path):
    record_settings(tmp_path / "experiment.json", {"epochs": 2, "lr": 0.1})
    record_settings(tmp_path / "experiment.json", {"epochs": 2, "lr": 0.1})
    with pytest.raises(UserError, match=r"was begun with other settings: epochs was 2, is 3; give the same"):
        record_settings(tmp_path / "experiment.json", {"epochs": 3, "lr": 0.1})


def test_two_experiments_in_one_folder_at_a_time_are_refused(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match="another experiment is at work"), locked(tmp_path):
        pass


# --- the plan of jobs ---


def jobs(**settings: object):
    from monai_synth.experiments.nnunet import _Data, _dataset_ids

    chosen, values = _checked(Settings("r", "s", "o", device="cpu", **settings))
    test = sets.TestSet("t", ({"case_id": "a", "images": ["a_0000.png"], "label": "a.png", "group": "a"},))
    data = _Data(Path("Dataset501_Real"), 8, (test,), {"background": 0, "disc": 1}, "2d")
    values |= {"patch_size": None}
    return _tasks(chosen, values, _dataset_ids(chosen), data, Path("/out"))


def test_every_network_of_the_protocol_is_trained_once():
    tasks, rows = jobs(ratios=(100, 250), modes=("mix", "control"), num_seeds=2)
    count = {row.mode: 0 for row in rows}
    for row in rows:
        count[row.mode] += len(row.runs)
    assert count == {"real": 10, "control": 10, "synthetic-only": 4, "pretrain": 20, "mix": 20}
    assert len({task.name for task in tasks}) == len(tasks) == 1 + 4 + 64
    assert [row.text for row in rows][:3] == ["real only", "real, then real again", "synthetic only 100 %"]
    seen: set[str] = set()
    for task in tasks:
        assert set(task.needs) <= seen
        seen.add(task.name)


def test_finetuning_starts_from_the_synthetic_network_of_its_own_ratio_and_seed():
    tasks, _ = jobs(ratios=(100, 250), modes=("pretrain", "control"), num_seeds=2)
    by_name = {task.name: task for task in tasks}
    task = by_name["seed1_pretrain250_fold3"]
    assert task.environment["MONAI_SYNTH_WEIGHTS"] == (
        "/out/nnunet/results/seed1_synthetic-only250/Dataset512_Synthetic250/"
        "MonaiSynthTrainer__nnUNetPlans_from501__2d/fold_all/checkpoint_final.pth"
    )
    assert "seed1_synthetic-only250" in task.needs
    assert task.environment["MONAI_SYNTH_EPOCHS"] == "150"
    assert "seed1_real_fold3/Dataset501_Real" in by_name["seed1_control_fold3"].environment["MONAI_SYNTH_WEIGHTS"]
    # set to nothing, so that a variable of the user's shell cannot slip in
    assert by_name["seed0_real_fold0"].environment["MONAI_SYNTH_WEIGHTS"] == ""


def test_presets_hold_the_values_of_the_text():
    paper, nuclei = PRESETS["paper"], PRESETS["paper-nuclei"]
    assert (paper["epochs"], paper["finetune_epochs"], paper["lr"], paper["finetune_lr"]) == (400, 150, 0.01, 0.01)
    assert (nuclei["epochs"], nuclei["finetune_epochs"], nuclei["lr"], nuclei["finetune_lr"]) == (1000, 100, 0.01, 5e-6)
    _, values = _checked(Settings("r", "s", "o", preset="paper-nuclei", device="cpu", finetune_epochs=7))
    assert (values["epochs"], values["finetune_epochs"], values["iterations"]) == (1000, 7, 250)


# --- running jobs; a job here is a few lines of Python instead of nnU-Net ---

CHILD = """
import json, sys, time, os, signal
job = json.load(open(sys.argv[1]))
for step in job["steps"]:
    marker = os.path.join(job["markers"], step["name"] + ".json")
    with open(sys.argv[2] + ".pid", "w") as file:
        file.write(str(os.getpid()))
    with open(sys.argv[2], "a") as file:
        file.write(step["name"] + " " + os.environ.get("SLOT", "-") + "\\n")
    if step["kind"] == "fail":
        print("CUDA is out of patience"); sys.exit(3)
    if step["kind"] == "hang":
        time.sleep(600)
    json.dump({"seconds": 1.0}, open(marker, "w"))
"""


def task(name: str, *, kind: str = "ok", needs: tuple[str, ...] = ()) -> Task:
    return Task(name, "toy", ({"name": f"{name}.train", "kind": kind, "args": {}},), needs)


def run_toy(tasks: list[Task], out: Path, **more: object):
    lines: list[str] = []
    ran = out / "ran"
    command = [sys.executable, "-S", "-c", CHILD]
    outcome = run_tasks(
        tasks, out, command=lambda job: [*command, str(job), str(ran)], report=lines.append, **more
    )  # fmt: skip
    names = [line.split() for line in ran.read_text().splitlines()] if ran.is_file() else []
    ran.unlink(missing_ok=True)
    return outcome, names, lines


def test_a_second_call_runs_nothing_that_is_done(tmp_path):
    tasks = [task("a"), task("b", needs=("a",))]
    outcome, ran, lines = run_toy(tasks, tmp_path)
    assert [name for name, _ in ran] == ["a.train", "b.train"]
    assert not outcome.failed
    assert lines[0].startswith("[1/2] a: done in 0 s, about 1 s left")
    assert run_toy(tasks, tmp_path)[1:] == ([], ["2 of 2 jobs are done already"])
    (tmp_path / "jobs/b.train.json").unlink()
    assert [name for name, _ in run_toy(tasks, tmp_path)[1]] == ["b.train"]


def test_a_failure_is_told_with_its_log_and_stops_only_what_needs_it(tmp_path):
    tasks = [task("a", kind="fail"), task("b", needs=("a",)), task("c", needs=("b",)), task("d")]
    outcome, ran, lines = run_toy(tasks, tmp_path)
    assert [name for name, _ in ran] == ["a.train", "d.train"]
    assert list(outcome.failed) == ["a"]
    assert outcome.skipped == {"b": "a", "c": "b"}
    told = next(line for line in lines if "a: FAILED" in line)
    assert "exit status 3" in told
    assert str(tmp_path / "logs/a.log") in told
    assert "CUDA is out of patience" in told
    assert any("b: skipped, it needs a, which failed" in line for line in lines)
    # mended, the same call does what is left
    outcome, ran, _ = run_toy([task("a"), *tasks[1:]], tmp_path)
    assert [name for name, _ in ran] == ["a.train", "b.train", "c.train"]
    assert not outcome.failed


def test_jobs_share_the_slots_and_see_their_own_gpu(tmp_path):
    tasks = [task(name) for name in "abcd"]
    _, ran, _ = run_toy(tasks, tmp_path, slots=[{"SLOT": "0"}, {"SLOT": "1"}])
    assert sorted(name for name, _ in ran) == [f"{name}.train" for name in "abcd"]
    assert {slot for _, slot in ran} == {"0", "1"}


def test_a_job_file_holds_all_that_is_needed_to_run_it_by_hand(tmp_path):
    steps = ({"name": "a.train", "kind": "ok", "args": {"fold": 0}},)
    run_toy([Task("a", "toy", steps, environment={"nnUNet_raw": "/r"})], tmp_path, slots=[{"SLOT": "1"}])
    job = json.loads((tmp_path / "jobs/a.job").read_text())
    expected = {"environment": {"nnUNet_raw": "/r", "SLOT": "1"}, "markers": str(tmp_path / "jobs")}
    assert job == expected | {"steps": list(steps)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_child_too_and_the_rest_is_resumed(tmp_path, number):
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from monai_synth.experiments.nnunet_jobs import Task, run_tasks
out = Path({str(tmp_path)!r})
steps = [{{"name": name + ".train", "kind": kind, "args": {{}}}} for name, kind in (("a", "ok"), ("b", "hang"))]
try:
    run_tasks([Task(step["name"][0], "toy", (step,)) for step in steps], out,
              command=lambda job: [sys.executable, "-S", "-c", {CHILD!r}, str(job), str(out / "ran")])
except KeyboardInterrupt:
    sys.exit(130)
"""
    with started([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "ran").is_file() or "b.train" not in (tmp_path / "ran").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "ran.pid").read_text()), 0)
    assert [name for name, _ in run_toy([task("a"), task("b")], tmp_path)[1]][-1:] == ["b.train"]

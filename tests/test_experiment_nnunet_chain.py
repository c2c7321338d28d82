# SPDX-License-Identifier: Apache-2.0
"""The whole segmentation experiment with nnU-Net itself, on discs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundle_runs import started
from nnunet_toy import write_prepared, write_synthetic

from monai_synth.cli import main

pytest.importorskip("nnunetv2")
pytestmark = pytest.mark.slow


def command(folder: Path, *more: str) -> list[str]:
    folders = ("--real", str(folder / "real"), "--synthetic", str(folder), "--out", str(folder / "out"))
    preset = ("--preset", "demo", "--device", "cpu", "--ratios", "150", "--iterations", "2")
    return ["experiment", "nnunet", *folders, *preset, *more]


def marker(folder: Path, step: str) -> dict:
    return json.loads((folder / f"out/jobs/{step}.json").read_text())


def test_rgb_pairs_go_through_all_modes_and_a_second_call_does_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "mine"))
    write_prepared(tmp_path / "real", splits={"training": 6, "validation": 2, "test": 3}, shape=(72, 80))
    write_prepared(tmp_path / "other", splits={"training": 2}, shape=(50, 40), seed=5)
    write_synthetic(tmp_path, num=12, shape=(64, 64))
    call = command(tmp_path, "--mode", "mix,control", "--test", f"more={tmp_path / 'other'}", "--show-real")
    assert main(call) == 0
    told = capfd.readouterr().out
    assert "those of your variables stay as is" in told
    assert not (tmp_path / "mine").exists()
    for kind, name in (("plan", "plan"), ("prepare", "prepare_Synthetic150"), ("prepare", "prepare_Mix150")):
        assert "verify_dataset_integrity Done" in (tmp_path / f"out/logs/{name}.log").read_text(), kind

    # fine-tuning and the control start from all weights, those of the segmentation heads too
    for tuned, first in (("pretrain150_fold0", "synthetic-only150"), ("control_fold0", "real_fold0")):
        end = marker(tmp_path, f"seed0_{first}.train")
        assert end["final_sha256"] != end["start_sha256"]
        assert marker(tmp_path, f"seed0_{tuned}.train")["start_sha256"] == end["final_sha256"]
    assert (
        marker(tmp_path, "seed0_real_fold0.train")["start_sha256"]
        == marker(tmp_path, "seed0_synthetic-only150.train")["start_sha256"]
    )  # one seed, one network

    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert {(e["test"], e["mode"]) for e in results} == {
        (test, mode) for test in ("discs", "more") for mode in ("real", "control", "synthetic-only", "pretrain", "mix")
    }
    assert {e["numbers"]["mDice"]["n"] for e in results} == {3, 2}

    before = trained_at(tmp_path)
    assert main(call) == 0
    assert "8 of 8 jobs are done already" in capfd.readouterr().out
    assert trained_at(tmp_path) == before != {}
    assert main([*call, "--epochs", "9"]) == 2
    assert "epochs was 2, is 9" in capfd.readouterr().err


def test_grey_3d_pairs_of_three_labels_are_trained_and_scored(tmp_path):
    size = {"channels": 1, "num_labels": 3}
    write_prepared(tmp_path / "real", splits={"training": 6, "test": 2}, shape=(36, 24, 28), **size)
    write_synthetic(tmp_path, num=9, shape=(32, 32, 32), **size)
    assert main(command(tmp_path, "--mode", "pretrain", "--patch-size", "24", "32", "16", "--epochs", "1")) == 0
    plans = json.loads((tmp_path / "out/nnunet/preprocessed/Dataset501_Real/nnUNetPlans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["patch_size"] == _transposed([16, 32, 24], plans)
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert len(results) == 3
    counts = marker(tmp_path, "seed0_real_fold0.discs")["cases"]
    assert all(len(labels) == 2 for labels in counts.values())


def test_a_stopped_training_goes_on_from_its_last_checkpoint(tmp_path):
    write_prepared(tmp_path / "real", splits={"training": 6, "test": 1}, shape=(64, 64))
    write_synthetic(tmp_path, num=9, shape=(64, 64))
    call = command(tmp_path, "--mode", "synthetic-only", "--epochs", "30")
    with started([sys.executable, "-m", "monai_synth", *call], stdout=subprocess.DEVNULL) as first:
        while not list((tmp_path / "out/nnunet/results").glob("seed0_real_fold0/*/*/fold_0/checkpoint_latest.pth")):
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 130
    assert not (tmp_path / "out/jobs/seed0_real_fold0.train.json").exists()
    assert main(call) == 0
    log = (tmp_path / "out/logs/seed0_real_fold0.log").read_text()
    epochs = [int(number) for number in re.findall(r": Epoch (\d+)", log)]
    assert epochs.count(0) == 1, "the second call began anew"
    assert set(epochs) == set(range(30))
    assert len(marker(tmp_path, "seed0_real_fold0.train")["train_losses"]) == 30


def test_a_training_that_fails_is_told_and_the_others_go_on(tmp_path, capfd):
    write_prepared(tmp_path / "real", splits={"training": 6, "test": 2}, shape=(64, 64))
    pool = write_synthetic(tmp_path, num=9, shape=(64, 64))
    broken = pool / "labelsTr/s003.png"
    broken.write_bytes(broken.read_bytes()[:40])
    assert main(command(tmp_path, "--mode", "pretrain", "--epochs", "1")) == 1
    told = capfd.readouterr()
    assert "prepare_Synthetic150: FAILED" in told.out
    assert str(tmp_path / "out/logs/prepare_Synthetic150.log") in told.out
    assert "2 that need them were skipped" in told.err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [e["mode"] for e in results["results"]] == ["real"]
    assert set(results["skipped"]) == {"seed0_synthetic-only150", "seed0_pretrain150_fold0"}


def trained_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "out/nnunet/results").rglob("*") if path.is_file()}


def _transposed(patch: list[int], plans: dict) -> list[int]:
    return [patch[axis] for axis in plans["transpose_forward"]]

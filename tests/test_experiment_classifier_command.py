# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundle_runs import started
from classifier_toy import write_both, write_dataset

from monai_synth.cli import main


@pytest.mark.slow
def test_the_command_learns_what_is_plain_with_two_processes(tmp_path, capsys):
    write_dataset(tmp_path / "real", {"training": (60, 90), "validation": (10, 10), "test": (20, 30)})
    write_dataset(tmp_path / "synthetic", {"training": (80, 80)}, seed=1)
    arguments = [f"--{key}={tmp_path / key}" for key in ("real", "synthetic", "out")]
    options = ["--preset", "demo", "--workers", "2", "--bootstrap", "100", "--device", "cpu"]
    assert main(["experiment", "classifier", *arguments, *options]) == 0
    assert "3 rows x 1 seeds = 3 trainings of resnet18 from scratch" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert [entry["row"] for entry in content["results"]] == ["1", "3", "17"]
    assert min(entry["numbers"]["accuracy"]["value"] for entry in content["results"]) > 0.9


def members(group):
    """Processes of a group that are alive, as their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(path.with_name("cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the processes from /proc")
@pytest.mark.parametrize(("workers", "number"), [(2, signal.SIGINT), (2, signal.SIGTERM)])
def test_an_interrupt_ends_all_processes_and_scores_what_is_done(tmp_path, workers, number):
    write_both(tmp_path)
    program = f"import sys; sys.path[:0] = {sys.path!r}; from monai_synth.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["experiment", "classifier", *(f"--{k}={tmp_path / k}" for k in ("real", "synthetic", "out"))]
    arguments += f"--seeds 3 --epochs 12 --batch-size 8 --workers {workers} --device cpu --bootstrap 20".split()
    with started([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("[2/"):
                break
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        assert process.wait(60) == 130
        deadline = time.monotonic() + 20
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not members(process.pid)
    assert not (tmp_path / "out/images.part").exists()
    done = {path.name for path in (tmp_path / "out/runs").glob("*.json")}
    assert len(done) >= 2
    content = json.loads((tmp_path / "out/results.json").read_text())
    assert sum(entry["num_seeds"] for entry in content["results"]) >= 2
    assert "Unfinished" in (tmp_path / "out/report.html").read_text()

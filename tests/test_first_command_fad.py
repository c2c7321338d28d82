# SPDX-License-Identifier: Apache-2.0
"""What the documentation promises of the demo of fad: from nothing to tiles that an expert takes for their class."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import BUNDLES

from monai_synth.checkpoint import load_file
from monai_synth.data.datalist import read_dataset


@pytest.mark.slow
def test_an_expert_knows_the_class_of_what_the_demo_models_make(tmp_path: Path) -> None:
    """Takes minutes; the commands are the documentation's but for where they write."""
    places = ["--phantom_dir", str(tmp_path / "phantom"), "--latest_dir", str(tmp_path / "models")]
    configs = BUNDLES / "fad" / "configs"
    aligned, baseline = str(configs / "train.json"), str(configs / "baseline.json")
    run = [sys.executable, "-m", "monai.bundle", "run"]
    for number, config in enumerate((str(configs / "train_expert.json"), aligned, f"['{aligned}','{baseline}']")):
        models = ["--ckpt_dir", str(tmp_path / "models"), "--output_dir", str(tmp_path / f"eval{number}")]
        subprocess.run([*run, "training", "--config_file", config, *places, *models], check=True)
    expert = tmp_path / "models" / "expert_resnet_small.pt"
    assert load_file(expert)["report"]["val_accuracy"] > 0.85

    sample = [*run, "--config_file", str(configs / "inference.json"), *places]
    subprocess.run([*sample, "--per_class", "2", "--output_dir", str(tmp_path / "out")], check=True)
    assert len(read_dataset(tmp_path / "out", task="classes").datalist("training")) == 8

    arms = [
        f"{arm}={tmp_path / 'models' / file}" for arm, file in (("baseline", "baseline.pt"), ("aligned", "model.pt"))
    ]
    compare = [sys.executable, "-m", "monai_synth", "experiment", "expert", "--expert", str(expert), "--models", *arms]
    options = ["--real", str(tmp_path / "phantom"), "--seeds", "3", "--out", str(tmp_path / "results")]
    subprocess.run([*compare, *options], check=True)
    (judge,) = json.loads((tmp_path / "results" / "results.json").read_text())["experts"]
    for arm in ("baseline", "aligned"):
        accuracy = judge["arms"][arm]["accuracy"]["value"]
        print(f"{arm}: {accuracy:.3f} of 120 tiles are taken for their class; chance is .25")
        assert accuracy > 0.5
    assert judge["real"]["as_generated"]["accuracy"] > 0.85

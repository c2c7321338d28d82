# SPDX-License-Identifier: Apache-2.0
"""What the documentation promises of the demo of fad: an expert, two models, and its judgement of their images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import BUNDLES


@pytest.mark.slow
def test_an_expert_knows_the_tissues_of_the_demo_models_and_of_the_phantom(tmp_path: Path) -> None:
    """Takes minutes; the commands are the documentation's but for where they write."""
    configs = BUNDLES / "fad" / "configs"
    places = ["--phantom_dir", str(tmp_path / "phantom"), "--ckpt_dir", str(tmp_path / "models")]
    places += ["--output_dir", str(tmp_path / "eval")]
    train = [sys.executable, "-m", "monai.bundle", "run", "training", *places, "--config_file"]
    latest = ["--latest_dir", str(tmp_path / "models")]
    subprocess.run([*train, str(configs / "train_expert.json")], check=True)
    subprocess.run([*train, str(configs / "train.json"), *latest], check=True)
    subprocess.run([*train, f"['{configs / 'train.json'}','{configs / 'baseline.json'}']", *latest], check=True)
    models = tmp_path / "models"
    command = [
        sys.executable, "-m", "monai_synth", "experiment", "expert", "--expert", models / "expert_resnet18.pt",
        "--real", tmp_path / "phantom", "--models",
        f"baseline={models / 'baseline.pt'}", f"aligned={models / 'model.pt'}",
        "--seeds", "3", "--out", tmp_path / "results",
    ]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)

    (judge,) = json.loads((tmp_path / "results" / "results.json").read_text())["experts"]
    assert judge["real"]["own_size"]["accuracy"] > 0.85
    for arm in ("baseline", "aligned"):
        accuracy = judge["arms"][arm]["accuracy"]
        print(f"{arm}: {accuracy['value']:.3f} of {accuracy['n']} images called the class asked for")
        assert accuracy["value"] > 0.5  # chance is 0.25
    assert judge["arms"]["aligned"]["steered"]
    assert not judge["arms"]["baseline"]["steered"]

# SPDX-License-Identifier: Apache-2.0
"""What the documentation promises of the demo of spade_gan: from nothing to slices that follow held-out maps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bundle_runs import BUNDLES

from monai_synth.evaluate.folders import evaluate_folder


@pytest.mark.slow
def test_slices_of_the_demo_gan_follow_held_out_maps(tmp_path: Path) -> None:
    """Takes minutes; the commands are the documentation's but for where they write."""
    places = ["--phantom_dir", str(tmp_path / "phantom"), "--latest_dir", str(tmp_path / "models")]
    run = [sys.executable, "-m", "monai.bundle", "run"]
    train = [*run, "training", "--config_file", str(BUNDLES / "spade_gan" / "configs" / "train.json"), *places]
    models = ["--ckpt_dir", str(tmp_path / "models")]
    subprocess.run([*train, *models, "--output_dir", str(tmp_path / "eval")], check=True)
    assert (tmp_path / "eval" / "samples.png").is_file()
    sample = [*run, "--config_file", str(BUNDLES / "spade_gan" / "configs" / "inference.json"), *places]
    subprocess.run([*sample, "--num_samples", "16", "--output_dir", str(tmp_path / "out")], check=True)
    lung = evaluate_folder(tmp_path / "out" / "Dataset900_SPADE")["classes"]["lung"]
    print(lung)
    assert lung["n"] >= 12
    assert lung["value"] >= 0.9

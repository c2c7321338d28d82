# SPDX-License-Identifier: Apache-2.0
"""What the README promises of its first command: three stages from nothing, and slices that follow their maps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from monai_synth.evaluate.folders import evaluate_folder

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "lsdm"


@pytest.mark.slow
def test_slices_of_the_demo_model_follow_held_out_maps(tmp_path: Path) -> None:
    """Takes minutes; the command is the README's but for where it writes."""
    phantom, models = tmp_path / "phantom", tmp_path / "models"
    places = ["--phantom_dir", str(phantom), "--latest_dir", str(models)]
    run = [sys.executable, "-m", "monai.bundle", "run"]
    train = [*run, "training", "--config_file", str(BUNDLE / "configs" / "train.json"), *places]
    subprocess.run([*train, "--ckpt_dir", str(models), "--output_dir", str(tmp_path / "eval")], check=True)
    grid = np.asarray(Image.open(tmp_path / "eval" / "samples.png").convert("L"), dtype=float)
    # rows of 128 with gaps of 2: maps, samples, phantom slices of the same cases
    sampled, real = grid[130:258], grid[260:388]
    assert np.corrcoef(sampled.ravel(), real.ravel())[0, 1] > 0.9

    sample = [*run, "--config_file", str(BUNDLE / "configs" / "inference.json"), *places]
    subprocess.run([*sample, "--num_samples", "16", "--output_dir", str(tmp_path / "out")], check=True)
    report = evaluate_folder(tmp_path / "out" / "Dataset900_LSDM")
    lung = report["classes"]["lung"]
    print(report)
    assert lung["n"] >= 12
    assert lung["value"] >= 0.9

# SPDX-License-Identifier: Apache-2.0
"""What the documentation promises of the demo of cfg_ddpm: from nothing to images that show the class asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_runs import BUNDLES
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from monai_synth.data.datalist import read_dataset
from monai_synth.data.pair_files import read_image


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    cases = read_dataset(folder, task="classes").datalist(split)
    pixels = np.stack([read_image(case["image"]).ravel() / 255 for case in cases])
    return pixels, np.array([case["class"] for case in cases])


@pytest.mark.slow
def test_images_of_the_demo_model_show_their_class(tmp_path: Path) -> None:
    """Takes minutes; the commands are the documentation's but for where they write."""
    places = ["--phantom_dir", str(tmp_path / "phantom"), "--latest_dir", str(tmp_path / "models")]
    run = [sys.executable, "-m", "monai.bundle", "run"]
    configs = BUNDLES / "cfg_ddpm" / "configs"
    train = [*run, "training", "--config_file", str(configs / "train.json"), *places]
    models = ["--ckpt_dir", str(tmp_path / "models")]
    subprocess.run([*train, *models, "--output_dir", str(tmp_path / "eval")], check=True)
    sample = [*run, "--config_file", str(configs / "inference.json"), *places]
    subprocess.run([*sample, "--per_class", "100", "--output_dir", str(tmp_path / "out")], check=True)

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    classifier.fit(*read(tmp_path / "phantom", "training"))
    ceiling = classifier.score(*read(tmp_path / "phantom", "test"))
    sampled, labels = read(tmp_path / "out", "training")
    accuracy = classifier.score(sampled, labels)
    print(f"class recognised: samples {accuracy:.3f} (n = {len(labels)}), phantom's own test images {ceiling:.3f}")
    assert accuracy > 0.75
    # and they vary: the mean distance of two samples of a class is that of two phantom images, within a half
    real, real_labels = read(tmp_path / "phantom", "training")
    for k in (0, 1):
        spread, expected = (np.std(x[y == k], axis=0).mean() for x, y in ((sampled, labels), (real, real_labels)))
        assert 0.5 < spread / expected < 1.5

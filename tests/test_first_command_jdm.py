# SPDX-License-Identifier: Apache-2.0
"""What the documentation promises of the demo of jdm: from nothing to pairs whose image and mask belong together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_runs import BUNDLES
from PIL import Image
from scipy import stats


def separation(folder: Path, images: str, labels: str) -> float:
    """Probability that a pixel inside the mask has less red than one outside (nuclei are blue), mean over pairs."""
    found = []
    for path in sorted((folder / labels).iterdir()):
        mask = np.asarray(Image.open(path)) > 0
        name = path.name if (folder / images / path.name).exists() else path.name.replace(".png", "_0000.png")
        red = np.asarray(Image.open(folder / images / name))[..., 0]
        u = stats.mannwhitneyu(red[~mask], red[mask]).statistic
        found.append(u / (mask.sum() * (~mask).sum()))
    return float(np.mean(found))


@pytest.mark.slow
def test_pairs_of_the_demo_model_belong_together(tmp_path: Path) -> None:
    """Takes minutes; the commands are the documentation's but for where they write."""
    places = ["--phantom_dir", str(tmp_path / "phantom"), "--latest_dir", str(tmp_path / "models")]
    run = [sys.executable, "-m", "monai.bundle", "run"]
    train = [*run, "training", "--config_file", str(BUNDLES / "jdm" / "configs" / "train.json"), *places]
    models = ["--ckpt_dir", str(tmp_path / "models")]
    subprocess.run([*train, *models, "--output_dir", str(tmp_path / "eval")], check=True)
    sample = [*run, "--config_file", str(BUNDLES / "jdm" / "configs" / "inference.json"), *places]
    subprocess.run([*sample, "--num_samples", "32", "--output_dir", str(tmp_path / "out")], check=True)
    folder = tmp_path / "out" / "Dataset910_JDM"
    sampled, ceiling = separation(folder, "imagesTr", "labelsTr"), separation(tmp_path / "phantom", "images", "labels")
    print(f"separation of masks: sampled {sampled:.3f} (n = 32), phantom itself {ceiling:.3f}")
    assert (tmp_path / "out" / "figures" / "pairs.png").is_file()
    assert sampled > 0.85
    shares = [(np.asarray(Image.open(p)) > 0).mean() for p in (folder / "labelsTr").iterdir()]
    real = [(np.asarray(Image.open(p)) > 0).mean() for p in (tmp_path / "phantom" / "labels").iterdir()]
    assert abs(np.mean(shares) - np.mean(real)) < 0.15

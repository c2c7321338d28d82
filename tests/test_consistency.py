# SPDX-License-Identifier: Apache-2.0
"""Image-mask consistency: pairs that fit score as real ones do, pairs that do not score less."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet, read_case_set
from monai_synth.evaluate.consistency import (
    Segmenter,
    SegmenterOptions,
    consistency_results,
    dice,
    held_out,
)


def blob_pair(seed: int, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A bright disc on grey noise and its mask."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:size, :size]
    row, col, radius = rng.integers(12, size - 12), rng.integers(12, size - 12), rng.integers(5, 11)
    mask = (rows - row) ** 2 + (cols - col) ** 2 <= radius**2
    image = 80 + 90 * gaussian_filter(mask.astype(float), 0.7) + rng.normal(0, 8, mask.shape)
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def write_pairs(root: Path, num: int, first: int = 0, *, shuffled: bool = False, test: int = 0, **head: object) -> Path:
    """A prepared dataset of pairs; ``shuffled`` gives each image the mask of the next."""
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    pairs = [blob_pair(first + i) for i in range(num + test)]
    content = {
        "name": root.name, "task": "pairs", "modality": "RGB", "image_channels": 1, "spatial_shape": [48, 48],
        "intensity": {"unit": "grey value"}, "labels": {"background": 0, "blob": 1},
        "training": [], "validation": [], "test": [], **head,
    }  # fmt: skip
    for i, (image, mask) in enumerate(pairs):
        if shuffled:
            mask = pairs[(i + 1) % len(pairs)][1]
        name = f"c{first + i:04d}"
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "labels" / f"{name}.png")
        content["training" if i < num else "test"].append(
            {"image": f"images/{name}.png", "label": f"labels/{name}.png", "case_id": name, "patient_id": name}
        )
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> CaseSet:
    return read_case_set(write_pairs(tmp_path_factory.mktemp("pairs") / "real", 40, test=10), option="--real")


@pytest.fixture(scope="module")
def segmenter(real: CaseSet) -> Segmenter:
    torch.set_num_threads(1)
    return Segmenter(real, SegmenterOptions(num_steps=120, size=48), shape=(48, 48))


def test_pairs_that_fit_score_as_real_ones_and_exchanged_masks_do_not(
    segmenter: Segmenter, real: CaseSet, tmp_path: Path
) -> None:
    unseen = segmenter.judge(read_case_set(real.root, option="--real", split="test"))
    good = segmenter.judge(read_case_set(write_pairs(tmp_path / "good", 20, 500), option="--synthetic"))
    bad = segmenter.judge(read_case_set(write_pairs(tmp_path / "bad", 20, 500, shuffled=True), option="--synthetic"))
    fits = consistency_results(good, unseen)["all labels"]
    fails = consistency_results(bad, unseen)["all labels"]
    assert fits["real"]["value"] > 0.85
    assert fits["real"]["n"] == 10
    assert abs(fits["difference"]["value"]) < 0.05
    assert fails["synthetic"]["value"] < 0.4
    assert fails["difference"]["ci"][1] < -0.3
    assert set(consistency_results(good, unseen)) == {"all labels"}


def test_the_same_seed_trains_the_same_segmenter_and_leaves_the_global_generator_alone(real: CaseSet) -> None:
    options = SegmenterOptions(num_steps=3, size=24)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = Segmenter(real, options, shape=(48, 48))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    second = Segmenter(real, options, shape=(48, 48))
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.size == (24, 24)


def test_dice_of_two_empty_masks_is_not_counted() -> None:
    empty, full = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    assert np.isnan(dice(empty, empty))
    assert (dice(full, full), dice(full, empty)) == (1, 0)
    judged = {"dice": np.asarray([1.0, np.nan, 0.5]), "labels": {"a": np.asarray([1.0, np.nan, 0.5])}}
    judged["patients"] = ["p", "q", "r"]
    result = consistency_results(judged, judged)["all labels"]
    assert (result["synthetic"]["value"], result["synthetic"]["n"]) == (0.75, 2)
    assert result["difference"]["value"] == 0


def test_pairs_to_judge_by_are_of_other_patients(real: CaseSet) -> None:
    learned, judged = held_out(real)
    assert len(learned) + len(judged) == len(real)
    assert not {c.patient_id for c in learned.cases} & {c.patient_id for c in judged.cases}
    assert len(judged) == 8
    with pytest.raises(UserError, match="one patient"):
        held_out(real.subset([0]))


def test_pairs_without_anything_in_their_masks_are_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "empty", 4)
    for label in (path / "labels").iterdir():
        Image.fromarray(np.zeros((48, 48), np.uint8)).save(label)
    with pytest.raises(UserError, match="anything but background"):
        Segmenter(read_case_set(path, option="--real"), SegmenterOptions(num_steps=1, size=24), shape=(48, 48))
    with pytest.raises(UserError, match="0 steps"):
        SegmenterOptions(num_steps=0)

# SPDX-License-Identifier: Apache-2.0
"""The phantom of chest X-rays: what its pictures and its classes promise."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from source_images import files_of

from monai_synth import bundle, cli
from monai_synth.data import phantom_xray
from monai_synth.data.datalist import read_dataset
from monai_synth.data.phantom_xray import PATIENT_REGEX, Xray, write_xrays, xray_picture, xrays
from monai_synth.data.phantom_xray_anatomy import Chest, draw_chest
from monai_synth.errors import UserError


@cache
def pictures_to_tell_apart() -> list[Xray]:
    """160 pictures of 16 x 16, half of them normal: of 7 patients two have two, and four have one with pneumonia."""
    visits = [
        (7 * k + p, v) for k in range(20) for p, v in ((1, 1), (1, 2), (5, 1), (5, 2), *((p, 1) for p in (2, 3, 4, 6)))
    ]
    return [xray_picture(1, patient, visit, size=16) for patient, visit in visits]


def area_under_curve(pictures: list[Xray], values: np.ndarray) -> float:
    """Of a logistic regression on ``values`` (N, D) that is tried on other patients than it was fitted to."""
    labels = np.array([xray.label for xray in pictures])
    fold = np.array([xray.patient for xray in pictures]) // 7 % 3
    scores = np.zeros(len(labels))
    for part in range(3):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        model.fit(values[fold != part], labels[fold != part])
        scores[fold == part] = model.decision_function(values[fold == part])
    return roc_auc_score(labels, scores)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_xrays(tmp_path / name, num_images=5, size=24, seed=seed, progress=False)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert not set(a.values()) & set(c.values())


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = files_of(write_xrays(tmp_path / "few", num_images=4, size=16, progress=False))
    many = files_of(write_xrays(tmp_path / "many", num_images=9, size=16, progress=False))
    assert few.items() < many.items()


def test_images_are_8_bit_grey_in_a_folder_of_their_class(tmp_path: Path) -> None:
    out = write_xrays(tmp_path / "out", num_images=12, size=28, progress=False)
    paths = sorted(out.rglob("*.png"))
    assert len(paths) == 12
    assert {path.parent.name for path in paths} == {"normal", "pneumonia"}
    for path in paths:
        image = Image.open(path)
        assert (image.mode, image.size) == ("L", (28, 28))
        assert np.ptp(np.asarray(image)) > 100


def test_two_of_seven_patients_are_normal_and_some_have_two_or_three_pictures_of_one_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(phantom_xray, "xray_picture", lambda seed, patient, visit, size: (patient, visit))
    visits = np.array(list(xrays(5, 2000)))
    counts = np.bincount(visits[:, 0])[1:-1]
    assert set(counts) == {1, 2, 3}
    assert 0.2 < (counts > 1).mean() < 0.6
    monkeypatch.undo()
    labels = [xray_picture(0, patient, 1, size=16).label for patient in range(1, 15)]
    assert labels.count(0) == 4
    assert {xray_picture(0, 1, visit, size=16).label for visit in (1, 2, 3)} == {0}


@pytest.mark.parametrize("seed", range(20))
def test_four_pictures_hold_both_classes(seed: int) -> None:
    assert len({(patient - 1) % 7 in (0, 4) for patient, _ in phantom_xray._visits(seed, 4)}) == 2


def test_pictures_of_one_patient_show_one_anatomy_in_poses_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def record(anatomy: np.random.Generator, visit: np.random.Generator, num: int) -> Chest:
        drawn.append((deepcopy(anatomy).random(), deepcopy(visit).random()))
        return draw_chest(anatomy, visit, num)

    monkeypatch.setattr(phantom_xray, "draw_chest", record)
    for patient, visit in ((1, 1), (1, 2), (2, 1)):
        xray_picture(2, patient, visit, size=16)
    (first, pose), (second, other_pose), (other, _) = drawn
    assert first == second != other
    assert pose != other_pose


@pytest.mark.parametrize("size", [16, 28, 100])
def test_pneumonia_brightens_the_lungs_and_leaves_every_other_pixel_as_it_is(size: int) -> None:
    for patient in range(1, 13):
        well, ill = (xray_picture(0, patient, 1, size=size, label=label) for label in (0, 1))
        assert (well.lungs == ill.lungs).all()
        assert not well.opacity.any()
        assert ill.opacity.max() < 1
        assert ill.lungs[ill.opacity > 0].all(), "opacities lie within the lungs"
        changed = well.image != ill.image
        assert changed.any()
        assert ill.lungs[changed].all()
        assert (ill.image.astype(int) - well.image).min() >= 0


def test_lungs_are_dark_between_bright_heart_and_belly_in_every_normal_picture() -> None:
    for patient in range(1, 25):
        xray = xray_picture(0, patient, 1, size=64, label=0)
        lungs = xray.image[xray.lungs].mean()
        assert 0.12 < xray.lungs.mean() < 0.55
        assert lungs + 20 < xray.image[20:52, 31:35].mean(), "spine and heart"
        assert lungs + 20 < xray.image[60:, 16:48].mean(), "belly"
        left, right = xray.lungs[:, 32:].sum(), xray.lungs[:, :32].sum()
        assert left > 50 < right


def test_the_heart_lies_on_the_patients_left() -> None:
    lungs = np.mean([xray_picture(0, patient, 1, size=32, label=0).lungs for patient in range(1, 41)], axis=0)
    assert lungs[14:24, 16:].sum() < 0.9 * lungs[14:24, :16].sum()


def test_the_chest_is_the_same_at_every_size() -> None:
    for patient in (1, 2, 3):
        large = xray_picture(0, patient, 1, size=168)
        small = xray_picture(0, patient, 1, size=28)
        shrunk = large.image.astype(float).reshape(28, 6, 28, 6).mean((1, 3))
        assert np.abs(shrunk - small.image).mean() < 3
        assert np.abs(large.opacity.reshape(28, 6, 28, 6).mean((1, 3)) - small.opacity).max() < 0.05


@pytest.mark.parametrize("size", [16, 1024])
def test_the_smallest_and_the_largest_picture_can_be_drawn(size: int) -> None:
    image = xray_picture(0, 2, 1, size=size).image
    assert image.shape == (size, size)
    assert image.dtype == np.uint8


def test_opacities_vary_in_extent_and_strength() -> None:
    ill = [xray for xray in pictures_to_tell_apart() if xray.label]
    extent = [(xray.opacity > 0.15).sum() / xray.lungs.sum() for xray in ill]
    strength = [xray.opacity.max() for xray in ill]
    for values in (extent, strength):
        low, high = np.percentile(values, [10, 90])
        assert high > 2 * low


def test_a_linear_classifier_tells_the_classes_apart_by_the_lungs_but_not_surely() -> None:
    pictures = pictures_to_tell_apart()
    values = np.array([xray.image.ravel() / 255 for xray in pictures])
    assert 0.70 < area_under_curve(pictures, values) < 0.97


def test_nothing_but_the_lungs_gives_the_class_away() -> None:
    pictures = pictures_to_tell_apart()
    rim = np.ones((16, 16), bool)
    rim[2:-2, 2:-2] = False
    outside = [xray.image[~binary_dilation(xray.lungs)].astype(float) for xray in pictures]
    for values in (
        np.array([np.where(xray.lungs, 0, xray.image)[rim] / 255 for xray in pictures]),  # lungs may reach it
        np.array([[pixels.mean(), pixels.std()] for pixels in outside]),  # exposure and contrast
        np.array([[xray.lungs.sum()] for xray in pictures]),  # size of the lungs
    ):
        assert 0.3 < area_under_curve(pictures, values) < 0.64  # 3 standard errors of 0.5 for 80 of each class


@pytest.mark.parametrize("wrong", [{"num_images": 3}, {"size": 15}, {"size": 1025}, {"size": 64.5}, {"seed": -1}])
def test_an_argument_out_of_range_is_told_and_nothing_is_written(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; give a whole number from"):
        write_xrays(tmp_path / "out", **wrong)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        write_xrays(tmp_path, num_images=4, size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_bundle_makes_it_once_and_keeps_a_patient_in_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "phantom"
    phantom = {
        "images": {"num_images": 40, "size": 16, "seed": 0, "progress": False},
        "import": {"name": "chest", "splits": [0.6, 0.2, 0.2], "seed": 0, "progress": False},
    }
    for _ in range(2):
        bundle.ensure_dataset(str(folder), str(folder), phantom, "demo", "cpu", task="classes")
        before = files_of(tmp_path)
    assert files_of(tmp_path) == before
    dataset = read_dataset(folder, task="classes")
    assert dataset.classes == {"normal": 0, "pneumonia": 1}
    assert dataset.content["spatial_shape"] == [16, 16]
    patients = {
        split: [case["patient_id"] for case in dataset.content[split]] for split in ("training", "validation", "test")
    }
    assert sum(map(len, patients.values())) == 40
    assert max(patients["training"].count(patient) for patient in patients["training"]) > 1
    assert len(set().union(*patients.values())) == sum(len(set(names)) for names in patients.values())
    assert all(re.fullmatch(r"p\d{5}", patient) for names in patients.values() for patient in names)


def test_the_patient_is_read_from_the_name() -> None:
    xray = xray_picture(0, 12, 2, size=16)
    assert re.search(PATIENT_REGEX, xray.name).group(1) == "p00012"


def test_the_command_takes_only_the_options_of_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "phantom", "out", "--kind", "xray", "--images", "5", "--size", "20"]) == 0
    assert len(list(Path("out").glob("*/*.png"))) == 5
    assert Image.open("out/normal/p00001_1.png").size == (20, 20)
    capsys.readouterr()
    assert cli.main(["prepare", "phantom", "no", "--kind", "xray", "--slices", "9"]) == 2
    assert "--slices is of --kind lidc" in capsys.readouterr().err
    assert not Path("no").exists()

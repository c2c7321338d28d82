# SPDX-License-Identifier: Apache-2.0
"""Sets of cases: every form of folder gives the pixels that were written to it, and what cannot be used is refused."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_synth.data.classes import prepare_classes
from monai_synth.data.pairs import prepare_pairs
from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import read_case_set
from monai_synth.export.classes import ClassFolderWriter
from monai_synth.export.nnunet import NNUNetRawWriter

LUNG = {"background": 0, "body": 1, "soft_tissue": 2, "high_dense": 3, "lung": 4}


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def raw(folder: Path, num: int = 3, *, channels: tuple[str, ...] = ("L",), ending: str = ".png", **kwargs) -> Path:
    labels = kwargs.get("labels", {"background": 0, "cell": 1})
    writer = NNUNetRawWriter(folder, dataset_id=7, name="T", channel_names=channels, labels=labels, file_ending=ending)
    for i in range(num):
        image = noise(i, 12, 14, 3) if len(channels) == 3 else noise(i, 12, 14)
        if channels == ("CT",):
            image = image.astype(np.int16) * 8 - 1000
        writer.add(f"c{i}", image, (noise(i, 12, 14) > 128).astype(np.uint8))
    return writer.finish()


def plain(folder: Path, num: int = 3, mode: str = "L") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        Image.fromarray(noise(i, 12, 14, *([3] if mode == "RGB" else []))).save(folder / f"i{i}.png")
    return folder


def test_a_raw_dataset_of_grey_png_gives_image_and_label_back(tmp_path: Path) -> None:
    found = read_case_set(raw(tmp_path), option="--real")
    assert (found.kind, found.unit, found.form, found.channels, found.size) == ("pairs", "8-bit", "nnunet", 1, (12, 14))
    np.testing.assert_array_equal(found.image(1), noise(1, 12, 14)[None])
    np.testing.assert_array_equal(found.label(1), noise(1, 12, 14) > 128)
    assert found.labels == {"background": 0, "cell": 1}


@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_rgb_is_one_png_or_three_nifti_files(tmp_path: Path, ending: str) -> None:
    found = read_case_set(raw(tmp_path, channels=("R", "G", "B"), ending=ending), option="--real")
    assert found.channels == 3
    assert len(found.cases[0].image) == (1 if ending == ".png" else 3)
    np.testing.assert_array_equal(found.image(2), np.moveaxis(noise(2, 12, 14, 3), -1, 0))
    assert found.picture(0, (6, 7)).shape == (3, 6, 7)


def test_ct_as_nifti_is_in_hu_and_a_picture_of_it_is_the_window(tmp_path: Path) -> None:
    found = read_case_set(raw(tmp_path, channels=("CT",), ending=".nii.gz"), option="--real")
    assert (found.kind, found.unit) == ("ct", "HU")
    hu = noise(0, 12, 14).astype(np.int16) * 8 - 1000
    np.testing.assert_array_equal(found.image(0)[0], hu)
    np.testing.assert_array_equal(found.picture(0)[0], np.rint((hu.clip(-1024, 800) + 1024) / 1824 * 255))


def test_a_semantic_map_beside_an_8_bit_image_says_that_it_is_ct(tmp_path: Path) -> None:
    found = read_case_set(raw(tmp_path, labels=LUNG), option="--real")
    assert (found.kind, found.unit) == ("ct", "HU")
    np.testing.assert_array_equal(found.picture(0), noise(0, 12, 14)[None])
    assert found.image(0).min() >= -1024
    assert found.image(0).dtype == np.int16


def test_a_prepared_ct_dataset_gives_hu_and_its_stored_pixels(tiny_dataset: Path) -> None:
    found = read_case_set(tiny_dataset, option="--real")
    stored = np.asarray(Image.open(found.cases[3].image[0]))
    np.testing.assert_array_equal(found.picture(3)[0], stored)
    np.testing.assert_allclose(found.image(3)[0], stored * (1824 / 255) - 1024, atol=0.5)
    assert (found.kind, found.split, len(found)) == ("ct", "training", 12)
    assert len(read_case_set(tiny_dataset, option="--real", split="test")) == 4
    assert found.cases[0].patient_id == "p0000"


def test_prepared_pairs_and_classes_are_read_by_split(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        plain(tmp_path / "src" / folder, 8)
    options = {"image_dir": "images", "label_dir": "masks", "labels": ["x"], "threshold": 127.0}
    prepare_pairs(tmp_path / "src", tmp_path / "pairs", **options, splits=(0.5, 0.25, 0.25))
    pairs = read_case_set(tmp_path / "pairs", option="--real")
    assert (pairs.kind, pairs.unit, len(pairs), pairs.labels) == ("pairs", "8-bit", 4, {"background": 0, "x": 1})
    assert set(np.unique(pairs.label(0))) == {0, 1}
    for name in ("a", "b"):
        plain(tmp_path / "classes_src" / name, 8)
        for i, path in enumerate(sorted((tmp_path / "classes_src" / name).iterdir())):
            Image.fromarray(noise(50 + i + ord(name), 12, 14)).save(path)
    prepare_classes(tmp_path / "classes_src", tmp_path / "classes", splits=(0.5, 0.25, 0.25))
    classes = read_case_set(tmp_path / "classes", option="--real", split="test")
    assert (classes.kind, classes.split) == ("classes", "test")
    assert {case.class_name for case in classes.cases} == {"a", "b"}


def test_sampled_class_folders_are_synthetic_and_keep_their_classes(tmp_path: Path) -> None:
    head = {"name": "S", "modality": "XR", "image_channels": 1, "spatial_shape": [12, 14], "intensity": {"unit": "x"}}
    writer = ClassFolderWriter(tmp_path / "out", classes={"a": 0, "b": 1}, head=head)
    for name, seed in (("a", 0), ("a", 1), ("b", 2)):
        writer.add(f"{name}_{seed:07d}", noise(seed, 1, 12, 14))
    with pytest.raises(UserError, match=r"--synthetic .* has not finished"):
        read_case_set(tmp_path / "out", option="--synthetic")
    writer.finish()
    found = read_case_set(tmp_path / "out", option="--synthetic")
    assert found.synthetic
    assert [case.class_name for case in found.cases] == ["a", "a", "b"]
    np.testing.assert_array_equal(found.image(2), noise(2, 1, 12, 14))


def test_plain_folders_are_read_with_and_without_classes(tmp_path: Path) -> None:
    assert {case.class_name for case in read_case_set(plain(tmp_path / "p"), option="--x").cases} == {None}
    for name in ("a", "b"):
        plain(tmp_path / "q" / name, 2)
    found = read_case_set(tmp_path / "q", option="--x")
    assert [case.case_id for case in found.cases] == ["a/i0", "a/i1", "b/i0", "b/i1"]
    assert [case.class_name for case in found.cases] == ["a", "a", "b", "b"]


def test_a_plain_2d_nifti_that_reaches_air_is_hu(tmp_path: Path) -> None:
    hu = noise(0, 9, 7).astype(np.int16) * 8 - 1000  # (X, Y): columns, rows
    for i in range(2):
        nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / f"{i}.nii.gz")
    found = read_case_set(tmp_path, option="--x")
    assert (found.unit, found.size) == ("HU", (7, 9))
    np.testing.assert_array_equal(found.image(0)[0], hu.T)


def test_the_draw_depends_on_case_ids_and_seed_alone(tmp_path: Path) -> None:
    folder = plain(tmp_path, 20)
    first = read_case_set(folder, option="--x", max_cases=6, seed=1)
    again = read_case_set(folder, option="--x", max_cases=6, seed=1)
    other = read_case_set(folder, option="--x", max_cases=6, seed=2)
    assert first.cases == again.cases
    assert first.cases != other.cases
    assert (len(first), first.num_available) == (6, 20)


def test_several_sizes_are_refused_only_where_one_is_needed(tmp_path: Path) -> None:
    Image.fromarray(noise(9, 20, 20)).save(plain(tmp_path) / "other.png")
    found = read_case_set(tmp_path, option="--x")
    assert found.picture(3, (8, 8)).shape == (1, 8, 8)
    with pytest.raises(UserError, match=r"2 sizes \(3 of 12 x 14, 1 of 20 x 20\)"):
        _ = found.size


def nan_nifti(folder: Path) -> None:
    for i in range(2):
        nib.save(nib.Nifti1Image(np.full((9, 7), np.nan, np.float32), np.eye(4)), folder / f"{i}.nii.gz")


def volumes(folder: Path) -> None:
    for i in range(2):
        nib.save(nib.Nifti1Image(np.zeros((9, 7, 5), np.uint8), np.eye(4)), folder / f"{i}.nii.gz")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: f.rmdir(), "is not a folder"),
        (lambda f: None, "holds no image"),
        (lambda f: plain(f, 1), r"has 1 image\(s\), needed are 2"),
        (lambda f: plain(f / "masks") and plain(f / "images"), "holds a folder 'masks'"),
        (lambda f: Image.fromarray(noise(0, 12, 14, 3)).save(plain(f) / "z.png"), "one mode"),
        (volumes, "is a volume"),
        (lambda f: raw(f), "holds the dataset Dataset007_T"),
        (lambda f: (f / "export.json").write_text("{}"), "has not finished"),
        (lambda f: (f / "dataset.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "dataset.json").write_text(json.dumps({"numTraining": 2})), "no image in imagesTr"),
    ],
)
def test_what_is_no_set_of_images_is_refused_with_its_option(tmp_path: Path, make, message: str) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_case_set(folder, option="--heldout")
    assert "--heldout" in str(caught.value) or "dataset.json" in str(caught.value)


def test_nan_is_refused_when_the_image_is_read(tmp_path: Path) -> None:
    nan_nifti(tmp_path)
    with pytest.raises(UserError, match=r"0\.nii\.gz: holds values that are no numbers"):
        read_case_set(tmp_path, option="--x").image(0)


def test_a_raw_dataset_without_a_label_file_is_refused(tmp_path: Path) -> None:
    folder = raw(tmp_path)
    (folder / "labelsTr" / "c1.png").unlink()
    with pytest.raises(UserError, match=r"c1\.png is missing"):
        read_case_set(folder, option="--x")


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(tmp_path, 4)
    monkeypatch.setattr("monai_synth.evaluate.case_sets.read_picture", lambda paths: pytest.fail("read"))
    assert len(read_case_set(tmp_path, option="--x")) == 4

# SPDX-License-Identifier: Apache-2.0
"""``prepare pairs``: forms of sources, splits, labels, tiles and what it refuses; end to end on small files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from source_images import cases_of, files_of, picture, refusal_of, save

from monai_synth import cli
from monai_synth.data.datalist import SPLITS, read_dataset
from monai_synth.data.pair_files import read_image, read_label
from monai_synth.data.pairs import prepare_pairs, split_groups
from monai_synth.data.pairs_output import tiles
from monai_synth.data.pairs_source import Pair, PairSource
from monai_synth.errors import UserError

rgb = partial(picture, shape=(12, 16, 3))


def blob(number: int, shape: tuple[int, ...] = (12, 16), value: int = 255) -> np.ndarray:
    return np.where(np.random.default_rng(number).random(shape) < 0.3, value, 0).astype(np.uint8)


def make_source(root: Path, num: int = 6, *, image_dir: str = "images", label_dir: str = "masks") -> Path:
    """``num`` RGB pictures a0, a1, ... with masks of 0 and 255, all different."""
    for i in range(num):
        save(root / image_dir / f"a{i}.png", rgb(i))
        save(root / label_dir / f"a{i}.png", blob(i))
    return root


def prepare(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return prepare_pairs(source, out, **{"labels": ["nucleus"], "num_workers": 1, "progress": False, **options})


refusal = partial(refusal_of, prepare)


# ---- what is written


def test_images_are_kept_and_masks_become_0_and_1(tmp_path: Path) -> None:
    source = make_source(tmp_path / "wells")
    content = prepare(source, tmp_path / "out")
    for i in range(6):
        case = cases_of(content)[f"a{i}"]
        np.testing.assert_array_equal(read_image(tmp_path / "out" / case["image"]), np.moveaxis(rgb(i), -1, 0))
        np.testing.assert_array_equal(read_label(tmp_path / "out" / case["label"]), blob(i) // 255)


def test_the_head_says_what_the_pairs_are(tmp_path: Path) -> None:
    content = prepare(make_source(tmp_path / "wells"), tmp_path / "out")
    expected = {
        "name": "wells", "task": "pairs", "modality": "RGB", "image_channels": 3, "channel_names": ["R", "G", "B"],
        "spatial_dims": 2, "spatial_shape": [12, 16], "labels": {"background": 0, "nucleus": 1},
        "intensity": {"unit": "grey value", "min": 0, "max": 255, "stored": "uint8 0..255"}, "file_ending": ".png",
    }  # fmt: skip
    assert {key: content[key] for key in expected} == expected
    assert {case["spacing"] == [1.0, 1.0] for case in cases_of(content).values()} == {True}
    text = (tmp_path / "out" / "dataset.json").read_text()
    assert json.loads(text) == content
    assert str(tmp_path) not in text


def test_read_dataset_gives_the_paths_of_every_split(tmp_path: Path) -> None:
    prepare(make_source(tmp_path / "wells"), tmp_path / "out")
    dataset = read_dataset(tmp_path / "out", task="pairs")
    cases = [case for split in SPLITS for case in dataset.datalist(split)]
    assert len(cases) == 6
    assert all(Path(case[key]).is_file() for case in cases for key in ("image", "label"))
    assert dataset.labels == {"background": 0, "nucleus": 1}


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = make_source(tmp_path / "wells")
    for out in ("one", "two"):
        prepare(source, tmp_path / out, patch_size=[8, 8])
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.slow
def test_processes_change_no_byte(tmp_path: Path) -> None:
    source = make_source(tmp_path / "wells")
    for out, workers in (("one", 1), ("two", 2)):
        prepare(source, tmp_path / out, num_workers=workers)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_overwrite_replaces_a_dataset_of_volumes_and_else_nothing(tmp_path: Path) -> None:
    source = tmp_path / "vol"
    for i in range(3):
        save(source / "images" / f"v{i}.nii.gz", picture(i, (4, 5, 6)))
        save(source / "masks" / f"v{i}.nii.gz", blob(i, (4, 5, 6), 1))
    prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out", overwrite=True, seed=1)
    (tmp_path / "out" / "images" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"mine\.txt"):
        prepare(source, tmp_path / "out", overwrite=True)


def test_resizing_changes_spacing_and_every_stage_resizes_alike(tmp_path: Path) -> None:
    source = tmp_path / "vol"
    for i in range(3):
        save(source / "images" / f"v{i}.nii.gz", picture(i, (4, 6, 8)))
        save(source / "masks" / f"v{i}.nii.gz", np.ones((4, 6, 8), np.uint8))
    content = prepare(source, tmp_path / "out", size=[2, 6, 4], modality="MR")
    assert content["spatial_shape"] == [2, 6, 4]
    assert content["modality"] == "MR"
    case = cases_of(content)["v0"]
    assert case["spacing"] == [1.0, 0.75, 4.0]
    np.testing.assert_allclose(nib.load(tmp_path / "out" / case["image"]).header.get_zooms(), [1.0, 0.75, 4.0])


def test_sizes_that_differ_between_cases_leave_the_shape_open(tmp_path: Path) -> None:
    source = make_source(tmp_path / "wells")
    save(source / "images" / "b.png", picture(9, (20, 20, 3)))
    save(source / "masks" / "b.png", blob(9, (20, 20)))
    assert prepare(source, tmp_path / "out")["spatial_shape"] is None


# ---- forms of sources


def test_folders_may_be_nested_and_hidden_files_do_not_matter(tmp_path: Path) -> None:
    source = make_source(tmp_path / "wells", image_dir="images/p1", label_dir="masks/p1")
    make_source(source, image_dir="images/p2", label_dir="masks/p2")
    (source / "images" / ".DS_Store").write_bytes(b"x")
    (source / "masks" / "p1" / "Thumbs.db").write_bytes(b"x")
    content = prepare(source, tmp_path / "out", group_regex="^(p.)/", splits=(0.5, 0, 0.5))
    assert len(cases_of(content)) == 12
    assert cases_of(content)["p2_a3"]["patient_id"] == "p2"


def test_masks_may_have_a_suffix_and_may_lie_among_the_images(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "src" / "all" / f"x{i}.jpg", rgb(i))
        save(tmp_path / "src" / "all" / f"x{i}_mask.png", blob(i))
    content = prepare(tmp_path / "src", tmp_path / "out", image_dir="all", label_dir="all", label_suffix="_mask")
    assert sorted(cases_of(content)) == ["x0", "x1", "x2"]


def test_a_forgotten_suffix_is_suggested(tmp_path: Path) -> None:
    save(tmp_path / "src" / "images" / "x.png", rgb(0))
    save(tmp_path / "src" / "masks" / "x_segmentation.png", blob(0))
    assert "--label-suffix _segmentation" in refusal(tmp_path / "src", tmp_path)


def test_a_training_folder_alone_is_split(tmp_path: Path) -> None:
    make_source(tmp_path / "src" / "train", 10)
    content = prepare(tmp_path / "src", tmp_path / "out")
    assert [len(content[s]) for s in SPLITS] == [8, 1, 1]
    assert content["source"]["given_splits"] == []


def test_given_splits_are_kept_and_only_the_missing_one_is_taken_from_training(tmp_path: Path) -> None:
    make_source(tmp_path / "src" / "train", 9)
    make_source(tmp_path / "src" / "test", 2)
    content = prepare(tmp_path / "src", tmp_path / "out")
    assert [len(content[s]) for s in SPLITS] == [8, 1, 2]
    assert {case["case_id"] for case in content["test"]} == {"test_a0", "test_a1"}, "names occur in both folders"
    make_source(tmp_path / "src" / "valid", 3)
    content = prepare(tmp_path / "src", tmp_path / "out2")
    assert [len(content[s]) for s in SPLITS] == [9, 3, 2]


def test_splits_may_lie_below_the_folders_of_images_and_masks(tmp_path: Path) -> None:
    for split, num in (("train", 5), ("val", 2), ("test", 1)):
        make_source(tmp_path / "src", num, image_dir=f"images/{split}", label_dir=f"masks/{split}")
    content = prepare(tmp_path / "src", tmp_path / "out")
    assert [len(content[s]) for s in SPLITS] == [5, 2, 1]
    assert cases_of(content)["val_a1"] in content["validation"]


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "valid"):
        make_source(tmp_path / "src" / split, 2)
    assert "two folders for one split: train, val, valid" in refusal(tmp_path / "src", tmp_path)


def test_a_test_folder_may_lie_elsewhere(tmp_path: Path) -> None:
    make_source(tmp_path / "src", 5)
    save(tmp_path / "other" / "images" / "z.png", rgb(50))
    save(tmp_path / "other" / "masks" / "z.png", blob(50))
    content = prepare(tmp_path / "src", tmp_path / "out", test_dir=tmp_path / "other")
    assert [case["case_id"] for case in content["test"]] == ["z"]
    assert [len(content[s]) for s in SPLITS] == [4, 1, 1]


def nnunet_source(root: Path, *, channels: int = 2) -> Path:
    for i in range(4):
        for c in range(channels):
            save(root / "imagesTr" / f"case_{i}_{c:04d}.nii.gz", picture(10 * i + c, (4, 5, 6)).astype(np.float32))
        save(root / "labelsTr" / f"case_{i}.nii.gz", picture(i, (4, 5, 6)) % 2 * 3)
    save(root / "imagesTs" / "case_9_0000.nii.gz", picture(9, (4, 5, 6)))
    content = {
        "channel_names": {str(c): f"T{c}" for c in range(channels)},
        "labels": {"background": 0, "core": 1, "rim": 3},
        "file_ending": ".nii.gz", "numTraining": 4,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_an_nnunet_dataset_is_taken_as_it_is(tmp_path: Path) -> None:
    content = prepare(nnunet_source(tmp_path / "Dataset009_X"), tmp_path / "out", labels=None)
    assert content["labels"] == {"background": 0, "core": 1, "rim": 2}
    assert (content["image_channels"], content["channel_names"], content["modality"]) == (2, ["T0", "T1"], "T0+T1")
    assert content["source"]["ignored"] == {"imagesTs_without_labels": 1}
    assert content["intensity"]["unit"] == "percentile of each image"
    label = read_label(tmp_path / "out" / cases_of(content)["case_2"]["label"])
    np.testing.assert_array_equal(label, picture(2, (4, 5, 6)) % 2 * 2)
    assert read_image(tmp_path / "out" / cases_of(content)["case_2"]["image"]).shape == (2, 4, 5, 6)


def test_an_nnunet_case_without_one_of_its_channels_is_told(tmp_path: Path) -> None:
    source = nnunet_source(tmp_path / "src")
    (source / "imagesTr" / "case_1_0001.nii.gz").unlink()
    assert "case_1_0000.nii.gz: no channel 0001" in refusal(source, tmp_path, labels=None)


def test_nnunet_regions_cannot_be_modelled(tmp_path: Path) -> None:
    source = nnunet_source(tmp_path / "src")
    content = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps(content | {"labels": {"background": 0, "whole": [1, 2]}}))
    assert "regions (whole)" in refusal(source, tmp_path, labels=None)


def test_msd_says_value_by_name_the_other_way_round(tmp_path: Path) -> None:
    source = tmp_path / "Task04"
    for i in range(3):
        save(source / "imagesTr" / f"h_{i:03d}.nii.gz", picture(i, (4, 5, 6)))
        save(source / "labelsTr" / f"h_{i:03d}.nii.gz", picture(i, (4, 5, 6)) % 3)
    content = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "front", "2": "back"}}
    (source / "dataset.json").write_text(json.dumps(content))
    content = prepare(source, tmp_path / "out", labels=None)
    assert content["labels"] == {"background": 0, "front": 1, "back": 2}
    assert content["channel_names"] == ["MRI"]


# ---- labels


def test_several_labels_have_the_values_that_are_listed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 2)
    save(source / "masks" / "a0.png", np.tile(np.array([0, 128, 255, 0], np.uint8), (12, 4)))
    options = {"labels": ["a", "b"], "splits": (1, 0, 0)}
    content = prepare(source, tmp_path / "out", label_values=[128, 255], **options)
    label = read_label(tmp_path / "out" / cases_of(content)["a0"]["label"])
    np.testing.assert_array_equal(label[0, :4], [0, 1, 2, 0])
    assert content["source"]["num_cases_with"] == {"background": 2, "a": 1, "b": 2}
    said = refusal(source, tmp_path / "out", **options)
    assert "holds 128, 255; allowed are 0 (background) and 1, 2" in said


def test_one_label_must_have_the_same_value_in_every_mask(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 3)
    save(source / "masks" / "a1.png", blob(1, value=7))
    assert "7 in a1.png" in refusal(source, tmp_path)
    content = prepare(source, tmp_path / "out", threshold=0)
    np.testing.assert_array_equal(read_label(tmp_path / "out" / cases_of(content)["a1"]["label"]), blob(1) // 255)


def test_a_threshold_is_needed_for_more_values_and_is_exclusive(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 3)
    save(source / "masks" / "a0.png", np.tile(np.array([0, 99, 100, 101], np.uint8), (12, 4)))
    assert "holds 0, 99, 100, 101; one label is 0 and one other value; give --threshold" in refusal(source, tmp_path)
    content = prepare(source, tmp_path / "out", threshold=100)
    assert read_label(tmp_path / "out" / cases_of(content)["a0"]["label"])[0, :4].tolist() == [0, 0, 0, 1]


def test_masks_as_jpeg_are_cut_in_the_middle_and_cannot_hold_several_labels(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 3)
    disc = (np.hypot(*np.ogrid[-16:16, -16:16]) < 9).astype(np.uint8)
    save(source / "images" / "a0.png", picture(0, (32, 32, 3)))
    (source / "masks" / "a0.png").unlink()
    path = save(source / "masks" / "a0.jpg", disc * 255)
    assert len(np.unique(np.asarray(Image.open(path)))) > 2
    content = prepare(source, tmp_path / "out")
    np.testing.assert_array_equal(read_label(tmp_path / "out" / cases_of(content)["a0"]["label"]), disc)
    assert "JPEG changes the values" in refusal(source, tmp_path / "out", labels=["a", "b"], label_values=[1, 255])


def test_empty_and_full_masks_are_counted_and_a_label_that_no_mask_shows_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_source(tmp_path / "src", 3)
    save(source / "masks" / "a0.png", np.zeros((12, 16), np.uint8))
    save(source / "masks" / "a1.png", np.full((12, 16), 255, np.uint8))
    assert prepare(source, tmp_path / "out")["source"]["num_cases_with"] == {"background": 2, "nucleus": 2}
    prepare(source, tmp_path / "out2", labels=["x", "y"], label_values=[255, 4])
    assert "no mask shows y" in caplog.text


# ---- intensities


def test_a_window_is_linear_and_closed_at_its_ends(tmp_path: Path) -> None:
    ramp = np.tile(np.array([-1000, -160, 40, 240, 3000], np.int16), (3, 1))
    for i in range(3):
        save(tmp_path / "src" / "images" / f"v{i}.nii.gz", ramp.T + np.int16(0))
        save(tmp_path / "src" / "masks" / f"v{i}.nii.gz", (ramp.T == 40).astype(np.int16))
    content = prepare(tmp_path / "src", tmp_path / "out", window=[-160, 240], modality="CT")
    image = read_image(tmp_path / "out" / cases_of(content)["v0"]["image"])
    assert image[0].tolist() == [[0, 0, 128, 255, 255]] * 3, "(X, Y) becomes rows and columns"
    assert content["intensity"] == {"unit": "window", "min": -160.0, "max": 240.0, "stored": "uint8 0..255"}
    assert content["channel_names"] == ["CT"]
    assert cases_of(content)["v0"]["spacing"] == [0.75, 0.5]


def test_images_that_are_not_all_8_bit_get_percentiles_all_of_them(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for i, kind in enumerate((np.uint8, np.float32, np.uint8)):
        save(source / "images" / f"v{i}.nii.gz", (picture(i, (6, 6, 6)) // 3).astype(kind))
        save(source / "masks" / f"v{i}.nii.gz", blob(i, (6, 6, 6), 1))
    content = prepare(source, tmp_path / "out")
    for i in range(3):
        values = (picture(i, (6, 6, 6)) // 3).astype(np.float64)
        low, high = np.percentile(values, [0.5, 99.5])
        expected = np.clip((values - low) / (high - low), 0, 1) * 255
        image = read_image(tmp_path / "out" / cases_of(content)[f"v{i}"]["image"])
        np.testing.assert_allclose(image[0], expected, atol=0.51)
    assert content["intensity"]["min"] == 0.5


def test_grey_makes_rgb_and_grey_alike(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 3)
    save(source / "images" / "a2.png", picture(2, (12, 16)))
    assert "a2.png: 2-D with 1 channel(s), most of the others are 2-D with 3" in refusal(source, tmp_path)
    content = prepare(source, tmp_path / "out", grey=True)
    assert (content["image_channels"], content["channel_names"], content["modality"]) == (1, ["L"], "L")
    image = read_image(tmp_path / "out" / cases_of(content)["a0"]["image"])
    np.testing.assert_allclose(image[0], rgb(0) @ [0.299, 0.587, 0.114], atol=1)


def test_one_deep_channel_makes_the_image_deep(tmp_path: Path) -> None:
    source = nnunet_source(tmp_path / "src")
    for path in (source / "imagesTr").glob("*_0000.nii.gz"):
        save(path, picture(0, (4, 5, 6)))
    assert prepare(source, tmp_path / "out", labels=None)["intensity"]["unit"] == "percentile of each image"


def test_a_mask_elsewhere_in_space_is_refused(tmp_path: Path) -> None:
    source = nnunet_source(tmp_path / "src", channels=1)
    moved = np.diag([0.5, 0.75, 2.0, 1.0])
    moved[0, 3] = 0.5
    nib.save(nib.Nifti1Image(blob(0, (4, 5, 6), 1), moved), source / "labelsTr" / "case_0.nii.gz")
    assert "lies elsewhere in space (affine); resample it" in refusal(source, tmp_path, labels=None)


# ---- tiles and splits


@given(
    shape=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    patch=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    data=st.data(),
)
def test_tiles_cover_everything_and_lie_inside(
    shape: tuple[int, int], patch: tuple[int, int], data: st.DataObject
) -> None:
    stride = data.draw(st.none() | st.integers(1, min(patch)))
    seen = np.zeros(shape, int)
    for start, cut in tiles(shape, patch, stride):
        assert seen[cut].shape == patch
        assert tuple(s.start for s in cut) == start
        seen[cut] += 1
    assert seen.min() >= 1


def test_tiles_are_named_by_their_place_and_stay_in_one_split(tmp_path: Path) -> None:
    content = prepare(make_source(tmp_path / "src"), tmp_path / "out", patch_size=[8, 8])
    tiles_of_a2 = [name for name in cases_of(content) if name.startswith("a2-")]
    assert tiles_of_a2 == ["a2-y0000-x0000", "a2-y0000-x0008", "a2-y0004-x0000", "a2-y0004-x0008"]
    place = cases_of(content)["a2-y0004-x0008"]
    np.testing.assert_array_equal(read_label(tmp_path / "out" / place["label"]), blob(2)[4:12, 8:16] // 255)
    image = read_image(tmp_path / "out" / place["image"])
    np.testing.assert_array_equal(image, np.moveaxis(rgb(2)[4:12, 8:16], -1, 0))
    splits_of = {case["patient_id"]: {s for s in SPLITS if case in content[s]} for case in cases_of(content).values()}
    for split in SPLITS:
        for case in content[split]:
            splits_of[case["patient_id"]].add(split)
    assert all(len(splits) == 1 for splits in splits_of.values())
    assert content["spatial_shape"] == [8, 8]


@given(
    num=st.integers(1, 30),
    per_group=st.integers(1, 3),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (1, 0, 0), (0.5, 0.5, 0), (0.5, 0, 0.5), (0.02, 0.49, 0.49)]),
    seed=st.integers(0, 5),
)
def test_a_group_is_in_one_split_and_each_split_has_one(
    num: int, per_group: int, shares: tuple[float, ...], seed: int
) -> None:
    pairs = [Pair(f"g{g}-{i}", ("x",), "y") for g in range(num) for i in range(per_group)]
    group_of = {pair.name: pair.name.split("-")[0] for pair in pairs}
    wanted = {split for split, share in zip(SPLITS, shares, strict=True) if share > 0}
    if num < len(wanted):
        with pytest.raises(UserError, match="need at least one group each"):
            split_groups(PairSource(pairs=pairs), group_of, shares, seed)
        return
    split_of = split_groups(PairSource(pairs=pairs), group_of, shares, seed)
    assert set(split_of.values()) == wanted
    assert len({(group_of[name], split) for name, split in split_of.items()}) == num


def test_groups_come_from_the_names_by_a_regular_expression(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for i in range(8):
        save(source / "images" / f"TCGA-{i // 2}-{i}.png", rgb(i))
        save(source / "masks" / f"TCGA-{i // 2}-{i}.png", blob(i))
    content = prepare(source, tmp_path / "out", group_regex=r"TCGA-(\d)")
    splits = {i: {s for s in SPLITS for case in content[s] if case["patient_id"] == str(i)} for i in range(4)}
    assert all(len(found) == 1 for found in splits.values())
    assert "finds no group in 8 name(s): TCGA-0-0" in refusal(source, tmp_path / "out", group_regex="LIDC")


def test_groups_that_are_written_with_one_name_come_into_one_split(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for i in range(12):
        name = f"{'pat 1' if i % 2 else 'pat_1'}x{i // 2}y{i}.png"
        save(source / "images" / name, rgb(i))
        save(source / "masks" / name, blob(i))
    content = prepare(source, tmp_path / "out", group_regex=r"(.*)y", splits=(0.5, 0.25, 0.25))
    splits = {case["patient_id"]: set() for split in SPLITS for case in content[split]}
    for split in SPLITS:
        for case in content[split]:
            splits[case["patient_id"]].add(split)
    assert len(splits) == 6
    assert all(len(found) == 1 for found in splits.values())


def test_a_patient_in_two_given_splits_is_refused(tmp_path: Path) -> None:
    make_source(tmp_path / "src" / "train", 4)
    make_source(tmp_path / "src" / "test", 2)
    said = refusal(tmp_path / "src", tmp_path, group_regex=r"a\d")
    assert "group a0 is in training and test of the source" in said


def test_serial_numbers_hide_names_and_keep_groups(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for i in range(6):
        save(source / "images" / f"Miller{i // 2}_{i}.png", rgb(i))
        save(source / "masks" / f"Miller{i // 2}_{i}.png", blob(i))
    content = prepare(source, tmp_path / "out", anonymize_ids=True, group_regex="^[^_]+", name="x")
    names = {case["case_id"]: case["patient_id"] for case in cases_of(content).values()}
    assert names == {f"p{p:04d}-{i:04d}": f"p{p:04d}" for p in (1, 2, 3) for i in (1, 2)}
    assert not any(b"Miller" in data for data in files_of(tmp_path / "out").values())


def test_copies_of_another_patients_image_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_source(tmp_path / "src", 4)
    save(source / "images" / "a3.png", rgb(0))
    assert prepare(source, tmp_path / "out")["source"]["num_repeated_images"] == 1
    assert "a3 is a0" in caplog.text


# ---- bad input


def test_everything_bad_is_collected_and_the_rest_can_be_prepared(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 12)
    images, masks = source / "images", source / "masks"
    (masks / "a0.png").unlink()
    (images / "a1.png").unlink()
    save(masks / "a2.png", blob(2, (12, 15)))
    (images / "a3.png").write_bytes((images / "a3.png").read_bytes()[:200])
    save(masks / "a4.png", rgb(4))
    save(images / "a5.jpg", rgb(5))
    (images / "notes.txt").write_text("hello")
    said = refusal(source, tmp_path)
    for text in (
        "has 7 unusable file(s)",
        "a0.png: no mask a0 in",
        "a1.png: no image a1 in",
        "a2.png: the image is 12x16, its mask",
        "a3.png: cannot be read",
        "a4.png: a colour-coded mask; turn its colours into numbers first",
        "a5.jpg: the same stem as",
        "notes.txt: no image that can be read; allowed are .png",
        "--skip-bad",
    ):
        assert text in said
    content = prepare(source, tmp_path / "out", skip_bad=True)
    assert sorted(cases_of(content)) == ["a10", "a11", "a6", "a7", "a8", "a9"]
    assert content["source"]["bad"] == {
        "duplicate_stem": 1, "no_image": 1, "no_label": 1, "unknown_ending": 1, "unusable": 3
    }  # fmt: skip


def test_ten_bad_files_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 14)
    for i in range(13):
        (source / "masks" / f"a{i}.png").unlink()
    said = refusal(source, tmp_path)
    assert said.count("no mask") == 10
    assert "and 3 more" in said


def test_one_image_only_is_not_enough_for_three_splits(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 1)
    said = refusal(source, tmp_path)
    assert "1 pair(s) in 1 group(s)" in said
    assert "--splits 1 0 0" in said
    assert len(prepare(source, tmp_path / "out", splits=(1, 0, 0))["training"]) == 1


def test_places_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src")
    for out in (source, source / "out", tmp_path):
        with pytest.raises(UserError, match="lies in the source|not empty"):
            prepare(source, out)
    assert "is not a folder" in refusal(tmp_path / "none", tmp_path)
    assert "has no folder labels with the masks (folders: images, masks)" in refusal(
        source, tmp_path, label_dir="labels"
    )
    assert "holds images, masks; needed is pics/" in refusal(source, tmp_path, image_dir="pics")
    for folder in ("images", "masks"):
        (tmp_path / "empty" / folder).mkdir(parents=True)
    assert "holds no pair" in refusal(tmp_path / "empty", tmp_path)


def test_names_that_become_the_same_file_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "src", 3)
    for name in ("b 1", "b?1", "A1"):
        save(source / "images" / f"{name}.png", rgb(7))
        save(source / "masks" / f"{name}.png", blob(7))
    said = refusal(source, tmp_path)
    assert "b?1.png: its name becomes that of" in said
    assert "a1.png: its name becomes that of" in said, "some disks do not tell A from a"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"labels": None}, "--labels nucleus"),
        ({"labels": ["a", "a"]}, "different names"),
        ({"labels": ["background"]}, "without the background"),
        ({"label_values": [0]}, "from 1 to 255"),
        ({"label_values": [1, 2]}, "2 label_values for 1 labels"),
        ({"threshold": -1}, "0 or more"),
        ({"threshold": 1, "labels": ["a", "b"]}, "leave one of them out"),
        ({"size": [0, 4]}, "1 or more"),
        ({"size": [4, 4, 4]}, "the images have 2 axes"),
        ({"patch_size": [4]}, "two or three"),
        ({"patch_size": [13, 4]}, "12x16 is smaller than a patch of 13x4"),
        ({"patch_size": [4, 8], "stride": 5}, "at most the patch size"),
        ({"stride": 5}, "at most the patch size"),
        ({"window": [1, 1]}, "lower one first"),
        ({"percentiles": [1, 101]}, "0 to 100"),
        ({"percentiles": [1, 9], "window": [0, 1]}, "Leave one out"),
        ({"splits": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"seed": -1}, "0 or more"),
        ({"group_regex": "("}, "no regular expression"),
        ({"num_workers": 0}, "1 or more"),
    ],
)
def test_a_setting_out_of_range_is_told(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    assert said in refusal(make_source(tmp_path / "src", 3), tmp_path, **wrong)


# ---- real images


def test_monuseg_is_prepared_by_the_documented_command(test_data: Path, tmp_path: Path) -> None:
    if not (test_data / "monuseg").is_dir():
        pytest.skip("MoNuSeg is not there")
    few = tmp_path / "monuseg"
    for kind in ("images", "masks"):
        (few / "train" / kind).mkdir(parents=True)
        for path in sorted((test_data / "monuseg" / "train" / kind).iterdir())[:3]:
            (few / "train" / kind / path.name).symlink_to(path)
    options = ["--image-dir", "images", "--label-dir", "masks", "--labels", "nucleus", "--workers", "1"]
    assert cli.main(["prepare", "pairs", str(few), str(tmp_path / "out"), *options]) == 0
    dataset = read_dataset(tmp_path / "out", task="pairs")
    for split in SPLITS:
        (case,) = dataset.datalist(split)
        stem = case["case_id"]
        original = np.asarray(Image.open(few / "train" / "masks" / f"{stem}.png")).astype(np.uint8)
        np.testing.assert_array_equal(read_label(case["label"]), original)
        image = read_image(case["image"])
        original = np.asarray(Image.open(few / "train" / "images" / f"{stem}.png"))
        np.testing.assert_array_equal(image, np.moveaxis(original, -1, 0))
        inside = read_label(case["label"]) == 1
        assert image[:, inside].mean() + 10 < image[:, ~inside].mean(), "nuclei are darker"


def test_msd_hippocampus_keeps_its_voxels_and_labels(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "msd_hippocampus"
    if not folder.is_dir():
        pytest.skip("MSD hippocampus is not there")
    options = {"image_dir": "imagesTr", "label_dir": "labelsTr", "labels": ["anterior", "posterior"]}
    content = prepare(folder, tmp_path / "out", **options)
    assert (len(cases_of(content)), content["spatial_dims"], content["file_ending"]) == (40, 3, ".nii.gz")
    assert content["source"]["num_cases_with"] == {"background": 40, "anterior": 40, "posterior": 40}
    for name in ("hippocampus_001", "hippocampus_003"):
        case = cases_of(content)[name]
        original = np.asarray(nib.load(folder / "labelsTr" / f"{name}.nii.gz").dataobj)
        np.testing.assert_array_equal(read_label(tmp_path / "out" / case["label"]), original)
        values = nib.load(folder / "imagesTr" / f"{name}.nii.gz").get_fdata().ravel()
        image = read_image(tmp_path / "out" / case["image"]).ravel()
        assert np.all(np.diff(image[np.argsort(values)].astype(int)) >= 0), "grey values keep their order"


@pytest.mark.slow
def test_kvasir_masks_are_cut_at_127(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "kvasir_seg"
    if not folder.is_dir():
        pytest.skip("Kvasir-SEG is not there")
    content = prepare(folder, tmp_path / "out", labels=["polyp"], num_workers=2)
    assert [len(content[s]) for s in SPLITS] == [400, 50, 50]
    for name in ("0", "134", "460"):
        original = np.asarray(Image.open(folder / "train" / "masks" / f"{name}.jpg").convert("L"))
        np.testing.assert_array_equal(read_label(tmp_path / "out" / "labels" / f"{name}.png"), original > 127)

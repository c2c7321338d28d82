# SPDX-License-Identifier: Apache-2.0
"""From PNG pairs to tensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from monai_synth.data.datalist import load_datalist, read_dataset
from monai_synth.data.slices import check_labels, one_hot, read_png, resize_semantic, slice_preprocessing
from monai_synth.errors import UserError


def test_a_one_pixel_nodule_survives_resizing_by_eight() -> None:
    label = torch.full((1, 64, 64), 4, dtype=torch.uint8)
    label[0, 37, 11] = 6
    small = resize_semantic(label, (8, 8))
    assert small[0, 37 // 8, 11 // 8] == 6
    assert (small == 4).sum() == 63


def test_resizing_takes_anatomy_from_the_nearest_pixel_and_not_from_the_largest_label() -> None:
    label = torch.zeros((1, 4, 4), dtype=torch.uint8)
    label[0, 0, 0] = 3  # not where nearest-exact looks in a window of two
    assert (resize_semantic(label, (2, 2)) == 0).all()


def test_one_hot_sums_to_one_and_argmax_inverts_it() -> None:
    label = torch.randint(0, 8, (2, 1, 5, 7), dtype=torch.uint8)
    seg = one_hot(label, 8)
    assert (seg.sum(1) == 1).all()
    assert torch.equal(seg.argmax(1, keepdim=True).to(torch.uint8), label)


def test_pictures_keep_rows_as_rows_and_reach_minus_one_and_one(tmp_path: Path) -> None:
    image = np.zeros((6, 4), np.uint8)
    image[5, 0] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((6, 4), np.uint8)).save(tmp_path / "b.png")
    case = {"image": str(tmp_path / "a.png"), "label": str(tmp_path / "b.png"), "case_id": "a"}
    item = slice_preprocessing((6, 4))(case)
    assert item["image"].shape == (1, 6, 4)
    assert item["image"][0, 5, 0] == 1
    assert item["image"].min() == -1
    assert type(item["image"]) is torch.Tensor


def test_images_shrink_by_area_averaging(tmp_path: Path) -> None:
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(image).save(tmp_path / "a.png")
    item = slice_preprocessing((4, 4), keys=("image",))({"image": str(tmp_path / "a.png"), "case_id": "a"})
    expected = image.reshape(4, 2, 4, 2).mean((1, 3)) / 127.5 - 1
    np.testing.assert_allclose(item["image"][0].numpy(), expected, atol=1e-6)


def test_an_unknown_label_value_is_named_with_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"map-7 has values \[9\], allowed are the integers 0\.\.7; remap"):
        check_labels(np.array([[0, 9]]), 8, "map-7")


@pytest.mark.parametrize("damage", ["missing", "truncated", "rgb"])
def test_a_picture_that_cannot_be_used_is_one_message_with_its_path(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"x\.png.*prepare the dataset again"):
        read_png(path)


def test_a_prepared_dataset_gives_absolute_paths_and_a_fingerprint_of_its_bytes(tiny_dataset: Path) -> None:
    dataset = read_dataset(tiny_dataset, task="lidc")
    assert len(dataset.datalist("training")) == 12
    assert all(Path(case["image"]).is_file() for case in dataset.datalist("test"))
    assert dataset.fingerprint != ""
    assert dataset.labels["lung"] == 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: p.unlink(), "holds no dataset.json"),
        (lambda p: p.write_text("{"), "is not valid JSON"),
        (lambda p: p.write_text("{}"), "lacks name"),
        (
            lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"task": "pairs"})),
            "prepared for task 'pairs'",
        ),
    ],
)
def test_a_broken_dataset_folder_is_one_message(tiny_dataset: Path, tmp_path: Path, break_it, message: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "dataset.json").write_bytes((tiny_dataset / "dataset.json").read_bytes())
    break_it(copy / "dataset.json")
    with pytest.raises(UserError, match=message):
        read_dataset(copy, task="lidc")


def test_a_missing_folder_and_raw_dicom_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "raw" / "scan").mkdir(parents=True)
    (tmp_path / "raw" / "scan" / "1.dcm").touch()
    with pytest.raises(UserError, match="looks like DICOM"):
        read_dataset(tmp_path / "raw")


def test_an_unknown_or_empty_split_is_refused_with_what_there_is(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="allowed are training, validation, test"):
        load_datalist(tiny_dataset, "train")
    content = json.loads((tiny_dataset / "dataset.json").read_text()) | {"test": []}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="test 0"):
        load_datalist(tmp_path, "test")

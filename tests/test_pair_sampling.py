# SPDX-License-Identifier: Apache-2.0
"""What is sampled of pairs: which seeds, which parts are given, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from monai_synth.data.pair_files import FILE_ENDINGS, read_image, read_label, write_image, write_label
from monai_synth.errors import UserError
from monai_synth.inference.pairs import (
    SEEDS_PER_ATTEMPT,
    PairSamplingDataset,
    PairSamplingPrepareBatch,
    collate_pairs,
    read_given_image,
)
from monai_synth.inference.sampler import make_generators

LABELS = {"background": 0, "nucleus": 1}
SHAPES = {2: (16, 12), 3: (8, 6, 4)}


def prepare(root: Path, *, dims: int = 2, channels: int = 3, labels: dict[str, int] = LABELS, count: int = 3) -> Path:
    """A prepared dataset of pairs whose cases are all in the test split."""
    rng = np.random.default_rng(dims)
    cases = []
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        files = {key: f"{key}s/c{number}{FILE_ENDINGS[dims]}" for key in ("image", "label")}
        write_image(root / files["image"], rng.integers(0, 256, (channels, *SHAPES[dims]), np.uint8))
        write_label(root / files["label"], rng.integers(0, len(labels), SHAPES[dims]).astype(np.uint8))
        spacing = [0.5, 2.0, 3.0][:dims]
        cases.append({**files, "case_id": f"c{number}", "patient_id": f"c{number}", "spacing": spacing})
    head = {
        "name": "tiny", "task": "pairs", "modality": "RGB", "image_channels": channels, "spatial_dims": dims,
        "spatial_shape": SHAPES[dims], "intensity": {}, "labels": labels, "training": [], "validation": [],
        "test": cases,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(head))
    return root


def sampling(root: Path | str = "", **changes: Any) -> PairSamplingDataset:
    options = {
        "condition": None, "dataset_dir": root, "split": "test", "num_samples": 5, "seed": 7, "image_size": (16, 12),
        "image_channels": 3, "labels": LABELS, "value_range": (0, 1),
    }  # fmt: skip
    return PairSamplingDataset(**(options | changes))


def png(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path.parent


# ------------------------------------------------------------------ seeds and ids


def test_pair_i_takes_case_i_modulo_their_number_and_seed_plus_i(tmp_path: Path) -> None:
    data = sampling(prepare(tmp_path / "d"), condition="mask")
    assert [d["seed"] for d in data.data] == [7, 8, 9, 10, 11]
    assert [d["case_id"] for d in data.data] == ["c0_s000007", "c1_s000008", "c2_s000009", "c0_s000010", "c1_s000011"]
    free = sampling(case_prefix="pool")
    assert [d["case_id"] for d in free.data] == [f"pool_{seed:06d}" for seed in range(7, 12)]
    assert [free[i]["index"] for i in range(5)] == list(range(5))


def test_processes_share_the_pairs_and_what_is_done_is_left_out(tmp_path: Path) -> None:
    whole = sampling().data
    parts = [sampling(process=(rank, 2)).data for rank in range(2)]
    assert sorted((d for part in parts for d in part), key=lambda d: d["seed"]) == whole
    done = {whole[1]["case_id"]}
    assert sampling(is_done=done.__contains__).data == [whole[0], *whole[2:]]


def test_a_retry_keeps_the_refused_pairs_with_the_seed_of_their_next_attempt() -> None:
    data = sampling()
    before = {d["case_id"]: d for d in data.data}
    for attempt in (1, 2):
        data.retry(["jdm_000008", "jdm_000010"])
        assert [d["case_id"] for d in data.data] == ["jdm_000008", "jdm_000010"]
        for item in data.data:
            first = before[item["case_id"]]
            expected = {"seed": first["seed"] + attempt * SEEDS_PER_ATTEMPT, "attempt": attempt}
            assert item == first | expected


def test_every_attempt_draws_other_noise() -> None:
    # PyTorch's CPU generator alone takes the lowest 32 bits of a seed only
    seeds = [seed + attempt * SEEDS_PER_ATTEMPT for seed in (0, 7, 2**24 - 1) for attempt in (0, 1, 2, 255)]
    noise = torch.stack([torch.randn(4, generator=g) for g in make_generators(seeds)])
    assert len(torch.unique(noise, dim=0)) == len(seeds)


# ------------------------------------------------------------------ what is given


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("value_range", [(0, 1), (-1, 1)])
def test_each_condition_gives_its_part_in_the_models_range(tmp_path: Path, dims: int, value_range: tuple) -> None:
    labels = LABELS | {"gland": 2}
    root = prepare(tmp_path / "d", dims=dims, labels=labels)
    options = {"image_size": SHAPES[dims], "labels": labels, "value_range": value_range}
    low, high = value_range
    image = read_image(root / "images" / f"c1{FILE_ENDINGS[dims]}")
    label = read_label(root / "labels" / f"c1{FILE_ENDINGS[dims]}")
    box = [2, 1, 6, 5] if dims == 2 else [2, 1, 0, 6, 5, 3]
    new = np.zeros(SHAPES[dims], bool)
    new[tuple(slice(a, b) for a, b in zip(box[:dims], box[dims:], strict=True))] = True
    for condition, regions in (("mask", None), ("image", None), ("region", box)):
        item = sampling(root, condition=condition, regions=regions, **options)[1]
        known, is_known = item["known"], item["is_known"].numpy()
        assert known.dtype == torch.float32
        assert known.shape == is_known.shape == (5, *SHAPES[dims])
        unit = (known.numpy() - low) / (high - low)
        if condition != "mask":
            np.testing.assert_allclose(unit[:3], image / 255, atol=1e-6)
        if condition != "image":
            np.testing.assert_array_equal(unit[3:], [label == 1, label == 2])
        expected = np.zeros_like(is_known)
        if condition == "region":
            expected[:] = ~new
        else:
            expected[slice(0, 3) if condition == "image" else slice(3, 5)] = True
        np.testing.assert_array_equal(is_known, expected)
        assert item["conditioning"]["case"] == "c1"
        assert item["conditioning"]["condition"] == condition
        assert item["spacing"] == [0.5, 2.0, 3.0][:dims]


def test_nothing_is_known_of_whole_pairs() -> None:
    item = sampling(spacing=[0.7, 0.8])[0]
    assert item["known"].shape == (4, 16, 12)
    assert not item["is_known"].any()
    assert (item["conditioning"], item["spacing"]) == ({}, [0.7, 0.8])


def test_prepared_cases_are_resized_with_their_spacing(tmp_path: Path) -> None:
    root = prepare(tmp_path / "d")
    block = np.zeros((16, 12), np.uint8)
    block[4:12, 2:8] = 1
    write_label(root / "labels" / "c0.png", block)
    item = sampling(root, condition="mask", image_size=(8, 6))[0]
    np.testing.assert_array_equal(item["known"][3], block[::2, ::2])
    assert item["spacing"] == [1.0, 4.0]


def test_given_masks_may_be_png_or_nifti_and_hold_255_for_1(tmp_path: Path) -> None:
    label = np.random.default_rng(0).integers(0, 2, (16, 12)).astype(np.uint8)
    folder = png(tmp_path / "m" / "a.png", 255 * label)
    png(folder / "b.png", label)
    nib.save(nib.Nifti1Image(label.T[..., None], np.diag([0.7, 0.9, 5, 1])), folder / "c.d.nii.gz")
    data = sampling(condition="mask", label_dir=folder)
    for i in range(3):
        np.testing.assert_array_equal(data[i]["known"][3], label)
    assert [c["case_id"] for c in data.cases] == ["a", "b", "c.d"]
    assert data[2]["spacing"] == pytest.approx([0.9, 0.7])
    assert data[0]["spacing"] == [1.0, 1.0]


def test_given_images_may_be_png_or_nifti_of_whole_numbers_to_255(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 16, 12), np.uint8)
    folder = png(tmp_path / "i" / "a.png", np.moveaxis(image, 0, -1))
    nifti = np.moveaxis(image.swapaxes(1, 2), 0, -1)[:, :, None].astype(np.float32)
    nib.save(nib.Nifti1Image(nifti, np.eye(4)), folder / "b.nii.gz")
    data = sampling(condition="image", image_dir=folder)
    for i in range(2):
        np.testing.assert_allclose(data[i]["known"][:3], image / 255, atol=1e-6)
    volume = np.random.default_rng(0).integers(0, 256, (8, 6, 4, 2), np.uint8)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(read_given_image(tmp_path / "v.nii.gz", 3), np.moveaxis(volume, -1, 0))


def test_regions_come_from_masks_named_like_the_cases_and_are_resized_with_them(tmp_path: Path) -> None:
    root = prepare(tmp_path / "d")
    region = np.zeros((16, 12), np.uint8)
    region[:8] = 9
    for number in range(3):
        folder = png(tmp_path / "r" / f"c{number}.png", region)
    item = sampling(root, condition="region", regions=str(folder), image_size=(8, 6))[2]
    np.testing.assert_array_equal(item["is_known"][0], np.arange(8)[:, None].repeat(6, 1) >= 4)
    assert item["conditioning"]["region"] == "c2.png"


def test_batches_stack_what_is_known_and_pass_seeds_to_the_inferer(tmp_path: Path) -> None:
    data = sampling(prepare(tmp_path / "d"), condition="mask")
    known, nothing, args, options = PairSamplingPrepareBatch()(collate_pairs([data[0], data[1]]), "cpu")
    assert known.shape == (2, 4, 16, 12)
    assert (nothing, args, options["seeds"]) == (None, (), [7, 8])
    assert options["is_known"].sum() == 2 * 16 * 12
    free = sampling()
    assert PairSamplingPrepareBatch()(collate_pairs([free[0]]), "cpu")[3] == {"is_known": None, "seeds": [7]}


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "label"}, "condition is 'label'; allowed are mask, image and region"),
        ({"label_dir": "m"}, "masks is given, but whole pairs.*--condition mask"),
        ({"condition": "mask", "image_dir": "m"}, "images is given, but condition is 'mask'.*--condition image"),
        ({"condition": "mask", "regions": [0, 0, 1, 1]}, "regions is given.*--condition region"),
        ({"condition": "region"}, "without regions; give --regions"),
        ({"condition": "region", "regions": "r", "label_dir": "m"}, "masks is given without images"),
        ({"condition": "mask", "label_dir": "nowhere"}, "masks nowhere holds no file"),
        ({"num_samples": 0}, "num_samples is 0, allowed are integers from 1"),
        ({"seed": -1}, "seed is -1, allowed are integers from 0"),
        ({"value_range": (0, 255)}, "value_range is"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampling(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_channels": 1}, "image_channels 3, the model was trained with 1"),
        ({"labels": {"background": 0, "polyp": 1}}, "labels .*nucleus.*polyp"),
        ({"image_size": (8, 8, 8)}, "spatial_dims 2, the model was trained with 3"),
        ({"split": "training"}, "'training' of .* has no case; give another --split, or --masks FOLDER"),
    ],
)
def test_a_dataset_of_another_kind_than_the_models_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampling(prepare(tmp_path / "d"), condition="mask", **changes)


@pytest.mark.parametrize(
    "box", [[0, 0, 17, 4], [4, 4, 4, 8], [0, 0, 4], [0.0, 0, 4, 4], [-1, 0, 4, 4], [0, 0, 0, 4, 4, 4]]
)
def test_a_box_that_does_not_lie_in_the_image_is_refused(tmp_path: Path, box: list) -> None:
    with pytest.raises(UserError, match=r"give \[top, left, bottom, right\] inside the model's 16x12 pixels"):
        sampling(prepare(tmp_path / "d"), condition="region", regions=box)


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.full((16, 12), 2, np.uint8), {}, r"values \[2\], allowed are the integers 0..1"),
        (np.zeros((16, 12, 3), np.uint8), {}, "mode RGB"),
        (np.zeros((8, 6), np.uint8), {}, "is 8x6, the model makes 16x12.*--resize_maps True"),
        (np.full((16, 12), 255, np.uint8), {"labels": LABELS | {"gland": 2}}, r"values \[255\], allowed are .*0..2"),
    ],
)
def test_a_mask_that_the_model_cannot_take_is_refused(
    tmp_path: Path, array: np.ndarray, options: dict, message: str
) -> None:
    data = sampling(condition="mask", label_dir=png(tmp_path / "m" / "a.png", array), **options)
    with pytest.raises(UserError, match=message):
        data[0]


def test_masks_of_another_size_are_resized_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = png(tmp_path / "m" / "a.png", np.eye(8, 6, dtype=np.uint8))
    item = sampling(condition="mask", label_dir=folder, resize_maps=True)[0]
    np.testing.assert_array_equal(item["known"][3], np.eye(8, 6).repeat(2, 0).repeat(2, 1))


def test_images_that_the_model_cannot_take_are_refused(tmp_path: Path) -> None:
    data = sampling(condition="image", image_dir=png(tmp_path / "i" / "a.png", np.zeros((16, 12), np.uint8)))
    with pytest.raises(UserError, match=r"has 1 channel.*the model makes 3"):
        data[0]
    folder = tmp_path / "v"
    folder.mkdir()
    nib.save(nib.Nifti1Image(np.full((12, 16), 0.5), np.eye(4)), folder / "a.nii.gz")
    with pytest.raises(UserError, match="whole numbers 0 to 255"):
        sampling(condition="image", image_dir=folder, image_channels=1)[0]
    (folder / "a.nii.gz").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as NIfTI"):
        sampling(condition="image", image_dir=folder, image_channels=1)


def test_regions_must_be_there_fit_their_case_and_mark_something(tmp_path: Path) -> None:
    root = prepare(tmp_path / "d")
    folder = png(tmp_path / "r" / "c0.png", np.zeros((16, 12), np.uint8))
    with pytest.raises(UserError, match=r"no mask for 2 of 3 cases \(e.g. c1\)"):
        sampling(root, condition="region", regions=folder)
    png(folder / "c1.png", np.ones((8, 6), np.uint8))
    png(folder / "c2.png", np.ones((16, 12), np.uint8))
    data = sampling(root, condition="region", regions=folder)
    with pytest.raises(UserError, match="is empty"):
        data[0]
    with pytest.raises(UserError, match=r"shape \(8, 6\), its case has \(16, 12\)"):
        data[1]
    assert not data[2]["is_known"].any()


def test_given_images_and_masks_for_regions_must_be_pairs(tmp_path: Path) -> None:
    masks = png(tmp_path / "m" / "a.png", np.ones((16, 12), np.uint8))
    images = png(tmp_path / "i" / "a.png", np.zeros((16, 12, 3), np.uint8))
    options = {"condition": "region", "regions": [0, 0, 4, 4], "label_dir": masks, "image_dir": images}
    assert sampling(**options)[0]["is_known"].sum() == 4 * (16 * 12 - 16)
    png(masks / "b.png", np.ones((16, 12), np.uint8))
    with pytest.raises(UserError, match="has no file for b"):
        sampling(**options)

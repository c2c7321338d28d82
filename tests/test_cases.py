# SPDX-License-Identifier: Apache-2.0
"""Which maps are sampled with which seeds, and what is asked of their nodules."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_synth.errors import UserError
from monai_synth.inference import nodule_requests
from monai_synth.inference.cases import SamplingDataset, check_targets, collate_cases, find_cases, read_label_file
from monai_synth.inference.lsdm import guidance_scales


def cases(tiny_dataset: Path, **changes) -> list[dict]:
    options = {"dataset_dir": str(tiny_dataset), "split": "test", "label_dir": None, "requests": None, "targets": None}
    return find_cases(**(options | changes))


def dataset(tiny_dataset: Path, **changes) -> SamplingDataset:
    options = {"num_samples": 10, "seed": 5, "image_size": (64, 64), "num_labels": 8} | changes
    return SamplingDataset(cases(tiny_dataset), **options)


def test_image_i_takes_map_i_modulo_the_number_of_maps_and_seed_plus_i(tiny_dataset: Path) -> None:
    data = dataset(tiny_dataset)
    assert [d["seed"] for d in data.data] == list(range(5, 15))
    assert [d["case"] for d in data.data] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert len({d["case_id"] for d in data.data}) == 10


def test_processes_share_the_images_without_changing_them(tiny_dataset: Path) -> None:
    whole = dataset(tiny_dataset).data
    parts = [dataset(tiny_dataset, process=(rank, 3)).data for rank in range(3)]
    assert sorted((d for part in parts for d in part), key=lambda d: d["seed"]) == whole


def test_what_is_done_is_left_out_and_nothing_else_moves(tiny_dataset: Path) -> None:
    whole = dataset(tiny_dataset).data
    done = {whole[2]["case_id"], whole[7]["case_id"]}
    assert dataset(tiny_dataset, is_done=done.__contains__).data == [d for d in whole if d["case_id"] not in done]


def test_nodules_keep_their_place_when_maps_are_resized(tiny_dataset: Path) -> None:
    for size in ((64, 64), (32, 32), (128, 128)):
        item = dataset(tiny_dataset, image_size=size)[0]
        row, col = item["nodules"][0]["center"]
        assert item["label"][0, round(row), round(col)] >= 5
        assert nodule_requests(item["label"][0], item["nodules"], 4)[0].region.any()
        assert item["spacing"] == pytest.approx([64 / size[0]] * 2)


def test_requests_go_from_every_nodule_to_one_case_and_the_nearer_one_wins(tiny_dataset: Path, tmp_path: Path) -> None:
    first = cases(tiny_dataset)[0]["case_id"]
    (tmp_path / "r.json").write_text(json.dumps({first: {"texture": 1}}))
    found = cases(tiny_dataset, requests=str(tmp_path / "r.json"), targets={"texture": 4, "malignancy": 1})
    assert found[0]["targets"] == {"texture": 1.0, "malignancy": 1.0}
    assert found[1]["targets"] == {"texture": 4.0, "malignancy": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read as JSON"), ('{"nobody": {}}', "are no cases; cases are p0016"), ("[1]", "cannot be read")],
)
def test_a_bad_file_of_requests_is_one_message(tiny_dataset: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=message):
        cases(tiny_dataset, requests=str(tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"malignancy": 0.5}, "0 .benign. or 1 .malignant."),
        ({"malignancy": 3}, "0 .benign. or 1 .malignant."),
        ({"texture": 0}, "a rating from 1 to 5"),
        ({"texture": "5"}, "a rating from 1 to 5"),
        ({"colour": 1}, "unknown nodule feature 'colour'"),
    ],
)
def test_features_out_of_their_scale_are_refused(targets: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_targets(targets)


def test_png_and_nifti_maps_read_alike(tmp_path: Path) -> None:
    label = np.random.default_rng(0).integers(0, 8, (6, 4), np.uint8)
    Image.fromarray(label).save(tmp_path / "a.png")
    nib.save(nib.Nifti1Image(label.T[..., None], np.eye(4)), tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(read_label_file(tmp_path / "a.png"), label)
    np.testing.assert_array_equal(read_label_file(tmp_path / "b.nii.gz"), label)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 3), np.uint8), np.eye(4)), tmp_path / "c.nii.gz")
    with pytest.raises(UserError, match="label maps are 2-D"):
        read_label_file(tmp_path / "c.nii.gz")
    (tmp_path / "d.nii.gz").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read as NIfTI"):
        read_label_file(tmp_path / "d.nii.gz")


def test_batches_stack_maps_and_keep_the_rest_per_image(tiny_dataset: Path) -> None:
    data = dataset(tiny_dataset)
    batch = collate_cases([data[0], data[1], data[2]])
    assert batch["label"].shape == (3, 1, 64, 64)
    assert batch["seed"] == [5, 6, 7]
    assert len(batch["nodules"]) == 3


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_impossible_numbers_of_images_are_refused(tiny_dataset: Path, value) -> None:
    with pytest.raises(UserError, match="num_samples is .*allowed are integers from 1"):
        dataset(tiny_dataset, num_samples=value)


def test_scales_are_one_number_or_one_per_loaded_classifier() -> None:
    assert guidance_scales(2, ["a", "b"]) == {"a": 2.0, "b": 2.0}
    assert guidance_scales({"a": 3}, ["a", "b"]) == {"a": 3.0, "b": 0.0}
    with pytest.raises(UserError, match="classifiers are loaded for"):
        guidance_scales({"c": 1}, ["a"])
    with pytest.raises(UserError, match="give a number"):
        guidance_scales("much", ["a"])

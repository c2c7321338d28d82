# SPDX-License-Identifier: Apache-2.0
"""The app for MONAI Label without MONAI Label: its folder, maps and their grids, requests, names, training data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import BUNDLES
from hypothesis import given, settings
from hypothesis import strategies as st
from label_toy import AFFINE, as_nifti, mask, semantic, write_models
from PIL import Image

from monai_synth import cli
from monai_synth.data.datalist import read_dataset
from monai_synth.errors import UserError
from monai_synth.label import training
from monai_synth.label.maps import check_image, read_map, read_slice
from monai_synth.label.parameters import read_parameters
from monai_synth.label.served import Served, sample_case, served_bundles
from monai_synth.label.store import check_file_name, safe_case_id

FLIPPED = np.diag([0.7, 0.8, 2.5, 1.0])
TURNED = np.array([[0, -0.7, 0, 9], [-0.8, 0, 0, 8], [0, 0, 2.5, 7], [0, 0, 0, 1.0]])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> dict[str, Served]:
    root = tmp_path_factory.mktemp("served")
    models = write_models(root / "toy", tiny_dataset)
    conf = {"bundles": ",".join(f"{k}={v}" for k, v in models.items()), "bundles_dir": str(BUNDLES)}
    return served_bundles(conf, root / "app")


def image_of(served: Served, source: Path, out: Path, **request: Any) -> np.ndarray:
    out.mkdir()
    made = sample_case(served, read_parameters(request, served.name), source=source, source_id="a", out=out)
    return np.asarray(nib.load(made.image).dataobj)


# The folder


def test_the_folder_holds_an_import_and_how_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["label-app", str(tmp_path / "app")]) == 0
    assert {p.name for p in (tmp_path / "app").iterdir()} == {"main.py", "requirements.txt", "README.md"}
    assert "monailabel start_server" in capsys.readouterr().out
    assert "pydicom<3" in (tmp_path / "app" / "requirements.txt").read_text()


def test_a_folder_that_holds_something_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "main.py").write_text("mine")
    assert cli.main(["label-app", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "main.py").read_text() == "mine"
    assert cli.main(["label-app", str(tmp_path), "--overwrite"]) == 0
    assert "SynthApp" in (tmp_path / "main.py").read_text()


# Maps and grids


@pytest.mark.parametrize("affine", [AFFINE, FLIPPED, TURNED])
def test_a_map_goes_to_the_model_and_back_onto_its_own_grid(affine: np.ndarray, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 8, (5, 7)).astype(np.uint8)
    source = as_nifti(array, tmp_path / "a.nii.gz", affine)
    given_map = read_map(source, dims=2, num_labels=8, axial=True)
    (tmp_path / "b.nii.gz").write_bytes(given_map.encode(given_map.labels))
    back = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(back.dataobj, nib.load(source).dataobj)
    np.testing.assert_allclose(back.affine, affine, atol=1e-6)


@pytest.mark.parametrize("affine", [AFFINE, FLIPPED, TURNED])
def test_the_model_sees_the_same_picture_however_the_axes_of_the_file_run(affine: np.ndarray, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 8, (6, 6)).astype(np.uint8)
    lps = nib.Nifti1Image(array.T[:, :, None], np.diag([-1.0, -1.0, 1.0, 1.0]))
    lps.set_sform(lps.affine, 1)
    ornt = nib.orientations.io_orientation(affine)
    nib.save(
        lps.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(lps.affine), ornt)), tmp_path / "a.nii"
    )
    np.testing.assert_array_equal(read_map(tmp_path / "a.nii", dims=2, num_labels=8, axial=True).labels, array)
    pixels, _ = read_slice(tmp_path / "a.nii")
    assert pixels.shape == (6, 6)


def test_a_slice_of_a_volume_keeps_its_place(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).integers(0, 8, (4, 5, 6)).astype(np.uint8)
    nib.save(nib.Nifti1Image(volume, AFFINE), tmp_path / "v.nii.gz")
    with pytest.raises(UserError, match="6 slices"):
        read_map(tmp_path / "v.nii.gz", dims=2, num_labels=8, axial=True)
    with pytest.raises(UserError, match="0 to 5"):
        read_map(tmp_path / "v.nii.gz", dims=2, num_labels=8, axial=True, slice_index=6)
    part = read_map(tmp_path / "v.nii.gz", dims=2, num_labels=8, axial=True, slice_index=2)
    np.testing.assert_array_equal(part.labels, volume[:, :, 2].T)
    np.testing.assert_allclose(part.affine @ [0, 0, 0, 1], AFFINE @ [0, 0, 2, 1])


@pytest.mark.parametrize(
    ("array", "told"),
    [(np.full((4, 4), 8, np.uint8), "0 to 7"), (np.full((4, 4), 0.5), "0.5"), (np.full((4, 4), -1, np.int16), "-1")],
)
def test_values_that_are_no_labels_are_refused(array: np.ndarray, told: str, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(array[:, :, None], AFFINE), tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=told):
        read_map(tmp_path / "a.nii.gz", dims=2, num_labels=8, axial=True)


def test_a_small_file_that_claims_many_voxels_is_refused_unread(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30))
    (tmp_path / "a.nii").write_bytes(header.binaryblock + bytes(4))
    with pytest.raises(UserError, match="27000000000 voxels"):
        read_map(tmp_path / "a.nii", dims=2, num_labels=8, axial=True, slice_index=0)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.png", "a.jpg", "a.tif", "a.exe", "a", "a.nrrd"])
def test_a_datastore_takes_no_file_that_is_no_image(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"none")
    with pytest.raises(UserError, match=r"cannot be read|allowed are \.nii, "):
        check_image(tmp_path / name)
    as_nifti(mask(0), tmp_path / "good.nii.gz")
    check_image(tmp_path / "good.nii.gz")


# Sampling


def test_a_flipped_map_gives_the_flipped_image(served: dict[str, Served], tiny_dataset: Path, tmp_path: Path) -> None:
    label = semantic(tiny_dataset)
    straight = as_nifti(label, tmp_path / "a.nii.gz")
    flipped = as_nifti(label[::-1, ::-1], tmp_path / "b.nii.gz", FLIPPED)
    images = [
        image_of(served["lsdm"], path, tmp_path / path.stem, seed=4, num_steps=2, guidance_scale=0)
        for path in (straight, flipped)
    ]
    np.testing.assert_array_equal(images[0], images[1][::-1, ::-1])


def test_a_map_of_another_size_is_refused_or_resized_and_its_grid_kept(
    served: dict[str, Served], tiny_dataset: Path, tmp_path: Path
) -> None:
    source = as_nifti(np.kron(semantic(tiny_dataset), np.ones((2, 2), np.uint8)), tmp_path / "big.nii.gz")
    with pytest.raises(UserError, match="resize_maps"):
        image_of(served["spade_gan"], source, tmp_path / "a")
    assert image_of(served["spade_gan"], source, tmp_path / "b", resize_maps=True).shape == (128, 128, 1)


def test_a_model_without_classifiers_samples_unguided_unless_a_feature_is_asked_for(
    served: dict[str, Served], tiny_dataset: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(served["lsdm"].ckpt_dir, models, ignore=shutil.ignore_patterns("classifier_*"))
    alone = Served("lsdm", BUNDLES / "lsdm", models, tmp_path / "app")
    source = as_nifti(semantic(tiny_dataset), tmp_path / "a.nii.gz")
    unguided = image_of(served["lsdm"], source, tmp_path / "a", num_steps=2, guidance_scale=0)
    np.testing.assert_array_equal(image_of(alone, source, tmp_path / "b", num_steps=2), unguided)
    with pytest.raises(UserError, match="spiculation"):
        image_of(alone, source, tmp_path / "c", num_steps=2, features=["spiculation"])


def test_what_is_served_must_be_there_and_of_the_bundle(served: dict[str, Served], tmp_path: Path) -> None:
    texts = (("", "no bundle"), ("vae", "vae"), ("lsdm,fad", "studio"), ("jdm,jdm", "twice"), ("jdm=/x", "no folder"))
    for text, told in texts:
        with pytest.raises(UserError, match=told):
            served_bundles({"bundles": text, "bundles_dir": str(BUNDLES)}, tmp_path)
    other = {"bundles": f"jdm={served['spade_gan'].ckpt_dir}", "bundles_dir": str(BUNDLES)}
    with pytest.raises(UserError, match="spade_gan"):
        served_bundles(other, tmp_path)["jdm"].contract()


# Requests


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"sampler": "$1+1"}, "not allowed"),
        ({"nodule": {"_target_": 1}}, "key"),
        ({"nodule": {"texture": "@seed"}}, "not allowed"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"features": [["%x"]]}, "not allowed"),
        ({"label_tag": "../x"}, "label_tag"),
        ({"malignency": 1}, "unknown"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 9}, "batch"),
        ({"slice": -1}, "slice"),
        ({"add_to_datastore": "yes"}, "true and false"),
        ({"condition": "none"}, "condition"),
    ],
)
def test_a_request_holds_nothing_but_allowed_names_numbers_and_words(request_: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_parameters(request_, "lsdm", max_steps=8)


@pytest.mark.parametrize("request_", [{"resample": 10}, {"num_steps": 5, "num_ensemble": 4, "resample": 3}])
def test_repeated_steps_count_as_steps(request_: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"times resample .* POST /batch/infer/jdm"):
        read_parameters(request_, "jdm", max_steps=50)
    assert read_parameters(request_, "jdm").sampling == request_


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=300))
def test_a_case_id_is_a_plain_file_name_without_a_dot(text: str) -> None:
    safe = safe_case_id(text)
    assert safe.replace("-", "").replace("_", "").isalnum() or set(safe) <= set("-_")
    assert safe.isascii()
    assert 0 < len(safe) < 180


@pytest.mark.parametrize("text", ["../a", "a/b", "a\\b", ".hidden", "", "a\0", "x" * 201, "C:a", None])
def test_an_image_may_not_be_called_what_is_no_plain_file_name(text: Any) -> None:
    with pytest.raises(UserError, match="case id"):
        check_file_name("the case id", text)
    check_file_name("the case id", "CT chest 1.5 mm (2)")


def test_different_case_ids_stay_different() -> None:
    texts = ["a.b", "a-b", "a b", "a/b", "../a", "a..b", "a.b "]
    assert len({safe_case_id(text) for text in texts}) == len(texts)


# Training


def cases_of(folder: Path, dataset: Path, num: int) -> list[tuple[str, Path, Path]]:
    cases = []
    for i in range(num):
        label = as_nifti(semantic(dataset), folder / f"l{i}.nii.gz", FLIPPED)
        hu = nib.Nifti1Image(np.full((64, 64, 1), 100 * i - 500, np.int16), FLIPPED)
        hu.set_sform(FLIPPED, 1)
        nib.save(hu, folder / f"i{i}.nii.gz")
        cases.append((f"c{i}", folder / f"i{i}.nii.gz", label))
    return cases


def trained_with(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> tuple[dict, dict]:
    """What a training returns, and what its config got; nothing is trained."""
    got: dict[str, Any] = {}
    monkeypatch.setattr(training, "run_workflow", lambda *_, **values: got.update(values))
    return training.train_on_cases(*args, device="cpu", **options), got


def test_annotated_slices_become_a_dataset_with_their_nodules(
    served: dict[str, Served], tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = cases_of(tmp_path, tiny_dataset, 5)
    result, got = trained_with(monkeypatch, served["lsdm"], cases, {"max_epochs": 1}, app_dir=tmp_path / "app")
    assert (result["training"], result["validation"]) == (4, 1)
    dataset = read_dataset(got["dataset_dir"], task="lidc")
    case = dataset.datalist("training")[0]
    np.testing.assert_array_equal(np.asarray(Image.open(case["label"]))[::-1, ::-1], semantic(tiny_dataset))
    (nodule,) = case["nodules"]
    assert nodule["area"] == (semantic(tiny_dataset) >= 5).sum()
    assert case["spacing"] == pytest.approx([0.8, 0.7])
    assert (got["max_epochs"], got["features"], got["preset"]) == (1, [], "demo")
    assert str(tmp_path / "app") in got["output_dir"]


def test_annotated_pairs_become_a_dataset_of_pairs(
    served: dict[str, Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = []
    for i in range(4):
        Image.fromarray(mask(i) * 200).save(tmp_path / f"i{i}.png")
        Image.fromarray(mask(i)).save(tmp_path / f"l{i}.png")
        cases.append((f"c{i}", tmp_path / f"i{i}.png", tmp_path / f"l{i}.png"))
    result, got = trained_with(monkeypatch, served["jdm"], cases, {}, app_dir=tmp_path / "app")
    assert (result["training"], result["validation"]) == (3, 1)
    assert read_dataset(got["dataset_dir"], task="pairs").labels == {"background": 0, "nucleus": 1}


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"dataset_dir": "/x"}, "no parameter"),
        ({"imports": ["$import os"]}, "no parameter"),
        ({"preset": "$print(1)"}, "not allowed"),
        ({"images": ["nobody"]}, "nobody"),
        ({"images": ["c0"]}, "4 or more"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_anything_is_written(
    request_: dict[str, Any], told: str, served: dict[str, Served], tiny_dataset: Path, tmp_path: Path
) -> None:
    cases = cases_of(tmp_path, tiny_dataset, 4)
    with pytest.raises(UserError, match=told):
        training.train_on_cases(served["lsdm"], cases, request_, app_dir=tmp_path / "app", device="cpu")
    assert not (tmp_path / "app").exists()


@pytest.mark.slow
def test_lsdm_is_trained_on_annotated_slices_and_sampled_from(
    served: dict[str, Served], tiny_dataset: Path, tmp_path: Path
) -> None:
    app = tmp_path / "app"
    lsdm = Served("lsdm", BUNDLES / "lsdm", served["lsdm"].ckpt_dir, app / "model" / "lsdm")
    request = {"image_size": [64, 64], "max_epochs": 1, "autoencoder_epochs": 1, "batch_size": 2, "val_interval": 1}
    cases = cases_of(tmp_path, tiny_dataset, 4)
    result = training.train_on_cases(lsdm, cases, request, app_dir=app, device="cpu")
    assert (result["training"], result["validation"], result["cases"]) == (3, 1, ["c0", "c1", "c2", "c3"])
    assert lsdm.models() == app / "model" / "lsdm" / result["run"]
    assert image_of(lsdm, cases[0][2], tmp_path / "out", num_steps=2).shape == (64, 64, 1)


def test_provenance_of_a_case_names_no_place(served: dict[str, Served], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    parameters = read_parameters({"condition": "none", "seed": 2, "num_steps": 2}, "jdm")
    made = sample_case(served["jdm"], parameters, source=None, source_id="x", out=out)
    assert str(tmp_path) not in json.dumps(made.provenance)
    assert made.label_names == {"background": 0, "nucleus": 1}

# SPDX-License-Identifier: Apache-2.0
"""Semantic fidelity: what the HU bands find, what Dice says of it, and what real slices reach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from monai_synth.data.semantic import LABELS, semantic_map, window_to_uint8
from monai_synth.errors import UserError
from monai_synth.evaluate.folders import evaluate_folder, evaluate_folders, list_pairs
from monai_synth.evaluate.semantic_fidelity import class_dice, dice, hu_classes, semantic_fidelity, summarize
from monai_synth.export.nnunet import NNUNetRawWriter

SIZE = 128
LUNG_HU, SOFT_HU, BONE_HU, FAT_HU, AIR_HU = -800.0, 50.0, 700.0, -100.0, -1000.0


def disc(row: float, col: float, radius: float) -> np.ndarray:
    rows, cols = np.mgrid[:SIZE, :SIZE]
    return np.hypot(rows - row, cols - col) <= radius


def toy_slice(shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A map and the image that obeys it, but for the lungs, which lie ``shift`` pixels lower."""
    label = np.full((SIZE, SIZE), LABELS["background"], np.uint8)
    image = np.full((SIZE, SIZE), AIR_HU, np.float32)
    for mask, name, hu in (
        (disc(64, 64, 56), "body", FAT_HU),
        (disc(64, 64, 50), "soft_tissue", SOFT_HU),
        (disc(104, 64, 8), "high_dense", BONE_HU),
    ):
        label[mask], image[mask] = LABELS[name], hu
    for col in (42, 86):
        label[disc(60, col, 16)] = LABELS["lung"]
        image[disc(60 + shift, col, 16)] = LUNG_HU
    return label, image


def test_the_bands_find_the_map_again() -> None:
    label, image = toy_slice()
    np.testing.assert_array_equal(hu_classes(image), label)


@pytest.mark.parametrize(
    ("hu", "name"),
    [
        (-401, "background"),
        (-400, "body"),
        (-1, "body"),
        (0, "soft_tissue"),
        (199, "soft_tissue"),
        (200, "high_dense"),
    ],
)
def test_the_band_limits_are_those_of_the_text(hu: float, name: str) -> None:
    image = np.full((SIZE, SIZE), AIR_HU, np.float32)
    image[disc(64, 64, 50)] = hu
    assert hu_classes(image)[64, 64] == LABELS[name]


@pytest.mark.parametrize(("hu", "name"), [(-401, "lung"), (-400, "body")])
def test_lung_ends_where_body_begins(hu: float, name: str) -> None:
    _, image = toy_slice()
    image[disc(60, 42, 16)] = hu
    assert hu_classes(image)[60, 42] == LABELS[name]


def test_air_around_the_patient_is_not_lung_even_behind_a_table() -> None:
    _, image = toy_slice()
    image[122:124] = BONE_HU  # a table across the picture shuts in the air below the patient
    image[126:] = BONE_HU
    classes = hu_classes(image)
    assert (classes[124:126] == LABELS["background"]).all()
    assert (classes == LABELS["lung"]).sum() == 2 * disc(60, 42, 16).sum()


def test_a_nodule_counts_as_lung_whether_solid_or_not() -> None:
    label, image = toy_slice()
    nodule = disc(60, 42, 3)
    for name in ("nodule_benign", "nodule_indeterminate", "nodule_malignant"):
        label[nodule] = LABELS[name]
        for hu in (-650.0, 30.0, 300.0):
            image[nodule] = hu
            assert class_dice(label, image) == {"lung": 1.0, "high_dense": 1.0}


def test_air_that_the_map_asks_for_is_no_lung_but_air_elsewhere_is() -> None:
    label, image = toy_slice()
    windpipe = disc(64, 64, 4)
    image[windpipe] = AIR_HU
    assert class_dice(label, image)["lung"] < 1  # the map has soft tissue there
    label[windpipe] = LABELS["background"]
    assert class_dice(label, image)["lung"] == 1


def test_what_is_larger_than_a_vessel_is_not_filled() -> None:
    label, image = toy_slice()
    large = disc(60, 42, 9)  # 253 pixels, more than 0.2 % of the picture
    image[large] = SOFT_HU
    lung = label == LABELS["lung"]
    expected = 2 * (lung.sum() - large.sum()) / (2 * lung.sum() - large.sum())
    assert class_dice(label, image)["lung"] == pytest.approx(expected)


def test_dice_equals_its_closed_form_for_shifted_squares() -> None:
    first, second = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    first[5:15, 5:15], second[5:15, 8:18] = True, True
    assert dice(first, second) == pytest.approx(0.7)  # 7 of 10 columns in common
    assert dice(first, first) == 1
    assert dice(first, ~first) == 0
    assert np.isnan(dice(first & ~first, first & ~first))


def test_disobedience_lowers_the_class_that_disobeys() -> None:
    label, image = toy_slice()
    values = [class_dice(label, toy_slice(shift)[1])["lung"] for shift in (0, 2, 8)]
    assert values[0] == 1
    assert values[0] > values[1] > values[2]
    image[disc(104, 64, 8)] = SOFT_HU
    scores = class_dice(label, image)
    assert scores["high_dense"] == 0
    assert scores["lung"] == 1


def test_a_class_that_the_map_hardly_has_is_not_counted() -> None:
    label, image = toy_slice()
    label[label == LABELS["high_dense"]] = LABELS["soft_tissue"]
    label[100, 60:70] = LABELS["high_dense"]  # 10 pixels, less than 0.1 %
    result = semantic_fidelity([label, toy_slice()[0]], [image, image])
    assert result["classes"]["high_dense"]["n"] == 1
    assert result["classes"]["lung"]["n"] == result["num_images"] == 2


def test_a_map_without_lung_gives_no_number() -> None:
    label, image = toy_slice()
    label[label == LABELS["lung"]] = LABELS["soft_tissue"]
    score = semantic_fidelity([label], [image])["classes"]["lung"]
    assert score == {"value": None, "n": 0, "num_groups": 0, "ci": None}


def test_the_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(0.8, 0.05, 200)
    scores = [{"lung": value, "high_dense": float("nan")} for value in values]
    score = summarize(scores, num_bootstrap=5000)["classes"]["lung"]
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert score["value"] == pytest.approx(values.mean())
    np.testing.assert_allclose(score["ci"], (values.mean() - half, values.mean() + half), atol=0.15 * half)


def test_the_interval_resamples_patients_not_slices() -> None:
    means = np.random.default_rng(2).normal(0.8, 0.05, 20)
    scores = [{"lung": mean, "high_dense": 1.0} for mean in means for _ in range(10)]
    groups = [str(patient) for patient in range(20) for _ in range(10)]
    by_patient = summarize(scores, groups=groups)["classes"]["lung"]
    by_slice = summarize(scores)["classes"]["lung"]
    assert (by_patient["n"], by_patient["num_groups"]) == (200, 20)
    widths = [score["ci"][1] - score["ci"][0] for score in (by_patient, by_slice)]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(10), rel=0.2)
    assert summarize(scores, groups=["same"] * 200)["classes"]["lung"]["ci"] is None


def test_the_same_seed_gives_the_same_interval() -> None:
    scores = [{"lung": value, "high_dense": 1.0} for value in np.linspace(0.5, 1, 9)]
    assert summarize(scores, seed=3) == summarize(scores, seed=3)
    assert summarize(scores, seed=3)["classes"] != summarize(scores, seed=4)["classes"]


@pytest.mark.parametrize(
    ("labels", "images", "message"),
    [
        ([], [], "no image"),
        ([np.zeros((9, 9), int)], [], "more maps"),
        ([], [np.zeros((9, 9))], "more images"),
        ([np.zeros((9, 9), int)], [np.zeros((9, 8))], r"\(9, 9\), image \(9, 8\)"),
        ([np.full((9, 9), 8)], [np.zeros((9, 9))], r"\[8\], allowed are 0..7"),
        ([np.zeros((1, 9, 9), int)], [np.zeros((1, 9, 9))], "one slice"),
    ],
)
def test_what_cannot_be_compared_is_refused(labels: list[Any], images: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        semantic_fidelity(labels, images)


# ------------------------------------------------------------------ folders


def write_nnunet(folder: Path, shifts: list[float], **settings: Any) -> Path:
    settings = {"channel_names": ["L"], "labels": LABELS} | settings
    writer = NNUNetRawWriter(folder, dataset_id=1, name="Toy", **settings)
    for index, shift in enumerate(shifts):
        label, image = toy_slice(shift)
        writer.add(f"c{index}", window_to_uint8(image) if writer.file_ending == ".png" else image, label)
    return writer.finish()


def write_prepared(folder: Path, num_patients: int = 3) -> Path:
    for sub in ("images", "labels"):
        (folder / sub).mkdir(parents=True)
    cases = []
    for patient in range(num_patients):
        label, image = toy_slice()
        case = {"case_id": f"p{patient}-z1", "patient_id": f"p{patient}", "spacing": [2.8, 2.8]}
        for key, array in (("image", window_to_uint8(image)), ("label", label)):
            case[key] = f"{key}s/{case['case_id']}.png"
            Image.fromarray(array).save(folder / case[key])
        cases.append(case)
    head = {
        "name": "toy",
        "task": "lidc",
        "modality": "CT",
        "image_channels": 1,
        "spatial_shape": [SIZE, SIZE],
    }
    intensity = {"unit": "HU", "min": -1024, "max": 800, "stored": "uint8 0..255"}
    content = head | {
        "intensity": intensity,
        "labels": LABELS,
        "training": [],
        "validation": [],
        "test": cases,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_a_generated_folder_is_judged_like_its_arrays(tmp_path: Path, ending: str) -> None:
    channel = "L" if ending == ".png" else "CT"
    folder = write_nnunet(tmp_path, [0, 2, 8], file_ending=ending, channel_names=[channel])
    result = evaluate_folder(folder)
    expected = semantic_fidelity([toy_slice()[0]] * 3, [toy_slice(shift)[1] for shift in (0, 2, 8)])
    assert result["classes"] == expected["classes"]
    assert (result["source"], result["kind"]) == ("Dataset001_Toy", "generated")
    assert result["classes"]["lung"]["n"] == 3


def test_labels_are_known_by_their_names_not_their_values(tmp_path: Path) -> None:
    names = ["background", "lung", "high_dense", "soft_tissue", "body"]
    writer = NNUNetRawWriter(
        tmp_path,
        dataset_id=1,
        name="Toy",
        channel_names=["L"],
        labels={name: value for value, name in enumerate(names)},
    )
    label, image = toy_slice()
    own = np.zeros_like(label)
    for value, name in enumerate(names):
        own[label == LABELS[name]] = value
    writer.add("a", window_to_uint8(image), own)
    assert {score["value"] for score in evaluate_folder(writer.finish())["classes"].values()} == {1.0}


def test_a_prepared_dataset_gives_the_ceiling_by_patient(tmp_path: Path) -> None:
    result = evaluate_folder(write_prepared(tmp_path / "data"))
    assert result["classes"]["lung"] == {"value": 1.0, "n": 3, "num_groups": 3, "ci": [1.0, 1.0]}
    assert "ceiling" in result["kind"]


def test_the_text_never_shows_a_number_without_n(tmp_path: Path) -> None:
    folder = write_nnunet(tmp_path / "a", [0, 2])
    for path in (folder / "labelsTr").iterdir():
        label = np.array(Image.open(path))
        label[label == LABELS["high_dense"]] = LABELS["soft_tissue"]
        Image.fromarray(label).save(path)
    report = tmp_path / "report.json"
    (text,) = evaluate_folders([folder], report=report)
    lung, dense = text.splitlines()[1:]
    assert "n=2" in lung
    assert "not measured" in dense
    (written,) = json.loads(report.read_text())
    assert {"classes", "recipe", "seed", "versions", "settings", "num_images"} <= set(written)


def test_max_cases_takes_the_first(tmp_path: Path) -> None:
    folder = write_nnunet(tmp_path, [0, 8, 8])
    assert evaluate_folder(folder, max_cases=1)["classes"]["lung"]["value"] == 1
    with pytest.raises(UserError, match="at least 1"):
        evaluate_folder(folder, max_cases=0)


def test_folders_that_cannot_be_judged_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no dataset.json; give the folder"):
        list_pairs(tmp_path)
    unfinished = NNUNetRawWriter(tmp_path, dataset_id=2, name="Half", channel_names=["L"], labels=LABELS)
    with pytest.raises(UserError, match="has not finished"):
        list_pairs(unfinished.path)
    only_nodules = NNUNetRawWriter(
        tmp_path, dataset_id=3, name="Nodule", channel_names=["L"], labels={"background": 0, "nodule": 1}
    )
    only_nodules.add("a", np.zeros((9, 9), np.uint8), np.zeros((9, 9), int))
    with pytest.raises(UserError, match="without lung and high_dense"):
        list_pairs(only_nodules.finish())
    prepared = write_prepared(tmp_path / "data")
    with pytest.raises(UserError, match="split 'training'"):
        list_pairs(prepared, split="training")
    folder = write_nnunet(tmp_path / "x", [0])
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        list_pairs(folder)
    with pytest.raises(UserError, match="no folder for the report"):
        list(evaluate_folders([prepared], report=tmp_path / "none" / "r.json"))


@pytest.mark.parametrize("damage", ["rubbish", "half", "empty", "gone"])
@pytest.mark.parametrize("ending", [".png", ".nii.gz"])
def test_a_damaged_image_is_named(tmp_path: Path, ending: str, damage: str) -> None:
    channel = "L" if ending == ".png" else "CT"
    folder = write_nnunet(tmp_path, [0], file_ending=ending, channel_names=[channel])
    image = folder / "imagesTr" / f"c0_0000{ending}"
    content = image.read_bytes()
    image.write_bytes({"rubbish": b"rubbish" * 99, "half": content[: len(content) // 2]}.get(damage, b""))
    if damage == "gone":
        image.unlink()
    with pytest.raises(UserError, match=rf"c0_0000\{ending}"):
        evaluate_folder(folder)


def test_a_colour_image_is_not_taken_for_ct(tmp_path: Path) -> None:
    folder = write_nnunet(tmp_path, [0])
    Image.new("RGB", (SIZE, SIZE)).save(folder / "imagesTr" / "c0_0000.png")
    with pytest.raises(UserError, match="8-bit grey is needed"):
        evaluate_folder(folder)


def test_real_slices_reach_a_high_ceiling(test_data: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    slices = []
    for path in sorted((test_data / "lidc_dicom" / "LIDC-IDRI-0001").rglob("*.dcm")):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if header.Modality == "CT":
            slices.append((float(header.ImagePositionPatient[2]), path))
    labels, images = [], []
    for _, path in sorted(slices)[35:112:19]:
        scan = pydicom.dcmread(path)
        image = scan.pixel_array * float(scan.RescaleSlope) + float(scan.RescaleIntercept)
        image = np.maximum(image, -1024).astype(np.float32)
        labels.append(semantic_map(image, spacing=tuple(map(float, scan.PixelSpacing))))
        images.append(image)
    result = semantic_fidelity(labels, images)["classes"]
    assert result["lung"]["value"] > 0.97
    assert result["high_dense"]["value"] > 0.97
    assert result["lung"]["n"] == len(images) == 5

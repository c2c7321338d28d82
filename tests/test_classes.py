# SPDX-License-Identifier: Apache-2.0
"""``prepare classes``: forms of sources, stratified splits, sizes and what it refuses; end to end on small files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from source_images import cases_of, dicom, files_of, picture, refusal_of, save

from monai_synth import cli
from monai_synth.data.classes import centre_crop, cover, prepare_classes, scale_short_side
from monai_synth.data.classes_npz import find_in_npz, read_images
from monai_synth.data.classes_source import ClassSource, Item
from monai_synth.data.classes_split import split_by_class
from monai_synth.data.datalist import SPLITS, read_dataset
from monai_synth.data.pair_files import read_image
from monai_synth.errors import UserError

PARTS = {"training": "train", "validation": "val", "test": "test"}


def make_folders(root: Path, sizes: dict[str, int], shape: tuple[int, ...] = (12, 16)) -> Path:
    """``sizes`` pictures c0, c1, ... in a folder per class c, all different."""
    number = sum(1 for _ in root.rglob("*.png"))
    for name, num in sizes.items():
        for i in range(num):
            save(root / name / f"{name}{i}.png", picture(number, shape))
            number += 1
    return root


def make_npz(path: Path, sizes: Sequence[int] = (8, 3, 4), classes: int = 2, **arrays: Any) -> dict[str, np.ndarray]:
    content = {}
    for part, num in zip(PARTS.values(), sizes, strict=True):
        content[f"{part}_images"] = picture(num, (num, 6, 6))
        content[f"{part}_labels"] = (np.arange(num, dtype=np.uint8) % classes)[:, None]
    content = {key: value for key, value in {**content, **arrays}.items() if value is not None}
    np.savez_compressed(path, **content)
    return content


def make_csv(root: Path, rows: Sequence[dict[str, Any]], name: str = "list.csv", shape: Any = (8, 8)) -> Path:
    """CSV file with ``rows`` in ``root``, and a picture for each path (first column)."""
    for number, row in enumerate(rows):
        save(root / next(iter(row.values())), picture(number + 1, shape))
    with open(root / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / name


def prepare(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    return prepare_classes(source, out, **{"num_workers": 1, "progress": False, **options})


refusal = partial(refusal_of, prepare)


# ---- MedMNIST


def test_an_npz_file_keeps_its_pixels_labels_and_splits(tmp_path: Path) -> None:
    arrays = make_npz(tmp_path / "a.npz")
    content = prepare(tmp_path / "a.npz", tmp_path / "out", classes=["no", "yes"])
    dataset = read_dataset(tmp_path / "out", task="classes")
    for split, part in PARTS.items():
        cases = dataset.datalist(split)
        np.testing.assert_array_equal([read_image(c["image"])[0] for c in cases], arrays[f"{part}_images"])
        assert [c["class"] for c in cases] == arrays[f"{part}_labels"][:, 0].tolist()
    expected = {
        "name": "a", "task": "classes", "modality": "L", "image_channels": 1, "channel_names": ["L"],
        "spatial_shape": [6, 6], "classes": {"no": 0, "yes": 1},
        "intensity": {"unit": "grey value", "min": 0, "max": 255, "stored": "uint8 0..255"},
    }  # fmt: skip
    assert {key: content[key] for key in expected} == expected
    assert content["source"]["num_cases"]["test"] == {"no": 2, "yes": 2}
    text = (tmp_path / "out" / "dataset.json").read_text()
    assert json.loads(text) == content
    assert str(tmp_path) not in text


def test_colours_of_an_npz_file_are_kept_or_made_grey(tmp_path: Path) -> None:
    images = picture(0, (6, 5, 7, 3))
    labels = np.arange(6) % 2
    np.savez(tmp_path / "rgb.npz", train_images=images, train_labels=labels)
    content = prepare(tmp_path / "rgb.npz", tmp_path / "out", splits=(1, 0, 0))
    assert (content["image_channels"], content["classes"]) == (3, {"0": 0, "1": 1})
    case = cases_of(content)["train_00003"]
    np.testing.assert_array_equal(np.moveaxis(read_image(tmp_path / "out" / case["image"]), 0, -1), images[3])
    content = prepare(tmp_path / "rgb.npz", tmp_path / "grey", grey=True, splits=(1, 0, 0))
    grey = read_image(tmp_path / "grey" / case["image"])[0]
    np.testing.assert_allclose(grey, images[3] @ [0.299, 0.587, 0.114], atol=1)


def test_an_npz_file_without_a_test_part_gives_it_from_its_training_images(tmp_path: Path) -> None:
    make_npz(tmp_path / "a.npz", (20, 4, 1), test_images=None, test_labels=None)
    content = prepare(tmp_path / "a.npz", tmp_path / "out", splits=(0.8, 0, 0.2))
    assert [len(content[s]) for s in SPLITS] == [16, 4, 4]
    assert Counter(case["class"] for case in content["test"]) == {0: 2, 1: 2}


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"train_images": None}, "lacks train_images (it has test_images"),
        ({"val_labels": None}, "lacks val_labels"),
        ({"train_images": np.zeros((8, 6, 6), np.float32)}, "train_images is float32 (8, 6, 6); allowed are uint8"),
        ({"train_images": np.zeros((8, 6, 6, 6), np.uint8)}, "(8, 6, 6, 6); allowed are uint8 (N, H, W)"),
        ({"val_images": np.zeros((3, 7, 6), np.uint8)}, "images of different form"),
        ({"train_labels": np.zeros((8, 14), np.uint8)}, "one for each of its 8 images"),
        ({"train_labels": np.zeros((7, 1), np.uint8)}, "one for each of its 8 images"),
        ({"train_labels": np.zeros((8, 1))}, "train_labels is float64 (8, 1); allowed are whole numbers"),
        ({"train_labels": np.array([[None]] * 8)}, "holds Python objects, which may run code"),
        ({"train_images": np.asfortranarray(picture(0, (8, 6, 6)))}, "Fortran order"),
        ({"train_labels": np.array([0, 1, -1, 0, 0, 1, 0, 1])}, "train_labels[2] is -1; allowed are 0 to 1"),
        ({"train_labels": np.array([0, 10**9] * 4)}, "a label is 1000000000, more than there are images"),
        ({"train_labels": np.array([0, 1, 2, -1, 0, 1, 0, 1])}, "train_labels[2] is 2; allowed are 0 to 1 (no, yes)"),
    ],
)
def test_an_npz_file_of_another_form_is_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    make_npz(tmp_path / "a.npz", **arrays)
    assert said in refusal(tmp_path / "a.npz", tmp_path, classes=["no", "yes"])


def test_a_damaged_npz_file_is_refused(tmp_path: Path) -> None:
    make_npz(tmp_path / "a.npz", (60, 3, 4))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data[: len(data) // 2])
    assert "cannot be read" in refusal(tmp_path / "a.npz", tmp_path)
    (tmp_path / "a.npz").write_bytes(data[:600] + bytes(200) + data[800:])  # told by its checksum, in the pixels
    assert "cannot be read" in refusal(tmp_path / "a.npz", tmp_path)
    (tmp_path / "a.npz").write_text("hello")
    assert "it is damaged or no npz file" in refusal(tmp_path / "a.npz", tmp_path)
    assert "is not there" in refusal(tmp_path / "b.npz", tmp_path)


def test_pneumoniamnist_has_its_published_counts_and_names(test_data: Path) -> None:
    path = test_data / "pneumoniamnist" / "pneumoniamnist.npz"
    if not path.is_file():
        pytest.skip("PneumoniaMNIST is not there")
    found, _ = find_in_npz(path)
    assert (found.classes, found.modality, found.problems) == (["normal", "pneumonia"], "X-ray", [])
    split_of = split_by_class(found, {item.name: item.name for item in found.items}, (0.8, 0.1, 0.1), 0)
    counts = Counter((split_of[item.name], item.label) for item in found.items)
    assert [[counts[s, k] for k in (0, 1)] for s in SPLITS] == [[1214, 3494], [135, 389], [234, 390]]
    with np.load(path) as arrays:
        expected = np.concatenate([arrays[f"{part}_images"] for part in PARTS.values()])
        labels = np.concatenate([arrays[f"{part}_labels"] for part in PARTS.values()])[:, 0]
    number = {item.name: i for i, item in enumerate(found.items)}
    assert len(number) == len(expected)
    by_name = {item.name: item.label for item in found.items}
    for (name, image), pixels, label in zip(read_images(path), expected, labels, strict=True):
        assert by_name[name] == label
        np.testing.assert_array_equal(image[0], pixels)


@pytest.mark.slow
def test_pneumoniamnist_is_prepared_by_the_documented_command(test_data: Path, tmp_path: Path) -> None:
    path = test_data / "pneumoniamnist" / "pneumoniamnist.npz"
    if not path.is_file():
        pytest.skip("PneumoniaMNIST is not there")
    assert cli.main(["prepare", "classes", str(path), str(tmp_path / "out")]) == 0
    dataset = read_dataset(tmp_path / "out", task="classes")
    with np.load(path) as arrays:
        for split, part in PARTS.items():
            cases = dataset.datalist(split)
            np.testing.assert_array_equal([read_image(c["image"])[0] for c in cases], arrays[f"{part}_images"])
            assert [c["class"] for c in cases] == arrays[f"{part}_labels"][:, 0].tolist()


# ---- a folder per class


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"02_B": 5, "01_A": 5})
    (source / ".DS_Store").write_bytes(b"x")
    content = prepare(source, tmp_path / "out", splits=(0.6, 0.2, 0.2), class_names=["a", "b"])
    assert content["classes"] == {"a": 0, "b": 1}
    assert [len(content[s]) for s in SPLITS] == [6, 2, 2]
    for name, case in cases_of(content).items():
        folder = ["01_A", "02_B"][case["class"]]
        assert name.startswith(f"{folder}_")
        original = np.asarray(Image.open(source / folder / f"{name[5:]}.png"))
        np.testing.assert_array_equal(read_image(tmp_path / "out" / case["image"])[0], original)


def test_classes_may_be_ordered_and_the_others_left_out(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 3, "b": 3, "c": 3})
    said = refusal(source, tmp_path, classes=["c", "a"])
    assert "b: no class or split has this name; allowed are a, c" in said
    content = prepare(source, tmp_path / "out", classes=["c", "a"], skip_bad=True)
    assert content["classes"] == {"c": 0, "a": 1}
    assert {name[0]: case["class"] for name, case in cases_of(content).items()} == {"c": 0, "a": 1}
    assert content["source"]["bad"] == {"unknown_class": 1}


def test_split_folders_are_kept_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    make_folders(tmp_path / "src" / "train", {"a": 10, "b": 10})
    make_folders(tmp_path / "src" / "test", {"a": 2, "b": 3})
    content = prepare(tmp_path / "src", tmp_path / "out")
    assert [len(content[s]) for s in SPLITS] == [18, 2, 5]
    assert {case["case_id"] for case in content["test"]} == {f"test_a_a{i}" for i in range(2)} | {
        f"test_b_b{i}" for i in range(3)
    }
    make_folders(tmp_path / "src" / "val", {"a": 1, "b": 1})
    content = prepare(tmp_path / "src", tmp_path / "out2")
    assert [len(content[s]) for s in SPLITS] == [20, 2, 5]


def test_a_split_may_lack_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folders(tmp_path / "src" / "train", {"a": 5, "b": 5})
    make_folders(tmp_path / "src" / "test", {"b": 3})
    content = prepare(tmp_path / "src", tmp_path / "out")
    assert content["source"]["num_cases"]["test"] == {"a": 0, "b": 3}
    assert "no image of a in test" in caplog.text


def test_kather_tiles_are_prepared_by_class(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "kather2016_sample" / "tiles150_labelled"
    if not folder.is_dir():
        pytest.skip("the Kather sample is not there")
    content = prepare(folder, tmp_path / "out", size=[32])
    names = sorted(p.name for p in folder.iterdir())
    assert list(content["classes"]) == names
    assert (len(names), content["image_channels"], content["spatial_shape"]) == (8, 3, [32, 32])
    cases = cases_of(content).values()
    expected = {k: sum(1 for _ in (folder / name).iterdir()) for k, name in enumerate(names)}
    assert Counter(case["class"] for case in cases) == expected
    for k, num in expected.items():
        for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
            assert abs(sum(case["class"] == k for case in content[split]) - share * num) < 1
    path = next((folder / names[0]).iterdir())
    small = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    case = cases_of(content)[f"{names[0]}_{path.stem}"]
    image = np.moveaxis(read_image(tmp_path / "out" / case["image"]), 0, -1).astype(int)
    np.testing.assert_allclose(image, np.asarray(small), atol=2)


# ---- CSV


def rows_of(num: int, **columns: Any) -> list[dict[str, Any]]:
    return [{"path": f"x/i{i}.png", "label": ["sick", "well"][i % 2]} | {k: f(i) for k, f in columns.items()}
            for i in range(num)]  # fmt: skip


def test_a_csv_file_names_classes_patients_and_splits(tmp_path: Path) -> None:
    table = make_csv(
        tmp_path / "src", rows_of(12, patient=lambda i: f"P {i // 3}", split=lambda i: "train" if i < 9 else "test")
    )
    content = prepare(tmp_path / "src", tmp_path / "out", table=table, splits=(0.7, 0.3, 0))
    assert content["classes"] == {"sick": 0, "well": 1}
    assert [len(content[s]) for s in SPLITS] == [6, 3, 3]
    for name, case in cases_of(content).items():
        number = int(name.removeprefix("x_i"))
        assert (case["class"], case["patient_id"]) == (number % 2, f"P_{number // 3}")
        np.testing.assert_array_equal(read_image(tmp_path / "out" / case["image"])[0], picture(number + 1, (8, 8)))


def test_columns_may_have_other_names_and_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [{"file": f"{i}.png", "grade": str([2, 10, 9][i % 3]), "who": f"p{i // 3}"} for i in range(12)]
    table = make_csv(tmp_path / "src", rows)
    columns = {"path_column": "file", "label_column": "grade", "patient_column": "who"}
    content = prepare(tmp_path / "src", tmp_path / "out", table=table, splits=(0.5, 0.25, 0.25), **columns)
    assert content["classes"] == {"2": 0, "9": 1, "10": 2}
    for split in SPLITS:
        assert len({case["patient_id"] for case in content[split]}) * 3 == len(content[split])
    said = refusal(tmp_path / "src", tmp_path / "out", table=table)
    assert "lacks the column(s) path, label (it has file, grade, who)" in said
    assert "lacks the column(s) nobody" in refusal(
        tmp_path / "src", tmp_path / "out", table=table, **{**columns, "patient_column": "nobody"}
    )
    assert "--csv" in refusal(tmp_path / "src", tmp_path / "out", path_column="file")


def test_bad_lines_of_a_csv_file_are_all_listed(tmp_path: Path) -> None:
    source = tmp_path / "src"
    rows = rows_of(12, split=lambda i: "train")
    save(tmp_path / "outside.png", picture(0))
    make_csv(source, rows)
    rows[0]["label"] = ""
    rows[1]["label"] = "dead"
    rows[2]["path"] = "../outside.png"
    rows[3]["path"] = str(tmp_path / "outside.png")
    rows[4]["path"] = "x/none.png"
    rows[5]["path"] = rows[6]["path"]
    rows[7]["split"] = "holdout"
    with open(source / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (source / "x" / "i8.png").write_bytes((source / "x" / "i8.png").read_bytes()[:60])
    options = {"table": source / "list.csv", "classes": ["sick", "well"]}
    said = refusal(source, tmp_path, **options)
    for text in (
        "has 8 unusable file(s)",
        "line 2: no label; allowed are sick, well",
        "line 3: label 'dead'",
        "line 4: path '../outside.png'; allowed are paths below",
        "line 5: path '/",
        "line 6: x/none.png is not there",
        "i6.png: is listed twice",
        "line 9: split 'holdout'; allowed are train",
        "i8.png: cannot be read",
    ):
        assert text in said
    content = prepare(source, tmp_path / "out", skip_bad=True, splits=(1, 0, 0), **options)
    assert sorted(cases_of(content)) == ["x_i10", "x_i11", "x_i6", "x_i9"]
    assert content["source"]["bad"]["bad_path"] == 2


def test_a_csv_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    table = tmp_path / "src" / "t.csv"
    assert "cannot be read (No such file" in refusal(tmp_path / "src", tmp_path, table=table)
    table.write_bytes(b"path,label\n\xff\xfe,1\n")
    assert "in UTF-8" in refusal(tmp_path / "src", tmp_path, table=table)
    table.write_text("path,label\n")
    assert "holds no line" in refusal(tmp_path / "src", tmp_path, table=table)


# ---- CheXpert


def chexpert_source(root: Path) -> Path:
    """Six patients with a frontal and a lateral image each; values 1, 0, -1, blank, 1, 0."""

    def row(i: int, part: str, view: str, value: str) -> dict[str, str]:
        path = f"CheXpert-v1.0-small/{part}/patient{i:05d}/study1/view1_{view}.jpg"
        return {"Path": path, "Sex": "F", "Frontal/Lateral": view.capitalize(), "Pneumonia": value, "Edema": "1.0"}

    values = ["1.0", "0.0", "-1.0", "", "1.0", "0.0"]
    train = [row(i, "train", view, v) for i, v in enumerate(values, 1) for view in ("frontal", "lateral")]
    valid = [row(i, "valid", "frontal", v) for i, v in ((21, "1.0"), (22, "0.0"))]
    for name, rows in (("train.csv", train), ("valid.csv", valid)):
        make_csv(root, rows, name)
    for name in ("train.csv", "valid.csv"):  # as it is unpacked: tables inside the folder that the paths name
        (root / name).rename(root / "CheXpert-v1.0-small" / name)
    return root / "CheXpert-v1.0-small"


@pytest.mark.parametrize(
    ("uncertain", "with_it", "num_ignored"),
    [("zeros", [1, 5], 0), ("ones", [1, 3, 5], 0), ("ignore", [1, 5], 1)],
)
def test_chexpert_takes_frontal_images_and_the_uncertain_as_told(
    tmp_path: Path, uncertain: str, with_it: list[int], num_ignored: int
) -> None:
    source = chexpert_source(tmp_path / "src")
    content = prepare(source, tmp_path / "out", chexpert=True, uncertain=uncertain, splits=(1, 0, 0))
    assert content["classes"] == {"no pneumonia": 0, "pneumonia": 1}
    assert (content["modality"], content["source"]["given_splits"]) == ("X-ray", ["validation"])
    assert sorted(case["patient_id"] for case in content["validation"]) == ["patient00021", "patient00022"]
    positive = [int(c["patient_id"][7:]) for c in content["training"] if c["class"] == 1]
    assert sorted(positive) == with_it
    assert len(content["training"]) == 6 - num_ignored
    expected = {"lateral": 6} | ({"uncertain": num_ignored} if num_ignored else {})
    assert content["source"]["ignored"] == expected


def test_chexpert_also_starts_from_the_folder_above_and_refuses_what_it_has_not(tmp_path: Path) -> None:
    inside = chexpert_source(tmp_path / "src")
    options = {"chexpert": True, "splits": (1, 0, 0)}
    content = prepare(tmp_path / "src", tmp_path / "out", table=inside / "train.csv", **options)
    assert len(content["training"]) == 6
    assert "lacks the column(s) Cold" in refusal(inside, tmp_path / "out", observation="Cold", **options)
    assert "has one class only" not in (said := refusal(inside, tmp_path / "out", observation="Edema", **options))
    assert "no image to train on of class no edema" in said
    assert "holds no train.csv" in refusal(tmp_path / "src", tmp_path / "out", **options)
    assert "allowed are zeros" in refusal(inside, tmp_path / "out", uncertain="maybe", **options)


# ---- DICOM


def test_dicom_is_windowed_turned_bright_and_loses_its_names(tmp_path: Path) -> None:
    ramp = np.arange(48).reshape(6, 8) * 10
    for i in range(8):
        kind = ["MONOCHROME2", "MONOCHROME1"][i % 2]
        header = {"PatientID": f"ID{i // 2}", "Modality": "CR", "PhotometricInterpretation": kind}
        dicom(tmp_path / "src" / "ab"[i // 4] / f"Miller_{i}.dcm", (ramp + i).astype(np.uint16), **header)
    content = prepare(tmp_path / "src", tmp_path / "out", window=[0, 480], splits=(0.5, 0, 0.5))
    assert (content["modality"], content["intensity"]["unit"]) == ("CR", "window")
    for split in ("training", "test"):
        cases = content[split]
        assert Counter(case["class"] for case in cases) == {0: 2, 1: 2}
        assert len({case["patient_id"] for case in cases}) == 2, "both images of a patient"
        for case in cases:
            image = read_image(tmp_path / "out" / case["image"])[0].astype(int)
            assert (image[0, 0] < 10) == (image[-1, -1] > 240) == case["case_id"].endswith("1")
    for path in (tmp_path / "out").rglob("*"):
        assert "Miller" not in path.name
        assert not path.is_file() or not any(word in path.read_bytes() for word in (b"Miller", b"ID0"))


# ---- size


@pytest.mark.parametrize("shape", [(300, 400), (411, 277), (256, 256), (90, 100)])
def test_the_text_transform_is_resize_256_crop_224_resize(tmp_path: Path, shape: tuple[int, int]) -> None:
    smooth = (127 + 100 * np.sin(np.arange(shape[0])[:, None] / 9) * np.cos(np.arange(shape[1]) / 13)).astype(np.uint8)
    for name in "ab":
        save(tmp_path / "src" / name / f"{name}.png", smooth)
    content = prepare(tmp_path / "src", tmp_path / "out", text_transform=True, splits=(1, 0, 0))
    assert content["spatial_shape"] == [28, 28]
    short = min(shape)
    resized = Image.fromarray(smooth).resize(
        (256 * shape[1] // short, 256 * shape[0] // short), Image.Resampling.BILINEAR
    )
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = resized.crop((left, top, left + 224, top + 224)).resize((28, 28), Image.Resampling.BILINEAR)
    image = read_image(tmp_path / "out" / cases_of(content)["a_a"]["image"])[0]
    np.testing.assert_allclose(image, np.asarray(expected), atol=2)


@given(shape=st.tuples(st.integers(1, 40), st.integers(1, 40)), size=st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_any_image_covers_any_size(shape: tuple[int, int], size: tuple[int, int]) -> None:
    assert cover(picture(0, (1, *shape)), size).shape == (1, *size)


def test_an_image_of_the_right_size_is_not_touched_and_a_longer_one_only_cut() -> None:
    image = picture(0, (1, 12, 16))
    np.testing.assert_array_equal(cover(image, (12, 16)), image)
    np.testing.assert_array_equal(cover(image, (12, 10)), image[:, :, 3:13])
    np.testing.assert_array_equal(cover(image, (6, 16)), image[:, 3:9])
    np.testing.assert_array_equal(centre_crop(image, (4, 4)), image[:, 4:8, 6:10])
    assert scale_short_side(image, 6).shape == (1, 6, 8)


def test_sizes_are_kept_unless_asked_and_then_the_shape_is_open(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 2, "b": 2})
    save(source / "a" / "odd.png", picture(9, (20, 20)))
    assert prepare(source, tmp_path / "out", splits=(1, 0, 0))["spatial_shape"] is None
    assert prepare(source, tmp_path / "o2", splits=(1, 0, 0), size=[8, 10])["spatial_shape"] == [8, 10]


def test_grey_and_colour_together_are_refused_unless_all_become_grey(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 3, "b": 3})
    save(source / "b" / "rgb.png", picture(9, (12, 16, 3)))
    assert "rgb.png: 2-D with 3 channel(s), most of the others are 2-D with 1" in refusal(source, tmp_path)
    assert prepare(source, tmp_path / "out", grey=True, splits=(1, 0, 0))["image_channels"] == 1


# ---- splits


@given(
    sizes=st.lists(st.integers(3, 40), min_size=2, max_size=5),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5, 0), (0.6, 0.15, 0.25), (0.34, 0.33, 0.33)]),
    seed=st.integers(0, 3),
)
def test_each_class_is_within_one_image_of_its_shares(sizes: list[int], shares: tuple[float, ...], seed: int) -> None:
    items = [Item(f"c{k}-{i}", "x", k) for k, num in enumerate(sizes) for i in range(num)]
    found = ClassSource("folders", [f"c{k}" for k in range(len(sizes))], items)
    split_of = split_by_class(found, {item.name: item.name for item in items}, shares, seed)
    assert set(split_of.values()) == {split for split, share in zip(SPLITS, shares, strict=True) if share}
    for k, num in enumerate(sizes):
        for split, share in zip(SPLITS, shares, strict=True):
            assert abs(sum(split_of[i.name] == split for i in items if i.label == k) - share * num) < 1 + 1e-6


@settings(max_examples=20, deadline=None)
@given(groups=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=60, max_size=90))
def test_a_patient_is_in_one_split_and_classes_keep_near_their_shares(groups: list[list[int]]) -> None:
    groups = [*groups, *[[0], [1], [2]] * 5]
    items = [Item(f"g{g}-{i}", "x", k) for g, labels in enumerate(groups) for i, k in enumerate(labels)]
    group_of = {item.name: item.name.split("-")[0] for item in items}
    split_of = split_by_class(ClassSource("CSV", ["a", "b", "c"], items), group_of, (0.6, 0.2, 0.2), 0)
    assert len({(group_of[name], split) for name, split in split_of.items()}) == len(groups)
    for k in range(3):
        num = sum(item.label == k for item in items)
        for split, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
            assert abs(sum(split_of[i.name] == split for i in items if i.label == k) - share * num) <= 0.1 * num + 4


def test_patients_come_from_the_names_by_a_regular_expression(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for i in range(16):
        save(source / "ab"[i % 2] / f"person{i // 4}_{i}.png", picture(i))
    content = prepare(source, tmp_path / "out", group_regex=r"person\d+", splits=(0.5, 0.25, 0.25))
    assert content["source"]["num_groups"] == 4
    for split, num in zip(SPLITS, (2, 1, 1), strict=True):
        assert len({case["patient_id"] for case in content[split]}) == num
        assert Counter(case["class"] for case in content[split]) == {0: 2 * num, 1: 2 * num}
    assert "finds no group in 16 name(s)" in refusal(source, tmp_path / "out", group_regex="LIDC")


def test_a_patient_in_two_given_splits_is_refused(tmp_path: Path) -> None:
    make_folders(tmp_path / "src" / "train", {"a": 3, "b": 3})
    make_folders(tmp_path / "src" / "test", {"a": 1, "b": 1})
    said = refusal(tmp_path / "src", tmp_path, group_regex=r"[ab]\d")
    assert "group a0 is in training and test of the source" in said


def test_the_seed_changes_the_split_and_nothing_else_changes_a_byte(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 10, "b": 10})
    for out in ("one", "two"):
        prepare(source, tmp_path / out, size=[8])
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    other = prepare(source, tmp_path / "three", size=[8], seed=1)
    first = json.loads((tmp_path / "one" / "dataset.json").read_text())
    assert other["test"] != first["test"]
    assert cases_of(other) == cases_of(first)


@pytest.mark.slow
def test_processes_change_no_byte(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 10, "b": 10})
    for out, workers in (("one", 1), ("two", 2)):
        prepare(source, tmp_path / out, num_workers=workers)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_copies_of_another_image_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_folders(tmp_path / "src", {"a": 5, "b": 5})
    save(source / "b" / "copy.png", picture(0))
    assert prepare(source, tmp_path / "out")["source"]["num_repeated_images"] == 1
    assert "b/copy is a/a0" in caplog.text


def test_serial_numbers_hide_names(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 5, "b": 5})
    content = prepare(source, tmp_path / "out", anonymize_ids=True)
    assert sorted(cases_of(content)) == [f"p{i:05d}-0001" for i in range(1, 11)]


# ---- bad input


def test_everything_bad_in_folders_is_collected(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 5, "b": 5})
    (source / "empty").mkdir()
    save(source / "loose.png", picture(1))
    (source / "a" / "notes.txt").write_text("hello")
    (source / "a" / "a0.png").write_bytes((source / "a" / "a0.png").read_bytes()[:80])
    save(source / "a" / "a1.bmp", picture(2))
    said = refusal(source, tmp_path)
    for text in (
        "has 5 unusable file(s)",
        "empty: no image of class empty",
        "loose.png: lies in no folder of a class",
        "notes.txt: no image that can be read",
        "a0.png: cannot be read",
        "its name becomes that of",
        "--skip-bad",
    ):
        assert text in said
    content = prepare(source, tmp_path / "out", classes=["a", "b"], skip_bad=True)
    assert len(cases_of(content)) == 9


def test_sources_that_hold_too_little_are_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "none", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "has no folder with images of a class" in refusal(tmp_path / "empty", tmp_path)
    assert "one class only (a)" in refusal(make_folders(tmp_path / "one", {"a": 5}), tmp_path)
    few = make_folders(tmp_path / "few", {"a": 1, "b": 1})
    assert "--splits 1 0 0" in refusal(few, tmp_path)
    assert "Change --class-names" in refusal(few, tmp_path, class_names=["x", "y", "z"])
    both = make_folders(tmp_path / "both" / "train", {"a": 2, "b": 2}).parent
    for name in ("val", "valid"):
        make_folders(both / name, {"a": 1, "b": 1})
    assert "two folders for one split: train, val, valid" in refusal(both, tmp_path)
    for out in (few, few / "out"):
        with pytest.raises(UserError, match="lies in the source"):
            prepare(few, out)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"classes": ["a"]}, "two or more different names"),
        ({"class_names": ["a", "a"]}, "two or more different names"),
        ({"size": [0]}, "1 or more"),
        ({"size": [4, 4, 4]}, "one or two numbers"),
        ({"window": [1, 1]}, "lower one first"),
        ({"percentiles": [1, 101]}, "0 to 100"),
        ({"percentiles": [1, 9], "window": [0, 1]}, "Leave one out"),
        ({"splits": (0.5, 0.5, 0.5)}, "add up to 1"),
        ({"seed": -1}, "0 or more"),
        ({"group_regex": "("}, "no regular expression"),
        ({"num_workers": 0}, "1 or more"),
        ({"chexpert": True, "classes": ["a", "b"]}, "--observation"),
    ],
)
def test_a_setting_out_of_range_is_told(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    assert said in refusal(make_folders(tmp_path / "src", {"a": 3, "b": 3}), tmp_path, **wrong)


def test_overwrite_replaces_a_dataset_and_else_nothing(tmp_path: Path) -> None:
    source = make_folders(tmp_path / "src", {"a": 5, "b": 5})
    prepare(source, tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out", overwrite=True, seed=1)
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"mine\.txt"):
        prepare(source, tmp_path / "out", overwrite=True)

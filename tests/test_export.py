# SPDX-License-Identifier: Apache-2.0
"""The nnU-Net raw writer: nnU-Net accepts what it writes, and what nnU-Net would refuse is refused first."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from monai_synth import atomic
from monai_synth.errors import UserError
from monai_synth.export.nnunet import NNUNetRawWriter, sanitize_case_id

LABELS = {"background": 0, "body": 1, "nodule": 2}


def open_png(folder: Path, **changes: object) -> NNUNetRawWriter:
    settings = {"dataset_id": 7, "name": "Toy", "channel_names": ["L"], "labels": LABELS} | changes
    return NNUNetRawWriter(folder, **settings)


def toy_case(seed: int, shape: tuple[int, ...] = (20, 24)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    label = rng.integers(0, 3, shape[:2], dtype=np.int64)
    return image, label


def dataset_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_flavour(folder: Path, flavour: str) -> NNUNetRawWriter:
    """Three cases of one of the kinds of dataset that the writer can write."""
    if flavour == "grey":
        writer, shape = open_png(folder), (20, 24)
    elif flavour == "rgb":
        writer, shape = open_png(folder, channel_names=["R", "G", "B"]), (20, 24, 3)
    else:
        writer = open_png(folder, channel_names=["CT"], file_ending=".nii.gz")
        shape = (20, 24) if flavour == "ct_slice" else (20, 24, 6)
    for seed in range(3):
        image, label = toy_case(seed, shape)
        if flavour == "ct_slice":
            image = image.astype(np.float64) * 7 - 1000.5
        if flavour == "ct_volume":
            image = image.astype(np.int32) * 7 - 1000
            label = np.repeat(label[..., None], 6, axis=2)
        spacing = {"ct_slice": (0.9, 0.7), "ct_volume": (0.7, 0.8, 2.5)}.get(flavour)
        writer.add(f"case{seed}", image, label, spacing=spacing)
    writer.finish()
    return writer


# ------------------------------------------------------------------ nnU-Net as the judge


@pytest.mark.parametrize("flavour", ["grey", "rgb", "ct_slice", "ct_volume"])
def test_nnunet_accepts_the_dataset(
    tmp_path: Path, flavour: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    module = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: _InProcess)  # 6 s less per case

    module.verify_dataset_integrity(str(write_flavour(tmp_path, flavour).path), num_processes=1)

    said = capfd.readouterr().out
    assert "most likely OK" in said
    assert "Warning" not in said


class _InProcess:
    """nnU-Net's checks in this process instead of a freshly spawned one."""

    class Pool:
        def __init__(self, processes: int) -> None: ...
        def __enter__(self) -> _InProcess.Pool:
            return self

        def __exit__(self, *exc: object) -> None: ...
        def starmap(self, function: object, arguments: object) -> list[object]:
            return [function(*given) for given in arguments]


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_nnunet_reads_a_nifti_slice_in_the_orientation_and_spacing_it_was_given(tmp_path: Path, reader: str) -> None:
    registry = pytest.importorskip("nnunetv2.imageio.reader_writer_registry")
    io = registry.recursive_find_reader_writer_by_name(reader)()
    writer = open_png(tmp_path, channel_names=["CT"], file_ending=".nii.gz")
    image, label = toy_case(0)
    hu = image.astype(np.int16) - 1000
    writer.add("a", hu, label, spacing=(0.9, 0.7))

    read, properties = io.read_images([str(writer.image_path("a"))])
    segmentation, _ = io.read_seg(str(writer.label_path("a")))

    np.testing.assert_array_equal(read, hu[None, None])
    np.testing.assert_array_equal(segmentation, label[None, None])
    np.testing.assert_allclose(properties["spacing"], (999, 0.9, 0.7), rtol=1e-6)


def test_a_nifti_slice_shows_the_patients_left_on_the_right_of_the_picture(
    tmp_path: Path,
) -> None:
    nib = pytest.importorskip("nibabel")
    writer = write_flavour(tmp_path, "ct_slice")
    affine = nib.load(writer.image_path("case0")).affine
    assert nib.aff2axcodes(affine) == ("L", "P", "S")  # as DICOM: columns run to the left, rows to the back


def test_a_nifti_volume_keeps_its_axes_values_and_spacing(tmp_path: Path) -> None:
    nib = pytest.importorskip("nibabel")
    writer = open_png(tmp_path, channel_names=["CT"], file_ending=".nii.gz")
    hu = np.arange(5 * 6 * 7, dtype=np.int64).reshape(5, 6, 7) - 1024
    writer.add("v", hu, np.zeros(hu.shape, bool), spacing=(0.7, 0.8, 2.5))
    image = nib.load(writer.image_path("v"))
    np.testing.assert_array_equal(np.asarray(image.dataobj), hu)
    assert image.get_data_dtype() == np.int16
    np.testing.assert_allclose(image.header.get_zooms(), (0.7, 0.8, 2.5), rtol=1e-6)
    assert nib.load(writer.label_path("v")).get_data_dtype() == np.uint8


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["grey", "ct_slice"])
def test_the_command_line_of_nnunet_plans_and_preprocesses_the_dataset(tmp_path: Path, flavour: str) -> None:
    pytest.importorskip("nnunetv2")
    raw = tmp_path / "raw"
    writer = write_flavour(raw, flavour)
    env = os.environ | {
        "nnUNet_raw": str(raw),
        "nnUNet_preprocessed": str(tmp_path / "pre"),
        "nnUNet_results": str(tmp_path / "res"),
    }
    command = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    done = subprocess.run(
        [command, "-d", "7", "-c", "2d", "--verify_dataset_integrity", "-np", "1", "-npfp", "1"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    plans = json.loads((tmp_path / "pre" / writer.path.name / "nnUNetPlans.json").read_text())
    assert list(plans["configurations"]) == ["2d"]
    # The planner takes the slice axis as the one not to convolve over, also where pixels are wider than 1 mm.
    assert plans["transpose_forward"] == [0, 1, 2]
    expected = {"grey": [1.0, 1.0], "ct_slice": [0.9, 0.7]}[flavour]
    np.testing.assert_allclose(plans["configurations"]["2d"]["spacing"], expected, rtol=1e-6)
    normalisation = {"grey": "ZScoreNormalization", "ct_slice": "CTNormalization"}[flavour]
    assert plans["configurations"]["2d"]["normalization_schemes"] == [normalisation]


# ------------------------------------------------------------------ what is on the disk


def test_png_gives_back_every_pixel_and_label(tmp_path: Path) -> None:
    from PIL import Image

    for channels, shape in ((["L"], (20, 24)), (["R", "G", "B"], (20, 24, 3))):
        writer = open_png(tmp_path / str(len(channels)), channel_names=channels)
        image, label = toy_case(1, shape)
        writer.add("a", image, label)
        np.testing.assert_array_equal(np.asarray(Image.open(writer.image_path("a"))), image)
        read = Image.open(writer.label_path("a"))
        assert read.mode == "L"
        np.testing.assert_array_equal(np.asarray(read), label)


def test_dataset_json_holds_what_the_format_asks_for(tmp_path: Path) -> None:
    writer = write_flavour(tmp_path, "rgb")
    assert writer.path.name == "Dataset007_Toy"
    assert json.loads((writer.path / "dataset.json").read_text()) == {
        "name": "Toy",
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": LABELS,
        "numTraining": 3,
        "file_ending": ".png",
        "overwrite_image_reader_writer": "NaturalImage2DIO",
    }


@pytest.mark.parametrize("flavour", ["grey", "ct_volume"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, flavour: str) -> None:
    first = dataset_bytes(write_flavour(tmp_path / "a", flavour).path)
    assert dataset_bytes(write_flavour(tmp_path / "b", flavour).path) == first
    assert len(first) == 8
    for name, content in first.items():
        assert not name.endswith(".gz") or content[4:8] == bytes(4), "gzip's time stamp"


def test_dataset_json_is_written_only_by_finish(tmp_path: Path) -> None:
    writer = open_png(tmp_path)
    writer.add("a", *toy_case(0))
    assert not (writer.path / "dataset.json").exists()
    writer.finish()
    assert (writer.path / "dataset.json").exists()


@pytest.mark.parametrize("case_id", ["p0001-s1-z0045", "a.b_c-1", "_x", "x" * 150])
def test_a_harmless_case_id_is_kept(case_id: str) -> None:
    assert sanitize_case_id(case_id) == case_id


@pytest.mark.parametrize("case_id", ["../../etc/passwd", "a/b", "a b", ".hidden", "-o", "ü", "x" * 300, "a\\b", "\n"])
def test_a_harmful_case_id_becomes_a_plain_file_name(case_id: str) -> None:
    safe = sanitize_case_id(case_id)
    assert safe == sanitize_case_id(safe)
    assert set(safe) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    assert safe[0] not in ".-"
    assert len(safe) <= 150


def test_different_case_ids_stay_different() -> None:
    ids = ["a/b", "a-b", "a b", "a\\b", "/a/b", "ü", "ö", "x" * 300, "x" * 301]
    assert len({sanitize_case_id(case_id) for case_id in ids}) == len(ids)


# ------------------------------------------------------------------ resuming and not overwriting


def test_a_resumed_dataset_equals_an_unbroken_one(tmp_path: Path) -> None:
    unbroken = dataset_bytes(write_flavour(tmp_path / "a", "grey").path)

    writer = open_png(tmp_path / "b")
    writer.add("case0", *toy_case(0))
    writer.add("case1", *toy_case(1))
    writer.label_path("case1").unlink()  # killed between the two files of a case
    (writer.path / "labelsTr" / ".case1.png.99.part").write_bytes(b"half")
    writer = open_png(tmp_path / "b")
    assert [writer.has(f"case{seed}") for seed in range(3)] == [True, False, False]
    for seed in (1, 2):
        writer.add(f"case{seed}", *toy_case(seed))
    writer.finish()

    assert dataset_bytes(writer.path) == unbroken


def test_finish_drops_half_a_case_that_nobody_completed(tmp_path: Path) -> None:
    writer = write_flavour(tmp_path, "grey")
    writer.label_path("case1").unlink()
    writer.image_path("case2").unlink()
    writer.finish()
    assert writer.cases() == ["case0"]
    assert json.loads((writer.path / "dataset.json").read_text())["numTraining"] == 1
    assert not writer.image_path("case1").exists()
    assert not writer.label_path("case2").exists()


def test_appending_raises_the_count(tmp_path: Path) -> None:
    write_flavour(tmp_path, "grey")
    writer = open_png(tmp_path)
    writer.add("more", *toy_case(9))
    writer.finish()
    assert json.loads((writer.path / "dataset.json").read_text())["numTraining"] == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"labels": {"background": 0, "polyp": 1}}, ["labels.body", "1", "None"]),
        ({"channel_names": ["R", "G", "B"]}, ["channel_names", "['L']", "['R', 'G', 'B']"]),
        ({"file_ending": ".nii.gz"}, ["file_ending", "'.png'", "'.nii.gz'"]),
        ({"settings": {"sampler": {"name": "ddpm"}}}, ["settings.sampler.name", "'ddim'", "'ddpm'"]),
        ({"settings": {}}, ["settings.sampler.name", "'ddim'", "None"]),
    ],
)
def test_resuming_with_another_setting_names_both_values(
    tmp_path: Path, changes: dict[str, object], named: list[str]
) -> None:
    begun = {"settings": {"sampler": {"name": "ddim"}}}
    before = dataset_bytes(open_png(tmp_path, **begun).path)
    with pytest.raises(UserError) as caught:
        open_png(tmp_path, **(begun | changes))
    message = str(caught.value)
    for part in (*named, "overwrite"):
        assert part in message
    assert dataset_bytes(tmp_path / "Dataset007_Toy") == before


def test_an_existing_dataset_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    before = dataset_bytes(write_flavour(tmp_path, "grey").path)
    with pytest.raises(UserError, match="already exists"):
        open_png(tmp_path, resume=False)
    assert dataset_bytes(tmp_path / "Dataset007_Toy") == before
    writer = open_png(tmp_path, overwrite=True, labels={"background": 0, "polyp": 1})
    assert writer.cases() == []
    assert not (writer.path / "dataset.json").exists()


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    theirs = tmp_path / "Dataset007_Toy" / "imagesTr" / "real_0000.png"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"real")
    with pytest.raises(UserError, match="not begun by this writer"):
        open_png(tmp_path)
    assert dataset_bytes(tmp_path) == {"Dataset007_Toy/imagesTr/real_0000.png": b"real"}


def test_a_second_dataset_with_the_same_id_is_refused(tmp_path: Path) -> None:
    open_png(tmp_path)
    with pytest.raises(UserError, match="Dataset007_Toy"):
        open_png(tmp_path, name="Other")


# ------------------------------------------------------------------ corruption is refused by us first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_id": 0}, "1 to 999"),
        ({"dataset_id": 1000}, "1 to 999"),
        ({"dataset_id": "7"}, "1 to 999"),
        ({"name": "a b"}, "letters"),
        ({"name": ""}, "letters"),
        ({"file_ending": ".jpg"}, "allowed are .png, .nii.gz"),
        ({"channel_names": []}, "channel_names"),
        ({"channel_names": "RGB"}, "channel_names"),
        ({"channel_names": ["CT"]}, "Hounsfield"),
        ({"channel_names": ["a", "b"]}, "1 or 3"),
        ({"channel_names": [], "file_ending": ".nii.gz"}, "one per channel"),
        ({"labels": {}}, "'background': 0"),
        ({"labels": {"background": 0, "polyp": 255}}, "255"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "repeat"),
        ({"labels": {"background": 1, "polyp": 0}}, "'background': 0"),
        ({"labels": {"nothing": 0, "polyp": 1}}, "'background': 0"),
        ({"labels": {"background": 0, "whole": (1, 2)}}, "renumber"),
    ],
)
def test_settings_that_nnunet_cannot_read_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_png(tmp_path, **changes)
    assert not any(tmp_path.iterdir())


GREY = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("changes", "image", "label", "message"),
    [
        ({}, GREY, GREY + 255, r"\[255\], allowed are 0..2 \(background, body, nodule\)"),
        ({}, GREY, GREY.astype(int) - 1, r"\[-1\]"),
        ({}, GREY, GREY.astype(np.float32), "float32; give integers"),
        ({}, GREY, GREY[:, :4], r"\(4, 4\)"),
        ({}, GREY, np.zeros((4, 5, 3), np.uint8), "RGB mask"),
        ({}, GREY.astype(np.float32), GREY, "PNG takes uint8"),
        ({}, GREY.astype(np.uint16), GREY, "PNG takes uint8"),
        ({}, GREY[..., None], GREY, r"\(4, 5, 1\)"),
        ({}, np.zeros((4, 5, 3), np.uint8), GREY, r"\(4, 5, 3\)"),
        ({}, GREY[:0], GREY[:0], "empty"),
        ({"channel_names": ["R", "G", "B"]}, GREY, GREY, r"\(4, 5\)"),
        ({"channel_names": ["R", "G", "B"]}, np.zeros((4, 5, 4), np.uint8), GREY, r"\(4, 5, 4\)"),
        ({"file_ending": ".nii.gz"}, np.full((4, 5), np.nan), GREY, "NaN"),
        ({"file_ending": ".nii.gz"}, np.full((4, 5), np.inf), GREY, "infinite"),
        ({"file_ending": ".nii.gz"}, np.full((4, 5), 40000), GREY, "32767"),
        ({"file_ending": ".nii.gz"}, np.zeros((4, 5), complex), GREY, "complex"),
        ({"file_ending": ".nii.gz"}, np.zeros((1, 4, 5, 2)), GREY, r"\(X, Y, Z\)"),
    ],
)
def test_a_case_that_nnunet_would_refuse_or_misread_is_refused(
    tmp_path: Path, changes: dict[str, object], image: np.ndarray, label: np.ndarray, message: str
) -> None:
    writer = open_png(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        writer.add("a", image, label)
    assert writer.cases() == []
    assert not any((writer.path / "imagesTr").iterdir())


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_a_spacing_that_is_no_length_is_refused(tmp_path: Path, spacing: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="2 positive lengths"):
        open_png(tmp_path, file_ending=".nii.gz").add("a", GREY, GREY, spacing=spacing)


def test_one_case_id_cannot_stand_for_two_cases(tmp_path: Path) -> None:
    writer = open_png(tmp_path)
    writer.add("a", GREY, GREY)
    with pytest.raises(UserError, match="already added"):
        writer.add("a", GREY, GREY)
    with pytest.raises(UserError, match="empty"):
        writer.add("", GREY, GREY)


def test_a_dataset_without_cases_cannot_be_finished(tmp_path: Path) -> None:
    writer = open_png(tmp_path)
    with pytest.raises(UserError, match="no case"):
        writer.finish()


# ------------------------------------------------------------------ whole files or none


def test_a_full_disk_leaves_the_old_file_and_no_half_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    atomic.write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_bytes(path, b"new and longer")
    assert dataset_bytes(tmp_path) == {"a.bin": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, the disk that is always full")
def test_a_case_on_a_disk_that_fills_up_is_written_on_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = open_png(tmp_path)
    real_open, calls = open, []

    def fill_up(path: object, *args: object) -> object:
        calls.append(path)
        return real_open(path if len(calls) < 2 else "/dev/full", *args)

    monkeypatch.setattr(atomic, "open", fill_up, raising=False)
    with pytest.raises(OSError, match="No space"):
        writer.add("a", *toy_case(0))
    monkeypatch.undo()
    assert len(calls) == 2
    writer = open_png(tmp_path)
    assert not writer.has("a")
    writer.add("a", *toy_case(0))
    assert writer.has("a")

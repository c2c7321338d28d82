# SPDX-License-Identifier: Apache-2.0
"""DICOM files to CT series in HU: order, padding, and one message for every fault."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from lidc_files import SIZE, ct_slice, other_dicom, put_pixels, rewrite, sop_uid, stored_image, write_series
from pydicom.uid import JPEG2000Lossless, RLELossless

from monai_synth.data import lidc_series
from monai_synth.data.lidc_series import (
    ReadingFile,
    Series,
    SliceFile,
    inspect_file,
    is_axial,
    order_series,
    read_hu,
)
from monai_synth.data.problems import Problem
from monai_synth.errors import UserError


def files(folder: Path) -> list[SliceFile]:
    found = [inspect_file(str(p)) for p in sorted(folder.rglob("*")) if p.is_file()]
    return [f for f in found if isinstance(f, SliceFile)]


def series(folder: Path) -> Series:
    ordered = order_series(files(folder))
    assert isinstance(ordered, Series), ordered
    return ordered


def saved(folder: Path, data: pydicom.Dataset, name: str = "a.dcm") -> str:
    data.save_as(folder / name)
    return str(folder / name)


def test_slices_are_ordered_by_position_whatever_their_names_and_numbers(tmp_path: Path) -> None:
    ordered = series(write_series(tmp_path))
    assert [s.sop_uid for s in ordered.slices] == [sop_uid(1, z) for z in range(10)]
    assert ordered.spacing == (2.0, 4.0, 4.0)


def test_the_order_follows_the_normal_of_the_image_plane(tmp_path: Path) -> None:
    """Columns reversed: the normal points to the feet, so the order turns round."""
    for path in write_series(tmp_path).glob("*.bin"):
        rewrite(path, ImageOrientationPatient=[-1, 0, 0, 0, 1, 0])
    assert [s.sop_uid for s in series(tmp_path).slices] == [sop_uid(1, z) for z in reversed(range(10))]


def test_pixels_become_hu(tmp_path: Path) -> None:
    data = ct_slice(z=3)
    hu = read_hu(inspect_file(saved(tmp_path, data)))
    np.testing.assert_array_equal(hu, stored_image(3).astype(np.float32) - 1024)
    assert hu.dtype == np.float32
    data.RescaleSlope, data.RescaleIntercept = "0.5", "-7"
    np.testing.assert_allclose(read_hu(inspect_file(saved(tmp_path, data))), stored_image(3) * 0.5 - 7)


@pytest.mark.parametrize("padding", [None, -2000, 63536, 30])
def test_padding_becomes_air_in_either_sign_convention(tmp_path: Path, padding: int | None) -> None:
    data = ct_slice()
    stored = stored_image(0)
    stored[:3] = -2000 if padding != 30 else 30
    put_pixels(data, stored)
    if padding is not None:
        data.add_new("PixelPaddingValue", "US" if padding == 63536 else "SS", padding)
    hu = read_hu(inspect_file(saved(tmp_path, data)))
    assert (hu[:3] == -1024).all()
    np.testing.assert_array_equal(hu[3:], stored[3:].astype(np.float32) - 1024)


def test_padding_with_the_other_sign_convention_is_told_from_tissue(tmp_path: Path) -> None:
    """Stored -100 is written as 65436 in the header; at intercept 0 it would be fat."""
    data = ct_slice()
    stored = stored_image(0)
    stored[:3] = -100
    put_pixels(data, stored)
    data.RescaleIntercept = 0
    data.add_new("PixelPaddingValue", "US", 65436)
    assert (read_hu(inspect_file(saved(tmp_path, data)))[:3] == -1024).all()


def test_a_range_of_padding_becomes_air(tmp_path: Path) -> None:
    data = ct_slice()
    stored = stored_image(0)
    stored[0], stored[1] = 3000, 3005
    put_pixels(data, stored)
    data.add_new("PixelPaddingValue", "SS", 3005)
    data.add_new("PixelPaddingRangeLimit", "SS", 3000)
    assert (read_hu(inspect_file(saved(tmp_path, data)))[:2] == -1024).all()


def test_compressed_pixels_with_a_decoder_are_read(tmp_path: Path) -> None:
    data = ct_slice(z=2)
    data.compress(RLELossless, generate_instance_uid=False)
    hu = read_hu(inspect_file(saved(tmp_path, data)))
    np.testing.assert_array_equal(hu, stored_image(2).astype(np.float32) - 1024)


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    assert isinstance(inspect_file(saved(tmp_path, ct_slice(), "no_extension")), SliceFile)
    assert inspect_file(saved(tmp_path, other_dicom("SEG"))) == "not_ct"
    assert inspect_file(saved(tmp_path, other_dicom("SR"))) == "not_ct"
    scout = ct_slice()
    scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    assert inspect_file(saved(tmp_path, scout)) == "localizer"
    reading = write_series(tmp_path / "s") / "reading.xml"
    shutil.copy(reading, tmp_path / "reading.txt")
    assert isinstance(inspect_file(str(tmp_path / "reading.txt")), ReadingFile)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    assert inspect_file(str(tmp_path / "notes.txt")) is None
    assert inspect_file(str(tmp_path / "empty")) is None


def test_a_file_without_preamble_is_still_dicom(tmp_path: Path) -> None:
    path = saved(tmp_path, ct_slice(z=1))
    data = pydicom.dcmread(path)
    bare = tmp_path / "bare"
    with open(bare, "wb") as stream:
        pydicom.dcmwrite(stream, pydicom.Dataset(dict(data.items())), implicit_vr=False, little_endian=True)
    assert bare.read_bytes()[128:132] != b"DICM"
    assert isinstance(inspect_file(str(bare)), SliceFile)


def cut(number: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:number])

    return change


def without_pixels(path: Path) -> None:
    rewrite(path, PixelData=None)


def setting(**values: object) -> Callable[[Path], None]:
    return lambda path: rewrite(path, **values)


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (
            cut(2000),
            "truncated",
            r"is cut off \(\d+ bytes of pixel data, 3200 are needed\)",
        ),
        (cut(-1), "truncated", "is cut off"),
        (cut(560), "no_pixel_data", "has no pixel data, or ends before it"),
        (cut(140), "truncated", "header ends before the modality"),
        (cut(0), "unreadable", "got an empty file, a DICOM file is needed"),
        (without_pixels, "no_pixel_data", "has no pixel data"),
        (
            setting(PhotometricInterpretation="MONOCHROME1"),
            "photometric",
            "is MONOCHROME1, MONOCHROME2 is allowed",
        ),
        (
            setting(SamplesPerPixel=3),
            "not_single_grey_frame",
            "1 frames and 3 samples per pixel, one of each",
        ),
        (setting(NumberOfFrames=4), "not_single_grey_frame", "4 frames"),
        (setting(RescaleIntercept=None), "incomplete_header", "has no RescaleIntercept"),
        (setting(ImagePositionPatient=None), "incomplete_header", "has no ImagePositionPatient"),
        (setting(SeriesInstanceUID=None), "incomplete_header", "has no SeriesInstanceUID"),
    ],
)
def test_each_fault_of_a_file_is_one_message_that_names_it(tmp_path: Path, change, code: str, message: str) -> None:
    path = Path(saved(tmp_path, ct_slice()))
    change(path)
    found = inspect_file(str(path))
    problem = found if isinstance(found, Problem) else found.problem
    assert problem is not None
    assert problem.code == code
    assert problem.message.startswith(f"{path}: ")
    assert re.search(message, problem.message), problem.message
    assert "\n" not in problem.message


def test_compression_without_a_decoder_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ct_slice()
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(64)])
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = JPEG2000Lossless
    monkeypatch.setattr(lidc_series, "get_decoder", lambda _: SimpleNamespace(is_available=False))
    problem = inspect_file(saved(tmp_path, data)).problem
    assert problem.code == "no_decoder"
    assert "JPEG 2000" in problem.message
    assert "pip install pylibjpeg" in problem.message


def test_pixels_that_break_in_the_decoder_are_one_message(tmp_path: Path) -> None:
    data = ct_slice()
    data.compress(RLELossless, generate_instance_uid=False)
    path = Path(saved(tmp_path, data))
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"a\.dcm: its pixels cannot be decoded") as caught:
        read_hu(inspect_file(str(path)))
    assert "\n" not in str(caught.value)


def first(folder: Path, z: int) -> Path:
    return folder / f"{(7 * z) % 10:03d}-x.bin"


def drop(folder: Path) -> None:
    first(folder, 4).unlink()
    first(folder, 5).unlink()


def same_position(folder: Path) -> None:
    rewrite(first(folder, 4), ImagePositionPatient=[-80, -80, -100 + 2 * 3])


def same_uid(folder: Path) -> None:
    data = ct_slice(z=4)
    put_pixels(data, stored_image(5))
    data.save_as(folder / "zz")


def smaller(folder: Path) -> None:
    data = ct_slice(z=4, size=SIZE - 2)
    data.save_as(first(folder, 4))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (drop, "missing_slice", r"6 mm between it and .*, 2 mm is usual in this series; add the 2 missing"),
        (same_position, "duplicate_slice", "lies at the same position as .* remove one of them"),
        (same_uid, "duplicate_slice", "has the SOPInstanceUID of .* but other content"),
        (smaller, "mixed_sizes", r"\(40, 40\).* a series has one size"),
        (lambda f: rewrite(first(f, 4), PixelSpacing=[4, 5]), "mixed_spacing", "one pixel spacing"),
        (lambda f: rewrite(first(f, 4), PatientID="other"), "mixed_patients", "one PatientID"),
        (
            lambda f: rewrite(first(f, 4), ImageOrientationPatient=[0, 1, 0, 1, 0, 0]),
            "mixed_orientation",
            "one orientation",
        ),
    ],
)
def test_each_fault_of_a_series_is_one_message(tmp_path: Path, change, code: str, message: str) -> None:
    change(write_series(tmp_path))
    problems = order_series(files(tmp_path))
    assert isinstance(problems, list)
    found = [p for p in problems if p.code == code]
    assert len(found) == 1
    assert re.search(message, found[0].message), found[0].message


def test_files_with_the_same_fault_are_reported_once_per_series(tmp_path: Path) -> None:
    for path in write_series(tmp_path).glob("*.bin"):
        rewrite(path, PhotometricInterpretation="MONOCHROME1")
    (problem,) = order_series(files(tmp_path))
    assert problem.message.endswith("[9 more files of this series alike]")


def test_a_copy_of_a_file_counts_once(tmp_path: Path) -> None:
    folder = write_series(tmp_path)
    shutil.copy(first(folder, 4), folder / "copy of it")
    ordered = series(folder)
    assert (len(ordered.slices), ordered.num_copies) == (10, 1)


def test_a_tilted_gantry_is_axial_and_a_coronal_reformat_is_not(tmp_path: Path) -> None:
    found = files(write_series(tmp_path, num_slices=2))
    assert is_axial(found)
    for path in tmp_path.glob("*.bin"):
        rewrite(path, ImageOrientationPatient=[1, 0, 0, 0, 0.94, 0.342])
    assert is_axial(files(tmp_path))
    for path in tmp_path.glob("*.bin"):
        rewrite(path, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    assert not is_axial(files(tmp_path))

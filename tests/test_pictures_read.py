# SPDX-License-Identifier: Apache-2.0
"""Files of images and masks as users have them: each form gives the right array or says why not."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image
from source_images import dicom

from monai_synth.data.intensity import to_uint8
from monai_synth.data.pairs import prepare_pairs
from monai_synth.data.pairs_output import Recipe, to_labels
from monai_synth.data.pictures_read import ENDINGS, ending_of, inspect_image, read_mask, read_picture
from monai_synth.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)


def values_of(path: Path) -> np.ndarray:
    """(C, *S) as read; the header must have said the same form."""
    values = read_picture([str(path)]).values
    form = inspect_image(str(path))
    assert (form.spatial_dims, form.channels, form.eight_bit) == (
        values.ndim - 1,
        len(values),
        values.dtype == np.uint8,
    )
    return values


def saved(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def binary(path: Path, **recipe: Any) -> list[Any]:
    label, _ = to_labels(read_mask(str(path)), Recipe(2, 3, 2, **recipe), str(path))
    return label.tolist()


# ---- images


@pytest.mark.parametrize("ending", [".png", ".PNG", ".bmp", ".tif", ".tiff"])
def test_8_bit_pictures_are_kept(tmp_path: Path, ending: str) -> None:
    np.testing.assert_array_equal(values_of(saved(tmp_path / f"grey{ending}", GREY)), GREY[None])
    np.testing.assert_array_equal(values_of(saved(tmp_path / f"rgb{ending}", RGB)), np.moveaxis(RGB, -1, 0))


def test_deep_grey_pictures_keep_their_values(tmp_path: Path) -> None:
    for ending in (".png", ".tif"):
        np.testing.assert_array_equal(values_of(saved(tmp_path / f"x{ending}", DEEP)), DEEP[None].astype(np.float32))
    tifffile.imwrite(tmp_path / "f.tif", GREY.astype(np.float32) / 7)
    np.testing.assert_array_equal(values_of(tmp_path / "f.tif"), GREY[None].astype(np.float32) / 7)


def test_deep_colours_are_read_from_tiff_and_refused_where_they_would_be_lost(tmp_path: Path) -> None:
    deep = RNG.integers(0, 65536, (6, 9, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", deep, photometric="rgb")
    np.testing.assert_array_equal(values_of(tmp_path / "x.tif"), np.moveaxis(deep, -1, 0).astype(np.float32))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 6, 16, 2, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    body = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(UserError, match="colours of 16 bits"):
        values_of(tmp_path / "x.png")


def test_opaque_alpha_is_dropped_and_any_other_refused(tmp_path: Path) -> None:
    alpha = np.full((6, 9, 1), 255, np.uint8)
    opaque = saved(tmp_path / "a.png", np.concatenate([RGB, alpha], -1))
    np.testing.assert_array_equal(values_of(opaque), np.moveaxis(RGB, -1, 0))
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha[..., 0])])
    grey.save(tmp_path / "la.png")
    np.testing.assert_array_equal(values_of(tmp_path / "la.png"), GREY[None])
    alpha[2, 3] = 254
    with pytest.raises(UserError, match=r"transparent; lay it on a plain background"):
        values_of(saved(tmp_path / "b.png", np.concatenate([RGB, alpha], -1)))
    with pytest.raises(UserError, match="transparent"):
        values_of(saved(tmp_path / "c.png", GREY, transparency=int(GREY[0, 0])))


def test_palette_pictures_become_rgb(tmp_path: Path) -> None:
    picture = Image.fromarray(GREY % 3, mode=None).convert("P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 1, 2, 3])
    picture.save(tmp_path / "p.png")
    colours = np.array([[255, 0, 0], [0, 255, 0], [1, 2, 3]])
    np.testing.assert_array_equal(values_of(tmp_path / "p.png"), np.moveaxis(colours[GREY % 3], -1, 0))


def test_a_jpeg_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = saved(tmp_path / "x.jpg", ramp, exif=exif, quality=100)
    np.testing.assert_allclose(values_of(path)[0].astype(int), np.rot90(ramp, -1).astype(int), atol=2)


def test_other_colours_and_pages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its colours are CMYK"):
        read_picture([str(saved(tmp_path / "x.jpg", RGB, "CMYK"))])
    page = Image.fromarray(GREY)
    page.save(tmp_path / "pages.tif", save_all=True, append_images=[page])
    with pytest.raises(UserError, match="2 pages or frames"):
        values_of(tmp_path / "pages.tif")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".bmp", ".nii.gz", ".nii", ".dcm"])
@pytest.mark.parametrize("content", [b"", b"not an image at all" * 20])
def test_a_damaged_file_is_told_by_its_name(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"broken{ending}"
    path.write_bytes(content)
    for read in (inspect_image, lambda p: read_picture([p]), read_mask):
        with pytest.raises(UserError, match=rf"broken\{ending}: cannot be read \(.*damaged"):
            read(str(path))


@pytest.mark.parametrize("ending", [".png", ".jpg", ".tif", ".nii.gz"])
def test_a_truncated_file_is_told(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x{ending}"
    big = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    nib.save(nib.Nifti1Image(big, np.eye(4)), path) if ending == ".nii.gz" else saved(path, big)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_picture([str(path)])


# ---- NIfTI


def nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nib.save(nib.Nifti1Image(array, np.diag([0.5, 0.75, 2.0, 1.0]) if affine is None else affine), path)
    return path


@pytest.mark.parametrize("shape", [(9, 6), (9, 6, 1)])
def test_a_nifti_picture_is_turned_to_rows_and_columns(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = nifti(tmp_path / "x.nii.gz", GREY.T.reshape(shape))
    np.testing.assert_array_equal(values_of(path), GREY[None])
    assert read_picture([str(path)]).spacing == (0.75, 0.5)
    np.testing.assert_array_equal(read_mask(str(path)).values, GREY)


def test_a_volume_is_turned_to_right_anterior_superior(tmp_path: Path) -> None:
    volume = RNG.integers(0, 256, (4, 5, 6), dtype=np.uint8)
    path = nifti(tmp_path / "x.nii", volume, np.diag([-0.5, -0.75, 2.0, 1.0]))
    np.testing.assert_array_equal(values_of(path)[0], volume[::-1, ::-1])
    assert read_picture([str(path)]).spacing == (0.5, 0.75, 2.0)
    swapped = np.eye(4)[[1, 0, 2, 3]]
    np.testing.assert_array_equal(values_of(nifti(tmp_path / "y.nii", volume, swapped))[0], volume.swapaxes(0, 1))


def test_channels_are_the_fourth_axis_or_files_of_their_own(tmp_path: Path) -> None:
    volume = RNG.integers(0, 256, (4, 5, 6, 2), dtype=np.uint8)
    np.testing.assert_array_equal(values_of(nifti(tmp_path / "x.nii.gz", volume)), np.moveaxis(volume, -1, 0))
    files = [str(nifti(tmp_path / f"x_000{c}.nii.gz", volume[..., c])) for c in range(2)]
    np.testing.assert_array_equal(read_picture(files).values, np.moveaxis(volume, -1, 0))
    files[1] = str(nifti(tmp_path / "z.nii.gz", volume[:3, ..., 1]))
    with pytest.raises(UserError, match="differs from that of channel 0"):
        read_picture(files)


def test_a_scaled_nifti_is_not_8_bit(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 5, 6)), np.eye(4))
    image.header.set_data_dtype(np.uint8)
    image.header.set_slope_inter(2.0, -100.0)
    image = nib.Nifti1Image(np.linspace(-100, 410, 120).reshape(4, 5, 6), np.eye(4), image.header)
    nib.save(image, tmp_path / "x.nii")
    np.testing.assert_allclose(values_of(tmp_path / "x.nii")[0], image.get_fdata(), atol=1.1)


def test_nan_is_refused_in_images_and_masks(tmp_path: Path) -> None:
    path = str(nifti(tmp_path / "x.nii", np.array([[[0, 1], [np.nan, 1]]] * 2, np.float32)))
    for read in (lambda p: read_picture([p]), read_mask):
        with pytest.raises(UserError, match="no numbers"):
            read(path)


# ---- DICOM


def test_dicom_is_rescaled_and_has_its_spacing(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 4000, (6, 9)).astype(np.int16)
    path = dicom(tmp_path / "x.dcm", pixels, RescaleSlope=2, RescaleIntercept=-1024, PixelSpacing=[0.3, 0.4])
    np.testing.assert_array_equal(values_of(path)[0], pixels * 2.0 - 1024)
    assert read_picture([str(path)]).spacing == (0.3, 0.4)
    form = inspect_image(str(path))
    assert (form.modality, form.patient) == ("DX", "ID77")


def test_monochrome1_becomes_bright_where_it_should(tmp_path: Path) -> None:
    pixels = np.arange(54, dtype=np.uint16).reshape(6, 9)
    path = dicom(tmp_path / "x.dcm", pixels, PhotometricInterpretation="MONOCHROME1")
    image = to_uint8(read_picture([str(path)]), window=(0, 53))
    np.testing.assert_allclose(image[0], 255 - pixels / 53 * 255, atol=0.51)


def test_colour_dicom_is_kept(tmp_path: Path) -> None:
    np.testing.assert_array_equal(values_of(dicom(tmp_path / "x.dcm", RGB)), np.moveaxis(RGB, -1, 0))


def test_dicom_that_may_show_names_or_has_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="BurnedInAnnotation"):
        read_picture([str(dicom(tmp_path / "x.dcm", GREY, BurnedInAnnotation="YES"))])
    with pytest.raises(UserError, match="3 frames"):
        read_picture([str(dicom(tmp_path / "y.dcm", GREY, NumberOfFrames=3))])


def test_dicom_needs_no_ending(tmp_path: Path) -> None:
    for name in ("IM0001", "1.2.840.99"):
        assert ending_of(str(dicom(tmp_path / name, GREY))) == ""
    (tmp_path / "README").write_text("x" * 200)
    assert ending_of(str(tmp_path / "README")) is None
    assert all(ending_of(f"x{ending}") == ending for ending in ENDINGS)


def test_no_identifier_of_dicom_is_written_and_a_patient_stays_in_one_split(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "src" / kind).mkdir(parents=True)
    for i in range(6):
        dicom(tmp_path / "src" / "images" / f"Miller_{i}.dcm", DEEP + np.uint16(i), PatientID=f"ID{i // 2}")
        saved(tmp_path / "src" / "masks" / f"Miller_{i}.png", GREY // 200)
    options = {"labels": ["lung"], "threshold": 0, "num_workers": 1, "progress": False}
    content = prepare_pairs(tmp_path / "src", tmp_path / "out", **options)
    assert content["modality"] == "DX"
    for split in ("training", "validation", "test"):
        assert len({case["patient_id"] for case in content[split]}) * 2 == len(content[split]) == 2
    for path in (tmp_path / "out").rglob("*"):
        assert "Miller" not in path.name
        assert not path.is_file() or not any(word in path.read_bytes() for word in (b"Miller", b"ID0"))


# ---- masks


def test_grey_masks_of_every_mode_give_the_same_labels(tmp_path: Path) -> None:
    mask = (GREY > 128).astype(np.uint8)
    expected = mask.tolist()
    assert binary(saved(tmp_path / "a.png", mask)) == expected
    assert binary(saved(tmp_path / "b.png", mask * 255)) == expected
    assert binary(saved(tmp_path / "c.png", mask * 255, "1")) == expected
    assert binary(saved(tmp_path / "d.png", mask * 255, "RGB")) == expected
    assert binary(saved(tmp_path / "e.png", mask * 255, "RGBA")) == expected
    assert binary(saved(tmp_path / "f.png", mask * 255, "P")) == expected
    assert binary(saved(tmp_path / "g.bmp", mask * 7)) == expected
    assert binary(saved(tmp_path / "h.tif", mask * 255)) == expected
    assert binary(nifti(tmp_path / "i.nii.gz", mask.T.astype(np.float64))) == expected


def test_a_palette_holds_numbers_where_it_has_colours_and_grey_values_where_it_has_none(tmp_path: Path) -> None:
    mask = (GREY > 128).astype(np.uint8)
    picture = Image.fromarray(mask).convert("P")
    picture.putpalette([0, 0, 0, 128, 0, 0])
    picture.save(tmp_path / "colours.png")
    np.testing.assert_array_equal(read_mask(str(tmp_path / "colours.png")).values, mask)
    picture.putdata((1 - mask).ravel().tolist())  # number 0 is white
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.save(tmp_path / "greys.png")
    np.testing.assert_array_equal(read_mask(str(tmp_path / "greys.png")).values, mask * 255)


def test_coloured_and_transparent_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"colour-coded mask; turn its colours into numbers first, for example label\["):
        read_mask(str(saved(tmp_path / "x.png", RGB)))
    clear = saved(tmp_path / "y.png", np.stack([GREY * 0, GREY * 0, GREY * 0, GREY], -1))
    with pytest.raises(UserError, match="transparent"):
        read_mask(str(clear))


def test_deep_masks_need_a_threshold(tmp_path: Path) -> None:
    objects = np.arange(54, dtype=np.uint16).reshape(6, 9) // 9 * 300
    for ending in (".png", ".tif"):
        path = saved(tmp_path / f"x{ending}", objects)
        with pytest.raises(UserError, match=r"more than 8 bits; save labels with 8 bits, or give --threshold 0"):
            binary(path)
        assert binary(path, threshold=0.0) == (objects > 0).astype(int).tolist()


def test_probabilities_need_a_threshold(tmp_path: Path) -> None:
    share = np.linspace(0, 1, 54, dtype=np.float32).reshape(9, 6)
    path = nifti(tmp_path / "x.nii", share)
    with pytest.raises(UserError, match=r"holds 0\.01.*; labels are whole numbers"):
        binary(path)
    assert binary(path, threshold=0.5) == (share.T > 0.5).astype(int).tolist()

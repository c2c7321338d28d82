# SPDX-License-Identifier: Apache-2.0
"""Semantic maps: bands, precedence, and lungs of known shape; then a real scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage.draw import polygon
from skimage.measure import find_contours

from monai_synth.data.lidc_series import inspect_file, order_series, read_hu
from monai_synth.data.lungs import LungPrior, body_mask, lung_mask, two_means_threshold
from monai_synth.data.semantic import LABELS, semantic_map, uint8_to_hu, window_to_uint8

SIZE = 160
SPACING = (2.0, 2.0)
ROW, COL = np.mgrid[:SIZE, :SIZE]


def disk(row: float, col: float, height: float, width: float) -> np.ndarray:
    return ((ROW - row) / height) ** 2 + ((COL - col) / width) ** 2 <= 1


BODY, RIGHT, LEFT = disk(80, 80, 55, 74), disk(80, 44, 38, 24), disk(80, 116, 38, 24)
HEART = disk(90, 80, 20, 10)
TRACHEA = disk(50, 80, 5, 5)


def thorax(*, noise: float = 30.0, seed: int = 0) -> np.ndarray:
    image = np.full((SIZE, SIZE), -1000.0)
    image[BODY] = 40
    image[RIGHT | LEFT] = -850
    image[TRACHEA] = -1000
    image[148, 30:130] = 100  # table
    image += np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.maximum(image, -1024).astype(np.float32)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_the_window_maps_its_ends_to_the_ends_of_eight_bits() -> None:
    hu = np.array([-3024, -1024, 800, 3000])
    assert window_to_uint8(hu).tolist() == [0, 0, 255, 255]
    assert window_to_uint8(hu).dtype == np.uint8


def test_the_window_is_undone_to_half_a_step_and_every_step_exactly() -> None:
    hu = np.arange(-1024, 801)
    assert np.abs(uint8_to_hu(window_to_uint8(hu)) - hu).max() <= 1824 / 255 / 2 + 1e-3
    steps = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(window_to_uint8(uint8_to_hu(steps)), steps)


def test_bands_meet_at_the_hu_that_the_thesis_gives_twice() -> None:
    hu = np.array([[-1024, -401, -400, -1, 0, 199, 200, 3000]], np.float32)
    assert semantic_map(hu)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_nodules_override_the_lung_and_the_lung_the_bands() -> None:
    image = thorax()
    image[disk(80, 44, 3, 3)] = 60  # a vessel
    nodule = np.zeros((SIZE, SIZE), np.uint8)
    nodule[60:64, 110:114], nodule[80:84, 110:114], nodule[20:24, 80:84] = 5, 6, 7
    label = semantic_map(image, nodule, SPACING)
    np.testing.assert_array_equal(label[nodule > 0], nodule[nodule > 0])
    assert (label[disk(80, 44, 3, 3)] == LABELS["lung"]).all()
    assert set(np.unique(label)) <= set(LABELS.values())
    assert label.dtype == np.uint8


def test_specks_of_background_are_body_and_larger_air_is_not() -> None:
    image = np.full((20, 20), 40, np.float32)
    image[5, 5:9] = -500
    image[10:14, 10:14] = -1000
    image[0, 3] = -500
    label = semantic_map(image, None, (1.0, 1.0))
    assert (label[5, 5:9] == LABELS["body"]).all()
    assert (label[10:14, 10:14] == LABELS["background"]).all()
    assert label[0, 3] == LABELS["background"]


def test_a_wrong_nodule_label_or_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds \[4\]; allowed are 0, 5, 6 and 7"):
        semantic_map(thorax(), np.full((SIZE, SIZE), 4, np.uint8))
    with pytest.raises(ValueError, match=r"shape \(3, 3\), the image \(160, 160\)"):
        semantic_map(thorax(), np.zeros((3, 3), np.uint8))


def test_kmeans_agrees_with_lloyds_algorithm_on_the_values_themselves() -> None:
    values = np.concatenate(
        [np.random.default_rng(0).normal(-800, 80, 4000), np.random.default_rng(1).normal(30, 60, 9000)]
    )
    centres = np.array([-850.0, 50.0])
    for _ in range(50):
        nearest = np.abs(values[:, None] - centres).argmin(1)
        centres = np.array([values[nearest == k].mean() for k in (0, 1)])
    assert two_means_threshold(values) == pytest.approx(centres.mean(), abs=2)


def test_lungs_of_known_shape_are_found_and_the_trachea_is_none() -> None:
    mask = lung_mask(thorax(), SPACING)
    assert dice(mask, RIGHT | LEFT) > 0.985
    assert not mask[TRACHEA].any()


@pytest.mark.parametrize("noise", [0.0, 60.0])
def test_noise_does_not_move_the_lungs(noise: float) -> None:
    assert dice(lung_mask(thorax(noise=noise), SPACING), RIGHT | LEFT) > 0.98


def test_the_boundary_is_that_of_filled_marching_squares() -> None:
    """Pixels within marching-squares contours at a level are those below it."""
    field = thorax(noise=0)[60:100, 15:75]
    inside = np.zeros(np.add(field.shape, 2), bool)
    for line in find_contours(np.pad(field, 1, constant_values=100), -405.0):
        inside[polygon(line[:, 0], line[:, 1], inside.shape)] ^= True
    np.testing.assert_array_equal(inside[1:-1, 1:-1], field < -405.0)


def test_the_heart_between_touching_lungs_is_not_lung() -> None:
    image = thorax(noise=0)
    image[disk(80, 80, 40, 30)] = -850  # the lungs meet in front of it and behind it
    image[HEART] = 40
    mask = lung_mask(image, SPACING)
    assert not mask[disk(90, 80, 17, 7)].any()
    assert mask[disk(80, 44, 30, 18)].all()


def test_the_field_of_view_may_cut_the_patient_and_the_lung() -> None:
    image = thorax()[:, 40:]
    mask = lung_mask(image, SPACING)
    assert dice(mask, (RIGHT | LEFT)[:, 40:]) > 0.97
    assert not body_mask(image, SPACING)[0, :5].any()


@pytest.mark.parametrize("gas", [None, -1000.0])
def test_a_slice_without_lungs_has_none(gas: float | None) -> None:
    image = thorax()
    image[RIGHT | LEFT | TRACHEA] = 40
    if gas is not None:
        image[disk(60, 60, 8, 14)] = gas
    assert not lung_mask(image, SPACING).any()
    assert not lung_mask(np.full((SIZE, SIZE), -1024, np.float32), SPACING).any()
    assert not lung_mask(np.full((SIZE, SIZE), 40, np.float32), SPACING).any()


def test_the_whole_scan_tells_bowel_from_lung_where_a_slice_cannot() -> None:
    """Stool and gas with the HU of lung, below a diaphragm of a few slices."""
    chest = [thorax(seed=k) for k in range(6)]
    belly = []
    for k in range(6):
        image = thorax(seed=10 + k)
        image[RIGHT | LEFT | TRACHEA] = 40
        image[disk(60, 60, 5, 8)] = -800
        belly.append(image)
    solid = np.where(BODY, 40, -1000).astype(np.float32)
    scan = [*belly, solid, solid, *chest]
    prior = LungPrior(scan, (2.5, *SPACING))
    shape = (SIZE, SIZE)
    assert lung_mask(scan[2], SPACING).any()
    assert not lung_mask(scan[2], SPACING, prior.on_slice(2, shape)).any()
    assert dice(lung_mask(scan[-1], SPACING, prior.on_slice(len(scan) - 1, shape)), RIGHT | LEFT) > 0.985
    assert not (prior.on_slice(len(scan) - 1, shape) & ~(RIGHT | LEFT)).any()


def test_a_pixel_size_does_not_decide_what_lung_is() -> None:
    fine = thorax(noise=0).repeat(2, 0).repeat(2, 1)
    mask = lung_mask(fine, (1.0, 1.0))
    assert dice(mask, (RIGHT | LEFT).repeat(2, 0).repeat(2, 1)) > 0.985


def test_real_slices_have_lungs_where_a_thorax_has_them(test_data: Path) -> None:
    paths = sorted((test_data / "lidc_dicom" / "LIDC-IDRI-0001").rglob("1-*.dcm"))
    slices = [f for f in (inspect_file(str(p)) for p in paths) if hasattr(f, "sop_uid")]
    series = order_series(slices)
    images = [read_hu(s) for s in series.slices[::4]]
    prior = LungPrior(images, (10.0, *series.spacing[1:]))
    pixel = series.spacing[1] * series.spacing[2] / 100
    areas = []
    for z in (0, 2, 12, 19, 23, 33):
        label = semantic_map(images[z], None, series.spacing[1:], prior=prior.on_slice(z, series.shape))
        assert set(np.unique(label)) <= {0, 1, 2, 3, 4}
        areas.append(float((label == LABELS["lung"]).sum()) * pixel)
        median = np.median(images[z][label == LABELS["lung"]]) if areas[-1] else -850
        assert -950 < median < -700
    kidney, gas, base, hilum, arch, neck = areas
    assert kidney == gas == neck == 0
    assert min(base, hilum, arch) > 100  # cm^2

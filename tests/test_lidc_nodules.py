# SPDX-License-Identifier: Apache-2.0
"""Outlines to masks, readings to nodules: closed forms, and the published segmentation of a real reading."""

from __future__ import annotations

from math import gcd
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lidc_files import RATINGS, message_xml, nodule_xml, roi_xml, sop_uid, square

from monai_synth.data.lidc_nodules import (
    BoxMask,
    Nodule,
    consensus_mask,
    distance,
    join_nodules,
    join_readings,
    nodules_on_slice,
    overlap,
    rasterise,
    region,
    slice_areas,
)
from monai_synth.data.lidc_series import Series, inspect_file, order_series
from monai_synth.data.lidc_xml import LidcReading, Roi, parse_lidc_xml, read_lidc_xml

SHAPE = (32, 32)
SPACING = (2.0, 1.0, 1.0)


def roi(xy: list[tuple[int, int]], *, inclusion: bool = True) -> Roi:
    return Roi(0.0, "u", inclusion, tuple(xy))


def drawn(*rois: Roi) -> np.ndarray:
    mask = rasterise(rois, dict.fromkeys(range(len(rois)), 0), SHAPE)
    return np.zeros(SHAPE, bool) if mask is None else mask.on((0, 0, 0), (1, *SHAPE))[0]


def box(z: int, row: int, col: int, shape: tuple[int, int, int] = (1, 4, 4)) -> BoxMask:
    return BoxMask((z, row, col), np.ones(shape, bool))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(2, 14), min_size=5, max_size=24))
def test_the_pixels_inside_any_outline_are_as_many_as_picks_theorem_says(radii: list[int]) -> None:
    """Interior lattice points of a simple lattice polygon: area - border points / 2 + 1."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    x = np.rint(16 + radii * np.cos(angles)).astype(int)
    y = np.rint(16 + radii * np.sin(angles)).astype(int)
    edges = list(zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True))
    turns = [(a - 16) * (d - 16) - (c - 16) * (b - 16) for a, b, c, d in edges]
    assume(min(turns) > 0)  # else rounding folded it over
    border = sum(gcd(int(c - a), int(d - b)) for a, b, c, d in edges)
    double_area = sum(int(a * d - c * b) for a, b, c, d in edges)
    _, _, inside = region(list(zip(x.tolist(), y.tolist(), strict=True)))
    assert 2 * inside.sum() == double_area - border + 2


@pytest.mark.parametrize("side", [1, 2, 5])
def test_an_outline_encloses_exactly_what_it_runs_around(side: int) -> None:
    expected = np.zeros(SHAPE, bool)
    expected[7 : 7 + side, 9 : 9 + side] = True
    np.testing.assert_array_equal(drawn(roi(square(7, 9, side))), expected)


def test_corners_alone_give_the_same_mask_as_every_border_pixel() -> None:
    corners = [(8, 6), (12, 6), (12, 10), (8, 10)]
    np.testing.assert_array_equal(drawn(roi(corners)), drawn(roi(square(7, 9, 3))))


@pytest.mark.parametrize("xy", [[(5, 5)], [(5, 5), (6, 5)], [(5, 5), (6, 5), (7, 5), (6, 5)], [(5, 5), (9, 9), (5, 5)]])
def test_a_point_and_an_outline_one_pixel_wide_enclose_nothing(xy: list[tuple[int, int]]) -> None:
    assert not drawn(roi(xy)).any()


@pytest.mark.parametrize("hole_first", [False, True])
def test_a_hole_removes_its_inside_and_keeps_its_border(hole_first: bool) -> None:
    rois = [roi(square(5, 5, 7)), roi([(8, 7), (9, 8), (8, 9), (7, 8)], inclusion=False)]
    mask = drawn(*(rois[::-1] if hole_first else rois))
    assert mask.sum() == 7 * 7 - 1
    assert not mask[8, 8]


def test_two_pieces_in_one_slice_are_united() -> None:
    mask = drawn(roi(square(5, 5, 3)), roi(square(6, 6, 3)), roi(square(20, 20, 2)))
    assert mask.sum() == 9 + 9 - 4 + 4


def test_what_is_drawn_beyond_the_image_is_cut_off() -> None:
    assert drawn(roi(square(-2, 30, 4))).sum() == 2 * 2
    assert not drawn(roi(square(40, 40, 4))).any()


def test_overlap_and_distance_are_those_of_the_voxels() -> None:
    a = box(0, 0, 0)
    assert overlap(a, box(0, 2, 0)) == 0.5
    assert distance(a, box(0, 2, 0), SPACING) == 0
    assert distance(a, box(1, 0, 0), SPACING) == 2.0
    assert distance(a, box(1, 3 + 2, 3 + 1), SPACING) == 3.0  # one slice, two rows, one column apart
    assert distance(a, box(50, 0, 0), SPACING) == 100.0


def test_readings_that_overlap_or_are_a_slice_apart_mean_one_nodule() -> None:
    masks = [box(0, 0, 0), box(0, 20, 20), box(0, 2, 2), box(1, 20, 20), box(4, 20, 20)]
    assert join_readings(masks, [0, 0, 1, 1, 2], SPACING) == [[0, 2], [1, 3], [4]]


def test_no_reader_reads_a_nodule_twice_when_nodules_touch() -> None:
    """Two neighbours drawn by both readers, each reading nearer to its partner."""
    masks = [box(0, 0, 0), box(0, 0, 5), box(0, 0, 1), box(0, 0, 6)]
    assert join_readings(masks, [0, 0, 1, 1], SPACING) == [[0, 2], [1, 3]]


def test_the_groups_do_not_depend_on_the_order_of_the_readings() -> None:
    rng = np.random.default_rng(0)
    masks = [box(int(z), *rng.integers(0, 24, 2).tolist()) for z in rng.integers(0, 3, 20)]
    readers = [i % 4 for i in range(20)]
    order = rng.permutation(20).tolist()
    groups = {frozenset(g) for g in join_readings(masks, readers, SPACING)}
    shuffled = join_readings([masks[i] for i in order], [readers[i] for i in order], SPACING)
    assert {frozenset(order[i] for i in g) for g in shuffled} == groups


def test_pieces_that_one_reader_drew_apart_count_as_one_drawing() -> None:
    whole, left, right = box(0, 0, 0, (1, 4, 9)), box(0, 0, 0), box(0, 0, 5)
    assert join_readings([whole, left, right], [0, 1, 1], SPACING) == [[0, 1, 2]]
    mask = consensus_mask([whole, left, right], [0, 1, 1], 1.0)
    assert mask is not None
    assert mask.voxels.sum() == 32  # the column between the pieces has one vote of two


@pytest.mark.parametrize(("num_readers", "needed"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_half_of_the_readers_who_drew_it_is_enough(num_readers: int, needed: int) -> None:
    """Reader k draws the first k + 1 columns, so column j has num_readers - j votes."""
    masks = [box(0, 0, 0, (1, 1, k + 1)) for k in range(num_readers)]
    mask = consensus_mask(masks, range(num_readers), 0.5)
    assert mask is not None
    assert mask.voxels.shape == (1, 1, num_readers - needed + 1)


def join(*sessions: str) -> object:
    reading = parse_lidc_xml(message_xml(1, sessions).encode())
    slices = {sop_uid(1, z): z for z in range(10)}
    return join_nodules(reading, slices, [-100 + 2 * z for z in range(10)], SHAPE, SPACING)


def test_ratings_are_the_higher_median_over_the_readers() -> None:
    def reader(malignancy: int) -> str:
        return nodule_xml(roi_xml(1, 3, square(5, 5, 4)), RATINGS | {"malignancy": malignancy})

    assert join(reader(2), reader(3)).nodules[0].ratings["malignancy"] == 3
    assert join(reader(1), reader(2), reader(5), reader(2)).nodules[0].ratings["malignancy"] == 2
    nodule = join(reader(0), reader(5)).nodules[0]  # a reader without a valid rating does not vote
    assert (nodule.ratings["malignancy"], nodule.num_readers, nodule.label) == (5, 2, 7)


def test_what_cannot_become_a_nodule_is_counted() -> None:
    point = nodule_xml(roi_xml(1, 3, [(5, 5)]), None)
    line = nodule_xml(roi_xml(1, 3, [(5, 5), (6, 5), (7, 5)]))
    unrated = nodule_xml(roi_xml(1, 3, square(5, 5, 4)), None)
    elsewhere = nodule_xml(roi_xml(2, 3, square(5, 5, 4)))
    joined = join(point, line, unrated, elsewhere)
    assert joined.nodules == ()
    assert (joined.num_small, joined.num_empty, joined.num_unrated, joined.num_outside) == (1, 1, 1, 1)


def test_an_outline_without_slice_identifier_goes_by_its_position() -> None:
    text = nodule_xml(roi_xml(1, 3, square(5, 5, 4))).replace(sop_uid(1, 3), "")
    assert join(text).nodules[0].mask.start == (3, 5, 5)


def test_map_and_table_of_a_slice_agree() -> None:
    sessions = [
        nodule_xml(roi_xml(1, 3, square(5, 5, 4)), RATINGS | {"malignancy": 1}, "a")
        + nodule_xml(roi_xml(1, 3, square(20, 20, 2)), RATINGS | {"malignancy": 5}, "too small"),
    ]
    nodules = join(*sessions).nodules
    assert slice_areas(nodules, 5).tolist() == [[0, 0, 0, 16, 0], [0, 0, 0, 4, 0]]
    label, table = nodules_on_slice(nodules, 3, SHAPE, 8)
    assert np.unique(label).tolist() == [0, 5]
    (row,) = table
    assert row["area"] == (label == 5).sum() == 16
    assert (row["center"], row["bbox"], row["malignant"]) == ([6.5, 6.5], [5, 5, 9, 9], 0)
    assert nodules_on_slice(nodules, 3, SHAPE, 1)[0][20, 20] == 7


def test_a_pixel_of_two_nodules_goes_to_the_one_more_readers_drew() -> None:
    first = nodule_xml(roi_xml(1, 3, square(5, 5, 6)), RATINGS | {"malignancy": 1}, "a")
    second = nodule_xml(roi_xml(1, 3, square(5, 10, 6)), RATINGS | {"malignancy": 5}, "b")
    nodules = join(first + second, second).nodules
    label, table = nodules_on_slice(nodules, 3, SHAPE, 8)
    assert {row["label"]: row["area"] for row in table} == {5: 30, 7: 36}
    assert [(label == row["label"]).sum() for row in table] == [row["area"] for row in table]


def test_what_another_nodule_leaves_of_one_is_not_drawn_where_it_is_too_small() -> None:
    large, small = Nodule(box(3, 5, 6, (1, 6, 6)), 2, RATINGS), Nodule(box(3, 5, 5, (1, 6, 6)), 1, RATINGS)
    label, table = nodules_on_slice([large, small], 3, SHAPE, 8)
    assert [row["area"] for row in table] == [36]
    assert (label > 0).sum() == 36


def real_scan(test_data: Path, patient: str) -> tuple[Series, LidcReading, dict[str, int]]:
    paths = sorted((test_data / "lidc_dicom" / patient).rglob("*"))
    slices = [f for f in (inspect_file(str(p)) for p in paths if p.suffix == ".dcm") if hasattr(f, "sop_uid")]
    series = order_series(slices)
    reading = read_lidc_xml(next(p for p in paths if p.suffix == ".xml"))
    return series, reading, {s.sop_uid: i for i, s in enumerate(series.slices)}


def test_a_reading_equals_its_published_segmentation_voxel_for_voxel(test_data: Path) -> None:
    series, reading, slices = real_scan(test_data, "LIDC-IDRI-0001")
    path = next((test_data / "lidc_dicom" / "LIDC-IDRI-0001").rglob("3000567*/*.dcm"))
    published = pydicom.dcmread(path)
    volume = np.zeros((len(series.slices), *series.shape), bool)
    for frame, groups in zip(published.pixel_array, published.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        volume[slices[source]] |= frame.astype(bool)
    nodule = next(n for n in reading.sessions[0].nodules if not n.is_small)
    mask = rasterise(nodule.rois, {i: slices[r.sop_uid] for i, r in enumerate(nodule.rois)}, series.shape)
    assert mask is not None
    np.testing.assert_array_equal(mask.on((0, 0, 0), volume.shape), volume)
    assert volume.sum() == 5905


def test_four_readers_of_one_real_nodule_become_one(test_data: Path) -> None:
    series, reading, slices = real_scan(test_data, "LIDC-IDRI-0001")
    positions = [s.position[2] for s in series.slices]
    (nodule,) = join_nodules(reading, slices, positions, series.shape, series.spacing).nodules
    assert nodule.num_readers == 4
    assert (nodule.ratings["malignancy"], nodule.label) == (5, 7)  # rated 5, 5, 5, 4


def test_a_real_nodule_drawn_by_two_readers_is_kept_where_either_drew_it(test_data: Path) -> None:
    series, reading, slices = real_scan(test_data, "LIDC-IDRI-0002")
    positions = [s.position[2] for s in series.slices]
    joined = join_nodules(reading, slices, positions, series.shape, series.spacing)
    (nodule,) = joined.nodules
    assert nodule.num_readers == 2
    drawings = []
    for session in reading.sessions:
        for n in (n for n in session.nodules if not n.is_small):
            where = {i: slices[r.sop_uid] for i, r in enumerate(n.rois) if r.sop_uid in slices}
            drawings.append(rasterise(n.rois, where, series.shape).on((0, 0, 0), (12, *series.shape)))
    assert len(drawings) == 2
    np.testing.assert_array_equal(nodule.mask.on((0, 0, 0), (12, *series.shape)), drawings[0] | drawings[1])
    assert (drawings[0] != drawings[1]).any()

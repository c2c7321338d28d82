# SPDX-License-Identifier: Apache-2.0
"""The phantom's files are valid, deterministic and true to what they say, and its nodules look as rated."""

from __future__ import annotations

import errno
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import (
    binary_closing,
    binary_dilation,
    binary_erosion,
    binary_fill_holes,
    distance_transform_edt,
    gaussian_filter,
    label,
)
from skimage.draw import polygon
from skimage.measure import perimeter, regionprops

from monai_synth.data import phantom
from monai_synth.data.lidc import prepare_lidc
from monai_synth.data.lidc_xml import read_lidc_xml
from monai_synth.data.phantom import PADDING_HU, PhantomPatient, phantom_patient, write_phantom
from monai_synth.data.phantom_nodules import RATING_MAX, RATINGS, outer_border, paint_nodule, shape_nodule
from monai_synth.data.phantom_shapes import Grid
from monai_synth.errors import UserError

SMALL = {"num_patients": 2, "num_slices": 8, "matrix": 64, "num_workers": 1, "progress": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("phantom") / "out", **SMALL)


@pytest.fixture(scope="module")
def patients() -> list[PhantomPatient]:
    return [phantom_patient(0, index, num_slices=12, matrix=128) for index in range(1, 7)]


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def plain_ratings(**changed: int) -> dict[str, int]:
    smooth = dict.fromkeys(RATINGS, 5) | {"internal_structure": 1, "calcification": 6}
    return smooth | {"lobulation": 1, "spiculation": 1, "malignancy": 3} | changed


class TestFiles:
    def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(self, written: Path, tmp_path: Path):
        again = write_phantom(tmp_path / "again", **SMALL)
        other = write_phantom(tmp_path / "other", **SMALL | {"seed": 1})
        assert files(again) == files(written)
        assert not set(files(other).values()) & set(files(written).values())
        planes = [pydicom.dcmread(next(root.rglob("1-004.dcm"))).pixel_array for root in (written, other)]
        assert np.abs(planes[0] - planes[1]).mean() > 20

    def test_worker_processes_and_the_number_of_patients_do_not_change_a_patient(self, written: Path, tmp_path: Path):
        more = write_phantom(tmp_path / "more", **SMALL | {"num_patients": 3, "num_workers": 2})
        assert files(written).items() < files(more).items()

    def test_every_series_has_its_slices_and_one_xml_in_a_folder_of_its_own(self, written: Path):
        for index in (1, 2):
            (series,) = (written / f"PHANTOM-{index:04d}").glob("*/*")
            names = sorted(p.name for p in series.iterdir())
            assert names == sorted([f"{index:03d}.xml", *(f"1-{k:03d}.dcm" for k in range(1, 9))])

    def test_read_back_the_slices_hold_the_patient_in_hu(self, written: Path):
        patient = phantom_patient(0, 2, num_slices=8, matrix=64)
        (series,) = (written / "PHANTOM-0002").glob("*/*")
        for k in range(8):
            d = pydicom.dcmread(series / f"1-{k + 1:03d}.dcm")
            stored = d.pixel_array
            assert stored.dtype == np.int16
            np.testing.assert_array_equal(
                stored.astype(int) * int(d.RescaleSlope) + int(d.RescaleIntercept), patient.image_hu[k]
            )
            assert (d.Modality, d.SOPClassUID) == ("CT", pydicom.uid.CTImageStorage)
            assert float(d.ImagePositionPatient[2]) == pytest.approx(patient.z_mm[k], abs=1e-5)
            assert [float(v) for v in d.PixelSpacing] == pytest.approx(patient.spacing_mm[1:], abs=1e-5)
            assert float(d.SliceThickness) == 2.5 == patient.spacing_mm[0]
            assert stored[0, 0] == d.PixelPaddingValue
        assert np.diff(patient.z_mm) == pytest.approx(-2.5)

    def test_no_name_no_date_and_no_uid_of_a_person_is_in_the_files(self, written: Path):
        uids = []
        for path in written.rglob("*.dcm"):
            d = pydicom.dcmread(path)
            for element in [*d, *d.file_meta]:
                if element.VR == "PN":
                    assert element.value in ("", d.PatientID)
                if element.VR in ("DA", "TM", "DT"):
                    assert not element.value
                if element.VR == "UI" and not str(element.value).startswith("1.2.840.10008."):
                    assert str(element.value).startswith("2.25.")
                    assert len(element.value) <= 64
            uids.append(d.SOPInstanceUID)
        assert len(set(uids)) == len(uids) == 16
        for path in written.rglob("*.xml"):
            assert "1.3.6.1" not in path.read_text()

    def test_the_xml_says_what_the_readers_marked(self, written: Path):
        patient = phantom_patient(0, 1, num_slices=8, matrix=64)
        (path,) = (written / "PHANTOM-0001").rglob("*.xml")
        read = read_lidc_xml(path)
        assert len(read.sessions) == len(patient.readings) == 4
        for got, made in zip(read.sessions, patient.readings, strict=True):
            assert len(got.nodules) == len(made)
            for nodule, reading in zip(got.nodules, made, strict=True):
                assert {k: v for k, v in nodule.ratings.items() if v is not None} == reading.ratings
                outlines = [o for _, o in sorted(reading.contours.items(), reverse=True)]
                opened = [o[:-1] if len(o) > 1 else o for o in outlines]  # the import drops the closing point
                assert [[(r, c) for c, r in roi.xy] for roi in nodule.rois] == opened


class TestAnatomy:
    def test_tissues_have_the_densities_of_a_ct(self):
        for index in (1, 2, 5):
            p = phantom_patient(0, index, num_slices=4, matrix=256)
            hu = p.image_hu.astype(float)
            lung = binary_erosion(p.lung & (p.nodule_map == 0), np.ones((1, 9, 9)))
            assert -900 < np.median(hu[lung]) < -800
            air = (hu > PADDING_HU) & (np.arange(256)[:, None] < 12)
            assert -1024 <= hu[air].mean() < -980
            for k in range(4):
                body = binary_fill_holes(binary_closing(gaussian_filter(hu[k], 1) > -300, iterations=2))
                parts, _ = label(body)
                body = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
                depth = distance_transform_edt(body) * p.spacing_mm[1]
                assert -130 < np.percentile(hu[k][(depth > 3.5) & (depth < 6)], 30) < -70  # under the skin
                inside = hu[k][(depth > 10) & ~p.lung[k]]
                soft = inside[(inside > 0) & (inside < 120)]
                assert 30 < np.median(soft) < 75
                assert 300 < np.percentile(inside, 99) < 800  # bone
                assert 0.02 < np.mean(inside > 200) < 0.3

    def test_patients_together_span_the_lungs_from_apex_to_base(self):
        tops = [phantom_patient(0, i, num_slices=4, matrix=64).z_mm[0] for i in range(1, 25)]
        assert max(tops) > 70
        assert min(tops) < -85
        assert max(np.diff(sorted(tops))) < 35

    def test_both_lungs_lie_in_every_slice(self, patients: list[PhantomPatient]):
        for p in patients:
            for plane in p.lung:
                assert 0.05 < plane[:, :64].mean() < 0.5
                assert 0.05 < plane[:, 64:].mean() < 0.5

    def test_padding_fills_what_the_scanner_does_not_see(self, patients: list[PhantomPatient]):
        axis = np.arange(128) - 63.5
        outside = np.hypot(axis[:, None], axis[None]) > 64
        for p in patients:
            assert (p.image_hu[:, outside] == PADDING_HU).all()
            assert p.image_hu[:, ~outside].min() >= -1024


class TestNodules:
    def test_every_patient_has_two_to_five_in_the_lungs(self, patients: list[PhantomPatient]):
        for p in patients:
            assert 2 <= len(p.nodules) <= 5
            assert set(np.unique(p.nodule_map)) == set(range(len(p.nodules) + 1))
            assert p.lung[p.nodule_map > 0].all()

    def test_volume_grows_with_malignancy(self):
        grid = Grid(24, 256, 30.0)
        mean = []
        for malignancy in range(1, 6):
            rng = np.random.default_rng(malignancy)
            rated = plain_ratings(malignancy=malignancy)
            shapes = [shape_nodule(grid, np.zeros(3), rated, rng) for _ in range(12)]
            mean.append(np.mean([(s.surface < 0).sum() for s in shapes]))
        assert all(b > 1.3 * a for a, b in pairwise(mean))

    def _middle(self, seed: int, **ratings: int) -> np.ndarray:
        grid = Grid(24, 256, 30.0)
        rng = np.random.default_rng(seed)
        nodule = shape_nodule(grid, np.zeros(3), plain_ratings(**ratings), rng, diameter_mm=24.0)
        parts, _ = label(nodule.surface[nodule.surface.shape[0] // 2] < 0)
        return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])

    def test_spiculation_lengthens_the_outline_for_its_area(self):
        def jag(spiculation: int) -> float:
            masks = [self._middle(s, spiculation=spiculation) for s in range(10)]
            return float(np.mean([perimeter(m) ** 2 / m.sum() for m in masks]))

        assert jag(1) < 1.05 * 4 * np.pi < 1.05 * jag(3) < jag(5)

    def test_lobulation_dents_the_outline(self):
        def solid(lobulation: int) -> float:
            masks = [self._middle(s, lobulation=lobulation) for s in range(10)]
            return float(np.mean([regionprops(m.astype(int))[0].solidity for m in masks]))

        assert solid(1) > solid(3) + 0.005 > solid(5) + 0.01

    def test_sphericity_stretches_and_texture_sets_the_density(self):
        def longish(sphericity: int) -> float:
            masks = [self._middle(s, sphericity=sphericity) for s in range(10)]
            return float(np.mean([regionprops(m.astype(int))[0].eccentricity for m in masks]))

        assert longish(5) < 0.35 < longish(1)
        grid, means = Grid(24, 128, 30.0), []
        for texture in range(1, 6):
            hu = np.full(grid.shape, -860.0, dtype=np.float32)
            rng = np.random.default_rng(0)
            nodule = shape_nodule(grid, np.zeros(3), plain_ratings(texture=texture), rng, diameter_mm=20.0)
            paint_nodule(hu, np.full(grid.shape, -9.0), nodule, grid, rng)
            means.append(hu[nodule.box][nodule.surface < 0].mean())
        assert means == sorted(means)
        assert -700 < means[0] < -500
        assert -60 < means[4] < 60


class TestReaders:
    def test_four_readers_and_at_most_one_misses_a_nodule(self, patients: list[PhantomPatient]):
        missed = 0
        for p in patients:
            assert len(p.readings) == len(p.others) == 4
            large = [sum(bool(r.ratings) for r in reader) for reader in p.readings]
            assert 3 * len(p.nodules) <= sum(large) <= 4 * len(p.nodules)
            missed += 4 * len(p.nodules) - sum(large)
            for reading in (r for reader in p.readings for r in reader):
                if not reading.ratings:
                    assert [len(o) for o in reading.contours.values()] == [1]
        assert missed

    def test_ratings_are_in_range_and_scatter_around_the_truth(self, patients: list[PhantomPatient]):
        steps: Counter[int] = Counter()
        for p in patients:
            for reading in (r for reader in p.readings for r in reader if r.ratings):
                assert all(1 <= reading.ratings[n] <= RATING_MAX[n] for n in RATINGS)
                k, outline = next(iter(reading.contours.items()))
                mask = filled(outline, p.image_hu.shape[1:])
                found = np.bincount(p.nodule_map[k][mask], minlength=1 + len(p.nodules))[1:]
                if found.any():
                    truth = p.nodules[int(np.argmax(found))].ratings
                    steps[reading.ratings["malignancy"] - truth["malignancy"]] += 1
        assert set(steps) == {-1, 0, 1}
        assert steps[0] > steps[1] + steps[-1]

    def test_what_most_readers_outline_is_the_nodule(self, patients: list[PhantomPatient]):
        for p in patients:
            votes = np.zeros(p.nodule_map.shape, dtype=int)
            for reading in (r for reader in p.readings for r in reader if r.ratings):
                for k, outline in reading.contours.items():
                    votes[k] += filled(outline, votes.shape[1:])
            joint, truth = votes >= 2, p.nodule_map > 0
            assert 2 * (joint & truth).sum() / (joint.sum() + truth.sum()) > 0.85


def filled(outline: list[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
    """Pixels strictly inside an outline, by filling the drawn curve rather than by its polygon."""
    curve = np.zeros(shape, dtype=bool)
    curve[tuple(np.array(outline).T)] = True
    return binary_fill_holes(curve) & ~curve


class TestOuterBorder:
    @settings(deadline=None, max_examples=60)
    @given(seed=st.integers(0, 10**6), smooth=st.sampled_from([0.0, 0.8, 1.5]), share=st.floats(0.05, 0.8))
    def test_is_a_closed_curve_just_outside_the_largest_part(self, seed: int, smooth: float, share: float):
        noise = gaussian_filter(np.random.default_rng(seed).normal(size=(16, 17)), smooth)
        mask = np.pad(noise > np.quantile(noise, 1 - share), 3)
        outline = outer_border(mask)
        assert outline[0] == outline[-1]
        assert np.abs(np.diff(np.array(outline), axis=0)).max(1).tolist() == [1] * (len(outline) - 1)
        parts, _ = label(mask)
        biggest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        assert not any(biggest[p] for p in outline)
        inside = filled(outline, mask.shape)
        assert (inside >= biggest).all()
        # Nothing is enclosed but the part, its holes, and notches too narrow for an outline.
        np.testing.assert_array_equal(inside, binary_erosion(binary_fill_holes(binary_dilation(biggest))))
        # The polygon that an import fills encloses the same pixels.
        rows, cols = np.array(outline).T
        area = np.zeros(mask.shape, dtype=bool)
        area[polygon(rows, cols, mask.shape)] = True
        area[rows, cols] = False
        np.testing.assert_array_equal(area, inside)

    def test_of_a_disc_encloses_the_disc_and_nothing_else(self):
        rows, cols = np.ogrid[-12:13, -12:13]
        for radius in (0.5, 1, 2.2, 3.7, 9):
            disc = rows**2 + cols**2 <= radius**2
            np.testing.assert_array_equal(filled(outer_border(disc), disc.shape), disc)

    def test_of_one_pixel_is_its_four_neighbours_and_of_nothing_is_nothing(self):
        mask = np.zeros((5, 5), dtype=bool)
        assert outer_border(mask) == []
        mask[2, 3] = True
        assert set(outer_border(mask)) == {(1, 3), (3, 3), (2, 2), (2, 4)}


class TestImport:
    def test_finds_the_nodules_and_lungs_that_were_drawn(self, tmp_path: Path):
        source = write_phantom(
            tmp_path / "in", num_patients=2, num_slices=10, matrix=128, num_workers=1, progress=False
        )
        made = prepare_lidc(
            source, tmp_path / "out", slice_fraction=1.0, splits=(1, 0, 0), num_workers=1, progress=False
        )
        assert made["source"]["num_scans"] == 2
        for index in (1, 2):
            p = phantom_patient(0, index, num_slices=10, matrix=128)
            window = np.clip((p.image_hu.astype(float) + 1024) / 1824, 0, 1) * 255
            cases = [c for c in made["training"] if c["patient_id"] == f"p{index:04d}"]
            got, want, lung_got, lung_want = [], [], [], []
            for case in cases:
                image = np.asarray(Image.open(tmp_path / "out" / case["image"])).astype(float)
                labels = np.asarray(Image.open(tmp_path / "out" / case["label"]))
                error = np.abs(window - image).max(axis=(1, 2))
                k = int(np.argmin(error))
                assert error[k] <= 1
                got.append(labels >= 5)
                want.append(p.nodule_map[k] > 0)
                lung_got.append(labels >= 4)
                lung_want.append(p.lung[k])
            assert dice(got, want) > 0.85
            assert dice(lung_got, lung_want) > 0.97
            numbers = {n["malignancy"] for c in cases for n in c["nodules"]}
            assert numbers <= {1, 2, 3, 4, 5}
            assert len(cases) >= 5


def dice(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    x, y = np.stack(a), np.stack(b)
    return float(2 * (x & y).sum() / (x.sum() + y.sum()))


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("num_patients", 0),
            ("num_patients", 10_000),
            ("num_slices", 3),
            ("num_slices", 2.5),
            ("matrix", 63),
            ("matrix", 513),
            ("matrix", True),
            ("seed", -1),
            ("num_workers", 0),
        ],
    )
    def test_an_argument_out_of_range_is_named_with_its_range(self, tmp_path: Path, name: str, value: object):
        with pytest.raises(UserError, match=rf"{name} is {value!r}; give a whole number from \d+ to \d+"):
            write_phantom(tmp_path / "out", **SMALL | {name: value})
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_with_content_or_a_file_is_left_alone(self, tmp_path: Path):
        (tmp_path / "mine.txt").write_text("mine")
        for out in (tmp_path, tmp_path / "mine.txt"):
            with pytest.raises(UserError, match="is not an empty folder"):
                write_phantom(out, **SMALL)
        assert files(tmp_path) == {"mine.txt": b"mine"}

    def test_an_empty_folder_may_be_filled(self, tmp_path: Path):
        (tmp_path / "out").mkdir()
        write_phantom(tmp_path / "out", **SMALL | {"num_patients": 1, "num_slices": 4})
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["PHANTOM-0001"]

    @pytest.mark.parametrize(
        ("failure", "expected"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), UserError),
            (KeyboardInterrupt(), KeyboardInterrupt),
        ],
    )
    def test_a_full_disk_or_ctrl_c_leaves_nothing_half_written(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        failure: BaseException,
        expected: type[BaseException],
    ):
        write = phantom.write_series

        def fail(*args, **kwargs):
            write(*args, **kwargs)
            raise failure

        monkeypatch.setattr(phantom, "write_series", fail)
        with pytest.raises(expected):
            write_phantom(tmp_path / "out", **SMALL)
        assert list(tmp_path.iterdir()) == []

# SPDX-License-Identifier: Apache-2.0
"""``prepare_lidc`` from a folder of DICOM and XML to a dataset on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lidc_files import (
    UID,
    ct_slice,
    message_xml,
    nodule_xml,
    other_dicom,
    reading_xml,
    rewrite,
    roi_xml,
    series_uid,
    square,
    write_series,
)
from PIL import Image

from monai_synth.data import lidc, lidc_scan
from monai_synth.data.datalist import load_datalist, read_dataset
from monai_synth.data.lidc import prepare_lidc, split_patients
from monai_synth.data.lidc_scan import evenly, select_slices
from monai_synth.data.semantic import FEATURES, LABELS
from monai_synth.data.whole_folder import partial_folder
from monai_synth.errors import UserError

QUIET = {"num_workers": 1, "progress": False}


def source_of(tmp_path: Path, num_patients: int = 3) -> Path:
    source = tmp_path / "SECRET source"
    for n in range(1, num_patients + 1):
        write_series(source / f"deep{n}" / "er", n, patient=f"SECRET-{n:04d}")
    return source


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def prepare(source: Path, out: Path, **options):
    return prepare_lidc(source, out, **(QUIET | options))


class TestDataset:
    def test_it_reads_back_with_nodules_that_the_label_maps_show(self, tmp_path: Path) -> None:
        content = prepare(source_of(tmp_path), tmp_path / "out", slice_fraction=0.5)
        assert read_dataset(tmp_path / "out", task="lidc").content == content
        assert (content["labels"], content["spatial_shape"]) == (LABELS, [40, 40])
        num_rows = 0
        for split in ("training", "validation", "test"):
            for case in load_datalist(tmp_path / "out", split):
                image, label = (np.asarray(Image.open(case[key])) for key in ("image", "label"))
                assert image.shape == label.shape == (40, 40)
                assert set(np.unique(label)) <= set(LABELS.values())
                drawn = {row["label"]: row["area"] for row in case["nodules"]}
                assert {v: int((label == v).sum()) for v in (5, 6, 7) if (label == v).any()} == drawn
                for row in case["nodules"]:
                    num_rows += 1
                    assert (row["num_readers"], row["area"], row["malignancy"], row["malignant"]) == (
                        2,
                        20,
                        5,
                        1,
                    )
                    assert set(FEATURES) <= set(row)
        assert num_rows == 6

    def test_the_counts_say_what_was_there(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        other_dicom("SEG").save_as(source / "seg.dcm")
        write_series(source / "no reading", 20, xml=None)
        write_series(source / "thick", 21)
        for path in (source / "thick").glob("*.bin"):
            rewrite(path, SliceThickness=5)
        (source / "elsewhere.xml").write_text(reading_xml(77))
        (source / "copy.xml").write_text(reading_xml(1))
        (source / "xray.xml").write_text(message_xml(5, [], root="IdriReadMessage"))
        (source / "notes.txt").write_text("hello")
        counts = prepare(source, tmp_path / "out")["source"]
        assert counts["skipped"] == {
            "not_ct": 1,
            "series_without_reading": 1,
            "series_too_thick": 1,
            "reading_without_series": 1,
            "copied_reading": 1,
            "xray_reading": 1,
            "no_dicom_or_xml": 1,
        }
        assert (counts["num_scans"], counts["num_slices_in_scans"], counts["num_slices"]) == (3, 30, 6)
        assert (counts["num_nodules"], counts["num_small_nodule_marks"], counts["bad"]) == (3, 3, {})

    def test_the_reading_may_lie_anywhere_below_the_source(self, tmp_path: Path) -> None:
        source = source_of(tmp_path, 1)
        (source / "xml").mkdir()
        shutil.move(next(source.rglob("reading.xml")), source / "xml" / "069.xml")
        assert prepare(source, tmp_path / "out")["source"]["num_scans"] == 1

    def test_the_same_source_gives_the_same_bytes(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        prepare(source, tmp_path / "a")
        prepare(source, tmp_path / "b")
        assert digests(tmp_path / "a") == digests(tmp_path / "b")

    @pytest.mark.slow
    def test_the_number_of_workers_does_not_change_a_byte(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        prepare(source, tmp_path / "a")
        prepare(source, tmp_path / "b", num_workers=3)
        assert digests(tmp_path / "a") == digests(tmp_path / "b")

    def test_no_identifier_and_no_date_reaches_the_output(self, tmp_path: Path) -> None:
        prepare(source_of(tmp_path), tmp_path / "out")
        for path in (tmp_path / "out").rglob("*"):
            content = path.read_bytes() if path.is_file() else b""
            for secret in (b"SECRET", UID.encode(), b"1999", b"Doe", b"reading.xml", str(tmp_path).encode()):
                assert secret not in content
                assert secret.decode() not in path.name

    def test_the_link_table_is_written_only_where_asked_and_outside(self, tmp_path: Path) -> None:
        source = source_of(tmp_path, 2)
        write_series(source / "second scan", 9, patient="SECRET-0001")
        prepare(source, tmp_path / "out", link_table=tmp_path / "link.csv")
        assert (tmp_path / "link.csv").read_text().splitlines() == [
            "patient_id,scan,PatientID,SeriesInstanceUID",
            f"p0001,s1,SECRET-0001,{series_uid(1)}",
            f"p0001,s2,SECRET-0001,{series_uid(9)}",
            f"p0002,s1,SECRET-0002,{series_uid(2)}",
        ]
        with pytest.raises(UserError, match="must stay free of identifiers"):
            prepare(source, tmp_path / "out2", link_table=tmp_path / "out2" / "link.csv")

    def test_a_real_scan_becomes_slices_with_its_nodule(self, test_data: Path, tmp_path: Path) -> None:
        content = prepare(test_data / "lidc_dicom" / "LIDC-IDRI-0002", tmp_path / "out", slice_fraction=0.3)
        (case,) = [c for c in content["training"] if c["case_id"] == "p0001-s1-z0002"]
        (row,) = case["nodules"]
        assert (row["num_readers"], row["malignancy"], row["label"]) == (2, 5, 7)
        label = np.asarray(Image.open(tmp_path / "out" / case["label"]))
        assert (label == 7).sum() == row["area"]
        assert 0.1 < (label == LABELS["lung"]).mean() < 0.4


class TestSelection:
    def test_nodule_slices_come_first_and_others_fill_the_quota_evenly(self) -> None:
        areas = np.zeros((1, 100), int)
        areas[0, 40:44] = 30
        chosen = select_slices(areas, 0.2, 8)
        assert len(chosen) == 20
        assert set(range(40, 44)) <= set(chosen)
        assert np.diff([z for z in chosen if not 40 <= z < 44]).max() <= 11

    def test_too_many_nodule_slices_are_thinned_evenly(self) -> None:
        areas = np.full((1, 100), 30)
        assert select_slices(areas, 0.1, 8) == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]

    def test_a_slice_with_less_than_the_smallest_area_is_neither(self) -> None:
        assert select_slices(np.array([[0, 7, 8, 7, 0]]), 1.0, 8) == [0, 2, 4]

    @pytest.mark.parametrize(("num_slices", "quota"), [(1, 1), (2, 1), (7, 1), (8, 2), (133, 27)])
    def test_the_quota_is_the_rounded_share_and_at_least_one(self, num_slices: int, quota: int) -> None:
        assert len(select_slices(np.zeros((0, num_slices), int), 0.2, 8)) == quota

    def test_even_places_differ_by_at_most_one(self) -> None:
        for num in range(1, 30):
            for wanted in range(1, num + 1):
                gaps = np.diff(evenly(num, wanted))
                assert len(set(evenly(num, wanted))) == wanted
                assert not len(gaps) or np.ptp(gaps) <= 1


class TestSplit:
    SPLITS = (0.86, 0.03, 0.11)

    def sizes(self, num: int, splits=SPLITS) -> tuple[int, ...]:
        split_of = split_patients([f"p{i:04d}" for i in range(num)], splits, 0)
        return tuple(list(split_of.values()).count(s) for s in ("training", "validation", "test"))

    def test_every_patient_is_in_one_split_of_the_wanted_size(self) -> None:
        assert self.sizes(1000) == (860, 30, 110)

    @pytest.mark.parametrize(("num", "sizes"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (9, (7, 1, 1))])
    def test_few_patients_still_train_first(self, num: int, sizes: tuple[int, ...]) -> None:
        assert self.sizes(num) == sizes

    def test_a_share_of_zero_stays_empty(self) -> None:
        assert self.sizes(10, (0.8, 0.0, 0.2)) == (8, 0, 2)

    def test_the_seed_decides_and_nothing_else(self) -> None:
        patients = [f"p{i:04d}" for i in range(50)]
        split_of = split_patients(patients, self.SPLITS, 3)
        assert split_patients(patients[::-1], self.SPLITS, 3) == split_of
        assert split_patients(patients, self.SPLITS, 4) != split_of

    def test_all_scans_of_a_patient_are_in_one_split(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        write_series(source / "second scan", 9, patient="SECRET-0001")
        content = prepare(source, tmp_path / "out")
        splits = ("training", "validation", "test")
        groups = [{c["patient_id"] for c in content[s]} for s in splits]
        assert sum(len(g) for g in groups) == len(set.union(*groups)) == 3


class TestRefusal:
    def message(self, source: Path, out: Path, **options) -> str:
        with pytest.raises(UserError) as caught:
            prepare(source, out, **options)
        assert not out.exists() or digests(out) == getattr(self, "before", digests(out))
        assert not partial_folder(out).exists()
        return str(caught.value)

    def test_everything_unusable_is_listed_at_once_and_nothing_written(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        bad = ct_slice(1, 0)
        bad.PhotometricInterpretation = "MONOCHROME1"
        bad.save_as(source / "deep1" / "er" / "000-x.bin")
        (source / "deep2" / "er" / "000-x.bin").unlink()
        (source / "deep2" / "er" / "001-x.bin").unlink()
        (source / "broken.xml").write_text("<LidcReadMessage")
        (source / "short.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\2\0")
        message = self.message(source, tmp_path / "out")
        assert "4 unusable file(s) or series, so nothing is written" in message
        for part in ("MONOCHROME1", "missing slice", "broken.xml: is no well-formed XML", "short.dcm: "):
            assert part in message

    def test_skip_bad_prepares_the_rest_and_counts_the_bad_without_names(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        (source / "deep2" / "er" / "005-x.bin").write_bytes(b"")
        path = source / "deep3" / "er" / "000-x.bin"
        path.write_bytes(path.read_bytes()[:-100])
        (source / "broken.xml").write_text("<LidcReadMessage")
        content = prepare(source, tmp_path / "out", skip_bad=True)
        assert content["source"]["bad"] == {"bad_xml": 1, "missing_slice": 1, "truncated": 1}
        assert content["source"]["num_patients"] == 1

    def test_a_fault_that_only_decoding_shows_refuses_or_is_skipped(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        data = ct_slice(2, 0, patient="SECRET-0002")
        data.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
        path = source / "deep2" / "er" / "000-x.bin"
        data.save_as(path)
        path.write_bytes(path.read_bytes()[:-700])
        assert "its pixels cannot be decoded" in self.message(source, tmp_path / "out")
        content = prepare(source, tmp_path / "out", skip_bad=True)
        assert content["source"]["bad"] == {"not_decodable": 1}
        cases = [c for s in ("training", "validation", "test") for c in content[s]]
        assert len(list((tmp_path / "out" / "images").iterdir())) == len(cases)
        assert {c["patient_id"] for c in cases} == {"p0001", "p0003"}

    def test_a_source_of_nothing_usable_says_what_it_has(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert "is not a folder" in self.message(tmp_path / "gone", out)
        (tmp_path / "empty").mkdir()
        assert "holds no file" in self.message(tmp_path / "empty", out)
        write_series(tmp_path / "unread", xml=reading_xml(8))
        message = self.message(tmp_path / "unread", out)
        assert "reading_without_series 1, series_without_reading 1" in message
        assert "XML of the same SeriesInstanceUID" in message

    def test_two_readings_that_differ_and_two_sizes_are_refused(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        other = message_xml(1, [nodule_xml(roi_xml(1, 2, square(20, 26, 4)))])
        (source / "other.xml").write_text(other)
        for z in range(4):
            (source / "big").mkdir(exist_ok=True)
            ct_slice(30, z, size=44).save_as(source / "big" / f"{z}.dcm")
        (source / "big" / "reading.xml").write_text(message_xml(30, []))
        message = self.message(source, tmp_path / "out")
        assert "reads the same series as" in message
        assert "its slices are (44, 44), those of the other scans (40, 40)" in message

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("slice_fraction", 0),
            ("slice_fraction", 1.5),
            ("consensus", 0),
            ("min_nodule_area", 0),
            ("max_slice_thickness", 0),
            ("splits", (0.5, 0.6, 0.1)),
            ("splits", (0.9, 0.1)),
            ("splits", (0.0, 0.5, 0.5)),
            ("seed", -1),
            ("num_workers", 0),
        ],
    )
    def test_a_setting_out_of_range_names_itself_and_what_is_allowed(self, tmp_path, option, value) -> None:
        message = self.message(tmp_path, tmp_path / "out", **{option: value})
        assert message.startswith(f"{option} is ")
        assert "allowed is" in message

    def test_an_output_that_exists_is_refused_and_replaced_only_if_it_is_a_dataset(self, tmp_path: Path) -> None:
        source, out = source_of(tmp_path), tmp_path / "out"
        prepare(source, out)
        self.before = digests(out)
        assert "exists and is not empty" in self.message(source, out)
        (out / "my notes.txt").write_text("keep me")
        self.before = digests(out)
        assert "holds my notes.txt, which is no part of one" in self.message(source, out, overwrite=True)
        (out / "my notes.txt").unlink()
        prepare(source, out, overwrite=True, slice_fraction=0.3)
        assert digests(out) != self.before

    def test_a_folder_that_is_no_dataset_or_holds_the_source_is_not_replaced(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        message = self.message(source, source, overwrite=True)
        assert "is no prepared dataset" in message
        assert "is no prepared dataset" in self.message(source, tmp_path, overwrite=True)

    def test_an_output_inside_the_source_is_not_read_as_source(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        first = prepare(source, source / "out")
        assert prepare(source, source / "out", overwrite=True) == first

    def test_a_folder_linked_into_itself_is_read_once(self, tmp_path: Path) -> None:
        source = source_of(tmp_path)
        (source / "loop").symlink_to(source, target_is_directory=True)
        assert prepare(source, tmp_path / "out")["source"]["num_scans"] == 3


class TestInterruption:
    def test_a_full_disk_leaves_nothing_and_says_so(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, out = source_of(tmp_path), tmp_path / "out"
        real, calls = Path.write_bytes, []

        def full(self: Path, content: bytes) -> int:
            calls.append(self)
            if len(calls) > 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
            return real(self, content)

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="the disk is full and nothing was left on it"):
            prepare(source, out)
        assert sorted(p.name for p in tmp_path.iterdir()) == [source.name]

    def test_ctrl_c_leaves_nothing_and_keeps_what_was_there(self, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, out = source_of(tmp_path), tmp_path / "out"
        prepare(source, out)
        before = digests(tmp_path)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(lidc, "prepare_scan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, overwrite=True)
        assert digests(tmp_path) == before

    def test_a_scan_writes_nothing_before_all_of_it_is_done(self, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[Path] = []
        monkeypatch.setattr(lidc_scan, "semantic_map", lambda *_, **__: 1 / 0)
        monkeypatch.setattr(Path, "write_bytes", lambda self, _: written.append(self))
        with pytest.raises(ZeroDivisionError):
            prepare(source_of(tmp_path), tmp_path / "out")
        assert written == []

    def test_what_a_killed_run_left_is_removed_and_a_dataset_it_moved_put_back(self, tmp_path: Path) -> None:
        source, out = source_of(tmp_path), tmp_path / "out"
        prepare(source, out)
        before = digests(out)
        partial = partial_folder(out)
        (partial / "dataset" / "images").mkdir(parents=True)
        (partial / "dataset" / "images" / "half.png").write_bytes(b"x")
        out.rename(partial / "replaced")
        with pytest.raises(UserError, match="exists and is not empty"):
            prepare(source, out)
        assert digests(out) == before
        assert not partial.exists()

    def test_two_runs_into_one_folder_are_kept_apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, out = source_of(tmp_path), tmp_path / "out"
        real = lidc.prepare_scan

        def second_run_inside(*args: object):
            monkeypatch.setattr(lidc, "prepare_scan", real)
            with pytest.raises(UserError, match="another run is writing"):
                prepare(source, out)
            return real(*args)

        monkeypatch.setattr(lidc, "prepare_scan", second_run_inside)
        assert prepare(source, out)["source"]["num_scans"] == 3
        assert (out / "dataset.json").is_file()

    @pytest.mark.slow
    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
    def test_a_run_ended_from_outside_leaves_no_dataset(self, tmp_path: Path, how: int) -> None:
        source, out = source_of(tmp_path, 8), tmp_path / "out"
        script = tmp_path / "run.py"
        script.write_text(
            "import sys\nfrom monai_synth.data.lidc import prepare_lidc\n"
            "if __name__ == '__main__':\n    prepare_lidc(*sys.argv[1:3], num_workers=2, progress=False)\n"
        )
        run = subprocess.Popen([sys.executable, script, source, out], stderr=subprocess.DEVNULL)
        wait_for(lambda: (partial_folder(out) / "dataset" / "labels").is_dir())
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        wait_for(lambda: len(children.read_text().split()) >= 2)
        workers = children.read_text().split()
        run.send_signal(how)
        assert run.wait(60) != 0
        assert not out.exists()
        assert partial_folder(out).exists() == (how == signal.SIGKILL)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        assert prepare(source, out)["source"]["num_scans"] == 8
        assert sorted(p.name for p in tmp_path.iterdir()) == [source.name, "out", "run.py"]

    @pytest.mark.slow
    def test_workers_that_cannot_start_end_the_run_with_one_message(self, tmp_path: Path) -> None:
        source, out = source_of(tmp_path, 3), tmp_path / "out"
        script = tmp_path / "run.py"
        script.write_text(
            "import sys\nfrom monai_synth.data.lidc import prepare_lidc\nprepare_lidc(*sys.argv[1:3], num_workers=2)\n"
        )
        run = subprocess.run([sys.executable, script, source, out], capture_output=True, text=True, check=False)
        assert run.returncode != 0
        assert "without `if __name__ == '__main__':`. Use --num_workers 1 or mend the script" in run.stderr
        assert not out.exists()
        assert not partial_folder(out).exists()


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.01)


def test_the_dataset_file_holds_its_settings(tmp_path: Path) -> None:
    prepare(source_of(tmp_path), tmp_path / "out", seed=5, name="mine")
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert content["name"] == "mine"
    assert content["created_with"]["settings"] == {
        "max_slice_thickness": 2.5,
        "slice_fraction": 0.2,
        "consensus": 0.5,
        "min_nodule_area": 8,
        "splits": [0.86, 0.03, 0.11],
        "seed": 5,
    }

# SPDX-License-Identifier: Apache-2.0
"""provenance.jsonl: whole lines whatever happens, each image once, nothing private."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monai_synth.checkpoint import sha256_of
from monai_synth.errors import UserError
from monai_synth.export import provenance
from monai_synth.export.provenance import ProvenanceWriter, read_provenance

DIGEST = "0" * 64


def add(writer: ProvenanceWriter, number: int, **changes: object) -> bool:
    record = {
        "case_id": f"case{number}",
        "seed": number,
        "checkpoints": {"lsdm": DIGEST},
        "sampler": "ddim",
        "num_steps": 50,
        "precision": "float32",
    }
    return writer.append(**(record | changes))


def test_a_line_says_how_to_make_the_image_again(tmp_path: Path) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    add(
        writer,
        3,
        conditioning={"case_id": "p0001-s1-z0045", "malignant": 1, "bbox": np.array([1, 2, 3, 4])},
        guidance={"malignancy": torch.tensor(1.5), "texture": np.float32(0.5)},
        filters={"copy_of_real": {"kept": True, "score": np.float64(0.25)}},
    )
    (line,) = (tmp_path / "p.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["versions"].pop("torch") == torch.__version__.split("+")[0]
    assert {"monai_synth", "monai", "diffusers", "numpy", "python"} <= set(record.pop("versions"))
    assert record == {
        "case_id": "case3",
        "seed": 3,
        "checkpoints": {"lsdm": DIGEST},
        "conditioning": {"case_id": "p0001-s1-z0045", "malignant": 1, "bbox": [1, 2, 3, 4]},
        "guidance": {"malignancy": 1.5, "texture": 0.5},
        "sampler": "ddim",
        "num_steps": 50,
        "precision": "float32",
        "filters": {"copy_of_real": {"kept": True, "score": 0.25}},
        "settings": {},
    }


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 400))
def test_a_torn_last_line_is_dropped_and_written_again(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("p") / "p.jsonl"
    writer = ProvenanceWriter(path)
    for number in range(3):
        add(writer, number)
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: -min(cut, last)])

    assert [r["case_id"] for r in read_provenance(path)] == ["case0", "case1"]
    writer = ProvenanceWriter(path)
    assert [writer.has(f"case{n}") for n in range(3)] == [True, True, False]
    assert add(writer, 2)
    assert path.read_bytes() == whole


def test_a_resumed_run_does_not_write_a_line_twice(tmp_path: Path) -> None:
    for _ in range(2):
        writer = ProvenanceWriter(tmp_path / "p.jsonl")
        written = [add(writer, number) for number in (0, 1)]
    assert written == [False, False]
    assert len(writer) == len(read_provenance(writer.path)) == 2


def test_another_image_under_the_same_name_is_refused_with_both_values(tmp_path: Path) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    add(writer, 0)
    with pytest.raises(UserError, match=r"seed = 0, now seed = 9; resume"):
        add(writer, 0, seed=9)
    assert len(read_provenance(writer.path)) == 1


def test_writer_and_reader_give_the_lines_in_order(tmp_path: Path) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    for number in (5, 1, 3):
        add(writer, number)
    assert [record["seed"] for record in read_provenance(writer.path)] == [5, 1, 3]
    assert len(writer) == len(ProvenanceWriter(writer.path)) == 3


def test_a_file_of_many_lines_is_opened_without_keeping_them(tmp_path: Path) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    add(writer, 0)
    record = json.loads(writer.path.read_text())
    lines = (
        json.dumps({**record, "case_id": f"case{n}", "settings": {"note": "x" * 2000}}) + "\n" for n in range(3000)
    )
    writer.path.write_text("".join(lines))
    tracemalloc.start()
    writer = ProvenanceWriter(writer.path)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(writer) == 3000
    assert kept < most < 1_500_000 < writer.path.stat().st_size / 4


def test_a_file_with_nothing_but_a_torn_line_is_empty(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"case_id": ' + b"x" * 200_000)
    assert len(ProvenanceWriter(tmp_path / "p.jsonl")) == 0
    assert (tmp_path / "p.jsonl").read_bytes() == b""


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        add(ProvenanceWriter(tmp_path / name), 0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "value",
    [
        "/data/LIDC-IDRI/x.png",
        "/data",
        "~/models/model.pt",
        "loaded from /home/someone/model.pt",
        "C:\\Users\\x\\model.pt",
        "D:/models/m.pt",
        "\\\\server\\share",
        "file:///data/x",
        "1.3.6.1.4.1.14519.5.2.1.6279.6001.298806137288633453246975630178",
    ],
)
def test_paths_and_uids_are_refused(tmp_path: Path, value: str) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match=r"conditioning.source.* holds a path or a UID"):
        add(writer, 0, conditioning={"source": ["fine", value]})
    with pytest.raises(UserError, match="path or a UID"):
        add(writer, 0, settings={"deep": {value: 1}})
    assert not writer.path.exists()


def test_dicom_identifiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"conditioning.PatientID identifies a patient"):
        add(ProvenanceWriter(tmp_path / "p.jsonl"), 0, conditioning={"PatientID": "x"})


@pytest.mark.parametrize(
    "value",
    [
        "p0001-s1-z0045",
        "2.8.0+cu128",
        "1.2.3.4",
        "lung/dense",
        "ratio 1/2",
        "https://example.org/a/b",
        "a: b",
    ],
)
def test_ordinary_text_is_kept(tmp_path: Path, value: str) -> None:
    assert add(ProvenanceWriter(tmp_path / "p.jsonl"), 0, settings={"text": value})


def test_a_checkpoint_goes_in_by_its_hash_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="64 hexadecimal digits"):
        add(ProvenanceWriter(tmp_path / "p.jsonl"), 0, checkpoints={"lsdm": "model.pt"})


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_a_value_that_json_cannot_hold_is_refused(tmp_path: Path, value: object) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    with pytest.raises(ValueError):
        add(writer, 0, settings={"x": value})
    assert not writer.path.exists()


@pytest.mark.parametrize("line", ["no json", "[1]", '{"seed": 1}', ""])
def test_a_strange_line_is_reported_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    add(ProvenanceWriter(path), 0)
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="line 2 is no provenance line"):
        ProvenanceWriter(path)
    with pytest.raises(FileNotFoundError, match="is not there"):
        read_provenance(tmp_path / "none.jsonl")


def test_a_full_disk_leaves_whole_lines_and_the_case_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    add(writer, 0)
    before = writer.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(provenance.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            add(writer, 1)
    assert writer.path.read_bytes() == before
    assert not writer.has("case1")
    assert add(writer, 1)


def test_a_write_that_the_disk_cuts_short_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ProvenanceWriter(tmp_path / "p.jsonl")
    add(writer, 0)
    before = writer.path.read_bytes()

    class Short(io.FileIO):
        def write(self, data: bytes) -> int:
            return super().write(data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(provenance, "open", lambda path, mode, buffering: Short(path, mode), raising=False)
        with pytest.raises(OSError, match="No space"):
            add(writer, 1)
    assert writer.path.read_bytes() == before
    assert add(writer, 1)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    code = (
        "import sys\n"
        "from monai_synth.export.provenance import ProvenanceWriter\n"
        "writer, number = ProvenanceWriter(sys.argv[1]), 0\n"
        "while True:\n"
        "    settings = dict(sampler='ddim', num_steps=50, precision='float32')\n"
        "    writer.append(case_id=f'case{number}', seed=number, checkpoints={}, **settings)\n"
        "    number += 1\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    deadline = time.monotonic() + 60
    while (not path.exists() or path.stat().st_size < 5000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()

    writer = ProvenanceWriter(path)
    records = read_provenance(writer.path)
    assert [record["seed"] for record in records] == list(range(len(records)))
    assert len(records) >= 5
    add(writer, len(records), checkpoints={})
    assert len(read_provenance(path)) == len(records) + 1


def test_the_hash_is_that_of_the_bytes_and_follows_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    assert sha256_of(path) == hashlib.sha256(b"weights").hexdigest()
    calls = []
    monkeypatch.setattr(provenance, "open", lambda *a: calls.append(a), raising=False)
    assert sha256_of(path) == hashlib.sha256(b"weights").hexdigest()
    assert not calls  # not read again
    monkeypatch.undo()
    path.write_bytes(b"Weights")
    os.utime(path, ns=(1, 1))
    assert sha256_of(path) == hashlib.sha256(b"Weights").hexdigest()
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "none.pt")

# SPDX-License-Identifier: Apache-2.0
"""Removal of near copies: exactly the rest is left, in the form of the source, which is not touched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from memorization_toy import patient, save

from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet, read_case_set
from monai_synth.evaluate.memorization_removal import check_target, target_of, write_cleaned
from monai_synth.export.classes import ClassFolderWriter
from monai_synth.export.nnunet import NNUNetRawWriter
from monai_synth.export.provenance import ProvenanceWriter, read_provenance


def line(writer: ProvenanceWriter, case_id: str, seed: int) -> None:
    writer.append(case_id=case_id, seed=seed, checkpoints={"model": "a" * 64}, sampler="s", num_steps=2, precision="f")


def raw(root: Path) -> CaseSet:
    labels = {"background": 0, "cell": 1}
    writer = NNUNetRawWriter(root, dataset_id=7, name="S", channel_names=["L"], labels=labels)
    provenance = ProvenanceWriter(writer.provenance_path)
    for i in range(5):
        writer.add(f"c{i}", patient(i, 32)[0], (patient(i, 32)[0] > 128).astype(np.uint8))
        line(provenance, f"c{i}", i)
    return read_case_set(writer.finish(), option="--synthetic")


def classes(root: Path) -> CaseSet:
    head = {"name": "S", "modality": "XR", "image_channels": 1, "spatial_shape": [32, 32], "intensity": {"unit": "x"}}
    writer = ClassFolderWriter(root / "samples", classes={"a": 0, "b": 1}, head=head)
    provenance = ProvenanceWriter(writer.provenance_path)
    for i in range(5):
        case = f"{'ab'[i % 2]}_{i:07d}"
        writer.add(case, patient(i, 32))
        line(provenance, case, i)
    return read_case_set(writer.finish(), option="--synthetic")


def plain(root: Path) -> CaseSet:
    for i in range(5):
        save(root / "images" / "ab"[i % 2] / f"{i}.png", patient(i, 32))
    return read_case_set(root / "images", option="--synthetic")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("make", [raw, classes, plain])
def test_exactly_the_rest_is_left_in_the_form_of_the_source(tmp_path: Path, make) -> None:
    source = make(tmp_path / "source")
    before = contents(source.root)
    gone = [source.cases[1].case_id, source.cases[4].case_id]
    path = target_of(tmp_path / "clean", source)
    why = {case: {"reason": "near copy of a training image", "p_value": 0.01} for case in gone}
    assert write_cleaned(path, source, why, {"level": 0.01}, overwrite=False) == 3
    left = read_case_set(path, option="--synthetic")
    kept = [0, 2, 3]
    assert [case.case_id for case in left.cases] == [source.cases[i].case_id for i in kept]
    assert (left.form, left.kind, left.channels) == (source.form, source.kind, source.channels)
    for new, old in enumerate(kept):
        np.testing.assert_array_equal(left.image(new), source.image(old))
        assert left.cases[new].class_name == source.cases[old].class_name
        if source.cases[old].label:
            np.testing.assert_array_equal(left.label(new), source.label(old))
    if source.form != "plain":
        lines = read_provenance(path / "provenance.jsonl")
        assert sorted(r["case_id"] for r in lines) == sorted(c.case_id for c in left.cases)
    record = json.loads((path / "removed.json").read_text())
    assert [entry["case_id"] for entry in record["removed"]] == sorted(gone)
    assert (record["num_kept"], record["level"]) == (3, 0.01)
    assert contents(source.root) == before


def test_a_raw_dataset_keeps_its_name_and_counts_its_cases(tmp_path: Path) -> None:
    source = raw(tmp_path / "source")
    path = target_of(tmp_path / "clean", source)
    assert path == tmp_path / "clean" / "Dataset007_S"
    assert target_of(tmp_path / "Dataset911_Clean", source).name == "Dataset911_Clean"
    write_cleaned(path, source, {"c0": {}}, {}, overwrite=False)
    content = json.loads((path / "dataset.json").read_text())
    assert content == json.loads((source.root / "dataset.json").read_text()) | {"numTraining": 4}
    files = sorted(p.name for sub in ("imagesTr", "labelsTr") for p in (path / sub).iterdir())
    assert len(files) == 8
    assert not any(name.startswith("c0") for name in files)


def test_the_sheet_of_samples_is_drawn_anew(tmp_path: Path) -> None:
    source = classes(tmp_path / "source")
    write_cleaned(tmp_path / "clean", source, {source.cases[0].case_id: {}}, {}, overwrite=False)
    assert (tmp_path / "clean" / "samples.png").read_bytes() != (source.root / "samples.png").read_bytes()


def test_nothing_foreign_is_replaced_and_the_source_is_no_target(tmp_path: Path) -> None:
    source = plain(tmp_path / "source")
    for place in (source.root, source.root / "clean", source.root.parent):
        with pytest.raises(UserError, match="lie in each other"):
            check_target(place, source, overwrite=True)
    save(tmp_path / "mine" / "x.png", patient(0, 32))
    with pytest.raises(UserError, match="is no cleaned dataset of this command"):
        check_target(tmp_path / "mine", source, overwrite=True)
    write_cleaned(tmp_path / "clean", source, {"a/0": {}}, {}, overwrite=False)
    with pytest.raises(UserError, match="replace it with --overwrite"):
        write_cleaned(tmp_path / "clean", source, {"a/0": {}}, {}, overwrite=False)
    assert write_cleaned(tmp_path / "clean", source, {"a/2": {}, "b/1": {}}, {}, overwrite=True) == 3
    assert (tmp_path / "clean" / "a" / "0.png").is_file()


def test_where_all_are_copies_nothing_is_written(tmp_path: Path) -> None:
    source = plain(tmp_path / "source")
    removed = {case.case_id: {} for case in source.cases[:4]}
    with pytest.raises(UserError, match="4 of 5 synthetic images are near copies, so no dataset is left"):
        write_cleaned(tmp_path / "clean", source, removed, {}, overwrite=False)
    assert not (tmp_path / "clean").exists()

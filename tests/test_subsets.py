# SPDX-License-Identifier: Apache-2.0
"""Parts of a pool: nested, linked, never mixed with something else, and never larger than the pool."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from monai_synth.errors import UserError
from monai_synth.export import subsets
from monai_synth.export.nnunet import NNUNetRawWriter
from monai_synth.export.provenance import ProvenanceWriter, read_provenance
from monai_synth.export.subsets import subset_size, write_ratio_subsets, write_subset


def make_pool(
    folder: Path, ids: list[str], seeds: list[int] | None = None, *, offset: int = 0, refused: dict | None = None
) -> Path:
    writer = NNUNetRawWriter(
        folder, dataset_id=10, name="Pool", channel_names=["L"], labels={"background": 0, "nucleus": 1}
    )
    lines = ProvenanceWriter(writer.provenance_path)
    for number, case in enumerate(ids):
        writer.add(case, np.full((4, 5), number + offset, np.uint8), np.eye(4, 5, dtype=np.uint8))
        if seeds is not None:
            lines.append(
                case_id=case, seed=seeds[number], checkpoints={}, sampler="dpm++", num_steps=2, precision="float32",
                filters={"refused": (refused or {}).get(number, [])},
            )  # fmt: skip
    return writer.finish()


def cases(dataset: Path) -> set[str]:
    return {path.stem for path in (dataset / "labelsTr").iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_subset_is_a_dataset_of_the_first_cases_with_their_provenance(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "a", [f"c{i}" for i in range(5)], list(range(5)))
    out = write_subset(pool, tmp_path / "b", dataset_id=11, name="Part", num_cases=3)
    assert out == tmp_path / "b" / "Dataset011_Part"
    assert cases(out) == {"c0", "c1", "c2"}
    head = json.loads((out / "dataset.json").read_text())
    assert head == json.loads((pool / "dataset.json").read_text()) | {"name": "Part", "numTraining": 3}
    assert read_provenance(out / "provenance.jsonl") == read_provenance(pool / "provenance.jsonl")[:3]
    assert (out / "export.json").read_bytes() == (pool / "export.json").read_bytes()
    for sub in ("imagesTr", "labelsTr"):
        for path in (out / sub).iterdir():
            assert os.path.samefile(path, pool / sub / path.name)


def test_ratio_subsets_are_nested_and_have_the_sizes_that_the_ratios_ask_for(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, [f"c{i:02d}" for i in range(20)], list(range(20)))
    ratios = [250, 100, 500]
    out = write_ratio_subsets(pool, tmp_path, ratios=ratios, num_real=4, first_id=11, name="JDM")
    assert [path.name for path in out] == ["Dataset011_JDM_250pct", "Dataset012_JDM_100pct", "Dataset013_JDM_500pct"]
    assert [len(cases(path)) for path in out] == [10, 4, 20]
    assert cases(out[1]) < cases(out[0]) < cases(out[2])


def test_source_cases_take_turns_in_a_subset_although_ids_sort_by_source(tmp_path: Path) -> None:
    ids = [f"{source}_s{i:06d}" for i, source in enumerate("abcabcabc")]
    pool = make_pool(tmp_path, ids, [0, 1000, *range(2, 9)], refused={1: [{"seed": 1, "reason": "empty"}]})
    out = write_subset(pool, tmp_path, dataset_id=11, name="Part", num_cases=3)
    assert {case[0] for case in cases(out)} == {"a", "b", "c"}


def test_a_pool_without_provenance_is_taken_in_the_order_of_its_ids(tmp_path: Path) -> None:
    out = write_subset(make_pool(tmp_path, ["z", "a", "m"]), tmp_path, dataset_id=11, name="Part", num_cases=2)
    assert cases(out) == {"a", "m"}
    assert not (out / "provenance.jsonl").exists()


def test_files_are_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path, ["a", "b"], [0, 1])
    linked = content(write_subset(pool, tmp_path / "x", dataset_id=11, name="Part", num_cases=2))

    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(subsets.os, "link", refuse)
    out = write_subset(pool, tmp_path / "y", dataset_id=11, name="Part", num_cases=2)
    assert content(out) == linked
    assert not os.path.samefile(out / "labelsTr" / "a.png", pool / "labelsTr" / "a.png")


def test_the_same_subset_again_is_left_alone_and_another_is_refused(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, [f"c{i}" for i in range(4)], list(range(4)))
    options = {"dataset_id": 11, "name": "Part"}
    out = write_subset(pool, tmp_path, num_cases=2, **options)
    before = content(out), out.stat().st_ino
    assert write_subset(pool, tmp_path, num_cases=2, **options) == out
    other = make_pool(tmp_path / "other", [f"c{i}" for i in range(4)], list(range(4)), offset=9)
    for source, num_cases in ((pool, 3), (other, 2)):
        with pytest.raises(UserError, match="holds something else"):
            write_subset(source, tmp_path, num_cases=num_cases, **options)
    with pytest.raises(UserError, match="one dataset per id"):
        write_subset(pool, tmp_path, dataset_id=10, name="Part", num_cases=2)
    assert (content(out), out.stat().st_ino) == before


def test_a_subset_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(tmp_path / "a", ["a", "b"], [0, 1])

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(subsets, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_subset(pool, tmp_path / "b", dataset_id=11, name="Part", num_cases=2)
    assert not any((tmp_path / "b").iterdir())


def test_a_pool_that_is_too_small_says_what_it_holds_and_what_is_needed(tmp_path: Path) -> None:
    pool = make_pool(tmp_path / "a", ["a", "b", "c"])
    with pytest.raises(UserError, match=r"holds 3 cases, the subset Part needs 7.*--num_samples 7"):
        write_subset(pool, tmp_path / "b", dataset_id=11, name="Part", num_cases=7)
    with pytest.raises(UserError, match=r"500 % of 2 real training cases are 10, .* holds 3.*--num_samples 10"):
        write_ratio_subsets(pool, tmp_path / "b", ratios=[100, 500], num_real=2, first_id=11, name="JDM")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("ratios", "message"),
    [([0], "whole percents"), ([1.5], "whole percents"), (["100"], "whole percents"), ([1], "is no case"),
     ([100, 100], "each once")],
)  # fmt: skip
def test_ratios_that_make_no_sense_are_refused(tmp_path: Path, ratios: list, message: str) -> None:
    pool = make_pool(tmp_path, ["a", "b", "c"])
    with pytest.raises(UserError, match=message):
        write_ratio_subsets(pool, tmp_path / "b", ratios=ratios, num_real=2, first_id=11, name="JDM")


def test_a_dataset_that_is_unfinished_is_no_pool(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, ["a"])
    (pool / "dataset.json").unlink()
    with pytest.raises(UserError, match="no finished nnU-Net raw dataset"):
        write_subset(pool, tmp_path, dataset_id=11, name="Part", num_cases=1)


def test_sizes_are_percents_of_the_real_training_set() -> None:
    assert [subset_size(ratio, 30) for ratio in (100, 150, 250, 1000)] == [30, 45, 75, 300]

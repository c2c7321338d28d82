# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from monai_synth.errors import UserError
from monai_synth.experiments.classifier_rows import Row, all_rows, chosen_rows
from monai_synth.experiments.classifier_sets import (
    held_out,
    require_synthetic,
    stratified,
    synthetic_counts,
    training_parts,
)

# Table 2: number -> geo aug, synthetic pretraining, real %, weighted loss
TABLE = {
    1: (False, False, 100, False),
    2: (False, False, 100, True),
    3: (False, True, 100, False),
    4: (False, True, 100, True),
    5: (True, False, 100, False),
    6: (True, False, 100, True),
    7: (True, True, 100, False),
    8: (True, True, 100, True),
    9: (False, False, 10, False),
    10: (False, False, 10, True),
    11: (False, True, 10, False),
    12: (False, True, 10, True),
    13: (True, False, 10, False),
    14: (True, False, 10, True),
    15: (True, True, 10, False),
    16: (True, True, 10, True),
    17: (False, True, 0, False),
    18: (True, True, 0, False),
}


def rows_by_number():
    return {row.number: row for row in all_rows((100, 10))}


def test_the_rows_are_those_of_table_2_in_its_order():
    rows = all_rows((100, 10))
    assert [row.number for row in rows] == list(TABLE)
    assert [row.name for row in rows] == [str(number) for number in TABLE]
    for row in rows:
        assert (row.geo, row.mode != "real", row.fraction, row.weighted) == TABLE[row.number]


def test_rows_with_geo_aug_start_from_18_and_the_others_from_17():
    starts = {number: row.start.number for number, row in rows_by_number().items() if row.start}
    assert starts == {3: 17, 4: 17, 11: 17, 12: 17, 7: 18, 8: 18, 15: 18, 16: 18}


def test_twins_differ_in_one_thing():
    rows = rows_by_number()
    twins = {number: {what: row.number for what, row in rows[number].twins.items()} for number in (1, 9, 12, 16, 18)}
    control = {what: row.name for what, row in rows[15].twins.items()}
    assert twins[1] == twins[9] == {}
    assert twins[12] == {"no synthetic images": 10, "no weights": 11, "plain": 9}
    assert twins[16] == {"no synthetic images": 14, "no geo aug": 12, "no weights": 15, "plain": 9}
    assert twins[18] == {"no geo aug": 17}
    assert control["as many steps on real images"] == "control-real10-geo"


def test_further_rows_have_names_that_differ():
    rows = all_rows((100, 50, 10), mix=(50, 200), oversample=True, control=True)
    names = [row.name for row in rows]
    assert len(set(names)) == len(names) == 3 * (8 + 2 * 5) + 2
    assert {"mix50-real10-geo", "oversample-real100", "control-real10", "real50-weighted", "pretrain-real50"} <= set(
        names
    )


def test_a_chosen_row_brings_what_it_starts_from():
    rows = all_rows((100, 10), control=True)
    assert [row.name for row in chosen_rows(rows, ["16", "1"])] == ["1", "16", "18"]
    assert [row.name for row in chosen_rows(rows, ["control-real10"])] == ["long-real10", "control-real10"]
    assert chosen_rows(rows, None) == rows
    with pytest.raises(UserError, match="no row 19; with these.*there are 1, 2, 3"):
        chosen_rows(rows, ["19"])
    with pytest.raises(UserError, match="no row is chosen"):
        chosen_rows(rows, [])


LABELS = {"training": np.repeat([0, 1, 2], [95, 300, 4]), "synthetic": np.repeat([0, 1, 2], 350)}


def test_a_tenth_keeps_every_class_and_is_the_same_for_all_rows_of_a_seed():
    chosen = stratified(LABELS["training"], 10, seed=3)
    assert np.bincount(LABELS["training"][chosen]).tolist() == [10, 30, 1]
    for row in all_rows((100, 10)):
        parts = training_parts(row, LABELS, 3, hold_out=False)
        if row.fraction == 10:
            assert np.array_equal(parts["training"], chosen)
        assert ("synthetic" in parts) == (row.mode == "synthetic")
    assert not np.array_equal(chosen, stratified(LABELS["training"], 10, seed=4))
    assert set(chosen) <= set(stratified(LABELS["training"], 50, seed=3))
    assert np.array_equal(stratified(LABELS["training"], 100, seed=3), np.arange(399))


def test_a_mix_adds_equally_many_of_each_class_and_oversampling_balances():
    mixed = training_parts(Row("mix", 100, False, ratio=50), LABELS, 0, hold_out=False)
    assert np.bincount(LABELS["synthetic"][mixed["synthetic"]]).tolist() == [67, 66, 66]
    filled = training_parts(Row("oversample", 100, False), LABELS, 0, hold_out=False)
    both = [np.bincount(LABELS[name][index]) for name, index in filled.items()]
    assert np.add(*both).tolist() == [300, 300, 300]
    assert len(set(filled["synthetic"])) == len(filled["synthetic"])
    assert synthetic_counts(Row("oversample", 10, True), np.array([10, 30, 1])) == [20, 0, 29]


def test_what_selects_the_epoch_is_not_trained_on():
    row = Row("synthetic", 0, False)
    kept = training_parts(row, LABELS, 0, hold_out=True)["synthetic"]
    out = held_out(LABELS["synthetic"], 0)
    assert np.bincount(LABELS["synthetic"][out]).tolist() == [35, 35, 35]
    assert not set(kept) & set(out)
    assert len(kept) + len(out) == len(LABELS["synthetic"])


def test_too_few_synthetic_images_are_told_before_training():
    classes = {"a": 0, "b": 1, "c": 2}
    require_synthetic([Row("mix", 100, False, ratio=200)], LABELS, classes)
    with pytest.raises(UserError, match="row mix300-real100 needs 399 synthetic images of a, there are 350"):
        require_synthetic([Row("mix", 100, False, ratio=300)], LABELS, classes)

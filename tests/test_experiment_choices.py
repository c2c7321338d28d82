# SPDX-License-Identifier: Apache-2.0
"""What experiments choose where their user says nothing."""

from __future__ import annotations

import pytest

from monai_synth.errors import UserError
from monai_synth.experiments.choices import chosen_baseline, chosen_batch_size


def test_a_batch_is_as_large_as_asked_or_as_usual_on_the_device() -> None:
    usual = {"cpu": 8, "cuda": 16}
    assert [chosen_batch_size(n, d, usual) for n in (None, 3) for d in usual] == [8, 16, 3, 3]


def test_the_baseline_is_the_arm_asked_for_or_the_first_and_another_is_refused() -> None:
    assert [chosen_baseline(("b", "a"), name) for name in (None, "a")] == ["b", "a"]
    with pytest.raises(UserError, match=r"there is no arm 'c'; allowed are b, a \(--baseline\)"):
        chosen_baseline(("b", "a"), "c")

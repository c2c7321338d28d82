# SPDX-License-Identifier: Apache-2.0
"""Processes that share the cores."""

from __future__ import annotations

import os

import pytest

from monai_synth.data.workers import map_unordered

NAMES = ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]


def test_processes_compute_with_one_thread_each_and_the_caller_keeps_his(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert list(map_unordered(os.getenv, NAMES, 2)) == ["1"] * 3
    assert not os.environ.keys() & set(NAMES)


def test_a_number_of_threads_that_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert list(map_unordered(os.getenv, NAMES[:1] * 2, 2)) == ["3", "3"]
    assert os.environ["OMP_NUM_THREADS"] == "3"

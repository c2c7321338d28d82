# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test module shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]

# Small problems on few cores: more threads than this cost more than they bring.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of the real verification images; a test that needs it skips where it is absent."""
    folder = Path(os.environ.get("MONAI_SYNTH_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real verification images are not at {folder}; set MONAI_SYNTH_TEST_DATA")
    return folder


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

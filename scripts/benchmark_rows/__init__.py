# SPDX-License-Identifier: Apache-2.0
"""The rows of ``scripts/benchmark.py``; importing a module of rows puts them into ``ROWS``."""

from __future__ import annotations

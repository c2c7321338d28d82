# SPDX-License-Identifier: Apache-2.0
"""What of a source cannot be used, and how that is told: all of it before anything is written, or as a count."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from monai_synth.errors import UserError

MAX_REPORTED = 10


@dataclass(frozen=True)
class Problem:
    """Something that cannot be used.

    Attributes:
        code: short reason without identifiers, for counts.
        message: one line for the user: which file, what was got, what is allowed, how to mend it.
    """

    code: str
    message: str


def refuse_or_count(problems: Sequence[Problem], ignored: Mapping[str, int], source: Path, skip_bad: bool) -> None:
    """Refuse a source with problems, or log them where ``skip_bad``."""
    lines = sorted(problem.message for problem in problems)
    if lines and not skip_bad:
        shown = lines[:MAX_REPORTED]
        if len(lines) > len(shown):
            shown.append(f"... and {len(lines) - len(shown)} more")
        head = f"source {source} has {len(lines)} unusable file(s), so nothing is written; "
        raise UserError("\n  ".join([head + "mend them, or prepare the rest with --skip-bad:", *shown]))
    log = logging.getLogger(__name__)
    for line in lines:
        log.warning("left out: %s", line)
    for reason, number in ignored.items():
        log.warning("left out: %d file(s), %s", number, reason)

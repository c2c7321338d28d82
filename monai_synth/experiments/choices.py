# SPDX-License-Identifier: Apache-2.0
"""What experiments choose where their user says nothing: a batch size, and the arm that others are measured by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from monai_synth.errors import UserError


def chosen_batch_size(asked: int | None, device: str, usual: Mapping[str, int]) -> int:
    """The batch size asked for; None is the usual one of the device.

    Args:
        asked: by the user.
        device: "cpu" or "cuda".
        usual: batch size by device.
    """
    return usual[device] if asked is None else asked


def chosen_baseline(arms: Iterable[str], asked: str | None) -> str:
    """The name of the arm that others are compared with; None is the first.

    Raises:
        UserError: there is no such arm.
    """
    names = list(arms)
    if asked is None:
        return names[0]
    if asked not in names:
        raise UserError(f"there is no arm {asked!r}; allowed are {', '.join(names)} (--baseline)")
    return asked

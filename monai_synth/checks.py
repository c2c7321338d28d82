# SPDX-License-Identifier: Apache-2.0
"""Numbers and devices that users give, checked by name before any work."""

from __future__ import annotations

import math
from typing import Any

from monai_synth.errors import UserError

# what a key must be: least whole number, or the ends of an interval of numbers
_WHOLE = {
    "accumulate": 1, "base_channels": 1, "batch_size": 1, "max_epochs": 1, "max_memory_bytes": 0, "max_val_cases": 1,
    "num_grid_samples": 1, "num_heads": 1, "num_res_blocks": 1, "num_steps": 1, "save_interval": 1, "seed": 0,
    "val_interval": 1,
}  # fmt: skip
_SHARES = ("drop_prob", "ema_decay", "guidance_rescale")


def whole(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is {value!r}, allowed are integers from {least}; give --{name} {max(least, 1)}, say")
    return value


def share(name: str, value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        UserError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; allowed are shares from 0 to 1")
    return float(value)


def chosen_device(device: str | None) -> str:
    """The device asked for, "cpu" or "cuda"; None is a GPU where there is one.

    Raises:
        UserError: another word, or no GPU.
    """
    import torch

    there = torch.cuda.is_available()
    device = device or ("cuda" if there else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"device {device!r}; allowed are cpu and cuda")
    if device == "cuda" and not there:
        raise UserError("device cuda, but PyTorch finds no GPU here; use --device cpu, or a build of PyTorch with CUDA")
    return device


def check_numbers(**values: Any) -> None:
    """Refuse values that are not what their names ask for; a config's first line with what its user may change.

    Args:
        values: by the names that configs have for them. ``image_size`` is a list of whole numbers, other names that are
            not known here are numbers of at least 0 (``learning_rate``: above 0).

    Raises:
        UserError: the first that is wrong.
    """
    for name, value in values.items():
        if name in _WHOLE:
            whole(name, value, _WHOLE[name])
        elif name in _SHARES:
            share(name, value)
            if name == "ema_decay" and value in (0, 1):
                raise UserError(f"ema_decay is {value!r}; allowed are shares between 0 and 1, without both")
        elif name == "image_size":
            if not isinstance(value, (list, tuple)) or not value or any(type(side) is not int for side in value):
                raise UserError(f"image_size is {value!r}; give a list of whole numbers, e.g. --image_size '[64, 64]'")
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name == "learning_rate"):
                least = "above 0" if name == "learning_rate" else "from 0"
                raise UserError(f"{name} is {value!r}; allowed are numbers {least}")

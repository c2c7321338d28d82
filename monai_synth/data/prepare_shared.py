# SPDX-License-Identifier: Apache-2.0
"""What every ``prepare`` verb for users' own files does alike: checks, headers, groups, refusals and copies."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from monai_synth.data.datalist import SPLITS
from monai_synth.data.pictures_read import Form, inspect_image
from monai_synth.data.problems import MAX_REPORTED, Problem
from monai_synth.data.whole_folder import check_output
from monai_synth.errors import UserError

Check = tuple[str, str, Callable[[Any], bool]]

CHECKS: tuple[Check, ...] = (
    ("window", "two values, the lower one first", lambda v: len(v) == 2 and v[0] < v[1]),
    ("percentiles", "two values from 0 to 100, the lower one first", lambda v: len(v) == 2 and 0 <= v[0] < v[1] <= 100),
    (
        "splits",
        "three shares of 0 or more that add up to 1, the first above 0",
        lambda v: len(v) == 3 and min(v) >= 0 and v[0] > 0 and abs(sum(v) - 1) < 1e-6,
    ),
    ("seed", "0 or more", lambda v: v >= 0),
)


def check_settings(settings: Mapping[str, Any], checks: Iterable[Check]) -> None:
    """Refuse a setting out of range; None is not given.

    Args:
        settings: by name, with window, percentiles, splits, seed and group_regex.
        checks: name, what is allowed, and whether a value is; those of :data:`CHECKS` are added.
    """
    for key, allowed, is_right in (*checks, *CHECKS):
        if settings[key] is not None and not is_right(settings[key]):
            raise UserError(f"{key} is {settings[key]}; allowed is {allowed}. Change --{key.replace('_', '-')}")
    if settings["window"] is not None and settings["percentiles"] is not None:
        raise UserError("window and percentiles are given; one of them sets the intensities. Leave one out")
    try:
        re.compile(settings["group_regex"] or "")
    except re.error as error:
        raise UserError(f"group_regex {settings['group_regex']!r} is no regular expression ({error})") from error


def check_places(sources: Iterable[Path], out: Path, overwrite: bool) -> None:
    """Refuse an output that is, holds or lies in a source, or must not be replaced."""
    real_out = out.resolve()
    for place in sources:
        real = place.resolve()
        if real == real_out or real_out in real.parents or real in real_out.parents:
            raise UserError(f"output {out} is, holds or lies in the source {place}; name a folder outside it")
    check_output(out, overwrite=overwrite)


def inspect_forms(
    files: Mapping[str, Sequence[str]], grey: bool, problems: list[Problem], progress: bool
) -> dict[str, Form]:
    """Form of each image, as it will be written, by name; images of an unusable or unusual form become problems.

    Args:
        files: of each image by its name, one or one per channel.
        grey: RGB pictures are written grey.
        problems: they are added here.
        progress: show a bar.
    """
    forms: dict[str, Form] = {}
    for name, paths in tqdm(files.items(), desc="reading headers", unit="image", disable=not progress):
        try:
            inspected = [inspect_image(path) for path in paths]
        except UserError as error:
            problems.append(Problem("unusable", str(error)))
            continue
        channels = sum(form.channels for form in inspected)
        channels = 1 if grey and (inspected[0].spatial_dims, channels) == (2, 3) else channels
        eight_bit = all(form.eight_bit for form in inspected)
        forms[name] = replace(inspected[0], channels=channels, eight_bit=eight_bit)
    kinds = Counter(kind_of(form) for form in forms.values())
    usual = max(kinds, key=lambda kind: (kinds[kind], kind), default=None)
    for name in [name for name, form in forms.items() if kind_of(form) != usual]:
        form = forms.pop(name)
        got, wanted = (f"{dims}-D with {n} channel(s)" for dims, n in (kind_of(form), usual))
        remedy = "prepare them apart" if grey or form.spatial_dims == 3 else "make all alike, or give --grey"
        problems.append(Problem("other_form", f"{files[name][0]}: {got}, most of the others are {wanted}; {remedy}"))
    return forms


def kind_of(form: Form) -> tuple[int, int]:
    """Spatial dimensions and channels."""
    return form.spatial_dims, form.channels


def groups_by_regex(keys: Mapping[str, str], regex: str) -> dict[str, str]:
    """Group by name, from each name's key: the first group of ``regex``, or the whole match.

    Raises:
        UserError: it finds nothing in one of them.
    """
    groups, missed = {}, []
    for name, key in keys.items():
        match = re.search(regex, key)
        if match is None or not (match[1] if match.re.groups else match[0]):
            missed.append(key)
        else:
            groups[name] = match[1] if match.re.groups else match[0]
    if missed:
        shown = ", ".join(missed[:MAX_REPORTED])
        raise UserError(f"group_regex {regex!r} finds no group in {len(missed)} name(s): {shown}; change --group-regex")
    return groups


def given_split_of_groups(members: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Split by group, from (group, split) of each image.

    Raises:
        UserError: a group is in two splits.
    """
    given: dict[str, str] = {}
    for group, split in members:
        if given.setdefault(group, split) != split:
            both = " and ".join(sorted((given[group], split), key=SPLITS.index))
            raise UserError(
                f"group {group} is in {both} of the source; move its images into one, or change --group-regex"
            )
    return given


def count_copies(images: Iterable[tuple[str, str, str]]) -> int:
    """How many images are copies of one of another group; they may come into different splits.

    Args:
        images: name, group and digest of each.
    """
    first: dict[str, tuple[str, str]] = {}
    copies = []
    for name, group, digest in images:
        other, other_group = first.setdefault(digest, (name, group))
        if group != other_group:
            copies.append(f"{name} is {other}")
    if copies:
        logging.getLogger(__name__).warning(
            "%d image(s) are copies of another patient's (%s); a copy may be tested on that was trained on",
            len(copies),
            ", ".join(copies[:MAX_REPORTED]),
        )
    return len(copies)

# SPDX-License-Identifier: Apache-2.0
"""What every ``prepare`` verb for users' own files does alike: settings, headers, groups, names and the record."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from monai_synth import __version__
from monai_synth.atomic import write_json
from monai_synth.data.datalist import SPLITS
from monai_synth.data.pictures_read import Form, inspect_image
from monai_synth.data.problems import MAX_REPORTED, Problem
from monai_synth.data.source_files import plain
from monai_synth.data.whole_folder import check_output
from monai_synth.errors import UserError

if TYPE_CHECKING:
    from monai_synth.data.classes_source import ClassSource
    from monai_synth.data.pairs_source import PairSource

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


def shared_settings(
    *,
    window: Sequence[float] | None,
    percentiles: Sequence[float] | None,
    grey: bool,
    group_regex: str | None,
    anonymize_ids: bool,
    splits: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """The settings that every verb has, as they are recorded."""
    return {
        "window": listed(window, float),
        "percentiles": listed(percentiles, float),
        "grey": bool(grey),
        "group_regex": group_regex,
        "anonymize_ids": bool(anonymize_ids),
        "splits": listed(splits, float),
        "seed": int(seed),
    }


def listed(values: Iterable[Any] | None, kind: Callable[[Any], Any]) -> list[Any] | None:
    """``values`` each made a ``kind``; None where they are not given."""
    return None if values is None else [kind(value) for value in values]


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


def case_ids(group_of: Mapping[str, str], *, serial: bool, digits: int) -> dict[str, tuple[str, str]]:
    """Names that an image and its patient get in the dataset, by name of the image.

    Args:
        group_of: patient by name of the image.
        serial: numbers, of ``digits`` digits for patients, instead of the source's names.
        digits: so many.
    """
    number = {group: f"p{i:0{digits}d}" for i, group in enumerate(sorted(set(group_of.values())), 1)}
    so_far: Counter[str] = Counter()
    names = {}
    for name, group in group_of.items():
        so_far[group] += 1
        names[name] = (f"{number[group]}-{so_far[group]:04d}", number[group]) if serial else (plain(name), plain(group))
    return names


def groups_to_split(
    members: Iterable[tuple[str, str]], given_splits: Sequence[str], splits: Sequence[float]
) -> tuple[dict[str, str], list[str], dict[str, float]]:
    """What the source has decided about the splits and what is left to decide.

    Args:
        members: group and split of each image.
        given_splits: which the source gives, beside the training images.
        splits: shares for training, validation and test.

    Returns:
        Split by group; the groups of the training images, sorted; and the shares of these by split.

    Raises:
        UserError: a group is in two splits.
    """
    split_of = _split_of_groups(members)
    pool = sorted(group for group, split in split_of.items() if split == "training")
    shares = {s: share for s, share in zip(SPLITS, splits, strict=True) if share > 0 and s not in given_splits}
    return split_of, pool, shares


def _split_of_groups(members: Iterable[tuple[str, str]]) -> dict[str, str]:
    given: dict[str, str] = {}
    for group, split in members:
        if given.setdefault(group, split) != split:
            both = " and ".join(sorted((given[group], split), key=SPLITS.index))
            raise UserError(
                f"group {group} is in {both} of the source; move its images into one, or change --group-regex"
            )
    return given


def gather(made: Generator[Any], num: int, unit: str, problems: list[Problem], progress: bool) -> list[Any]:
    """Results in order of the case ids of their tasks; what is a problem goes to ``problems``.

    Args:
        made: results and problems as they come; it is closed after an error or Ctrl-C.
        num: how many there will be.
        unit: what each of them is of, for the progress bar.
        problems: they are added here.
        progress: show a bar.
    """
    results = []
    with tqdm(total=num, desc=f"preparing {unit}s", unit=unit, disable=not progress) as bar, closing(made) as items:
        for item in items:
            bar.update()
            (problems if isinstance(item, Problem) else results).append(item)
    return sorted(results, key=lambda result: result.task.case_id)


def source_entry(
    found: PairSource | ClassSource,
    group_of: Mapping[str, str],
    digest_of: Mapping[str, str],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """What ``dataset.json`` says about the source.

    Args:
        found: the source.
        group_of: group by name of the image.
        digest_of: digest of the pixels by name of each image that was written.
        counts: numbers of cases.
    """
    return {
        "form": found.form,
        "given_splits": list(found.given_splits),
        "num_images": len(digest_of),
        "num_groups": len({group_of[name] for name in digest_of}),
        **counts,
        "num_repeated_images": count_copies((name, group_of[name], digest) for name, digest in digest_of.items()),
        "ignored": dict(sorted(found.ignored.items())),
        "bad": dict(sorted(Counter(problem.code for problem in found.problems).items())),
    }


def write_dataset(
    folder: Path,
    head: Mapping[str, Any],
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    cases: Iterable[tuple[str, dict[str, Any]]],
) -> dict[str, Any]:
    """Write ``dataset.json``, the last file of a dataset.

    Args:
        folder: of the dataset.
        head: what its images are.
        source: of :func:`source_entry`.
        settings: that it was made with.
        cases: split and entry of each.

    Returns:
        Its content.
    """
    cases = list(cases)
    content = {
        **head,
        "source": source,
        "created_with": {"monai_synth": __version__, "settings": settings},
        **{split: [case for where, case in cases if where == split] for split in SPLITS},
    }
    write_json(folder / "dataset.json", content)
    return content


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

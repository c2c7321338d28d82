# SPDX-License-Identifier: Apache-2.0
"""``monai-synth prepare pairs``: images with masks, in the forms that users have, to a dataset of pairs."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.data.datalist import SPLITS
from monai_synth.data.intensity import intensity_entry, percentiles_for
from monai_synth.data.pair_files import FILE_ENDINGS
from monai_synth.data.pairs_output import PairResult, PairTask, Recipe, prepare_pair
from monai_synth.data.pairs_source import PairSource, find_pairs
from monai_synth.data.pictures_read import Form
from monai_synth.data.prepare_shared import (
    case_ids,
    check_places,
    check_settings,
    gather,
    groups_by_regex,
    groups_to_split,
    inspect_forms,
    kind_of,
    listed,
    shared_settings,
    source_entry,
    write_dataset,
)
from monai_synth.data.problems import refuse_or_count
from monai_synth.data.source_files import plain
from monai_synth.data.whole_folder import whole_dataset
from monai_synth.data.workers import map_unordered, worker_count
from monai_synth.errors import UserError

_LOG = logging.getLogger(__name__)
_PAIRS_PER_WORKER = 50  # of 0.25 megapixel; a worker's start costs about as much


def prepare_pairs(
    source: str | Path,
    out: str | Path,
    *,
    image_dir: str = "images",
    label_dir: str = "masks",
    label_suffix: str = "",
    labels: Sequence[str] | None = None,
    label_values: Sequence[int] | None = None,
    threshold: float | None = None,
    size: Sequence[int] | None = None,
    patch_size: Sequence[int] | None = None,
    stride: int | None = None,
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] | None = None,
    grey: bool = False,
    modality: str | None = None,
    group_regex: str | None = None,
    anonymize_ids: bool = False,
    splits: Sequence[float] = (0.8, 0.1, 0.1),
    test_dir: str | Path | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    name: str | None = None,
) -> dict[str, Any]:
    """Prepare pairs of images and label maps.

    ``source`` holds two folders with files of equal stems, with ``train/``, ``val/`` and ``test/`` above or below
    them where it is split, or is a raw dataset of nnU-Net v2 or MSD (``imagesTr``, ``labelsTr``). Images and masks are
    PNG, JPEG, TIFF, BMP, NIfTI (2-D, 3-D) or DICOM (one frame). The same source and settings give the same bytes.

    Args:
        source: folder.
        out: folder to write, outside ``source``; it must not exist unless ``overwrite``.
        image_dir: folder of the images.
        label_dir: folder of the masks.
        label_suffix: what stems of masks have after those of their images, such as "_mask".
        labels: names without the background. Default: those of the source's ``dataset.json``.
        label_values: value of each label in the masks. Default: 1, 2, ...; for one label any one value beside 0.
        threshold: for one label: foreground is above it. Default: masks hold labels; 127 for JPEG.
        size: resize to (rows, columns) or (X, Y, Z). Default: keep.
        patch_size: cut into tiles of this size, after any resizing. Default: whole images.
        stride: distance of tiles. Default: ``patch_size``, so that they only overlap at the end.
        window: values that become 0 and 255. Default: 8-bit images are kept, others get ``percentiles``.
        percentiles: of each image, that become 0 and 255. Default: (0.5, 99.5) unless every image has 8 bits.
        grey: make RGB images grey.
        modality: word for the head. Default: as the source says.
        group_regex: where it matches the path of an image below its folder (without its ending), its first group,
            or all of it, names the patient. Default: each image is its own; for DICOM the PatientID.
        anonymize_ids: serial numbers instead of the source's names, as DICOM always gets.
        splits: shares of groups for training, validation and test; those that the source gives are kept.
        test_dir: another folder of the same form, whose pairs are the test split.
        seed: of the split.
        num_workers: processes; None takes up to one per core.
        skip_bad: prepare what is usable and count the rest; otherwise anything unusable refuses the source.
        overwrite: replace a dataset that was prepared before.
        progress: show progress bars.
        name: of the dataset. Default: that of the source's folder.

    Returns:
        The content of ``dataset.json``.

    Raises:
        UserError: a setting is out of range, the source has nothing usable or something unusable, the output may
            not be written, or the disk is full.
    """
    source, out = Path(source).expanduser().absolute(), Path(os.path.abspath(Path(out).expanduser()))
    test = None if test_dir is None else Path(test_dir).expanduser().absolute()
    settings = {
        "labels": listed(labels, str),
        "label_values": listed(label_values, int),
        "threshold": None if threshold is None else float(threshold),
        "size": listed(size, int),
        "patch_size": listed(patch_size, int),
        "stride": None if stride is None else int(stride),
        **shared_settings(
            window=window,
            percentiles=percentiles,
            grey=grey,
            group_regex=group_regex,
            anonymize_ids=anonymize_ids,
            splits=splits,
            seed=seed,
        ),
    }
    _check_settings(settings)
    check_places([source] if test is None else [source, test], out, overwrite)
    found = find_pairs(source, image_dir=image_dir, label_dir=label_dir, label_suffix=label_suffix, test_dir=test)
    forms = inspect_forms({pair.name: pair.images for pair in found.pairs}, grey, found.problems, progress)
    found.pairs = [pair for pair in found.pairs if pair.name in forms]
    _refuse_nothing(found, source)
    label_names, values = _labels(settings, found)
    recipe = _recipe(settings, forms, label_names, values)
    group_of = _groups(found, forms, group_regex)
    if skip_bad or not found.problems:  # else these are told first, with those that are found on the way
        split_groups(found, group_of, settings["splits"], seed)  # too few groups are told before the work
    tasks = _tasks(found, group_of, recipe, anonymize_ids or any(f.modality for f in forms.values()))
    workers = worker_count(num_workers, useful=-(-len(tasks) // _PAIRS_PER_WORKER))
    with whole_dataset(out, overwrite=overwrite) as folder:
        results = _prepare_all(tasks, folder, workers, found, progress)
        refuse_or_count(found.problems, found.ignored, source, skip_bad)
        _refuse_nothing(found, source)
        _refuse_several_values(results)
        split_of = split_groups(found, group_of, settings["splits"], seed)
        head = _head(name or source.name, modality, found, forms, recipe, label_names, results)
        about = _source(found, group_of, list(head["labels"]), results)
        cases = ((split_of[result.task.pair.name], case) for result in results for case in result.cases)
        return write_dataset(folder, head, about, settings, cases)


def split_groups(found: PairSource, group_of: Mapping[str, str], splits: Sequence[float], seed: int) -> dict[str, str]:
    """Split by group, deterministic by seed; the splits that the source gives are kept.

    The other splits are taken from the training folder, by their shares; each with a share above 0 gets at least
    one group.

    Args:
        found: pairs with the splits that the source gives.
        group_of: group by name of the pair.
        splits: shares for training, validation and test.
        seed: of the random order.

    Returns:
        Split by name of the pair.

    Raises:
        UserError: fewer groups than splits, or a group in two splits of the source.
    """
    members = ((group_of[pair.name], pair.split) for pair in found.pairs)
    given, pool, shares = groups_to_split(members, found.given_splits, splits)
    if len(pool) < len(shares):
        got = f"{len(found.pairs)} pair(s) in {len(given)} group(s), {len(pool)} of them to split"
        remedy = "add images, or give --splits 1 0 0 (all for training) or --splits 0.5 0 0.5"
        raise UserError(f"{got}; {', '.join(shares)} need at least one group each; {remedy}")
    order = [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))]
    left = len(order)
    for split in ("test", "validation"):
        if split in shares:
            wanted = int(np.floor(shares[split] / sum(shares.values()) * len(order) + 0.5))
            still = sum(s in shares for s in SPLITS[: SPLITS.index(split)])  # each of them needs one
            take = min(max(wanted, 1), left - still)
            given |= dict.fromkeys(order[left - take : left], split)
            left -= take
    return {pair.name: given[group_of[pair.name]] for pair in found.pairs}


def _check_settings(settings: dict[str, Any]) -> None:
    def names_ok(v: list[str]) -> bool:
        return 1 <= len(v) <= 255 and len(set(v)) == len(v) and "background" not in v and all(v)

    checks = (
        ("labels", "1 to 255 different names, without the background", names_ok),
        (
            "label_values",
            "different numbers from 1 to 255",
            lambda v: set(v) <= set(range(1, 256)) and len(set(v)) == len(v),
        ),
        ("threshold", "0 or more", lambda v: v >= 0),
        ("size", "two or three numbers of pixels, 1 or more", lambda v: len(v) in (2, 3) and min(v) >= 1),
        ("patch_size", "two or three numbers of pixels, 1 or more", lambda v: len(v) in (2, 3) and min(v) >= 1),
        ("stride", "1 or more (pixels)", lambda v: v >= 1),
    )
    check_settings(settings, checks)
    stride, patch = settings["stride"], settings["patch_size"]
    if stride is not None and (patch is None or stride > min(patch)):
        raise UserError(f"stride is {stride}, patch_size {patch}; a stride is at most the patch size. Change --stride")
    if settings["threshold"] is not None and (len(settings["labels"] or ()) > 1 or settings["label_values"]):
        raise UserError("threshold makes one label, but labels or values of labels are given; leave one of them out")


def _labels(settings: Mapping[str, Any], found: PairSource) -> tuple[list[str], tuple[int, ...] | None]:
    """Names without the background, and their values in the masks (None: 1, 2, ..., or any for one)."""
    names, values = settings["labels"], settings["label_values"]
    if names is None:
        if not found.labels:
            raise UserError("labels are not given; name what the masks show, for example --labels nucleus")
        names, values = list(found.labels), values or list(found.labels.values())
    if values is not None and len(values) != len(names):
        raise UserError(f"{len(values)} label_values for {len(names)} labels ({', '.join(names)}); give one for each")
    return names, None if values is None or settings["threshold"] is not None else tuple(values)


def _recipe(
    settings: Mapping[str, Any], forms: Mapping[str, Form], names: Sequence[str], values: tuple[int, ...] | None
) -> Recipe:
    dims, channels = kind_of(next(iter(forms.values())))
    if settings["grey"] and (dims, channels) != (2, 1):
        raise UserError(f"grey is set, but the images are {dims}-D with {channels} channel(s); leave --grey out")
    if dims == 2 and channels not in (1, 3):
        raise UserError(f"the images are 2-D with {channels} channels; allowed are 1 (grey) and 3 (RGB)")
    for key in ("size", "patch_size"):
        if settings[key] is not None and len(settings[key]) != dims:
            raise UserError(f"{key} is {settings[key]}, the images have {dims} axes; give one number for each")
    lists = {key: settings[key] and tuple(settings[key]) for key in ("window", "size", "patch_size")}
    return Recipe(
        spatial_dims=dims,
        channels=channels,
        num_labels=len(names) + 1,
        label_values=values,
        threshold=settings["threshold"],
        percentiles=percentiles_for(settings["window"], settings["percentiles"], forms.values()),
        grey=settings["grey"],
        stride=settings["stride"],
        **lists,
    )


def _groups(found: PairSource, forms: Mapping[str, Form], regex: str | None) -> dict[str, str]:
    """Group by name of the pair, as it will be written: names that become one are one patient, in one split."""
    if regex is not None:
        groups = groups_by_regex({pair.name: pair.key for pair in found.pairs}, regex)
    else:
        groups = {pair.name: forms[pair.name].patient or pair.name for pair in found.pairs}
    return {name: plain(group) for name, group in groups.items()}


def _tasks(found: PairSource, group_of: Mapping[str, str], recipe: Recipe, serial: bool) -> list[PairTask]:
    ids = case_ids({pair.name: group_of[pair.name] for pair in found.pairs}, serial=serial, digits=4)
    return sorted((PairTask(pair, *ids[pair.name], recipe) for pair in found.pairs), key=lambda task: task.case_id)


def _prepare_all(
    tasks: Sequence[PairTask], folder: Path, workers: int, found: PairSource, progress: bool
) -> list[PairResult]:
    """Results in order of the case ids; problems go to ``found``, which keeps the pairs that are well."""
    for part in ("images", "labels"):
        (folder / part).mkdir()
    made = map_unordered(partial(prepare_pair, folder=folder), tasks, workers)
    results = gather(made, len(tasks), "pair", found.problems, progress)
    done = {result.task.pair.name for result in results}
    found.pairs = [pair for pair in found.pairs if pair.name in done]
    return results


def _refuse_nothing(found: PairSource, source: Path) -> None:
    if found.pairs:
        return
    if found.problems:
        refuse_or_count(found.problems, found.ignored, source, skip_bad=False)
    raise UserError(f"source {source} holds no pair; its folders of images and masks are empty")


def _refuse_several_values(results: Sequence[PairResult]) -> None:
    """One label may have any value, but the same one in every mask: 1 here and 2 there may be two things."""
    first: dict[int, str] = {}
    for result in results:
        if result.value is not None:
            first.setdefault(result.value, Path(result.task.pair.label).name)
    if len(first) > 1:
        got = ", ".join(f"{value} in {name}" for value, name in sorted(first.items())[:5])
        raise UserError(
            f"masks show their one label as different values ({got}); if they mean the same, give --threshold 0, "
            "else name every label with --labels"
        )


def _head(
    name: str,
    modality: str | None,
    found: PairSource,
    forms: Mapping[str, Form],
    recipe: Recipe,
    labels: Sequence[str],
    results: Sequence[PairResult],
) -> dict[str, Any]:
    channel_names = _channel_names(modality, found, forms, recipe)
    shapes = set().union(*(result.shapes for result in results))
    return {
        "name": name,
        "task": "pairs",
        "modality": modality or ("RGB" if channel_names == ["R", "G", "B"] else "+".join(channel_names)),
        "image_channels": recipe.channels,
        "channel_names": channel_names,
        "spatial_dims": recipe.spatial_dims,
        "spatial_shape": list(next(iter(shapes))) if len(shapes) == 1 else None,
        "intensity": intensity_entry(recipe.window, recipe.percentiles),
        "labels": {"background": 0, **{label: i for i, label in enumerate(labels, 1)}},
        "file_ending": FILE_ENDINGS[recipe.spatial_dims],
    }


def _channel_names(modality: str | None, found: PairSource, forms: Mapping[str, Form], recipe: Recipe) -> list[str]:
    dims, channels = recipe.spatial_dims, recipe.channels
    if found.channel_names is not None and len(found.channel_names) == channels:
        return found.channel_names
    if channels == 3 and dims == 2:
        return ["R", "G", "B"]
    modalities = {form.modality for form in forms.values()}
    one = modality or (modalities.pop() if len(modalities) == 1 else "") or ("L" if dims == 2 else "unknown")
    return [one] if channels == 1 else [f"{one}{i}" for i in range(channels)]


def _source(
    found: PairSource, group_of: Mapping[str, str], labels: Sequence[str], results: Sequence[PairResult]
) -> dict[str, Any]:
    num_with = [sum(numbers) for numbers in zip(*(result.num_with for result in results), strict=True)]
    for label, number in zip(labels, num_with, strict=True):
        if number == 0:
            _LOG.warning("no mask shows %s", label)
    counts = {
        "num_cases": sum(len(result.cases) for result in results),
        "num_cases_with": dict(zip(labels, num_with, strict=True)),
    }
    return source_entry(found, group_of, {r.task.pair.name: r.digest for r in results}, counts)

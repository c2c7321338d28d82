# SPDX-License-Identifier: Apache-2.0
"""Which split an image goes to: the source's, else by patient and stratified by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from monai_synth.data.classes_source import ClassSource
from monai_synth.data.prepare_shared import groups_to_split
from monai_synth.errors import UserError


def split_by_class(
    found: ClassSource, group_of: Mapping[str, str], splits: Sequence[float], seed: int
) -> dict[str, str]:
    """Assign groups to splits so that each class has its share in each.

    Splits of the source are kept; the others are taken from its training images. Groups are taken by the rarest class
    in them, the larger ones first, each to the split that lacks most of that class. With one image per group every
    class is within one image of its shares. A split that would stay empty gets one group that another can spare.

    Args:
        found: the source.
        group_of: group by name of the image.
        splits: shares of the images for training, validation and test.
        seed: of the random order.

    Returns:
        Split by name of the image.

    Raises:
        UserError: a group in two splits of the source, a split without an image, or a class without one to train on.
    """
    members = ((group_of[item.name], item.split) for item in found.items)
    split_of_group, pool, shares = groups_to_split(members, found.given_splits, splits)
    number = {group: row for row, group in enumerate(pool)}
    counts = np.zeros((len(pool), len(found.classes)), int)
    for item in found.items:
        if item.split == "training":
            counts[number[group_of[item.name]], item.label] += 1
    assigned = _stratify(counts, np.array(list(shares.values())) / sum(shares.values()), seed)
    split_of_group |= {group: list(shares)[column] for group, column in zip(pool, assigned, strict=True)}
    split_of = {item.name: split_of_group[group_of[item.name]] for item in found.items}
    _refuse_empty(found, split_of, list(shares), len(pool))
    return split_of


def _stratify(counts: np.ndarray, shares: np.ndarray, seed: int) -> list[int]:
    """Column of ``shares`` for each row of ``counts`` (groups, classes)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    lacking = shares[:, None] * counts.sum(0)  # (splits, classes)
    rarity = np.argsort(np.argsort(counts.sum(0), kind="stable"))
    rarest = np.where(counts > 0, rarity, len(rarity)).argmin(1) if len(counts) else np.zeros(0, int)
    assigned = [0] * len(counts)
    for row in order[np.argsort(rarity[rarest[order]], kind="stable")]:
        by_class, in_all = lacking[:, rarest[row]], lacking.sum(1)
        column = int(np.lexsort((-in_all.round(9), -by_class.round(9)))[0])
        assigned[row] = column
        lacking[column] -= counts[row]
    for column in sorted(set(range(len(shares))) - set(assigned)):  # few images: one from where most are too many
        have = shares[:, None] * counts.sum(0) - lacking
        spare = [row for row in order if (have[assigned[row]] > counts[row])[counts[row] > 0].all()]
        if spare:
            row = min(spare, key=lambda row: lacking[assigned[row], rarest[row]].round(9))
            lacking[assigned[row]] += counts[row]
            lacking[column] -= counts[row]
            assigned[row] = column
    return assigned


def _refuse_empty(found: ClassSource, split_of: Mapping[str, str], shares: Sequence[str], num_groups: int) -> None:
    empty = [split for split in shares if split not in split_of.values()]
    if empty:
        got = f"{len(found.items)} image(s), {num_groups} group(s) to split"
        remedy = "add images, or give --splits 1 0 0 (all for training) or --splits 0.5 0 0.5"
        raise UserError(f"{got}; nothing is left for {', '.join(empty)}; {remedy}")
    trained = {item.label for item in found.items if split_of[item.name] == "training"}
    missing = [name for label, name in enumerate(found.classes) if label not in trained]
    if missing:
        remedy = "add images of them, change --splits, or take them away with --classes and --skip-bad"
        raise UserError(f"no image to train on of class {', '.join(missing)}; {remedy}")

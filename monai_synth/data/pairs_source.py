# SPDX-License-Identifier: Apache-2.0
"""Which image belongs to which label map: the forms of a source of ``monai-synth prepare pairs``.

Known are two folders with equal stems, the same per split, and the raw datasets of nnU-Net v2 and of the Medical
Segmentation Decathlon (MSD). Files are told by their names here; what is in them is read by ``pictures_read``.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_synth.data.pictures_read import ENDINGS
from monai_synth.data.problems import Problem
from monai_synth.data.source_files import files_below, image_files, plain, split_folders
from monai_synth.errors import UserError

_CHANNEL = re.compile(r"(.+)_(\d{4})$")


@dataclass(frozen=True)
class Pair:
    """Files of one image and its label map.

    Attributes:
        key: path of the image below its folder, without its ending, with "/".
        images: one file, or one per channel.
        label: the mask's file.
        split: the source's; "training" where it gives none.
        prefix: folder of the split, where the same key occurs in two of them.
    """

    key: str
    images: tuple[str, ...]
    label: str
    split: str = "training"
    prefix: str = ""

    @property
    def name(self) -> str:
        """Name that no other pair of the source has."""
        return f"{self.prefix}/{self.key}" if self.prefix else self.key


@dataclass
class PairSource:
    """What a folder holds.

    Attributes:
        form: "folders", "nnU-Net" or "MSD".
        pairs: by name.
        problems: everything that is not one half of a pair.
        given_splits: which the source gives, beside the training folder.
        labels: value by name without the background, as the source's ``dataset.json`` says; None without.
        channel_names: likewise.
        ignored: what is rightly left out, counted by reason.
        repeated: files whose stem another file of the same folder has; they are in no pair.
    """

    form: str = "folders"
    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    given_splits: tuple[str, ...] = ()
    labels: dict[str, int] | None = None
    channel_names: list[str] | None = None
    ignored: Counter[str] = field(default_factory=Counter)
    repeated: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Part:
    """Two folders that belong together."""

    split: str
    folder: str
    images: Path
    labels: Path


def find_pairs(
    source: Path, *, image_dir: str, label_dir: str, label_suffix: str = "", test_dir: Path | None = None
) -> PairSource:
    """Match images and label maps by name.

    Args:
        source: folder; see the module.
        image_dir: folder of the images below ``source`` or below each of its splits.
        label_dir: likewise for the masks.
        label_suffix: what the stems of masks have after those of their images, such as "_mask".
        test_dir: another folder with ``image_dir`` and ``label_dir``, whose pairs make the test split.

    Raises:
        UserError: it is no folder, of none of the forms, or holds no pair.
    """
    if not source.is_dir():
        raise UserError(f"source {source} is not a folder; give the folder that holds {image_dir}/ and {label_dir}/")
    found = PairSource()
    parts = _parts(source, image_dir, label_dir, found)
    _read_description(source, found)
    if test_dir is not None:
        if any(part.split == "test" for part in parts):
            raise UserError(f"source {source} has a test folder of its own; leave --test-dir out")
        parts.append(_part("test", test_dir.name, test_dir, image_dir, label_dir))
    for part in parts:
        found.pairs += _pairs_of(part, label_suffix, found)
    if len(parts) > 1:
        found.given_splits = tuple(part.split for part in parts if part.split != "training")
        _separate_names(found, {part.split: part.folder for part in parts})
    _refuse_same_names(found)
    found.pairs.sort(key=lambda pair: pair.name)
    found.problems.sort(key=lambda problem: problem.message)
    return found


def _parts(source: Path, image_dir: str, label_dir: str, found: PairSource) -> list[_Part]:
    decathlon = source / "imagesTr"
    if decathlon.is_dir() and ((source / image_dir) == decathlon or not (source / image_dir).is_dir()):
        found.form = "MSD"
        parts = [_part("training", "Tr", source, "imagesTr", "labelsTr")]
        if _holds_files(source / "labelsTs"):
            parts.append(_part("test", "Ts", source, "imagesTs", "labelsTs"))
        elif (source / "imagesTs").is_dir():
            found.ignored["imagesTs_without_labels"] = sum(1 for _ in files_below(source / "imagesTs", (), []))
        return parts
    whole = source / image_dir
    above = [  # train/images
        _part(split, folder, source / folder, image_dir, label_dir)
        for split, folder in split_folders(source)
        if not whole.is_dir() and (source / folder / image_dir).is_dir()
    ]
    below = [  # images/train
        _part(split, folder, source, f"{image_dir}/{folder}", f"{label_dir}/{folder}")
        for split, folder in (split_folders(whole) if _holds_only_splits(whole) else [])
    ]
    parts = above or below
    if not parts and whole.is_dir():
        return [_part("training", "", source, image_dir, label_dir)]
    splits = [part.split for part in parts]
    if len(splits) != len(set(splits)):
        raise UserError(
            f"source {source} has two folders for one split: {', '.join(p.folder for p in parts)}; keep one"
        )
    if "training" not in splits:
        has = ", ".join(sorted(p.name for p in source.iterdir())[:8]) or "nothing"
        needs = f"{image_dir}/ or train/{image_dir}/ (--image-dir), or imagesTr/ of an nnU-Net or MSD dataset"
        raise UserError(f"source {source} holds {has}; needed is {needs}")
    return parts


def _holds_only_splits(folder: Path) -> bool:
    inside = {p.name for p in folder.iterdir() if not p.name.startswith(".")} if folder.is_dir() else set()
    return "training" in dict(split_folders(folder)) and inside == {name for _, name in split_folders(folder)}


def _part(split: str, folder: str, root: Path, image_dir: str, label_dir: str) -> _Part:
    if not (root / image_dir).is_dir():
        raise UserError(f"{root} has no folder {image_dir}; give the folder of its images with --image-dir")
    if not (root / label_dir).is_dir():
        has = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "none"
        raise UserError(f"{root} has no folder {label_dir} with the masks (folders: {has}); name it with --label-dir")
    return _Part(split, folder, root / image_dir, root / label_dir)


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(files_below(folder, (), []))


def _read_description(source: Path, found: PairSource) -> None:
    """Labels and channels of the ``dataset.json`` of nnU-Net v2 or MSD."""
    path = source / "dataset.json"
    if found.form != "MSD" or not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        channels = content.get("channel_names", content.get("modality", {}))
        labels = content["labels"]
        if "file_ending" in content:
            found.form = "nnU-Net"
            if content["file_ending"] not in ENDINGS:
                raise UserError(f"{path}: file_ending {content['file_ending']}; allowed are {', '.join(ENDINGS)}")
        found.channel_names = [str(channels[k]) for k in sorted(channels, key=int)] or None
        found.labels = _labels(labels, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be used ({error!r}); mend it, or take it away and give --labels") from error


def _labels(labels: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Value by name, from ``{"name": value}`` (nnU-Net) or ``{"value": "name"}`` (MSD)."""
    if all(str(key).isdigit() for key in labels):
        labels = {name: int(value) for value, name in labels.items()}
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions or "ignore" in labels:
        what = f"regions ({', '.join(regions)})" if regions else "the label 'ignore'"
        raise UserError(f"{path}: {what} cannot be modelled; write masks with one plain label per pixel")
    return {str(name): int(value) for name, value in labels.items() if int(value) != 0}


def _pairs_of(part: _Part, suffix: str, found: PairSource) -> list[Pair]:
    images = _by_key(part.images, found)
    same_folder = part.images.resolve() == part.labels.resolve()
    if same_folder and not suffix:
        raise UserError(f"{part.images} holds images and masks alike; tell masks with --label-suffix, such as _mask")
    labels = images if same_folder else _by_key(part.labels, found)
    if same_folder:
        images = {key: path for key, path in images.items() if not key.endswith(suffix)}
        labels = {key: path for key, path in labels.items() if key.endswith(suffix)}
    channels = _by_channel(images, found) if found.form == "nnU-Net" else {k: (path,) for k, path in images.items()}
    for key in sorted(channels.keys() - {k.removesuffix(suffix) for k in labels if k.endswith(suffix)}):
        msg = f"{channels[key][0]}: no mask {key}{suffix} in {part.labels}{_suffix_hint(key, suffix, labels)}"
        found.problems.append(Problem("no_label", msg))
    for key in sorted(labels):
        if not key.endswith(suffix):
            msg = f"{labels[key]}: its name does not end with {suffix} (--label-suffix)"
            found.problems.append(Problem("no_image", msg))
        elif key.removesuffix(suffix) not in channels:
            msg = f"{labels[key]}: no image {key.removesuffix(suffix)} in {part.images}"
            found.problems.append(Problem("no_image", msg))
    return [
        Pair(key, files, labels[key + suffix], part.split)
        for key, files in channels.items()
        if key + suffix in labels and found.repeated.isdisjoint((*files, labels[key + suffix]))
    ]


def _suffix_hint(key: str, suffix: str, labels: Mapping[str, str]) -> str:
    longer = [label[len(key) :] for label in labels if not suffix and label.startswith(key) and label != key]
    return f" (give --label-suffix {longer[0]} for {key}{longer[0]}?)" if len(longer) == 1 else ""


def _by_key(folder: Path, found: PairSource) -> dict[str, str]:
    """Path by key; files of unknown kind and two files of one key are problems."""
    problems = found.problems
    paths: dict[str, list[str]] = defaultdict(list)
    for key, path in image_files(folder, problems):
        paths[key].append(path)
    for several in paths.values():
        if len(several) > 1:
            msg = f"{several[0]}: the same stem as {', '.join(several[1:])}; keep one"
            problems.append(Problem("duplicate_stem", msg))
            found.repeated.add(several[0])
    return {key: several[0] for key, several in paths.items()}


def _by_channel(images: Mapping[str, str], found: PairSource) -> dict[str, tuple[str, ...]]:
    """Files by case of an nnU-Net raw dataset, in order of their channels."""
    cases: dict[str, dict[str, str]] = defaultdict(dict)
    for key, path in images.items():
        match = _CHANNEL.match(key)
        if match is None:
            msg = f"{path}: no channel number; nnU-Net's names end with _0000, _0001, ..."
            found.problems.append(Problem("no_channel", msg))
        else:
            cases[match[1]][match[2]] = path
    wanted = sorted({channel for files in cases.values() for channel in files})
    for case in [case for case, files in cases.items() if sorted(files) != wanted]:
        files = cases.pop(case)
        missing = ", ".join(sorted(set(wanted) - set(files)))
        found.problems.append(Problem("missing_channel", f"{min(files.values())}: no channel {missing} of this case"))
    return {case: tuple(files[channel] for channel in wanted) for case, files in cases.items()}


def _separate_names(found: PairSource, folders: Mapping[str, str]) -> None:
    """Put the split before the names where two splits use the same one."""
    times = Counter(pair.key for pair in found.pairs)
    if any(n > 1 for n in times.values()):
        found.pairs = [Pair(p.key, p.images, p.label, p.split, folders[p.split]) for p in found.pairs]


def _refuse_same_names(found: PairSource) -> None:
    """Case ids are file names: two must differ in more than case or replaced characters."""
    first: dict[str, Pair] = {}
    for pair in sorted(found.pairs, key=lambda pair: pair.name):
        other = first.setdefault(plain(pair.name).casefold(), pair)
        if other is not pair:
            msg = f"{pair.images[0]}: its name becomes that of {other.images[0]}; rename one"
            found.problems.append(Problem("duplicate_stem", msg))
    found.pairs = list(first.values())

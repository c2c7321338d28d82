# SPDX-License-Identifier: Apache-2.0
"""What to sample of the joint variable: seeds, and the parts of image and label that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.engines import PrepareBatch

from monai_synth.checks import whole
from monai_synth.data.datalist import read_dataset
from monai_synth.data.joint import check_value_range, to_joint
from monai_synth.data.pair_files import read_image, read_label, resize_image, resize_label
from monai_synth.data.slices import check_labels
from monai_synth.errors import UserError
from monai_synth.inference.cases import MAP_ENDINGS, read_label_file

CONDITIONS = (None, "mask", "image", "region")
SEEDS_PER_ATTEMPT = 2**32  # attempt a takes seed + a times this; an ensemble's members are 2**40 apart

_NEEDS = {None: (), "mask": ("label",), "image": ("image",), "region": ("image", "label")}
_OPTIONS = {"label": "masks", "image": "images"}


class PairSamplingDataset(torch.utils.data.Dataset):
    """One item per pair to make; pair ``i`` takes source case ``i mod n`` and seed ``seed + i``.

    A pair that a filter refused is made again with the seed of its next attempt, see :meth:`retry`.

    Args:
        condition: what is given: nothing (None), the ``mask``, the ``image``, or all but a ``region`` of both.
        dataset_dir: prepared dataset of task "pairs" that the given parts come from.
        split: split of it.
        label_dir: folder of given masks in its stead, PNG or NIfTI; for two labels 0/255 counts as 0/1.
        image_dir: folder of given images in its stead, PNG or NIfTI of values 0..255.
        regions: what ``region`` paints anew: a folder of masks that are named like the cases (nonzero: new), or a
            box [top, left, bottom, right] in the model's pixels; for volumes the three starts, then the three stops.
        resize_maps: resize files of ``label_dir`` and ``image_dir`` that are not of the model's size; those of a
            prepared dataset always are.
        num_samples: pairs in all, over all processes.
        seed: seed of the first pair.
        image_size: the model's S.
        image_channels: the model's C.
        labels: the model's, name -> value; K of them.
        value_range: the model's.
        spacing: mm along each axis of the model's pixels, for pairs whose source says nothing. Default: 1.
        is_done: whether a pair of this id is there already; it is left out.
        process: (rank, number of processes); each takes every n-th pair, so that seeds do not depend on them.
        case_prefix: begins the ids of pairs without a source case.

    Items: ``known`` (C + K - 1, *S) float32 with the given values, ``is_known`` of that shape, ``seed``, ``case_id``,
    ``index``, ``attempt``, ``conditioning``, ``spacing``.

    Raises:
        UserError: options that do not go together, a dataset of another kind than the model's, nothing to sample from,
            or a file of another size, kind or value than the model takes.
    """

    def __init__(
        self,
        *,
        condition: str | None,
        dataset_dir: str | Path,
        split: str,
        num_samples: int,
        seed: int,
        image_size: Sequence[int],
        image_channels: int,
        labels: Mapping[str, int],
        value_range: Sequence[float],
        label_dir: str | Path | None = None,
        image_dir: str | Path | None = None,
        regions: str | Path | Sequence[int] | None = None,
        resize_maps: bool = False,
        spacing: Sequence[float] | None = None,
        is_done: Callable[[str], bool] | None = None,
        process: tuple[int, int] = (0, 1),
        case_prefix: str = "jdm",
    ) -> None:
        whole("num_samples", num_samples)
        whole("seed", seed, 0)
        self.num_samples = num_samples
        self.condition = condition
        self.image_size = tuple(int(side) for side in image_size)
        self.image_channels = int(image_channels)
        self.labels = dict(labels)
        self.value_range = check_value_range(value_range)
        self.resize_maps = resize_maps
        self.spacing = [float(mm) for mm in spacing or [1.0] * len(self.image_size)]
        folders = {"label": label_dir, "image": image_dir}
        _check_condition(condition, folders, regions)
        self.cases = self._sources(dataset_dir, split, folders)
        self.box = self._box(regions) if condition == "region" and not isinstance(regions, (str, Path)) else None
        if condition == "region" and self.box is None:
            self._find_regions(Path(regions).expanduser())
        self.data = []
        for i in range(process[0], num_samples, process[1]):
            case = i % len(self.cases) if self.cases else None
            name = case_prefix + "_" if case is None else self.cases[case]["case_id"] + "_s"
            case_id = f"{name}{seed + i:06d}"
            if is_done is None or not is_done(case_id):
                self.data.append({"case_id": case_id, "case": case, "index": i, "seed": seed + i, "attempt": 0})

    def __len__(self) -> int:
        return len(self.data)

    def retry(self, case_ids: Sequence[str]) -> None:
        """Keep only these pairs, each with the seed of its next attempt."""
        again = set(case_ids)
        self.data = [
            item | {"seed": item["seed"] + SEEDS_PER_ATTEMPT, "attempt": item["attempt"] + 1}
            for item in self.data
            if item["case_id"] in again
        ]

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        known, is_known, spacing, conditioning = self._given(item["case"])
        return {
            "known": known, "is_known": is_known, "seed": item["seed"], "case_id": item["case_id"],
            "index": item["index"], "attempt": item["attempt"], "conditioning": conditioning, "spacing": spacing,
        }  # fmt: skip

    def _given(self, case: int | None) -> tuple[torch.Tensor, torch.Tensor, list[float], dict[str, Any]]:
        """What is known of a pair, where, the pair's spacing, and what its provenance says about it."""
        shape = (self.image_channels + len(self.labels) - 1, *self.image_size)
        if case is None:
            return torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), list(self.spacing), {}
        source = self.cases[case]
        image, label, size = self._read(source)
        known = to_joint(image[None], label[None], len(self.labels), self.value_range)[0]
        is_known = torch.zeros(shape, dtype=torch.bool)
        conditioning = {"condition": self.condition, "case": source["case_id"], "source": source["source"]}
        if self.condition == "image":
            is_known[: self.image_channels] = True
        elif self.condition == "mask":
            is_known[self.image_channels :] = True
        else:
            is_known[:] = ~self._region(source, size)
            conditioning["region"] = self.box or Path(source["region"]).name
        spacing = source.get("spacing")
        scaled = [mm * old / new for mm, old, new in zip(spacing or self.spacing, size, self.image_size, strict=True)]
        return known, is_known, scaled if spacing else list(self.spacing), conditioning

    # Where the given parts come from

    def _sources(
        self, dataset_dir: str | Path, split: str, folders: Mapping[str, str | Path | None]
    ) -> list[dict[str, Any]]:
        """Cases with the files that the condition needs."""
        needs = _NEEDS[self.condition]
        if not needs:
            return []
        if any(folders.values()):
            return _folder_cases({key: Path(folders[key]).expanduser() for key in needs}, len(self.image_size))
        dataset = read_dataset(dataset_dir, task="pairs")
        head = {
            "image_channels": (dataset.content["image_channels"], self.image_channels),
            "spatial_dims": (dataset.content.get("spatial_dims"), len(self.image_size)),
            "labels": (dataset.labels, self.labels),
        }
        for key, (got, wanted) in head.items():
            if got != wanted:
                msg = (
                    f"dataset_dir {dataset.root} has {key} {got}, the model was trained with {wanted}; "
                    "give a dataset that was prepared like the model's"
                )
                raise UserError(msg)
        cases = [dict(case, source=split) for case in dataset.datalist(split)]
        if not cases:
            option = " or ".join(f"--{_OPTIONS[key]} FOLDER" for key in needs)
            raise UserError(f"split {split!r} of {dataset_dir} has no case; give another --split, or {option}")
        return cases

    def _read(self, case: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]]:
        """Image (C, *S) and label (*S) at the model's size, zeros where not needed, and the size on disk."""
        prepared = case["source"] not in _OPTIONS.values()
        parts: dict[str, np.ndarray] = {}
        for key in _NEEDS[self.condition]:
            path = case[key]
            if key == "image":
                array = read_image(path) if prepared else read_given_image(path, len(self.image_size))
                if len(array) != self.image_channels:
                    msg = f"image {path} has {len(array)} channel(s), the model makes {self.image_channels}"
                    raise UserError(f"{msg}; give images like those it was trained with")
                size = array.shape[1:]
            else:
                array = read_label(path) if prepared else read_given_mask(path, len(self.image_size), len(self.labels))
                check_labels(array, len(self.labels), str(path))
                size = array.shape
            if not prepared and not self.resize_maps:
                self._require_size(path, size)
            parts[key] = array
        sizes = {key: array.shape[-len(self.image_size) :] for key, array in parts.items()}
        if len(set(sizes.values())) > 1:
            msg = (
                f"image and mask of case {case['case_id']} are {sizes['image']} and {sizes['label']}; give equal sizes"
            )
            raise UserError(msg)
        image, label = parts.get("image"), parts.get("label")
        image = self._zeros(self.image_channels) if image is None else resize_image(image, self.image_size)
        label = (
            self._zeros() if label is None else resize_label(label.astype(np.uint8), self.image_size, len(self.labels))
        )
        return torch.from_numpy(image.copy()), torch.from_numpy(label.copy()), size

    def _zeros(self, *channels: int) -> np.ndarray:
        return np.zeros((*channels, *self.image_size), np.uint8)

    def _require_size(self, path: str | Path, size: Sequence[int]) -> None:
        if tuple(size) != self.image_size:
            got, wanted = ("x".join(map(str, s)) for s in (size, self.image_size))
            msg = f"{path} is {got}, the model makes {wanted}; give files of that size, or --resize_maps True"
            raise UserError(msg)

    # Regions

    def _box(self, box: Sequence[int]) -> list[int]:
        """The box, if it is one inside the model's image."""
        dims = len(self.image_size)
        values = list(box)
        whole = len(values) == 2 * dims and all(type(v) is int for v in values)
        if not whole or not all(
            0 <= a < b <= side for a, b, side in zip(values[:dims], values[dims:], self.image_size, strict=True)
        ):
            names = "[top, left, bottom, right]" if dims == 2 else "[x, y, z of the start, x, y, z of the stop]"
            msg = f"regions is {values}; give {names} inside the model's {'x'.join(map(str, self.image_size))} pixels"
            raise UserError(msg + ", each stop above its start, or a folder of masks")
        return values

    def _find_regions(self, folder: Path) -> None:
        """Name each case's region file."""
        files = {_stem(path): path for path in _files(folder, "regions")}
        missing = [case["case_id"] for case in self.cases if case["case_id"] not in files]
        if missing:
            msg = f"regions {folder} has no mask for {len(missing)} of {len(self.cases)} cases"
            raise UserError(f"{msg} (e.g. {missing[0]}); name each {missing[0]}.png, say, or give a box")
        for case in self.cases:
            case["region"] = str(files[case["case_id"]])

    def _region(self, case: Mapping[str, Any], size: Sequence[int]) -> torch.Tensor:
        """Where a pair is painted anew, (*S) bool."""
        if self.box is not None:
            region = torch.zeros(self.image_size, dtype=torch.bool)
            dims = len(self.image_size)
            region[tuple(slice(a, b) for a, b in zip(self.box[:dims], self.box[dims:], strict=True))] = True
            return region
        array = (read_given_mask(case["region"], len(self.image_size)) != 0).astype(np.uint8)
        if array.shape != tuple(size):
            msg = f"region {case['region']} has shape {array.shape}, its case has {tuple(size)}; give equal sizes"
            raise UserError(msg)
        region = torch.from_numpy(resize_label(array, self.image_size, 2).copy()).bool()
        if not region.any():
            raise UserError(f"region {case['region']} is empty; mark what is to be painted anew with nonzero pixels")
        return region


def read_given_mask(path: str | Path, dims: int, num_labels: int | None = None) -> np.ndarray:
    """Label map (*S) of a PNG or NIfTI file; for two labels 0/255 is read as 0/1.

    Raises:
        UserError: damaged, or of another number of dimensions.
    """
    if dims == 2:
        array = read_label_file(path)
    else:
        array = _volume(path)
        if array.ndim != 3:
            raise UserError(f"{path} has shape {array.shape}; a mask is a volume (X, Y, Z) of one value per voxel")
    if num_labels == 2 and array.max() == 255 and set(np.unique(array)) <= {0, 255}:
        return (array == 255).astype(np.uint8)
    return array


def read_given_image(path: str | Path, dims: int) -> np.ndarray:
    """uint8 (C, *S) of a PNG file (2-D) or of a NIfTI file whose values are whole numbers 0 to 255.

    Raises:
        UserError: damaged, of another number of dimensions, or of other values.
    """
    if str(path).endswith(".png"):
        return read_image(path)
    array = _volume(path)
    if dims == 2:
        array = array[:, :, 0] if array.ndim > 2 and array.shape[2] == 1 else array
        array = np.swapaxes(array, 0, 1)
    if array.ndim not in (dims, dims + 1):
        raise UserError(f"{path} has shape {array.shape}; the model makes images of {dims} dimensions")
    if array.min() < 0 or array.max() > 255 or not np.array_equal(array, np.round(array)):
        msg = f"{path} has values {array.min():g} to {array.max():g}; given images hold whole numbers 0 to 255"
        raise UserError(f"{msg}, as `monai-synth prepare pairs` writes them")
    return (array[None] if array.ndim == dims else np.moveaxis(array, -1, 0)).astype(np.uint8)


def _volume(path: str | Path) -> np.ndarray:
    try:
        return np.asarray(nib.load(path).dataobj)
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise UserError(f"{path} cannot be read as NIfTI ({error}); write the file again") from error


def _file_spacing(path: Path, dims: int) -> list[float] | None:
    """mm along each array axis as the header says; None for PNG, which says nothing."""
    if path.name.endswith(".png"):
        return None
    try:
        zooms = [float(mm) for mm in nib.load(path).header.get_zooms()]
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise UserError(f"{path} cannot be read as NIfTI ({error}); write the file again") from error
    return [zooms[1], zooms[0]] if dims == 2 else zooms[:3]


def _stem(path: Path) -> str:
    """File name without its ending."""
    return next(path.name[: -len(ending)] for ending in MAP_ENDINGS[::-1] if path.name.endswith(ending))


def _files(folder: Path, option: str) -> list[Path]:
    files = sorted(p for p in folder.glob("[!.]*") if p.name.endswith(MAP_ENDINGS)) if folder.is_dir() else []
    if not files:
        raise UserError(f"{option} {folder} holds no file to sample from; allowed are {', '.join(MAP_ENDINGS)} files")
    return files


def _folder_cases(folders: Mapping[str, Path], dims: int) -> list[dict[str, Any]]:
    """Cases of given folders, joined by the files' names."""
    found = {key: {_stem(path): path for path in _files(folder, _OPTIONS[key])} for key, folder in folders.items()}
    names = set.union(*(set(files) for files in found.values()))
    for key, files in found.items():
        lacking = sorted(names - set(files))
        if lacking:
            msg = f"{_OPTIONS[key]} {folders[key]} has no file for {lacking[0]}, which the other folder has"
            raise UserError(f"{msg}; give files of equal names in both")
    cases = []
    for name in sorted(names):
        files = {key: paths[name] for key, paths in found.items()}
        first = next(iter(files.values()))
        case = {"case_id": name, "source": _OPTIONS[next(iter(files))], "spacing": _file_spacing(first, dims)}
        cases.append(case | {key: str(path) for key, path in files.items()})
    return cases


def _check_condition(
    condition: str | None, folders: Mapping[str, str | Path | None], regions: str | Path | Sequence[int] | None
) -> None:
    """Refuse options that do not go together."""
    if condition not in CONDITIONS:
        raise UserError(f"condition is {condition!r}; allowed are mask, image and region, or none for whole pairs")
    given = {key: folder for key, folder in folders.items() if folder is not None}
    useless = [_OPTIONS[key] for key in given if key not in _NEEDS[condition]]
    if regions is not None and condition != "region":
        useless.append("regions")
    if useless:
        what = "whole pairs are sampled" if condition is None else f"condition is {condition!r}"
        use = {"masks": "mask", "images": "image", "regions": "region"}[useless[0]]
        raise UserError(f"{useless[0]} is given, but {what}; leave it out, or give --condition {use}")
    if condition == "region" and regions is None:
        raise UserError("condition is 'region' without regions; give --regions FOLDER or [top, left, bottom, right]")
    if condition == "region" and len(given) == 1:
        have, lack = _OPTIONS[next(iter(given))], _OPTIONS[next(key for key in folders if key not in given)]
        raise UserError(
            f"{have} is given without {lack}; painting a region anew needs image and mask: give --{lack} too"
        )


def collate_pairs(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack ``known`` and ``is_known`` and keep everything else as lists."""
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    return batch | {key: torch.stack(batch[key]) for key in ("known", "is_known")}


class PairSamplingPrepareBatch(PrepareBatch):
    """Batch of :class:`PairSamplingDataset` -> (known, None, (), {is_known, seeds}); is_known None if nothing is."""

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None, tuple, dict[str, Any]]:
        known = batchdata["known"].to(device, non_blocking=non_blocking)
        is_known = batchdata["is_known"]
        is_known = is_known.to(device, non_blocking=non_blocking) if is_known.any() else None
        return known, None, (), {"is_known": is_known, "seeds": batchdata["seed"]}

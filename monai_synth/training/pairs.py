# SPDX-License-Identifier: Apache-2.0
"""From a prepared dataset of pairs to what the joint diffusion model trains on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureTyped,
    RandFlipd,
    RandSpatialCropd,
    SelectItemsd,
    Transform,
)
from torch.utils.data import Sampler

from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.data.joint import to_joint
from monai_synth.data.pair_files import read_image, read_label, resize_image, resize_label
from monai_synth.data.slices import check_labels
from monai_synth.diffusion import DiffusionTarget, add_noise
from monai_synth.errors import UserError
from monai_synth.training.prepare_batch import NoisyPrepareBatch


def pair_list(dataset_dir: str, split: str) -> list[dict[str, Any]]:
    """Cases of a split with absolute paths and their ``index``; a dataset without validation validates on training.

    Raises:
        UserError: the training split is empty, or see ``read_dataset``.
    """
    return read_dataset(dataset_dir, task="pairs").indexed(split)


def num_real(dataset: PreparedDataset) -> int:
    """Real pairs that are 100 % where synthetic ones are counted in percent: what nnU-Net makes its folds of.

    These are training and validation, of which ``experiment nnunet`` makes the real set.
    """
    return sum(len(dataset.content.get(split, [])) for split in ("training", "validation"))


def pair_spacing(cases: Sequence[Mapping[str, Any]], image_size: Sequence[int], scale: float | None) -> list[float]:
    """Median spacing in mm of what the model sees, along each axis: of volumes resized or scaled; 1 for pictures.

    Args:
        cases: of :func:`pair_list`.
        image_size: spatial size that the model takes.
        scale: None where images are resized to ``image_size``, else the factor of :class:`LoadPair`.
    """
    if len(image_size) == 2:
        return [1.0, 1.0]
    found = []
    for case in cases:
        shape = nib.load(case["image"]).shape[: len(image_size)]
        factors = [new / old if scale is None else scale for new, old in zip(image_size, shape, strict=True)]
        found.append([mm / factor for mm, factor in zip(case["spacing"], factors, strict=True)])
    return [float(mm) for mm in np.median(found, axis=0)]


def epochs_for(num_iterations: int, iterations_per_epoch: int) -> int:
    """Epochs that hold at least ``num_iterations``.

    Raises:
        UserError: one of them is below 1.
    """
    if num_iterations < 1 or iterations_per_epoch < 1:
        msg = f"num_iterations {num_iterations} and iterations_per_epoch {iterations_per_epoch} must be at least 1"
        raise UserError(msg)
    return math.ceil(num_iterations / iterations_per_epoch)


class LoadPair(Transform):
    """Paths -> ``image`` uint8 (C, *S) and ``label`` uint8 (1, *S), checked and resized.

    Args:
        image_size: spatial size that the model takes.
        image_channels: C.
        num_labels: values that a label map may have.
        scale: None resizes to ``image_size`` (the text's way); a number resizes each image by that factor, never
            below ``image_size``, to be cropped afterwards.
    """

    def __init__(
        self, image_size: Sequence[int], *, image_channels: int, num_labels: int, scale: float | None = None
    ) -> None:
        self.image_size = tuple(image_size)
        self.image_channels = image_channels
        self.num_labels = num_labels
        self.scale = scale

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image, label = read_image(data["image"]), read_label(data["label"])
        check_labels(label, self.num_labels, str(data["label"]))
        if len(image) != self.image_channels or image.shape[1:] != label.shape:
            msg = (
                f"{data['image']} has shape {image.shape} and its label {label.shape}; needed are "
                f"{self.image_channels} channels and equal sizes: prepare the dataset again"
            )
            raise UserError(msg)
        size = self.image_size
        if len(size) != label.ndim:
            msg = f"{data['image']} has {label.ndim} spatial axes, image_size is {list(size)}; give {label.ndim} sizes"
            raise UserError(msg)
        if self.scale is not None:
            size = tuple(max(round(s * self.scale), least) for s, least in zip(label.shape, size, strict=True))
        image, label = resize_image(image, size), resize_label(label, size, self.num_labels)
        return {**data, "image": torch.from_numpy(image.copy()), "label": torch.from_numpy(label.copy())[None]}


def pair_preprocessing(
    image_size: Sequence[int],
    *,
    image_channels: int,
    num_labels: int,
    random: bool,
    patches: bool = False,
    patch_scale: float = 1.0,
    flips: bool = False,
) -> Compose:
    """Files -> ``image`` uint8 (C, *image_size), ``label`` uint8 (1, *image_size), ``index``.

    Args:
        image_size: spatial size that the model takes.
        image_channels: C.
        num_labels: values that a label map may have.
        random: random patches and flips, for training; else the patch in the middle.
        patches: patches of ``image_size`` instead of whole images resized to it.
        patch_scale: size of the image before a patch is taken, relative to the file's.
        flips: random flips along each axis.

    Raises:
        UserError: ``patch_scale`` is not positive.
    """
    if not patch_scale > 0:
        raise UserError(f"patch_scale is {patch_scale!r}; allowed are factors above 0, 1 keeps the pixel size")
    keys = ("image", "label")
    steps: list[Any] = [
        LoadPair(
            image_size,
            image_channels=image_channels,
            num_labels=num_labels,
            scale=patch_scale if patches else None,
        )
    ]
    if patches and random:
        steps.append(RandSpatialCropd(keys=keys, roi_size=tuple(image_size), random_size=False))
    elif patches:
        steps.append(CenterSpatialCropd(keys=keys, roi_size=tuple(image_size)))
    if flips and random:
        steps += [RandFlipd(keys=keys, prob=0.5, spatial_axis=axis) for axis in range(len(image_size))]
    # a network that is fed MetaTensors pays milliseconds per call
    return Compose([*steps, EnsureTyped(keys=keys, track_meta=False), SelectItemsd(keys=[*keys, "index"])])


class IterationSampler(Sampler[int]):
    """A fixed number of draws per epoch, every case equally often, shared out among the processes.

    Epochs of a data set of 30 images would be over in three iterations; training lengths are given in iterations.

    Args:
        num_cases: cases to draw from.
        num_samples: draws of one process in one epoch.
        seed: of the order.
        rank: this process.
        num_replicas: processes.
    """

    def __init__(self, num_cases: int, num_samples: int, *, seed: int, rank: int = 0, num_replicas: int = 1) -> None:
        self.num_cases, self.num_samples = int(num_cases), int(num_samples)
        if self.num_samples < 1:
            msg = f"an epoch has {num_samples} draws; give an --iterations_per_epoch and a --batch_size of at least 1"
            raise UserError(msg)
        self.seed, self.rank, self.num_replicas = int(seed), rank, num_replicas
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the coming epoch."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.num_samples

    def places(self) -> range:
        """The stretch of an endless row that this process takes in this epoch."""
        per_epoch = self.num_samples * self.num_replicas
        first = (self.epoch - 1) * per_epoch + self.rank
        return range(first, first + per_epoch, self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        # one endless row of permutations
        current, order = None, []
        for i in self.places():
            number, place = divmod(i, self.num_cases)
            if number != current:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
                order = torch.randperm(self.num_cases, generator=generator).tolist()
                current = number
            yield order[place]


class JointDiffusionPrepareBatch(NoisyPrepareBatch):
    """Pairs -> (x_t, :class:`DiffusionTarget`, (), {timesteps}) (thesis Sec 3.1).

    The batch holds ``image`` uint8 (B, C, *S), ``label`` uint8 (B, 1, *S) and ``index`` (B,).

    Args:
        schedule: noise schedule.
        num_labels: K.
        value_range: of x_0.
        seed: see :class:`NoisyPrepareBatch`.
    """

    def __init__(
        self,
        schedule: Mapping[str, Any],
        *,
        num_labels: int,
        value_range: Sequence[float],
        seed: int | None = None,
    ) -> None:
        super().__init__(schedule, seed=seed)
        self.num_labels = num_labels
        self.value_range = tuple(value_range)

    def __call__(
        self,
        batchdata: Mapping[str, torch.Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, DiffusionTarget, tuple, dict[str, torch.Tensor]]:
        image, label = (batchdata[k].to(device, non_blocking=non_blocking) for k in ("image", "label"))
        x_0 = to_joint(image, label[:, 0], self.num_labels, self.value_range)
        t, (eps,) = self.draw(x_0.shape, batchdata["index"], 1)
        t, eps = t.to(x_0.device), eps.to(x_0)
        x_t = add_noise(self.schedule, x_0, eps, t, table=self.alphas_cumprod)
        return x_t, DiffusionTarget(x_0=x_0, x_t=x_t, eps=eps, t=t), (), {"timesteps": t}

# SPDX-License-Identifier: Apache-2.0
"""Latents of a prepared dataset, encoded once and read from memory-mapped arrays afterwards.

A cache folder holds, per split, ``mean.npy`` and ``std.npy`` (posterior of the image), ``cond.npy`` (E(m)) as
(N, c, h, w) float32 and ``seg.npy`` (N, h, w), a bit mask whose bit k says that label k occurs in the cell, that is
the map max-pooled per class (LSDM thesis, Sec 3.3). The folder's name is a hash of everything the arrays depend on:
the autoencoder's file, the dataset's fingerprint, the split, the sizes and the pooling.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.data import DataLoader, Dataset
from PIL import Image
from tqdm import tqdm

from monai_synth.data.datalist import read_dataset
from monai_synth.data.semantic import MALIGNANCY
from monai_synth.data.slices import collapse_nodules, one_hot, slice_preprocessing
from monai_synth.errors import UserError
from monai_synth.networks.latent_codec import LatentCodec, latent_window
from monai_synth.networks.spade import pool_semantic
from monai_synth.training.classifier import told_features

logger = logging.getLogger(__name__)

ARRAYS = ("mean", "std", "cond", "seg")
CACHE_FORMAT = 1


class LatentCache:
    """Arrays of one split of a dataset; built on first use, by rank 0 when several processes train.

    Args:
        dataset_dir: prepared dataset.
        split: ``training``, ``validation`` or ``test``.
        codec: autoencoder with its conventions; its ``scale_factor`` is not applied here.
        autoencoder_sha256: hash of the autoencoder's file, part of the cache key.
        cache_dir: folder that holds the caches.
        image_size: (H, W) to which slices are resized.
        semantic_downsample: pooling of the map to the latent grid, see ``SPADEUNet``.
        collapse_nodule_labels: see :func:`monai_synth.data.slices.collapse_nodules`.
        device: where to encode.
        batch_size: slices per encoder call.
    """

    def __init__(
        self,
        dataset_dir: str | Path,
        split: str,
        codec: LatentCodec,
        *,
        autoencoder_sha256: str,
        cache_dir: str | Path,
        image_size: Sequence[int],
        semantic_downsample: str = "max_onehot",
        collapse_nodule_labels: bool = False,
        device: str | torch.device = "cpu",
        batch_size: int = 8,
    ) -> None:
        dataset = read_dataset(dataset_dir)
        self.cases = dataset.datalist(split)
        self.split = split
        self.codec = codec
        self.image_size = tuple(image_size)
        self.semantic_downsample = semantic_downsample
        self.collapse_nodule_labels = collapse_nodule_labels
        self.device = torch.device(device)
        self.batch_size = batch_size
        key = [
            CACHE_FORMAT, autoencoder_sha256, dataset.fingerprint, split, list(self.image_size), codec.num_labels,
            codec.image_channels, semantic_downsample, collapse_nodule_labels,
        ]  # fmt: skip
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        self.folder = Path(cache_dir) / f"{split}-{name}"
        if self.cases:
            self._ensure()
        self.arrays = {n: np.load(self.folder / f"{n}.npy", mmap_mode="r") for n in ARRAYS} if self.cases else {}

    def __len__(self) -> int:
        return len(self.cases)

    def _ensure(self) -> None:
        distributed = dist.is_available() and dist.is_initialized()
        if not (self.folder / "complete").is_file() and (not distributed or dist.get_rank() == 0):
            self._build()
        if distributed:
            dist.barrier()

    def _build(self) -> None:
        partial = self.folder.with_name(self.folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        partial.mkdir(parents=True)
        transform = slice_preprocessing(self.image_size, num_labels=self.codec.num_labels)
        loader = DataLoader(Dataset(self.cases, transform), batch_size=self.batch_size, num_workers=0)
        self.codec.to(self.device)
        out: dict[str, Any] = {}
        start = 0
        try:
            for batch in tqdm(loader, desc=f"encode {self.split}", unit="batch", mininterval=1.0):
                for name, value in self._encode(batch["image"], batch["label"]).items():
                    if name not in out:
                        out[name] = np.lib.format.open_memmap(
                            partial / f"{name}.npy", "w+", value.dtype, (len(self.cases), *value.shape[1:])
                        )
                    out[name][start : start + len(value)] = value
                start += len(batch["image"])
            for array in out.values():
                array.flush()
            (partial / "complete").touch()
            os.replace(partial, self.folder)
        except OSError as error:
            msg = f"cannot write the latent cache {self.folder} ({error}); free some space or give another --output_dir"
            raise UserError(msg) from error
        finally:
            out.clear()
            shutil.rmtree(partial, ignore_errors=True)

    def _encode(self, image: torch.Tensor, label: torch.Tensor) -> dict[str, np.ndarray]:
        if self.collapse_nodule_labels:
            label = collapse_nodules(label)
        image, label = image.to(self.device), label.to(self.device)
        mean, std = self.codec.encode_image(image)
        size = tuple(mean.shape[2:])
        seg = pool_semantic(one_hot(label, self.codec.num_labels), size, self.semantic_downsample) > 0
        bits = (seg.to(torch.int32) << torch.arange(self.codec.num_labels, device=seg.device)[:, None, None]).sum(1)
        arrays = {"mean": mean, "std": std, "cond": self.codec.encode_label(label)}
        out = {name: value.float().cpu().numpy() for name, value in arrays.items()}
        return out | {"seg": bits.to(torch.uint8).cpu().numpy()}

    def scale_factor(self, max_cases: int = 2048) -> float:
        """1 / standard deviation of latents drawn from the posterior, over at most ``max_cases`` cases (LDM).

        Var[z] = Var[mean] + E[std^2], so no draw is needed and every process finds the same number.
        """
        n = min(len(self.cases), max_cases)
        step = max(1, len(self.cases) // n)
        mean = np.asarray(self.arrays["mean"][::step][:n], dtype=np.float64)
        std = np.asarray(self.arrays["std"][::step][:n], dtype=np.float64)
        return float(1.0 / np.sqrt(mean.var() + (std**2).mean()))


class LatentDataset(torch.utils.data.Dataset):
    """Cached latents as the diffusion model trains on them.

    Args:
        cache: the arrays.
        num_labels: K of ``seg``.

    Items: ``mean``, ``std``, ``cond`` (c, h, w) float32, ``seg`` (K, h, w) float32 of zeros and ones, ``index``.
    """

    def __init__(self, cache: LatentCache, num_labels: int) -> None:
        self.cache = cache
        self.num_labels = num_labels

    @property
    def data(self) -> list[dict[str, Any]]:
        """The datalist behind the arrays."""
        return self.cache.cases

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {n: torch.from_numpy(np.array(self.cache.arrays[n][index])) for n in ("mean", "std", "cond")}
        bits = torch.from_numpy(np.array(self.cache.arrays["seg"][index])).to(torch.int32)
        item["seg"] = ((bits[None] >> torch.arange(self.num_labels)[:, None, None]) & 1).float()
        item["index"] = index
        return item


def nodule_targets(nodule: Mapping[str, Any], features: Sequence[str]) -> list[float]:
    """Binary malignancy (0 for ratings <= 2, else 1; thesis Sec 3.4.1) and the ratings of other features."""
    return [float(nodule["malignant" if feature == MALIGNANCY else feature]) for feature in features]


class NoduleCropDataset(torch.utils.data.Dataset):
    """Latent crops centred at nodules with one rated feature (thesis Sec 3.4, SEEDS L-20 and L-22).

    Crops are cut from the latent of the whole slice, so that training sees what guidance will see (SEEDS 2.3.13).

    Args:
        cache: the arrays.
        feature: one of LIDC's nine; ``malignancy`` becomes binary. "all" gives the four that guide together.
        crop_size: side of the crop in latent pixels (16 for 64 image pixels at f = 4).
        jitter: largest random shift in latent pixels, drawn from torch's global generator; 0 for validation.

    Items: ``mean``, ``std`` (c, k, k), ``target`` (a number, or one of each feature), ``index``.

    Raises:
        UserError: unknown feature, or no nodule in the split.
    """

    def __init__(self, cache: LatentCache, feature: str, *, crop_size: int, jitter: int = 0) -> None:
        self.cache = cache
        self.crop_size = crop_size
        self.jitter = jitter
        self.items: list[tuple[int, int, int, list[float]]] = []
        features = told_features(feature)
        for case_index, case in enumerate(cache.cases):
            nodules = case.get("nodules", [])
            if not nodules:
                continue
            with Image.open(case["image"]) as picture:
                width, height = picture.size
            h, w = cache.arrays["mean"].shape[-2:]
            if crop_size > min(h, w):
                msg = f"crop_size {crop_size} is larger than the latent {h}x{w}; give at most {min(h, w)}"
                raise UserError(msg)
            for nodule in nodules:
                row, col = nodule["center"]
                window = latent_window(((row + 0.5) * h / height, (col + 0.5) * w / width), crop_size, (h, w))
                top, left = (axis.start for axis in window)
                self.items.append((case_index, top, left, nodule_targets(nodule, features)))
        if not self.items and cache.split == "training":
            msg = (
                f"split {cache.split!r} has no nodule of at least 3 mm, so there is nothing to learn {feature} from; "
                "prepare more scans, or train without classifiers (--features '[]')"
            )
            raise UserError(msg)

    @property
    def data(self) -> list[dict[str, Any]]:
        """The datalist behind the arrays."""
        return self.cache.cases

    @property
    def targets(self) -> np.ndarray:
        """Target of every item (N,), of several features (N, number of features)."""
        targets = np.array([item[3] for item in self.items])
        return targets.ravel() if targets.size == len(self.items) else targets

    def balanced_weights(self) -> list[float]:
        """Weights with which every label is drawn equally often (thesis Sec 4.2); of several features their mean."""
        weights = []
        for column in self.targets.reshape(len(self.items), -1).T:
            labels, inverse, counts = np.unique(column, return_inverse=True, return_counts=True)
            weights.append(1.0 / (len(labels) * counts[inverse]))
        return np.mean(weights, axis=0).tolist()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        case_index, top, left, target = self.items[index]
        h, w = self.cache.arrays["mean"].shape[-2:]
        if self.jitter:
            shift = torch.randint(-self.jitter, self.jitter + 1, (2,)).tolist()
            top = min(max(top + shift[0], 0), h - self.crop_size)
            left = min(max(left + shift[1], 0), w - self.crop_size)
        window = (slice(None), slice(top, top + self.crop_size), slice(left, left + self.crop_size))
        item = {n: torch.from_numpy(np.array(self.cache.arrays[n][case_index][window])) for n in ("mean", "std")}
        return item | {"target": target[0] if len(target) == 1 else torch.tensor(target), "index": index}

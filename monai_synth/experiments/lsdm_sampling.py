# SPDX-License-Identifier: Apache-2.0
"""The images of the lung CT experiment: the same noise for every model and guidance, kept by arm and seed.

Slice i of the test split and seed s start from noise of seed ``s 1000000 + i``, so bundle lsdm's own sampling with
``--split test --seed s000000`` makes the same images. A file holds at most `PART` slices; its name tells which, so a
stopped run goes on where it stopped and another choice of slices gets files of its own.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer
from torch import nn

from monai_synth.atomic import remove_leftovers, write_bytes
from monai_synth.errors import UserError
from monai_synth.experiments.lsdm_source import Arm, Cases, Model, to_pixels
from monai_synth.experiments.record import record_settings
from monai_synth.inference.cases import collate_cases
from monai_synth.inference.lsdm import LSDMInferer
from monai_synth.inference.model import LSDMModel, load_lsdm, load_model
from monai_synth.inference.spade_gan import SPADEGANInferer

SEED_STEP = 1_000_000
MOST_SEEDS = 4_000  # so that the seed of an image stays below 2^32
PART = 32  # slices of a file
_TOLD_EVERY = 60.0  # seconds


def image_seed(seed: int, index: int) -> int:
    """Seed of the noise of slice ``index`` of the test split."""
    return seed * SEED_STEP + index


class Loaded:
    """Models in memory, each read once with the classifiers of all arms.

    Args:
        arms: that may be sampled.
        sampler: of ``LSDMInferer``.
        num_steps: calls of the network.
        device: "cpu" or "cuda".

    Raises:
        UserError: files that do not fit each other, or a setting that the sampler does not take.
    """

    def __init__(self, arms: Sequence[Arm], *, sampler: str, num_steps: int, device: str) -> None:
        self.sampler, self.num_steps, self.device = sampler, num_steps, device
        self._features: dict[str, tuple[str, ...]] = {}
        for arm in arms:
            self._features[arm.model.name] = tuple(
                dict.fromkeys([*self._features.get(arm.model.name, ()), *arm.features])
            )
        self._diffusion: dict[str, LSDMModel] = {}
        self._generators: dict[str, nn.Module] = {}
        for arm in arms:
            self(arm)

    def diffusion(self, model: Model) -> LSDMModel:
        """A diffusion model with its autoencoder and the classifiers that any arm needs."""
        if model.name not in self._diffusion:
            features = self._features.get(model.name, ())
            self._diffusion[model.name] = load_lsdm(
                model.path.parent, model_file=model.path.name, features=features, device=self.device
            )
        return self._diffusion[model.name]

    def __call__(self, arm: Arm) -> tuple[nn.Module, Inferer]:
        """The arm's network and its bundle's own way to sample from it."""
        model, contract = arm.model, arm.model.contract
        if model.kind == "spade_gan":
            if model.name not in self._generators:
                self._generators[model.name] = load_model(
                    "spade_gan", model.path.parent, model_file=model.path.name, device=self.device, stage="generator"
                ).network
            collapse = bool(contract.get("collapse_nodule_labels", False))
            inferer: Inferer = SPADEGANInferer(len(contract["labels"]), collapse_nodule_labels=collapse)
            return self._generators[model.name], inferer
        loaded = self.diffusion(model)
        inferer = LSDMInferer(
            loaded.codec,
            contract["schedule"],
            sampler=self.sampler,
            num_steps=self.num_steps,
            classifiers={feature: loaded.classifiers[feature] for feature in arm.features},
            guidance_scale=arm.scale,
            crop_size_latent=loaded.crop_size_latent,
            semantic_downsample=contract["semantic_downsample"],
            collapse_nodule_labels=contract["collapse_nodule_labels"],
        )
        return loaded.network, inferer


class Samples:
    """Images of arms in a folder.

    Args:
        folder: of all of them.
        cases: slices to sample from.
        loaded: models.
        batch_size: images at once.
    """

    def __init__(self, folder: Path, cases: Cases, loaded: Loaded, *, batch_size: int) -> None:
        self.folder, self.cases, self.loaded, self.batch_size = folder, cases, loaded, batch_size

    def parts(self, arm: Arm, seed: int, indices: Sequence[int]) -> list[tuple[Path, tuple[int, ...]]]:
        """Files of the images of an arm and a seed, and the slices of each."""
        chunks = [tuple(indices[i : i + PART]) for i in range(0, len(indices), PART)]
        return [(self.folder / arm.name / f"seed_{seed}-{_name_of(chunk)}.npz", chunk) for chunk in chunks]

    def is_done(self, arm: Arm, seed: int, indices: Sequence[int]) -> bool:
        return all(path.is_file() for path, _ in self.parts(arm, seed, indices))

    def load(self, arm: Arm, seed: int, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(slice, uint8 (H, W)) in the order of the slices, a file in memory at a time.

        Raises:
            UserError: a file is damaged.
        """
        for path, chunk in self.parts(arm, seed, indices):
            yield from zip(chunk, self._read(path, chunk), strict=True)

    def make(self, arm: Arm, seeds: Sequence[int], indices: Sequence[int], report: Callable[[str], None]) -> None:
        """Sample what is not there yet.

        Raises:
            UserError: images of other files or settings are there under the arm's name.
        """
        (self.folder / arm.name).mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder / arm.name)
        record_settings(self.folder / arm.name / "arm.json", arm.record())
        missing = [(s, p) for s in seeds for p in self.parts(arm, s, indices) if not p[0].is_file()]
        if not missing:
            return
        network, inferer = self.loaded(arm)
        begin = told = time.monotonic()
        for number, (seed, (path, chunk)) in enumerate(missing):
            images = self._sample(arm, network, inferer, seed, chunk)
            _write(path, images, chunk, seed)
            if time.monotonic() - told > _TOLD_EVERY and number + 1 < len(missing):
                told = time.monotonic()
                rest = (told - begin) / (number + 1) * (len(missing) - number - 1) / 60
                report(f"    {arm.name}: {number + 1} of {len(missing)} files, about {rest:.0f} more minutes")
        report(f"  {arm.name}: {sum(len(p[1]) for _, p in missing)} images in {time.monotonic() - begin:.0f} s")

    def _sample(self, arm: Arm, network: nn.Module, inferer: Inferer, seed: int, chunk: Sequence[int]) -> np.ndarray:
        images = []
        for start in range(0, len(chunk), self.batch_size):
            part = chunk[start : start + self.batch_size]
            batch = collate_cases([self.cases.item(i) for i in part])
            made = inferer(
                batch["label"].to(self.loaded.device),
                network,
                seeds=[image_seed(seed, i) for i in part],
                nodules=batch["nodules"],
                targets=[dict(arm.targets) for _ in part],
            )
            images += [to_pixels(image) for image in made]
        return np.stack(images)

    def _read(self, path: Path, chunk: Sequence[int]) -> np.ndarray:
        try:
            with np.load(path, allow_pickle=False) as file:
                images, there = file["images"], file["indices"].tolist()
        except Exception as error:  # zipfile and NumPy raise several kinds
            raise UserError(f"{path} cannot be read ({error}); delete it and run the same command again") from error
        if there != list(chunk) or images.shape != (len(chunk), *self.cases.model.image_size):
            raise UserError(f"{path} holds other slices than its name says; delete it and run the same command again")
        return images


def _name_of(chunk: Sequence[int]) -> str:
    return f"{chunk[0]:05d}-" + hashlib.sha256(",".join(map(str, chunk)).encode()).hexdigest()[:8]


def _write(path: Path, images: np.ndarray, chunk: Sequence[int], seed: int) -> None:
    buffer = io.BytesIO()
    content: dict[str, Any] = {"images": images, "indices": np.asarray(chunk)}
    np.savez_compressed(buffer, **content, seeds=np.asarray([image_seed(seed, i) for i in chunk]))
    write_bytes(path, buffer.getvalue())


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 (H, W) -> (1, 1, H, W) in [-1, 1]."""
    return torch.from_numpy(image.astype(np.float32) / 127.5 - 1)[None, None]

# SPDX-License-Identifier: Apache-2.0
"""The images of the expert experiment: the same noise for every model, kept by model and seed.

Image i of class number k and seed s starts from noise of seed ``s 1000000 + k 1000 + i``. With the mean filter its
attempt a has ``s 1000000 + k 1000 + i + a n`` for n images of each class. So neither the model, nor the batch, nor what
else is sampled decides which noise an image has.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from monai_synth.atomic import remove_leftovers, write_bytes
from monai_synth.checkpoint import load_file, restore_network
from monai_synth.data.joint import to_image
from monai_synth.errors import UserError
from monai_synth.experiments.expert_source import Model
from monai_synth.inference.classes import ClassInferer

SEED_STEP, CLASS_STEP = 1_000_000, 1_000
MOST_SEEDS = 4_000  # so that the seed of an image stays below 2^32
MOST_ATTEMPTS = 20  # of the mean filter
FILTER_REACH = 0.1  # below the mean of the class, for values in [0, 1]
_TOLD_EVERY = 60.0  # seconds


@dataclass(frozen=True)
class Plan:
    """What is sampled of every model.

    Attributes:
        classes: name -> number of those that are sampled.
        num_classes: K of the models.
        per_class: n images of each class for each seed.
        sampler: see ``ClassInferer``.
        num_steps: calls of the network; None: 20, or all of the schedule for "ddpm".
        guidance_scale: 1 is none.
        floors: lowest mean of an image in [0, 1] by class name, where images are filtered by their mean.
    """

    classes: Mapping[str, int]
    num_classes: int
    per_class: int
    sampler: str = "dpm++"
    num_steps: int | None = None
    guidance_scale: float = 1.0
    floors: Mapping[str, float] | None = None

    @property
    def per_seed(self) -> int:
        """Images of a seed."""
        return self.per_class * len(self.classes)


@dataclass(frozen=True)
class Samples:
    """Images of one model and seed, class by class in the order of the plan.

    Attributes:
        images: uint8 (K', n, C, H, W).
        classes: int (K',), the numbers of the classes.
        seeds: int (K', n), of the noise that each image was made of.
        attempts: int (K', n), 1 where the first was taken.
        below: bool (K', n), kept although its mean is too low.
    """

    images: np.ndarray
    classes: np.ndarray
    seeds: np.ndarray
    attempts: np.ndarray
    below: np.ndarray

    @property
    def digest(self) -> str:
        """Of the images."""
        return hashlib.sha256(np.ascontiguousarray(self.images).tobytes()).hexdigest()


def image_seed(seed: int, number: int, index: int, attempt: int = 0, per_class: int = 0) -> int:
    """Seed of an image's noise; ``attempt`` from 0."""
    return seed * SEED_STEP + number * CLASS_STEP + index + attempt * per_class


def check_plan(plan: Plan, num_seeds: int) -> None:
    """Refuse numbers for which two images would share their noise.

    Raises:
        UserError: says which, and how many are possible.
    """
    most = CLASS_STEP // (MOST_ATTEMPTS if plan.floors is not None else 1)
    if not 2 <= plan.per_class <= most:
        why = f"at most {most}" + (" with --mean-filter" if plan.floors is not None else "")
        raise UserError(
            f"per_class is {plan.per_class}; give 2 or more, as their similarity is one of pairs, and {why}"
        )
    if not 1 <= num_seeds <= MOST_SEEDS:
        raise UserError(f"seeds is {num_seeds}; allowed are 1 to {MOST_SEEDS} (--seeds)")
    if plan.num_classes > SEED_STEP // CLASS_STEP:
        raise UserError(
            f"the models have {plan.num_classes} classes; at most {SEED_STEP // CLASS_STEP} can be numbered"
        )


def make_inferer(model: Model, plan: Plan) -> ClassInferer:
    """The bundle's own way to sample from a model.

    Raises:
        UserError: a setting that the sampler or the model does not take.
    """
    contract = model.contract
    if plan.guidance_scale != 1.0 and not model.null_class:
        msg = f"guidance_scale is {plan.guidance_scale:g}, but {model.path} was trained without dropping the class"
        raise UserError(f"{msg}, which guidance needs; give --guidance-scale 1")
    steps = int(contract["schedule"]["num_train_timesteps"]) if plan.sampler == "ddpm" else 20
    return ClassInferer(
        contract["schedule"],
        image_size=contract["image_size"],
        image_channels=contract["image_channels"],
        null_class=plan.num_classes,
        sampler=plan.sampler,
        num_steps=steps if plan.num_steps is None else plan.num_steps,
        guidance_scale=plan.guidance_scale,
        value_range=contract["value_range"],
    )


def samples_path(out: Path, model: Model, seed: int) -> Path:
    """Where the images of a model and a seed are."""
    return out / "samples" / model.folder / f"seed_{seed}.npz"


def load_samples(path: Path) -> Samples:
    """Read what `sample_all` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return Samples(**{name: file[name] for name in Samples.__dataclass_fields__})
    except Exception as error:  # zipfile and NumPy raise several kinds
        raise UserError(f"{path} cannot be read ({error}); delete it and run the same command again") from error


def sample_all(
    models: Sequence[Model],
    num_seeds: int,
    plan: Plan,
    out: Path,
    *,
    batch_size: int,
    device: str,
    report: Callable[[str], None],
) -> None:
    """Sample what is not there yet, seed by seed for all models, so that a stopped run can be compared.

    Args:
        models: of all arms.
        num_seeds: seeds 0 to this minus one.
        plan: what to sample.
        out: folder of the experiment.
        batch_size: images at once, across classes and seeds. Seeds that share a batch are sampled together whatever is
            there already, so a stopped run gets the images of one that was not.
        device: "cpu" or "cuda".
        report: takes one line each.
    """
    together = max(1, batch_size // plan.per_seed)
    groups = [range(first, min(first + together, num_seeds)) for first in range(0, num_seeds, together)]
    for model in models:
        folder = samples_path(out, model, 0).parent
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    total = len(models) * num_seeds
    done = sum(samples_path(out, model, seed).is_file() for model in models for seed in range(num_seeds))
    if done:
        report(f"{done} of {total} sets of {plan.per_seed} images are there already")
    begin, made, waiting = time.monotonic(), 0, total - done
    for group in groups:
        for model in models:
            missing = [seed for seed in group if not samples_path(out, model, seed).is_file()]
            if not missing:
                continue
            start = time.monotonic()
            network = restore_network(load_file(model.path, stage="diffusion"), model.path).to(device)
            name = f"{model.folder} seed {group[0]}" + (f" to {group[-1]}" if len(group) > 1 else "")
            draw = _Draw(make_inferer(model, plan), network, plan, batch_size, device, name, report)
            found = draw(list(group))
            del draw, network
            for seed in missing:
                _write(samples_path(out, model, seed), found[seed])
            made += len(missing)
            seconds = (time.monotonic() - begin) / made * (waiting - made)
            redrawn = sum(int((found[seed].attempts - 1).sum()) for seed in missing)
            text = f"{len(group) * plan.per_seed} images in {time.monotonic() - start:.0f} s"
            text += f", {redrawn} redrawn" if plan.floors is not None else ""
            report(f"[{done + made}/{total}] {name}: {text}{time_left(seconds)}")


def time_left(seconds: float) -> str:
    """The rest of a line of progress."""
    if seconds < 1:
        return ""
    return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


class _Draw:
    """Samples whole seeds of one model."""

    def __init__(
        self,
        inferer: ClassInferer,
        network: nn.Module,
        plan: Plan,
        batch_size: int,
        device: str,
        name: str,
        report: Callable[[str], None],
    ) -> None:
        self.inferer, self.network, self.plan = inferer, network, plan
        self.batch_size, self.device, self.name, self.report = batch_size, device, name, report
        self.numbers = np.array(list(plan.classes.values()))
        self.told = time.monotonic()

    def __call__(self, seeds: Sequence[int]) -> dict[int, Samples]:
        n = self.plan.per_class
        grid = np.meshgrid(seeds, self.numbers, np.arange(n), indexing="ij")
        jobs = np.stack([axis.ravel() for axis in grid], axis=1)  # (N, 3): seed, class, index
        attempts, of_noise = np.zeros(len(jobs), np.int64), np.zeros(len(jobs), np.int64)
        images = np.zeros((len(jobs), *self.inferer.shape), np.uint8)
        floors = None
        if self.plan.floors is not None:
            floors = np.repeat([self.plan.floors[name] for name in self.plan.classes], n)
            floors = np.tile(floors, len(seeds))
        left = np.arange(len(jobs))
        for attempt in range(1 if floors is None else MOST_ATTEMPTS):
            of_noise[left] = [image_seed(*map(int, jobs[i]), attempt, n) for i in left]
            attempts[left] = attempt + 1
            for part in np.array_split(left, math.ceil(len(left) / self.batch_size)):
                images[part] = self._sample(jobs[part, 1], of_noise[part])
                if time.monotonic() - self.told > _TOLD_EVERY:
                    self.told = time.monotonic()
                    again = f", attempt {attempt + 1}" if attempt else ""
                    self.report(
                        f"    {self.name}: {int(np.flatnonzero(left == part[-1])[0]) + 1} of {len(left)}{again}"
                    )
            if floors is None:
                break
            left = np.flatnonzero(_means(images) < floors)
            if not len(left):
                break
        below = np.zeros(len(jobs), bool) if floors is None else _means(images) < floors
        shape = (len(seeds), len(self.numbers), n)
        parts = [x.reshape(*shape, *x.shape[1:]) for x in (images, of_noise, attempts, below)]
        return {
            seed: Samples(parts[0][i], self.numbers, *(part[i] for part in parts[1:])) for i, seed in enumerate(seeds)
        }

    def _sample(self, numbers: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        labels = torch.from_numpy(numbers.astype(np.int64)).to(self.device)
        images = self.inferer(labels, self.network, seeds=seeds.tolist())
        return to_image(images, self.inferer.value_range).cpu().numpy()


def _means(images: np.ndarray) -> np.ndarray:
    """Mean of each image in [0, 1]."""
    return images.mean(axis=(1, 2, 3), dtype=np.float64) / 255


def _write(path: Path, samples: Samples) -> None:
    buffer = io.BytesIO()
    content: dict[str, Any] = {name: getattr(samples, name) for name in Samples.__dataclass_fields__}
    np.savez_compressed(buffer, **content)
    write_bytes(path, buffer.getvalue())

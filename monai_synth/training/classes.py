# SPDX-License-Identifier: Apache-2.0
"""What a diffusion model of images with classes trains on, and whether it learned the class and its absence."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from monai_synth.checks import whole
from monai_synth.data.joint import check_value_range, from_image
from monai_synth.diffusion import add_noise, training_target
from monai_synth.errors import UserError
from monai_synth.training.pairs import IterationSampler
from monai_synth.training.prepare_batch import ConditionDropout, NoisyPrepareBatch

logger = logging.getLogger(__name__)

LOSSES = {"l1": nn.L1Loss, "mse": nn.MSELoss}
CLASS_SAMPLINGS = ("natural", "balanced")


def denoising_loss(name: str) -> nn.Module:
    """L1 (the X-ray text's Sec 4.1) or mean squared error, by name.

    Raises:
        UserError: unknown name.
    """
    if name not in LOSSES:
        raise UserError(f"unknown loss {name!r}; allowed are {', '.join(LOSSES)}")
    return LOSSES[name]()


class PartTarget(NamedTuple):
    """Target of a loss that tells two kinds of items apart.

    Attributes:
        target: of every item (B, ...).
        instance: bool (B,), the items that the network is fine-tuned to.
    """

    target: Tensor
    instance: Tensor

    def of_instances(self, values: Tensor) -> Tensor:
        """Mean over the instances of values (B,) where they are half of the batch."""
        return 2 * torch.where(self.instance, values, 0).mean()


def iterations_for(num_cases: int, batch_size: int, num_processes: int = 1) -> int:
    """Iterations in which every case is seen once.

    Raises:
        UserError: ``batch_size`` is below 1.
    """
    return -(-num_cases // (whole("batch_size", batch_size) * num_processes))


class BalancedSampler(IterationSampler):
    """An :class:`IterationSampler` that takes the classes in turn, and the cases of each equally often.

    Args:
        classes: class of each case, 0 to K - 1, each at least once.
        num_samples: draws of one process in one epoch.
        options: ``seed``, ``rank`` and ``num_replicas`` of :class:`IterationSampler`.
    """

    def __init__(self, classes: Sequence[int], num_samples: int, **options: int) -> None:
        super().__init__(len(classes), num_samples, **options)
        self.members = [[i for i, k in enumerate(classes) if k == number] for number in range(max(classes) + 1)]

    def __iter__(self) -> Iterator[int]:
        # one endless row in which classes alternate, each with permutations of its own cases
        orders: dict[int, tuple[int, list[int]]] = {}
        for i in self.places():
            turn, number = divmod(i, len(self.members))
            members = self.members[number]
            permutation, place = divmod(turn, len(members))
            if orders.get(number, (None,))[0] != permutation:
                generator = torch.Generator().manual_seed((self.seed * 1009 + number) * 1_000_003 + permutation)
                orders[number] = permutation, torch.randperm(len(members), generator=generator).tolist()
            yield members[orders[number][1][place]]


def class_sampler(
    cases: Sequence[Mapping[str, Any]], sampling: str, *, num_samples: int, **options: int
) -> Sampler[int]:
    """Sampler that draws cases as often as they are there ("natural"), or each class equally often ("balanced").

    Raises:
        UserError: another word.
    """
    if sampling not in CLASS_SAMPLINGS:
        raise UserError(f"unknown class_sampling {sampling!r}; allowed are {', '.join(CLASS_SAMPLINGS)}")
    if sampling == "natural":
        return IterationSampler(len(cases), num_samples, **options)
    return BalancedSampler([case["class"] for case in cases], num_samples, **options)


def random_flips(images: Tensor) -> Tensor:
    """Each image of (B, C, *S) turned over along each of its axes or not, equally likely.

    Drawn by torch's generator of the processor, which ``EpochSeed`` seeds.
    """
    for axis in range(2, images.ndim):
        turned = (torch.rand(len(images)) < 0.5).view(-1, *[1] * (images.ndim - 1)).to(images.device)
        images = torch.where(turned, images.flip(axis), images)
    return images


def flipped_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ready batch whose images are turned over at random; a collate function, so that all see the same image."""
    return {**batch, "image": random_flips(batch["image"])}


class ClassDiffusionPrepareBatch(NoisyPrepareBatch):
    """Images with classes -> (x_t, target, (), {timesteps, class_labels}), some of the classes replaced by none.

    The batch holds ``image`` uint8 (B, C, *S), ``class`` (B,) and ``index`` (B,).

    Args:
        schedule: noise schedule.
        null_class: the number that stands for no class.
        drop_prob: share of the classes that are dropped (Ho and Salimans 2022, Alg 1).
        value_range: of the images that the network sees, [-1, 1] or [0, 1].
        seed: see :class:`NoisyPrepareBatch`.
    """

    def __init__(
        self,
        schedule: Mapping[str, Any],
        *,
        null_class: int,
        drop_prob: float,
        value_range: Sequence[float] = (-1, 1),
        seed: int | None = None,
    ) -> None:
        super().__init__(schedule, seed=seed)
        self.value_range = check_value_range(value_range)
        self.dropout = ConditionDropout(drop_prob, null_class, seed=seed)

    def __call__(
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, tuple, dict[str, Tensor]]:
        x_0 = from_image(batchdata["image"].to(device, non_blocking=non_blocking), self.value_range)
        t, (eps,) = self.draw(x_0.shape, batchdata["index"], 1)
        t, eps = t.to(x_0.device), eps.to(x_0)
        labels = self.dropout(batchdata["class"], batchdata["index"]).to(x_0.device)
        x_t = add_noise(self.schedule, x_0, eps, t, table=self.alphas_cumprod)
        target = training_target(self.schedule, x_0, eps, t, table=self.alphas_cumprod)
        return x_t, target, (), {"timesteps": t, "class_labels": labels}


class ClassReport:
    """What the classes and their absence are worth to a trained network: its losses with and without them.

    The same noisy validation images are denoised three times: told their class, told none, and told the next class.
    Where the network has learned the classes, the first loss is the lowest; where the null class was never trained, the
    second is far off.

    Args:
        network: the network, the EMA usually.
        batches: validation batches, as :class:`ClassDiffusionPrepareBatch` takes them.
        prepare: without dropout and with a seed, so that all three see the same noise.
        loss: of prediction and target.
        num_classes: K; the null class is number K.
        device: where to compute.
        has_null: whether the network has a null class; else the second loss is left out.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Iterable[Mapping[str, Tensor]],
        prepare: ClassDiffusionPrepareBatch,
        loss: nn.Module,
        *,
        num_classes: int,
        device: str,
        has_null: bool = True,
    ) -> None:
        self.network, self.batches, self.prepare, self.loss = network, batches, prepare, loss
        self.num_classes, self.device, self.has_null = num_classes, device, has_null

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """``n``, ``class_loss``, ``wrong_class_loss``, and ``null_loss`` where there is a null class."""
        training = self.network.training
        self.network.eval()
        sums, n = dict.fromkeys(("class_loss", *["null_loss"] * self.has_null, "wrong_class_loss"), 0.0), 0
        for batch in self.batches:
            x_t, target, _, given = self.prepare(batch, self.device)
            labels, t = given["class_labels"], given["timesteps"]
            told = {
                "class_loss": labels,
                "null_loss": torch.full_like(labels, self.num_classes),
                "wrong_class_loss": (labels + 1) % self.num_classes,
            }
            for name in sums:
                sums[name] += len(labels) * float(self.loss(self.network(x_t, t, class_labels=told[name]), target))
            n += len(labels)
        self.network.train(training)
        report = {"n": n} | {name: total / n for name, total in sums.items()}
        none = f"told none {report['null_loss']:.4f}, " if self.has_null else ""
        logger.info(
            f"validation loss told the class {report['class_loss']:.4f}, {none}"
            f"told another {report['wrong_class_loss']:.4f} (n {n} images)"
        )
        if report["class_loss"] >= report["wrong_class_loss"]:
            logger.warning("the network denoises no better when it is told the right class: it has not learned them")
        return report

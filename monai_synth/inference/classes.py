# SPDX-License-Identifier: Apache-2.0
"""Sampling images of given classes with classifier-free guidance (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from monai.engines import PrepareBatch
from monai.inferers import Inferer
from torch import Tensor, nn

from monai_synth.checks import share, whole
from monai_synth.data.joint import check_value_range
from monai_synth.diffusion import alphas_cumprod, clipped_prediction, make_sampler
from monai_synth.diffusion.flow import FlowSampler
from monai_synth.errors import UserError
from monai_synth.inference.sampler import initial_noise, make_generators, sample

CONVENTIONS = ("scale", "weight")


def guidance_scale_of(value: float, convention: str = "scale") -> float:
    """The scale s of ``null + s (cond - null)``, from either way in which guidance is written.

    Args:
        value: "scale": s itself, as in the code of the X-ray text (3 there) and in diffusers: 0 ignores the class, 1
            is the conditional model, more is guidance. "weight": the w of Ho and Salimans' ``(1 + w) cond - w null``,
            for which s = 1 + w: -1 ignores the class, 0 is the conditional model.
        convention: which of them.

    Raises:
        UserError: another convention, or no number.
    """
    if convention not in CONVENTIONS:
        raise UserError(f"unknown guidance_convention {convention!r}; allowed are {', '.join(CONVENTIONS)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        raise UserError(f"guidance_scale is {value!r}; give a number, 3 is the X-ray text's (1 is no guidance)")
    return float(value) + (1.0 if convention == "weight" else 0.0)


def guided(cond: Tensor, null: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """``null + scale (cond - null)``, brought back towards the spread of the conditional prediction.

    Args:
        cond: prediction of the network told the class (B, ...).
        null: prediction of the network told none.
        scale: s.
        rescale: phi of Lin et al. 2023 (Eq 15 and 16): share of the result whose standard deviation is made that of
            ``cond``, for each sample; 0 leaves it.
    """
    result = null + scale * (cond - null)
    if rescale == 0.0:
        return result
    axes = tuple(range(1, cond.ndim))
    matched = result * (cond.std(dim=axes, keepdim=True) / result.std(dim=axes, keepdim=True).clamp_min(1e-8))
    return rescale * matched + (1 - rescale) * result


class ClassInferer(Inferer):
    """Samples an image for each given class.

    Where the guided prediction needs the network with and without the class, both are one call on a batch twice as
    large; where the scale is 0 or 1, and outside ``guidance_interval``, only one of them is computed.

    Args:
        schedule: noise schedule of the training.
        image_size: spatial size.
        image_channels: C.
        null_class: the number that stands for no class.
        sampler: "ddpm", "ddim", "dpm++" or "unipc"; of a rectified flow "euler" or "heun" as well.
        num_steps: calls of the network, 1 to T.
        guidance_scale: see :func:`guidance_scale_of`.
        guidance_convention: see there.
        guidance_interval: (first, last) timesteps between which guidance acts, both included, in either order;
            elsewhere the class is given without guidance (Kynkaanniemi et al. 2024). None is everywhere.
        guidance_rescale: see :func:`guided`, 0 to 1; where only one prediction is computed there is nothing to rescale.
        clip: keep each predicted x_0 within ``value_range``, as the text's code does.
        value_range: of the images that the network was trained on.

    Raises:
        UserError: a setting out of range.
    """

    def __init__(
        self,
        schedule: Mapping[str, Any],
        *,
        image_size: Sequence[int],
        image_channels: int,
        null_class: int,
        sampler: str = "dpm++",
        num_steps: int = 20,
        guidance_scale: float = 3.0,
        guidance_convention: str = "scale",
        guidance_interval: Sequence[int] | None = None,
        guidance_rescale: float = 0.0,
        clip: bool = True,
        value_range: Sequence[float] = (-1, 1),
    ) -> None:
        super().__init__()
        self.schedule = dict(schedule)
        self.alphas_cumprod = alphas_cumprod(schedule)
        self.shape = (int(image_channels), *image_size)
        self.null_class = int(null_class)
        self.sampler, self.num_steps = sampler, num_steps
        self.guidance_scale = guidance_scale_of(guidance_scale, guidance_convention)
        self.guidance_interval = self._interval(guidance_interval)
        self.guidance_rescale = share("guidance_rescale", guidance_rescale)
        self.clip, self.value_range = clip, check_value_range(value_range)
        self._scheduler()  # refuse wrong settings before any work

    def _interval(self, given: Sequence[int] | None) -> tuple[int, int] | None:
        if given is None:
            return None
        last = len(self.alphas_cumprod) - 1
        whole = isinstance(given, Sequence) and len(given) == 2 and all(type(t) is int for t in given)
        if not whole or not all(0 <= t <= last for t in given):
            raise UserError(f"guidance_interval is {given!r}; give two timesteps from 0 to {last}, e.g. [0, {last}]")
        return min(given), max(given)

    def __call__(self, class_labels: Tensor, network: nn.Module, *, seeds: Sequence[int]) -> Tensor:
        """Sample one image for each class and seed.

        Args:
            class_labels: (B,) integers, 0 to K - 1.
            network: called with (x_t, timesteps, class_labels=...).
            seeds: one for each image.

        Returns:
            Images (B, C, *S), in ``value_range`` where ``clip``.
        """
        labels = class_labels.clone()  # tensors made in inference mode are not for other modes
        both = torch.cat([labels, torch.full_like(labels, self.null_class)])
        generators = make_generators(seeds)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            prediction = self._prediction(network, x_t, t, labels, both)
            if not self.clip:
                return prediction
            return clipped_prediction(self.schedule, prediction, x_t, t, self.value_range, table=self.alphas_cumprod)

        x_T = initial_noise(self.shape, generators, labels.device)
        x_0 = sample(denoise, x_T, self._scheduler(), generators=generators)
        return x_0.clamp(*self.value_range) if self.clip else x_0

    def _prediction(self, network: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor, both: Tensor) -> Tensor:
        scale, interval = self.guidance_scale, self.guidance_interval
        if interval is not None and not interval[0] <= int(t[0]) <= interval[1]:
            scale = 1.0
        if scale == 1.0:
            return network(x_t, t, class_labels=labels)
        if scale == 0.0:
            return network(x_t, t, class_labels=both[len(labels) :])
        cond, null = network(torch.cat([x_t, x_t]), torch.cat([t, t]), class_labels=both).chunk(2)
        return guided(cond, null, scale, self.guidance_rescale)

    def _scheduler(self) -> SchedulerMixin | FlowSampler:
        return make_sampler(self.sampler, self.schedule, self.num_steps)


class ClassSamplingDataset(torch.utils.data.Dataset):
    """One item per image to make; image ``i`` of class k has the seed ``seed + i K + k``.

    So an image stays the same when more of them, or fewer classes, are asked for.

    Args:
        classes: the model's, name -> number; K of them.
        per_class: images of each class, or of each by name.
        only: names of the classes to sample. Default: all.
        seed: of the first image.
        case_id_of: id of the image of a class name and seed. Default: name and seed.
        is_done: whether the image of this id is there already; it is left out.
        process: (rank, number of processes); each takes every n-th image.

    Items: ``class`` (number), ``class_name``, ``seed``, ``case_id``, ``index``, ``conditioning``.

    Raises:
        UserError: an unknown class, or no whole number of images.
    """

    def __init__(
        self,
        classes: Mapping[str, int],
        *,
        per_class: int | Mapping[str, int],
        only: Sequence[str] | None = None,
        seed: int = 0,
        case_id_of: Callable[[str, int], str] = "{}_{:07d}".format,
        is_done: Callable[[str], bool] | None = None,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        self.classes = dict(classes)
        self.counts = self._checked(per_class, only)
        whole("seed", seed, 0)
        wanted = [
            (i, name) for i in range(max(self.counts.values())) for name, count in self.counts.items() if i < count
        ]
        self.data = []
        for index, (i, name) in enumerate(wanted):
            number = self.classes[name]
            seed_of_image = seed + i * len(self.classes) + number
            case_id = case_id_of(name, seed_of_image)
            if index % process[1] == process[0] and (is_done is None or not is_done(case_id)):
                item = {"class": number, "class_name": name, "seed": seed_of_image, "case_id": case_id, "index": index}
                self.data.append(item)

    def _checked(self, per_class: int | Mapping[str, int], only: Sequence[str] | None) -> dict[str, int]:
        """Images of each class that is sampled."""
        if only is not None and not isinstance(only, (str, Sequence)):
            raise UserError(f"only is {only!r}; give names of classes, e.g. --only '[\"{next(iter(self.classes))}\"]'")
        names = list(self.classes if only is None else [only] if isinstance(only, str) else only)
        given = dict(per_class) if isinstance(per_class, Mapping) else dict.fromkeys(names, per_class)
        unknown = sorted({*given, *names} - set(self.classes))
        if unknown or not names:
            what = f"unknown class {unknown[0]!r}" if unknown else "no class is named"
            raise UserError(f"{what}; the model was trained with {', '.join(self.classes)}")
        counts = {name: given.get(name, 0) for name in self.classes if name in names}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0 or not any(counts.values()):
                raise UserError(
                    f"per_class is {count!r} for {name}; give a whole number from 1, such as --per_class 16"
                )
        return counts

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.data[index]
        return item | {"conditioning": {"class": item["class_name"]}}


def collate_classes(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """``class`` as a tensor (B,), everything else as lists."""
    batch: dict[str, Any] = {key: [item[key] for item in items] for key in items[0]}
    return batch | {"class": torch.tensor(batch["class"])}


class ClassSamplingPrepareBatch(PrepareBatch):
    """Batch of :class:`ClassSamplingDataset` -> (class_labels, None, (), {seeds})."""

    def __call__(
        self,
        batchdata: Mapping[str, Any],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, tuple, dict[str, Any]]:
        return batchdata["class"].to(device, non_blocking=non_blocking), None, (), {"seeds": batchdata["seed"]}

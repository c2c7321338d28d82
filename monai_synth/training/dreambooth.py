# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning a class-conditional denoiser to one class, with prior preservation (DreamBooth, Ruiz et al. 2023).

A batch is half images of that class, the instances, and half others, the priors, which keep the rest of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor, nn

from monai_synth.checkpoint import load_file, require_agreement
from monai_synth.data.class_images import class_list
from monai_synth.data.datalist import read_dataset
from monai_synth.errors import UserError
from monai_synth.networks.text_features import find_class
from monai_synth.training.classes import PartTarget, denoising_loss, iterations_for


def dreambooth_list(
    dataset_dir: str, *, instance_class: str, prior_dir: str | None = None, num_prior: int | None = None
) -> list[dict[str, Any]]:
    """Training cases: instances of a dataset, and priors of the other classes.

    Args:
        dataset_dir: prepared dataset.
        instance_class: class of the instances, by name or prompt.
        prior_dir: folder that the sampling of a model of the same classes wrote, whose images of the other classes are
            the priors (the method's own images, as DreamBooth has it). None: real images of the dataset.
        num_prior: at most so many priors, evenly from all of them; None takes all.

    Raises:
        UserError: there are no instances or no priors, or ``prior_dir`` has other classes or channels.
    """
    dataset = read_dataset(dataset_dir, task="classes")
    number = instance_number(instance_class, dataset.classes)
    cases = class_list(dataset_dir, "training")
    instances = [case for case in cases if case["class"] == number]
    if prior_dir is None:
        priors = [case for case in cases if case["class"] != number]
    else:
        other = read_dataset(prior_dir, task="classes")
        keys = ("classes", "image_channels")
        require_agreement(
            {key: other.content[key] for key in keys},
            {key: dataset.content[key] for key in keys},
            f"prior_dir {other.root} with the dataset {dataset.root}",
            "Give images that a model of these classes sampled.",
        )
        priors = [case for case in other.indexed("training") if case["class"] != number]
    if not priors:
        where = dataset.root if prior_dir is None else prior_dir
        raise UserError(f"{where} has no image of a class other than {instance_class!r}; priors are needed")
    if num_prior is not None and num_prior < len(priors):
        priors = [priors[i * len(priors) // num_prior] for i in range(num_prior)]
    return [{**case, "index": i} for i, case in enumerate([*instances, *priors])]


def is_prior(cases: Sequence[Mapping[str, Any]], number: int) -> list[int]:
    """0 for an instance (class ``number``), 1 for a prior: what ``BalancedSampler`` takes in turn."""
    return [int(case["class"] != number) for case in cases]


def dreambooth_iterations(
    cases: Sequence[Mapping[str, Any]], number: int, batch_size: int, num_processes: int = 1
) -> int:
    """Iterations in which every instance is seen once, in batches of which half are priors."""
    return iterations_for(2 * is_prior(cases, number).count(0), batch_size, num_processes)


def instance_number(instance_class: str, classes: Mapping[str, int]) -> int:
    """Number of the class that is meant by name or prompt.

    Raises:
        UserError: there is no such class.
    """
    return classes[find_class(instance_class, classes)]


class InstancePrepareBatch(PrepareBatch):
    """What another PrepareBatch gives, with a :class:`PartTarget` for the target.

    Args:
        prepare: gives (x_t, target, args, kwargs).
        number: class of the instances.
    """

    def __init__(self, prepare: PrepareBatch, number: int) -> None:
        self.prepare, self.number = prepare, number

    def __call__(
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, PartTarget, tuple, dict[str, Tensor]]:
        x_t, target, args, given = self.prepare(batchdata, device, non_blocking, **kwargs)
        return x_t, PartTarget(target, (batchdata["class"] == self.number).to(x_t.device)), args, given


class PriorPreservationLoss(nn.Module):
    """Loss of the instances plus ``prior_weight`` times that of the priors (Ruiz et al. 2023, Eq 2).

    Both are means over half a batch. Written as twice a mean over all of it, which is the same, it also holds where one
    process has instances and another has priors.

    Args:
        loss: "l1" or "mse".
        prior_weight: lambda, 0 or more.

    Raises:
        UserError: another loss, or a weight below 0.
    """

    def __init__(self, loss: str, prior_weight: float) -> None:
        super().__init__()
        self.loss = denoising_loss(loss)
        self.loss.reduction = "none"
        if isinstance(prior_weight, bool) or not isinstance(prior_weight, (int, float)) or not 0 <= prior_weight < 1e9:
            raise UserError(f"prior_weight is {prior_weight!r}; give a number from 0, DreamBooth's is 1")
        self.prior_weight = float(prior_weight)

    def forward(self, prediction: Tensor, target: PartTarget) -> Tensor:
        """Scalar."""
        each = self.loss(prediction, target.target).flatten(1).mean(1)
        return 2 * torch.where(target.instance, each, self.prior_weight * each).mean()


def start_from(network: nn.Module, path: str | Path | None, *, classes: Mapping[str, int]) -> nn.Module:
    """The network with the weights of a trained model of the same classes, but with its own prompts.

    Args:
        network: a ``TextUNet`` that knows its prompts.
        path: file of the stage "diffusion"; None leaves the network as it is.
        classes: name -> number.

    Raises:
        UserError: the file is missing, of another network, or of other classes.
    """
    if path is None:
        return network
    content = load_file(path, stage="diffusion", option="--start_file")
    remedy = "Give a --start_file that this bundle trained with these classes and network settings."
    require_agreement({"classes": content["contract"]["classes"]}, {"classes": dict(classes)}, str(path), remedy)
    own = network.state_dict()
    theirs = {**content["state_dict"], "text_features": own["text_features"]}
    try:
        network.load_state_dict(theirs)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this network ({' '.join(str(error).split())[:200]}). {remedy}") from error
    return network

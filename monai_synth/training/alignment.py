# SPDX-License-Identifier: Apache-2.0
"""Alignment of a denoiser's features with those of an expert (feature-aligned diffusion, Eq 3 to 5).

What is trained is the denoiser with a projection around it; what is averaged, validated, exported and sampled from is
the denoiser alone. The features are tapped by a hook that lives for one call only.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from ignite.engine import Engine, Events
from monai.engines import PrepareBatch
from torch import Tensor, nn

from monai_synth.errors import UserError
from monai_synth.training.classes import PartTarget
from monai_synth.training.handlers import MLflowRun, rank

PROJECTED = ("expert", "network")
SHAPES = ("linear", "cosine")


class AlignedOutput(NamedTuple):
    """What an :class:`AlignedNetwork` gives.

    Attributes:
        prediction: of the denoiser.
        cosine: similarity of both features for each image (B,), -1 to 1.
    """

    prediction: Tensor
    cosine: Tensor


class AlignedNetwork(nn.Module):
    """A denoiser whose features at one layer are compared with an expert's: ``D_c(W_p x', f_d)`` of Eq 4.

    Args:
        network: the denoiser.
        layer: dotted name of the layer whose output is tapped; of several outputs the first. The text takes the last
            block of the encoder.
        num_features: length E_e of the expert's features.
        example: arguments of one call of the denoiser, which tells the layer's channels E_d.
        project: the side that the linear layer is on: "expert" makes E_d of E_e, as Eq 4 has it; "network" makes E_e
            of E_d.
        seed: of the linear layer's weights, which leaves the global generator alone.

    Raises:
        UserError: the layer does not exist, is not run, or gives no feature map.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        layer: str,
        num_features: int,
        example: Mapping[str, Any],
        project: str = "expert",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if project not in PROJECTED:
            raise UserError(f"align_project is {project!r}; allowed are {', '.join(PROJECTED)}")
        self.network, self.layer, self.project = network, layer, project
        self._check_layer()
        channels = self._channels(example)
        sizes = (num_features, channels) if project == "expert" else (channels, num_features)
        self.projection = nn.utils.skip_init(nn.Linear, *sizes, bias=False)
        generator = torch.Generator().manual_seed(seed)
        nn.init.kaiming_uniform_(self.projection.weight, a=math.sqrt(5), generator=generator)

    def forward(self, *args: Any, expert_features: Tensor, **kwargs: Any) -> AlignedOutput:
        """Denoise and compare.

        Args:
            args: of the denoiser.
            expert_features: of the same images (B, E_e).
            kwargs: of the denoiser.
        """
        prediction, features = self.tap(*args, **kwargs)
        if self.project == "expert":
            expert_features = self.projection(expert_features)
        else:
            features = self.projection(features)
        return AlignedOutput(prediction, nn.functional.cosine_similarity(features.float(), expert_features.float()))

    def tap(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The denoiser's prediction and the layer's output, averaged over space (B, E_d).

        Raises:
            UserError: the layer was not run or gives no feature map.
        """
        tapped: list[Any] = []
        hook = self.network.get_submodule(self.layer).register_forward_hook(lambda m, i, out: tapped.append(out))
        try:
            prediction = self.network(*args, **kwargs)
        finally:
            hook.remove()
        if not tapped:
            raise UserError(f"layer {self.layer!r} exists, but the network does not run it itself; {self._allowed()}")
        features = tapped[0]
        while isinstance(features, (tuple, list)) and features:
            features = features[0]
        if not isinstance(features, Tensor) or features.ndim not in (2, prediction.ndim):
            what = f"of shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            msg = f"layer {self.layer!r} gives {what}, needed is a feature map (B, C, sizes) or vectors (B, C)"
            raise UserError(f"{msg}; {self._allowed()}")
        return prediction, features.flatten(2).mean(2) if features.ndim > 2 else features

    def _check_layer(self) -> None:
        names = [name for name, _ in self.network.named_modules() if name]
        if self.layer not in names:
            near = difflib.get_close_matches(str(self.layer), names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"the network has no layer {self.layer!r}{hint}; {self._allowed()}")

    def _allowed(self) -> str:
        """The layers that a user may mean; a list of layers stands for its members."""
        names: list[str] = []
        for name, child in self.network.named_children():
            members = [n for n, _ in child.named_children()] if isinstance(child, nn.ModuleList) else []
            names += [f"{name}.{member}" for member in members] or [name]
        return f"give one of {', '.join(names)} or a layer within as --align_layer"

    @torch.no_grad()
    def _channels(self, example: Mapping[str, Any]) -> int:
        device, training = next(self.network.parameters()).device, self.network.training
        given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in example.items()}
        self.network.eval()
        try:
            _, features = self.tap(**given)
        finally:
            self.network.train(training)
        return features.shape[1]


def plain_network(network: nn.Module) -> nn.Module:
    """The denoiser within an :class:`AlignedNetwork`, which may be wrapped for distributed training."""
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    return network.network if isinstance(network, AlignedNetwork) else network


def weight_schedule(weight: float | Mapping[str, Any], name: str = "weight") -> Callable[[float], float]:
    """A loss's weight as a function of the share of the training that is done, 0 to 1.

    Args:
        weight: a number from 0; or ``{"shape": "linear", "start": 0, "end": 1, "between": [0, 0.5]}``, which goes from
            ``start`` to ``end`` between two shares of the training and stays there. The shape is "linear" or "cosine".
        name: of the config key, for messages.

    Raises:
        UserError: neither of both.
    """
    if _is_weight(weight):
        return lambda done: float(weight)
    spec = {"between": (0, 1), **weight} if isinstance(weight, Mapping) else {}
    fits = set(spec) == {"shape", "start", "end", "between"} and spec["shape"] in SHAPES
    fits = fits and _is_weight(spec["start"]) and _is_weight(spec["end"])
    if not fits or len(spec["between"]) != 2 or not 0 <= spec["between"][0] < spec["between"][1] <= 1:
        msg = (
            f"{name} is {weight!r}; allowed are a number from 0, or "
            '{"shape": "linear" or "cosine", "start": 0, "end": 1, "between": [0, 0.5]}'
        )
        raise UserError(f"{msg} with weights from 0 and two rising shares of the training from 0 to 1")
    start, end, (first, last) = float(spec["start"]), float(spec["end"]), spec["between"]

    def at(done: float) -> float:
        share = min(max((done - first) / (last - first), 0.0), 1.0)
        if spec["shape"] == "cosine":
            share = 0.5 * (1 - math.cos(math.pi * share))
        return start + (end - start) * share

    return at


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


class AlignedLoss(nn.Module):
    """``w1 L_noise + w2 (1 - cos)`` (Eq 5 with the constant 1 added). Attached to a trainer, its weights can change.

    Args:
        denoising: loss of prediction and target.
        w1: its weight, see :func:`weight_schedule`.
        w2: weight of the alignment.
    """

    def __init__(
        self,
        denoising: Callable[[Tensor, Any], Tensor],
        *,
        w1: float | Mapping[str, Any] = 1.0,
        w2: float | Mapping[str, Any] = 1.0,
    ) -> None:
        super().__init__()
        self.denoising = denoising
        self.schedules = weight_schedule(w1, "w1"), weight_schedule(w2, "w2")
        self.weights = tuple(schedule(0.0) for schedule in self.schedules)
        self.terms: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self._advance)

    def _advance(self, engine: Engine) -> None:
        # of the iteration's number alone, so that a resumed training has the weights of one that was not stopped
        done = (engine.state.iteration - 1) / (engine.state.max_epochs * engine.state.epoch_length)
        self.weights = tuple(schedule(done) for schedule in self.schedules)

    def forward(self, output: AlignedOutput, target: Any) -> Tensor:
        """The loss as a scalar; its terms without their weights stay in ``terms``.

        Where the target tells instances apart (DreamBooth), only these are aligned.
        """
        denoising, apart = self.denoising(output.prediction, target), 1 - output.cosine
        alignment = target.of_instances(apart) if isinstance(target, PartTarget) else apart.mean()
        self.terms = {"denoising_loss": denoising.detach(), "alignment_loss": alignment.detach()}
        w1, w2 = self.weights
        # with w2 = 0 the gradients get zeros added, which leaves every bit as it is and every process in step
        return w1 * denoising + w2 * alignment

    def term(self, name: str) -> Callable[[Any], Tensor]:
        """What an ignite metric reads: a term of the iteration that is under way."""
        return lambda output: self.terms[name]


class HeldOutAlignment:
    """After each validation, the alignment loss of images that are not trained on, as ``val_alignment_loss`` in MLflow.

    Args:
        network: the network that is trained, with its projection, not wrapped.
        prepare: an ``AlignedPrepareBatch`` with a seed.
        batches: validation batches.
        mlflow: the run.
        interval: epochs between two validations.
    """

    def __init__(
        self,
        network: AlignedNetwork,
        prepare: PrepareBatch,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        mlflow: MLflowRun,
        interval: int,
    ) -> None:
        self.network, self.prepare, self.batches = network, prepare, batches
        self.mlflow, self.interval = mlflow, interval

    def attach(self, engine: Engine) -> None:
        if rank() == 0:
            engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self._record)

    def _record(self, engine: Engine) -> None:
        self.mlflow.log_metrics({"val_alignment_loss": self()}, step=engine.state.epoch)

    @torch.no_grad()
    def __call__(self) -> float:
        """1 - cosine similarity, mean over the images."""
        device = next(self.network.parameters()).device
        training = self.network.training
        self.network.eval()
        total, n = 0.0, 0
        for batch in self.batches:
            x_t, _, args, kwargs = self.prepare(batch, device)
            cosine = self.network(x_t, *args, **kwargs).cosine
            total, n = total + float((1 - cosine).double().sum()), n + len(cosine)
        self.network.train(training)
        return total / n

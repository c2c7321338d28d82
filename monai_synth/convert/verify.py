# SPDX-License-Identifier: Apache-2.0
"""Whether a converted network computes what the other library's does: both run on the same input, or nothing is said.

The reference is a network of the other library with the untouched checkpoint. Loaders that may leave weights random
are run on a network full of NaN, so that what they leave shows.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor, nn

from monai_synth.convert.source import NetworkText
from monai_synth.errors import UserError

TOLERANCE = 1e-4  # of the outputs' standard deviation; rounding of float32 alone makes about 1e-6
_LEAST_SIDE = 8


@dataclass(frozen=True)
class Comparison:
    """Outputs of two networks on one input.

    Attributes:
        library: whose network is the reference, with its version.
        difference: largest absolute difference.
        spread: smallest standard deviation among the reference's outputs.
    """

    library: str
    difference: float
    spread: float


def compare(
    text: NetworkText, weights: Mapping[str, Tensor], own: nn.Module, *, extra_channels: int
) -> list[Comparison]:
    """Run the converted network and every reference that there is on the same random input.

    Args:
        text: the other library's network.
        weights: the checkpoint as it was read.
        own: the converted network.
        extra_channels: channels of its input that it must not read; they get random values.

    Raises:
        UserError: there is no reference, outputs differ, or the outputs are constant and so show nothing.
    """
    found = []
    for library, network in _references(text, weights):
        inputs = _inputs(text)
        wide = dict(inputs)
        if extra_channels:
            x = inputs["x"]
            unread = torch.randn(x.shape[0], extra_channels, *x.shape[2:], generator=torch.Generator().manual_seed(1))
            wide["x"] = torch.cat([x, unread], dim=1)
        expected, got = _outputs(text, network, inputs), _outputs(text, own, wide)
        spread = min(float(e.std()) for e in expected)
        difference = max(float((e - g).abs().max()) for e, g in zip(expected, got, strict=True))
        if not spread > 1e-12:
            msg = "an output of the network is the same number everywhere, so nothing can be compared"
            raise UserError(f"{msg}: these weights look untrained; give the checkpoint of the end of a training")
        if not all(
            float((e - g).abs().max()) <= TOLERANCE * float(e.std()) for e, g in zip(expected, got, strict=True)
        ):
            msg = (
                f"the converted {text.kind} computes something else than {library} (largest difference "
                f"{difference:.2e} where outputs spread by {spread:.2e}), so nothing was written. The weights fit by "
                "name, so this is a fault of the conversion: report it with the description of the network"
            )
            raise UserError(msg)
        found.append(Comparison(library, difference, spread))
    if not found:
        msg = (
            f"this {text.kind} was trained with monai-generative, and MONAI alone cannot load it, so there is nothing "
            "to compare the result with; install monai-generative (pip install monai_synth[generative]) for that"
        )
        raise UserError(msg)
    return found


def generative_nets() -> Any | None:
    """The networks of monai-generative; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("generative.networks.nets")
    except ImportError:
        return None


def _references(text: NetworkText, weights: Mapping[str, Tensor]) -> list[tuple[str, nn.Module]]:
    """Networks of the other libraries with all of the weights in them."""
    name = f"MONAI {version('monai')}"
    for include_fc in (True, False):
        for combined in (False, True):
            options = {"include_fc": include_fc, "use_combined_linear": combined}
            with torch.device("meta"):
                keys = set(_core(text, **options).state_dict())
            if keys == set(weights):
                core = _core(text, **options)
                core.load_state_dict(dict(weights), strict=True)
                return [(name, core.eval())]
    found = []
    old = generative_nets()
    if old is not None:
        network = _generative(old, text)
        if set(network.state_dict()) == set(weights):
            network.load_state_dict(dict(weights), strict=True)
            found.append((f"monai-generative {_version('monai-generative')}", network.eval()))
    loaded = _by_monais_loader(text, weights)
    return [*found, (f"{name} (load_old_state_dict)", loaded)] if loaded is not None else found


def _core(text: NetworkText, **options: Any) -> nn.Module:
    return getattr(nets, text.kind)(**text.args, **options)


def _generative(old: Any, text: NetworkText) -> nn.Module:
    names = {"channels": "num_channels"}
    return getattr(old, text.kind)(**{names.get(key, key): value for key, value in text.args.items()})


def _by_monais_loader(text: NetworkText, weights: Mapping[str, Tensor]) -> nn.Module | None:
    """MONAI's own network, loaded by its own converter; None where that fails or leaves a weight as it was.

    That converter copies ``proj_attn``, which monai-generative never calls, into projections that MONAI does call (the
    decoder of its SPADE network has them whatever ``include_fc`` says). So it is given the identity for them.
    """
    crossed = bool(text.args.get("with_conditioning"))
    network = _core(text, include_fc=crossed, use_combined_linear=False)
    with torch.no_grad():
        for value in network.state_dict().values():
            value.fill_(float("nan") if value.is_floating_point() else 0)
    state = {key.replace("param_free_norm.N.", "param_free_norm."): value for key, value in weights.items()}
    for key, value in state.items():
        if ".proj_attn." in key:
            state[key] = torch.eye(len(value)) if value.ndim == 2 else torch.zeros_like(value)
    converter = nets.DiffusionModelUNet if text.kind == "SPADEDiffusionModelUNet" else type(network)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            converter.load_old_state_dict(network, state)
    except (KeyError, RuntimeError):
        return None
    left = any(bool(v.isnan().any()) for v in network.state_dict().values() if v.is_floating_point())
    return None if left else network.eval()


def _inputs(text: NetworkText) -> dict[str, Any]:
    args, generator = text.args, torch.Generator().manual_seed(0)
    side = max(_LEAST_SIDE, 2 ** len(args["channels"]))
    shape = [side] * args["spatial_dims"]
    inputs: dict[str, Any] = {"x": torch.randn(2, args["in_channels"], *shape, generator=generator)}
    if text.kind == "AutoencoderKL":
        return inputs
    inputs["timesteps"] = torch.tensor([3, 870])
    if args["num_class_embeds"] is not None:
        inputs["class_labels"] = torch.tensor([0, args["num_class_embeds"] - 1])
    if text.kind == "SPADEDiffusionModelUNet":
        classes = torch.randint(0, args["label_nc"], (2, *shape), generator=generator)
        inputs["seg"] = torch.nn.functional.one_hot(classes, args["label_nc"]).movedim(-1, 1).float()
    if text.kind == "ControlNet":
        factor = 2 ** (len(args["conditioning_embedding_num_channels"]) - 1)
        wide = [side * factor for side in shape]
        channels = args["conditioning_embedding_in_channels"]
        inputs["controlnet_cond"] = torch.randn(2, channels, *wide, generator=generator)
        if args["with_conditioning"]:
            inputs["context"] = torch.randn(2, 1, args["cross_attention_dim"], generator=generator)
    return inputs


@torch.no_grad()
def _outputs(text: NetworkText, network: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    if text.kind == "AutoencoderKL":
        mean, sigma = network.encode(inputs["x"])
        return [mean, sigma, network.decode(mean)]
    result = network(**inputs)
    if text.kind == "ControlNet":
        return [*result[0], result[1]]
    return [result]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of unknown version"

# SPDX-License-Identifier: Apache-2.0
"""Weights trained with MONAI's or monai-generative's diffusion U-Nets, brought into the form of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from monai_synth.errors import UserError

_SHOWN_KEYS = 4  # keys named in an error message before "and N more"
_HINT = (
    "Build the network with the options of the training (weights of MONAI: time_scale_shift=False and, with SPADE,"
    " spade_in=('up',) and spade_variant='monai'). Cross-attention is not supported."
)


def convert_monai_state_dict(state_dict: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a MONAI or monai-generative (0.2.3) diffusion U-Net.

    Three things differ. monai-generative wraps SPADE's group norm (``param_free_norm.N``), has the
    attention's linear layers one level higher and calls the convolution after up-sampling ``conv``. MONAI can
    join query, key and value in one layer (``use_combined_linear``). And the attention may be without output
    projection: MONAI's with ``include_fc=False``, and monai-generative's always, because it owns a layer
    ``proj_attn`` that its forward pass never calls. There the projection becomes the identity, which makes
    the outputs equal; copying ``proj_attn`` into it, or leaving it random, does not.

    Args:
        state_dict: the weights to convert; not changed.
        own: the state dict of the network that they are for.

    Returns:
        The renamed weights. Keys that match nothing are left as they are, for :func:`load_strictly` to
        report.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = key.replace("param_free_norm.N.", "param_free_norm.")
        name = name.replace(".upsampler.conv.", ".upsampler.postconv.")
        owner, _, last = name.rpartition(".")
        parent, _, layer = owner.rpartition(".")
        if layer in ("to_q", "to_k", "to_v") and not parent.endswith(".attn"):
            converted[f"{parent}.attn.{layer}.{last}"] = value
        elif layer == "qkv":
            for part, chunk in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
                converted[f"{parent}.{part}.{last}"] = chunk
        elif layer != "proj_attn":
            converted[name] = value
    for key in own:
        attention, found, last = key.rpartition(".out_proj.")
        projection = (f"{attention}.out_proj.weight", f"{attention}.out_proj.bias")
        if found and f"{attention}.to_q.weight" in converted and not set(projection) & set(state_dict):
            converted[key] = torch.eye(len(own[key])) if last == "weight" else torch.zeros(len(own[key]))
    return converted


def load_strictly(network: nn.Module, state_dict: Mapping[str, Tensor], *, hint: str = _HINT) -> None:
    """Load weights, or nothing at all where a key or a shape does not match.

    Args:
        network: what is loaded into.
        state_dict: the weights.
        hint: how to mend it, the end of the message.

    Raises:
        UserError: naming the keys that are missing, left over, or of another shape.
    """
    own = network.state_dict()
    missing = [key for key in own if key not in state_dict]
    unknown = [key for key in state_dict if key not in own]
    reshaped = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    problems = {"missing": missing, "unknown": unknown, "of another shape": reshaped}
    found = [f"{len(keys)} {what}: {_shortened(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise UserError(f"These weights do not fit {type(network).__name__} ({'; '.join(found)}). {hint}")
    network.load_state_dict(dict(state_dict))


def _shortened(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return ", ".join(keys[:_SHOWN_KEYS]) + more

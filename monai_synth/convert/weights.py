# SPDX-License-Identifier: Apache-2.0
"""Weights of MONAI or monai-generative in a network that this package restores: which network, and renaming.

A network for latents alone becomes one for latents and encoded map by zeros in its first convolution, so it computes
what it did and does not read the second half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from monai_synth.checkpoint import build_network
from monai_synth.convert.source import NetworkText
from monai_synth.errors import UserError
from monai_synth.networks.checkpoints import convert_monai_state_dict, load_strictly

_FIRST = "conv_in.conv.weight"


def own_arch(text: NetworkText, *, extra_channels: int = 0) -> dict[str, Any]:
    """Description of the network that takes the weights.

    Args:
        text: the other library's network.
        extra_channels: channels that the input has more, and that are not read.

    Raises:
        UserError: the other network has a part that this package does not.
    """
    args = text.args
    if text.kind in ("AutoencoderKL", "ControlNet"):
        return {"target": f"monai.networks.nets.{text.kind}", "args": dict(args)}
    if args["with_conditioning"]:
        msg = f"this {text.kind} has cross-attention (with_conditioning), which no bundle of this package has"
        raise UserError(f"{msg}; only networks without it are converted")
    spade = text.kind == "SPADEDiffusionModelUNet"
    own = {
        "spatial_dims": args["spatial_dims"],
        "in_channels": args["in_channels"] + extra_channels,
        "out_channels": args["out_channels"],
        "label_nc": args["label_nc"] if spade else 0,
        "channels": args["channels"],
        "attention_levels": args["attention_levels"],
        "num_res_blocks": args["num_res_blocks"],
        "num_head_channels": args["num_head_channels"],
        "norm_num_groups": args["norm_num_groups"],
        "norm_eps": args["norm_eps"],
        "resblock_updown": args["resblock_updown"],
        "num_class_embeds": args["num_class_embeds"],
        "spade_in": ["up"] if spade else [],
        "time_scale_shift": False,
    }
    if spade:
        own |= {
            "spade_variant": "monai",
            "semantic_downsample": "nearest",
            "spade_hidden_channels": args["spade_intermediate_channels"],
        }
    return {"target": "monai_synth.networks.SPADEUNet", "args": own}


def converted_network(text: NetworkText, weights: Mapping[str, Tensor], arch: Mapping[str, Any]) -> nn.Module:
    """The network of :func:`own_arch` with the weights, in evaluation mode.

    Raises:
        UserError: a key is missing or left over, or a shape differs; it is named. There is no partial loading.
    """
    network = build_network(arch)
    own = network.state_dict()
    renamed = _renamed(text, weights, own)
    extra = arch["args"]["in_channels"] - text.args["in_channels"]
    if extra and _FIRST in renamed:
        first = renamed[_FIRST]
        renamed[_FIRST] = torch.cat([first, first.new_zeros(first.shape[0], extra, *first.shape[2:])], dim=1)
    load_strictly(
        network, renamed, hint=f"Give the description with which this {text.kind} was trained, and its own weights."
    )
    return network.eval()


def _renamed(text: NetworkText, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if text.kind == "ControlNet" and text.args["with_conditioning"]:
        return {key.replace(".to_out.0.", ".out_proj."): value for key, value in weights.items()}
    if text.kind != "AutoencoderKL":
        return convert_monai_state_dict(weights, own)
    # an up-sampling block of monai-generative: N.conv.conv.*; the last convolution of both is named so, too
    up = {key.replace(".postconv.", ".conv.", 1): key for key in own if ".postconv." in key}
    return convert_monai_state_dict({up.get(key, key): value for key, value in weights.items()}, own)

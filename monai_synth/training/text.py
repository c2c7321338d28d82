# SPDX-License-Identifier: Apache-2.0
"""What a denoiser that is told its class by text is built of, before it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from monai_synth.checkpoint import build_network, sha256_of
from monai_synth.networks.text_features import class_prompt, find_class, text_features
from monai_synth.networks.text_unet import pretrained


def class_prompts(
    classes: Mapping[str, int], *, instance_class: str | None = None, instance_word: str = "sks"
) -> dict[str, str]:
    """Prompt of each class by its name, in the order of their numbers: the bare word, as the text's code has it.

    Args:
        classes: name -> number.
        instance_class: class whose prompt gets ``instance_word`` before it (DreamBooth), by name or prompt.
        instance_word: a rare word.

    Raises:
        UserError: there is no such class, or a name without a word.
    """
    prompts = {name: class_prompt(name) for name in sorted(classes, key=classes.__getitem__)}
    if instance_class is not None:
        name = find_class(instance_class, classes)
        prompts[name] = f"{instance_word} {prompts[name]}"
    return prompts


def text_network(
    arch: Mapping[str, Any],
    *,
    prompts: Mapping[str, str],
    pretrained_unet: str | None,
    text_encoder: str | None,
) -> nn.Module:
    """A ``TextUNet`` with the features of its prompts and, where asked for, pretrained weights.

    Args:
        arch: see ``build_network``.
        prompts: of the classes, in the order of their numbers.
        pretrained_unet: folder of segmind/tiny-sd, or "random".
        text_encoder: folder of openai/clip-vit-base-patch32, or "random".

    Raises:
        UserError: a folder is missing, incomplete or of another model.
    """
    network = build_network(arch)
    pretrained(network, pretrained_unet)
    features = text_features(list(prompts.values()), text_encoder, dim=arch["args"]["text_dim"])
    network.set_text_features(features)
    return network


def where_from(source: str | None) -> str | None:
    """What a trained file says of pretrained weights: "random", or folder name and SHA-256, without the path."""
    if source is None or source == "random":
        return source
    folder = Path(source).expanduser()
    found = [path for pattern in ("*.safetensors", "*.bin") for path in sorted(folder.rglob(pattern))]
    hashes = [sha256_of(path)[:16] for path in found[:1]]
    return " ".join([folder.resolve().name, *hashes])


def hash_of(path: str | None) -> str | None:
    """SHA-256 of a file by which a trained file names it; None where there is none."""
    return sha256_of(path) if path is not None and Path(path).is_file() else None

# SPDX-License-Identifier: Apache-2.0
"""Class names as prompts, and prompts as features: CLIP's, or directions that the words decide (seed text, Sec III).

The text's code takes the bare class name and the projected feature of openai/clip-vit-base-patch32.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monai_synth.errors import UserError

SOURCE = "huggingface.co/openai/clip-vit-base-patch32"
RANDOM = "random"

_REMEDY = f"get the folder {SOURCE} and give its path"
_NUMBER = re.compile(r"^\d+[\s_.-]+(?=.*[^\W\d_])")  # before a name: of 01_TUMOR, not of 2019
_WORD = re.compile(r"[^\W_]+")
_SHOWN = 3  # names in an error message


def class_prompt(name: str) -> str:
    """Prompt for a class by the name of its folder: bare and in lower case, as in the text's code.

    A number in front is left out, underscores and hyphens become blanks: "01_TUMOR" is "tumor", "lung_adenocarcinoma"
    is "lung adenocarcinoma".

    Raises:
        UserError: the name has no letter or digit.
    """
    prompt = " ".join(re.split(r"[\s_-]+", _NUMBER.sub("", name).lower())).strip()
    if not _WORD.search(prompt):
        raise UserError(f"class {name!r} has no letter or digit to make a prompt of; give its folder another name")
    return prompt


def find_class(name: str, classes: Mapping[str, int]) -> str:
    """Class that is meant by its name or by its prompt, in upper or lower case: "tumor" means "01_TUMOR".

    Args:
        name: what the user gave.
        classes: name -> number.

    Raises:
        UserError: none is meant, or more than one.
    """
    if name in classes:
        return name
    for key in (str.lower, _prompt_or_name):
        found = [known for known in classes if key(known) == key(str(name))]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"class {name!r} may mean {' or '.join(found)}; give one of them as it is written here")
    raise UserError(f"unknown class {name!r}; allowed are {', '.join(classes)}")


def _prompt_or_name(name: str) -> str:
    try:
        return class_prompt(name)
    except UserError:
        return name


def text_features(prompts: Sequence[str], source: str | Path | None, *, dim: int = 512) -> Tensor:
    """Features of prompts, each on its own.

    "random" needs no text encoder. It gives every word a direction of its own and a prompt the sum of those of its
    words, with length 1: "sks tumor" is near "tumor". The directions carry no meaning: "tumor" is no nearer to
    "carcinoma" than to "sand", and the order of words does not count.

    Args:
        prompts: K texts.
        source: local folder of CLIP with its tokenizer, such as openai/clip-vit-base-patch32; or "random".
        dim: length of a feature that the caller needs.

    Returns:
        (K, dim) float32; CLIP's projected features are not normalised, as in the text's code.

    Raises:
        UserError: no source, a folder that is incomplete or of another model, transformers is not installed, or a
            prompt that is empty, too long or given twice.
    """
    prompts = [str(prompt) for prompt in prompts]
    for prompt in prompts:
        if not _WORD.search(prompt):
            raise UserError(f"prompt {prompt!r} has no letter or digit; give one with a word, such as 'tumor'")
    if len({prompt.lower() for prompt in prompts}) < len(prompts):
        twice = next(p for i, p in enumerate(prompts) if p.lower() in {q.lower() for q in prompts[:i]})
        raise UserError(f"prompt {twice!r} is given twice; give the classes names that differ in more than numbers")
    if source is None:
        msg = "no text encoder is given for the names of the classes"
        raise UserError(f"{msg}; {_REMEDY}, or give {RANDOM!r} for directions without meaning")
    features = _random_features(prompts, dim) if source == RANDOM else _clip_features(prompts, Path(source))
    if features.shape[1] != dim:
        raise UserError(
            f"text encoder {source} gives features of length {features.shape[1]}, needed is {dim}; {_REMEDY}"
        )
    return features


def _random_features(prompts: Sequence[str], dim: int) -> Tensor:
    sums = torch.stack([sum(_direction(word, dim) for word in _WORD.findall(prompt.lower())) for prompt in prompts])
    return torch.nn.functional.normalize(sums, dim=1)


def _direction(word: str, dim: int) -> Tensor:
    """Unit vector (dim,) that only the word decides."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big", signed=True)
    return torch.nn.functional.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(seed)), dim=0)


@torch.no_grad()
def _clip_features(prompts: Sequence[str], folder: Path) -> Tensor:
    folder = folder.expanduser()
    config = _clip_config(folder)
    if not (folder / "tokenizer.json").is_file() and not all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    ):
        # transformers 5 would make a tokenizer without words
        raise UserError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); {_REMEDY}")
    tokenizer, encoder = _load_clip(folder, config)
    rows = []
    for prompt in prompts:
        words = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not words or tokenizer.unk_token_id in words:
            raise UserError(f"the tokenizer of {folder} has no tokens for prompt {prompt!r}; give it another name")
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        if ids.shape[1] > encoder.config.max_position_embeddings or ids.max() >= encoder.config.vocab_size:
            most, known = encoder.config.max_position_embeddings, encoder.config.vocab_size
            msg = f"prompt {prompt!r} has {ids.shape[1]} tokens, the highest {int(ids.max())}, of {folder}"
            raise UserError(f"{msg}; its encoder takes at most {most} tokens below {known}: give a shorter name")
        rows.append(encoder(input_ids=ids).text_embeds[0].float())
    return torch.stack(rows)


def _clip_config(folder: Path) -> Mapping[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(f"there is no {folder / 'config.json'}; {_REMEDY}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); {_REMEDY}") from error
    if kind not in ("clip", "clip_text_model"):
        raise UserError(f"{folder} holds a model of type {kind!r}, needed is CLIP with its text encoder; {_REMEDY}")
    return config


def _load_clip(folder: Path, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and text encoder with its projection, whose weights are all from the folder."""
    try:
        import transformers
    except ImportError as error:
        msg = 'text features of CLIP need transformers: pip install "monai_synth[fad]"'
        raise UserError(f"{msg}, or give {RANDOM!r} for directions without meaning") from error
    options = transformers.CLIPTextConfig.from_pretrained(folder, local_files_only=True)
    if config["model_type"] == "clip" and "projection_dim" in config:
        options.projection_dim = config["projection_dim"]  # CLIPModel reads it here, not in the part for text
    logs = transformers.utils.logging
    verbosity, bar = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()  # the unused image encoder of the file would be reported at length
    logs.disable_progress_bar()
    try:
        # weights that the file lacks are random here, and refused below
        encoder, info = transformers.CLIPTextModelWithProjection.from_pretrained(
            folder, config=options, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged or incomplete folder
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"text encoder {folder} cannot be read ({reason}); {_REMEDY}") from error
    finally:
        logs.set_verbosity(verbosity)
        if bar:
            logs.enable_progress_bar()
    for what in ("missing", "mismatched"):
        names = sorted(str(key if isinstance(key, str) else key[0]) for key in info[f"{what}_keys"])
        if names:
            shown = ", ".join(names[:_SHOWN])
            raise UserError(f"text encoder {folder} has {len(names)} {what} weights such as {shown}; {_REMEDY}")
    return tokenizer, encoder.eval()

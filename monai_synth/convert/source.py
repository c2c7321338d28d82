# SPDX-License-Identifier: Apache-2.0
"""What the user brings: a checkpoint, and the text that says which network and which noise schedule it is for.

Weights are read with ``weights_only=True``; the text is data: ``@name`` is looked up, nothing in it is run.
"""

from __future__ import annotations

import inspect
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks import nets
from torch import Tensor

from monai_synth.checkpoint import FORMAT
from monai_synth.diffusion import alphas_cumprod
from monai_synth.errors import UserError

KINDS = ("AutoencoderKL", "DiffusionModelUNet", "SPADEDiffusionModelUNet", "ControlNet")
_OLD_NAMES = {  # monai-generative's name -> MONAI's
    "num_channels": "channels",
    "use_checkpointing": "use_checkpoint",
}
_WITHOUT_WEIGHTS = ("include_fc", "use_combined_linear", "use_flash_attention", "use_checkpoint")
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler")
_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
_PREFIXES = ("module.", "_orig_mod.")  # of distributed training, of torch.compile
_MOST_REFERENCES = 16  # of one to the next, more is a circle


@dataclass(frozen=True)
class NetworkText:
    """A network as its description says.

    Attributes:
        kind: one of `KINDS`.
        args: arguments of MONAI's class of that name, complete, without those that choose only how it computes.
    """

    kind: str
    args: dict[str, Any]


def read_weights(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint, in float32, without the prefixes of distributed training and torch.compile.

    Args:
        path: a file of ``torch.save``: a state dict, or a dictionary that holds one.
        key: where in the dictionary it is, ``a.b`` for a dictionary in another. Default: where there is only one.

    Raises:
        UserError: missing, damaged, not loadable as weights only, several state dicts, weights that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give the file that the other library's training wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript torch says twice what the message says
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged or foreign file
        if _holds_code(path, error):
            msg = (
                f"{path} holds more than weights (pickled objects, or TorchScript), which is not unpickled because it "
                "could run code; save the network's state_dict() with torch.save where it was made, and give that"
            )
        else:
            msg = f"{path} cannot be read: it is truncated or no checkpoint of PyTorch; copy or save it again"
        raise UserError(msg) from error
    if isinstance(content, Mapping) and content.get("format") == FORMAT:
        raise UserError(f"{path} is a trained file of this package already; use it as it is")
    found = _state_dict(content, key, path)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    broken = [name for name, value in found.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(
            f"{path}: weights that are not finite, first {broken[0]}; the training went wrong, give another file"
        )
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def _holds_code(path: Path, error: Exception) -> bool:
    """Whether a file that was not loaded is whole, but not weights alone."""
    with path.open("rb") as file:
        head = file.read(2)
    pickled = head[:1] == b"\x80" or zipfile.is_zipfile(path)
    return pickled and (isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error))


def _state_dict(content: Any, key: str | None, path: Path) -> dict[str, Tensor]:
    places = {name: value for name, value in _dictionaries(content) if value and _only_tensors(value)}
    listed = ", ".join(name or "the file itself" for name in list(places)[:8])
    if key is not None:
        if key not in places:
            raise UserError(f"{path} holds no weights at {key!r}; there are some at: {listed or 'no place'}")
        return dict(places[key])
    if not places:
        kind = type(content).__name__
        raise UserError(f"{path} holds no state dict (a {kind} without one); save state_dict() with torch.save")
    if len(places) > 1:
        raise UserError(f"{path} holds several state dicts, at {listed}; say with --key which")
    return dict(next(iter(places.values())))


def _dictionaries(content: Any, name: str = "", depth: int = 0) -> list[tuple[str, Mapping]]:
    if not isinstance(content, Mapping) or depth > 3:
        return []
    found = [(name, content)]
    for key, value in content.items():
        if isinstance(key, str):  # an optimiser's state of one parameter has a number
            found += _dictionaries(value, f"{name}.{key}" if name else key, depth + 1)
    return found


def _only_tensors(value: Mapping) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def read_text(path: str | Path) -> dict[str, Any]:
    """A description, or a bundle's configuration, of JSON or YAML.

    Raises:
        UserError: missing or not to be parsed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the bundle's configuration, or a file with the network's")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            import yaml

            content = yaml.safe_load(text)
        else:
            content = json.loads(text)
    except ImportError as error:
        raise UserError(f"{path} is YAML, which needs the package pyyaml; install it, or write JSON") from error
    except Exception as error:  # of both parsers
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be parsed ({reason}); give JSON, or YAML with the ending .yaml") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object of names and values; give a network with `_target_` in it")
    return content


def network_text(content: Mapping[str, Any], path: str | Path, name: str | None = None) -> NetworkText:
    """The network that a description is of.

    Args:
        content: what :func:`read_text` read.
        path: for messages.
        name: id of the network there, ``autoencoder_def`` say. Default: the whole file, or the only network in it.

    Raises:
        UserError: no network, several, one of another kind, or arguments that it does not have.
    """
    entry = _entry(content, path, name, KINDS, "network", "--network-id")
    kind = _class_of(entry)
    allowed = inspect.signature(getattr(nets, kind).__init__).parameters
    given = {_OLD_NAMES.get(key, key): _resolved(value, content, path, key) for key, value in _arguments(entry).items()}
    unknown = [key for key in given if key not in allowed or key == "self"]
    if unknown:
        names = ", ".join(key for key in allowed if key != "self")
        raise UserError(f"{path}: {kind} has no argument {unknown[0]!r}; it has {names}")
    args = {}
    for key, parameter in allowed.items():
        if key == "self" or key in _WITHOUT_WEIGHTS:
            continue
        if key not in given and parameter.default is inspect.Parameter.empty:
            raise UserError(f"{path}: {kind} lacks the argument {key!r}; add the one of the training")
        value = given.get(key, parameter.default)
        args[key] = list(value) if isinstance(value, tuple) else value
    return NetworkText(kind, args)


def schedule_text(content: Mapping[str, Any], path: str | Path, name: str | None = None) -> dict[str, Any]:
    """The noise schedule of a description, in this package's words.

    Raises:
        UserError: none, several, or one that this package does not have.
    """
    entry = content
    if "beta_schedule" not in content or "_target_" in content or name is not None:
        entry = _entry(content, path, name, _SCHEDULERS, "noise scheduler", "--schedule-id")
    given = {key: _resolved(value, content, path, key) for key, value in _arguments(entry).items()}
    kind = str(given.get("schedule", given.get("beta_schedule", "linear_beta")))
    kind = kind.removesuffix("_beta")
    kind = _BETAS.get(kind, kind)
    schedule = {
        "num_train_timesteps": given.get("num_train_timesteps", 1000),
        "beta_schedule": kind,
        "prediction_type": given.get("prediction_type", "epsilon"),
    }
    if kind in ("linear", "scaled_linear"):
        schedule |= {"beta_start": given.get("beta_start", 1e-4), "beta_end": given.get("beta_end", 2e-2)}
    alphas_cumprod(schedule)  # refuses what this package does not have
    return schedule


def _entry(
    content: Mapping[str, Any], path: str | Path, name: str | None, kinds: tuple[str, ...], what: str, option: str
) -> Mapping[str, Any]:
    """The object of one of these classes."""
    found = {"": content} if _class_of(content) in kinds else {}
    found |= {key: value for key, value in content.items() if _class_of(value) in kinds}
    if name is None:
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise UserError(f"{path} has several {what}s: {', '.join(found)}; say with {option} which")
        there = ", ".join(sorted({_class_of(v) for v in (content, *content.values())} - {""})) or "nothing"
        msg = f"{path} has no {what} of the kinds {', '.join(kinds)} at its top (there: {there})"
        raise UserError(f"{msg}; others are not converted, one deeper in the file is named with {option}")
    entry: Any = content
    for part in name.replace("::", "#").split("#"):
        entry = entry.get(part) if isinstance(entry, Mapping) else None
    if _class_of(entry) not in kinds:
        got = _class_of(entry) or "nothing with a `_target_`"
        raise UserError(f"{path}: {name} is {got}, allowed are {', '.join(kinds)}")
    return entry


def _class_of(entry: Any) -> str:
    return str(entry.get("_target_", "")).rpartition(".")[2] if isinstance(entry, Mapping) else ""


def _arguments(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not (key.startswith("_") and key.endswith("_"))}


def _resolved(value: Any, content: Mapping[str, Any], path: str | Path, key: str, depth: int = 0) -> Any:
    """A value with ``@name`` replaced by what has that name."""
    if isinstance(value, (list, tuple)):
        return [_resolved(part, content, path, key, depth + 1) for part in value]
    if not isinstance(value, str) or value[:1] not in ("@", "$", "%"):
        return value
    found: Any = content
    for part in value[1:].replace("::", "#").split("#"):
        found = found.get(part) if isinstance(found, Mapping) else None
    if value[0] != "@" or found is None or depth > _MOST_REFERENCES:
        msg = f"{path}: {key} is {value!r}, which is not looked up (expressions are not run); write the value there"
        raise UserError(msg)
    return _resolved(found, content, path, key, depth + 1)

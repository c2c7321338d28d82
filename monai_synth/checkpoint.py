# SPDX-License-Identifier: Apache-2.0
"""Trained files: what is in them, how they are written and what is checked before they are used.

A trained file holds the weights with everything that sampling must agree with: the architecture's name and
arguments and a *contract* (sizes, value range, schedule, scale factor, labels, data fingerprint, hash of the
autoencoder). It is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from monai_synth import __version__
from monai_synth.errors import UserError

FORMAT = "monai_synth/1"
NETWORK_PACKAGES = ("monai_synth.networks", "monai.networks.nets")
_OWN_NETWORK = re.compile(r"^(?!monai\.)\w+\.networks\.(?=\w+$)")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file as 64 hexadecimal digits; read again only when its size or modification time changed.

    Raises:
        FileNotFoundError: there is no such file.
    """
    stat = os.stat(path)
    return _sha256(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def build_network(arch: Mapping[str, Any]) -> nn.Module:
    """Network of ``{"target": dotted name, "args": {...}}``.

    A network of this package may be named by the package's own name or by that of a copy in a packaged bundle.

    Raises:
        UserError: the name is not a network of this package or of MONAI, or the arguments do not fit it.
    """
    package, _, name = _OWN_NETWORK.sub(f"{__package__}.networks.", str(arch["target"])).rpartition(".")
    if not package.startswith(NETWORK_PACKAGES):
        raise UserError(f"network {arch['target']!r} is not in {' or '.join(NETWORK_PACKAGES)}; give one that is")
    try:
        network_class = getattr(importlib.import_module(package), name)
        return network_class(**arch["args"])
    except UserError:
        raise
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"cannot build network {arch['target']} with {dict(arch['args'])}: {error}") from error


def save_atomic(content: Mapping[str, Any], path: str | Path) -> None:
    """``torch.save`` that leaves either the whole file or the one that was there before.

    Raises:
        UserError: the file cannot be written (disk full, folder read-only).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError
        msg = f"cannot write {path} ({error}); free some space or give another --ckpt_dir, then start again to resume"
        raise UserError(msg) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def load_file(
    path: str | Path, *, stage: str | None = None, map_location: Any = "cpu", option: str = "--ckpt_dir"
) -> dict[str, Any]:
    """Read a file written by :func:`save_atomic`.

    Args:
        path: the file.
        stage: refuse a file of another stage (``autoencoder``, ``classifier``, ``diffusion``, ``generator``).
        map_location: see ``torch.load``.
        option: by which the user named the file, or its folder.

    Raises:
        UserError: missing, truncated, not of this package, or of another stage.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("*.pt")) if path.parent.is_dir() else []
        msg = (
            f"there is no trained file {path} (found there: {', '.join(found) or 'nothing'}); "
            f"train it first, or give the right {option}"
        )
        raise UserError(msg)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged or foreign file
        # of a file that it will not unpickle torch tells how to unpickle it all the same
        text = "" if isinstance(error, pickle.UnpicklingError) else str(error)
        reason = text.splitlines()[0][:200] if text else type(error).__name__
        msg = f"{path} cannot be read ({reason}): it is truncated or no checkpoint; delete it and train it again"
        raise UserError(msg) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        msg = f"{path} is not a {FORMAT} file (format {content.get('format') if isinstance(content, dict) else None!r})"
        raise UserError(msg + "; give a file that a training of this package wrote")
    if stage is not None and content["stage"] != stage:
        raise UserError(f"{path} holds the stage {content['stage']!r}, needed is {stage!r}; give the right file")
    return content


def trained_file(
    stage: str, network: nn.Module, arch: Mapping[str, Any], contract: Mapping[str, Any], **extra: Any
) -> dict[str, Any]:
    """Content of a trained file."""
    return {
        "format": FORMAT,
        "version": __version__,
        "stage": stage,
        "arch": dict(arch),
        "contract": dict(contract),
        "state_dict": {k: v.detach().cpu() for k, v in network.state_dict().items()},
        **extra,
    }


def classifier_file(feature: str, schedule: Mapping[str, Any]) -> str:
    """Name of the file of a noisy classifier. It reads the noise of one schedule; those of flows have their own names.

    Args:
        feature: what it tells.
        schedule: what its noise is made by.
    """
    return f"classifier_{feature}{'_rflow' if 'flow' in schedule else ''}.pt"


def restore_network(content: Mapping[str, Any], path: str | Path = "checkpoint") -> nn.Module:
    """Network of a trained file with its weights, in evaluation mode.

    Raises:
        UserError: the weights do not fit the architecture that the file names.
    """
    network = build_network(content["arch"])
    try:
        network.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        first = " ".join(str(error).split())[:300]
        msg = (
            f"the weights in {path} do not fit {content['arch']['target']} with its arguments ({first}); train it again"
        )
        raise UserError(msg) from error
    return network.eval()


def differences(got: Any, expected: Any, prefix: str = "") -> list[str]:
    """Leaves in which two nested values differ, as ``name: got ..., expected ...``."""
    if isinstance(got, Mapping) and isinstance(expected, Mapping):
        keys = [*expected, *(k for k in got if k not in expected)]
        return [
            d for k in keys for d in differences(got.get(k), expected.get(k), f"{prefix}.{k}" if prefix else str(k))
        ]
    got = list(got) if isinstance(got, tuple) else got
    expected = list(expected) if isinstance(expected, tuple) else expected
    if isinstance(got, float) and isinstance(expected, float) and abs(got - expected) <= 1e-6 * abs(expected):
        return []
    return [] if got == expected else [f"{prefix}: {got!r} there, {expected!r} here"]


def require_agreement(got: Mapping[str, Any], expected: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuse to combine what was made with different settings.

    Raises:
        UserError: names every value that differs, both ways.
    """
    found = differences(got, expected)
    if found:
        raise UserError(f"{what} does not agree: {'; '.join(found[:6])}. {remedy}")

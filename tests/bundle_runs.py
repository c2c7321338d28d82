# SPDX-License-Identifier: Apache-2.0
"""Running bundles in tests: by the runner's classes and by its command."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from monai_synth.errors import UserError

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"


def user_error(action: Callable[[], Any]) -> UserError:
    """The message for the user in what an action raises; the runner wraps it in errors of its own."""
    with pytest.raises((RuntimeError, UserError)) as caught:
        action()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    assert error is not None, caught.value
    return error


def workflow(bundle: str, config: str | list[str], kind: str, run_id: str, **values: Any) -> ConfigWorkflow:
    files = [str(BUNDLES / bundle / "configs" / c) for c in ([config] if isinstance(config, str) else config)]
    return ConfigWorkflow(files, workflow_type=kind, run_id=run_id, **values)


def run(bundle: str, config: str | list[str], kind: str, run_id: str, **values: Any) -> ConfigWorkflow:
    """Run a bundle whole, and see that none of its networks is fed a MetaTensor."""
    made = workflow(bundle, config, kind, run_id, **values)
    with only_plain_tensors():
        made.initialize()
        made.run()
        made.finalize()
    return made


@contextlib.contextmanager
def only_plain_tensors() -> Iterator[None]:
    """A layer that is fed a tensor with metadata, which costs milliseconds, raises."""

    def refuse(layer: nn.Module, args: tuple) -> None:
        assert not any(isinstance(value, MetaTensor) for value in args), f"{type(layer).__name__} was fed a MetaTensor"

    handle = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def places_of(trained: dict[str, str]) -> dict[str, str]:
    """What sampling takes of the places of a training."""
    return {key: trained[key] for key in ("dataset_dir", "ckpt_dir")}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "monai.bundle", "run", *arguments]


def options(values: dict[str, Any]) -> list[str]:
    return [
        part
        for key, value in values.items()
        for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


@contextlib.contextmanager
def started(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, of which nothing is left after the block."""
    process = subprocess.Popen(arguments, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Importing MONAI costs a process ten seconds of a core. Commands that start no processes of their own are thus run by
# processes forked from one that has imported it.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["monai.bundle", "mlflow.store.tracking.sqlalchemy_store", "matplotlib.pyplot", "diffusers", "monai_synth.training"]
)


def _run_module(arguments: list[str], log: str, variables: dict[str, str]) -> None:
    with open(log, "wb", buffering=0) as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.environ |= variables
    sys.argv = arguments[2:]
    runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)


@contextlib.contextmanager
def forked(arguments: list[str], log: Path, **variables: str) -> Iterator[Any]:
    """A process that does what ``python -m MODULE ...`` does, with what it prints in a file; killed with the block."""
    process = FORKED.Process(target=_run_module, args=(arguments, str(log), variables))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run_forked(arguments: list[str]) -> str:
    """Run a command to its end, which must be a good one, and return what it printed."""
    return _run_to_the_end(arguments, [{}])


def run_two_forked(arguments: list[str], port: int) -> None:
    """Run a command in two processes that know of each other by what ``torchrun`` tells them."""
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _run_to_the_end(arguments, [both | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"])


def _run_to_the_end(arguments: list[str], each: list[dict[str, str]]) -> str:
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        logs = [Path(folder) / str(i) for i in range(len(each))]
        processes = [stack.enter_context(forked(arguments, log, **more)) for log, more in zip(logs, each, strict=True)]
        for process in processes:
            process.join()
        printed = "".join(log.read_text() for log in logs)
        assert [process.exitcode for process in processes] == [0] * len(each), printed[-3000:]
    return printed


def kill_when_there(arguments: list[str], path: Path) -> None:
    """Start a command and kill -9 it as soon as a file is there."""
    deadline = time.monotonic() + 300
    with forked(arguments, Path(os.devnull)) as process:
        while not path.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)

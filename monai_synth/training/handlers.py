# SPDX-License-Identifier: Apache-2.0
"""Ignite handlers of every training: seeds per epoch, exact resume, progress, MLflow."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler
from monai.utils import path_to_sqlite_uri
from torch import nn
from tqdm import tqdm

from monai_synth.checkpoint import FORMAT, load_file, require_agreement, save_atomic, trained_file
from monai_synth.errors import UserError

logger = logging.getLogger(__name__)


def rank() -> int:
    """Rank of this process; 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def make_folder(folder: Path, key: str) -> None:
    """Create a folder before any work that is to be kept there.

    Raises:
        UserError: it cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key} {folder} cannot be written ({error.strerror}); give another --{key}") from error


class SharedHandler:
    """Attaches a handler that is defined elsewhere in a config, because others refer to it too.

    MONAI's property check reads ``_target_`` of every entry of ``train#handlers``, so a bare reference cannot stand
    in that list.
    """

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def attach(self, engine: Engine) -> None:
        self.handler.attach(engine)


class EpochSeed:
    """Reseed everything that draws at the start of each epoch from (seed, rank, epoch).

    An epoch is then a function of the weights, the optimiser and its number alone, so a training that was killed
    and resumed takes the same steps as one that was not, and no generator state has to be saved.

    Args:
        seed: the run's seed.
        sampler: gets ``set_epoch``; its order must depend on its own seed and the epoch.
        dataset: gets its transform reseeded where it has one that draws.
    """

    def __init__(self, seed: int, sampler: Any = None, dataset: Any = None) -> None:
        self.seed = int(seed)
        self.sampler = sampler
        self.dataset = dataset

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        digest = hashlib.sha256(f"{self.seed}/{rank()}/{epoch}".encode()).digest()
        number = int.from_bytes(digest[:4], "little")
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002 - for third-party code that draws from it
        torch.manual_seed(number)
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        transform = getattr(self.dataset, "transform", None)
        if hasattr(transform, "set_random_state"):
            transform.set_random_state(number)


class StageCheckpoint:
    """Saves a training so that it can be resumed exactly, and writes the trained file at its end.

    ``last_<name>`` holds model, EMA, optimisers, schedulers and epoch; ``<name>`` is the trained file. Both say under
    ``training`` how each stretch of epochs was computed.

    Args:
        path: the trained file, e.g. ``models/autoencoder.pt``.
        stage: ``autoencoder``, ``classifier``, ``diffusion`` or ``generator``.
        objects: what has a ``state_dict`` and must be restored.
        export: network whose weights go into the trained file (the EMA, usually).
        arch: its architecture, see ``monai_synth.checkpoint.build_network``.
        contract: what sampling must agree with.
        save_interval: epochs between two saves; the last epoch is always saved.
        resume: go on from ``last_<name>`` where it is there.
        report: called at the end; its result is put into the trained file as ``report``.
        record: how the weights are computed, e.g. ``precision``; a resumed training may differ in it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        stage: str,
        objects: Mapping[str, Any],
        export: nn.Module,
        arch: Mapping[str, Any],
        contract: Mapping[str, Any],
        save_interval: int = 1,
        resume: bool = True,
        report: Callable[[], Mapping[str, Any]] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.last = self.path.with_name(f"last_{self.path.name}")
        self.stage = stage
        self.objects = dict(objects)
        self.export = export
        self.arch = dict(arch)
        self.contract = dict(contract)
        self.save_interval = int(save_interval)
        self.resume = bool(resume)
        self.report = report
        self.record = dict(record or {})
        self.earlier: list[dict[str, Any]] = []  # records of the stretches before this one

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.write_trained_file)

    def save(self, engine: Engine) -> None:
        """Write ``last_<name>``, on rank 0, every ``save_interval`` epochs and at the end."""
        epoch = engine.state.epoch
        if rank() or (epoch % self.save_interval and epoch != engine.state.max_epochs):
            return
        scaler = getattr(engine, "scaler", None)
        objects = self.objects | ({"scaler": scaler} if scaler is not None else {})
        state = {name: item.state_dict() for name, item in objects.items()}
        content = {"format": FORMAT, "stage": self.stage, "arch": self.arch, "contract": self.contract}
        content |= {"epoch": epoch, "epoch_length": engine.state.epoch_length, "state": state} | self._training(epoch)
        save_atomic(content, self.last)

    def restore(self, engine: Engine) -> int:
        """Bring the training to where ``last_<name>`` left it; gives the epochs that are done.

        Raises:
            UserError: there are results that would be overwritten, the file is of another training, or its folder
                cannot be written.
        """
        if rank() == 0:
            make_folder(self.path.parent, "ckpt_dir")
        if not self.resume:
            for path in (self.path, self.last):
                if path.exists():
                    msg = (
                        f"resume is off, but {path} exists and is not overwritten; "
                        "delete it or give another --ckpt_dir, or leave resume on to go on from it"
                    )
                    raise UserError(msg)
            return 0
        if not self.last.exists():
            return 0
        content = load_file(self.last, stage=self.stage, map_location="cpu")
        content["arch"], arch = _without_memory_options(content["arch"]), _without_memory_options(self.arch)
        here = {"arch": arch, "contract": self.contract, "epoch_length": engine.state.epoch_length}
        remedy = f"Give the settings of that training, or another --ckpt_dir, or delete {self.last} to start anew."
        require_agreement({k: content[k] for k in here}, here, f"the unfinished training {self.last}", remedy)
        for name, item in self.objects.items():
            item.load_state_dict(content["state"][name])
        if "scaler" in content["state"]:
            # MONAI makes the gradient scaler when the run starts
            engine.add_event_handler(Events.STARTED, lambda e: e.scaler.load_state_dict(content["state"]["scaler"]))
        epoch, length = int(content["epoch"]), int(content["epoch_length"])
        engine.state.epoch, engine.state.iteration = epoch, epoch * length
        self._go_on_from(content.get("training", []))
        return epoch

    def _training(self, epoch: int) -> dict[str, Any]:
        """The stretches up to an epoch, each with its last; nothing where nothing is recorded."""
        if not self.record or (self.earlier and self.earlier[-1]["until_epoch"] >= epoch):
            return {"training": self.earlier} if self.earlier else {}
        return {"training": [*self.earlier, {"until_epoch": epoch, **self.record}]}

    def _go_on_from(self, stretches: list[dict[str, Any]]) -> None:
        self.earlier = [dict(stretch) for stretch in stretches]
        if not self.record or not self.earlier:
            return
        changed = {key: value for key, value in self.record.items() if self.earlier[-1].get(key) != value}
        if changed:
            before = {key: self.earlier[-1].get(key) for key in changed}
            logger.warning(f"the training goes on with {changed}, it was begun with {before}; both are recorded")
        else:
            self.earlier.pop()  # this stretch continues it

    def write_trained_file(self, engine: Engine) -> None:
        """Write ``<name>``, on rank 0; the report is made on all ranks, which validate together."""
        extra = {"epochs": int(engine.state.epoch), "report": dict(self.report()) if self.report else {}}
        extra |= self._training(int(engine.state.epoch))
        if rank():
            return
        save_atomic(trained_file(self.stage, self.export, self.arch, self.contract, **extra), self.path)
        logger.info(f"wrote {self.path} after epoch {engine.state.epoch}")


def _without_memory_options(arch: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture without what changes memory and time but no number."""
    return {**arch, "args": {key: value for key, value in arch["args"].items() if key != "use_checkpoint"}}


def run_training(trainer: Engine, checkpoint: StageCheckpoint) -> None:
    """Resume, then train to ``max_epochs``; a finished training is said to be finished and left alone.

    Raises:
        UserError: ``max_epochs`` below 1, or see :meth:`StageCheckpoint.restore`.
    """
    max_epochs = trainer.state.max_epochs
    if not isinstance(max_epochs, int) or max_epochs < 1:
        raise UserError(f"max_epochs is {max_epochs!r}, allowed are integers from 1; give --max_epochs 10, say")
    done = checkpoint.restore(trainer)
    if done >= max_epochs:
        if not checkpoint.path.exists():
            checkpoint.write_trained_file(trainer)
        logger.info(
            f"{checkpoint.path} is trained already ({done} epochs of {max_epochs}); "
            "raise --max_epochs to train on, or give another --ckpt_dir to start anew"
        )
        return
    if done:
        logger.info(f"resuming {checkpoint.path.stem} from {checkpoint.last} after epoch {done} of {max_epochs}")
    trainer.run()


class RunProgress:
    """One bar over the whole run of an engine with the loss and the time left.

    Args:
        name: what is trained or sampled.
        output: name of the loss in the engine's output; None shows no loss.
    """

    def __init__(self, name: str, output: str | None = "loss") -> None:
        self.name = name
        self.output = output
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        if rank() == 0:
            engine.add_event_handler(Events.STARTED, self._start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
            engine.add_event_handler(Events.COMPLETED, self._close)
            engine.add_event_handler(Events.EXCEPTION_RAISED, self._close_on_error)

    def _start(self, engine: Engine) -> None:
        total = engine.state.max_epochs * engine.state.epoch_length
        # a log file gets a line every 20 seconds, a terminal a live bar
        interval = 0.5 if sys.stderr.isatty() else 20.0
        self.bar = tqdm(
            total=total, initial=engine.state.iteration, desc=self.name, unit="it", mininterval=interval,
            maxinterval=2 * interval,
        )  # fmt: skip
        self.updated = time.monotonic()

    def _step(self, engine: Engine) -> None:
        if (
            self.output is not None and time.monotonic() - self.updated > self.bar.mininterval
        ):  # reading the loss waits for the device
            self.updated = time.monotonic()
            loss = float(torch.as_tensor(engine.state.output[self.output]).detach())
            self.bar.set_postfix(epoch=engine.state.epoch, loss=f"{loss:.4f}", refresh=False)
        self.bar.update()

    def _close(self, engine: Engine) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _close_on_error(self, engine: Engine, error: BaseException) -> None:
        self._close(engine)
        raise error


class MLflowRun(MLFlowHandler):
    """MLflow record of one training: parameters, a value per epoch, pictures, the trained file's path.

    MONAI's handler with what it lacks: SQLite under ``output_dir`` unless ``MLFLOW_TRACKING_URI`` is set, a unique
    run name, FAILED after a crash and KILLED after an interrupt, nothing per iteration (each write costs tens of
    milliseconds), rank 0 only.

    Args:
        output_dir: where the database lies.
        experiment: name of the experiment, the bundle's.
        run: what is trained; time and process number make the run's name unique.
        params: parameters to record.
        checkpoint: path that is recorded when the run has finished.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        experiment: str,
        run: str,
        params: Mapping[str, Any],
        checkpoint: str | Path,
    ) -> None:
        output_dir = Path(output_dir)
        self.active = rank() == 0
        self.checkpoint = str(checkpoint)
        if not self.active:
            return
        make_folder(output_dir, "output_dir")
        super().__init__(
            tracking_uri=path_to_sqlite_uri(str(output_dir / "mlruns.db")),
            iteration_log=False,
            epoch_logger=self._log_epoch,
            experiment_name=experiment,
            run_name=f"{run}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
            experiment_param=_flat({k: v for k, v in params.items() if v is not None}),
        )

    def attach(self, engine: Engine) -> None:
        if not self.active:
            return
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._log_epoch)
        engine.add_event_handler(Events.COMPLETED, self._finish)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def start(self, engine: Engine) -> None:
        super().start(engine)
        self._end_dead_runs()
        run_id = self.cur_run.info.run_id
        self.client.set_tag(run_id, "monai_synth.process", f"{socket.gethostname()}/{os.getpid()}")
        if engine.state.epoch:
            self.client.set_tag(run_id, "monai_synth.resumed_after_epoch", engine.state.epoch)

    def _end_dead_runs(self) -> None:
        """Mark runs of processes of this machine that are gone (kill -9) as KILLED."""
        for run in self.client.search_runs(
            [self.experiment.experiment_id], "attributes.status = 'RUNNING'", max_results=100
        ):
            host, _, pid = run.data.tags.get("monai_synth.process", "").rpartition("/")
            if host == socket.gethostname() and pid.isdigit() and not _alive(int(pid)):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def _log_epoch(self, engine: Engine) -> None:
        values = {k: float(v) for k, v in engine.state.metrics.items() if np.isscalar(v) or torch.is_tensor(v)}
        if values:
            self._log_metrics(values, step=engine.state.epoch)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values that are no ignite metric."""
        if self.active and self.cur_run is not None:
            self._log_metrics(dict(metrics), step=step)

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Record a file, a picture usually."""
        if self.active and self.cur_run is not None:
            self.client.log_artifact(self.cur_run.info.run_id, str(path), folder)

    def _finish(self, engine: Engine) -> None:
        if self.cur_run is not None:
            self.client.set_tag(self.cur_run.info.run_id, "monai_synth.checkpoint", self.checkpoint)
            self.client.set_terminated(self.cur_run.info.run_id, "FINISHED")

    def _fail(self, engine: Engine, error: BaseException) -> None:
        if self.cur_run is not None:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            self.client.set_terminated(self.cur_run.info.run_id, status)
            self.cur_run = None
        raise error


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters with dotted names; MLflow takes values of up to 6000 characters."""
    out: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= _flat(value, f"{name}.")
        else:
            out[name] = str(value)[:6000]
    return out

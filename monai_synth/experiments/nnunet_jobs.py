# SPDX-License-Identifier: Apache-2.0
"""Running the processes of an experiment: in order, several at once, stopped and resumed, with a log each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_synth.atomic import write_json
from monai_synth.errors import UserError

LOG_LINES = 12


@dataclass(frozen=True)
class Task:
    """One process.

    Attributes:
        name: of its log and its job file.
        kind: tasks of one kind take about equally long.
        steps: ``{"name", "kind", "args"}`` each; see `monai_synth.experiments.nnunet_steps`.
        needs: names of tasks that must be done before.
        environment: variables of the process.
    """

    name: str
    kind: str
    steps: tuple[Mapping[str, Any], ...]
    needs: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of the tasks.

    Attributes:
        failed: name -> exit status and the last lines of the log.
        skipped: name -> the task that it would have needed.
    """

    failed: dict[str, str]
    skipped: dict[str, str]


class Markers:
    """The files by which a step counts as done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, step: str) -> dict[str, Any] | None:
        """What a step recorded, or None when it is not done."""
        path = self.folder / f"{step}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def done(self, task: Task) -> bool:
        return all((self.folder / f"{step['name']}.json").is_file() for step in task.steps)

    def seconds(self, task: Task) -> float:
        return sum((self.read(step["name"]) or {}).get("seconds", 0.0) for step in task.steps)


def default_command(job: Path) -> list[str]:
    """The command that runs a job file."""
    return [sys.executable, "-m", "monai_synth.experiments.nnunet_steps", str(job)]


def run_tasks(
    tasks: Sequence[Task],
    out: Path,
    *,
    slots: Sequence[Mapping[str, str]] = ({},),
    command: Callable[[Path], list[str]] = default_command,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Run what is not done; a failure stops only the tasks that need it.

    Args:
        tasks: each after those that it needs.
        out: folder of the experiment; ``jobs/`` and ``logs/`` go into it.
        slots: one process runs in each at a time, with these variables on top (which GPU it sees).
        command: makes the command of a job file.
        report: takes one line per task.

    Raises:
        KeyboardInterrupt: after all processes have ended.
    """
    markers = Markers(out / "jobs")
    for sub in ("jobs", "logs"):
        (out / sub).mkdir(parents=True, exist_ok=True)
    waiting = [task for task in tasks if not markers.done(task)]
    done = {task.name for task in tasks} - {task.name for task in waiting}
    if done:
        report(f"{len(done)} of {len(tasks)} jobs are done already")
    failed: dict[str, str] = {}
    skipped: dict[str, str] = {}
    running: dict[int, tuple[Task, subprocess.Popen[bytes], float]] = {}
    taken: dict[str, float] = {}

    def tell(task: Task, text: str) -> None:
        number = len(done) + len(failed) + len(skipped)
        left = _left([*waiting, *(entry[0] for entry in running.values())], tasks, markers, len(slots))
        report(f"[{number}/{len(tasks)}] {task.name}: {text}{left}")

    with _ended(running):
        while waiting or running:
            for task in list(waiting):
                missing = next((name for name in task.needs if name in failed or name in skipped), None)
                if missing is not None:
                    waiting.remove(task)
                    skipped[task.name] = missing
                    tell(task, f"skipped, it needs {missing}, which {'failed' if missing in failed else 'was skipped'}")
            for slot in range(len(slots)):
                ready = next((task for task in waiting if set(task.needs) <= done), None)
                if slot not in running and ready is not None:
                    waiting.remove(ready)
                    job = _write_job(ready, markers, slots[slot])
                    log, variables = out / "logs" / f"{ready.name}.log", {**ready.environment, **slots[slot]}
                    running[slot] = (ready, _start(command(job), log, variables), time.monotonic())
            time.sleep(0.05)
            for slot, (task, process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                taken[task.name] = time.monotonic() - start
                if process.returncode == 0 and markers.done(task):
                    done.add(task.name)
                    tell(task, f"done in {taken[task.name]:.0f} s")
                else:
                    log = out / "logs" / f"{task.name}.log"
                    failed[task.name] = f"exit status {process.returncode}, log {log}:\n{_last_lines(log)}"
                    tell(task, f"FAILED after {taken[task.name]:.0f} s, {failed[task.name]}\n")
    return Outcome(failed, skipped)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold a folder against a second experiment at work in it.

    Raises:
        UserError: one is, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); give another --out") from error
    with open(out / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            msg = f"another experiment is at work in {out}; wait for its end or give another --out"
            raise UserError(msg) from error
        yield


def _write_job(task: Task, markers: Markers, slot: Mapping[str, str]) -> Path:
    path = markers.folder / f"{task.name}.job"
    content = {"environment": {**task.environment, **slot}, "markers": str(markers.folder), "steps": list(task.steps)}
    write_json(path, content)
    return path


def _start(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that it can be ended with its workers."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **variables},
            start_new_session=True,
        )


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """A request to terminate the process counts as Ctrl-C, so that it cleans up too."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ended(running: Mapping[int, tuple[Task, subprocess.Popen[bytes], float]]) -> Iterator[None]:
    """End all processes on the way out."""
    with terminated_as_interrupt():
        try:
            yield
        finally:
            for _, process, _ in running.values():
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _left(open_tasks: Sequence[Task], tasks: Sequence[Task], markers: Markers, num_slots: int) -> str:
    """The estimated rest from what finished tasks of the same kind took."""
    if not open_tasks:
        return ""
    known: dict[str, list[float]] = {}
    for task in tasks:
        if markers.done(task):
            known.setdefault(task.kind, []).append(markers.seconds(task))
    means = {kind: sum(values) / len(values) for kind, values in known.items()}
    longest = max(means.values(), default=0.0)
    rest = sum(means.get(task.kind, longest) for task in open_tasks) / num_slots
    return f", about {rest / 60:.0f} min left" if rest >= 90 else f", about {rest:.0f} s left"


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return "\n".join(f"    {line}" for line in lines[-LOG_LINES:])

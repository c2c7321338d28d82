# SPDX-License-Identifier: Apache-2.0
"""How two ways of doing the same work are timed, and how one row of the table is judged.

All ways run in every round, there and back (A B .. B A), so that what else the machine does meets them alike. The ratio
is taken within each round; its median is the row's figure, its smallest and largest value are the spread.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

Action = Callable[[], object]


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def clock_of(device: str) -> Callable[[], float]:
    """The clock for work on a device: process time on a CPU; wall time after all kernels have ended on a GPU."""
    if device == "cpu":
        return cpu_seconds

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def interleaved(
    actions: Mapping[str, Action], rounds: int = 5, *, clock: Callable[[], float] = cpu_seconds, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each action in each round; every round runs all of them, the next one in the opposite order.

    Args:
        actions: name -> what is timed.
        rounds: how many.
        clock: gives seconds.
        warm: run each action once before.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values() if warm else ():
        action()
    for number in range(rounds):
        for name in list(actions)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            actions[name]()
            times[name].append(clock() - start)
    return times


@dataclass(frozen=True)
class Goal:
    """What a row is to reach.

    Attributes:
        limit: the number.
        at_least: True where more is better, False where less is.
        of: "ratio", or "ours" for a goal in the row's unit.
    """

    limit: float
    at_least: bool = False
    of: str = "ratio"

    def met(self, value: float) -> bool:
        """Whether a value reaches it."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        key: name that stays the same from run to run.
        work: what is done.
        peer: with what it is compared.
        ours: our figure in ``unit``; None where the row was skipped.
        theirs: the peer's.
        unit: of both, e.g. "s".
        ratios: one for each round: ours / theirs, or theirs / ours where ``times_faster``.
        times_faster: the ratio says how many times faster we are, so more is better.
        goal: what is to be reached.
        note: what has to be known to read it.
        skipped: why there is no figure.
        sizes: with which parameters it ran; only rows of equal sizes are comparable.
    """

    key: str
    work: str
    peer: str = ""
    ours: float | None = None
    theirs: float | None = None
    unit: str = "s"
    ratios: list[float] = field(default_factory=list)
    times_faster: bool = False
    goal: Goal | None = None
    note: str = ""
    skipped: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Median of the rounds' ratios."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def judged(self) -> float | None:
        """The value that the goal is about."""
        return self.ours if self.goal is not None and self.goal.of == "ours" else self.ratio

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal or a figure."""
        if self.goal is None or self.judged is None:
            return None
        return self.goal.met(self.judged)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Row:
        """What :meth:`to_json` gave; unknown keys of another version are left out."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in content.items() if key in known}
        if values.get("goal") is not None:
            values["goal"] = Goal(**values["goal"])
        return cls(**values)


def compared(
    key: str,
    work: str,
    times: Mapping[str, Sequence[float]],
    peer: str,
    *,
    ours: str = "ours",
    scale: float = 1.0,
    peer_scale: float = 1.0,
    times_faster: bool = False,
    **row: Any,
) -> Row:
    """The row of two of the actions of :func:`interleaved`.

    Args:
        key: see :class:`Row`.
        work: see there.
        times: seconds for each action and round.
        peer: name of the action that ours is compared with.
        ours: name of ours.
        scale: factor on our times, where only a part of the work was timed.
        peer_scale: the same for the peer's.
        times_faster: see :class:`Row`.
        **row: its other attributes.
    """
    own = [scale * value for value in times[ours]]
    other = [peer_scale * value for value in times[peer]]
    pairs = zip(own, other, strict=True)
    ratios = [b / a if times_faster else a / b for a, b in pairs]
    return Row(
        key, work, row.pop("peer_name", peer), statistics.median(own), statistics.median(other),
        ratios=ratios, times_faster=times_faster, **row,
    )  # fmt: skip


@dataclass
class Run:
    """What all rows of one run share.

    Attributes:
        device: where networks run.
        rounds: of interleaved timing.
        level: "full", "quick", "tiny" or "gpu"; chooses each row's sizes.
        class_model: ckpt_dir of a trained model of cfg_ddpm, for the rows that can use one.
    """

    device: str = "cpu"
    rounds: int = 5
    level: str = "full"
    class_model: str | None = None

    def time(self, actions: Mapping[str, Action], rounds: int | None = None) -> dict[str, list[float]]:
        """:func:`interleaved` with the device's clock."""
        return interleaved(actions, rounds or self.rounds, clock=clock_of(self.device))


@dataclass(frozen=True)
class Entry:
    """A function that measures rows, and its sizes for each level."""

    name: str
    measure: Callable[..., list[Row]]
    sizes: Mapping[str, Mapping[str, Any]]

    def __call__(self, run: Run) -> list[Row]:
        """The rows, with the sizes that they ran with."""
        sizes = dict(self.sizes.get(run.level, self.sizes["full"]))
        rows = self.measure(run, **sizes)
        for row in rows:
            row.sizes = row.sizes or {"device": run.device} | sizes
        return rows


ROWS: dict[str, Entry] = {}


def rows_of(name: str, **sizes: Mapping[str, Any]) -> Callable[[Callable[..., list[Row]]], Callable[..., list[Row]]]:
    """Register a function ``(run, **sizes) -> rows`` under a name, with its sizes for "full", "quick", "tiny", "gpu".

    A level without sizes takes those of "full".
    """

    def register(measure: Callable[..., list[Row]]) -> Callable[..., list[Row]]:
        ROWS[name] = Entry(name, measure, sizes)
        return measure

    return register

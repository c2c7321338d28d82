# SPDX-License-Identifier: Apache-2.0
"""Work spread over processes so that Ctrl-C, a killed parent and a killed worker all end cleanly.

Processes are spawned, never forked: the caller may have threads of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from monai_synth.errors import UserError

# Processes that share the cores must not start a thread per core each: they would wait for one another.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_stop: Any = None


def stopped() -> bool:
    """Whether the run that this worker belongs to is being given up."""
    return _stop is not None and _stop.is_set()


def _start_worker(stop: Any) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started within compute with one thread each, unless the user set how many."""
    ours = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, "1"))
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def map_unordered(function: Callable[[Any], Any], items: Sequence[Any], num_workers: int) -> Iterator[Any]:
    """Results of ``function`` over ``items`` as they come, in this process where ``num_workers`` is 1.

    Raises:
        UserError: a worker was killed, or could not be started.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    num = min(num_workers, len(items))
    pool = ProcessPoolExecutor(num, mp_context=context, initializer=_start_worker, initargs=(stop,))
    with _one_thread_each(), pool:
        try:
            for future in as_completed([pool.submit(function, item) for item in items]):
                yield future.result()
        except BrokenProcessPool as error:
            msg = (
                f"one of {num} worker processes ended at once: out of memory, killed, or started from a "
                "script without `if __name__ == '__main__':`. Use --num_workers 1 or mend the script"
            )
            raise UserError(msg) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def worker_count(num_workers: int | None, useful: int | None = None) -> int:
    """Number of processes.

    Args:
        num_workers: as given; None takes one per CPU core, but no more than are useful.
        useful: how many there is work for. Default: any number.

    Raises:
        UserError: ``num_workers`` is below 1.
    """
    if num_workers is None:
        cores = os.cpu_count() or 1
        return cores if useful is None else min(cores, useful)
    if num_workers < 1:
        raise UserError(f"num_workers is {num_workers}; allowed is 1 or more, or none for one per core")
    return int(num_workers)

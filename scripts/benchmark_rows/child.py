# SPDX-License-Identifier: Apache-2.0
"""Work that needs a process of its own: ``python -m benchmark_rows.child JSON``, the answer is a line of JSON.

"memory": MiB of training steps beyond the memory after building, for each of its jobs. "sample": for every line that
comes in, samples once and answers with the seconds it took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parents[1]


def child_command(job: dict[str, Any]) -> list[str]:
    """The command line that does a job in a process of its own."""
    return [sys.executable, "-m", "benchmark_rows.child", json.dumps(job)]


def child_environment(threads: int = 1) -> dict[str, str]:
    """The environment of such a process: it finds this package and computes with so many threads."""
    places = [str(SCRIPTS), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(place for place in places if place)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


def memory_mib(field: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS now, VmHWM at most since the process began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def memory(job: dict[str, Any]) -> float:
    """MiB of two training steps, beyond the memory after building."""
    import torch

    from benchmark_rows.networks import training_step, unet

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, shape = job["device"], job["shape"]
    network = unet(job["library"], **shape, checkpoint=job.get("checkpoint", False)).to(device)
    x = torch.randn(job["batch"], shape["in_channels"], shape["size"], shape["size"], device=device)
    own = job["library"] == "ours"
    step = training_step(network, x, fused=own, bf16=job.get("bf16", False), device=device)
    before = memory_mib("VmRSS") if device == "cpu" else torch.cuda.memory_allocated() / 2**20
    for _ in range(2):
        step()
    peak = memory_mib("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return peak - before


def in_forks(jobs: list[dict[str, Any]]) -> list[float]:
    """:func:`memory` of each job in a fork of this process, which has imported the libraries and computed nothing.

    A fork's record of its peak begins anew, and the libraries are imported once instead of once for each job.
    """
    from benchmark_rows.networks import unet

    for library in {job["library"] for job in jobs}:  # import what it needs; weights of a tiny one are soon freed
        unet(library, base=8, mult=(1, 2), size=16, attention=(8,), in_channels=1, out_channels=1, groups=4)
    results = []
    for job in jobs:
        reading, writing = os.pipe()
        if os.fork() == 0:
            status = 1
            try:
                os.write(writing, json.dumps(memory(job)).encode())
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        with open(reading) as pipe:
            results.append(json.loads(pipe.read()))
        os.wait()
    return results


def serve_samples(job: dict[str, Any]) -> None:
    """Sample once for each line that comes in, until there are no more."""
    import torch

    from benchmark_rows.scale import sampling_job

    torch.set_num_threads(1)
    work = sampling_job(**job["sizes"])
    work()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.monotonic()
        work()
        print(json.dumps({"seconds": time.monotonic() - start}), flush=True)


def main() -> None:
    job = json.loads(sys.argv[1])
    if job["kind"] == "memory":
        print(json.dumps(in_forks(job["jobs"])))
    else:
        serve_samples(job)


if __name__ == "__main__":
    main()

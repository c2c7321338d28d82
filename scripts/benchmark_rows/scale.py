# SPDX-License-Identifier: Apache-2.0
"""Rows of what users wait for beside a network's calls: start-up, guided images of classes, several processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmark_rows.child import child_command, child_environment
from benchmark_rows.measure import Goal, Row, Run, compared, interleaved, rows_of
from benchmark_rows.networks import INSTALL, has_lucidrains, parameters_of

SCHEDULE = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
TEXT_STEPS = 500  # of the text's ancestral sampler


@rows_of("start-up", full={"peers": ("monai", "diffusers", "denoising_diffusion_pytorch")}, tiny={"peers": ()})
def start_up(run: Run, *, peers: tuple[str, ...]) -> list[Row]:
    """Import times and that of the first help, each in an interpreter of its own."""
    if not has_lucidrains():
        peers = tuple(peer for peer in peers if peer != "denoising_diffusion_pytorch")
    commands = {"bare": ["-c", "pass"], "ours": ["-c", "import monai_synth"], "help": ["-m", "monai_synth", "--help"]}
    commands |= {peer: ["-c", f"import {peer}"] for peer in peers}

    def start(arguments: list[str]) -> None:
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    actions = {name: (lambda arguments=arguments: start(arguments)) for name, arguments in commands.items()}
    times = interleaved(actions, max(1, min(run.rounds, 3)))
    question = "import sys, monai_synth; print('torch' in sys.modules)"
    asked = subprocess.run([sys.executable, "-c", question], check=True, capture_output=True, text=True)
    has_torch = asked.stdout.strip() == "True"
    beyond = {n: [max(a - b, 0.0) for a, b in zip(times[n], times["bare"], strict=True)] for n in commands}
    note = "process time beyond that of an interpreter that does nothing; "
    note += "torch is loaded" if has_torch else "torch is not loaded"
    goal = Goal(0.1, of="ours")
    rows = [
        compared(f"start-up/{peer}", "import monai_synth", beyond, peer, peer_name=f"import {peer}", unit="CPU s",
                 goal=goal, note=note)
        for peer in peers
    ]  # fmt: skip
    if not peers:
        rows = [Row("start-up/alone", "import monai_synth", "-", statistics.median(beyond["ours"]), unit="CPU s",
                    goal=goal, note=note)]  # fmt: skip
    elif not has_lucidrains():
        reason = f"not installed; {INSTALL}"
        rows.append(Row("start-up/denoising_diffusion_pytorch", "import monai_synth", skipped=reason))
    rows.append(Row(
        "start-up/help", "monai-synth --help", "-", statistics.median(times["help"]), unit="CPU s",
        goal=Goal(0.5, of="ours"), note="process time of the whole process",
    ))  # fmt: skip
    return rows


def class_model(run: Run, base: int, mult: tuple[int, ...], res_blocks: int, size: int) -> tuple[Any, dict[str, Any]]:
    """A trained network and its contract, or one of a shape with random weights."""
    if run.class_model:
        from monai_synth.inference.model import load_model

        model = load_model("cfg_ddpm", run.class_model, device=run.device)
        return model.network.eval(), model.contract
    from monai_synth.networks import ClassUNet

    torch.manual_seed(0)
    network = ClassUNet(2, 1, 2, (size, size), base_channels=base, channel_mult=mult, num_res_blocks=res_blocks)
    contract = {"schedule": SCHEDULE, "classes": {"a": 0, "b": 1}, "image_size": [size, size], "image_channels": 1}
    return network.to(run.device).eval(), contract


def class_sampling(
    run: Run, sampler: str, steps: int, batch: int, network: Any, contract: dict[str, Any]
) -> Callable[[], Any]:
    """Sampling of a batch of guided images."""
    from monai_synth.inference.classes import ClassInferer

    number = len(contract["classes"])
    labels = torch.arange(batch, device=run.device) % number
    inferer = ClassInferer(
        contract["schedule"], image_size=contract["image_size"], image_channels=contract["image_channels"],
        null_class=number, sampler=sampler, num_steps=steps,
    )  # fmt: skip
    return lambda: inferer(labels, network, seeds=range(batch))


@rows_of(
    "class-images",
    full={"base": 32, "mult": (1, 2, 2), "res_blocks": 1, "size": 28, "batch": 50, "calls": 20, "timed": 5},
    quick={"base": 32, "mult": (1, 2, 2), "res_blocks": 1, "size": 28, "batch": 50, "calls": 20, "timed": 3},
    tiny={"base": 8, "mult": (1, 2), "res_blocks": 1, "size": 8, "batch": 2, "calls": 2, "timed": 1},
    gpu={"base": 64, "mult": (1, 2, 4), "res_blocks": 2, "size": 28, "batch": 500, "calls": 20, "timed": 20},
)
def class_images(run: Run, *, batch: int, calls: int, timed: int, **shape: Any) -> list[Row]:
    """500 guided images: seconds of the clock with all cores, and against the text's ancestral steps."""
    network, contract = class_model(run, **shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        wall = interleaved(
            {
                "ours": class_sampling(run, "dpm++", calls, batch, network, contract),
                "text": class_sampling(run, "ddpm", timed, batch, network, contract),
            },
            max(1, min(run.rounds, 3)),
            clock=_wall_clock(run.device),
        )
    finally:
        torch.set_num_threads(threads)
    size = contract["image_size"][0]
    whose = "trained" if run.class_model else "random weights"
    return [compared(
        "class-images", f"500 guided images of {size} x {size}, {calls} calls", wall, "text",
        peer_name=f"{TEXT_STEPS} ancestral steps", unit="s wall", times_faster=True, scale=500 / batch,
        peer_scale=500 / batch * TEXT_STEPS / timed, goal=Goal(90, of="ours"),
        note=f"{os.cpu_count()} threads, seconds of the clock, so other work on the machine counts; one batch of "
        f"{batch} timed and scaled, {timed} of the ancestral steps; {parameters_of(network) / 1e6:.2f} M parameters, "
        f"{whose}; float32",
    )]  # fmt: skip


def _wall_clock(device: str) -> Callable[[], float]:
    def clock() -> float:
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.monotonic()

    return clock


def sampling_job(*, base: int, mult: tuple[int, ...], size: int, batch: int, calls: int) -> Callable[[], Any]:
    """What a process of the row below does for each line it is sent."""
    run = Run()
    network, contract = class_model(run, base, tuple(mult), 1, size)
    return class_sampling(run, "dpm++", calls, batch, network, contract)


@rows_of(
    "processes",
    full={"base": 32, "mult": (1, 2, 2), "size": 28, "batch": 16, "calls": 10, "repeats": 5},
    quick={"base": 32, "mult": (1, 2, 2), "size": 28, "batch": 8, "calls": 10, "repeats": 3},
    tiny={"base": 8, "mult": (1, 2), "size": 8, "batch": 1, "calls": 2, "repeats": 1},
)
def two_processes(run: Run, *, repeats: int, **sizes: Any) -> list[Row]:
    """Samples by two processes at once against one alone, each with one thread."""
    work, peer = "guided images by 2 processes, one thread each", "1 process"
    if (os.cpu_count() or 1) < 2:
        return [Row("processes", work, peer, goal=Goal(1.8, at_least=True), skipped="this machine has one core")]
    job = {"kind": "sample", "sizes": sizes}
    children = [
        subprocess.Popen(
            child_command(job), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=child_environment()
        )
        for _ in range(2)
    ]
    try:
        for child in children:
            _answer(child)
        together, alone, ratios = [], [], []
        for number in range(repeats):
            one: list[float] = []
            both: list[float] = []
            for kind in (("one", "both"), ("both", "one"))[number % 2]:
                if kind == "one":
                    one = [_ask([children[number % 2]])]
                else:
                    both = [_ask(children)]
            alone.append(sizes["batch"] / one[0])
            together.append(2 * sizes["batch"] / both[0])
            ratios.append(together[-1] / alone[-1])
    finally:
        for child in children:
            child.stdin.close()
            child.wait()
            child.stdout.close()
    return [Row(
        "processes", work, peer, statistics.median(together), statistics.median(alone), "images/s wall", ratios,
        times_faster=True, goal=Goal(1.8, at_least=True),
        note="seconds of the clock, the slower of the two counts: it needs two free cores, on a busy machine it says "
        "nothing",
    )]  # fmt: skip


def _answer(child: subprocess.Popen) -> dict[str, Any]:
    return json.loads(child.stdout.readline())


def _ask(children: list[subprocess.Popen]) -> float:
    """Seconds until all of these processes have sampled once, begun at the same time."""
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    return max(_answer(child)["seconds"] for child in children)

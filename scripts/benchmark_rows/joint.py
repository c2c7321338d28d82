# SPDX-License-Identifier: Apache-2.0
"""Rows of the joint diffusion model's U-Net: training step, call, memory, checkpointing, share of the matrix rate."""

from __future__ import annotations

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmark_rows.child import child_command, child_environment
from benchmark_rows.measure import Goal, Row, Run, clock_of, compared, interleaved, rows_of
from benchmark_rows.networks import (
    INSTALL,
    NO_BF16,
    call,
    has_bf16,
    has_lucidrains,
    in_bf16,
    parameters_of,
    sampling_call,
    training_step,
    unet,
)

FP32_GOAL = "the goal was set with bfloat16; "
OPTIMIZERS = "ours with fused AdamW as in the bundles' configs, the peers with torch's default AdamW"

MINI = {"mult": (1, 1, 2, 2, 4, 4), "in_channels": 4, "out_channels": 8}
WIDE = {"mult": (1, 1, 2, 2, 4), "in_channels": 4, "out_channels": 8}
TINY = {"base": 8, "size": 16, "mult": (1, 2), "attention": (8,), "in_channels": 4, "out_channels": 8, "groups": 4}


def _noisy(shape: dict[str, Any], batch: int, device: str) -> torch.Tensor:
    return torch.randn(batch, shape["in_channels"], shape["size"], shape["size"], device=device)


def _training_rows(run: Run, key: str, goals: dict[str, float], batch: int, shape: dict[str, Any]) -> list[Row]:
    """A training step of ours in float32 and bfloat16 beside each peer's in float32."""
    torch.manual_seed(0)
    x = _noisy(shape, batch, run.device)
    names = ["ours", "MONAI", "diffusers", *(["denoising-diffusion-pytorch"] if has_lucidrains() else [])]
    networks = {name: unet(name, **shape).to(run.device) for name in names}
    actions = {n: training_step(net, x, fused=n == "ours", device=run.device) for n, net in networks.items()}
    bf16 = has_bf16(run.device)
    if bf16:
        own = unet("ours", **shape).to(run.device)
        actions["bf16"] = training_step(own, x, fused=True, bf16=True, device=run.device)
    times = run.time(actions)
    size, millions = shape["size"], {name: parameters_of(net) / 1e6 for name, net in networks.items()}
    work = f"JDM training step, {size} x {size}, base {shape['base']}, batch {batch}"
    rows = []
    for peer in names[1:]:
        goal = Goal(goals[peer]) if peer in goals else None
        alike = millions[peer] == millions["ours"]
        note = f"{OPTIMIZERS}; {millions['ours']:.2f} M parameters" + (
            "" if alike else f", {peer} {millions[peer]:.2f} M"
        )
        rows.append(compared(
            f"{key}/{peer}/fp32", f"{work}, float32", times, peer, goal=goal,
            note=note if goal is None else FP32_GOAL + note,
        ))  # fmt: skip
        label = f"{work}, ours bfloat16 autocast"
        if bf16:
            rows.append(compared(
                f"{key}/{peer}/bf16", label, times, peer, ours="bf16", peer_name=f"{peer} float32", goal=goal, note=note
            ))  # fmt: skip
        else:
            rows.append(Row(f"{key}/{peer}/bf16", label, peer, skipped=NO_BF16))
    if not has_lucidrains():
        reason = f"not installed; {INSTALL}"
        rows.append(Row(f"{key}/denoising-diffusion-pytorch/fp32", work, "denoising-diffusion-pytorch", skipped=reason))
    return rows


@rows_of(
    "jdm-train",
    full={**MINI, "base": 64, "size": 64, "attention": (8, 4), "batch": 2},
    quick={**MINI, "base": 32, "size": 64, "attention": (8, 4), "batch": 2},
    tiny={**TINY, "batch": 1},
    gpu={**MINI, "base": 128, "size": 128, "attention": (16, 8), "batch": 32},
)
def jdm_training(run: Run, *, batch: int, **shape: Any) -> list[Row]:
    """A training step with few tokens in attention."""
    return _training_rows(run, "jdm-train", {"diffusers": 0.60, "MONAI": 0.60}, batch, shape)


@rows_of(
    "jdm-train-attention",
    full={**WIDE, "base": 32, "size": 128, "attention": (32, 16), "batch": 2},
    quick={**WIDE, "base": 32, "size": 128, "attention": (32, 16), "batch": 1},
    tiny={**TINY, "batch": 1},
    gpu={**WIDE, "base": 128, "size": 256, "attention": (64, 32), "batch": 8},
)
def jdm_training_attention(run: Run, *, batch: int, **shape: Any) -> list[Row]:
    """A training step with attention over 1024 tokens."""
    return _training_rows(run, "jdm-train-attention", {"MONAI": 0.50}, batch, shape)


@rows_of(
    "jdm-call",
    full={**MINI, "base": 64, "size": 64, "attention": (8, 4), "batch": 4},
    quick={**MINI, "base": 32, "size": 64, "attention": (8, 4), "batch": 2},
    tiny={**TINY, "batch": 1},
    gpu={**MINI, "base": 128, "size": 256, "attention": (16, 8), "batch": 10},
)
def jdm_call(run: Run, *, batch: int, **shape: Any) -> list[Row]:
    """A call of the denoiser in sampling."""
    torch.manual_seed(0)
    x = _noisy(shape, batch, run.device)
    names = ["ours", "MONAI", "diffusers", *(["denoising-diffusion-pytorch"] if has_lucidrains() else [])]
    networks = {name: unet(name, **shape).to(run.device).eval() for name in names}
    actions = {name: sampling_call(network, x) for name, network in networks.items()}
    bf16 = has_bf16(run.device)
    if bf16:
        actions["bf16"] = sampling_call(in_bf16(networks["ours"], run.device), x)
    times = run.time(actions)
    size, millions = shape["size"], {name: parameters_of(net) / 1e6 for name, net in networks.items()}
    work = f"JDM denoiser call, {size} x {size}, base {shape['base']}, batch {batch}"
    rows = []
    for peer in names[1:]:
        goal = Goal(0.40) if peer == "diffusers" else None
        alike = millions[peer] == millions["ours"]
        note = f"{millions['ours']:.2f} M parameters" + ("" if alike else f", {peer} {millions[peer]:.2f} M")
        rows.append(compared(
            f"jdm-call/{peer}/fp32", f"{work}, float32", times, peer, goal=goal,
            note=note if goal is None else FP32_GOAL + note,
        ))  # fmt: skip
        label = f"{work}, ours bfloat16 weights, channels last"
        if bf16:
            rows.append(compared(
                f"jdm-call/{peer}/bf16", label, times, peer, ours="bf16", peer_name=f"{peer} float32", goal=goal,
                note=note,
            ))  # fmt: skip
        else:
            rows.append(Row(f"jdm-call/{peer}/bf16", label, peer, skipped=NO_BF16))
    return rows


def peaks_of_steps(jobs: list[dict[str, Any]]) -> list[float]:
    """MiB that training steps take beyond what building the network took, each in a process of its own."""
    command = child_command({"kind": "memory", "jobs": jobs})
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=child_environment())
    return json.loads(done.stdout.splitlines()[-1])


@rows_of(
    "jdm-memory",
    full={**WIDE, "base": 32, "size": 128, "attention": (32, 16), "batch": 2, "repeats": 1},
    quick={**WIDE, "base": 32, "size": 128, "attention": (32, 16), "batch": 2, "repeats": 1},
    tiny={**TINY, "batch": 1, "repeats": 1},
    gpu={**WIDE, "base": 128, "size": 256, "attention": (64, 32), "batch": 8, "repeats": 1},
)
def jdm_memory(run: Run, *, batch: int, repeats: int, **shape: Any) -> list[Row]:
    """Peak memory of a training step beside MONAI's default form."""
    if run.device == "cpu" and not Path("/proc/self/status").is_file():
        return [Row("jdm-memory/fp32", "peak memory of a training step", "MONAI", skipped="there is no /proc here")]
    ways: dict[str, dict[str, Any]] = {
        "MONAI": {"library": "MONAI"}, "diffusers": {"library": "diffusers"}, "fp32": {"library": "ours"},
        "fp32-checkpoint": {"library": "ours", "checkpoint": True},
    }  # fmt: skip
    bf16 = has_bf16(run.device)
    if bf16:
        ways["bf16"] = {"library": "ours", "bf16": True}
    jobs = [way | {"device": run.device, "shape": shape, "batch": batch} for way in ways.values()]
    found = peaks_of_steps(jobs * repeats)
    peaks = {name: found[i :: len(ways)] for i, name in enumerate(ways)}
    size = shape["size"]
    work = f"peak memory of a JDM training step, {size} x {size}, base {shape['base']}, batch {batch}"
    note = (
        "beyond the memory after building, in a fresh process (VmHWM; on a card its allocator's peak), AdamW included"
    )
    rows = []
    for name, text in (
        ("fp32", "float32"),
        ("fp32-checkpoint", "float32, per-block checkpointing"),
        ("bf16", "bfloat16 autocast"),
    ):
        if name not in peaks:
            rows.append(Row(f"jdm-memory/{name}", f"{work}, {text}", "MONAI", skipped=NO_BF16))
            continue
        rows.append(compared(
            f"jdm-memory/{name}", f"{work}, {text}", peaks, "MONAI", ours=name, unit="MiB", note=note,
            goal=Goal(0.6),
        ))  # fmt: skip
    rows.append(compared(
        "jdm-memory/fp32/diffusers", f"{work}, float32", peaks, "diffusers", ours="fp32", unit="MiB", note=note
    ))  # fmt: skip
    return rows


def kept_bytes(network: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, each memory once, without parameters."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that its address is not given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(network, x, torch.zeros(len(x), dtype=torch.long, device=x.device))
    return sum(size for size, _ in kept.values())


@rows_of(
    "jdm-checkpointing",
    full={**MINI, "base": 32, "size": 128, "attention": (16, 8), "batch": 1},
    tiny={**TINY, "batch": 1},
    gpu={**MINI, "base": 128, "size": 256, "attention": (16, 8), "batch": 10},
)
def jdm_checkpointing(run: Run, *, batch: int, **shape: Any) -> list[Row]:
    """What per-block checkpointing keeps, and what it costs."""
    torch.manual_seed(0)
    x = _noisy(shape, batch, run.device)
    networks = {
        "ours": unet("ours", **shape, checkpoint=True), "without": unet("ours", **shape),
        "MONAI": unet("MONAI", **shape),
    }  # fmt: skip
    networks = {name: network.to(run.device) for name, network in networks.items()}
    kept = {name: [kept_bytes(network, x) / 2**20] for name, network in networks.items()}
    times = run.time({n: training_step(networks[n], x, fused=True, device=run.device) for n in ("ours", "without")})
    size = shape["size"]
    work = f"JDM, {size} x {size}, base {shape['base']}, batch {batch}, per-block checkpointing"
    note = "tensors kept for the backward pass, counted with saved_tensors_hooks; the same on every machine"
    return [
        compared("jdm-checkpointing/kept", f"{work}: activations kept", kept, "MONAI", peer_name="MONAI default",
                 unit="MiB", goal=Goal(0.30), note=note),
        compared("jdm-checkpointing/kept-own", f"{work}: activations kept", kept, "without",
                 peer_name="ours without it", unit="MiB", note=note),
        compared("jdm-checkpointing/time", f"{work}: time of a step", times, "without", peer_name="ours without it",
                 goal=Goal(1.35)),
    ]  # fmt: skip


def matrix_rate(run: Run, side: int, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices, the best of the rounds."""
    a, b = (torch.randn(side, side, device=run.device, dtype=dtype) for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b}, max(run.rounds, 5), clock=clock_of(run.device))["product"]
    return 2 * side**3 / min(seconds)


def flops_of_step(network: torch.nn.Module, x: torch.Tensor) -> int:
    """FLOPs of a forward and a backward pass, 2 for each product and sum."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call(network, x, torch.zeros(len(x), dtype=torch.long, device=x.device)).square().mean().backward()
    network.zero_grad()
    return counter.get_total_flops()


@rows_of(
    "matrix-share",
    full={**MINI, "base": 64, "size": 64, "attention": (8, 4), "batch": 2, "side": 2048, "bf16": False},
    tiny={**TINY, "batch": 1, "side": 64, "bf16": False},
    gpu={**MINI, "base": 128, "size": 256, "attention": (16, 8), "batch": 32, "side": 8192, "bf16": True},
)
def matrix_share(run: Run, *, batch: int, side: int, bf16: bool, **shape: Any) -> list[Row]:
    """Share of the machine's own matrix rate that a training step reaches."""
    torch.manual_seed(0)
    x = _noisy(shape, batch, run.device)
    network = unet("ours", **shape).to(run.device)
    flops = flops_of_step(network, x)
    ways = {"eager": network}
    if run.device != "cpu":
        network = network.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        ways = {"eager": network, "compiled": torch.compile(network)}
    rate = matrix_rate(run, side, torch.bfloat16 if bf16 else torch.float32)
    times = run.time({
        name: training_step(net, x, fused=True, bf16=bf16, device=run.device) for name, net in ways.items()
    })  # fmt: skip
    kind = "bfloat16" if bf16 else "float32"
    rows = []
    for name in ways:
        shares = [flops / seconds / rate for seconds in times[name]]
        goal = Goal(0.35, at_least=True, of="ours") if run.device != "cpu" else None
        rows.append(Row(
            f"matrix-share/{name}",
            f"JDM training step, {shape['size']} x {shape['size']}, base {shape['base']}, batch {batch}, {kind}, {name}"
            ": share of the measured matrix rate",
            "matrix product", statistics.median(shares), rate / 1e9, "", shares, times_faster=True, goal=goal,
            note=f"rate of a product of {side} x {side} in {kind} in this run, in GFLOP/s; "
            f"{flops / 1e9:.0f} GFLOP a step; the ratio is the share again",
        ))  # fmt: skip
    return rows

# SPDX-License-Identifier: Apache-2.0
"""Measurements of `benchmark.py` that need data or minutes: imports, first commands, trained models, alignment."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

from benchmark_rows.measure import cpu_seconds, interleaved

ROOT = Path(__file__).resolve().parents[2]


def class_sampling(ckpt_dir: Path, *, num_images: int = 500, batch: int = 50, device: str) -> None:
    """Guided images of classes with 20 steps, and with the text's 500 ancestral ones, whose time a batch tells."""
    from monai_synth.inference.classes import ClassInferer
    from monai_synth.inference.model import load_model

    model = load_model("cfg_ddpm", ckpt_dir, device=device)
    contract = model.contract
    num_classes = len(contract["classes"])
    labels = torch.arange(batch, device=device) % num_classes

    def run(sampler: str, num_steps: int, num_batches: int) -> tuple[float, float]:
        inferer = ClassInferer(
            contract["schedule"], image_size=contract["image_size"], image_channels=contract["image_channels"],
            null_class=num_classes, sampler=sampler, num_steps=num_steps,
        )  # fmt: skip
        start, wall = cpu_seconds(), time.monotonic()
        for i in range(num_batches):
            float(inferer(labels, model.network, seeds=range(i * batch, (i + 1) * batch)).sum())
        factor = num_images / (num_batches * batch)
        return (cpu_seconds() - start) * factor, (time.monotonic() - wall) * factor

    run("dpm++", 2, 1)
    fast, slow = run("dpm++", 20, num_images // batch), run("ddpm", 500, 1)
    print(
        f"{num_images} images of {contract['image_size']}, batch {batch}, guided, {device}: dpm++ with 20 steps "
        f"{fast[0]:.1f} CPU s ({fast[1]:.1f} s wall), ddpm with 500 steps {slow[0]:.0f} CPU s ({slow[1]:.0f} s wall; "
        f"from {batch} images), ratio {slow[0] / fast[0]:.1f}"
    )


def _class_network(bundle: str, preset: str, size: int) -> tuple[torch.nn.Module, str]:
    """The network of a bundle whose images have classes, and the layer that it aligns."""
    from monai_synth.networks import ClassUNet, TextUNet

    torch.manual_seed(0)
    if bundle == "cfg_ddpm":
        sizes = {
            "demo": {"base_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1},
            "paper": {"base_channels": 64, "channel_mult": (1, 2, 4), "num_res_blocks": 2},
        }[preset]
        return ClassUNet(2, 1, 8, (size, size), **sizes), "middle_block"
    settings = json.loads((ROOT / "bundles" / "fad" / "configs" / "train.json").read_text())["presets"][preset]
    keys = ("block_out_channels", "cross_attention", "cross_attention_dim", "attention_head_dim", "norm_num_groups")
    network = TextUNet(1, 8, (size, size), text_dim=settings["text_dim"], **{key: settings[key] for key in keys})
    network.set_text_features(torch.randn(8, settings["text_dim"]))
    return network, "unet.down_blocks.2"


def alignment(bundle: str, preset: str, backbone: str, *, size: int = 64, batch: int = 4, device: str) -> None:
    """A training step of a network, plain and with an expert that sees the noisy images at their size."""
    from monai_synth.networks import ImageClassifier
    from monai_synth.training import (
        AlignedLoss,
        AlignedNetwork,
        AlignedPrepareBatch,
        ClassDiffusionPrepareBatch,
        Expert,
    )

    expert = Expert(ImageClassifier(backbone, 8, 1), value_range=[-1, 1], device=device)
    network, layer = _class_network(bundle, preset, size)
    network = network.to(device)
    t = torch.zeros(1, dtype=torch.long)
    aligned = AlignedNetwork(
        network, layer=layer, num_features=expert.num_features,
        example={"x": torch.zeros(1, 1, size, size), "timesteps": t, "class_labels": t},
    ).to(device)  # fmt: skip
    schedule = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    prepare = ClassDiffusionPrepareBatch(schedule, null_class=8, drop_prob=0.0)
    ways = {
        "plain": (network, torch.nn.MSELoss(), prepare),
        "aligned": (aligned, AlignedLoss(torch.nn.MSELoss()), AlignedPrepareBatch(prepare, expert, image_channels=1)),
    }
    optimizers = {name: torch.optim.AdamW(way[0].parameters(), fused=True) for name, way in ways.items()}
    image = torch.randint(0, 256, (batch, 1, size, size), dtype=torch.uint8)
    data = {"image": image, "class": torch.arange(batch) % 8, "index": torch.arange(batch)}

    def step(name: str) -> None:
        model, loss_function, prepared = ways[name]
        x_t, target, args, kwargs = prepared(data, device)
        loss = loss_function(model(x_t, *args, **kwargs), target)
        optimizers[name].zero_grad()
        loss.backward()
        optimizers[name].step()
        float(loss.detach())  # waits for the device

    rounds = interleaved({name: (lambda name=name: step(name)) for name in ways}, rounds=7)
    times = {name: statistics.median(seconds) for name, seconds in rounds.items()}
    print(
        f"training step of {bundle} ({preset}), {size} x {size}, batch {batch}, {device}: plain {times['plain']:.3f} s,"
        f" aligned with {backbone} {times['aligned']:.3f} s, {100 * (times['aligned'] / times['plain'] - 1):+.0f} %"
    )


def pairs_import(source: Path, label: str) -> None:
    """``prepare pairs`` in a process of its own, with the machine's default number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        start, wall = cpu_seconds(), time.monotonic()
        command = [sys.executable, "-m", "monai_synth", "prepare", "pairs", str(source), f"{folder}/out"]
        subprocess.run([*command, "--labels", label], check=True, stdout=subprocess.DEVNULL)
        print(f"prepare pairs {source.name}: {cpu_seconds() - start:.1f} CPU s, {time.monotonic() - wall:.1f} s wall")


def lidc_import(source: Path) -> None:
    """``prepare lidc`` in a process of its own, with the machine's default number of workers."""
    with tempfile.TemporaryDirectory() as folder:
        start, wall = cpu_seconds(), time.monotonic()
        command = [sys.executable, "-m", "monai_synth", "prepare", "lidc", str(source), f"{folder}/out"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(f"prepare lidc {source.name}: {cpu_seconds() - start:.1f} CPU s, {time.monotonic() - wall:.1f} s wall")


def xml_parsing(archive: Path) -> None:
    """All XML files of a zip."""
    from monai_synth.data.lidc_xml import read_lidc_xml

    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(archive).extractall(folder)
        files = sorted(Path(folder).rglob("*.xml"))
        start = cpu_seconds()
        for file in files:
            read_lidc_xml(file)
        print(f"LIDC XML: {len(files)} files in {cpu_seconds() - start:.1f} CPU s")


def first_command(bundle: str) -> None:
    """A bundle's training on its phantom in an empty place: wall time, CPU time and the largest process."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"phantom_dir": "phantom", "ckpt_dir": "models", "latest_dir": "models", "output_dir": "eval"}
        options = [part for key, value in places.items() for part in (f"--{key}", f"{folder}/{value}")]
        config = str(ROOT / "bundles" / bundle / "configs" / "train.json")
        start, wall = cpu_seconds(), time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", config, *options],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        seconds = time.monotonic() - wall
        used = f"{cpu_seconds() - start:.0f} CPU s, largest process {peak:.2f} GiB"
        print(f"{bundle} on its phantom: {seconds:.0f} s wall, {used}")

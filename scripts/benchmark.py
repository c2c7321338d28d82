# SPDX-License-Identifier: Apache-2.0
"""Speed of what users wait for, measured side by side in one run.

    python scripts/benchmark.py                         # SPADE cache, joint U-Net beside that of diffusers
    python scripts/benchmark.py --lidc FOLDER           # import of a real series
    python scripts/benchmark.py --xml-zip FILE          # parsing of LIDC XML files
    python scripts/benchmark.py --pairs FOLDER LABEL    # import of SRC/images and SRC/masks
    python scripts/benchmark.py --first-command lsdm    # train.json of a bundle on its phantom (minutes)
    python scripts/benchmark.py --class-model FOLDER    # sampling with a trained model of cfg_ddpm, 20 and 500 steps
    python scripts/benchmark.py --alignment             # training step of cfg_ddpm and of fad, plain and aligned

Times are process times (all threads of this process and of its children), on a GPU with the wait for it, medians of
interleaved rounds; on a shared machine quote ratios. Nothing here is a test: machines differ.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def interleaved(actions: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Median CPU seconds of each action; every round runs all of them, back and forth."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for number in range(rounds):
        for name in list(actions)[:: 1 if number % 2 == 0 else -1]:
            start = cpu_seconds()
            actions[name]()
            times[name].append(cpu_seconds() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def spade_cache(preset: str, batch: int) -> None:
    """Sampling with SPADE's modulations computed once per case against at every step."""
    from monai_synth.diffusion import make_sampler
    from monai_synth.inference import initial_noise, make_generators, sample
    from monai_synth.networks import SPADEUNet

    channels, hidden, size, heads, groups, res_blocks = {
        "demo": ((32, 64, 64), 32, 32, 32, 8, 1),
        "paper-quarter": ((32, 128, 256), 128, 64, 32, 32, 2),
    }[preset]
    torch.manual_seed(0)
    network = SPADEUNet(
        2, 6, 3, 8, channels, num_res_blocks=res_blocks, attention_levels=(False,) * 3, num_head_channels=heads,
        norm_num_groups=groups, spade_hidden_channels=hidden,
    ).eval()  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    seg = torch.nn.functional.one_hot(torch.randint(0, 8, (batch, size, size)), 8).movedim(-1, 1).float()
    cond = torch.randn(batch, 3, size, size)
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205}
    results: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def run(name: str) -> None:
        generators = make_generators(range(batch))
        x_T = initial_noise((3, size, size), generators)
        extra = {"modulations": network.modulations(seg, (size, size))} if name == "cached" else {"seg": seg}
        sampler = make_sampler("dpm++", schedule, 20)
        results[name] = sample(lambda x, t: network(torch.cat([x, cond], 1), t, **extra), x_T, sampler)

    times = interleaved({name: (lambda name=name: run(name)) for name in ("cached", "uncached")})
    difference = (results["cached"] - results["uncached"]).abs().max() / results["cached"].abs().max()
    print(
        f"SPADE cache, {preset}, batch {batch}, 20 steps: cached {times['cached']:.2f} s, "
        f"uncached {times['uncached']:.2f} s, ratio {times['uncached'] / times['cached']:.2f}, "
        f"largest relative difference {difference:.1e}"
    )


def joint_unet(base_channels: int, size: int, batch: int, *, device: str) -> None:
    """The network of Table 4.1 at a width and size beside diffusers' of the same shape: sampling and training step."""
    from diffusers import UNet2DModel

    from monai_synth.networks import JointUNet

    mult, attention = (1, 1, 2, 2, 4, 4), (size // 16, size // 32)
    groups = min(32, base_channels)
    ours = JointUNet(
        2, 3, 1, (size, size), base_channels=base_channels, channel_mult=mult, attention_resolutions=attention,
        norm_num_groups=groups, time_scale_shift=False,
    )  # fmt: skip
    down = ["AttnDownBlock2D" if size // 2**i in attention else "DownBlock2D" for i in range(len(mult))]
    other = UNet2DModel(
        sample_size=size, in_channels=4, out_channels=8, layers_per_block=2, norm_num_groups=groups,
        block_out_channels=[base_channels * m for m in mult], down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)], attention_head_dim=base_channels,
    )  # fmt: skip
    x, t = torch.randn(batch, 4, size, size, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    networks = {"ours": ours.to(device), "diffusers": other.to(device)}
    optimizers = {k: torch.optim.AdamW(n.parameters(), fused=True) for k, n in networks.items()}

    def call(name: str) -> torch.Tensor:
        out = networks[name](x, t)
        return out if name == "ours" else out.sample

    def infer(name: str) -> float:
        with torch.no_grad():
            return float(call(name).sum())  # waits for the device

    def train(name: str) -> None:
        call(name).square().mean().backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        float(x[0, 0, 0, 0])

    sizes = {k: sum(p.numel() for p in n.parameters()) / 1e6 for k, n in networks.items()}
    for what, action in (("call", infer), ("training step", train)):
        times = interleaved({k: (lambda k=k, action=action: action(k)) for k in networks})
        print(
            f"joint U-Net base {base_channels}, {size} x {size}, batch {batch}, {device}, {what}: ours "
            f"{times['ours']:.3f} s ({sizes['ours']:.2f} M), diffusers {times['diffusers']:.3f} s "
            f"({sizes['diffusers']:.2f} M), ratio {times['ours'] / times['diffusers']:.2f}"
        )


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

    times = interleaved({name: (lambda name=name: step(name)) for name in ways}, rounds=7)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lidc", type=Path, help="folder with a LIDC series to import")
    parser.add_argument("--xml-zip", type=Path, help="zip of LIDC XML files to parse")
    parser.add_argument("--pairs", nargs=2, metavar=("FOLDER", "LABEL"), help="images and masks to import")
    parser.add_argument("--first-command", metavar="BUNDLE", help="train a bundle on its phantom, e.g. jdm")
    parser.add_argument("--class-model", type=Path, metavar="FOLDER", help="ckpt_dir of cfg_ddpm to sample from")
    parser.add_argument("--alignment", action="store_true", help="training step with and without an expert")
    parser.add_argument("--device", default="cpu", help="where the networks run (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if arguments.lidc:
        lidc_import(arguments.lidc)
    if arguments.xml_zip:
        xml_parsing(arguments.xml_zip)
    if arguments.first_command:
        first_command(arguments.first_command)
    if arguments.pairs:
        pairs_import(Path(arguments.pairs[0]), arguments.pairs[1])
    if arguments.class_model:
        class_sampling(arguments.class_model, device=arguments.device)
    if arguments.alignment:
        for bundle in ("cfg_ddpm", "fad"):
            for preset in ("demo", "paper"):
                for backbone in ("resnet18", "resnet50"):
                    alignment(bundle, preset, backbone, device=arguments.device)
    chosen = ("lidc", "xml_zip", "pairs", "first_command", "class_model", "alignment")
    if not any(vars(arguments)[key] for key in chosen):
        spade_cache("demo", 8)
        spade_cache("paper-quarter", 1)
        joint_unet(32, 64, 4, device=arguments.device)
        if arguments.device != "cpu":
            joint_unet(128, 256, 10, device=arguments.device)


if __name__ == "__main__":
    main()

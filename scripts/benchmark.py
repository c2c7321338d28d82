# SPDX-License-Identifier: Apache-2.0
"""Speed of what users wait for, measured side by side in one run.

    python scripts/benchmark.py                         # SPADE cache, solvers, phantom import
    python scripts/benchmark.py --lidc FOLDER           # import of a real series
    python scripts/benchmark.py --xml-zip FILE          # parsing of LIDC XML files
    python scripts/benchmark.py --first-command         # the README's first command, all stages (minutes)

Times are process times (all threads of this process and of its children), medians of interleaved rounds; on a
shared machine quote ratios. Nothing here is a test: machines differ.
"""

from __future__ import annotations

import argparse
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


def first_command() -> None:
    """The README's first command in an empty place: wall time, CPU time and the largest process."""
    with tempfile.TemporaryDirectory() as folder:
        places = {"phantom_dir": "phantom", "ckpt_dir": "models", "latest_dir": "models", "output_dir": "eval"}
        options = [part for key, value in places.items() for part in (f"--{key}", f"{folder}/{value}")]
        config = str(ROOT / "bundles" / "lsdm" / "configs" / "train.json")
        start, wall = cpu_seconds(), time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", config, *options],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        seconds = time.monotonic() - wall
        print(f"first command: {seconds:.0f} s wall, {cpu_seconds() - start:.0f} CPU s, largest process {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lidc", type=Path, help="folder with a LIDC series to import")
    parser.add_argument("--xml-zip", type=Path, help="zip of LIDC XML files to parse")
    parser.add_argument("--first-command", action="store_true", help="run the README's first command")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if arguments.lidc:
        lidc_import(arguments.lidc)
    if arguments.xml_zip:
        xml_parsing(arguments.xml_zip)
    if arguments.first_command:
        first_command()
    if not (arguments.lidc or arguments.xml_zip or arguments.first_command):
        spade_cache("demo", 8)
        spade_cache("paper-quarter", 1)


if __name__ == "__main__":
    main()

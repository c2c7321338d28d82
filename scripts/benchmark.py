# SPDX-License-Identifier: Apache-2.0
"""Speed of what users wait for, measured side by side in one run: this project, diffusers, MONAI and others.

    python scripts/benchmark.py                         # the whole table, under 10 minutes on 2 cores
    python scripts/benchmark.py --quick                 # smaller sizes, fewer rounds; goals are not judged
    python scripts/benchmark.py --rows spade-call solver
    python scripts/benchmark.py --json new.json --against old.json   # exit status 1 where something became slower
    python scripts/benchmark.py --gpu                   # larger sizes, and the share of the card's matrix rate
    python scripts/benchmark.py --class-model FOLDER    # rows with a trained model of cfg_ddpm; 20 and 500 steps

    python scripts/benchmark.py --lidc FOLDER           # import of a real series
    python scripts/benchmark.py --xml-zip FILE          # parsing of LIDC XML files
    python scripts/benchmark.py --pairs FOLDER LABEL    # import of SRC/images and SRC/masks
    python scripts/benchmark.py --first-command lsdm    # train.json of a bundle on its phantom (minutes)
    python scripts/benchmark.py --alignment             # training step of cfg_ddpm and of fad, plain and aligned
    python scripts/benchmark.py --sizes 1000 10000 100000   # data work against the number of images

Times are process times (all threads of this process and of its children) where a row does not say otherwise; on a GPU
they are seconds of the clock until its work is done. Ratios are medians over rounds in which all ways take turns. What
the rows mean and what was found: scripts/benchmark.md. Nothing here is a test: machines differ.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from benchmark_rows import jobs, joint, lsdm, quality, scale, spade
from benchmark_rows.measure import ROWS, Row, Run, cpu_seconds
from benchmark_rows.report import compare, describe_machine, load, save, table
from benchmark_rows.size import by_size

from monai_synth.errors import UserError

MODULES = (spade, lsdm, joint, quality, scale)  # importing them has put their rows into ROWS
logging.getLogger("monai_synth.precision").setLevel(logging.ERROR)  # that a processor is slow in bfloat16 is a row
JOBS = ("lidc", "xml_zip", "pairs", "first_command", "alignment", "sizes")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"only these: {', '.join(ROWS)}")
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="smaller sizes and two rounds; goals are not judged")
    level.add_argument("--gpu", action="store_true", help="larger sizes on the first GPU")
    parser.add_argument("--rounds", type=int, help="rounds in which all ways take turns (default: 5, quick: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--against", type=Path, metavar="FILE", help="an older --json; exit status 1 if slower")
    parser.add_argument("--class-model", type=Path, metavar="FOLDER", help="ckpt_dir of cfg_ddpm to sample from")
    parser.add_argument("--lidc", type=Path, help="folder with a LIDC series to import")
    parser.add_argument("--xml-zip", type=Path, help="zip of LIDC XML files to parse")
    parser.add_argument("--pairs", nargs=2, metavar=("FOLDER", "LABEL"), help="images and masks to import")
    parser.add_argument("--first-command", metavar="BUNDLE", help="train a bundle on its phantom, e.g. jdm")
    parser.add_argument("--alignment", action="store_true", help="training step with and without an expert")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="cost of data work against N images")
    parser.add_argument("--device", default="cpu", help="where the networks run (default: %(default)s)")
    return parser.parse_args(arguments)


def run_of(arguments: argparse.Namespace) -> Run:
    """The settings that all rows share.

    Raises:
        UserError: a row that is not there, no GPU, or numbers below 1.
    """
    unknown = [name for name in arguments.rows or () if name not in ROWS]
    if unknown:
        raise UserError(f"there is no row {unknown[0]!r}; --rows takes {', '.join(ROWS)}")
    for option in ("rounds", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; give a whole number from 1")
    device = "cuda" if arguments.gpu else arguments.device
    if any(num < 2 for num in arguments.sizes or ()):
        raise UserError(f"--sizes is {arguments.sizes}; give whole numbers from 2")
    if device != "cpu" and not torch.cuda.is_available():
        msg = f"--{'gpu' if arguments.gpu else f'device {device}'} needs a GPU that torch can use, and there is none"
        raise UserError(f"{msg} (torch {torch.__version__}); run without it, or install torch for your card")
    level = "quick" if arguments.quick else "gpu" if arguments.gpu else "full"
    rounds = arguments.rounds or (2 if arguments.quick else 5)
    return Run(device, rounds, level, str(arguments.class_model) if arguments.class_model else None)


def measure(run: Run, names: list[str], keep: Callable[[list[Row]], None]) -> tuple[list[Row], list[str]]:
    """All rows of these names, and the names of those that failed; ``keep`` gets what there is after each."""
    rows: list[Row] = []
    failed: list[str] = []
    for name in names:
        start = time.monotonic()
        try:
            rows += ROWS[name](run)
        except UserError:
            raise
        except Exception as error:
            traceback.print_exc()
            failed.append(name)
            rows.append(Row(name, name, skipped=f"FAILED: {type(error).__name__}: {error}"))
        keep(rows)
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return rows, failed


def run_jobs(arguments: argparse.Namespace) -> bool:
    """The measurements that need data or minutes; whether any was asked for."""
    if arguments.lidc:
        jobs.lidc_import(arguments.lidc)
    if arguments.xml_zip:
        jobs.xml_parsing(arguments.xml_zip)
    if arguments.first_command:
        jobs.first_command(arguments.first_command)
    if arguments.pairs:
        jobs.pairs_import(Path(arguments.pairs[0]), arguments.pairs[1])
    if arguments.class_model and not arguments.rows:
        jobs.class_sampling(arguments.class_model, device=arguments.device)
    if arguments.alignment:
        for bundle in ("cfg_ddpm", "fad"):
            for preset in ("demo", "paper"):
                for backbone in ("resnet18", "resnet50"):
                    jobs.alignment(bundle, preset, backbone, device=arguments.device)
    if arguments.sizes:
        by_size(arguments.sizes)
    return any(getattr(arguments, job) for job in (*JOBS, "class_model"))


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and tell by the exit status whether all went well and nothing became slower."""
    options = parse(arguments)
    run = run_of(options)
    old = load(options.against) if options.against else None
    torch.set_num_threads(options.threads)
    machine = describe_machine(run.device)
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s), {run.device}, Python "
          f"{machine['python']}, {versions}, {time.strftime('%Y-%m-%d')}\n")  # fmt: skip
    if run_jobs(options) and not options.rows:
        return 0
    start, cpu_start = time.monotonic(), cpu_seconds()

    def keep(rows: list[Row]) -> None:
        if options.json:
            save(options.json, rows, machine, {"level": run.level, "rounds": run.rounds, "threads": options.threads})

    rows, failed = measure(run, options.rows or list(ROWS), keep)
    print(table(rows, judged=run.level != "quick"))
    seconds, cpu = time.monotonic() - start, cpu_seconds() - cpu_start
    print(f"\n{len(rows)} rows, level {run.level}, {run.rounds} rounds: {seconds:.0f} s, {cpu:.0f} CPU s")
    changes = [] if old is None else compare(old, rows)
    if old is not None:
        print(f"\nagainst {options.against}:")
        print("\n".join(change.text for change in changes if change.verdict != "same") or "nothing changed")
    return 1 if failed or any(change.verdict == "slower" for change in changes) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

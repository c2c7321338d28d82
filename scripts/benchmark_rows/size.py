# SPDX-License-Identifier: Apache-2.0
"""Cost against the number of images: each kind of work in a process of its own, by CPU time and peak memory.

``python -m benchmark_rows.size KIND N FOLDER`` does one and answers with a line of JSON. Images are grey, 28 x 28.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmark_rows.child import child_environment, memory_mib
from monai_synth.errors import UserError

CLASSES = {"normal": 0, "pneumonia": 1}
SIDE = 28


def _case(i: int) -> str:
    return f"{tuple(CLASSES)[i % 2]}_{i:07d}"


def _opened(folder: Path) -> tuple:
    from monai_synth.export.classes import ClassFolderWriter
    from monai_synth.export.provenance import ProvenanceWriter

    head = {"name": "x", "modality": "XR", "image_channels": 1, "spatial_shape": [SIDE, SIDE], "intensity": {}}
    writer = ClassFolderWriter(folder / "made", classes=CLASSES, head=head)
    return writer, ProvenanceWriter(writer.provenance_path)


def export(num: int, folder: Path) -> None:
    """Write images and their provenance as sampling does, without a network."""
    writer, provenance = _opened(folder)
    rng = np.random.default_rng(0)
    record = {"checkpoints": {"model.pt": "a" * 64}, "sampler": "dpm++", "num_steps": 20, "precision": "float32"}
    for i in range(num):
        writer.add(_case(i), rng.integers(0, 255, (1, SIDE, SIDE), dtype=np.uint8))
        provenance.append(case_id=_case(i), seed=i, conditioning={"class": i % 2}, guidance={"scale": 3.0}, **record)
    writer.finish()


def resume(num: int, folder: Path) -> None:
    """Open what `export` wrote and ask of every image whether it is there."""
    writer, provenance = _opened(folder)
    if not all(writer.has(_case(i)) and provenance.has(_case(i)) for i in range(num)):
        sys.exit(f"some of {num} images are missing")


def prepare(num: int, folder: Path) -> None:
    """Import a MedMNIST file, in one process."""
    from monai_synth.data.classes import prepare_classes

    rng = np.random.default_rng(0)
    content = {}
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        n = round(num * share)
        content[f"{split}_images"] = rng.integers(0, 255, (n, SIDE, SIDE), dtype=np.uint8)
        content[f"{split}_labels"] = rng.integers(0, 2, (n, 1))
    np.savez(folder / "set.npz", **content)
    prepare_classes(folder / "set.npz", folder / "prepared", class_names=list(CLASSES), num_workers=1, progress=False)


def features(num: int, folder: Path) -> None:
    """Read every image of what `export` wrote in batches, as the evaluations do."""
    from monai_synth.evaluate.case_sets import read_case_set

    cases = read_case_set(folder / "made", option="--synthetic")
    total = sum(float(cases.picture(i).mean()) for i in range(len(cases)))
    if len(cases) != num or not total:
        sys.exit(f"{len(cases)} of {num} images were read")


KINDS: dict[str, Callable[[int, Path], None]] = {
    "export": export, "resume": resume, "features": features, "prepare": prepare,
}  # fmt: skip
TITLES = {
    "export": "write images and provenance",
    "resume": "open that again, ask what is done",
    "features": "read it for an evaluation",
    "prepare": "prepare classes from one file",
}


def by_size(sizes: Sequence[int]) -> None:
    """Print CPU time an image and peak memory of each kind of work for each number of images."""
    print("| work | images | CPU ms an image | wall ms an image | memory beyond the smallest, MiB |")
    print("|---|---|---|---|---|")
    found: dict[tuple[str, int], dict[str, float]] = {}
    for num in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for kind in KINDS:
                print(f"{TITLES[kind]}, {num} images", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "benchmark_rows.size", kind, str(num), folder]
                result = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
                if result.returncode:
                    raise UserError(f"{TITLES[kind]} failed with {num} images: {result.stderr.strip()[-300:]}")
                found[kind, num] = json.loads(result.stdout.splitlines()[-1])
    for kind, title in TITLES.items():
        for num in sizes:
            row = found[kind, num]
            more = row["memory"] - found[kind, sizes[0]]["memory"]
            print(f"| {title} | {num} | {1e3 * row['cpu'] / num:.2f} | {1e3 * row['wall'] / num:.2f} | {more:.0f} |")


def main() -> None:
    kind, num, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    cpu, wall = time.process_time(), time.monotonic()
    KINDS[kind](num, folder)
    answer = {
        "cpu": time.process_time() - cpu, "wall": time.monotonic() - wall, "memory": memory_mib("VmHWM"),
    }  # fmt: skip
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

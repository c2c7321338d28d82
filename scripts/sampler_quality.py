# SPDX-License-Identifier: Apache-2.0
"""What fewer steps cost: images of one trained model by several samplers, from the same noise, compared.

    python scripts/sampler_quality.py lsdm --real bundles/lsdm/data/phantom --out quality -- --num_samples 64

Samples by the bundle's own inference.json (what follows ``--`` goes there) and prints a table as Markdown:

* distance: Frechet distance of the first principal components of the pictures to real training images, in percent of
  the latter's variance, with a 95 % interval, and divided by that of the first sampler. Few images bias it upwards, all
  rows alike; two sets of real images show by how much.
* off the path: root mean square difference to the reference sampler's images of the same noise, in percent of the grey
  range. The reference stands for the solution of the differential equation, so a sampler that adds noise has none.
* CPU seconds an image, with the start of Python, on a machine that nobody else uses.

Finished samplings are kept: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA

from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet, read_case_set
from monai_synth.evaluate.distribution import frechet_result

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = 24
SIDE = 64  # pixels; larger pictures are shrunk, whose grain would be most of the variance


def sample(bundle: str, sampler: str, steps: int, out: Path, extra: list[str]) -> dict[str, float]:
    """Run the bundle's sampling into a folder of its own, unless it is finished there."""
    record = out / "measured.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    config = ROOT / "bundles" / bundle / "configs" / "inference.json"
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(config),
        "--output_dir",
        str(out / "run"),
    ]
    command += ["--sampler", sampler, "--num_steps", str(steps), "--seed", "0", *extra]
    out.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = (out / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        sys.exit(f"sampling with {sampler}, {steps} steps failed: {' '.join(last)} (see {out / 'log.txt'})")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    content = {"cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    record.write_text(json.dumps(content), encoding="utf-8")
    return content


def written(out: Path) -> CaseSet:
    """The samples of one run: the folder itself, or the nnU-Net dataset in it."""
    inside = sorted((out / "run").glob("Dataset*"))
    return read_case_set(inside[0] if inside else out / "run", option="--out")


def pictures(cases: CaseSet, size: tuple[int, int]) -> np.ndarray:
    """(N, P) grey values 0 to 1 of all pictures at one size, in the order of the case ids."""
    order = np.argsort([case.case_id for case in cases.cases])
    return np.stack([cases.picture(int(i), size if cases.size != size else None).ravel() / 255 for i in order])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", choices=("lsdm", "jdm", "cfg_ddpm", "fad"))
    parser.add_argument("--real", type=Path, required=True, metavar="DIR", help="prepared dataset of the training")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the samples")
    parser.add_argument(
        "--samplers",
        default="ddpm:1000,ddim:50,unipc:20,dpm++:10,dpm++:15,dpm++:20,dpm++:200",
        help="NAME:STEPS,...; the first is compared with, the last is the reference of the path (default: %(default)s)",
    )
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    args, extra = parser.parse_args(given[:cut]), given[cut + 1 :]
    arms = [(name, int(steps)) for name, _, steps in (arm.partition(":") for arm in args.samplers.split(","))]
    try:
        real = read_case_set(args.real, option="--real", split="training", max_cases=2000)
        unseen = read_case_set(args.real, option="--real", split="test")
        made: dict[tuple[str, int], tuple[CaseSet, float]] = {}
        for name, steps in arms:
            print(f"{name}, {steps} steps", file=sys.stderr, flush=True)
            measured = sample(args.bundle, name, steps, args.out / f"{name}_{steps}", extra)
            made[name, steps] = (written(args.out / f"{name}_{steps}"), measured["cpu_s"])
        height, width = made[arms[0]][0].size
        size = (min(height, SIDE), min(width, SIDE))
        train, test = pictures(real, size), pictures(unseen, size)
        drawn = {arm: pictures(cases, size) for arm, (cases, _) in made.items()}
    except UserError as error:
        sys.exit(f"sampler_quality: error: {error}")

    pca = PCA(min(COMPONENTS, len(train) - 1, train.shape[1]), random_state=0).fit(train)
    variance = pca.explained_variance_.sum()

    def distance(x: np.ndarray) -> tuple[float, str]:
        found = frechet_result(pca.transform(x), pca.transform(train))
        value, ci = 100 * found["value"] / variance, found["ci"]
        interval = f" [{100 * ci[0] / variance:.2f}, {100 * ci[1] / variance:.2f}]" if ci else ""
        return value, f"{value:.2f}{interval}"

    reference = drawn[arms[-1]]
    first = distance(drawn[arms[0]])[0]
    share = 100 * pca.explained_variance_ratio_.sum()
    print(f"n = {len(reference)} images, {len(train)} real training and {len(test)} real test images,")
    print(f"{pca.n_components_} components ({share:.0f} % of the variance)\n")
    print(f"| sampler | calls | distance, % | to {arms[0][0]} {arms[0][1]} | off the path, % | CPU s an image |")
    print("|---|---|---|---|---|---|")
    print(f"| real test images | | {distance(test)[1]} | | | |")
    for (name, steps), x in drawn.items():
        value, text = distance(x)
        path = (
            "" if name == "ddpm" or (name, steps) == arms[-1] else f"{100 * np.sqrt(np.mean((x - reference) ** 2)):.2f}"
        )
        print(f"| {name} | {steps} | {text} | {value / first:.2f} | {path} | {made[name, steps][1] / len(x):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

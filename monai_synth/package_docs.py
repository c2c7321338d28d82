# SPDX-License-Identifier: Apache-2.0
"""The page of a packaged bundle: the bundle's own, with the headings of the zoo and commands for the unpacked zip."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

SAMPLED = ("diffusion", "generator")  # stages whose file may be models/model.pt

_ELSEWHERE = re.compile(r"\[([^\]]+)\]\(\.\./\.\./[^)]*\)")

_STEPS = """## Additional Usage Steps
{needs}Unpack the zip in an empty folder and stay there:
```
{commands}
```
Images to train on, and maps to sample for, come from `--dataset_dir`; without it a phantom is computed, which takes a
minute. A training writes to `{name}/models/<name of the dataset's folder>/` (`phantom` for the phantom) and leaves the
weights of the bundle as they are. Sampling takes the weights of the bundle, not the last training's; for those of a
training give `--ckpt_dir` with that folder. In Python, the network with its weights is
```
monai.bundle.load("{name}", bundle_dir=".", workflow_type="inference", key_in_ckpt="state_dict")
```
Commands that begin with `monai-synth` or `python scripts/` prepare data and judge results; they belong to
monai_synth {own} and are not in here. Links of this page to other bundles are left out.

### Trained files
| file in `models/` | holds | used by | SHA-256 |
|---|---|---|---|
{files}
"""

_SYSTEM = """## System Configuration
Made and checked with MONAI {monai}, PyTorch {torch}, NumPy {numpy}; {others}. It runs on a CPU or on a GPU of CUDA.
Input of the network {input}, output {output}.
"""

_TRAININGS = ("train_expert.json", "train.json")  # in this order, where they are


def packaged_readme(
    text: str,
    name: str,
    meta: Mapping[str, Any],
    trained: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str],
    *,
    configs: Collection[str],
    depend: bool,
) -> str:
    """Page of a packaged bundle.

    Args:
        text: the bundle's own page.
        name: the bundle's name.
        meta: the packaged metadata.
        trained: contents of the trained files by name.
        hashes: SHA-256 of these files by name.
        configs: names of the configs.
        depend: the code is a dependency and not in the bundle.
    """
    from monai_synth import __version__

    text = _ELSEWHERE.sub(r"\1", text).replace(f"bundles/{name}/", f"{name}/")
    needs = f"Needs `pip install monai_synth=={__version__}`. " if depend else ""
    run = [f"run training --config_file {name}/configs/{config}" for config in _TRAININGS if config in configs]
    run += [f"run --config_file {name}/configs/inference.json"]
    spec = meta["network_data_format"]
    shapes = [
        " x ".join(str(n) for n in (s["num_channels"], *s["spatial_shape"]))
        for s in (spec["inputs"]["image"], spec["outputs"]["pred"])
    ]
    steps = _STEPS.format(
        needs=needs, name=name, own=__version__, commands="\n".join(f"python -m monai.bundle {line}" for line in run),
        files="\n".join(_file_row(file, trained[file], hashes[file]) for file in sorted(trained)),
    )  # fmt: skip
    system = _SYSTEM.format(
        monai=meta["monai_version"], torch=meta["pytorch_version"], numpy=meta["numpy_version"],
        others=", ".join(f"{n} {v}" for n, v in meta["required_packages_version"].items()),
        input=shapes[0], output=shapes[1],
    )  # fmt: skip
    added = f"{steps}\n{system}"
    before, mark, after = text.partition("\n## Limitations\n")
    return f"{before}\n{added}{mark}{after}" if mark else f"{text.rstrip()}\n\n{added}"


def _file_row(file: str, content: Mapping[str, Any], digest: str) -> str:
    stage, contract = content["stage"], content["contract"]
    holds = "rectified flow" if stage == "diffusion" and "flow" in contract["schedule"] else stage.replace("_", " ")
    if "feature" in contract:
        holds += f" of {contract['feature']}"
    if stage not in SAMPLED:
        used = "sampling or training, with the others"
    else:
        used = "sampling" if file == "model.pt" else f"sampling with `--model_file {file}`"
    return f"| `{file}` | {holds} | {used} | `{digest}` |"

# SPDX-License-Identifier: Apache-2.0
"""The page of a packaged bundle: the bundle's own, with the headings of the zoo and commands for the unpacked zip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ELSEWHERE = re.compile(r"\[([^\]]+)\]\(\.\./\.\./[^)]*\)")

_STEPS = """## Additional Usage Steps
{needs}Unpack the zip in an empty folder and stay there:
```
python -m monai.bundle run training --config_file {name}/configs/train.json
python -m monai.bundle run --config_file {name}/configs/inference.json
```
Sampling takes the weights of the bundle, or those of the last training in it. Where it needs maps of a dataset, give
`--dataset_dir`, or train first, which makes the built-in phantom. In Python, the network with its weights is
```
monai.bundle.load("{name}", bundle_dir=".", workflow_type="inference", key_in_ckpt="state_dict")
```
Commands that begin with `monai-synth` or `python scripts/` prepare data and judge results; they belong to
monai_synth {own} and are not in here. Links of this page to other bundles are left out.
"""

_SYSTEM = """## System Configuration
Made and checked with MONAI {monai}, PyTorch {torch}, NumPy {numpy}; {others}. It runs on a CPU or on a GPU of CUDA.
Input of the network {input}, output {output}.
"""


def packaged_readme(text: str, name: str, meta: Mapping[str, Any], *, depend: bool) -> str:
    """Page of a packaged bundle.

    Args:
        text: the bundle's own page.
        name: the bundle's name.
        meta: the packaged metadata.
        depend: the code is a dependency and not in the bundle.
    """
    from monai_synth import __version__

    text = _ELSEWHERE.sub(r"\1", text).replace(f"bundles/{name}/", f"{name}/")
    needs = f"Needs `pip install monai_synth=={__version__}`. " if depend else ""
    spec = meta["network_data_format"]
    shapes = [
        " x ".join(str(n) for n in (s["num_channels"], *s["spatial_shape"]))
        for s in (spec["inputs"]["image"], spec["outputs"]["pred"])
    ]
    added = _STEPS.format(needs=needs, name=name, own=__version__) + "\n" + _SYSTEM.format(
        monai=meta["monai_version"], torch=meta["pytorch_version"], numpy=meta["numpy_version"],
        others=", ".join(f"{n} {v}" for n, v in meta["required_packages_version"].items()),
        input=shapes[0], output=shapes[1],
    )  # fmt: skip
    before, mark, after = text.partition("\n## Limitations\n")
    return f"{before}\n{added}{mark}{after}" if mark else f"{text.rstrip()}\n\n{added}"

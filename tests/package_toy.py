# SPDX-License-Identifier: Apache-2.0
"""What tests of packaging share: where the package lies, and a network that is built in no time."""

from __future__ import annotations

from pathlib import Path

import monai_synth

ROOT = Path(monai_synth.__file__).parent
CLASS_UNET = {
    "target": "monai_synth.networks.ClassUNet",
    "args": {
        "spatial_dims": 2, "image_channels": 1, "num_classes": 2, "image_size": [8, 8], "base_channels": 8,
        "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [], "num_heads": 2,
    },
}  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Untrained models of all bundles that the studio shows, in folders as trainings leave them."""

from __future__ import annotations

from pathlib import Path

import lsdm_toy

from monai_synth.studio.places import Place, find_places

SCHEDULE = {
    "num_train_timesteps": 50, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.1,
    "prediction_type": "epsilon",
}  # fmt: skip
SHARED = {"image_channels": 1, "image_size": [32, 32], "schedule": SCHEDULE, "dataset": {"name": "toy"}}
SMALL = {
    "spatial_dims": 2, "image_channels": 1, "image_size": [32, 32], "base_channels": 8, "channel_mult": [1],
    "num_res_blocks": 1, "attention_resolutions": [],
}  # fmt: skip


def write_models(root: Path, tiny_dataset: Path) -> None:
    """Files of all bundles: ``models`` (lsdm), ``spade``, ``jdm``, ``cfg_ddpm`` and ``fad``."""
    lsdm_toy.write_all(root, tiny_dataset)
    contract = SHARED | {
        "bundle": "jdm", "channel_names": ["L"], "labels": {"background": 0, "nucleus": 1}, "value_range": [0, 1],
        "intensity": {}, "file_ending": ".png", "spacing": [1.0, 1.0], "learned_variance": True, "num_real": 5,
    }  # fmt: skip
    args = SMALL | {"label_channels": 1, "learned_variance": True, "norm_num_groups": 4}
    arch = {"target": "monai_synth.networks.JointUNet", "args": args}
    lsdm_toy.write_file(root / "jdm" / "model.pt", "diffusion", arch, contract, 30, spread=0.05)
    for number, name in enumerate(("cfg_ddpm", "fad")):
        contract = SHARED | {
            "bundle": name, "classes": {"left": 0, "right": 1}, "modality": "toy", "intensity": {},
            "value_range": [-1, 1], "prompts": ["a left spot", "a right spot"],
        }  # fmt: skip
        arch = {"target": "monai_synth.networks.ClassUNet", "args": SMALL | {"num_classes": 2}}
        lsdm_toy.write_file(root / name / "model.pt", "diffusion", arch, contract, 40 + number, spread=0.05)


def places(root: Path, tiny_dataset: Path) -> dict[str, Place]:
    """All of them, as the command finds them."""
    folders = {"lsdm": "models", "spade_gan": "spade", "jdm": "jdm", "cfg_ddpm": "cfg_ddpm", "fad": "fad"}
    return find_places(
        root / "nothing",
        ckpt_dirs={name: str(root / folder) for name, folder in folders.items()},
        dataset_dirs={"lsdm": str(tiny_dataset), "spade_gan": str(tiny_dataset)},
    )

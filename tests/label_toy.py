# SPDX-License-Identifier: Apache-2.0
"""Untrained files of the bundles that MONAI Label serves, small enough for tests, and maps and masks for them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from lsdm_toy import write_all, write_file
from PIL import Image

AFFINE = np.array([[-0.7, 0, 0, 120], [0, -0.8, 0, 90], [0, 0, 2.5, -310], [0, 0, 0, 1.0]])
SCHEDULE = {
    "num_train_timesteps": 20, "beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.3,
    "prediction_type": "epsilon",
}  # fmt: skip


def write_models(folder: Path, dataset: Path) -> dict[str, str]:
    """Folders of trained files of lsdm, spade_gan and jdm, by name."""
    write_all(folder, dataset)
    args = {
        "spatial_dims": 2, "image_channels": 1, "label_channels": 1, "image_size": [32, 32], "base_channels": 8,
        "channel_mult": [1, 1], "num_res_blocks": 1, "attention_resolutions": [], "num_heads": 2,
        "norm_num_groups": 4, "learned_variance": False,
    }  # fmt: skip
    contract = {
        "bundle": "jdm", "image_size": [32, 32], "image_channels": 1, "channel_names": ["grey"],
        "labels": {"background": 0, "nucleus": 1}, "value_range": [-1, 1], "intensity": {"min": 0, "max": 255},
        "file_ending": ".png", "spacing": [1.0, 1.0], "schedule": SCHEDULE, "learned_variance": False, "num_real": 4,
        "patches": {"random": False, "scale": 1.0, "flips": False}, "dataset": {"name": "toy", "fingerprint": "0"},
    }  # fmt: skip
    arch = {"target": "monai_synth.networks.JointUNet", "args": args}
    write_file(folder / "jdm" / "model.pt", "diffusion", arch, contract, 30, spread=0.05)
    return {"lsdm": str(folder / "models"), "spade_gan": str(folder / "spade"), "jdm": str(folder / "jdm")}


def semantic(dataset: Path) -> np.ndarray:
    """A semantic map (64, 64) with a nodule."""
    return np.asarray(Image.open(min((dataset / "labels").iterdir())))


def as_nifti(label: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> Path:
    """Pictures (rows, columns) as a slice (X, Y, 1)."""
    image = nib.Nifti1Image(np.ascontiguousarray(label.T[:, :, None]), affine)
    image.set_sform(affine, 1)
    nib.save(image, path)
    return path


def mask(number: int) -> np.ndarray:
    """A mask (32, 32) of a disc, 0 and 1."""
    rows, cols = np.mgrid[:32, :32]
    return ((rows - 12 - number) ** 2 + (cols - 16) ** 2 < 40).astype(np.uint8)

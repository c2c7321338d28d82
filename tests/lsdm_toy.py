# SPDX-License-Identifier: Apache-2.0
"""Untrained files of bundles lsdm and spade_gan for the tiny dataset, small enough for tests, and settings for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from monai_synth.checkpoint import build_network, save_atomic, sha256_of, trained_file
from monai_synth.data.datalist import read_dataset
from monai_synth.experiments.lsdm import Settings

SIZE = [64, 64]
SCHEDULE = {
    "num_train_timesteps": 50, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.1,
    "prediction_type": "epsilon",
}  # fmt: skip
AUTOENCODER = {
    "target": "monai.networks.nets.AutoencoderKL",
    "args": {
        "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [8, 8, 8], "num_res_blocks": [1, 1, 1],
        "attention_levels": [False, False, False], "latent_channels": 3, "norm_num_groups": 4,
        "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
    },
}  # fmt: skip
FEATURES = ("malignancy", "lobulation", "spiculation", "texture")


def write_file(path: Path, stage: str, arch: dict, contract: dict, seed: int, *, spread: float = 0.0) -> None:
    """A trained file with random weights; ``spread`` adds noise where networks begin with zeros."""
    torch.manual_seed(seed)
    network: nn.Module = build_network(arch)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += spread * torch.randn_like(parameter)
    save_atomic(trained_file(stage, network, arch, contract), path)


def write_all(folder: Path, dataset_dir: Path) -> None:
    """``models`` with autoencoder, model.pt, model_ldm.pt and four classifiers, and ``spade/model.pt``."""
    dataset = read_dataset(dataset_dir)
    data = {"name": dataset.name, "fingerprint": dataset.fingerprint}
    shared = {"bundle": "lsdm", "image_size": SIZE, "factor": 4, "dataset": data}
    models = folder / "models"
    contract = {**shared, "image_channels": 1, "value_range": [-1, 1], "num_labels": 8, "latent_channels": 3}
    write_file(models / "autoencoder.pt", "autoencoder", AUTOENCODER, contract, 0, spread=0.05)
    contract = {
        **shared, "value_range": [-1, 1], "intensity": dataset.content["intensity"], "labels": dataset.labels,
        "latent_channels": 3, "semantic_downsample": "max_onehot", "collapse_nodule_labels": False,
        "schedule": SCHEDULE, "scale_factor": 0.8, "autoencoder_sha256": sha256_of(models / "autoencoder.pt"),
    }  # fmt: skip
    for number, (name, spade_in) in enumerate((("model", ["down", "middle", "up"]), ("model_ldm", []))):
        args = {
            "spatial_dims": 2, "in_channels": 6, "out_channels": 3, "label_nc": 8, "channels": [8, 8],
            "num_res_blocks": 1, "attention_levels": [False, False], "num_head_channels": 8, "norm_num_groups": 4,
            "spade_in": spade_in, "spade_hidden_channels": 4, "semantic_downsample": "max_onehot",
        }  # fmt: skip
        arch = {"target": "monai_synth.networks.SPADEUNet", "args": args}
        write_file(models / f"{name}.pt", "diffusion", arch, contract, 1 + number, spread=0.02)
    keys = ("bundle", "image_size", "factor", "schedule", "scale_factor", "autoencoder_sha256", "dataset")
    for number, feature in enumerate(FEATURES):
        args = {
            "spatial_dims": 2, "in_channels": 1, "out_channels": 2 if feature == "malignancy" else 1,
            "channels": [8, 8], "num_res_blocks": 1, "attention_levels": [False, False], "num_head_channels": 8,
            "norm_num_groups": 4, "output_bias": 0.0 if feature == "malignancy" else 3.0,
        }  # fmt: skip
        arch = {"target": "monai_synth.networks.NoisyClassifier", "args": args}
        own = {key: contract[key] for key in keys} | {"num_labels": 8, "feature": feature, "crop_size_latent": 8}
        write_file(models / f"classifier_{feature}.pt", "classifier", arch, own, 10 + number, spread=0.1)
    gan = {
        "bundle": "spade_gan", "image_size": SIZE, "value_range": [-1, 1], "intensity": dataset.content["intensity"],
        "labels": dataset.labels, "collapse_nodule_labels": False, "dataset": data,
    }  # fmt: skip
    args = {
        "spatial_dims": 2, "label_nc": 8, "out_channels": 1, "image_size": SIZE, "channels": [4, 6, 8],
        "last_channels": [4, 5], "spade_hidden_channels": 4, "z_dim": 0,
    }  # fmt: skip
    arch = {"target": "monai_synth.networks.SPADEGenerator", "args": args}
    write_file(folder / "spade" / "model.pt", "generator", arch, gan, 20)


def settings(folder: Path, dataset: Path, out: Path, **given) -> Settings:
    """All three models, small numbers."""
    values = {
        "dataset": str(dataset),
        "models": [
            ("spade", str(folder / "spade")),
            ("ldm", str(folder / "models" / "model_ldm.pt")),
            ("lsdm", str(folder / "models")),
        ],
        "out": str(out), "seeds": 2, "crop": 24, "num_steps": 3, "sampler": "ddim", "sweep_cases": 1,
        "sweep_scales": (1.0, 8.0), "gradient_cases": 2, "gradient_times": (0.1, 0.6), "batch_size": 3, "device": "cpu",
    }  # fmt: skip
    return Settings(**{**values, **given})

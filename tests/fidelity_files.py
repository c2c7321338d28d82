# SPDX-License-Identifier: Apache-2.0
"""Weights files for the tests of feature extractors and of fidelity."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from monai_synth.checkpoint import save_atomic, trained_file
from monai_synth.evaluate import features as door
from monai_synth.networks import ImageClassifier


def write_classifier(path: Path, *, channels: int = 1, size: int = 28, stage: str = "image_classifier") -> Path:
    torch.manual_seed(0)
    args = {"backbone": "resnet18", "num_classes": 2, "image_channels": channels, "mean": [0.5], "std": [0.2]}
    contract = {
        "classes": {"a": 0, "b": 1}, "image_channels": channels, "image_size": [size, size], "value_range": [0, 1],
        "trained_on": "real images", "initial_weights": "random", "fingerprints": {"real": "f" * 64},
    }  # fmt: skip
    arch = {"target": "monai_synth.networks.ImageClassifier", "args": args}
    save_atomic(trained_file(stage, ImageClassifier(**args), arch, contract), path)
    return path


class FakeInception(nn.Module):
    """What StyleGAN's TorchScript takes and gives."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        x = nn.functional.adaptive_avg_pool2d(images.to(torch.float32), (32, 64))
        return x.mean(dim=1).flatten(1)


def publish(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(door.PUBLISHED_INCEPTION, digest, "a test")

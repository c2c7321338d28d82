# SPDX-License-Identifier: Apache-2.0
"""Small models, experts and images of three classes for the expert experiment: a bright spot left, right, or none."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from classifier_toy import SIZE, toy_image, write_dataset
from monai.networks.nets import resnet

from monai_synth.checkpoint import save_atomic, sha256_of, trained_file
from monai_synth.data.datalist import read_dataset
from monai_synth.experiments.expert import Settings
from monai_synth.networks import ClassUNet, ImageClassifier, image_classifier

CLASSES = {"01_LEFT": 0, "02_RIGHT": 1, "03_EMPTY": 2}
SCHEDULE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}


def narrow_resnet(patch):
    """A narrow ResNet under the usual name."""
    build = functools.partial(
        resnet.ResNet, "basic", [1, 1, 1, 1], [4, 4, 8, 8], spatial_dims=2, num_classes=1, conv1_t_stride=2
    )
    usual = image_classifier.BACKBONES["resnet18"]
    patch.setitem(image_classifier.BACKBONES, "resnet18", replace(usual, build=build))


def write_model(path, dataset, *, seed=0, size=SIZE, **contract):
    torch.manual_seed(seed)
    arguments = {"spatial_dims": 2, "image_channels": 1, "num_classes": len(dataset.classes), "image_size": list(size)}
    arguments |= {"base_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": []}
    network = ClassUNet(**arguments)
    for parameter in network.parameters():  # a fresh one predicts 0 for every class
        torch.nn.init.normal_(parameter, std=0.1)
    terms = {
        "bundle": "fad",
        "classes": dataset.classes,
        "image_channels": 1,
        "image_size": list(size),
        "value_range": [-1, 1],
        "schedule": SCHEDULE,
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
    }
    arch = {"target": "monai_synth.networks.ClassUNet", "args": arguments}
    save_atomic(trained_file("diffusion", network, arch, {**terms, **contract}), path)
    return path


def write_expert(path, dataset, *, seed=0, size=(24, 24), channels=1, **contract):
    classes = contract.pop("classes", dataset.classes)
    terms = {"value_range": [0, 1], "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint}}
    return write_classifier(path, classes, seed=seed, size=size, channels=channels, **(terms | contract))


def write_classifier(path, classes, *, seed=0, size=(16, 16), channels=1, **contract):
    torch.manual_seed(seed)
    arguments = {"backbone": "resnet18", "num_classes": len(classes), "image_channels": channels}
    terms = {"classes": classes, "image_channels": channels, "image_size": list(size), "val_accuracy": 0.75}
    arch = {"target": "monai_synth.networks.ImageClassifier", "args": arguments}
    save_atomic(trained_file("image_classifier", ImageClassifier(**arguments), arch, {**terms, **contract}), path)
    return path


def write_all(folder):
    """Dataset ``real``, experts e1 and e2, models base, base_b, aligned (by e1) and aligned_b."""
    splits = {"training": (6, 7, 5), "validation": (1, 1, 1), "test": (4, 5, 3)}
    dataset = read_dataset(write_dataset(folder / "real", splits, classes=tuple(CLASSES)))
    for name, seed in (("e1", 1), ("e2", 2)):
        write_expert(folder / f"{name}.pt", dataset, seed=seed)
    for name, seed in (("base", 3), ("base_b", 4)):
        write_model(folder / f"{name}.pt", dataset, seed=seed)
    alignment = {"expert_sha256": sha256_of(folder / "e1.pt"), "on": "noisy"}
    for name, seed in (("aligned", 5), ("aligned_b", 6)):
        write_model(folder / f"{name}.pt", dataset, seed=seed, alignment=alignment)
    return dataset


def models(folder, **arms):
    """``arm="file"`` or ``arm="file,file"``, of ``folder``."""
    return [(arm, [str(folder / f"{name}.pt") for name in names.split(",")]) for arm, names in arms.items()]


def settings(folder, out="out", **given):
    values = {
        "expert": str(folder / "e1.pt"),
        "real": str(folder / "real"),
        "models": models(folder, base="base", aligned="aligned"),
        "out": str(folder / out),
        "seeds": 2,
        "per_class": 3,
        "num_steps": 2,
        "num_bootstrap": 50,
        "device": "cpu",
    }
    return Settings(**{**values, **given})


def plant(patch, wrong):
    """Samplers and experts with known answers.

    Args:
        patch: pytest's monkeypatch.
        wrong: (folder of the arm, seed, class, index) -> class that the image shows instead, or None.
    """
    from monai_synth.experiments import expert_sampling, expert_scores

    def draw(self, numbers, seeds):
        images = []
        for number, seed in zip(numbers, seeds, strict=True):
            seed, index = divmod(int(seed), expert_sampling.SEED_STEP)
            shown = wrong(self.name.split()[0], seed, int(number), index % expert_sampling.CLASS_STEP)
            images.append(toy_image(np.random.default_rng(seed), int(number) if shown is None else shown))
        return np.stack(images)

    def look(network, images, size, device="cpu"):
        halves = np.split(images.astype(np.float32).mean((1, 2)), 2, axis=1)
        return np.stack([halves[0].mean(1), halves[1].mean(1), np.full(len(images), 40.0)], axis=1)

    patch.setattr(expert_sampling._Draw, "_sample", draw)
    patch.setattr(expert_scores, "classify", look)

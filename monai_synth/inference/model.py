# SPDX-License-Identifier: Apache-2.0
"""The trained files of a bundle together, checked against each other before anything is sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from monai_synth.checkpoint import classifier_file, load_file, require_agreement, restore_network, sha256_of
from monai_synth.errors import UserError
from monai_synth.networks.latent_codec import LatentCodec
from monai_synth.networks.noisy_classifier import FeatureHead, feature_columns
from monai_synth.precision import check_compile, for_sampling, sampling_precision

logger = logging.getLogger(__name__)


@dataclass
class LSDMModel:
    """Diffusion network, autoencoder and classifiers of one training.

    Attributes:
        network: the denoiser.
        codec: autoencoder with the scale factor.
        contract: what the denoiser was trained with.
        classifiers: noisy classifier per feature.
        crop_size_latent: side of the classifiers' crop; 0 without classifiers.
        checkpoints: file name -> SHA-256, for the provenance.
        precision: what the denoiser computes in, see ``monai_synth.precision``; all others compute in float32.
    """

    network: nn.Module
    codec: LatentCodec
    contract: dict[str, Any]
    classifiers: dict[str, nn.Module] = field(default_factory=dict)
    crop_size_latent: int = 0
    checkpoints: dict[str, str] = field(default_factory=dict)
    precision: str = "float32"


def load_lsdm(
    ckpt_dir: str | Path,
    *,
    model_file: str = "model.pt",
    features: Sequence[str] = (),
    shared_classifier: bool = False,
    device: str = "cpu",
    precision: str = "float32",
    compile: bool = False,
) -> LSDMModel:
    """Load and cross-check the trained files of a folder.

    Args:
        ckpt_dir: folder with ``autoencoder.pt``, the model and ``classifier_<feature>.pt``, or of a
            rectified flow ``classifier_<feature>_rflow.pt``.
        model_file: name of the diffusion model's file.
        features: features to guide; their classifiers must be there.
        shared_classifier: take the one of all features, ``classifier_all.pt``, instead of one for each.
        device: where to sample.
        precision: of the denoiser, see :func:`monai_synth.precision.for_sampling`.
        compile: see there.

    Raises:
        UserError: an unknown precision; or a file is missing, damaged, of another architecture, or trained with another
            autoencoder, scale factor, schedule or size; the message names both values.
    """
    _check(precision, compile, device)
    folder = Path(ckpt_dir)
    path = folder / model_file
    model = _of_bundle("lsdm", path)
    contract = model["contract"]
    autoencoder_path = folder / "autoencoder.pt"
    autoencoder = load_file(autoencoder_path, stage="autoencoder")
    checkpoints = {model_file: sha256_of(path), "autoencoder.pt": sha256_of(autoencoder_path)}
    remedy = f"Use the files of one training, or train {path.name} again."
    expected = {"autoencoder_sha256": contract["autoencoder_sha256"], "image_size": contract["image_size"]}
    found = {
        "autoencoder_sha256": checkpoints["autoencoder.pt"],
        "image_size": autoencoder["contract"]["image_size"],
    }
    require_agreement(found, expected, f"{autoencoder_path} with {path}", remedy)
    codec = LatentCodec(
        restore_network(autoencoder, autoencoder_path),
        image_channels=autoencoder["contract"]["image_channels"],
        factor=contract["factor"],
        num_labels=len(contract["labels"]),
        scale_factor=contract["scale_factor"],
    )
    network, used = for_sampling(restore_network(model, path), precision=precision, device=device, compile=compile)
    loaded = LSDMModel(network, codec.to(device), contract, checkpoints=checkpoints, precision=used)
    shared = ("autoencoder_sha256", "scale_factor", "schedule", "image_size", "factor")
    files: dict[str, nn.Module] = {}
    for feature in features:
        told = "all" if shared_classifier else feature
        name = classifier_file(told, contract["schedule"])
        if not (folder / name).is_file():
            config = (
                "['train_classifier.json','rflow.json']" if "flow" in contract["schedule"] else "train_classifier.json"
            )
            others = "--shared_classifier False" if shared_classifier else "drop it from --features"
            msg = (
                f"guidance asks for {feature}, but {folder / name} is not there; train it "
                f"({config} --feature {told}), or {others}, or give --guidance_scale 0"
            )
            raise UserError(msg)
        content = load_file(folder / name, stage="classifier")
        theirs = {key: content["contract"].get(key) for key in shared}
        require_agreement(theirs, {key: contract[key] for key in shared}, f"{folder / name} with {path}", remedy)
        columns = feature_columns(content["contract"].get("features", [feature]))
        if feature not in columns:
            raise UserError(f"{folder / name} tells {', '.join(columns)}, not {feature}; drop it from --features")
        report = content.get("report", {})
        report = report.get("features", {feature: report})[feature]
        if report.get("converged") is False:
            logger.warning(
                f"the classifier of {feature} did not converge (validation loss {report['val_loss']:.3f}, "
                f"best constant {report['constant_loss']:.3f}, n {report['n']}): its guidance "
                "moves pixels, but not towards the feature"
            )
        if name not in files:
            files[name] = restore_network(content, folder / name).to(device)
            checkpoints[name] = sha256_of(folder / name)
        loaded.classifiers[feature] = FeatureHead(files[name], columns[feature]) if shared_classifier else files[name]
        loaded.crop_size_latent = content["contract"]["crop_size_latent"]
    return loaded


@dataclass
class OneFileModel:
    """A model that is one trained file.

    Attributes:
        network: the denoiser, or a generator.
        contract: what it was trained with.
        checkpoints: file name -> SHA-256, for the provenance.
        precision: what the network computes in, see ``monai_synth.precision``.
    """

    network: nn.Module
    contract: dict[str, Any]
    checkpoints: dict[str, str]
    precision: str = "float32"


def load_model(
    bundle: str,
    ckpt_dir: str | Path,
    *,
    model_file: str = "model.pt",
    device: str = "cpu",
    stage: str = "diffusion",
    precision: str = "float32",
    compile: bool = False,
) -> OneFileModel:
    """Load the model of a bundle whose model is one file.

    Args:
        bundle: name of the bundle, e.g. "jdm" or "cfg_ddpm".
        ckpt_dir: folder with the model.
        model_file: name of its file.
        device: where to sample.
        stage: what the file holds, "diffusion" or "generator".
        precision: see :func:`monai_synth.precision.for_sampling`.
        compile: see there.

    Raises:
        UserError: an unknown precision; or the file is missing, damaged or of another bundle or stage.
    """
    _check(precision, compile, device)
    path = Path(ckpt_dir) / model_file
    content = _of_bundle(bundle, path, stage)
    network, used = for_sampling(restore_network(content, path), precision=precision, device=device, compile=compile)
    return OneFileModel(network, content["contract"], {model_file: sha256_of(path)}, used)


def _check(precision: str, compile: bool, device: str) -> None:
    """Refuse wrong settings before files are read."""
    sampling_precision(precision, device)
    check_compile(compile)


def _of_bundle(bundle: str, path: Path, stage: str = "diffusion") -> dict[str, Any]:
    content = load_file(path, stage=stage)
    there = content["contract"].get("bundle")
    if there != bundle:
        raise UserError(f"{path} was trained by the bundle {there!r}, this is {bundle!r}; give the right --ckpt_dir")
    return content

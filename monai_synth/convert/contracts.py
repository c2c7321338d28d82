# SPDX-License-Identifier: Apache-2.0
"""What a converted file must say so that a bundle takes it: the contract, made from a prepared dataset.

The task of the dataset decides the bundle: ``lidc`` lsdm, ``classes`` cfg_ddpm, ``pairs`` jdm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_synth.checkpoint import load_file, sha256_of
from monai_synth.convert.source import NetworkText
from monai_synth.data.class_images import class_counts
from monai_synth.data.datalist import PreparedDataset
from monai_synth.data.joint import check_value_range
from monai_synth.errors import UserError
from monai_synth.training.pairs import num_real, pair_spacing

BUNDLES = {"lidc": "lsdm", "classes": "cfg_ddpm", "pairs": "jdm"}


def autoencoder_contract(
    text: NetworkText, dataset: PreparedDataset, *, image_size: Sequence[int] | None, value_range: Sequence[float]
) -> dict[str, Any]:
    """Contract of ``autoencoder.pt`` of the bundle lsdm.

    Raises:
        UserError: the network or its values do not fit the dataset or the bundle.
    """
    args = text.args
    _require_bundle(dataset, "lsdm", text)
    _require(args["spatial_dims"] == 2, f"spatial_dims is {args['spatial_dims']}, the bundle lsdm is made for 2")
    same = args["in_channels"] == args["out_channels"] and args["in_channels"] in (1, 3)
    channels = (args["in_channels"], args["out_channels"])
    _require(same, f"in_channels and out_channels are {channels}, the bundle lsdm takes 1 and 1, or 3 and 3")
    factor = 2 ** (len(args["channels"]) - 1)
    size = _size(dataset, image_size, 2)
    _require(all(s % factor == 0 for s in size), f"the image size {size} is no multiple of {factor}; give --image-size")
    return {
        "bundle": "lsdm",
        "image_size": size,
        "image_channels": args["in_channels"],
        "value_range": _pm1(value_range, "lsdm"),
        "intensity": dataset.content["intensity"],
        "num_labels": len(dataset.labels),
        "factor": factor,
        "latent_channels": args["latent_channels"],
        "dataset": _named(dataset),
    }


def lsdm_contract(
    text: NetworkText,
    dataset: PreparedDataset,
    *,
    schedule: Mapping[str, Any],
    autoencoder: Path,
    scale_factor: float | None,
) -> tuple[dict[str, Any], int]:
    """Contract of ``model.pt`` of the bundle lsdm, and by how many channels the network's input must be widened.

    The bundle gives the noisy latent and the encoded map, concatenated; a network that was trained on the latent
    alone is widened, and does not read the map there.

    Raises:
        UserError: the network does not fit the autoencoder, the dataset or the bundle.
    """
    args = text.args
    if not autoencoder.is_file():
        msg = f"a network of the bundle lsdm is used with {autoencoder}, which is not there"
        raise UserError(f"{msg}; convert the autoencoder first, --out {autoencoder}")
    coder = load_file(autoencoder, stage="autoencoder", option="--out")["contract"]
    c = coder["latent_channels"]
    _require(args["spatial_dims"] == 2, f"spatial_dims is {args['spatial_dims']}, the bundle lsdm is made for 2")
    fits = args["in_channels"] in (c, 2 * c) and args["out_channels"] == c
    channels = (args["in_channels"], args["out_channels"])
    _require(
        fits, f"in_channels and out_channels are {channels}; the latents of {autoencoder} need {(c, c)} or {(2 * c, c)}"
    )
    _require(args["num_class_embeds"] is None, "the network wants classes, which the bundle lsdm does not give")
    named = _named(dataset)
    there = f"{autoencoder} belongs to the dataset {coder['dataset']['name']}"
    _require(coder["dataset"] == named, f"{there}, given is {named['name']} or another state of it; give the same")
    labels = len(dataset.labels)
    if text.kind == "SPADEDiffusionModelUNet":
        got = args["label_nc"]
        _require(got == labels, f"label_nc is {got}, the dataset {dataset.name} has {labels} labels with background")
    latent = [n // coder["factor"] for n in coder["image_size"]]
    _require_halves(latent, args, f"the size of the latents of {autoencoder}")
    if scale_factor is None:
        msg = "the factor on the latents (scale_factor of LatentDiffusionInferer) is in no checkpoint"
        raise UserError(f"{msg}; give the one of the training with --scale-factor, 1 where there was none")
    if not 0 < scale_factor < float("inf"):
        raise UserError(f"--scale-factor is {scale_factor}; give a number above 0")
    contract = {
        "bundle": "lsdm",
        "image_size": coder["image_size"],
        "value_range": [-1, 1],
        "intensity": coder["intensity"],
        "labels": dataset.labels,
        "factor": coder["factor"],
        "latent_channels": c,
        "semantic_downsample": "nearest",
        "collapse_nodule_labels": False,
        "schedule": dict(schedule),
        "scale_factor": float(scale_factor),
        "autoencoder_sha256": sha256_of(autoencoder),
        "dataset": named,
    }
    return contract, 2 * c - args["in_channels"]


@dataclass(frozen=True)
class ImageNetwork:
    """What the contract of a denoiser of images is made from.

    Attributes:
        text: the network.
        dataset: that it was trained on, or one like it.
        schedule: of the noise.
        image_size: of its training; None is the dataset's.
        value_range: of the images that it was trained on.
    """

    text: NetworkText
    dataset: PreparedDataset
    schedule: Mapping[str, Any]
    image_size: Sequence[int] | None
    value_range: Sequence[float]


def class_contract(given: ImageNetwork) -> dict[str, Any]:
    """Contract of ``model.pt`` of the bundle cfg_ddpm.

    Raises:
        UserError: the network does not fit the dataset or the bundle.
    """
    args, dataset = given.text.args, given.dataset
    channels, classes = dataset.content["image_channels"], dataset.classes
    _require_plain(given.text, "cfg_ddpm")
    _require_channels(args, channels, f"images of {dataset.name} have {channels}")
    got, needed = args["num_class_embeds"], len(classes) + 1
    _require(
        got == needed,
        f"num_class_embeds is {got}; the bundle cfg_ddpm needs {needed}: one for each of {', '.join(classes)} in this "
        "order, and a last one for no class, which guidance needs",
    )
    size = _size(dataset, given.image_size, args["spatial_dims"])
    _require_halves(size, args, "the image size")
    return {
        "bundle": "cfg_ddpm",
        "image_size": size,
        "image_channels": channels,
        "classes": classes,
        "modality": dataset.content["modality"],
        "intensity": dataset.content["intensity"],
        "value_range": _pm1(given.value_range, "cfg_ddpm"),
        "schedule": dict(given.schedule),
        "drop_prob": None,
        "loss": None,
        "class_sampling": None,
        "num_real": class_counts(dataset.datalist("training"), classes),
        "dataset": _named(dataset),
    }


def pair_contract(given: ImageNetwork) -> dict[str, Any]:
    """Contract of ``model.pt`` of the bundle jdm.

    Raises:
        UserError: the network does not fit the dataset or the bundle.
    """
    args, dataset = given.text.args, given.dataset
    channels = dataset.content["image_channels"]
    together = channels + len(dataset.labels) - 1
    _require_plain(given.text, "jdm")
    _require(args["num_class_embeds"] is None, "the network wants classes, which the bundle jdm does not give")
    _require_channels(
        args, together, f"image and label maps of {dataset.name} have {together} (a channel for each label but the "
        "background, after those of the image)",
    )  # fmt: skip
    size = _size(dataset, given.image_size, args["spatial_dims"])
    _require_halves(size, args, "the image size")
    return {
        "bundle": "jdm",
        "image_size": size,
        "image_channels": channels,
        "channel_names": dataset.content["channel_names"],
        "labels": dataset.labels,
        "value_range": list(check_value_range(given.value_range)),
        "intensity": dataset.content["intensity"],
        "file_ending": dataset.content["file_ending"],
        "spacing": pair_spacing(dataset.indexed("training"), size, None),
        "schedule": dict(given.schedule),
        "learned_variance": False,
        "patches": {"random": False, "scale": None, "flips": False},
        "num_real": num_real(dataset),
        "dataset": _named(dataset),
    }


def _require(fits: bool, otherwise: str) -> None:
    if not fits:
        raise UserError(f"{otherwise}; this network cannot be used there")


def _require_bundle(dataset: PreparedDataset, bundle: str, text: NetworkText) -> None:
    got = BUNDLES.get(dataset.content["task"])
    if got != bundle:
        msg = f"{dataset.root} was prepared for the bundle {got}, which has no {text.kind}; it belongs to {bundle}"
        raise UserError(f"{msg}: give a dataset prepared for that")


def _require_plain(text: NetworkText, bundle: str) -> None:
    if text.kind != "DiffusionModelUNet":
        raise UserError(f"the bundle {bundle} has no {text.kind}; give a dataset of another task, or another network")


def _require_channels(args: Mapping[str, Any], channels: int, what: str) -> None:
    got = (args["in_channels"], args["out_channels"])
    _require(got == (channels, channels), f"in_channels and out_channels are {got}; {what}")


def _require_halves(size: Sequence[int], args: Mapping[str, Any], what: str) -> None:
    """Refuse a size that the network's levels cannot halve and double again."""
    factor = 2 ** (len(args["channels"]) - 1)
    if any(n % factor for n in size):
        raise UserError(f"{what} {list(size)} is no multiple of {factor}, as this network needs; give --image-size")


def _size(dataset: PreparedDataset, image_size: Sequence[int] | None, dims: int) -> list[int]:
    size = image_size or dataset.content["spatial_shape"]
    if size is None:
        raise UserError(f"the images of {dataset.root} differ in size; give --image-size, that of the training")
    if len(size) != dims or any(s < 1 for s in size):
        raise UserError(f"the image size {list(size)} does not fit a {dims}-D network; give --image-size, {dims} sizes")
    return [int(s) for s in size]


def _pm1(value_range: Sequence[float], bundle: str) -> list[int]:
    if list(value_range) != [-1, 1]:
        low, high = value_range
        msg = f"--value-range is {low:g} {high:g}; the bundle {bundle} gives its networks images from -1 to 1"
        raise UserError(f"{msg}, so a network that was trained with others cannot be used there")
    return [-1, 1]


def _named(dataset: PreparedDataset) -> dict[str, str]:
    return {"name": dataset.name, "fingerprint": dataset.fingerprint}

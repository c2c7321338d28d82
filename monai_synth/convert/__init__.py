# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of monai-generative and of MONAI's bundles as trained files of this package, or a reason why not.

Nothing is written unless every weight has found its place and both libraries compute the same from the same input.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.schedulers import DDPMScheduler

from monai_synth.checkpoint import load_file, restore_network, save_atomic, sha256_of, trained_file
from monai_synth.convert.contracts import (
    BUNDLES,
    ImageNetwork,
    autoencoder_contract,
    class_contract,
    lsdm_contract,
    pair_contract,
)
from monai_synth.convert.source import NetworkText, network_text, read_text, read_weights, schedule_text
from monai_synth.convert.verify import Comparison, compare
from monai_synth.convert.weights import converted_network, own_arch
from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.diffusion import alphas_cumprod
from monai_synth.errors import UserError

__all__ = ["Settings", "convert_checkpoint"]

_UNSEEN = ("num_head_channels", "norm_num_groups", "norm_eps")  # leave no trace in the weights
_BETAS = {"linear": "linear_beta", "scaled_linear": "scaled_linear_beta", "squaredcos_cap_v2": "cosine"}


@dataclass(frozen=True)
class Settings:
    """What is converted, and for what.

    Attributes:
        source: the checkpoint.
        network: file that describes its network: ``_target_`` and arguments, or a bundle's configuration.
        out: trained file to write; ``autoencoder.pt`` for an autoencoder.
        network_id: id of the network in the file. Default: the only one.
        schedule: file that describes the noise schedule. Default: ``network``.
        schedule_id: id of the scheduler there. Default: the only one.
        key: where in the checkpoint the weights are. Default: where there is only one state dict.
        dataset: prepared dataset of the kind that it was trained on; not for a ControlNet.
        image_size: spatial size of the training. Default: that of the dataset's images.
        value_range: of the images that it was trained on.
        scale_factor: on the latents.
        overwrite: replace ``out``.
    """

    source: str
    network: str
    out: str
    network_id: str | None = None
    schedule: str | None = None
    schedule_id: str | None = None
    key: str | None = None
    dataset: str | None = None
    image_size: list[int] | None = None
    value_range: list[float] | tuple[float, float] = (-1.0, 1.0)
    scale_factor: float | None = None
    overwrite: bool = False


def convert_checkpoint(settings: Settings, *, report: Callable[[str], None] = print) -> list[Comparison]:
    """Convert a checkpoint, compare both libraries, and write the trained file.

    Args:
        settings: see :class:`Settings`.
        report: gets each line of text.

    Returns:
        The comparisons.

    Raises:
        UserError: anything does not fit; then nothing is written.
    """
    out = Path(settings.out).expanduser().absolute()
    _check_out(out, settings)
    text = network_text(read_text(settings.network), settings.network, settings.network_id)
    _check_name(out, text)
    stage, contract, extra_channels = _contract(settings, text, out)
    weights = read_weights(settings.source, settings.key)

    arch = own_arch(text, extra_channels=extra_channels)
    network = converted_network(text, weights, arch)
    report(f"{text.kind}: {len(weights)} tensors, {sum(v.numel() for v in weights.values()):,} numbers, all placed")
    unseen = ", ".join(f"{key} {text.args[key]}" for key in _UNSEEN if key in text.args)
    report(f"taken from the description, because weights do not show it: {unseen}")
    compared = compare(text, weights, network, extra_channels=extra_channels)
    for found in compared:
        report(
            f"same input, {found.library}: largest difference {found.difference:.2e} "
            f"(the outputs' standard deviation is {found.spread:.2e} or more)"
        )
    if "schedule" in contract:
        report(f"noise schedule: largest difference from MONAI's {_schedule_difference(contract['schedule']):.2e}")

    converted = {
        "kind": text.kind,
        "description": text.args,
        "source_sha256": sha256_of(settings.source),
        "compared": [{"library": c.library, "difference": c.difference, "spread": c.spread} for c in compared],
    }
    content = trained_file(stage, network, arch, contract, converted=converted)
    _write(content, out, network)
    report(f"wrote {out}: {_use(text, contract, extra_channels)}")
    return compared


def _check_out(out: Path, settings: Settings) -> None:
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the file to write, {out / 'model.pt'} say")
    if out.exists() and Path(settings.source).exists() and out.samefile(settings.source):
        raise UserError(f"--out is the checkpoint {settings.source} itself; give another file")
    if out.exists() and not settings.overwrite:
        raise UserError(f"{out} exists and is not overwritten; give another --out, or --overwrite")


def _check_name(out: Path, text: NetworkText) -> None:
    is_autoencoder = text.kind == "AutoencoderKL"
    if is_autoencoder != (out.name == "autoencoder.pt") or out.suffix != ".pt":
        name = "autoencoder.pt" if is_autoencoder else "model.pt"
        raise UserError(f"--out {out} is not where a bundle looks for a {text.kind}; give {out.parent / name}, say")


def _contract(settings: Settings, text: NetworkText, out: Path) -> tuple[str, dict[str, Any], int]:
    """Stage and contract of the file, and by how many channels the network's input is widened."""
    if text.kind == "ControlNet":
        return "controlnet", {"bundle": None}, 0
    dataset = _dataset(settings, text)
    sizes: dict[str, Any] = {"image_size": settings.image_size, "value_range": settings.value_range}
    if text.kind == "AutoencoderKL":
        return "autoencoder", autoencoder_contract(text, dataset, **sizes), 0
    place = settings.schedule or settings.network
    schedule = schedule_text(read_text(place), place, settings.schedule_id)
    bundle = BUNDLES[dataset.content["task"]]
    if bundle == "lsdm":
        autoencoder = out.with_name("autoencoder.pt")
        contract, extra = lsdm_contract(
            text, dataset, schedule=schedule, autoencoder=autoencoder, scale_factor=settings.scale_factor
        )
        return "diffusion", contract, extra
    make = class_contract if bundle == "cfg_ddpm" else pair_contract
    return "diffusion", make(ImageNetwork(text, dataset, schedule, **sizes)), 0


def _dataset(settings: Settings, text: NetworkText) -> PreparedDataset:
    if settings.dataset is None:
        msg = f"a {text.kind} needs --dataset: sizes, labels or classes, and units of its images are in no checkpoint"
        raise UserError(f"{msg}; prepare images like those of its training with `monai-synth prepare`")
    try:
        dataset = read_dataset(settings.dataset)
    except UserError as error:
        raise UserError(str(error).replace("dataset_dir", "dataset")) from error  # the bundles' name of the option
    task = dataset.content["task"]
    if task not in BUNDLES:
        raise UserError(f"{dataset.root} was prepared for {task!r}; allowed are {', '.join(BUNDLES)}")
    return dataset


def _schedule_difference(schedule: dict[str, Any]) -> float:
    """Largest difference of the share of signal at any timestep from what MONAI's scheduler computes.

    Raises:
        UserError: it is no rounding error.
    """
    given = {key: schedule[key] for key in ("beta_start", "beta_end") if key in schedule}
    theirs = DDPMScheduler(schedule["num_train_timesteps"], schedule=_BETAS[schedule["beta_schedule"]], **given)
    difference = float((alphas_cumprod(schedule) - theirs.alphas_cumprod.double()).abs().max())
    if difference > 1e-4:
        raise UserError(f"the noise schedule {schedule} differs from MONAI's by {difference:.1e}; report this fault")
    return difference


def _write(content: dict[str, Any], out: Path, network: torch.nn.Module) -> None:
    """Write the file under another name, read it again, and give it its own name where it holds the same network.

    Raises:
        UserError: it does not, or it cannot be written.
    """
    new = out.with_name(f".{out.stem}.new.pt")
    try:
        save_atomic(content, new)
        read = restore_network(load_file(new), new).state_dict()
        if not all(torch.equal(value, read[key]) for key, value in network.state_dict().items()):
            raise UserError(f"{new} came back from the disk with other numbers and was removed; check the disk")
        os.replace(new, out)
    finally:
        new.unlink(missing_ok=True)


def _use(text: NetworkText, contract: dict[str, Any], extra_channels: int) -> str:
    bundle = contract["bundle"]
    if text.kind == "AutoencoderKL":
        return "the bundle lsdm samples with it, and trains its diffusion model on top of it, with this --ckpt_dir"
    if bundle is None:
        return "no bundle uses a ControlNet; monai_synth.checkpoint.restore_network gives it back for code of your own"
    if extra_channels and text.kind == "DiffusionModelUNet":
        return f"the bundle {bundle} samples with it, but it reads no map: images come at random"
    if bundle == "lsdm" and not extra_channels:
        more = "; it gets the latent first, then the map encoded by the autoencoder, so it must be trained on these"
        return f"the bundle lsdm samples with it (inference.json, --ckpt_dir its folder){more}"
    return f"the bundle {bundle} samples with it (inference.json, --ckpt_dir its folder)"

# SPDX-License-Identifier: Apache-2.0
"""What a user asks for becomes the very parts that the bundle's own sampling is made of, so images are the same.

Each ``*_job`` is the counterpart of a bundle's ``inference.json``: dataset, inferer, evaluator and writer of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.engines import PrepareBatch
from monai.inferers import Inferer
from torch import nn
from torch.utils.data import Dataset

from monai_synth.checks import whole
from monai_synth.data.pair_files import write_image, write_label
from monai_synth.errors import UserError
from monai_synth.export.classes import ClassExport, class_folders
from monai_synth.export.handler import LabelledImageExport, SampleExport
from monai_synth.export.pairs import PairExport
from monai_synth.inference.cases import SamplingDataset, SamplingPrepareBatch, check_targets, collate_cases
from monai_synth.inference.classes import (
    ClassInferer,
    ClassSamplingDataset,
    ClassSamplingPrepareBatch,
    collate_classes,
)
from monai_synth.inference.joint import JointInferer
from monai_synth.inference.lsdm import LSDMInferer
from monai_synth.inference.model import LSDMModel, OneFileModel
from monai_synth.inference.pairs import PairSamplingDataset, PairSamplingPrepareBatch, collate_pairs
from monai_synth.inference.spade_gan import SPADEGANInferer
from monai_synth.studio.places import MAP_BUNDLES, Place

MOST_IMAGES = 64
MOST_AT_ONCE = 32
MOST_GUIDANCE = 1000.0
MOST_SEED = 2**53  # of a number that a browser holds exactly
FORMATS = ("png", "nii.gz")
JDM_GRADIENT_SCALE = 0.1  # of the bundle's config


@dataclass(frozen=True)
class Request:
    """What a user may choose, checked.

    Attributes:
        num_images: images in all; of classes, of each class.
        seed: of the first.
        batch_size: images at once.
        sampler: see the bundle's ``sampler``.
        num_steps: calls of the network.
        precision: "auto", "float32" or "bfloat16".
        guidance_scale: 0 (lsdm) or 1 (cfg_ddpm) is none.
        targets: nodule features asked for (lsdm).
        classes: names to sample (models of classes).
        size: S of the images, one of the place's ``sizes``; None is the trained one.

    Raises:
        UserError: a value out of range.
    """

    num_images: int = 4
    seed: int = 0
    batch_size: int = 4
    sampler: str = "dpm++"
    num_steps: int = 10
    precision: str = "auto"
    guidance_scale: float = 1.0
    targets: Mapping[str, float] = field(default_factory=dict)
    classes: Sequence[str] = ()
    size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        limits = {"num_images": (1, MOST_IMAGES), "batch_size": (1, MOST_AT_ONCE), "seed": (0, MOST_SEED)}
        for name, (least, most) in (limits | {"num_steps": (1, 1000)}).items():
            if whole(name, getattr(self, name), least) > most:
                raise UserError(f"{name} is {getattr(self, name)}; allowed here are integers from {least} to {most}")
        scale = self.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= MOST_GUIDANCE:
            raise UserError(f"guidance_scale is {scale!r}; allowed are numbers up to {MOST_GUIDANCE:g}")
        check_targets(self.targets)


@dataclass(frozen=True)
class Drawing:
    """A label map to sample from.

    Attributes:
        label: uint8 (H, W) of one of the model's sizes.
        origin: what it came from: "drawing", "upload" or the dataset's case.
        case: the dataset's case where nothing was changed; its nodules then tell their own features.
        spacing: (row, column) in mm; None where it is not known.
    """

    label: np.ndarray
    origin: str = "drawing"
    case: Mapping[str, Any] | None = None
    spacing: Sequence[float] | None = None

    @property
    def name(self) -> str:
        """Of the map, by its content."""
        return f"map-{_digest(self.label)}"


def _digest(array: np.ndarray) -> str:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()[:10]


@dataclass(frozen=True)
class Job:
    """What is sampled, by what, and how it is written.

    Attributes:
        dataset: an item per image.
        collate: items -> batch.
        prepare_batch: batch -> what the inferer takes.
        network: the model.
        inferer: the bundle's.
        batch_size: images at once.
        num_steps: steps of each batch; 0 where the sampler has none.
        export: (folder, format) -> the bundle's writer.
        formats: that can be written.
    """

    dataset: Dataset
    collate: Callable[..., dict[str, Any]]
    prepare_batch: PrepareBatch
    network: nn.Module
    inferer: Inferer
    batch_size: int
    num_steps: int
    export: Callable[[Path, str], SampleExport]
    formats: tuple[str, ...] = FORMATS


def map_job(place: Place, model: LSDMModel | OneFileModel, drawing: Drawing, request: Request, folder: Path) -> Job:
    """CT slices of a label map, by lsdm or spade_gan.

    Args:
        place: the bundle.
        model: its loaded files; of lsdm with the classifiers of all features that guide.
        drawing: the map.
        request: what is asked for.
        folder: of the session; the map is written there.

    Raises:
        UserError: what the bundle's own sampling refuses.
    """
    contract = model.contract
    targets = check_targets(request.targets)
    if drawing.case is not None:
        case = dict(drawing.case, targets=targets)
    else:
        path = _written(drawing, folder)
        case = {"case_id": drawing.name, "label": str(path), "nodules": None, "source": drawing.origin}
        case |= {"targets": targets} | ({"spacing": drawing.spacing} if drawing.spacing else {})
    dataset = SamplingDataset(
        [case],
        num_samples=request.num_images,
        seed=request.seed,
        image_size=request.size or place.size,
        num_labels=len(contract["labels"]),
    )
    inferer: Inferer
    if isinstance(model, LSDMModel):
        inferer = LSDMInferer(
            model.codec,
            contract["schedule"],
            sampler=request.sampler,
            num_steps=request.num_steps,
            classifiers=model.classifiers,
            guidance_scale=request.guidance_scale,
            crop_size_latent=model.crop_size_latent,
            semantic_downsample=contract["semantic_downsample"],
            collapse_nodule_labels=contract["collapse_nodule_labels"],
        )
        guidance = {
            "scales": inferer.scales, "scale_by": inferer.guidance_scale_by, "decode": inferer.guidance_decode,
            "interval": inferer.guidance_interval,
        }  # fmt: skip
        record = _record(model, request) | {"guidance": guidance}
        num_steps = request.num_steps
    else:
        inferer = SPADEGANInferer(len(contract["labels"]), collapse_nodule_labels=contract["collapse_nodule_labels"])
        record = _record(model, request) | {"sampler": "generator", "num_steps": 1}
        num_steps = 0

    def export(out: Path, form: str) -> SampleExport:
        return LabelledImageExport(
            out, dataset_id=900, dataset_name=place.bundle.upper(), labels=contract["labels"],
            intensity=contract["intensity"], record=record, image_format=form,
        )  # fmt: skip

    return Job(
        dataset, collate_cases, SamplingPrepareBatch(), model.network, inferer, request.batch_size, num_steps, export
    )


def pair_job(
    place: Place,
    model: OneFileModel,
    drawing: Drawing | None,
    image: np.ndarray | None,
    request: Request,
    folder: Path,
) -> Job:
    """Images for a mask, masks for an image, uint8 (C, H, W), or whole pairs where neither is given, by jdm.

    See :func:`map_job`.

    Raises:
        UserError: what the bundle's own sampling refuses.
    """
    contract = model.contract
    condition = "mask" if drawing is not None else "image" if image is not None else None
    dataset = PairSamplingDataset(
        condition=condition,
        dataset_dir=folder,
        split="test",
        label_dir=None if drawing is None else _written(drawing, folder).parent,
        image_dir=None if image is None else _written_image(image, folder).parent,
        num_samples=request.num_images,
        seed=request.seed,
        image_size=request.size or place.size,
        image_channels=contract["image_channels"],
        labels=contract["labels"],
        value_range=contract["value_range"],
        spacing=contract["spacing"],
    )
    inferer = JointInferer(
        contract["schedule"],
        value_range=contract["value_range"],
        learned_variance=contract["learned_variance"],
        sampler=request.sampler,
        num_steps=request.num_steps,
        gradient_scale=JDM_GRADIENT_SCALE,
    )
    settings = {
        "condition": condition, "clip": True, "resample": 1, "gradient_scale": JDM_GRADIENT_SCALE, "known_noise": None,
        "num_ensemble": 1,
    }  # fmt: skip

    def export(out: Path, form: str) -> SampleExport:
        return PairExport(
            out, dataset_id=910, dataset_name="JDM", labels=contract["labels"], condition=condition,
            channel_names=contract["channel_names"], value_range=contract["value_range"],
            image_channels=contract["image_channels"], record=_record(model, request) | {"settings": settings},
            file_ending=f".{form}",
        )  # fmt: skip

    parts = (dataset, collate_pairs, PairSamplingPrepareBatch(), model.network, inferer)
    return Job(*parts, request.batch_size, request.num_steps, export)


def class_job(place: Place, model: OneFileModel, request: Request) -> Job:
    """Images of classes, by cfg_ddpm or fad.

    Raises:
        UserError: what the bundle's own sampling refuses.
    """
    contract = model.contract
    with_guidance = place.bundle == "cfg_ddpm"
    if request.num_images * max(1, len(request.classes)) > MOST_IMAGES:
        asked = f"{request.num_images} images of {len(request.classes)} classes"
        raise UserError(f"{asked} are asked for; allowed are {MOST_IMAGES} in all")
    folders = class_folders(contract["classes"])
    dataset = ClassSamplingDataset(
        contract["classes"],
        per_class=request.num_images,
        only=list(request.classes),
        seed=request.seed,
        case_id_of=lambda name, seed: f"{folders[name]}_{seed:07d}",
    )
    inferer = ClassInferer(
        contract["schedule"],
        image_size=contract["image_size"],
        image_channels=contract["image_channels"],
        null_class=len(contract["classes"]),
        sampler=request.sampler,
        num_steps=request.num_steps,
        guidance_scale=request.guidance_scale if with_guidance else 1.0,
        value_range=contract["value_range"],
    )
    guidance = {"scale": inferer.guidance_scale, "interval": None, "rescale": 0.0} if with_guidance else {}
    settings = {"clip": True} | ({} if with_guidance else {"prompts": contract["prompts"]})
    record = _record(model, request) | {"guidance": guidance, "settings": settings}

    def export(out: Path, form: str) -> SampleExport:
        name = f"synthetic_{contract['dataset']['name']}"
        return ClassExport(out / name, contract=contract, name=name, seed=request.seed, record=record)

    parts = (dataset, collate_classes, ClassSamplingPrepareBatch(), model.network, inferer)
    return Job(*parts, request.batch_size, request.num_steps, export, formats=("png",))


def make_job(
    place: Place,
    model: LSDMModel | OneFileModel,
    request: Request,
    folder: Path,
    drawing: Drawing | None = None,
    image: np.ndarray | None = None,
) -> Job:
    """The job of a bundle.

    Raises:
        UserError: a map is needed and none is given, a size that the model cannot make, or what the bundle's own
            sampling refuses.
    """
    if request.size is not None:
        place.check_size(request.size)
    makers = {"jdm": partial(pair_job, drawing=drawing, image=image, folder=folder)}
    if place.bundle in MAP_BUNDLES:
        if drawing is None:
            raise UserError("there is no label map yet; take one of the dataset, upload one, or draw one")
        return map_job(place, model, drawing, request, folder)
    return makers.get(place.bundle, class_job)(place=place, model=model, request=request)


def _record(model: LSDMModel | OneFileModel, request: Request) -> dict[str, Any]:
    return {
        "checkpoints": model.checkpoints,
        "sampler": request.sampler,
        "num_steps": request.num_steps,
        "precision": model.precision,
    }


def _written(drawing: Drawing, folder: Path) -> Path:
    """The map's file, alone in a folder of its own."""
    path = folder / drawing.name / f"{drawing.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_label(path, drawing.label)
    return path


def _written_image(image: np.ndarray, folder: Path) -> Path:
    """The image's file, alone in a folder of its own."""
    name = f"image-{_digest(image)}"
    path = folder / name / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, image)
    return path

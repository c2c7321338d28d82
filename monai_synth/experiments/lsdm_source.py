# SPDX-License-Identifier: Apache-2.0
"""What the experiment of the lung CT text compares: trained models by name and held-out slices with nodules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_synth.checkpoint import classifier_file, load_file, require_agreement, sha256_of
from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.data.slices import read_png, slice_preprocessing
from monai_synth.errors import UserError
from monai_synth.inference.cases import SamplingDataset, find_cases

REAL = "real"  # what real slices are called beside the models
# As bundle lsdm lists them: the order in which gradients are summed decides the last bit of an image.
FEATURE_OF = {"mali": "malignancy", "lobu": "lobulation", "spic": "spiculation", "text": "texture"}
GUIDANCES = ("none", *FEATURE_OF, "all")
STAGES = {"lsdm": "diffusion", "spade_gan": "generator"}
_COMMON = ("image_size", "labels", "intensity")


@dataclass(frozen=True)
class Model:
    """One trained model.

    Attributes:
        name: given by the user, such as "ldm".
        path: its file; autoencoder and classifiers lie beside it.
        sha256: of the file.
        kind: the bundle that trained it, "lsdm" or "spade_gan".
        contract: what it was trained with.
        spade: whether label maps reach it by SPADE; LDM has concatenation only.
        features: for which there is a classifier beside it.
    """

    name: str
    path: Path
    sha256: str
    kind: str
    contract: dict[str, Any]
    spade: bool
    features: tuple[str, ...] = ()

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.contract["image_size"]
        return int(height), int(width)

    def files(self, features: Sequence[str] = ()) -> dict[str, str]:
        """SHA-256 of every file that decides an image of it."""
        hashes = {"model": self.sha256}
        if self.kind == "lsdm":
            names = ["autoencoder.pt", *(classifier_file(f, self.contract["schedule"]) for f in features)]
            hashes |= {name: sha256_of(self.path.parent / name) for name in names}
        return hashes


@dataclass(frozen=True)
class Arm:
    """A model with what guides it.

    Attributes:
        name: "lsdm+mali", or the model's own name where nothing guides it.
        model: which one.
        guidance: one of ``GUIDANCES``.
        features: whose classifiers guide.
        scale: s.
        targets: features that replace the nodules' own ratings.
    """

    name: str
    model: Model
    guidance: str = "none"
    features: tuple[str, ...] = ()
    scale: float = 1.0
    targets: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What decides its images beside the cases and seeds."""
        return {
            "files": self.model.files(self.features),
            "features": list(self.features),
            "scale": self.scale,
            "targets": dict(self.targets),
        }


def read_models(given: Sequence[tuple[str, str]]) -> list[Model]:
    """Models of bundles lsdm and spade_gan, checked to make images of the same kind.

    Args:
        given: (name, file of a model, or folder with ``model.pt``).

    Raises:
        UserError: a name twice or not usable, a file that is no such model, or models that cannot be compared.
    """
    names = [name for name, _ in given]
    if not names:
        raise UserError("no model is given; give one or more, such as --models spade=DIR ldm=FILE lsdm=DIR")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the model {name!r} is given twice; give each a name of its own (--models)")
        if not name.replace("-", "").replace("_", "").isalnum() or name == REAL:
            msg = f"{name!r} is no usable name; allowed are letters, digits, '-' and '_', and not {REAL!r} (--models)"
            raise UserError(msg)
    models = [_read_model(name, Path(path).expanduser().absolute()) for name, path in given]
    first = models[0]
    for model in models[1:]:
        got, expected = ({key: m.contract.get(key) for key in _COMMON} for m in (model, first))
        require_agreement(
            got, expected, f"{model.name} with {first.name}", "Give models of one kind of image (--models)."
        )
    return models


def _read_model(name: str, path: Path) -> Model:
    path = path / "model.pt" if path.is_dir() else path
    content = load_file(path, option="--models")
    contract, stage = content.get("contract", {}), content["stage"]
    kind = contract.get("bundle")
    if STAGES.get(kind) != stage:
        msg = f"{path} holds the stage {stage!r} of bundle {kind!r}; allowed are models of "
        raise UserError(msg + " and ".join(f"{b} (stage {s!r})" for b, s in STAGES.items()) + " (--models)")
    features: tuple[str, ...] = ()
    if kind == "lsdm":
        if not (path.parent / "autoencoder.pt").is_file():
            raise UserError(
                f"there is no autoencoder.pt beside {path}; keep the files of a training together (--models)"
            )
        files = {f: path.parent / classifier_file(f, contract.get("schedule", {})) for f in FEATURE_OF.values()}
        features = tuple(f for f, file in files.items() if file.is_file())
    spade = kind == "spade_gan" or bool(content["arch"].get("args", {}).get("spade_in", True))
    return Model(name, path, sha256_of(path), kind, contract, spade, features)


def chosen_arms(
    models: Sequence[Model], guidance: Sequence[str], guided: str | None, scale: float
) -> tuple[list[Arm], Model | None]:
    """Each model by itself, and the guided one with each guidance.

    Args:
        models: as given.
        guidance: of ``GUIDANCES``.
        guided: name of the model that is guided. None: the last diffusion model with SPADE, else the last one.
        scale: s.

    Returns:
        Arms in the order of the models, and the guided model (None where there is no diffusion model).

    Raises:
        UserError: an unknown word, a model that cannot be guided, or a classifier that is missing.
    """
    unknown = [word for word in guidance if word not in GUIDANCES]
    if unknown or not guidance:
        raise UserError(f"guidance {unknown or list(guidance)}; allowed are {', '.join(GUIDANCES)} (--guidance)")
    if not np.isfinite(scale) or scale <= 0:
        raise UserError(f"the guidance scale is {scale!r}; allowed are numbers above 0 (--scale)")
    diffusion = [m for m in models if m.kind == "lsdm"]
    model = next((m for m in models if m.name == guided), None) if guided else None
    if guided and model not in diffusion:
        names = ", ".join(m.name for m in diffusion) or "none here"
        raise UserError(f"{guided!r} cannot be guided; diffusion models are {names} (--guided)")
    if model is None and diffusion:
        model = ([m for m in diffusion if m.spade] or diffusion)[-1]
    asked = [word for word in GUIDANCES if word in guidance and word != "none"]
    if asked and model is None:
        raise UserError(f"guidance {asked} needs a diffusion model; give --guidance none, or a model of bundle lsdm")
    arms: list[Arm] = []
    for m in models:
        if m is not model or "none" in guidance:
            arms.append(Arm(m.name, m))
        if m is model:
            arms += [guided_arm(m, word, scale) for word in asked]
    return arms, model


def guided_arm(model: Model, word: str, scale: float) -> Arm:
    """A model with one guidance.

    Raises:
        UserError: a classifier is missing.
    """
    features = tuple(FEATURE_OF.values()) if word == "all" else (FEATURE_OF[word],)
    missing = [f for f in features if f not in model.features]
    if missing:
        files = ", ".join(classifier_file(f, model.contract["schedule"]) for f in missing)
        msg = f"guidance {word!r} needs {files} beside {model.path}; "
        raise UserError(msg + "train them (train_classifier.json --feature NAME), or leave it out of --guidance")
    return Arm(f"{model.name}+{word}", model, word, features, scale)


class Cases:
    """Slices of the test split that show a nodule, at the models' size; read one at a time.

    Args:
        dataset: prepared LIDC dataset.
        model: whose size and labels count.
        max_cases: take so many, evenly spread over the list. None: all.

    Raises:
        UserError: labels or window of another kind, no nodules, or fewer than 2 slices.
    """

    def __init__(self, dataset: PreparedDataset, model: Model, max_cases: int | None = None) -> None:
        got = {"labels": dataset.labels, "intensity": dataset.content["intensity"]}
        expected = {key: model.contract.get(key) for key in got}
        require_agreement(got, expected, f"{dataset.root} with the models", "Give the dataset they are made for.")
        if max_cases is not None and max_cases < 2:
            raise UserError(f"max_cases is {max_cases}; 2 or more are needed (--max-cases)")
        found = find_cases(dataset_dir=str(dataset.root), split="test", label_dir=None, requests=None, targets=None)
        self.dataset, self.model, self._all = dataset, model, found
        indices = [i for i, case in enumerate(found) if case.get("nodules")]
        if len(indices) < 2:
            msg = f"the test split of {dataset.root} has {len(indices)} slices with a nodule; 2 or more are needed"
            raise UserError(f"{msg}: prepare more scans, or give a larger share for the test split (--splits)")
        self.num_found = len(indices)
        if max_cases is not None and max_cases < len(indices):
            indices = [indices[i] for i in np.linspace(0, len(indices) - 1, max_cases).round().astype(int)]
        self.indices = tuple(indices)  # places in the split
        self._items = SamplingDataset(
            found,
            num_samples=len(found),
            seed=0,
            image_size=model.image_size,
            num_labels=len(model.contract["labels"]),
        )
        self._reader = slice_preprocessing(model.image_size, keys=("image",))

    def __len__(self) -> int:
        return len(self.indices)

    def case_id(self, index: int) -> str:
        return str(self._all[index]["case_id"])

    def patient(self, index: int) -> str:
        return str(self._all[index].get("patient_id", self._all[index]["case_id"]))

    def item(self, index: int) -> dict[str, Any]:
        """As sampling takes it: ``label`` (1, H, W) uint8, ``nodules`` in pixels of the model, ``spacing``."""
        return self._items[index]

    def real(self, index: int) -> np.ndarray:
        """The slice itself, uint8 (H, W)."""
        case = self._all[index]
        size = self.model.image_size
        if read_png(case["image"]).shape == size:
            return read_png(case["image"])
        return to_pixels(self._reader({"image": case["image"], "case_id": case["case_id"]})["image"])

    def by_nodule_area(self) -> list[int]:
        """Places of the chosen slices, largest nodule area first."""
        return sorted(self.indices, key=lambda i: -sum(float(n.get("area", 0)) for n in self._all[i]["nodules"]))


def to_pixels(image_pm1: torch.Tensor) -> np.ndarray:
    """(1, H, W) in [-1, 1] -> uint8 (H, W), by the arithmetic of the export of bundle lsdm."""
    unit = (image_pm1[0].detach().float().cpu().clamp(-1, 1).numpy() + 1) / 2
    return np.round(unit * 255).astype(np.uint8)


def read_cases(dataset_dir: str, models: Sequence[Model], max_cases: int | None) -> Cases:
    """Held-out slices for models that agree with each other."""
    return Cases(read_dataset(dataset_dir, task="lidc"), models[0], max_cases)

# SPDX-License-Identifier: Apache-2.0
"""What the expert experiment compares: models by arm, the experts that judge, and real images; checked to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_synth.checkpoint import differences, load_file, require_agreement, restore_network, sha256_of
from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.errors import UserError
from monai_synth.evaluate.similarity import WINDOW

REAL = "real"  # what real images are called beside the arms
EXPERT_STAGE = "image_classifier"
_NEEDED = ("classes", "image_size", "image_channels", "value_range", "schedule", "dataset")
_MOST_TOLD = 8  # differences of contracts


@dataclass(frozen=True)
class Model:
    """One trained model.

    Attributes:
        arm: what it is an example of, such as "baseline".
        training: its number among those of its arm, from 0.
        folder: where its samples are, below ``OUT/samples``.
        path: its file.
        sha256: of the file.
        contract: what it was trained with.
    """

    arm: str
    training: int
    folder: str
    path: Path
    sha256: str
    contract: dict[str, Any]

    @property
    def null_class(self) -> bool:
        """Whether it learned to be told no class, which guidance needs."""
        return float(self.contract.get("drop_prob") or 0.0) > 0


@dataclass(frozen=True)
class Judge:
    """A trained classifier that says which class an image shows.

    Attributes:
        name: "expert" or "second expert".
        path: its file.
        sha256: of the file.
        contract: what it was trained with.
        arch: its architecture.
    """

    name: str
    path: Path
    sha256: str
    contract: dict[str, Any]
    arch: dict[str, Any]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that it was trained on."""
        height, width = self.contract["image_size"]
        return int(height), int(width)

    def steered(self, models: Sequence[Model]) -> bool:
        """Whether the training of one of the models was aligned with this very file."""
        return any((m.contract.get("alignment") or {}).get("expert_sha256") == self.sha256 for m in models)

    @property
    def fingerprint(self) -> str | None:
        """Of the dataset that it was trained on, where its file tells."""
        dataset, both = self.contract.get("dataset") or {}, self.contract.get("fingerprints") or {}
        return dataset.get("fingerprint", both.get("real"))


def read_models(given: Sequence[tuple[str, Sequence[str]]]) -> dict[str, list[Model]]:
    """Models by arm.

    Args:
        given: (arm, files or folders with model.pt), one for each training.

    Raises:
        UserError: a name twice, files that are no such models, or models that cannot be compared.
    """
    names = [name for name, _ in given]
    if not names:
        raise UserError("no model is given; give one or more, such as --models baseline=a/model.pt aligned=b/model.pt")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the arm {name!r} is given twice; give each a name of its own (--models)")
        if not name.replace("-", "").replace("_", "").isalnum() or name == REAL:
            msg = f"the arm {name!r} has no usable name; allowed are letters, digits, '-' and '_', and not {REAL!r}"
            raise UserError(f"{msg} (--models)")
    counts = {name: len(paths) for name, paths in given}
    if len(set(counts.values())) > 1 or not min(counts.values()):
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        msg = f"the arms have different numbers of trainings ({text}); give equally many, as trainings are compared"
        raise UserError(f"{msg} in the order in which they are given (--models)")
    arms: dict[str, list[Model]] = {}
    for name, paths in given:
        arms[name] = []
        for number, path in enumerate(paths):
            folder = name if len(paths) == 1 else f"{name}_{number + 1}"
            arms[name].append(_read_model(name, number, folder, path))
        hashes = [model.sha256 for model in arms[name]]
        if len(set(hashes)) < len(hashes):
            raise UserError(f"the arm {name!r} has the same model twice, which is one training; give each file once")
    every = [model for models in arms.values() for model in models]
    _require_alike(every)
    return arms


def read_judges(paths: Sequence[str | None], model: Model) -> list[Judge]:
    """The expert, and the second one where its path is not None.

    Raises:
        UserError: a file is no expert, or one that does not fit the models.
    """
    judges = []
    for name, path in zip(("expert", "second expert"), paths, strict=True):
        if path is None:
            continue
        option = "--" + name.replace(" ", "-")
        file = Path(path).expanduser().absolute()
        content = load_file(file, stage=EXPERT_STAGE, option=option)
        contract = {**(content.get("report") or {}), **content["contract"]}
        remedy = f"Give one that was trained on the images of these models ({option})."
        _require_same(
            contract, model.contract, ("classes", "image_channels"), f"{name} {file} with {model.path}", remedy
        )
        if len(contract.get("image_size") or ()) != 2:
            raise UserError(f"{name} {file} tells no height and width of its images; train it again")
        restore_network(content, file)  # refuse damaged weights before anything is sampled
        judges.append(Judge(name, file, sha256_of(file), contract, content["arch"]))
    if len(judges) == 2 and judges[0].sha256 == judges[1].sha256:
        raise UserError("both experts are the same file; give another one, or leave --second-expert out")
    return judges


def read_real(folder: str | Path, model: Model, sampled: Sequence[str]) -> PreparedDataset:
    """The real images.

    Raises:
        UserError: not those that the models were trained on, no test image, or too few of a class to make pairs.
    """
    dataset = read_dataset(folder, task="classes")
    content = dataset.content
    got = {
        "classes": dataset.classes,
        "image_channels": content["image_channels"],
        "dataset": {"fingerprint": dataset.fingerprint},
    }
    remedy = "Give the prepared dataset that the models were trained on (--real)."
    _require_same(
        got, model.contract, ("classes", "image_channels", "dataset"), f"{dataset.root} with {model.path}", remedy
    )
    dataset.indexed("test")  # refuse a split without images
    numbers = [case["class"] for case in content["training"]]
    for name in sampled:
        if numbers.count(dataset.classes[name]) < 2:
            msg = f"the training split of {dataset.root} has fewer than 2 images of {name}, and their similarity is one"
            raise UserError(f"{msg} of pairs; prepare it with other --splits, or leave the class out (--exclude)")
    return dataset


def chosen_classes(
    classes: Mapping[str, int], exclude: Sequence[str], only: Sequence[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """The classes that the expert chooses from, and of these the ones that are sampled.

    Args:
        classes: the models', name -> number.
        exclude: names or prompts of classes that are left out of both.
        only: of those that are sampled. Empty: all that are left.

    Raises:
        UserError: an unknown name, a class in both, or fewer than two to choose from.
    """
    from monai_synth.networks.text_features import find_class

    def known(names: Sequence[str], option: str) -> set[str]:
        try:
            return {find_class(name, classes) for name in names}
        except UserError as error:
            raise UserError(f"{error} ({option})") from error

    without, wanted = known(exclude, "--exclude"), known(only, "--only")
    if both := sorted(without & wanted):
        raise UserError(f"the class {both[0]!r} is given to --only and to --exclude; drop one of them")
    left = {name: number for name, number in classes.items() if name not in without}
    if len(left) < 2:
        raise UserError(f"the expert would choose from {', '.join(left) or 'no class'}; leave 2 or more (--exclude)")
    return left, {name: number for name, number in left.items() if not wanted or name in wanted}


def told_apart(models: Mapping[str, Sequence[Model]], baseline: str) -> dict[str, list[str]]:
    """By arm, in which settings its first training differs from that of the baseline."""
    skipped = ("report", "num_real")
    first = {arm: {k: v for k, v in found[0].contract.items() if k not in skipped} for arm, found in models.items()}
    told = {arm: differences(contract, first[baseline]) for arm, contract in first.items() if arm != baseline}
    return {
        arm: [text.replace(" there", f" in {arm}").replace(" here", f" in {baseline}") for text in found[:_MOST_TOLD]]
        for arm, found in told.items()
    }


def _read_model(arm: str, number: int, folder: str, given: str) -> Model:
    path = Path(given).expanduser().absolute()
    if path.is_dir():
        path = path / "model.pt"
    content = load_file(path, stage="diffusion", option="--models")
    contract = content["contract"]
    lacking = [key for key in _NEEDED if not contract.get(key)]
    if lacking:
        msg = f"{path} was trained by the bundle {contract.get('bundle')!r} and tells no {', '.join(lacking)}"
        raise UserError(f"{msg}; give models that are told a class, of the bundles fad or cfg_ddpm (--models)")
    size = contract["image_size"]
    if len(size) != 2 or min(size) < WINDOW:
        msg = f"{path} makes images of {'x'.join(map(str, size))}; an expert and SSIM take two axes of {WINDOW} pixels"
        raise UserError(f"{msg} or more, so give another model (--models)")
    restore_network(content, path)  # refuse damaged weights before anything is sampled
    return Model(arm, number, folder, path, sha256_of(path), contract)


def _require_alike(models: Sequence[Model]) -> None:
    first = models[0]
    remedy = "Give models of the same data and size, so that only what is studied differs (--models)."
    for model in models[1:]:
        keys = ("classes", "image_size", "image_channels", "dataset")
        _require_same(model.contract, first.contract, keys, f"{model.path} with {first.path}", remedy)


def _require_same(
    got: Mapping[str, Any], expected: Mapping[str, Any], keys: Sequence[str], what: str, remedy: str
) -> None:
    def value(contract: Mapping[str, Any], key: str) -> Any:
        found = contract.get(key)
        if key == "classes":
            return sorted((found or {}).items())  # as one value, so that a message shows both tables whole
        return (found or {}).get("fingerprint") if key == "dataset" else found

    sides = ({key: value(contract, key) for key in keys} for contract in (got, expected))
    require_agreement(*sides, what, remedy)

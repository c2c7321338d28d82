# SPDX-License-Identifier: Apache-2.0
"""Sets of images that are compared: which images of which dataset, and how they are brought to one form.

The form is that of the synthetic images; another dataset's are resized to it and never stretched.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.data.pair_files import read_image, resize_image
from monai_synth.errors import UserError
from monai_synth.export.run_folder import SETTINGS_FILE

NAMES = {
    "real_train": "real training",
    "real_test": "real test",
    "synthetic": "synthetic",
    "control": "control",
}
STRETCH = 0.02  # relative difference of the ratios of height and width that a resize may have


class ComparedSet:
    """What all kinds of sets can do; they have the members of `ImageSet` as attributes or properties."""

    dataset: str
    fingerprint: str
    num_available: int
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    sizes: Mapping[tuple[int, int], int]
    channels: int
    form: tuple[int, int, int]

    def __len__(self) -> int:
        raise NotImplementedError

    def of_class(self, name: str) -> np.ndarray:
        """Numbers of the images of a class."""
        return np.flatnonzero(np.asarray(self.labels) == name)

    @property
    def changes(self) -> tuple[str, ...]:
        """What is done to the images before they are compared, in words."""
        size = "{} x {}".format(*self.form[1:])
        texts = [
            f"{num} images of {h} x {w} resized to {size} (bilinear, low-pass filter where they shrink)"
            for (h, w), num in sorted(self.sizes.items())
            if (h, w) != self.form[1:]
        ]
        if self.channels != self.form[0]:
            texts.append("grey repeated to RGB" if self.form[0] == 3 else "RGB made grey (luminance)")
        return tuple(texts)

    def record(self) -> dict[str, Any]:
        """What the results say of it."""
        return {
            "dataset": self.dataset,
            "fingerprint": self.fingerprint,
            "n": len(self),
            "num_available": self.num_available,
            "num_patients": len(set(self.patients)),
            "classes": dict(sorted(Counter(self.labels).items())),
            "form": list(self.form),
            "changes": list(self.changes),
        }


@dataclass(frozen=True)
class ImageSet(ComparedSet):
    """Images of one set.

    Attributes:
        key: of ``NAMES``.
        dataset: its name.
        fingerprint: SHA-256 of its dataset.json.
        num_available: images in it before some were drawn.
        paths: of the images that were drawn, by case id.
        patients: of each.
        labels: class of each, by name.
        sizes: (H, W) -> number of images.
        channels: of the files, 1 or 3.
        form: (C, H, W) to which `readers` bring them.
    """

    key: str
    dataset: str
    fingerprint: str
    num_available: int
    paths: tuple[Path, ...]
    patients: tuple[str, ...]
    labels: tuple[str, ...]
    sizes: Mapping[tuple[int, int], int]
    channels: int
    form: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def readers(self) -> list[Callable[[], np.ndarray]]:
        """Functions that read an image each, uint8 of shape `form`."""
        return [functools.partial(_read, path, self.form) for path in self.paths]


def read_sets(
    real: str | Path,
    synthetic: str | Path,
    control: str | Path | None = None,
    *,
    max_images: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, ImageSet], list[str]]:
    """Draw images of each set.

    Args:
        real: dataset of ``monai-synth prepare classes``.
        synthetic: folder of sampled images, finished.
        control: another prepared dataset of classes, whatever it shows.
        max_images: of each set; where there are more, a random choice.
        seed: of that choice, which depends on case ids and not on their order.

    Returns:
        Key -> set, and warnings. ``real_test`` is missing where the real dataset has no test split.

    Raises:
        UserError: a folder that is no such dataset or is unfinished, other classes, other channels, fewer than 2
        images, images of several sizes, or of a size that would be stretched.
    """
    if max_images < 2 or seed < 0:
        raise UserError(f"max_images is {max_images}, seed {seed}; allowed are 2 or more and 0 or more")
    warnings: list[str] = []
    real_data, synthetic_data = _dataset(real, "--real"), _dataset(synthetic, "--synthetic")
    if real_data.classes != synthetic_data.classes:
        msg = f"the classes of --real are {real_data.classes}, those of --synthetic {synthetic_data.classes}; "
        raise UserError(msg + "give the dataset that the synthetic images were trained on")
    if "synthetic" not in synthetic_data.content:
        warnings.append("the folder given as --synthetic does not say that its images are synthetic")
    if real_data.content.get("synthetic") is not None:
        warnings.append("the dataset given as --real says that its images are synthetic")
    cases = {
        "real_train": (real_data, real_data.datalist("training")),
        "real_test": (real_data, real_data.datalist("test")),
        "synthetic": (synthetic_data, synthetic_data.datalist("training")),
    }
    if control is not None:
        data = _dataset(control, "--control")
        cases["control"] = (data, data.datalist("training") or data.datalist("test"))
    if not cases["real_test"][1]:
        del cases["real_test"]
        warnings.append("the real dataset has no test split: how far two sets of real images are apart is unknown")
    form = _common_form(cases["synthetic"][1], synthetic_data)
    sets = {key: _draw(key, *value, form, max_images, seed) for key, value in cases.items()}
    for key, image_set in sets.items():
        warnings += [f"{NAMES[key]}: {text}" for text in image_set.changes]
        if key.startswith("real") and image_set.channels != form[0]:
            kinds = {1: "grey", 3: "RGB"}
            msg = f"--real has {kinds[image_set.channels]} images, --synthetic {kinds[form[0]]} ones; "
            raise UserError(msg + "give the dataset that the synthetic images were trained on, or prepare with --grey")
    return sets, warnings


def _dataset(folder: str | Path, option: str) -> PreparedDataset:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{option} {path} is not a folder; give one of monai-synth prepare classes or of sampling")
    if not (path / "dataset.json").is_file() and (path / SETTINGS_FILE).is_file():
        msg = f"{option} {path} holds no dataset.json: the run that samples it has not finished; "
        raise UserError(msg + "run the same command again, it goes on where it stopped")
    return read_dataset(path, task="classes")


def _common_form(cases: Sequence[Mapping[str, Any]], dataset: PreparedDataset) -> tuple[int, int, int]:
    """(C, H, W) of the synthetic images."""
    sizes = {_size(case["image"]) for case in cases}
    if len(sizes) > 1:
        shown = ", ".join(f"{h} x {w}" for h, w in sorted(sizes)[:4])
        msg = f"--synthetic has images of {len(sizes)} sizes ({shown}); prepare it with one --size"
        raise UserError(msg)
    if not sizes:
        raise UserError(f"--synthetic {dataset.root} has no image in its training split; sample some")
    return (_channels(dataset), *sizes.pop())


def _draw(
    key: str,
    dataset: PreparedDataset,
    cases: list[dict[str, Any]],
    form: tuple[int, int, int],
    max_images: int,
    seed: int,
) -> ImageSet:
    if len(cases) < 2:
        msg = f"the set {NAMES[key]!r} ({dataset.root}) has {len(cases)} images; 2 or more are needed in each set"
        raise UserError(msg)
    cases = sorted(cases, key=lambda case: str(case["case_id"]))
    num_available = len(cases)
    if num_available > max_images:
        chosen = np.random.default_rng(seed).choice(num_available, max_images, replace=False)
        cases = [cases[i] for i in np.sort(chosen)]
    sizes = Counter(_size(case["image"]) for case in cases)
    for h, w in sizes:
        if abs(h * form[2] / (w * form[1]) - 1) > STRETCH:
            msg = f"the set {NAMES[key]!r} has images of {h} x {w}, the synthetic ones are {form[1]} x {form[2]}: "
            raise UserError(msg + f"resizing would stretch them; prepare it with --size {form[1]} {form[2]}")
    names = {number: name for name, number in dataset.classes.items()}
    return ImageSet(
        key,
        dataset.name,
        dataset.fingerprint,
        num_available,
        tuple(Path(case["image"]) for case in cases),
        tuple(str(case.get("patient_id", case["case_id"])) for case in cases),
        tuple(names.get(case.get("class"), "unknown") for case in cases),
        dict(sizes),
        _channels(dataset),
        form,
    )


def _channels(dataset: PreparedDataset) -> int:
    channels = dataset.content["image_channels"]
    if channels not in (1, 3):
        raise UserError(f"{dataset.root} has images of {channels} channels; fidelity takes grey (1) and RGB (3)")
    return int(channels)


def _size(path: str | Path) -> tuple[int, int]:
    """(H, W) from the head of a PNG."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError) as error:  # PIL's words for a broken PNG
        raise UserError(f"{path} cannot be read ({error}); write the dataset again") from error


def _read(path: Path, form: tuple[int, int, int]) -> np.ndarray:
    image = read_image(path)
    if len(image) == 3 and form[0] == 1:
        image = np.asarray(Image.fromarray(np.moveaxis(image, 0, -1)).convert("L"))[None]
    image = resize_image(image, form[1:])
    return np.repeat(image, 3, axis=0) if len(image) < form[0] else image

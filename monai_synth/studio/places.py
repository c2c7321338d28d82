# SPDX-License-Identifier: Apache-2.0
"""Which bundles have trained files here, and what their models take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_synth.bundle import latest_run, sampling_ckpt_dir
from monai_synth.checkpoint import classifier_file, load_file
from monai_synth.data.datalist import PreparedDataset, read_dataset
from monai_synth.data.semantic import GUIDING_FEATURES
from monai_synth.diffusion import FLOW_SAMPLERS, SAMPLERS, is_flow
from monai_synth.errors import UserError

MAP_BUNDLES = ("lsdm", "spade_gan")  # CT slices from semantic maps
BUNDLES = {
    "lsdm": "CT slices from label maps, with the nodule's features guided (lsdm)",
    "spade_gan": "CT slices from label maps in one call (spade_gan)",
    "jdm": "Images with their masks (jdm)",
    "cfg_ddpm": "Images of a class, with guidance (cfg_ddpm)",
    "fad": "Images of a class, from text (fad)",
}
# Of the trained size, what is offered where the network takes others. Below three quarters the demo model of lsdm
# follows its maps less: Dice of the lung 0.97 at 128, 0.95 at 96, 0.89 at 64, 0.98 at 192 and 256 pixels (n = 12).
SCALES = (1.0, 0.75, 1.25, 1.5, 2.0)
WHY_ONE_SIZE = {
    "spade_gan": "its generator begins with a grid of fixed size",
    "cfg_ddpm": "without a map the network alone decides what is where, which it learned at this size",
    "fad": "without a map the network alone decides what is where, which it learned at this size",
}
OTHER_SIZES = {
    "lsdm": "Trained at the first. The smaller it is, the less fine structures follow the map.",
    "jdm": "Trained at the first. Structures keep their size in pixels, so a larger image shows more of them.",
}


@dataclass(frozen=True)
class Place:
    """A bundle with trained files.

    Attributes:
        bundle: its name.
        ckpt_dir: folder of its trained files.
        contract: what its model was trained with.
        dataset: whose maps are offered; None where there is none.
        features: nodule features with a classifier.
        stride: pixels by which the network's coarsest grid steps; sides are multiples of it.
    """

    bundle: str
    ckpt_dir: Path
    contract: Mapping[str, Any] = field(repr=False)
    dataset: PreparedDataset | None = field(repr=False)
    features: tuple[str, ...] = ()
    stride: int = 1

    @property
    def size(self) -> tuple[int, ...]:
        """S of the images that the model was trained on."""
        return tuple(int(side) for side in self.contract["image_size"])

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """S of the images that it can make, the trained one first, see :data:`WHY_ONE_SIZE`."""
        if self.bundle in WHY_ONE_SIZE:
            return (self.size,)
        scaled = [[side * scale for side in self.size] for scale in SCALES]
        return tuple(tuple(map(int, sides)) for sides in scaled if all(side % self.stride == 0 for side in sides))

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse S that the model cannot make.

        Raises:
            UserError: it is none of `sizes`.
        """
        if tuple(size) not in self.sizes:
            allowed = ", ".join("x".join(map(str, known)) for known in self.sizes)
            raise UserError(f"{self.bundle} makes {allowed} here, not {'x'.join(map(str, size))}")

    @property
    def labels(self) -> dict[str, int]:
        """Name -> value; empty for models of classes."""
        return dict(self.contract.get("labels", {}))

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names that may be chosen, the bundle's default first."""
        if "schedule" not in self.contract:
            return ()
        known = FLOW_SAMPLERS if is_flow(self.contract["schedule"]) else SAMPLERS
        return tuple(sorted(known, key=lambda name: name != "dpm++"))

    @property
    def most_steps(self) -> int:
        """Steps of the training's schedule."""
        return int(self.contract["schedule"]["num_train_timesteps"]) if "schedule" in self.contract else 1

    def cases(self) -> dict[str, dict[str, Any]]:
        """Cases of the dataset that have a map, by "split / id", the test split first."""
        if self.dataset is None or not self.labels:
            return {}
        return {
            f"{split} / {case['case_id']}": dict(case, source=split)
            for split in ("test", "validation", "training")
            for case in self.dataset.datalist(split)
        }


def find_places(
    root: str | Path = "bundles",
    *,
    ckpt_dirs: Mapping[str, str] | None = None,
    dataset_dirs: Mapping[str, str] | None = None,
) -> dict[str, Place]:
    """Bundles with trained files.

    Args:
        root: folder of the bundles, each with ``models``; of each its latest training is taken.
        ckpt_dirs: bundle -> folder of trained files in their stead.
        dataset_dirs: bundle -> prepared dataset whose maps are offered.

    Raises:
        UserError: an unknown bundle; a folder that was named and holds no model; a model of another bundle.
    """
    ckpt_dirs, dataset_dirs = dict(ckpt_dirs or {}), dict(dataset_dirs or {})
    for name in (*ckpt_dirs, *dataset_dirs):
        if name not in BUNDLES:
            raise UserError(f"unknown bundle {name!r}; the studio shows {', '.join(BUNDLES)}")
    places = {}
    for name in BUNDLES:
        home = Path(root).expanduser().absolute() / name
        phantom = str(home / "data" / "phantom")
        latest = latest_run(str(home / "models"), phantom)
        data = dataset_dirs.get(name, latest["dataset_dir"])
        models = Path(ckpt_dirs.get(name) or sampling_ckpt_dir(str(home), data, phantom, latest)).expanduser()
        if not (models / "model.pt").is_file():
            if name in ckpt_dirs:
                raise UserError(f"{models} holds no model.pt; give the folder that {name} was trained into")
            continue
        places[name] = _place(name, models, data if name in dataset_dirs or Path(data).is_dir() else None)
    return places


def _place(name: str, models: Path, dataset_dir: str | None) -> Place:
    path = models / "model.pt"
    content = load_file(path, stage="generator" if name == "spade_gan" else "diffusion")
    contract = content["contract"]
    if contract.get("bundle") != name:
        msg = f"{path} was trained by the bundle {contract.get('bundle')!r}, not by {name!r}"
        raise UserError(f"{msg}; give its folder with --ckpt-dir {contract.get('bundle')}={models}")
    dataset = None if dataset_dir is None else read_dataset(dataset_dir)
    if dataset is not None and "labels" in contract and dataset.labels != contract["labels"]:
        raise UserError(
            f"the dataset {dataset.root} has the labels {list(dataset.labels)}, the model of {name} "
            f"{list(contract['labels'])}; give the model's own with --dataset-dir {name}=DIR"
        )
    features = ()
    if name == "lsdm":
        schedule = contract["schedule"]
        features = tuple(f for f in GUIDING_FEATURES if (models / classifier_file(f, schedule)).is_file())
    args = content["arch"]["args"]
    levels = len(args.get("channels") or args.get("channel_mult") or args.get("block_out_channels") or [1])
    stride = int(contract.get("factor", 1)) * 2 ** (levels - 1)
    return Place(name, models, contract, dataset, features, stride)

# SPDX-License-Identifier: Apache-2.0
"""A bundle that is served: where it lies, what it was trained for, and one sampling run of it.

The run is the bundle's own inference.json, so everything that holds for it (checks, provenance, bits of a seed) holds
here.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow

from monai_synth.bundle import latest_run
from monai_synth.checkpoint import load_file
from monai_synth.errors import UserError
from monai_synth.label.maps import GivenMap, read_made, read_map
from monai_synth.label.parameters import BUNDLES, MAPS, Parameters

_JDM_SAMPLING = ["$export_pairs.sample_pairs(@dataset, @evaluator, @export)", "$@export.finish()"]

_GUIDANCE = {"guidance_scale", "features", "nodule"}


@dataclass(frozen=True)
class Served:
    """A bundle and its trained files.

    Attributes:
        name: under which it is served; lsdm, spade_gan or jdm.
        folder: of the bundle.
        ckpt_dir: of its trained files; None takes those of the last training.
        app_models: where the app's own trainings go; the last finished one of them is taken before ``ckpt_dir``.
    """

    name: str
    folder: Path
    ckpt_dir: Path | None
    app_models: Path

    def models(self) -> Path:
        """Folder of the trained files."""
        own = Path(latest_run(str(self.app_models), "")["ckpt_dir"])
        if (own / "model.pt").is_file():
            return own
        return self.ckpt_dir or Path(latest_run(str(self.folder / "models"), "")["ckpt_dir"])

    def contract(self) -> dict[str, Any]:
        """What the model was trained with.

        Raises:
            UserError: there is no model, or one of another bundle.
        """
        path = self.models() / "model.pt"
        contract = load_file(path, option=f"--conf bundles {self.name}=DIR")["contract"]
        if contract.get("bundle") != self.name:
            msg = f"{path} was trained by the bundle {contract.get('bundle')!r}, this is {self.name!r}"
            raise UserError(f"{msg}; give the right --conf bundles {self.name}=DIR")
        return contract

    def metadata(self) -> dict[str, Any]:
        return json.loads((self.folder / "configs" / "metadata.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Made:
    """A sampled case.

    Attributes:
        image: its file.
        label: the file of its label map, on the same grid.
        provenance: the line that the bundle wrote about it.
        label_names: name -> value.
    """

    image: Path
    label: Path
    provenance: dict[str, Any]
    label_names: dict[str, int]


def served_bundles(conf: Mapping[str, str], app_dir: str | Path) -> dict[str, Served]:
    """The bundles that ``--conf bundles`` names.

    Args:
        conf: of the server: ``bundles`` (NAME or NAME=FOLDER OF TRAINED FILES, with commas), ``bundles_dir``.
        app_dir: of the app.

    Raises:
        UserError: none is named, one is not known or lies nowhere, or its models are not there.
    """
    text = conf.get("bundles", "")
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UserError(f"no bundle is named; give --conf bundles NAME,NAME of {', '.join(BUNDLES)}")
    served: dict[str, Served] = {}
    for part in parts:
        name, _, models = part.partition("=")
        if name not in BUNDLES:
            msg = f"--conf bundles names {name!r}; served can be {', '.join(BUNDLES)}, whose images have a label map"
            raise UserError(f"{msg} to review. Images of classes (cfg_ddpm, fad) are made by `monai-synth studio`")
        if name in served:
            raise UserError(f"--conf bundles names {name!r} twice; name it once")
        if "=" in part and not Path(models).expanduser().is_dir():
            raise UserError(f"--conf bundles {part}: {models!r} is no folder; give one with model.pt")
        ckpt_dir = Path(models).expanduser().absolute() if models else None
        app_models = Path(app_dir).absolute() / "model" / name
        served[name] = Served(name, _bundle_folder(name, conf.get("bundles_dir")), ckpt_dir, app_models)
    return served


def _bundle_folder(name: str, bundles_dir: str | None) -> Path:
    own = Path(__file__).resolve().parents[2] / "bundles"
    places = [Path(bundles_dir).expanduser()] if bundles_dir else [Path("bundles"), own]
    for place in places:
        if (place / name / "configs" / "inference.json").is_file():
            return (place / name).absolute()
    where = " and ".join(str(place) for place in places)
    raise UserError(f"the bundle {name} is not in {where}; give --conf bundles_dir DIR, the folder that holds {name}/")


def sample_case(
    served: Served, parameters: Parameters, *, source: Path | None, source_id: str, out: Path, device: str = "cpu"
) -> Made:
    """Sample one case and write its image and label map to ``out``.

    Args:
        served: the bundle.
        parameters: what is asked for.
        source: file of the map; None for a whole pair.
        source_id: what the provenance calls it.
        out: an empty folder.
        device: where to sample.

    Raises:
        UserError: the map, the models or a parameter cannot be used.
    """
    contract = served.contract()
    labels = {str(k): int(v) for k, v in contract["labels"].items()}
    size = tuple(contract["image_size"])
    options: dict[str, Any] = {}
    given = None
    if parameters.condition is not None:
        if source is None:
            raise UserError("there is no map to sample from; send a file, or name an image of the datastore")
        axial = served.name in MAPS
        given = read_map(
            source, dims=len(size), num_labels=len(labels), axial=axial, slice_index=parameters.slice_index
        )
        if given.labels.shape != size and not parameters.resize_maps:
            got, wanted = ("x".join(map(str, s)) for s in (given.labels.shape, size))
            msg = f"the map is {got}, the model makes {wanted}"
            raise UserError(f'{msg}; give maps of that size, or the parameter "resize_maps": true')
        (out / "map").mkdir()
        given.write_for_model(out / "map" / re.sub(r"[^A-Za-z0-9_-]", "-", source_id)[:80])
        options["resize_maps"] = parameters.resize_maps
        options["label_dir" if axial else "masks"] = str(out / "map")
    if served.name == "lsdm" and not _GUIDANCE & parameters.sampling.keys():
        # A model that was trained on annotated cases has no classifiers; unasked, it samples without guidance.
        options |= {} if any(served.models().glob("classifier_*.pt")) else {"guidance_scale": 0}
    if served.name in MAPS:
        options["image_format"] = "png" if given.ending == ".png" else "nii.gz"
    else:
        options |= {"condition": parameters.condition, "sampling": _JDM_SAMPLING}
    made = _run(served, {**options, **parameters.sampling, "seed": parameters.seed}, out, device)
    return _on_grid(made, given, labels, out)


def _run(served: Served, options: Mapping[str, Any], out: Path, device: str) -> Path:
    """Run the bundle's inference.json for one case; gives the dataset's folder."""
    configs = served.folder / "configs"
    values = {
        **{key: value for key, value in options.items() if value is not None}, "num_samples": 1, "batch_size": 1,
        "ckpt_dir": str(served.models()), "output_dir": str(out / "made"), "device": device,
    }  # fmt: skip
    run_workflow(configs / "inference.json", configs / "metadata.json", "infer", **values)
    return next((out / "made").glob("Dataset*"))


def run_workflow(config: Path, metadata: Path, kind: str, **values: Any) -> None:
    """Run a bundle's config to its end.

    Raises:
        UserError: what the user can mend, out of what the runner wraps it in.
    """
    state, hook = torch.get_rng_state(), sys.excepthook  # a run sets both for its process, which here is the server's
    try:
        workflow = ConfigWorkflow(
            str(config), meta_file=str(metadata), logging_file=False, workflow_type=kind, run_id="run", **values
        )
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise UserError(str(cause)) from error
    finally:
        torch.set_rng_state(state)
        sys.excepthook = hook


def _on_grid(dataset: Path, given: GivenMap | None, labels: dict[str, int], out: Path) -> Made:
    """The case of a dataset of one, on the grid of the given map."""
    provenance = json.loads((dataset / "provenance.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    images = sorted((dataset / "imagesTr").iterdir())
    label = next((dataset / "labelsTr").iterdir())
    if given is None:
        if len(images) > 1:
            raise UserError(f"the model makes {len(images)} files for each image; MONAI Label takes one")
        ending = ".png" if images[0].name.endswith(".png") else ".nii.gz"
        paths = (out / f"image{ending}", out / f"label{ending}")
        for source, path in zip((images[0], label), paths, strict=True):
            shutil.move(source, path)
    else:
        arrays = [read_made(path) for path in images]
        image = arrays[0] if len(arrays) == 1 else np.stack(arrays, axis=-1)
        paths = (out / f"image{given.ending}", out / f"label{given.ending}")
        for path, array in zip(paths, (image, given.labels), strict=True):
            path.write_bytes(given.encode(array))
    return Made(*paths, provenance, labels)

# SPDX-License-Identifier: Apache-2.0
"""The app that MONAI Label serves: its tasks hand requests to the bundles and cases to the datastore.

MONAI Label treats every result as a label of the image that was asked about. Here a result is an image of its own, so
the app answers infer requests itself: nothing is ever saved under the source's name.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.random import Random

from monai_synth import __version__
from monai_synth.errors import UserError
from monai_synth.label.datastore import CaseFolder
from monai_synth.label.parameters import Parameters, read_parameters
from monai_synth.label.served import Made, Served, sample_case, served_bundles
from monai_synth.label.store import add_case, annotated, default_case_id, is_synthetic, safe_case_id, to_review
from monai_synth.label.training import train_on_cases

logger = logging.getLogger(__name__)

MAX_STEPS = 50  # of a request that waits; the server answers nobody else meanwhile


class SynthInferTask(InferTask):
    """What viewers are told about a bundle; the app samples."""

    def __init__(self, served: Served, *, viewer: bool) -> None:
        contract, metadata = served.contract(), served.metadata()
        logger.info(f"{served.name} is served from {served.models()}")
        self.served = served
        self.version = metadata["version"]
        labels = {str(k): int(v) for k, v in contract["labels"].items() if int(v)} if viewer else {}
        config: dict[str, Any] = {"seed": 0}
        if viewer:
            config |= {"return": "label", "add_to_datastore": True}
        super().__init__(
            type=InferType.SEGMENTATION if viewer else InferType.OTHERS,
            labels=labels,  # type: ignore[arg-type]
            dimension=len(contract["image_size"]),
            description=metadata["description"],
            config=config,
        )

    def info(self) -> dict[str, Any]:
        return super().info() | {"version": self.version}

    def get_path(self, validate: bool = True) -> str:
        return str(self.served.models() / "model.pt")

    def is_valid(self) -> bool:
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str | None, dict]:
        raise NotImplementedError("SynthApp.infer samples")


class SynthTrainTask(TrainTask):
    """Trains a bundle on the cases with a final label."""

    def __init__(self, served: Served, app_dir: str) -> None:
        super().__init__(f"trains {served.name} on the cases with a final label")
        self.served, self.app_dir = served, Path(app_dir)

    def config(self) -> dict[str, Any]:
        return {"preset": "demo", "seed": 0}

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        device = usable_device(request.get("device"))
        return train_on_cases(self.served, annotated(datastore), request, app_dir=self.app_dir, device=device)


class ReviewStrategy(Strategy):
    """Offers synthetic cases without a final label, the oldest first."""

    def __init__(self) -> None:
        super().__init__("synthetic cases that wait for review, the oldest first")

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any] | None:
        waiting = to_review(datastore)
        return {"id": waiting[0], "weight": len(waiting)} if waiting else None


class SynthBatch(BatchInferTask):
    """Makes ``num_samples`` cases of each source, or so many pairs, and adds them; those that are there are left."""

    def __call__(self, request: Mapping[str, Any], datastore: Any, infer: Callable) -> dict[str, Any]:
        images: list[str | None] = [None]
        if request.get("condition") != "none":
            found = self.get_images(request, datastore)
            images = sorted(i for i in found if i not in datastore.list_images() or not is_synthetic(datastore, i))
            if not images:
                raise UserError("the datastore has no map to sample from; add images, or name some with images")
        num, first = request.get("num_samples", 1), request.get("seed", 0)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in (num, first)) or num < 1 or first < 0:
            raise UserError(f"num_samples is {num!r} and seed {first!r}; allowed are integers from 1 and from 0")
        limit = request.get("max_batch_size") or 0
        result: dict[str, Any] = {}
        for image in images[:limit] if limit else images:
            for seed in range(first, first + num):
                case_id = default_case_id(request["model"], image, seed)
                if case_id in datastore.list_images():
                    result[case_id] = {"added": False, "there": True}
                    continue
                asked = {k: v for k, v in request.items() if k not in ("images", "num_samples", "case_id")}
                asked |= {"image": image or "none", "seed": seed, "add_to_datastore": True, "case_id": case_id}
                try:
                    made = infer(asked, datastore)
                    Path(made["file"]).unlink(missing_ok=True)
                    result[case_id] = {"added": True, "seed": seed}
                except HTTPException as error:
                    logger.warning(f"{case_id} was not made: {error.detail}")
                    result[case_id] = {"added": False, "error": error.detail}
        errors = [entry["error"] for entry in result.values() if "error" in entry]
        if errors and len(errors) == len(result):
            raise UserError(f"none of {len(result)} cases was made; the first: {errors[0]}")
        return result


class SynthApp(MONAILabelApp):
    """Serves the bundles that ``--conf bundles`` names.

    Further ``--conf``: ``bundles_dir`` (where their folders lie), ``viewer true`` (models are of type segmentation and
    answer with the label, so that 3D Slicer offers them and shows what comes back; the case goes into the datastore),
    ``max_steps`` (most steps of a request that waits).

    Args:
        app_dir: folder of main.py; trained models go to its model/.
        studies: folder of the datastore.
        conf: of the server.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.served = served_bundles(conf, app_dir)
        self.viewer = str(conf.get("viewer", "false")).lower() == "true"
        steps = str(conf.get("max_steps", MAX_STEPS))
        if not steps.isdecimal() or int(steps) < 1:
            raise UserError(f"--conf max_steps is {steps!r}; give a whole number from 1")
        self.max_steps = int(steps)
        names = dict.fromkeys(n for s in self.served.values() for n, v in s.contract()["labels"].items() if int(v))
        super().__init__(
            app_dir, studies, conf, name="monai_synth", version=__version__, labels=list(names),
            description="Synthesizes labelled images: from semantic maps or masks, or image and mask together",
        )  # fmt: skip

    def on_init_complete(self) -> None:
        """Once, in the server itself: answer 400 where the params of a request are no JSON, which MONAI Label does not.

        Its stack of handlers is built before an app is there, so it is built again.
        """
        super().on_init_complete()
        from monailabel.app import app as server

        async def tell(request: Request, error: json.JSONDecodeError) -> JSONResponse:
            return JSONResponse({"detail": f"params are no JSON ({error}); give an object as {{}}"}, status_code=400)

        server.add_exception_handler(json.JSONDecodeError, tell)
        server.middleware_stack = None

    def init_datastore(self) -> Datastore:
        """That of a folder is ours, which takes no file that it should not."""
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return CaseFolder(
            self.studies,
            extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, InferTask]:
        return {name: SynthInferTask(served, viewer=self.viewer) for name, served in self.served.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        return {name: SynthTrainTask(served, self.app_dir) for name, served in self.served.items()}

    def init_strategies(self) -> dict[str, Strategy]:
        return {"synthetic": ReviewStrategy(), "random": Random()}

    def init_batch_infer(self) -> Callable:
        return SynthBatch()

    def infer(self, request: Mapping[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Sample one case.

        Raises:
            HTTPException: 400 with one message for what the caller can mend.
        """
        return _answered(lambda: self._infer(dict(request), datastore or self.datastore()))

    def train(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Train a bundle; see `SynthTrainTask`."""

        def action() -> dict[str, Any]:
            self._known(request, "train")
            return super(SynthApp, self).train(request)

        return _answered(action)

    def batch_infer(self, request: Mapping[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Make many cases; see `SynthBatch`."""
        store = datastore or self.datastore()

        def infer(asked: Mapping[str, Any], to: Any) -> dict[str, Any]:
            return _answered(lambda: self._infer(dict(asked), to, in_batch=True))

        def action() -> dict[str, Any]:
            self._known(request, "batch")
            return self._batch_infer(request, store, infer)

        return _answered(action)

    def next_sample(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The next case; without a strategy one for review."""
        return super().next_sample({**request, "strategy": request.get("strategy") or "synthetic"})

    def _known(self, request: Mapping[str, Any], what: str) -> Served:
        model = request.get("model")
        if model not in self.served:
            raise UserError(f"there is no model {str(model)[:80]!r} to {what}; served are {', '.join(self.served)}")
        return self.served[str(model)]

    def _infer(self, request: dict[str, Any], datastore: Any, *, in_batch: bool = False) -> dict[str, Any]:
        served = self._known(request, "infer")
        task = self._infers[served.name]
        parameters = read_parameters(
            {**task.config(), **request}, served.name, max_steps=None if in_batch else self.max_steps
        )
        source, source_id = self._source(request, parameters, datastore)
        case_id = (
            safe_case_id(parameters.case_id)
            if parameters.case_id
            else default_case_id(served.name, source_id, parameters.seed)
        )
        if parameters.add and case_id in datastore.list_images():
            raise UserError(f"the datastore has a case {case_id!r} already; give another case_id, or another seed")
        device = usable_device(request.get("device"))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            made = sample_case(served, parameters, source=source, source_id=source_id or "map", out=out, device=device)
            if parameters.add:
                add_case(datastore, case_id, made, tag=parameters.label_tag, model=served.name)
            file = _kept(made, parameters.returned)
        answer = {
            "label_names": made.label_names, "synthetic": made.provenance, "case_id": case_id, "added": parameters.add,
        }  # fmt: skip
        return {"label": file, "tag": parameters.label_tag, "file": file, "params": answer}

    def _source(
        self, request: Mapping[str, Any], parameters: Parameters, datastore: Any
    ) -> tuple[Path | None, str | None]:
        """File of the map and what to call it: a second file that was sent, one that was sent, or one of a case."""
        if parameters.condition is None:
            return None, None
        image = request.get("image")
        if not isinstance(image, str) or not image:
            raise UserError("image names no case; give ?image=ID, or send a file")
        if label := request.get("label"):
            return _sent(label), "drawn"
        if image in datastore.list_images():
            tag = parameters.source_tag
            path = datastore.get_label_uri(image, tag) if tag else datastore.get_image_uri(image)
            if not path:
                tags = ", ".join(datastore.get_labels_by_image_id(image)) or "none"
                raise UserError(f"case {image!r} has no label with the tag {tag!r}; it has {tags}")
            return Path(path), image
        return _sent(image), "sent"


def usable_device(device: Any) -> str:
    """The device asked for where it is there, else the CPU: viewers ask for "cuda" unseen."""
    if isinstance(device, str) and device.startswith("cuda") and torch.cuda.is_available():
        return device if ":" in device else "cuda:0"
    return "cpu"


def _sent(path: Any) -> Path:
    """A file that came with the request: MONAI Label puts it into the temporary folder, or into a session's.

    Raises:
        UserError: it is neither a case of the datastore nor such a file; requests may name any path.
    """
    sessions = settings.MONAI_LABEL_SESSION_PATH or os.path.join(Path.home(), ".cache", "monailabel", "sessions")
    file = Path(str(path)).resolve()
    inside = file.parent == Path(tempfile.gettempdir()).resolve() or Path(sessions).resolve() in file.parents
    if not inside or not file.is_file():
        raise UserError(f"there is no image {str(path)[:80]!r} in the datastore; GET /datastore/image lists none of it")
    return file


def _kept(made: Made, which: str) -> str:
    """A copy of the image or the label that outlives the request; MONAI Label removes it after the answer."""
    source = made.image if which == "image" else made.label
    ending = ".png" if source.name.endswith(".png") else ".nii.gz"
    handle, path = tempfile.mkstemp(suffix=ending)
    os.close(handle)
    shutil.copyfile(source, path)
    return path


def _answered(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return action()
    except UserError as error:
        logger.warning(f"refused: {error}")
        raise HTTPException(status_code=400, detail=str(error)) from error

# SPDX-License-Identifier: Apache-2.0
"""The studio's state: models that all users share, and per user a folder, a map, what was made and what is read."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from monai_synth.data.pair_files import read_image, resize_image
from monai_synth.errors import UserError
from monai_synth.inference.cases import read_label_file
from monai_synth.inference.model import LSDMModel, OneFileModel, load_lsdm, load_model
from monai_synth.studio import maps, uploads
from monai_synth.studio.jobs import Drawing, Request, make_job
from monai_synth.studio.places import MAP_BUNDLES, Place
from monai_synth.studio.reading import Case, Reading
from monai_synth.studio.runs import CancelledError, Progress, Run, run_job

MOST_MODELS = 3  # kept in memory
MOST_CASES = 200  # of a dataset that are offered to readers


@dataclass
class Session:
    """What one user did.

    Attributes:
        folder: of this user alone; its name cannot be guessed.
        drawings: bundle -> its map.
        pictures: bundle -> image whose mask is wanted, uint8 (C, H, W).
        sizes: bundle -> S of what is to be made; the trained one where none was chosen.
        runs: bundle -> what was made last.
        reading: cases that are being read.
        mark: (row, column) that the reader marked.
        closed: the user is gone; nothing of it may stay.
    """

    folder: Path
    drawings: dict[str, Drawing] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    reading: Reading | None = None
    mark: tuple[float, float] | None = None
    closed: bool = False
    _cancel: threading.Event = field(default_factory=threading.Event)
    _busy: bool = False
    _has_turn: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Reserve the session for a sampling that will come.

        Raises:
            UserError: one is waiting or running.
        """
        with self._lock:
            if self._busy:
                raise UserError("a generation of yours is waiting or running; wait for it, or cancel it")
            self._busy = self._has_turn = True
            self._cancel.clear()

    def take_turn(self) -> bool:
        """Whether `begin` was passed and nothing was sampled for it yet; true once."""
        with self._lock:
            had, self._has_turn = self._has_turn, False
            return had

    def cancel(self) -> bool:
        """Stop what is waiting or running, at its next step; False where nothing is."""
        self._cancel.set()
        return self._busy

    def end(self) -> None:
        """Release the session."""
        self._busy = False


class Studio:
    """Models and sessions.

    Args:
        places: bundles with trained files.
        work_dir: the only folder that is written to.
        device: "cpu" or "cuda".
    """

    def __init__(self, places: Mapping[str, Place], work_dir: Path, *, device: str = "cpu") -> None:
        self.places, self.work_dir, self.device = dict(places), Path(work_dir), device
        self._sessions: dict[str, Session] = {}
        self._models: OrderedDict[tuple, LSDMModel | OneFileModel] = OrderedDict()
        self._sampling = threading.Lock()
        self._guard = threading.Lock()

    # Sessions

    def session(self, key: str) -> Session:
        """The session of a user, made when first asked for."""
        with self._guard:
            if key not in self._sessions:
                folder = self.work_dir / f"session-{secrets.token_hex(16)}"
                folder.mkdir(parents=True)
                self._sessions[key] = Session(folder)
            return self._sessions[key]

    def known(self, key: str) -> Session | None:
        """The session of a user who is still there."""
        with self._guard:
            return self._sessions.get(key)

    def close(self, key: str) -> None:
        """End a session whose user is gone: what runs stops, its files are removed."""
        with self._guard:
            session = self._sessions.pop(key, None)
        if session is not None:
            session.closed = True
            session.cancel()
            shutil.rmtree(session.folder, ignore_errors=True)

    def close_all(self) -> None:
        """End all sessions."""
        for key in list(self._sessions):
            self.close(key)

    # Maps

    def colours(self, bundle: str) -> np.ndarray:
        """A colour for each label of a bundle."""
        return maps.colours_of(self.places[bundle].labels)

    def take_case(self, session: Session, bundle: str, name: str) -> Drawing:
        """Take a map of the dataset.

        Raises:
            UserError: no such case.
        """
        place = self.places[bundle]
        case = _case_of(place, name)
        session.drawings[bundle] = self._of_case(place, case, self.size(session, bundle))
        return session.drawings[bundle]

    def _of_case(self, place: Place, case: Mapping, size: tuple[int, ...]) -> Drawing:
        array = read_label_file(case["label"])
        label = uploads.fitted(array, place.labels, size)
        spacing = _rescaled(case.get("spacing", (1.0, 1.0)), array.shape, size)
        return Drawing(label, case["source"], case if place.bundle != "jdm" else None, spacing)

    def size(self, session: Session, bundle: str) -> tuple[int, ...]:
        """S of what the session makes."""
        return session.sizes.get(bundle, self.places[bundle].size)

    def take_size(self, session: Session, bundle: str, size: tuple[int, ...]) -> None:
        """Make images of another size from now on; the map is resized, as the bundle resizes its own.

        Raises:
            UserError: the model cannot make it.
        """
        place = self.places[bundle]
        place.check_size(size)
        before = session.drawings.get(bundle)
        if before is not None and before.label.shape != tuple(size):
            if before.case is not None:
                session.drawings[bundle] = self._of_case(place, before.case, tuple(size))
            else:
                label = uploads.fitted(before.label, place.labels, size)
                spacing = _rescaled(before.spacing, before.label.shape, size) if before.spacing else None
                session.drawings[bundle] = replace(before, label=label, spacing=spacing)
        session.sizes[bundle] = tuple(size)

    def take_upload(self, session: Session, bundle: str, path: str | Path, *, resize: bool) -> Drawing:
        """Take an uploaded map.

        Raises:
            UserError: see `monai_synth.studio.uploads.read_map`.
        """
        place = self.places[bundle]
        label = uploads.read_map(
            path, session.folder, labels=place.labels, size=self.size(session, bundle), resize=resize
        )
        session.drawings[bundle] = Drawing(label, "upload")
        return session.drawings[bundle]

    def take_picture(self, session: Session, bundle: str, path: str | Path, *, resize: bool) -> np.ndarray:
        """Take an uploaded image, whose mask is wanted, uint8 (C, H, W).

        Raises:
            UserError: see `monai_synth.studio.uploads.read_picture`.
        """
        channels, size = int(self.places[bundle].contract["image_channels"]), self.size(session, bundle)
        image = uploads.read_picture(path, session.folder, channels=channels, size=size, resize=resize)
        session.pictures[bundle] = image
        return image

    def take_case_picture(self, session: Session, bundle: str, name: str) -> np.ndarray:
        """Take an image of the dataset, whose mask is wanted, uint8 (C, H, W).

        Raises:
            UserError: no such case.
        """
        place = self.places[bundle]
        image = read_image(_case_of(place, name)["image"])
        session.pictures[bundle] = resize_image(image, self.size(session, bundle))
        return session.pictures[bundle]

    def take_drawn(self, session: Session, bundle: str, label: np.ndarray) -> Drawing:
        """Take what was drawn, uint8 (H, W); a map on which nothing was drawn stays what it was."""
        before = self.drawing(session, bundle)
        if not np.array_equal(label, before.label):
            session.drawings[bundle] = Drawing(label, "drawing", None, before.spacing)
        return session.drawings[bundle]

    def stamp(
        self, session: Session, bundle: str, label_name: str, *, row: float, column: float, diameter: float
    ) -> Drawing:
        """Put a disc of a label onto the map.

        Raises:
            UserError: an unknown label, or see `monai_synth.studio.maps.stamp`.
        """
        place = self.places[bundle]
        if label_name not in place.labels:
            raise UserError(f"{label_name!r} is no label of {bundle}; its labels are {', '.join(place.labels)}")
        label = maps.stamp(self.drawing(session, bundle).label, place.labels[label_name], (row, column), diameter)
        return self.take_drawn(session, bundle, label)

    def drawing(self, session: Session, bundle: str) -> Drawing:
        """The map of a bundle; empty at first."""
        if bundle not in session.drawings:
            session.drawings[bundle] = Drawing(np.zeros(self.size(session, bundle), np.uint8))
        return session.drawings[bundle]

    # Sampling

    def model(self, bundle: str, request: Request) -> LSDMModel | OneFileModel:
        """The loaded files of a bundle; the last few are kept.

        Raises:
            UserError: files that are missing, damaged or do not fit each other.
        """
        place = self.places[bundle]
        guided = bundle == "lsdm" and request.guidance_scale != 0
        unknown = sorted(set(request.targets) - set(place.features)) if guided else []
        if unknown:
            raise UserError(f"no classifier of {unknown[0]} is there; the features of this model are {place.features}")
        features = place.features if guided else ()
        precision = "float32" if bundle == "spade_gan" else request.precision
        key = (bundle, features, precision)
        if key not in self._models:
            if bundle == "lsdm":
                options = {"features": features, "precision": precision}
                self._models[key] = load_lsdm(place.ckpt_dir, device=self.device, **options)
            else:
                stage = "generator" if bundle == "spade_gan" else "diffusion"
                self._models[key] = load_model(
                    bundle, place.ckpt_dir, device=self.device, stage=stage, precision=precision
                )
        self._models.move_to_end(key)
        while len(self._models) > MOST_MODELS:
            self._models.popitem(last=False)
        return self._models[key]

    def generate(
        self,
        session: Session,
        bundle: str,
        request: Request,
        *,
        given: str = "map",
        progress: Progress | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> Run:
        """Sample; users take turns. Call `Session.begin` first.

        Args:
            session: the user's.
            bundle: which.
            request: what is asked for.
            given: what the model gets of the session: its "map", of jdm also its "image" or "nothing"; models of
                classes take none of them.
            progress: called with (done, in all) after each step.
            waiting: called before the user's turn is waited for.

        Raises:
            CancelledError: the user cancelled, or left.
            UserError: what the bundle's own sampling refuses.
        """
        try:
            if waiting is not None:
                waiting()
            with self._sampling:
                if session._cancel.is_set():
                    raise CancelledError
                place = self.places[bundle]
                drawing = self.drawing(session, bundle) if given == "map" and place.labels else None
                image = self._picture(session, bundle) if given == "image" else None
                request = replace(request, size=self.size(session, bundle))
                job = make_job(place, self.model(bundle, request), request, session.folder, drawing, image)
                run = run_job(place, job, device=self.device, progress=progress, cancel=session._cancel)
                session.runs[bundle] = run
                return run
        finally:
            session.end()
            if session.closed:
                shutil.rmtree(session.folder, ignore_errors=True)

    def _picture(self, session: Session, bundle: str) -> np.ndarray:
        if bundle not in session.pictures:
            raise UserError("there is no image yet; upload one, or take one of the dataset")
        return resize_image(session.pictures[bundle], self.size(session, bundle))

    # Reading

    def start_reading(self, session: Session, bundle: str, source: str, seed: int = 0) -> Reading:
        """Begin to read cases.

        Args:
            session: the user's.
            bundle: whose images.
            source: "generated", "dataset" or "both".
            seed: of their order.

        Raises:
            UserError: another source, or no case.
        """
        place = self.places[bundle]
        if source not in ("generated", "dataset", "both") or not place.labels:
            raise UserError(f"cannot read {source!r} of {bundle}; allowed are generated, dataset and both")
        malignancies = bundle in MAP_BUNDLES
        cases = []
        if source != "dataset" and bundle in session.runs:
            cases += [Case(s.case_id, s.image, s.label, True, malignancies) for s in session.runs[bundle].samples()]
        if source != "generated":
            known = [case for case in place.cases().values() if case["source"] == "test"][:MOST_CASES]
            cases += [self._real(place, case, malignancies) for case in known]
        session.reading, session.mark = Reading(cases, seed), None
        return session.reading

    def _real(self, place: Place, case: Mapping, malignancies: bool) -> Case:
        image, label = uploads.read_pair(case, place.labels, place.size)
        return Case(case["case_id"], image, label, False, malignancies)


def _case_of(place: Place, name: str) -> Mapping[str, Any]:
    case = place.cases().get(name)
    if case is None:
        raise UserError(f"{name!r} is no case of the dataset of {place.bundle}; choose one of the list")
    return case


def _rescaled(spacing: Sequence[float], before: Sequence[int], size: Sequence[int]) -> list[float]:
    """mm of a pixel once an array of shape ``before`` has another size."""
    return [mm * a / b for mm, a, b in zip(spacing, before, size, strict=True)]

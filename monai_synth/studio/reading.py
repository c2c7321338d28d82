# SPDX-License-Identifier: Apache-2.0
"""Training of readers: a case is shown without its map, the reader marks and rates, then the truth is told and scored.

The truth stays on the server until the reader has answered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import ndimage

from monai_synth.data.semantic import LABELS
from monai_synth.data.slices import NODULE_LABEL_MIN
from monai_synth.errors import UserError

NEAR = 3.0  # pixels from a nodule's rim at which a mark still hits: small nodules are hard to click
_GRADES = {1: "benign", 2: "benign", 3: "indeterminate", 4: "malignant", 5: "malignant"}


@dataclass(frozen=True)
class Case:
    """A case to read.

    Attributes:
        name: shown with the truth only, as ids of synthetic cases tell that they are.
        image: uint8 (H, W) or (H, W, 3).
        label: uint8 (H, W).
        synthetic: whether a model made it.
        malignancies: from 5 on, the nodule labels tell malignancy; False for masks of other things.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    synthetic: bool
    malignancies: bool = True

    @property
    def target(self) -> np.ndarray:
        """Where what is to be found is, bool (H, W)."""
        return self.label >= (NODULE_LABEL_MIN if self.malignancies else 1)


@dataclass(frozen=True)
class Answer:
    """A reader's answer and its score.

    Attributes:
        present: whether the case has something to find.
        marked: whether the reader marked something.
        hit: the mark lies on or near it.
        distance: from the mark to the nearest pixel of it, in pixels; None without both.
        rating: the reader's, 1 to 5; None without a mark.
        truth: "benign", "indeterminate" or "malignant" of what was hit; None where not known.
        rating_fits: whether the rating says the same: 1 and 2 benign, 3 indeterminate, 4 and 5 malignant.
    """

    present: bool
    marked: bool
    hit: bool
    distance: float | None
    rating: int | None
    truth: str | None
    rating_fits: bool | None

    def text(self) -> str:
        """For the reader."""
        if not self.present:
            return "Wrong: there is none in this case." if self.marked else "Right: there is none in this case."
        if not self.marked:
            return "Missed: there is one, outlined in the picture."
        if not self.hit:
            return f"Missed: your mark is {self.distance:.0f} pixels away from the nearest one."
        if self.truth is None:
            return "Right: your mark hits."
        fits = "which your rating says too" if self.rating_fits else f"you rated {self.rating} of 5"
        return f"Right: your mark hits. It is {self.truth}, {fits}."


def score(case: Case, mark: tuple[float, float] | None, rating: int | None) -> Answer:
    """Score an answer.

    Args:
        case: what was shown.
        mark: (row, column) in pixels of the case; None says that there is none.
        rating: malignancy from 1 to 5, needed with a mark where the case tells malignancy.

    Raises:
        UserError: a mark outside the picture, or no such rating.
    """
    target = case.target
    present = bool(target.any())
    if mark is None:
        return Answer(present, False, False, None, None, None, None)
    if not all(0 <= place < side for place, side in zip(mark, target.shape, strict=True)):
        raise UserError(
            f"the mark {mark} lies outside the picture of {target.shape[0]} rows and {target.shape[1]} columns; "
            "mark a place within it"
        )
    if case.malignancies and (isinstance(rating, bool) or rating not in _GRADES):
        raise UserError(f"the rating is {rating!r}; rate from 1 (surely benign) to 5 (surely malignant)")
    if not present:
        return Answer(False, True, False, None, rating, None, None)
    distances, (rows, columns) = ndimage.distance_transform_edt(~target, return_indices=True)
    place = (int(mark[0]), int(mark[1]))
    distance = float(distances[place])
    hit = distance <= NEAR
    truth = fits = None
    if hit and case.malignancies:
        value = int(case.label[rows[place], columns[place]])
        truth = next(name for name, number in LABELS.items() if number == value).removeprefix("nodule_")
        fits = _GRADES[rating] == truth
    return Answer(True, True, hit, distance, rating, truth, fits)


@dataclass
class Reading:
    """A reader's session.

    Args:
        cases: to be shown; their order is drawn by ``seed``.
        seed: of the order.

    Raises:
        UserError: there is no case.
    """

    cases: Sequence[Case]
    seed: int = 0
    answers: list[tuple[Case, Answer]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.cases:
            raise UserError("there is no case to read; generate some images with maps, or give a dataset")
        self.cases = list(self.cases)
        random.Random(self.seed).shuffle(self.cases)

    @property
    def current(self) -> Case | None:
        """The case that is to be answered; None when all are."""
        return self.cases[len(self.answers)] if len(self.answers) < len(self.cases) else None

    def answer(self, mark: tuple[float, float] | None, rating: int | None) -> tuple[Case, Answer]:
        """Score the answer to the current case, which may be given once.

        Raises:
            UserError: all cases are answered, or see :func:`score`.
        """
        case = self.current
        if case is None:
            raise UserError("all cases are answered; start again")
        self.answers.append((case, score(case, mark, rating)))
        return self.answers[-1]

    def totals(self) -> dict[str, Any]:
        """Counts, by what was there and what was answered; shares are None where nothing can be counted."""
        given = [answer for _, answer in self.answers]
        present = [answer for answer in given if answer.present]
        absent = [answer for answer in given if not answer.present]
        rated = [answer for answer in given if answer.rating_fits is not None]
        return {
            "num_read": len(given),
            "num_cases": len(self.cases),
            "num_present": len(present),
            "num_found": sum(answer.hit for answer in present),
            "num_absent": len(absent),
            "num_false_alarms": sum(answer.marked for answer in absent),
            "num_rated": len(rated),
            "num_rated_right": sum(bool(answer.rating_fits) for answer in rated),
        }

# SPDX-License-Identifier: Apache-2.0
"""The three sets of the memorization audit: which images are compared, and which held-out ones tell nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from monai_synth.errors import UserError
from monai_synth.evaluate.case_sets import CaseSet, read_case_set

LARGEST = 256  # longer side of images by default: what is lost above tells no patients apart
SMALLEST = 16


def read_sets(
    train: str, heldout: str | None, synthetic: str, *, max_heldout: int, seed: int
) -> tuple[CaseSet, CaseSet, CaseSet, list[str]]:
    """Training, held-out and synthetic set, and what a reader must know of them.

    Raises:
        UserError: see `read_case_set`; the same folder twice; other channels; no held-out images.
    """
    notes: list[str] = []
    paths = [Path(p).expanduser().resolve() for p in (train, synthetic, *([heldout] if heldout else []))]
    names = ("--train", "--synthetic", "--heldout")
    for i, first in enumerate(paths):
        for j in range(i + 1, len(paths)):
            if first == paths[j]:
                hint = "; leave --heldout out to take its test split" if names[j] == "--heldout" and i == 0 else ""
                raise UserError(f"{names[i]} and {names[j]} are both {first}, three different sets are needed{hint}")
    training = read_case_set(train, option="--train")
    made = read_case_set(synthetic, option="--synthetic")
    if heldout is not None:
        held = read_case_set(heldout, option="--heldout", max_cases=max_heldout, seed=seed)
    else:
        held = _split_of(train, training, max_heldout, seed, notes)
    if not made.synthetic and made.form != "plain":
        notes.append("the folder given as --synthetic does not say that its images are synthetic")
    for name, cases in (("--train", training), ("--heldout", held)):
        if cases.synthetic:
            notes.append(f"the folder given as {name} says that its images are synthetic")
        if cases.channels != made.channels:
            kinds = {1: "grey", 3: "RGB"}
            msg = f"{name} has {kinds[cases.channels]} images, --synthetic {kinds[made.channels]} ones; "
            raise UserError(msg + "give the dataset that the model was trained on, or prepare with --grey")
    return training, held, made, notes


def _split_of(folder: str, training: CaseSet, max_heldout: int, seed: int, notes: list[str]) -> CaseSet:
    if training.form != "prepared":
        raise UserError(f"--train {training.root} has no splits, so --heldout is needed: real images of other patients")
    for split in ("test", "validation"):
        try:
            held = read_case_set(folder, option="--train", split=split, max_cases=max_heldout, seed=seed)
        except UserError as error:
            if "has no case" in str(error) or "needed are 2 or more" in str(error):
                continue
            raise
        notes.append(f"--heldout is not given: the {split} split of --train is taken ({len(held)} images)")
        return held
    raise UserError(f"--train {training.root} has no test or validation split of 2 images or more; give --heldout")


def common_size(
    train: CaseSet, held: CaseSet, synthetic: CaseSet, size: Sequence[int] | None
) -> tuple[tuple[int, int], bool]:
    """(H, W) at which images are compared, and whether any is resized for it.

    Raises:
        UserError: the sets have different sizes and none is given, or the size is too small.
    """
    sets = {"--train": train, "--heldout": held, "--synthetic": synthetic}
    if size is not None:
        height, width = (int(size[0]), int(size[-1]))
        chosen = (height, width)
    else:
        kinds = {name: sorted(s.sizes) for name, s in sets.items()}
        if len({s for many in kinds.values() for s in many}) > 1:
            shown = ", ".join(
                f"{name} {' and '.join(f'{h} x {w}' for h, w in many[:3])}" + (" and others" if len(many) > 3 else "")
                for name, many in kinds.items()
            )
            raise UserError(f"the images have different sizes ({shown}); bring all to one with --size, e.g. --size 256")
        height, width = synthetic.size
        scale = min(1.0, LARGEST / max(height, width))
        chosen = (round(height * scale), round(width * scale))
    if min(chosen) < SMALLEST:
        raise UserError(
            f"images of {chosen[0]} x {chosen[1]} are too small, needed are {SMALLEST} pixels or more a side"
        )
    return chosen, any(s != chosen for many in sets.values() for s in many.sizes)


def without_training_patients(train: CaseSet, held: CaseSet, notes: list[str]) -> CaseSet:
    """Held-out images of patients who are not in training: only they show how much other patients resemble.

    Raises:
        UserError: fewer than 2 are left.
    """
    known = {case.patient_id for case in train.cases}
    trained = {case.patient_id: case.patient_id == case.case_id for case in train.cases}
    # an id that is only the case's own name says nothing of the patient where both sets name files alike
    same = [
        i
        for i, case in enumerate(held.cases)
        if case.patient_id in known and not (trained[case.patient_id] and case.patient_id == case.case_id)
    ]
    if not same:
        return held
    patients = {held.cases[i].patient_id for i in same}
    left = [i for i in range(len(held)) if i not in set(same)]
    if len(left) < 2:
        msg = (
            f"{len(same)} of {len(held)} held-out images are of patients who are in training too, so they do not show "
            "how much other patients resemble them; give images of other patients as --heldout"
        )
        raise UserError(msg)
    notes.append(f"{len(same)} held-out images of {len(patients)} patients who are in training too are left out")
    return held.subset(left)

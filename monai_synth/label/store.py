# SPDX-License-Identifier: Apache-2.0
"""Synthetic cases in a MONAI Label datastore: an image of its own, its label, and in both what they were made by.

A case is reviewed where its label has the tag ``original`` and none is ``final``: viewers show the one and submit the
other.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from monai_synth.errors import UserError
from monai_synth.export.nnunet import sanitize_case_id
from monai_synth.label.served import Made

SYNTHETIC = "synthetic"  # key of an image's info
MAX_NAME = 200  # bytes; file systems take 255, and endings come after it


def safe_case_id(text: str) -> str:
    """A name that is a file name on every system, without a dot, by which datastores part names from endings.

    Raises:
        UserError: the text is empty.
    """
    safe = sanitize_case_id(text)
    if "." not in safe:
        return safe
    return f"{safe.replace('.', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_file_name(what: str, text: Any) -> None:
    """Check that a text is the name of a file in a folder and nothing else, spaces and dots inside it allowed.

    Raises:
        UserError: it is empty, longer than `MAX_NAME` bytes, begins with a dot, or leads elsewhere.
    """
    if (
        not isinstance(text, str)
        or not 0 < len(text.encode("utf-8", "replace")) <= MAX_NAME
        or text.startswith(".")
        or not text.isprintable()
        or re.search(r'[/\\:*?"<>|]', text)
    ):
        msg = f"{what} is {str(text)[:80]!r}; give 1 to {MAX_NAME} letters, digits, spaces, '.', '_' or '-'"
        raise UserError(f"{msg}, not beginning with a dot")


def default_case_id(bundle: str, source_id: str | None, seed: int) -> str:
    """Name of a case that was given none."""
    return safe_case_id(f"{SYNTHETIC}_{bundle}{'_' + source_id if source_id else ''}_s{seed:06d}")


def is_synthetic(datastore: Any, image_id: str) -> bool:
    """Whether this app made an image."""
    return SYNTHETIC in datastore.get_image_info(image_id)


def add_case(datastore: Any, case_id: str, made: Made, *, tag: str, model: str) -> None:
    """Put a case into the datastore.

    Raises:
        UserError: it has a case of this name, or takes no images.
    """
    if case_id in datastore.list_images():
        raise UserError(f"the datastore has a case {case_id!r} already; give another case_id, or another seed")
    record = {SYNTHETIC: made.provenance, "model": model, "label_names": made.label_names}
    try:
        datastore.add_image(case_id, str(made.image), dict(record))
    except NotImplementedError as error:
        raise UserError("this datastore takes no new images; use a folder for --studies") from error
    label_info = [{"name": name, "idx": value} for name, value in made.label_names.items() if value]
    info = {**record, "label_info": label_info, "params": {"label_names": made.label_names}}
    try:
        datastore.save_label(case_id, str(made.label), tag, info)
    except BaseException:
        datastore.remove_image(case_id)  # never an image without its label
        raise


def to_review(datastore: Any) -> list[str]:
    """Synthetic cases without a final label, the oldest first."""
    waiting = [image for image in datastore.get_unlabeled_images() if is_synthetic(datastore, image)]
    return sorted(waiting, key=lambda image: (datastore.get_image_info(image).get("ts", 0), image))


def annotated(datastore: Any) -> list[tuple[str, Path, Path]]:
    """Id, image and label of every case with a final label."""
    cases = []
    for image in sorted(datastore.get_labeled_images()):
        files = Path(datastore.get_image_uri(image)), Path(datastore.get_label_uri(image, "final"))
        if all(file.is_file() for file in files):
            cases.append((image, *files))
    return cases

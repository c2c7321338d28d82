# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, and that nothing in it is more than plain numbers and words.

A bundle's config evaluates texts that begin with ``$`` as Python, so a request must never bring one into it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from monai_synth.checks import whole
from monai_synth.errors import UserError
from monai_synth.inference.cases import check_targets

BUNDLES = ("lsdm", "spade_gan", "jdm")
MAPS = ("lsdm", "spade_gan")  # CT slices from semantic maps; jdm makes pictures or volumes from masks, or whole pairs

# Keys of a bundle's inference.json that a request may set.
_SAMPLING = {
    "lsdm": ("sampler", "num_steps", "features", "shared_classifier", "guidance_scale", "guidance_interval", "nodule"),
    "spade_gan": (),
    "jdm": ("sampler", "num_steps", "clip", "resample", "gradient_scale", "num_ensemble", "filters", "max_attempts"),
}
_OWN = (
    "seed", "resize_maps", "slice", "condition", "source_tag", "return", "add_to_datastore", "case_id", "label_tag",
    "num_samples",
)  # fmt: skip
# What MONAI Label and its viewers put into a request.
_THEIRS = re.compile(
    r"model|image|label|labels|device|description|session|save_label|logging|latencies|timeout|images|multi_gpu|gpus|"
    r"max_workers|max_batch_size|client_id|_id|_image_id|result_\w+"
)
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,49}")
_USUAL_STEPS = 20  # of jdm, the one bundle that repeats steps
_SWITCHES = ("resize_maps", "add_to_datastore", "clip", "shared_classifier")


@dataclass(frozen=True)
class Parameters:
    """A checked request.

    Attributes:
        seed: of the first image.
        sampling: config values of the bundle.
        condition: "mask" or None, which is a whole pair without a source.
        resize_maps: bring maps of another size to the model's, and the image back.
        slice_index: slice of a volume, for models of pictures.
        source_tag: take the stored label of the image with this tag as the map; None takes the image itself.
        returned: "image" or "label".
        add: put the case into the datastore.
        case_id: name for it; None makes one.
        label_tag: its label's tag.
        num_samples: images for each source, in a batch.
    """

    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)
    condition: str | None = "mask"
    resize_maps: bool = False
    slice_index: int | None = None
    source_tag: str | None = None
    returned: str = "image"
    add: bool = False
    case_id: str | None = None
    label_tag: str = "original"
    num_samples: int = 1


def read_parameters(request: Mapping[str, Any], bundle: str, *, max_steps: int | None = None) -> Parameters:
    """Check a request.

    Args:
        request: as MONAI Label hands it over.
        bundle: one of `BUNDLES`.
        max_steps: most steps that may be asked for; None sets no end.

    Raises:
        UserError: an unknown key, or a value that is not allowed.
    """
    allowed = (*_OWN, *_SAMPLING[bundle])
    for name in request:
        if name not in allowed and not _THEIRS.fullmatch(name):
            raise UserError(f"unknown parameter {name!r}; {bundle} takes {', '.join(sorted(allowed))}")
    given = {name: check_plain(name, request[name]) for name in allowed if request.get(name) is not None}
    for name in _SWITCHES:
        if not isinstance(given.get(name, False), bool):
            raise UserError(f"{name} is {given[name]!r}; allowed are true and false")
    sampling = {name: given[name] for name in _SAMPLING[bundle] if name in given}
    if "nodule" in sampling:
        if not isinstance(sampling["nodule"], Mapping):
            raise UserError(f'nodule is {sampling["nodule"]!r}; give features by name, e.g. {{"spiculation": 5}}')
        check_targets(sampling["nodule"])
    repeats = math.prod(whole(name, sampling.get(name, 1)) for name in ("resample", "num_ensemble"))
    steps = repeats * whole("num_steps", sampling.get("num_steps", _USUAL_STEPS if repeats > 1 else 1))
    if max_steps is not None and steps > max_steps:
        what = "num_steps" if repeats == 1 else "num_steps times resample and num_ensemble"
        msg = f"{what} is {steps}; a request that waits may take {max_steps}, for others the server would stand still"
        raise UserError(f"{msg}: ask for it by POST /batch/infer/{bundle}")
    condition = given.get("condition", "mask")
    if condition not in (("mask", "none") if bundle == "jdm" else ("mask",)):
        raise UserError(f"condition is {condition!r}; {bundle} takes mask{' and none' * (bundle == 'jdm')}")
    returned = given.get("return", "image")
    if returned not in ("image", "label"):
        raise UserError(f"return is {returned!r}; allowed are image and label")
    slice_index = given.get("slice")
    return Parameters(
        seed=whole("seed", given.get("seed", 0), 0),
        sampling=sampling,
        condition=None if condition == "none" else "mask",
        resize_maps=given.get("resize_maps", False),
        slice_index=None if slice_index is None else whole("slice", slice_index, 0),
        source_tag=check_tag("source_tag", given["source_tag"]) if "source_tag" in given else None,
        returned=returned,
        add=given.get("add_to_datastore", False),
        case_id=_text(given, "case_id"),
        label_tag=check_tag("label_tag", given.get("label_tag", "original")),
        num_samples=whole("num_samples", given.get("num_samples", 1)),
    )


def check_plain(name: str, value: Any) -> Any:
    """A value without anything that a config would evaluate or build.

    Raises:
        UserError: it holds a text with ``$``, ``@`` or ``%``, a key with ``_``, ``#`` or ``::`` in the wrong place, or
            a number that is none.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", key):
                raise UserError(f"{name} holds the key {key!r}; allowed are names of letters, digits and '_'")
        return {key: check_plain(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [check_plain(name, item) for item in value]
    if isinstance(value, str) and re.search(r"[$@%]", value):
        raise UserError(f"{name} holds the text {value[:40]!r}; '$', '@' and '%' are not allowed")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value!r}; give a finite number")
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise UserError(f"{name} is of type {type(value).__name__}; give numbers, words, lists or objects of them")
    return value


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip() or len(value) > 1000):
        raise UserError(f"{name} is {str(value)[:40]!r}; give a text of 1 to 1000 characters")
    return value


def check_tag(name: str, value: Any) -> str:
    """A label tag, which becomes a folder's name.

    Raises:
        UserError: it is more than letters, digits, ``_`` and ``-``, or longer than 50.
    """
    if not isinstance(value, str) or not _TAG.fullmatch(value):
        raise UserError(f"{name} is {str(value)[:40]!r}; give original, final or another word of letters and digits")
    return value

# SPDX-License-Identifier: Apache-2.0
"""A frozen classifier that looks at what a denoiser is trained on (feature-aligned diffusion, Eq 3).

It is no part of any network that is trained, so no ``train()``, no optimiser and no saved state reaches it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.engines import PrepareBatch
from torch import Tensor, nn

from monai_synth.checkpoint import load_file, require_agreement, restore_network, sha256_of
from monai_synth.data.joint import check_value_range
from monai_synth.errors import UserError

STAGE = "image_classifier"
ALIGN_ON = ("noisy", "clean")
BEYOND_RANGE = ("keep", "clip")


class Expert:
    """Pooled features of a frozen classifier of images.

    Args:
        network: takes (B, C, H, W) in [0, 1] and has ``features`` and ``num_features``, as ``ImageClassifier`` has. It
            is put into evaluation mode and never gets a gradient.
        value_range: lowest and highest value of clean images as the denoiser sees them; these become 0 and 1.
        input_size: H, W to resize to; None takes images as they are.
        beyond_range: what becomes of values of noisy images beyond the range. "keep" shows the expert x_t itself, as
            the text does (Eq 3); "clip" shows an image that could be one.
        device: where to compute.
        sha256: of the file that the network is from.

    Raises:
        UserError: an option is not among those allowed.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        value_range: Sequence[float],
        input_size: Sequence[int] | None = None,
        beyond_range: str = "keep",
        device: str | torch.device = "cpu",
        sha256: str | None = None,
    ) -> None:
        if beyond_range not in BEYOND_RANGE:
            raise UserError(f"expert_beyond_range is {beyond_range!r}; allowed are {', '.join(BEYOND_RANGE)}")
        self.network = network.to(device).eval().requires_grad_(False)
        self.value_range = check_value_range(value_range)
        self.input_size = None if input_size is None else tuple(input_size)
        self.beyond_range, self.sha256 = beyond_range, sha256

    @property
    def num_features(self) -> int:
        """Length D of the features."""
        return self.network.num_features

    def to_unit(self, x: Tensor) -> Tensor:
        """From the denoiser's range to [0, 1]; noise reaches beyond, unless it is clipped."""
        low, high = self.value_range
        unit = (x.float() - low) / (high - low)
        return unit.clamp(0, 1) if self.beyond_range == "clip" else unit

    # no inference mode: the features are saved for the backward pass of the projection
    @torch.no_grad()
    def __call__(self, unit: Tensor) -> Tensor:
        """Features.

        Args:
            unit: images (B, C, H, W), clean ones in [0, 1].

        Returns:
            (B, D), without gradient.
        """
        if self.input_size is not None and tuple(unit.shape[2:]) != self.input_size:
            unit = nn.functional.interpolate(unit, self.input_size, mode="bilinear", antialias=True)
        return self.network.features(unit)


def load_expert(
    path: str | Path | None,
    *,
    image_size: Sequence[int],
    image_channels: int,
    classes: Mapping[str, int] | None = None,
    value_range: Sequence[float],
    input_size: Sequence[int] | None = None,
    beyond_range: str = "keep",
    device: str | torch.device = "cpu",
) -> Expert:
    """Expert of a trained file that fits the data.

    Args:
        path: file of the stage "image_classifier", such as ``experiment classifier`` leaves in ``OUT/classifiers``.
        image_size: H, W of the images that the denoiser trains on.
        image_channels: their channels.
        classes: their class table; None where they have no classes.
        value_range: see :class:`Expert`.
        input_size: H, W that the expert is fed; needed where the denoiser's images have not the size of the expert's.
        beyond_range: see :class:`Expert`.
        device: where to compute.

    Raises:
        UserError: no file, a file of another stage, or an expert that does not fit the data.
    """
    remedy = "give the file of one trained on such images as --expert (`experiment classifier` leaves OUT/classifiers)"
    if path is None or not Path(path).is_file():
        what = "no expert was given" if path is None else f"there is no expert {path}"
        raise UserError(f"{what}; the alignment needs a trained classifier: {remedy}")
    content = load_file(path, stage=STAGE)
    contract = content["contract"]
    if len(image_size) != 2:
        raise UserError(f"the images have {len(image_size)} spatial axes {list(image_size)}; an expert takes 2 only")
    wanted: dict[str, Any] = {"image_channels": image_channels}
    if classes is not None:
        # as one value, so that the message shows both tables whole
        wanted["classes"] = sorted(dict(classes).items())
    found = {"image_channels": contract["image_channels"], "classes": sorted(contract["classes"].items())}
    require_agreement({k: found[k] for k in wanted}, wanted, f"expert {path} with the data", f"Please {remedy}.")
    own = list(contract["image_size"])
    if input_size is None and own != list(image_size):
        here = list(image_size)
        msg = (
            f"expert {path} was trained on images of {own}, this training has {here}; give "
            f'--expert_input_size "{here}" to feed it as they are, "{own}" to resize them for it, or another --expert'
        )
        raise UserError(msg)
    if input_size is not None and (len(input_size) != 2 or any(not isinstance(s, int) or s < 1 for s in input_size)):
        raise UserError(f"expert_input_size is {input_size!r}; give a height and a width, such as {own}")
    network = restore_network(content, path)
    if not hasattr(network, "features"):
        raise UserError(f"{path} holds {content['arch']['target']}, which has no pooled features; {remedy}")
    return Expert(
        network,
        value_range=value_range,
        input_size=input_size,
        beyond_range=beyond_range,
        device=device,
        sha256=sha256_of(path),
    )


class AlignedPrepareBatch(PrepareBatch):
    """What another PrepareBatch gives, and the expert's features of the same images as ``expert_features`` (B, D).

    Args:
        prepare: gives (x_t, target, args, kwargs); the first ``image_channels`` channels of x_t are the image.
        expert: the frozen classifier.
        image_channels: C.
        align_on: "noisy" shows the expert x_t, "clean" the image of the batch (``image``, uint8). The text compares
            both (Tab I) and takes the noisy one.

    Raises:
        UserError: unknown ``align_on``.
    """

    def __init__(self, prepare: PrepareBatch, expert: Expert, *, image_channels: int, align_on: str = "noisy") -> None:
        if align_on not in ALIGN_ON:
            raise UserError(f"align_on is {align_on!r}; allowed are {', '.join(ALIGN_ON)}")
        self.prepare, self.expert, self.image_channels, self.align_on = prepare, expert, image_channels, align_on

    def __call__(
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any, tuple, dict[str, Tensor]]:
        x_t, target, args, given = self.prepare(batchdata, device, non_blocking, **kwargs)
        if self.align_on == "clean":
            unit = batchdata["image"].to(x_t.device, non_blocking=non_blocking).float() / 255
        else:
            unit = self.expert.to_unit(x_t[:, : self.image_channels])
        return x_t, target, args, {**given, "expert_features": self.expert(unit)}

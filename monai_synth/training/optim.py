# SPDX-License-Identifier: Apache-2.0
"""Learning-rate decays by name and the perceptual loss from local weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from monai_synth.errors import UserError

DECAYS = ("constant", "linear", "second_half", "cosine")


def lr_decay(name: str, max_epochs: int) -> Callable[[int], float]:
    """Factor on the learning rate as a function of the finished epochs.

    A function of ``max_epochs`` rather than scheduler state, so that a training that is continued with a larger
    ``max_epochs`` follows the longer decay.

    Raises:
        UserError: unknown name.
    """
    if name == "constant":
        return lambda epoch: 1.0
    if name == "linear":
        return lambda epoch: max(0.0, 1.0 - epoch / max_epochs)
    if name == "second_half":  # constant, then linear to 0
        return lambda epoch: min(1.0, max(0.0, 2.0 * (1.0 - epoch / max_epochs)))
    if name == "cosine":
        return lambda epoch: 0.5 * (1.0 + math.cos(math.pi * min(epoch / max_epochs, 1.0)))
    raise UserError(f"unknown lr_decay {name!r}; allowed are {', '.join(DECAYS)}")


class PerceptualLoss(nn.Module):
    """LPIPS (Zhang et al. 2018) of images in [-1, 1], averaged over the batch; one channel is repeated to three."""

    def __init__(self, lpips: nn.Module) -> None:
        super().__init__()
        self.lpips = lpips.eval().requires_grad_(False)

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        prediction, target = (x.expand(-1, 3, *x.shape[2:]) for x in (prediction, target))
        return self.lpips(prediction, target).mean()


def perceptual_loss(weights: str | None, trunk: str, device: str) -> PerceptualLoss | None:
    """LPIPS with a trunk from a local file, or None where no file is given.

    Args:
        weights: state dict of torchvision's network as ``torch.save`` wrote it, e.g. ``vgg16-397923af.pth``.
        trunk: ``alex``, ``vgg`` or ``squeeze``; the linear layers come with the ``lpips`` package.
        device: where to compute.

    Raises:
        UserError: no ``lpips`` package, no file, or a file of another network.
    """
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if not path.is_file():
        msg = (
            f"perceptual_weights {path} is not there; download torchvision's ImageNet state dict of {trunk} "
            "(the address is its Weights enum's `url`), or leave the key out to train with L1 alone"
        )
        raise UserError(msg)
    try:
        from lpips import LPIPS
    except (ImportError, RuntimeError) as error:
        msg = f"the perceptual loss needs the `lpips` package and a torchvision that fits torch ({error})"
        raise UserError(msg + "; install `monai_synth[metrics]`") from error
    if trunk not in ("alex", "vgg", "squeeze"):
        raise UserError(f"unknown perceptual_trunk {trunk!r}; allowed are alex, vgg, squeeze")
    lpips = LPIPS(net=trunk, pnet_rand=True, verbose=False)
    state = torch.load(path, map_location="cpu", weights_only=True)
    features = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    own = lpips.net.state_dict()
    # lpips cuts torchvision's `features` into slices but keeps the layer numbers: slice2.5.weight is features.5.weight
    mapped = {name: features.get(name.split(".", 1)[1]) for name in own}
    wrong = [n for n, v in mapped.items() if v is None or v.shape != own[n].shape]
    if wrong:
        msg = f"{path} does not hold the features of {trunk} (missing or of another shape: {', '.join(wrong[:3])})"
        raise UserError(msg + "; give torchvision's state dict of that network")
    lpips.net.load_state_dict(mapped)
    return PerceptualLoss(lpips).to(device)

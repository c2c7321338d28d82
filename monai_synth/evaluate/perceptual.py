# SPDX-License-Identifier: Apache-2.0
"""LPIPS: how different two images look to a network, calibrated on what people said (Zhang et al. 2018).

The package lpips brings the calibration (its linear heads, version 0.1); the network below it is torchvision's AlexNet
or VGG16 of ImageNet and comes from a file, never from a download.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_synth.errors import UserError
from monai_synth.evaluate.features import checked_weights, read_state_dict

# SHA-256 of torchvision's files, each beginning as the file's name says.
PUBLISHED_TRUNKS = {
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02": "alexnet-owt-7be5be79.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0": "vgg16-397923af.pth",
}
LPIPS_SOURCE = (
    "download download.pytorch.org/models/alexnet-owt-7be5be79.pth (or vgg16-397923af.pth beside it) on a machine with "
    "a network and give its path"
)
_NETS = {"features.0.weight": {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}}
_TITLES = {"alex": "AlexNet", "vgg": "VGG16"}
_MIN_SIDE = 64  # AlexNet's pooling leaves nothing of less


@dataclass(frozen=True)
class Perceptual:
    """LPIPS of one trunk.

    Attributes:
        title: what it is.
        recipe: everything between two 8-bit images and their distance.
        weights_sha256: of the trunk's file.
        warnings: to be printed with every number that comes from it.
        call: two images (B, 3, H, W) in [-1, 1] -> (B,).
        device: where it runs.
    """

    title: str
    recipe: str
    weights_sha256: str
    warnings: tuple[str, ...]
    call: Callable[[Tensor, Tensor], Tensor]
    device: torch.device

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances of images (B, C, H, W) in [0, 1], C 1 or 3; 0 for equal ones, (B,) in double precision."""
        with torch.inference_mode():
            return self.call(*(_prepared(v.to(self.device)) for v in (x, y))).double().flatten()


def lpips_distance(
    path: str | Path, *, device: str | torch.device = "cpu", allow_unknown_weights: bool = False
) -> Perceptual:
    """LPIPS by a local file of its trunk.

    Args:
        path: torchvision's ImageNet weights of AlexNet or VGG16; which one is seen from its first layer.
        device: where to run.
        allow_unknown_weights: take a file with another SHA-256 too.

    Raises:
        UserError: missing, unreadable, of another network or of another hash; lpips or torchvision is not installed.
    """
    path = Path(path).expanduser()
    digest, known = checked_weights(
        path, "LPIPS trunk weights", PUBLISHED_TRUNKS, LPIPS_SOURCE, allow_unknown=allow_unknown_weights
    )
    weights = {k: v for k, v in read_state_dict(path, LPIPS_SOURCE).items() if k.startswith("features.")}
    first = weights.get("features.0.weight")
    net = _NETS["features.0.weight"].get(tuple(first.shape)) if first is not None else None
    if net is None:
        raise UserError(f"{path} is neither torchvision's AlexNet nor its VGG16; {LPIPS_SOURCE}")
    network = _network(net, weights, path).to(device)
    warning = f"LPIPS trunk of unknown origin (SHA-256 {digest[:16]}...): compare with nothing else"
    return Perceptual(
        title=f"LPIPS ({_TITLES[net]})",
        recipe=f"LPIPS 0.1 of {_TITLES[net]}, grey repeated to RGB, -1 to 1, images with a side under {_MIN_SIDE} "
        f"pixels enlarged bilinearly to {_MIN_SIDE}, linear heads of the package lpips",
        weights_sha256=digest,
        warnings=() if known else (warning,),
        call=lambda x, y: network(x, y),
        device=torch.device(device),
    )


def _prepared(x: Tensor) -> Tensor:
    x = x.float().expand(-1, 3, -1, -1) * 2 - 1
    short = min(x.shape[-2:])
    if short < _MIN_SIDE:
        size = [-(-side * _MIN_SIDE // short) for side in x.shape[-2:]]
        x = F.interpolate(x, size=size, mode="bilinear")
    return x


def _network(net: str, weights: dict[str, Tensor], path: Path) -> nn.Module:
    try:
        import lpips
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        msg = f"LPIPS needs lpips and torchvision, which cannot be imported ({' '.join(str(error).split())}); "
        raise UserError(msg + "install them with: pip install monai_synth[metrics]") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips builds its trunk by arguments that torchvision calls old
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    trunk = {key: key.split(".", 1)[1] for key in network.net.state_dict()}  # slice2.3.weight -> 3.weight
    try:
        network.net.load_state_dict({key: weights[f"features.{name}"] for key, name in trunk.items()})
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit torchvision's {_TITLES[net]}: {reason}; {LPIPS_SOURCE}") from error
    return network.eval()

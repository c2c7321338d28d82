# SPDX-License-Identifier: Apache-2.0
"""Features of RadImageNet's ResNet-50, trained on CT, MR and ultrasound instead of photographs (Mei et al. 2022).

The published PyTorch file holds torchvision's ResNet-50 without its last layer, as a list of its parts. A file of the
name RadImageNet-ResNet50_notop is another network (converted from Keras, with other strides and biases): it fits the
names but not the layers, so it is told apart and refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_synth.errors import UserError
from monai_synth.evaluate.features import Extractor, checked_weights, read_state_dict

PUBLISHED_RADIMAGENET = {
    "08629f7e7bd3e29b8ee9522ca3f65ce4d010a7ddf74f0ea3c7e3f3d0bbab0734": "RadImageNet_pytorch/ResNet50.pt",
}
RADIMAGENET_SOURCE = (
    "get ResNet50.pt out of RadImageNet_pytorch.zip, whose address github.com/BMEII-AI/RadImageNet gives (Pytorch "
    "weights), on a machine with a network and give its path"
)
_PARTS = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_SIZE = 224
_RECIPE = (
    "grey repeated to three channels, RGB as BGR, -1 to 1, bilinear with low-pass filter to 224 x 224, ResNet-50 of "
    "RadImageNet, 2048 pooled features"
)


def radimagenet(
    path: str | Path, *, device: str | torch.device = "cpu", allow_unknown_weights: bool = False
) -> Extractor:
    """RadImageNet's ResNet-50, from its published file.

    Args:
        path: ``ResNet50.pt``.
        device: where to run.
        allow_unknown_weights: take a file with another SHA-256 too.

    Raises:
        UserError: missing, unreadable, of another network or of another hash; torchvision is not installed.
    """
    path = Path(path).expanduser()
    digest, known = checked_weights(
        path, "RadImageNet weights", PUBLISHED_RADIMAGENET, RADIMAGENET_SOURCE, allow_unknown=allow_unknown_weights
    )
    network = _network(path).to(device)

    def call(images: Tensor) -> Tensor:
        x = F.interpolate(images.float().flip(1), size=(_SIZE, _SIZE), mode="bilinear", antialias=True)
        return network(x.clamp(0, 255) / 127.5 - 1)

    warning = f"RadImageNet weights of unknown origin (SHA-256 {digest[:16]}...): compare with nothing else"
    return Extractor(
        key="radimagenet" if known else "unknown_radimagenet",
        title="RadImageNet network",
        recipe=_RECIPE,
        weights_sha256=digest,
        num_features=2048,
        channels=3,
        warnings=() if known else (warning,),
        call=call,
        device=torch.device(device),
    )


def _network(path: Path) -> nn.Module:
    try:
        from torchvision.models import resnet50
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        msg = f"RadImageNet needs torchvision, which cannot be imported ({' '.join(str(error).split())}); "
        raise UserError(msg + "install it with: pip install monai_synth[metrics]") from error
    weights = read_state_dict(path, RADIMAGENET_SOURCE)
    renamed = {}
    for key, value in weights.items():
        number, _, rest = key.removeprefix("backbone.").partition(".")
        renamed[f"{_PARTS.get(number, number)}.{rest}"] = value
    network = resnet50(weights=None)
    network.fc = nn.Identity()
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        keras = " (it looks like RadImageNet-ResNet50_notop, another network)" if "conv1.bias" in renamed else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit ResNet50.pt{keras}: {reason}; {RADIMAGENET_SOURCE}") from error
    return network.eval()

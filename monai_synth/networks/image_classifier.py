# SPDX-License-Identifier: Apache-2.0
"""Classifier of whole images: a MONAI backbone that takes published ImageNet weights, and its own last layer.

Grey images become three channels and values are normalised inside, so callers feed [0, 1] whatever the backbone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import densenet, efficientnet, resnet
from torch import Tensor, nn

from monai_synth.errors import UserError
from monai_synth.networks import vit

_SHOWN_KEYS = 3  # keys named in an error message


@dataclass(frozen=True)
class _Backbone:
    """How to build a backbone and where its published weights are.

    Attributes:
        build: makes the network with one output, which is then taken off; takes the image size where there is a
            patch.
        head: dotted name of its last layer.
        url: of its ImageNet weights; None where nobody published any.
        published_name: name in that file of a key of the network.
        patch: side of the patches of a transformer, which is made for one image size; None of others.
        fit: makes of that file's tensors and an image size those of the network, by the names in the file.
        within: key of that file under which the tensors are.
    """

    build: Callable[..., nn.Module]
    head: str
    url: str | None
    published_name: Callable[[str], str]
    patch: int | None = None
    fit: Callable[[Mapping[str, Tensor], Sequence[int]], Mapping[str, Tensor]] | None = None
    within: str | None = None


def _resnet(name: str) -> nn.Module:
    """Layer by layer torchvision's: stride 2 in the first convolution, no bias in the shortcuts."""
    options = {"conv1_t_size": 7, "conv1_t_stride": 2, "shortcut_type": "B", "bias_downsample": False}
    return getattr(resnet, name)(spatial_dims=2, n_input_channels=3, num_classes=1, **options)


def _small_resnet() -> nn.Module:
    """Four narrow blocks from the full size on, for few small images: 306 thousand parameters."""
    options = {"conv1_t_size": 3, "conv1_t_stride": 1, "no_max_pool": True, "bias_downsample": False}
    widths = [16, 32, 64, 128]
    return resnet.ResNet("basic", [1] * 4, widths, spatial_dims=2, n_input_channels=3, num_classes=1, **options)


def _densenet(name: str) -> nn.Module:
    return getattr(densenet, name)(spatial_dims=2, in_channels=3, out_channels=1)


def _efficientnet(name: str) -> nn.Module:
    return efficientnet.EfficientNetBN(name, pretrained=False, spatial_dims=2, in_channels=3, num_classes=1)


_TORCHVISION = "https://download.pytorch.org/models/"
_RESNETS = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
}
_DENSENETS = {
    "densenet121": "densenet121-a639ec97.pth",
    "densenet169": "densenet169-b2777c0a.pth",
    "densenet201": "densenet201-c1103571.pth",
}
BACKBONES: dict[str, _Backbone] = {
    "resnet_small": _Backbone(_small_resnet, "fc", None, lambda key: key),
    **{
        name: _Backbone(functools.partial(_resnet, name), "fc", _TORCHVISION + file, lambda key: key)
        for name, file in _RESNETS.items()
    },
    **{
        name: _Backbone(
            functools.partial(_densenet, name),
            "class_layers.out",
            _TORCHVISION + file,
            lambda key: key.replace(".layers.", "."),
        )
        for name, file in _DENSENETS.items()
    },
    **{
        f"efficientnet-b{k}": _Backbone(
            functools.partial(_efficientnet, f"efficientnet-b{k}"),
            "_fc",
            efficientnet.url_map[f"efficientnet-b{k}"],
            lambda key: re.sub(r"(.+)\.\d+(\.\d+\..+)", r"\1\2", key),
        )
        for k in range(8)
    },
    "vit_b_16": _Backbone(
        functools.partial(vit.ClassTokenViT, hidden_size=768, num_heads=12),
        "classification_head",
        _TORCHVISION + "vit_b_16-c867db91.pth",
        vit.torchvision_name,
        patch=vit.PATCH,
        fit=vit.fit_torchvision,
    ),
    "vit_ti_16": _Backbone(
        functools.partial(vit.ClassTokenViT, hidden_size=192, num_heads=3),
        "classification_head",
        "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
        vit.deit_name,
        patch=vit.PATCH,
        fit=vit.fit_deit,
        within="model",
    ),
}


class ImageClassifier(nn.Module):
    """Backbone, pooling and one linear layer.

    Args:
        backbone: of ``BACKBONES``.
        num_classes: 2 or more.
        image_channels: 1 (grey, repeated to 3) or 3.
        mean: of the values of each channel in [0, 1], or one for all.
        std: their standard deviation; more than 0.
        image_size: H, W of the images, multiples of 16; only the transformers (``vit_...``) need it, the others take
            any size.

    Raises:
        UserError: unknown backbone, numbers out of their range, or a transformer without a size.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 2,
        image_channels: int = 1,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        image_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise UserError(f"backbone {backbone!r}; allowed are {', '.join(BACKBONES)}")
        if num_classes < 2 or image_channels not in (1, 3):
            msg = f"{num_classes} classes, {image_channels} channels; allowed are 2 or more classes, 1 or 3 channels"
            raise UserError(msg)
        if {len(mean), len(std)} - {1, image_channels} or min(std) <= 0:
            msg = f"mean {list(mean)}, std {list(std)}; give 1 or {image_channels} numbers each, std above 0"
            raise UserError(msg)
        self.name, self.num_classes, self.image_channels = backbone, num_classes, image_channels
        patch = BACKBONES[backbone].patch
        self.image_size = None if patch is None else _patched_size(backbone, patch, image_size)
        self.backbone = BACKBONES[backbone].build(*([] if patch is None else [self.image_size]))
        last = self.backbone.get_submodule(BACKBONES[backbone].head)
        self.backbone.set_submodule(BACKBONES[backbone].head, nn.Identity())
        self.head = nn.Linear(last.in_features, num_classes)
        for key, values in (("mean", mean), ("std", std)):
            self.register_buffer(key, torch.tensor([float(v) for v in values]).reshape(1, -1, 1, 1))

    @property
    def num_features(self) -> int:
        """Length D of `features`."""
        return self.head.in_features

    def features(self, x: Tensor) -> Tensor:
        """Pooled features before the last layer; of a transformer the class token after the last normalisation.

        Args:
            x: images (B, C, H, W) in [0, 1].

        Returns:
            (B, D).
        """
        if x.ndim != 4 or x.shape[1] != self.image_channels:
            msg = f"images of shape {tuple(x.shape)}; this classifier takes (B, {self.image_channels}, H, W)"
            raise UserError(msg)
        if self.image_size is not None and tuple(x.shape[2:]) != self.image_size:
            msg = f"images of {list(x.shape[2:])}; this {self.name} was made for {list(self.image_size)}"
            raise UserError(f"{msg}: resize them, or train one with their size as image_size")
        x = (x - self.mean) / self.std
        return self.backbone(x.expand(-1, 3, -1, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: images (B, C, H, W) in [0, 1].

        Returns:
            Logits (B, num_classes).
        """
        return self.head(self.features(x))

    def load_backbone_weights(self, path: str | Path) -> None:
        """Load published ImageNet weights into all but the last layer.

        Args:
            path: file with the state dict of torchvision's ResNet, DenseNet or vit_b_16, of efficientnet-pytorch, or
                of DeiT-Ti. The positions of a transformer are interpolated to its image size.

        Raises:
            UserError: missing, unreadable, or of another network.
        """
        require_published(self.name)
        remedy = f"get the weights of {self.name} from {weights_source(self.name)} and give the file's path"
        backbone = BACKBONES[self.name]
        published = _read(path, remedy, backbone.within)
        if backbone.fit is not None:
            published = backbone.fit(published, self.image_size)
        name_in_file = backbone.published_name
        own = self.backbone.state_dict()
        # Old files of DenseNet lack the counters of batches, which nothing here reads.
        wanted = {key: name_in_file(key) for key in own if not key.endswith("num_batches_tracked")}
        wanted_names = set(wanted.values())
        head = ("fc.", "_fc.", "classifier.", "heads.", "head.")
        missing = [name for name in wanted.values() if name not in published]
        reshaped = [
            name for key, name in wanted.items() if name in published and published[name].shape != own[key].shape
        ]
        unknown = [
            name
            for name in published
            if name not in wanted_names and not name.startswith(head) and not name.endswith("num_batches_tracked")
        ]
        problems = {"lacks": missing, "has besides": unknown, "has of another shape": reshaped}
        found = [
            f"{what} {len(names)} such as {', '.join(names[:_SHOWN_KEYS])}" for what, names in problems.items() if names
        ]
        if found:
            raise UserError(f"{path} does not fit {self.name}: it {'; it '.join(found)}; {remedy}")
        self.backbone.load_state_dict({**own, **{key: published[name] for key, name in wanted.items()}})


def weights_source(backbone: str) -> str | None:
    """Where the published ImageNet weights of a backbone are; None where nobody published any."""
    return BACKBONES[backbone].url


def require_published(backbone: str) -> None:
    """Refuse a backbone that can only be trained from scratch.

    Raises:
        UserError: nobody published weights of it.
    """
    if weights_source(backbone) is None:
        with_weights = ", ".join(name for name in BACKBONES if weights_source(name))
        raise UserError(f"there are no published weights of {backbone}; train it from scratch, or take {with_weights}")


def _patched_size(backbone: str, patch: int, image_size: Sequence[int] | None) -> tuple[int, int]:
    if image_size is None:
        raise UserError(f"backbone {backbone} is made for one size of images; give image_size, such as [224, 224]")
    if len(image_size) != 2 or any(not isinstance(s, int) or s < patch or s % patch for s in image_size):
        msg = f"image_size is {list(image_size)}; {backbone} takes a height and a width that are multiples of {patch}"
        raise UserError(f"{msg}: resize the images, or choose another backbone")
    return image_size[0], image_size[1]


def _read(path: str | Path, remedy: str, within: str | None = None) -> Mapping[str, Any]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"there is no weights file {path}; {remedy}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"weights file {path} cannot be read ({reason}); {remedy}") from error
    if within is not None and isinstance(content, Mapping):
        content = content.get(within, content)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"weights file {path} holds no state dict (tensors by name); {remedy}")
    return content

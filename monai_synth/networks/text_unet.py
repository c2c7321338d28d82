# SPDX-License-Identifier: Apache-2.0
"""Denoising U-Net of pixels that is told a class by the text feature of its name (feature-aligned diffusion, Sec III).

The U-Net is diffusers', by default with the layers of segmind/tiny-sd, whose weights it takes from a local folder.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from monai_synth.checkpoint import differences
from monai_synth.errors import UserError

SOURCE = "huggingface.co/segmind/tiny-sd"
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
RANDOM = "random"

_NEW = ("conv_in.", "conv_out.")  # of pixels here, of the latents of Stable Diffusion in the file
_FREE = {"in_channels", "out_channels", "sample_size"}  # options in which a file may differ
_OF_MID_BLOCK = {"mid_block_scale_factor", "mid_block_only_cross_attention"}
# options that a file gives as one value or as one for each level
_BY_LEVEL = {
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "only_cross_attention",
}
_REMEDY = f"get the folder unet of {SOURCE} and give its path"
_SHOWN = 3  # names in an error message


class TextUNet(nn.Module):
    """U-Net over images of one of K classes, each told by a text feature as the one token of cross attention.

    Class k is row k of the buffer ``text_features``, which `set_text_features` fills and trained weights bring along,
    so that neither training nor sampling needs the text encoder. A linear layer makes the token of it. There is no
    null class: the text trains without guidance. The attention over one token adds the same to every position.

    The defaults are the layers of segmind/tiny-sd, 323.37 million parameters for one channel without the linear layer.
    Its last block of the encoder is ``unet.down_blocks.2``; the text's code taps a layer within,
    ``unet.down_blocks.2.resnets.0.conv_shortcut``.

    Args:
        image_channels: C.
        num_classes: K.
        image_size: H, W of the images; each side divisible by 2 to the number of levels minus one.
        text_dim: length of a text feature.
        block_out_channels: channels of each level, multiples of ``norm_num_groups`` and ``attention_head_dim``.
        cross_attention: whether the level has attention, over its positions and over the token.
        layers_per_block: residual blocks of each level.
        cross_attention_dim: length of the token.
        attention_head_dim: heads of every attention (diffusers has called their number so since Stable Diffusion).
        norm_num_groups: groups of the normalisations.
        mid_block: a block with attention between encoder and decoder.
        use_checkpoint: recompute activations in the backward pass.

    Raises:
        UserError: the options do not fit each other.
    """

    def __init__(
        self,
        image_channels: int,
        num_classes: int,
        image_size: Sequence[int],
        *,
        text_dim: int = 512,
        block_out_channels: Sequence[int] = (320, 640, 1280),
        cross_attention: Sequence[bool] = (True, True, True),
        layers_per_block: int = 1,
        cross_attention_dim: int = 768,
        attention_head_dim: int = 8,
        norm_num_groups: int = 32,
        mid_block: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        counts = {
            "image_channels": image_channels,
            "num_classes": num_classes,
            "text_dim": text_dim,
            "layers_per_block": layers_per_block,
            "cross_attention_dim": cross_attention_dim,
            "attention_head_dim": attention_head_dim,
            "norm_num_groups": norm_num_groups,
        }
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}; give a whole number from 1")
        _check_levels(image_size, block_out_channels, cross_attention, norm_num_groups, attention_head_dim)
        if not mid_block and not any(cross_attention):
            raise UserError("cross_attention is off at every level and so is mid_block; turn one on to tell the class")
        self.num_classes, self.text_dim = num_classes, text_dim
        self.unet = UNet2DConditionModel(
            sample_size=tuple(image_size),
            in_channels=image_channels,
            out_channels=image_channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if on else "DownBlock2D" for on in cross_attention),
            mid_block_type="UNetMidBlock2DCrossAttn" if mid_block else None,
            up_block_types=tuple("CrossAttnUpBlock2D" if on else "UpBlock2D" for on in reversed(cross_attention)),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
        )
        if use_checkpoint:
            self.unet.enable_gradient_checkpointing()
        self.text_projection = nn.Linear(text_dim, cross_attention_dim)
        self.register_buffer("text_features", torch.zeros(num_classes, text_dim))
        self._told = False  # whether the buffer holds features; asking the buffer itself would wait for the GPU

    def set_text_features(self, features: Tensor) -> None:
        """Tell what the classes are called.

        Args:
            features: (K, text_dim), row k of class k.

        Raises:
            UserError: of another shape, not finite, or equal for two classes.
        """
        shape = tuple(self.text_features.shape)
        if tuple(features.shape) != shape:
            what = f"text features of shape {tuple(features.shape)}; this network takes {shape}"
            raise UserError(f"{what}, one row for each of its {self.num_classes} classes")
        features = features.detach().float()
        if not features.isfinite().all() or not features.any(dim=1).all():
            raise UserError("text features are not finite, or 0 for a class; take them from text_features()")
        if len(features.unique(dim=0)) < self.num_classes:
            raise UserError("two classes have the same text feature; give their folders names that differ in words")
        self.text_features.copy_(features)
        self._told = True

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Denoise.

        Args:
            x: noisy images x_t (B, C, H, W).
            timesteps: t (B,), 0 to T - 1.
            class_labels: (B,) integers, 0 to K - 1.

        Returns:
            Prediction (B, C, H, W).

        Raises:
            UserError: the text features were not set.
        """
        if not self._told:
            msg = "this network has no text features yet; call set_text_features, or load trained weights into it"
            raise UserError(msg)
        token = self.text_projection(nn.functional.embedding(class_labels, self.text_features))
        return self.unet(x, timesteps, encoder_hidden_states=token[:, None], return_dict=False)[0]

    def load_pretrained_unet(self, path: str | Path) -> None:
        """Take the weights of a Stable Diffusion U-Net of the same layers from a local folder.

        All but the first and the last convolution, which are of latents there; these get new random weights from
        torch's generator (as in the text's code). Nothing changes where the folder is refused.

        Args:
            path: folder that diffusers wrote, with config.json and diffusion_pytorch_model.safetensors or .bin; or
                one of a whole pipeline, with such a folder ``unet``.

        Raises:
            UserError: incomplete, unreadable, or of another model.
        """
        folder = _unet_folder(path)
        self._check_config(_read_config(folder / CONFIG), folder / CONFIG)
        file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"{folder} has no {' or '.join(WEIGHTS)}; {_REMEDY}")
        given = {k: v for k, v in _read_weights(file).items() if not k.startswith(_NEW)}
        own = self.unet.state_dict()
        wanted = [name for name in own if not name.startswith(_NEW)]
        problems = {
            "lacks": [name for name in wanted if name not in given],
            "has besides": [name for name in given if name not in own],
            "has of another shape": [
                name
                for name in wanted
                if name in given and (given[name].shape != own[name].shape or not given[name].is_floating_point())
            ],
        }
        found = [
            f"it {what} {len(names)} such as {', '.join(names[:_SHOWN])}" for what, names in problems.items() if names
        ]
        if found:
            raise UserError(f"{file} does not fit this network: {'; '.join(found)}; {_REMEDY}")
        self.unet.load_state_dict({**own, **given})
        self.unet.conv_in.reset_parameters()
        self.unet.conv_out.reset_parameters()

    def _check_config(self, config: Mapping[str, Any], path: Path) -> None:
        name = config.get("_class_name", "none")
        if name != UNet2DConditionModel.__name__:
            raise UserError(f"{path} is of a {name}, not of a {UNet2DConditionModel.__name__}; {_REMEDY}")
        parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
        defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
        own = {key: value for key, value in self.unet.config.items() if key in defaults}
        ignored = _FREE if own["mid_block_type"] else _FREE | _OF_MID_BLOCK
        keys = [key for key in defaults if key not in ignored]
        wanted = {key: _plain(key, own[key]) for key in keys}
        given = {key: _plain(key, config.get(key, defaults[key])) for key in keys}
        # None, False and 0 all turn an option off, and versions of diffusers differ in which they write
        found = differences({key: given[key] if given[key] or wanted[key] else wanted[key] for key in keys}, wanted)
        if found:
            msg = f"{path} is of a U-Net with other layers: {'; '.join(found[:_SHOWN])}"
            raise UserError(f"{msg}; {_REMEDY}, or give the network that folder's options")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        given = state_dict.get(f"{prefix}text_features")
        if given is not None and given.shape == self.text_features.shape:
            self._told = bool(given.any())


def pretrained(network: TextUNet, source: str | Path | None) -> None:
    """Begin with published weights, or with random ones where that is asked for by name.

    Args:
        network: just built.
        source: folder, see `TextUNet.load_pretrained_unet`; "random" leaves the random weights.

    Raises:
        UserError: no source, or see there.
    """
    if source is None:
        msg = "no weights are given for the U-Net to begin with"
        raise UserError(f"{msg}; {_REMEDY}, or give {RANDOM!r} to begin with random weights")
    if source != RANDOM:
        network.load_pretrained_unet(source)


def _check_levels(
    image_size: Sequence[int], channels: Sequence[int], cross_attention: Sequence[bool], groups: int, heads: int
) -> None:
    if len(channels) != len(cross_attention) or not channels:
        msg = f"block_out_channels {list(channels)} and cross_attention {list(cross_attention)} differ in length"
        raise UserError(f"{msg}; give one of each for every level")
    if not all(isinstance(on, bool) for on in cross_attention):
        msg = f"cross_attention is {list(cross_attention)}; give True or False for every level"
        raise UserError(f'{msg}, on the command line as "[False, True]"')
    factor = 2 ** (len(channels) - 1)
    if len(image_size) != 2 or any(not isinstance(s, int) or s < 1 or s % factor for s in image_size):
        msg = f"image_size is {list(image_size)}; with {len(channels)} levels give a height and a width"
        raise UserError(f"{msg} that are multiples of {factor}")
    for width in channels:
        if not isinstance(width, int) or width < 1 or width % groups or width % heads:
            msg = f"block_out_channels has {width!r}; give multiples of norm_num_groups {groups}"
            raise UserError(f"{msg} and of attention_head_dim {heads}")


def _unet_folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; {_REMEDY}")
    for candidate in (folder, folder / "unet"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise UserError(f"{folder} has no {CONFIG} and no unet/{CONFIG}; {_REMEDY}")


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    return content if isinstance(content, Mapping) else {}


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise several kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason}): it is truncated or no such file; {_REMEDY}") from error
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict (tensors by name); {_REMEDY}")
    return content


def _plain(key: str, value: Any) -> Any:
    """An option's value such that two ways to write the same are equal."""
    if key in _BY_LEVEL and isinstance(value, Sequence) and not isinstance(value, str) and len(set(value)) == 1:
        return value[0]
    return value

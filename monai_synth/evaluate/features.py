# SPDX-License-Identifier: Apache-2.0
"""The one door to feature extractors: range, channels, resize and weights, fixed together under a name.

Two extractors see one image differently when one of these differs, so they are never chosen apart. A further
extractor is one more function here that returns an `Extractor`.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from monai_synth.checkpoint import load_file, restore_network, sha256_of
from monai_synth.errors import UserError

# SHA-256 of the published files. Both hold the network that FID is defined by, converted from TensorFlow's
# inception-2015-12-05.
PUBLISHED_INCEPTION = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "state dict of pytorch-fid and torch-fidelity",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "TorchScript of StyleGAN2-ADA and clean-fid",
}
INCEPTION_SOURCE = (
    "download pt_inception-2015-12-05-6726825d.pth from github.com/mseitzer/pytorch-fid/releases/tag/fid_weights (or "
    "weights-inception-2015-12-05-6726825d.pth from github.com/toshas/torch-fidelity/releases/tag/v0.2.0, or "
    "inception-2015-12-05.pt of stylegan2-ada-pytorch) on a machine with a network and give its path"
)
INCEPTION_RESIZES = {
    "tensorflow": "bilinear to 299 x 299 as TensorFlow 1 (without a low-pass filter)",
    "clean": "bicubic to 299 x 299 with a low-pass filter where it shrinks (Pillow in floating point as clean-fid, "
    "rounded to 8 bits at the end)",
}
_INCEPTION_RECIPE = "grey repeated to RGB, 0 to 255, {}, Inception-v3 of 2015-12-05, 2048 pooled features"


@dataclass(frozen=True)
class Extractor:
    """Turns images into feature vectors.

    Attributes:
        key: "inception", or what the names of the metrics end in (``frechet_<key>``).
        title: what it is, in a few words.
        recipe: everything between an 8-bit image and its vector.
        weights_sha256: of the weights file.
        num_features: D.
        channels: 1 or 3, to which images are brought; None takes either.
        warnings: to be printed with every number that comes from it.
        call: uint8 (B, C, H, W) on its device -> (B, D).
        device: where it runs.
        details: what else is known of it, such as ``fingerprint`` of the dataset that it was trained on.
    """

    key: str
    title: str
    recipe: str
    weights_sha256: str
    num_features: int
    channels: int | None
    warnings: tuple[str, ...]
    call: Callable[[Tensor], Tensor]
    device: torch.device
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Names what decides the features of an image."""
        return hashlib.sha256(f"{self.recipe}\n{self.weights_sha256}".encode()).hexdigest()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features of images.

        Args:
            images: uint8 (B, C, H, W), C 1 or 3.

        Returns:
            float32 (B, D).

        Raises:
            UserError: RGB images for an extractor of grey ones, or features that are not finite.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"images are {images.dtype} {images.shape}; extractors take uint8 (B, 1 or 3, H, W)")
        if self.channels == 1 and images.shape[1] == 3:
            raise UserError(f"the {self.title} takes grey images, these are RGB; prepare them with --grey")
        if self.channels == 3 and images.shape[1] == 1:
            images = np.repeat(images, 3, axis=1)
        with torch.inference_mode():
            features = self.call(torch.from_numpy(np.ascontiguousarray(images)).to(self.device)).float().cpu().numpy()
        if features.shape != (len(images), self.num_features) or not np.isfinite(features).all():
            msg = f"the {self.title} gave features of shape {features.shape}, or some that are not finite; needed are "
            raise UserError(msg + f"{(len(images), self.num_features)} finite ones: its weights are damaged or foreign")
        return features


def inception(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    allow_unknown_weights: bool = False,
    resize: str = "tensorflow",
) -> Extractor:
    """The network of the Frechet inception distance, from a file of its published weights.

    Args:
        path: pytorch-fid's or torch-fidelity's state dict, or StyleGAN's TorchScript.
        device: where to run.
        allow_unknown_weights: take a file with another SHA-256 too; its numbers are then not called FID and KID.
        resize: of ``INCEPTION_RESIZES``; "clean" gives other numbers, which are named so (Parmar et al. 2022).

    Raises:
        UserError: missing, unreadable, of another network or of another hash; torch-fidelity is not installed.
    """
    if resize not in INCEPTION_RESIZES:
        raise UserError(f"inception resize {resize!r}; allowed are {', '.join(INCEPTION_RESIZES)}")
    path = Path(path).expanduser()
    digest, known = checked_weights(
        path,
        "Inception weights",
        PUBLISHED_INCEPTION,
        INCEPTION_SOURCE,
        allow_unknown=allow_unknown_weights,
        remark=" (its numbers are then not called FID)",
    )
    call = _torchscript(path, device) if _is_torchscript(path) else _state_dict(path, device)
    warning = f"Inception weights of unknown origin (SHA-256 {digest[:16]}...): these numbers are not FID and KID"
    key = ("" if known else "unknown_") + "inception" + ("_clean" if resize == "clean" else "")
    return Extractor(
        key=key,
        title="Inception-v3 network" + (", clean resize" if resize == "clean" else ""),
        recipe=_INCEPTION_RECIPE.format(INCEPTION_RESIZES[resize]),
        weights_sha256=digest,
        num_features=2048,
        channels=3,
        warnings=() if known else (warning,),
        call=call if resize == "tensorflow" else lambda images: call(clean_resize(images)),
        device=torch.device(device),
    )


def checked_weights(
    path: Path, what: str, published: Mapping[str, str], source: str, *, allow_unknown: bool, remark: str = ""
) -> tuple[str, bool]:
    """SHA-256 of a weights file and whether it is published.

    Args:
        path: the file.
        what: it should hold, for messages.
        published: SHA-256 -> what it is.
        source: where to get it, for messages.
        allow_unknown: take another file too.
        remark: what that does.

    Raises:
        UserError: no file, or one that is not published and not allowed.
    """
    if not path.is_file():
        raise UserError(f"there is no file of {what} {path}; {source}")
    digest = sha256_of(path)
    known = digest in published
    if not known and not allow_unknown:
        promised = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
        why = f"it is none of the {len(published)} published files of {what}"
        if promised and not digest.startswith(promised[1]):
            why = f"its name promises {promised[1]}..., so the download is damaged or the file was renamed"
        msg = f"{path} has SHA-256 {digest}: {why}; {source}, or allow it with --allow-unknown-weights"
        raise UserError(msg + remark)
    return digest, known


def read_state_dict(path: Path, source: str) -> dict[str, Tensor]:
    """Tensors by name, without unpickling anything else.

    Raises:
        UserError: damaged, or something else.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}); {source}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no state dict (tensors by name); {source}")
    return dict(weights)


def clean_resize(images: Tensor, size: int = 299) -> Tensor:
    """uint8 (B, 3, H, W) -> uint8 (B, 3, size, size) by Pillow's bicubic filter; 299 is where networks leave it."""
    if tuple(images.shape[-2:]) == (size, size):
        return images
    out = np.empty((len(images), images.shape[1], size, size), np.float32)
    for b, image in enumerate(images.cpu().numpy()):
        for c, channel in enumerate(image):
            picture = Image.fromarray(channel.astype(np.float32))
            out[b, c] = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(out.round().clip(0, 255).astype(np.uint8)).to(images.device)


def trained_classifier(path: str | Path, *, device: str | torch.device = "cpu") -> Extractor:
    """A classifier that ``monai-synth experiment classifier`` trained; distances of its features are never FID.

    Args:
        path: one of OUT/classifiers/\\*.pt.
        device: where to run.

    Raises:
        UserError: missing, unreadable, or of another stage.
    """
    content = load_file(path, stage="image_classifier", option="--extractor")
    network = restore_network(content, path).to(device)
    contract = content["contract"]
    size = tuple(int(n) for n in contract["image_size"])
    channels = int(contract["image_channels"])
    name = content["arch"]["args"].get("backbone", "network")

    def call(images: Tensor) -> Tensor:
        x = images.float()
        if tuple(x.shape[-2:]) != size:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        return network.features(x / 255)

    with torch.inference_mode():
        num_features = call(torch.zeros(2, channels, *size, dtype=torch.uint8, device=device)).shape[1]
    start = "from random weights" if contract.get("initial_weights") == "random" else "from published weights"
    return Extractor(
        key="classifier",
        title=f"classifier ({name})",
        recipe=f"{'grey' if channels == 1 else 'RGB, grey repeated'}, 0 to 1, bilinear with low-pass filter to "
        f"{size[0]} x {size[1]}, {name} trained {start} on {contract.get('trained_on', 'unknown data')}, "
        f"{num_features} pooled features",
        weights_sha256=sha256_of(path),
        num_features=int(num_features),
        channels=channels,
        warnings=(),
        call=call,
        device=torch.device(device),
        details={"fingerprint": contract.get("fingerprints", {}).get("real")},
    )


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _torchscript(path: Path, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    """StyleGAN's file; it resizes inside as the TensorFlow graph does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 calls this form of file old; it still reads it
            network = torch.jit.load(str(path), map_location=device).eval()
        network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device), return_features=True)
    except Exception as error:  # torch raises several kinds for damaged and for other programs
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is no TorchScript of Inception-v3 ({reason}); {INCEPTION_SOURCE}") from error
    return lambda images: network(images, return_features=True)


def _state_dict(path: Path, device: str | torch.device) -> Callable[[Tensor], Tensor]:
    network = _torch_fidelity_network(read_state_dict(path, INCEPTION_SOURCE), path).to(device)
    return lambda images: network(images)[0]


def _torch_fidelity_network(weights: Mapping[str, Any], path: Path) -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        msg = f"FID needs torch-fidelity and torchvision, which cannot be imported ({' '.join(str(error).split())}); "
        raise UserError(msg + "install them with: pip install monai_synth[metrics]") from error
    # Its constructor unpickles whatever it is given; here that is what was read with weights_only above.
    buffer = io.BytesIO()
    torch.save(dict(weights), buffer)
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        torchvision_own = " (it looks like torchvision's own Inception-v3, which FID does not use)"
        hint = torchvision_own if any(key.startswith("AuxLogits") for key in weights) else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit FID's Inception-v3{hint}: {reason}; {INCEPTION_SOURCE}") from error

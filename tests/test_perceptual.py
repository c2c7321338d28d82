# SPDX-License-Identifier: Apache-2.0
"""LPIPS and RadImageNet features from local files: agreement with other implementations, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from monai_synth.errors import UserError
from monai_synth.evaluate import perceptual, radimagenet
from monai_synth.evaluate.perceptual import lpips_distance

lpips = pytest.importorskip("lpips")
models = pytest.importorskip("torchvision.models")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under torchvision's names, without the layers that LPIPS does not use."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    state = {f"features.{k}": v for k, v in models.alexnet(weights=None).features.state_dict().items()}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def distance(trunk: Path) -> perceptual.Perceptual:
    return lpips_distance(trunk, allow_unknown_weights=True)


def pictures(seed: int, n: int, channels: int = 3, size: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((n, channels, size, size)))


def test_the_distance_is_that_of_torchmetrics_with_the_same_trunk(trunk: Path, distance: perceptual.Perceptual) -> None:
    functional = pytest.importorskip("torchmetrics.functional.image.lpips")
    other = functional._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    weights = torch.load(trunk, weights_only=True)
    other.net.load_state_dict({k: weights[f"features.{k.split('.', 1)[1]}"] for k in other.net.state_dict()})
    x, y = pictures(0, 3), pictures(1, 3)
    with torch.inference_mode():
        expected = other.eval()(x.float(), y.float(), normalize=True).flatten()
    torch.testing.assert_close(distance(x, y), expected.double(), rtol=1e-5, atol=1e-7)
    assert expected.min() > 0


def test_equal_images_are_at_0_and_more_noise_is_farther(distance: perceptual.Perceptual) -> None:
    x = pictures(0, 2)
    assert distance(x, x).tolist() == [0, 0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = [distance(x, (x + s * noise).clamp(0, 1)).mean().item() for s in (0.02, 0.1, 0.4)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_grey_is_repeated_and_small_images_are_enlarged(distance: perceptual.Perceptual) -> None:
    x, y = pictures(0, 2, 1, 28), pictures(1, 2, 1, 28)
    torch.testing.assert_close(distance(x, y), distance(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)))
    assert distance(x, y).min() > 0
    assert "enlarged bilinearly to 64" in distance.recipe


def test_a_trunk_of_unknown_hash_needs_leave_and_a_published_one_none(
    trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"none of the 2 published files of LPIPS.*download.pytorch.org.*--allow-unk"):
        lpips_distance(trunk)
    assert "unknown origin" in lpips_distance(trunk, allow_unknown_weights=True).warnings[0]
    monkeypatch.setitem(perceptual.PUBLISHED_TRUNKS, hashlib.sha256(trunk.read_bytes()).hexdigest(), "a test")
    assert lpips_distance(trunk).warnings == ()
    for digest, name in list(perceptual.PUBLISHED_TRUNKS.items())[:2]:
        assert name.endswith(f"-{digest[:8]}.pth")


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file of LPIPS trunk weights"):
        lpips_distance(tmp_path / "none.pth")
    for content, match in (
        ({"fc.weight": torch.zeros(3)}, "neither torchvision's AlexNet"),
        ({"features.0.weight": torch.zeros(64, 3, 11, 11)}, "does not fit torchvision's AlexNet"),
    ):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match=match):
            lpips_distance(tmp_path / "other.pth", allow_unknown_weights=True)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """Random weights as RadImageNet's file names them: the parts of torchvision's ResNet-50 by number."""
    torch.manual_seed(0)
    network = models.resnet50(weights=None).eval()
    parts = torch.nn.Sequential(*list(network.children())[:-2])
    path = tmp_path_factory.mktemp("weights") / "ResNet50.pt"
    torch.save({f"backbone.{k}": v for k, v in parts.state_dict().items()}, path)
    return path, parts


def test_radimagenet_features_are_the_pooled_ones_of_its_parts_on_bgr_from_minus_1_to_1(
    resnet: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, parts = resnet
    extractor = radimagenet.radimagenet(path, allow_unknown_weights=True)
    assert extractor.key == "unknown_radimagenet"
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    x = torch.from_numpy(images[:, ::-1].copy()).float() * 2 / 255 - 1
    with torch.inference_mode():
        expected = parts(x).mean((2, 3)).numpy()
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setitem(radimagenet.PUBLISHED_RADIMAGENET, hashlib.sha256(path.read_bytes()).hexdigest(), "a test")
    assert radimagenet.radimagenet(path).key == "radimagenet"


def test_the_other_file_of_radimagenet_and_unknown_ones_are_refused(
    resnet: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"RadImageNet weights.*BMEII-AI/RadImageNet"):
        radimagenet.radimagenet(resnet[0])
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "conv1.bias": torch.zeros(64)}, tmp_path / "notop.pth")
    with pytest.raises(UserError, match="looks like RadImageNet-ResNet50_notop"):
        radimagenet.radimagenet(tmp_path / "notop.pth", allow_unknown_weights=True)

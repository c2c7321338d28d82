# SPDX-License-Identifier: Apache-2.0
"""Feature extractors: which weights are taken, what images become, and what the cache finds again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fidelity_files import FakeInception, publish, write_classifier
from PIL import Image
from torch import nn

from monai_synth.errors import UserError
from monai_synth.evaluate import features as door
from monai_synth.evaluate.feature_cache import FeatureCache, content_hash
from monai_synth.networks import ImageClassifier


def pictures(seed: int, n: int, channels: int = 1, size: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


@pytest.fixture
def torchscript(tmp_path: Path) -> Path:
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(FakeInception()).save(str(path))
    return path


@pytest.fixture(scope="module")
def inception_weights() -> dict[str, torch.Tensor]:
    """Random weights under the names of FID's Inception-v3."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    # Its constructor wants weights before it says what they are called.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(module.torch, "load", lambda *_, **__: {})
        network = module.FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="")
    state = network.state_dict()
    return {k: v * 5 if k.endswith("conv.weight") else v for k, v in state.items()}  # else all fades to 0


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_gives_the_features_of_torch_fidelity(
    tmp_path: Path, inception_weights: dict[str, torch.Tensor], legacy: bool
) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # The published file is of the older form, and was written before batch normalisation counted its batches.
    weights = {k: v for k, v in inception_weights.items() if not (legacy and k.endswith("num_batches_tracked"))}
    path = tmp_path / "weights.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    extractor = door.inception(path, allow_unknown_weights=True)
    images = pictures(0, 2)
    other = FeatureExtractorInceptionV3("other", ["2048"], feature_extractor_weights_path=str(path))
    expected = other(torch.from_numpy(images).expand(-1, 3, -1, -1))[0].numpy()
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    assert extractor.num_features == 2048


def test_weights_of_an_unknown_hash_are_refused_and_when_allowed_are_not_called_inception(
    tmp_path: Path, torchscript: Path
) -> None:
    with pytest.raises(
        UserError, match=r"none of the 2 published files of Inception.*; download .* --allow-unknown-weights"
    ):
        door.inception(torchscript)
    extractor = door.inception(torchscript, allow_unknown_weights=True)
    assert extractor.key == "unknown_inception"
    assert "not FID" in extractor.warnings[0]
    assert extractor.weights_sha256 == hashlib.sha256(torchscript.read_bytes()).hexdigest()


def test_a_file_whose_content_is_not_what_its_name_promises_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"promises 6726825d\.\.\., so the download is damaged"):
        door.inception(path)


def test_the_clean_resize_is_pillows_and_its_numbers_have_their_own_name(
    torchscript: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, torchscript)
    clean, usual = door.inception(torchscript, resize="clean"), door.inception(torchscript)
    assert (clean.key, usual.key) == ("inception_clean", "inception")
    assert clean.fingerprint != usual.fingerprint
    image = pictures(0, 1, 3, 40) // 3 + 80  # where Pillow's 8-bit form cuts no overshoot between its two passes
    resized = door.clean_resize(torch.from_numpy(image)).numpy()
    assert resized.shape == (1, 3, 299, 299)
    expected = np.asarray(Image.fromarray(np.moveaxis(image[0], 0, -1)).resize((299, 299), Image.Resampling.BICUBIC))
    assert np.abs(np.moveaxis(expected, -1, 0).astype(int) - resized[0]).max() <= 1
    np.testing.assert_array_equal(clean(image), usual(resized))
    large = pictures(1, 1, 3, 299)
    np.testing.assert_array_equal(clean(large), usual(large))
    with pytest.raises(UserError, match="allowed are tensorflow, clean"):
        door.inception(torchscript, resize="bilinear")


def test_the_known_hashes_begin_as_the_file_names_say() -> None:
    assert sum(digest.startswith("6726825d") for digest in door.PUBLISHED_INCEPTION) == 1
    assert {len(digest) for digest in door.PUBLISHED_INCEPTION} == {64}


def test_published_weights_are_inception_and_grey_images_become_rgb(
    torchscript: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, torchscript)
    extractor = door.inception(torchscript)
    assert extractor.key == "inception"
    assert not extractor.warnings
    grey = pictures(0, 3)
    np.testing.assert_array_equal(extractor(grey), extractor(np.repeat(grey, 3, axis=1)))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"no weights", "cannot be read"),
        ([1, 2], "no state dict"),
        ({"fc.weight": torch.zeros(3)}, "does not fit"),
        ({"AuxLogits.fc.weight": torch.zeros(3)}, "torchvision's own"),
    ],
)
def test_files_of_something_else_are_refused_with_the_place_to_get_the_right_one(
    tmp_path: Path, content: object, match: str
) -> None:
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"{match}.*github.com/mseitzer/pytorch-fid"):
        door.inception(path, allow_unknown_weights=True)


def test_a_missing_weights_file_and_a_foreign_torchscript_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file of Inception weights.*pytorch-fid"):
        door.inception(tmp_path / "none.pth")
    path = tmp_path / "other.pt"
    torch.jit.script(nn.Identity()).save(str(path))
    with pytest.raises(UserError, match="no TorchScript of Inception-v3"):
        door.inception(path, allow_unknown_weights=True)


def test_a_classifier_gives_its_own_pooled_features(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "c.pt")
    extractor = door.trained_classifier(path)
    images = pictures(0, 4)
    torch.manual_seed(0)
    network = ImageClassifier("resnet18", 2, 1, [0.5], [0.2]).eval()
    with torch.inference_mode():
        expected = network.features(torch.from_numpy(images).float() / 255).numpy()
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-5, atol=1e-5)
    assert (extractor.key, extractor.num_features) == ("classifier", 512)
    assert "resnet18 trained from random weights on real images" in extractor.recipe


def test_images_of_another_size_are_brought_to_the_classifiers_and_batches_do_not_matter(tmp_path: Path) -> None:
    extractor = door.trained_classifier(write_classifier(tmp_path / "c.pt", size=32))
    small = pictures(0, 3, size=16)
    whole = extractor(small)
    assert whole.shape == (3, 512)
    np.testing.assert_allclose(np.concatenate([extractor(image[None]) for image in small]), whole, rtol=1e-4, atol=1e-5)


def test_grey_images_become_rgb_for_a_classifier_of_rgb_and_rgb_is_refused_by_one_of_grey(tmp_path: Path) -> None:
    of_rgb = door.trained_classifier(write_classifier(tmp_path / "rgb.pt", channels=3))
    assert of_rgb(pictures(0, 2)).shape == (2, 512)
    of_grey = door.trained_classifier(write_classifier(tmp_path / "grey.pt"))
    with pytest.raises(UserError, match="takes grey images"):
        of_grey(pictures(0, 2, channels=3))


def test_a_trained_file_of_another_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'diffusion', needed is 'image_classifier'"):
        door.trained_classifier(write_classifier(tmp_path / "d.pt", stage="diffusion"))


def counting() -> tuple[door.Extractor, list[int]]:
    """First pixels as features, and how many images were asked for at a time."""
    calls: list[int] = []

    def call(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.flatten(1).float()[:, :5]

    extractor = door.Extractor("pixels", "first pixels", "none", "0" * 64, 5, None, (), call, torch.device("cpu"))
    return extractor, calls


def test_the_cache_computes_each_image_once_whatever_the_order(tmp_path: Path) -> None:
    extractor, calls = counting()
    images = pictures(0, 10)
    readers = [lambda image=image: image for image in images]
    first = FeatureCache(tmp_path, extractor).features(readers, batch_size=4)
    np.testing.assert_array_equal(first, images.reshape(10, -1)[:, :5])
    assert calls == [4, 4, 2]
    again = FeatureCache(tmp_path, extractor).features(readers[::-1], batch_size=3)
    np.testing.assert_array_equal(again, first[::-1])
    assert calls == [4, 4, 2]
    more = [*readers, *(lambda image=image: image for image in pictures(1, 2))]
    assert len(FeatureCache(tmp_path, extractor).features(more, batch_size=64)) == 12
    assert calls == [4, 4, 2, 2]


def test_a_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    extractor, calls = counting()
    readers = [lambda image=image: image for image in pictures(0, 3)]
    cache = FeatureCache(tmp_path, extractor)
    expected = cache.features(readers)
    cache.path.write_bytes(cache.path.read_bytes()[:100])
    np.testing.assert_array_equal(FeatureCache(tmp_path, extractor).features(readers), expected)
    assert calls == [3, 3]


def test_another_recipe_or_other_weights_have_another_file(tmp_path: Path) -> None:
    one = door.Extractor("k", "t", "recipe", "0" * 64, 5, None, (), lambda x: x, torch.device("cpu"))
    assert one.fingerprint != door.Extractor(**{**vars(one), "recipe": "other"}).fingerprint
    assert one.fingerprint != door.Extractor(**{**vars(one), "weights_sha256": "1" * 64}).fingerprint


def test_images_of_equal_bytes_and_other_shapes_are_not_mixed_up() -> None:
    assert content_hash(np.zeros((1, 2, 8), np.uint8)) != content_hash(np.zeros((1, 4, 4), np.uint8))


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = door.Extractor(
        "k", "network", "r", "0" * 64, 5, None, (), lambda x: torch.full((len(x), 5), torch.nan), torch.device("cpu")
    )
    with pytest.raises(UserError, match="not finite"):
        broken(pictures(0, 2))

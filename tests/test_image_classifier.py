# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from monai_synth.checkpoint import load_file, restore_network, save_atomic, trained_file
from monai_synth.errors import UserError
from monai_synth.networks import ImageClassifier
from monai_synth.networks.image_classifier import BACKBONES


def _torchvision():
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # a build that does not fit PyTorch raises on import
        pytest.skip(f"torchvision does not work here: {error}")
    return torchvision


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "densenet121"])
def test_with_torchvisions_weights_every_feature_is_torchvisions(backbone, tmp_path):
    torch.manual_seed(0)
    reference = getattr(_torchvision().models, backbone)(weights=None)
    for module in reference.modules():  # else a normalisation in evaluation mode is the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network = ImageClassifier(backbone, 3, 3, mean=[0.0], std=[1.0])
    network.load_backbone_weights(tmp_path / "weights.pth")
    x = torch.rand(2, 3, 64, 64)
    if backbone.startswith("resnet"):
        reference.fc = torch.nn.Identity()
    else:
        reference.classifier = torch.nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(network.eval().features(x), reference.eval()(x))


def test_every_layer_of_resnet18_gives_what_torchvisions_gives(tmp_path):
    torch.manual_seed(0)
    reference = _torchvision().models.resnet18(weights=None)
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network = ImageClassifier("resnet18", 2, 3, mean=[0.0], std=[1.0])
    network.load_backbone_weights(tmp_path / "weights.pth")
    outputs = {}
    for owner, model in (("own", network.backbone), ("torchvision", reference)):
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.BatchNorm2d):
                layer.register_forward_hook(
                    lambda _, __, out, key=(owner, name): outputs.__setitem__(key, out.detach().clone())
                )
    x = torch.rand(2, 3, 28, 28)
    network.train()(x), reference.train()(x)
    names = {name for owner, name in outputs if owner == "own"}
    assert names == {name for owner, name in outputs if owner == "torchvision"}
    assert len(names) == 40
    for name in names:
        torch.testing.assert_close(outputs["own", name], outputs["torchvision", name])


def test_grey_is_normalised_and_repeated():
    torch.manual_seed(0)
    grey = ImageClassifier("resnet18", 2, 1, mean=[0.4], std=[0.2]).eval()
    colour = ImageClassifier("resnet18", 2, 3, mean=[0.0], std=[1.0]).eval()
    colour.load_state_dict({k: v for k, v in grey.state_dict().items() if k not in ("mean", "std")}, strict=False)
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(grey(x), colour(((x - 0.4) / 0.2).repeat(1, 3, 1, 1)))
    assert grey(x).shape == (2, 2)
    assert grey.features(x).shape == (2, grey.num_features)


@pytest.mark.parametrize("backbone", sorted(set(BACKBONES) - {"resnet34", "densenet201", "densenet169"})[:3])
def test_a_backbone_takes_the_weights_that_its_own_names_stand_for(backbone, tmp_path):
    network = ImageClassifier(backbone, 2, 3)
    named = {BACKBONES[backbone].published_name(k): v + 1 for k, v in network.backbone.state_dict().items()}
    assert len(named) == len(network.backbone.state_dict())
    torch.save({**named, "_fc.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    before = {k: v.clone() for k, v in network.backbone.state_dict().items()}
    network.load_backbone_weights(tmp_path / "weights.pth")
    for key, value in network.backbone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, before[key] + 1)


def test_a_trained_file_gives_the_same_classifier_back(tmp_path):
    args = {"backbone": "resnet18", "num_classes": 3, "image_channels": 1, "mean": [0.3], "std": [0.2]}
    network = ImageClassifier(**args).eval()
    arch = {"target": "monai_synth.networks.ImageClassifier", "args": args}
    save_atomic(trained_file("image_classifier", network, arch, {"classes": {"a": 0}}), tmp_path / "c.pt")
    again = restore_network(load_file(tmp_path / "c.pt", stage="image_classifier"))
    x = torch.rand(1, 1, 28, 28)
    assert torch.equal(again(x), network(x))


def test_weights_of_another_network_are_refused_with_where_to_get_the_right_ones(tmp_path):
    other = ImageClassifier("resnet34", 2, 3)
    torch.save(other.backbone.state_dict(), tmp_path / "w.pth")
    network = ImageClassifier("resnet18", 2, 3)
    with pytest.raises(UserError, match=r"does not fit resnet18.*has besides.*resnet18-f37072fd\.pth"):
        network.load_backbone_weights(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"no weights file.*resnet18-f37072fd\.pth"):
        network.load_backbone_weights(tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"not a file of torch")
    with pytest.raises(UserError, match="cannot be read"):
        network.load_backbone_weights(tmp_path / "bad.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no state dict"):
        network.load_backbone_weights(tmp_path / "list.pth")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backbone": "vgg"}, "backbone 'vgg'; allowed are resnet18"),
        ({"num_classes": 1}, "2 or more classes"),
        ({"image_channels": 2}, "1 or 3 channels"),
        ({"std": [0.0]}, "std above 0"),
        ({"mean": [0.1, 0.2]}, "give 1 or 1 numbers"),
    ],
)
def test_options_out_of_range_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        ImageClassifier(**options)


def test_images_of_another_form_are_refused():
    with pytest.raises(UserError, match=r"takes \(B, 1, H, W\)"):
        ImageClassifier()(torch.rand(1, 3, 28, 28))

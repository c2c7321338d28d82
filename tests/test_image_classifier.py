# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
import torch

from monai_synth.checkpoint import load_file, restore_network, save_atomic, trained_file
from monai_synth.errors import UserError
from monai_synth.networks import ImageClassifier
from monai_synth.networks.image_classifier import BACKBONES
from monai_synth.networks.vit import interpolate_positions


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


def _moved(reference):
    """Every parameter moved from where building leaves it, such as biases from 0."""
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return reference.eval()


@pytest.mark.slow
@pytest.mark.parametrize("older_names", [False, True])
def test_with_torchvisions_weights_the_features_of_vit_b_16_are_its_class_token(older_names, tmp_path):
    torch.manual_seed(0)
    reference = _moved(_torchvision().models.vit_b_16(weights=None))
    state = reference.state_dict()
    if older_names:  # as in the file that torchvision publishes
        old = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
        state = {re.sub(r"mlp\.[03]", lambda m: old[m[0]], key): value for key, value in state.items()}
    torch.save(state, tmp_path / "weights.pth")
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    network = ImageClassifier("vit_b_16", 3, 3, mean, std, image_size=[224, 224]).eval()
    network.load_backbone_weights(tmp_path / "weights.pth")
    parameters = sum(p.numel() for p in reference.parameters()) - sum(p.numel() for p in reference.heads.parameters())
    assert sum(p.numel() for p in network.backbone.parameters()) == parameters - 768  # class token and its position
    reference.heads = torch.nn.Identity()
    x = torch.rand(1, 3, 224, 224)
    normalised = (x - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(std).reshape(1, 3, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(network.features(x), reference(normalised), rtol=1e-5, atol=1e-5)
    assert network.num_features == 768


def _deit(size: int = 224):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return _moved(timm.create_model("deit_tiny_patch16_224", pretrained=False, img_size=size))


def test_with_deits_weights_the_features_of_vit_ti_16_are_its_class_token(tmp_path):
    reference = _deit()
    torch.save({"model": reference.state_dict()}, tmp_path / "weights.pth")
    network = ImageClassifier("vit_ti_16", 3, 3, [0.0], [1.0], image_size=[224, 224]).eval()
    network.load_backbone_weights(tmp_path / "weights.pth")
    x = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        expected = reference.forward_features(x)[:, 0]
        torch.testing.assert_close(network.features(x), expected, rtol=1e-5, atol=1e-5)
    assert network.num_features == 192
    assert expected.std(0).max() > 1e-3


def _transformer_by_hand(state, positions, x):
    """Class token of a DeiT, written out: the equations of Dosovitskiy et al. 2021 (1 to 4)."""

    def norm(z, name):
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return z * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(z, name):
        return z @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attention(z, name):
        q, k, v = linear(z, f"{name}.qkv").reshape(*z.shape[:2], 3, 3, 64).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / 8).softmax(-1) @ v
        return linear(mixed.transpose(1, 2).flatten(2), f"{name}.proj")

    patches = x.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    weight = state["patch_embed.proj.weight"].flatten(1)
    z = patches @ weight.T + state["patch_embed.proj.bias"]
    z = torch.cat([state["cls_token"].expand(len(x), -1, -1), z], 1) + positions
    for i in range(12):
        z = z + attention(norm(z, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        hidden = linear(norm(z, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        z = z + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"blocks.{i}.mlp.fc2")
    return norm(z, "norm")[:, 0]


def _deit_state(seed: int = 0, num: int = 197):
    """Tensors by the names of the DeiT release, with more spread than at the start of a training."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"cls_token": (1, 1, 192), "pos_embed": (1, num, 192)}
    shapes |= {"patch_embed.proj.weight": (192, 3, 16, 16), "patch_embed.proj.bias": (192,)}
    layers = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}
    for i in range(12):
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    norms = ["norm", *(f"blocks.{i}.norm{k}" for i in range(12) for k in (1, 2))]
    shapes |= {f"{name}.{kind}": (192,) for name in norms for kind in ("weight", "bias")}
    shapes |= {"head.weight": (1000, 192), "head.bias": (1000,)}
    state = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value + ("norm" in name and name.endswith("weight")) for name, value in state.items()}


@pytest.mark.parametrize("image_size", [(32, 48), (64, 64)])
def test_at_another_size_the_positions_of_the_patches_are_interpolated_and_that_of_the_class_token_stays(
    image_size, tmp_path
):
    state = _deit_state()
    torch.save({"model": state}, tmp_path / "weights.pth")
    network = ImageClassifier("vit_ti_16", 2, 1, [0.4], [0.3], image_size=image_size).eval()
    network.load_backbone_weights(tmp_path / "weights.pth")
    grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, [s // 16 for s in image_size], mode="bicubic")
    positions = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).mT], 1)
    x = torch.rand(2, 1, *image_size)
    expected = _transformer_by_hand(state, positions, ((x - 0.4) / 0.3).expand(-1, 3, -1, -1))
    with torch.inference_mode():
        torch.testing.assert_close(network.features(x), expected, rtol=1e-4, atol=1e-5)


def test_interpolated_positions_keep_a_constant_and_are_the_same_on_the_same_grid():
    positions = torch.randn(1, 196, 5)
    assert torch.equal(interpolate_positions(positions, (14, 14)), positions)
    constant = positions[:, :1].expand(-1, 196, -1)
    torch.testing.assert_close(interpolate_positions(constant, (3, 20)), positions[:, :1].expand(-1, 60, -1))
    rows = torch.arange(14.0).repeat_interleave(14).reshape(1, 196, 1)  # the number of the row
    there = interpolate_positions(rows, (7, 28)).reshape(7, 28)
    assert (there.std(1) < 1e-5).all()
    torch.testing.assert_close(there[1:6, 0], torch.arange(5.0) * 2 + 2.5)  # centres of two rows


def test_a_trained_transformer_comes_back_with_its_image_size(tmp_path):
    args = {"backbone": "vit_ti_16", "num_classes": 3, "image_channels": 1, "image_size": [32, 32]}
    network = ImageClassifier(**args).eval()
    arch = {"target": "monai_synth.networks.ImageClassifier", "args": args}
    save_atomic(trained_file("image_classifier", network, arch, {"classes": {"a": 0}}), tmp_path / "c.pt")
    again = restore_network(load_file(tmp_path / "c.pt", stage="image_classifier"))
    x = torch.rand(1, 1, 32, 32)
    assert torch.equal(again(x), network(x))
    with pytest.raises(UserError, match=r"images of \[48, 32\]; this vit_ti_16 was made for \[32, 32\]"):
        again(torch.rand(1, 1, 48, 32))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state.pop("cls_token"), r"lacks 1 such as cls_token"),
        (lambda state: state.update(dist_token=torch.zeros(1, 1, 192)), r"has besides 1 such as dist_token"),
        (lambda state: state.update(pos_embed=torch.zeros(1, 190, 192)), r"has of another shape 1 such as pos_embed"),
        (lambda state: state.update(cls_token=torch.zeros(1, 1, 384)), r"has of another shape 2 such as cls_token"),
    ],
)
def test_weights_that_are_not_those_of_deit_ti_are_refused(change, match, tmp_path):
    state = _deit_state()
    change(state)
    torch.save({"model": state}, tmp_path / "weights.pth")
    network = ImageClassifier("vit_ti_16", 2, 1, image_size=[32, 32])
    with pytest.raises(UserError, match=f"{match}.*deit_tiny_patch16_224-a1311bcf"):
        network.load_backbone_weights(tmp_path / "weights.pth")


def test_every_parameter_of_a_transformer_is_trained():
    torch.manual_seed(0)
    network = ImageClassifier("vit_ti_16", 3, 1, image_size=[32, 32])
    torch.nn.functional.cross_entropy(network(torch.rand(2, 1, 32, 32)), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backbone": "vit_ti_16"}, r"vit_ti_16 is made for one size of images; give image_size"),
        ({"backbone": "vit_ti_16", "image_size": [40, 32]}, r"image_size is \[40, 32\]; .* multiples of 16"),
        ({"backbone": "vit_ti_16", "image_size": [32]}, "a height and a width"),
        ({"backbone": "vgg"}, "backbone 'vgg'; allowed are resnet_small, resnet18"),
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


def test_the_small_resnet_keeps_the_full_size_until_its_second_block_and_has_no_published_weights(tmp_path):
    network = ImageClassifier("resnet_small", 3).eval()
    shapes = []
    for layer in (network.backbone.layer1, network.backbone.layer4):
        layer.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert network(torch.rand(1, 1, 32, 32)).shape == (1, 3)
    assert shapes == [(16, 32, 32), (128, 4, 4)]
    torch.save(network.backbone.state_dict(), tmp_path / "own.pth")
    with pytest.raises(UserError, match=r"no published weights of resnet_small; train it from scratch, or take resn"):
        network.load_backbone_weights(tmp_path / "own.pth")

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import load_file as read_safetensors
from safetensors.torch import save_file

from monai_synth.checkpoint import load_file, restore_network, save_atomic, trained_file
from monai_synth.errors import UserError
from monai_synth.networks import TextUNet
from monai_synth.networks.text_unet import pretrained
from monai_synth.training.alignment import AlignedNetwork

TINY = {
    "image_channels": 1,
    "num_classes": 3,
    "image_size": (16, 16),
    "text_dim": 6,
    "block_out_channels": (8, 16, 16),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
# such as a folder of tiny-sd, which denoises latents of 4 channels
FOLDER = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3,
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def tiny(seed: int = 0, **options) -> TextUNet:
    torch.manual_seed(seed)
    network = TextUNet(**{**TINY, **options})
    network.set_text_features(torch.randn(network.num_classes, network.text_dim))
    return network


def example(batch: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 16, 16, generator=generator)
    return x, torch.arange(batch) * 300 + 7, torch.arange(batch) % 3


def folder_of(path, seed: int = 5, safe: bool = True, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = UNet2DConditionModel(**{**FOLDER, **options})
    model.save_pretrained(path, safe_serialization=safe)
    return model.state_dict()


def test_it_is_diffusers_unet_told_the_projected_feature_of_the_class_as_one_token():
    network = tiny().eval()
    torch.manual_seed(9)
    reference = UNet2DConditionModel(**{**FOLDER, "in_channels": 1, "out_channels": 1}).eval()
    reference.load_state_dict(network.unet.state_dict())
    x, t, labels = example()
    weight, bias = network.text_projection.weight, network.text_projection.bias
    token = network.text_features[labels] @ weight.T + bias
    with torch.no_grad():
        expected = reference(x, t, encoder_hidden_states=token[:, None]).sample
        torch.testing.assert_close(network(x, t, labels), expected)


@pytest.mark.parametrize(
    ("cross_attention", "mid_block"), [((False, True, True), False), ((False, False, False), True)]
)
def test_attention_is_at_the_levels_named_in_encoder_and_decoder(cross_attention, mid_block):
    network = tiny(cross_attention=cross_attention, mid_block=mid_block)
    down = [hasattr(block, "attentions") for block in network.unet.down_blocks]
    up = [hasattr(block, "attentions") for block in network.unet.up_blocks]
    assert tuple(down) == cross_attention
    assert tuple(reversed(up)) == cross_attention
    assert (network.unet.mid_block is not None) == mid_block
    x, t, labels = example()
    assert not torch.equal(network(x, t, labels), network(x, t, labels + 1))


def test_the_class_changes_the_prediction_and_only_that_of_its_image():
    network = tiny().eval()
    x, t, labels = example(3)
    other = labels.clone()
    other[1] = 2
    with torch.no_grad():
        change = (network(x, t, labels) - network(x, t, other)).abs().amax((1, 2, 3))
    assert change[1] > 1e-4
    assert change[0] < 1e-6
    assert change[2] < 1e-6


def test_by_default_it_has_the_parameters_of_tiny_sd():
    with torch.device("meta"):
        network = TextUNet(1, 4, (64, 64))
    parameters = sum(p.numel() for p in network.unet.parameters())
    assert round(parameters / 1e6, 2) == 323.37
    assert sum(p.numel() for p in network.parameters()) - parameters == 512 * 768 + 768
    assert network.unet.down_blocks[2].resnets[0].conv_shortcut.out_channels == 1280


def test_every_attention_is_pytorchs_fused_one():
    assert {type(p) for p in tiny().unet.attn_processors.values()} == {AttnProcessor2_0}


def test_the_seed_decides_the_random_weights():
    one, same, other = (tiny(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["unet.conv_in.weight"], other["unet.conv_in.weight"])


def test_recomputing_activations_changes_neither_prediction_nor_gradient():
    x, t, labels = example()
    results = []
    for use_checkpoint in (False, True):
        network = tiny(use_checkpoint=use_checkpoint).train()
        assert network.unet.is_gradient_checkpointing == use_checkpoint
        prediction = network(x, t, labels)
        prediction.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        results.append((prediction.detach(), gradients))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert "text_projection.weight" in results[0][1]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


@pytest.mark.parametrize("layer", ["unet.down_blocks.2", "unet.down_blocks.2.resnets.0.conv_shortcut"])
def test_the_layers_that_the_text_and_its_code_tap_are_there(layer):
    x, t, labels = example()
    given = {"x": x, "timesteps": t, "class_labels": labels}
    network = tiny(block_out_channels=(8, 16, 24))  # else the last level needs no shortcut
    aligned = AlignedNetwork(network, layer=layer, num_features=5, example=given)
    assert aligned.projection.out_features == 24


def test_a_trained_file_brings_the_text_features_along(tmp_path):
    network = tiny().eval()
    arch = {"target": "monai_synth.networks.TextUNet", "args": {**TINY, "image_size": [16, 16]}}
    save_atomic(trained_file("diffusion", network, arch, {}), tmp_path / "model.pt")
    again = restore_network(load_file(tmp_path / "model.pt", stage="diffusion"))
    with torch.no_grad():
        assert torch.equal(again(*example()), network(*example()))
        assert torch.equal(copy.deepcopy(network)(*example()), network(*example()))


def test_without_text_features_it_refuses_to_run():
    torch.manual_seed(0)
    network = TextUNet(**TINY)
    with pytest.raises(UserError, match="no text features yet; call set_text_features"):
        network(*example())
    network.load_state_dict(TextUNet(**TINY).state_dict())  # of one that was not told either
    with pytest.raises(UserError, match="no text features yet"):
        copy.deepcopy(network)(*example())


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (torch.ones(2, 6), r"shape \(2, 6\); this network takes \(3, 6\)"),
        (torch.full((3, 6), float("nan")), "not finite"),
        (torch.eye(3, 6) * torch.tensor([[1.0], [0.0], [1.0]]), "0 for a class"),
        (torch.eye(3, 6)[[0, 1, 1]], "two classes have the same"),
    ],
)
def test_text_features_that_tell_no_classes_apart_are_refused(features, match):
    network = TextUNet(**TINY)
    with pytest.raises(UserError, match=match):
        network.set_text_features(features)
    assert not network.text_features.any()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("inside", ["", "unet"])
def test_a_folder_of_pretrained_weights_gives_all_but_the_first_and_last_convolution(safe, inside, tmp_path):
    source = folder_of(tmp_path / inside, safe=safe)
    assert (tmp_path / inside / "diffusion_pytorch_model.safetensors").is_file() == safe
    network = tiny()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    pretrained(network, tmp_path)
    for key, value in network.unet.state_dict().items():
        if not key.startswith(("conv_in.", "conv_out.")):
            assert torch.equal(value, source[key]), key
            continue
        assert value.shape == before[f"unet.{key}"].shape
        assert not torch.equal(value, before[f"unet.{key}"])
    for key in ("text_features", "text_projection.weight", "text_projection.bias"):
        assert torch.equal(network.state_dict()[key], before[key])


def test_the_new_convolutions_are_decided_by_the_seed(tmp_path):
    folder_of(tmp_path)
    convolutions = []
    for seed in (3, 3, 4):
        network = tiny()
        torch.manual_seed(seed)
        network.load_pretrained_unet(tmp_path)
        convolutions.append(network.unet.conv_out.weight.clone())
    assert torch.equal(convolutions[0], convolutions[1])
    assert not torch.equal(convolutions[0], convolutions[2])


def test_weights_in_half_precision_and_options_written_for_each_level_are_taken(tmp_path):
    source = folder_of(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in source.items()}, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "attention_head_dim": [2, 2, 2],
        "layers_per_block": [1, 1, 1],
        "of_a_later_version": 1,
        "upcast_attention": None,
    }
    del config["norm_eps"]  # as the default
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = tiny()
    network.load_pretrained_unet(tmp_path)
    key = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(network.unet.state_dict()[key], source[key].half().float())


def _drop(key):
    def change(folder):
        file = folder / "diffusion_pytorch_model.safetensors"
        content = read_safetensors(file)
        save_file({k: v.clone() for k, v in content.items() if k != key}, file)

    return change


def _truncate(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _truncate_bin(folder):
    content = read_safetensors(folder / "diffusion_pytorch_model.safetensors")
    torch.save({k: v.clone() for k, v in content.items()}, folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    file = folder / "diffusion_pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-1000])


def _unsafe_bin(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"weights": pytest.approx}, folder / "diffusion_pytorch_model.bin")


def _other_shape(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    content = {k: v.clone() for k, v in read_safetensors(file).items()}
    save_file({**content, "time_embedding.linear_1.bias": torch.zeros(3)}, file)


def _lora(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "pytorch_lora_weights.safetensors")


def _add_key(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({**{k: v.clone() for k, v in read_safetensors(file).items()}, "mid_block.x": torch.zeros(1)}, file)


def _config(**changes):
    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json and no unet"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be read"),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
            r"has no diffusion_pytorch_model\.safetensors or diffusion_pytorch_model\.bin",
        ),
        (_drop("down_blocks.1.resnets.0.conv1.weight"), r"lacks 1 such as down_blocks\.1\.resnets\.0\.conv1\.weight"),
        (_add_key, r"has besides 1 such as mid_block\.x"),
        (_other_shape, r"has of another shape 1 such as time_embedding\.linear_1\.bias"),
        (_truncate, r"cannot be read .*truncated"),
        (_truncate_bin, r"\.bin cannot be read .*truncated"),
        (_unsafe_bin, r"\.bin cannot be read"),
        (_lora, r"has no config\.json"),
        (_config(_class_name="AutoencoderKL"), "is of a AutoencoderKL, not of a UNet2DConditionModel"),
        (_config(flip_sin_to_cos=False), "flip_sin_to_cos: False there, True here"),
        (_config(mid_block_type="UNetMidBlock2DCrossAttn"), "mid_block_type: 'UNetMidBlock2DCrossAttn' there"),
    ],
)
def test_a_folder_that_is_incomplete_or_of_another_model_is_refused_and_changes_nothing(change, match, tmp_path):
    folder_of(tmp_path)
    change(tmp_path)
    network = tiny()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    with pytest.raises(UserError, match=match) as error:
        network.load_pretrained_unet(tmp_path)
    assert "huggingface.co/segmind/tiny-sd" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_weights_of_a_unet_with_other_levels_are_refused_by_both_their_widths(tmp_path):
    folder_of(tmp_path, block_out_channels=(8, 8, 16))
    with pytest.raises(UserError, match=r"block_out_channels: \[8, 8, 16\] there, \[8, 16, 16\] here"):
        tiny().load_pretrained_unet(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        tiny().load_pretrained_unet(tmp_path / "none")


def test_random_weights_are_taken_only_where_they_are_asked_for_by_name():
    network = tiny()
    with pytest.raises(UserError, match=r"huggingface\.co/segmind/tiny-sd.*or give 'random' to begin with random"):
        pretrained(network, None)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    pretrained(network, "random")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_size": (16, 18)}, r"image_size is \[16, 18\]; with 3 levels .* multiples of 4"),
        ({"image_size": (16, 16, 16)}, "a height and a width"),
        ({"cross_attention": (True, True)}, "differ in length"),
        ({"cross_attention": (False,) * 3}, "turn one on to tell the class"),
        ({"block_out_channels": (8, 10, 16)}, "has 10; give multiples of norm_num_groups 4"),
        ({"block_out_channels": (4, 8, 16), "attention_head_dim": 8}, "has 4; .*attention_head_dim 8"),
        ({"num_classes": 0}, "num_classes is 0; give a whole number from 1"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        TextUNet(**{**TINY, **options})


@pytest.mark.slow
def test_it_runs_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch\n"
        "from monai_synth.networks import TextUNet\n"
        f"network = TextUNet(**{TINY!r})\n"
        "network.set_text_features(torch.eye(3, 6))\n"
        "print(network(torch.zeros(1, 1, 16, 16), torch.tensor([5]), torch.tensor([1])).shape)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["torch.Size([1,", "1,", "16,", "16])"], result.stderr


def test_words_that_are_no_truth_values_are_refused_for_levels() -> None:
    with pytest.raises(UserError, match="True or False"):
        TextUNet(1, 2, (16, 16), block_out_channels=(8, 16), cross_attention=["false", "true"], norm_num_groups=4)

# SPDX-License-Identifier: Apache-2.0
"""Weights of MONAI and of monai-generative load so that the outputs are equal, or not at all."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets import DiffusionModelUNet, SPADEDiffusionModelUNet
from torch import nn

from monai_synth.errors import UserError
from monai_synth.networks import SPADEUNet

OPTIONS = {
    "attention_levels": (False, True),
    "num_res_blocks": 2,
    "num_head_channels": 8,
    "norm_num_groups": 8,
}
LABELS, CHANNELS = 4, (16, 32)
IN_MONAIS_WAY = {
    "spade_in": ("up",),
    "spade_variant": "monai",
    "time_scale_shift": False,
    "semantic_downsample": "nearest",
}


def ours(spatial_dims: int, **options) -> SPADEUNet:
    return SPADEUNet(spatial_dims, 3, 2, LABELS, CHANNELS, **(OPTIONS | IN_MONAIS_WAY | options)).eval()


def theirs(kind: type, spatial_dims: int, **options) -> nn.Module:
    """A network of MONAI or monai-generative, every parameter random."""
    widths = {"num_channels" if kind.__module__.startswith("generative") else "channels": CHANNELS}
    labels = {"label_nc": LABELS} if "SPADE" in kind.__name__ else {}
    network = kind(spatial_dims=spatial_dims, in_channels=3, out_channels=2, **widths, **labels, **OPTIONS, **options)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.15
    return network.eval()


def outputs(network: nn.Module, spatial_dims: int, *, spade: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    shape = [8] * spatial_dims
    x = torch.randn(2, 3, *shape, generator=generator)
    seg = torch.randint(0, 2, (2, LABELS, *shape), generator=generator).float()
    with torch.no_grad():
        return network(x, torch.tensor([3, 900]), **({"seg": seg} if spade else {}))


def assert_equal_outputs(own: nn.Module, other: nn.Module, spatial_dims: int, *, spade: bool) -> None:
    expected = outputs(other, spatial_dims, spade=spade)
    assert expected.std() > 0.02
    torch.testing.assert_close(outputs(own, spatial_dims, spade=spade), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("resblock_updown", [False, True])
def test_monais_spade_unet_loads_strictly_and_computes_the_same(spatial_dims, resblock_updown):
    other = theirs(SPADEDiffusionModelUNet, spatial_dims, resblock_updown=resblock_updown)
    own = ours(spatial_dims, resblock_updown=resblock_updown)
    own.load_state_dict(other.state_dict(), strict=True)
    assert_equal_outputs(own, other, spatial_dims, spade=True)


@pytest.mark.parametrize("options", [{}, {"include_fc": False}, {"use_combined_linear": True}])
@pytest.mark.parametrize("kind", [SPADEDiffusionModelUNet, DiffusionModelUNet])
def test_monais_attention_options_load_and_compute_the_same(kind, options):
    spade = kind is SPADEDiffusionModelUNet
    other, own = theirs(kind, 2, **options), ours(2, spade_in=("up",) if spade else ())
    own.load_monai_state_dict(other.state_dict())
    assert_equal_outputs(own, other, 2, spade=spade)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("spade", [True, False])
def test_monai_generatives_unets_load_and_compute_the_same(spatial_dims, spade):
    nets = pytest.importorskip("generative.networks.nets", reason="needs the extra `generative`")
    other = theirs(nets.SPADEDiffusionModelUNet if spade else nets.DiffusionModelUNet, spatial_dims)
    own = ours(spatial_dims, spade_in=("up",) if spade else ())
    state = other.state_dict()
    keys = set(state)
    own.load_monai_state_dict(state)
    assert set(state) == keys
    assert_equal_outputs(own, other, spatial_dims, spade=spade)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spade_variant": "paper"}, "unknown: up_blocks.*param_free_norm.*spade_variant='monai'"),
        ({"spade_in": ("up", "down")}, "missing: down_blocks"),
        (
            {"time_scale_shift": True},
            r"another shape: down_blocks.*time_emb_proj.weight \(16, 64\) instead of \(32, 64\)",
        ),
    ],
)
def test_weights_of_another_architecture_are_refused_and_nothing_is_loaded(options, words):
    own = ours(2, **options)
    before = {key: value.clone() for key, value in own.state_dict().items()}
    with pytest.raises(UserError, match=words):
        own.load_monai_state_dict(theirs(SPADEDiffusionModelUNet, 2).state_dict())
    assert all(torch.equal(before[key], value) for key, value in own.state_dict().items())


@pytest.mark.parametrize("lost", ["conv_in.conv.weight", "middle_block.attention.attn.to_k.bias", "out.0.bias"])
def test_a_truncated_state_dict_is_refused_by_the_name_of_what_is_lost(lost):
    state = theirs(SPADEDiffusionModelUNet, 2).state_dict()
    del state[lost]
    with pytest.raises(UserError, match=f"1 missing: {lost}"):
        ours(2).load_monai_state_dict(state)


def test_half_an_output_projection_is_not_taken_for_none():
    state = theirs(SPADEDiffusionModelUNet, 2).state_dict()
    del state["middle_block.attention.attn.out_proj.bias"]
    with pytest.raises(UserError, match=r"1 missing: middle_block\.attention\.attn\.out_proj\.bias"):
        ours(2).load_monai_state_dict(state)


def test_class_embeddings_load_and_compute_the_same():
    other, own = theirs(DiffusionModelUNet, 2, num_class_embeds=3), ours(2, spade_in=(), num_class_embeds=3)
    own.load_monai_state_dict(other.state_dict())
    x, t, labels = torch.randn(3, 3, 16, 16), torch.tensor([5, 500, 900]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        torch.testing.assert_close(own(x, t, class_labels=labels), other(x, t, class_labels=labels))
        assert not torch.equal(own(x, t, class_labels=labels), own(x, t, class_labels=labels.flip(0)))


def test_class_embeddings_for_a_network_without_classes_are_refused():
    with pytest.raises(UserError, match=r"1 unknown: class_embedding\.weight"):
        ours(2, spade_in=()).load_monai_state_dict(theirs(DiffusionModelUNet, 2, num_class_embeds=3).state_dict())


def test_a_network_with_classes_asks_for_them():
    with pytest.raises(UserError, match=r"knows 3 classes and needs `class_labels`"):
        ours(2, spade_in=(), num_class_embeds=3)(torch.randn(1, 3, 16, 16), torch.tensor([5]))

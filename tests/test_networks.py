# SPDX-License-Identifier: Apache-2.0
"""SPADE as in the paper, the U-Net that uses it, and the classifier that shares its encoder."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from monai_synth.errors import UserError
from monai_synth.networks import SPADE, NoisyClassifier, SPADEUNet, pool_semantic

LEVELS = {
    "attention_levels": (False, True),
    "num_res_blocks": 1,
    "num_head_channels": 8,
    "norm_num_groups": 8,
}


def unet(spatial_dims: int = 2, **options) -> SPADEUNet:
    return SPADEUNet(spatial_dims, 3, 2, 4, (8, 16), **(LEVELS | {"spade_hidden_channels": 8} | options))


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, so that nothing is hidden behind a layer that starts at 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return network.eval()


def inputs(spatial_dims: int = 2, batch: int = 2, size: int = 8, factor: int = 1) -> tuple[torch.Tensor, ...]:
    label = torch.randint(0, 4, (batch, *[size * factor] * spatial_dims))
    seg = nn.functional.one_hot(label, 4).movedim(-1, 1).float()
    return torch.randn(batch, 3, *[size] * spatial_dims), torch.tensor([7, 800])[:batch], seg


class TestSPADE:
    def test_a_uniform_map_gives_uniform_modulations_away_from_the_borders(self):
        layer = SPADE(2, 16, 4, hidden_channels=8, num_groups=4)
        seg = torch.zeros(1, 4, 12, 12)
        seg[:, 1] = 1
        for modulation in layer.modulation(seg):
            inside = modulation[..., 2:-2, 2:-2]
            torch.testing.assert_close(inside, inside[..., :1, :1].expand_as(inside), rtol=0, atol=1e-6)
            assert inside.std(dim=1).min() > 1e-3  # yet differs between channels

    def test_monais_variant_blows_up_borders_of_a_uniform_map(self):
        """Why the paper's is the default: an InstanceNorm of what is constant leaves border effects only."""
        layer = SPADE(2, 16, 4, hidden_channels=8, num_groups=4, variant="monai")
        seg = torch.zeros(1, 4, 32, 32)
        seg[:, 1] = 1
        gamma = layer.modulation(seg)[0] - 1
        assert gamma[..., 8:-8, 8:-8].abs().mean() < 0.2 * gamma[..., :2, :].abs().mean()

    def test_features_are_normalised_without_parameters_then_scaled_and_shifted(self):
        layer, x, seg = SPADE(2, 16, 4, num_groups=4), torch.randn(2, 16, 6, 6), torch.rand(2, 4, 6, 6)
        groups = x.view(2, 4, -1)
        normal = (groups - groups.mean(-1, keepdim=True)) / groups.std(-1, keepdim=True, correction=0)
        hidden = torch.relu(layer.mlp_shared.conv(seg))
        expected = normal.view_as(x) * (1 + layer.mlp_gamma.conv(hidden)) + layer.mlp_beta.conv(hidden)
        torch.testing.assert_close(layer(x, seg), expected, rtol=1e-4, atol=1e-5)
        assert not list(layer.param_free_norm.parameters())

    def test_an_unknown_variant_is_refused(self):
        with pytest.raises(UserError, match=r"'park'.*'paper', 'monai'"):
            SPADE(2, 16, 4, variant="park")


class TestPooling:
    @pytest.mark.parametrize("spatial_dims", [2, 3])
    @pytest.mark.parametrize("mode", ["max_onehot", "max_label"])
    def test_a_nodule_of_one_pixel_survives_pooling_by_eight(self, spatial_dims, mode):
        seg = torch.zeros(1, 6, *[16] * spatial_dims)
        seg[:, 4] = 1
        pixel = (0, slice(None), *[13] * spatial_dims)
        seg[pixel] = torch.tensor([0.0, 0, 0, 0, 0, 1])
        pooled = pool_semantic(seg, [2] * spatial_dims, mode)
        assert pooled[0, 5].nonzero().tolist() == [[1] * spatial_dims]
        surroundings = pooled[(0, 4, *[1] * spatial_dims)]
        assert surroundings == (1 if mode == "max_onehot" else 0)

    def test_nearest_loses_it(self):
        seg = torch.zeros(1, 2, 16, 16)
        seg[:, 1, 13, 13] = 1
        assert pool_semantic(seg, (2, 2), "nearest")[:, 1].sum() == 0

    def test_max_label_equals_the_one_hot_of_the_pooled_label_map(self):
        label = torch.randint(0, 5, (2, 12, 12))
        seg = nn.functional.one_hot(label, 5).movedim(-1, 1).float()
        pooled_label = nn.functional.max_pool2d(label.float(), 3).long()
        expected = nn.functional.one_hot(pooled_label, 5).movedim(-1, 1).float()
        assert torch.equal(pool_semantic(seg, (4, 4), "max_label"), expected)

    @pytest.mark.parametrize("mode", ["max_onehot", "max_label", "nearest"])
    def test_an_empty_map_stays_empty_and_steps_may_be_joined(self, mode):
        assert pool_semantic(torch.zeros(1, 3, 8, 8), (4, 4), mode).sum() == 0
        seg = nn.functional.one_hot(torch.randint(0, 3, (1, 16, 16)), 3).movedim(-1, 1).float()
        at_once, in_two = (
            pool_semantic(seg, (4, 4), mode),
            pool_semantic(pool_semantic(seg, (8, 8), mode), (4, 4), mode),
        )
        assert torch.equal(at_once, in_two)

    @pytest.mark.parametrize("shape", [(3, 4), (16, 16), (8,)])
    def test_shapes_that_do_not_divide_are_refused(self, shape):
        with pytest.raises(UserError, match="integer multiple"):
            pool_semantic(torch.zeros(1, 3, 8, 8), shape)


class TestUNet:
    @pytest.mark.parametrize("spatial_dims", [2, 3])
    @pytest.mark.parametrize("resblock_updown", [False, True])
    def test_a_fresh_network_predicts_zero_noise_of_the_right_shape(self, spatial_dims, resblock_updown):
        x, t, seg = inputs(spatial_dims)
        eps = unet(spatial_dims, resblock_updown=resblock_updown)(x, t, seg)
        assert eps.shape == (2, 2, *x.shape[2:])
        assert (eps == 0).all()

    def test_a_fresh_residual_block_passes_its_input_on(self):
        block, seg = unet().down_blocks[0].resnets[0], inputs()[2]
        h = torch.randn(2, 8, 8, 8)
        assert torch.equal(block(h, torch.randn(2, 32), seg), h)

    @pytest.mark.parametrize("spatial_dims", [2, 3])
    @pytest.mark.parametrize("time_scale_shift", [False, True])
    def test_the_output_depends_on_time_map_and_each_input_channel(self, spatial_dims, time_scale_shift):
        network = randomise(unet(spatial_dims, time_scale_shift=time_scale_shift))
        x, t, seg = inputs(spatial_dims)
        eps = network(x, t, seg)
        assert (network(x, t + 100, seg) - eps).abs().mean() > 1e-3
        for channel in range(3):
            changed = x.clone()
            changed[:, channel] += 1
            assert (network(changed, t, seg) - eps).abs().mean() > 1e-3
        for label in range(4):
            changed = seg.clone()
            changed[:, label] = 1 - changed[:, label]
            assert (network(x, t, changed) - eps).abs().mean() > 1e-3

    @pytest.mark.parametrize(("place", "num_blocks"), [("down", 2), ("middle", 2), ("up", 4)])
    def test_each_part_alone_carries_the_map_into_the_output(self, place, num_blocks):
        network = randomise(unet(spade_in=(place,)))
        x, t, seg = inputs()
        assert (network(x, t, seg) - network(x, t, seg.flip(1))).abs().mean() > 1e-4
        assert len(network.modulations(seg, x.shape[2:])) == num_blocks
        spade_layers = [name for name, module in network.named_modules() if isinstance(module, SPADE)]
        assert len(spade_layers) == 2 * num_blocks
        assert all(place in name for name in spade_layers)

    def test_samples_of_a_batch_do_not_mix(self):
        network = randomise(unet())
        x, t, seg = inputs()
        torch.testing.assert_close(network(x, t, seg)[1:], network(x[1:], t[1:], seg[1:]), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("spatial_dims", [2, 3])
    @pytest.mark.parametrize("factor", [1, 4])
    def test_cached_modulations_give_the_same_output(self, spatial_dims, factor):
        network = randomise(unet(spatial_dims))
        x, t, seg = inputs(spatial_dims, factor=factor)
        cached = network.modulations(seg, x.shape[2:])
        torch.testing.assert_close(network(x, t, modulations=cached), network(x, t, seg), rtol=0, atol=1e-5)

    def test_modulations_of_one_map_serve_a_batch(self):
        network = randomise(unet())
        x, t, seg = inputs()
        cached = network.modulations(seg[:1], x.shape[2:])
        expected = network(x, t, seg[:1].expand(2, -1, -1, -1))
        torch.testing.assert_close(network(x, t, modulations=cached), expected, rtol=0, atol=1e-5)

    def test_a_finer_map_counts_as_its_pooled_one(self):
        network = randomise(unet())
        x, t, seg = inputs(factor=4)
        torch.testing.assert_close(network(x, t, seg), network(x, t, pool_semantic(seg, (8, 8))), rtol=0, atol=1e-6)

    def test_without_spade_the_map_is_neither_needed_nor_used(self):
        network = randomise(unet(spade_in=()))
        x, t, seg = inputs()
        assert torch.equal(network(x, t), network(x, t, seg))
        assert network.modulations(seg, x.shape[2:]) == ()

    def test_time_scales_and_shifts_after_the_second_norm(self):
        """With the scale at -1 and the shift at 0 the residual branch is empty, whatever the input."""
        network = randomise(unet(spade_in=()))
        block = network.middle_block.resnet_1
        nn.init.zeros_(block.time_emb_proj.weight)
        block.time_emb_proj.bias.data = torch.cat([torch.full((16,), -1.0), torch.zeros(16)])
        x = torch.randn(2, 16, 4, 4)
        expected = x + block.conv2.conv.bias.view(1, -1, 1, 1)
        torch.testing.assert_close(block(x, torch.randn(2, 32)), expected)

    def test_checkpointing_changes_neither_output_nor_gradients(self):
        plain, saving = randomise(unet()), randomise(unet(use_checkpoint=True))
        x, t, seg = inputs()
        for network in (plain, saving):
            network(x, t, seg).square().sum().backward()
        for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)

    def test_checkpointing_keeps_fewer_activations(self):
        def saved_numbers(network):
            sizes = {}
            x, t, seg = inputs(size=16)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda v: sizes.__setitem__(v.untyped_storage().data_ptr(), v.numel()) or v, lambda v: v
            ):
                network(x, t, seg)
            return sum(sizes.values())

        assert saved_numbers(randomise(unet(use_checkpoint=True))) < 0.6 * saved_numbers(randomise(unet()))

    def test_every_parameter_gets_a_gradient(self):
        network = randomise(unet())
        network(*inputs()).square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_flash_attention_changes_nothing(self):
        x, t, seg = inputs()
        flash, plain = (randomise(unet(use_flash_attention=flag))(x, t, seg) for flag in (True, False))
        torch.testing.assert_close(flash, plain, rtol=1e-4, atol=1e-5)

    def test_metadata_is_dropped_at_the_door(self):
        network = randomise(unet())
        x, t, seg = inputs()
        eps = network(MetaTensor(x), t, MetaTensor(seg))
        assert not isinstance(eps, MetaTensor)
        assert torch.equal(eps, network(x, t, seg))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spade_in": ("decoder",)}, r"spade_in is \('decoder',\).*'down', 'middle', 'up'"),
        ({"semantic_downsample": "max"}, "semantic_downsample is 'max'"),
        ({"attention_levels": (True,)}, "attention_levels has 1 entries for 2 levels"),
        ({"norm_num_groups": 3}, r"channels \(8, 16\).*norm_num_groups 3"),
        ({"num_head_channels": 5}, "num_head_channels 5 does not divide"),
        ({"num_res_blocks": (1, 2, 3)}, r"num_res_blocks \(1, 2, 3\)"),
        ({"spade_variant": "park"}, "spade_variant is 'park'"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        unet(**options)


def test_inputs_that_do_not_fit_are_refused():
    network = unet()
    x, t, seg = inputs()
    with pytest.raises(UserError, match="needs the map"):
        network(x, t)
    with pytest.raises(UserError, match="multiples of 2"):
        network(x[..., :7], t, seg)
    with pytest.raises(UserError, match="3 channels"):
        network(x[:, :2], t, seg)
    with pytest.raises(UserError, match=r"needs \(B, 4"):
        network(x, t, seg[:, :3])
    with pytest.raises(UserError, match="integer multiple"):
        network(x, t, seg[..., :6])
    with pytest.raises(UserError, match="modulations for 0 residual blocks"):
        network(x, t, modulations=())


class TestClassifier:
    def classifier(self, spatial_dims: int = 2, out_channels: int = 2) -> NoisyClassifier:
        return randomise(NoisyClassifier(spatial_dims, 1, out_channels, (8, 16), **LEVELS))

    @pytest.mark.parametrize("spatial_dims", [2, 3])
    @pytest.mark.parametrize("out_channels", [1, 2])
    def test_it_gives_a_row_for_each_crop_of_any_even_size(self, spatial_dims, out_channels):
        network = self.classifier(spatial_dims, out_channels)
        for size in (8, 12):
            x = torch.randn(3, 1, *[size] * spatial_dims)
            assert network(x, torch.tensor([0, 5, 999])).shape == (3, out_channels)

    def test_it_knows_the_timestep_and_each_crop_by_itself(self):
        network, x, t = self.classifier(), torch.randn(2, 1, 8, 8), torch.tensor([10, 500])
        out = network(x, t)
        assert (network(x, t + 300) - out).abs().min() > 1e-4
        torch.testing.assert_close(network(x[1:], t[1:]), out[1:], rtol=1e-4, atol=1e-5)

    def test_its_encoder_is_that_of_the_unet(self):
        """Same layers, same names: the U-Net without SPADE can lend its weights."""
        own = {k: v.shape for k, v in self.classifier().state_dict().items() if not k.startswith(("out", "conv_in"))}
        lender = {k: v.shape for k, v in unet(spade_in=()).state_dict().items()}
        assert own.items() <= lender.items()

    def test_its_gradient_reaches_every_pixel(self):
        x = torch.randn(1, 1, 8, 8, requires_grad=True)
        out = self.classifier()(x, torch.tensor([3]))
        assert (torch.autograd.grad(out[0, 1], x)[0] != 0).all()

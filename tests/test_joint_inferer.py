# SPDX-License-Identifier: Apache-2.0
"""Sampling image and label together: learned variance, clipping, ensembles, and samples that do not see each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from monai_synth.diffusion import SAMPLERS, alphas_cumprod, clipped_prediction, make_sampler, predicted_x_0
from monai_synth.diffusion import sampling_timesteps as visited
from monai_synth.errors import UserError
from monai_synth.inference import make_generators, sample
from monai_synth.inference.joint import SEEDS_PER_MEMBER, JointInferer
from monai_synth.networks import SPADEUNet

LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
DATA_STD = 0.4
NARROW_STD = 0.02
KINDS = pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])


@pytest.fixture(scope="module")
def network() -> SPADEUNet:
    """Three image channels, one label channel and their v; every parameter is random, none of its layers is silent."""
    torch.manual_seed(0)
    net = SPADEUNet(
        2, 4, 8, label_nc=0, channels=(8, 8), attention_levels=(False, True), num_res_blocks=1,
        num_head_channels=8, norm_num_groups=4, spade_in=(),
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return net.eval()


def given(num: int, is_label: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """A label, or an image, and where it is known; the rest is not a number."""
    generator = torch.Generator().manual_seed(3)
    known = torch.rand(num, 4, 8, 8, generator=generator)
    known[:, 3] = (known[:, 3] > 0.5).float()
    is_known = torch.zeros(known.shape, dtype=torch.bool)
    is_known[:, slice(3, 4) if is_label else slice(0, 3)] = True
    return torch.where(is_known, known, math.nan), is_known


class TestLearnedVariance:
    @pytest.mark.parametrize("v", [-1.0, 0.0, 1.0])
    @pytest.mark.parametrize("num_steps", [1000, 250, 50])
    def test_the_spread_of_the_samples_is_that_of_the_exact_recursion(self, num_steps, v):
        """Of data N(0, NARROW_STD^2), with beta and beta tilde of the shortened chain and their logarithms' mean.

        For data as narrow as that the three differ by 8 %, more than the spread's error.
        """

        def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            abar = ABAR[int(t[0])]
            eps = math.sqrt(1 - abar) * x / (abar * NARROW_STD**2 + 1 - abar)
            return torch.cat([eps, torch.full_like(x, v)], dim=1)

        steps, variance = visited(LINEAR, num_steps), 1.0
        for t, t_prev in zip(steps, [*steps[1:], -1], strict=True):
            abar, before = ABAR[t], ABAR[t_prev] if t_prev >= 0 else 1.0
            beta = 1 - abar / before
            data = math.sqrt(abar) * NARROW_STD**2 / (abar * NARROW_STD**2 + 1 - abar)
            factor = math.sqrt(before) * beta / (1 - abar) * data + math.sqrt(1 - beta) * (1 - before) / (1 - abar)
            added = 0.0 if t_prev < 0 else beta * ((1 - before) / (1 - abar)) ** (0.5 - v / 2)
            variance = factor**2 * variance + added
        inferer = JointInferer(LINEAR, value_range=(-1, 1), sampler="ddpm", num_steps=num_steps, clip=False)
        x_0 = inferer(torch.zeros(2, 1, 5_000), denoiser, is_known=None, seeds=[0, 1])["x_0"]
        assert float(x_0.std()) == pytest.approx(math.sqrt(variance), rel=4 / math.sqrt(2 * 10_000) + 1e-3)

    def test_v_beyond_its_range_is_that_of_its_end(self):
        """The variance stays within beta tilde and beta whatever the network says."""
        found = [
            JointInferer(LINEAR, sampler="ddpm", num_steps=10)(
                torch.zeros(1, 2, 4, 4),
                lambda x, t, v=v: torch.cat([0.9 * x, torch.full_like(x, v)], dim=1),
                is_known=None,
                seeds=[0],
            )["x_0"]
            for v in (1.0, 50.0)
        ]
        assert torch.equal(*found)

    def test_a_single_step_adds_no_noise(self):
        scheduler = make_sampler("ddpm", LINEAR, 1, learned_variance=True)
        x_0 = sample(lambda x, t: x, torch.zeros(1, 2, 4, 4), scheduler, generators=make_generators([0]))
        assert float(x_0.abs().max()) < 1e-6

    @pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc"])
    def test_the_other_samplers_leave_v_aside(self, name):
        def run(v: float) -> torch.Tensor:
            return JointInferer(LINEAR, sampler=name)(
                torch.zeros(1, 2, 4, 4),
                lambda x, t: torch.cat([0.9 * x, torch.full_like(x, v)], dim=1),
                is_known=None,
                seeds=[0],
            )["x_0"]

        assert torch.equal(run(-1.0), run(1.0))


class TestClip:
    @KINDS
    @pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
    def test_the_predicted_data_lie_within_the_range_and_those_that_did_change_no_bit(self, schedule, kind):
        schedule = {**schedule, "prediction_type": kind}
        x_t, prediction = torch.randn(2, 5, 400, generator=torch.Generator().manual_seed(0))
        t = torch.tensor([0, 10, 500, 990, 999])
        x_0 = predicted_x_0(schedule, prediction, x_t, t)
        clipped = clipped_prediction(schedule, prediction, x_t, t, (0, 1))
        inside = (x_0 >= 0) & (x_0 <= 1)
        assert torch.equal(clipped[inside], prediction[inside])
        # At the cosine schedule's end sqrt(abar) is 5e-5: eps of single precision tells x_0 to 1e-2 at best.
        rounding = 1e-2 if (kind, schedule["beta_schedule"]) == ("epsilon", "squaredcos_cap_v2") else 1e-4
        found = predicted_x_0(schedule, clipped, x_t, t)
        torch.testing.assert_close(found, x_0.clamp(0, 1), rtol=0, atol=rounding)

    @pytest.mark.parametrize("name", SAMPLERS)
    @pytest.mark.parametrize("value_range", [(0, 1), (-1, 1)])
    def test_samples_lie_within_the_range(self, network, name, value_range):
        inferer = JointInferer(LINEAR, value_range=value_range, sampler=name, num_steps=8)
        x_0 = inferer(torch.zeros(2, 4, 8, 8), network, is_known=None, seeds=[0, 1])["x_0"]
        assert value_range[0] <= float(x_0.min()) < float(x_0.max()) <= value_range[1]
        free = JointInferer(LINEAR, value_range=value_range, sampler=name, num_steps=8, clip=False)
        assert float(free(torch.zeros(2, 4, 8, 8), network, is_known=None, seeds=[0, 1])["x_0"].abs().max()) > 1.5


EVERY_WAY = pytest.mark.parametrize(
    "options",
    [
        *({"sampler": name} for name in SAMPLERS),
        {"sampler": "ddpm", "resample": 3},
        {"sampler": "dpm++", "gradient_scale": 1.0},
        {"sampler": "ddpm", "gradient_scale": 1.0},
        {"sampler": "ddpm", "known_noise": "fixed"},
        {"sampler": "unipc", "known_noise": "fresh", "num_ensemble": 3},
    ],
    ids=str,
)


class TestGivenParts:
    @EVERY_WAY
    @pytest.mark.parametrize("is_label", [True, False], ids=["label", "image"])
    def test_they_come_back_to_the_bit_and_the_rest_is_sampled(self, network, options, is_label):
        known, is_known = given(2, is_label)
        inferer = JointInferer(LINEAR, num_steps=6, **options)
        result = inferer(known, network, is_known=is_known, seeds=[0, 1])
        assert torch.equal(result["x_0"][is_known], known[is_known])
        assert result["x_0"].isfinite().all()
        rest = torch.where(is_known, 0, result["x_0"])
        assert (rest[0] - rest[1]).abs().max() > 0.05
        if result["std"] is not None:
            assert (result["std"][is_known] == 0).all()

    @EVERY_WAY
    def test_the_sample_of_a_seed_is_the_same_alone_and_beside_one_that_knows_nothing(self, network, options):
        known, is_known = given(3)
        is_known[1] = False
        inferer = JointInferer(LINEAR, num_steps=6, **options)
        together = inferer(known, network, is_known=is_known, seeds=[5, 6, 7])["x_0"]
        for i, seed in enumerate([5, 6, 7]):
            where = is_known[i : i + 1] if i != 1 else None
            alone = inferer(known[i : i + 1], network, is_known=where, seeds=[seed])["x_0"]
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)

    def test_they_change_what_is_sampled_beside_them(self, network):
        known, is_known = given(1)
        inferer = JointInferer(LINEAR, num_steps=6)
        first = inferer(known, network, is_known=is_known, seeds=[0])["x_0"]
        second = inferer(1 - known, network, is_known=is_known, seeds=[0])["x_0"]
        assert (first - second)[:, :3].abs().max() > 0.01

    def test_fresh_noise_of_the_known_part_repeats_neither_the_start_nor_the_sampler_s_noise(self, network):
        known, is_known = given(1)
        states = []

        def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            abar = ABAR[int(t[0])]
            states.append(((x - math.sqrt(abar) * known) / math.sqrt(1 - abar))[is_known])
            return network(x, t)

        JointInferer(LINEAR, sampler="ddpm", num_steps=4)(known, watched, is_known=is_known, seeds=[0])
        generator = make_generators([0])[0]  # draws what the start and the sampler's steps draw
        drawn = [torch.randn(1, 4, 8, 8, generator=generator)[is_known] for _ in range(5)]
        torch.testing.assert_close(states[0], drawn[0], rtol=1e-4, atol=1e-4)
        for eps in states[1:]:
            assert all((eps - other).abs().mean() > 0.5 for other in drawn)

    def test_no_gradient_is_computed_without_its_scale(self, network):
        known, is_known = given(1)
        modes = []

        def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            modes.append(torch.is_grad_enabled())
            return network(x, t)

        JointInferer(LINEAR, num_steps=4, gradient_scale=0.0)(known, watched, is_known=is_known, seeds=[0])
        assert modes == [False] * 4
        JointInferer(LINEAR, num_steps=4, gradient_scale=0.5)(known, watched, is_known=is_known, seeds=[0])
        assert modes[4:] == [False, True] * 4

    def test_the_correction_leaves_no_gradient_at_the_network_and_works_in_inference_mode(self, network):
        inferer = JointInferer(LINEAR, num_steps=4, gradient_scale=1.0)
        with torch.inference_mode():
            known, is_known = given(1)
            x_0 = inferer(known, network, is_known=is_known, seeds=[0])["x_0"]
        assert not x_0.requires_grad
        assert all(p.grad is None for p in network.parameters())


class TestEnsemble:
    def test_it_is_mean_and_standard_deviation_of_samples_with_the_members_seeds(self, network):
        known, is_known = given(2)
        single, several = (JointInferer(LINEAR, num_steps=5, num_ensemble=n) for n in (1, 4))
        members = torch.stack(
            [
                single(known, network, is_known=is_known, seeds=[3 + m * SEEDS_PER_MEMBER, 9 + m * SEEDS_PER_MEMBER])[
                    "x_0"
                ]
                for m in range(4)
            ]
        )
        found = several(known, network, is_known=is_known, seeds=[3, 9])
        assert SEEDS_PER_MEMBER == 2**40
        torch.testing.assert_close(found["x_0"], members.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["std"], members.std(0), rtol=1e-4, atol=1e-6)
        assert float(found["std"][~is_known].mean()) > 0.02

    def test_seeds_that_differ_only_above_32_bits_draw_other_noise(self):
        """PyTorch's own generator takes them for the same."""
        seeds = [7, 7 + 2**32, 7 + 2**39, 7 + 2**40, 7 + 2**41]
        noise = torch.stack([torch.randn(50, generator=g) for g in make_generators(seeds)])
        assert len(noise.unique(dim=0)) == 5
        assert torch.equal(noise[0], torch.randn(50, generator=torch.Generator().manual_seed(7)))

    def test_its_batches_are_as_large_as_what_comes_in(self, network):
        sizes = []

        def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            return network(x, t)

        JointInferer(LINEAR, num_steps=2, num_ensemble=5)(
            torch.zeros(3, 4, 8, 8), watched, is_known=None, seeds=[0, 1, 2]
        )
        assert set(sizes) == {3}


class TestResample:
    def test_every_step_but_the_last_is_walked_as_often(self, network):
        heard = []

        def watched(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            heard.append(int(t[0]))
            return network(x, t)

        known, is_known = given(1)
        JointInferer(LINEAR, sampler="ddpm", num_steps=4, resample=3)(known, watched, is_known=is_known, seeds=[0])
        steps = visited(LINEAR, 4)
        assert heard == [t for t in steps[:-1] for _ in range(3)] + steps[-1:]

    def test_repeated_steps_keep_the_spread_of_data_that_the_denoiser_knows_exactly(self):
        """Going back to t and forth again has the same law, so no sample is lost or gained by it."""

        def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            abar = ABAR[int(t[0])]
            return math.sqrt(1 - abar) * x / (abar * DATA_STD**2 + 1 - abar)

        inferer = JointInferer(
            LINEAR, learned_variance=False, value_range=(-1, 1), sampler="ddpm", num_steps=200, resample=3, clip=False
        )
        x_0 = inferer(torch.zeros(2, 1, 5_000), denoiser, is_known=None, seeds=[0, 1])["x_0"]
        assert float(x_0.std()) == pytest.approx(DATA_STD, rel=0.04)

    @pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc"])
    def test_the_loop_refuses_it_with_a_sampler_that_remembers_its_steps(self, name):
        with pytest.raises(UserError, match="resample is 2, but the sampler remembers"):
            sample(lambda x, t: x, torch.zeros(1, 2, 4, 4), make_sampler(name, LINEAR, 5), resample=2)


class TestMisuse:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sampler": "euler"}, "euler"),
            ({"num_steps": 0}, "num_steps is 0"),
            ({"num_steps": 1001}, "num_steps is 1001"),
            ({"gradient_scale": -0.5}, "gradient_scale is -0.5"),
            ({"gradient_scale": math.nan}, "gradient_scale is nan"),
            ({"num_ensemble": 0}, "num_ensemble is 0"),
            ({"resample": 0}, "resample is 0"),
            ({"resample": 2.5}, "resample is 2.5"),
            ({"resample": 2, "sampler": "dpm++"}, "give --sampler ddpm"),
            ({"known_noise": "none"}, "known_noise is 'none'"),
            ({"value_range": (0, 255)}, "value_range"),
        ],
        ids=str,
    )
    def test_wrong_options_are_refused_before_any_work(self, options, message):
        with pytest.raises(UserError, match=message):
            JointInferer(LINEAR, **options)

    def test_a_network_with_other_channels_than_learned_variance_asks_for_is_refused_with_both_counts(self, network):
        inferer = JointInferer(LINEAR, learned_variance=False)
        with pytest.raises(UserError, match="has 8 output channels; with 4 .* learned_variance False it needs 4"):
            inferer(torch.zeros(1, 4, 8, 8), network, is_known=None, seeds=[0])
        with pytest.raises(UserError, match="has 2 output channels; with 2 .* learned_variance True it needs 4"):
            JointInferer(LINEAR)(torch.zeros(1, 2, 4, 4), lambda x, t: x, is_known=None, seeds=[0])


def test_the_table_of_the_schedule_is_the_one_that_the_closed_forms_use():
    np.testing.assert_allclose(alphas_cumprod(LINEAR).numpy(), ABAR, rtol=1e-12)

# SPDX-License-Identifier: Apache-2.0
"""Local guidance of nodules: where it acts, in which direction, in which order, and by how much."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from monai_synth.diffusion import make_sampler
from monai_synth.errors import UserError
from monai_synth.inference import (
    NoduleGuidance,
    NoduleRequest,
    initial_noise,
    latent_window,
    make_generators,
    nodule_requests,
    sample,
)

SCALED = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0205,
}
SIZE, CROP, CHANNELS = 24, 8, 3


class Decoder(nn.Module):
    """A frozen nonlinear map with twice the resolution that mixes neighbours, as a decoder does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.kernel = nn.Parameter(torch.randn(1, CHANNELS, 3, 3, generator=generator) * 0.4)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        up = nn.functional.interpolate(z, scale_factor=2.0, mode="nearest")
        return torch.tanh(nn.functional.conv2d(up, self.kernel, padding=1))


class Classifier(nn.Module):
    """Reads the image through fixed random weights, and the timestep."""

    def __init__(self, out_channels: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(out_channels, (2 * CROP) ** 2, generator=generator) * 0.1)
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls.append((x.detach().clone(), t.clone()))
        hidden = x.flatten(1) @ self.weight.T
        return hidden + 0.1 * hidden**2 + t[:, None] / 1000


def request(center, targets, *, radius=1) -> NoduleRequest:
    region = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    row, column = center
    region[max(row - radius, 0) : row + radius + 1, max(column - radius, 0) : column + radius + 1] = True
    return NoduleRequest(tuple(center), region, targets)


def classifiers() -> dict[str, nn.Module]:
    return {
        "lobulation": Classifier(1, 2),
        "malignancy": Classifier(2, 3),
        "texture": Classifier(1, 4),
    }


def guide(requests, networks=None, **options) -> NoduleGuidance:
    return NoduleGuidance(Decoder(), networks or classifiers(), requests, crop_size_latent=CROP, **options)


def latents(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def log_p(z, center, name, target, networks, t=100) -> torch.Tensor:
    """Log-probability of one feature of one nodule, written out."""
    rows, columns = latent_window(center, CROP, (SIZE, SIZE))
    output = networks[name](Decoder()(z[:1, :, rows, columns]), torch.tensor([t]))[0]
    return torch.log_softmax(output, 0)[int(target)] if name == "malignancy" else -((output[0] - target) ** 2)


def gradient_of(z, *args) -> torch.Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(log_p(z, *args), z)[0]


class TestWhere:
    @pytest.mark.parametrize("decode", ["crop_first", "decode_first"])
    def test_gradient_is_exactly_zero_outside_the_region_and_not_inside(self, decode):
        asked = request((10, 12), {"lobulation": 5.0, "malignancy": 1})
        gradient = guide([[asked]], decode=decode)(latents(), 100, 0.01)
        assert gradient.dtype == torch.float32
        assert (gradient[:, :, ~asked.region] == 0).all()
        assert (gradient[:, :, asked.region] != 0).all()

    def test_each_nodule_of_a_slice_gets_the_gradient_it_would_get_alone(self):
        first, second = (
            request((5, 5), {"texture": 1.0}),
            request((17, 16), {"texture": 5.0, "lobulation": 2.0}),
        )
        both = guide([[first, second]])(latents(), 100, 0.01)
        alone = guide([[first]])(latents(), 100, 0.01) + guide([[second]])(latents(), 100, 0.01)
        torch.testing.assert_close(both, alone)
        assert both[:, :, first.region].abs().min() > 0
        assert both[:, :, second.region].abs().min() > 0

    @pytest.mark.parametrize("decode", ["crop_first", "decode_first"])
    def test_nodules_of_one_slice_do_not_reach_into_each_others_regions(self, decode):
        near = request((10, 10), {"texture": 1.0}), request((10, 14), {"texture": 5.0})
        both = guide([near], decode=decode)(latents(), 100, 0.01)
        alone = guide([near[:1]], decode=decode)(latents(), 100, 0.01)
        torch.testing.assert_close(both[:, :, near[0].region], alone[:, :, near[0].region])

    @pytest.mark.parametrize("center", [(0, 0), (0, 23), (23, 2), (23, 23), (11, 23)])
    def test_a_nodule_at_the_border_is_guided_as_well(self, center):
        asked = request(center, {"texture": 5.0})
        gradient = guide([[asked]])(latents(), 100, 0.01)
        assert (gradient[:, :, asked.region] != 0).all()
        assert (gradient[:, :, ~asked.region] == 0).all()

    def test_the_crop_is_moved_inside_but_never_shrunk(self):
        assert latent_window((10, 0), 8, (24, 24)) == (slice(6, 14), slice(0, 8))
        assert latent_window((23, 12), 8, (24, 24)) == (slice(16, 24), slice(8, 16))

    def test_samples_without_requests_are_left_alone(self):
        gradient = guide([[], [request((9, 9), {"malignancy": 0})], []])(latents(3), 100, 0.01)
        assert (gradient[[0, 2]] == 0).all()
        assert (gradient[1] != 0).any()


class TestHowMuch:
    @pytest.mark.parametrize("name", ["lobulation", "malignancy"])
    @pytest.mark.parametrize("target", [0, 1])
    def test_gradient_is_that_of_the_log_probability_times_the_scale(self, name, target):
        asked = request((10, 12), {name: target})
        gradient = guide([[asked]], scales={name: 3.0})(latents(), 100, 0.01)
        expected = 3 * gradient_of(latents(), (10, 12), name, target, classifiers()) * asked.region
        torch.testing.assert_close(gradient, expected)

    @pytest.mark.parametrize("name", ["lobulation", "malignancy"])
    @pytest.mark.parametrize("target", [0, 1])
    def test_following_the_gradient_raises_the_probability_of_what_is_asked(self, name, target):
        z = latents()
        gradient = guide([[request((10, 12), {name: target})]])(z, 100, 0.01)
        args = ((10, 12), name, target, classifiers())
        assert log_p(z + 0.05 * gradient, *args) > log_p(z, *args)

    def test_regressors_are_summed_at_one_latent_and_malignancy_is_judged_at_the_moved_one(self):
        networks, z, variance = classifiers(), latents(), 0.7
        asked = request((10, 12), {"lobulation": 4.0, "texture": 2.0, "malignancy": 1})
        gradient = guide([[asked]], scales={"texture": 2.0, "malignancy": 0.5})(z, 100, variance)
        at = (10, 12)
        regressed = gradient_of(z, at, "lobulation", 4, networks) + 2 * gradient_of(z, at, "texture", 2, networks)
        regressed = regressed * asked.region
        moved = z + variance * regressed
        malignancy = 0.5 * gradient_of(moved, at, "malignancy", 1, networks) * asked.region
        torch.testing.assert_close(gradient, regressed + malignancy)
        unmoved = 0.5 * gradient_of(z, at, "malignancy", 1, networks) * asked.region
        assert (malignancy - unmoved).abs().max() > 1e-3  # the order matters in this example

    def test_sigma_scaling_moves_the_latent_by_sigma_instead_of_the_variance(self):
        networks, z, variance = classifiers(), latents(), 0.25
        asked = request((10, 12), {"lobulation": 4.0, "malignancy": 1})
        gradient = guide([[asked]], scale_by="sigma")(z, 100, variance)
        regressed = gradient_of(z, (10, 12), "lobulation", 4, networks) * asked.region
        moved = z + 0.5 * regressed
        malignancy = gradient_of(moved, (10, 12), "malignancy", 1, networks) * asked.region
        torch.testing.assert_close(variance * gradient, 0.5 * (regressed + malignancy))
        assert (guide([[asked]], scale_by="sigma")(z, 0, 0.0) == 0).all()

    def test_decoding_first_crops_the_image_of_the_whole_latent(self):
        asked, networks = request((10, 12), {"texture": 1.0}), classifiers()
        gradient = guide([[asked]], networks, decode="decode_first")(latents(), 100, 0.01)
        rows, columns = latent_window((10, 12), CROP, (SIZE, SIZE))
        pixels = Decoder()(latents())[:, :, 2 * rows.start : 2 * rows.stop, 2 * columns.start : 2 * columns.stop]
        torch.testing.assert_close(networks["texture"].calls[0][0], pixels)
        z = latents().requires_grad_()
        pixels = Decoder()(z)[:, :, 2 * rows.start : 2 * rows.stop, 2 * columns.start : 2 * columns.stop]
        score = -((networks["texture"](pixels, torch.tensor([100])) - 1.0) ** 2).sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(score, z)[0] * asked.region)
        cropped = guide([[asked]])(latents(), 100, 0.01)
        assert (gradient - cropped).abs().max() > 1e-6  # the crop's border has other surroundings

    def test_classifiers_are_told_the_timestep_and_all_crops_go_through_in_one_call(self):
        networks = classifiers()
        nodules = [
            [request((5, 5), {"texture": 1.0, "lobulation": 1.0})],
            [request((9, 9), {"texture": 2.0})] * 2,
        ]
        guide(nodules, networks)(latents(2), 321, 0.01)
        assert [len(t) for _, t in networks["texture"].calls] == [3]
        assert [len(t) for _, t in networks["lobulation"].calls] == [1]
        assert networks["texture"].calls[0][1].tolist() == [321, 321, 321]

    def test_outside_the_interval_nothing_is_guided(self):
        guidance = guide([[request((9, 9), {"texture": 1.0})]], interval=(100, 200))
        assert [bool(guidance(latents(), t, 0.01).any()) for t in (99, 100, 200, 201)] == [
            False,
            True,
            True,
            False,
        ]

    def test_networks_are_frozen_and_get_no_gradient(self):
        networks, decoder = classifiers(), Decoder()
        NoduleGuidance(decoder, networks, [[request((9, 9), {"texture": 1.0})]], crop_size_latent=CROP)(
            latents(), 100, 0.01
        )
        for module in (decoder, *networks.values()):
            assert not module.training
            assert all(not p.requires_grad and p.grad is None for p in module.parameters())


class TestInTheLoop:
    def denoiser(self, x_t, t):
        return 0.9 * x_t

    @pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++"])
    def test_scale_zero_is_bit_identical_to_no_guidance(self, name):
        asked = [[request((10, 12), {"texture": 5.0, "malignancy": 1})]]
        guidance = guide(asked, scales={"texture": 0.0, "malignancy": 0.0, "lobulation": 0.0})
        plain, guided = (
            sample(
                self.denoiser,
                latents(),
                make_sampler(name, SCALED, 5),
                guidance=g,
                generators=make_generators([3]),
            )
            for g in (None, guidance)
        )
        assert torch.equal(plain, guided)

    @pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++", "unipc"])
    def test_samples_come_closer_to_what_was_asked_and_stay_equal_elsewhere(self, name):
        networks = {"texture": Classifier(1, 4)}
        asked = request((10, 12), {"texture": 5.0}, radius=3)
        noise = initial_noise((CHANNELS, SIZE, SIZE), make_generators([7]))
        plain, guided = (
            sample(
                self.denoiser,
                noise,
                make_sampler(name, SCALED, 20),
                guidance=guide([[asked]], networks, scales={"texture": s}),
                generators=make_generators([7]),
            )
            for s in (0.0, 0.2)
        )
        args = ((10, 12), "texture", 5.0, networks)
        assert log_p(guided, *args) > log_p(plain, *args) + 1
        assert torch.equal(plain[:, :, ~asked.region], guided[:, :, ~asked.region])

    def test_a_nodules_guidance_does_not_depend_on_the_batch(self):
        nodules = [[request((5 + 3 * i, 9), {"texture": float(i), "malignancy": i % 2})] for i in range(4)]
        noise = initial_noise((CHANNELS, SIZE, SIZE), make_generators(range(4)))

        def run(chosen):
            return sample(
                self.denoiser,
                noise[chosen],
                make_sampler("ddpm", SCALED, 6),
                guidance=guide([nodules[i] for i in chosen]),
                generators=make_generators(chosen),
            )

        together = run([0, 1, 2, 3])
        for i in range(4):
            torch.testing.assert_close(together[i], run([i])[0], rtol=1e-5, atol=1e-5)

    def test_guidance_works_for_a_caller_in_inference_mode(self):
        guidance = guide([[request((10, 12), {"texture": 5.0})]])
        with torch.inference_mode():
            noise = initial_noise((CHANNELS, SIZE, SIZE), make_generators([7]))
            guided = sample(self.denoiser, noise, make_sampler("ddim", SCALED, 3), guidance=guidance)
        assert guided.isfinite().all()


class TestRequests:
    FACTOR = 4

    def label(self) -> np.ndarray:
        label = np.full((64, 96), 4, dtype=np.uint8)
        label[9, 33] = 5  # a nodule of one pixel
        label[40:52, 60:70] = 7
        return label

    def nodules(self) -> list[dict]:
        return [
            {
                "center": [45.5, 64.5],
                "bbox": [40, 60, 52, 70],
                "malignant": 1,
                "texture": 5,
                "lobulation": None,
            },
            {"center": [9, 33], "bbox": [9, 33, 10, 34], "malignant": 0, "texture": 2, "lobulation": 3},
        ]

    def test_a_one_pixel_nodule_has_a_region_of_its_latent_pixel_and_its_neighbours(self):
        asked = nodule_requests(self.label(), self.nodules(), self.FACTOR, features=("malignancy", "texture"))[1]
        expected = torch.zeros(16, 24, dtype=torch.bool)
        expected[1:4, 7:10] = True
        assert asked.center == (2, 8)
        assert torch.equal(asked.region, expected)
        assert asked.targets == {"malignancy": 0.0, "texture": 2.0}

    def test_without_dilation_the_region_is_the_pooled_nodule(self):
        asked = nodule_requests(torch.from_numpy(self.label()), self.nodules(), self.FACTOR, dilation=0)[0]
        expected = torch.zeros(16, 24, dtype=torch.bool)
        expected[10:13, 15:18] = True
        assert torch.equal(asked.region, expected)

    def test_features_without_a_rating_are_not_asked_for_and_targets_override(self):
        features = ("malignancy", "lobulation")
        first, second = nodule_requests(
            self.label(), self.nodules(), self.FACTOR, features=features, targets={"malignancy": 0}
        )
        assert first.targets == {"malignancy": 0.0}
        assert second.targets == {"malignancy": 0.0, "lobulation": 3.0}

    def test_touching_nodules_are_parted_by_the_nearest_centre(self):
        label = np.full((32, 64), 4)
        label[8:16, 8:40] = 6
        nodules = [{"center": [12, 15.5], "malignant": 0}, {"center": [12, 32], "malignant": 1}]
        left, right = nodule_requests(label, nodules, self.FACTOR, dilation=0)
        assert torch.equal(left.region.nonzero()[:, 1].unique(), torch.arange(2, 6))
        assert torch.equal(right.region.nonzero()[:, 1].unique(), torch.arange(6, 10))

    def test_a_bare_map_asks_for_the_malignancy_that_its_labels_say(self):
        small, large = nodule_requests(self.label(), None, self.FACTOR, targets={"texture": 1.0})
        assert small.targets == {"malignancy": 0.0, "texture": 1.0}
        assert large.targets == {"malignancy": 1.0, "texture": 1.0}
        assert large.center == (11, 16)

    def test_pixels_that_touch_at_a_corner_are_one_nodule(self):
        label = np.where(np.eye(16, dtype=bool), 6, 4)
        assert len(nodule_requests(label, None, self.FACTOR)) == 1

    def test_a_map_without_nodules_asks_for_nothing(self):
        assert nodule_requests(np.full((64, 64), 4), None, self.FACTOR) == []
        assert nodule_requests(np.full((64, 64), 4), [], self.FACTOR) == []

    @pytest.mark.parametrize(
        ("label", "words"),
        [(np.full((64, 64), 4), "has none there"), (np.full((62, 64), 5), "multiples of 4")],
    )
    def test_a_map_that_does_not_fit_is_refused(self, label, words):
        with pytest.raises(UserError, match=words):
            nodule_requests(label, self.nodules(), self.FACTOR)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scales": {"margin": 1.0}}, "no classifier for \\['margin'\\].*lobulation"),
        ({"scale_by": "std"}, "scale_by is 'std'"),
        ({"decode": "first"}, "decode is 'first'.*crop_first"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        guide([[request((5, 5), {"texture": 1.0})]], **options)


def test_requests_that_do_not_fit_the_latents_are_refused():
    with pytest.raises(UserError, match="no classifier for \\['margin'\\]"):
        guide([[request((5, 5), {"margin": 1.0})]])
    with pytest.raises(UserError, match=r"1 samples.*2 latents"):
        guide([[]])(latents(2), 5, 0.1)
    with pytest.raises(UserError, match="region has shape"):
        guide([[NoduleRequest((1, 1), torch.ones(4, 4, dtype=torch.bool), {"texture": 1.0})]])(latents(), 5, 0.1)
    with pytest.raises(UserError, match="crop_size_latent 8 is larger"):
        guide([[]])(latents()[..., :4], 5, 0.1)

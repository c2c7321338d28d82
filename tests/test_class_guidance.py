# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance, where everything is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from monai_synth.diffusion import alphas_cumprod
from monai_synth.errors import UserError
from monai_synth.inference.classes import ClassInferer, ClassSamplingDataset, guidance_scale_of, guided

SCHEDULE = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
MEANS, STD = torch.tensor([-0.5, 0.3]), 0.1  # of the two classes, which are equally frequent
NULL = 2


class ExactDenoiser(torch.nn.Module):
    """The best prediction for a mixture of two Gaussians: told the class, or none (a mean by responsibility)."""

    def __init__(self, prediction_type: str = "epsilon") -> None:
        super().__init__()
        self.table = alphas_cumprod(SCHEDULE)
        self.prediction_type = prediction_type
        self.batches: list[tuple[int, set[int]]] = []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, *, class_labels: torch.Tensor) -> torch.Tensor:
        self.batches.append((len(x_t), set(class_labels.tolist())))
        abar = self.table[t].view(-1, 1, 1, 1)
        variance = abar * STD**2 + 1 - abar
        x = x_t.double()
        each = torch.stack([m + abar.sqrt() * STD**2 / variance * (x - abar.sqrt() * m) for m in MEANS])
        log_p = torch.stack([-((x - abar.sqrt() * m) ** 2 / (2 * variance)).sum((1, 2, 3)) for m in MEANS])
        share = torch.softmax(log_p, dim=0)
        for k in range(2):
            share[:, class_labels == k] = torch.nn.functional.one_hot(torch.tensor(k), 2).double()[:, None]
        x_0 = (share[..., None, None, None] * each).sum(0)
        eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
        if self.prediction_type == "v_prediction":
            return (abar.sqrt() * eps - (1 - abar).sqrt() * x_0).to(x_t)
        return (eps if self.prediction_type == "epsilon" else x_0).to(x_t)


def inferer(prediction_type: str = "epsilon", **options) -> ClassInferer:
    schedule = SCHEDULE | {"prediction_type": prediction_type}
    return ClassInferer(schedule, image_size=(1, 1), image_channels=1, null_class=NULL, **options)


def values(label: int, number: int = 1500, **options) -> torch.Tensor:
    labels = torch.full((number,), label)
    prediction_type = options.get("prediction_type", "epsilon")
    return inferer(**options)(labels, ExactDenoiser(prediction_type), seeds=range(number)).flatten()


@pytest.mark.parametrize("sampler", ["dpm++", "unipc", "ddpm"])
def test_scale_1_samples_the_class_and_scale_0_all_of_them(sampler):
    steps = 60 if sampler == "ddpm" else 25
    for label in (0, 1):
        given = values(label, sampler=sampler, num_steps=steps, guidance_scale=1.0)
        assert abs(given.mean() - MEANS[label]) < 4 * STD / math.sqrt(len(given)) + 0.005
        assert abs(given.std() / STD - 1) < 0.1
    mixed = values(0, sampler=sampler, num_steps=steps, guidance_scale=0.0)
    low = (mixed < MEANS.mean()).float().mean()
    assert abs(low - 0.5) < 4 * 0.5 / math.sqrt(len(mixed))
    assert abs(mixed[mixed < MEANS.mean()].mean() - MEANS[0]) < 0.02
    assert abs(mixed[mixed > MEANS.mean()].mean() - MEANS[1]) < 0.02


def test_a_larger_scale_leads_away_from_the_other_class():
    means = [float(values(1, guidance_scale=scale, num_steps=25).mean()) for scale in (0.0, 0.5, 1.0, 2.0, 4.0)]
    assert means == sorted(means)
    assert means[-1] > MEANS[1]


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_guidance_is_the_same_for_whatever_the_network_predicts(prediction_type):
    expected = values(1, 50, guidance_scale=3.0)
    got = values(1, 50, guidance_scale=3.0, prediction_type=prediction_type)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_both_conventions_are_one_parameter():
    cond, null = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3)
    w = 2.0
    torch.testing.assert_close(guided(cond, null, guidance_scale_of(w, "weight")), (1 + w) * cond - w * null)
    assert guidance_scale_of(3) == guidance_scale_of(2, "weight") == 3.0
    a = values(0, 20, guidance_scale=2.0, guidance_convention="weight")
    assert torch.equal(a, values(0, 20, guidance_scale=3.0))


def test_both_passes_are_one_batch_and_only_the_needed_one_is_computed():
    for scale, size, told in ((3.0, 8, {0, 1, NULL}), (1.0, 4, {0, 1}), (0.0, 4, {NULL})):
        network = ExactDenoiser()
        inferer(guidance_scale=scale, num_steps=5)(torch.tensor([0, 1, 0, 1]), network, seeds=range(4))
        assert network.batches == [(size, told)] * 5


def test_outside_the_interval_the_class_is_given_without_guidance():
    network = ExactDenoiser()
    guide = inferer(guidance_scale=3.0, num_steps=10, guidance_interval=[300, 100])
    steps = guide._scheduler().timesteps.tolist()
    guide(torch.tensor([0]), network, seeds=[0])
    assert [size for size, _ in network.batches] == [2 if 100 <= t <= 300 else 1 for t in steps]
    everywhere = values(1, 20, guidance_scale=3.0, guidance_interval=[0, 499])
    assert torch.equal(everywhere, values(1, 20, guidance_scale=3.0))
    assert torch.equal(values(1, 20, guidance_scale=1.0), values(1, 20, guidance_scale=1.0, guidance_interval=[9, 9]))


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_agrees_with_that_of_diffusers(phi):
    cond, null = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    expected = rescale_noise_cfg(null + 5 * (cond - null), cond, guidance_rescale=phi)
    torch.testing.assert_close(guided(cond, null, 5.0, phi), expected)
    if phi == 1.0:
        spread = guided(cond, null, 5.0, phi).std(dim=(1, 2, 3))
        torch.testing.assert_close(spread, cond.std(dim=(1, 2, 3)))


def test_a_prediction_without_spread_is_rescaled_to_no_nan():
    assert torch.equal(guided(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), 3.0, 0.7), torch.zeros(2, 1, 4, 4))


def test_an_image_depends_on_its_class_and_seed_alone():
    labels, seeds = torch.tensor([0, 1, 1, 0]), [7, 8, 9, 10]
    whole = inferer(num_steps=6)(labels, ExactDenoiser(), seeds=seeds)
    for i in range(4):
        one = inferer(num_steps=6)(labels[i : i + 1], ExactDenoiser(), seeds=seeds[i : i + 1])
        torch.testing.assert_close(one[0], whole[i], rtol=1e-5, atol=1e-6)


def test_clipping_keeps_images_in_the_range():
    strong = inferer(guidance_scale=400.0, num_steps=20)(torch.ones(50, dtype=int), ExactDenoiser(), seeds=range(50))
    assert strong.abs().max() <= 1
    free = inferer(guidance_scale=400.0, num_steps=20, clip=False)
    assert free(torch.ones(50, dtype=int), ExactDenoiser(), seeds=range(50)).abs().max() > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale": "much"}, "guidance_scale is 'much'"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_convention": "w"}, "allowed are scale, weight"),
        ({"guidance_interval": [0, 500]}, r"two timesteps from 0 to 499"),
        ({"guidance_interval": 5}, r"two timesteps"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2"),
        ({"num_steps": 501}, "1 to 500 steps"),
        ({"sampler": "euler"}, "'euler'"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_any_work(options, words):
    with pytest.raises(UserError, match=words):
        inferer(**options)


CLASSES = {"normal": 0, "pneumonia": 1, "other": 2}


def test_classes_are_balanced_and_every_seed_is_used_once():
    items = [ClassSamplingDataset(CLASSES, per_class=4)[i] for i in range(12)]
    assert [item["class"] for item in items].count(1) == 4
    assert sorted(item["seed"] for item in items) == list(range(12))
    assert len({item["case_id"] for item in items}) == 12


def test_an_image_stays_the_same_when_more_or_fewer_are_asked_for():
    def made(**options) -> dict[str, int]:
        return {item["case_id"]: item["seed"] for item in ClassSamplingDataset(CLASSES, seed=5, **options).data}

    few = made(per_class=3)
    assert few.items() <= made(per_class=9).items()
    assert made(per_class=3, only=["pneumonia"]).items() <= few.items()
    assert made(per_class={"pneumonia": 2, "other": 1}).items() <= few.items()
    parts = [made(per_class=3, process=(rank, 2)) for rank in range(2)]
    assert parts[0] | parts[1] == few
    assert not parts[0].keys() & parts[1].keys()


def test_what_is_there_already_is_left_out():
    done = ClassSamplingDataset(CLASSES, per_class=3).data[4]["case_id"]
    rest = ClassSamplingDataset(CLASSES, per_class=3, is_done=lambda case_id: case_id == done)
    assert len(rest) == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_class": 2, "only": ["covid"]}, "unknown class 'covid'; the model was trained with normal, pneumonia"),
        ({"per_class": {"covid": 1}}, "unknown class 'covid'"),
        ({"per_class": 0}, "per_class is 0"),
        ({"per_class": 1.5}, "per_class is 1.5"),
        ({"per_class": -1}, "per_class is -1"),
        ({"per_class": 2, "only": []}, "no class is named"),
        ({"per_class": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_wrong_wishes_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ClassSamplingDataset(CLASSES, **options)

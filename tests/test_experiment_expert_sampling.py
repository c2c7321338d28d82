# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from expert_toy import CLASSES, SCHEDULE, models, write_all

from monai_synth.checkpoint import load_file, restore_network
from monai_synth.data.joint import to_image
from monai_synth.errors import UserError
from monai_synth.experiments import expert_sampling as sampling
from monai_synth.experiments.expert_source import read_models
from monai_synth.inference.classes import ClassInferer

PLAN = sampling.Plan(CLASSES, 3, 3, num_steps=2)


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    write_all(folder)
    return read_models(models(folder, base="base", aligned="aligned"))


def sample(arms, out, plan=PLAN, num_seeds=2, batch_size=64):
    found = [model for of_arm in arms.values() for model in of_arm]
    lines = []
    sampling.sample_all(found, num_seeds, plan, out, batch_size=batch_size, device="cpu", report=lines.append)
    paths = {(m.arm, seed): sampling.samples_path(out, m, seed) for m in found for seed in range(num_seeds)}
    return {key: sampling.load_samples(path) for key, path in paths.items()}, lines


def test_an_image_is_that_of_the_bundles_inferer_with_its_own_seed(arms, tmp_path):
    samples, _ = sample(arms, tmp_path)
    model = arms["aligned"][0]
    network = restore_network(load_file(model.path), model.path)
    inferer = ClassInferer(
        SCHEDULE, image_size=[16, 16], image_channels=1, null_class=3, num_steps=2, guidance_scale=1.0
    )
    for seed, number, index in ((0, 0, 0), (1, 2, 1)):
        image = inferer(torch.tensor([number]), network, seeds=[seed * 1_000_000 + number * 1_000 + index])
        got = samples["aligned", seed].images[number, index].astype(int)
        assert np.abs(got - to_image(image, (-1, 1))[0].numpy()).max() <= 1


def test_all_models_get_the_same_noise_and_no_two_images_share_theirs(arms, tmp_path):
    samples, _ = sample(arms, tmp_path)
    for seed in (0, 1):
        np.testing.assert_array_equal(samples["base", seed].seeds, samples["aligned", seed].seeds)
    every = np.concatenate([samples["base", seed].seeds.ravel() for seed in (0, 1)])
    assert len(np.unique(every)) == len(every) == 18
    assert not np.array_equal(samples["base", 0].images, samples["aligned", 0].images)


def test_the_batch_decides_nothing(arms, tmp_path):
    many, _ = sample(arms, tmp_path / "a")
    few, _ = sample(arms, tmp_path / "b", batch_size=4)
    for key, found in many.items():
        assert np.abs(found.images.astype(int) - few[key].images).max() <= 1  # rounding of the last bit


def test_what_is_there_is_left_and_what_is_missing_comes_out_the_same(arms, tmp_path):
    before, _ = sample(arms, tmp_path)
    paths = sorted((tmp_path / "samples").rglob("*.npz"))
    times = {path: path.stat().st_mtime_ns for path in paths}
    gone = tmp_path / "samples/base/seed_1.npz"
    gone.unlink()
    after, lines = sample(arms, tmp_path)
    assert {path for path in paths if path.stat().st_mtime_ns != times[path]} == {gone}
    assert lines[0] == "3 of 4 sets of 9 images are there already"
    for key, found in before.items():
        np.testing.assert_array_equal(found.images, after[key].images)


def planted(means):
    """Grey images whose mean is a function of the seed; and the calls."""
    calls = []

    def draw(self, numbers, seeds):
        calls.extend(map(int, seeds))
        values = np.array([means(int(seed)) for seed in seeds])
        return np.broadcast_to(values[:, None, None, None], (len(seeds), *self.inferer.shape)).astype(np.uint8)

    return draw, calls


def test_the_mean_filter_redraws_only_what_falls_below_with_other_noise(arms, tmp_path, monkeypatch):
    # image 1 of each class is too dark at first, image 2 of class 0 twice
    dark = {1, 1001, 2001, 2, 2 + 3}
    draw, calls = planted(lambda seed: 50 if seed in dark else 150 + seed % 7)
    monkeypatch.setattr(sampling._Draw, "_sample", draw)
    plan = replace(PLAN, floors=dict.fromkeys(CLASSES, 0.5))
    filtered = sample({"base": arms["base"]}, tmp_path / "a", plan, num_seeds=1)[0]["base", 0]
    assert sorted(calls[9:]) == [1 + 3, 2 + 3, 2 + 6, 1001 + 3, 2001 + 3]
    np.testing.assert_array_equal(filtered.attempts, [[1, 2, 3], [1, 2, 1], [1, 2, 1]])
    np.testing.assert_array_equal(filtered.seeds, [[0, 4, 8], [1000, 1004, 1002], [2000, 2004, 2002]])
    plain = sample({"base": arms["base"]}, tmp_path / "b", num_seeds=1)[0]["base", 0]
    kept = filtered.attempts == 1
    np.testing.assert_array_equal(filtered.images[kept], plain.images[kept])
    assert (filtered.images.mean((2, 3, 4)) / 255 >= 0.5).all()
    assert not filtered.below.any()


def test_an_image_that_stays_too_dark_is_kept_after_twenty_attempts_and_counted(arms, tmp_path, monkeypatch):
    draw, calls = planted(lambda seed: 10 if seed % 3 == 0 and seed < 1000 else 200)
    monkeypatch.setattr(sampling._Draw, "_sample", draw)
    plan = replace(PLAN, classes={"01_LEFT": 0}, floors={"01_LEFT": 0.3})
    found = sample({"base": arms["base"]}, tmp_path, plan, num_seeds=1)[0]["base", 0]
    np.testing.assert_array_equal(found.attempts, [[20, 1, 1]])
    np.testing.assert_array_equal(found.below, [[True, False, False]])
    assert len(calls) == 3 + 19
    assert found.seeds[0, 0] == 19 * 3


def test_seeds_of_images_differ_and_stay_below_32_bits():
    plan = sampling.Plan(CLASSES, 1000, 50, floors={})
    sampling.check_plan(plan, sampling.MOST_SEEDS)
    attempts = {sampling.image_seed(3, 7, i, a, 50) for i in range(50) for a in range(sampling.MOST_ATTEMPTS)}
    assert len(attempts) == 50 * sampling.MOST_ATTEMPTS
    assert max(attempts) < sampling.image_seed(3, 8, 0)
    assert sampling.image_seed(3, 999, 999) < sampling.image_seed(4, 0, 0)
    assert sampling.image_seed(sampling.MOST_SEEDS - 1, 999, 999) < 2**32


@pytest.mark.parametrize(
    ("change", "num_seeds", "message"),
    [
        ({"per_class": 1}, 1, "give 2 or more"),
        ({"per_class": 51, "floors": {}}, 1, "at most 50 with --mean-filter"),
        ({"per_class": 1001}, 1, "at most 1000"),
        ({}, 0, "seeds is 0"),
        ({}, 4001, "1 to 4000"),
        ({"num_classes": 1001}, 1, "1001 classes"),
    ],
)
def test_numbers_for_which_images_would_share_noise_are_refused(change, num_seeds, message):
    with pytest.raises(UserError, match=message):
        sampling.check_plan(replace(PLAN, **change), num_seeds)


def test_ancestral_sampling_takes_all_steps_and_guidance_needs_a_null_class(arms):
    model = arms["base"][0]
    assert sampling.make_inferer(model, replace(PLAN, sampler="ddpm", num_steps=None)).num_steps == 100
    assert sampling.make_inferer(model, replace(PLAN, num_steps=None)).num_steps == 20
    with pytest.raises(UserError, match="without dropping the class"):
        sampling.make_inferer(model, replace(PLAN, guidance_scale=3.0))
    free = replace(model, contract={**model.contract, "drop_prob": 0.2})
    inferer = sampling.make_inferer(free, replace(PLAN, guidance_scale=3.0))
    assert (inferer.guidance_scale, inferer.null_class) == (3.0, 3)


def test_images_of_a_model_of_another_range_are_written_by_that_range(arms):
    model = arms["base"][0]
    unit = replace(model, contract={**model.contract, "value_range": [0, 1]})
    assert sampling.make_inferer(unit, PLAN).value_range == (0.0, 1.0)

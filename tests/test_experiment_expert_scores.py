# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
import scipy.stats
import torch
from expert_toy import narrow_resnet, write_expert
from skimage.metrics import structural_similarity
from sklearn.metrics import accuracy_score, confusion_matrix

from monai_synth.data.datalist import PreparedDataset
from monai_synth.experiments import expert_scores as scores
from monai_synth.experiments.expert_source import Judge


def test_the_confusion_matrix_is_that_of_scikit_learn_and_its_trace_the_accuracy():
    rng = np.random.default_rng(0)
    truth, logits = rng.integers(4, size=60), rng.normal(size=(60, 4))
    counts = scores.confusion(truth, logits, range(4))
    np.testing.assert_array_equal(counts, confusion_matrix(truth, logits.argmax(1), labels=range(4)))
    assert np.trace(counts) / counts.sum() == pytest.approx(accuracy_score(truth, logits.argmax(1)))


def test_a_class_that_is_left_out_is_never_the_answer():
    logits = np.array([[1.0, 9.0, 2.0], [3.0, 9.0, 2.0]])
    np.testing.assert_array_equal(scores.confusion(np.array([0, 2]), logits, [0, 2]), [[0, 1], [0, 0], [1, 0]])


@pytest.mark.parametrize("channels", [1, 3])
def test_similarity_is_the_mean_of_scikit_image_over_all_pairs(channels):
    images = np.random.default_rng(0).integers(0, 255, (4, channels, 14, 16), dtype=np.uint8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = [
        np.mean(
            [
                _inside(structural_similarity(x / 255, y / 255, full=True, **options)[1])
                for x, y in zip(a, b, strict=True)
            ]
        )
        for a, b in combinations(images, 2)
    ]
    assert len(pairs) == 6
    assert scores.mean_similarity(images) == pytest.approx(np.mean(pairs), abs=1e-9)
    assert scores.mean_similarity(np.repeat(images[:1], 3, axis=0)) == pytest.approx(1)


def _inside(values):
    return values[5:-5, 5:-5].mean()


def test_the_signed_rank_test_is_scipys_exact_one_where_there_are_no_ties():
    values = np.array([0.3, -0.1, 0.5, 0.2, 0.7, 0.4])
    found = scores.signed_rank(values)
    expected = scipy.stats.wilcoxon(values, method="exact")
    assert (found["p"], found["statistic"]) == (pytest.approx(expected.pvalue), expected.statistic)
    assert (found["n"], found["num_higher"], found["num_lower"], found["method"]) == (6, 5, 1, "exact")


def test_ties_are_counted_out_over_all_signs_and_equal_seeds_are_left_out():
    steps = np.array([2, 1, 1, -1, 3, 2, 0, 0])
    # as differences of accuracies come, whose last digits differ
    found = scores.signed_rank(steps / 70 + np.array([1, -1] * 4) * 1e-17)
    moved = steps[steps != 0]
    ranks = scipy.stats.rankdata(np.abs(moved))
    least = min(ranks[moved > 0].sum(), ranks[moved < 0].sum())
    sums = np.array(
        [ranks[list(signs)].sum() for signs in map(np.nonzero, product((0, 1), repeat=6)) for signs in signs]
    )
    assert found["p"] == pytest.approx(min(1, 2 * (sums <= least).mean()))
    assert (found["n"], found["num_equal"], found["method"]) == (6, 2, "exact")


def test_no_difference_has_no_p():
    found = scores.signed_rank(np.zeros(5))
    assert (found["p"], found["n"], found["num_equal"]) == (None, 0, 5)


def test_the_interval_over_seeds_is_near_that_of_normal_theory():
    values = np.random.default_rng(0).normal(0.7, 0.05, (1, 200, 1))
    number = scores.Bootstrap(4000).numbers(values, 14000)[0]
    reach = 1.96 * values.std(ddof=1) / 200**0.5
    assert number["ci"] == pytest.approx([values.mean() - reach, values.mean() + reach], abs=0.1 * reach)
    assert (number["value"], number["sd"]) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
    assert (number["n"], number["num_seeds"], number["num_trainings"], number["ci_trainings"]) == (14000, 200, 1, None)


def test_an_interval_over_trainings_is_that_over_seeds_only_where_trainings_agree():
    seeds = np.random.default_rng(0).normal(0.7, 0.05, (1, 15, 1))
    alike = scores.Bootstrap(500).numbers(np.repeat(seeds, 3, axis=0), 1)[0]
    assert alike["ci_trainings"] == pytest.approx(alike["ci"])
    offsets = np.array([-0.2, 0.0, 0.2])[:, None, None]
    apart = scores.Bootstrap(500).numbers(seeds + offsets, 1)[0]
    assert apart["ci"] == pytest.approx(alike["ci"])
    assert np.diff(apart["ci_trainings"])[0] > 4 * np.diff(apart["ci"])[0]
    assert apart["per_training"] == pytest.approx((seeds.mean() + offsets).ravel())


def test_one_seed_has_no_interval():
    number = scores.Bootstrap(50).numbers(np.full((1, 1, 1), 0.5), 10)[0]
    assert (number["ci"], number["sd"], number["ci_trainings"]) == (None, None, None)


def test_the_most_frequent_wrong_class_is_never_the_right_one():
    assert scores.most_frequent_wrong(np.array([9, 2, 3]), 0) == 2
    assert scores.most_frequent_wrong(np.array([9, 0, 0]), 0) is None


def test_an_expert_sees_images_at_its_own_size_in_0_to_1():
    transforms = pytest.importorskip("torchvision.transforms.functional")
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :2]

    images = np.random.default_rng(0).integers(0, 255, (2, 1, 32, 32), dtype=np.uint8)
    scores.classify(Network(), images, (12, 20))
    expected = transforms.resize(torch.from_numpy(images).float() / 255, [12, 20], antialias=True)
    torch.testing.assert_close(seen[0], expected)
    scores.classify(Network(), images, (32, 32))
    torch.testing.assert_close(seen[1], torch.from_numpy(images / np.float32(255)))


def test_logits_are_kept_for_the_images_that_they_are_of(tmp_path, monkeypatch):
    narrow_resnet(monkeypatch)
    dataset = PreparedDataset(tmp_path, {"name": "toy", "classes": {"a": 0, "b": 1}}, "f")
    path = write_expert(tmp_path / "e.pt", dataset)
    judge = Judge("expert", path, "0" * 64, {"image_size": [24, 24]}, {})
    first, second = np.random.default_rng(0).integers(0, 255, (2, 3, 1, 24, 24), dtype=np.uint8)
    logits = scores.Opinions(judge, tmp_path, "cpu")(first, "arm/seed_0")
    path.unlink()
    np.testing.assert_array_equal(scores.Opinions(judge, tmp_path, "cpu")(first, "arm/seed_0"), logits)
    with pytest.raises(Exception, match="no trained file"):
        scores.Opinions(judge, tmp_path, "cpu")(second, "arm/seed_0")

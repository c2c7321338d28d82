# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from monai_synth.experiments import classifier_scores as scores
from monai_synth.experiments.classifier_text import PRINTED, TEST_COUNTS, reported

metrics = pytest.importorskip("sklearn.metrics")


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def sklearn_scores(truth, probabilities, positive, weights):
    num = probabilities.shape[1]
    found = probabilities.argmax(1)
    options = {"sample_weight": weights, "zero_division": 0}
    macro = metrics.precision_recall_fscore_support(truth, found, average="macro", **options)[:3]
    single = [x[positive] for x in metrics.precision_recall_fscore_support(truth, found, **options)[:3]]
    area = (
        metrics.roc_auc_score(truth, probabilities[:, 1], sample_weight=weights)
        if num == 2
        else metrics.roc_auc_score(truth, probabilities, multi_class="ovr", sample_weight=weights)
    )
    per_class = metrics.recall_score(truth, found, average=None, **options)
    accuracy = metrics.accuracy_score(truth, found, sample_weight=weights)
    return np.array([accuracy, *per_class, *macro, area, *single])


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_every_score_is_scikit_learns_with_and_without_weights(num_classes):
    rng = np.random.default_rng(num_classes)
    truth = rng.integers(0, num_classes, 60)
    probabilities = softmax(rng.integers(0, 3, (60, num_classes)) + 1.5 * np.eye(num_classes)[truth])  # with ties
    positive = num_classes - 1
    weights = rng.integers(0, 4, (7, 60))
    for k in range(num_classes):
        weights[:, np.flatnonzero(truth == k)[0]] = 1  # scikit-learn wants every class
    got = scores.score(truth, probabilities, positive, weights)
    for k, drawn in enumerate(weights):
        # a weight of 0 is an image that is not there
        there = drawn > 0
        expected = sklearn_scores(truth[there], probabilities[there], positive, drawn[there].astype(float))
        np.testing.assert_allclose(got[k], expected, atol=1e-6)
    np.testing.assert_allclose(
        scores.score(truth, probabilities, positive)[0], sklearn_scores(truth, probabilities, positive, None), atol=1e-6
    )
    names = scores.metric_names([f"c{k}" for k in range(num_classes)], positive)
    assert len(names) == got.shape[1]
    assert names[-1] == f"f1 (c{positive})"


def test_scores_of_five_images_by_hand():
    truth = np.array([0, 0, 1, 1, 1])
    p = np.array([0.1, 0.6, 0.4, 0.6, 0.9])  # of class 1; found: 0 1 0 1 1
    got = dict(zip(scores.metric_names(["n", "p"], 1), scores.score(truth, np.stack([1 - p, p], 1), 1)[0], strict=True))
    assert got == pytest.approx(
        {
            "accuracy": 3 / 5,
            "accuracy (n)": 1 / 2,
            "accuracy (p)": 2 / 3,
            "precision": (1 / 2 + 2 / 3) / 2,
            "recall": (1 / 2 + 2 / 3) / 2,
            "f1": (1 / 2 + 2 / 3) / 2,
            "auroc": (3 + 1 + 0.5) / 6,  # pairs in order: all 3 above .1; above .6 one, equal one
            "precision (p)": 2 / 3,
            "recall (p)": 2 / 3,
            "f1 (p)": 2 / 3,
        }
    )


def test_confusion_counts_truth_in_rows():
    truth = np.array([0, 0, 1])
    found = np.array([[0.4, 0.6], [0.7, 0.3], [0.9, 0.1]])
    assert scores.confusion(truth, found)[0].tolist() == [[1, 1], [1, 0]]
    assert scores.confusion(truth, found, np.array([[5, 0, 2]]))[0].tolist() == [[0, 5], [2, 0]]


def test_a_class_that_is_never_found_has_precision_0_and_a_draw_without_a_class_no_auroc():
    truth, p = np.array([0, 0, 1]), np.array([[0.9, 0.1]] * 3)
    got = scores.score(truth, p, 1, np.array([[1, 1, 1], [1, 1, 0]]))
    assert got[0, -3] == 0
    assert got[0, 6] == 0.5
    assert np.isnan(got[1, 6])
    assert got[1, 3:6].tolist() == [1, 1, 1]  # the draw has class 0 only, and finds it


def test_sd_is_over_seeds_and_the_interval_over_draws_of_their_mean():
    values = np.array([[0.5], [0.7]])
    drawn = np.array([[[0.3], [0.5], [0.7]], [[0.5], [0.7], [0.9]]])
    number = scores.numbers(["accuracy"], values, drawn, 10)["accuracy"]
    assert number["value"] == pytest.approx(0.6)
    assert number["sd"] == pytest.approx(np.sqrt(0.02))
    assert (number["n"], number["num_seeds"]) == (10, 2)
    assert number["ci"] == pytest.approx([0.41, 0.79])
    alone = scores.numbers(["accuracy"], values[:1], drawn[:1], 10)["accuracy"]
    assert alone["sd"] is None
    assert alone["ci_seeds"] is None
    assert scores.numbers(["auroc"], np.array([[np.nan]]), None, 10)["auroc"] == {
        "value": None, "sd": None, "n": 10, "num_seeds": 1, "ci": None, "ci_seeds": None,
    }  # fmt: skip


def test_the_interval_over_seeds_too_has_the_variance_of_both():
    rng = np.random.default_rng(0)
    seeds, patients = np.array([-0.2, 0.0, 0.1, 0.1]), 0.05 * rng.normal(size=20000)
    number = scores.numbers(["f1"], seeds[:, None], (seeds[:, None] + patients)[..., None], 10)["f1"]
    width = (number["ci"][1] - number["ci"][0]) / 2
    both = (number["ci_seeds"][1] - number["ci_seeds"][0]) / 2
    assert width == pytest.approx(1.96 * 0.05, rel=0.03)
    assert both == pytest.approx(1.96 * np.sqrt(0.05**2 + seeds.var() / 4), rel=0.05)


def macro(normal, pneumonia):
    """Accuracy, macro precision, recall and F1 from the accuracies of the classes and the counts of the test set."""
    n, p = TEST_COUNTS
    right = (normal * n, pneumonia * p)
    found = (right[0] + p - right[1], right[1] + n - right[0])
    precision = [r / f for r, f in zip(right, found, strict=True)]
    recall = (normal, pneumonia)
    f1 = [2 * a * b / (a + b) for a, b in zip(precision, recall, strict=True)]
    return np.array([sum(right) / (n + p), np.mean(precision), np.mean(recall), np.mean(f1)])


@pytest.mark.parametrize("number", range(1, 19))
def test_the_texts_table_is_macro_averages_of_its_class_accuracies(number):
    row = reported(number)
    got = macro(*row.per_class)
    np.testing.assert_allclose(got, (row.accuracy, row.precision, row.recall, row.f1), atol=0.0015)


@pytest.mark.parametrize("number", [1, 17, 18])
def test_what_is_corrected_does_not_agree_as_printed(number):
    accuracy, normal, pneumonia, *rest = PRINTED[number]
    assert np.abs(macro(normal, pneumonia) - (accuracy, *rest)).max() > 0.0015
    assert reported(number).note


def test_the_text_prints_macro_not_binary_precision():
    row = reported(5)
    n, p = TEST_COUNTS
    binary = row.per_class[1] * p / (row.per_class[1] * p + (1 - row.per_class[0]) * n)
    assert abs(binary - row.precision) > 0.01

# SPDX-License-Identifier: Apache-2.0
"""One noisy classifier of all guiding features: its loss, its report, its guidance, its file."""

from __future__ import annotations

import logging
from pathlib import Path

import lsdm_toy
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from test_guidance import CROP, Classifier, guide, latents, request

from monai_synth.checkpoint import sha256_of
from monai_synth.data.semantic import GUIDING_FEATURES
from monai_synth.errors import UserError
from monai_synth.inference.model import load_lsdm
from monai_synth.networks import FeatureHead, NoisyClassifier, feature_columns
from monai_synth.training import ConvergenceReport, classifier_loss, initial_output, num_outputs, told_features

COLUMNS = feature_columns(GUIDING_FEATURES)


def answers(num: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(num, 5, generator=generator)
    ratings = torch.randint(1, 6, (num, 3), generator=generator).float()
    return pred, torch.cat([torch.randint(0, 2, (num, 1), generator=generator).float(), ratings], 1)


def heads() -> tuple[Classifier, dict[str, FeatureHead]]:
    network = Classifier(5, 7)
    return network, {name: FeatureHead(network, columns) for name, columns in COLUMNS.items()}


def test_malignancy_has_two_outputs_and_each_rating_one() -> None:
    assert {
        "malignancy": slice(0, 2), "lobulation": slice(2, 3), "spiculation": slice(3, 4), "texture": slice(4, 5),
    } == COLUMNS  # fmt: skip
    assert [num_outputs(feature) for feature in ("malignancy", "margin", "all")] == [2, 1, 5]
    assert initial_output("all") == [0.0, 0.0, 3.0, 3.0, 3.0]
    assert told_features("all") == list(GUIDING_FEATURES)


def test_a_fresh_network_answers_undecided_and_the_middle_of_the_scales() -> None:
    args = {"attention_levels": [False], "num_res_blocks": 1, "num_head_channels": 8, "norm_num_groups": 4}
    network = NoisyClassifier(2, 1, 5, [8], output_bias=initial_output("all"), **args)
    torch.testing.assert_close(network.out[-1].bias.detach(), torch.tensor([0.0, 0, 3, 3, 3]))
    with pytest.raises(UserError, match="output_bias has 2 numbers for 5 output channels"):
        NoisyClassifier(2, 1, 5, [8], output_bias=[0.0, 3.0], **args)


def test_the_loss_is_the_sum_of_those_of_the_single_classifiers() -> None:
    pred, label = answers()
    alone = [
        classifier_loss(feature)(pred[:, columns], label[:, i].long() if i == 0 else label[:, i : i + 1])
        for i, (feature, columns) in enumerate(COLUMNS.items())
    ]
    torch.testing.assert_close(classifier_loss("all")(pred, label), torch.stack(alone).sum())


def report_of(feature: str, pred: torch.Tensor, label: torch.Tensor) -> dict:
    evaluator = Engine(lambda engine, batch: {"pred": pred, "label": label})
    report = ConvergenceReport(evaluator, feature)
    evaluator.state.max_epochs = 1
    original = evaluator.run
    evaluator.run = lambda: original([0], max_epochs=1)
    return dict(report())


def test_each_feature_is_judged_as_its_own_classifier_would_be() -> None:
    pred, label = answers()
    together = report_of("all", pred, label)
    for i, (feature, columns) in enumerate(COLUMNS.items()):
        single = label[:, i].long() if i == 0 else label[:, i : i + 1]
        assert together["features"][feature] == report_of(feature, pred[:, columns], single)
    assert together["n"] == 12
    losses = [report["val_loss"] for report in together["features"].values()]
    assert together["val_loss"] == pytest.approx(sum(losses))
    assert together["converged"] is False
    perfect = torch.cat([torch.stack([-label[:, 0], label[:, 0]], 1) * 40, label[:, 1:]], 1)
    assert report_of("all", perfect, label)["converged"] is True


def test_heads_of_one_network_guide_as_the_sum_of_each_alone() -> None:
    targets = {"malignancy": 1, "lobulation": 5.0, "spiculation": 2.0, "texture": 1.0}
    scales = dict(zip(targets, (1.0, 0.5, 2.0, 1.5), strict=True))
    _, networks = heads()
    both = [[request((10, 12), targets), request((4, 4), {"texture": 4.0})], []]
    together = guide(both, networks, scales=scales)(latents(2), 100, 0.01)
    alone = torch.zeros_like(together)
    for name, head in networks.items():
        part = [
            [request(r.center, {name: r.targets[name]}) for r in of_sample if name in r.targets] for of_sample in both
        ]
        alone += guide(part, {name: head}, scales={name: scales[name]})(latents(2), 100, 0.01)
    torch.testing.assert_close(together, alone)
    assert together[0].abs().sum() > 0
    assert together[1].abs().sum() == 0


def test_one_step_runs_the_shared_network_once_for_all_nodules_and_features() -> None:
    network, networks = heads()
    targets = {"malignancy": 1, "lobulation": 5.0, "spiculation": 2.0, "texture": 1.0}
    guide([[request((10, 12), targets), request((4, 4), {"texture": 4.0})]], networks)(latents(), 300, 0.01)
    assert len(network.calls) == 1
    images, timesteps = network.calls[0]
    assert images.shape == (2, 1, 2 * CROP, 2 * CROP)
    assert timesteps.tolist() == [300, 300]


@pytest.fixture
def models(tiny_dataset: Path, tmp_path: Path) -> Path:
    lsdm_toy.write_all(tmp_path, tiny_dataset)
    folder = tmp_path / "models"
    content = torch.load(folder / "classifier_texture.pt", weights_only=True)
    content["arch"]["args"] |= {"out_channels": 5, "output_bias": initial_output("all")}
    torch.manual_seed(3)
    network = NoisyClassifier(**content["arch"]["args"])
    bad = {"val_loss": 2.0, "constant_loss": 1.0, "n": 9, "converged": False}
    content |= {
        "state_dict": network.state_dict(),
        "contract": content["contract"] | {"feature": "all", "features": list(GUIDING_FEATURES)},
        "report": {"n": 9, "converged": False, "features": {f: bad | {"converged": f != "texture"} for f in COLUMNS}},
    }
    torch.save(content, folder / "classifier_all.pt")
    return folder


def test_the_shared_classifier_is_loaded_once_and_read_by_every_feature(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_lsdm(models, features=["texture", "malignancy"], shared_classifier=True)
    texture, malignancy = loaded.classifiers["texture"], loaded.classifiers["malignancy"]
    assert texture.network is malignancy.network
    x, t = torch.rand(3, 1, 32, 32), torch.tensor([0, 400, 999])
    with torch.no_grad():
        whole = texture.network(x, t)
        np.testing.assert_array_equal(texture(x, t), whole[:, 4:5])
        np.testing.assert_array_equal(malignancy(x, t), whole[:, :2])
    assert loaded.checkpoints["classifier_all.pt"] == sha256_of(models / "classifier_all.pt")
    assert "classifier_texture.pt" not in loaded.checkpoints
    said = [record.message for record in caplog.records if "did not converge" in record.message]
    assert len(said) == 1
    assert "classifier of texture" in said[0]


def test_a_shared_classifier_that_is_missing_or_does_not_tell_the_feature_is_refused(models: Path) -> None:
    with pytest.raises(UserError, match=r"classifier_all.pt tells malignancy, lobulation, .*, not margin"):
        load_lsdm(models, features=["margin"], shared_classifier=True)
    (models / "classifier_all.pt").unlink()
    with pytest.raises(UserError, match=r"--feature all\), or --shared_classifier False"):
        load_lsdm(models, features=["texture"], shared_classifier=True)

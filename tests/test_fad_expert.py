# SPDX-License-Identifier: Apache-2.0
"""Experts of the bundle fad: what is trained, which epoch is kept, and which of several experts is chosen."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLES, command, kill_when_there, options, run_forked, user_error, workflow
from ignite.engine import Engine, Events
from PIL import Image
from torch import nn

from monai_synth.checkpoint import load_file, restore_network, save_atomic, sha256_of
from monai_synth.data.class_images import ClassImages, class_list
from monai_synth.data.classes import prepare_classes
from monai_synth.data.datalist import read_dataset
from monai_synth.errors import UserError
from monai_synth.evaluate.features import trained_classifier
from monai_synth.networks import ImageClassifier
from monai_synth.training import (
    BestEpoch,
    ExpertPrepareBatch,
    ExpertReport,
    best_expert,
    check_start,
    compare_experts,
    initial_expert,
    load_expert,
    normalisation,
)
from monai_synth.training.expert_training import experts_figure, random_flips, read_experts

CONFIG = BUNDLES / "fad" / "configs" / "train_expert.json"
SIZE = 24
TINY = {
    "preset": "demo", "backbone": "resnet18", "image_size": [SIZE, SIZE], "max_epochs": 4, "batch_size": 10,
    "learning_rate": 0.002, "lr_gamma": 0.7, "save_interval": 4, "device": "cpu",
}  # fmt: skip


def texture(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Smooth, or rough; mean grey value tells nothing."""
    noise = rng.normal(0, {"smooth": 3, "rough": 45}[kind], (SIZE, SIZE))
    return (rng.uniform(100, 150) + noise).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("textures"), np.random.default_rng(0)
    for kind in ("smooth", "rough"):
        (root / "source" / kind).mkdir(parents=True)
        for i in range(25):
            Image.fromarray(texture(kind, rng)).save(root / "source" / kind / f"{i}.png")
    prepare_classes(root / "source", root / "prepared", name="toy", splits=(0.4, 0.4, 0.2), progress=False)
    return root / "prepared"


def train(dataset: Path, root: Path, rates: list[float] | None = None, **values: Any) -> Path:
    """Train in this process; gives the expert's file, and the rate of each epoch in ``rates``."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(root / "models"), "output_dir": str(root / "eval")}
    made = workflow("fad", CONFIG.name, "train", "training", **(TINY | places | values))
    made.initialize()
    if rates is not None:
        optimizer, trainer, checkpoint, best = (
            made.parser.get_parsed_content(key) for key in ("optimizer", "train#trainer", "checkpoint", "best")
        )
        assert checkpoint.export is best.network  # in a short training the last epoch may well be the best
        trainer.add_event_handler(Events.EPOCH_STARTED, lambda: rates.append(optimizer.param_groups[0]["lr"]))
    made.run()
    made.finalize()
    return root / "models" / values.get("model_file", "expert_resnet18.pt")


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root, rates = tmp_path_factory.mktemp("trained"), []
    return SimpleNamespace(path=train(dataset, root, rates), out=root / "eval", rates=rates)


def validation_images(dataset: Path, size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    images = ClassImages(class_list(str(dataset), "validation"), image_size=(size, size), image_channels=1)
    return images.images.float() / 255, images.classes


# Numbers of the text


def test_the_paper_preset_holds_the_numbers_of_the_text() -> None:
    config = json.loads(CONFIG.read_text())
    assert config["presets"]["paper"] == {
        "backbone": "resnet50", "weights": None, "image_size": [224, 224], "max_epochs": 15, "batch_size": 64,
        "learning_rate": 1e-4, "lr_gamma": 0.7,
    }  # fmt: skip
    assert (config["weight_decay"], config["flips"]) == (0.0, True)
    assert config["optimizer"]["_target_"] == "torch.optim.Adam"
    assert config["train"]["loss_function"] == {"_target_": "torch.nn.CrossEntropyLoss"}


# What is trained


def test_each_flip_comes_as_often_as_the_others_and_is_drawn_by_the_seeded_generator() -> None:
    image = torch.arange(2 * 3 * 5, dtype=torch.uint8).reshape(1, 2, 3, 5)
    ways = torch.cat([image, image.flip(2), image.flip(3), image.flip(2, 3)])
    torch.manual_seed(1)
    flipped = random_flips(image.expand(4000, -1, -1, -1))
    counts = (flipped[:, None] == ways).flatten(2).all(-1).sum(0)
    assert counts.sum() == 4000
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    torch.manual_seed(1)
    assert torch.equal(flipped, random_flips(image.expand(4000, -1, -1, -1)))


def test_only_the_training_images_are_flipped(dataset: Path, tmp_path: Path) -> None:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e")}
    batch = {"image": torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8), "class": torch.arange(64)}
    for flips in (True, False):
        made = workflow("fad", CONFIG.name, "train", "training", **(TINY | places), flips=flips)
        training, validation = (
            made.parser.get_parsed_content(f"{part}#prepare_batch")(batch, "cpu")[0] for part in ("train", "validate")
        )
        assert torch.equal(validation, batch["image"] / 255)
        assert torch.equal(training, validation) == (not flips)
    with pytest.raises(UserError, match="flips is 1; allowed are true and false"):
        ExpertPrepareBatch(flips=1)


@pytest.mark.parametrize("max_bytes", [1 << 20, 0])
def test_a_training_from_scratch_normalises_by_its_own_training_images(dataset: Path, max_bytes: int) -> None:
    cases = class_list(str(dataset), "training")
    images = ClassImages(cases, image_size=(SIZE, SIZE), image_channels=1, max_bytes=max_bytes)
    values = np.stack([np.asarray(Image.open(case["image"])) for case in cases]) / 255
    found = normalisation(images, "random")
    assert found == {"mean": [pytest.approx(values.mean(), abs=1e-6)], "std": [pytest.approx(values.std(), abs=1e-6)]}


def test_published_weights_are_normalised_by_imagenet_and_kept_but_for_the_last_layer(tmp_path: Path) -> None:
    published = ImageClassifier("resnet18", 5, 3).backbone.state_dict()
    extra = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save({**published, **extra}, tmp_path / "w.pth")
    grey, colour = (SimpleNamespace(image_channels=n) for n in (1, 3))
    assert normalisation(grey, "w.pth") == {"mean": [0.449], "std": [0.226]}
    assert normalisation(colour, "w.pth") == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    arch = {"target": "monai_synth.networks.ImageClassifier", "args": {"backbone": "resnet18", "num_classes": 4}}
    network = initial_expert(arch, str(tmp_path / "w.pth"), seed=3)
    assert all(torch.equal(value, published[key]) for key, value in network.backbone.state_dict().items())
    other = initial_expert(arch, "random", seed=3)
    assert torch.equal(network.head.weight, other.head.weight)
    assert not torch.equal(network.backbone.conv1.weight, other.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("backbone", "weights", "size", "words"),
    [
        ("resnet_small", None, (32, 32), r"no published weights of resnet_small; .*: give --weights random"),
        (
            "resnet50",
            None,
            [224, 224],
            r"no --weights .*; download .*resnet50-0676ba61\.pth .*--weights random",
        ),
        ("resnet50", "gone.pth", [224, 224], r"no weights file gone\.pth; download .*resnet50-0676ba61\.pth"),
        ("resnet5", "random", [224, 224], "backbone 'resnet5'; allowed are resnet_small"),
        ("resnet18", "random", [24, 24, 24], r"image_size is \[24, 24, 24\]; experts take images of two axes"),
    ],
)
def test_a_training_with_nothing_to_start_from_is_refused(
    backbone: str, weights: str | None, size: list[int], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_start(backbone, weights, size)


def test_the_paper_preset_asks_for_weights_before_anything_is_read_or_written(dataset: Path, tmp_path: Path) -> None:
    places = {"ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e"), "device": "cpu"}
    made = workflow("fad", CONFIG.name, "train", "training", dataset_dir=str(dataset), **places)
    assert "--weights random to train from scratch" in str(user_error(made.initialize))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_gamma": -1}, "lr_gamma is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image_size": 24}, "image_size is 24; give a list"),
        ({"preset": "big"}, "give --preset demo or --preset paper"),
        ({"dataset_dir": "."}, "holds no dataset.json"),
        ({"flips": "no"}, "flips is 'no'"),
    ],
)
def test_bad_settings_end_in_one_message(dataset: Path, tmp_path: Path, values: dict, message: str) -> None:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e")}
    made = workflow("fad", CONFIG.name, "train", "training", **(TINY | places | values))
    assert message in str(user_error(lambda: (made.initialize(), made.run())))
    assert not (tmp_path / "m").exists()


# The epoch that is kept


def epochs_of(best: BestEpoch, network: nn.Linear, values: list[tuple[float, float]]) -> None:
    """Let ``best`` see epochs with these validation accuracies and losses; the weight is the number of the epoch."""
    engine = Engine(lambda e, b: None)
    engine.state.max_epochs = len(best.curves["val_loss"]) + len(values)
    for accuracy, loss in values:
        engine.state.epoch = len(best.curves["val_loss"]) + 1
        engine.state.metrics = {"train_loss": 1.0, "train_accuracy": 0.5}
        best.evaluator.state.metrics = {"val_accuracy": accuracy, "val_loss": loss}
        nn.init.constant_(network.weight, engine.state.epoch)
        best(engine)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([(0.5, 1.0), (0.9, 3.0), (0.7, 0.1)], 2),  # the accuracy decides,
        ([(0.5, 1.0), (0.9, 3.0), (0.9, 2.0), (0.9, 2.5)], 3),  # of equal ones the loss,
        ([(0.9, 2.0), (0.9, 2.0), (0.9, 2.0)], 1),  # of equal ones the first
        ([(0.0, 9.0), (0.0, 10.0), (0.0, 11.0)], 1),
    ],
)
@pytest.mark.parametrize("stop", [None, 1, 2])
def test_the_epoch_of_highest_validation_accuracy_is_kept(
    values: list[tuple[float, float]], kept: int, stop: int | None
) -> None:
    network = nn.Linear(1, 1)
    best = BestEpoch(network, SimpleNamespace(state=SimpleNamespace()))
    epochs_of(best, network, values[:stop])
    if stop is not None:
        saved, network = best.state_dict(), nn.Linear(1, 1)
        best = BestEpoch(network, SimpleNamespace(state=SimpleNamespace()))
        best.load_state_dict(saved)
        epochs_of(best, network, values[stop:])
    assert best.epoch == kept
    assert best.network.weight.item() == kept
    assert network.weight.item() == len(values)
    assert list(zip(best.curves["val_accuracy"], best.curves["val_loss"], strict=True)) == values


def test_a_loss_that_is_not_finite_ends_the_training_before_it_is_kept() -> None:
    network = nn.Linear(1, 1)
    best = BestEpoch(network, SimpleNamespace(state=SimpleNamespace()))
    epochs_of(best, network, [(0.5, 1.0)])
    with pytest.raises(UserError, match="not finite after epoch 2; give a smaller --learning_rate"):
        epochs_of(best, network, [(0.9, float("nan"))])
    assert best.network.weight.item() == 1


def report_of(accuracy: float, validation: list[int], training: list[str] | None = None) -> dict[str, Any]:
    best = BestEpoch(nn.Linear(1, 1), SimpleNamespace(state=SimpleNamespace()))
    epochs_of(best, best.source, [(accuracy, 1.0)])
    cases = [{"image": f"v{i}", "class": k} for i, k in enumerate(validation)]
    classes = {"tumor": 0, "stroma": 1}
    return ExpertReport(best, classes=classes, training=[{"image": i} for i in training or ["t"]], validation=cases)()


def test_an_expert_no_better_than_the_most_frequent_class_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert report_of(0.75, [0, 1, 1, 1])["most_frequent_share"] == 0.75
    assert "right on 75.0% of the validation images, no more than if it always said 'stroma' (75.0%)" in caplog.text
    caplog.clear()
    assert report_of(0.76, [0, 1, 1, 1])["held_out"]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not report_of(1.0, [0, 1], training=["v0", "v1"])["held_out"]
    assert "no validation images, so the accuracy is that on training images" in caplog.text


# From here on the bundle runs.


def test_an_expert_learns_classes_that_can_be_told_apart(dataset: Path, trained: SimpleNamespace) -> None:
    report = load_file(trained.path)["report"]
    assert report["val_accuracy"] >= 0.9
    assert report["num_validation"] == 20
    assert report["most_frequent_share"] == 0.5
    assert all(len(curve) == 4 for curve in report["curves"].values())


def test_the_stored_weights_have_the_best_accuracy_of_all_epochs(dataset: Path, trained: SimpleNamespace) -> None:
    content = load_file(trained.path, stage="image_classifier")
    report = content["report"]
    assert report["val_accuracy"] == max(report["curves"]["val_accuracy"])
    images, classes = validation_images(dataset)
    logits = restore_network(content)(images)
    assert (logits.argmax(1) == classes).double().mean().item() == report["val_accuracy"]
    loss = nn.functional.cross_entropy(logits, classes).item()
    assert report["val_loss"] == pytest.approx(loss, rel=1e-5)  # of logits: softmax before would bound it from below


def test_the_rate_falls_by_the_factor_after_each_epoch(trained: SimpleNamespace) -> None:
    assert trained.rates == pytest.approx([TINY["learning_rate"] * 0.7**k for k in range(4)], rel=1e-12)


def test_each_epoch_is_recorded(trained: SimpleNamespace) -> None:
    curves = load_file(trained.path)["report"]["curves"]
    client = mlflow.MlflowClient(f"sqlite:///{trained.out}/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name("fad").experiment_id])
    assert found.info.status == "FINISHED"
    table = np.genfromtxt(trained.out / "expert_resnet18_curves.csv", delimiter=",", names=True)
    for key, curve in curves.items():
        assert [m.value for m in client.get_metric_history(found.info.run_id, key)] == pytest.approx(curve)
        np.testing.assert_allclose(table[key], curve)
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert {"experts.png", "expert_resnet18_curves.png", "expert_resnet18_curves.csv"} <= artifacts


def test_a_resumed_training_ends_with_the_file_of_one_that_was_not_stopped(
    dataset: Path, trained: SimpleNamespace, tmp_path: Path
) -> None:
    train(dataset, tmp_path, max_epochs=2)
    there, here = load_file(trained.path), load_file(train(dataset, tmp_path))
    assert all(torch.equal(value, here["state_dict"][key]) for key, value in there["state_dict"].items())
    assert {k: v for k, v in there.items() if k != "state_dict"} == {k: v for k, v in here.items() if k != "state_dict"}
    made = workflow("fad", CONFIG.name, "train", "training", **TINY, **{
        "dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "models"), "output_dir": str(tmp_path / "eval"),
        "seed": 1,
    })  # fmt: skip
    message = str(user_error(lambda: (made.initialize(), made.run())))
    assert "contract.seed: 0 there, 1 here" in message


def test_an_expert_steers_and_is_not_changed_by_it(dataset: Path, trained: SimpleNamespace) -> None:
    expert = load_expert(
        trained.path,
        image_size=[SIZE, SIZE],
        image_channels=1,
        classes={"rough": 0, "smooth": 1},
        value_range=[-1, 1],
    )
    content = load_file(trained.path)
    images, _ = validation_images(dataset)
    for _ in range(3):
        features = expert(expert.to_unit(2 * images - 1 + torch.randn_like(images)))
    assert features.shape == (20, 512)
    assert not features.requires_grad
    assert all(torch.equal(value, content["state_dict"][key]) for key, value in expert.network.state_dict().items())


def test_an_expert_is_an_extractor_of_the_fidelity_metrics(dataset: Path, trained: SimpleNamespace) -> None:
    extractor = trained_classifier(trained.path)
    images, _ = validation_images(dataset)
    features = extractor((images * 255).round().to(torch.uint8).numpy())
    expected = restore_network(load_file(trained.path)).features(images).detach()
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert "resnet18 trained from random weights on 20 training images of toy" in extractor.recipe
    assert extractor.fingerprint
    assert extractor.details["fingerprint"] == read_dataset(dataset).fingerprint


@pytest.mark.slow
def test_a_training_from_a_weights_file_says_which_and_starts_there(dataset: Path, tmp_path: Path) -> None:
    published = ImageClassifier("resnet18", 5, 3).backbone.state_dict()
    torch.save(published, tmp_path / "w.pth")
    path = train(dataset, tmp_path, weights=str(tmp_path / "w.pth"), learning_rate=1e-9, max_epochs=1)
    content = load_file(path)
    assert content["contract"]["initial_weights"] == f"sha256 {sha256_of(tmp_path / 'w.pth')}"
    assert content["arch"]["args"]["mean"] == [0.449]
    for key, value in content["state_dict"].items():
        if key.startswith("backbone.") and key.endswith("weight"):
            torch.testing.assert_close(value, published[key.removeprefix("backbone.")], atol=1e-7, rtol=0)


@pytest.mark.slow
def test_a_vision_transformer_is_trained_by_its_name(dataset: Path, tmp_path: Path) -> None:
    path = train(
        dataset, tmp_path, backbone="vit_ti_16", image_size=[32, 32], max_epochs=1, model_file="expert_vit_ti_16.pt"
    )
    content = load_file(path)
    images, classes = validation_images(dataset, 32)
    accuracy = (restore_network(content)(images).argmax(1) == classes).double().mean().item()
    assert accuracy == content["report"]["val_accuracy"]


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_file_of_one_that_was_not(dataset: Path, tmp_path: Path) -> None:
    weights = []
    for way in ("whole", "killed"):
        values = TINY | {
            "dataset_dir": str(dataset),
            "ckpt_dir": str(tmp_path / way),
            "max_epochs": 6,
            "save_interval": 1,
        }
        run_it = command("training", "--config_file", str(CONFIG), *options(values | {"output_dir": str(tmp_path)}))
        if way == "killed":
            kill_when_there(run_it, tmp_path / way / "last_expert_resnet18.pt")
            assert not (tmp_path / way / "expert_resnet18.pt").exists()
        printed = run_forked(run_it)
        assert ("resuming expert_resnet18 from" in printed) == (way == "killed")
        assert f"best expert: {tmp_path / way / 'expert_resnet18.pt'}, validation accuracy" in printed
        weights.append(load_file(tmp_path / way / "expert_resnet18.pt")["state_dict"])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.slow
def test_properties_of_the_training_are_complete(dataset: Path, tmp_path: Path) -> None:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e")}
    made = workflow("fad", CONFIG.name, "train", "training", **(TINY | places))
    made.initialize()
    assert made.check_properties() == []


# The choice among experts


def write_expert(path: Path, accuracies: list[float], fingerprint: str = "here", **content: Any) -> None:
    best = int(np.argmax(accuracies))
    report = {
        "val_accuracy": accuracies[best], "best_epoch": best + 1, "num_validation": 9,
        "curves": {"val_accuracy": accuracies},
    }  # fmt: skip
    contract = {"dataset": {"name": f"data of {fingerprint}", "fingerprint": fingerprint}}
    whole = {"format": "monai_synth/1", "stage": "image_classifier", "contract": contract, "report": report}
    save_atomic(whole | content, path)


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    write_expert(tmp_path / "expert_a.pt", [0.2, 0.6])
    write_expert(tmp_path / "expert_b.pt", [0.5, 0.8, 0.7])
    write_expert(tmp_path / "expert_c.pt", [0.8, 0.1])
    write_expert(tmp_path / "last_expert_d.pt", [1.0])  # unfinished
    return tmp_path


def test_the_expert_of_highest_validation_accuracy_is_chosen_and_of_equal_ones_the_first_by_name(experts: Path) -> None:
    assert best_expert(experts) == str(experts / "expert_b.pt")
    write_expert(experts / "expert_0.pt", [0.81])
    assert best_expert(experts) == str(experts / "expert_0.pt")


def test_files_that_are_no_experts_of_this_dataset_are_left_out_with_the_reason(
    experts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_expert(experts / "expert_u.pt", [0.99], stage="diffusion")
    write_expert(experts / "expert_v.pt", [0.99], report={})
    write_expert(experts / "expert_w.pt", [0.99], fingerprint="elsewhere")
    (experts / "expert_x.pt").write_text("no file of torch")
    assert best_expert(experts, "here") == str(experts / "expert_b.pt")
    left_out = {Path(r.getMessage().split(" is left out")[0]).name: r.getMessage() for r in caplog.records}
    assert set(left_out) == {f"expert_{letter}.pt" for letter in "uvwx"}
    assert "holds the stage 'diffusion'" in left_out["expert_u.pt"]
    assert "no record of its validation accuracy" in left_out["expert_v.pt"]
    assert "trained on another dataset, data of elsewhere" in left_out["expert_w.pt"]
    assert "cannot be read" in left_out["expert_x.pt"]
    assert best_expert(experts) == str(experts / "expert_w.pt")


@pytest.mark.parametrize("fingerprint", [None, "elsewhere"])
def test_where_there_is_no_expert_the_command_that_trains_one_is_named(
    experts: Path, tmp_path: Path, fingerprint: str | None
) -> None:
    folder = experts if fingerprint else tmp_path / "nothing"
    with pytest.raises(UserError, match=r"holds no expert.*run training --config_file \S*train_expert\.json"):
        best_expert(folder, fingerprint)


def test_the_picture_has_a_line_for_each_expert_with_its_best_epoch_marked(
    experts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    write_expert(experts / "expert_w.pt", [0.99], fingerprint="elsewhere")
    (axes,) = experts_figure(read_experts(experts, "here")).axes
    shown = [(list(line.get_xdata()), list(line.get_ydata()), line.get_markevery()) for line in axes.lines]
    assert shown == [
        ([1, 2], [0.2, 0.6], [1]),
        ([1, 2, 3], [0.5, 0.8, 0.7], [1]),
        ([1, 2], [0.8, 0.1], [0]),
    ]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "a: 0.600 in epoch 2", "b: 0.800 in epoch 2", "c: 0.800 in epoch 1"
    ]  # fmt: skip
    compare_experts(experts, experts / "out", "here")
    assert Image.open(experts / "out" / "experts.png").format == "PNG"
    assert f"best expert: {experts / 'expert_b.pt'}, validation accuracy 0.8000 in epoch 2" in caplog.text
    assert "expert_a.pt 0.6000, expert_c.pt 0.8000" in caplog.text

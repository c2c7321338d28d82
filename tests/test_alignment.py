# SPDX-License-Identifier: Apache-2.0
"""Alignment with a frozen expert: the loss, what it trains and what it leaves alone, and the overlays."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import (
    BUNDLES,
    command,
    kill_when_there,
    options,
    run,
    run_forked,
    run_two_forked,
    user_error,
    workflow,
)
from expert_toy import write_classifier
from ignite.engine import Engine
from monai.engines import SupervisedTrainer
from source_images import shades
from torch import Tensor, nn

from monai_synth.checkpoint import load_file, save_atomic, sha256_of, trained_file
from monai_synth.data.classes import prepare_classes
from monai_synth.data.pairs import prepare_pairs
from monai_synth.data.phantom_nuclei import write_nuclei
from monai_synth.errors import UserError
from monai_synth.networks import ClassUNet, ImageClassifier, JointUNet
from monai_synth.training import (
    EMA,
    AlignedLoss,
    AlignedNetwork,
    AlignedPrepareBatch,
    ClassDiffusionPrepareBatch,
    Expert,
    load_expert,
    plain_network,
    weight_schedule,
)

SCHEDULE = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
CLASSES = {"bright": 0, "dark": 1}


def denoiser(**values: Any) -> ClassUNet:
    torch.manual_seed(0)
    options = {"base_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}
    network = ClassUNet(2, 1, 2, (16, 16), num_heads=2, **(options | values))
    for parameter in network.out.parameters():  # the last layer begins as zero
        nn.init.normal_(parameter, std=0.1)
    return network


def call(batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(batch, 1, 16, 16, generator=generator),
        "timesteps": torch.arange(batch) * 30 % 500,
        "class_labels": torch.arange(batch) % 3,
    }


def aligned(network: nn.Module | None = None, **values: Any) -> AlignedNetwork:
    values = {"layer": "middle_block", "num_features": 5, "example": call()} | values
    return AlignedNetwork(network or denoiser(), **values)


@functools.cache
def classifier(image_channels: int = 1) -> ImageClassifier:
    torch.manual_seed(3)
    return ImageClassifier("resnet18", 2, image_channels)


def expert(**values: Any) -> Expert:
    return Expert(classifier(), **({"value_range": [-1, 1]} | values))


@pytest.fixture(scope="module")
def expert_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("expert") / "expert.pt", CLASSES)


# The loss.


@pytest.mark.parametrize("project", ["expert", "network"])
@pytest.mark.parametrize(("sign", "loss"), [(1, 0.0), (-1, 2.0)])
def test_identical_features_cost_0_and_opposite_ones_2(project: str, sign: int, loss: float) -> None:
    network = aligned(num_features=16, project=project)
    with torch.no_grad():
        network.projection.weight.copy_(torch.eye(16))
    _, features = network.tap(**call(3))
    output = network(**call(3), expert_features=sign * 7.0 * features.detach())
    got = AlignedLoss(lambda prediction, target: prediction.new_zeros(()))(output, None)
    assert float(got.detach()) == pytest.approx(loss, abs=1e-6)


def test_the_tapped_features_are_the_spatial_mean_of_the_named_layer_and_the_prediction_is_the_denoisers() -> None:
    network = denoiser()
    seen = []
    network.down_blocks[1].register_forward_hook(lambda m, i, out: seen.append(out[0]))
    prediction, features = aligned(network, layer="down_blocks.1").tap(**call(2))
    torch.testing.assert_close(features, seen[-1].mean((2, 3)))
    assert torch.equal(prediction, network(**call(2)))


def test_the_projection_is_on_the_side_that_is_asked_for_and_has_no_bias() -> None:
    assert aligned(project="expert").projection.weight.shape == (16, 5)  # Eq 4: E_e -> E_d
    assert aligned(project="network").projection.weight.shape == (5, 16)
    assert aligned().projection.bias is None


def test_gradients_are_those_of_the_formula_written_out() -> None:
    network = aligned()
    theirs = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    target = torch.ones(4, 1, 16, 16)
    loss = AlignedLoss(nn.MSELoss(), w1=0.7, w2=0.3)(network(**call(4), expert_features=theirs), target)
    got = torch.autograd.grad(loss, list(network.parameters()))

    other = copy.deepcopy(network)
    maps = []
    other.network.middle_block.register_forward_hook(lambda m, i, out: maps.append(out))
    prediction = other.network(**call(4))
    a, b = maps[0].mean((2, 3)), theirs @ other.projection.weight.T
    cosine = (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())
    by_hand = 0.7 * (prediction - target).square().mean() + 0.3 * (1 - cosine).mean()
    for mine, hand in zip(got, torch.autograd.grad(by_hand, list(other.parameters())), strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-4, atol=1e-7)


def test_the_alignment_alone_moves_the_layers_up_to_the_tapped_one_and_no_later_ones() -> None:
    network = aligned()
    network(**call(4), expert_features=torch.ones(4, 5)).cosine.sum().backward()
    moved = {name.split(".")[0] for name, p in network.network.named_parameters() if p.grad is not None}
    assert moved == {"conv_in", "time_embed", "class_embedding", "down_blocks", "middle_block"}
    assert float(network.projection.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("layer", ["middle_block", "down_blocks.1.resnets.0"])
def test_recomputed_activations_give_the_same_gradients(layer: str) -> None:
    grads = []
    for recompute in (False, True):
        network = aligned(denoiser(use_checkpoint=recompute), layer=layer)
        network(**call(2), expert_features=torch.ones(2, 5)).cosine.sum().backward()
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 10
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_after_a_call_no_hook_is_left_even_where_the_call_fails() -> None:
    network = aligned()
    network(**call(), expert_features=torch.ones(1, 5))
    with pytest.raises(UserError):
        network(**(call() | {"class_labels": None}), expert_features=torch.ones(1, 5))
    assert not any(module._forward_hooks for module in network.modules())


def test_the_projection_does_not_touch_the_global_generator_and_depends_on_its_seed() -> None:
    network = denoiser()
    before = torch.get_rng_state()
    first, same, other = (aligned(network, seed=seed).projection.weight for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


# Weights.


def test_weights_are_constant_or_follow_their_schedule_and_stay_where_it_ends() -> None:
    assert [weight_schedule(0.3)(done) for done in (0, 0.5, 1)] == [0.3] * 3
    ramp = weight_schedule({"shape": "linear", "start": 0, "end": 2, "between": [0.2, 0.6]})
    np.testing.assert_allclose([ramp(d) for d in (0, 0.2, 0.3, 0.4, 0.6, 1)], [0, 0, 0.5, 1, 2, 2], atol=1e-12)
    decay = weight_schedule({"shape": "cosine", "start": 1, "end": 0})
    np.testing.assert_allclose([decay(d) for d in (0, 1 / 3, 0.5, 1)], [1, 0.75, 0.5, 0], atol=1e-12)


@pytest.mark.parametrize(
    "weight",
    [-1, True, "1", float("inf"), {"shape": "step", "start": 0, "end": 1}, {"shape": "linear", "start": 0},
     {"shape": "linear", "start": 0, "end": 1, "between": [0.5, 0.5]}],
)  # fmt: skip
def test_other_weights_are_refused_by_their_name(weight: Any) -> None:
    with pytest.raises(UserError, match="w2 is .*allowed are a number from 0"):
        AlignedLoss(nn.MSELoss(), w2=weight)


def test_weights_follow_the_number_of_the_iteration_also_of_a_resumed_trainer() -> None:
    loss = AlignedLoss(nn.MSELoss(), w2={"shape": "linear", "start": 0, "end": 1})
    seen: list[float] = []
    engine = Engine(lambda e, batch: seen.append(loss.weights[1]))
    loss.attach(engine)
    engine.run([0] * 4, max_epochs=2)
    np.testing.assert_allclose(seen, np.arange(8) / 8)
    seen.clear()
    engine.state.epoch, engine.state.iteration, engine.state.max_epochs = 1, 4, 2
    engine.run([0] * 4, max_epochs=2, epoch_length=4)
    np.testing.assert_allclose(seen, np.arange(4, 8) / 8)


# The expert.


def test_the_denoisers_range_becomes_0_to_1_and_noise_beyond_it_is_kept_or_clipped() -> None:
    x = torch.tensor([-2.0, -1, 0, 1, 1.5])
    assert expert().to_unit(x).tolist() == [-0.5, 0, 0.5, 1, 1.25]
    assert expert(beyond_range="clip").to_unit(x).tolist() == [0, 0, 0.5, 1, 1]
    assert torch.equal(expert(value_range=[0, 1]).to_unit(x), x)


def test_clean_alignment_sees_the_image_of_the_file_and_noisy_alignment_sees_x_t() -> None:
    frozen = expert()
    batch = {"image": torch.arange(512).reshape(2, 1, 16, 16).to(torch.uint8), "class": torch.tensor([0, 1])}
    batch["index"] = torch.tensor([4, 5])
    prepare = ClassDiffusionPrepareBatch(SCHEDULE, null_class=2, drop_prob=0.0, seed=0)
    plain = prepare(batch)
    features = {}
    for align_on in ("noisy", "clean"):
        x_t, target, args, given = AlignedPrepareBatch(prepare, frozen, image_channels=1, align_on=align_on)(batch)
        features[align_on] = given.pop("expert_features")
        assert torch.equal(x_t, plain[0])
        assert torch.equal(target, plain[1])
        assert args == ()
        assert {k: v.tolist() for k, v in given.items()} == {k: v.tolist() for k, v in plain[3].items()}
    with torch.no_grad():
        assert torch.equal(features["clean"], frozen.network.features(batch["image"] / 255))
        assert torch.equal(features["noisy"], frozen.network.features((plain[0] + 1) / 2))


def test_of_joint_data_the_expert_sees_the_image_channels_only() -> None:
    frozen = expert()
    x = torch.randn(2, 2, 16, 16)
    seen = []
    for label in (x[:, 1:], -x[:, 1:]):
        joint = torch.cat([x[:, :1], label], 1)
        prepare = AlignedPrepareBatch(lambda *_, x=joint: (x, None, (), {}), frozen, image_channels=1)
        seen.append(prepare({})[3]["expert_features"])
    assert torch.equal(*seen)


def test_an_expert_is_fed_at_the_size_that_is_asked_for() -> None:
    sizes = []
    toy = nn.Identity()
    toy.features, toy.num_features = lambda x: (sizes.append(tuple(x.shape)), x.mean((2, 3)))[1], 1
    for input_size in (None, [8, 8], [32, 16]):
        Expert(toy, value_range=[0, 1], input_size=input_size)(torch.rand(2, 1, 16, 16))
    assert sizes == [(2, 1, 16, 16), (2, 1, 8, 8), (2, 1, 32, 16)]


class Toy(SupervisedTrainer):
    """A trainer of three steps on one batch."""

    def __init__(self, network: nn.Module, loss: nn.Module, prepare: Any, ema: EMA | None = None) -> None:
        image = torch.randint(0, 256, (4, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        batch = {"image": image, "class": torch.tensor([0, 1, 0, 1]), "index": torch.arange(4)}
        torch.manual_seed(7)
        super().__init__(
            torch.device("cpu"), 1, [batch] * 3, network, torch.optim.AdamW(network.parameters(), 0.01, fused=True),
            loss, prepare_batch=prepare, decollate=False, train_handlers=[ema] if ema else [],
        )  # fmt: skip
        self.run()


def prepare_noisy() -> ClassDiffusionPrepareBatch:
    return ClassDiffusionPrepareBatch(SCHEDULE, null_class=2, drop_prob=0.5)


def test_training_leaves_the_expert_as_it_was_and_moves_network_and_projection() -> None:
    frozen, network = expert(), aligned(num_features=512)
    theirs = copy.deepcopy(frozen.network.state_dict())
    mine = copy.deepcopy(network.state_dict())
    prepare = AlignedPrepareBatch(prepare_noisy(), frozen, image_channels=1)
    network.train()
    Toy(network, AlignedLoss(nn.MSELoss()), prepare)
    assert not any(module.training for module in frozen.network.modules())
    assert all(p.grad is None and not p.requires_grad for p in frozen.network.parameters())
    assert all(torch.equal(value, theirs[key]) for key, value in frozen.network.state_dict().items())
    assert any("running_mean" in key for key in theirs)
    still = [key for key, value in network.state_dict().items() if torch.equal(value, mine[key])]
    assert still == []


def test_with_w2_0_the_weights_are_those_of_the_plain_training_to_the_bit() -> None:
    network = aligned(num_features=512)
    Toy(network, AlignedLoss(nn.MSELoss(), w2=0), AlignedPrepareBatch(prepare_noisy(), expert(), image_channels=1))
    plain, other = denoiser(), aligned(num_features=512)
    Toy(plain, nn.MSELoss(), prepare_noisy())
    Toy(other, AlignedLoss(nn.MSELoss()), AlignedPrepareBatch(prepare_noisy(), expert(), image_channels=1))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, network.network.state_dict()[key]), key
    assert not torch.equal(plain.conv_in.conv.weight, other.network.conv_in.conv.weight)


def test_the_average_is_of_the_plain_network_and_has_its_keys_only() -> None:
    network = aligned(num_features=512)
    ema = EMA(plain_network(network), decay=0.9, warmup_iters=1)
    Toy(network, AlignedLoss(nn.MSELoss()), AlignedPrepareBatch(prepare_noisy(), expert(), image_channels=1), ema)
    assert ema.ema_model.state_dict().keys() == denoiser().state_dict().keys()
    assert not any(module._forward_hooks for module in ema.ema_model.modules())
    assert not torch.equal(ema.ema_model.conv_in.conv.weight, denoiser().conv_in.conv.weight)


# Bad input.


def test_an_unknown_layer_lists_those_that_exist() -> None:
    with pytest.raises(UserError) as caught:
        aligned(layer="mid_block")
    assert str(caught.value) == (
        "the network has no layer 'mid_block' (did you mean middle_block?); give one of conv_in, time_embed, "
        "class_embedding, down_blocks.0, down_blocks.1, middle_block, up_blocks.0, up_blocks.1, out or a layer within "
        "as --align_layer"
    )


@pytest.mark.parametrize(
    ("layer", "message"),
    [("down_blocks", "does not run it itself"), ("middle_block.attention.attn.to_q", "needed is a feature map")],
)
def test_a_layer_without_a_feature_map_is_refused(layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        aligned(layer=layer)


GIVEN = {"image_size": [16, 16], "image_channels": 1, "classes": CLASSES, "value_range": [-1, 1]}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_channels": 3}, "image_channels: 1 there, 3 here"),
        ({"classes": {"bright": 0, "dark": 1, "grey": 2}}, "classes: .*dark.* there, .*grey.* here"),
        ({"classes": {"bright": 1, "dark": 0}}, "does not agree: classes"),
        (
            {"image_size": [32, 32]},
            r"trained on images of \[16, 16\], this training has \[32, 32\]; give --expert_input_",
        ),
        ({"image_size": [16, 16, 16]}, "3 spatial axes"),
        ({"input_size": [16]}, r"expert_input_size is \[16\]"),
        ({"beyond_range": "fold"}, "expert_beyond_range is 'fold'; allowed are keep, clip"),
        ({"value_range": [0, 255]}, "value_range is"),
        ({"path": None}, "no expert was given"),
        ({"path": "nowhere.pt"}, "there is no expert nowhere.pt"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_an_expert_that_does_not_fit_the_data_is_refused(expert_file: Path, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_expert(**({"path": expert_file} | GIVEN | values))


def test_a_file_of_another_stage_is_no_expert(tmp_path: Path) -> None:
    save_atomic(trained_file("diffusion", nn.Linear(1, 1), {}, {}), tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds the stage 'diffusion', needed is 'image_classifier'"):
        load_expert(tmp_path / "model.pt", **GIVEN)


def test_an_expert_of_another_size_is_fed_at_the_size_that_the_user_chooses(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "expert.pt", CLASSES, size=(32, 32))
    for size in ([16, 16], [32, 32]):
        assert load_expert(path, **GIVEN, input_size=size).input_size == tuple(size)
    assert load_expert(path, **(GIVEN | {"image_size": [32, 32]})).sha256 == sha256_of(path)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: AlignedPrepareBatch(prepare_noisy(), expert(), image_channels=1, align_on="both"), "align_on is 'both'"),
    (lambda: aligned(project="both"), "align_project is 'both'"),
])  # fmt: skip
def test_unknown_options_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# The overlays.


@pytest.mark.parametrize("bundle", ["cfg_ddpm", "jdm"])
def test_an_overlay_adds_its_keys_and_replaces_only_what_trains(bundle: str) -> None:
    configs = BUNDLES / bundle / "configs"
    train, overlay = (json.loads((configs / name).read_text()) for name in ("train.json", "align.json"))
    new = {
        "expert", "align_layer", "align_on", "align_project", "w1", "w2", "expert_input_size", "expert_beyond_range",
        "alignment",
    }  # fmt: skip
    assert set(overlay) - set(train) == new | {
        "contract#alignment", "ema#model", "checkpoint#objects#projection", "+train#handlers",
        "train#trainer#prepare_batch", "train#trainer#loss_function", "train#trainer#additional_metrics",
    }  # fmt: skip
    assert set(overlay) & set(train) == {"network"}
    assert (overlay["w1"], overlay["w2"], overlay["align_on"]) == (1.0, 1.0, "noisy")  # Sec V-B, Tab I


TINY = {
    "cfg_ddpm": {
        "preset": "demo", "max_epochs": 3, "val_interval": 1, "save_interval": 1, "batch_size": 8, "base_channels": 8,
        "num_heads": 2, "num_grid_samples": 2, "device": "cpu",
    },
    "jdm": {
        "preset": "demo", "image_size": [32, 32], "num_iterations": 6, "iterations_per_epoch": 2, "val_interval": 1,
        "save_interval": 1, "batch_size": 4, "device": "cpu",
    },
}  # fmt: skip
LONGER = {
    "cfg_ddpm": {"max_epochs": 12, "val_interval": 4},
    "jdm": {"num_iterations": 30, "iterations_per_epoch": 5, "val_interval": 2},
}
CONFIGS = ["train.json", "align.json"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Dataset and expert for each bundle."""
    root = tmp_path_factory.mktemp("data")
    prepare_classes(
        shades(root / "classes", ("dark", "bright")), root / "xray", splits=(0.7, 0.15, 0.15), progress=False
    )
    write_nuclei(root / "nuclei_source", num_images=12, size=64, seed=0)
    prepare_pairs(root / "nuclei_source", root / "nuclei", labels=["nucleus"], splits=(0.7, 0.15, 0.15))
    experts = {
        "cfg_ddpm": write_classifier(root / "grey.pt", CLASSES),
        "jdm": write_classifier(root / "colour.pt", CLASSES, channels=3, size=(32, 32)),
    }
    folders = {"cfg_ddpm": root / "xray", "jdm": root / "nuclei"}
    return {name: {"dataset_dir": str(folders[name]), "expert": str(path)} for name, path in experts.items()}


def places(root: Path, dataset_dir: str) -> dict[str, str]:
    return {
        "dataset_dir": dataset_dir, "ckpt_dir": str(root / "models"), "output_dir": str(root / "eval"),
        "latest_dir": str(root),
    }  # fmt: skip


def metric(root: Path, bundle: str, name: str) -> list[float]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{root}/eval/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name(bundle).experiment_id])
    assert found.info.status == "FINISHED"
    return [point.value for point in client.get_metric_history(found.info.run_id, name)]


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["cfg_ddpm", "jdm"])
def test_the_overlay_trains_lowers_the_alignment_loss_and_exports_the_plain_network(
    data: dict, tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    expert_file = tmp_path / "expert.pt"
    expert_file.write_bytes(Path(data[bundle]["expert"]).read_bytes())
    values = (
        TINY[bundle] | LONGER[bundle] | places(tmp_path, data[bundle]["dataset_dir"]) | {"expert": str(expert_file)}
    )
    made = run(bundle, CONFIGS, "train", "training", **values)
    assert made.check_properties() == []
    for name in ("alignment_loss", "val_alignment_loss"):
        losses = metric(tmp_path, bundle, name)
        assert losses[-1] < 0.6 * losses[0], losses
    total, denoising, alignment = (
        metric(tmp_path, bundle, n) for n in ("train_loss", "denoising_loss", "alignment_loss")
    )
    np.testing.assert_allclose(total, np.add(denoising, alignment), rtol=1e-4)

    content = load_file(tmp_path / "models" / "model.pt", stage="diffusion")
    networks = {"cfg_ddpm": ClassUNet, "jdm": JointUNet}
    assert content["state_dict"].keys() == networks[bundle](**content["arch"]["args"]).state_dict().keys()
    assert content["contract"]["alignment"]["expert_sha256"] == sha256_of(expert_file)
    last = load_file(tmp_path / "models" / "last_model.pt")["state"]
    assert set(last) == {"network", "projection", "ema", "optimizer", "lr_scheduler"}
    assert last["network"].keys() == content["state_dict"].keys()
    assert len(last["optimizer"]["state"]) == len(list(made.parser.get_parsed_content("network_def").parameters())) + 1

    expert_file.unlink()
    wanted = {"cfg_ddpm": {"per_class": 1}, "jdm": {"num_samples": 2, "condition": "image", "split": "test"}}[bundle]
    where = {key: values[key] for key in ("dataset_dir", "ckpt_dir")} | {"output_dir": str(tmp_path / "out")}
    run(bundle, "inference.json", "infer", "run", num_steps=2, device="cpu", **wanted, **where)
    assert list((tmp_path / "out").rglob("*.png"))


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["cfg_ddpm", "jdm"])
def test_with_w2_0_a_bundle_trains_the_weights_of_its_plain_training(data: dict, tmp_path: Path, bundle: str) -> None:
    weights = []
    for name, config, extra in (("plain", "train.json", {}), ("zero", CONFIGS, {"w2": 0.0, "expert": None})):
        extra = {k: data[bundle]["expert"] if k == "expert" else v for k, v in extra.items()}
        values = TINY[bundle] | places(tmp_path / name, data[bundle]["dataset_dir"]) | extra
        run(bundle, config, "train", "training", **values)
        weights.append(load_file(tmp_path / name / "models" / "model.pt")["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.slow
def test_an_aligned_training_that_was_killed_resumes_to_the_weights_of_one_that_was_not(
    data: dict, tmp_path: Path
) -> None:
    weights = []
    ramp = {"shape": "linear", "start": 0.0, "end": 1.0, "between": [0.0, 0.5]}
    for way in ("whole", "killed"):
        values = TINY["cfg_ddpm"] | data["cfg_ddpm"] | {"max_epochs": 16, "val_interval": 16, "w2": ramp}
        values |= places(tmp_path / way, data["cfg_ddpm"]["dataset_dir"])
        files = str([str(BUNDLES / "cfg_ddpm" / "configs" / name) for name in CONFIGS])
        run_it = command("training", "--config_file", files, *options(values))
        models = tmp_path / way / "models"
        if way == "killed":
            kill_when_there(run_it, models / "last_model.pt")
            assert not (models / "model.pt").exists()
        printed = run_forked(run_it)
        assert ("resuming model from" in printed) == (way == "killed")
        state = load_file(models / "last_model.pt")["state"]
        weights.append([*load_file(models / "model.pt")["state_dict"].values(), state["projection"]["weight"]])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.slow
def test_a_plain_training_is_not_resumed_with_alignment(data: dict, tmp_path: Path) -> None:
    values = TINY["cfg_ddpm"] | places(tmp_path, data["cfg_ddpm"]["dataset_dir"])
    run("cfg_ddpm", "train.json", "train", "training", **values)
    (tmp_path / "models" / "model.pt").unlink()
    made = workflow("cfg_ddpm", CONFIGS, "train", "training", **values, expert=data["cfg_ddpm"]["expert"])
    assert "does not agree: contract.alignment" in str(user_error(lambda: (made.initialize(), made.run())))


def torchrun(port: int, *arguments: str) -> None:
    root = str(Path(__file__).resolve().parents[1])  # a script's own folder comes before it
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, check=False, env=environment, cwd=root)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


TWO_PROCESSES = """
import torch
import torch.distributed as dist
from torch import nn
from monai_synth.bundle import begin, parallel
from monai_synth.networks import ClassUNet
from monai_synth.training import AlignedLoss, AlignedNetwork, plain_network

begin(seed=0, device="cpu", distributed=True)
denoiser = ClassUNet(2, 1, 2, (16, 16), base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2)
generator = torch.Generator().manual_seed(0)
def draw(*shape):
    return torch.randn(2, *shape, generator=generator)
x, theirs, target = draw(4, 1, 16, 16), draw(4, 5), draw(4, 1, 16, 16)
t, labels = torch.arange(4), torch.zeros(4, dtype=torch.long)
example = {"x": x[0], "timesteps": t, "class_labels": labels}
aligned = AlignedNetwork(denoiser, layer="middle_block", num_features=5, example=example)
loss = AlignedLoss(nn.MSELoss())
mean = [torch.zeros_like(p) for p in aligned.parameters()]
for i in range(2):
    grads = torch.autograd.grad(loss(aligned(x[i], t, class_labels=labels, expert_features=theirs[i]), target[i]),
                                list(aligned.parameters()), allow_unused=True, materialize_grads=True)
    mean = [m + g / 2 for m, g in zip(mean, grads)]
wrapped = parallel(aligned, "cpu")
assert wrapped is not aligned and plain_network(wrapped) is denoiser
mine = dist.get_rank()
output = wrapped(x[mine], t, class_labels=labels, expert_features=theirs[mine])
loss(output, target[mine]).backward()
for parameter, gradient in zip(aligned.parameters(), mean):
    torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
assert float(aligned.projection.weight.grad.abs().sum()) > 0
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_mean_of_the_gradients_of_network_and_projection(tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    torchrun(29617, str(script))


@pytest.mark.slow
def test_two_processes_train_with_the_overlay(data: dict, tmp_path: Path) -> None:
    values = TINY["cfg_ddpm"] | places(tmp_path, data["cfg_ddpm"]["dataset_dir"]) | data["cfg_ddpm"] | {"w2": 0.5}
    files = str([str(BUNDLES / "cfg_ddpm" / "configs" / name) for name in (*CONFIGS, "multi_gpu_train.json")])
    run_two_forked(command("training", "--config_file", files, *options(values)), port=29618)
    assert load_file(tmp_path / "models" / "model.pt")["contract"]["alignment"]["w2"] == 0.5

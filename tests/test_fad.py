# SPDX-License-Identifier: Apache-2.0
"""The bundle fad trains aligned, unaligned and to one class, and samples, by the stock runner."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from bundle_runs import BUNDLES, command, kill_when_there, options, places_of, run, user_error, workflow
from expert_toy import write_classifier
from monai.bundle import verify_net_in_out
from source_images import shades

from monai_synth.checkpoint import load_file, restore_network, sha256_of
from monai_synth.data.class_images import ready_batch
from monai_synth.data.classes import prepare_classes
from monai_synth.data.datalist import read_dataset
from monai_synth.errors import UserError
from monai_synth.export.provenance import read_provenance
from monai_synth.networks.text_features import text_features
from monai_synth.training import (
    AlignedLoss,
    AlignedOutput,
    BalancedSampler,
    ClassDiffusionPrepareBatch,
    InstancePrepareBatch,
    PriorPreservationLoss,
    class_prompts,
    dreambooth_iterations,
    dreambooth_list,
    flipped_batch,
    is_prior,
)
from monai_synth.training.classes import PartTarget

CONFIGS = BUNDLES / "fad" / "configs"
CLASSES = {"01_TUMOR": 0, "02_STROMA": 1, "03_COMPLEX": 2}
TINY = {
    "preset": "demo", "max_epochs": 2, "val_interval": 1, "save_interval": 1, "batch_size": 8, "image_size": [16, 16],
    "block_out_channels": [8, 16], "cross_attention": [False, True], "norm_num_groups": 4, "attention_head_dim": 2,
    "cross_attention_dim": 8, "text_dim": 16, "align_layer": "unet.down_blocks.1", "num_grid_samples": 2,
    "device": "cpu",
}  # fmt: skip
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}


def config(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_the_paper_preset_holds_the_numbers_of_the_text_and_the_layers_of_tiny_sd() -> None:
    train = config("train")
    paper = train["presets"]["paper"]
    expected = {
        "image_size": [64, 64], "batch_size": 4, "max_epochs": 20, "learning_rate": 1e-4,  # Sec V-B
        "block_out_channels": [320, 640, 1280], "cross_attention": [True] * 3, "cross_attention_dim": 768,
        "text_dim": 512, "prediction_type": "epsilon", "lr_decay": "cosine",  # its code
    }  # fmt: skip
    assert {k: paper[k] for k in expected} == expected
    assert (train["w1"], train["w2"], train["align_on"], train["loss"]) == (1.0, 1.0, "noisy", "mse")
    assert train["schedule"]["num_train_timesteps"] == 1000
    assert train["schedule"]["beta_schedule"] == "squaredcos_cap_v2"
    assert paper["pretrained_unet"] is paper["text_encoder"] is None  # random weights only by name
    assert config("ancestral") == {"sampler": "ddpm", "num_steps": 1000}
    assert config("dreambooth_800")["learning_rate"] == 5e-6  # DreamBooth's own values
    assert config("dreambooth_800")["max_epochs"] * config("dreambooth_800")["iterations_per_epoch"] == 800


@pytest.mark.parametrize("name", ["ancestral", "multi_gpu_train", "align_clean", "seed_code", "baseline", "rflow"])
def test_an_overlay_changes_only_keys_that_exist(name: str) -> None:
    known = {k for n in ("train", "inference") for k in config(n)} | {"contract#alignment"}
    assert set(config(name)) <= known


def test_training_and_inference_agree_on_what_they_share() -> None:
    train, inference = config("train"), config("inference")
    for key in ("phantom_dir", "latest_dir", "model_file", "seed", "device", "sampler", "num_steps"):
        assert train[key] == inference[key], key


def test_the_prompt_of_a_class_is_its_bare_name_and_that_of_the_instances_gets_a_rare_word() -> None:
    shuffled = {"02_STROMA": 1, "01_TUMOR": 0}
    assert list(class_prompts(shuffled).items()) == [("01_TUMOR", "tumor"), ("02_STROMA", "stroma")]
    assert class_prompts(shuffled, instance_class="tumor")["01_TUMOR"] == "sks tumor"
    assert class_prompts(shuffled, instance_class="tumor")["02_STROMA"] == "stroma"


def test_an_image_is_turned_over_along_each_axis_about_every_second_time_and_else_stays() -> None:
    torch.manual_seed(1)
    image = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).expand(400, 1, 3, 4)
    batch = {"image": image, "class": torch.arange(400), "index": torch.arange(400)}
    turned = flipped_batch(batch)
    kinds = [image[0].flip(axes) for axes in ([], [1], [2], [1, 2])]
    counts = [sum(torch.equal(found, kind) for found in turned["image"]) for kind in kinds]
    assert sum(counts) == 400
    assert min(counts) > 70  # 100 each, standard deviation 8.7
    assert turned["class"] is batch["class"]


def test_in_the_range_0_to_1_the_network_sees_the_image_plus_noise_in_that_range() -> None:
    batch = {"image": torch.full((1, 1, 4, 4), 255, dtype=torch.uint8), "class": torch.zeros(1, dtype=torch.long)}
    batch["index"] = torch.zeros(1, dtype=torch.long)
    seen = {}
    for value_range in ([0, 1], [-1, 1]):
        prepare = ClassDiffusionPrepareBatch(SCHEDULE, null_class=2, drop_prob=0.0, value_range=value_range, seed=0)
        batch["image"].fill_(255)
        white = prepare(batch, "cpu")[0]
        batch["image"].zero_()
        seen[tuple(value_range)] = white - prepare(batch, "cpu")[0]  # the same noise: it is sqrt(alpha-bar) of the span
    torch.testing.assert_close(seen[-1, 1], 2 * seen[0, 1])


# DreamBooth.


def test_the_loss_is_the_instances_mean_plus_lambda_times_the_priors_mean() -> None:
    prediction, target = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 4, 4)
    instance = torch.tensor([True, False] * 3)
    by_hand = (prediction - target)[::2].square().mean() + 0.3 * (prediction - target)[1::2].square().mean()
    got = PriorPreservationLoss("mse", 0.3)(prediction, PartTarget(target, instance))
    torch.testing.assert_close(got, by_hand)


def test_only_instances_are_aligned() -> None:
    cosine = torch.tensor([0.5, -1.0, 0.1, -1.0])
    target = PartTarget(torch.zeros(4, 1), torch.tensor([True, False] * 2))
    loss = AlignedLoss(lambda prediction, target: prediction.new_zeros(()), w2=1.0)
    assert float(loss(AlignedOutput(torch.zeros(4, 1), cosine), target)) == pytest.approx(1 - 0.3)


@pytest.mark.parametrize("weight", [-1, True, "1", float("nan")])
def test_a_prior_weight_that_is_none_is_refused(weight: Any) -> None:
    with pytest.raises(UserError, match="prior_weight"):
        PriorPreservationLoss("mse", weight)


# From here on a dataset.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fad")
    prepare_classes(
        shades(root / "source", list(CLASSES), step=70), root / "prepared", splits=(0.7, 0.15, 0.15), progress=False
    )
    return root / "prepared"


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("expert") / "expert.pt", CLASSES, seed=3)


def test_a_dreambooth_batch_is_half_instances_and_an_epoch_sees_each_of_them_once(dataset: Path) -> None:
    cases = dreambooth_list(str(dataset), instance_class="tumor")
    kinds = is_prior(cases, 0)
    assert (kinds.count(0), kinds.count(1)) == (8, 16)
    assert [case["index"] for case in cases] == list(range(24))
    iterations = dreambooth_iterations(cases, 0, 4)
    assert iterations == 4
    sampler = BalancedSampler(kinds, 4 * iterations, seed=0)
    sampler.set_epoch(1)
    drawn = [cases[i] for i in sampler]
    assert [case["class"] == 0 for case in drawn] == [True, False] * 8
    assert len({case["image"] for case in drawn if case["class"] == 0}) == 8


def test_priors_may_be_samples_of_a_model_of_the_same_classes_only(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(dataset, folder)
    content = json.loads((dataset / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"validation": [], "test": []}))
    cases = dreambooth_list(str(dataset), instance_class="STROMA", prior_dir=str(folder), num_prior=5)
    assert is_prior(cases, 1).count(1) == 5
    assert {case["class"] for case in cases if case["class"] != 1} == {0, 2}
    (folder / "dataset.json").write_text(json.dumps(content | {"classes": {"a": 0, "b": 1, "c": 2}}))
    with pytest.raises(UserError, match="classes.01_TUMOR"):
        dreambooth_list(str(dataset), instance_class="STROMA", prior_dir=str(folder))


def test_targets_tell_which_items_are_instances() -> None:
    inner = ClassDiffusionPrepareBatch(SCHEDULE, null_class=3, drop_prob=0.0)
    batch = {"image": torch.zeros(3, 1, 4, 4, dtype=torch.uint8), "class": torch.tensor([0, 2, 0])}
    batch = ready_batch(batch | {"index": torch.arange(3)})
    _, target, _, given = InstancePrepareBatch(inner, 0)(batch, "cpu")
    assert target.instance.tolist() == [True, False, True]
    assert target.target.shape == (3, 1, 4, 4)
    assert given["class_labels"].tolist() == [0, 2, 0]


# From here on the bundle runs.


def train(places: dict[str, str], overlays: tuple[str, ...] = (), **values: Any) -> dict[str, Any]:
    configs = ["train.json", *(f"{name}.json" for name in overlays)]
    made = run("fad", configs, "train", "training", **TINY | places | values)
    return load_file(Path(places["ckpt_dir"]) / made.parser.get_parsed_content("model_file"), stage="diffusion")


def places_in(root: Path, dataset: Path) -> dict[str, str]:
    return {
        "dataset_dir": str(dataset), "ckpt_dir": str(root / "models"), "output_dir": str(root / "eval"),
        "latest_dir": str(root),
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(dataset: Path, expert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    places = places_in(tmp_path_factory.mktemp("trained"), dataset)
    train(places, expert=str(expert), max_epochs=4)
    return places


@pytest.mark.slow
def test_the_trained_file_holds_neither_expert_nor_projection_but_says_which_expert_it_was(
    trained: dict[str, str], expert: Path
) -> None:
    content = load_file(Path(trained["ckpt_dir"]) / "model.pt", stage="diffusion")
    network = restore_network(content)
    assert set(content["state_dict"]) == set(network.state_dict())
    assert not [key for key in content["state_dict"] if "projection" in key and "text_projection" not in key]
    contract = content["contract"]
    assert contract["alignment"]["expert_sha256"] == sha256_of(expert)
    assert contract["prompts"] == {"01_TUMOR": "tumor", "02_STROMA": "stroma", "03_COMPLEX": "complex"}
    assert contract["text_encoder"] == contract["pretrained_unet"] == "random"
    assert set(content["report"]) == {"n", "class_loss", "wrong_class_loss"}
    features = text_features(["tumor", "stroma", "complex"], "random", dim=16)
    assert torch.equal(content["state_dict"]["text_features"], features)


@pytest.mark.slow
def test_training_lowers_the_alignment_loss_also_of_images_not_trained_on_and_draws_it(trained: dict[str, str]) -> None:
    table = (Path(trained["output_dir"]) / "model_loss.csv").read_text().splitlines()
    names = table[0].split(",")
    assert {"train_loss", "denoising_loss", "alignment_loss", "val_loss"} <= set(names)
    at = names.index("alignment_loss")
    assert float(table[-1].split(",")[at]) < float(table[1].split(",")[at])
    assert (Path(trained["output_dir"]) / "model_loss.png").is_file()
    client = mlflow.MlflowClient(f"sqlite:///{trained['output_dir']}/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name("fad").experiment_id])
    history = [metric.value for metric in client.get_metric_history(found.info.run_id, "val_alignment_loss")]
    assert len(history) == 4
    assert history[-1] < history[0]


@pytest.mark.slow
def test_sampling_needs_neither_expert_nor_text_encoder(
    dataset: Path, expert: Path, trained: dict[str, str], tmp_path: Path
) -> None:
    values = {"per_class": 2, "num_steps": 2, "device": "cpu"}
    hidden = expert.with_suffix(".away")
    expert.rename(hidden)
    try:
        run("fad", "inference.json", "infer", "run", **places_of(trained), output_dir=str(tmp_path / "out"), **values)
    finally:
        hidden.rename(expert)
    found = read_dataset(tmp_path / "out", task="classes")
    assert [case["class"] for case in found.datalist("training")] == [0, 0, 1, 1, 2, 2]
    lines = read_provenance(tmp_path / "out" / "provenance.jsonl")
    assert len(lines) == 6


@pytest.mark.slow
def test_with_w2_0_the_weights_are_those_of_the_baseline_to_the_bit(
    dataset: Path, expert: Path, tmp_path: Path
) -> None:
    plain = train(places_in(tmp_path / "a", dataset), ("baseline",))
    unweighted = train(places_in(tmp_path / "b", dataset), expert=str(expert), w2=0.0)
    weighted = train(places_in(tmp_path / "c", dataset), expert=str(expert))
    assert plain["contract"]["alignment"] is None
    for key, value in plain["state_dict"].items():
        assert torch.equal(value, unweighted["state_dict"][key]), key
    assert any(not torch.equal(value, weighted["state_dict"][key]) for key, value in plain["state_dict"].items())


@pytest.mark.slow
def test_clean_alignment_and_the_codes_settings_train_other_weights(
    dataset: Path, expert: Path, tmp_path: Path
) -> None:
    noisy = train(places_in(tmp_path / "a", dataset), expert=str(expert))
    clean = train(places_in(tmp_path / "b", dataset), ("align_clean",), expert=str(expert))
    layer = {"align_layer": "unet.down_blocks.1.resnets.0.conv_shortcut"}
    code = train(places_in(tmp_path / "c", dataset), ("seed_code",), expert=str(expert), **layer)
    assert clean["contract"]["alignment"]["on"] == "clean"
    assert code["contract"]["value_range"] == [0, 1]
    for other in (clean, code):
        assert not torch.equal(noisy["state_dict"]["unet.conv_in.weight"], other["state_dict"]["unet.conv_in.weight"])
    places = places_of(places_in(tmp_path / "c", dataset))
    run("fad", "inference.json", "infer", "run", **places, output_dir=str(tmp_path / "out"), num_steps=2, device="cpu")
    assert len(read_dataset(tmp_path / "out", task="classes").datalist("training")) == 30


@pytest.mark.slow
@pytest.mark.parametrize("overlays", [("dreambooth",), ("baseline", "dreambooth")])
def test_dreambooth_goes_on_from_a_model_with_a_prompt_of_its_own(
    dataset: Path, expert: Path, trained: dict[str, str], tmp_path: Path, overlays: tuple[str, ...]
) -> None:
    start = str(Path(trained["ckpt_dir"]) / "model.pt")
    places = places_in(tmp_path, dataset)
    values = {} if "baseline" in overlays else {"expert": str(expert)}
    made = train(places, overlays, start_file=start, learning_rate=1e-9, **values)
    before, after = load_file(start)["state_dict"], made["state_dict"]
    torch.testing.assert_close(after["unet.conv_in.weight"], before["unet.conv_in.weight"], rtol=0, atol=1e-6)
    assert torch.equal(after["text_features"][1:], before["text_features"][1:])
    assert torch.equal(after["text_features"][0], text_features(["sks tumor"], "random", dim=16)[0])
    assert made["contract"]["dreambooth"]["start_sha256"] == sha256_of(start)
    assert made["contract"]["prompts"]["01_TUMOR"] == "sks tumor"
    assert (made["contract"]["alignment"] is None) == ("baseline" in overlays)


@pytest.mark.slow
def test_properties_of_training_and_inference_are_complete(
    dataset: Path, expert: Path, trained: dict[str, str], tmp_path: Path
) -> None:
    made = workflow("fad", "train.json", "train", "training", **TINY, **trained, expert=str(expert))
    made.initialize()
    assert made.check_properties() == []
    made = workflow("fad", "inference.json", "infer", "run", **places_of(trained), output_dir=str(tmp_path / "o"))
    made.initialize()
    assert made.check_properties() == []


@pytest.mark.slow
def test_the_network_takes_and_gives_what_metadata_says(trained: dict[str, str]) -> None:
    verify_net_in_out(
        net_id="network_def", config_file=str(CONFIGS / "inference.json"), meta_file=str(CONFIGS / "metadata.json"),
        device="cpu", extra_forward_args={"timesteps": torch.tensor([1]), "class_labels": torch.tensor([0])},
        bundle_root=str(BUNDLES / "fad"), **places_of(trained),
    )  # fmt: skip


@pytest.mark.slow
def test_a_training_that_was_killed_resumes_to_the_weights_of_one_that_was_not(
    dataset: Path, expert: Path, tmp_path: Path
) -> None:
    whole, killed = (places_in(tmp_path / name, dataset) for name in ("whole", "killed"))
    values = {"expert": str(expert), "max_epochs": 4}
    expected = train(whole, **values)
    arguments = options(TINY | killed | values | {"cross_attention": "[False, True]"})  # Python's words, not JSON's
    last = Path(killed["ckpt_dir"]) / "last_model.pt"
    kill_when_there(command("training", "--config_file", str(CONFIGS / "train.json"), *arguments), last)
    found = train(killed, **values)
    for key, value in expected["state_dict"].items():
        assert torch.equal(value, found["state_dict"][key]), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlays", "values", "message"),
    [
        ((), {}, "train_expert"),
        ((), {"expert": "/nowhere/expert.pt"}, "there is no expert"),
        ((), {"align_layer": "unet.down_blocks.7"}, "unet.down_blocks.1"),
        ((), {"pretrained_unet": None}, "tiny-sd"),
        ((), {"pretrained_unet": "/nowhere"}, "tiny-sd"),
        ((), {"text_encoder": None}, "clip-vit-base-patch32"),
        ((), {"w2": -1}, "w2 is -1"),
        ((), {"align_on": "dirty"}, "noisy, clean"),
        ((), {"value_range": [0, 255]}, "value_range"),
        (("dreambooth",), {"instance_class": "bone"}, "01_TUMOR"),
        (("dreambooth",), {"start_file": "/nowhere.pt"}, "start_file"),
    ],
)
def test_bad_trainings_end_in_one_message_and_leave_no_model(
    dataset: Path, expert: Path, tmp_path: Path, overlays: tuple[str, ...], values: dict, message: str
) -> None:
    places = places_in(tmp_path, dataset)
    given = ({} if not values else {"expert": str(expert)}) | values
    nothing = {key: value for key, value in given.items() if value is not None}
    none = {key: "$None" for key, value in given.items() if value is None}
    error = user_error(lambda: train(places, overlays, **nothing, **none))
    assert message in str(error)
    assert "\n" not in str(error)
    assert not list(Path(places["ckpt_dir"]).glob("*.pt"))

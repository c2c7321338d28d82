# SPDX-License-Identifier: Apache-2.0
"""The bundle cfg_ddpm trains, stops, resumes and samples images of classes by the stock runner."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from bundle_runs import (
    BUNDLES,
    command,
    kill_when_there,
    options,
    places_of,
    run,
    run_forked,
    run_two_forked,
    user_error,
    workflow,
)
from monai.bundle import verify_net_in_out
from PIL import Image
from source_images import shades

from monai_synth.checkpoint import load_file
from monai_synth.data.classes import prepare_classes
from monai_synth.data.datalist import read_dataset

CONFIGS = BUNDLES / "cfg_ddpm" / "configs"
TINY = {
    "preset": "demo", "max_epochs": 2, "val_interval": 1, "save_interval": 1, "batch_size": 8, "base_channels": 8,
    "num_heads": 2, "num_grid_samples": 2, "device": "cpu",
}  # fmt: skip


def test_the_paper_preset_holds_the_numbers_of_the_text() -> None:
    train = json.loads((CONFIGS / "train.json").read_text())
    paper = train["presets"]["paper"]
    expected = {
        "learning_rate": 1e-4, "max_epochs": 300, "loss": "l1", "batch_size": 4, "val_interval": 5,  # Sec 4.1, 4.4
        "base_channels": 64, "channel_mult": [1, 2, 4], "drop_prob": 0.5, "prediction_type": "epsilon",  # its code
        "lr_decay": "constant",
    }  # fmt: skip
    assert {k: paper[k] for k in expected} == expected
    assert train["schedule"]["beta_schedule"] == "squaredcos_cap_v2"
    assert train["schedule"]["num_train_timesteps"] == 500
    assert (train["weight_decay"], train["class_sampling"], train["guidance_scale"]) == (0.0, "natural", 3.0)
    optimizer = torch.optim.AdamW([torch.zeros(1)], weight_decay=0.0).defaults
    assert (optimizer["betas"], optimizer["eps"]) == ((0.9, 0.999), 1e-8)
    assert json.loads((CONFIGS / "ancestral.json").read_text()) == {"sampler": "ddpm", "num_steps": 500}


@pytest.mark.parametrize("name", ["ancestral", "rflow", "multi_gpu_train"])
def test_an_overlay_changes_only_keys_that_exist(name: str) -> None:
    known = {k for n in ("train.json", "inference.json") for k in json.loads((CONFIGS / n).read_text())}
    assert set(json.loads((CONFIGS / f"{name}.json").read_text())) <= known


def test_training_and_inference_agree_on_what_they_share() -> None:
    train, inference = (json.loads((CONFIGS / n).read_text()) for n in ("train.json", "inference.json"))
    for key in ("phantom_dir", "latest_dir", "model_file", "seed", "device", "sampler", "num_steps", "guidance_scale"):
        assert train[key] == inference[key], key


# From here on the bundle runs.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    prepare_classes(
        shades(root / "source", ("dark", "bright")), root / "prepared", splits=(0.7, 0.15, 0.15), progress=False
    )
    return root / "prepared"


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    root = tmp_path_factory.mktemp("trained")
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(root / "models"), "output_dir": str(root / "eval")}
    run("cfg_ddpm", "train.json", "train", "training", **TINY, **places, latest_dir=str(root))
    return places


def sample(trained: dict[str, str], out: Path, config: str | list[str] = "inference.json", **values: Any) -> Path:
    values = {"per_class": 3, "num_steps": 2, "device": "cpu"} | values
    run("cfg_ddpm", config, "infer", "run", **places_of(trained), output_dir=str(out), **values)
    return out


@pytest.mark.slow
def test_training_writes_a_model_a_grid_a_loss_plot_and_a_finished_run(trained: dict[str, str]) -> None:
    assert {p.name for p in Path(trained["ckpt_dir"]).glob("*.pt")} == {"model.pt", "last_model.pt"}
    content = load_file(Path(trained["ckpt_dir"]) / "model.pt", stage="diffusion")
    assert content["contract"]["classes"] == {"bright": 0, "dark": 1}
    assert content["contract"]["num_real"] == {"bright": 8, "dark": 8}
    assert set(content["report"]) == {"n", "class_loss", "null_loss", "wrong_class_loss"}
    out = Path(trained["output_dir"])
    sheet = np.asarray(Image.open(out / "samples.png"))
    assert sheet.shape == (2 * 16 + 2, 2 * 16 + 2, 3)  # a row for each class
    lines = (out / "model_loss.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,val_loss"
    assert len(lines) == 3
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name("cfg_ddpm").experiment_id])
    assert found.info.status == "FINISHED"
    assert {"train_loss", "val_loss"} <= set(found.data.metrics)
    artifacts = {a.path for a in client.list_artifacts(found.info.run_id)}
    assert {"samples", "model_loss.png", "model_loss.csv"} <= artifacts


@pytest.mark.slow
def test_properties_of_training_and_inference_are_complete(trained: dict[str, str], tmp_path: Path) -> None:
    made = workflow("cfg_ddpm", "train.json", "train", "training", **TINY, **trained)
    made.initialize()
    assert made.check_properties() == []
    made = workflow("cfg_ddpm", "inference.json", "infer", "run", **places_of(trained), output_dir=str(tmp_path / "o"))
    made.initialize()
    assert made.check_properties() == []


@pytest.mark.slow
def test_the_network_takes_and_gives_what_metadata_says(trained: dict[str, str], tmp_path: Path) -> None:
    verify_net_in_out(
        net_id="network_def", config_file=str(CONFIGS / "inference.json"), meta_file=str(CONFIGS / "metadata.json"),
        device="cpu", extra_forward_args={"timesteps": torch.tensor([1]), "class_labels": torch.tensor([0])},
        bundle_root=str(BUNDLES / "cfg_ddpm"), **places_of(trained),
    )  # fmt: skip


@pytest.mark.slow
def test_samples_are_a_prepared_dataset_with_a_line_for_each_image(trained: dict[str, str], tmp_path: Path) -> None:
    out = sample(trained, tmp_path / "out", per_class={"bright": 4, "dark": 2})
    found = read_dataset(out, task="classes")
    assert [case["class"] for case in found.content["training"]] == [0] * 4 + [1] * 2
    lines = [json.loads(line) for line in (out / "provenance.jsonl").read_text().splitlines()]
    assert len({line["seed"] for line in lines}) == 6
    assert {line["guidance"]["scale"] for line in lines} == {3.0}
    assert all(set(line["checkpoints"]) == {"model.pt"} for line in lines)
    assert Image.open(found.datalist("training")[0]["image"]).size == (16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_the_image_of_a_seed_does_not_depend_on_the_batch(
    trained: dict[str, str], tmp_path: Path, sampler: str
) -> None:
    folders = [sample(trained, tmp_path / str(b), batch_size=b, sampler=sampler) for b in (1, 6)]
    paths = sorted(p.relative_to(folders[0]) for p in folders[0].glob("*/*.png"))
    assert len(paths) == 6
    for path in paths:
        images = [np.asarray(Image.open(f / path)).astype(int) for f in folders]
        assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
def test_a_stopped_sampling_goes_on_to_the_same_files(trained: dict[str, str], tmp_path: Path) -> None:
    sample(trained, tmp_path / "a", per_class=1)
    sample(trained, tmp_path / "a", per_class=3)
    sample(trained, tmp_path / "b", per_class=3)
    paths = sorted(p.relative_to(tmp_path / "b") for p in (tmp_path / "b").glob("*/*.png"))
    assert [(tmp_path / "a" / p).read_bytes() for p in paths] == [(tmp_path / "b" / p).read_bytes() for p in paths]


@pytest.mark.slow
def test_both_conventions_of_guidance_sample_the_same_images(trained: dict[str, str], tmp_path: Path) -> None:
    a = sample(trained, tmp_path / "a", per_class=1, guidance_scale=3)
    b = sample(trained, tmp_path / "b", per_class=1, guidance_scale=2, guidance_convention="weight")
    c = sample(trained, tmp_path / "c", per_class=1, guidance_scale=1)
    for path in (p.relative_to(a) for p in a.glob("*/*.png")):
        assert (a / path).read_bytes() == (b / path).read_bytes()
        assert (a / path).read_bytes() != (c / path).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_class": 0}, "per_class is 0"),
        ({"only": ["covid"]}, "unknown class 'covid'; the model was trained with bright, dark"),
        ({"num_steps": 501}, "500"),
        ({"guidance_scale": "3x"}, "guidance_scale is '3x'"),
        ({"guidance_rescale": "x"}, "guidance_rescale is 'x'; allowed are shares"),
        ({"batch_size": 0}, "batch_size is 0, allowed are integers from 1"),
        ({"num_steps": "x"}, "num_steps is 'x'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"only": 0}, "only is 0; give names of classes"),
        ({"guidance_interval": [0, 900]}, "two timesteps from 0 to 499"),
        ({"ckpt_dir": "nowhere"}, "there is no trained file"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_requests_end_in_one_message(trained: dict[str, str], tmp_path: Path, values: dict, message: str) -> None:
    base = {"num_steps": 2, "device": "cpu", "output_dir": str(tmp_path / "out")} | places_of(trained)
    made = workflow("cfg_ddpm", "inference.json", "infer", "run", **(base | values))
    assert message in str(user_error(lambda: (made.initialize(), made.run())))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": [18, 18]}, "give 2 sizes that are multiples of 4"),
        ({"loss": "l2"}, "unknown loss 'l2'"),
        ({"class_sampling": "even"}, "unknown class_sampling 'even'"),
        ({"drop_prob": 2}, "drop_prob is 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"learning_rate": "x"}, "learning_rate is 'x'; allowed are numbers above 0"),
        ({"ema_decay": 2}, "ema_decay is 2; allowed are shares"),
        ({"save_interval": 0}, "save_interval is 0, allowed are integers from 1"),
        ({"num_grid_samples": 0}, "num_grid_samples is 0"),
        ({"image_size": 20}, "image_size is 20; give a list"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_trainings_end_in_one_message(dataset: Path, tmp_path: Path, values: dict, message: str) -> None:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e")}
    made = workflow("cfg_ddpm", "train.json", "train", "training", **(TINY | places | values))
    assert message in str(user_error(lambda: (made.initialize(), made.run())))
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["ckpt_dir", "output_dir"])
def test_a_place_that_is_a_file_is_told_before_the_training(dataset: Path, tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text("x")
    places = {"ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e")} | {key: str(tmp_path / "file")}
    made = workflow("cfg_ddpm", "train.json", "train", "training", **TINY, dataset_dir=str(dataset), **places)
    assert f"give another --{key}" in str(user_error(lambda: (made.initialize(), made.run())))


@pytest.mark.slow
def test_a_training_that_was_killed_resumes_to_the_weights_of_one_that_was_not(dataset: Path, tmp_path: Path) -> None:
    weights = []
    for way in ("whole", "killed"):
        values = TINY | {
            "max_epochs": 16, "val_interval": 16, "class_sampling": "balanced", "dataset_dir": str(dataset),
            "ckpt_dir": str(tmp_path / way), "output_dir": str(tmp_path / f"eval_{way}"), "latest_dir": str(tmp_path),
        }  # fmt: skip
        run_it = command("training", "--config_file", str(CONFIGS / "train.json"), *options(values))
        if way == "killed":
            kill_when_there(run_it, tmp_path / way / "last_model.pt")
            assert not (tmp_path / way / "model.pt").exists()
        printed = run_forked(run_it)
        assert ("resuming model from" in printed) == (way == "killed")
        weights.append(load_file(tmp_path / way / "model.pt")["state_dict"])
        assert len((tmp_path / f"eval_{way}" / "model_loss.csv").read_text().splitlines()) == 17
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.slow
def test_two_processes_train_and_sample_together(dataset: Path, tmp_path: Path) -> None:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "models"), "latest_dir": str(tmp_path)}
    for config, ids, values in (
        ("train.json", ["training"], TINY | {"accumulate": 2, "output_dir": str(tmp_path / "eval")}),
        ("inference.json", [], {"per_class": 3, "num_steps": 3, "output_dir": str(tmp_path / "out")}),
    ):
        files = str([str(CONFIGS / n) for n in (config, "multi_gpu_train.json")])
        run_two_forked(command(*ids, "--config_file", files, *options(places | values)), port=29614)
    assert len(read_dataset(tmp_path / "out").content["training"]) == 6


@pytest.mark.slow
def test_colour_images_of_unequal_size_train_at_the_size_that_is_given(tmp_path: Path) -> None:
    source = shades(tmp_path / "source", ("dark", "bright"), channels=3)
    Image.fromarray(np.full((30, 20, 3), 200, np.uint8)).save(source / "bright" / "large.png")
    prepare_classes(source, tmp_path / "prepared", splits=(0.7, 0.15, 0.15), progress=False)
    places = {
        "dataset_dir": str(tmp_path / "prepared"), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e"),
    }  # fmt: skip
    made = workflow("cfg_ddpm", "train.json", "train", "training", **TINY, **places, latest_dir=str(tmp_path))
    assert "give --image_size" in str(user_error(lambda: (made.initialize(), made.run())))
    values = TINY | {"image_size": [24, 16], "max_epochs": 1}
    run("cfg_ddpm", "train.json", "train", "training", **values, **places, latest_dir=str(tmp_path))
    out = sample(places, tmp_path / "out", per_class=1)
    image = Image.open(read_dataset(out).datalist("training")[0]["image"])
    assert (image.mode, image.size) == ("RGB", (16, 24))

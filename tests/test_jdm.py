# SPDX-License-Identifier: Apache-2.0
"""The bundle JDM trains, stops, resumes and samples pairs by the stock runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import nibabel as nib
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

from monai_synth.checkpoint import load_file
from monai_synth.data.pairs import prepare_pairs
from monai_synth.data.phantom_nuclei import write_nuclei

CONFIGS = BUNDLES / "jdm" / "configs"
TINY = {
    "preset": "demo", "image_size": [32, 32], "num_iterations": 4, "iterations_per_epoch": 2, "val_interval": 1,
    "save_interval": 1, "batch_size": 4, "device": "cpu",
}  # fmt: skip


def test_the_paper_preset_holds_the_numbers_of_table_4_1() -> None:
    train = json.loads((CONFIGS / "train.json").read_text())
    paper = train["presets"]["paper"]
    expected = {
        "image_size": [256, 256], "base_channels": 128, "channel_mult": [1, 1, 2, 2, 4, 4], "num_res_blocks": 2,
        "attention_resolutions": [16, 8], "num_heads": 4, "batch_size": 10, "learning_rate": 1e-4,
        "num_iterations": 60_000, "ema_decay": 0.9999, "prediction_type": "epsilon",
        "value_range": [0, 1],
    }  # fmt: skip
    assert {k: paper[k] for k in expected} == expected
    assert (train["learned_variance"], train["vlb_weight"]) == (True, 0.001)  # Eq 2.18
    assert (train["lr_decay"], train["weight_decay"]) == ("linear", 0.0)
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    assert schedule.items() <= train["schedule"].items()
    nuclei = json.loads((CONFIGS / "monuseg.json").read_text())
    assert nuclei == {"image_size": [512, 512], "num_res_blocks": 3, "num_iterations": 40_000}


@pytest.mark.parametrize("name", ["monuseg", "patches", "range_pm1", "repaint", "rflow", "multi_gpu_train"])
def test_an_overlay_changes_only_keys_that_exist(name: str) -> None:
    known = {k for n in ("train.json", "inference.json") for k in json.loads((CONFIGS / n).read_text())}
    assert set(json.loads((CONFIGS / f"{name}.json").read_text())) <= known


def test_training_and_inference_agree_on_what_they_share() -> None:
    train, inference = (json.loads((CONFIGS / n).read_text()) for n in ("train.json", "inference.json"))
    for key in ("phantom_dir", "latest_dir", "model_file", "seed", "device"):
        assert train[key] == inference[key], key


# From here on the bundle runs.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nuclei")
    write_nuclei(root / "source", num_images=12, size=64, seed=0)
    prepare_pairs(root / "source", root / "prepared", labels=["nucleus"], splits=(0.7, 0.15, 0.15))
    return root / "prepared"


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    root = tmp_path_factory.mktemp("trained")
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(root / "models"), "output_dir": str(root / "eval")}
    run("jdm", "train.json", "train", "training", **TINY, **places, latest_dir=str(root))
    return places


def sample(trained: dict[str, str], out: Path, config: str | list[str] = "inference.json", **values: Any) -> Path:
    # an untrained model paints the middle of the range: what it paints is not judged here
    values = {"num_samples": 5, "batch_size": 4, "num_steps": 3, "device": "cpu", "max_attempts": 256} | values
    run("jdm", config, "infer", "run", **places_of(trained), output_dir=str(out), **values)
    return out / "Dataset910_JDM"


@pytest.mark.slow
def test_training_writes_a_model_a_grid_and_a_finished_run(trained: dict[str, str]) -> None:
    assert {p.name for p in Path(trained["ckpt_dir"]).glob("*.pt")} == {"model.pt", "last_model.pt"}
    contract = load_file(Path(trained["ckpt_dir"]) / "model.pt", stage="diffusion")["contract"]
    assert contract["labels"] == {"background": 0, "nucleus": 1}
    assert contract["value_range"] == [-1, 1]
    assert (contract["image_channels"], contract["num_real"]) == (3, 10)  # training and validation
    assert (Path(trained["output_dir"]) / "samples.png").is_file()
    client = mlflow.MlflowClient(f"sqlite:///{trained['output_dir']}/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name("jdm").experiment_id])
    assert found.info.status == "FINISHED"
    assert {"train_loss", "val_loss"} <= set(found.data.metrics)
    assert client.list_artifacts(found.info.run_id, "samples")


@pytest.mark.slow
def test_the_rate_falls_linearly_to_zero_over_the_iterations(trained: dict[str, str]) -> None:
    state = load_file(Path(trained["ckpt_dir"]) / "last_model.pt")["state"]
    assert state["lr_scheduler"]["last_epoch"] == 4
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.0


@pytest.mark.slow
def test_properties_of_training_and_inference_are_complete(trained: dict[str, str], tmp_path: Path) -> None:
    made = workflow("jdm", "train.json", "train", "training", **TINY, **trained)
    made.initialize()
    assert made.check_properties() == []
    made = workflow("jdm", "inference.json", "infer", "run", **places_of(trained), output_dir=str(tmp_path))
    made.initialize()
    assert made.check_properties() == []


@pytest.mark.slow
def test_the_network_takes_and_gives_what_metadata_says(trained: dict[str, str]) -> None:
    verify_net_in_out(
        net_id="network_def", config_file=str(CONFIGS / "inference.json"), meta_file=str(CONFIGS / "metadata.json"),
        device="cpu", extra_forward_args={"timesteps": torch.tensor([1])}, bundle_root=str(BUNDLES / "jdm"),
        **places_of(trained),
    )  # fmt: skip


@pytest.mark.slow
def test_sampled_pairs_are_a_dataset_that_nnunet_accepts_with_nested_ratio_subsets(
    trained: dict[str, str], tmp_path: Path
) -> None:
    folder = sample(trained, tmp_path, num_samples=15, ratios=[100, 150])
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity").verify_dataset_integrity
    subsets = sorted(tmp_path.glob("Dataset*"))
    assert len(subsets) == 3
    for subset in subsets:
        verify(str(subset), num_processes=1)
    cases = [{p.name for p in (s / "labelsTr").iterdir()} for s in subsets]
    assert [len(c) for c in cases] == [15, 10, 15]
    assert cases[1] < cases[2] <= cases[0]
    lines = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert len({line["seed"] for line in lines}) == 15
    assert all(line["filters"] for line in lines)
    assert (tmp_path / "figures").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_the_pair_of_a_seed_does_not_depend_on_the_batch(trained: dict[str, str], tmp_path: Path, sampler: str) -> None:
    folders = [sample(trained, tmp_path / str(b), batch_size=b, num_samples=4, sampler=sampler) for b in (1, 4)]
    for path in sorted((folders[0] / "imagesTr").iterdir()):
        images = [np.asarray(Image.open(f / "imagesTr" / path.name)).astype(int) for f in folders]
        assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
def test_images_for_given_masks_carry_those_masks_exactly(
    trained: dict[str, str], dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "masks").mkdir()
    mask = np.zeros((32, 32), np.uint8)
    mask[5:20, 8:25] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "drawn.png")
    folder = sample(
        trained, tmp_path / "out", condition="mask", masks=str(tmp_path / "masks"), num_samples=3, sampler="ddpm"
    )
    labels = sorted((folder / "labelsTr").iterdir())
    assert len(labels) == 3
    for path in labels:
        np.testing.assert_array_equal(np.asarray(Image.open(path)), mask > 0)
    images = [np.asarray(Image.open(p)).astype(int) for p in sorted((folder / "imagesTr").iterdir())]
    assert not np.array_equal(images[0], images[1])


@pytest.mark.slow
def test_a_given_image_comes_back_with_a_mask_its_ensemble_mean_and_its_spread(
    trained: dict[str, str], dataset: Path, tmp_path: Path
) -> None:
    folder = sample(trained, tmp_path, condition="image", split="test", num_samples=2, num_ensemble=3)
    for path in sorted((folder / "imagesTr").iterdir()):
        name = path.name.removesuffix("_0000.png")
        assert (folder / "ensemble" / f"{name}_mean.png").is_file()
        assert (folder / "ensemble" / f"{name}_std.png").is_file()
        assert np.asarray(Image.open(path)).shape == (32, 32, 3)


@pytest.mark.slow
def test_in_painting_leaves_everything_outside_the_region_as_it_is(trained: dict[str, str], tmp_path: Path) -> None:
    folders = [
        sample(trained, tmp_path / name, condition="region", regions=[8, 8, 24, 24], num_samples=2, split="training",
               **values)
        for name, values in (("plain", {}), ("resampled", {"sampler": "ddpm", "resample": 2}))
    ]  # fmt: skip
    outside = np.ones((32, 32), bool)
    outside[8:24, 8:24] = False
    for path in sorted((folders[0] / "imagesTr").iterdir()):
        plain, resampled = (np.asarray(Image.open(f / "imagesTr" / path.name)) for f in folders)
        np.testing.assert_array_equal(plain[outside], resampled[outside])
        assert not np.array_equal(plain[~outside], resampled[~outside])


@pytest.mark.slow
def test_a_stopped_sampling_goes_on_to_the_same_files(trained: dict[str, str], tmp_path: Path) -> None:
    sample(trained, tmp_path / "a", num_samples=2)
    folder = sample(trained, tmp_path / "a", num_samples=5)
    whole = sample(trained, tmp_path / "b", num_samples=5)
    for sub in ("imagesTr", "labelsTr"):
        for path in (whole / sub).iterdir():
            assert path.read_bytes() == (folder / sub / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"condition": "class"}, "condition is 'class'"),
        ({"num_steps": 1001}, "1000"),
        ({"resample": 3}, "ddpm"),
        ({"num_ensemble": 0}, "num_ensemble"),
        ({"gradient_scale": -1}, "gradient_scale"),
        ({"ratios": [500]}, "num_samples"),
        ({"ckpt_dir": "nowhere"}, "there is no trained file"),
        ({"condition": "mask", "masks": "nowhere"}, "nowhere"),
        ({"condition": "region"}, "regions"),
        ({"filters": {"min_foreground": 2}}, "min_foreground"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_requests_end_in_one_message(trained: dict[str, str], tmp_path: Path, values: dict, message: str) -> None:
    base = {"num_samples": 1, "num_steps": 2, "device": "cpu", "max_attempts": 256} | places_of(trained)
    made = workflow("jdm", "inference.json", "infer", "run", **(base | {"output_dir": str(tmp_path / "out")} | values))
    assert message in str(user_error(lambda: (made.initialize(), made.run())))


@pytest.mark.slow
def test_a_filter_that_refuses_everything_is_reported_with_its_rate(trained: dict[str, str], tmp_path: Path) -> None:
    error = user_error(
        lambda: sample(trained, tmp_path, filters={"min_foreground": 0.999}, max_attempts=2, num_samples=2)
    )
    assert "min_foreground" in str(error)


@pytest.mark.slow
def test_a_training_that_was_killed_resumes_to_the_weights_of_one_that_was_not(dataset: Path, tmp_path: Path) -> None:
    weights = []
    for way in ("whole", "killed"):
        values = TINY | {
            "num_iterations": 16, "val_interval": 8, "patches": True, "flips": True, "dataset_dir": str(dataset),
            "ckpt_dir": str(tmp_path / way), "output_dir": str(tmp_path / f"eval_{way}"), "latest_dir": str(tmp_path),
        }  # fmt: skip
        run_it = command("training", "--config_file", str(CONFIGS / "train.json"), *options(values))
        if way == "killed":
            kill_when_there(run_it, tmp_path / way / "last_model.pt")
            assert not (tmp_path / way / "model.pt").exists()
        printed = run_forked(run_it)
        assert ("resuming model from" in printed) == (way == "killed")
        weights.append(load_file(tmp_path / way / "model.pt")["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.slow
def test_two_processes_train_and_sample_together(dataset: Path, tmp_path: Path) -> None:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "models"), "latest_dir": str(tmp_path)}
    for config, ids, values in (
        ("train.json", ["training"], TINY | {"output_dir": str(tmp_path / "eval")}),
        ("inference.json", [], {"num_samples": 5, "num_steps": 3, "output_dir": str(tmp_path / "out"),
                                "max_attempts": 256}),
    ):  # fmt: skip
        files = str([str(CONFIGS / n) for n in (config, "multi_gpu_train.json")])
        run_two_forked(command(*ids, "--config_file", files, *options(places | values)), port=29613)
    assert len(list((tmp_path / "out" / "Dataset910_JDM" / "labelsTr").iterdir())) == 5

    values = places | {"num_samples": 3, "num_steps": 1, "output_dir": str(tmp_path / "none"), "max_attempts": 1}
    values["filters"] = {"min_foreground": 0.9999}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29613"]
    done = subprocess.run(
        [*torchrun, *command("--config_file", files, *options(values))[1:]],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "monai_synth: error: 3 pairs were refused 1 times each" in done.stderr  # by both, of which each made some


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlay", "check"), [("range_pm1.json", ("value_range", [-1, 1])), ("patches.json", ("patches", None))]
)
def test_overlays_train(dataset: Path, tmp_path: Path, overlay: str, check: tuple) -> None:
    places = {"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e")}
    run("jdm", ["train.json", overlay], "train", "training", **TINY, **places, latest_dir=str(tmp_path))
    contract = load_file(tmp_path / "m" / "model.pt")["contract"]
    assert contract[check[0]] == (check[1] or {"random": True, "scale": 1.0, "flips": True})
    sample({"dataset_dir": str(dataset), "ckpt_dir": str(tmp_path / "m")}, tmp_path / "out", num_samples=2)


@pytest.mark.slow
def test_volumes_with_several_labels_train_and_are_sampled_as_nifti(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "source" / folder).mkdir(parents=True)
    for i in range(6):
        label = np.zeros((20, 18, 16), np.uint8)
        label[4:12, 5:12, 3 + i : 8 + i] = 1
        label[6:9, 6:9, 4 + i : 6 + i] = 2
        image = (60.0 * label + rng.normal(40, 5, label.shape)).astype(np.float32)
        for folder, array in (("imagesTr", image), ("labelsTr", label)):
            nib.save(
                nib.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / "source" / folder / f"v{i}.nii.gz"
            )
    data = tmp_path / "prepared"
    prepare_pairs(
        tmp_path / "source", data, image_dir="imagesTr", label_dir="labelsTr", labels=["outer", "inner"],
        splits=(0.6, 0.2, 0.2), modality="MR",
    )  # fmt: skip
    places = {"dataset_dir": str(data), "ckpt_dir": str(tmp_path / "m"), "output_dir": str(tmp_path / "e")}
    values = TINY | {"image_size": [16, 16, 16], "num_iterations": 2}
    run("jdm", "train.json", "train", "training", **values, **places, latest_dir=str(tmp_path))
    masks = tmp_path / "masks"
    masks.mkdir()
    given = np.zeros((16, 16, 16), np.uint8)
    given[4:9, 4:12, 4:12] = 2
    nib.save(nib.Nifti1Image(given, np.diag([1.25, 1.125, 2.0, 1.0])), masks / "drawn.nii.gz")
    folder = sample(places, tmp_path / "out", condition="mask", masks=str(masks), num_samples=2, batch_size=2)
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity").verify_dataset_integrity
    verify(str(folder), num_processes=1)
    for path in (folder / "labelsTr").iterdir():
        written = nib.load(path)
        np.testing.assert_array_equal(np.asarray(written.dataobj), given)
        np.testing.assert_allclose(written.header.get_zooms(), [1.25, 1.125, 2.0])
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "outer": 1, "inner": 2}

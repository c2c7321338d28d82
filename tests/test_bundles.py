# SPDX-License-Identifier: Apache-2.0
"""Every bundle obeys MONAI's rules, and LSDM's stages run, stop, resume and sample by the stock runner."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bundle_runs
import mlflow
import numpy as np
import pytest
import torch
from bundle_runs import command, kill_when_there, options, run_forked, user_error
from monai.bundle import ConfigParser, ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.bundle.config_item import ConfigComponent
from PIL import Image

import monai_synth
from monai_synth.checkpoint import load_file
from monai_synth.export.provenance import ProvenanceWriter

BUNDLES = sorted((Path(__file__).resolve().parents[1] / "bundles").iterdir())
LSDM = Path(__file__).resolve().parents[1] / "bundles" / "lsdm"
STAGES = ("train_autoencoder.json", "train_classifier.json", "train.json")
TINY = {
    "preset": "demo", "image_size": [64, 64], "max_epochs": 2, "val_interval": 1,
    "autoencoder_epochs": 2, "classifier_epochs": 2, "features": ["malignancy", "texture"], "device": "cpu",
}  # fmt: skip


def configs() -> list[Path]:
    return [path for bundle in BUNDLES for path in sorted((bundle / "configs").glob("*.json"))]


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_a_bundle_holds_the_files_that_the_specification_asks_for(bundle: Path) -> None:
    for name in ("LICENSE", "configs/metadata.json", "configs/train.json", "configs/inference.json", "docs/README.md"):
        assert (bundle / name).is_file(), name
    assert (bundle / "docs" / "data_license.txt").is_file()


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_metadata_obeys_the_schema_and_lists_its_version(bundle: Path, tmp_path: Path) -> None:
    meta = bundle / "configs" / "metadata.json"
    schema = tmp_path / "schema.json"
    schema.write_bytes((Path(monai_synth.__file__).parent / "metadata_schema.json").read_bytes())
    # verify_metadata downloads the schema only where the file is not there
    verify_metadata(meta_file=str(meta), filepath=str(schema))
    content = json.loads(meta.read_text())
    assert content["version"] in content["changelog"]


@pytest.mark.parametrize("path", configs(), ids=lambda p: f"{p.parent.parent.name}/{p.name}")
def test_every_target_in_a_config_can_be_imported_and_no_string_is_a_path_of_a_machine(path: Path) -> None:
    for item in leaves(json.loads(path.read_text())):
        if isinstance(item, str):
            assert not re.match(r"(/|~|[A-Z]:\\)", item), item
        if isinstance(item, dict) and "_target_" in item:
            resolved = ConfigComponent(config=item, id="").resolve_module_name()
            module, _, name = resolved.rpartition(".") if isinstance(resolved, str) else ("", "", "")
            assert callable(resolved) or hasattr(importlib.import_module(module), name), item["_target_"]


def test_what_the_three_trainings_share_is_equal_in_their_configs() -> None:
    shared = (
        "bundle_root",
        "output_dir",
        "phantom_dir",
        "phantom",
        "dataset_dir",
        "ckpt_dir",
        "preset",
        "seed",
        "device",
    )
    contents = [json.loads((LSDM / "configs" / name).read_text()) for name in STAGES]
    for key in shared:
        assert contents[0][key] == contents[1][key] == contents[2][key], key
    assert contents[1]["schedule"] == contents[2]["schedule"]
    for preset in ("demo", "paper"):
        sizes = {json.dumps(c["presets"][preset]["image_size"]) for c in contents}
        assert len(sizes) == 1
        assert len({c["presets"][preset]["prediction_type"] for c in contents[1:]}) == 1


def test_the_paper_preset_holds_the_numbers_of_the_text() -> None:
    autoencoder, classifier, train = (json.loads((LSDM / "configs" / name).read_text()) for name in STAGES)
    assert autoencoder["factor"] == 4  # Sec 7.1
    assert autoencoder["presets"]["paper"]["image_size"] == [512, 512]  # Sec 4.1
    assert autoencoder["presets"]["paper"]["channels"]["4"] == [128, 256, 512]  # LDM's KL-f4
    assert autoencoder["kl_weight"] == 1e-6
    assert autoencoder["presets"]["paper"]["adversarial_start"] == 50_001
    assert classifier["presets"]["paper"]["crop_pixels"] == 64  # Sec 3.4.1
    assert classifier["presets"]["paper"]["ema_decay"] == 0.9999  # Sec 4.2
    assert train["presets"]["paper"]["channels"] == [128, 512, 1024]  # LDM's semantic_synthesis512
    assert train["presets"]["paper"]["prediction_type"] == "epsilon"  # Eq 3.1
    assert train["features"] == ["malignancy", "lobulation", "spiculation", "texture"]  # Sec 3.4.1
    assert train["schedule"] == {
        "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205,
        "prediction_type": "$@settings['prediction_type']",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ldm", "no_spade", "rflow", "guide_malignancy", "guide_none", "multi_gpu_train"])
def test_an_overlay_changes_few_keys_and_only_ones_that_exist(name: str) -> None:
    known = {k for n in (*STAGES, "inference.json") for k in json.loads((LSDM / "configs" / n).read_text())}
    overlay = json.loads((LSDM / "configs" / f"{name}.json").read_text())
    assert set(overlay) <= known
    assert 0 < len(overlay) <= 3


# From here on bundles run.


def workflow(config: str | list[str], kind: str, run_id: str, **values: Any) -> ConfigWorkflow:
    return bundle_runs.workflow("lsdm", config, kind, run_id, **values)


def run(config: str | list[str], kind: str, run_id: str, **values: Any) -> ConfigWorkflow:
    return bundle_runs.run("lsdm", config, kind, run_id, **values)


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of one tiny training of all stages."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    root = tmp_path_factory.mktemp("trained")
    places = {"dataset_dir": str(tiny_dataset), "ckpt_dir": str(root / "models"), "output_dir": str(root / "eval")}
    run("train.json", "train", "training", **TINY, **{k: places[k] for k in ("dataset_dir", "ckpt_dir", "output_dir")},
        latest_dir=str(root))  # fmt: skip
    return places


def places_of(trained: dict[str, str], *keys: str) -> dict[str, str]:
    return {key: trained[key] for key in keys}


@pytest.mark.slow
def test_training_runs_the_missing_stages_and_writes_what_it_promises(trained: dict[str, str]) -> None:
    found = {p.name for p in Path(trained["ckpt_dir"]).glob("*.pt")}
    names = {"autoencoder.pt", "classifier_malignancy.pt", "classifier_texture.pt", "model.pt"}
    assert found == names | {f"last_{n}" for n in names}
    assert (Path(trained["output_dir"]) / "samples.png").is_file()
    contract = load_file(Path(trained["ckpt_dir"]) / "model.pt", stage="diffusion")["contract"]
    assert contract["dataset"]["name"] == "tiny"
    assert contract["scale_factor"] > 0
    client = mlflow.MlflowClient(f"sqlite:///{trained['output_dir']}/mlruns.db")
    runs = client.search_runs([client.get_experiment_by_name("lsdm").experiment_id])
    assert len(runs) == 4
    assert all(r.info.status == "FINISHED" for r in runs)
    assert len({r.info.run_name for r in runs}) == 4
    (model,) = [r for r in runs if r.info.run_name.startswith("model")]
    assert {"train_loss", "val_loss"} <= set(model.data.metrics)
    assert model.data.params["contract.schedule.beta_end"] == "0.0205"
    assert client.list_artifacts(model.info.run_id, "samples")


@pytest.mark.slow
@pytest.mark.parametrize("config", STAGES)
def test_train_properties_are_complete(trained: dict[str, str], config: str) -> None:
    values = TINY if config == "train.json" else {k: TINY[k] for k in ("preset", "image_size", "max_epochs", "device")}
    made = workflow(
        config, "train", "training", **values, **places_of(trained, "dataset_dir", "ckpt_dir", "output_dir")
    )
    made.initialize()
    assert made.check_properties() == []


@pytest.mark.slow
def test_inference_properties_are_complete(trained: dict[str, str], tmp_path: Path) -> None:
    made = workflow(
        "inference.json", "infer", "run", **places_of(trained, "dataset_dir", "ckpt_dir"), output_dir=str(tmp_path),
        features=TINY["features"], device="cpu",
    )  # fmt: skip
    made.initialize()
    assert made.check_properties() == []


@pytest.mark.slow
def test_the_network_takes_and_gives_what_metadata_says(trained: dict[str, str]) -> None:
    verify_net_in_out(
        net_id="network_def", config_file=str(LSDM / "configs" / "inference.json"),
        meta_file=str(LSDM / "configs" / "metadata.json"), device="cpu",
        extra_forward_args={"timesteps": torch.tensor([1]), "seg": torch.ones(1, 8, 32, 32)},
        bundle_root=str(LSDM), **places_of(trained, "dataset_dir", "ckpt_dir"), features=[],
    )  # fmt: skip


def sample(trained: dict[str, str], out: Path, config: str | list[str] = "inference.json", **values: Any) -> Path:
    options = {
        "features": TINY["features"],
        "num_samples": 5,
        "batch_size": 4,
        "num_steps": 3,
        "device": "cpu",
    } | values
    run(config, "infer", "run", **places_of(trained, "dataset_dir", "ckpt_dir"), output_dir=str(out), **options)
    return out / "Dataset900_LSDM"


@pytest.mark.slow
def test_sampling_writes_a_dataset_that_nnunet_accepts(trained: dict[str, str], tmp_path: Path) -> None:
    folder = sample(trained, tmp_path)
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity").verify_dataset_integrity
    verify(str(folder), num_processes=1)
    lines = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 2, 3, 4]
    assert lines[0]["guidance"]["scales"] == {"malignancy": 1.0, "texture": 1.0}
    assert set(lines[0]["checkpoints"]) >= {"model.pt", "autoencoder.pt", "classifier_texture.pt"}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_the_image_of_a_seed_does_not_depend_on_the_batch(
    trained: dict[str, str], tmp_path: Path, sampler: str
) -> None:
    folders = [sample(trained, tmp_path / str(b), batch_size=b, num_samples=4, sampler=sampler) for b in (1, 4)]
    for path in sorted((folders[0] / "imagesTr").iterdir()):
        images = [np.asarray(Image.open(f / "imagesTr" / path.name)).astype(int) for f in folders]
        assert np.abs(images[0] - images[1]).max() <= 1


@pytest.mark.slow
def test_a_stopped_sampling_goes_on_and_a_finished_one_is_left_alone(trained: dict[str, str], tmp_path: Path) -> None:
    folder = sample(trained, tmp_path / "a", num_samples=2)
    stamps = {p.name: p.stat().st_mtime_ns for p in (folder / "imagesTr").iterdir()}
    sample(trained, tmp_path / "a", num_samples=5)
    after = {p.name: p.stat().st_mtime_ns for p in (folder / "imagesTr").iterdir()}
    assert len(after) == 5
    assert all(after[name] == stamp for name, stamp in stamps.items())
    whole = sample(trained, tmp_path / "b", num_samples=5)
    for path in (whole / "imagesTr").iterdir():
        assert path.read_bytes() == (folder / "imagesTr" / path.name).read_bytes()
    assert len(ProvenanceWriter(folder / "provenance.jsonl")) == 5


@pytest.mark.slow
def test_guidance_changes_the_nodule_and_its_absence_nothing(trained: dict[str, str], tmp_path: Path) -> None:
    plain = sample(trained, tmp_path / "plain", num_samples=1, guidance_scale=0)
    overlay = sample(trained, tmp_path / "overlay", ["inference.json", "guide_none.json"], num_samples=1)
    guided = sample(trained, tmp_path / "guided", num_samples=1, guidance_scale=500.0, nodule={"texture": 1})
    name = next((plain / "imagesTr").iterdir()).name
    images = [np.asarray(Image.open(f / "imagesTr" / name)).astype(int) for f in (plain, overlay, guided)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.slow
def test_a_folder_of_maps_can_be_sampled_as_nifti_with_nodules_only(
    trained: dict[str, str], tiny_dataset: Path, tmp_path: Path
) -> None:
    nib = pytest.importorskip("nibabel")
    folder = sample(
        trained,
        tmp_path,
        label_dir=str(tiny_dataset / "labels"),
        image_format="nii.gz",
        label_kind="nodule",
        num_samples=3,
    )
    (first, *_) = sorted((folder / "labelsTr").iterdir())
    label = np.asarray(nib.load(first).dataobj)
    name = first.name.split("_s0")[0]
    source = np.asarray(Image.open(tiny_dataset / "labels" / f"{name}.png"))
    np.testing.assert_array_equal(label[..., 0].T, source >= 5)
    image = np.asarray(nib.load(folder / "imagesTr" / first.name.replace(".nii.gz", "_0000.nii.gz")).dataobj)
    assert image.min() >= -1024
    assert image.max() <= 800


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0, allowed are integers from 1"),
        ({"sampler": "euler"}, "dpm"),
        ({"num_steps": 1001}, "1000"),
        ({"split": "holdout"}, "allowed are training, validation, test"),
        ({"features": ["margin"]}, "classifier_margin.pt is not there"),
        ({"nodule": {"texture": 9}}, "texture is 9; allowed is a rating from 1 to 5"),
        ({"label_dir": "nowhere"}, "holds no label map"),
        ({"ckpt_dir": "nowhere"}, "there is no trained file"),
        ({"device": "cuda:77"}, "device 'cuda:77' cannot be used"),
        ({"image_format": "jpg"}, "allowed are png, nii.gz"),
        ({"dataset_dir": "nowhere"}, "is not a folder"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_requests_end_in_one_message_and_write_nothing(
    trained: dict[str, str], tmp_path: Path, values: dict, message: str
) -> None:
    options = {"features": TINY["features"], "num_samples": 1, "num_steps": 2, "device": "cpu"} | places_of(
        trained, "dataset_dir", "ckpt_dir"
    )
    made = workflow("inference.json", "infer", "run", **(options | {"output_dir": str(tmp_path / "out")} | values))
    assert message in str(user_error(lambda: (made.initialize(), made.run())))
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_maps_with_unknown_values_or_of_another_size_are_refused(trained: dict[str, str], tmp_path: Path) -> None:
    for name, array, message in (
        ("value", np.full((64, 64), 9, np.uint8), r"has values \[9\]"),
        ("size", np.zeros((48, 64), np.uint8), "is 48x64, the model makes 64x64"),
    ):
        (tmp_path / name).mkdir()
        Image.fromarray(array).save(tmp_path / name / "map.png")
        options = {"label_dir": str(tmp_path / name), "num_samples": 1}
        error = user_error(lambda name=name, options=options: sample(trained, tmp_path / "out" / name, **options))
        assert re.search(message, str(error))


@pytest.mark.slow
def test_one_classifier_of_all_features_is_trained_and_guides(trained: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(trained["ckpt_dir"], folder)
    own = {"preset": "demo", "image_size": [64, 64], "max_epochs": 1, "device": "cpu", "feature": "all"}
    places = {"dataset_dir": trained["dataset_dir"], "ckpt_dir": str(folder), "output_dir": str(tmp_path / "eval")}
    run("train_classifier.json", "train", "training", **own, **places)
    report = load_file(folder / "classifier_all.pt", stage="classifier")["report"]
    assert set(report["features"]) == {"malignancy", "lobulation", "spiculation", "texture"}
    moved = trained | {"ckpt_dir": str(folder)}
    options = {"shared_classifier": True, "features": ["malignancy", "texture"], "guidance_scale": 30.0}
    guided = sample(moved, tmp_path / "guided", **options)
    lines = [json.loads(line) for line in (guided / "provenance.jsonl").read_text().splitlines()]
    assert set(lines[0]["checkpoints"]) == {"model.pt", "autoencoder.pt", "classifier_all.pt"}
    plain = sample(moved, tmp_path / "plain", guidance_scale=0)
    same = [(guided / "imagesTr" / p.name).read_bytes() == p.read_bytes() for p in (plain / "imagesTr").iterdir()]
    assert not all(same)


@pytest.mark.slow
def test_files_of_two_trainings_are_not_mixed(trained: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for path in Path(trained["ckpt_dir"]).glob("*.pt"):
        (folder / path.name).write_bytes(path.read_bytes())
    content = torch.load(folder / "classifier_texture.pt", weights_only=True)
    content["contract"]["scale_factor"] = 9.0
    torch.save(content, folder / "classifier_texture.pt")
    error = user_error(lambda: sample(trained | {"ckpt_dir": str(folder)}, tmp_path / "out"))
    assert "scale_factor: 9.0 there, " in str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "name", "epochs"),
    [
        ("train_autoencoder.json", "autoencoder.pt", 6),
        ("train_classifier.json", "classifier_malignancy.pt", 6),
        ("train.json", "model.pt", 6),
    ],
)
def test_a_stage_that_was_killed_resumes_to_the_weights_of_one_that_was_not(
    trained: dict[str, str], tmp_path: Path, config: str, name: str, epochs: int
) -> None:
    """kill -9 after the first saved epoch, then the same command again."""
    needed = (
        ["autoencoder.pt", "classifier_malignancy.pt", "classifier_texture.pt"]
        if name == "model.pt"
        else ["autoencoder.pt"]
    )
    weights = []
    for way in ("whole", "killed"):
        folder = tmp_path / way
        folder.mkdir()
        for other in needed:
            if other != name:
                (folder / other).write_bytes((Path(trained["ckpt_dir"]) / other).read_bytes())
        values = {k: v for k, v in TINY.items() if name == "model.pt" or k in ("preset", "image_size", "device")}
        values |= {
            "max_epochs": epochs,
            "save_interval": 1,
            "dataset_dir": trained["dataset_dir"],
            "ckpt_dir": str(folder),
        }
        values |= {"output_dir": str(tmp_path / f"eval_{way}")}
        values |= {"latest_dir": str(tmp_path)} if name == "model.pt" else {}
        run_it = command("training", "--config_file", str(LSDM / "configs" / config), *options(values))
        if way == "killed":
            kill_when_there(run_it, folder / f"last_{name}")
            assert not (folder / name).exists()
        printed = run_forked(run_it)
        assert (f"resuming {name.removesuffix('.pt')} from" in printed) == (way == "killed")
        weights.append(load_file(folder / name)["state_dict"])
        if way == "killed":
            client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/eval_killed/mlruns.db")
            runs = client.search_runs([client.get_experiment_by_name("lsdm").experiment_id])
            assert sorted(r.info.status for r in runs) == ["FINISHED", "KILLED"]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))


@pytest.mark.slow
def test_two_processes_train_together_and_write_once(trained: dict[str, str], tmp_path: Path) -> None:
    files = str([str(LSDM / "configs" / n) for n in ("train.json", "multi_gpu_train.json")])
    values = TINY | {
        "max_epochs": 1, "autoencoder_epochs": 1, "classifier_epochs": 1, "features": ["texture"],
        "dataset_dir": trained["dataset_dir"], "ckpt_dir": str(tmp_path / "models"), "latest_dir": str(tmp_path),
        "output_dir": str(tmp_path / "eval"),
    }  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611"]
    done = subprocess.run(
        [*torchrun, *command("training", "--config_file", files, *options(values))[1:]],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert (tmp_path / "models" / "model.pt").is_file()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/eval/mlruns.db")
    assert len(client.search_runs([client.get_experiment_by_name("lsdm").experiment_id])) == 3


@pytest.mark.slow
def test_the_command_line_shows_one_message_and_a_status_for_a_users_mistake(tmp_path: Path) -> None:
    run_it = command("training", "--config_file", str(LSDM / "configs" / "train.json"), "--dataset_dir", "none")
    done = subprocess.run(
        run_it, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("monai_synth: error: dataset_dir")


def test_the_parser_reads_every_training_config() -> None:
    for name in STAGES:
        parser = ConfigParser()
        parser.read_config(str(LSDM / "configs" / name))
        assert parser["training"] == parser["run"] or parser["run"] == "%training"

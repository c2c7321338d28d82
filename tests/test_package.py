# SPDX-License-Identifier: Apache-2.0
"""A packaged bundle runs where this package is not installed, says what it holds, and tells nothing of the machine."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import BUNDLES, options, run
from monai.apps.utils import HashCheckError
from monai.bundle import download_large_files
from package_toy import CLASS_UNET, ROOT
from source_images import shades

import monai_synth
from monai_synth import cli, package, package_check
from monai_synth.bundle import default_ckpt_dir
from monai_synth.checkpoint import build_network, save_atomic, sha256_of, trained_file
from monai_synth.data.classes import prepare_classes
from monai_synth.errors import UserError
from monai_synth.package import package_bundle
from monai_synth.package_check import LARGE
from monai_synth.package_vendor import read_configs

TINY = {
    "preset": "demo", "max_epochs": 1, "val_interval": 1, "save_interval": 1, "batch_size": 8, "base_channels": 8,
    "num_heads": 2, "num_grid_samples": 2, "device": "cpu",
}  # fmt: skip


# What a user may do wrong


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    content = {"format": "monai_synth/1", "stage": "diffusion", "contract": {"bundle": "jdm"}, "state_dict": {}}
    save_atomic(content, tmp_path / "foreign" / "model.pt")
    return tmp_path / "foreign"


@pytest.mark.parametrize(
    ("bundle", "ckpt_dir", "values", "message"),
    [
        (
            "nope",
            "foreign",
            {},
            "there is no bundle 'nope'; give a folder with .*, or cfg_ddpm, fad",
        ),
        ("cfg_ddpm", "nowhere", {}, "--ckpt-dir .* is no folder"),
        ("cfg_ddpm", ".", {}, "there is no trained file .*give the right --ckpt-dir"),
        ("cfg_ddpm", "foreign", {}, "trained by the bundle 'jdm', this is 'cfg_ddpm'; give the right --ckpt-dir"),
        ("cfg_ddpm", "foreign", {"version": "1"}, "--version is '1'; give MAJOR.MINOR.PATCH"),
        ("cfg_ddpm", "foreign", {"version": "9.0.0"}, "changelog has no 9.0.0; say with --change"),
        ("cfg_ddpm", "foreign", {"change": "x"}, "has 0.1.0 already; give a new --version"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(
    foreign: Path, tmp_path: Path, bundle: str, ckpt_dir: str, values: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        package_bundle(bundle, ckpt_dir=str(tmp_path / ckpt_dir), out=str(tmp_path / "dist"), **values)
    assert {p.name for p in tmp_path.iterdir()} == {"foreign"}


@pytest.mark.parametrize(
    ("there", "out", "message"),
    [
        ("dist/jdm/mine", "dist", "has jdm already; give another folder, or remove it"),
        ("dist/jdm_v0.1.0.zip", "dist", "has jdm_v0.1.0.zip already; give another folder, or remove it"),
        ("dist", "dist", "dist is a file; give a folder"),
    ],
)
def test_nothing_is_replaced(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str, out: str, message: str
) -> None:
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("mine")
    assert cli.main(["package", "jdm", "--ckpt-dir", str(foreign), "--out", str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / there).read_text() == "mine"
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 2


def test_several_packages_lie_in_one_folder(trained: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "jdm").mkdir()
    (tmp_path / "jdm_v0.1.0.zip").write_text("another")
    build(trained, tmp_path)
    names = {"cfg_ddpm", "cfg_ddpm_v0.1.0.zip", "jdm", "jdm_v0.1.0.zip"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "jdm_v0.1.0.zip").read_text() == "another"


def test_large_weights_are_listed_so_that_monai_verifies_them(tmp_path: Path) -> None:
    folder = tmp_path / "jdm"
    (folder / "models").mkdir(parents=True)
    for name, size in (("model.pt", LARGE + 1), ("small.pt", LARGE)):
        with open(folder / "models" / name, "wb") as file:
            file.truncate(size)
    package._write_large_files(folder, "https://example.org/w/")
    assert (folder / "large_files.yml").read_text().splitlines() == [
        "large_files:",
        '  - path: "models/model.pt"',
        '    url: "https://example.org/w/model.pt"',
        # head -c 25000001 /dev/zero | sha256sum
        '    hash_val: "3a3f82432ee88b7e79df96875927ff4dda4758e0778e9ee3d5a6be1ed0723e3c"',
        '    hash_type: "sha256"',
    ]
    download_large_files(str(folder))  # what is there is compared with its hash and not downloaded
    with open(folder / "models" / "model.pt", "r+b") as file:
        file.write(b"x")
    with pytest.raises(HashCheckError):
        download_large_files(str(folder))


def test_large_weights_without_a_url_are_told_and_those_not_listed_are_refused(built: Path) -> None:
    check = package_check.Bundle(built, ROOT / "metadata_schema.json", None, [])
    assert check.large_files() == "0 above 25 MB, listed with SHA-256"
    model = built / "models" / "model.pt"
    with model.open("ab") as file:
        file.truncate(LARGE + 1)
    with pytest.raises(package_check.Failed, match=r"models/model.pt has 25000001 bytes and is not in large_files.yml"):
        check.large_files()
    package._write_large_files(built, None)
    assert check.large_files() == "1 above 25 MB, listed with SHA-256; no url yet for models/model.pt (--weights-url)"


# What is written


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Untrained weights in a trained file of cfg_ddpm, the same as a flow beside it, and a small dataset."""
    root = tmp_path_factory.mktemp("trained")
    prepare_classes(
        shades(root / "source", ("dark", "bright")), root / "prepared", splits=(0.7, 0.15, 0.15), progress=False
    )
    contract = {
        "bundle": "cfg_ddpm", "image_size": [16, 16], "image_channels": 1, "classes": {"dark": 0, "bright": 1},
        "modality": "X-ray", "intensity": {"unit": "grey value", "min": 0, "max": 255}, "value_range": [-1, 1],
        "schedule": {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"},
        "num_real": {"dark": 1, "bright": 1}, "dataset": {"name": "shades", "fingerprint": "0"},
    }  # fmt: skip
    flow = {"num_train_timesteps": 1000, "flow": "rectified", "sample_method": "uniform"}
    network = build_network(CLASS_UNET)
    (root / "models").mkdir()
    for name, schedule in (("model", contract["schedule"]), ("model_rflow", flow), ("last_model", flow)):
        content = trained_file("diffusion", network, CLASS_UNET, contract | {"schedule": schedule})
        save_atomic(content, root / "models" / f"{name}.pt")
    return {"dataset_dir": str(root / "prepared"), "ckpt_dir": str(root / "models")}


def build(given: dict[str, Any], out: Path) -> Path:
    """The zip of a packaged bundle that no check has seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(package, "_check", lambda *args, **kwargs: [])
        return package_bundle("cfg_ddpm", **given, out=str(out), report=lambda line: None)


@pytest.fixture(scope="module")
def unchecked(trained: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(trained, tmp_path_factory.mktemp("unchecked") / "dist")


@pytest.fixture
def built(unchecked: Path, tmp_path: Path) -> Path:
    """Folder of a packaged bundle, to be changed at will."""
    return Path(shutil.copytree(unchecked.parent / "cfg_ddpm", tmp_path / "cfg_ddpm"))


@pytest.mark.filterwarnings("ignore:No hash value")  # of the schema, which is ours
def test_what_is_built_passes_the_checks_that_only_read(built: Path, trained: dict[str, str]) -> None:
    check = package_check.Bundle(built, ROOT / "metadata_schema.json", None, [trained["ckpt_dir"]])
    for name in ("files", "private_content", "large_files", "version", "metadata", "readme", "pins"):
        getattr(check, name)()
    assert "monai_synth" not in check.meta["required_packages_version"]
    assert "fire" in check.meta["required_packages_version"], "MONAI's command line needs it and does not require it"
    assert check.meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == [16, 16]
    assert sorted(p.name for p in (built / "models").iterdir()) == ["model.pt", "model_rflow.pt"]


def test_the_same_input_gives_the_same_bytes(trained: dict[str, str], unchecked: Path, tmp_path: Path) -> None:
    assert build(trained, tmp_path / "again").read_bytes() == unchecked.read_bytes()


def test_a_flow_is_packed_beside_the_model_or_as_the_model(
    trained: dict[str, str], built: Path, tmp_path: Path
) -> None:
    models = Path(trained["ckpt_dir"])
    assert (built / "models" / "model_rflow.pt").read_bytes() == (models / "model_rflow.pt").read_bytes()
    digest = sha256_of(models / "model_rflow.pt")
    row = f"| `model_rflow.pt` | rectified flow | sampling with `--model_file model_rflow.pt` | `{digest}` |"
    assert row in (built / "docs" / "README.md").read_text().splitlines()

    made = build(trained | {"model_file": "model_rflow.pt"}, tmp_path / "flow").parent / "cfg_ddpm"
    assert [p.name for p in (made / "models").iterdir()] == ["model.pt"]
    assert (made / "models" / "model.pt").read_bytes() == (models / "model_rflow.pt").read_bytes()
    assert f"| `model.pt` | rectified flow | sampling | `{digest}` |" in (made / "docs" / "README.md").read_text()


def test_a_flow_alone_is_not_taken_for_the_model_unasked(trained: dict[str, str], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(Path(trained["ckpt_dir"]) / "model_rflow.pt", alone)
    given = {"ckpt_dir": str(alone), "out": str(tmp_path / "dist")}
    with pytest.raises(UserError, match=r"has no model.pt, but model_rflow.pt; say with --model-file which"):
        package_bundle("cfg_ddpm", **given)
    with pytest.raises(UserError, match="--model-file is '../model.pt'; give the name of a file"):
        package_bundle("cfg_ddpm", **given, model_file="../model.pt")


def test_training_leaves_the_packed_weights_and_sampling_finds_maps() -> None:
    for bundle in sorted(p.name for p in BUNDLES.iterdir()):
        configs = read_configs(BUNDLES / bundle / "configs")
        schedule = {"beta_schedule": "linear"}
        trained = {"model.pt": {"contract": {"schedule": schedule}}, "classifier_texture.pt": {"contract": {}}}
        package._own_defaults(configs, trained)
        for name, content in configs.items():
            if name.startswith("train"):
                assert content["ckpt_dir"].endswith("(@bundle_root, @dataset_dir, @bundle_root)"), (bundle, name)
        inference = configs["inference.json"]
        assert inference["ckpt_dir"] == "$@bundle_root + '/models'"
        assert "@latest" not in json.dumps(inference)
        makes = any("ensure_dataset" in step for step in inference["initialize"])
        assert makes == (bundle in ("lsdm", "spade_gan"))
        assert inference.get("features", ["texture"]) == ["texture"]
    assert default_ckpt_dir("/b", "/b/data/phantom", "/b") == "/b/models/phantom"


def test_a_pinned_package_that_is_missing_is_one_line(trained: dict[str, str], tmp_path: Path) -> None:
    folder = build(trained | {"depend": True}, tmp_path / "dist").parent / "cfg_ddpm"
    meta = json.loads((folder / "configs" / "metadata.json").read_text())
    assert meta["required_packages_version"]["monai_synth"] == monai_synth.__version__
    assert not (folder / "cfg_ddpm_scripts").exists()
    for name in ("train.json", "inference.json"):
        first = json.loads((folder / "configs" / name).read_text())["initialize"][0]
        names = {"find_spec": lambda module: None, "sys": sys}
        with pytest.raises(SystemExit, match=r"^monai_synth: error: this bundle needs monai_synth==\S+, which is not"):
            eval(first.removeprefix("$"), names)
        assert eval(first.removeprefix("$"), names | {"find_spec": importlib.util.find_spec})


def test_a_checkpoint_that_holds_a_path_or_an_identifier_is_refused(built: Path) -> None:
    content = torch.load(built / "models" / "model.pt", weights_only=True)
    check = package_check.Bundle(built, ROOT / "metadata_schema.json", None, [])
    for text in ("/home/someone/weights", "C:\\Users\\someone", "1.2.840.113654.2.55.1"):
        save_atomic(content | {"report": {"from": [text]}}, built / "models" / "model.pt")
        with pytest.raises(package_check.Failed, match=r"models/model.pt holds .*, a path or an identifier"):
            check.private_content()


@pytest.mark.parametrize(
    ("failing", "hint"), [("pins", ""), ("train properties", "; they were asked with the phantom, .* as --dataset-dir")]
)
def test_a_check_that_fails_leaves_nothing(
    trained: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, hint: str
) -> None:
    def run(command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        results = [{"check": "files", "status": "ok", "text": ""}, {"check": failing, "status": "FAIL", "text": "why"}]
        Path(command[command.index("--result") + 1]).write_text(json.dumps(results))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(package.subprocess, "run", run)
    monkeypatch.setattr(package, "_build", lambda source, folder, *args, **given: folder.mkdir(parents=True))
    monkeypatch.setattr(package, "_write_zip", write_one)
    with pytest.raises(UserError, match=f"the packaged bundle fails: {failing}: why{hint}; nothing was written"):
        package_bundle("cfg_ddpm", ckpt_dir=trained["ckpt_dir"], out=str(tmp_path / "dist"))
    assert list(tmp_path.iterdir()) == []


def write_one(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{folder.name}/LICENSE", "")


@pytest.mark.parametrize("bundle", ["cfg_ddpm", "fad", "jdm", "lsdm", "spade_gan"])
def test_training_is_checked_at_the_models_size_and_with_its_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: str
) -> None:
    shutil.copytree(BUNDLES / bundle / "configs", tmp_path / "configs")
    (tmp_path / "models").mkdir()
    factor = {"factor": 8} if bundle == "lsdm" else {}
    torch.save({"contract": {"image_size": [96, 64]} | factor}, tmp_path / "models" / "model.pt")
    asked = []
    monkeypatch.setattr(package_check.Bundle, "_properties", lambda self, *names, **values: asked.append(values))
    package_check.Bundle(tmp_path, tmp_path / "schema.json", None, []).train_properties()
    train = json.loads((BUNDLES / bundle / "configs" / "train.json").read_text())
    if bundle == "lsdm":
        assert asked == [{"preset": "demo", "factor": 8, "initialize": train["initialize"][:-1]}]
        assert "ensure_stages" in train["initialize"][-1]
    else:
        assert "image_size" in train
        assert asked == [{"preset": "demo", "image_size": [96, 64]}]


# From here on a packaged bundle is run.


def without_this_package(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module in a folder and a process in which monai_synth cannot be imported."""
    code = (
        "import runpy, sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'monai_synth': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "sys.argv[0] = 'monai.bundle'\n"
        "runpy.run_module('monai.bundle', run_name='__main__', alter_sys=True)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_check_of_the_zoo_is_a_line_and_the_bundle_trains_and_samples_without_this_package(
    trained: dict[str, str], tmp_path: Path
) -> None:
    lines: list[str] = []
    archive = package_bundle("cfg_ddpm", **trained, out=str(tmp_path / "dist"), report=lines.append)
    assert archive.name == "cfg_ddpm_v0.1.0.zip"
    words = [line.split(":")[0].split(maxsplit=1) for line in lines[:-2]]
    assert {check: status for status, check in words} == {
        "files": "ok", "private content": "ok", "large files": "ok", "version": "ok", "metadata": "ok", "readme": "ok",
        "pins": "ok", "configs": "ok", "trained files": "ok", "train properties": "ok", "inference properties": "ok",
        "net in out": "ok", "load": "ok", "supported apps": "skip", "torchscript": "skip",
    }  # fmt: skip

    empty = tmp_path / "empty"
    with zipfile.ZipFile(archive) as file:
        file.extractall(empty)
    before = sha256_of(empty / "cfg_ddpm" / "models" / "model.pt")
    sampling = {"per_class": 2, "num_steps": 2, "device": "cpu", "output_dir": "out"}
    done = without_this_package(empty, "run", "--config_file", "cfg_ddpm/configs/inference.json", *options(sampling))
    assert done.returncode == 0, done.stderr[-2000:]
    run(
        "cfg_ddpm", "inference.json", "infer", "run", **sampling | {"output_dir": str(tmp_path / "own")}, **trained
    )  # fmt: skip
    pictures = sorted((empty / "out").glob("*/*.png"))
    assert len(pictures) == 4
    for picture in pictures:
        own = tmp_path / "own" / picture.relative_to(empty / "out")
        assert picture.read_bytes() == own.read_bytes(), "the bundle itself makes the same image of a seed"

    values = TINY | {"dataset_dir": trained["dataset_dir"], "output_dir": "eval"}
    done = without_this_package(
        empty / "cfg_ddpm", "run", "training", "--config_file", "configs/train.json", *options(values)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content = torch.load(empty / "cfg_ddpm" / "models" / "prepared" / "model.pt", weights_only=True)
    assert content["arch"]["target"] == "cfg_ddpm_scripts.networks.ClassUNet"
    assert sha256_of(empty / "cfg_ddpm" / "models" / "model.pt") == before
    done = without_this_package(empty, "run", "--config_file", "cfg_ddpm/configs/inference.json", *options(sampling))
    assert "there already" in done.stdout + done.stderr, "sampling goes on with the packed weights after a training"


@pytest.mark.parametrize(("host", "looked_for"), [("container", False), ("ward7-scanner", True), ("pc1", False)])
def test_a_hosts_name_is_looked_for_where_it_cannot_be_a_word_of_the_code(
    host: str, looked_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package_check.socket, "gethostname", lambda: host)
    assert (host in package_check.machine_words()) == looked_for

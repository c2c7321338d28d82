# SPDX-License-Identifier: Apache-2.0
"""A packaged bundle runs where this package is not installed, says what it holds, and tells nothing of the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import BUNDLES, options, run
from source_images import shades

import monai_synth
from monai_synth import cli, package, package_check
from monai_synth.checkpoint import build_network, save_atomic
from monai_synth.data.classes import prepare_classes
from monai_synth.errors import UserError
from monai_synth.package import package_bundle
from monai_synth.package_docs import packaged_readme
from monai_synth.package_vendor import needed_code, read_configs, renamed_configs, renamed_source

ROOT = Path(monai_synth.__file__).parent
TINY = {
    "preset": "demo", "max_epochs": 1, "val_interval": 1, "save_interval": 1, "batch_size": 8, "base_channels": 8,
    "num_heads": 2, "num_grid_samples": 2, "device": "cpu",
}  # fmt: skip
CLASS_UNET = {
    "target": "monai_synth.networks.ClassUNet",
    "args": {
        "spatial_dims": 2, "image_channels": 1, "num_classes": 2, "image_size": [8, 8], "base_channels": 8,
        "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [], "num_heads": 2,
    },
}  # fmt: skip


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [t for item in value.values() for t in texts(item)]
    if isinstance(value, list):
        return [t for item in value for t in texts(item)]
    return [value] if isinstance(value, str) else []


# What is copied


@pytest.mark.parametrize("bundle", sorted(p.name for p in BUNDLES.iterdir()))
def test_no_name_of_this_package_is_left_in_the_configs_of_any_bundle(bundle: str) -> None:
    configs = read_configs(BUNDLES / bundle / "configs")
    made = renamed_configs(configs, bundle, f"{bundle}_scripts", ROOT)
    assert [t for t in texts(made) if "monai_synth" in t] == []
    assert made.keys() == configs.keys()
    for name, content in made.items():
        known = set(content.get("code", made["train.json"]["code"] | made["inference.json"]["code"]))
        used = {t.split("@code::")[1].split(".")[0].split(" ")[0] for t in texts(content) if "@code::" in t}
        assert used <= known, name


def test_the_code_is_closed_under_imports_and_leaves_out_what_is_not_needed() -> None:
    code = needed_code(read_configs(BUNDLES / "cfg_ddpm" / "configs"), ROOT)
    for name in (
        "monai_synth",
        "monai_synth.networks.class_unet",
        "monai_synth.data.phantom_xray",
        "monai_synth.atomic",
    ):
        assert name in code.modules, name
    assert not [name for name in code.modules if name.startswith(("monai_synth.experiments", "monai_synth.commands"))]
    assert {"torch", "monai", "numpy"} <= code.always
    assert "transformers" in code.sometimes


def test_only_names_of_modules_are_renamed() -> None:
    source = (
        "import monai_synth.atomic\n"
        "from monai_synth.errors import UserError\n"
        'a = monai_synth.atomic, "monai_synth.networks.ClassUNet", "monai_synth.process", "monai_synth/1"\n'
        'b = """two\nmonai_synth.bundle lines"""  # monai_synth.bundle\n'
    )
    assert renamed_source(source, "own", ROOT) == (
        "import own.atomic\n"
        "from own.errors import UserError\n"
        'a = own.atomic, "own.networks.ClassUNet", "monai_synth.process", "monai_synth/1"\n'
        'b = """two\nown.bundle lines"""  # monai_synth.bundle\n'
    )


def test_a_name_of_a_module_is_reached_by_code_and_one_that_looks_like_it_is_not() -> None:
    configs = {
        "train.json": {
            "imports": ["$import torch", "$import monai_synth.bundle as bundle"],
            "bundle_root": "$bundle.bundle_root('x')",
            "a": "$bundle.end() if @bundle.x else 'bundle.y' + @b#bundle.z",
            "b": {"_target_": "monai_synth.training.EMA", "model": "$torch.nn.Identity()"},
        },
        "more.json": {"a": "$bundle.end()"},
    }
    made = renamed_configs(configs, "x", "x_scripts", ROOT)
    assert made["train.json"]["a"] == "$@code::bundle.end() if @bundle.x else 'bundle.y' + @b#bundle.z"
    assert made["train.json"]["b"]["_target_"] == "x_scripts.training.EMA"
    assert made["train.json"]["b"]["_requires_"] == "@code::path"
    assert made["train.json"]["imports"][0] == "$import torch"
    assert made["more.json"] == {"a": "$@code::bundle.end()"}


def test_a_trained_file_of_a_packaged_bundle_builds_the_same_network() -> None:
    own = build_network(CLASS_UNET)
    copied = build_network(CLASS_UNET | {"target": "cfg_ddpm_scripts.networks.ClassUNet"})
    assert type(copied) is type(own)
    for target in ("os.system", "torch.nn.Linear", "a.b.networks.ClassUNet"):
        with pytest.raises(UserError, match="is not in"):
            build_network(CLASS_UNET | {"target": target})


def page(text: str, trained: dict[str, Any], **given: Any) -> str:
    tensor = {"num_channels": 1, "spatial_shape": [8, 8]}
    meta = {
        "monai_version": "1", "pytorch_version": "2", "numpy_version": "3", "required_packages_version": {"x": "4"},
        "network_data_format": {"inputs": {"image": tensor}, "outputs": {"pred": tensor}},
    }  # fmt: skip
    given = {"configs": ("train.json", "inference.json"), "depend": False} | given
    return packaged_readme(text, "a", meta, trained, dict.fromkeys(trained, "0f"), **given)


def test_the_page_gets_the_headings_of_the_zoo_and_loses_links_to_other_bundles() -> None:
    text = "# A\nsee [b](../../b/docs/README.md#c), bundles/a/configs\n\n## Limitations\nnone\n"
    made = page(text, {})
    assert "see b, a/configs" in made
    assert (
        made.index("## Additional Usage Steps") < made.index("## System Configuration") < made.index("## Limitations")
    )
    assert "train_expert.json" not in made
    assert "pip install" in page(text, {}, depend=True)
    made = page(text, {}, configs=("train.json", "train_expert.json"))
    assert made.index("a/configs/train_expert.json") < made.index("a/configs/train.json")


def test_the_page_says_of_each_trained_file_what_it_holds_and_how_it_is_sampled() -> None:
    linear, flow = {"beta_schedule": "linear"}, {"flow": "rectified"}
    made = page("# A\n", {
        "model.pt": {"stage": "diffusion", "contract": {"schedule": linear}},
        "model_rflow.pt": {"stage": "diffusion", "contract": {"schedule": flow}},
        "classifier_texture_rflow.pt": {"stage": "classifier", "contract": {"schedule": flow, "feature": "texture"}},
        "expert_a.pt": {"stage": "image_classifier", "contract": {}},
    })  # fmt: skip
    for row in (
        "| `model.pt` | diffusion | sampling | `0f` |",
        "| `model_rflow.pt` | rectified flow | sampling with `--model_file model_rflow.pt` | `0f` |",
        "| `classifier_texture_rflow.pt` | classifier of texture | sampling or training, with the others | `0f` |",
        "| `expert_a.pt` | image classifier | sampling or training, with the others | `0f` |",
    ):
        assert row in made.splitlines(), row


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


def test_a_folder_that_is_not_empty_is_kept(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["package", "jdm", "--ckpt-dir", str(foreign), "--out", str(foreign)]
    assert cli.main(command) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in foreign.iterdir()] == ["model.pt"]


def test_large_weights_are_listed_with_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "LARGE", 3)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").write_bytes(b"abcd")
    (tmp_path / "models" / "small.pt").write_bytes(b"abc")
    package._write_large_files(tmp_path, "https://example.org/w/")
    assert (tmp_path / "large_files.yml").read_text().splitlines() == [
        "large_files:",
        '  - path: "models/model.pt"',
        '    url: "https://example.org/w/model.pt"',
        '    hash_val: "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"',  # sha256sum of abcd
        '    hash_type: "sha256"',
    ]


# From here on a bundle is trained, packaged and run.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    root = tmp_path_factory.mktemp("trained")
    prepare_classes(
        shades(root / "source", ("dark", "bright")), root / "prepared", splits=(0.7, 0.15, 0.15), progress=False
    )
    places = {"dataset_dir": str(root / "prepared"), "ckpt_dir": str(root / "models")}
    run("cfg_ddpm", "train.json", "train", "training", **TINY, **places, output_dir=str(root / "eval"),
        latest_dir=str(root))  # fmt: skip
    return places


@pytest.fixture(scope="module")
def packaged(trained: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    lines: list[str] = []
    out = tmp_path_factory.mktemp("packaged") / "dist"
    made = package_bundle("cfg_ddpm", **trained, out=str(out), report=lines.append)
    return made, lines


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
@pytest.mark.parametrize("bundle", ["cfg_ddpm", "fad", "jdm", "lsdm", "spade_gan"])
def test_training_is_checked_at_the_models_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: str) -> None:
    assert "image_size" in json.loads((BUNDLES / bundle / "configs" / "train.json").read_text())
    (tmp_path / "configs").mkdir()
    (tmp_path / "models").mkdir()
    shutil.copy(BUNDLES / bundle / "configs" / "metadata.json", tmp_path / "configs")
    torch.save({"contract": {"image_size": [96, 64]}}, tmp_path / "models" / "model.pt")
    asked = []
    monkeypatch.setattr(package_check.Bundle, "_properties", lambda self, *names, **values: asked.append(values))
    package_check.Bundle(tmp_path, tmp_path / "schema.json", None, []).train_properties()
    assert asked == [{"preset": "demo", "image_size": [96, 64]}]


def test_every_check_of_the_zoo_is_a_line(packaged: tuple[Path, list[str]]) -> None:
    archive, lines = packaged
    assert archive.name == "cfg_ddpm_v0.1.0.zip"
    words = [line.split(":")[0].split(maxsplit=1) for line in lines[:-2]]
    assert {check: status for status, check in words} == {
        "files": "ok", "large files": "ok", "version": "ok", "metadata": "ok", "readme": "ok", "pins": "ok",
        "configs": "ok", "train properties": "ok", "inference properties": "ok", "net in out": "ok", "load": "ok",
        "supported apps": "skip", "torchscript": "skip", "private content": "ok",
    }  # fmt: skip
    meta = json.loads((archive.parent / "cfg_ddpm" / "configs" / "metadata.json").read_text())
    assert "monai_synth" not in meta["required_packages_version"]
    assert meta["network_data_format"]["inputs"]["image"]["spatial_shape"] == [16, 16]
    assert not list(archive.parent.rglob("last_*"))


@pytest.mark.slow
def test_a_packaged_bundle_trains_and_samples_without_this_package(
    packaged: tuple[Path, list[str]], trained: dict[str, str], tmp_path: Path
) -> None:
    with zipfile.ZipFile(packaged[0]) as file:
        file.extractall(tmp_path)
    sampling = {"per_class": 2, "num_steps": 2, "device": "cpu", "output_dir": "out"}
    done = without_this_package(tmp_path, "run", "--config_file", "cfg_ddpm/configs/inference.json", *options(sampling))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 4
    values = TINY | {"dataset_dir": trained["dataset_dir"], "ckpt_dir": "new", "output_dir": "eval"}
    done = without_this_package(
        tmp_path / "cfg_ddpm", "run", "training", "--config_file", "configs/train.json", *options(values)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content = torch.load(tmp_path / "cfg_ddpm" / "new" / "model.pt", weights_only=True)
    assert content["arch"]["target"] == "cfg_ddpm_scripts.networks.ClassUNet"


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(
    packaged: tuple[Path, list[str]], trained: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "_check", lambda *args, **kwargs: [])
    again = package_bundle("cfg_ddpm", **trained, out=str(tmp_path / "again"), report=lambda line: None)
    assert again.read_bytes() == packaged[0].read_bytes()


@pytest.mark.slow
def test_a_checkpoint_that_holds_a_path_is_refused(trained: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(trained["ckpt_dir"], tmp_path / "models")
    content = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    content["contract"]["text_encoder"] = "/home/someone/weights"
    save_atomic(content, tmp_path / "models" / "model.pt")
    with pytest.raises(UserError, match="models/model.pt holds '/home/someone/weights', a path"):
        package_bundle(
            "cfg_ddpm", ckpt_dir=str(tmp_path / "models"), dataset_dir=trained["dataset_dir"], out=str(tmp_path / "d")
        )
    assert {p.name for p in tmp_path.iterdir()} == {"models"}

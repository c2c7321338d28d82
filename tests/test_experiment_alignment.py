# SPDX-License-Identifier: Apache-2.0
"""The sweep over the weights of the alignment: its arms, its table, and its trainings by the bundle's command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from bundle_runs import BUNDLES
from expert_toy import write_classifier
from source_images import shades

from monai_synth.checkpoint import load_file
from monai_synth.cli import main
from monai_synth.data.classes import prepare_classes
from monai_synth.errors import UserError
from monai_synth.experiments.alignment import Arm, Settings, _arms, run_experiment, sweep_lines


def settings(**values: Any) -> Settings:
    return Settings(**({"real": "r", "expert": "e", "out": "o"} | values))


def test_every_combination_is_an_arm_and_the_baseline_is_one_whatever_is_asked_for() -> None:
    arms = _arms(settings(w1=(1.0, 0.5), w2=(0.0, 2.0), align_on=("noisy", "clean")))
    assert [(a.name, a.w1, a.w2) for a in arms] == [
        ("baseline", 1.0, 0.0), ("noisy_w1_1_w2_2", 1.0, 2.0), ("noisy_w1_0p5_w2_2", 0.5, 2.0),
        ("clean_w1_1_w2_2", 1.0, 2.0), ("clean_w1_0p5_w2_2", 0.5, 2.0),
    ]  # fmt: skip
    assert arms[0].keys == {}
    assert arms[2].keys == {"w1": "0.5", "w2": "2.0", "align_on": "noisy"}
    assert len(_arms(settings(w2=(1e-7, 2e-7)))) == len({a.name for a in _arms(settings(w2=(1e-7, 2e-7)))}) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w2": (1.0, 1.0)}, "w2"),
        ({"w1": (-1.0,)}, "w1"),
        ({"w2": ()}, "w2"),
        ({"align_on": ("dirty",)}, "noisy, clean"),
        ({"options": ("preset",)}, "KEY=VALUE"),
        ({"options": ("seed=3",)}, "own"),
        ({"trainings": 0}, "trainings"),
        ({"bundle": "nowhere"}, "--bundle"),
        ({"bundle": str(BUNDLES / "fad")}, "there is no expert e"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_made(values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_experiment(settings(out=str(tmp_path / "out"), **values))
    assert not (tmp_path / "out").exists()


def test_a_line_has_what_the_expert_said_of_its_arm_and_the_difference_to_the_baseline() -> None:
    def number(value: float) -> dict:
        return {"value": value, "ci": [value - 0.1, value + 0.1]}

    arms = {
        "baseline": {"accuracy": number(0.5), "difference": None},
        "noisy_w1_1_w2_2": {"accuracy": number(0.7), "difference": {"minus": "baseline", "accuracy": number(0.2)}},
    }
    similarity = {"baseline": {"mean": number(0.3)}, "noisy_w1_1_w2_2": {"mean": {"value": 0.2, "ci": None}}}
    content = {"experts": [{"name": "expert", "arms": arms}], "similarity": similarity}
    asked = [Arm("baseline", 1.0, 0.0, ""), Arm("noisy_w1_1_w2_2", 1.0, 2.0, "noisy"), Arm("late", 1.0, 3.0, "noisy")]
    first, second = sweep_lines(asked, content)
    assert (first["w2"], first["accuracy"], first["accuracy_difference"]) == (0.0, 0.5, None)
    assert (second["accuracy_difference"], second["ssim"], second["ssim_low"]) == (0.2, 0.2, None)
    assert second["accuracy_difference_high"] == pytest.approx(0.3)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    prepare_classes(
        shades(root / "source", ("dark", "bright")), root / "prepared", splits=(0.6, 0.2, 0.2), progress=False
    )
    write_classifier(root / "expert.pt", {"bright": 0, "dark": 1})
    return root


OPTIONS = [
    "preset=demo", "max_epochs=1", "val_interval=1", "batch_size=8", "image_size=[16,16]", "block_out_channels=[8,16]",
    "cross_attention=[False,True]", "norm_num_groups=4", "attention_head_dim=2", "cross_attention_dim=8",
    "text_dim=16", "align_layer=unet.down_blocks.1", "num_grid_samples=1",
]  # fmt: skip


@pytest.mark.slow
def test_the_command_trains_every_arm_once_and_goes_on_where_it_stopped(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [
        "experiment", "alignment", "--real", str(dataset / "prepared"), "--expert", str(dataset / "expert.pt"),
        "--bundle", str(BUNDLES / "fad"), "--w2", "1", "--trainings", "2", "--seeds", "2", "--per-class", "2",
        "--num-steps", "2", "--device", "cpu", "--bootstrap", "20", "--out", str(out), "--set", *OPTIONS,
    ]  # fmt: skip
    assert main(command) == 0
    found = {path.name for path in (out / "models").glob("*.pt") if not path.name.startswith("last_")}
    assert found == {f"{arm}_{t}.pt" for arm in ("baseline", "noisy_w1_1_w2_1") for t in (0, 1)}
    contracts = {name: load_file(out / "models" / name)["contract"] for name in found}
    assert contracts["baseline_0.pt"]["alignment"] is None
    assert contracts["noisy_w1_1_w2_1_1.pt"]["alignment"]["w2"] == 1.0
    lines = list(csv.DictReader((out / "sweep.csv").open()))
    assert [line["w2"] for line in lines] == ["0.0", "1.0"]
    results = json.loads((out / "compared" / "results.json").read_text())
    assert results["baseline"] == "baseline"
    assert float(lines[1]["accuracy"]) == results["experts"][0]["arms"]["noisy_w1_1_w2_1"]["accuracy"]["value"]
    assert (out / "sweep.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in (out / "models").glob("*.pt")}
    (out / "models" / "baseline_1.pt").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.count("done already") == 3
    after = {path: path.stat().st_mtime_ns for path in (out / "models").glob("*.pt")}
    assert {path.name for path in before if before[path] != after[path]} <= {"baseline_1.pt", "last_baseline_1.pt"}


@pytest.mark.slow
def test_a_training_that_fails_ends_in_its_own_message(dataset: Path, tmp_path: Path) -> None:
    given = {"real": str(dataset / "prepared"), "expert": str(dataset / "expert.pt"), "out": str(tmp_path / "out")}
    wrong = [*OPTIONS[:-2], "align_layer=middle"]
    with pytest.raises(UserError, match=r"noisy_w1_1_w2_1_0.pt failed: the network has no layer 'middle'"):
        run_experiment(settings(bundle=str(BUNDLES / "fad"), w2=(1.0,), options=wrong, device="cpu", **given))

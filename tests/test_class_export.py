# SPDX-License-Identifier: Apache-2.0
"""Sampled images of classes as a folder for each class that is a prepared dataset too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from monai_synth.data.classes import prepare_classes
from monai_synth.data.datalist import read_dataset
from monai_synth.data.joint import to_image
from monai_synth.errors import UserError
from monai_synth.export.classes import ClassExport, ClassFolderWriter
from monai_synth.export.provenance import read_provenance
from monai_synth.inference.classes import ClassSamplingDataset, collate_classes

CONTRACT = {
    "classes": {"normal": 0, "with fluid": 1}, "image_channels": 1, "image_size": [8, 8], "modality": "X-ray",
    "value_range": [-1, 1], "intensity": {"kind": "percentiles"},
}  # fmt: skip
RECORD = {
    "checkpoints": {"model.pt": "0" * 64}, "sampler": "dpm++", "num_steps": 20, "precision": "float32",
    "guidance": {"scale": 3.0}, "settings": {"clip": True},
}  # fmt: skip


def opened(folder: Path, record: dict = RECORD, contract: dict = CONTRACT, **options) -> ClassExport:
    return ClassExport(folder, **({"contract": contract, "name": "toy", "seed": 0, "record": record} | options))


def dataset(export: ClassExport, per_class: int = 3) -> ClassSamplingDataset:
    return ClassSamplingDataset(
        CONTRACT["classes"], per_class=per_class, case_id_of=export.case_id_of, is_done=export.is_done
    )


def write(export: ClassExport, per_class: int = 3, channels: int = 1) -> int:
    """Write an image for each wish whose brightness is its seed; give how many were wished for."""
    wishes = dataset(export, per_class)
    items = [wishes[i] for i in range(len(wishes))]
    if items:
        seeds = torch.tensor([item["seed"] for item in items]).float()
        pred = (seeds / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, channels, 8, 8)
        export.write(SimpleNamespace(state=SimpleNamespace(batch=collate_classes(items), output={"pred": pred})))
    export.finish()
    return len(items)


def test_the_folder_is_a_prepared_dataset_with_every_image_under_its_class(tmp_path):
    write(opened(tmp_path / "out"))
    found = read_dataset(tmp_path / "out", task="classes")
    assert found.classes == CONTRACT["classes"]
    cases = found.datalist("training")
    assert [case["class"] for case in cases] == [0, 0, 0, 1, 1, 1]
    for case in cases:
        seed = int(case["case_id"].rpartition("_")[2])
        assert seed % 2 == case["class"]
        assert (np.asarray(Image.open(case["image"])) == seed).all()
    assert found.content["synthetic"]["guidance"] == {"scale": 3.0}
    lines = read_provenance(tmp_path / "out" / "provenance.jsonl")
    told = {case["case_id"]: ["normal", "with fluid"][case["class"]] for case in cases}
    assert {line["case_id"]: line["conditioning"]["class"] for line in lines} == told
    assert (tmp_path / "out" / "samples.png").is_file()


def test_the_folder_is_a_folder_for_each_class_beside_its_records(tmp_path):
    write(opened(tmp_path / "out"), per_class=10)
    content = prepare_classes(tmp_path / "out", tmp_path / "prepared", skip_bad=True, progress=False)
    assert len(content["classes"]) == 2
    assert sum(len(content[split]) for split in ("training", "validation", "test")) == 20


def test_a_run_goes_on_where_it_stopped_and_more_images_leave_the_first_ones_alone(tmp_path):
    assert write(opened(tmp_path / "out"), 3) == 6
    before = {p: p.read_bytes() for p in (tmp_path / "out").glob("*/*.png")}
    next(iter(before)).unlink()
    assert write(opened(tmp_path / "out"), 3) == 1
    assert {p: p.read_bytes() for p in (tmp_path / "out").glob("*/*.png")} == before
    assert write(opened(tmp_path / "out"), 5) == 4
    assert before.items() <= {p: p.read_bytes() for p in (tmp_path / "out").glob("*/*.png")}.items()
    assert len(read_dataset(tmp_path / "out").content["training"]) == 10


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    write(opened(tmp_path / "out"))
    with pytest.raises(UserError, match=r"begun with settings.guidance.scale = 3.0, now .* = 1.0.*--output_dir"):
        write(opened(tmp_path / "out", record=RECORD | {"guidance": {"scale": 1.0}}))
    with pytest.raises(UserError, match="begun with settings.seed = 0, now settings.seed = 1"):
        write(opened(tmp_path / "out", seed=1))
    with pytest.raises(UserError, match="already exists"):
        write(opened(tmp_path / "out", resume=False))
    assert write(opened(tmp_path / "out", record=RECORD | {"guidance": {"scale": 1.0}}, overwrite=True), 1) == 2
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path, overwrite):
    (tmp_path / "holiday.jpg").write_text("sea")
    with pytest.raises(UserError, match=r"'holiday.jpg'.*--output_dir"):
        write(opened(tmp_path, overwrite=overwrite))
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_run_that_is_replaced_by_one_of_other_classes_leaves_nothing_behind(tmp_path):
    write(opened(tmp_path / "out"))
    other = opened(tmp_path / "out", contract=CONTRACT | {"classes": {"wet": 0, "normal": 1}}, overwrite=True)
    assert len(other.writer.cases()) == 0
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"wet", "normal"}


def test_nothing_is_begun_or_removed_before_the_wish_is_checked(tmp_path):
    write(opened(tmp_path / "out"))
    export = opened(tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="per_class is 'abc'"):
        dataset(export, "abc")
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 6
    with pytest.raises(UserError):
        dataset(opened(tmp_path / "new"), 0)
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file.*--output_dir"):
        write(opened(tmp_path / "file" / "out"))


def test_an_unfinished_run_has_no_dataset_json(tmp_path):
    export = opened(tmp_path / "out")
    with pytest.raises(UserError, match="has no image"):
        export.finish()
    with pytest.raises(UserError, match=r"holds no dataset\.json"):
        read_dataset(tmp_path / "out")


def test_colour_images_are_written_as_rgb(tmp_path):
    write(opened(tmp_path / "out", contract=CONTRACT | {"image_channels": 3}), channels=3)
    assert Image.open(next((tmp_path / "out").glob("*/*.png"))).mode == "RGB"


def test_class_names_become_safe_folders_that_stay_apart(tmp_path):
    writer = ClassFolderWriter(tmp_path / "out", classes={"a/b": 0, "a:b": 1, "../c": 2}, head={"name": "x"})
    folders = set(writer.folders.values())
    assert len(folders) == 3
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == folders
    assert json.loads((tmp_path / "out" / "export.json").read_text())["classes"] == {"a/b": 0, "a:b": 1, "../c": 2}


def test_values_become_8_bit_as_prepare_reads_them_back():
    values = torch.arange(256).view(1, 1, 16, 16).float()
    assert (to_image(values / 127.5 - 1, (-1, 1)).numpy() == values.numpy().astype(np.uint8)).all()
    assert to_image(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2), (-1, 1)).ravel().tolist() == [0, 255]

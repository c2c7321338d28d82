# SPDX-License-Identifier: Apache-2.0
"""Figures of pairs: what is in each cell, and that no real image is drawn without being asked for."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_synth.data.pair_files import write_image, write_label
from monai_synth.errors import UserError
from monai_synth.evaluate.pair_figures import label_colours, label_picture, outlined, write_pair_figures
from monai_synth.export.nnunet import NNUNetRawWriter
from monai_synth.export.provenance import ProvenanceWriter

SIDE = 128
CELL = SIDE + 2
LABELS = {"background": 0, "a": 1, "b": 2}


def real_maps() -> np.ndarray:
    """Twelve blocky label maps (12, 128, 128)."""
    return np.random.default_rng(3).integers(0, 3, (12, 8, 8)).repeat(16, 1).repeat(16, 2).astype(np.uint8)


def real_dataset(root: Path) -> Path:
    entries = []
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    for number, label in enumerate(real_maps()):
        files = {key: f"{key}s/r{number:02d}.png" for key in ("image", "label")}
        write_image(root / files["image"], np.full((1, SIDE, SIDE), 100 + number, np.uint8))
        write_label(root / files["label"], label)
        entries.append({**files, "case_id": f"r{number:02d}", "patient_id": "p", "spacing": [1.0, 1.0]})
    head = {
        "name": "real", "task": "pairs", "modality": "L", "image_channels": 1, "spatial_dims": 2,
        "spatial_shape": [SIDE, SIDE], "intensity": {}, "labels": LABELS, "training": entries[:11], "validation": [],
        "test": entries[11:],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(head))
    return root


def sampled(folder: Path, *, per_case: int = 5) -> Path:
    """Samples of the maps 4, 9 and 11; image k has grey value k everywhere."""
    writer = NNUNetRawWriter(folder, dataset_id=1, name="S", channel_names=["L"], labels=LABELS)
    lines = ProvenanceWriter(writer.provenance_path)
    for k in range(3 * per_case):
        source = (4, 9, 11)[k % 3]
        case = f"r{source:02d}_s{k:06d}"
        writer.add(case, np.full((SIDE, SIDE), k, np.uint8), real_maps()[source])
        lines.append(
            case_id=case, seed=k, checkpoints={}, sampler="dpm++", num_steps=2, precision="float32",
            conditioning={"case": f"r{source:02d}", "condition": "mask"},
        )  # fmt: skip
    return writer.finish()


def cells(path: Path) -> np.ndarray:
    """(rows, columns, 128, 128, 3)."""
    sheet = np.asarray(Image.open(path))
    rows, columns = (sheet.shape[0] + 2) // CELL, (sheet.shape[1] + 2) // CELL
    return np.stack(
        [
            np.stack([sheet[r * CELL : r * CELL + SIDE, c * CELL : c * CELL + SIDE] for c in range(columns)])
            for r in range(rows)
        ]
    )


def test_the_grid_has_images_above_masks_above_outlines(tmp_path: Path) -> None:
    path = sampled(tmp_path)
    (file,) = write_pair_figures(path, out=tmp_path / "f", num=10)
    sheet = cells(file)
    assert sheet.shape[:2] == (6, 8)
    names = sorted(p.stem for p in (path / "labelsTr").iterdir())
    shown = [int(value) for value in sheet[0, :, 0, 0, 0]] + [int(value) for value in sheet[3, :2, 0, 0, 0]]
    greys = {int(name[-6:]): name for name in names}
    assert len(set(shown)) == 10
    assert [greys[k] for k in shown] == sorted(greys[k] for k in shown)
    for column, grey in enumerate(shown[:8]):
        label = real_maps()[(4, 9, 11)[grey % 3]]
        np.testing.assert_array_equal(sheet[1, column], label_colours(3)[label])
        drawn = (sheet[2, column] != grey).any(axis=-1)
        assert drawn.any()
        assert (label[drawn] > 0).all()
        assert (sheet[2, column][drawn] == label_colours(3)[label[drawn]]).all()


def test_a_copied_training_map_is_found_beside_its_real_image(tmp_path: Path) -> None:
    path, real = sampled(tmp_path), real_dataset(tmp_path / "real")
    files = write_pair_figures(path, out=tmp_path / "f", num=15, real=real, show_real=True)
    assert [file.name for file in files] == ["pairs.png", "nearest.png"]
    table = json.loads((tmp_path / "f" / "nearest.json").read_text())
    assert len(table) == 15
    for row in table:
        if row["case_id"][:3] != "r11":  # not in the training split
            assert row["nearest"] == row["case_id"][:3]
        else:
            assert row["mutual_information"] < 0.3
    sheet = cells(files[1])
    assert sheet.shape[:2] == (8, 4)
    for row, cell in zip(table, sheet, strict=False):
        number = int(row["nearest"][1:])
        assert (cell[0] == int(row["case_id"][-6:])).all()
        assert (cell[2] == 100 + number).all()
        np.testing.assert_array_equal(cell[3], label_colours(3)[real_maps()[number]])


@pytest.mark.parametrize("show_real", [False, True])
def test_each_given_mask_has_a_row_of_its_samples(tmp_path: Path, show_real: bool) -> None:
    path, real = sampled(tmp_path), real_dataset(tmp_path / "real")
    options = {"real": real, "show_real": show_real, "condition": "mask"}
    files = write_pair_figures(path, out=tmp_path / "f", **options)
    sheet = cells(files[-1])
    assert sheet.shape[:2] == (3, 6 if show_real else 5)
    for row, source in enumerate((4, 9, 11)):
        np.testing.assert_array_equal(sheet[row, 0], label_colours(3)[real_maps()[source]])
        greys = sheet[row, 1:, 0, 0, 0].tolist()
        expected = [k for k in range(15) if (4, 9, 11)[k % 3] == source][:4]
        assert greys == ([100 + source] if show_real else []) + expected


@pytest.mark.parametrize("condition", [None, "mask", "image", "region"])
def test_no_real_image_is_drawn_unless_it_is_asked_for(tmp_path: Path, condition: str | None) -> None:
    path = sampled(tmp_path)
    out = tmp_path / "f"
    files = write_pair_figures(path, out=out, real=real_dataset(tmp_path / "real"), condition=condition)
    expected = {None: ["pairs.png"], "mask": ["pairs.png", "masks.png"]}.get(condition, [])
    assert [file.name for file in files] == expected
    assert sorted(p.name for p in out.glob("*")) == sorted(expected)


def test_the_same_seed_draws_the_same_figure_and_another_one_other_pairs(tmp_path: Path) -> None:
    path = sampled(tmp_path)
    first, again, other = (
        write_pair_figures(path, out=tmp_path / name, num=4, seed=seed)[0].read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


def test_of_a_volume_of_several_channels_the_middle_slice_is_drawn(tmp_path: Path) -> None:
    writer = NNUNetRawWriter(
        tmp_path, dataset_id=1, name="V", channel_names=["T1", "T2"], labels=LABELS, file_ending=".nii.gz"
    )
    image = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 5, 2)).astype(np.uint8)
    label = np.zeros((SIDE, SIDE, 5), np.uint8)
    label[:, :40, 2] = 2
    writer.add("v", image, label)
    assert nib.load(writer.image_path("v", 1)).shape == (SIDE, SIDE, 5)
    sheet = cells(write_pair_figures(writer.finish(), out=tmp_path / "f")[0])
    assert sheet.shape[:2] == (3, 1)
    np.testing.assert_array_equal(np.sort(sheet[0, 0, ..., 0], axis=None), np.sort(image[:, :, 2, 0], axis=None))
    assert (sheet[1, 0] == label_colours(3)[2]).all(axis=-1).mean() == 40 / SIDE


def test_small_pictures_are_enlarged_by_whole_factors() -> None:
    label = np.eye(40, dtype=np.uint8)
    drawn = label_picture(label, 2)
    assert drawn.shape == (120, 120, 3)
    np.testing.assert_array_equal(drawn[..., 0], 255 * label.repeat(3, 0).repeat(3, 1))
    ring = (outlined(np.zeros((1, 40, 40), np.uint8), np.pad(np.ones((20, 20), np.uint8), 10), 2) != 0).any(-1)
    assert ring.sum() == 4 * 60 - 4


def test_colours_of_many_labels_differ() -> None:
    colours = label_colours(40).astype(int)
    assert len(np.unique(colours, axis=0)) == 40
    assert (np.abs(np.diff(colours, axis=0)).sum(axis=1) > 150).all()


def test_what_cannot_be_drawn_is_one_message(tmp_path: Path) -> None:
    path = sampled(tmp_path)
    with pytest.raises(UserError, match="num is 0"):
        write_pair_figures(path, out=tmp_path / "f", num=0)
    real = real_dataset(tmp_path / "real")
    head = json.loads((real / "dataset.json").read_text())
    (real / "dataset.json").write_text(json.dumps(head | {"labels": {"background": 0, "polyp": 1}}))
    with pytest.raises(UserError, match="give the dataset that the model was trained on"):
        write_pair_figures(path, out=tmp_path / "f", real=real, show_real=True)
    (path / "dataset.json").unlink()
    with pytest.raises(UserError, match="no finished nnU-Net raw dataset"):
        write_pair_figures(path, out=tmp_path / "f")

# SPDX-License-Identifier: Apache-2.0
"""The phantom of stained tissue: what its pictures and masks promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import label
from source_images import files_of

from monai_synth import cli
from monai_synth.data.phantom_nuclei import nuclei_picture, write_nuclei
from monai_synth.errors import UserError


def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_nuclei(tmp_path / name, num_images=2, size=48, seed=seed, progress=False)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert sorted(a) == ["images/n0001.png", "images/n0002.png", "masks/n0001.png", "masks/n0002.png"]
    assert not set(a.values()) & set(c.values())


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = files_of(write_nuclei(tmp_path / "few", num_images=1, size=48, progress=False))
    many = files_of(write_nuclei(tmp_path / "many", num_images=3, size=48, progress=False))
    assert few.items() <= many.items()


def test_images_are_rgb_and_masks_hold_0_and_255(tmp_path: Path) -> None:
    out = write_nuclei(tmp_path / "out", num_images=2, size=64, progress=False)
    image, mask = Image.open(out / "images/n0001.png"), Image.open(out / "masks/n0001.png")
    assert (image.mode, image.size, mask.mode, mask.size) == ("RGB", (64, 64), "L", (64, 64))
    assert set(np.unique(np.asarray(mask))) == {0, 255}


def test_nuclei_are_dark_blue_on_bright_pink_in_every_picture() -> None:
    for index in range(1, 9):
        image, mask = nuclei_picture(0, index)
        inside, outside = image[mask].mean(0), image[~mask].mean(0)
        assert inside.mean() + 40 < outside.mean()
        assert inside[2] > inside[0] + 10, "nuclei are blue-violet"
        assert outside[0] > outside[1] + 20, "the rest is pink"
        assert 0.08 < mask.mean() < 0.7


def test_nuclei_vary_in_size_some_touch_and_the_stain_varies_between_pictures() -> None:
    pictures = [nuclei_picture(0, index) for index in range(1, 17)]
    areas = np.concatenate([np.bincount(label(mask)[0].ravel())[1:] for _, mask in pictures])
    low, high = np.percentile(areas, [20, 90])
    assert high > 3 * low
    hues = np.array([image[~mask].mean(0) for image, mask in pictures])
    assert (hues.std(0) > 2).all()


@pytest.mark.parametrize("wrong", [{"num_images": 0}, {"size": 31}, {"size": 64.5}, {"seed": -1}])
def test_an_argument_out_of_range_is_told_and_nothing_is_written(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; give a whole number from"):
        write_nuclei(tmp_path / "out", **wrong)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        write_nuclei(tmp_path, num_images=1, size=48)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_takes_only_the_options_of_its_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "phantom", "out", "--kind", "nuclei", "--images", "2", "--size", "40"]) == 0
    assert Image.open("out/images/n0002.png").size == (40, 40)
    assert not Path("out/images/n0003.png").exists()
    capsys.readouterr()
    assert cli.main(["prepare", "phantom", "no", "--kind", "nuclei", "--slices", "9"]) == 2
    assert "--slices is of --kind lidc" in capsys.readouterr().err
    assert cli.main(["prepare", "phantom", "no", "--images", "9"]) == 2
    assert "--images is of --kind nuclei and xray" in capsys.readouterr().err
    assert not Path("no").exists()

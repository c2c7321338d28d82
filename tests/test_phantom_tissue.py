# SPDX-License-Identifier: Apache-2.0
"""The phantom of tissue tiles: what its pictures and its classes promise."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, laplace
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from source_images import files_of

from monai_synth import bundle, cli
from monai_synth.data import phantom_tissue
from monai_synth.data.datalist import read_dataset
from monai_synth.data.phantom_tissue import CLASSES, Tissue, tissue_picture, tissues, write_tissue
from monai_synth.data.phantom_tissue_textures import TEXTURES, Plane, noise, nuclei, scatter
from monai_synth.errors import UserError


@cache
def pictures_to_tell_apart() -> list[Tissue]:
    """160 pictures of 32 x 32, a quarter of each class."""
    return list(tissues(1, 160, size=32))


def accuracy(values: np.ndarray) -> float:
    """Of a logistic regression on ``values`` (160, D) that is tried on other pictures than it was fitted to."""
    labels = [tissue.label for tissue in pictures_to_tell_apart()]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float((cross_val_predict(model, values, labels, cv=4) == labels).mean())


def texture(image: np.ndarray) -> list[float]:
    """Strength, skewness, kurtosis and direction of four bands of detail, of an image of mean 0 and contrast 1."""
    image = (image - image.mean()) / image.std()
    found = []
    for scale in (0.7, 1.4, 2.8, 5.6):
        band = gaussian_filter(image, scale) - gaussian_filter(image, 2 * scale)
        rows, cols = np.gradient(gaussian_filter(image, scale))
        low, high = np.linalg.eigvalsh(np.cov(rows.ravel(), cols.ravel()))
        moments = [(band**power).mean() / band.std() ** power for power in (3, 4)]
        found += [np.log(band.var()), *moments, (high - low) / (high + low)]
    return found


def section(points: int = 160) -> Plane:
    """Two units of a section, without warp."""
    u, v = np.meshgrid(*[(2 * np.arange(points) + 1) / points - 1] * 2)
    return Plane(u, v, 2.0, u + 1j * v)


def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_tissue(tmp_path / name, num_images=5, size=24, seed=seed, progress=False)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert not set(a.values()) & set(c.values())


def test_the_files_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    one, two = (
        files_of(write_tissue(tmp_path / str(n), num_images=60, size=16, num_workers=n, progress=False)) for n in (1, 2)
    )
    assert one == two
    assert len(one) == 60


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    few = files_of(write_tissue(tmp_path / "few", num_images=4, size=16, progress=False))
    many = files_of(write_tissue(tmp_path / "many", num_images=9, size=16, progress=False))
    assert few.items() < many.items()


def test_images_are_8_bit_grey_in_a_folder_of_their_class_and_the_classes_take_turns(tmp_path: Path) -> None:
    out = write_tissue(tmp_path / "out", num_images=10, size=28, progress=False)
    paths = sorted(out.rglob("*.png"), key=lambda path: path.stem)
    assert [path.stem for path in paths] == [f"{number:05d}" for number in range(1, 11)]
    assert [path.parent.name for path in paths] == [*CLASSES, *CLASSES, *CLASSES[:2]]
    for path in paths:
        image = Image.open(path)
        assert (image.mode, image.size) == ("L", (28, 28))
        assert np.ptp(np.asarray(image)) > 60


@pytest.mark.parametrize("label", range(4))
def test_the_tile_is_the_same_at_every_size(label: int) -> None:
    for number in (1, 2, 3):
        large = tissue_picture(0, number, size=168, label=label)
        small = tissue_picture(0, number, size=28, label=label)
        shrunk = large.image.astype(float).reshape(28, 6, 28, 6).mean((1, 3))
        assert np.corrcoef(shrunk.ravel(), small.image.ravel())[0, 1] > 0.93
        assert abs(shrunk.mean() - small.image.mean()) < 3
        assert large.other == small.other
        assert abs(large.share - small.share) < 0.02
        assert np.corrcoef(tissue_picture(0, number + 3, size=28).image.ravel(), shrunk.ravel())[0, 1] < 0.7


@pytest.mark.parametrize("size", [16, 1024])
def test_the_smallest_and_the_largest_picture_can_be_drawn(size: int) -> None:
    image = tissue_picture(0, 1, size=size).image
    assert image.shape == (size, size)
    assert image.dtype == np.uint8


def test_pose_and_film_and_corner_are_drawn_without_a_look_at_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(rng: np.random.Generator, plane: Plane) -> tuple[np.ndarray, np.ndarray]:
        planes.append(plane)
        rng.random(len(planes))  # each texture takes a number of draws of its own
        return 0.8 + 0.1 * plane.u, 0.3 + 0.1 * plane.v

    planes: list[Plane] = []
    monkeypatch.setattr(phantom_tissue, "TEXTURES", (flat,) * 4)
    for number in range(1, 13):
        planes.clear()
        tiles = [tissue_picture(0, number, size=16, label=label) for label in range(4)]
        assert all((tile.image == tiles[0].image).all() for tile in tiles)
        assert all((plane.aside == planes[0].aside).all() for plane in planes)
        assert len({(tile.other - tile.label) % 4 for tile in tiles}) == len({tile.share for tile in tiles}) == 1


def test_a_third_to_a_half_of_the_tiles_have_another_tissue_in_a_corner_that_never_takes_the_larger_part() -> None:
    drawn = [phantom_tissue._corner(np.random.default_rng([0, number]), 32) for number in range(1000)]
    mixed = [(step_on, share.mean()) for step_on, share in drawn if step_on]
    assert 330 < len(mixed) < 500
    assert np.bincount([step_on for step_on, _ in mixed])[1:].min() > 0.26 * len(mixed)
    assert max(share for _, share in mixed) < 0.4
    assert all(not share.any() for step_on, share in drawn if not step_on)


def test_mean_grey_and_contrast_overlap_and_texture_tells_the_classes() -> None:
    images = np.array([tissue.image for tissue in pictures_to_tell_apart()], float)
    means, contrasts = images.mean((1, 2)), images.std((1, 2))
    assert accuracy(means[:, None]) < 0.62
    assert accuracy(np.stack([means, contrasts], 1)) < 0.68
    assert accuracy(np.array([texture(image) for image in images])) > 0.75


def test_neither_noise_nor_place_nor_direction_gives_the_class_away() -> None:
    images = np.array([tissue.image for tissue in pictures_to_tell_apart()], float)
    grain = np.array([[np.median(np.abs(laplace(image[:2])))] for image in images])  # of the upper border alone
    thirds = images[:, 1:31].reshape(160, 3, 10, 32)[..., 1:31].reshape(160, 3, 10, 3, 10).mean((2, 4))
    place = thirds.reshape(160, 9) / thirds.mean((1, 2))[:, None]
    rows, cols = (np.diff(images, axis=axis).std((1, 2)) for axis in (1, 2))
    for values, most in ((grain, 0.60), (place, 0.38), (np.log(rows / cols)[:, None], 0.38)):
        assert accuracy(values) < most  # 0.25 and 3.8 standard errors but for the grain, where detail counts too


@pytest.mark.parametrize("name", CLASSES)
def test_tiles_of_a_class_differ_in_brightness_and_contrast(name: str) -> None:
    images = [tissue.image for tissue in pictures_to_tell_apart() if CLASSES[tissue.label] == name]
    for values, spread in (([i.mean() for i in images], 30), ([i.std() for i in images], 14)):
        low, high = np.percentile(values, [10, 90])
        assert high - low > spread


def dyes(name: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    return TEXTURES[CLASSES.index(name)](np.random.default_rng(number), section())


def test_each_tissue_holds_what_it_is_known_by() -> None:
    dyed = {name: [dyes(name, number) for number in range(8)] for name in CLASSES}
    for pink, blue in (pair for pairs in dyed.values() for pair in pairs):
        assert min(pink.min(), blue.min()) >= 0
    nucleus = {name: np.mean([(blue > 0.55).mean() for _, blue in dyed[name]]) for name in CLASSES}
    assert min(nucleus["tumor"], nucleus["lympho"]) > 0.3 > 3 * max(nucleus["stroma"], nucleus["adipose"])
    empty = {name: np.mean([(pink + blue < 0.15).mean() for pink, blue in dyed[name]]) for name in CLASSES}
    assert empty["adipose"] > 0.4 > 2 * max(empty[name] for name in CLASSES[:3])
    direction = {}
    for name in CLASSES:
        found = []
        for pink, _ in dyed[name]:
            rows, cols = np.gradient(gaussian_filter(pink, 1))
            low, high = np.linalg.eigvalsh(np.cov(rows.ravel(), cols.ravel()))
            found.append((high - low) / (high + low))
        direction[name] = np.mean(found)
    assert direction["stroma"] > 2 * max(value for name, value in direction.items() if name != "stroma")


def test_noise_has_mean_0_and_variance_1_and_is_smooth_over_its_grain() -> None:
    plane = section(80)  # 8 points to the grain along u, 16 along v
    many = np.array([noise(np.random.default_rng(number), plane.u, plane.v, 0.2, 0.4) for number in range(400)])
    assert abs(many.mean()) < 0.05  # 3 standard errors
    assert abs(many.var() - 1) < 0.06

    def alike(rows: int, cols: int) -> float:
        return float((many[:, rows:, cols:] * many[:, : 80 - rows, : 80 - cols]).mean())

    # One grain apart, the products of neighbouring cubic splines: 1191 of 2416; four grains apart none overlap.
    for rows, cols in ((0, 8), (16, 0)):
        assert alike(rows, cols) == pytest.approx(1191 / 2416, abs=0.06)
    for rows, cols in ((0, 32), (64, 0)):
        assert abs(alike(rows, cols)) < 0.06


def test_a_nucleus_alone_is_an_ellipse_of_the_asked_area_and_axes() -> None:
    plane = section(400)
    cell = np.array([[0.2, -0.1]])
    share, _, dark = nuclei(np.random.default_rng(0), plane, cell, *np.array([[0.5], [0.3], [2.0]]), spread=0.0)
    area = share.sum() * (2 / 400) ** 2
    assert area == pytest.approx(np.pi * 0.3**2, rel=0.03)
    u, v = plane.u - 0.2, plane.v + 0.1
    assert abs((share * u).sum()) + abs((share * v).sum()) < 0.01 * share.sum()
    along = np.cos(0.5) * u + np.sin(0.5) * v
    across = np.cos(0.5) * v - np.sin(0.5) * u
    assert np.sqrt((share * along**2).sum() / (share * across**2).sum()) == pytest.approx(2.0, rel=0.02)
    assert (dark == 1).all()


@pytest.mark.parametrize(("stretch", "turn"), [(1.0, 0.0), (1.5, 0.7), (1.5, 2.5)])
def test_scattered_points_cover_the_plane_with_the_density_of_the_lattice(stretch: float, turn: float) -> None:
    points = scatter(np.random.default_rng(0), 2.0, 0.1, stretch=stretch, turn=turn, jitter=0.4)
    counts = np.histogram2d(*points.T, bins=4, range=[[-2, 2]] * 2)[0]
    assert counts == pytest.approx(1 / (0.87 * 0.1**2), rel=0.15)


WRONG = [{"num_images": 3}, {"num_images": True}, {"size": 15}, {"size": 1025}, {"size": 64.5}, {"seed": -1}]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_argument_out_of_range_is_told_and_nothing_is_written(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*; give a whole number from"):
        write_tissue(tmp_path / "out", **wrong)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an empty folder"):
        write_tissue(tmp_path, num_images=4, size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_fills_up_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Image.Image.save

    def full(image: Image.Image, path: Path) -> None:
        if len(list(tmp_path.rglob("*.png"))) == 2:
            raise OSError(28, "No space left on device")
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="cannot be written .*No space left.*free space"):
        write_tissue(tmp_path / "out", num_images=4, size=16, progress=False)
    assert not any(tmp_path.iterdir())


def test_the_bundle_makes_it_once_where_its_kind_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "phantom"
    phantom = {
        "kind": "tissue",
        "images": {"num_images": 20, "size": 16, "seed": 0, "progress": False},
        "import": {"name": "tissue", "splits": [0.6, 0.2, 0.2], "seed": 0, "progress": False},
    }
    for _ in range(2):
        bundle.ensure_dataset(str(folder), str(folder), phantom, "demo", "cpu", task="classes")
        before = files_of(tmp_path)
    assert files_of(tmp_path) == before
    dataset = read_dataset(folder, task="classes")
    assert sorted(dataset.classes) == sorted(CLASSES)
    assert dataset.content["spatial_shape"] == [16, 16]
    assert dataset.content["image_channels"] == 1
    for split, each in (("training", 3), ("validation", 1), ("test", 1)):
        assert np.bincount([case["class"] for case in dataset.content[split]]).tolist() == [each] * 4


@pytest.mark.parametrize(("task", "kind"), [("classes", "lung"), ("classes", ["tissue"]), ("pairs", "tissue")])
def test_a_kind_that_there_is_not_is_told_and_nothing_is_written(tmp_path: Path, task: str, kind: object) -> None:
    folder = tmp_path / "phantom"
    with pytest.raises(UserError, match=r"phantom kind is .*; give '\w+'( or 'tissue')?, or leave it out"):
        bundle.ensure_dataset(str(folder), str(folder), {"kind": kind}, "demo", "cpu", task=task)
    assert not any(tmp_path.iterdir())


def test_the_command_takes_the_options_of_its_kind_and_has_the_defaults_that_it_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--images", "5", "--size", "20", "--seed", "9"]
    assert cli.main(["prepare", "phantom", "out", "--kind", "tissue", *options]) == 0
    direct = write_tissue(tmp_path / "direct", num_images=5, size=20, seed=9, progress=False)
    assert files_of(Path("out")) == files_of(direct)
    assert cli.main(["prepare", "classes", "out", "data", "--splits", "1", "0", "0"]) == 0
    assert sorted(read_dataset("data", task="classes").classes) == sorted(CLASSES)
    capsys.readouterr()
    assert cli.main(["prepare", "phantom", "no", "--kind", "tissue", "--slices", "9"]) == 2
    assert "--slices is of --kind lidc" in capsys.readouterr().err
    assert not Path("no").exists()
    with pytest.raises(SystemExit):
        cli.main(["prepare", "phantom", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    default = {name: p.default for name, p in inspect.signature(write_tissue).parameters.items()}
    assert f"tissue: 4 to 99999 (default: {default['num_images']})" in text
    assert f"tissue: 16 to 1024 (default: {default['size']})" in text

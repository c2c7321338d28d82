# SPDX-License-Identifier: Apache-2.0
"""``evaluate fidelity``: sets, pairs, what the report says and what is refused; end to end on small images."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fidelity_files import FakeInception, publish, write_classifier
from scipy.ndimage import gaussian_filter

from monai_synth import cli
from monai_synth.data.classes import prepare_classes
from monai_synth.data.pair_files import write_image
from monai_synth.errors import UserError
from monai_synth.evaluate import fidelity_compare as module
from monai_synth.evaluate.distribution import frechet_distance
from monai_synth.evaluate.features import trained_classifier
from monai_synth.evaluate.fidelity import Settings, evaluate_fidelity
from monai_synth.evaluate.fidelity_compare import metric_keys
from monai_synth.evaluate.image_sets import read_sets
from monai_synth.evaluate.similarity import ssim

CLASSES = {"dark": 0, "light": 1}
TEXT_ORDER = [
    ("real_train", "real_test"), ("synthetic", "real_train"), ("synthetic", "real_test"),
    ("real_train", "control"), ("real_test", "control"), ("synthetic", "control"),
]  # fmt: skip


def picture(number: int, label: int, channels: int = 1, shape: tuple[int, int] = (28, 28)) -> np.ndarray:
    rng = np.random.default_rng(number)
    grey = 90 + 60 * label + 25 * gaussian_filter(rng.normal(size=shape), 2) * 4
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[None], channels, axis=0)


def make_dataset(
    root: Path,
    splits: dict[str, int],
    *,
    first: int = 0,
    draw: Callable[..., np.ndarray] = picture,
    channels: int = 1,
    shape: tuple[int, int] = (28, 28),
    classes: dict[str, int] = CLASSES,
    **head: Any,
) -> Path:
    """A prepared dataset with so many images in each split, half of each class."""
    content: dict[str, Any] = {
        "name": root.name, "task": "classes", "modality": "X-ray", "image_channels": channels,
        "spatial_shape": list(shape), "intensity": {"unit": "grey value"}, "classes": classes, **head,
    }  # fmt: skip
    number = first
    for split in ("training", "validation", "test"):
        content[split] = []
        for i in range(splits.get(split, 0)):
            name = f"case{number:05d}"
            (root / "images").mkdir(parents=True, exist_ok=True)
            write_image(root / "images" / f"{name}.png", draw(number, i % 2, channels, shape))
            case = {"image": f"images/{name}.png", "class": i % 2, "case_id": name, "patient_id": name}
            content[split].append(case)
            number += 1
    root.mkdir(parents=True, exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def noise(number: int, label: int, channels: int, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (channels, *shape), dtype=np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("fidelity")
    return {
        "real": str(make_dataset(root / "real", {"training": 40, "test": 30})),
        "synthetic": str(make_dataset(root / "synthetic", {"training": 36}, first=500, synthetic={"seed": 0})),
        "control": str(make_dataset(root / "fashion", {"training": 30}, draw=noise, classes={"shoe": 0, "bag": 1})),
        "extractor": str(write_classifier(root / "classifier.pt")),
    }


@pytest.fixture(scope="module")
def content(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("report") / "out"
    settings = Settings(**folders, out=str(out), num_pairs=60, per_class=True)
    return evaluate_fidelity(settings, report=lambda _: None) | {"out": out}


def whole(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["a"], e["b"]): e["metrics"] for e in content["pairs"] if e["class"] is None}


def test_the_six_pairs_stand_in_the_texts_order_with_its_numbers(content: dict[str, Any]) -> None:
    entries = [e for e in content["pairs"] if e["class"] is None]
    assert [(e["a"], e["b"]) for e in entries] == TEXT_ORDER
    assert [e["text"]["fid"] for e in entries] == [31.25, 193.922, 207.901, 176.893, 175.255, 335.008]
    assert [e["text"]["ssim"] for e in entries] == [0.2996, 0.2713, 0.2833, 0.0623, 0.0757, 0.0424]


def test_every_number_comes_with_n_and_an_interval_around_it(content: dict[str, Any]) -> None:
    for entry in content["pairs"]:
        for number in entry["metrics"].values():
            assert number["n"]
            if number["ci"] is not None:
                assert number["ci"][0] <= number["value"] <= number["ci"][1]
    assert whole(content)["synthetic", "real_test"]["frechet_classifier"]["n"] == [36, 30]
    assert whole(content)["synthetic", "real_test"]["ssim"]["n"] == 60


def test_distances_of_a_classifiers_features_are_never_called_fid(content: dict[str, Any]) -> None:
    for metrics in whole(content).values():
        neighbours = ["precision_classifier", "recall_classifier", "density_classifier", "coverage_classifier"]
        assert list(metrics) == ["frechet_classifier", "kernel_classifier", *neighbours, "ssim", "ms_ssim"]
    assert metric_keys("inception") == ("fid", "kid")
    assert metric_keys("unknown_inception") == ("frechet_unknown_inception", "kernel_unknown_inception")
    page = (content["out"] / "report.html").read_text()
    assert "it is not FID" in page
    assert "FID ↓" not in page


def test_the_control_is_farther_than_any_two_sets_of_one_kind(content: dict[str, Any]) -> None:
    pairs = whole(content)
    alike = [pairs[p] for p in TEXT_ORDER[:3]]
    control = [pairs[p] for p in TEXT_ORDER[3:]]
    for key in ("frechet_classifier", "kernel_classifier"):
        assert min(m[key]["value"] for m in control) > max(m[key]["value"] for m in alike)
    for key in ("ssim", "ms_ssim"):
        assert max(m[key]["value"] for m in control) < min(m[key]["value"] for m in alike)


def test_the_numbers_are_those_of_the_images_themselves(content: dict[str, Any], folders: dict[str, str]) -> None:
    sets, _ = read_sets(folders["real"], folders["synthetic"])
    extractor = trained_classifier(folders["extractor"])
    images = {key: np.stack([read() for read in s.readers()]) for key, s in sets.items()}
    expected = frechet_distance(extractor(images["synthetic"]), extractor(images["real_train"]))
    pair = whole(content)["synthetic", "real_train"]
    assert pair["frechet_classifier"]["value"] == pytest.approx(expected, rel=1e-3)
    # The mean over 60 random pairs lies near that over all pairs.
    x, y = (torch.from_numpy(images[key]).double() / 255 for key in ("synthetic", "real_train"))
    every = torch.cat([ssim(image.expand_as(y), y) for image in x]).mean().item()
    assert abs(pair["ssim"]["value"] - every) < 3 * pair["ssim"]["standard_error"]


def test_each_class_is_compared_with_the_same_class_and_not_with_the_control(content: dict[str, Any]) -> None:
    entries = [e for e in content["pairs"] if e["class"] is not None]
    assert {e["class"] for e in entries} == set(CLASSES)
    assert not [e for e in entries if "control" in (e["a"], e["b"])]
    assert all(e["text"] is None for e in entries)
    light = next(e for e in entries if (e["class"], e["a"], e["b"]) == ("light", "synthetic", "real_test"))
    assert light["metrics"]["frechet_classifier"]["n"] == [18, 15]
    # The classes differ in brightness, so images of one class are more alike than images of any.
    assert light["metrics"]["ssim"]["value"] > whole(content)["synthetic", "real_test"]["ssim"]["value"]


def test_the_table_for_programs_holds_every_number(content: dict[str, Any]) -> None:
    with open(content["out"] / "fidelity.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    within = sum(len(record["within"]) for record in content["sets"].values())
    assert len(rows) == sum(len(e["metrics"]) for e in content["pairs"]) + within
    first = rows[0]
    assert (first["a"], first["b"], first["metric"], first["n_a"]) == (
        "real_train", "real_test", "frechet_classifier", "40",
    )  # fmt: skip
    assert float(first["value"]) == whole(content)["real_train", "real_test"]["frechet_classifier"]["value"]


def test_the_record_says_how_the_numbers_came_about_and_holds_no_path(
    content: dict[str, Any], folders: dict[str, str]
) -> None:
    text = (content["out"] / "fidelity.json").read_text()
    read = json.loads(text)
    assert read["seed"] == 0
    assert {"monai_synth", "torch", "monai"} <= set(read["versions"])
    assert read["settings"]["num_pairs"] == 60
    assert "2 of 5 scales" in read["recipe"]["ms_ssim"]
    assert read["extractors"]["classifier"]["weights_sha256"]
    assert str(Path(folders["real"]).parent) not in text
    assert any("trained on another dataset" in w for w in read["warnings"])


def test_the_page_holds_all_in_itself_and_no_real_image_unless_asked(
    content: dict[str, Any], folders: dict[str, str], tmp_path: Path
) -> None:
    page = (content["out"] / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "src='data:image/png" in page
    assert "Images: real training" not in page
    assert page.count("<img") == 3
    settings = Settings(
        **folders, out=str(tmp_path / "o"), num_pairs=5, show_real=True, cache=str(content["out"] / "features")
    )
    evaluate_fidelity(settings, report=lambda _: None)
    shown = (tmp_path / "o" / "report.html").read_text()
    assert "Images: real training" in shown
    assert shown.count("<img") == 6
    assert not (tmp_path / "o" / "features").exists()


def test_a_second_call_computes_no_feature_again_and_gives_the_same_report(
    content: dict[str, Any], folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr("monai_synth.evaluate.features.Extractor.__call__", forbidden)
    settings = Settings(
        **folders, out=str(tmp_path / "o"), num_pairs=60, per_class=True, cache=str(content["out"] / "features")
    )
    evaluate_fidelity(settings, report=lambda _: None)
    for name in ("fidelity.json", "fidelity.csv", "report.html"):
        assert (tmp_path / "o" / name).read_bytes() == (content["out"] / name).read_bytes()


def test_the_order_of_a_datasets_cases_does_not_matter(folders: dict[str, str], tmp_path: Path) -> None:
    turned = make_dataset(tmp_path / "real", {"training": 40, "test": 30})
    listing = json.loads((turned / "dataset.json").read_text())
    for split in ("training", "test"):
        listing[split] = listing[split][::-1]
    (turned / "dataset.json").write_text(json.dumps(listing))
    results = []
    for i, real in enumerate((folders["real"], str(turned))):
        settings = Settings(
            **{**folders, "real": real}, out=str(tmp_path / f"o{i}"), num_pairs=30, max_images=20, seed=3
        )
        results.append(evaluate_fidelity(settings, report=lambda _: None)["pairs"])
    assert results[0] == results[1]


def test_of_a_large_set_so_many_images_are_drawn_by_the_seed(folders: dict[str, str]) -> None:
    drawn = [read_sets(folders["real"], folders["synthetic"], max_images=10, seed=s)[0] for s in (0, 0, 1)]
    assert [len(sets["real_train"]) for sets in drawn] == [10] * 3
    assert drawn[0]["real_train"].paths == drawn[1]["real_train"].paths != drawn[2]["real_train"].paths
    assert drawn[0]["real_train"].num_available == 40


def test_without_control_there_are_three_pairs_and_without_network_only_similarities(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o"
    command = ["evaluate", "fidelity", "--real", folders["real"], "--synthetic", folders["synthetic"]]
    assert cli.main([*command, "--out", str(out), "--num-pairs", "20", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "n=20" in printed
    assert "give --inception (FID, KID), --radimagenet or --extractor" in printed
    content = json.loads((out / "fidelity.json").read_text())
    assert list(whole(content)) == TEXT_ORDER[:3]
    assert list(whole(content)["synthetic", "real_test"]) == ["ssim", "ms_ssim"]
    before = (out / "fidelity.json").read_bytes()
    assert cli.main([*command, "--out", str(out)]) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert (out / "fidelity.json").read_bytes() == before
    assert cli.main([*command, "--out", str(out), "--num-pairs", "5", "--overwrite"]) == 0
    assert json.loads((out / "fidelity.json").read_text())["settings"]["num_pairs"] == 5


def test_published_inception_weights_give_fid_and_kid_beside_the_texts_fid(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(FakeInception()).save(str(path))
    publish(monkeypatch, path)
    settings = Settings(**folders, inception=str(path), out=str(tmp_path / "o"), num_pairs=5)
    metrics = whole(evaluate_fidelity(settings, report=lambda _: None))["synthetic", "real_train"]
    assert list(metrics)[:3] == ["fid", "kid", "precision_inception"]
    assert {"frechet_classifier", "kernel_classifier"} < set(metrics)
    assert "2048 features" in metrics["fid"]["warnings"][0]
    page = (tmp_path / "o" / "report.html").read_text()
    assert "FID ↓" in page
    assert "193.922" in page


def test_a_set_against_its_copy_is_at_distance_0(folders: dict[str, str], tmp_path: Path) -> None:
    same = make_dataset(tmp_path / "same", {"training": 40}, synthetic={})
    settings = Settings(**{**folders, "synthetic": str(same)}, out=str(tmp_path / "o"), num_pairs=5)
    metrics = whole(evaluate_fidelity(settings, report=lambda _: None))["synthetic", "real_train"]
    scale = frechet_scale(folders, same)
    assert metrics["frechet_classifier"]["value"] == pytest.approx(0, abs=1e-9 * scale)


def frechet_scale(folders: dict[str, str], synthetic: Path) -> float:
    """Total variance of the features."""
    sets, _ = read_sets(folders["real"], synthetic)
    features = trained_classifier(folders["extractor"])(np.stack([r() for r in sets["synthetic"].readers()]))
    return float(features.astype(float).var(axis=0).sum() + 1)


def test_a_control_of_another_size_and_colour_is_brought_to_the_synthetic_form_and_said_so(
    folders: dict[str, str], tmp_path: Path
) -> None:
    control = make_dataset(tmp_path / "colour", {"training": 10}, draw=noise, channels=3, shape=(56, 56))
    sets, warnings = read_sets(folders["real"], folders["synthetic"], control)
    assert {read().shape for read in sets["control"].readers()} == {(1, 28, 28)}
    assert any("56 x 56 resized to 28 x 28" in w for w in warnings)
    assert any("RGB made grey" in w for w in warnings)


def test_classes_in_other_shares_are_warned_of(folders: dict[str, str], tmp_path: Path) -> None:
    path = make_dataset(tmp_path / "s", {"training": 20}, first=900, synthetic={})
    content = json.loads((path / "dataset.json").read_text())
    content["training"] = [c for i, c in enumerate(content["training"]) if c["class"] == 0 or i < 4]
    (path / "dataset.json").write_text(json.dumps(content))
    settings = Settings(folders["real"], str(path), str(tmp_path / "o"), num_pairs=5)
    warnings = evaluate_fidelity(settings, report=lambda _: None)["warnings"]
    assert any("dark 83% against 50% (real training)" in w for w in warnings)


def test_images_smaller_than_the_window_get_no_similarity_and_the_reason(tmp_path: Path) -> None:
    real = make_dataset(tmp_path / "r", {"training": 4, "test": 4}, shape=(8, 8))
    synthetic = make_dataset(tmp_path / "s", {"training": 4}, first=50, shape=(8, 8), synthetic={})
    content = evaluate_fidelity(Settings(str(real), str(synthetic), str(tmp_path / "o")), report=lambda _: None)
    number = whole(content)["synthetic", "real_test"]["ssim"]
    assert (number["value"], number["n"]) == (None, 0)
    assert "smaller than the window" in number["warnings"][0]


def refused(folders: dict[str, str], tmp_path: Path, match: str, **changes: Any) -> None:
    settings = {**folders, "out": str(tmp_path / "o"), "num_pairs": 5, **changes}
    with pytest.raises(UserError, match=match):
        evaluate_fidelity(Settings(**settings), report=lambda _: None)
    assert not (tmp_path / "o" / "fidelity.json").exists()


def test_bad_folders_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    refused(folders, tmp_path, "is not a folder", real=str(tmp_path / "none"))
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "export.json").write_text("{}")
    refused(folders, tmp_path, "has not finished; run the same command again", synthetic=str(unfinished))
    empty = make_dataset(tmp_path / "empty", {})
    refused(folders, tmp_path, "has no image", synthetic=str(empty))
    one = make_dataset(tmp_path / "one", {"training": 1})
    refused(folders, tmp_path, "1 images; 2 or more", synthetic=str(one))
    refused(folders, tmp_path, "0 images; 2 or more", control=str(empty))
    others = make_dataset(tmp_path / "others", {"training": 4}, classes={"cat": 0, "dog": 1})
    refused(folders, tmp_path, r"'dark': 0.*'cat': 0", synthetic=str(others))
    wide = make_dataset(tmp_path / "wide", {"training": 4}, shape=(28, 40))
    refused(folders, tmp_path, "would stretch them", control=str(wide))
    colour = make_dataset(tmp_path / "colour", {"training": 4, "test": 4}, channels=3)
    refused(folders, tmp_path, "--real has RGB images", real=str(colour))
    two = make_dataset(tmp_path / "two", {"training": 4})
    write_image(two / "images" / "case00000.png", picture(0, 0, shape=(30, 30)))
    refused(folders, tmp_path, "2 sizes", synthetic=str(two))
    broken = make_dataset(tmp_path / "broken", {"training": 4})
    (broken / "images" / "case00000.png").write_bytes(b"no PNG")
    refused(folders, tmp_path, "cannot be read", synthetic=str(broken))


def test_bad_files_and_numbers_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    refused(folders, tmp_path, "no file of Inception weights", inception=str(tmp_path / "none.pth"))
    refused(folders, tmp_path, "there is no trained file", extractor=str(tmp_path / "none.pt"))
    other = write_classifier(tmp_path / "d.pt", stage="diffusion")
    refused(folders, tmp_path, "needed is 'image_classifier'", extractor=str(other))
    refused(folders, tmp_path, "max_images is 1", max_images=1)
    refused(folders, tmp_path, "num_pairs is 0", num_pairs=0)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    refused(folders, tmp_path, "no part of a fidelity report", out=str(foreign), overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "years of work"


def test_rgb_images_are_compared_as_rgb_and_refused_by_a_classifier_of_grey(
    folders: dict[str, str], tmp_path: Path
) -> None:
    real = make_dataset(tmp_path / "r", {"training": 6, "test": 6}, channels=3)
    synthetic = make_dataset(tmp_path / "s", {"training": 6}, channels=3, first=70, synthetic={})
    refused({}, tmp_path, "takes grey", real=str(real), synthetic=str(synthetic), extractor=folders["extractor"])
    settings = Settings(str(real), str(synthetic), str(tmp_path / "o2"), control=folders["control"], num_pairs=5)
    content = evaluate_fidelity(settings, report=lambda _: None)
    assert content["sets"]["control"]["form"] == [3, 28, 28]
    assert any("grey repeated to RGB" in w for w in content["warnings"])


def test_a_real_dataset_without_test_split_is_compared_without_it(folders: dict[str, str], tmp_path: Path) -> None:
    real = make_dataset(tmp_path / "r", {"training": 10})
    settings = Settings(**{**folders, "real": str(real)}, out=str(tmp_path / "o"), num_pairs=5)
    content = evaluate_fidelity(settings, report=lambda _: None)
    assert list(whole(content)) == [p for p in TEXT_ORDER if "real_test" not in p]
    assert any("no test split" in w for w in content["warnings"])


def test_no_more_than_a_batch_of_images_is_read_before_it_is_compared(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    original = module.similarity.ssim
    monkeypatch.setattr(module.similarity, "ssim", lambda x, y: sizes.append(len(x)) or original(x, y))
    settings = Settings(folders["real"], folders["synthetic"], str(tmp_path / "o"), num_pairs=20, batch_size=8)
    evaluate_fidelity(settings, report=lambda _: None)
    assert sizes == [8, 8, 4] * 6


def test_pneumonia_test_images_are_nearer_to_the_training_images_than_noise(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "pneumoniamnist" / "pneumoniamnist.npz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    with np.load(source) as images:  # a part of it, which is prepared sooner
        np.savez(tmp_path / "part.npz", **{key: images[key][:200] for key in images})
    real = tmp_path / "pneumonia"
    prepare_classes(tmp_path / "part.npz", real, num_workers=1)
    classes = json.loads((real / "dataset.json").read_text())["classes"]
    fake = make_dataset(tmp_path / "fake", {"training": 100}, draw=noise, classes=classes, synthetic={})
    extractor = str(write_classifier(tmp_path / "c.pt"))
    settings = Settings(str(real), str(fake), str(tmp_path / "o"), extractor=extractor, max_images=100, num_pairs=100)
    pairs = whole(evaluate_fidelity(settings, report=lambda _: None))
    for key in ("frechet_classifier", "kernel_classifier"):
        assert pairs["synthetic", "real_train"][key]["value"] > 3 * pairs["real_train", "real_test"][key]["value"]
    assert 0.2 < pairs["real_train", "real_test"]["ssim"]["value"] < 0.7
    assert abs(pairs["synthetic", "real_test"]["ssim"]["value"]) < 0.1

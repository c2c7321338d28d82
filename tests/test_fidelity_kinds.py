# SPDX-License-Identifier: Apache-2.0
"""``evaluate fidelity`` of pairs, CT slices and plain folders: what each kind gets, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from fidelity_files import write_classifier
from PIL import Image
from test_consistency import write_pairs

from monai_synth.data.semantic import LABELS, uint8_to_hu
from monai_synth.errors import UserError
from monai_synth.evaluate.fidelity import Settings, evaluate_fidelity
from monai_synth.evaluate.fidelity_text import absent_labels, answers, console_lines, meaning
from monai_synth.export.nnunet import NNUNetRawWriter


def run(out: Path, **settings: Any) -> dict[str, Any]:
    return evaluate_fidelity(Settings(out=str(out), num_pairs=20, **settings), report=lambda _: None)


def between(content: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    return next(e for e in content["pairs"] if (e["a"], e["b"], e["class"]) == (a, b, None))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("kinds")
    folders = {
        "real": str(write_pairs(root / "real", 30, test=12)),
        "synthetic": str(write_pairs(root / "made", 20, 500, shuffled=True, synthetic={"seed": 0})),
        "extractor": str(write_classifier(root / "classifier.pt", size=48)),
    }
    content = run(root / "report", **folders, consistency=True, consistency_steps=60, consistency_size=48)
    return {"folders": folders, "content": content, "out": root / "report"}


def test_pairs_get_every_metric_of_images_and_of_masks_with_n_and_interval(pairs: dict[str, Any]) -> None:
    content = pairs["content"]
    assert content["kind"] == "pairs"
    entry = between(content, "synthetic", "real_test")
    for key in ("frechet", "kernel", "precision", "recall", "density", "coverage"):
        assert entry["metrics"][f"{key}_classifier"]["n"] == [20, 12]
    assert set(entry["masks"]["blob"]) == {"area", "count", "object_area", "eccentricity", "solidity"}
    area = entry["masks"]["blob"]["area"]
    assert area["wasserstein"]["n"] == [20, 12]
    assert area["mean_difference"]["ci"][0] < area["mean_difference"]["value"] < area["mean_difference"]["ci"][1]
    assert content["sets"]["synthetic"]["masks"]["blob"]["count"]["mean"] == 1
    assert content["sets"]["synthetic"]["within"]["ssim"]["n"] == 20
    assert entry["text"] is None


def test_masks_that_belong_to_other_images_are_seen_and_said(pairs: dict[str, Any]) -> None:
    row = pairs["content"]["consistency"]["labels"]["all labels"]
    assert row["synthetic"]["value"] < row["real"]["value"] - 0.3
    assert row["real"]["n"] == 12
    answer = next(a for a in pairs["content"]["answers"] if a["question"].startswith("Do masks and images agree"))
    assert answer["tone"] == "poor"
    assert "less clearly" in answer["answer"]


def test_the_page_starts_with_answers_and_shows_no_real_image(pairs: dict[str, Any]) -> None:
    page = (pairs["out"] / "report.html").read_text()
    assert page.index("Are they as varied?") < page.index("<h2>")
    for text in ("Objects of the masks: blob", "Synthetic images and their masks", "Variety within each set"):
        assert text in page
    assert "Images: real" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    csv = (pairs["out"] / "fidelity.csv").read_text()
    assert "mask_area_wasserstein (blob)" in csv
    assert "dice_difference (all labels)" in csv
    assert json.loads((pairs["out"] / "fidelity.json").read_text())["answers"] == pairs["content"]["answers"]


def test_answers_follow_the_numbers(pairs: dict[str, Any]) -> None:
    content = json.loads(json.dumps(pairs["content"]))
    entry = between(content, "synthetic", "real_test")
    entry["metrics"]["kernel_classifier"] |= {"ci": [0.1, 0.2]}
    assert "by more than chance" in answers(content)[0]["answer"]
    entry["metrics"]["kernel_classifier"] |= {"ci": [-0.1, 0.2]}
    assert answers(content)[0]["tone"] == "good"
    assert "too few images" in answers(content)[1]["answer"]
    sure = {"standard_error": 0.01, "warnings": []}
    between(content, "real_train", "real_test")["metrics"]["recall_classifier"] |= {"value": 0.9, **sure}
    entry["metrics"]["recall_classifier"] |= {"value": 0.1, **sure}
    assert answers(content)[1]["tone"] == "poor"
    assert "10% of the real images" in answers(content)[1]["answer"]
    judged = content["consistency"]["labels"]["all labels"]
    judged["real"]["value"] = 0.3
    assert "learned too little" in answers(content)[-1]["answer"]
    assert any("not measured" not in line and "n=" in line for line in console_lines(content))
    assert all(meaning(key)[1] for key in entry["metrics"])


def write_ct(root: Path, prepared: Path, shift: float = 0.0, first: int = 0, num: int = 12) -> Path:
    """What the sampling of bundle lsdm writes: slices of the prepared maps, their HU shifted."""
    writer = NNUNetRawWriter(
        root, dataset_id=1, name="Made", channel_names=["CT"], labels=LABELS, file_ending=".nii.gz"
    )
    cases = json.loads((prepared / "dataset.json").read_text())["training"][first : first + num]
    rng = np.random.default_rng(0)
    for case in cases:
        image = uint8_to_hu(np.asarray(Image.open(prepared / case["image"]))) + shift + rng.normal(0, 4, (64, 64))
        label = np.asarray(Image.open(prepared / case["label"]))
        writer.add(f"{case['case_id']}_s000000", image.round().astype(np.int16), label)
    return writer.finish()


@pytest.fixture(scope="module")
def ct(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("ct")
    made = write_ct(root / "raw", tiny_dataset, shift=50)
    extractor = str(write_classifier(root / "classifier.pt", size=32))
    folders = {"real": str(tiny_dataset), "synthetic": str(made), "extractor": extractor}
    return {"folders": folders, "content": run(root / "report", **folders), "out": root / "report"}


def test_ct_slices_are_compared_in_hu_whole_and_by_label(ct: dict[str, Any]) -> None:
    content = ct["content"]
    assert content["kind"] == "ct"
    hu = between(content, "synthetic", "real_train")["hu"]
    assert hu["lung"]["mean_difference"]["value"] == pytest.approx(50, abs=2)
    assert hu["lung"]["wasserstein"]["value"] == pytest.approx(50, abs=2)
    assert hu["lung"]["wasserstein"]["n"] == [12, 12]
    answer = next(a for a in content["answers"] if "Hounsfield" in a["question"])
    assert answer["tone"] == "poor"
    page = (ct["out"] / "report.html").read_text()
    assert "Hounsfield units" in page
    assert "Nodule crops" in page


def test_nodule_crops_and_their_masks_are_compared(ct: dict[str, Any]) -> None:
    entry = between(ct["content"], "synthetic", "real_train")
    assert entry["metrics"]["nodule_frechet_classifier"]["n"] == [12, 12]
    assert entry["metrics"]["nodule_frechet_classifier"]["warnings"]
    assert set(entry["masks"]) == {"nodule_benign", "nodule_indeterminate", "nodule_malignant"}
    assert ct["content"]["sets"]["synthetic"]["nodules"]["n"] == 12


def test_a_label_that_no_mask_has_is_named_once_and_not_compared(ct: dict[str, Any]) -> None:
    content = copy.deepcopy(ct["content"])
    page = (ct["out"] / "report.html").read_text()
    absent = absent_labels(content)
    for name, masks in content["sets"]["synthetic"]["masks"].items():
        in_none = not any(s["masks"][name]["area"]["mean"] for s in content["sets"].values() if s.get("masks"))
        assert in_none == (name in absent) == (f"Objects of the masks: {name.replace('_', ' ')}" not in page), masks
    for s in content["sets"].values():
        s.get("masks", {}).get("nodule_malignant", {}).get("area", {})["mean"] = 0.0
    lines = console_lines(content)
    assert not any(line.strip().startswith("nodule_malignant: ") for line in lines)
    assert any(line.startswith("in no mask: ") and "nodule_malignant" in line for line in lines)


def test_images_of_the_same_maps_are_compared_in_pairs(ct: dict[str, Any]) -> None:
    paired = ct["content"]["paired"]
    assert (paired["n"], paired["num_synthetic"]) == (12, 12)
    assert paired["metrics"]["hu_error"]["value"] == pytest.approx(50, abs=3)
    unpaired = between(ct["content"], "synthetic", "real_train")["metrics"]["ssim"]["value"]
    assert paired["metrics"]["ssim"]["value"] > unpaired
    assert paired["metrics"]["ssim"]["sd"] > 0


def test_images_of_another_map_are_no_pair(ct: dict[str, Any], tiny_dataset: Path, tmp_path: Path) -> None:
    made = Path(ct["folders"]["synthetic"])
    other = tmp_path / made.name
    shutil.copytree(made, other)
    for path in sorted((other / "labelsTr").iterdir())[:9]:
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine), path)
    content = run(tmp_path / "o", real=str(tiny_dataset), synthetic=str(other))
    assert content["paired"]["n"] == 3


def write_plain(folder: Path, num: int, first: int = 0, size: int = 32) -> Path:
    folder.mkdir(parents=True)
    for i in range(num):
        rng = np.random.default_rng(first + i)
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size)).save(folder / f"{first + i:03d}.png")
    return folder


def test_plain_folders_are_compared_without_a_dataset(tmp_path: Path) -> None:
    content = run(
        tmp_path / "o",
        real=str(write_plain(tmp_path / "a", 10)),
        synthetic=str(write_plain(tmp_path / "b", 8, 50)),
        extractor=str(write_classifier(tmp_path / "c.pt", channels=3, size=32)),
    )
    metrics = between(content, "synthetic", "real_train")["metrics"]
    assert metrics["frechet_classifier"]["n"] == [8, 10]
    assert metrics["ssim"]["value"] is not None
    assert any("no splits" in w for w in content["warnings"])
    assert content["paired"] is None


def test_equal_file_names_of_plain_folders_make_no_pair_unless_sampling_gave_them(tmp_path: Path) -> None:
    real, made = write_plain(tmp_path / "a", 6), write_plain(tmp_path / "b", 6)
    shutil.rmtree(made)
    made.mkdir()
    for i in range(6):
        name = f"{i:03d}_s000007.png" if i < 2 else f"{i:03d}.png"
        Image.fromarray(np.random.default_rng(90 + i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(made / name)
    assert run(tmp_path / "o", real=str(real), synthetic=str(made))["paired"]["n"] == 2


def test_copies_among_the_synthetic_images_are_said(tmp_path: Path) -> None:
    real = write_plain(tmp_path / "a", 6)
    made = write_plain(tmp_path / "b", 4, 50)
    shutil.copy(real / "000.png", made / "copy.png")
    content = run(tmp_path / "o", real=str(real), synthetic=str(made))
    assert any("1 of 5 synthetic images are equal to a real one" in w for w in content["warnings"])


def refused(tmp_path: Path, match: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=match):
        run(tmp_path / "o", **settings)
    assert not (tmp_path / "o" / "fidelity.json").exists()


def test_bad_folders_are_refused(tmp_path: Path, tiny_dataset: Path) -> None:
    real = str(write_plain(tmp_path / "a", 4))
    refused(tmp_path, "same folder", real=real, synthetic=real)
    one = str(write_plain(tmp_path / "one", 1))
    refused(tmp_path, "1 image", real=real, synthetic=one)
    refused(tmp_path, "1 image", real=one, synthetic=real)
    mixed = write_plain(tmp_path / "mixed", 3)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(mixed / "small.png")
    refused(tmp_path, "2 sizes", real=real, synthetic=str(mixed))
    grey = write_plain(tmp_path / "grey", 3)
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(grey / "x.png")
    refused(tmp_path, "one mode", real=real, synthetic=str(grey))
    refused(tmp_path, "--real has grey images", real=str(tiny_dataset), synthetic=real)
    wide = tmp_path / "wide"
    wide.mkdir()
    for i in range(3):
        Image.fromarray(np.full((32, 48, 3), i, np.uint8)).save(wide / f"{i}.png")
    refused(tmp_path, "would stretch them", real=real, synthetic=str(wide))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tmp_path, "holds no image", real=real, synthetic=str(empty))


def test_images_with_nan_are_refused(tmp_path: Path, tiny_dataset: Path) -> None:
    made = write_ct(tmp_path / "raw", tiny_dataset, num=3)
    path = sorted((made / "imagesTr").iterdir())[1]
    values = np.asarray(nib.load(path).dataobj).astype(np.float32)
    values[3, 3] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)
    refused(tmp_path, "NaN", real=str(tiny_dataset), synthetic=str(made))


def test_ct_is_not_compared_with_pictures(tmp_path: Path, tiny_dataset: Path) -> None:
    grey = tmp_path / "grey"
    grey.mkdir()
    for i in range(3):
        Image.fromarray(np.full((64, 64), 9 * i, np.uint8)).save(grey / f"{i}.png")
    refused(tmp_path, "holds CT in HU", real=str(tiny_dataset), synthetic=str(grey))


def test_lpips_and_the_record_in_mlflow(tmp_path: Path, pairs: dict[str, Any]) -> None:
    models = pytest.importorskip("torchvision.models")
    pytest.importorskip("lpips")
    from mlflow.tracking import MlflowClient

    torch.manual_seed(0)
    state = models.alexnet(weights=None).features.state_dict()
    torch.save({f"features.{k}": v for k, v in state.items()}, tmp_path / "alexnet.pth")
    folders = {k: pairs["folders"][k] for k in ("real", "synthetic")}
    lpips = {"lpips": str(tmp_path / "alexnet.pth"), "allow_unknown_weights": True}
    content = run(tmp_path / "o", **folders, **lpips, mlflow=str(tmp_path / "records"))
    number = between(content, "synthetic", "real_test")["metrics"]["lpips"]
    assert number["value"] > 0
    assert number["sd"] > 0
    assert any("LPIPS trunk of unknown origin" in w for w in content["warnings"])
    client = MlflowClient(f"sqlite:///{tmp_path}/records/mlruns.db")
    found = client.search_runs([client.get_experiment_by_name("fidelity").experiment_id])[0]
    assert found.data.metrics["synthetic to real_test.lpips"] == number["value"]
    assert {f.path for f in client.list_artifacts(found.info.run_id)} == {"report.html", "fidelity.json"}


def test_real_polyps_against_real_polyps_cannot_be_told_apart(test_data: Path, tmp_path: Path) -> None:
    source = test_data / "kvasir_seg" / "train"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    names = sorted(p.name for p in (source / "images").iterdir())[:60]
    for half in (0, 1):
        for name in names[half::2]:
            target = tmp_path / str(half) / name.replace(".jpg", ".png")
            target.parent.mkdir(exist_ok=True)
            with Image.open(source / "images" / name) as picture:
                picture.convert("RGB").resize((64, 64)).save(target)
    extractor = str(write_classifier(tmp_path / "c.pt", channels=3, size=64))
    content = run(tmp_path / "o", real=str(tmp_path / "0"), synthetic=str(tmp_path / "1"), extractor=extractor)
    kernel = between(content, "synthetic", "real_train")["metrics"]["kernel_classifier"]
    assert kernel["ci"][0] < 0 < kernel["ci"][1] or kernel["value"] < 0
    assert content["answers"][0]["tone"] == "good"

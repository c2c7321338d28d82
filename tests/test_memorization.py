# SPDX-License-Identifier: Apache-2.0
"""The memorization audit: planted copies are found whatever was done to them, fresh images and real ones are not."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from fidelity_files import FakeInception, publish, write_classifier
from memorization_toy import copied, patient, save, write_sets
from PIL import Image

from monai_synth import cli
from monai_synth.data.phantom import phantom_patient
from monai_synth.errors import UserError
from monai_synth.evaluate import memorization as audit
from monai_synth.evaluate.case_sets import read_case_set
from monai_synth.evaluate.memorization import Settings, evaluate_memorization
from monai_synth.export.nnunet import NNUNetRawWriter


def run(root: Path, out: str = "out", **given) -> dict:
    folders = {"train": f"{root}/train", "heldout": f"{root}/held", "synthetic": f"{root}/synthetic"}
    settings = Settings(**{**folders, "out": f"{root}/{out}", "workers": 1, **given})
    return evaluate_memorization(settings, report=lambda text: None)


def flagged(content: dict) -> set[str]:
    return {row["synthetic_id"] for row in content["cases"] if row["verdict"] == "near copy"}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    root = tmp_path_factory.mktemp("sets")
    return root, write_sets(root, train=60, held=40, fresh=40, copies=10)


@pytest.fixture(scope="module")
def content(sets: tuple[Path, dict[str, int]]) -> dict:
    return run(sets[0])


def test_every_kind_of_copy_is_found_with_its_source_and_nothing_else(sets, content: dict) -> None:
    planted = sets[1]
    assert flagged(content) == set(planted)
    rows = {row["synthetic_id"]: row for row in content["cases"]}
    assert {key: rows[key]["nearest_id"] for key in planted} == {k: f"t{s:05d}" for k, s in planted.items()}
    assert content["near_copies"]["value"] == 10 / 50
    low, high = content["near_copies"]["ci"]
    assert low < 0.2 < high
    assert content["identical"]["count"] == 1


def test_no_held_out_image_is_called_a_copy(content: dict) -> None:
    assert [score["held_out_above"] for score in content["scores"].values()] == [0, 0]


def test_what_the_held_out_set_cannot_support_is_said(content: dict) -> None:
    assert any("40 held-out patients support a level of 2.4% by counting" in text for text in content["warnings"])
    assert content["scores"]["ssim"]["supported_level"] == pytest.approx(1 / 41)


@pytest.mark.slow
def test_of_five_percent_copies_99_percent_are_found_without_a_false_alarm(tmp_path: Path) -> None:
    planted = write_sets(tmp_path, train=1200, held=600, fresh=1900, copies=100)
    content = run(tmp_path, workers=2)
    found = flagged(content)
    assert len(found & set(planted)) >= 99
    assert not found - set(planted)
    assert all(score["held_out_above"] == 0 for score in content["scores"].values())
    # and held-out images, audited as if they were synthetic, raise no alarm
    (tmp_path / "held").rename(tmp_path / "all_held")
    for i, path in enumerate(sorted((tmp_path / "all_held").iterdir())):
        save(tmp_path / ("held" if i % 2 else "other") / path.name, np.asarray(Image.open(path))[None])
    assert not flagged(run(tmp_path, "out2", synthetic=f"{tmp_path}/other"))


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (64, 3), (100, 1)])
def test_other_sizes_and_colours_work(tmp_path: Path, size: int, channels: int) -> None:
    write_sets(tmp_path, train=40, held=25, fresh=10, copies=0, size=size, channels=channels)
    for i, kind in enumerate(("exact", "both", "gamma", "shifted", "inverse contrast range")):
        save(tmp_path / "synthetic" / f"z{i}.png", copied(patient(i, size, channels), kind, i))
    assert flagged(run(tmp_path)) == {f"z{i}" for i in range(5)}


def test_an_image_that_is_not_square_is_compared_in_the_four_poses_that_keep_its_shape(tmp_path: Path) -> None:
    for name, first, num in (("train", 0, 40), ("held", 500, 25), ("synthetic", 900, 8)):
        for i in range(num):
            save(tmp_path / name / f"{name}{i}.png", patient(first + i, 96)[:, :64])
    save(tmp_path / "synthetic" / "z.png", patient(7, 96)[:, :64][:, ::-1, ::-1])
    content = run(tmp_path)
    assert flagged(content) == {"z"}
    assert {row["pose"] for row in content["cases"]} <= {0, 2, 4, 6}


@pytest.fixture(scope="module")
def scans() -> list[np.ndarray]:
    """Phantom CT of 20 patients: 8-bit slices (1, 64, 64), 2.5 mm apart."""
    found = [phantom_patient(0, i, num_slices=6, matrix=64).image_hu.astype(float) for i in range(1, 21)]
    return [((hu + 1024) / 1824 * 255).clip(0, 255).astype(np.uint8)[:, None] for hu in found]


def save_slices(folder: Path, scans: list[np.ndarray], patients: range, slices: range) -> None:
    for i in patients:
        for z in slices:
            save(folder / f"p{i:02d}-z{z}.png", scans[i][z])


@pytest.mark.parametrize("num_held", [2, 4, 8])
def test_of_few_held_out_patients_no_fresh_slice_is_removed_and_a_copy_still_is(
    scans: list[np.ndarray], tmp_path: Path, num_held: int
) -> None:
    save_slices(tmp_path / "train", scans, range(6), range(6))
    save_slices(tmp_path / "held", scans, range(6, 6 + num_held), range(3, 4))
    save_slices(tmp_path / "synthetic", scans, range(14, 20), range(6))
    save(tmp_path / "synthetic" / "exact.png", scans[2][4])
    save(tmp_path / "synthetic" / "mirrored.png", scans[3][2][..., ::-1])
    content = run(tmp_path, remove=f"{tmp_path}/clean")
    assert flagged(content) == {"exact", "mirrored"}
    left = {path.name for path in (tmp_path / "clean").glob("*.png")}
    assert left == {path.name for path in (tmp_path / "synthetic").iterdir()} - {"exact.png", "mirrored.png"}
    assert f"{num_held} held-out patients are too few" in content["warnings"][0]
    assert f"{num_held} held-out patients are too few" in (tmp_path / "out" / "report.html").read_text()
    assert all(row["tail_p_value"] is None for row in content["cases"])
    assert "p by" not in (tmp_path / "out" / "report.html").read_text()  # a mark decides, not a chance
    assert not any("almost as close" in text for text in content["warnings"])


def test_held_out_slices_beside_training_slices_are_told(scans: list[np.ndarray], tmp_path: Path) -> None:
    save_slices(tmp_path / "train", scans, range(14), range(0, 6, 2))
    save_slices(tmp_path / "held", scans, range(14), range(1, 6, 2))
    save_slices(tmp_path / "synthetic", scans, range(14, 20), range(6))
    content = run(tmp_path)
    assert any("almost as close to training images as copies are" in text for text in content["warnings"])
    assert not flagged(content)


def test_held_out_crops_of_training_images_are_told_and_an_exact_copy_is_found_all_the_same(tmp_path: Path) -> None:
    for i in range(30):
        large = patient(i, 72)
        save(tmp_path / "train" / f"{i}.png", large[:, 3:67, 3:67])
        save(tmp_path / "held" / f"{i}.png", large[:, 4:68, 2:66])
        save(tmp_path / "synthetic" / f"f{i}.png", patient(100 + i, 64))
    save(tmp_path / "synthetic" / "exact.png", patient(7, 72)[:, 3:67, 3:67])
    content = run(tmp_path)
    assert any("almost as close to training images as copies are" in text for text in content["warnings"])
    assert flagged(content) == {"exact"}


def test_ordinary_sets_are_not_called_close(content: dict) -> None:
    assert not any("almost as close" in text for text in content["warnings"])


def test_features_of_a_classifier_and_of_inception_are_compared_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sets(tmp_path, train=30, held=25, fresh=10, copies=0)
    save(tmp_path / "synthetic" / "exact.png", patient(4))
    classifier, weights = write_classifier(tmp_path / "classifier.pt", size=64), tmp_path / "inception.pt"
    torch.jit.script(FakeInception()).save(str(weights))
    with pytest.raises(UserError, match="--allow-unknown-weights"):
        run(tmp_path, extractor=str(classifier), inception=str(weights))
    content = run(tmp_path, extractor=str(classifier), inception=str(weights), allow_unknown_weights=True)
    assert list(content["scores"]) == ["features", "ssim", "inception", "extractor"]
    titles = [content["scores"][key]["title"] for key in ("inception", "extractor")]
    assert titles == [
        "resemblance of features of the Inception-v3 network, weights of unknown origin",
        "resemblance of features of the classifier (resnet18)",
    ]
    assert content["extractors"]["extractor"]["weights_sha256"] == hashlib.sha256(classifier.read_bytes()).hexdigest()
    assert {content["extractors"]["inception"]["num_features"], content["extractors"]["extractor"]["num_features"]} == {
        2048, 512,
    }  # fmt: skip
    assert "resnet18" in content["recipe"]["extractor"]
    assert flagged(content) == {"exact"}
    (exact,) = (row for row in content["cases"] if row["synthetic_id"] == "exact")
    for key in ("inception", "extractor"):
        assert exact[f"{key}_nearest_id"] == "t00004"
        assert exact[key] == pytest.approx(1, abs=1e-5)
        assert exact[f"{key}_distance"] == pytest.approx(0, abs=1e-3)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(title in page for title in titles)
    publish(monkeypatch, weights)
    known = run(tmp_path, "known", inception=str(weights))
    assert known["scores"]["inception"]["title"] == "resemblance of features of the Inception-v3 network"


def test_a_classifier_of_grey_images_is_refused_for_rgb(tmp_path: Path) -> None:
    write_sets(tmp_path, train=3, held=3, fresh=3, copies=0, channels=3)
    with pytest.raises(UserError, match="takes grey images, these are RGB"):
        run(tmp_path, extractor=str(write_classifier(tmp_path / "c.pt")))


def test_flat_images_that_are_all_equal_but_for_their_grey_are_audited_without_a_number_that_is_none(
    tmp_path: Path,
) -> None:
    for name, greys in (("train", (10, 20)), ("held", (30, 40)), ("synthetic", (50, 60, 70))):
        for grey in greys:
            save(tmp_path / name / f"{name}{grey}.png", np.full((1, 32, 32), grey, np.uint8))
    content = run(tmp_path, show_real=True)
    assert not flagged(content)
    assert "nan" not in (tmp_path / "out" / "report.html").read_text().split("<img")[0]
    assert content["membership"]["value"] == 0.5


def test_a_null_full_of_near_duplicates_raises_the_bar_and_is_told(tmp_path: Path) -> None:
    write_sets(tmp_path, train=50, held=50, fresh=20, copies=0)
    for i in range(3):  # the same scan again, as slices of one patient or frames of one video are
        save(tmp_path / "held" / f"again{i}.png", copied(patient(i), "noised", i))
    save(tmp_path / "synthetic" / "noised.png", copied(patient(9), "noised", 50))
    save(tmp_path / "synthetic" / "exact.png", patient(10))
    content = run(tmp_path)
    assert "exact" in flagged(content)
    assert any("resemble a training image as closely as copies do" in text for text in content["warnings"])


def test_membership_is_at_chance_for_fresh_images_and_above_it_for_copies(tmp_path: Path) -> None:
    write_sets(tmp_path, train=60, held=60, fresh=60, copies=0)
    fresh = run(tmp_path)["membership"]
    assert fresh["ci"][0] < 0.5 < fresh["ci"][1]
    for i in range(60):
        save(tmp_path / "synthetic" / f"z{i}.png", copied(patient(i), "both", i))
    leak = run(tmp_path, "out2")["membership"]
    assert leak["value"] > 0.99
    assert leak["n"] == [60, 60]


def test_the_page_shows_no_image_of_a_patient_unless_asked(sets, content: dict) -> None:
    root = sets[0]
    page = (root / "out" / "report.html").read_text()
    assert page.count("<img") == 1  # the histograms
    assert "--show-real" in page
    run(root, "shown", show_real=True, num_pictures=3)
    shown = (root / "shown" / "report.html").read_text()
    assert shown.count("<img") == 1 + 2 * 3
    assert "http" not in re.sub(r"xmlns='[^']*'", "", shown)
    first = re.findall(r"alt='training' src='data:image/png;base64,([^']*)'", shown)[0]
    assert base64.b64decode(first).startswith(b"\x89PNG")


def test_list_and_json_say_the_same(sets, content: dict) -> None:
    out = sets[0] / "out"
    assert json.loads((out / "memorization.json").read_text()) == json.loads(json.dumps(content))
    with open(out / "memorization.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["synthetic_id"] for row in rows] == [row["synthetic_id"] for row in content["cases"]]
    assert {row["synthetic_id"] for row in rows if row["verdict"] == "near copy"} == flagged(content)
    assert all(0 < float(row["p_value"]) <= 1 for row in rows)
    for key in ("near_copies", "identical", "membership"):
        assert {"value", "n", "ci"} <= set(content[key])


def test_equal_seeds_give_equal_bytes_and_the_cache_changes_nothing(sets, content: dict) -> None:
    root = sets[0]
    for out, cache in (("again", None), ("cached", f"{root}/cache"), ("cached again", f"{root}/cache")):
        run(root, out, cache=cache)
        for name in ("memorization.json", "memorization.csv", "report.html"):
            assert (root / out / name).read_bytes() == (root / "out" / name).read_bytes(), (out, name)


def test_a_report_is_replaced_only_when_asked_and_a_folder_of_others_never(sets, content: dict) -> None:
    root = sets[0]
    with pytest.raises(UserError, match=r"holds a report; name another folder, or replace it with --overwrite"):
        run(root)
    assert run(root, overwrite=True)["near_copies"] == content["near_copies"]
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"'thesis.txt', which is no part"):
        run(root, "mine", overwrite=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"synthetic": "train"}, "--train and --synthetic are both"),
        ({"heldout": "train"}, "--train and --heldout are both .* leave --heldout out"),
        ({"heldout": "synthetic"}, "--synthetic and --heldout are both"),
        ({"heldout": "none"}, "--heldout .* is not a folder"),
        ({"heldout": None}, "has no splits, so --heldout is needed"),
        ({"heldout": "larger"}, r"different sizes \(--train 64 x 64, --heldout 80 x 80.*--size"),
        ({"heldout": "colour"}, "--heldout has RGB images, --synthetic grey ones"),
        ({"heldout": "one"}, r"1 image\(s\), needed are 2"),
        ({"heldout": "nan"}, "no numbers"),
        ({"synthetic": "same"}, "training and the synthetic images are the same, pixel by pixel"),
        ({"level": 0.0}, "--level is 0.0"),
        ({"level": 0.5}, "--level is 0.5"),
        ({"exact": 20}, "--exact is 20"),
        ({"max_heldout": 1}, "--max-heldout is 1"),
        ({"size": (8,)}, "too small"),
    ],
)
def test_what_cannot_be_audited_is_one_clear_message(sets, tmp_path: Path, given: dict, message: str) -> None:
    root = sets[0]
    for i in range(2):
        save(tmp_path / "larger" / f"{i}.png", patient(i, 80))
        save(tmp_path / "colour" / f"{i}.png", patient(i, 64, 3))
        (tmp_path / "nan").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(np.full((64, 64), np.nan, np.float32), np.eye(4)), tmp_path / "nan" / f"{i}.nii.gz")
    save(tmp_path / "one" / "a.png", patient(0))
    for i in range(60):
        save(tmp_path / "same" / f"{i}.png", patient(i))
    for name, value in given.items():
        if name in ("train", "heldout", "synthetic") and value is not None:
            given = {**given, name: str(root / value if (root / value).is_dir() else tmp_path / value)}
    with pytest.raises(UserError, match=message):
        run(root, "bad", **given)
    assert not (root / "bad").exists()


def test_one_size_can_be_asked_for(sets, tmp_path: Path) -> None:
    root = sets[0]
    for i in range(25):
        save(tmp_path / "larger" / f"{i}.png", patient(100_000 + i, 80))
    content = run(root, "sized", heldout=f"{tmp_path}/larger", size=(64,))
    assert content["near_copies"]["count"] >= 8
    assert "resized to 64 x 64" in content["recipe"]["images"]


def prepared(root: Path, patients: dict[str, list[tuple[str, int]]]) -> Path:
    """A prepared dataset of classes: split -> (patient, number of image)."""
    entries = {split: [] for split in ("training", "validation", "test")}
    for split, cases in patients.items():
        for name, number in cases:
            path = save(root / "images" / f"c{number:05d}.png", patient(number))
            case = {"image": f"images/{path.name}", "class": 0, "case_id": path.stem, "patient_id": name}
            entries[split].append(case)
    head = {"name": "P", "task": "classes", "modality": "XR", "image_channels": 1, "spatial_shape": [64, 64],
            "intensity": {"unit": "grey value"}, "classes": {"a": 0}}  # fmt: skip
    (root / "dataset.json").write_text(json.dumps({**head, **entries}))
    return root


def test_without_heldout_the_test_split_is_taken_and_said(sets, tmp_path: Path) -> None:
    train = [(f"p{i}", i) for i in range(60)]
    data = prepared(tmp_path / "data", {"training": train, "test": [(f"q{i}", 100_000 + i) for i in range(30)]})
    content = run(sets[0], "split", train=str(data), heldout=None)
    assert flagged(content) == set(sets[1])
    assert any("the test split of --train is taken (30 images)" in text for text in content["warnings"])


def test_patients_of_the_training_set_are_no_null(sets, tmp_path: Path) -> None:
    train = [(f"p{i}", i) for i in range(60)]
    test = [(f"q{i}", 100_000 + i) for i in range(30)] + [("p3", 300_000), ("p4", 300_001)]
    data = prepared(tmp_path / "data", {"training": train, "test": test})
    content = run(sets[0], "patients", train=str(data), heldout=None)
    assert any("2 held-out images of 2 patients who are in training too" in text for text in content["warnings"])
    assert content["sets"]["held_out"]["n"] == 30
    data = prepared(tmp_path / "one", {"training": train, "test": [(f"p{i}", 300_000 + i) for i in range(5)]})
    with pytest.raises(UserError, match="5 of 5 held-out images are of patients who are in training too"):
        run(sets[0], "none", train=str(data), heldout=None)


def test_the_command_reaches_the_audit_and_prints_its_answer(sets, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sets[0]
    options = ["--train", f"{root}/train", "--heldout", f"{root}/held", "--synthetic", f"{root}/synthetic"]
    assert cli.main(["evaluate", "memorization", *options, "--out", f"{root}/cli", "--workers", "1"]) == 0
    assert "near copies of training images: 10 of 50" in capsys.readouterr().out
    assert cli.main(["evaluate", "memorization", *options, "--out", f"{root}/cli"]) == 2
    assert capsys.readouterr().err.startswith("monai-synth: error: --out")
    calls = []
    monkeypatch.setattr(audit, "evaluate_memorization", lambda settings, report: calls.append(settings))
    cli.main(["evaluate", "memorization", *options, "--out", "o"])
    assert calls == [Settings(train=options[1], heldout=options[3], synthetic=options[5], out="o")]


def raw_pairs(root: Path, cases: list[tuple[np.ndarray, np.ndarray]], number: int) -> Path:
    labels = {"background": 0, "cell": 1}
    writer = NNUNetRawWriter(root, dataset_id=number, name="M", channel_names=["L"], labels=labels)
    for i, (image, mask) in enumerate(cases):
        writer.add(f"c{i:03d}", image[0], mask)
    return writer.finish()


def test_masks_are_compared_by_themselves_and_removal_leaves_the_rest_of_the_pairs(tmp_path: Path) -> None:
    def pair(i: int, j: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        return patient(i), (patient(i if j is None else j)[0] > 128).astype(np.uint8)

    train = raw_pairs(tmp_path / "a", [pair(i) for i in range(40)], 1)
    held = raw_pairs(tmp_path / "b", [pair(1000 + i) for i in range(25)], 2)
    fresh = [pair(2000 + i) for i in range(10)]
    both = tuple(x[..., ::-1].copy() for x in pair(3))
    mask_only = (patient(3000), np.rot90(pair(4)[1]).copy())
    synthetic = raw_pairs(tmp_path / "c", [*fresh, both, mask_only], 3)
    content = run(tmp_path, train=str(train), heldout=str(held), synthetic=str(synthetic), remove=f"{tmp_path}/clean")
    assert flagged(content) == {"c010"}
    assert {r["synthetic_id"] for r in content["cases"] if r["mask_verdict"] == "near copy"} == {"c010", "c011"}
    rows = {row["synthetic_id"]: row for row in content["cases"]}
    assert rows["c011"]["mask_nearest_id"] == "c004"
    assert rows["c011"]["mask_mi_share"] == 1.0
    left = read_case_set(tmp_path / "clean" / "Dataset003_M", option="--synthetic")
    assert [case.case_id for case in left.cases] == [f"c{i:03d}" for i in range(12) if i != 10]
    assert all(path.is_file() for path in synthetic.glob("*/c010*"))

# SPDX-License-Identifier: Apache-2.0
"""Sampled pairs as nnU-Net raw datasets: what nnU-Net accepts, refusals that are counted and replaced, resuming."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.engines import SupervisedEvaluator
from PIL import Image
from torch.utils.data import DataLoader

from monai_synth.data.joint import to_joint
from monai_synth.errors import UserError
from monai_synth.export.pairs import PairExport, check_filters, num_samples_for, refusal, sample_pairs
from monai_synth.export.provenance import read_provenance
from monai_synth.inference.pairs import (
    SEEDS_PER_ATTEMPT,
    PairSamplingDataset,
    PairSamplingPrepareBatch,
    collate_pairs,
)
from monai_synth.inference.sampler import make_generators

LABELS = {"background": 0, "nucleus": 1}
FLAVOURS: dict[str, dict[str, Any]] = {
    "rgb": {"image_channels": 3, "channel_names": ["R", "G", "B"]},
    "grey": {"image_channels": 1, "channel_names": ["L"]},
    "ct_png": {"image_channels": 1, "channel_names": ["CT"]},
    "labels": {"image_channels": 1, "channel_names": ["L"], "labels": LABELS | {"gland": 2, "vessel": 3}},
    "volume": {"image_channels": 1, "channel_names": ["MRI"], "file_ending": ".nii.gz"},
    "channels": {"image_channels": 2, "channel_names": ["T1", "T2"], "file_ending": ".nii.gz"},
}


class SeededPairs:
    """Stands in for the joint inferer: pairs that depend on the seed only; masks of some seeds are empty or full."""

    def __init__(self, labels: int, channels: int, value_range: Sequence[float], empty=(), full=(), fail_at=None):
        self.labels, self.channels, self.value_range = labels, channels, value_range
        self.empty, self.full, self.fail_at = set(empty), set(full), fail_at
        self.made = 0

    def __call__(self, known: torch.Tensor, network, *, is_known, seeds: Sequence[int]) -> dict[str, Any]:
        if self.fail_at is not None and self.made >= self.fail_at:
            raise KeyboardInterrupt
        self.made += len(seeds)
        rows = [self._pair(seed, known.shape[2:]) for seed in seeds]
        image, label = (torch.stack(part) for part in zip(*rows, strict=True))
        x_0 = to_joint(image, label, self.labels, self.value_range)
        if is_known is not None:
            x_0 = torch.where(is_known, known, x_0)
        low, high = self.value_range
        soft = torch.where(x_0 == high, low + 0.8 * (high - low), x_0)  # an ensemble's mean, not all members agree
        return {
            "x_0": torch.cat([x_0[:, : self.channels], soft[:, self.channels :]], 1),
            "std": torch.full_like(x_0, 0.1),
        }

    def _pair(self, seed: int, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        (rng,) = make_generators([seed])
        image = torch.randint(0, 256, (self.channels, *size), dtype=torch.uint8, generator=rng)
        label = torch.randint(0, self.labels, tuple(size), generator=rng)
        label[(0,) * len(size)], label[(-1,) * len(size)] = 0, 1
        return image, torch.zeros_like(label) if seed in self.empty else torch.ones_like(
            label
        ) if seed in self.full else label


class Run:
    """Dataset, inferer and export as the bundle's config joins them."""

    def __init__(
        self, folder: Path, flavour: str = "grey", *, num_samples: int = 6, batch_size: int = 4,
        value_range=(0, 1), inferer: dict | None = None, sampling: dict | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.form = {"labels": LABELS, "file_ending": ".png"} | FLAVOURS[flavour]
        record = {
            "checkpoints": {"model.pt": "0" * 64}, "sampler": "dpm++", "num_steps": 2, "precision": "float32",
            "settings": {},
        }  # fmt: skip
        self.export = PairExport(
            folder, dataset_id=10, dataset_name="JDM", value_range=value_range, record=record, **(self.form | options)
        )
        size = (8, 6) if self.form["file_ending"] == ".png" else (8, 6, 4)
        self.dataset = PairSamplingDataset(
            **{"condition": options.get("condition"), "dataset_dir": "", "split": "test", "num_samples": num_samples,
               "seed": 5, "image_size": size, "image_channels": self.form["image_channels"],
               "labels": self.form["labels"], "value_range": value_range, "is_done": self.export.is_done}
            | (sampling or {})
        )  # fmt: skip
        self.inferer = SeededPairs(
            len(self.form["labels"]), self.form["image_channels"], value_range, **(inferer or {})
        )
        self.evaluator = SupervisedEvaluator(
            device=torch.device("cpu"),
            val_data_loader=DataLoader(self.dataset, batch_size=batch_size, collate_fn=collate_pairs),
            network=torch.nn.Identity(),
            inferer=self.inferer,
            prepare_batch=PairSamplingPrepareBatch(),
            val_handlers=[self.export],
            decollate=False,
        )

    def __call__(self) -> Path:
        sample_pairs(self.dataset, self.evaluator, self.export)
        return self.export.finish()


def content(folder: Path) -> dict[str, Any]:
    """Files and their bytes; the order of provenance lines, in which pairs are finished, does not count."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {k: sorted(v.splitlines()) if k.endswith(".jsonl") else v for k, v in files.items()}


# ------------------------------------------------------------------ nnU-Net as the judge


class _InProcess:
    """nnU-Net's checks in this process instead of a freshly spawned one."""

    class Pool:
        def __init__(self, processes: int) -> None: ...
        def __enter__(self) -> _InProcess.Pool:
            return self

        def __exit__(self, *exc: object) -> None: ...
        def starmap(self, function: Any, arguments: Any) -> list[object]:
            return [function(*given) for given in arguments]


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """nnU-Net's own check of a dataset folder; fails where it says a word of warning."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    module = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: _InProcess)

    def check(folder: Path) -> None:
        module.verify_dataset_integrity(str(folder), num_processes=1)
        said = capfd.readouterr().out
        assert "most likely OK" in said
        assert "Warning" not in said

    return check


@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_nnunet_accepts_every_form_and_its_ratio_subsets(tmp_path: Path, flavour: str, verify) -> None:
    path = Run(tmp_path, flavour, ratios=[50, 100], num_real=4)()
    verify(path)
    for part in ("Dataset011_JDM_50pct", "Dataset012_JDM_100pct"):
        verify(tmp_path / part)


def test_nnunet_reads_back_the_channels_and_labels_that_were_sampled(tmp_path: Path) -> None:
    registry = pytest.importorskip("nnunetv2.imageio.reader_writer_registry")
    for flavour in ("rgb", "labels", "channels"):
        run = Run(tmp_path / flavour, flavour)
        path = run()
        reader = registry.recursive_find_reader_writer_by_name(
            json.loads((path / "dataset.json").read_text())["overwrite_image_reader_writer"]
        )()
        size = run.dataset.image_size
        image, label = run.inferer._pair(5, size)
        ending = run.form["file_ending"]
        files = sorted(map(str, (path / "imagesTr").glob("jdm_000005_*")))
        read, _ = reader.read_images(files)
        seg, _ = reader.read_seg(str(path / "labelsTr" / f"jdm_000005{ending}"))
        if ending == ".png":
            np.testing.assert_array_equal(read[:, 0], image)
            np.testing.assert_array_equal(seg[0, 0], label)
        else:  # SimpleITK's arrays are (Z, Y, X)
            np.testing.assert_array_equal(read, image.numpy().transpose(0, 3, 2, 1))
            np.testing.assert_array_equal(seg[0], label.numpy().transpose(2, 1, 0))


# ------------------------------------------------------------------ refusals


def test_a_case_that_lacks_a_channel_is_made_again_and_dropped_by_finish(tmp_path: Path) -> None:
    run = Run(tmp_path, "channels", num_samples=3)
    path = run()
    whole = content(path)
    run.export.writer.image_path("jdm_000006", 1).unlink()
    assert run.export.writer.cases() == ["jdm_000005", "jdm_000007"]
    again = Run(tmp_path, "channels", num_samples=3)
    assert [item["case_id"] for item in again.dataset.data] == ["jdm_000006"]
    again()
    assert content(path) == whole
    run.export.writer.image_path("jdm_000006", 1).unlink()
    run.export.writer.finish()
    assert not run.export.writer.image_path("jdm_000006").exists()
    assert json.loads((path / "dataset.json").read_text())["numTraining"] == 2


def test_refused_pairs_are_replaced_counted_and_declared(tmp_path: Path) -> None:
    again = 6 + SEEDS_PER_ATTEMPT
    run = Run(tmp_path, inferer={"empty": [6, again], "full": [9]})
    path = run()
    lines = {line["case_id"]: line for line in read_provenance(path / "provenance.jsonl")}
    assert sorted(lines) == [f"jdm_{seed:06d}" for seed in range(5, 11)]
    assert [lines[c]["seed"] for c in sorted(lines)] == [5, again + SEEDS_PER_ATTEMPT, 7, 8, 9 + SEEDS_PER_ATTEMPT, 10]
    assert lines["jdm_000006"]["filters"]["refused"] == [
        {"seed": 6, "reason": "empty"}, {"seed": again, "reason": "empty"}
    ]  # fmt: skip
    label = np.asarray(Image.open(path / "labelsTr" / "jdm_000006.png"))
    np.testing.assert_array_equal(label, run.inferer._pair(lines["jdm_000006"]["seed"], (8, 6))[1])
    assert lines["jdm_000006"]["filters"]["foreground"] == {
        "share": label.mean(), "kept": True, "min_foreground": 0.0, "max_foreground": 1.0
    }  # fmt: skip
    assert json.loads((path / "filters.json").read_text()) == {
        "filters": {"min_foreground": 0.0, "max_foreground": 1.0}, "num_kept": 6, "num_refused": 3, "num_sampled": 9,
        "refusal_rate": 3 / 9, "reasons": {"empty": 2, "full": 1},
    }  # fmt: skip
    assert json.loads((path / "export.json").read_text())["settings"]["filters"]["min_foreground"] == 0.0
    assert run.inferer.made == 9


def test_pairs_outside_the_given_shares_are_replaced(tmp_path: Path) -> None:
    path = Run(tmp_path, num_samples=12, filters={"min_foreground": 0.45, "max_foreground": 0.55}, max_attempts=50)()
    shares = [np.asarray(Image.open(p)).mean() for p in (path / "labelsTr").iterdir()]
    assert len(shares) == 12
    assert 0.45 <= min(shares) <= max(shares) <= 0.55
    reasons = json.loads((path / "filters.json").read_text())["reasons"]
    assert set(reasons) == {"min_foreground", "max_foreground"}


def test_a_model_of_empty_masks_ends_in_one_message_with_the_rate_and_keeps_what_is_done(tmp_path: Path) -> None:
    empty = [6 + attempt * SEEDS_PER_ATTEMPT for attempt in range(9)]
    with pytest.raises(
        UserError, match=r"1 pairs were refused 3 times each \(e.g. jdm_000006.*8 pairs made: empty 38 %"
    ):
        Run(tmp_path, inferer={"empty": empty}, max_attempts=3)()
    assert len(list((tmp_path / "Dataset010_JDM" / "labelsTr").iterdir())) == 5
    again = Run(tmp_path, max_attempts=3)
    again()
    assert again.inferer.made == 1


@pytest.mark.parametrize("condition", ["mask", "image"])
def test_given_masks_and_segmentations_of_given_images_are_never_refused(tmp_path: Path, condition: str) -> None:
    given = tmp_path / "given"
    given.mkdir()
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(given / "a.png")
    source = {"label_dir" if condition == "mask" else "image_dir": given}
    path = Run(tmp_path, condition=condition, num_samples=2, sampling=source, inferer={"empty": [5, 6]})()
    assert not np.asarray(Image.open(path / "labelsTr" / "a_s000005.png")).any()
    assert not (path / "filters.json").exists()
    assert read_provenance(path / "provenance.jsonl")[0]["filters"] == {}


@pytest.mark.parametrize(
    ("share", "reason"),
    [(0.0, "empty"), (1.0, "full"), (0.1, "min_foreground"), (0.9, "max_foreground"), (0.2, None), (0.8, None)],
)
def test_each_refusal_has_its_reason(share: float, reason: str | None) -> None:
    assert refusal(share, {"min_foreground": 0.2, "max_foreground": 0.8}) == reason


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"min_area": 3}, "unknown filter 'min_area'; allowed are min_foreground, max_foreground"),
        ({"min_foreground": 0.6, "max_foreground": 0.5}, "0 <= min_foreground < max_foreground <= 1"),
        ({"max_foreground": 50}, "max_foreground <= 1"),
        ({"min_foreground": "0"}, "give shares"),
    ],
)
def test_filters_that_make_no_sense_are_refused(filters: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_filters(filters)


# ------------------------------------------------------------------ resuming and batches


def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    options = {"batch_size": 2, "ratios": [100], "num_real": 4}
    bad = {"empty": [6, 6 + SEEDS_PER_ATTEMPT], "full": [9]}
    whole = content(Run(tmp_path / "a", inferer=bad, **options)().parent)
    for fail_at in (0, 2, 4, 6, 8):
        folder = tmp_path / str(fail_at)
        with pytest.raises(KeyboardInterrupt):
            Run(folder, inferer=bad | {"fail_at": fail_at}, **options)()
        assert content(Run(folder, inferer=bad, **options)().parent) == whole


def test_batch_size_and_number_of_processes_do_not_matter(tmp_path: Path) -> None:
    bad = {"empty": [7], "full": [9]}
    whole = content(Run(tmp_path / "a", inferer=bad, batch_size=6)())
    assert content(Run(tmp_path / "b", inferer=bad, batch_size=1)()) == whole
    ranks = [Run(tmp_path / "c", inferer=bad, sampling={"process": (rank, 2)}) for rank in range(2)]
    for run in ranks:
        sample_pairs(run.dataset, run.evaluator, run.export)
    assert content(ranks[0].export.finish()) == whole


def test_the_value_range_does_not_change_the_files(tmp_path: Path) -> None:
    a, b = (content(Run(tmp_path / str(r[0]), "rgb", value_range=r)()) for r in ((0, 1), (-1, 1)))
    assert a == b


def test_resuming_with_other_filters_or_another_condition_is_refused(tmp_path: Path) -> None:
    Run(tmp_path)()
    with pytest.raises(UserError, match="filters.min_foreground"):
        Run(tmp_path, filters={"min_foreground": 0.1})
    (tmp_path / "a").mkdir()
    Image.fromarray(np.eye(8, 6, dtype=np.uint8)).save(tmp_path / "a" / "a.png")
    with pytest.raises(UserError, match="condition"):
        Run(tmp_path, condition="mask", sampling={"label_dir": tmp_path / "a"})


# ------------------------------------------------------------------ ensembles, ratios


@pytest.mark.parametrize("flavour", ["grey", "labels", "volume"])
def test_an_ensembles_mean_and_spread_lie_beside_the_dataset(tmp_path: Path, flavour: str, verify) -> None:
    given, ending = tmp_path / "given", FLAVOURS[flavour].get("file_ending", ".png")
    given.mkdir()
    if ending == ".png":
        Image.fromarray(np.zeros((8, 6), np.uint8)).save(given / "a.png")
    else:
        nib.save(nib.Nifti1Image(np.zeros((8, 6, 4), np.uint8), np.eye(4)), given / "a.nii.gz")
    run = Run(
        tmp_path, flavour, condition="image", value_range=(-1, 1), num_samples=1, sampling={"image_dir": given}
    )  # fmt: skip
    path = run()
    verify(path)
    count = len(run.form["labels"]) - 1
    ends = [""] if count == 1 else [f"_{k}" for k in range(1, count + 1)]
    names = {f"a_s000005_{kind}{end}{ending}" for kind in ("mean", "std") for end in ends}
    assert {p.name for p in (path / "ensemble").iterdir()} == names
    label = run.inferer._pair(5, run.dataset.image_size)[1].numpy()
    for kind, expected in (("mean", 204 * (label == 1)), ("std", np.full(label.shape, round(0.05 * 255)))):
        file = path / "ensemble" / f"a_s000005_{kind}{ends[0]}{ending}"
        array = np.asarray(Image.open(file)) if ending == ".png" else np.asarray(nib.load(file).dataobj)
        np.testing.assert_array_equal(array, expected)


def test_overwriting_leaves_nothing_of_the_old_dataset(tmp_path: Path) -> None:
    path = Run(tmp_path)()
    (path / "ensemble").mkdir()
    Run(tmp_path, overwrite=True)
    assert {p.name for p in path.iterdir()} == {"export.json", "imagesTr", "labelsTr"}


def test_the_largest_ratio_tells_how_many_pairs_to_make() -> None:
    assert num_samples_for([100, 1000, 250], 30) == 300
    assert num_samples_for(None, None) == 32
    with pytest.raises(UserError, match="num_real"):
        num_samples_for([100], None)


def test_too_few_pairs_for_the_ratios_end_in_one_message_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"of 4 real .* need 20 pairs, num_samples is 6; give --num_samples 20"):
        Run(tmp_path, ratios=[100, 500], num_real=4)()
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("value", [0, 257, 1.5, True])
def test_impossible_numbers_of_attempts_are_refused(tmp_path: Path, value) -> None:
    with pytest.raises(UserError, match="max_attempts"):
        Run(tmp_path, max_attempts=value)
    assert not any(tmp_path.iterdir())

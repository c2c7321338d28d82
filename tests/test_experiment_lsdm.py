# SPDX-License-Identifier: Apache-2.0
"""The experiments of the lung CT text: equal noise, tables, gradients, convergence, resuming, and bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import lsdm_toy as toy
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import nn

from monai_synth.checkpoint import load_file, save_atomic
from monai_synth.data.slices import read_png
from monai_synth.errors import UserError
from monai_synth.experiments import lsdm_convergence as convergence
from monai_synth.experiments import lsdm_source as source
from monai_synth.experiments.lsdm import Settings, run_experiment
from monai_synth.experiments.lsdm_gradients import centre_and_boundary, image_gradient, view_nodule
from monai_synth.experiments.lsdm_sampling import Loaded, Samples, to_tensor
from monai_synth.experiments.lsdm_scores import Patients
from monai_synth.inference.cases import SamplingDataset, collate_cases, find_cases
from monai_synth.inference.lsdm import LSDMInferer
from monai_synth.inference.model import load_lsdm

QUICK = {"guidance": ("none", "mali"), "sweep_cases": 0, "gradient_cases": 0}


@pytest.fixture(scope="module")
def files(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lsdm")
    toy.write_all(folder, tiny_dataset)
    return folder


@pytest.fixture(scope="module")
def finished(files: Path, tiny_dataset: Path) -> tuple[Path, dict]:
    """One run with all its parts, and what it told."""
    content = run_experiment(toy.settings(files, tiny_dataset, files / "out"), report=lambda text: None)
    return files / "out", content


def models(files: Path) -> dict[str, source.Model]:
    given = toy.settings(files, files, files).models
    return {model.name: model for model in source.read_models(given)}


def images(folder: Path, arm: str, seed: int) -> dict[int, np.ndarray]:
    found = {}
    for path in sorted((folder / "samples" / arm).glob(f"seed_{seed}-*.npz")):
        with np.load(path) as file:
            found |= dict(zip(file["indices"].tolist(), file["images"], strict=True))
    return found


# Sampling


def test_an_unguided_image_has_the_bytes_of_the_bundles_own_sampling(finished, files: Path, tiny_dataset: Path) -> None:
    model = load_lsdm(files / "models")
    contract = model.contract
    inferer = LSDMInferer(
        model.codec, contract["schedule"], sampler="ddim", num_steps=3, guidance_scale=1.0,
        semantic_downsample=contract["semantic_downsample"], collapse_nodule_labels=False,
    )  # fmt: skip
    cases = find_cases(dataset_dir=str(tiny_dataset), split="test", label_dir=None, requests=None, targets=None)
    data = SamplingDataset(cases, num_samples=4, seed=1_000_000, image_size=(64, 64), num_labels=8)
    written = images(finished[0], "lsdm", 1)
    for part in ((0, 1, 2), (3,)):
        batch = collate_cases([data[i] for i in part])
        made = inferer(batch["label"], model.network, seeds=batch["seed"], nodules=batch["nodules"])
        for i, image in zip(part, made, strict=True):
            unit = (image[0].clamp(-1, 1).numpy() + 1) / 2  # as the bundle's export writes it
            np.testing.assert_array_equal(written[i], np.round(unit * 255).astype(np.uint8))


def test_models_and_guidances_start_from_the_same_noise_and_seeds_from_another(
    files: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(denoiser, x_T, scheduler, **options):
        seen.append(x_T.clone())
        return x_T

    monkeypatch.setattr("monai_synth.inference.lsdm.sample", spy)
    found = models(files)
    cases = source.read_cases(str(tiny_dataset), list(found.values()), 2)
    arms = [source.Arm("ldm", found["ldm"]), source.Arm("lsdm", found["lsdm"])]
    arms.append(source.guided_arm(found["lsdm"], "all", 2.0))
    loaded = Loaded(arms, sampler="ddim", num_steps=3, device="cpu")
    samples = Samples(files / "noise", cases, loaded, batch_size=2)
    for arm in arms:
        samples.make(arm, [0, 1], cases.indices, lambda text: None)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[4])
    assert torch.equal(seen[1], seen[5])
    assert not torch.equal(seen[0], seen[1])


def test_guidance_changes_images_near_the_nodule_and_the_gan_has_one_image_of_a_map(finished) -> None:
    plain, guided = images(finished[0], "lsdm", 0), images(finished[0], "lsdm+all", 0)
    assert any((plain[i] != guided[i]).any() for i in plain)
    first, second = images(finished[0], "spade", 0), images(finished[0], "spade", 1)
    for i in first:
        np.testing.assert_array_equal(first[i], second[i])


def test_a_second_run_samples_nothing_and_says_the_same(
    finished, files: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, content = finished
    monkeypatch.setattr(Samples, "_sample", None)  # a call would fail
    again = run_experiment(toy.settings(files, tiny_dataset, out), report=lambda text: None)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(content))
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(content))


def test_a_stopped_run_tells_what_it_has_and_goes_on_with_the_same_bytes(
    finished, files: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original = [], Samples._sample

    def stop(self, arm, network, inferer, seed, chunk):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(arm.name)
        return original(self, arm, network, inferer, seed, chunk)

    quick = toy.settings(files, tiny_dataset, tmp_path / "out", **QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "_sample", stop)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(quick, report=lambda text: None)
    assert made == ["spade", "ldm", "lsdm", "lsdm+mali"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["num_seeds_compared"] == 1
    assert "Unfinished" in (tmp_path / "out" / "report.html").read_text()
    content = run_experiment(quick, report=lambda text: None)
    assert content["num_seeds_compared"] == 2
    for arm in made:
        for i, image in images(tmp_path / "out", arm, 1).items():
            np.testing.assert_array_equal(image, images(finished[0], arm, 1)[i])


# Tables


def test_the_tables_are_what_the_written_images_give_by_other_means(finished, tiny_dataset: Path) -> None:
    out, content = finished
    cases = json.loads((tiny_dataset / "dataset.json").read_text())["test"]
    real = [read_png(tiny_dataset / case["image"]) for case in cases]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    each = {}
    for arm in ("spade", "lsdm+mali"):
        rows = []
        for seed in (0, 1):
            made = images(out, arm, seed)
            for i, truth in enumerate(real):
                _, field = structural_similarity(made[i], truth, full=True, **options)
                rows.append(field[5:-5, 5:-5].mean())
        each[arm] = np.array(rows)
        found = content["table_5_1"][arm]["ssim"]
        assert found["value"] == pytest.approx(each[arm].mean(), abs=1e-6)
        assert found["sd"] == pytest.approx(each[arm].std(ddof=1), abs=1e-6)
        assert (found["n"], found["num_images"]) == (4, 8)
    difference = content["table_5_1"]["lsdm+mali"]["ssim"]["difference"]
    assert difference["minus"] == "spade"
    assert difference["value"] == pytest.approx(each["lsdm+mali"].mean() - each["spade"].mean(), abs=1e-6)


def test_distances_are_those_of_the_written_images_and_crops(
    files: Path, finished, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from monai_synth.evaluate.features import Extractor
    from monai_synth.experiments import lsdm

    def call(x: torch.Tensor) -> torch.Tensor:
        x = x.float() / 255
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3)), x[:, 0, 8:16, 8:16].mean((1, 2))], dim=1)

    extractor = Extractor("toy", "toy", "mean, sd, corner", "0" * 64, 3, 1, (), call, torch.device("cpu"))
    monkeypatch.setattr(lsdm, "_extractors", lambda settings, device: ([extractor], None))
    out = shutil.copytree(finished[0], tmp_path / "out")
    content = run_experiment(toy.settings(files, tiny_dataset, out, **QUICK), report=lambda text: None)
    listed = json.loads((tiny_dataset / "dataset.json").read_text())["test"]

    def crop(image: np.ndarray, case: dict) -> np.ndarray:
        padded = np.pad(image, 12)
        row, column = (int(c) for c in case["nodules"][0]["center"])
        return padded[row : row + 24, column : column + 24]

    def features(pictures: list[np.ndarray]) -> np.ndarray:
        return call(torch.from_numpy(np.stack(pictures)[:, None])).double().numpy()

    def frechet(x: np.ndarray, y: np.ndarray) -> float:
        from scipy.linalg import sqrtm

        a, b = np.cov(x.T), np.cov(y.T)
        return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b))))

    real = [read_png(tiny_dataset / case["image"]) for case in listed]
    for table, metric, change in (
        ("table_5_1", "frechet_toy", lambda image, case: image),
        ("table_5_2", "crop_frechet_toy", crop),
    ):
        truth = features([change(image, case) for image, case in zip(real, listed, strict=True)])
        values = []
        for seed in (0, 1):
            made = images(out, "ldm", seed)
            values.append(frechet(features([change(made[i], case) for i, case in enumerate(listed)]), truth))
        found = content[table]["ldm"][metric]
        assert found["value"] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-6)
        assert found["per_seed"] == pytest.approx(values, rel=1e-4, abs=1e-6)
        assert found["warnings"] == []  # 4 images for 3 features


def test_an_interval_is_that_of_a_paired_t_test_where_each_patient_has_one_slice() -> None:
    from scipy import stats

    values = np.random.default_rng(0).normal(1, 2, 12)
    patients = Patients([f"p{i}" for i in range(12)])
    result = patients.result(patients.values(lambda mask: float(values[mask].mean())), 12)
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert result["ci"] == pytest.approx(expected)
    few = Patients(["a", "a", "b", "c", "d"])
    assert few.result(few.values(lambda mask: 1.0), 5)["ci"] is None


def test_the_csv_has_every_number_of_the_tables_with_its_n(finished) -> None:
    out, content = finished
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for part in ("table_5_1", "table_5_2"):
        for arm, metrics in content[part].items():
            for metric, result in metrics.items():
                (row,) = [r for r in rows if (r["part"], r["arm"], r["metric"]) == (part, arm, metric)]
                assert row["value"] == ("" if result["value"] is None else str(result["value"]))
                assert int(row["n"]) == result["n"]


def test_the_page_tells_the_texts_numbers_what_is_missing_and_shows_no_real_slice_unasked(
    finished, files: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "out")
    page = (out / "report.html").read_text()
    assert "0.42 &plusmn; 0.04" in page  # SSIM of SPADE in Table 5.1
    assert "there is no Fréchet distance and no FID" in page
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert "--show-real only" in page
    assert str(files) not in page + (out / "results.json").read_text()
    before = page.count("<img")
    run_experiment(toy.settings(files, tiny_dataset, out, show_real=True), report=lambda text: None)
    assert (out / "report.html").read_text().count("<img") == before + 1  # the reconstructions


def test_a_guiding_classifier_that_did_not_converge_is_told_on_the_page(
    files: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(files / "models", tmp_path / "models")
    path = tmp_path / "models" / "classifier_malignancy.pt"
    report = {"n": 4, "val_loss": 0.71, "constant_loss": 0.693, "converged": False}
    save_atomic(load_file(path) | {"report": report}, path)
    given = toy.settings(files, tiny_dataset, tmp_path / "out", **QUICK, models=[("a", str(tmp_path / "models"))])
    content = run_experiment(given, report=lambda text: None)
    assert content["classifiers"] == {"malignancy": report, **dict.fromkeys(toy.FEATURES[1:])}
    assert "classifier of malignancy did not converge" in (tmp_path / "out" / "report.html").read_text()


def test_values_go_to_mlflow_where_an_address_is_given(
    finished, files: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    import mlflow

    out, content = shutil.copytree(finished[0], tmp_path / "out"), finished[1]
    given = toy.settings(files, tiny_dataset, out, **QUICK, mlflow=str(tmp_path / "tracked"))
    run_experiment(given, report=lambda text: None)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/tracked/mlruns.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lsdm").experiment_id])
    assert run.data.metrics["table_5_1.ldm.ssim"] == pytest.approx(content["table_5_1"]["ldm"]["ssim"]["value"])
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.html", "results.json"}


# Gradients


class Toy(nn.Module):
    """Two logits of a crop by a fixed smooth function, in double precision."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        weight = torch.randn(2, x[0].numel(), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        hidden = torch.tanh(x.flatten(1) @ weight.T * 0.2)
        return hidden + 0.3 * hidden.flip(1) ** 2 + t[:, None] / 100


@pytest.mark.parametrize("target", [0, 1])
def test_the_image_gradient_is_that_of_finite_differences(target: int) -> None:
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def log_p(v: torch.Tensor) -> float:
        return float(torch.log_softmax(Toy()(v, torch.tensor([7])), 1)[0, target])

    found = image_gradient(Toy(), x, 7, target)
    for place in ((0, 0), (2, 3), (5, 5)):
        step = torch.zeros_like(x)
        step[(0, 0, *place)] = 1e-5
        expected = (log_p(x + step) - log_p(x - step)) / 2e-5
        assert float(found[(0, 0, *place)]) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_the_latent_gradient_is_the_image_gradient_through_the_decoder_inside_the_nodule_only(
    files: Path, tiny_dataset: Path
) -> None:
    model = load_lsdm(files / "models", features=["malignancy"])
    cases = source.read_cases(str(tiny_dataset), list(models(files).values()), None)
    item = cases.item(0)
    view = view_nodule(model, to_tensor(cases.real(0)), item["label"], item["nodules"][0], 20, seed=4)
    assert view.noisy.shape == view.inside.shape == view.image["benign"].shape == (32, 32)
    for gradient in view.latent.values():
        assert gradient.shape == (3, 8, 8)
        assert (gradient == 0).all(0).any()  # outside
        assert (gradient != 0).any()
    # two classes: the gradients of both log probabilities point in opposite directions
    a, b = view.image["benign"], view.image["malignant"]
    np.testing.assert_allclose(a / np.linalg.norm(a), -b / np.linalg.norm(b), atol=1e-4)
    np.testing.assert_allclose(
        a * view.probability**-1, -b * (1 - view.probability) ** -1, rtol=1e-3, atol=1e-3 * np.abs(a).max()
    )


def test_the_noise_of_the_gradients_is_that_of_no_sample() -> None:
    from monai_synth.experiments import lsdm_report, lsdm_sampling

    last = lsdm_sampling.image_seed(lsdm_sampling.MOST_SEEDS - 1, lsdm_sampling.SEED_STEP - 1)
    assert last < lsdm_report._NOISE < 2**32 - lsdm_sampling.SEED_STEP


def test_centre_and_boundary_tell_a_shrinking_nodule_from_a_growing_one() -> None:
    inside = np.zeros((20, 20), bool)
    inside[8:12, 8:12] = True
    shrinking = np.where(inside, 1.0, 0.0)
    shrinking[5:15, 5:15] -= 0.5
    centre, boundary = centre_and_boundary(shrinking, inside)
    assert centre > 0 > boundary
    assert centre_and_boundary(-shrinking, inside) == pytest.approx((-centre, -boundary))
    assert np.isnan(centre_and_boundary(shrinking, np.zeros((20, 20), bool))).all()


# Convergence


def test_skill_is_one_for_the_truth_and_zero_for_the_best_constant() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 6, 40).astype(float)
    patients = [f"p{i % 10}" for i in range(40)]
    shape = (40, 4, 2, 1)
    truth = convergence.judge("texture", np.broadcast_to(targets[:, None, None, None], shape), targets, patients)
    assert truth["skill"]["value"] == pytest.approx(1)
    assert truth["learned"] is True
    constant = convergence.judge("texture", np.full(shape, 3.0), targets, patients)
    assert constant["skill"]["value"] == pytest.approx(0)
    assert constant["learned"] is False
    binary = (targets > 2).astype(float)
    undecided = convergence.judge("malignancy", np.zeros((40, 4, 2, 2)), binary, patients)
    assert undecided["skill"]["value"] == pytest.approx(0)
    logits = np.stack([-20 * binary, 20 * binary - 10], -1)[:, None, None] * np.ones((1, 4, 2, 1))
    assert convergence.judge("malignancy", logits, binary, patients)["skill"]["value"] > 0.99
    alike = convergence.judge("subtlety", np.full(shape, 3.0), np.full(40, 3.0), patients)
    assert (alike["skill"], alike["learned"]) == (None, None)


def test_each_cell_of_the_convergence_table_stands_under_its_heading() -> None:
    from monai_synth.data.semantic import FEATURES
    from monai_synth.experiments.lsdm_tables import convergence_table

    targets = np.array([1.0, 2, 3, 4, 5, 1, 2, 3, 4, 5])
    truth = np.broadcast_to(targets[:, None, None, None], (10, 4, 2, 1))
    found = convergence.judge("texture", truth, targets, [f"p{i}" for i in range(10)])
    page = convergence_table({"bands": convergence.bands_of(1000), "features": dict.fromkeys(FEATURES, found)})
    head = re.findall(r"<th>(.*?)</th>", page)
    (row,) = (r for r in re.findall(r"<tr>(.*?)</tr>", page) if r.startswith("<td>texture<"))
    cells = dict(zip(head, re.findall(r"<td>(.*?)</td>", row), strict=True))
    assert (cells["feature"], cells["learned"], cells["the text"]) == ("texture", "yes", "converged")
    assert "<b>1</b>" in cells["t 750 to 999"]
    assert cells["held-out nodules"].startswith("10 ")


@pytest.mark.slow
def test_all_nine_features_are_trained_judged_and_kept(
    files: Path, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = toy.settings(files, tiny_dataset, tmp_path / "out", **QUICK, convergence_steps=2, seeds=1)
    content = run_experiment(given, report=lambda text: None)
    found = content["convergence"]
    assert len(found["features"]) == 9
    assert found["bands"] == [[0, 11], [12, 24], [25, 37], [38, 49]]
    assert found["features"]["margin"]["why"] == "all held-out nodules have the same value"
    assert found["features"]["malignancy"]["n"] == 4
    monkeypatch.setattr(convergence, "train", None)  # a call would fail
    assert run_experiment(given, report=lambda text: None)["convergence"] == found


# The command


def test_the_command_passes_what_is_given_and_leaves_the_rest_to_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai_synth import cli
    from monai_synth.experiments import lsdm

    calls = []
    monkeypatch.setattr(lsdm, "run_experiment", lambda settings, report: calls.append(settings))
    given = ["experiment", "lsdm", "--dataset", "D", "--models", "spade=S", "lsdm=L/model.pt", "--out", "O"]
    assert cli.main(given) == 0
    assert cli.main([*given, "--guidance", "none,all", "--sweep-scales", "1", "8", "--show-real"]) == 0
    assert calls[0] == Settings("D", [("spade", "S"), ("lsdm", "L/model.pt")], "O")
    assert (calls[1].guidance, calls[1].sweep_scales, calls[1].show_real) == (("none", "all"), [1.0, 8.0], True)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": ("none", "size")}, "allowed are none, mali, lobu, spic, text, all"),
        ({"guided": "spade"}, "cannot be guided; diffusion models are ldm, lsdm"),
        ({"baseline": "nobody"}, "there is no arm 'nobody'; allowed are spade, ldm, lsdm"),
        ({"seeds": 0}, "seeds is 0; allowed are 1 to 4000"),
        ({"crop": 65}, "crop is 65, but images are 64 pixels wide"),
        ({"crop": 8}, "crop is 8; allowed are whole numbers from 11"),
        ({"max_cases": 1}, "max_cases is 1; 2 or more"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"sampler": "euler"}, "euler"),
        ({"scale": -1.0}, "allowed are numbers above 0"),
        ({"sweep_scales": (0.0,)}, "allowed are numbers above 0"),
        ({"gradient_times": (1.0,)}, "from 0 to below 1"),
        ({"models": []}, "no model is given"),
        ({"inception": "nowhere.pth"}, "no file of Inception weights"),
        ({"mlflow": "gopher://x"}, "starts with 'gopher'"),
    ],
)
def test_bad_settings_are_one_message_and_leave_nothing(
    files: Path, tiny_dataset: Path, tmp_path: Path, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_experiment(toy.settings(files, tiny_dataset, tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def quick(files: Path, dataset: Path, out: Path, *given: tuple[str, Path]) -> Settings:
    return toy.settings(files, dataset, out, **QUICK, models=[(name, str(path)) for name, path in given])


def test_files_that_do_not_belong_are_refused(files: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="stage 'classifier' of bundle 'lsdm'"):
        run_experiment(quick(files, tiny_dataset, out, ("a", files / "models" / "classifier_texture.pt")))
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(files / "models" / "model.pt", alone)
    with pytest.raises(UserError, match="no autoencoder.pt beside"):
        run_experiment(quick(files, tiny_dataset, out, ("a", alone)))
    shutil.copy(files / "models" / "autoencoder.pt", alone)
    with pytest.raises(UserError, match="'mali' needs classifier_malignancy.pt"):
        run_experiment(quick(files, tiny_dataset, out, ("a", alone)))
    with pytest.raises(UserError, match="guidance .'mali'. needs a diffusion model"):
        run_experiment(quick(files, tiny_dataset, out, ("a", files / "spade")))
    with pytest.raises(UserError, match="given twice"):
        run_experiment(quick(files, tiny_dataset, out, ("a", files / "spade"), ("a", files / "models")))
    content = load_file(files / "spade" / "model.pt")
    save_atomic(content | {"contract": content["contract"] | {"image_size": [32, 32]}}, tmp_path / "small.pt")
    with pytest.raises(UserError, match="image_size"):
        run_experiment(quick(files, tiny_dataset, out, ("a", files / "models"), ("b", tmp_path / "small.pt")))
    assert not out.exists()


def test_a_test_split_without_nodules_is_refused(files: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "data")
    content = json.loads((tmp_path / "data" / "dataset.json").read_text())
    for case in content["test"]:
        case["nodules"] = []
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 0 slices with a nodule"):
        run_experiment(toy.settings(files, tmp_path / "data", tmp_path / "out"))


def test_foreign_folders_other_settings_and_other_models_are_refused(
    files: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds 'models' and no experiment"):
        run_experiment(toy.settings(files, tiny_dataset, files, **QUICK))
    out = tmp_path / "out"
    given = quick(files, tiny_dataset, out, ("a", files / "models"))
    run_experiment(given, report=lambda text: None)
    with pytest.raises(UserError, match="num_steps was 3, is 2"):
        run_experiment(Settings(**{**given.__dict__, "num_steps": 2}))
    with pytest.raises(UserError, match="other settings: files was"):
        run_experiment(quick(files, tiny_dataset, out, ("a", files / "models" / "model_ldm.pt")), report=print)
    (part,) = (out / "samples" / "a").glob("seed_1-*.npz")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="delete it and run the same command again"):
        run_experiment(given, report=lambda text: None)

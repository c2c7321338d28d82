# SPDX-License-Identifier: Apache-2.0
"""The SPADE GAN: its networks and losses, and its training and sampling by the stock runner."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import bundle_runs
import mlflow
import pytest
import torch
import torch.nn.functional as F
from bundle_runs import BUNDLES, command, kill_when_there, options, places_of, run_forked, user_error
from ignite.engine import Events
from monai.bundle import verify_net_in_out
from sklearn.metrics import hinge_loss
from torch.utils.data import DataLoader

from monai_synth.checkpoint import build_network, load_file
from monai_synth.data.slices import one_hot
from monai_synth.errors import UserError
from monai_synth.evaluate.folders import evaluate_folder
from monai_synth.inference.spade_gan import SPADEGANInferer, warn_of_repeats
from monai_synth.networks import MapDiscriminator, SPADEGenerator
from monai_synth.training import MapPrepareBatch, SPADEGANTrainer, lr_decay, ttur_rates
from monai_synth.training.spade_gan import feature_matching_loss

SPADE_GAN = BUNDLES / "spade_gan"
SIZE = (64, 64)
TINY = {
    "preset": "demo", "image_size": [64, 64], "max_epochs": 2, "val_interval": 1, "save_interval": 1, "device": "cpu",
}  # fmt: skip


def generator(**values: Any) -> SPADEGenerator:
    torch.manual_seed(0)
    return SPADEGenerator(2, 3, 1, SIZE, (4, 6, 8), (4, 5), **({"spade_hidden_channels": 4} | values))


def discriminator(**values: Any) -> MapDiscriminator:
    torch.manual_seed(1)
    return MapDiscriminator(2, 3, 1, SIZE, **({"channels": 4} | values))


def labels(n: int = 4) -> torch.Tensor:
    """Maps (n, 1, 64, 64) with blocks of three labels."""
    blocks = torch.randint(0, 3, (n, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    return F.interpolate(blocks.float(), SIZE).to(torch.uint8)


# Networks


def test_the_generator_gives_an_image_of_the_maps_size_in_range_and_keeps_the_list_that_it_is_given() -> None:
    channels = [4, 6, 8]
    made = SPADEGenerator(2, 3, 2, SIZE, channels, [4, 5], spade_hidden_channels=4)
    image = made(one_hot(labels(), 3))
    assert image.shape == (4, 2, 64, 64)
    assert image.abs().max() <= 1
    assert channels == [4, 6, 8]


def test_the_generator_ends_at_full_resolution_and_not_in_a_picture_of_doubled_pixels() -> None:
    """A pixel of the map that no lower resolution sees changes the image, where it lies."""
    net = generator().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    seg = one_hot(torch.zeros(1, 1, 64, 64), 3)
    changed = seg.clone()
    changed[0, :, 33, 33] = torch.tensor([0.0, 1.0, 0.0])  # odd: "nearest" takes the even pixels
    moved = (net(seg) - net(changed)).detach()[0, 0].abs() > 1e-6
    rows, cols = moved.nonzero().T
    assert moved[33, 33]
    # 3x3 five times: two of SPADE, two of the block, that of the image
    assert max((rows - 33).abs().max(), (cols - 33).abs().max()) <= 5


def test_the_generator_reacts_to_the_map_already_when_it_is_fresh() -> None:
    net = generator().eval()
    a, b = net(one_hot(labels(2), 3)).detach()
    assert (a - b).abs().max() > 10 * torch.finfo(torch.float32).eps


def test_spade_of_the_paper_lets_a_uniform_map_shift_and_monais_does_not() -> None:
    """After MONAI's InstanceNorm gamma and beta of a uniform map vanish away from the border."""
    uniform = one_hot(torch.ones(1, 1, 64, 64), 3)
    found = {}
    for variant in ("paper", "monai"):
        layer = generator(spade_variant=variant).last_block.norm_0
        for conv in (layer.mlp_gamma.conv, layer.mlp_beta.conv, layer.mlp_shared.conv):
            torch.nn.init.normal_(conv.weight)
        flat = torch.zeros(1, 4, 64, 64)
        found[variant] = layer(flat, uniform)[..., 32, 32].abs().mean()
    assert found["paper"] > 20 * found["monai"]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_spade_is_the_papers_formula(norm: str) -> None:
    """Park et al., Eq 1: the norm over (batch and) pixels, scaled by 1 + gamma and shifted by beta of the map."""
    layer = generator(norm=norm).last_block.norm_0
    x, seg = torch.randn(4, 4, 64, 64) * 3 + 1, one_hot(labels(), 3)
    over = (0, 2, 3) if norm == "batch" else (2, 3)
    normal = (x - x.mean(over, keepdim=True)) / (x.var(over, unbiased=False, keepdim=True) + 1e-5).sqrt()
    conv = lambda y, m: F.conv2d(y, m.conv.weight, m.conv.bias, padding=1)  # noqa: E731
    hidden = torch.relu(conv(seg, layer.mlp_shared))
    expected = normal * (1 + conv(hidden, layer.mlp_gamma)) + conv(hidden, layer.mlp_beta)
    torch.testing.assert_close(layer(x, seg), expected, atol=1e-5, rtol=1e-4)


def test_spectral_norms_are_one_where_the_paper_has_them_and_the_weights_are_free_elsewhere() -> None:
    net, judge = generator(), discriminator()
    for _ in range(40):  # power iterations
        net(one_hot(labels(1), 3))
        judge(one_hot(labels(1), 3), torch.rand(1, 1, 64, 64))
    bounded = [block.conv_1.conv for block in (*net.trunk.decoder.blocks, net.last_block)]
    bounded += [judge.scales.discriminator_0.get_submodule("0").conv]
    for conv in bounded:
        assert torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2) == pytest.approx(1, abs=0.02)
    free = net.last_block.norm_0.mlp_gamma.conv
    assert torch.linalg.matrix_norm(free.weight.flatten(1), 2) < 0.5


def test_the_encoder_draws_z_and_z_moves_the_image() -> None:
    net = generator(z_dim=6).eval()
    seg, image = one_hot(labels(), 3), torch.rand(4, 1, 64, 64) * 2 - 1
    made, mean, log_variance = net(seg, image)
    assert made.shape == image.shape
    assert mean.shape == log_variance.shape == (4, 6)
    z = torch.randn(4, 6)
    assert not torch.equal(net(seg, z=z), net(seg, z=z + 1))
    assert torch.equal(net(seg), net(seg, z=torch.zeros(4, 6)))


def test_the_discriminator_judges_map_and_image_together_at_two_scales() -> None:
    judge, seg = discriminator(), one_hot(labels(), 3)
    image = torch.rand(4, 1, 64, 64)
    logits, features = judge(seg, image)
    assert len(logits) == len(features) == 2
    assert logits[0].shape[-1] > logits[1].shape[-1] > 1
    for other in ((seg.roll(1, dims=0), image), (seg, image.roll(1, dims=0))):
        assert all(not torch.equal(a, b) for a, b in zip(logits, judge(*other)[0], strict=True))


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (SPADEGenerator, {"image_size": (60, 64)}, r"image_size is \[60, 64\]; allowed are 2 multiples of 8"),
        (SPADEGenerator, {"norm": "layer"}, "norm is 'layer'; allowed are batch, instance"),
        (SPADEGenerator, {"spade_variant": "mine"}, "spade_variant is 'mine'; allowed are paper, monai"),
        (SPADEGenerator, {"semantic_downsample": "mean"}, "allowed are max_onehot, max_label, nearest"),
        (SPADEGenerator, {"z_dim": -1}, "z_dim is -1; allowed are whole numbers from 0"),
        (MapDiscriminator, {"image_size": (32, 64)}, r"\[32, 64\] is too small for 2 discriminators of 2 to 4 layers"),
    ],
)
def test_networks_that_cannot_be_are_refused(make: type, values: dict, message: str) -> None:
    given = {"spatial_dims": 2, "label_nc": 3, "image_size": SIZE}
    given |= {"out_channels": 1, "channels": (4, 6, 8), "last_channels": (4, 5)} if make is SPADEGenerator else {}
    given |= {"in_channels": 1} if make is MapDiscriminator else {}
    with pytest.raises(UserError, match=message):
        make(**given | values)


# Losses and the step


def test_feature_matching_is_zero_for_equals_and_the_closed_form_for_a_shift() -> None:
    real = [[torch.randn(2, 3, 5, 5), torch.randn(2, 4, 3, 3)], [torch.randn(2, 3, 2, 2)]]
    assert feature_matching_loss(real, real) == 0
    shifted = [[f + 0.5 for f in scale] for scale in real]
    assert feature_matching_loss(shifted, real) == pytest.approx(0.5 * 3 / 2)  # three layers, two discriminators


def test_feature_matching_moves_the_fakes_only() -> None:
    fake, real = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    feature_matching_loss([[fake]], [[real]]).backward()
    assert fake.grad is not None
    assert real.grad is None


def test_two_time_scales_are_half_and_twice_the_rate() -> None:
    assert ttur_rates(2e-4, True) == (1e-4, 4e-4)  # Park et al., Sec 4
    assert ttur_rates(2e-4, False) == (2e-4, 2e-4)


def test_the_rate_of_the_paper_is_whole_for_half_the_epochs_and_then_falls_to_zero() -> None:
    decay = lr_decay("second_half", 200)
    assert [decay(e) for e in (0, 100, 150, 200)] == [1.0, 1.0, 0.5, 0.0]


def trainer(**values: Any) -> SPADEGANTrainer:
    chosen = {key: values.pop(key) for key in ("z_dim", "init_gain") if key in values}
    net, judge, rate = generator(**chosen), discriminator(), values.pop("rate", 1e-3)
    items = [{"image": torch.rand(1, 64, 64) * 2 - 1, "label": label} for label in labels()]
    return SPADEGANTrainer(
        torch.device("cpu"), values.pop("max_epochs", 1), DataLoader(items, 4), net, judge,
        torch.optim.Adam(net.parameters(), rate, betas=(0.0, 0.9)),
        torch.optim.Adam(judge.parameters(), 4e-3, betas=(0.0, 0.9)), prepare_batch=MapPrepareBatch(3), **values,
    )  # fmt: skip


def test_the_losses_of_a_step_are_those_of_other_implementations() -> None:
    """The discriminator's hinge is scikit-learn's (MONAI's puts logits through tanh), the KL is torch's."""
    made = trainer(z_dim=6, perceptual_loss=F.mse_loss)
    seg, real = made.prepare_batch(next(iter(made.data_loader)))
    generated = made.generator(seg, real)
    # spectral norm iterates at each call in training; a copy sees what the step will see
    judge = copy.deepcopy(made.discriminator)
    fake, losses = made._generator_losses(seg, real, generated)
    logits, features = judge(torch.cat([seg, seg]), torch.cat([generated[0], real]))
    fakes = [scale[:4] for scale in logits]
    torch.testing.assert_close(losses["adversarial"], -sum(f.mean() for f in fakes) / 2)
    difference = sum((f[:4] - f[4:]).abs().mean() for scale in features for f in scale)
    torch.testing.assert_close(losses["feature_matching"], 10 * difference / 2)
    torch.testing.assert_close(losses["perceptual"], 10 * ((fake - real) ** 2).mean())
    mean, log_variance = generated[1:]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(losses["kl"], 0.05 * kl.sum(1).mean())

    judge = copy.deepcopy(made.discriminator)
    loss = made._discriminator_loss(seg, real, fake.detach())
    logits, _ = judge(torch.cat([seg, seg]), torch.cat([real, fake.detach()]))
    truth = torch.tensor([1, 1, 1, 1, -1, -1, -1, -1])
    flat = [(truth.view(-1, 1, 1, 1).expand_as(x).flatten(), x.detach().flatten()) for x in logits]
    assert loss.item() == pytest.approx(sum(hinge_loss(t, x) for t, x in flat) / 2, rel=1e-5)


def test_each_optimiser_moves_its_own_network_and_the_discriminator_learns_from_its_own_loss_only() -> None:
    made = trainer()
    twin, before = copy.deepcopy(made.discriminator), [p.detach().clone() for p in made.generator.parameters()]
    optimizer = torch.optim.Adam(twin.parameters(), 4e-3, betas=(0.0, 0.9))
    batch = next(iter(made.data_loader))
    output = made._iteration(made, batch)
    assert any(not torch.equal(a, b) for a, b in zip(before, made.generator.parameters(), strict=True))
    seg, real = made.prepare_batch(batch)
    with torch.no_grad():
        twin(torch.cat([seg, seg]), torch.cat([output["pred"], real]))  # the power iteration of the generator's step
    logits, _ = twin(torch.cat([seg, seg]), torch.cat([real, output["pred"]]))
    (sum((torch.relu(1 - x[:4]).mean() + torch.relu(1 + x[4:]).mean()) / 2 for x in logits) / 2).backward()
    optimizer.step()
    for a, b in zip(made.discriminator.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bfloat16_keeps_weights_in_float32() -> None:
    made = trainer(amp=True, z_dim=6)
    made.run()
    assert {p.dtype for net in (made.generator, made.discriminator) for p in net.parameters()} == {torch.float32}
    assert made.state.output["pred"].dtype == torch.bfloat16


@pytest.mark.slow
def test_a_short_training_brings_the_generator_to_the_images_of_its_maps() -> None:
    """Grey values 0.8, 0 and -0.8 of three labels: plain enough for 40 steps."""
    made = trainer(max_epochs=40, init_gain=1.0, rate=5e-3)
    grey = torch.tensor([0.8, 0.0, -0.8])
    made.data_loader = [{"image": grey[labels().long()], "label": labels()}]
    target = made.data_loader[0]["image"]
    first = (made.generator(one_hot(labels(), 3)) - target).abs().mean().item()
    made.run()
    made.generator.eval()
    assert (made.generator(one_hot(labels(), 3)) - target).abs().mean().item() < 0.5 * first


def test_the_map_of_malignancy_can_be_hidden() -> None:
    batch = {"label": torch.tensor([4, 5, 6, 7]).view(1, 1, 2, 2), "image": torch.zeros(1, 1, 2, 2)}
    seen = MapPrepareBatch(8, collapse_nodule_labels=True)(batch)[0].argmax(1)
    assert seen.flatten().tolist() == [4, 5, 5, 5]


# Sampling


@pytest.mark.parametrize("z_dim", [0, 6])
def test_an_image_depends_on_map_and_seed_and_not_on_what_lies_beside_it(z_dim: int) -> None:
    net, infer, maps = generator(z_dim=z_dim).eval(), SPADEGANInferer(3), labels(3)
    together = infer(maps, net, seeds=[7, 8, 9])
    alone = infer(maps[1:2], net, seeds=[8])
    assert torch.equal(together[1:2], alone)
    other = infer(maps[1:2], net, seeds=[9])
    assert torch.equal(alone, other) == (z_dim == 0)


def test_repeats_are_said_before_they_are_made(caplog: pytest.LogCaptureFixture) -> None:
    for net, samples, said in ((generator(), 4, False), (generator(), 5, True), (generator(z_dim=6), 5, False)):
        caplog.clear()
        warn_of_repeats(net, 4, samples)
        assert ("images will repeat" in caplog.text) == said


# The bundle


def test_the_paper_preset_holds_the_numbers_of_the_paper() -> None:
    train = json.loads((SPADE_GAN / "configs" / "train.json").read_text())
    paper = train["presets"]["paper"]
    assert paper["image_size"] == [512, 512]  # LSDM's text, Sec 4.1
    assert [*reversed(paper["channels"]), *paper["last_channels"]] == [1024, 1024, 1024, 512, 256, 128, 64]
    assert (paper["spade_hidden_channels"], paper["init_gain"]) == (128, 0.02)
    assert (paper["learning_rate"], train["betas"], paper["ttur"]) == (2e-4, [0.0, 0.9], True)
    assert (train["feature_weight"], train["perceptual_weight"], train["kl_weight"]) == (10.0, 10.0, 0.05)
    assert (paper["batch_size"], paper["max_epochs"], paper["lr_decay"]) == (32, 200, "second_half")


def test_it_trains_on_the_phantom_and_samples_by_the_keys_of_bundle_lsdm() -> None:
    for name, own in (("train.json", ()), ("inference.json", ("dataset_name",))):
        mine, theirs = (json.loads((BUNDLES / b / "configs" / name).read_text()) for b in ("spade_gan", "lsdm"))
        shared = ["output_dir", "phantom_dir", "dataset_dir", "ckpt_dir", "latest_dir", "seed", "device", "resume"]
        shared += ["phantom"] if name == "train.json" else [
            "split", "label_dir", "resize_maps", "num_samples", "batch_size", "dataset_id", "image_format",
            "label_kind", "overwrite", "dataloader", "evaluator", "dataset_name", "latest", "model_file",
        ]  # fmt: skip
        for key in shared:
            assert key in mine, key
            assert key in own or mine[key] == theirs[key], key


def run(config: str, kind: str, **values: Any) -> Any:
    return bundle_runs.run("spade_gan", config, kind, "training" if kind == "train" else "run", **values)


def places(root: Path, dataset: Path) -> dict[str, str]:
    found = {"ckpt_dir": root / "models", "output_dir": root / "eval", "latest_dir": root, "dataset_dir": dataset}
    return {key: str(path) for key, path in found.items()}


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    found = places(tmp_path_factory.mktemp("spade_gan"), tiny_dataset)
    run("train.json", "train", **TINY, **found)
    return found


def sample(trained: dict[str, str], out: Path, **values: Any) -> Path:
    given = {"num_samples": 4, "batch_size": 3, "device": "cpu"} | places_of(trained) | values
    run("inference.json", "infer", output_dir=str(out), **given)
    return out / "Dataset900_SPADE"


@pytest.mark.slow
def test_training_writes_what_it_promises(trained: dict[str, str]) -> None:
    assert {p.name for p in Path(trained["ckpt_dir"]).glob("*.pt")} == {"model.pt", "last_model.pt"}
    for name in ("samples.png", "model_loss.png", "model_loss.csv", "samples/epoch_0001.png"):
        assert (Path(trained["output_dir"]) / name).is_file(), name
    content = load_file(Path(trained["ckpt_dir"]) / "model.pt", stage="generator")
    assert content["contract"]["dataset"]["name"] == "tiny"
    build_network(content["arch"]).load_state_dict(content["state_dict"])
    client = mlflow.MlflowClient(f"sqlite:///{trained['output_dir']}/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name("spade_gan").experiment_id])
    assert found.info.status == "FINISHED"
    losses = {"train_loss", "train_adversarial", "train_feature_matching", "train_discriminator", "val_mae"}
    assert losses <= set(found.data.metrics)
    assert client.list_artifacts(found.info.run_id, "samples")


@pytest.mark.slow
def test_properties_are_complete_and_the_network_takes_and_gives_what_metadata_says(
    trained: dict[str, str], tmp_path: Path
) -> None:
    made = bundle_runs.workflow("spade_gan", "train.json", "train", "training", **TINY, **trained)
    made.initialize()
    assert made.check_properties() == []
    made = bundle_runs.workflow(
        "spade_gan", "inference.json", "infer", "run", **places_of(trained), output_dir=str(tmp_path), device="cpu"
    )
    made.initialize()
    assert made.check_properties() == []
    meta = json.loads((SPADE_GAN / "configs" / "metadata.json").read_text())
    for side, channels in (("inputs", 8), ("outputs", 1)):
        (entry,) = meta["network_data_format"][side].values()
        assert entry["num_channels"] == channels
        entry["spatial_shape"] = [64, 64]  # of the tiny training
    (tmp_path / "metadata.json").write_text(json.dumps(meta))
    verify_net_in_out(
        net_id="network_def", config_file=str(SPADE_GAN / "configs" / "inference.json"),
        meta_file=str(tmp_path / "metadata.json"), device="cpu", bundle_root=str(SPADE_GAN), **places_of(trained),
    )  # fmt: skip


@pytest.mark.slow
def test_samples_are_what_evaluate_reads_and_nnunet_accepts(trained: dict[str, str], tmp_path: Path) -> None:
    folder = sample(trained, tmp_path)
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity").verify_dataset_integrity
    verify(str(folder), num_processes=1)
    lines = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1, 2, 3]
    assert set(lines[0]["checkpoints"]) == {"model.pt"}
    assert lines[0]["sampler"] == "generator"
    assert evaluate_folder(folder)["classes"]["lung"]["n"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("z_dim", [0, 16])
def test_same_seed_same_bytes_whatever_the_batch(tiny_dataset: Path, tmp_path: Path, z_dim: int) -> None:
    found = places(tmp_path / "run", tiny_dataset)
    run("train.json", "train", **TINY | {"max_epochs": 1}, z_dim=z_dim, **found)
    folders = [sample(found, tmp_path / str(b), batch_size=b, num_samples=8) for b in (1, 8)]
    late = sample(found, tmp_path / "late", seed=4, num_samples=4, batch_size=3)
    names = sorted(p.name for p in (folders[0] / "imagesTr").iterdir())
    assert len(names) == 8
    pictures = {name: (folders[0] / "imagesTr" / name).read_bytes() for name in names}
    assert pictures == {name: (folders[1] / "imagesTr" / name).read_bytes() for name in names}
    # four maps, so seeds 0 and 4 share one
    for path in (late / "imagesTr").iterdir():
        assert path.read_bytes() == pictures[path.name]
        stem, seed = path.name.removesuffix("_0000.png").split("_s00")
        twin = f"{stem}_s00{int(seed) - 4:04d}_0000.png"
        assert (pictures[twin] == pictures[path.name]) == (z_dim == 0)


def weights_of(found: dict[str, str]) -> dict[str, torch.Tensor]:
    """All weights and statistics of both networks, as they were saved last."""
    state = load_file(Path(found["ckpt_dir"]) / "last_model.pt")["state"]
    return {f"{net}.{key}": value for net in ("network", "discriminator") for key, value in state[net].items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.slow
def test_a_training_that_was_stopped_resumes_to_the_weights_of_one_that_was_not(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    values = TINY | {"max_epochs": 3, "z_dim": 8}
    whole, stopped = (places(tmp_path / name, tiny_dataset) for name in ("whole", "stopped"))
    run("train.json", "train", **values, **whole)

    def stop(engine: Any) -> None:
        raise RuntimeError("stop")

    made = bundle_runs.workflow("spade_gan", "train.json", "train", "training", **values, **stopped)
    made.initialize()
    engine = made.parser.get_parsed_content("train#trainer")
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=5), stop)  # in the second of epochs of three steps
    with pytest.raises(RuntimeError):
        made.run()
    assert not (Path(stopped["ckpt_dir"]) / "model.pt").exists()
    run("train.json", "train", **values, **stopped)
    assert_equal(weights_of(whole), weights_of(stopped))


@pytest.mark.slow
def test_a_training_that_was_killed_resumes_to_the_weights_of_one_that_was_not(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    """kill -9 after the first saved epoch, then the same command again."""
    found = {}
    for name in ("whole", "killed"):
        found[name] = places(tmp_path / name, tiny_dataset)
        run_it = command("training", "--config_file", str(SPADE_GAN / "configs" / "train.json"))
        run_it += options(TINY | {"max_epochs": 6, "val_interval": 6} | found[name])
        if name == "killed":
            kill_when_there(run_it, Path(found[name]["ckpt_dir"]) / "last_model.pt")
            assert not (Path(found[name]["ckpt_dir"]) / "model.pt").exists()
        printed = run_forked(run_it)
        assert ("resuming model from" in printed) == (name == "killed")
    assert_equal(weights_of(found["whole"]), weights_of(found["killed"]))


TWO_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from monai.bundle import ConfigWorkflow
from monai_synth import bundle

files, values = eval(sys.argv[1])
made = ConfigWorkflow(files, workflow_type="train", run_id="training", **values)
made.initialize()
made.run()
for name in ("network", "discriminator"):
    net = made.parser.get_parsed_content(name)
    assert isinstance(net, torch.nn.parallel.DistributedDataParallel), type(net)
    mine = torch.cat([p.detach().flatten() for p in net.parameters()])
    both = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(both, mine)
    assert torch.equal(*both), name
shown = made.parser.get_parsed_content("train#trainer").state.output["pred"]
both = [torch.empty_like(shown) for _ in range(2)]
dist.all_gather(both, shown)
assert not torch.equal(*both), "both processes saw the same images"
made.finalize()
"""


@pytest.mark.slow
def test_two_processes_see_different_images_end_with_equal_weights_and_write_one_file(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    files = [str(SPADE_GAN / "configs" / name) for name in ("train.json", "multi_gpu_train.json")]
    found = places(tmp_path, tiny_dataset)
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29621"]
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [*torchrun, str(script), repr((files, TINY | {"batch_size": 3} | found))], cwd=root, text=True,
        capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count("wrote " + found["ckpt_dir"]) + done.stderr.count("wrote " + found["ckpt_dir"]) == 1
    assert {p.name for p in Path(found["ckpt_dir"]).iterdir()} == {"model.pt", "last_model.pt"}
    made = weights_of(found)
    assert all(torch.isfinite(value).all() for value in made.values())
    client = mlflow.MlflowClient(f"sqlite:///{found['output_dir']}/mlruns.db")
    assert len(client.search_runs([client.get_experiment_by_name("spade_gan").experiment_id])) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0, allowed are integers from 1"),
        ({"split": "holdout"}, "allowed are training, validation, test"),
        ({"label_dir": "nowhere"}, "holds no label map"),
        ({"ckpt_dir": "nowhere"}, "there is no trained file"),
        ({"image_format": "jpg"}, "allowed are png, nii.gz"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_requests_end_in_one_message_and_write_nothing(
    trained: dict[str, str], tmp_path: Path, values: dict, message: str
) -> None:
    error = user_error(lambda: sample(trained, tmp_path / "out", **values))
    assert message in str(error)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_a_model_of_another_bundle_or_stage_is_refused(trained: dict[str, str], tmp_path: Path) -> None:
    for change, message in (
        ({"stage": "diffusion"}, r"holds the stage 'diffusion', needed is 'generator'"),
        ({"contract": {"bundle": "lsdm"}}, r"was trained by the bundle 'lsdm', this is 'spade_gan'"),
    ):
        content = torch.load(Path(trained["ckpt_dir"]) / "model.pt", weights_only=True) | change
        torch.save(content, tmp_path / "model.pt")
        error = user_error(lambda: sample(trained, tmp_path / "out", ckpt_dir=str(tmp_path)))
        assert re.search(message, str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": [60, 60]}, "multiples of 16"),
        ({"image_size": [48, 48]}, "is too small for 2 discriminators"),
        ({"preset": "big"}, "give --preset demo or --preset paper"),
        ({"perceptual_weights": "none.pth"}, "none.pth is not there"),
        ({"norm": "layer"}, "allowed are batch, instance"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_trainings_end_in_one_message(tiny_dataset: Path, tmp_path: Path, values: dict, message: str) -> None:
    error = user_error(lambda: run("train.json", "train", **(TINY | places(tmp_path, tiny_dataset) | values)))
    assert message in str(error)
    assert not list(tmp_path.rglob("*.pt"))

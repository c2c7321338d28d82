# SPDX-License-Identifier: Apache-2.0
"""Losses, noisy batches, and trainings that are killed and resumed."""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from monai_synth.checkpoint import load_file
from monai_synth.diffusion import add_noise, alphas_cumprod, training_target
from monai_synth.errors import UserError
from monai_synth.training import (
    EMA,
    EpochSeed,
    LatentDiffusionPrepareBatch,
    MLflowRun,
    StageCheckpoint,
    lr_decay,
    perceptual_loss,
    run_training,
)
from monai_synth.training.autoencoder import (
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_per_pixel,
)

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205,
    "prediction_type": "epsilon",
}  # fmt: skip


def test_kl_equals_torchs_divergence_of_two_gaussians() -> None:
    mean, sigma = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, sigma), normal(0.0, 1.0)).sum() / (3 * 256)
    torch.testing.assert_close(kl_per_pixel(mean, sigma, 256), expected)


def test_hinge_losses_are_zero_beyond_the_margin_and_linear_within() -> None:
    assert hinge_discriminator_loss(torch.tensor([1.5]), torch.tensor([-2.0])) == 0
    assert hinge_discriminator_loss(torch.tensor([0.5]), torch.tensor([0.25])) == pytest.approx(0.5 * (0.5 + 1.25))
    assert hinge_generator_loss(torch.tensor([3.0, -1.0])) == -1.0


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    rec, adv = (torch.tensor([3.0, 4.0]) * w).sum(), (torch.tensor([0.0, 2.0]) * w).sum()
    assert adaptive_weight(rec, adv, w) == pytest.approx(5.0 / 2.0, rel=1e-3)


def latents(n: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "mean": torch.randn(n, 3, 4, 4, generator=g), "std": torch.zeros(n, 3, 4, 4), "index": torch.arange(n),
        "cond": torch.randn(n, 3, 4, 4, generator=g), "seg": torch.ones(n, 8, 4, 4),
    }  # fmt: skip


def test_network_input_is_the_closed_form_of_the_forward_process_beside_the_scaled_map() -> None:
    batch = latents(5)
    inputs, eps, _, extra = LatentDiffusionPrepareBatch(SCHEDULE, scale_factor=2.0, seed=0)(batch)
    abar = alphas_cumprod(SCHEDULE)[extra["timesteps"]].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(inputs[:, :3], abar.sqrt() * 2.0 * batch["mean"] + (1 - abar).sqrt() * eps)
    torch.testing.assert_close(inputs[:, 3:], 2.0 * batch["cond"])


def test_training_targets_are_what_the_samplers_turn_back_into_the_data() -> None:
    x_0, eps, t = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 300, 700, 950, 999])
    for kind in ("epsilon", "sample", "v_prediction"):
        schedule = SCHEDULE | {"prediction_type": kind}
        scheduler = DDPMScheduler(**schedule, clip_sample=False)
        x_t = add_noise(schedule, x_0, eps, t)
        target = training_target(schedule, x_0, eps, t)
        for i, step in enumerate(t.tolist()):
            found = scheduler.step(target[i], step, x_t[i]).pred_original_sample
            torch.testing.assert_close(found, x_0[i], atol=2e-3, rtol=1e-3)


def test_validation_draws_depend_on_the_item_and_not_on_its_batch() -> None:
    batch = latents(6)
    prepare = LatentDiffusionPrepareBatch(SCHEDULE, scale_factor=1.0, seed=7)
    whole = prepare(batch)
    part = prepare({k: v[4:5] for k, v in batch.items()})
    assert torch.equal(whole[0][4:5], part[0])
    assert torch.equal(whole[3]["timesteps"][4:5], part[3]["timesteps"])
    assert not torch.equal(whole[1][0], whole[1][1])


def test_training_draws_every_timestep_alike() -> None:
    prepare = LatentDiffusionPrepareBatch(SCHEDULE, scale_factor=1.0)
    t, _ = prepare.draw(torch.Size([20_000, 1]), torch.arange(20_000), 0)
    assert t.min() == 0
    assert t.max() == 999
    counts = np.bincount(t.numpy() // 100, minlength=10)
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_learning_rates_start_whole_and_a_longer_training_decays_longer(name: str) -> None:
    short, long = lr_decay(name, 10), lr_decay(name, 20)
    assert short(0) == 1.0
    if name != "constant":
        assert short(10) == pytest.approx(0.0)
        assert long(10) == pytest.approx(0.5)
    with pytest.raises(UserError, match="constant, linear, second_half, cosine"):
        lr_decay("exp", 10)


class Numbers(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": torch.full((4,), index / 10.0), "label": torch.full((1,), index / 7.0)}


def tiny_training(folder: Path, max_epochs: int, *, handlers=(), contract=None, **options):
    torch.manual_seed(3)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_decay("linear", 6))
    data = Numbers()
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=5)
    ema = EMA(network, decay=0.9, warmup_iters=30)
    checkpoint = StageCheckpoint(
        folder / "model.pt", stage="diffusion", export=ema.ema_model, arch={"target": "x", "args": {}},
        objects={"network": network, "ema": ema.ema_model, "optimizer": optimizer, "lr_scheduler": scheduler},
        contract=contract or {"seed": 0}, **options,
    )  # fmt: skip
    losses: list[float] = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=max_epochs, train_data_loader=DataLoader(data, 4, sampler=sampler),
        network=network, optimizer=optimizer, loss_function=torch.nn.MSELoss(), decollate=False,
        train_handlers=[
            EpochSeed(11, sampler, data), ema, LrScheduleHandler(scheduler, print_lr=False), *handlers, checkpoint
        ],
    )  # fmt: skip
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["loss"].item()))
    return trainer, checkpoint, network, losses


class Stop:
    """Stops a training in the middle of an epoch, as kill does: nothing is saved on the way out."""

    def __init__(self, iteration: int, error: BaseException) -> None:
        self.iteration, self.error = iteration, error

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), self)

    def __call__(self, engine: Engine) -> None:
        raise self.error


def test_a_training_that_was_stopped_goes_on_to_the_very_weights_of_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    trainer, checkpoint, whole, losses = tiny_training(tmp_path / "a", 4)
    run_training(trainer, checkpoint)
    trainer, checkpoint, *_ = tiny_training(tmp_path / "b", 4, handlers=[Stop(13, RuntimeError("killed"))])
    with pytest.raises(RuntimeError, match="killed"):
        run_training(trainer, checkpoint)
    trainer, checkpoint, resumed, later = tiny_training(tmp_path / "b", 4)
    run_training(trainer, checkpoint)
    assert later == losses[10:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    averages = [load_file(tmp_path / way / "model.pt")["state_dict"] for way in ("a", "b")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_ranks_and_epochs_draw_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(lambda e, b: None)
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr("monai_synth.training.handlers.rank", lambda rank=rank: rank)
        for engine.state.epoch in (1, 2):
            EpochSeed(0)(engine)
            drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 4


def test_a_finished_training_is_left_alone_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    run_training(*tiny_training(tmp_path, 2)[:2])
    before = (tmp_path / "model.pt").read_bytes()
    trainer, checkpoint, _, losses = tiny_training(tmp_path, 2)
    run_training(trainer, checkpoint)
    assert losses == []
    assert (tmp_path / "model.pt").read_bytes() == before
    trainer, checkpoint, _, losses = tiny_training(tmp_path, 3)
    run_training(trainer, checkpoint)
    assert len(losses) == 5


def test_results_are_not_overwritten_when_resume_is_off(tmp_path: Path) -> None:
    run_training(*tiny_training(tmp_path, 1)[:2])
    with pytest.raises(UserError, match="resume is off, but .*model.pt exists and is not overwritten"):
        run_training(*tiny_training(tmp_path, 1, resume=False)[:2])


def test_an_unfinished_training_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    run_training(*tiny_training(tmp_path, 1)[:2])
    with pytest.raises(UserError, match=r"contract\.seed: 0 there, 1 here"):
        run_training(*tiny_training(tmp_path, 2, contract={"seed": 1})[:2])


@pytest.mark.parametrize("epochs", [0, -1, 2.5, "ten"])
def test_impossible_numbers_of_epochs_are_refused(tmp_path: Path, epochs) -> None:
    trainer, checkpoint, *_ = tiny_training(tmp_path, 1)
    trainer.state.max_epochs = epochs
    with pytest.raises(UserError, match="max_epochs is .*allowed are integers from 1"):
        run_training(trainer, checkpoint)


@pytest.fixture(scope="module")
def mlflow_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (RuntimeError("crash"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_mlflow_tells_how_a_run_ended(
    mlflow_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error, status: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = MLflowRun(mlflow_dir, experiment="lsdm", run=status, params={"a": {"b": 1}, "none": None}, checkpoint="m.pt")
    stops = [Stop(7, error)] if error else []
    trainer, checkpoint, *_ = tiny_training(tmp_path, 2, handlers=[run, *stops])
    if error is None:
        run_training(trainer, checkpoint)
    else:
        with pytest.raises(type(error)):
            run_training(trainer, checkpoint)
    client = mlflow.MlflowClient(f"sqlite:///{mlflow_dir}/mlruns.db")
    experiment = client.get_experiment_by_name("lsdm").experiment_id
    (found,) = [r for r in client.search_runs([experiment]) if r.info.run_name.startswith(status)]
    assert found.info.status == status
    assert found.data.params["a.b"] == "1"
    assert "none" not in found.data.params


def test_runs_of_processes_that_are_gone_are_marked_killed(mlflow_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    dead = MLflowRun(mlflow_dir, experiment="lsdm", run="dead", params={}, checkpoint="m.pt")
    trainer, *_ = tiny_training(tmp_path / "a", 1)
    dead.start(trainer)
    dead.client.set_tag(
        dead.cur_run.info.run_id, "monai_synth.process", f"{__import__('socket').gethostname()}/4194999"
    )
    run = MLflowRun(mlflow_dir, experiment="lsdm", run="next", params={}, checkpoint="m.pt")
    run_training(*tiny_training(tmp_path / "b", 1, handlers=[run])[:2])
    assert dead.client.get_run(dead.cur_run.info.run_id).info.status == "KILLED"


def test_lpips_takes_its_trunk_from_a_local_file_and_says_where_to_get_it(tmp_path: Path) -> None:
    assert perceptual_loss(None, "alex", "cpu") is None
    with pytest.raises(UserError, match="download torchvision's ImageNet state dict of alex"):
        perceptual_loss(str(tmp_path / "alex.pth"), "alex", "cpu")
    try:
        import torchvision
        from lpips import LPIPS
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs lpips and a torchvision that fits torch: {error}")
    trunk = torchvision.models.alexnet(weights=None)
    torch.save(trunk.state_dict(), tmp_path / "alex.pth")
    loss = perceptual_loss(str(tmp_path / "alex.pth"), "alex", "cpu")
    reference = LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    reference.net.slice1[0].load_state_dict(trunk.features[0].state_dict())
    for slice_, number in (
        (reference.net.slice2, 3),
        (reference.net.slice3, 6),
        (reference.net.slice4, 8),
        (reference.net.slice5, 10),
    ):
        next(m for m in slice_ if isinstance(m, torch.nn.Conv2d)).load_state_dict(trunk.features[number].state_dict())
    a, b = torch.rand(2, 1, 64, 64) * 2 - 1, torch.rand(2, 1, 64, 64) * 2 - 1
    torch.testing.assert_close(loss(a, b), reference(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)).mean())
    assert loss(a, a) == 0
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match="does not hold the features of alex"):
        perceptual_loss(str(tmp_path / "wrong.pth"), "alex", "cpu")

# SPDX-License-Identifier: Apache-2.0
"""Steps of the optimiser: accumulated, in mixed precision, compiled, recomputed; each against the plain way."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from test_precision import SCHEDULE, denoiser, example
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from monai_synth.checkpoint import load_file
from monai_synth.diffusion import HybridLoss
from monai_synth.errors import UserError
from monai_synth.networks import ClassUNet, JointUNet, SPADEUNet, TextUNet
from monai_synth.training import (
    EMA,
    AlignedNetwork,
    JointDiffusionPrepareBatch,
    LrSchedule,
    MixedPrecisionInferer,
    StageCheckpoint,
    lr_decay,
    run_training,
)

NUM_STEPS = 6  # of the optimiser, in two epochs


class Pairs(Dataset):
    """Twelve images with masks; their noise is drawn by their index."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.images = torch.randint(0, 256, (12, 1, 8, 8), generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        return {"image": image, "label": (image > 99).to(torch.uint8), "index": index}


def training(
    folder: Path, *, batch_size: int = 4, accumulate: int = 1, max_epochs: int = 2, precision: str = "float32",
    network: nn.Module | None = None, arch: dict[str, Any] | None = None, **options: Any,
) -> tuple[SupervisedTrainer, StageCheckpoint, EMA]:  # fmt: skip
    """The joint model's training in small."""
    network = denoiser("joint") if network is None else network
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_decay("linear", NUM_STEPS))
    ema = EMA(network, decay=0.9, warmup_iters=5)
    checkpoint = StageCheckpoint(
        folder / "model.pt", stage="diffusion", export=ema.ema_model, arch=arch or {"target": "x", "args": {}},
        objects={"network": network, "ema": ema.ema_model, "optimizer": optimizer, "lr_scheduler": scheduler},
        contract={}, record={"precision": precision, "accumulate": accumulate},
    )  # fmt: skip
    trainer = SupervisedTrainer(
        device=torch.device("cpu"), max_epochs=max_epochs, train_data_loader=DataLoader(Pairs(), batch_size),
        network=network, optimizer=optimizer, loss_function=HybridLoss(SCHEDULE, value_range=(-1, 1)),
        prepare_batch=JointDiffusionPrepareBatch(SCHEDULE, num_labels=2, value_range=(-1, 1), seed=0),
        inferer=MixedPrecisionInferer(precision, "cpu"), accumulation_steps=accumulate, decollate=False,
        train_handlers=[ema, LrSchedule(scheduler), checkpoint], **options,
    )  # fmt: skip
    return trainer, checkpoint, ema


def trained(folder: Path, **options: Any) -> dict[str, Tensor]:
    """The weights, and behind them the averaged ones, of a whole training."""
    trainer, checkpoint, ema = training(folder, **options)
    run_training(trainer, checkpoint)
    weights = checkpoint.objects["network"].state_dict()
    return {**weights, **{f"ema.{name}": value for name, value in ema.ema_model.state_dict().items()}}


def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 2), (1, 4)])
def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path, batch_size, accumulate):
    start = denoiser("joint").state_dict()
    whole = trained(tmp_path / "whole")
    parts = trained(tmp_path / "parts", batch_size=batch_size, accumulate=accumulate)
    moved = max(float((whole[name] - value).abs().max()) for name, value in start.items())
    assert moved > 1e-3
    assert largest(whole, parts) < 1e-4 * moved
    states = [load_file(tmp_path / way / "last_model.pt")["state"] for way in ("whole", "parts")]
    assert [s["lr_scheduler"]["last_epoch"] for s in states] == [NUM_STEPS] * 2


def test_the_gradient_of_accumulated_batches_is_that_of_one_large_batch():
    loss, prepare = HybridLoss(SCHEDULE, value_range=(-1, 1)), None
    gradients = []
    for batch_size in (12, 3):
        network = denoiser("joint")
        prepare = JointDiffusionPrepareBatch(SCHEDULE, num_labels=2, value_range=(-1, 1), seed=0)
        for batch in DataLoader(Pairs(), batch_size):
            x_t, target, _, kwargs = prepare(batch)
            (loss(network(x_t, **kwargs), target) * batch_size / 12).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 6), (2, 4), (3, 2), (6, 2)])
def test_average_and_rate_follow_each_step_and_an_epoch_ends_with_one(tmp_path, accumulate, steps):
    trainer, checkpoint, ema = training(tmp_path, accumulate=accumulate)
    made: list[int] = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *a, **k: (made.append(1), step(*a, **k))[1]
    averaged: list[int] = []
    update = ema._update_ema_model
    ema._update_ema_model = lambda *a: (averaged.append(1), update(*a))[1]
    run_training(trainer, checkpoint)
    assert len(made) == steps
    assert load_file(tmp_path / "last_model.pt")["state"]["lr_scheduler"]["last_epoch"] == steps
    assert ema.momentum_scheduler.event_index == steps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_that_accumulates_goes_on_to_the_very_weights_of_one_that_was_not_stopped(tmp_path, accumulate):
    whole = trained(tmp_path / "whole", accumulate=accumulate)
    trained(tmp_path / "parts", accumulate=accumulate, max_epochs=1)
    assert largest(whole, trained(tmp_path / "parts", accumulate=accumulate)) == 0


# Mixed precision.


class Spied(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.inside = network, set()
        network.conv_in.register_forward_hook(lambda m, args, out: self.inside.add(out.dtype))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.network(*args, **kwargs)


def test_under_autocast_the_network_computes_in_bfloat16_and_the_loss_and_the_weights_in_float32():
    spied = Spied(denoiser("joint"))
    x, t, _ = example("joint")
    expected = spied.network(x, t)
    spied.inside.clear()
    found = MixedPrecisionInferer("bfloat16", "cpu")(x, spied, t)
    assert spied.inside == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert 1e-4 < float(((found - expected).norm() / expected.norm()).detach()) < 0.02
    found.square().mean().backward()
    assert {p.grad.dtype for p in spied.parameters()} == {torch.float32}


def test_named_outputs_come_out_of_autocast_as_they_are_but_in_float32():
    x, t, given = example("class")
    aligned = AlignedNetwork(
        denoiser("class"), layer="middle_block", num_features=5, example={"x": x, "timesteps": t, **given}
    )
    features = torch.randn(len(x), 5)
    expected, found = (
        MixedPrecisionInferer(precision, "cpu")(x, aligned, t, expert_features=features, **given)
        for precision in ("float32", "bfloat16")
    )
    assert type(found) is type(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert float(((a - b).norm() / b.norm()).detach()) < 0.03


def test_a_training_in_bfloat16_stays_close_to_one_in_float32(tmp_path):
    start = denoiser("joint").state_dict()
    full, mixed = (trained(tmp_path / p, precision=p) for p in ("float32", "bfloat16"))
    moved = torch.cat([(full[name] - value).flatten() for name, value in start.items()])
    apart = torch.cat([(full[name] - mixed[name]).flatten() for name in start])
    assert (
        0 < float(apart.norm() / moved.norm()) < 0.25
    )  # Adam's first steps have the size of the rate, whatever the gradient


def test_float32_and_float16_leave_autocast_to_others():
    x, t, _ = example("joint")
    network = denoiser("joint")
    for precision in ("float32", "float16"):
        assert torch.equal(MixedPrecisionInferer(precision, "cpu")(x, network, t), network(x, t))


def test_both_files_say_how_each_stretch_of_epochs_was_computed_and_a_change_is_told(tmp_path, caplog):
    trained(tmp_path, max_epochs=1)
    trained(tmp_path, max_epochs=2)
    one = [{"until_epoch": 2, "precision": "float32", "accumulate": 1}]
    assert [load_file(tmp_path / f)["training"] for f in ("model.pt", "last_model.pt")] == [one] * 2
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, max_epochs=4, precision="bfloat16")
    both = [*one, {"until_epoch": 4, "precision": "bfloat16", "accumulate": 1}]
    assert [load_file(tmp_path / f)["training"] for f in ("model.pt", "last_model.pt")] == [both] * 2
    assert "goes on with {'precision': 'bfloat16'}, it was begun with {'precision': 'float32'}" in caplog.text
    trained(tmp_path, max_epochs=4)  # finished: nothing was computed in float32 since
    assert load_file(tmp_path / "model.pt")["training"] == both


# Compiled networks. The backend "eager" compiles nothing, but traces as all backends do.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spade", "joint", "class", "text"])
def test_every_denoiser_is_traced_as_one_graph_and_gives_the_same(kind):
    torch._dynamo.reset()
    network = denoiser(kind)
    x, t, given = example(kind)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t, **given), network(x, t, **given))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layer"), [("joint", "middle_block"), ("text", "unet.down_blocks.1")])
def test_a_compiled_alignment_sees_the_features_of_each_batch(kind, layer):
    torch._dynamo.reset()
    x, t, given = example(kind)
    aligned = AlignedNetwork(
        denoiser(kind), layer=layer, num_features=5, example={"x": x, "timesteps": t, **given}
    ).eval()
    compiled = torch.compile(aligned, backend="eager")
    features = torch.randn(len(x), 5)
    for batch in (x, x + 0.5, -x):
        expected = aligned(batch, t, expert_features=features, **given)
        found = compiled(batch, t, expert_features=features, **given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
def test_compiled_and_plain_trainings_continue_each_other_and_their_files_are_the_same(tmp_path):
    plain = trained(tmp_path / "plain")
    for first, then in ((True, False), (False, True)):
        torch._dynamo.reset()
        folder = tmp_path / f"{first}"
        trained(folder, max_epochs=1, compile=first, compile_kwargs={"backend": "eager"})
        found = trained(folder, compile=then, compile_kwargs={"backend": "eager"})
        assert largest(plain, found) < 1e-6
        for name in ("model.pt", "last_model.pt"):
            theirs, ours = (load_file(place / name) for place in (tmp_path / "plain", folder))
            keys = [(c["state_dict"] if name == "model.pt" else c["state"]["network"]).keys() for c in (theirs, ours)]
            assert keys[0] == keys[1]
            assert not any("_orig_mod" in key for key in keys[1])


# Activations that are computed again.

SMALL = {"image_size": (16, 16), "attention_resolutions": (8,), "num_heads": 2, "norm_num_groups": 8}
DEEP = {
    "spade": lambda **o: SPADEUNet(
        2, 4, 2, 3, (32, 64), attention_levels=(False, True), num_res_blocks=2, num_head_channels=8,
        norm_num_groups=8, spade_hidden_channels=32, **o,
    ),
    "joint": lambda **o: JointUNet(2, 1, 1, base_channels=32, channel_mult=(1, 2), **SMALL, **o),
    "class": lambda **o: ClassUNet(2, 1, 3, base_channels=32, channel_mult=(1, 2), **SMALL, **o),
    "text": lambda **o: TextUNet(
        1, 3, (16, 16), text_dim=8, block_out_channels=(32, 64), cross_attention=(True, True), layers_per_block=2,
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8, **o,
    ),
}  # fmt: skip


def gradients_and_kept(kind: str, use_checkpoint: bool) -> tuple[Tensor, int]:
    """Gradients of all weights, and bytes that the forward pass keeps for the backward pass, without the weights."""
    torch.manual_seed(0)
    network = DEEP[kind](use_checkpoint=use_checkpoint).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / max(weight[0].numel(), 1) ** 0.5)
    if kind == "text":
        network.set_text_features(torch.randn(3, 8, generator=generator))
    _, t, _ = example(kind)
    x = torch.randn(4, {"spade": 4, "joint": 2}.get(kind, 1), 16, 16, generator=generator)
    given = {"seg": (torch.rand(4, 3, 16, 16, generator=generator) > 0.5).float()} if kind == "spade" else {}
    given |= {"class_labels": torch.tensor([0, 1, 2, 0])} if kind in ("class", "text") else {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(value)
            sizes[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = network(x, t, **given)
    total = sum(sizes.values())
    output.square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]), total


@pytest.mark.parametrize("kind", DEEP)
def test_recomputing_gives_the_same_gradients_and_keeps_at_most_30_percent(kind):
    plain, much = gradients_and_kept(kind, False)
    again, little = gradients_and_kept(kind, True)
    assert float((plain - again).norm() / plain.norm()) < 1e-6
    assert little < 0.30 * much


def test_a_training_may_go_on_with_or_without_recomputing(tmp_path):
    arch = {"target": "x", "args": {"channels": 8}}
    trained(tmp_path, max_epochs=1, arch=arch)  # as a file of before the option was there
    with_option = {"target": "x", "args": {"channels": 8, "use_checkpoint": True}}
    trained(tmp_path, arch=with_option)
    assert load_file(tmp_path / "model.pt")["arch"] == with_option
    with pytest.raises(UserError, match=r"arch\.args\.channels: 8 there, 4 here"):
        trained(tmp_path, max_epochs=3, arch={"target": "x", "args": {"channels": 4}})


def test_plain_tensors_leave_the_batches(tmp_path):
    trainer, checkpoint, _ = training(tmp_path, max_epochs=1)
    seen: set[type] = set()
    network = checkpoint.objects["network"]
    network.register_forward_pre_hook(
        lambda m, args, kw: seen.update(map(type, [*args, *kw.values()])), with_kwargs=True
    )
    run_training(trainer, checkpoint)
    assert seen == {Tensor}
    assert MetaTensor not in seen

# SPDX-License-Identifier: Apache-2.0
"""The two-optimiser step of the autoencoder."""

from __future__ import annotations

import copy

import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import AutoencoderKL, PatchDiscriminator
from torch.utils.data import DataLoader

from monai_synth.training import AutoencoderTrainer
from monai_synth.training.autoencoder import last_decoder_weight


class Waves(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        line = torch.linspace(0, 6.28, 32)
        return {"image": (torch.sin(line * (1 + index % 3))[None, :] * torch.cos(line)[:, None])[None]}


def make(epochs: int, **options) -> AutoencoderTrainer:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        2, 1, 1, num_res_blocks=(1, 1), channels=(4, 8), attention_levels=(False, False), latent_channels=2,
        norm_num_groups=2, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    discriminator = PatchDiscriminator(2, channels=4, in_channels=1, num_layers_d=2, norm="INSTANCE")
    return AutoencoderTrainer(
        torch.device("cpu"), epochs, DataLoader(Waves(), 4), autoencoder, discriminator,
        torch.optim.Adam(autoencoder.parameters(), 5e-3), torch.optim.Adam(discriminator.parameters(), 1e-3), **options,
    )  # fmt: skip


def weights(network: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def test_reconstruction_improves_and_the_discriminator_waits_for_its_start() -> None:
    trainer = make(30, adversarial_start=1000)
    before, losses = weights(trainer.discriminator), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(e.state.output["l1"].item()))
    trainer.run()
    assert losses[-1] < 0.6 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer.discriminator), strict=True))


def test_from_its_start_on_the_discriminator_learns_and_reaches_the_decoder() -> None:
    plain, adversarial = make(2, adversarial_weight=0.0), make(2, adversarial_start=3)
    outputs = []
    keep = lambda e: outputs.append(e.state.output["loss_discriminator"])  # noqa: E731
    adversarial.add_event_handler(Events.ITERATION_COMPLETED, keep)
    before = weights(adversarial.discriminator)
    plain.run()
    adversarial.run()
    assert [float(o) > 0 for o in outputs] == [False, False, True, True]
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(adversarial.discriminator), strict=True))
    pairs = zip(weights(plain.autoencoder), weights(adversarial.autoencoder), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_the_autoencoders_step_leaves_no_gradient_for_the_discriminators() -> None:
    """One step from equal weights: the discriminator moves as it would without the generator's loss."""
    trainer = make(1, adversarial_start=1)
    twin = copy.deepcopy(trainer.discriminator)
    batch = next(iter(trainer.data_loader))
    trainer.state.iteration = 1
    output = trainer._iteration(trainer, batch)
    optimizer = torch.optim.Adam(twin.parameters(), 1e-3)
    logits = twin(torch.cat([batch["image"], output["pred"]]))[-1]
    real, fake = logits.chunk(2)
    (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
    optimizer.step()
    for a, b in zip(trainer.discriminator.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_last_weight_is_the_one_that_makes_the_image() -> None:
    weight = last_decoder_weight(make(1).autoencoder)
    assert weight.shape[0] == 1


@pytest.mark.parametrize("amp", [False, True])
def test_bfloat16_keeps_weights_in_float32(amp: bool) -> None:
    trainer = make(1, amp=amp, adversarial_start=1)
    trainer.run()
    assert {p.dtype for p in trainer.autoencoder.parameters()} == {torch.float32}
    assert trainer.state.output["pred"].dtype == (torch.bfloat16 if amp else torch.float32)

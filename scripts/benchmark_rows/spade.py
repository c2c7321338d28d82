# SPDX-License-Identifier: Apache-2.0
"""Rows of the SPADE network by itself: a call, the cache of its modulations, training on cached latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmark_rows.measure import Goal, Row, Run, compared, rows_of
from benchmark_rows.networks import NO_BF16, has_bf16, in_bf16, randomize

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0205}
LABELS, LATENT = 8, 3


def spade_network(channels: Sequence[int], hidden: int, *, like_monai: bool, monai: bool = False) -> nn.Module:
    """LSDM's denoiser; or the one that computes what MONAI's does; or MONAI's own in its default form."""
    heads = min(32, channels[0])
    groups = min(32, channels[0])
    levels = (False,) * (len(channels) - 1) + (True,)
    if monai:
        from monai.networks.nets import SPADEDiffusionModelUNet

        return SPADEDiffusionModelUNet(
            2, 2 * LATENT, LATENT, LABELS, 2, channels, levels, norm_num_groups=groups, num_head_channels=heads,
            spade_intermediate_channels=hidden,
        )  # fmt: skip
    from monai_synth.networks import SPADEUNet

    options: dict[str, Any] = {}
    if like_monai:
        options = {"spade_in": ("up",), "spade_variant": "monai", "semantic_downsample": "nearest"}
        options["time_scale_shift"] = False
    return SPADEUNet(
        2, 2 * LATENT, LATENT, LABELS, channels, num_res_blocks=2, attention_levels=levels, num_head_channels=heads,
        norm_num_groups=groups, spade_hidden_channels=hidden, **options,
    )  # fmt: skip


def autoencoder(channels: Sequence[int], *, preset: str = "demo") -> nn.Module:
    """A KL autoencoder of factor 2 to the number of levels minus one, as a preset of the bundle builds it."""
    from monai.networks.nets import AutoencoderKL

    levels, paper = len(channels), preset == "paper"
    return AutoencoderKL(
        2, 1, 1, [1 + paper] * levels, channels, (False,) * levels, LATENT,
        norm_num_groups=min(32 if paper else 8, channels[0]),
        with_encoder_nonlocal_attn=paper, with_decoder_nonlocal_attn=paper, use_flash_attention=True,
    )  # fmt: skip


def equal_spade_networks(channels: Sequence[int], hidden: int, device: str) -> tuple[nn.Module, nn.Module]:
    """Ours and MONAI's SPADE network with the same random weights."""
    torch.manual_seed(0)
    theirs = randomize(spade_network(channels, hidden, like_monai=True, monai=True))
    ours = spade_network(channels, hidden, like_monai=True)
    ours.load_monai_state_dict(theirs.state_dict())
    return ours.to(device).eval(), theirs.to(device).eval()


def spade_inputs(latent: int, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Map (B, 8, S, S), encoded map and noise (B, 3, S, S)."""
    seg = torch.nn.functional.one_hot(torch.randint(0, LABELS, (batch, latent, latent)), LABELS).movedim(-1, 1).float()
    cond, noise = (torch.randn(batch, LATENT, latent, latent, device=device) for _ in range(2))
    return seg.to(device), cond, noise


@rows_of(
    "spade-call",
    full={"channels": (64, 128, 192), "hidden": 128, "latent": 32, "batch": 4},
    quick={"channels": (64, 128, 192), "hidden": 128, "latent": 32, "batch": 1},
    tiny={"channels": (8, 16), "hidden": 8, "latent": 8, "batch": 1},
    gpu={"channels": (192, 384, 576, 768), "hidden": 128, "latent": 128, "batch": 8},
)
def spade_call(run: Run, *, channels: Sequence[int], hidden: int, latent: int, batch: int) -> list[Row]:
    """One call of the SPADE denoiser against MONAI's with the same weights."""
    ours, theirs = equal_spade_networks(channels, hidden, run.device)
    seg, cond, noise = spade_inputs(latent, batch, run.device)
    t = torch.full((batch,), 500, device=run.device)
    x = torch.cat([noise, cond], 1)
    results: dict[str, Tensor] = {}

    def keep(name: str, predict: Callable[[], Tensor]) -> Callable[[], None]:
        @torch.no_grad()
        def action() -> None:
            results[name] = predict()

        return action

    with torch.no_grad():
        modulations = ours.modulations(seg, (latent, latent))
    actions = {
        "ours": keep("ours", lambda: ours(x, t, modulations=modulations)),
        "uncached": keep("uncached", lambda: ours(x, t, seg=seg)),
        "MONAI": keep("MONAI", lambda: theirs(x, t, seg=seg)),
    }
    bf16 = has_bf16(run.device)
    if bf16:
        half = in_bf16(ours, run.device)
        with torch.no_grad():
            cached = half.modulations(seg, (latent, latent))
        actions["bf16"] = keep("bf16", lambda: half(x, t, modulations=cached))
    times = run.time(actions)
    scale = results["MONAI"].abs().max()

    def apart(name: str) -> str:
        difference = (results[name] - results["MONAI"]).abs().max()
        return f"largest difference of outputs {difference:.1e} ({difference / scale:.1e} of the largest output)"

    work = f"SPADE denoiser call, {latent} x {latent}, batch {batch}"
    rows = [
        compared("spade-call/fp32", f"{work}, float32, cached modulations", times, "MONAI", goal=Goal(0.40),
                 peer_name="MONAI default", note=f"same weights; {apart('ours')}"),
        compared("spade-call/uncached", f"{work}, float32, without the cache", times, "MONAI", ours="uncached",
                 peer_name="MONAI default", note=f"same weights; {apart('uncached')}"),
    ]  # fmt: skip
    label = f"{work}, bfloat16 weights, cached modulations"
    if bf16:
        rows.append(compared(
            "spade-call/bf16", label, times, "MONAI", ours="bf16", peer_name="MONAI default float32", goal=Goal(0.25),
            note=f"same weights, rounded; {apart('bf16')}",
        ))  # fmt: skip
    else:
        rows.append(Row("spade-call/bf16", label, "MONAI default", goal=Goal(0.25), skipped=NO_BF16))
    return rows


@rows_of(
    "spade-cache",
    full={"demo": ((32, 64, 64), 32, 1, 8), "quarter": ((32, 128, 256), 64, 2, 1), "latent": 32, "calls": 20},
    quick={"demo": ((32, 64, 64), 32, 1, 4), "quarter": ((32, 128, 256), 64, 2, 1), "latent": 32, "calls": 10},
    tiny={"demo": ((8, 16), 8, 1, 1), "latent": 8, "calls": 2},
    gpu={"paper": ((128, 512, 1024), 128, 2, 4), "latent": 128, "calls": 20},
)
def spade_cache(run: Run, *, latent: int, calls: int, **presets: tuple[Sequence[int], int, int, int]) -> list[Row]:
    """Sampling with SPADE's modulations computed once per case against at every step, in the bundle's own shapes."""
    from monai_synth.diffusion import make_sampler
    from monai_synth.inference import initial_noise, make_generators, sample
    from monai_synth.networks import SPADEUNet

    rows = []
    for preset, (channels, hidden, res_blocks, batch) in presets.items():
        torch.manual_seed(0)
        network = randomize(SPADEUNet(
            2, 2 * LATENT, LATENT, LABELS, channels, num_res_blocks=res_blocks, num_head_channels=min(32, channels[0]),
            attention_levels=(False,) * len(channels), norm_num_groups=8, spade_hidden_channels=hidden,
        )).to(run.device).eval()  # fmt: skip
        seg, cond, _ = spade_inputs(latent, batch, run.device)
        results: dict[str, Tensor] = {}

        @torch.no_grad()
        def draw(
            name: str, network: nn.Module = network, seg: Tensor = seg, cond: Tensor = cond, results: dict = results
        ) -> None:
            x_T = initial_noise((LATENT, latent, latent), make_generators(range(len(seg))), run.device)
            is_cached = name == "ours"
            extra = {"modulations": network.modulations(seg, (latent, latent))} if is_cached else {"seg": seg}
            sampler = make_sampler("dpm++", SCHEDULE, calls)
            results[name] = sample(lambda x, t: network(torch.cat([x, cond], 1), t, **extra), x_T, sampler)

        times = run.time({name: (lambda name=name, draw=draw: draw(name)) for name in ("ours", "at every call")})
        apart = (results["ours"] - results["at every call"]).abs().max() / results["ours"].abs().max()
        rows.append(compared(
            f"spade-cache/{preset}",
            f"LSDM {preset} network, {batch} latents of {latent} x {latent}, {calls} calls, SPADE cache",
            times, "at every call", peer_name="SPADE at every call", note=f"largest relative difference {apart:.1e}",
        ))  # fmt: skip
    return rows


@rows_of(
    "latents",
    full={"channels": (64, 128, 192), "hidden": 128, "ae_channels": (32, 64, 128), "latent": 32, "batch": 2},
    quick={"channels": (64, 128, 192), "hidden": 128, "ae_channels": (32, 64, 128), "latent": 32, "batch": 1},
    tiny={"channels": (8, 16), "hidden": 8, "ae_channels": (4, 8, 8), "latent": 8, "batch": 1},
    gpu={"channels": (192, 384, 576, 768), "hidden": 128, "ae_channels": (64, 128, 256), "latent": 128, "batch": 8},
)
def cached_latents(
    run: Run, *, channels: Sequence[int], hidden: int, ae_channels: Sequence[int], latent: int, batch: int
) -> list[Row]:
    """A training step of a latent model on cached latents against one that encodes, and MONAI's, which encodes."""
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.nets import DiffusionModelUNet
    from monai.networks.schedulers import DDPMScheduler

    from monai_synth.networks import SPADEUNet
    from monai_synth.training import LatentDiffusionPrepareBatch

    torch.manual_seed(0)
    size = latent * 2 ** (len(ae_channels) - 1)
    network_ae = autoencoder(ae_channels, preset="paper").to(run.device).eval()
    image = torch.randn(batch, 1, size, size, device=run.device)
    seg, cond, _ = spade_inputs(latent, batch, run.device)
    with torch.no_grad():
        mean, std = network_ae.encode(image)
    prepare = LatentDiffusionPrepareBatch(SCHEDULE, scale_factor=1.0)
    groups, levels = min(32, channels[0]), (False,) * (len(channels) - 1) + (True,)
    networks = {
        "spade": spade_network(channels, hidden, like_monai=False),
        "plain": SPADEUNet(2, LATENT, LATENT, 0, channels, num_res_blocks=2, attention_levels=levels, spade_in=(),
                           num_head_channels=groups, norm_num_groups=groups, time_scale_shift=False),
    }  # fmt: skip
    rows = []
    for name, goal in (("spade", 0.85), ("plain", 0.70)):
        network = networks[name].to(run.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

        def step(
            encode: bool, network: nn.Module = network, optimizer: Any = optimizer, plain: bool = name == "plain"
        ) -> None:
            with torch.no_grad():
                posterior = network_ae.encode(image) if encode else (mean, std)
            batchdata = {
                "mean": posterior[0],
                "std": posterior[1],
                "cond": cond,
                "seg": seg,
                "index": torch.arange(batch),
            }
            x, target, _, kwargs = prepare(batchdata, run.device)
            out = network(x[:, :LATENT], kwargs["timesteps"]) if plain else network(x, **kwargs)
            torch.nn.functional.mse_loss(out, target).backward()
            optimizer.step()
            optimizer.zero_grad()

        actions: dict[str, Callable[[], Any]] = {
            "ours": lambda step=step: step(False), "encode": lambda step=step: step(True)
        }  # fmt: skip
        if name == "plain":
            theirs = DiffusionModelUNet(
                2, LATENT, LATENT, 2, channels, levels, norm_num_groups=groups, num_head_channels=groups
            ).to(run.device)
            actions["MONAI"] = _inferer_step(
                LatentDiffusionInferer(DDPMScheduler(num_train_timesteps=1000)), network_ae, theirs, image, mean
            )
        times = run.time(actions)
        work = f"LDM training step, {size} x {size} -> {latent} x {latent} x {LATENT}, batch {batch}, {name}, cached"
        note = (
            "the same step that encodes the image each time (not the map: in its favour); float32; the autoencoder is "
            "that of the bundle's paper preset at a quarter of its width"
        )
        rows.append(compared(
            f"latents/{name}", work, times, "encode", peer_name="encoding each step", goal=Goal(goal), note=note
        ))  # fmt: skip
        if name == "plain":
            rows.append(compared(
                "latents/monai", work, times, "MONAI", peer_name="MONAI LatentDiffusionInferer, default network",
                note="MONAI's inferer encodes each step; torch's default AdamW there, fused here; equal parameters",
            ))  # fmt: skip
    return rows


def _inferer_step(
    inferer: Any, encoder: nn.Module, network: nn.Module, image: Tensor, like: Tensor
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        noise = torch.randn_like(like)
        t = torch.randint(0, 1000, (len(image),), device=image.device)
        out = inferer(image, encoder, network, noise, t)
        torch.nn.functional.mse_loss(out, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

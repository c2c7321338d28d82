# SPDX-License-Identifier: Apache-2.0
"""Rows on quality: how far solvers end from the ODE's solution, and what samples of equal quality cost.

The denoiser of these rows is exact: the posterior mean of a Gaussian mixture, in closed form. So the distance between a
solver and the converged solution from the same noise is the solver's error alone, without a network's and without the
noise of a Frechet distance.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmark_rows.measure import Goal, Row, Run, compared, rows_of
from benchmark_rows.networks import INSTALL, call, has_bf16, has_lucidrains, in_bf16, parameters_of, unet

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
DEFAULT_CALLS = 20
PEER_CALLS = 50


class MixtureDenoiser(nn.Module):
    """The exact eps of a mixture of Gaussians that share a diagonal covariance.

    The variances fall with a power of the index, as the spectrum of images does; half of the total lies between the
    components. Which orthogonal basis the numbers are in makes no difference to any solver.

    Args:
        side: samples are (1, side, side).
        components: K.
        power: of the fall of the variances.
        seed: of the means.
    """

    def __init__(self, side: int = 16, components: int = 10, *, power: float = 2.0, seed: int = 0) -> None:
        super().__init__()
        self.side = side
        spectrum = torch.arange(1, side * side + 1, dtype=torch.float64) ** -power
        spectrum = spectrum / spectrum.sum() * side * side * 0.25  # a standard deviation of 0.5 for each pixel
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(components, side * side, generator=generator, dtype=torch.float64)
        self.register_buffer("means", draws * (spectrum / 2).sqrt())
        self.register_buffer("variances", spectrum / 2)
        from monai_synth.diffusion import alphas_cumprod

        self.register_buffer("table", alphas_cumprod(SCHEDULE))

    def draw(self, number: int, seed: int) -> Tensor:
        """Samples of the mixture itself (B, D)."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(0, len(self.means), (number,), generator=generator)
        noise = torch.randn(number, len(self.variances), generator=generator, dtype=torch.float64)
        return self.means[which] + noise * self.variances.sqrt()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of the mixture."""
        mean = self.means.mean(0)
        centred = self.means - mean
        return mean, torch.diag(self.variances) + centred.T @ centred / len(self.means)

    def eps(self, x: Tensor, abar: float) -> Tensor:
        """The noise expected in x (B, D), float64, at a share abar of the data's variance."""
        root = math.sqrt(abar)
        spread = abar * self.variances + 1 - abar
        away = x[:, None] - root * self.means
        weights = torch.softmax(-(away.square() / (2 * spread)).sum(-1), dim=1)
        # Given a component, the expected data are its mean and a share of the way to x; eps is what is left of x.
        away = (weights[..., None] * away).sum(1)
        return math.sqrt(1 - abar) * away / spread

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        """As a network: x (B, 1, S, S) and t -> eps."""
        abar = float(self.table[int(timesteps.flatten()[0])])
        return self.eps(x.flatten(1).double(), abar).view(x.shape).to(x.dtype)


def ode_solution(denoiser: MixtureDenoiser, x_T: Tensor, steps: int = 400) -> Tensor:
    """Where the probability-flow ODE leads from x_T, with Runge and Kutta's fourth-order steps in float64.

    With y = x / sqrt(abar) and s = sqrt((1 - abar) / abar) the ODE is dy/ds = eps; it is walked evenly in log s from
    the last timestep to the first, then in one step to s = 0, as samplers do.
    """
    table = denoiser.table
    first, last = (0.5 * math.log((1 - float(abar)) / float(abar)) for abar in (table[-1], table[0]))

    def slope(y: Tensor, log_s: float) -> Tensor:
        s = math.exp(log_s)
        abar = 1 / (1 + s * s)
        return s * denoiser.eps(y * math.sqrt(abar), abar)

    y = x_T.flatten(1).double() / math.sqrt(float(table[-1]))
    h = (last - first) / steps
    for number in range(steps):
        u = first + number * h
        a = slope(y, u)
        b = slope(y + h / 2 * a, u + h / 2)
        c = slope(y + h / 2 * b, u + h / 2)
        d = slope(y + h * c, u + h)
        y = y + h / 6 * (a + 2 * b + 2 * c + d)
    return (y - slope(y, last)).view(x_T.shape)


def our_samples(denoiser: nn.Module, x_T: Tensor, name: str, calls: int) -> Tensor:
    """Samples by one of our solvers."""
    from monai_synth.diffusion import make_sampler
    from monai_synth.inference import sample

    return sample(lambda x, t: denoiser(x, t), x_T, make_sampler(name, SCHEDULE, calls))


def monai_samples(denoiser: nn.Module, x_T: Tensor, name: str, calls: int) -> Tensor:
    """Samples by MONAI's inferer, without clipping."""
    from monai.inferers import DiffusionInferer
    from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

    kind = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[name]
    scheduler = kind(num_train_timesteps=1000, schedule="linear_beta", clip_sample=False)
    scheduler.set_timesteps(calls)
    return DiffusionInferer(scheduler).sample(x_T, denoiser, scheduler, verbose=False)


def diffusers_samples(denoiser: nn.Module, x_T: Tensor, calls: int) -> Tensor:
    """Samples by diffusers' DDIM with its default spacing, without clipping; what its pipeline does after the noise."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(calls)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t), t, x).prev_sample
    return x


def rmse(a: Tensor, b: Tensor) -> float:
    """Root mean square distance."""
    return float((a.double() - b.double()).square().mean().sqrt())


def frechet(samples: Tensor, mean: Tensor, covariance: Tensor, components: int = 24) -> float:
    """Frechet distance to a distribution on its first principal components, in percent of its variance there."""
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors[:, -components:]
    own = samples.flatten(1).double() @ basis
    a_mean, b_mean = own.mean(0), mean @ basis
    a_cov, b_cov = torch.cov(own.T), torch.diag(values[-components:])
    root = torch.diag(values[-components:].sqrt())
    cross = torch.linalg.eigvalsh(root @ a_cov @ root).clamp_min(0).sqrt().sum()
    distance = (a_mean - b_mean).square().sum() + a_cov.trace() + b_cov.trace() - 2 * cross
    return 100 * float(distance / b_cov.trace())


def fewest_calls(denoiser: nn.Module, x_T: Tensor, truth: Tensor, limit: float, most: int = PEER_CALLS) -> int:
    """Fewest calls of the default solver that end within a distance of the ODE's solution."""
    for calls in range(4, most + 1):
        if rmse(our_samples(denoiser, x_T, "dpm++", calls), truth) <= limit:
            return calls
    return most


def _noises(side: int, batch: int, rounds: int) -> list[Tensor]:
    return [torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(i)) for i in range(rounds)]


@rows_of(
    "solver",
    full={"side": 16, "batch": 256, "ancestral": True},
    quick={"side": 16, "batch": 64, "ancestral": False},
    tiny={"side": 4, "batch": 16, "ancestral": False},
)
def solver_rows(run: Run, *, side: int, batch: int, ancestral: bool) -> list[Row]:
    """Distance to the ODE's solution, and a Frechet distance, of the default solver and the peers' usual ones."""
    denoiser = MixtureDenoiser(side)
    errors: dict[str, list[float]] = {"ours": [], "MONAI": [], "diffusers": []}
    distances: dict[str, list[float]] = {"ours": [], "MONAI": [], "MONAI ddpm": [], "draws": []}
    mean, covariance = denoiser.moments()
    for number, x_T in enumerate(_noises(side, batch, run.rounds)):
        truth = ode_solution(denoiser, x_T)
        made = {
            "ours": our_samples(denoiser, x_T, "dpm++", DEFAULT_CALLS),
            "MONAI": monai_samples(denoiser, x_T, "ddim", PEER_CALLS),
            "diffusers": diffusers_samples(denoiser, x_T, PEER_CALLS),
        }
        for name, samples in made.items():
            errors[name].append(rmse(samples, truth))
        torch.manual_seed(number)
        if ancestral:
            made["MONAI ddpm"] = monai_samples(denoiser, x_T, "ddpm", 1000)
        made["draws"] = denoiser.draw(batch, number + 1000)
        for name in distances:
            if name in made:
                distances[name].append(frechet(made[name], mean, covariance))
    floor = sum(distances["draws"]) / run.rounds
    work = f"{DEFAULT_CALLS} calls of dpm++, distance to the ODE's solution"
    note = (
        f"root mean square over {run.rounds} batches of {batch}, data of standard deviation 0.5; the denoiser is "
        f"exact: a Gaussian mixture over {side * side} numbers with the spectrum of images; the same on every machine"
    )
    rows = [
        compared(f"solver/rmse/{peer}", work, errors, peer, peer_name=f"{peer} DDIM, {PEER_CALLS} calls", unit="",
                 goal=Goal(0.8), note=note)
        for peer in ("MONAI", "diffusers")
    ]  # fmt: skip
    frechet_note = (
        "Frechet distance to the mixture on 24 principal components, in percent of the variance; exact draws, as many, "
        f"have {floor:.2g}: below that is noise"
    )
    for peer, name in (("MONAI", f"DDIM, {PEER_CALLS} calls"), ("MONAI ddpm", "DDPM, 1000 calls")):
        if distances[peer]:
            rows.append(compared(
                f"solver/frechet/{peer.replace(' ', '-')}", f"{DEFAULT_CALLS} calls of dpm++, Frechet distance",
                distances, peer, peer_name=f"MONAI {name}", unit="%", note=frechet_note,
            ))  # fmt: skip
    if run.class_model:
        rows.append(_trained_row(run, batch))
    return rows


def _trained_row(run: Run, batch: int) -> Row:
    """The same with a trained network of cfg_ddpm, told the first class; the reference is dpm++ with 250 calls."""
    from diffusers import DDIMScheduler

    from monai_synth.diffusion import make_sampler
    from monai_synth.inference import sample
    from monai_synth.inference.model import load_model

    model = load_model("cfg_ddpm", run.class_model, device=run.device)
    schedule = model.contract["schedule"]
    shape = (min(batch, 32), model.contract["image_channels"], *model.contract["image_size"])
    labels = torch.zeros(shape[0], dtype=torch.long, device=run.device)

    @torch.no_grad()
    def network(x: Tensor, t: Tensor) -> Tensor:
        return model.network(x, t.expand(len(x)), class_labels=labels)

    errors: dict[str, list[float]] = {"ours": [], "diffusers": []}
    for number in range(min(run.rounds, 3)):
        x_T = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(run.device)
        truth = sample(network, x_T, make_sampler("dpm++", schedule, 250))
        ours = sample(network, x_T, make_sampler("dpm++", schedule, DEFAULT_CALLS))
        scheduler = DDIMScheduler(**schedule, clip_sample=False)
        scheduler.set_timesteps(PEER_CALLS)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        errors["ours"].append(rmse(ours, truth))
        errors["diffusers"].append(rmse(x, truth))
    return compared(
        "solver/rmse/trained", f"the same with the network of {run.class_model}, no guidance", errors, "diffusers",
        peer_name=f"diffusers DDIM, {PEER_CALLS} calls", unit="", goal=Goal(0.8),
        note=f"batches of {shape[0]}, first class; the reference is dpm++ with 250 calls, not clipped",
    )  # fmt: skip


@rows_of(
    "equal-quality",
    full={"side": 16, "size": 32, "base": 32, "mult": (1, 2, 2), "attention": (8,), "batch": 64, "timed": 5},
    quick={"side": 16, "size": 32, "base": 32, "mult": (1, 2, 2), "attention": (8,), "batch": 16, "timed": 5},
    tiny={"side": 4, "size": 16, "base": 8, "mult": (1, 2), "attention": (8,), "batch": 2, "timed": 2},
    gpu={"side": 16, "size": 128, "base": 128, "mult": (1, 2, 2, 4), "attention": (16,), "batch": 64, "timed": 10},
)
def equal_quality(run: Run, *, side: int, batch: int, timed: int, **shape: Any) -> list[Row]:
    """64 samples by our default solver and by each peer's pipeline, all within one distance of the ODE's solution."""
    denoiser = MixtureDenoiser(side)
    x_T = _noises(side, 256 if side > 4 else 16, 1)[0]
    truth = ode_solution(denoiser, x_T)
    limits = {
        "MONAI": rmse(monai_samples(denoiser, x_T, "ddim", PEER_CALLS), truth),
        "diffusers": rmse(diffusers_samples(denoiser, x_T, PEER_CALLS), truth),
    }
    calls = fewest_calls(denoiser, x_T, truth, min(limits.values()))
    actions, millions = sampling_actions(run.device, batch, timed, shape)
    times = run.time(actions, rounds=max(1, min(run.rounds, 3)))
    part = 64 / batch / timed
    size = shape["size"]
    rows = []
    names = {
        "diffusers": "diffusers DDIMPipeline", "MONAI": "MONAI DiffusionInferer, DDIM",
        "denoising-diffusion-pytorch": "denoising-diffusion-pytorch, DDIM",
    }  # fmt: skip
    for own, kind in (("ours", "float32"), ("bf16", "bfloat16")):
        for peer, name in names.items():
            key = f"equal-quality/{peer}/{'fp32' if own == 'ours' else own}"
            work = f"64 samples of {size} x {size} at equal distance to the ODE, base {shape['base']}, {kind}"
            if own not in actions:
                continue
            if peer not in actions:
                rows.append(Row(key, work, name, skipped=f"not installed; {INSTALL}"))
                continue
            rows.append(compared(
                key, work, times, peer, ours=own, times_faster=True, scale=calls * part, peer_scale=PEER_CALLS * part,
                peer_name=f"{name}, {PEER_CALLS} calls",
                note=f"{calls} calls of dpm++ end as close to the ODE's solution as the nearest peer's {PEER_CALLS} do "
                f"(exact denoiser, distance {min(limits.values()):.2g}; what bfloat16 changes is not in it); {batch} "
                f"samples and {timed} calls of each timed and scaled; parameters in "
                "millions: " + ", ".join(f"{n} {m:.2f}" for n, m in millions.items()),
            ))  # fmt: skip
    return rows


def sampling_actions(
    device: str, batch: int, calls: int, shape: dict[str, Any]
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Sampling of a batch with so many calls by each library, and the parameters of its network in millions."""
    torch.manual_seed(0)
    shape = {"in_channels": 1, "out_channels": 1, "groups": min(32, shape["base"])} | shape
    names = ["ours", "MONAI", "diffusers", *(["denoising-diffusion-pytorch"] if has_lucidrains() else [])]
    networks = {name: unet(name, **shape).to(device).eval() for name in names}
    millions = {name: parameters_of(network) / 1e6 for name, network in networks.items()}
    x_T = torch.randn(batch, 1, shape["size"], shape["size"], device=device)
    actions: dict[str, Callable[[], object]] = {
        "ours": lambda: our_samples(lambda x, t: call(networks["ours"], x, t), x_T, "dpm++", calls),
        "MONAI": lambda: monai_samples(networks["MONAI"], x_T, "ddim", calls),
        "diffusers": _pipeline(networks["diffusers"], device, batch, calls),
    }
    if has_bf16(device):
        half = in_bf16(networks["ours"], device)
        actions["bf16"] = lambda: our_samples(lambda x, t: call(half, x, t), x_T, "dpm++", calls)
    if "denoising-diffusion-pytorch" in networks:
        actions["denoising-diffusion-pytorch"] = _lucidrains(
            networks["denoising-diffusion-pytorch"], device, batch, calls, shape["size"]
        )
    return actions, millions


def _pipeline(network: nn.Module, device: str, batch: int, calls: int) -> Callable[[], object]:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(network, DDIMScheduler(clip_sample=False)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(batch_size=batch, num_inference_steps=calls, output_type="np")


def _lucidrains(network: nn.Module, device: str, batch: int, calls: int, size: int) -> Callable[[], object]:
    from denoising_diffusion_pytorch import GaussianDiffusion

    diffusion = GaussianDiffusion(
        network, image_size=size, timesteps=1000, sampling_timesteps=calls, beta_schedule="linear"
    ).to(device)

    def draw() -> object:
        with contextlib.redirect_stderr(io.StringIO()):  # it shows a progress bar and has no switch for it
            return diffusion.sample(batch_size=batch)

    return draw

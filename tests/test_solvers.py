# SPDX-License-Identifier: Apache-2.0
"""Every solver, on every bundle's schedule, comes to the same solution of the same equation as its calls grow."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor

from monai_synth.diffusion import SAMPLERS, alphas_cumprod, make_sampler, signal_and_noise
from monai_synth.diffusion.flow import is_flow
from monai_synth.inference import sample

BUNDLES = Path(__file__).resolve().parents[1] / "bundles"
DETERMINISTIC = ("ddim", "dpm++", "unipc")

# Data: a mixture of three Gaussians in one dimension, so that the equation is not linear.
WEIGHTS, MEANS, STDS = torch.tensor([[0.4, 0.3, 0.3], [-0.8, 0.1, 0.7], [0.08, 0.3, 0.15]], dtype=torch.float64)


def schedule_of(bundle: str, config: str) -> dict:
    found = json.loads((BUNDLES / bundle / "configs" / f"{config}.json").read_text())["schedule"]
    return {key: value for key, value in found.items() if key != "prediction_type"}  # a reference; eps is the default


SCHEDULES = {bundle: schedule_of(bundle, "train") for bundle in ("lsdm", "jdm", "cfg_ddpm", "fad")}
SCHEDULES["rflow"] = schedule_of("cfg_ddpm", "rflow")  # the same in every bundle
EVERY_SCHEDULE = pytest.mark.parametrize("name", sorted(SCHEDULES))


def mixture(schedule: dict, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances of the three Gaussians of x_t, and the factor of the data."""
    data, noise = signal_and_noise(schedule, torch.tensor(t), table=None if is_flow(schedule) else table_of(schedule))
    return data.sqrt() * MEANS, data * STDS**2 + noise, data.sqrt()


def table_of(schedule: dict) -> Tensor:
    return _table(json.dumps(schedule))


@cache
def _table(described: str) -> Tensor:
    return alphas_cumprod(json.loads(described))


def denoiser(schedule: dict) -> Callable[[Tensor, Tensor], Tensor]:
    """The best prediction of the noise, or of a flow's velocity, for that mixture (Tweedie's formula)."""

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        means, variances, factor = mixture(schedule, int(t[0]))
        away = x_t[..., None] - means
        log_p = -(away**2) / variances / 2 - variances.log() / 2 + WEIGHTS.log()
        data = (log_p.softmax(-1) * (MEANS + factor * STDS**2 / variances * away)).sum(-1)
        eps = (x_t - factor * data) / (variances[0] - factor**2 * STDS[0] ** 2).sqrt()
        return data - eps if is_flow(schedule) else eps

    return predict


def distribution(schedule: dict, t: int | None, x: Tensor) -> Tensor:
    """The distribution function of x_t, or of the data."""
    means, variances = (MEANS, STDS**2) if t is None else mixture(schedule, t)[:2]
    return (WEIGHTS * torch.special.ndtr((x[..., None] - means) / variances.sqrt())).sum(-1)


def exact(schedule: dict, x_T: Tensor) -> Tensor:
    """Where the probability-flow equation takes x_T: in one dimension paths do not cross, so quantiles remain."""
    last = schedule["num_train_timesteps"] - (0 if is_flow(schedule) else 1)
    wanted = distribution(schedule, last, x_T)
    low, high = torch.full_like(x_T, -5), torch.full_like(x_T, 5)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(schedule, None, middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle


@cache
def error(name: str, sampler: str, num_steps: int) -> float:
    """Root mean square distance to the exact solution from the same noise."""
    schedule = SCHEDULES[name]
    noise = torch.randn(1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x_0 = sample(denoiser(schedule), noise, make_sampler(sampler, schedule, num_steps))
    return float((x_0 - exact(schedule, noise)).square().mean().sqrt())


@EVERY_SCHEDULE
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_every_solver_comes_closer_to_the_exact_solution_with_every_more_calls(name: str, sampler: str) -> None:
    errors = [error(name, sampler, n) for n in (10, 20, 50)]
    assert errors == sorted(errors, reverse=True)
    # LSDM's schedule ends with a beta of 0.0015, whose noise no solver can tell from data
    assert error(name, sampler, 200) < 0.01


@EVERY_SCHEDULE
@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_the_second_order_solvers_are_closer_with_20_calls_than_ddim_with_50(name: str, sampler: str) -> None:
    assert error(name, sampler, 20) < 0.8 * error(name, "ddim", 50)


@EVERY_SCHEDULE
def test_ancestral_samples_have_the_distribution_of_the_data(name: str) -> None:
    schedule = SCHEDULES[name]
    torch.manual_seed(0)
    x_0 = sample(denoiser(schedule), torch.randn(4000, 1).double(), make_sampler("ddpm", schedule, 100)).flatten()
    points = torch.linspace(-1, 1, 21, dtype=torch.float64)
    found = (x_0[:, None] < points).double().mean(0)
    assert float((found - distribution(schedule, None, points)).abs().max()) < 0.05


@pytest.mark.parametrize("bundle", ["lsdm", "jdm", "cfg_ddpm", "fad"])
def test_sampler_and_number_of_calls_of_a_bundle_are_options_of_its_inference(bundle: str) -> None:
    config = json.loads((BUNDLES / bundle / "configs" / "inference.json").read_text())
    calls = 10 if bundle == "lsdm" else 20  # measured: the tables in the bundles' docs
    assert (config["sampler"], config["num_steps"]) == ("dpm++", calls)
    parser = ConfigParser(config | {"sampler": "ddim", "num_steps": 7})
    for user in ("inferer", "record"):
        assert parser.get_parsed_content(f"{user}#sampler") == "ddim"
        assert parser.get_parsed_content(f"{user}#num_steps") == 7
    assert {"dpm++", "unipc", "ddim", "ddpm"} == set(SAMPLERS)

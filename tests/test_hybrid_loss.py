# SPDX-License-Identifier: Apache-2.0
"""L_hybrid: its bound is 0 at the posterior and trains the variance only."""

from __future__ import annotations

import math

import ignite.metrics
import pytest
import torch
from ignite.engine import Engine
from scipy.stats import norm

from monai_synth.diffusion import DiffusionTarget, HybridLoss, add_noise, alphas_cumprod, training_target
from monai_synth.errors import UserError

KINDS = ("epsilon", "sample", "v_prediction")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def schedule(kind: str = "epsilon", num_steps: int = 1000) -> dict:
    return {
        "num_train_timesteps": num_steps,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "prediction_type": kind,
    }


def batch(t: list[int], dtype: torch.dtype = torch.float64) -> DiffusionTarget:
    """8-bit data of two channels, in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(0, 256, (len(t), 2, 5, 5), generator=generator).to(dtype) / 255
    eps = torch.randn(x_0.shape, generator=generator, dtype=dtype)
    return DiffusionTarget(x_0, add_noise(schedule(), x_0, eps, torch.tensor(t)), eps, torch.tensor(t))


def outputs(target: DiffusionTarget, kind: str, v: float, error: float = 0.0) -> torch.Tensor:
    """The true target with an error, beside v."""
    prediction = training_target(schedule(kind), target.x_0, target.eps, target.t) + error
    return torch.cat([prediction, torch.full_like(prediction, v)], dim=1)


class TestBound:
    def test_it_is_exactly_0_where_mean_and_variance_are_the_posterior_s(self):
        target = batch([1, 2, 500, 999], torch.float32)
        mse, vlb = HybridLoss(schedule("sample"), value_range=(0, 1)).terms(outputs(target, "sample", -1), target)
        assert (vlb == 0).all()
        assert (mse == 0).all()

    @EVERY_KIND
    def test_it_is_0_for_every_kind_of_prediction(self, kind):
        target = batch([1, 2, 500, 999])
        _, vlb = HybridLoss(schedule(kind), value_range=(0, 1)).terms(outputs(target, kind, -1), target)
        torch.testing.assert_close(vlb, torch.zeros_like(vlb), rtol=0, atol=1e-12)

    def test_its_values_are_bits_of_independent_formulas(self):
        """KL of torch.distributions for t > 0, difference of scipy's distribution functions at t = 0."""
        target = batch([0, 1, 700])
        _, vlb = HybridLoss(schedule(), value_range=(0, 1)).terms(outputs(target, "epsilon", 0.5, 0.2), target)
        table = alphas_cumprod(schedule())
        for i, t in enumerate([0, 1, 700]):
            abar, before = table[t], table[t - 1] if t else torch.ones((), dtype=torch.float64)
            beta = 1 - abar / before
            u = max(t, 1)  # at t = 0 the posterior's variance is 0, that of t = 1 stands there
            tilde = (1 - table[u - 1]) / (1 - table[u]) * (1 - table[u] / table[u - 1])
            x_0, x_t = target.x_0[i], target.x_t[i]
            x_0_hat = (x_t - (1 - abar).sqrt() * (target.eps[i] + 0.2)) / abar.sqrt()
            mean, true_mean = (
                before.sqrt() * beta / (1 - abar) * x + (abar / before).sqrt() * (1 - before) / (1 - abar) * x_t
                for x in (x_0_hat, x_0)
            )
            std = torch.full_like(mean, float(beta**0.75 * tilde**0.25) ** 0.5)
            if t:
                true = torch.distributions.Normal(true_mean, tilde.sqrt())
                nats = torch.distributions.kl_divergence(true, torch.distributions.Normal(mean, std))
            else:
                upper = torch.where(x_0 == 1, math.inf, x_0 + 0.5 / 255).numpy()
                lower = torch.where(x_0 == 0, -math.inf, x_0 - 0.5 / 255).numpy()
                nats = -torch.log(torch.from_numpy(norm.cdf(upper, mean, std) - norm.cdf(lower, mean, std)))
            assert float(vlb[i]) == pytest.approx(float(nats.mean()) / math.log(2), abs=1e-5)

    @EVERY_KIND
    def test_its_gradient_reaches_only_the_variance(self, kind):
        target = batch([0, 1, 500, 999])
        output = outputs(target, kind, 0.3, 0.1).requires_grad_()
        _, vlb = HybridLoss(schedule(kind), value_range=(0, 1)).terms(output, target)
        (gradient,) = torch.autograd.grad(vlb.sum(), output)
        assert (gradient[:, :2] == 0).all()
        assert (gradient[:, 2:] != 0).all()

    @EVERY_KIND
    def test_it_does_not_change_the_gradient_of_the_mean(self, kind):
        target = batch([0, 1, 500, 999])
        output = outputs(target, kind, 0.3, 0.1)
        with_bound, without = (
            torch.autograd.grad(HybridLoss(schedule(kind), value_range=(0, 1), vlb_weight=w)(o, target), o)[0]
            for w, o in ((0.001, output.clone().requires_grad_()), (0.0, output.clone().requires_grad_()))
        )
        assert torch.equal(with_bound[:, :2], without[:, :2])
        assert (with_bound[:, 2:] != 0).all()
        assert (without[:, 2:] == 0).all()

    def test_descent_on_it_finds_the_posterior_s_variance(self):
        """Of a network whose mean is right, the best variance is beta tilde, v = -1."""
        target = batch([300] * 4)
        loss = HybridLoss(schedule(), value_range=(0, 1), vlb_weight=10.0)
        v = torch.full_like(target.x_0, 0.8, requires_grad=True)
        optimizer = torch.optim.Adam([v], lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            loss(torch.cat([target.eps, v], dim=1), target).backward()
            optimizer.step()
        torch.testing.assert_close(v.detach(), torch.full_like(v, -1.0), rtol=0, atol=0.02)


class TestWhole:
    @pytest.mark.parametrize("num_steps", [1000, 100])
    def test_it_is_the_squared_error_plus_weight_times_the_timesteps_times_the_bound(self, num_steps):
        target = batch([0, 50, 99])
        loss = HybridLoss(schedule("epsilon", num_steps), value_range=(0, 1), vlb_weight=0.002)
        output = outputs(target, "epsilon", 0.3, 0.1)
        mse, vlb = loss.terms(output, target)
        torch.testing.assert_close(mse, torch.full_like(mse, 0.01))
        assert float(loss(output, target)) == pytest.approx(float(mse.mean() + 0.002 * num_steps * vlb.mean()))
        assert float(vlb.mean()) > 0

    @EVERY_KIND
    def test_without_a_learned_variance_it_is_the_squared_error(self, kind):
        target = batch([0, 500])
        loss = HybridLoss(schedule(kind), value_range=(0, 1), learned_variance=False)
        assert float(loss(outputs(target, kind, 0, 0.1)[:, :2], target)) == pytest.approx(0.01)

    def test_the_range_of_the_data_decides_the_width_of_the_decoder_s_bins(self):
        target = batch([0])
        twice = DiffusionTarget(2 * target.x_0 - 1, 2 * target.x_t - 1, target.eps, target.t)
        narrow, wide = (
            HybridLoss(schedule("sample"), value_range=r).terms(torch.cat([x.x_0, torch.zeros_like(x.x_0)], dim=1), x)[
                1
            ]
            for r, x in (((0, 1), target), ((-1, 1), twice))
        )
        assert float(narrow) > float(wide) + 0.5  # the same variance against bins of half the width

    def test_output_in_half_precision_is_computed_in_that_of_the_data(self):
        target = batch([0, 1, 500], torch.float32)
        loss = HybridLoss(schedule(), value_range=(0, 1))
        output = outputs(target, "epsilon", 0.3, 0.1)
        assert loss(output.bfloat16(), target).dtype == torch.float32
        assert float(loss(output.bfloat16(), target)) == pytest.approx(float(loss(output, target)), rel=0.05)

    def test_its_tables_are_no_part_of_a_checkpoint(self):
        assert not HybridLoss(schedule(), value_range=(0, 1)).state_dict()

    def test_ignite_averages_it_over_samples(self):
        """ignite.metrics.Loss asks the label for its length."""
        loss = HybridLoss(schedule(), value_range=(0, 1))
        targets = [batch([0, 500]), batch([1, 2, 999])]
        pairs = [(outputs(target, "epsilon", 0.3, 0.1 * (i + 1)), target) for i, target in enumerate(targets)]
        engine = Engine(lambda _, pair: pair)
        ignite.metrics.Loss(loss).attach(engine, "loss")
        found = engine.run(pairs).metrics["loss"]
        assert found == pytest.approx(float(2 * loss(*pairs[0]) + 3 * loss(*pairs[1])) / 5)


class TestMisuse:
    @pytest.mark.parametrize(("learned", "channels"), [(True, 2), (False, 4)])
    def test_a_network_with_other_channels_is_refused_with_both_counts(self, learned, channels):
        target = batch([0])
        loss = HybridLoss(schedule(), value_range=(0, 1), learned_variance=learned)
        needed = 4 if learned else 2
        with pytest.raises(UserError, match=f"has {channels} output channels.* needs {needed}"):
            loss(torch.zeros(1, channels, 5, 5), target)

    def test_wrong_options_are_refused(self):
        with pytest.raises(UserError, match="vlb_weight is -1"):
            HybridLoss(schedule(), value_range=(0, 1), vlb_weight=-1)
        with pytest.raises(UserError, match="value_range"):
            HybridLoss(schedule(), value_range=(0, 255))
        with pytest.raises(UserError, match="1 timestep"):
            HybridLoss(schedule(num_steps=1), value_range=(0, 1))

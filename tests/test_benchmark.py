# SPDX-License-Identifier: Apache-2.0
"""The benchmark's arithmetic and verdicts, that ours and the peers do the same work, and that every row runs."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "scripts"))

from benchmark_rows import child, joint, measure, quality, report, scale, size  # noqa: E402
from benchmark_rows.measure import ROWS, Goal, Row, Run  # noqa: E402
from benchmark_rows.networks import call, parameters_of, randomize, unet  # noqa: E402
from benchmark_rows.spade import equal_spade_networks, spade_inputs  # noqa: E402

from monai_synth.errors import UserError  # noqa: E402


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", REPO / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row_of(ratios: list[float], **options: object) -> Row:
    return Row("a", "work", "peer", 1.0, 2.0, ratios=ratios, **options)


class TestArithmetic:
    def test_all_ways_take_turns_there_and_back(self) -> None:
        order: list[str] = []
        now = iter(range(100))
        actions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
        times = measure.interleaved(actions, 3, clock=lambda: float(next(now)))
        assert "".join(order) == "ab" + "ab" + "ba" + "ab"
        assert times == {"a": [1.0] * 3, "b": [1.0] * 3}

    def test_the_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_the_medians(self) -> None:
        times = {"ours": [1.0, 2.0, 9.0], "peer": [4.0, 2.0, 3.0]}
        row = measure.compared("k", "w", times, "peer")
        assert row.ratios == [0.25, 1.0, 3.0]
        assert row.ratio == 1.0 != row.ours / row.theirs

    def test_times_faster_turns_the_ratio_round_and_scales_what_was_timed_in_part(self) -> None:
        times = {"ours": [2.0], "peer": [1.0]}
        row = measure.compared("k", "w", times, "peer", times_faster=True, scale=16.0, peer_scale=100 * 16.0)
        assert (row.ours, row.theirs, row.ratio) == (32.0, 1600.0, 50.0)

    @pytest.mark.parametrize(
        ("goal", "met"),
        [(Goal(0.4), True), (Goal(0.2), False), (Goal(0.3, at_least=True), True), (Goal(1, at_least=True), False)],
    )
    def test_a_goal_is_met_by_the_median(self, goal: Goal, met: bool) -> None:
        assert row_of([0.1, 0.3, 0.9], goal=goal).met is met

    def test_a_goal_can_be_about_our_own_figure(self) -> None:
        assert row_of([5.0], goal=Goal(1.0, of="ours")).met is True
        assert row_of([0.1], goal=Goal(0.9, of="ours")).met is False

    def test_a_skipped_row_is_neither_met_nor_missed_and_says_why(self) -> None:
        row = Row("a", "work", "peer", goal=Goal(1), skipped="there is none")
        assert row.met is None
        assert "skipped: there is none" in report.table([row])

    def test_the_table_gives_the_spread_and_says_no_where_we_lose(self) -> None:
        text = report.table([row_of([0.5, 0.75, 2.0], goal=Goal(0.6), note="a note")])
        assert "0.75 (0.5 .. 2)" in text
        assert "| at most 0.6 | no |" in text
        assert "[1] a note" in text

    def test_sizes_of_the_quick_run_are_not_judged(self) -> None:
        assert "| at most 0.6 | - |" in report.table([row_of([0.5], goal=Goal(0.6))], judged=False)

    @pytest.mark.parametrize(
        ("value", "text"), [(None, "-"), (0.0, "0"), (1234.5, "1234"), (0.0361, "0.0361"), (5e-7, "5.0e-07")]
    )
    def test_figures_have_three_digits(self, value: float | None, text: str) -> None:
        assert report.figure(value) == text


class TestAgainst:
    def test_a_run_comes_back_from_json_as_it_was(self, tmp_path: Path) -> None:
        rows = [row_of([0.5, 0.6], goal=Goal(0.4, at_least=True), sizes={"batch": 2}), Row("b", "w", skipped="why")]
        report.save(tmp_path / "run.json", rows, {"processor": "x"}, {"level": "full"})
        assert report.load(tmp_path / "run.json") == rows

    @pytest.mark.parametrize(
        ("old", "new", "verdict"),
        [
            ([1.0, 1.1], [1.3, 1.4], "slower"),
            ([1.3, 1.4], [1.0, 1.1], "faster"),
            ([1.0, 1.3], [1.2, 1.4], "same"),  # the ranges meet
            ([1.0, 1.01], [1.02, 1.03], "same"),  # apart, but by less than 5 %
        ],
    )
    def test_a_ratio_is_slower_beyond_margin_and_spread(self, old: list, new: list, verdict: str) -> None:
        (change,) = report.compare([row_of(old)], [row_of(new)])
        assert change.verdict == verdict

    def test_less_is_slower_where_the_ratio_counts_how_many_times_faster_we_are(self) -> None:
        (change,) = report.compare([row_of([200.0], times_faster=True)], [row_of([100.0], times_faster=True)])
        assert (change.verdict, change.factor) == ("slower", 2.0)

    def test_a_row_without_ratio_is_compared_by_its_own_figure(self) -> None:
        (change,) = report.compare([Row("a", "w", ours=0.1)], [Row("a", "w", ours=0.2)])
        assert (change.verdict, change.factor) == ("slower", 2.0)

    def test_other_sizes_are_not_compared(self) -> None:
        (change,) = report.compare([row_of([1.0], sizes={"batch": 1})], [row_of([9.0], sizes={"batch": 2})])
        assert change.verdict == "not comparable"

    def test_sizes_are_the_same_after_json_where_tuples_are_lists(self) -> None:
        old = Row.from_json(json.loads(json.dumps(row_of([1.0], sizes={"mult": (1, 2)}).to_json())))
        (change,) = report.compare([old], [row_of([1.0], sizes={"mult": (1, 2)})])
        assert change.verdict == "same"

    def test_what_can_no_longer_be_measured_is_told(self) -> None:
        (change,) = report.compare([row_of([1.0])], [Row("a", "w", skipped="gone")])
        assert change.verdict == "gone"
        assert "gone" in change.text

    @pytest.mark.parametrize("content", ["", "[]", '{"format": 99, "rows": []}', '{"format": 1}'])
    def test_a_file_of_another_kind_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match=r"cannot compare with .*--json FILE"):
            report.load(tmp_path / "x.json")


SHAPE = {"base": 8, "mult": (1, 2), "size": 16, "attention": (8,), "in_channels": 2, "out_channels": 2, "groups": 4}


class TestEqualWork:
    @pytest.mark.parametrize("shape", [SHAPE, {**SHAPE, "mult": (1, 2, 2), "attention": (8, 4), "base": 16}])
    def test_the_networks_of_three_libraries_have_equal_parameters(self, shape: dict) -> None:
        counts = {library: parameters_of(unet(library, **shape)) for library in ("ours", "MONAI", "diffusers")}
        assert len(set(counts.values())) == 1, counts

    def test_the_anchor_shape_has_the_parameters_that_were_measured_by_hand(self) -> None:
        shape = {**joint.MINI, "base": 32, "size": 64, "attention": (8, 4)}
        assert parameters_of(unet("ours", **shape)) == 7_211_848

    def test_our_network_computes_what_monais_does(self) -> None:
        theirs = randomize(unet("MONAI", **SHAPE))
        ours = unet("ours", **SHAPE)
        ours.load_monai_state_dict(theirs.state_dict())
        x, t = torch.randn(2, 2, 16, 16), torch.tensor([3, 800])
        with torch.no_grad():
            torch.testing.assert_close(call(ours, x, t), call(theirs, x, t), rtol=1e-4, atol=1e-6)

    def test_the_cached_spade_call_computes_what_monais_does(self) -> None:
        ours, theirs = equal_spade_networks((8, 16), 8, "cpu")
        seg, cond, noise = spade_inputs(8, 2, "cpu")
        x, t = torch.cat([noise, cond], 1), torch.tensor([3, 800])
        with torch.no_grad():
            expected = theirs(x, t, seg=seg)
            assert expected.std() > 0
            got = ours(x, t, modulations=ours.modulations(seg, (8, 8)))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)

    def test_checkpointing_keeps_less_and_predicts_the_same(self) -> None:
        plain, thrifty = unet("ours", **SHAPE), unet("ours", **SHAPE, checkpoint=True)
        thrifty.load_state_dict(randomize(plain).state_dict())
        x = torch.randn(1, 2, 16, 16)
        assert joint.kept_bytes(thrifty, x) < joint.kept_bytes(plain, x) / 2
        assert torch.equal(call(plain, x, torch.tensor([5])), call(thrifty, x, torch.tensor([5])))

    def test_kept_bytes_are_those_of_the_tensors_that_a_product_needs(self) -> None:
        class Square(torch.nn.Module):
            def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return x * x

        x = torch.randn(2, 3, requires_grad=True)
        assert joint.kept_bytes(Square(), x) == 2 * 3 * 4  # x itself, twice saved and once counted

    def test_kept_bytes_leave_out_the_weights(self) -> None:
        class Scale(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1000))

            def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return x * self.weight.mean() + (x[:, :1] * self.weight).sum()

        x = torch.randn(2, 3)
        assert joint.kept_bytes(Scale(), x) < 4 * 1000

    def test_the_flops_of_a_convolution_step_are_those_of_three_convolutions(self) -> None:
        class Conv(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 5, 3, padding=1)

            def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
                return self.conv(x)

        forward = 2 * 3 * 5 * 9 * 8 * 8
        assert joint.flops_of_step(Conv(), torch.randn(1, 3, 8, 8)) == 2 * forward  # the input needs no gradient
        assert joint.flops_of_step(Conv(), torch.randn(1, 3, 8, 8, requires_grad=True)) == 3 * forward


class TestExactDenoiser:
    def test_its_eps_is_the_score_of_the_noisy_mixture(self) -> None:
        mixture = quality.MixtureDenoiser(2, 3)
        abar = 0.4
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        spread = abar * mixture.variances + 1 - abar
        exponent = -((x[:, None] - math.sqrt(abar) * mixture.means).square() / (2 * spread)).sum(-1)
        (score,) = torch.autograd.grad(torch.logsumexp(exponent, 1).sum(), x)
        torch.testing.assert_close(mixture.eps(x.detach(), abar), -math.sqrt(1 - abar) * score)

    def test_the_ode_of_one_gaussian_ends_where_its_closed_form_does(self) -> None:
        mixture = quality.MixtureDenoiser(2, 1)
        abar = float(mixture.table[-1])
        x_T = torch.randn(3, 1, 2, 2, dtype=torch.float64)
        # With one component the flow keeps each number's place in its distribution.
        spread = (abar * mixture.variances + 1 - abar).sqrt()
        place = (x_T.flatten(1) - math.sqrt(abar) * mixture.means) / spread
        expected = mixture.means + place * mixture.variances.sqrt()
        torch.testing.assert_close(quality.ode_solution(mixture, x_T).flatten(1), expected, rtol=1e-3, atol=1e-3)

    def test_more_calls_of_our_solver_come_closer_to_the_ode(self) -> None:
        mixture = quality.MixtureDenoiser(4)
        x_T = torch.randn(8, 1, 4, 4)
        truth = quality.ode_solution(mixture, x_T)
        errors = [quality.rmse(quality.our_samples(mixture, x_T, "dpm++", n), truth) for n in (10, 20, 40, 1000)]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-3

    def test_the_peers_ddim_solves_the_same_ode(self) -> None:
        mixture = quality.MixtureDenoiser(4)
        x_T = torch.randn(8, 1, 4, 4)
        truth = quality.ode_solution(mixture, x_T)
        assert quality.rmse(quality.monai_samples(mixture, x_T, "ddim", 1000), truth) < 0.01
        assert quality.rmse(quality.diffusers_samples(mixture, x_T, 1000), truth) < 0.01

    def test_the_frechet_distance_of_a_shifted_gaussian_is_the_shift(self) -> None:
        covariance = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        draws = torch.randn(200_000, 2, dtype=torch.float64) * covariance.diagonal().sqrt()
        shifted = draws + torch.tensor([1.0, 0.0], dtype=torch.float64)
        mean = torch.zeros(2, dtype=torch.float64)
        assert quality.frechet(draws, mean, covariance, 2) < 0.1
        assert quality.frechet(shifted, mean, covariance, 2) == pytest.approx(100 * 1 / 5, abs=0.5)

    def test_the_fewest_calls_are_the_first_within_the_limit(self) -> None:
        mixture = quality.MixtureDenoiser(4)
        x_T = torch.randn(8, 1, 4, 4)
        truth = quality.ode_solution(mixture, x_T)
        limit = quality.rmse(quality.our_samples(mixture, x_T, "dpm++", 9), truth)
        calls = quality.fewest_calls(mixture, x_T, truth, limit)
        assert calls <= 9
        assert quality.rmse(quality.our_samples(mixture, x_T, "dpm++", calls), truth) <= limit


OWN_PROCESSES = ("jdm-memory", "processes", "start-up")


class TestRows:
    @pytest.mark.parametrize("name", sorted(set(ROWS) - set(OWN_PROCESSES)))
    def test_every_row_runs_at_its_smallest_size(self, name: str) -> None:
        rows = ROWS[name](Run(level="tiny", rounds=1))
        assert rows
        for row in rows:
            assert row.key.startswith(name)
            assert row.skipped or (row.ours > 0 and all(math.isfinite(ratio) for ratio in row.ratios))
        assert len({row.key for row in rows}) == len(rows)
        assert Row.from_json(json.loads(json.dumps(rows[0].to_json()))).key == rows[0].key

    @pytest.mark.slow
    @pytest.mark.parametrize("name", OWN_PROCESSES)
    def test_rows_that_start_processes_run_too(self, name: str) -> None:
        assert all(row.skipped or row.ours is not None for row in ROWS[name](Run(level="tiny", rounds=1)))

    def test_every_row_has_sizes_for_a_smoke_test_and_a_full_run(self) -> None:
        assert all({"full", "tiny"} <= set(entry.sizes) for entry in ROWS.values())

    def test_rows_with_bfloat16_are_skipped_with_a_reason_where_there_is_none(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(joint, "has_bf16", lambda device: False)
        rows = ROWS["jdm-call"](Run(level="tiny", rounds=1))
        skipped = [row for row in rows if row.key.endswith("bf16")]
        assert skipped
        assert all("bfloat16" in row.skipped for row in skipped)
        assert next(row for row in rows if row.key == "jdm-call/diffusers/fp32").goal == Goal(0.40)

    def test_a_peer_that_is_not_installed_is_skipped_with_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(joint, "has_lucidrains", lambda: False)
        rows = ROWS["jdm-train"](Run(level="tiny", rounds=1))
        (row,) = [row for row in rows if row.peer == "denoising-diffusion-pytorch"]
        assert "pip install denoising-diffusion-pytorch" in row.skipped

    def test_two_processes_that_take_as_long_as_one_are_twice_as_many_images(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Child:
            stdin = stdout = type("Closed", (), {"close": lambda self: None})()

            def wait(self) -> None:
                pass

        monkeypatch.setattr(scale.subprocess, "Popen", lambda *args, **kwargs: Child())
        monkeypatch.setattr(scale, "_answer", lambda child: {})
        monkeypatch.setattr(scale, "_ask", lambda children: 0.5)
        monkeypatch.setattr(scale.os, "cpu_count", lambda: 2)
        (row,) = ROWS["processes"](Run(level="tiny"))
        assert row.ratio == 2.0
        assert row.met is True


class TestCommand:
    def test_a_gpu_that_is_not_there_ends_in_a_clear_message(
        self, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(UserError, match="--gpu needs a GPU that torch can use, and there is none"):
            benchmark.main(["--gpu"])

    def test_an_unknown_row_is_refused_with_those_there_are(self, benchmark: ModuleType) -> None:
        with pytest.raises(UserError, match=r"no row 'sped'; --rows takes .*spade-call"):
            benchmark.main(["--rows", "sped"])

    @pytest.mark.parametrize("option", ["--rounds", "--threads"])
    def test_numbers_below_one_are_refused(self, benchmark: ModuleType, option: str) -> None:
        with pytest.raises(UserError, match=f"{option} is 0"):
            benchmark.main([option, "0"])

    def test_the_exit_status_tells_of_what_became_slower(
        self, benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        ratios = [1.0]
        entry = measure.Entry("a", lambda run: [row_of(list(ratios))], {"full": {}})
        monkeypatch.setitem(benchmark.ROWS, "a", entry)
        file = str(tmp_path / "old.json")
        assert benchmark.main(["--rows", "a", "--json", file]) == 0
        assert benchmark.main(["--rows", "a", "--against", file]) == 0
        ratios[0] = 2.0
        assert benchmark.main(["--rows", "a", "--against", file]) == 1
        assert "2.00 times as slow" in capsys.readouterr().out

    def test_a_row_that_fails_is_told_and_fails_the_run_but_not_the_other_rows(
        self, benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        def broken(run: Run) -> list[Row]:
            raise RuntimeError("no weights")

        monkeypatch.setitem(benchmark.ROWS, "a", measure.Entry("a", broken, {"full": {}}))
        monkeypatch.setitem(benchmark.ROWS, "b", measure.Entry("b", lambda run: [row_of([1.0])], {"full": {}}))
        assert benchmark.main(["--rows", "a", "b"]) == 1
        out = capsys.readouterr().out
        assert "FAILED: RuntimeError: no weights" in out
        assert "2 rows" in out

    def test_processes_of_rows_find_the_package_and_compute_with_one_thread(self) -> None:
        environment = child.child_environment()
        assert environment["PYTHONPATH"].startswith(str(REPO / "scripts"))
        assert environment["OMP_NUM_THREADS"] == "1"


def test_what_was_exported_is_found_again_and_read(tmp_path: Path) -> None:
    for kind in ("export", "resume", "features", "prepare"):
        size.KINDS[kind](80, tmp_path)
    assert len(list((tmp_path / "made").glob("*/*.png"))) == 80
    assert len((tmp_path / "made" / "provenance.jsonl").read_text().splitlines()) == 80
    assert len(json.loads((tmp_path / "prepared" / "dataset.json").read_text())["training"]) == 64
    (tmp_path / "made" / "normal" / "normal_0000002.png").unlink()
    with pytest.raises(SystemExit, match="some of 80 images are missing"):
        size.resume(80, tmp_path)


def test_cost_is_told_for_each_number_of_images(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def child(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        kind, num = command[3], int(command[4])
        answer = {"cpu": 0.002 * num, "wall": 0.004 * num, "memory": 100 + num}
        return subprocess.CompletedProcess(command, int(kind == "none"), json.dumps(answer), "")

    monkeypatch.setattr(size.subprocess, "run", child)
    assert benchmark.main(["--sizes", "10", "20"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        f"| {title} | {num} | 2.00 | 4.00 | {num - 10} |" for title in size.TITLES.values() for num in (10, 20)
    ]
    with pytest.raises(UserError, match=r"--sizes is \[1\]; give whole numbers from 2"):
        benchmark.main(["--sizes", "1"])

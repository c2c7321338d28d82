# SPDX-License-Identifier: Apache-2.0
"""A denoiser in bfloat16 gives what it gives in float32, to a stated tolerance, and says that it is one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bundle_runs
import lsdm_toy
import pytest
import torch
from bundle_runs import user_error
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

from monai_synth import precision
from monai_synth.diffusion import make_sampler
from monai_synth.errors import UserError
from monai_synth.inference.classes import ClassInferer
from monai_synth.inference.guidance import NoduleGuidance
from monai_synth.inference.joint import JointInferer
from monai_synth.inference.sampler import initial_noise, make_generators, sample
from monai_synth.networks import ClassUNet, JointUNet, SPADEUNet, TextUNet
from monai_synth.networks.latent_codec import LatentCodec
from monai_synth.precision import for_sampling, has_bfloat16_units, sampling_precision, training_precision

SCHEDULE = {
    "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
    "prediction_type": "v_prediction",
}  # fmt: skip
SPADE_LEVELS = {
    "label_nc": 3, "channels": (16, 32), "attention_levels": (False, True), "num_res_blocks": 1,
    "num_head_channels": 8, "norm_num_groups": 8, "spade_hidden_channels": 8,
}  # fmt: skip
PLAIN_LEVELS = {
    "image_size": (8, 8), "base_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1,
    "attention_resolutions": (4,), "num_heads": 2, "norm_num_groups": 8,
}  # fmt: skip
KINDS = ("spade", "spade_3d", "joint", "class", "text")


def of_unit_gain(network: nn.Module) -> nn.Module:
    """Random weights that keep the size of what goes through, so that no layer's rounding is hidden by zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    return network.eval()


def denoiser(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind.startswith("spade"):
        return of_unit_gain(SPADEUNet(3 if kind == "spade_3d" else 2, 4, 2, **SPADE_LEVELS))
    if kind == "joint":
        return of_unit_gain(JointUNet(2, 1, 1, **PLAIN_LEVELS))
    if kind == "class":
        return of_unit_gain(ClassUNet(2, 1, 3, **PLAIN_LEVELS))
    network = TextUNet(
        1, 3, (8, 8), text_dim=8, block_out_channels=(16, 32), cross_attention=(False, True),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=8,
    )  # fmt: skip
    network.set_text_features(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    return of_unit_gain(network)


def both(kind: str) -> tuple[nn.Module, nn.Module]:
    """The same network in float32 and in bfloat16."""
    network = denoiser(kind)
    low, used = for_sampling(copy.deepcopy(network), precision="bfloat16", device="cpu")
    assert used == "bfloat16"
    return network, low


def example(kind: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    spatial = (8,) * (3 if kind == "spade_3d" else 2)
    channels = {"spade": 4, "spade_3d": 4, "joint": 2}.get(kind, 1)
    x = torch.randn(4, channels, *spatial, generator=generator)
    given: dict[str, Tensor] = {}
    if kind.startswith("spade"):
        given["seg"] = (torch.rand(4, 3, *spatial, generator=generator) > 0.5).float()
    elif kind != "joint":
        given["class_labels"] = torch.tensor([0, 1, 2, 0])
    return x, torch.tensor([1, 100, 500, 999]), given


def apart(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, in that of the second."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_in_bfloat16_is_within_2_percent_of_float32_and_looks_like_it(kind):
    network, low = both(kind)
    x, t, given = example(kind)
    with torch.no_grad():
        expected, found = network(x, t, **given), low(x, t, **given)
    assert 1e-4 < apart(found, expected) < 0.02
    assert found.dtype == expected.dtype == torch.float32
    assert found.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_with_respect_to_the_input_is_float32_and_within_3_percent(kind):
    network, low = both(kind)
    x, t, given = example(kind)
    x.requires_grad_()
    expected, found = (torch.autograd.grad(n(x, t, **given).square().sum(), x)[0] for n in (network, low))
    assert found.dtype == torch.float32
    assert 1e-4 < apart(found, expected) < 0.03


def test_modulations_that_were_computed_once_change_nothing_in_bfloat16_either():
    _, low = both("spade")
    x, t, given = example("spade")
    with torch.no_grad():
        cached = low(x, t, modulations=low.modulations(given["seg"], x.shape[2:]))
        assert torch.equal(cached, low(x, t, **given))


def test_timesteps_are_not_rounded():
    """Of the neighbours of 999 bfloat16 knows 996 and 1000."""
    network = nn.Sequential()
    network.forward = lambda x, t: x + t.view(-1, 1, 1, 1)
    low, _ = for_sampling(network, precision="bfloat16", device="cpu")
    given = torch.tensor([999.0, 998.0])
    assert low(torch.zeros(2, 1, 1, 1), given).flatten().tolist() == [999.0, 998.0]


@pytest.mark.parametrize(
    ("sampler", "scale", "tolerance"),
    [(s, 1.0, 0.01) for s in ("dpm++", "unipc", "ddim", "ddpm")] + [("dpm++", 3.0, 0.02)],
)
def test_20_calls_in_bfloat16_end_close_to_those_in_float32(sampler, scale, tolerance):
    network, low = both("class")
    inferer = ClassInferer(
        SCHEDULE, image_size=(8, 8), image_channels=1, null_class=3, sampler=sampler, num_steps=20,
        guidance_scale=scale,
    )  # fmt: skip
    expected, found = (inferer(torch.tensor([0, 1, 2, 0]), n, seeds=range(4)) for n in (network, low))
    assert expected.std() > 0.5
    assert 1e-5 < float((expected - found).square().mean().sqrt()) < tolerance


@pytest.mark.parametrize("gradient_scale", [0.0, 0.1])
def test_the_unknown_half_is_sampled_close_to_float32_and_the_known_half_is_kept(gradient_scale):
    network, low = both("joint")
    inferer = JointInferer(SCHEDULE, value_range=(-1, 1), gradient_scale=gradient_scale)
    known = torch.rand(4, 2, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    is_known = torch.zeros_like(known, dtype=torch.bool)
    is_known[:, 1] = True
    expected, found = (inferer(known, n, is_known=is_known, seeds=range(4))["x_0"] for n in (network, low))
    assert torch.equal(found[:, 1], known[:, 1])
    assert 1e-5 < float((expected - found)[:, 0].square().mean().sqrt()) < 0.02


def test_noise_and_stored_x_t_stay_float32_and_are_never_clipped():
    _, low = both("class")
    labels = torch.tensor([0, 1])
    seen: list[Tensor] = []
    generators = make_generators(range(2))
    sample(
        lambda x, t: 3 * low(x, t, class_labels=labels), initial_noise((1, 8, 8), generators),
        make_sampler("dpm++", SCHEDULE, 5), generators=generators, callback=lambda n, t, x: seen.append(x),
    )  # fmt: skip
    assert {x.dtype for x in seen} == {torch.float32}
    assert max(float(x.abs().max()) for x in seen) > 1
    assert any((x != x.bfloat16().float()).any() for x in seen)


@pytest.mark.parametrize(("channels", "groups", "size"), [(32, 8, 16), (32, 8, 32), (64, 4, 16)])
def test_group_norms_leave_channels_last_where_it_is_slow(channels, groups, size):
    norm, _ = for_sampling(nn.Sequential(nn.GroupNorm(groups, channels)), precision="bfloat16", device="cpu")
    layouts: list[bool] = []
    norm[0].register_forward_hook(lambda m, args, out: layouts.append(out.is_contiguous()))
    x = torch.randn(2, channels, size, size)
    found = norm(x)
    assert layouts == [channels // groups < 16 and size * size < 1024]
    torch.testing.assert_close(found, nn.functional.group_norm(x, groups), atol=0.02, rtol=0.02)


def test_auto_is_bfloat16_where_there_are_units_for_it_and_float32_elsewhere(monkeypatch):
    for units, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "has_bfloat16_units", lambda device, units=units: units)
        assert sampling_precision("auto", "cpu") == expected
        assert sampling_precision("float32", "cpu") == "float32"
        assert sampling_precision("bfloat16", "cpu") == "bfloat16"
        assert training_precision("auto", "cpu") == expected
        assert training_precision(False, "cpu") == "float32"
        assert training_precision(True, "cpu") == "bfloat16"


def test_mixed_precision_on_a_gpu_without_bfloat16_is_float16_where_gradients_are_scaled(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16_units", lambda device: False)
    assert training_precision(True, "cuda") == "float16"
    assert training_precision(True, "cuda", float16=False) == "float32"
    assert training_precision("auto", "cuda") == "float32"


@pytest.mark.parametrize(
    ("capabilities", "expected"), [({"amx_bf16": True}, True), ({"amx_bf16": False, "avx512_bf16": True}, False)]
)
def test_a_cpu_has_units_for_bfloat16_if_it_has_those_of_amx(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    precision._cpu_has_amx_bfloat16.cache_clear()
    assert has_bfloat16_units("cpu") == expected
    precision._cpu_has_amx_bfloat16.cache_clear()


def test_float32_leaves_the_network_as_it_is():
    network, used = for_sampling(denoiser("class"), precision="float32", device="cpu")
    x, t, given = example("class")
    assert used == "float32"
    assert not network._forward_pre_hooks
    assert torch.equal(network(x, t, **given), denoiser("class")(x, t, **given))


def test_a_compiled_denoiser_samples_the_same_and_says_that_it_is_compiled(monkeypatch):
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call: compiled.append(call) or call)
    network, used = for_sampling(denoiser("spade"), precision="bfloat16", device="cpu", compile=True)
    assert used == "bfloat16 compiled"
    assert len(compiled) == 1
    x, t, given = example("spade")
    modulations = network.modulations(given["seg"], x.shape[2:])
    assert torch.equal(network(x, t, modulations=modulations), both("spade")[1](x, t, **given))


@pytest.mark.parametrize("given", ["bf16", "float16", 16, None, True])
def test_another_precision_is_refused(given):
    with pytest.raises(UserError, match="precision is .*; allowed are float32, bfloat16, auto"):
        sampling_precision(given, "cpu")


@pytest.mark.parametrize("given", ["bfloat16", "yes", 1, None])
def test_another_amp_is_refused(given):
    with pytest.raises(UserError, match="amp is .*; allowed are True, False and 'auto'"):
        training_precision(given, "cpu")


# The bundle of CT slices, with untrained files.


@pytest.fixture(scope="module")
def models(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("toy")
    lsdm_toy.write_all(folder, tiny_dataset)
    return {"dataset_dir": str(tiny_dataset), "ckpt_dir": str(folder / "models")}


def sampled(models: dict[str, str], out: Path, **values: Any) -> SimpleNamespace:
    """Pictures of a run, and what their provenance says."""
    options = {"num_samples": 2, "batch_size": 2, "num_steps": 3, "device": "cpu", "features": ["texture"]} | values
    bundle_runs.run("lsdm", "inference.json", "infer", "run", output_dir=str(out), **models, **options)
    folder = out / "Dataset900_LSDM"
    lines = [json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines()]
    return SimpleNamespace(precision={line["precision"] for line in lines}, number=len(lines))


def test_provenance_says_what_was_used_and_not_what_was_asked_for(models, tmp_path, monkeypatch):
    for units, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision, "has_bfloat16_units", lambda device, units=units: units)
        found = sampled(models, tmp_path / str(units), precision="auto")
        assert found.precision == {expected}


def test_guidance_and_decoder_compute_in_float32(models, tmp_path, monkeypatch):
    seen: dict[str, set[torch.dtype]] = {"decode": set(), "_log_p": set(), "_gradient": set()}

    def watch(owner: type, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any) -> Tensor:
            result = original(*args)
            seen[name] |= {result.dtype, *(a.dtype for a in args if isinstance(a, Tensor))}
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(LatentCodec, "decode")
    watch(NoduleGuidance, "_log_p")
    watch(NoduleGuidance, "_gradient")
    assert sampled(models, tmp_path, precision="bfloat16").precision == {"bfloat16"}
    assert seen == {"decode": {torch.float32}, "_log_p": {torch.float32}, "_gradient": {torch.float32}}


def test_a_run_that_goes_on_in_another_precision_is_refused(models, tmp_path):
    sampled(models, tmp_path, precision="float32", num_samples=1)
    error = user_error(lambda: sampled(models, tmp_path, precision="bfloat16"))
    assert "precision" in str(error)
    assert "float32" in str(error)
    assert "bfloat16" in str(error)
    assert sampled(models, tmp_path, precision="float32").number == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "half"}, "precision is 'half'; allowed are float32, bfloat16, auto"),
        ({"compile": "yes"}, "compile is 'yes'; allowed are True and False"),
    ],
)
def test_wrong_values_end_in_one_message_and_write_nothing(models, tmp_path, values, message):
    assert message in str(user_error(lambda: sampled(models, tmp_path / "out", **values)))
    assert not (tmp_path / "out").exists()


# Attention.


@pytest.mark.parametrize("kind", ["spade", "joint", "class"])
def test_every_attention_of_a_denoiser_is_pytorchs_fused_one(kind):
    flags = [m.use_flash_attention for m in denoiser(kind).modules() if hasattr(m, "use_flash_attention")]
    assert flags
    assert all(flags)


def test_the_autoencoders_attention_is_pytorchs_fused_one_also_in_the_middle():
    config = json.loads((bundle_runs.BUNDLES / "lsdm" / "configs" / "train_autoencoder.json").read_text())
    given = {k: v for k, v in config["network_arch"]["args"].items() if isinstance(v, bool)}
    network = AutoencoderKL(
        2, 1, 1, num_res_blocks=(1, 1), channels=(8, 8), attention_levels=(False, True), norm_num_groups=4, **given
    )
    flags = [m.use_flash_attention for m in network.modules() if hasattr(m, "use_flash_attention")]
    assert len(flags) >= 4
    assert all(flags)

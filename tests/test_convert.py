# SPDX-License-Identifier: Apache-2.0
"""A converted checkpoint computes what the other library computes, or nothing is written; a bundle samples with it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import run
from monai.networks import nets
from monai.networks.schedulers import DDPMScheduler
from PIL import Image
from torch import nn

import monai_synth.convert.verify as verify
from monai_synth import cli
from monai_synth.bundle import load_codec
from monai_synth.checkpoint import load_file, restore_network, sha256_of
from monai_synth.convert import Settings, convert_checkpoint
from monai_synth.convert.source import network_text, read_weights, schedule_text
from monai_synth.diffusion import alphas_cumprod
from monai_synth.errors import UserError

LEVELS = {
    "spatial_dims": 2, "num_res_blocks": 1, "channels": [8, 16], "attention_levels": [False, True],
    "norm_num_groups": 4,
}  # fmt: skip
U = {**LEVELS, "num_head_channels": 8}
AUTOENCODER = {
    **LEVELS, "channels": [8, 8, 8], "attention_levels": [False, False, False], "in_channels": 1, "out_channels": 1,
    "latent_channels": 3,
}  # fmt: skip
SPADE = {**U, "in_channels": 3, "out_channels": 3, "label_nc": 8, "spade_intermediate_channels": 4}
CLASSES = {**U, "in_channels": 1, "out_channels": 1, "num_class_embeds": 3}
PAIRS = {**U, "in_channels": 2, "out_channels": 2}
CONTROL = {**U, "in_channels": 3, "conditioning_embedding_num_channels": [4, 8]}
SCHEDULE = {
    "_target_": "DDPMScheduler", "num_train_timesteps": 50, "schedule": "scaled_linear_beta", "beta_start": 0.0015,
    "beta_end": 0.1, "clip_sample": False,
}  # fmt: skip


def theirs(library: Any, kind: str, args: dict, **options: Any) -> nn.Module:
    """A network of MONAI or monai-generative, every parameter random as after a training."""
    args = dict(args)
    if library is not nets:
        args["num_channels"] = args.pop("channels")
    network = getattr(library, kind)(**args, **options)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.15
    return network.eval()


@pytest.fixture(params=["monai", "monai-generative"])
def library(request: pytest.FixtureRequest) -> Any:
    if request.param == "monai":
        return nets
    found = verify.generative_nets()
    if found is None:
        pytest.skip("needs the extra `generative`")
    return found


def ask(folder: Path, kind: str, args: dict, content: Any, out: str = "models/model.pt", **given: Any) -> Settings:
    """Checkpoint and description on disk, and settings that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content.state_dict() if isinstance(content, nn.Module) else content, folder / f"{kind}.ckpt")
    description = {"net": {"_target_": f"monai.networks.nets.{kind}", **args}, "scheduler": SCHEDULE}
    (folder / f"{kind}.json").write_text(json.dumps(description))
    return Settings(str(folder / f"{kind}.ckpt"), str(folder / f"{kind}.json"), str(folder / out), **given)


def message_of(settings: Settings) -> str:
    with pytest.raises(UserError) as caught:
        convert_checkpoint(settings, report=lambda text: None)
    assert not Path(settings.out).exists()
    assert not list(Path(settings.out).parent.glob(".*"))
    return str(caught.value)


def convert(settings: Settings) -> list[str]:
    said: list[str] = []
    for found in convert_checkpoint(settings, report=said.append):
        assert found.spread > 1e-3
        assert found.difference < 1e-5
    return said


def prepared(root: Path, task: str, **head: Any) -> Path:
    """A prepared dataset of 16x16 pictures."""
    root.mkdir()
    names = []
    for i in range(4):
        Image.fromarray(np.full((16, 16), 40 * i, np.uint8)).save(root / f"{i}.png")
        Image.fromarray(np.eye(16, dtype=np.uint8)).save(root / f"{i}_label.png")
        names.append({"case_id": f"c{i}", "image": f"{i}.png"})
        names[-1] |= {"class": i % 2} if task == "classes" else {"label": f"{i}_label.png", "spacing": [1.0, 1.0]}
    content = {
        "name": "few", "task": task, "modality": "CR", "image_channels": 1, "spatial_shape": [16, 16],
        "intensity": {"unit": "8-bit"}, "training": names[:3], "validation": names[3:], "test": [], **head,
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def class_dataset(tmp_path: Path) -> Path:
    return prepared(tmp_path / "data", "classes", classes={"dark": 0, "bright": 1})


def test_autoencoder_and_spade_network_convert_and_bundle_lsdm_samples_with_them(
    library: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset = str(tiny_dataset)
    coder = theirs(library, "AutoencoderKL", AUTOENCODER)
    said = convert(ask(tmp_path, "AutoencoderKL", AUTOENCODER, coder, "models/autoencoder.pt", dataset=dataset))
    assert any("largest difference" in line for line in said)
    unet = theirs(library, "SPADEDiffusionModelUNet", SPADE)
    settings = ask(tmp_path, "SPADEDiffusionModelUNet", SPADE, unet, dataset=dataset, scale_factor=0.7)
    convert(settings)

    codec = load_codec(str(tmp_path / "models"))
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    torch.testing.assert_close(codec.encode_image(x)[0], coder.encode(x)[0])

    content = load_file(settings.out, stage="diffusion")
    assert content["contract"]["scale_factor"] == 0.7
    assert content["converted"]["compared"][0]["difference"] < 1e-5
    own = restore_network(content)
    x, t, seg = torch.randn(2, 6, 8, 8), torch.tensor([4, 40]), torch.eye(8)[torch.randint(8, (2, 8, 8))]
    seg = seg.movedim(-1, 1)
    torch.testing.assert_close(own(x, t, seg), unet(x[:, :3], t, seg=seg), rtol=1e-4, atol=1e-5)

    run(
        "lsdm", "inference.json", "infer", "run", dataset_dir=dataset, ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "out"), num_samples=2, num_steps=3, guidance_scale=0.0, device="cpu",
    )  # fmt: skip
    images = sorted((tmp_path / "out").rglob("imagesTr/*.png"))
    assert len(images) == 2
    assert np.asarray(Image.open(images[0])).std() > 0


@pytest.mark.slow
def test_bundle_lsdm_trains_its_diffusion_model_on_a_converted_autoencoder(tiny_dataset: Path, tmp_path: Path) -> None:
    coder = theirs(nets, "AutoencoderKL", AUTOENCODER)
    settings = ask(tmp_path, "AutoencoderKL", AUTOENCODER, coder, "models/autoencoder.pt", dataset=str(tiny_dataset))
    convert(settings)
    before = Path(settings.out).read_bytes()
    run(
        "lsdm", "train.json", "train", "training", preset="demo", image_size=[64, 64], max_epochs=1, val_interval=1,
        features=[], device="cpu", dataset_dir=str(tiny_dataset), ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "eval"), latest_dir=str(tmp_path),
    )  # fmt: skip
    assert Path(settings.out).read_bytes() == before
    assert not (tmp_path / "models" / "last_autoencoder.pt").exists()
    contract = load_file(tmp_path / "models" / "model.pt", stage="diffusion")["contract"]
    assert contract["autoencoder_sha256"] == sha256_of(settings.out)


def test_a_network_of_classes_converts_and_bundle_cfg_ddpm_samples_with_it(
    library: Any, class_dataset: Path, tmp_path: Path
) -> None:
    unet = theirs(library, "DiffusionModelUNet", CLASSES)
    settings = ask(tmp_path, "DiffusionModelUNet", CLASSES, unet, dataset=str(class_dataset))
    convert(settings)
    own = restore_network(load_file(settings.out))
    x, t, k = torch.randn(3, 1, 16, 16), torch.tensor([1, 20, 49]), torch.tensor([0, 1, 2])
    torch.testing.assert_close(own(x, t, class_labels=k), unet(x, t, class_labels=k), rtol=1e-4, atol=1e-5)
    run(
        "cfg_ddpm", "inference.json", "infer", "run", dataset_dir=str(class_dataset),
        ckpt_dir=str(tmp_path / "models"), output_dir=str(tmp_path / "out"), per_class=2, num_steps=3, device="cpu",
    )  # fmt: skip
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 4


def test_a_network_of_pairs_converts_and_bundle_jdm_samples_with_it(library: Any, tmp_path: Path) -> None:
    head = {"labels": {"background": 0, "lung": 1}, "channel_names": {"0": "CR"}, "file_ending": ".png"}
    dataset = prepared(tmp_path / "data", "pairs", **head)
    unet = theirs(library, "DiffusionModelUNet", PAIRS)
    convert(ask(tmp_path, "DiffusionModelUNet", PAIRS, unet, dataset=str(dataset), value_range=[0.0, 1.0]))
    run(
        "jdm", "inference.json", "infer", "run", dataset_dir=str(dataset), ckpt_dir=str(tmp_path / "models"),
        output_dir=str(tmp_path / "out"), num_samples=2, num_steps=3, device="cpu", max_attempts=256,
    )  # fmt: skip
    assert len(list((tmp_path / "out").rglob("imagesTr/*.png"))) == 2


@pytest.mark.parametrize("crossed", [{}, {"with_conditioning": True, "cross_attention_dim": 5}])
def test_a_controlnet_converts_and_is_restored_for_own_code(library: Any, crossed: dict, tmp_path: Path) -> None:
    args = CONTROL | crossed
    other = theirs(library, "ControlNet", args)
    settings = ask(tmp_path, "ControlNet", args, other)
    said = convert(settings)
    assert "no bundle uses a ControlNet" in said[-1]
    own = restore_network(load_file(settings.out, stage="controlnet"))
    given = {"controlnet_cond": torch.randn(1, 1, 16, 16)} | ({"context": torch.randn(1, 1, 5)} if crossed else {})
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([7])
    for got, expected in zip(own(x, t, **given)[0], other(x, t, **given)[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"include_fc": False}, {"use_combined_linear": True}])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "ControlNet"])
def test_attention_of_each_form_of_monai_converts(kind: str, options: dict, tiny_dataset: Path, tmp_path: Path) -> None:
    coder = kind == "AutoencoderKL"
    args = AUTOENCODER if coder else CONTROL
    out, given = ("models/autoencoder.pt", {"dataset": str(tiny_dataset)}) if coder else ("models/c.pt", {})
    convert(ask(tmp_path, kind, args, theirs(nets, kind, args, **options), out, **given))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AutoencoderKL", "SPADEDiffusionModelUNet", "ControlNet"])
def test_without_monai_generative_its_weights_are_compared_with_monai_or_refused(
    kind: str, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = verify.generative_nets()
    if old is None:
        pytest.skip("needs the extra `generative` to make its weights")
    monkeypatch.setattr(verify, "generative_nets", lambda: None)
    if kind == "ControlNet":  # MONAI's loader leaves its attention random
        assert "install monai-generative" in message_of(ask(tmp_path, kind, CONTROL, theirs(old, kind, CONTROL)))
        return
    coder = theirs(old, "AutoencoderKL", AUTOENCODER)
    given: dict[str, Any] = {"dataset": str(tiny_dataset)}
    said = convert(ask(tmp_path, "AutoencoderKL", AUTOENCODER, coder, "models/autoencoder.pt", **given))
    if kind != "AutoencoderKL":
        said = convert(ask(tmp_path, kind, SPADE, theirs(old, kind, SPADE), **given, scale_factor=1.0))
    assert sum("same input, MONAI" in line for line in said) == 1


def test_wrong_numbers_in_the_converted_network_are_found(
    class_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*args: Any) -> nn.Module:
        network = real(*args)
        nn.init.normal_(network.middle_block.attention.attn.out_proj.weight)
        return network

    import monai_synth.convert as package

    real = package.converted_network
    monkeypatch.setattr(package, "converted_network", spoilt)
    other = theirs(nets, "DiffusionModelUNet", CLASSES)
    said = message_of(ask(tmp_path, "DiffusionModelUNet", CLASSES, other, dataset=str(class_dataset)))
    assert "computes something else than MONAI" in said


def test_a_loader_that_leaves_weights_random_is_no_reference() -> None:
    text = network_text({"_target_": "DiffusionModelUNet", **CLASSES}, "net.json")
    weights = theirs(nets, "DiffusionModelUNet", CLASSES, include_fc=False).state_dict()
    assert verify._by_monais_loader(text, weights) is not None
    weights.pop("out.0.conv.weight", None)
    weights.pop("out.0.weight", None)
    weights["old.to_q.weight"] = torch.zeros(1)
    assert verify._by_monais_loader(text, weights) is None


@pytest.mark.parametrize("lost", ["conv_in.conv.weight", "middle_block.attention.attn.to_k.bias"])
def test_a_key_that_is_missing_or_left_over_is_named(lost: str, class_dataset: Path, tmp_path: Path) -> None:
    weights = theirs(nets, "DiffusionModelUNet", CLASSES).state_dict()
    weights["mine"] = weights.pop(lost)
    said = message_of(ask(tmp_path, "DiffusionModelUNet", CLASSES, weights, dataset=str(class_dataset)))
    assert f"1 missing: {lost}" in said
    assert "1 unknown: mine" in said


def test_weights_inside_other_dictionaries_and_of_distributed_training_are_found(tmp_path: Path) -> None:
    weights = theirs(nets, "ControlNet", CONTROL).state_dict()
    prefixed = {f"module.{key}": value.half() for key, value in weights.items()}
    settings = ask(tmp_path, "ControlNet", CONTROL, {"epoch": 3, "state": {"net": prefixed}})
    convert(settings)
    read = read_weights(settings.source, "state.net")
    assert set(read) == set(weights)
    assert all(value.dtype == torch.float32 for value in read.values())


def test_weights_beside_an_optimisers_state_and_of_a_compiled_network_are_found(tmp_path: Path) -> None:
    network = theirs(nets, "ControlNet", CONTROL)
    optimizer = torch.optim.Adam(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    weights = {f"_orig_mod.{key}": value for key, value in network.state_dict().items()}
    settings = ask(tmp_path, "ControlNet", CONTROL, {"model": weights, "optimizer": optimizer.state_dict()})
    assert set(read_weights(settings.source)) == set(network.state_dict())


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    settings = ask(tmp_path, "ControlNet", CONTROL, {"net": Touch()})
    assert "could run code" in message_of(settings)
    Path(settings.source).write_bytes(pickle.dumps({"net": Touch()}))
    assert "could run code" in message_of(settings)
    assert not (tmp_path / "ran").exists()


def test_wrong_sources_end_in_one_message(class_dataset: Path, tmp_path: Path) -> None:
    other = theirs(nets, "DiffusionModelUNet", CLASSES)
    given = {"dataset": str(class_dataset)}
    weights = other.state_dict()

    def said(content: Any, **more: Any) -> str:
        return message_of(ask(tmp_path, "DiffusionModelUNet", CLASSES, content, **(given | more)))

    assert "several state dicts, at a, b" in said({"a": weights, "b": weights})
    assert "holds no weights at 'c'; there are some at: a, b" in said({"a": weights, "b": weights}, key="c")
    assert "holds no state dict" in said([1, 2])
    assert "holds more than weights (pickled objects" in said({"network": SimpleNamespace(a=1)})
    assert "not finite, first out.2" in said({**weights, "out.2.conv.bias": torch.tensor([float("nan")])})
    assert "a trained file of this package already" in said({"format": "monai_synth/1"})
    untrained = nets.DiffusionModelUNet(**CLASSES)
    assert "look untrained" in said(untrained)
    settings = ask(tmp_path, "DiffusionModelUNet", CLASSES, other, **given)
    whole = Path(settings.source).read_bytes()
    Path(settings.source).write_bytes(whole[: len(whole) // 2])
    assert "truncated or no checkpoint" in message_of(settings)
    Path(settings.source).write_text("weights")
    assert "truncated or no checkpoint" in message_of(settings)
    torch.jit.script(nn.Conv2d(1, 1, 1)).save(settings.source)
    assert "holds more than weights (pickled objects, or TorchScript)" in message_of(settings)
    Path(settings.source).unlink()
    assert "there is no checkpoint" in message_of(settings)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"channels": [8, 24]}, "of another shape: "),
        ({"attention_levels": [True, True]}, "missing: down_blocks.0.attentions"),
        ({"num_class_embeds": 2}, "num_class_embeds is 2; the bundle cfg_ddpm needs 3: one for each of dark, bright"),
        ({"num_class_embeds": None}, "num_class_embeds is None"),
        ({"in_channels": 3}, "images of few have 1"),
        ({"with_conditioning": True, "cross_attention_dim": 4}, "has cross-attention"),
        ({"widths": 4}, "has no argument 'widths'"),
        ({"channels": "$[8, 16]"}, "expressions are not run"),
        ({"channels": "@nowhere"}, "channels is '@nowhere'"),
        ({"_target_": "UNet"}, "ControlNet at its top (there: DDPMScheduler, UNet); others are not converted"),
        ({"_target_": "VQVAE"}, "ControlNet at its top (there: DDPMScheduler, VQVAE); others are not converted"),
    ],
)
def test_a_description_of_another_network_ends_in_one_message(
    args: dict, words: str, class_dataset: Path, tmp_path: Path
) -> None:
    other = theirs(nets, "DiffusionModelUNet", CLASSES)
    said = message_of(ask(tmp_path, "DiffusionModelUNet", CLASSES | args, other, dataset=str(class_dataset)))
    assert words in said


def test_weights_of_another_kind_of_network_end_in_one_message(class_dataset: Path, tmp_path: Path) -> None:
    coder = theirs(nets, "AutoencoderKL", AUTOENCODER)
    said = message_of(ask(tmp_path, "DiffusionModelUNet", CLASSES, coder, dataset=str(class_dataset)))
    assert "missing: " in said
    assert "Give the description with which this DiffusionModelUNet was trained, and its own weights" in said


def test_wrong_places_end_in_one_message(class_dataset: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    other = theirs(nets, "DiffusionModelUNet", CLASSES)
    given = {"dataset": str(class_dataset)}

    def said(**more: Any) -> str:
        return message_of(ask(tmp_path, "DiffusionModelUNet", CLASSES, other, **(given | more)))

    assert "needs --dataset" in said(dataset=None)
    assert "dataset" in said(dataset=str(tmp_path / "none"))
    assert "give --image-size, 2 sizes" in said(image_size=[16])
    assert "size [15, 16] is no multiple of 2, as this network needs; give --image-size" in said(image_size=[15, 16])
    assert "gives its networks images from -1 to 1" in said(value_range=[0.0, 1.0])
    assert "is not where a bundle looks for a DiffusionModelUNet" in said(out="models/autoencoder.pt")
    assert "is used with" in said(dataset=str(tiny_dataset))
    assert "there is no file" in said(schedule=str(tmp_path / "none.json"))
    settings = ask(tmp_path, "DiffusionModelUNet", CLASSES, other, **given)
    Path(settings.out).parent.mkdir(exist_ok=True)
    Path(settings.out).write_text("kept")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        convert_checkpoint(settings, report=print)
    assert Path(settings.out).read_text() == "kept"


def test_an_autoencoder_and_a_network_of_other_latents_are_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    given = {"dataset": str(tiny_dataset)}
    coder = theirs(nets, "AutoencoderKL", AUTOENCODER)
    convert(ask(tmp_path, "AutoencoderKL", AUTOENCODER, coder, "models/autoencoder.pt", **given))
    for change, words in (
        ({"in_channels": 4}, "need (3, 3) or (6, 3)"),
        ({"label_nc": 5}, "label_nc is 5, the dataset tiny has 8 labels"),
        ({"channels": [8] * 6, "attention_levels": [False] * 6}, "[16, 16] is no multiple of 32"),
        ({}, "give the one of the training with --scale-factor"),
    ):
        other = theirs(nets, "SPADEDiffusionModelUNet", SPADE | change)
        assert words in message_of(ask(tmp_path, "SPADEDiffusionModelUNet", SPADE | change, other, **given))


@pytest.mark.parametrize(
    "given",
    [
        {"schedule": "scaled_linear_beta", "beta_start": 0.0015, "beta_end": 0.0205},
        {"schedule": "linear_beta", "num_train_timesteps": 200},
        {"schedule": "cosine", "prediction_type": "v_prediction"},
        {},
    ],
)
def test_the_schedule_is_the_table_of_monais(given: dict) -> None:
    schedule = schedule_text({"noise": {"_target_": "DDPMScheduler", **given}}, "train.json")
    expected = DDPMScheduler(**given)
    torch.testing.assert_close(alphas_cumprod(schedule), expected.alphas_cumprod.double(), rtol=0, atol=1e-5)
    assert schedule["prediction_type"] == expected.prediction_type


def test_references_in_a_bundles_configuration_are_looked_up() -> None:
    content = {
        "c": 3, "model": {"width": [8, "@top"]}, "top": 16, "circle": ["@circle"],
        "net": {
            "_target_": "generative.networks.nets.DiffusionModelUNet", "_disabled_": False, "spatial_dims": 2,
            "in_channels": "@c", "out_channels": "@c", "num_channels": "@model#width",
        },
    }  # fmt: skip
    text = network_text(content, "train.json")
    assert (text.args["in_channels"], text.args["channels"]) == (3, [8, 16])
    with pytest.raises(UserError, match="several networks: net, again; say with --network-id which"):
        network_text({**content, "again": content["net"]}, "train.json")
    assert network_text({**content, "again": content["net"]}, "train.json", "again") == text
    content["net"]["num_channels"] = "@circle"
    with pytest.raises(UserError, match="num_channels is '@circle'"):
        network_text(content, "train.json")


def test_the_command_prints_the_difference_and_its_failures_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ask(tmp_path, "ControlNet", CONTROL, theirs(nets, "ControlNet", CONTROL))
    command = ["convert", settings.source, "--network", settings.network, "--out", settings.out]
    assert cli.main(command) == 0
    assert "largest difference" in capsys.readouterr().out
    assert cli.main(command) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "exists and is not overwritten" in printed
    assert cli.main([*command, "--overwrite"]) == 0

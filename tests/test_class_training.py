# SPDX-License-Identifier: Apache-2.0
"""What a class-conditional diffusion model trains on: images in memory, drawn classes, dropped classes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from monai_synth.data.class_images import ClassImages, class_image_size, class_list, ready_batch, some_of
from monai_synth.data.datalist import read_dataset
from monai_synth.data.pair_files import read_image, resize_image, write_image
from monai_synth.diffusion import alphas_cumprod
from monai_synth.errors import UserError
from monai_synth.networks import ClassUNet
from monai_synth.training import (
    BalancedSampler,
    ClassDiffusionPrepareBatch,
    ClassReport,
    ConditionDropout,
    class_sampler,
    denoising_loss,
    iterations_for,
)

SCHEDULE = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}


def write_dataset(folder: Path, of_images: list[int], size: int = 8, **head) -> Path:
    """A prepared dataset whose images of class k are mostly brighter the larger k is."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    cases = []
    for i, k in enumerate(of_images):
        image = np.clip(rng.normal(80 + 90 * k, 10, (1, size, size)), 0, 255).astype(np.uint8)
        write_image(folder / "images" / f"{i}.png", image)
        cases.append({"image": f"images/{i}.png", "class": k, "case_id": str(i), "patient_id": str(i)})
    content = {
        "name": "toy", "task": "classes", "modality": "X-ray", "image_channels": 1, "spatial_shape": [size, size],
        "intensity": None, "classes": {"dark": 0, "bright": 1}, "training": cases, "validation": [], "test": [],
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content | head))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("toy") / "prepared", [0] * 3 + [1] * 9)


def test_batches_are_the_files_whether_they_are_kept_in_memory_or_not(dataset):
    cases = class_list(str(dataset), "training")
    for size in ((8, 8), (6, 4)):
        kept = ClassImages(cases, image_size=size, image_channels=1, progress=False)
        read = ClassImages(cases, image_size=size, image_channels=1, max_bytes=0)
        assert kept.images is not None
        assert read.images is None
        chosen = [7, 0, 3]
        for images in (kept, read):
            batch = images.__getitems__(chosen)
            expected = np.stack([resize_image(read_image(cases[i]["image"]), size) for i in chosen])
            np.testing.assert_array_equal(batch["image"].numpy(), expected)
            assert batch["class"].tolist() == [1, 0, 1]
            assert batch["index"].tolist() == chosen
            assert torch.equal(images[3]["image"], batch["image"][2])


def test_a_loader_takes_whole_batches(dataset):
    images = ClassImages(class_list(str(dataset), "training"), image_size=(8, 8), image_channels=1, progress=False)
    calls = []
    images.__class__ = type("Counted", (ClassImages,), {
        "__getitems__": lambda self, indices: calls.append(len(indices)) or ClassImages.__getitems__(self, indices)
    })  # fmt: skip
    batches = list(torch.utils.data.DataLoader(images, batch_size=5, collate_fn=ready_batch))
    assert calls == [5, 5, 2]
    assert torch.cat([b["index"] for b in batches]).tolist() == list(range(12))


def test_a_dataset_of_one_class_or_without_images_of_one_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "a", [0, 0])
    with pytest.raises(UserError, match="no image of bright; a model that is told the class needs two or more"):
        class_list(str(folder), "training")
    folder = write_dataset(tmp_path / "b", [0, 0], classes={"dark": 0})
    with pytest.raises(UserError, match=r"one class only \(dark\)"):
        class_list(str(folder), "training")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class": 7}, r"has the class 7, allowed are \[0, 1\]"),
        ({"class": "dark"}, "has the class 'dark'"),
        ({"class": None}, "has the class None"),
        ({"image": "../other/0.png"}, "lies outside the dataset"),
        ({"image": "/etc/passwd"}, "lies outside the dataset"),
    ],
)
def test_a_dataset_that_was_changed_by_hand_is_refused(tmp_path, change, words):
    folder = write_dataset(tmp_path / "a", [0, 1])
    content = json.loads((folder / "dataset.json").read_text())
    content["training"][1] |= change
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_dataset(folder, task="classes")


def test_class_numbers_are_counted_from_0(tmp_path):
    folder = write_dataset(tmp_path / "a", [1, 5], classes={"dark": 1, "bright": 5})
    with pytest.raises(UserError, match="needed are names with the numbers 0, 1"):
        read_dataset(folder, task="classes")


def test_a_few_cases_hold_the_classes_as_all_do():
    cases = [{"class": k} for k in [0] * 300 + [1] * 100]
    assert [case["class"] for case in some_of(cases, 40)].count(1) == 10
    assert some_of(cases, 400) == cases
    assert some_of(cases, 1000) == cases


def test_images_of_unequal_size_ask_for_a_size(tmp_path):
    folder = write_dataset(tmp_path / "a", [0, 1], spatial_shape=None)
    with pytest.raises(UserError, match=r"differ in size; give --image_size '\[64, 64\]'"):
        class_image_size(read_dataset(folder))


def test_colour_images_for_a_grey_model_are_refused(tmp_path):
    folder = write_dataset(tmp_path / "a", [0, 1])
    write_image(folder / "images" / "1.png", np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"1\.png has shape \(3, 8, 8\); needed are 1 channel"):
        ClassImages(class_list(str(folder), "training"), image_size=(8, 8), image_channels=1, progress=False)


# Which images are drawn


def test_balanced_sampling_takes_classes_in_turn_and_each_image_of_one_equally_often():
    classes = [0] * 3 + [1] * 9
    sampler = BalancedSampler(classes, 36, seed=3)
    sampler.set_epoch(1)
    drawn = list(sampler)
    assert [classes[i] for i in drawn] == [0, 1] * 18
    assert set(Counter(i for i in drawn if classes[i] == 0).values()) == {6}
    assert set(Counter(i for i in drawn if classes[i] == 1).values()) == {2}
    sampler.set_epoch(2)
    assert list(sampler) != drawn


def test_balanced_sampling_shares_one_row_among_processes():
    classes = [0, 1, 1, 0, 1, 2]
    whole = BalancedSampler(classes, 30, seed=1)
    whole.set_epoch(2)
    parts = [BalancedSampler(classes, 15, seed=1, rank=rank, num_replicas=2) for rank in range(2)]
    for part in parts:
        part.set_epoch(2)
    assert [i for pair in zip(*parts, strict=True) for i in pair] == list(whole)


def test_natural_sampling_draws_every_image_equally_often():
    cases = [{"class": k} for k in [0] * 3 + [1] * 9]
    sampler = class_sampler(cases, "natural", num_samples=24, seed=0)
    sampler.set_epoch(1)
    assert set(Counter(sampler).values()) == {2}
    with pytest.raises(UserError, match="unknown class_sampling 'even'; allowed are natural, balanced"):
        class_sampler(cases, "even", num_samples=24, seed=0)


def test_an_epoch_of_the_text_is_1047_iterations():
    assert iterations_for(4185, 4) == 1047
    assert iterations_for(4185, 4, 2) == 524
    with pytest.raises(UserError, match="batch_size is 0"):
        iterations_for(10, 0)


# What the network gets


@pytest.mark.parametrize("drop_prob", [0.0, 0.2, 1.0])
def test_as_many_classes_are_dropped_as_asked(drop_prob):
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (20_000,))
    dropped = ConditionDropout(drop_prob, 2)(labels, torch.arange(20_000))
    share = (dropped == 2).float().mean()
    assert abs(share - drop_prob) < 4 * (drop_prob * (1 - drop_prob) / 20_000) ** 0.5 + 1e-9
    assert torch.equal(dropped[dropped != 2], labels[dropped != 2])


def test_conditions_of_any_shape_are_dropped_whole_and_by_seed_the_same_in_any_batch():
    tokens, null = torch.randn(50, 3, 4), torch.zeros(3, 4)
    drop = ConditionDropout(0.5, null, seed=1)
    whole = drop(tokens, torch.arange(50))
    zero = (whole == 0).flatten(1)
    assert torch.equal(zero.all(1), zero.any(1))
    assert 10 < zero.all(1).sum() < 40
    assert torch.equal(drop(tokens[20:30], torch.arange(20, 30)), whole[20:30])
    with pytest.raises(UserError, match=r"drop_prob is 1.5; allowed are shares from 0"):
        ConditionDropout(1.5, 0)


def batch(number: int = 6) -> dict[str, torch.Tensor]:
    image = torch.randint(0, 256, (number, 1, 8, 8), dtype=torch.uint8)
    return {"image": image, "class": torch.arange(number) % 2, "index": torch.arange(number)}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_inputs_and_targets_give_back_the_image(kind):
    data = batch()
    prepare = ClassDiffusionPrepareBatch(SCHEDULE | {"prediction_type": kind}, null_class=2, drop_prob=0.0, seed=0)
    x_t, target, _, given = prepare(data)
    abar = alphas_cumprod(SCHEDULE)[given["timesteps"]].view(-1, 1, 1, 1).float()
    x_0 = {
        "epsilon": (x_t - (1 - abar).sqrt() * target) / abar.sqrt(),
        "v_prediction": abar.sqrt() * x_t - (1 - abar).sqrt() * target,
        "sample": target,
    }[kind]
    torch.testing.assert_close(x_0, data["image"].float() / 127.5 - 1, rtol=1e-3, atol=2e-3)
    assert given["class_labels"].tolist() == data["class"].tolist()


def test_losses_are_those_of_torch_by_name():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert denoising_loss("l1")(a, b) == (a - b).abs().mean()
    assert denoising_loss("mse")(a, b) == ((a - b) ** 2).mean()
    with pytest.raises(UserError, match="unknown loss 'l2'; allowed are l1, mse"):
        denoising_loss("l2")


def test_a_null_class_is_trained_beside_the_classes(dataset):
    """After training on classes that differ in brightness, knowing the class helps, and knowing none is no nonsense."""
    torch.manual_seed(0)
    images = ClassImages(class_list(str(dataset), "training"), image_size=(8, 8), image_channels=1, progress=False)
    net = ClassUNet(2, 1, 2, (8, 8), base_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=1)
    schedule = SCHEDULE | {"prediction_type": "v_prediction"}
    prepare = ClassDiffusionPrepareBatch(schedule, null_class=net.null_class, drop_prob=0.3)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    before = net.class_embedding.weight.detach().clone()
    for _ in range(120):
        x_t, target, _, given = prepare(images.__getitems__(list(range(12))))
        loss = nn.functional.mse_loss(net(x_t, **given), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (net.class_embedding.weight - before).abs().amax(dim=1).min() > 1e-3  # of both classes and of none
    fixed = ClassDiffusionPrepareBatch(schedule, null_class=net.null_class, drop_prob=0.0, seed=0)
    batches = [images.__getitems__(list(range(12)))] * 10
    report = ClassReport(net, batches, fixed, nn.MSELoss(), num_classes=2, device="cpu")()
    print(report)
    assert report["n"] == 120
    assert report["class_loss"] < 0.95 * report["null_loss"]
    assert report["null_loss"] < report["wrong_class_loss"]

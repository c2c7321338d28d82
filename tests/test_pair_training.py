# SPDX-License-Identifier: Apache-2.0
"""From a prepared dataset of pairs to training batches; the joint variable and the joint U-Net."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader
from scipy import ndimage

from monai_synth.data.joint import split_joint, to_image, to_joint, to_label
from monai_synth.data.pair_files import (
    read_image,
    read_label,
    resize_image,
    resize_label,
    write_image,
    write_label,
)
from monai_synth.diffusion import alphas_cumprod
from monai_synth.errors import UserError
from monai_synth.networks import JointUNet
from monai_synth.training import (
    EpochSeed,
    IterationSampler,
    JointDiffusionPrepareBatch,
    epochs_for,
    pair_list,
    pair_preprocessing,
    pair_spacing,
)

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


# Files


@pytest.mark.parametrize(("shape", "ending"), [((1, 5, 7), "png"), ((3, 5, 7), "png"), ((2, 4, 5, 6), "nii.gz")])
def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path, shape: tuple[int, ...], ending: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_image(tmp_path / f"i.{ending}", image, (2.0, 1.0, 1.5))
    write_label(tmp_path / f"l.{ending}", image[0])
    np.testing.assert_array_equal(read_image(tmp_path / f"i.{ending}"), image)
    np.testing.assert_array_equal(read_label(tmp_path / f"l.{ending}"), image[0])
    first = (tmp_path / f"i.{ending}").read_bytes()
    write_image(tmp_path / f"i.{ending}", image, (2.0, 1.0, 1.5))
    assert (tmp_path / f"i.{ending}").read_bytes() == first


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "i.png", np.zeros((3, 64, 64), np.uint8))
    content = (tmp_path / "i.png").read_bytes()
    (tmp_path / "i.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"i\.png cannot be read"):
        read_image(tmp_path / "i.png")


def test_a_label_takes_the_majority_of_the_pixels_it_stands_for() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (12, 12), np.uint8)
    small = resize_label(label, (4, 4), 3)
    for row, col in np.ndindex(4, 4):
        counts = np.bincount(label[3 * row : 3 * row + 3, 3 * col : 3 * col + 3].ravel(), minlength=3)
        assert counts[small[row, col]] == counts.max()
    np.testing.assert_array_equal(resize_label(label, (24, 24), 3), label.repeat(2, 0).repeat(2, 1))


def test_shrinking_an_image_keeps_its_mean_and_does_not_alias() -> None:
    rows = np.arange(256)[:, None] + np.zeros((1, 256))
    stripes = (127.5 + 127 * np.cos(np.pi * rows)).astype(np.uint8)[None]  # the highest frequency there is
    small = resize_image(stripes, (32, 32))
    assert small.std() < 2
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(256, 256)), 12)
    smooth = ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)[None]
    expected = smooth[0].reshape(32, 8, 32, 8).mean((1, 3))
    assert np.abs(resize_image(smooth, (32, 32))[0] - expected)[1:-1, 1:-1].max() < 4


# The joint variable


@pytest.mark.parametrize("value_range", [(0, 1), (-1, 1)])
@pytest.mark.parametrize("num_labels", [2, 4])
def test_the_joint_variable_holds_image_and_label_without_loss(value_range: tuple, num_labels: int) -> None:
    image = torch.randint(0, 256, (2, 3, 8, 9), dtype=torch.uint8)
    label = torch.randint(0, num_labels, (2, 8, 9), dtype=torch.uint8)
    x_0 = to_joint(image, label, num_labels, value_range)
    assert x_0.shape == (2, 3 + num_labels - 1, 8, 9)
    assert (x_0.min(), x_0.max()) == value_range
    parts = split_joint(x_0, 3)
    assert torch.equal(to_image(parts[0], value_range), image)
    assert torch.equal(to_label(parts[1], value_range), label)


@pytest.mark.parametrize(("value_range", "middle"), [((0, 1), 0.5), ((-1, 1), 0.0)])
def test_a_mask_is_cut_in_the_middle_of_the_range_whatever_the_range_is(value_range: tuple, middle: float) -> None:
    mask = torch.tensor([middle - 0.01, middle, middle + 0.01]).view(1, 1, 1, 3)
    assert to_label(mask, value_range).tolist() == [[[0, 0, 1]]]


def test_another_value_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"value_range is \[0, 255\]; allowed are \[0, 1\]"):
        to_image(torch.zeros(1, 1, 2, 2), (0, 255))


# The network


def test_the_network_of_table_4_1_has_the_parameters_of_the_texts_code() -> None:
    with torch.device("meta"):
        polyps = JointUNet(2, 3, 1, (256, 256))
        nuclei = JointUNet(2, 3, 1, (512, 512), num_res_blocks=3)
    millions = [round(sum(p.numel() for p in net.parameters()) / 1e6) for net in (polyps, nuclei)]
    assert millions == [124, 157]  # counted on the published code, SEEDS 1.4
    assert (polyps.in_channels, polyps.out_channels) == (4, 8)


@pytest.mark.parametrize("dims", [2, 3])
def test_attention_stands_at_the_map_sizes_that_are_asked_for(dims: int) -> None:
    net = JointUNet(
        dims, 1, 2, (16,) * dims, base_channels=8, channel_mult=(1, 1, 2), num_res_blocks=1, norm_num_groups=4,
        attention_resolutions=(8,),
    )  # fmt: skip
    has = [any("attention" in name for name, _ in block.named_modules()) for block in net.down_blocks]
    assert has == [False, True, False]
    out = net(torch.randn(2, 3, *(16,) * dims), torch.tensor([0, 999]))
    assert out.shape == (2, 6, *(16,) * dims)


def test_an_image_size_that_the_levels_cannot_halve_is_refused() -> None:
    with pytest.raises(UserError, match=r"image_size \[60, 64\] does not fit .* multiples of 8"):
        JointUNet(2, 3, 1, (60, 64), channel_mult=(1, 1, 2, 2))


# Batches


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Seven grey pictures of another size each, whose image is 100 times the label plus its number."""
    cases = []
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(7):
        label = ndimage.gaussian_filter(rng.normal(size=(40 + 4 * i, 48)), 5) > 0
        write_label(tmp_path / "labels" / f"c{i}.png", label.astype(np.uint8))
        write_image(tmp_path / "images" / f"c{i}.png", (100 * label + i)[None].astype(np.uint8))
        files = {"image": f"images/c{i}.png", "label": f"labels/c{i}.png"}
        cases.append({**files, "case_id": f"c{i}", "patient_id": f"p{i}", "spacing": [1.0, 1.0]})
    head = {
        "name": "toy", "task": "pairs", "modality": "L", "image_channels": 1, "channel_names": ["L"],
        "spatial_dims": 2, "spatial_shape": None, "intensity": {"unit": "8-bit", "min": 0, "max": 255},
        "labels": {"background": 0, "thing": 1}, "file_ending": ".png", "training": cases, "validation": [], "test": [],
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(head))
    return tmp_path


def transform(**options: object):
    options = {"image_channels": 1, "num_labels": 2, "random": True} | options
    return pair_preprocessing((32, 32), **options)


@pytest.mark.parametrize("patches", [False, True])
def test_image_and_label_stay_together_through_patches_and_flips(pairs: Path, patches: bool) -> None:
    dataset = CacheDataset(
        pair_list(str(pairs), "training"), transform(patches=patches, patch_scale=1.0, flips=True), progress=False
    )
    seen = set()
    loader = DataLoader(dataset, batch_size=7)  # a new one would draw the same again
    for _ in range(8):
        for item in loader:
            image, label, index = (item[k] for k in ("image", "label", "index"))
            assert type(image) is torch.Tensor
            assert image.shape == label.shape == (7, 1, 32, 32)
            expected = 100 * label + index.view(-1, 1, 1, 1)
            if patches:
                assert torch.equal(image.long(), expected)
            else:  # the image is interpolated along edges
                assert (image.float() - expected).abs().mean() < 8
            seen |= {tuple(label[0].flatten().tolist())}
    assert len(seen) > 2


def test_patches_of_a_small_image_come_from_an_enlarged_one(pairs: Path) -> None:
    item = transform(patches=True, patch_scale=0.1)(pair_list(str(pairs), "training")[0])
    assert item["image"].shape == (1, 32, 32)


def test_validation_takes_the_same_pixels_every_time(pairs: Path) -> None:
    fixed = transform(random=False, patches=True, flips=True)
    case = pair_list(str(pairs), "training")[3]
    assert torch.equal(fixed(case)["image"], fixed(case)["image"])


def test_a_dataset_without_validation_is_validated_on_its_training_cases(pairs: Path) -> None:
    assert len(pair_list(str(pairs), "validation")) == 7
    with pytest.raises(UserError, match="split 'test' .* has no case"):
        pair_list(str(pairs), "test")


def test_a_picture_of_other_channels_is_named(pairs: Path) -> None:
    with pytest.raises((UserError, RuntimeError)) as caught:
        transform(image_channels=3)(pair_list(str(pairs), "training")[0])
    assert "needed are 3 channels" in str(caught.value.__cause__ or caught.value)


def test_an_epoch_is_the_same_again_after_its_number_is_set_again(pairs: Path) -> None:
    dataset = CacheDataset(pair_list(str(pairs), "training"), transform(patches=True, flips=True), progress=False)
    sampler = IterationSampler(7, 20, seed=3)
    seed = EpochSeed(3, sampler, dataset)

    def epoch(number: int) -> torch.Tensor:
        seed(type("Engine", (), {"state": type("State", (), {"epoch": number})}))
        return torch.cat([b["image"] for b in DataLoader(dataset, batch_size=5, sampler=sampler)])

    first, second = epoch(1), epoch(2)
    assert not torch.equal(first, second)
    assert torch.equal(epoch(1), first)


@pytest.mark.parametrize("replicas", [1, 3])
def test_every_case_is_drawn_equally_often_and_no_draw_is_made_twice(replicas: int) -> None:
    draws = Counter()
    for rank in range(replicas):
        sampler = IterationSampler(7, 14, seed=0, rank=rank, num_replicas=replicas)
        for epoch in range(1, 6):
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert len(order) == len(sampler) == 14
            draws.update(order)
    assert set(draws.values()) == {10 * replicas}


def test_the_batch_is_the_forward_process_of_the_joint_variable(pairs: Path) -> None:
    dataset = CacheDataset(pair_list(str(pairs), "training"), transform(random=False), progress=False)
    batch = next(iter(DataLoader(dataset, batch_size=7)))
    for value_range in ((0, 1), (-1, 1)):
        prepare = JointDiffusionPrepareBatch(SCHEDULE, num_labels=2, value_range=value_range)
        x_t, target, _, options = prepare(batch, "cpu")
        abar = alphas_cumprod(SCHEDULE)[target.t].view(-1, 1, 1, 1).float()
        torch.testing.assert_close(x_t, abar.sqrt() * target.x_0 + (1 - abar).sqrt() * target.eps)
        assert torch.equal(options["timesteps"], target.t)
        assert torch.equal(target.x_t, x_t)
        assert torch.equal(target.x_0, to_joint(batch["image"], batch["label"][:, 0], 2, value_range))


def test_a_seed_fixes_the_noise_of_each_case_whatever_the_batch(pairs: Path) -> None:
    dataset = CacheDataset(pair_list(str(pairs), "training"), transform(random=False), progress=False)
    prepare = JointDiffusionPrepareBatch(SCHEDULE, num_labels=2, value_range=(0, 1), seed=5)
    whole = prepare(next(iter(DataLoader(dataset, batch_size=7))), "cpu")[0]
    parts = torch.cat([prepare(b, "cpu")[0] for b in DataLoader(dataset, batch_size=2)])
    assert torch.equal(whole, parts)


def test_volumes_keep_their_extent_in_mm(tmp_path: Path) -> None:
    write_image(tmp_path / "v.nii.gz", np.zeros((1, 30, 40, 20), np.uint8), (1.0, 2.0, 3.0))
    cases = [{"image": str(tmp_path / "v.nii.gz"), "spacing": [1.0, 2.0, 3.0]}]
    assert pair_spacing(cases, (60, 20, 20), None) == [0.5, 4.0, 3.0]
    assert pair_spacing(cases, (8, 8, 8), 0.5) == [2.0, 4.0, 6.0]
    assert pair_spacing(cases, (8, 8), None) == [1.0, 1.0]


def test_iterations_become_whole_epochs() -> None:
    assert [epochs_for(n, 50) for n in (1, 50, 51, 700)] == [1, 1, 2, 14]
    with pytest.raises(UserError, match="must be at least 1"):
        epochs_for(0, 50)

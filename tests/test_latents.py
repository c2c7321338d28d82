# SPDX-License-Identifier: Apache-2.0
"""Cached latents equal what the encoder gives, and crops sit at the nodules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import AutoencoderKL

from monai_synth.data.datalist import load_datalist
from monai_synth.data.semantic import GUIDING_FEATURES
from monai_synth.data.slices import one_hot, slice_preprocessing
from monai_synth.errors import UserError
from monai_synth.networks import pool_semantic
from monai_synth.networks.latent_codec import LatentCodec
from monai_synth.training import LatentCache, LatentDataset, NoduleCropDataset


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        2, 3, 3, num_res_blocks=(1, 1, 1), channels=(4, 4, 8), attention_levels=(False,) * 3, latent_channels=3,
        norm_num_groups=4, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    return LatentCodec(autoencoder, image_channels=3, factor=4, num_labels=8)


def make_cache(tiny_dataset: Path, codec: LatentCodec, folder: Path, **changes) -> LatentCache:
    options = {"autoencoder_sha256": "a", "cache_dir": folder, "image_size": (64, 64), "batch_size": 5} | changes
    return LatentCache(tiny_dataset, "training", codec, **options)


def test_cached_arrays_equal_direct_encoding(tiny_dataset: Path, codec: LatentCodec, tmp_path: Path) -> None:
    data = LatentDataset(make_cache(tiny_dataset, codec, tmp_path), 8)
    case = slice_preprocessing((64, 64))(load_datalist(tiny_dataset, "training")[7])
    mean, std = codec.encode_image(case["image"][None])
    item = data[7]
    torch.testing.assert_close(item["mean"], mean[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(item["std"], std[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(item["cond"], codec.encode_label(case["label"][None])[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(item["seg"], pool_semantic(one_hot(case["label"][None], 8), (16, 16))[0])


def test_the_scale_factor_gives_posterior_draws_unit_variance(
    tiny_dataset: Path, codec: LatentCodec, tmp_path: Path
) -> None:
    cache = make_cache(tiny_dataset, codec, tmp_path)
    mean, std = (np.asarray(cache.arrays[k], dtype=np.float64) for k in ("mean", "std"))
    draws = mean + std * np.random.default_rng(0).standard_normal((50, *mean.shape))
    assert (draws * cache.scale_factor()).std() == pytest.approx(1.0, rel=0.01)


def test_a_second_use_reads_the_same_folder_and_other_inputs_take_another(
    tiny_dataset: Path, codec: LatentCodec, tmp_path: Path
) -> None:
    first = make_cache(tiny_dataset, codec, tmp_path)
    stamp = (first.folder / "mean.npy").stat().st_mtime_ns
    again = make_cache(tiny_dataset, codec, tmp_path)
    assert again.folder == first.folder
    assert (again.folder / "mean.npy").stat().st_mtime_ns == stamp
    others = [{"autoencoder_sha256": "b"}, {"image_size": (32, 32)}, {"semantic_downsample": "nearest"}]
    others.append({"collapse_nodule_labels": True})
    folders = {make_cache(tiny_dataset, codec, tmp_path, **o).folder for o in others}
    assert len(folders | {first.folder}) == 5


def test_an_unfinished_cache_is_built_again(tiny_dataset: Path, codec: LatentCodec, tmp_path: Path) -> None:
    first = make_cache(tiny_dataset, codec, tmp_path)
    expected = np.array(first.arrays["mean"])
    (first.folder / "complete").unlink()
    (first.folder / "mean.npy").write_bytes(b"half")
    np.testing.assert_array_equal(make_cache(tiny_dataset, codec, tmp_path).arrays["mean"], expected)


def test_a_full_disk_while_encoding_is_one_message_and_leaves_no_cache(
    tiny_dataset: Path, codec: LatentCodec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(UserError, match="cannot write the latent cache .*No space left"):
        make_cache(tiny_dataset, codec, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_collapsed_maps_do_not_tell_malignancy(tiny_dataset: Path, codec: LatentCodec, tmp_path: Path) -> None:
    seg = LatentDataset(make_cache(tiny_dataset, codec, tmp_path, collapse_nodule_labels=True), 8)[4]["seg"]
    assert seg[5].sum() > 0
    assert seg[6:].sum() == 0


def test_crops_are_cut_around_the_nodule(tiny_dataset: Path, codec: LatentCodec, tmp_path: Path) -> None:
    cache = make_cache(tiny_dataset, codec, tmp_path)
    crops = NoduleCropDataset(cache, "malignancy", crop_size=8)
    assert len(crops) == 12
    for (case_index, top, left, target), case in zip(crops.items, cache.cases, strict=True):
        nodule = case["nodules"][0]
        assert target == [nodule["malignant"]]
        row, col = (c / 4 for c in nodule["center"])
        assert top <= row < top + 8
        assert left <= col < left + 8
        expected = cache.arrays["mean"][case_index][:, top : top + 8, left : left + 8]
        np.testing.assert_array_equal(crops[case_index]["mean"].numpy(), expected)


def test_balanced_weights_draw_every_label_alike(tiny_dataset: Path, codec: LatentCodec, tmp_path: Path) -> None:
    crops = NoduleCropDataset(make_cache(tiny_dataset, codec, tmp_path), "malignancy", crop_size=8)
    weights = np.array(crops.balanced_weights())
    assert weights.sum() == pytest.approx(1.0)
    assert weights[crops.targets == 1].sum() == pytest.approx(0.5)


def test_the_guiding_features_are_told_of_each_crop(tiny_dataset: Path, codec: LatentCodec, tmp_path: Path) -> None:
    cache = make_cache(tiny_dataset, codec, tmp_path)
    crops = NoduleCropDataset(cache, "all", crop_size=8)
    alone = [NoduleCropDataset(cache, feature, crop_size=8) for feature in GUIDING_FEATURES]
    np.testing.assert_array_equal(crops.targets, np.stack([c.targets for c in alone], axis=1))
    np.testing.assert_array_equal(crops[3]["target"], crops.targets[3])
    np.testing.assert_allclose(crops.balanced_weights(), np.mean([c.balanced_weights() for c in alone], axis=0))


@pytest.mark.parametrize("feature", ["texture", "all"])
def test_a_held_out_split_without_nodules_has_no_targets(
    tiny_dataset: Path, codec: LatentCodec, tmp_path: Path, feature: str
) -> None:
    cache = make_cache(tiny_dataset, codec, tmp_path)
    cache.split, cache.cases = "validation", []
    assert NoduleCropDataset(cache, feature, crop_size=8).targets.tolist() == []


def test_features_that_lidc_does_not_rate_and_crops_that_do_not_fit_are_refused(
    tiny_dataset: Path, codec: LatentCodec, tmp_path: Path
) -> None:
    cache = make_cache(tiny_dataset, codec, tmp_path)
    with pytest.raises(UserError, match="unknown nodule feature 'colour'; allowed are subtlety"):
        NoduleCropDataset(cache, "colour", crop_size=8)
    with pytest.raises(UserError, match="crop_size 17 is larger than the latent 16x16"):
        NoduleCropDataset(cache, "texture", crop_size=17)


def test_the_codec_averages_what_it_repeated_and_is_differentiable(codec: LatentCodec) -> None:
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    image = codec.decode(z)
    assert image.shape == (1, 1, 16, 16)
    torch.testing.assert_close(image, codec.autoencoder.decode(z).mean(1, keepdim=True))
    image.sum().backward()
    assert z.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in codec.parameters())
    codec.train()
    assert not codec.autoencoder.training

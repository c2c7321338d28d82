# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.transform import AffineTransform, warp

from monai_synth.experiments.classifier_augment import Geometry, apply_geometry, draw_geometry


def images(num=5, channels=1, size=(20, 28)):
    """Smooth inside, 0 at the border, where libraries differ in how they fade out."""
    x = torch.rand(num, channels, *size, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.pad(x[..., 3:-3, 3:-3], (3, 3, 3, 3))


def still(num, **given):
    values = {"flip": torch.zeros(num, dtype=torch.bool), "angle": torch.zeros(num), "shift": torch.zeros(num, 2)}
    return Geometry(**(values | given))


def test_it_is_torchvisions_flip_then_affine():
    try:
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as reference
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not work here: {error}")
    x = images(8, 3)
    drawn = draw_geometry(8, (20, 28), torch.Generator().manual_seed(1))
    assert drawn.flip.any()
    assert not drawn.flip.all()
    got = apply_geometry(x, drawn)
    for k in range(8):
        one = reference.hflip(x[k]) if drawn.flip[k] else x[k]
        shift = [float(drawn.shift[k, 0]) * 28, float(drawn.shift[k, 1]) * 20]
        angle = math.degrees(drawn.angle[k])
        one = reference.affine(one, angle, shift, 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(got[k], one, atol=2e-5, rtol=0)


def test_it_is_scikit_images_warp():
    x = images(4)
    drawn = draw_geometry(4, (20, 28), torch.Generator().manual_seed(2))
    got = apply_geometry(x, drawn)
    for k in range(4):
        one = x[k, 0].numpy()
        one = one[:, ::-1] if drawn.flip[k] else one
        centre = np.array([13.5, 9.5])
        moved = centre + drawn.shift[k].numpy() * (28, 20)
        turn = AffineTransform(translation=-centre) + AffineTransform(rotation=float(drawn.angle[k]))
        expected = warp(one, (turn + AffineTransform(translation=moved)).inverse, order=1, mode="constant", cval=0)
        np.testing.assert_allclose(got[k, 0].numpy(), expected, atol=2e-5)


def test_nothing_drawn_changes_nothing_and_a_flip_mirrors():
    x = images(3)
    torch.testing.assert_close(apply_geometry(x, still(3)), x, atol=1e-5, rtol=0)
    flip = torch.tensor([True, False, True])
    torch.testing.assert_close(
        apply_geometry(x, still(3, flip=flip)), torch.stack([x[0].flip(-1), x[1], x[2].flip(-1)]), atol=1e-5, rtol=0
    )


def test_a_shift_by_whole_pixels_moves_right_and_down_and_fills_with_0():
    x = torch.rand(1, 1, 10, 20, generator=torch.Generator().manual_seed(0))
    got = apply_geometry(x, still(1, shift=torch.tensor([[0.1, 0.1]])))
    expected = ndimage.shift(x[0, 0].numpy(), (1, 2), order=0, cval=0)
    np.testing.assert_allclose(got[0, 0].numpy(), expected, atol=1e-5)


def test_a_crop_is_enlarged_and_does_not_look_outside_itself():
    x = torch.zeros(1, 1, 16, 16)
    x[..., 4:12, 4:12] = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    x[..., :4, :] = 9.0  # outside the crop
    crop = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    got = apply_geometry(x, still(1, crop=crop))
    assert got.max() < 6  # bilinear reaches half a pixel over the edge
    enlarged = torch.nn.functional.interpolate(x[..., 4:12, 4:12], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(got[..., 2:-2, 2:-2], enlarged[..., 2:-2, 2:-2], atol=1e-5, rtol=0)
    shifted = apply_geometry(x, still(1, crop=crop, shift=torch.tensor([[0.0, 0.25]])))
    assert shifted[..., :3, :].abs().max() == 0


def test_what_is_drawn_is_in_the_texts_ranges_and_follows_the_generator():
    drawn = draw_geometry(4000, (28, 28), torch.Generator().manual_seed(0), crop=True)
    assert 0.45 < drawn.flip.float().mean() < 0.55
    assert 29 < math.degrees(drawn.angle.abs().max()) <= 30
    assert 0.099 < drawn.shift.abs().max() <= 0.1
    area = drawn.crop[:, 2] * drawn.crop[:, 3]
    assert 0.07 < area.min() < 0.1
    assert area.max() <= 1
    ratio = drawn.crop[:, 2] / drawn.crop[:, 3]
    assert 0.7499 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 1.3334
    assert (drawn.crop[:, :2] - drawn.crop[:, 2:] / 2).min() >= -1e-6
    assert (drawn.crop[:, :2] + drawn.crop[:, 2:] / 2).max() <= 1 + 1e-6
    again = draw_geometry(4000, (28, 28), torch.Generator().manual_seed(0))
    assert torch.equal(again.angle, drawn.angle)

# SPDX-License-Identifier: Apache-2.0
"""Computed chest X-rays of two classes, normal and pneumonia: images with a class without a download.

Pneumonia is fluid in place of some of the lungs' air and nothing else: everything beside it is drawn without a look at
the class. A picture depends on the seed and its number alone, and its chest is the same at every size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from monai_synth.data.phantom_files import check_limits, write_pictures
from monai_synth.data.phantom_xray_anatomy import draw_chest, draw_opacities, plane_axis, smooth_noise

Array = np.ndarray

CLASSES = ("normal", "pneumonia")
PATIENT_REGEX = r"(p\d+)_\d+$"  # the patient in the path of a picture without its ending

# Four pictures always hold both classes: the first patient has at most three.
_LIMITS = {"num_images": (4, 99999), "size": (16, 1024)}
_PICTURES_OF_A_PATIENT = (1, 1, 1, 1, 2, 2, 3)  # drawn from, equally likely
_NORMAL_PATIENTS = (0, 4)  # of every 7
_POINTS = 168  # at least, along an axis, from which a picture is averaged
_FINE = 400  # pixels along an axis from which on one point in each is enough, and else two by two


@dataclass(frozen=True)
class Xray:
    """One picture and what it shows.

    Attributes:
        image: uint8 (size, size).
        label: 0 normal, 1 pneumonia.
        patient: from 1.
        visit: number of the picture among the patient's, from 1.
        lungs: bool (size, size), where air-filled lung shows at all.
        opacity: float (size, size), mean share of the lungs' air in a pixel that fluid has displaced, 0 to below 1.
    """

    image: Array
    label: int
    patient: int
    visit: int
    lungs: Array
    opacity: Array

    @property
    def name(self) -> str:
        """Path in the data set without the ending."""
        return f"{CLASSES[self.label]}/p{self.patient:05d}_{self.visit}"


def write_xrays(
    folder: str | Path,
    *,
    num_images: int = 600,
    size: int = 64,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write pictures into a folder per class, whole or not at all; the same arguments give the same bytes.

    Two of seven patients are normal; a patient has one, two or three pictures, all of one class.

    Args:
        folder: folder to write; it must not exist or be empty. ``normal/p00001_1.png`` and
            ``pneumonia/p00002_1.png`` (8-bit grey) and so on go into it: ``p<patient>_<number>``. Read it with
            ``monai-synth prepare classes`` and ``PATIENT_REGEX`` as ``--group-regex``.
        num_images: pictures; 4 to 99999.
        size: rows and columns of a picture; 16 to 1024.
        seed: of everything in it; 0 or more.
        num_workers: processes; None takes as many as pay off. The files do not depend on it.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: an argument is out of range, ``folder`` holds something, or cannot be written.
    """
    check_limits(_LIMITS, num_workers=num_workers, num_images=num_images, size=size, seed=seed)
    asked = [(seed, patient, visit, size) for patient, visit in _visits(seed, num_images)]
    return write_pictures(folder, _named, asked, folders=CLASSES, num_workers=num_workers, progress=progress)


def _named(seed: int, patient: int, visit: int, size: int) -> list[tuple[str, Array]]:
    xray = xray_picture(seed, patient, visit, size=size)
    return [(xray.name, xray.image)]


def xrays(seed: int, num_images: int, *, size: int = 64) -> Iterator[Xray]:
    """Compute the first pictures of a data set, patient by patient.

    Args:
        seed: seed of the data set.
        num_images: how many.
        size: rows and columns.
    """
    for patient, visit in _visits(seed, num_images):
        yield xray_picture(seed, patient, visit, size=size)


def xray_picture(seed: int, patient: int, visit: int, *, size: int = 64, label: int | None = None) -> Xray:
    """Compute one picture.

    Args:
        seed: seed of the data set.
        patient: number of the patient from 1.
        visit: number of the picture among the patient's from 1.
        size: rows and columns.
        label: 0 normal, 1 pneumonia; None is that of the patient. Everything but the opacities stays as it is.

    Returns:
        The picture and what it shows.
    """
    # Streams of their own, so that the draws of one leave those of another alone.
    anatomy = np.random.default_rng([seed, patient])
    visits = {name: np.random.default_rng([seed, patient, visit, n]) for n, name in enumerate(("pose", "film", "ill"))}
    if label is None:
        label = int((patient - 1) % 7 not in _NORMAL_PATIENTS)
    ratio = max(-(-_POINTS // size), 1 if size >= _FINE else 2)
    chest = draw_chest(anatomy, visits["pose"], size * ratio)
    fill = draw_opacities(visits["ill"], chest) if label else np.zeros_like(chest.air)
    absorbed = _average((chest.absorbed - chest.air * (1 - fill)).clip(0, None), ratio)
    image = _film(visits["film"], absorbed)
    return Xray(image, label, patient, visit, _average(chest.air > 0, ratio) > 0, _average(fill, ratio))


def _visits(seed: int, num_images: int) -> Iterator[tuple[int, int]]:
    """Patient and number of each picture."""
    rng = np.random.default_rng([seed, 0])  # patients count from 1
    patient = done = 0
    while done < num_images:
        patient += 1
        for visit in range(1, 1 + min(int(rng.choice(_PICTURES_OF_A_PATIENT)), num_images - done)):
            yield patient, visit
            done += 1


def _film(rng: np.random.Generator, absorbed: Array) -> Array:
    """Picture uint8 of what was absorbed: exposure, contrast, uneven beam, noise and margins."""
    size = len(absorbed)
    axis = plane_axis(size)
    exposure, curve, black = rng.uniform(0.62, 0.82), rng.uniform(0.50, 0.85), rng.uniform(0.0, 0.12)
    beam = 1 + 0.05 * rng.normal() * axis[:, None] + 0.05 * rng.normal() * axis + 0.02 * smooth_noise(rng, axis, 0.7)
    light = black + (1 - black) * exposure * beam * absorbed**curve
    light /= (1 + (light / 0.92) ** 6) ** (1 / 6)  # the shoulder of the film's curve
    grain = rng.uniform(0.008, 0.025) * min(1, size / 256) ** 0.5  # larger pixels count more photons
    light += grain * gaussian_filter(rng.standard_normal((size, size)), 0.5)
    return (255 * light).clip(0, 255).round().astype(np.uint8)


def _average(array: Array, ratio: int) -> Array:
    """Means of squares of ``ratio`` x ``ratio``."""
    size = len(array) // ratio
    return array.reshape(size, ratio, size, ratio).mean((1, 3))

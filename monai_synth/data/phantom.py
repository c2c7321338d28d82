# SPDX-License-Identifier: Apache-2.0
"""Synthetic thorax CT with readers' outlines, written as LIDC-IDRI is published.

A first run needs no download: the phantom goes through exactly the import that real LIDC goes through.
Every patient depends on the seed and its number alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from monai_synth.data.phantom_anatomy import build_thorax
from monai_synth.data.phantom_dicom import PADDING, RESCALE_INTERCEPT, lidc_xml, write_series
from monai_synth.data.phantom_files import check_limits, write_whole
from monai_synth.data.phantom_nodules import (
    NUM_READERS,
    Nodule,
    Reading,
    draw_ratings,
    nodule_mask,
    paint_nodule,
    read_nodule,
    shape_nodule,
)
from monai_synth.data.phantom_shapes import (
    FIELD_OF_VIEW_MM,
    SLICE_MM,
    Array,
    Grid,
    blend,
    capsule,
    smooth_noise,
    soft,
    vessel_tree,
)
from monai_synth.data.phantom_wall import Habitus

PADDING_HU = PADDING + RESCALE_INTERCEPT
_LOWEST_MM, _HIGHEST_MM = -118.0, 92.0  # the slab lies between the domes' sides and the apices
_BRONCHI = [  # ends in mm, radii
    ((-34, 13, -22), (-44, 17, -48), 4.2, 3.0),
    ((-44, 17, -48), (-60, 30, -85), 3.0, 1.6),
    ((-44, 17, -48), (-62, -12, -66), 2.6, 1.4),
    ((-34, 13, -20), (-52, 4, -2), 3.4, 2.2),
    ((-52, 4, -2), (-62, 8, 34), 2.2, 1.2),
    ((40, 17, -28), (48, 22, -50), 4.0, 2.8),
    ((48, 22, -50), (64, 34, -85), 2.8, 1.5),
    ((40, 17, -26), (56, 4, -14), 3.2, 2.0),
    ((56, 4, -14), (62, -4, 30), 2.0, 1.2),
]
_LIMITS = {"num_patients": (1, 9999), "num_slices": (4, 80), "matrix": (64, 512)}


@dataclass
class PhantomPatient:
    """One patient and all that is known about it.

    Attributes:
        image_hu: densities (D, H, W), int16, head first; PADDING_HU outside the field of view.
        nodule_map: number of the nodule (D, H, W), 0 for none, n for `nodules[n - 1]`; uint8.
        lung: lungs with their vessels and nodules (D, H, W), bool.
        nodules: the nodules of at least 3 mm with their true ratings.
        z_mm: position (D,) of every slice in mm.
        spacing_mm: slice, row and column spacing.
        readings: per reader, what was marked as a nodule (ratings empty below 3 mm).
        others: per reader, the places (slice, row, column) marked as no nodule.
        contrast: whether the vessels are enhanced.
    """

    image_hu: Array
    nodule_map: Array
    lung: Array
    nodules: list[Nodule]
    z_mm: Array
    spacing_mm: tuple[float, float, float]
    readings: list[list[Reading]] = field(default_factory=list)
    others: list[list[tuple[int, int, int]]] = field(default_factory=list)
    contrast: bool = False


def phantom_patient(seed: int, index: int, *, num_slices: int = 24, matrix: int = 256) -> PhantomPatient:
    """Compute one patient.

    Args:
        seed: seed of the data set.
        index: number of the patient from 1.
        num_slices: slices of 2.5 mm.
        matrix: rows and columns of a slice over a field of view of 330 mm.

    Returns:
        Image, truth and readings, the same for the same arguments.
    """
    rng = np.random.default_rng([seed, index])
    who = Habitus.draw(rng)
    room = max(0.0, _HIGHEST_MM - _LOWEST_MM - num_slices * SLICE_MM)
    # Neighbouring patients lie at levels far apart, so that few patients already span the lungs.
    level = (index * 0.618034 + rng.uniform(-0.08, 0.08)) % 1.0
    top = _HIGHEST_MM - room * level
    shift = (float(rng.normal(0, 4)), float(rng.normal(-6, 3)))
    cell = matrix * 50 / FIELD_OF_VIEW_MM
    bend = 1.8 * np.stack([smooth_noise(rng, (matrix, matrix), (cell, cell)) for _ in range(2)])
    grid = Grid(num_slices, matrix, float(top), float(rng.normal(0, 0.03)), shift, bend)
    thorax = build_thorax(grid, who, rng)

    air = _parenchyma(grid, who, thorax.lung, rng)
    nodules = _place_nodules(grid, thorax.lung, rng)
    dots = _small_spots(grid, thorax.lung, nodules, rng)
    for nodule in nodules:
        paint_nodule(air, thorax.lung, nodule, grid, rng)
    for center, radius in dots:
        hit = capsule(grid, center, center, (radius, radius), 2.0, slab=1.0)
        if hit is not None:
            blend(air[hit[0]], 40.0, soft(hit[1], grid.pixel_mm))
    blend(thorax.hu, air, soft(thorax.lung, grid.pixel_mm))

    truth = np.zeros(grid.shape, dtype=np.uint8)
    for number, nodule in enumerate(nodules, start=1):
        truth[nodule.box][nodule_mask(nodule, thorax.lung)] = number
    readings, others = _read(grid, thorax.lung, nodules, dots, rng)
    return PhantomPatient(
        image_hu=_scan(grid, thorax.hu, rng),
        nodule_map=truth,
        lung=thorax.lung < 0,
        nodules=nodules,
        z_mm=grid.z.astype(float),
        spacing_mm=(SLICE_MM, grid.pixel_mm, grid.pixel_mm),
        readings=readings,
        others=others,
        contrast=who.blood_hu > 100,
    )


def _parenchyma(grid: Grid, who: Habitus, lung: Array, rng: np.random.Generator) -> Array:
    """Densities (D, H, W) of the lung: air and tissue, denser below, with branching arteries and veins."""
    hu = rng.uniform(-880, -845) + 0.34 * grid.y + 9 * smooth_noise(rng, grid.shape, (3, 5, 5))
    hu = hu.astype(np.float32)
    vessel = np.zeros(grid.shape, dtype=np.float32)
    roots = {-1: [(-42, 10, -18), (-38, 14, -42)], 1: [(44, 16, -14), (38, 14, -42)]}
    for side, (artery, vein) in roots.items():
        inside = np.argwhere((lung < -5) & (grid.x * side > 0))
        if not len(inside):
            continue
        volume = len(inside) * grid.pixel_mm**2 * SLICE_MM
        for root, density in ((artery, 3.2e-4), (vein, 2.2e-4)):
            count = int(np.clip(volume * density, 8, 420))
            spots = grid.position(inside[rng.integers(0, len(inside), count)]) + rng.normal(0, 0.6, (count, 3))
            start = np.array(root, dtype=float)
            # What lies between the slab and the hilum is not drawn, but its branches come from there.
            beyond = start + (spots[: count // 2] - start) * rng.uniform(0.25, 0.95, (count // 2, 1))
            beyond = beyond[(beyond[:, 2] > grid.z[0]) | (beyond[:, 2] < grid.z[-1])]
            for a, b, r_a, r_b in vessel_tree(start, np.concatenate([spots, beyond]), rng):
                hit = capsule(grid, a, b, (r_a, r_b), 0.6 * grid.pixel_mm, slab=1.6)
                if hit is not None:
                    thin = min(1.0, 2.2 * (r_a + r_b) / 2 / grid.pixel_mm)
                    np.maximum(vessel[hit[0]], thin * soft(hit[1], grid.pixel_mm), out=vessel[hit[0]])
    blend(hu, 30 + 0.7 * (who.blood_hu - 40), vessel)
    for wall, value in ((0.8, -220.0), (0.0, -960.0)):  # the larger bronchi beside the arteries
        for a, b, r_a, r_b in _BRONCHI:
            hit = capsule(grid, np.array(a), np.array(b), (r_a + wall, r_b + wall), grid.pixel_mm)
            if hit is not None:
                blend(hu[hit[0]], value, soft(hit[1], grid.pixel_mm))
    return hu


def _place_nodules(grid: Grid, lung: Array, rng: np.random.Generator) -> list[Nodule]:
    """Two to five nodules in the slab, some against the pleura, now and then two side by side."""
    wanted = int(rng.integers(2, 6))
    depth = -lung
    nodules: list[Nodule] = []
    order = rng.permutation(5)[:wanted] + 1  # every patient sees different malignancies
    for malignancy in order:
        for _ in range(6):
            ratings = draw_ratings(rng, int(malignancy))
            probe = shape_nodule(grid, np.array([0.0, 0.0, grid.z[len(grid.z) // 2]]), ratings, rng)
            if probe is None:
                continue
            radius = probe.diameter_mm / 2
            pleural = rng.random() < 0.3
            low, high = (0.55 * radius, 0.85 * radius) if pleural else (radius + 2, 60.0)
            near_end = min(0.8 * radius, SLICE_MM * grid.num_slices / 4)
            level = (grid.z <= grid.z[0] - near_end) & (grid.z >= grid.z[-1] + near_end)
            fits = (depth > low) & (depth < high) & level[:, None, None]
            spots = np.argwhere(fits)
            if not len(spots):
                continue
            gaps = [3.0] if nodules and rng.random() < 0.25 else [8.0]
            tries = grid.position(spots[rng.integers(0, len(spots), 40)])
            good = [
                p
                for p in tries
                if all(np.linalg.norm(p - n.center) > 1.25 * (radius + n.diameter_mm / 2) + gaps[0] for n in nodules)
            ]
            if not good:
                continue
            if gaps[0] < 5:
                good.sort(key=lambda p: float(np.linalg.norm(p - nodules[-1].center)))
            nodule = shape_nodule(grid, good[0], ratings, rng, probe.diameter_mm)
            if nodule is not None and nodule_mask(nodule, lung).sum() >= 4:
                nodules.append(nodule)
                break
    return nodules


def _small_spots(grid: Grid, lung: Array, nodules: list[Nodule], rng: np.random.Generator) -> list[tuple[Array, float]]:
    """Centres and radii of nodules under 3 mm, away from the larger ones."""
    spots = np.argwhere(lung < -6)
    if not len(spots):
        return []
    picks = grid.position(spots[rng.integers(0, len(spots), int(rng.integers(1, 4)))])
    return [
        (p, float(rng.uniform(1.0, 1.4)))
        for p in picks
        if all(np.linalg.norm(p - n.center) > n.diameter_mm + 4 for n in nodules)
    ]


def _read(
    grid: Grid, lung: Array, nodules: list[Nodule], dots: list[tuple[Array, float]], rng: np.random.Generator
) -> tuple[list[list[Reading]], list[list[tuple[int, int, int]]]]:
    """Let four readers mark the scan; at most one of them misses any one nodule of at least 3 mm."""
    readings: list[list[Reading]] = [[] for _ in range(NUM_READERS)]
    others: list[list[tuple[int, int, int]]] = [[] for _ in range(NUM_READERS)]
    for nodule in nodules:
        missing = int(rng.integers(NUM_READERS)) if rng.random() < 0.3 else -1
        for reader in range(NUM_READERS):
            reading = read_nodule(nodule, lung, grid, rng)
            if reader != missing and reading.contours:
                readings[reader].append(reading)

    def voxel(position: Array) -> tuple[int, int, int]:
        nearest = np.argmin(np.hypot(grid.x - position[0], grid.y - position[1]))
        row, col = np.unravel_index(nearest, grid.x.shape)
        return int(np.argmin(np.abs(grid.z - position[2]))), int(row), int(col)

    for center, _ in dots:
        k, row, col = voxel(center)
        for reader in range(NUM_READERS):
            if rng.random() < 0.6:
                readings[reader].append(Reading({}, {k: [(row, col)]}))
    inside = np.argwhere(lung < -3)
    for reader in range(NUM_READERS):
        for _ in range(int(rng.integers(0, 3)) if len(inside) else 0):
            k, row, col = inside[rng.integers(len(inside))]
            others[reader].append((int(k), int(row), int(col)))
        order = rng.permutation(len(readings[reader]))
        readings[reader] = [readings[reader][n] for n in order]
    return readings, others


def _scan(grid: Grid, hu: Array, rng: np.random.Generator) -> Array:
    """What the scanner makes of the densities: blur, correlated noise, circular field of view; int16 HU."""
    blur = rng.uniform(0.45, 0.65)
    out = gaussian_filter(hu, (0.0, blur, blur))
    out = gaussian_filter1d(out, 0.35, axis=0, mode="nearest")
    white = rng.standard_normal(grid.shape).astype(np.float32)
    noise = gaussian_filter(white, (0, 0.6, 0.6)) - 0.8 * gaussian_filter(white, (0, 1.8, 1.8))
    noise /= noise.std() + 1e-6
    dose = gaussian_filter(out[:: max(1, grid.num_slices // 6)].mean(0), 12 / grid.pixel_mm)
    level = rng.uniform(9, 17) * np.clip(0.75 + dose / 2500, 0.3, 1.0)
    out += noise * level
    axis = (np.arange(grid.matrix) - (grid.matrix - 1) / 2) * grid.pixel_mm
    outside = np.hypot(axis[:, None], axis[None]) > FIELD_OF_VIEW_MM / 2
    image = np.clip(np.rint(out), -1024, 3071).astype(np.int16)
    image[:, outside] = PADDING_HU
    return image


def write_phantom(
    out: str | os.PathLike[str],
    *,
    num_patients: int = 24,
    num_slices: int = 24,
    matrix: int = 256,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write synthetic thorax scans as `OUT/PHANTOM-0001/<study>/<series>/{1-001.dcm, ..., 001.xml}`.

    The folder appears complete or not at all. The files depend on the seed, not on the number of workers.

    Args:
        out: folder to make; it may exist if it is empty.
        num_patients: scans to write, 1 to 9999.
        num_slices: slices of 2.5 mm per scan, 4 to 80.
        matrix: rows and columns of a slice, 64 to 512, over a field of view of 330 mm.
        seed: a whole number from 0.
        num_workers: processes; None takes as many as pay off.
        progress: whether to show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: an argument out of range, a folder that is not empty, or a disk that cannot be written.
    """
    out = Path(out)
    check_limits(
        _LIMITS, num_workers=num_workers, num_patients=num_patients, num_slices=num_slices, matrix=matrix, seed=seed
    )
    if num_workers is None:
        num_workers = min(os.cpu_count() or 1, -(-num_patients // 4))  # a worker's start costs about two patients

    def jobs(work: Path) -> list[tuple[str, int, int, int, int]]:
        return [(str(work), seed, index, num_slices, matrix) for index in range(1, num_patients + 1)]

    return write_whole(
        out, _write_patient, jobs, num_workers=num_workers, total=num_patients, unit="patient", progress=progress
    )


def _write_patient(job: tuple[str, int, int, int, int]) -> int:
    """Compute and write one patient; how many that were."""
    root, seed, index, num_slices, matrix = job
    patient = phantom_patient(seed, index, num_slices=num_slices, matrix=matrix)
    name = f"PHANTOM-{index:04d}"
    folder = Path(root) / name / f"study-{index:04d}" / "series-0001"
    folder.mkdir(parents=True)
    key = (seed, index, num_slices, matrix)
    uids = write_series(folder, patient.image_hu, patient.z_mm, key, name, patient.contrast)
    xml = lidc_xml(patient.readings, patient.others, uids, patient.z_mm, key)
    (folder / f"{index:03d}.xml").write_text(xml, encoding="utf-8")
    return 1

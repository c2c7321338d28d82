# SPDX-License-Identifier: Apache-2.0
"""From the readers' outlines to nodules: masks, who drew the same nodule, consensus and ratings.

LIDC's conventions: the pixels of an outline are the outer border and do not belong to the nodule; an outline
with ``inclusion`` FALSE is a hole. Both are read the same way here: the region of an outline is what lies
strictly inside it. So a hole of one pixel, which the reading tool stores as that pixel's four neighbours,
removes one pixel. An outline one pixel wide encloses nothing and gives no pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from statistics import median_high

import numpy as np
from scipy.spatial import cKDTree
from skimage.draw import polygon

from monai_synth.data.lidc_xml import LidcReading, NoduleReading, Roi
from monai_synth.data.semantic import FEATURES, LABELS


@dataclass(frozen=True)
class BoxMask:
    """A boolean volume that is False outside a box.

    Attributes:
        start: (slice, row, column) of the box's first voxel.
        voxels: the box, shape (D, H, W).
    """

    start: tuple[int, int, int]
    voxels: np.ndarray

    @property
    def stop(self) -> tuple[int, int, int]:
        return tuple(a + n for a, n in zip(self.start, self.voxels.shape, strict=True))  # type: ignore[return-value]

    def on(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """The same mask on another box, cropped or padded with False."""
        out = np.zeros([b - a for a, b in zip(start, stop, strict=True)], bool)
        low = [max(a, b) for a, b in zip(start, self.start, strict=True)]
        high = [min(a, b) for a, b in zip(stop, self.stop, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            to = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start, strict=True))
            of = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, self.start, strict=True))
            out[to] = self.voxels[of]
        return out


@dataclass(frozen=True)
class Nodule:
    """A nodule of 3 mm or more as the readers who drew it agree on it.

    Attributes:
        mask: consensus.
        num_readers: readers who drew it.
        ratings: ``median_high`` of the valid ratings of each feature.
    """

    mask: BoxMask
    num_readers: int
    ratings: dict[str, int]

    @property
    def label(self) -> int:
        """Semantic label by malignancy: under 3, 3, over 3 (LSDM thesis, Fig 4.1)."""
        malignancy = self.ratings["malignancy"]
        if malignancy == 3:
            return LABELS["nodule_indeterminate"]
        return LABELS["nodule_benign" if malignancy < 3 else "nodule_malignant"]


def region(xy: Sequence[tuple[int, int]]) -> tuple[int, int, np.ndarray]:
    """Pixels strictly inside an outline.

    Args:
        xy: vertices as (column, row) in order, closed or not; consecutive ones need not be neighbours.

    Returns:
        First row, first column and boolean image (H, W) of the outline's bounding box.
    """
    points = np.asarray(xy, dtype=np.int64).reshape(-1, 2)
    col0, row0 = points.min(0)
    width, height = points.max(0) - (col0, row0) + 1
    inside = np.zeros((height, width), bool)
    cols, rows = points[:, 0] - col0, points[:, 1] - row0
    if len(points) > 2:
        inside[polygon(rows, cols, inside.shape)] = True
    for r0, c0, r1, c1 in zip(rows, cols, np.roll(rows, -1), np.roll(cols, -1), strict=True):
        steps = max(gcd(int(r1 - r0), int(c1 - c0)), 1)  # lattice points on the edge, its first vertex included
        k = np.arange(steps)
        inside[r0 + (r1 - r0) // steps * k, c0 + (c1 - c0) // steps * k] = False
    return int(row0), int(col0), inside


def rasterise(rois: Sequence[Roi], slice_of: Mapping[int, int], shape: tuple[int, int]) -> BoxMask | None:
    """Voxels of one reading: inside its outlines, without the insides of its holes.

    Args:
        rois: outlines.
        slice_of: slice index of each outline by its place in ``rois``; outlines without one are left out.
        shape: (rows, columns) of a slice; what is drawn beyond it is cut off.

    Returns:
        The mask, or None where no voxel is enclosed.
    """
    drawn = [(slice_of[i], roi.inclusion, *region(roi.xy)) for i, roi in enumerate(rois) if i in slice_of]
    included = [d for d in drawn if d[1] and d[4].any()]
    if not included:
        return None
    start = [min(d[i] for d in included) for i in (0, 2, 3)]
    stop = [
        max(d[0] for d in included) + 1,
        max(d[2] + d[4].shape[0] for d in included),
        max(d[3] + d[4].shape[1] for d in included),
    ]
    voxels = np.zeros([b - a for a, b in zip(start, stop, strict=True)], bool)
    for inclusion in (True, False):  # holes last, whatever their order in the file
        for z, is_in, row, col, inside in drawn:
            if is_in == inclusion:
                part = BoxMask((z, row, col), inside[None]).on(start, stop)
                voxels[part] = inclusion
    return _trimmed(BoxMask(tuple(start), voxels), shape)  # type: ignore[arg-type]


def _trimmed(mask: BoxMask, shape: tuple[int, int]) -> BoxMask | None:
    start = (mask.start[0], max(mask.start[1], 0), max(mask.start[2], 0))
    stop = (mask.stop[0], min(mask.stop[1], shape[0]), min(mask.stop[2], shape[1]))
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        return None
    voxels = mask.on(start, stop)
    if not voxels.any():
        return None
    where = np.nonzero(voxels)
    low, high = [int(w.min()) for w in where], [int(w.max()) + 1 for w in where]
    crop = voxels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return BoxMask(tuple(a + b for a, b in zip(start, low, strict=True)), crop)  # type: ignore[arg-type]


def overlap(a: BoxMask, b: BoxMask) -> float:
    """Share of the smaller mask that lies in the other one, in [0, 1]."""
    common = int((b.on(a.start, a.stop) & a.voxels).sum())
    return common / min(int(a.voxels.sum()), int(b.voxels.sum()))


def distance(a: BoxMask, b: BoxMask, spacing: Sequence[float]) -> float:
    """Smallest distance in mm between voxel centres of two masks; 0 where they share one."""
    gap = [max(y0 - x1 + 1, x0 - y1 + 1, 0) for x0, x1, y0, y1 in zip(a.start, a.stop, b.start, b.stop, strict=True)]
    lower_bound = float(np.hypot.reduce(np.multiply(gap, spacing)))
    if lower_bound > 3 * max(spacing):  # far apart: the boxes' distance decides just as well
        return lower_bound
    p = (np.argwhere(a.voxels) + a.start) * spacing
    q = (np.argwhere(b.voxels) + b.start) * spacing
    return float(cKDTree(p).query(q)[0].min())


def join_readings(
    masks: Sequence[BoxMask], readers: Sequence[int], spacing: Sequence[float], tolerance: float | None = None
) -> list[list[int]]:
    """Group readings that mean the same nodule; the files do not say which do.

    Pairs are joined from the most to the least alike (share of overlap, then distance), as long as they
    overlap or lie within ``tolerance``, and never so that one reader would have read a nodule twice. Only
    after that a reading left over joins the group in which at least half of it (or of the reading it meets)
    lies: that reader drew in pieces what others drew as one, and the pieces count as one drawing.

    Args:
        masks: one per reading.
        readers: who drew each.
        spacing: (slice, row, column) spacing in mm.
        tolerance: largest gap in mm between readings of one nodule; None takes the slice spacing.

    Returns:
        Groups of indices, each ascending, in order of their first index.
    """
    tolerance = spacing[0] if tolerance is None else tolerance
    pairs = []
    for i in range(len(masks)):
        for j in range(i + 1, len(masks)):
            far = distance(masks[i], masks[j], spacing)
            if far <= tolerance + 1e-6:
                pairs.append((-overlap(masks[i], masks[j]), far, i, j))
    pairs.sort()
    group = list(range(len(masks)))
    for _, _, i, j in pairs:
        a, b = group[i], group[j]
        who = [readers[k] for k in range(len(masks)) if group[k] in (a, b)]
        if a != b and len(who) == len(set(who)):
            group = [min(a, b) if g in (a, b) else g for g in group]
    for negative_share, _, i, j in pairs:
        a, b = group[i], group[j]
        alone = group.count(a) == 1 or group.count(b) == 1
        if a != b and alone and -negative_share >= 0.5 and readers[i] != readers[j]:
            group = [min(a, b) if g in (a, b) else g for g in group]
    return [[k for k in range(len(masks)) if group[k] == g] for g in sorted(set(group))]


def consensus_mask(masks: Sequence[BoxMask], readers: Sequence[int], consensus: float) -> BoxMask | None:
    """Voxels that at least the share ``consensus`` of the readers who drew the nodule include (Sec 4.1).

    Exactly that share is enough: drawn by two readers, a voxel of either one is kept at 0.5.
    """
    start = [min(m.start[i] for m in masks) for i in range(3)]
    stop = [max(m.stop[i] for m in masks) for i in range(3)]
    votes = np.zeros([b - a for a, b in zip(start, stop, strict=True)], np.int32)
    names = sorted(set(readers))
    for name in names:
        own = [m.on(start, stop) for m, r in zip(masks, readers, strict=True) if r == name]
        votes += np.logical_or.reduce(own)
    agreed = votes >= max(consensus * len(names) - 1e-9, 1)
    return _trimmed(BoxMask(tuple(start), agreed), (stop[1], stop[2]))  # type: ignore[arg-type]


@dataclass(frozen=True)
class JoinedNodules:
    """What the readers of one scan agree on, and what was counted or left out on the way."""

    nodules: tuple[Nodule, ...]
    num_small: int
    num_non_nodules: int
    num_unrated: int
    num_empty: int
    num_outside: int


def join_nodules(
    reading: LidcReading,
    slices: Mapping[str, int],
    positions: Sequence[float],
    shape: tuple[int, int],
    spacing: Sequence[float],
    *,
    consensus: float = 0.5,
) -> JoinedNodules:
    """Join the readings of one scan into nodules.

    Args:
        reading: annotation file of the scan.
        slices: slice index by SOPInstanceUID.
        positions: z of every slice in mm, used for outlines whose UID is not known.
        shape: (rows, columns).
        spacing: (slice, row, column) spacing in mm.
        consensus: share of the readers who drew a nodule that has to include a voxel.

    Returns:
        Nodules in order of (first slice, row, column), and counts: marks under 3 mm and marks for non-nodules
        (each per reader), nodules whose features no reader rated validly, outlines that enclose nothing and
        outlines in slices that are not there.
    """
    found: list[tuple[NoduleReading, BoxMask, int]] = []
    small = empty = outside = 0
    for reader, session in enumerate(reading.sessions):
        for nodule in session.nodules:
            if nodule.is_small:
                small += 1
                continue
            slice_of = _slices_of(nodule.rois, slices, positions, spacing[0])
            outside += len(nodule.rois) - len(slice_of)
            mask = rasterise(nodule.rois, slice_of, shape)
            if mask is None:
                empty += bool(slice_of)
                continue
            found.append((nodule, mask, reader))
    nodules, unrated = [], 0
    masks, readers = [f[1] for f in found], [f[2] for f in found]
    for group in join_readings(masks, readers, spacing):
        mask = consensus_mask([masks[i] for i in group], [readers[i] for i in group], consensus)
        ratings = _median_ratings([found[i] for i in group])
        if mask is None:
            empty += 1
        elif len(ratings) < len(FEATURES):
            unrated += 1
        else:
            nodules.append(Nodule(mask, len({readers[i] for i in group}), ratings))
    nodules.sort(key=lambda n: (n.mask.start, n.mask.stop))
    num_non = sum(len(s.non_nodules) for s in reading.sessions)
    return JoinedNodules(tuple(nodules), small, num_non, unrated, empty, outside)


def _slices_of(
    rois: Sequence[Roi], slices: Mapping[str, int], positions: Sequence[float], thickness: float
) -> dict[int, int]:
    found = {}
    for i, roi in enumerate(rois):
        if roi.sop_uid in slices:
            found[i] = slices[roi.sop_uid]
        elif not roi.sop_uid:
            gaps = np.abs(np.asarray(positions) - roi.z)
            nearest = int(gaps.argmin())
            if gaps[nearest] < thickness / 2:
                found[i] = nearest
    return found


def _median_ratings(found: Sequence[tuple[NoduleReading, BoxMask, int]]) -> dict[str, int]:
    """``median_high`` per feature over readers; of a reader's pieces the largest one's ratings count."""
    largest: dict[int, NoduleReading] = {}
    for nodule, _, reader in sorted(found, key=lambda f: int(f[1].voxels.sum())):
        largest[reader] = nodule
    ratings = {}
    for feature in FEATURES:
        values = [n.ratings[feature] for n in largest.values() if feature in n.ratings]
        if values:
            ratings[feature] = int(median_high(values))
    return ratings


def slice_areas(nodules: Sequence[Nodule], num_slices: int) -> np.ndarray:
    """Pixels of each nodule's consensus in each slice, shape (num_nodules, num_slices)."""
    areas = np.zeros((len(nodules), num_slices), np.int64)
    for i, nodule in enumerate(nodules):
        areas[i, nodule.mask.start[0] : nodule.mask.stop[0]] = nodule.mask.voxels.sum((1, 2))
    return areas


def nodules_on_slice(
    nodules: Sequence[Nodule], z: int, shape: tuple[int, int], min_area: int
) -> tuple[np.ndarray, list[dict[str, object]]]:
    """Label image and table of the nodules of one slice.

    A nodule with fewer than ``min_area`` pixels there is neither drawn nor listed, so that map and table
    agree. Where two nodules meet, the one that more readers drew keeps the pixel.

    Args:
        nodules: nodules of the scan; ``nodule_id`` is the place in it, from 1.
        z: slice index.
        shape: (rows, columns).
        min_area: pixels.

    Returns:
        uint8 image with 0 or the nodule's semantic label (5, 6, 7), and one row per nodule: id, centre and
        bounding box (half-open) in pixels, area, readers, label, binary malignancy (over 2) and all nine
        ratings.
    """
    owner = np.zeros(shape, np.int32)
    for i in sorted(range(len(nodules)), key=lambda i: (nodules[i].num_readers, -i)):
        mask = nodules[i].mask
        if mask.start[0] <= z < mask.stop[0]:
            image = mask.voxels[z - mask.start[0]]
            if image.sum() >= min_area:
                rows, cols = np.nonzero(image)
                owner[rows + mask.start[1], cols + mask.start[2]] = i + 1
    label, table = np.zeros(shape, np.uint8), []
    for i, nodule in enumerate(nodules):
        rows, cols = np.nonzero(owner == i + 1) if (owner == i + 1).any() else ((), ())
        if len(rows) >= max(min_area, 1):
            label[rows, cols] = nodule.label
            row = {
                "nodule_id": i + 1,
                "center": [round(float(rows.mean()), 2), round(float(cols.mean()), 2)],
                "bbox": [int(rows.min()), int(cols.min()), int(rows.max()) + 1, int(cols.max()) + 1],
                "area": len(rows),
                "num_readers": nodule.num_readers,
                "label": nodule.label,
                "malignant": int(nodule.ratings["malignancy"] > 2),
            }
            table.append(row | nodule.ratings)
    return label, table

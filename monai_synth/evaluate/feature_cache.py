# SPDX-License-Identifier: Apache-2.0
"""Features on disk, found again by the content of an image, the size it was brought to, and the extractor.

One file for an extractor holds a hash of each image beside its vector, so that a longer list, another order or other
names compute only what is new. Features can tell whether an image was in a set: a cache is as private as the images.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from monai_synth.atomic import write_bytes
from monai_synth.evaluate.features import Extractor


class FeatureCache:
    """Features of one extractor.

    Args:
        folder: where the file is; created if missing.
        extractor: whose features these are.
    """

    def __init__(self, folder: str | Path, extractor: Extractor) -> None:
        self.extractor = extractor
        self.path = Path(folder) / f"{extractor.key}-{extractor.fingerprint[:16]}.npz"
        self._rows: dict[bytes, np.ndarray] = {}
        self._load()

    def _load(self) -> None:
        try:
            with np.load(self.path) as content:
                hashes, features = content["hashes"], content["features"]
        except Exception:  # missing, or truncated by a full disk: what is lost is computed again
            return
        if features.ndim == 2 and features.shape == (len(hashes), self.extractor.num_features):
            self._rows = {row.tobytes(): feature for row, feature in zip(hashes, features, strict=True)}

    def __len__(self) -> int:
        return len(self._rows)

    def features(
        self,
        images: Sequence[Callable[[], np.ndarray]],
        *,
        batch_size: int = 64,
        progress: Callable[[int], object] | None = None,
    ) -> np.ndarray:
        """Features of images, from the cache where it has them; what is new is written to it.

        Args:
            images: functions that read one image each, uint8 (C, H, W); so no more than a batch is in memory.
            batch_size: images at once.
            progress: called with the number of images that were just done.

        Returns:
            float32 (N, D) in the order of the images.
        """
        keys: list[bytes] = []
        new = 0
        for start in range(0, len(images), batch_size):
            batch = [read() for read in images[start : start + batch_size]]
            batch_keys = [content_hash(image) for image in batch]
            missing = {key: image for key, image in zip(batch_keys, batch, strict=True) if key not in self._rows}
            if missing:
                computed = self.extractor(np.stack(list(missing.values())))
                self._rows.update(zip(missing, computed, strict=True))
                new += len(missing)
            keys += batch_keys
            if progress is not None:
                progress(len(batch))
        if new:
            self._write()
        return np.stack([self._rows[key] for key in keys])

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        hashes = np.stack([np.frombuffer(key, np.uint8) for key in self._rows])
        buffer = io.BytesIO()
        np.savez(buffer, hashes=hashes, features=np.stack(list(self._rows.values())))
        write_bytes(self.path, buffer.getvalue())


def content_hash(image: np.ndarray) -> bytes:
    """32 bytes that name an image's pixels and shape."""
    return hashlib.sha256(str(image.shape).encode() + np.ascontiguousarray(image).tobytes()).digest()

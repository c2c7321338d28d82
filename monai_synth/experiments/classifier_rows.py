# SPDX-License-Identifier: Apache-2.0
"""The rows of the classifier experiment as data: what each trains on, from what it starts, what it is compared with.

Rows 1 to 18 are those of the text's Table 2. The text does not say from which synthetic classifier a row starts: here
rows with geometric augmentation start from the one with it (18), the others from the one without (17).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from monai_synth.errors import UserError

# mode -> what is trained on
MODES = {
    "synthetic": "synthetic images only",
    "real": "real images",
    "pretrain": "synthetic images, then real ones",
    "mix": "real and synthetic images together",
    "oversample": "real images, the rarer classes filled up with synthetic ones",
    "long": "real images, for as many steps as synthetic only",
    "control": "real images for as many steps as synthetic only, then again as the others",
}
_TEXT_FRACTIONS = {100: 0, 10: 8}


@dataclass(frozen=True)
class Row:
    """One classifier per seed.

    Attributes:
        mode: of ``MODES``.
        fraction: percent of the real training images; 0 for synthetic only.
        geo: geometric augmentation.
        weighted: cross-entropy weighted by inverse class proportions.
        ratio: mix only: synthetic images in percent of the real ones.
    """

    mode: str
    fraction: int
    geo: bool
    weighted: bool = False
    ratio: int | None = None

    @property
    def number(self) -> int | None:
        """Its number in Table 2."""
        if self.mode == "synthetic":
            return 17 + self.geo
        if self.mode in ("real", "pretrain") and self.fraction in _TEXT_FRACTIONS:
            return 1 + _TEXT_FRACTIONS[self.fraction] + 4 * self.geo + 2 * (self.mode == "pretrain") + self.weighted
        return None

    @property
    def name(self) -> str:
        """Its number in Table 2, or a name such as ``mix50-real10-geo``."""
        if self.number is not None:
            return str(self.number)
        ratio = "" if self.ratio is None else str(self.ratio)
        first = "" if self.mode == "real" else f"{self.mode}{ratio}-"
        return f"{first}real{self.fraction}" + "-geo" * self.geo + "-weighted" * self.weighted

    @property
    def text(self) -> str:
        """What it trains on."""
        ratio = "" if self.ratio is None else f" ({self.ratio} %)"
        return MODES[self.mode] + ratio

    @property
    def start(self) -> Row | None:
        """The row whose classifier it starts from; None: from the initial weights."""
        if self.mode == "pretrain":
            return Row("synthetic", 0, self.geo)
        if self.mode == "control":
            return Row("long", self.fraction, self.geo)
        return None

    @property
    def twins(self) -> dict[str, Row]:
        """Rows that differ from it in one thing, by what that is."""
        found = {}
        if self.mode not in ("real", "synthetic"):
            found["no synthetic images" if self.mode not in ("long", "control") else "fewer steps"] = Row(
                "real", self.fraction, self.geo, self.weighted
            )
        if self.mode == "pretrain" and not self.weighted:
            found["as many steps on real images"] = Row("control", self.fraction, self.geo)
        if self.geo:
            found["no geo aug"] = Row(self.mode, self.fraction, False, self.weighted, self.ratio)
        if self.weighted:
            found["no weights"] = Row(self.mode, self.fraction, self.geo, False, self.ratio)
        if self.fraction and self != Row("real", self.fraction, False):
            found["plain"] = Row("real", self.fraction, False)
        return found


def all_rows(
    fractions: Sequence[int], *, mix: Sequence[int] = (), oversample: bool = False, control: bool = False
) -> list[Row]:
    """All rows in the order of Table 2, further ones after those of their fraction.

    Args:
        fractions: percents of the real training images.
        mix: further rows with so many synthetic images in percent of the real ones.
        oversample: further rows whose rarer classes are filled up.
        control: further rows with as many steps on real images as pretraining takes.
    """
    rows = []
    for fraction in fractions:
        for geo in (False, True):
            rows += [Row(mode, fraction, geo, weighted) for mode in ("real", "pretrain") for weighted in (False, True)]
        for geo in (False, True):
            rows += [Row("mix", fraction, geo, ratio=ratio) for ratio in mix]
            rows += [Row("oversample", fraction, geo)] * oversample
            rows += [Row("long", fraction, geo), Row("control", fraction, geo)] * control
    return [*rows, Row("synthetic", 0, False), Row("synthetic", 0, True)]


def chosen_rows(rows: Sequence[Row], names: Iterable[str] | None) -> list[Row]:
    """The rows of these names with those that they start from, in the order of ``rows``.

    Args:
        rows: all there are.
        names: numbers of Table 2 or names. Default: all.

    Raises:
        UserError: there is no such row.
    """
    if names is None:
        return list(rows)
    by_name = {row.name: row for row in rows}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        msg = (
            f"there is no row {', '.join(unknown)}; with these --fractions, --mix, --oversample and --control there "
            f"are {', '.join(by_name)}"
        )
        raise UserError(msg)
    wanted = {by_name[name] for name in names}
    if not wanted:
        raise UserError("no row is chosen; give one or more after --rows, or leave it out for all")
    wanted |= {row.start for row in wanted if row.start is not None}
    return [row for row in rows if row in wanted]

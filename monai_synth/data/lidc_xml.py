# SPDX-License-Identifier: Apache-2.0
"""LIDC annotation files (XML) as plain frozen records.

Two kinds of file are published under one name: ``LidcReadMessage`` reads a CT series, ``IdriReadMessage`` a
chest radiograph. Only the first holds contours in CT slices; of the second nothing but the kind is read.

What the published files are like, and what is decided here:

* A nodule of 3 mm or more has contours and nine ratings. A smaller one has a single ROI with a single point
  and no ratings; some files write an empty ``characteristics`` element for it, one writes nine zeros. So the
  number of points decides, not the presence of ratings.
* Ratings outside their scale (0, or an internal structure of 5) are slips of the reading tool and read as
  absent; the other readers' ratings of that nodule still count.
* A nodule has several ROIs in one slice where it is drawn in pieces or has a hole (``inclusion`` is FALSE).
* Contours are not always closed and their points not always neighbours; they are read as they stand, in
  order, without a repeated last point.
* Reader names are removed from public files, so readings are told apart by the order of the sessions.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_synth.data.semantic import FEATURES
from monai_synth.errors import UserError

RATING_MAX = {name: 5 for name in FEATURES} | {"internal_structure": 4, "calcification": 6}
_XML_NAMES = {name: re.sub(r"_(\w)", lambda m: m.group(1).upper(), name) for name in FEATURES}
_KINDS = {"LidcReadMessage": "ct", "IdriReadMessage": "xray"}
_FORBIDDEN = re.compile(rb"<!\s*(DOCTYPE|ENTITY)", re.IGNORECASE)


@dataclass(frozen=True)
class Roi:
    """One drawn outline in one slice.

    Attributes:
        z: slice position in mm as the reading tool wrote it.
        sop_uid: SOPInstanceUID of the slice; empty where the file has none.
        inclusion: False for a hole.
        xy: outline in order, pixels as (column, row) counted from 0, without the closing repetition.
    """

    z: float
    sop_uid: str
    inclusion: bool
    xy: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class NoduleReading:
    """What one reader said about one nodule.

    Attributes:
        nodule_id: the reader's own name for it; readers do not share names.
        rois: outlines, or the single point of a small nodule.
        ratings: valid ratings by feature name (:data:`monai_synth.data.semantic.FEATURES`).
    """

    nodule_id: str
    rois: tuple[Roi, ...]
    ratings: dict[str, int] = field(hash=False)

    @property
    def is_small(self) -> bool:
        """Whether it is a mark for a nodule under 3 mm: points only, no outline."""
        return all(len(roi.xy) == 1 for roi in self.rois)


@dataclass(frozen=True)
class NonNodule:
    """A mark for a finding of 3 mm or more that is no nodule."""

    z: float
    sop_uid: str
    xy: tuple[int, int]


@dataclass(frozen=True)
class ReadingSession:
    """All marks of one reader."""

    nodules: tuple[NoduleReading, ...]
    non_nodules: tuple[NonNodule, ...]


@dataclass(frozen=True)
class LidcReading:
    """One annotation file.

    Attributes:
        kind: ``ct``, ``xray`` or ``other`` (well-formed XML that is no LIDC annotation).
        series_uid: SeriesInstanceUID that was read; empty unless ``ct``.
        sessions: one per reader; empty unless ``ct``.
    """

    kind: str
    series_uid: str
    sessions: tuple[ReadingSession, ...]


def read_lidc_xml(path: str | Path) -> LidcReading:
    """Read one annotation file.

    Raises:
        UserError: see :func:`parse_lidc_xml`; also a file that cannot be opened.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); mend its permissions or leave it out") from error
    return parse_lidc_xml(content, str(path))


def parse_lidc_xml(content: bytes, name: str = "<memory>") -> LidcReading:
    """Parse the bytes of one annotation file, whatever its XML namespace.

    Args:
        content: the file.
        name: what to call it in messages.

    Raises:
        UserError: malformed XML, a document type or entity declaration, a CT reading without
            SeriesInstanceUid, or an outline without position or with coordinates that are no whole numbers.
    """
    # Other encodings than UTF-8 could hide a declaration from the search below, so they are turned into it
    # first.
    content = _as_utf8(content, name)
    if _FORBIDDEN.search(content):
        msg = (
            f"{name}: has a DOCTYPE or ENTITY declaration; LIDC annotation files have none. It is refused "
            "because entities can read other files; delete it or take the published file again"
        )
        raise UserError(msg)
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        msg = f"{name}: is no well-formed XML ({error}); take the file from its publisher again or leave it out"
        raise UserError(msg) from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    kind = _KINDS.get(root.tag, "other")
    if kind != "ct":
        return LidcReading(kind, "", ())
    series_uid = _text(root, "ResponseHeader/SeriesInstanceUid")
    if not series_uid:
        msg = f"{name}: has no ResponseHeader/SeriesInstanceUid, so its series is unknown; add it"
        raise UserError(msg)
    sessions = tuple(
        ReadingSession(
            tuple(_nodule(e, name) for e in session.iterfind("unblindedReadNodule")),
            tuple(_non_nodule(e, name) for e in session.iterfind("nonNodule")),
        )
        for session in root.iterfind("readingSession")
    )
    return LidcReading(kind, series_uid, sessions)


def _as_utf8(content: bytes, name: str) -> bytes:
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    else:
        head = re.match(rb"(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)[\"']", content)
        encoding = head.group(1).decode("ascii") if head else "utf-8-sig"
        encoding = "utf-8-sig" if encoding.lower().replace("-", "") == "utf8" else encoding
    try:
        text = content.decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise UserError(f"{name}: is no text in its own encoding {encoding!r} ({error}); leave it out") from error
    return re.sub(r"^\s*<\?xml[^>]*\?>", "", text, count=1).lstrip().encode("utf-8")


def _text(element: ElementTree.Element, tag: str) -> str:
    return (element.findtext(tag) or "").strip()


def _number(element: ElementTree.Element, tag: str, kind: type, name: str) -> Any:
    text = _text(element, tag)
    try:
        value = kind(text)
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        msg = f"{name}: {element.tag} has {tag} {text!r}; {wanted} is needed. Mend the file or leave it out"
        raise UserError(msg) from None
    return value


def _points(element: ElementTree.Element, tag: str, name: str) -> tuple[tuple[int, int], ...]:
    try:  # the common case, without a message to prepare: 350 000 points in 300 files
        points = [(int(p.findtext("xCoord")), int(p.findtext("yCoord"))) for p in element.iterfind(tag)]
    except (TypeError, ValueError):
        points = [(_number(p, "xCoord", int, name), _number(p, "yCoord", int, name)) for p in element.iterfind(tag)]
    if len(points) > 1 and points[0] == points[-1]:
        points.pop()
    return tuple(points)


def _nodule(element: ElementTree.Element, name: str) -> NoduleReading:
    rois = []
    for roi in element.iterfind("roi"):
        xy = _points(roi, "edgeMap", name)
        if xy:
            inclusion = _text(roi, "inclusion").upper() != "FALSE"
            z = _number(roi, "imageZposition", float, name)
            rois.append(Roi(z, _text(roi, "imageSOP_UID"), inclusion, xy))
    ratings = {}
    for feature, tag in _XML_NAMES.items():
        text = _text(element, f"characteristics/{tag}")
        if text.isdecimal() and 1 <= int(text) <= RATING_MAX[feature]:
            ratings[feature] = int(text)
    return NoduleReading(_text(element, "noduleID"), tuple(rois), ratings)


def _non_nodule(element: ElementTree.Element, name: str) -> NonNodule:
    points = _points(element, "locus", name)
    z = _number(element, "imageZposition", float, name)
    return NonNodule(z, _text(element, "imageSOP_UID"), points[0] if points else (-1, -1))

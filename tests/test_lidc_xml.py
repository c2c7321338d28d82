# SPDX-License-Identifier: Apache-2.0
"""The annotation parser on all published files at hand, and on what it must refuse."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from lidc_files import RATINGS, message_xml, nodule_xml, reading_xml, roi_xml, series_uid, square

from monai_synth.data.lidc_xml import parse_lidc_xml, read_lidc_xml
from monai_synth.errors import UserError


def parse(text: str, name: str = "a.xml"):
    return parse_lidc_xml(text.encode(), name)


def test_all_published_files_parse_and_no_mark_is_lost(test_data: Path) -> None:
    kinds, marks = Counter(), Counter()
    with zipfile.ZipFile(test_data / "lidc_xml" / "lidc_xml_300.zip") as archive:
        for name in archive.namelist():
            content = archive.read(name)
            reading = parse_lidc_xml(content, name)
            kinds[reading.kind] += 1
            if reading.kind != "ct":
                continue
            nodules = [n for s in reading.sessions for n in s.nodules]
            # Counted independently, by the text of the file.
            assert len(nodules) == content.count(b"<unblindedReadNodule>")
            assert sum(len(n.rois) for n in nodules) == content.count(b"<roi>")
            assert sum(len(s.non_nodules) for s in reading.sessions) == content.count(b"<nonNodule>")
            marks["small"] += sum(n.is_small for n in nodules)
            marks["drawn"] += sum(not n.is_small for n in nodules)
            marks["fully rated"] += sum(len(n.ratings) == 9 for n in nodules)
            assert all(n.is_small or n.ratings for n in nodules)
    assert kinds == {"ct": 240, "xray": 60}
    assert marks == {
        "small": 2951,
        "drawn": 1544,
        "fully rated": 1543,
    }  # one internal structure of 5 is no rating


def test_the_namespace_does_not_matter() -> None:
    with_namespace = reading_xml(1)
    without = with_namespace.replace(' xmlns="http://www.nih.gov"', "")
    prefixed = re.sub(r"<(/?)(\w)", r"<\1n:\2", without).replace(
        "<n:LidcReadMessage", '<n:LidcReadMessage xmlns:n="x"', 1
    )
    prefixed = prefixed.replace("<?n:xml", "<?xml")
    assert parse(with_namespace) == parse(without) == parse(prefixed)
    assert parse(without).series_uid == series_uid(1)


def test_the_repeated_last_point_of_a_closed_outline_is_dropped_and_the_order_kept() -> None:
    xy = square(3, 5, 2)
    reading = parse(message_xml(1, [nodule_xml(roi_xml(1, 0, xy))]))
    roi = reading.sessions[0].nodules[0].rois[0]
    assert roi.xy == tuple(xy[:-1])
    assert (roi.z, roi.inclusion) == (-100.0, True)


def test_zeros_and_ratings_beyond_their_scale_are_absent() -> None:
    ratings = RATINGS | {"malignancy": 0, "internal_structure": 5, "calcification": 6}
    nodule = parse(message_xml(1, [nodule_xml(roi_xml(1, 0, square(3, 5, 2)), ratings)])).sessions[0].nodules[0]
    assert set(RATINGS) - set(nodule.ratings) == {"malignancy", "internal_structure"}
    assert nodule.ratings["calcification"] == 6


def test_a_single_point_is_a_small_nodule_with_or_without_ratings() -> None:
    point = roi_xml(1, 0, [(3, 4)])
    for ratings in (None, {}, dict.fromkeys(RATINGS, 0), RATINGS):
        assert parse(message_xml(1, [nodule_xml(point, ratings)])).sessions[0].nodules[0].is_small


def test_the_chest_radiograph_kind_and_foreign_xml_are_recognised() -> None:
    assert parse(message_xml(1, [], root="IdriReadMessage")).kind == "xray"
    assert parse("<html><body/></html>").kind == "other"


@pytest.mark.parametrize(
    "declaration",
    [
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a SYSTEM "http://example.org/a.dtd">',
        '<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]>',
        "<!doctype a>",
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_declarations_that_could_pull_in_other_files_are_refused(declaration: str, encoding: str) -> None:
    text = reading_xml(1).replace('<?xml version="1.0" encoding="UTF-8"?>', declaration)
    with pytest.raises(UserError, match=r"a\.xml: has a DOCTYPE or ENTITY declaration"):
        parse_lidc_xml(text.encode(encoding), "a.xml")


def test_utf16_and_latin1_files_are_read_like_utf8() -> None:
    text = reading_xml(1)
    assert parse_lidc_xml(text.replace("UTF-8", "UTF-16").encode("utf-16")) == parse(text)
    assert parse_lidc_xml(text.replace("UTF-8", "ISO-8859-1").encode("latin-1")) == parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-20], "no well-formed XML"),
        (lambda t: "", "no well-formed XML"),
        (lambda t: t.replace("SeriesInstanceUid", "Other"), "no ResponseHeader/SeriesInstanceUid"),
        (lambda t: t.replace("<xCoord>25<", "<xCoord>25.5<"), "has xCoord '25.5'; a whole number is needed"),
        (lambda t: t.replace("<xCoord>25</xCoord>", ""), "has xCoord ''"),
        (lambda t: t.replace("-92.0 ", "north"), "has imageZposition 'north'; a number is needed"),
        (lambda t: t.replace("-92.0 ", "nan"), "has imageZposition 'nan'"),
        (lambda t: t.replace("UTF-8", "UTF-99"), "no text in its own encoding 'UTF-99'"),
    ],
)
def test_each_fault_of_a_file_is_one_message_that_names_it(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "bad.xml"
    path.write_text(change(reading_xml(1)), encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_lidc_xml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_a_message_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.xml: cannot be read"):
        read_lidc_xml(tmp_path / "gone.xml")

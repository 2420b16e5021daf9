"""How results are written: numbers in full for programs, columns and dates for people."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.gallery.search_results import FoundCrop, QueryResult, SearchResults

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def results(*found, threshold=None, queries=1):
    each = tuple(QueryResult(query=f"q{number}.jpg", found=found) for number in range(queries))
    return SearchResults(gallery="g", metric="euclidean", results=each, threshold=threshold)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (1_000_451.0, "1000451"),
        (0.5, "0.5"),
        (1777629652.8, "2026-05-01T10:00:52.800Z"),
        (1777629652.0, "2026-05-01T10:00:52Z"),
        (1777629652.9999, "2026-05-01T10:00:53Z"),
        (None, ""),
    ],
)
def test_times_since_1970_are_dates_and_others_numbers(seconds, shown):
    crop = FoundCrop(id="a", distance=1.0, columns={"time": seconds, "camera": "7"})
    line = results(crop).as_table().splitlines()[1]
    assert line.split() == [each for each in ("1", "1.0000", "7", shown, "a") if each]


def test_a_gallery_without_cameras_has_no_such_columns():
    assert results(FoundCrop(id=7, distance=0.25)).as_table() == "rank  distance  id\n   1    0.2500  7"


@given(ids=st.lists(st.one_of(texts, st.integers()), min_size=1, max_size=4),
       distance=st.floats(0, 1e9), note=texts, threshold=st.one_of(st.none(), st.floats(0, 1e9)))  # fmt: skip
def test_programs_read_what_was_found(ids, distance, note, threshold):
    found = [FoundCrop(id=each, distance=distance, columns={"note": note, "time": None}) for each in ids]
    both = results(*found, threshold=threshold, queries=2)
    match = None if threshold is None else distance <= threshold
    for query in json.loads(both.as_json())["queries"]:
        assert [crop["id"] for crop in query["found"]] == ids
        for crop in query["found"]:
            assert (crop["distance"], crop["note"], crop["time"]) == (distance, note, None)
            assert crop.get("match") == match
    lines = list(csv.DictReader(io.StringIO(both.as_csv(), newline="")))
    assert [line["id"] for line in lines] == [str(each) for each in ids] * 2
    assert all(float(line["distance"]) == distance and line["time"] == "" for line in lines)
    assert {line["match"] for line in lines} == {"" if match is None else str(int(match))}
    assert both.as_table().count("\n") == 2 * (len(ids) + 1) + 2
    assert not any(math.isnan(crop.distance) for crop in found)

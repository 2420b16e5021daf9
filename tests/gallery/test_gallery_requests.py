"""What callers ask of a gallery: values of any kind and shape find what they say, or are refused in one line."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidInput, InvalidValue
from tests.gallery.old_index import source
from tests.refusals import refuses

EMBEDDINGS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
PIDS = [1, 1, 2, 2, 2**53 + 1, -3]
COLUMNS = {"camera": [1, 2, 1, 2, 3, 3], "pid": PIDS, "name": list("aabbcc"), "score": [0.5, 1, 2, 3, 2.0**53, 5]}


@pytest.fixture
def gallery(tmp_path, no_fsync) -> Gallery:
    return Gallery.create(tmp_path / "people", EMBEDDINGS, list("abcdef"), columns=COLUMNS)


def found(gallery: Gallery, **parts) -> list[int]:
    try:
        return gallery.rows_where(RowFilter(**parts)).tolist()
    except InvalidInput:
        return []


def test_numbers_are_those_that_a_column_holds_and_none_that_is_like_one(gallery):
    for values, rows in (
        ([1.5], []), ([1.0], [0, 1]), ([2**70, -3], [5]), ([float("nan"), 2], [2, 3]), ([np.inf], []),
        ([2.0**53], []), ([2**53 + 1], [4]), (np.array([2, 7], np.uint8), [2, 3]), ({1, -3}, [0, 1, 5]),
    ):  # fmt: skip
        assert found(gallery, columns={"pid": values}) == rows
    assert found(gallery, columns={"score": [2**53 + 1, 1]}) == [1]
    assert found(gallery, columns={"score": [2**53, np.float32(0.5), 10**400]}) == [0, 4]


def test_filters_of_arrays_are_filters_of_lists(gallery):
    arrays = {"cameras": np.array([1, 3]), "ids": np.array(["a", "c", "f"]), "columns": {"name": np.array(["a", "b"])}}
    for _ in range(2):  # the second is compared with the first
        assert sorted(gallery.search(EMBEDDINGS[0], where=RowFilter(**arrays)).ids) == ["a", "c"]
    with refuses(InvalidInput, "none of the 6 rows", "camera 1 or 3"):
        gallery.rows_where(RowFilter(**{**arrays, "ids": np.array(["b"])}))


def test_a_filter_is_what_it_was_when_it_was_made(gallery):
    cameras, names = [1], ["a"]
    where = RowFilter(cameras=cameras, columns={"name": names})
    assert gallery.search(EMBEDDINGS[0], where=where).ids.tolist() == ["a"]
    cameras[0], names[0] = 2, "b"
    assert gallery.search(EMBEDDINGS[0], where=where).ids.tolist() == ["a"]
    where.columns["name"] = ("b",)  # and what is remembered of it is not used for another one
    assert gallery.search(EMBEDDINGS[0], where=where).ids.tolist() == ["c"]


BAD_FILTERS = [
    ("cameras", "abz"), ("cameras", 3), ("cameras", [1.0]), ("cameras", [["a"]]), ("cameras", [True]), ("ids", b"ab"),
    ("columns", {"pid": 5}), ("columns", {3: [1]}), ("columns", ["pid"]), ("columns", {"name": "a"}), ("since", "3"),
    ("since", float("nan")), ("until", [1]), ("until", 10**400),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_FILTERS)
def test_filters_that_are_none_are_one_line(name, value):
    with refuses(InvalidValue, name=next(iter(value)) if value in ({"pid": 5}, {"name": "a"}) else name):
        RowFilter(**{name: value})


@pytest.mark.parametrize(
    ("parts", "expected"),
    [({"cameras": ["1"]}, "whole numbers"), ({"columns": {"name": [1]}}, "texts"), ({"ids": [1]}, "texts")],
)
def test_values_of_another_kind_than_the_column_are_told(gallery, parts, expected):
    with refuses(InvalidValue, expected=expected):
        gallery.search(EMBEDDINGS[0], where=RowFilter(**parts))


def test_a_camera_is_left_out_however_it_is_given(gallery):
    camera = gallery.column("camera")[0]
    expected = gallery.search(EMBEDDINGS[0], not_camera=1).ids.tolist()
    assert len(expected) == 4
    for one in (camera, np.array(1), [1], np.array([1], np.uint8), (camera,)):
        assert gallery.search(EMBEDDINGS[0], not_camera=one).ids.tolist() == expected
    for wrong in ("1", 1.0, [["a"]], True, ["1"], {"a": 1}, [None]):
        with refuses(InvalidValue, name="not_camera"):
            gallery.search(EMBEDDINGS[0], not_camera=wrong)


def test_requests_that_are_none_are_one_line(gallery):
    for k in (2.5, "3", None, True, 0, [1]):
        with refuses(InvalidValue, name="k", value=k, expected="whole number"):
            gallery.search(EMBEDDINGS[0], k)
    assert gallery.search(EMBEDDINGS[0], np.int8(2)).ids.shape == (2,)
    for distance in ("3", None, True, -1.0, float("nan")):
        with refuses(InvalidValue, name="distance", expected="0 or more"):
            gallery.within(EMBEDDINGS[0], distance)
    for far in (1e200, np.inf, 10**300):
        assert len(gallery.within(EMBEDDINGS[0], far)[0].ids) == 6
    with refuses(InvalidInput, "one length"):
        gallery.search([[1.0, 2, 3, 4], [1.0]])
    for where in (["a"], "a", {"cameras": [1]}):
        with refuses(InvalidValue, name="where", expected="RowFilter"):
            gallery.search(EMBEDDINGS[0], where=where)
    for change in (
        lambda: gallery.add([[1.0], [1, 2]], ["x", "y"]),
        lambda: gallery.add(EMBEDDINGS[:1], ["x"], {3: [1]}),
    ):
        with refuses(InvalidInput):
            change()


def test_what_a_new_gallery_cannot_hold_is_one_line(tmp_path, no_fsync):
    with refuses(InvalidValue, name="columns", value=3):
        Gallery.create(tmp_path / "g", EMBEDDINGS, np.arange(6), columns={3: [0] * 6})
    with refuses(InvalidInput, "too large"):
        Gallery.create(tmp_path / "g", EMBEDDINGS[:2], ["a", "b"], columns={"pid": [2**63 + 1, -1]})
    with refuses(InvalidValue, name="dim", value=70_000):
        Gallery.create(tmp_path / "g", np.ones((1, 70_000), np.float16), ["a"])
    for name in ("n" * 300, "a\0b"):
        with refuses(CannotWrite, path=tmp_path / name):
            Gallery.create(tmp_path / name, EMBEDDINGS, np.arange(6))
        with refuses(InvalidFile, "cannot be read", path=tmp_path / name):
            Gallery.open(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_no_rows_are_rows(gallery):
    assert gallery.column("pid", []).dtype == np.int64
    assert gallery.embeddings([]).shape == (0, 4)


def test_rows_of_an_unknown_model_are_not_added_to_those_of_a_known_one(tmp_path, no_fsync):
    gallery = Gallery.create(tmp_path / "g", EMBEDDINGS, np.arange(6), source=source(4))
    with refuses(InvalidInput, "nothing says what made these", path=gallery.path, hint="source"):
        gallery.add(EMBEDDINGS, np.arange(6, 12))
    gallery.add(EMBEDDINGS, np.arange(6, 12), source=gallery.source)
    assert len(gallery) == 12


def test_a_relative_path_stays_the_same_gallery(tmp_path, no_fsync, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    made = Gallery.create("people", EMBEDDINGS, np.arange(6))
    opened = Gallery.open("people")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert opened.column("id").tolist() == list(range(6))
    made.remove([3])
    assert opened.remove([4]) == 1
    assert opened.column("id").tolist() == [0, 1, 2, 5]

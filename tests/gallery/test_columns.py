"""Columns: any text and any number comes back, ids are found though their hashes meet, and bad offsets are one line."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.gallery.gallery import Gallery
from pmm.gallery.storage import columns, snapshot
from pmm.gallery.storage.columns import TextColumn, column_arrays, map_array, write_array
from pmm.utils.errors import InvalidFile
from tests.conftest import examples
from tests.refusals import refuses

texts = st.lists(st.text(st.characters(), max_size=6), max_size=12)  # NUL and lone surrogates, too


def text_column(folder, values):
    array = np.empty(len(values), object)
    array[:] = values
    mapped = {}
    for name, content in column_arrays("x", array).items():
        stored = write_array(folder / name, content)
        mapped[name.split(".")[1]] = map_array(folder / name, stored, content.dtype, (-1,))
    return TextColumn(mapped["offsets"], mapped["bytes"], mapped.get("codes"), folder)


@given(values=texts, repeats=st.integers(1, 3))
@examples(60)
def test_every_text_comes_back(tmp_path_factory, values, repeats):
    values = values * repeats
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        column = text_column(tmp_path_factory.mktemp("column"), values)
    assert column.take(np.arange(len(values))).tolist() == values
    assert (column.codes is not None) == (2 * len(set(values)) <= len(values))
    wanted = values[:2]
    assert column.equal_to([*wanted, 3]).tolist() == [value in wanted for value in values]


def test_texts_that_lie_outside_their_file_are_one_line(tmp_path, no_fsync):
    plain, coded = text_column(tmp_path, ["ab", "c", "def"]), text_column(tmp_path, ["ab", "ab", "c", "c"])
    for offsets in ([-1, 2, 3, 6], [0, 3, 2, 6], [0, 2, 3, 99]):
        with refuses(InvalidFile, "outside", path=tmp_path):
            TextColumn(np.array(offsets), plain.content, None, tmp_path).take(np.arange(3))
    for codes in ([0, 0, 1, 2], [-1, 0, 1, 1]):
        bad = TextColumn(coded.offsets, coded.content, np.array(codes, np.int32), tmp_path)
        with refuses(InvalidFile, "outside", path=tmp_path):
            bad.take(np.arange(4))
        with refuses(InvalidFile, "outside", path=tmp_path):
            bad.equal_to(["ab"])
    with refuses(InvalidFile, "UTF-8", path=tmp_path):
        TextColumn(plain.offsets, np.full(6, 0xFF, np.uint8), None, tmp_path).take(np.arange(3))


def test_ids_whose_hashes_meet_are_told_apart(tmp_path, no_fsync, monkeypatch):
    def meets(ids):
        return np.array([len(text) for text in ids], np.uint64)

    monkeypatch.setattr(columns, "id_keys", meets)
    monkeypatch.setattr(snapshot, "id_keys", meets)
    gallery = Gallery.create(tmp_path / "g", np.eye(4), ["aa", "bb", "c", "dd"])
    assert gallery.find(["dd", "ee", "bb", "c", "aa", "x"]).tolist() == [3, -1, 1, 2, 0, -1]
    gallery.remove(["bb"])
    gallery.add(np.eye(4)[:1], ["bb"])
    assert gallery.find(["bb", "aa"]).tolist() == [4, 0]
    assert gallery.verify() == []


def test_arrays_are_aligned_and_numpy_reads_them(tmp_path, no_fsync):
    for array in (np.arange(40_000, dtype=np.int64), np.ones((0, 4), np.float16), np.ones((3, 30_000), np.float32)):
        stored = write_array(tmp_path / "a.npy", array)
        assert np.array_equal(np.load(tmp_path / "a.npy", allow_pickle=False), array)
        mapped = map_array(tmp_path / "a.npy", stored, array.dtype, array.shape)
        assert np.array_equal(mapped, array)
        assert not mapped.flags.writeable or not mapped.size
        assert mapped.ctypes.data % array.itemsize == 0
    with refuses(InvalidFile, "float32 [3, 30000], not float32 [3, 7]", path=tmp_path / "a.npy"):
        map_array(tmp_path / "a.npy", stored, np.float32, (3, 7))
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    size = (tmp_path / "a.npy").stat().st_size
    with refuses(InvalidFile, path=tmp_path / "a.npy"):
        map_array(tmp_path / "a.npy", type(stored)(size=size, sha256=""), object, (1,))

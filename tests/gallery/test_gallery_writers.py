"""Writers: threads of one gallery take turns, a forked child is another writer, and what is not the gallery's stays."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from pmm.exact_search.searcher import ExactSearcher
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import CannotWrite
from tests.refusals import refuses

EMBEDDINGS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


@pytest.fixture
def gallery(tmp_path, no_fsync) -> Gallery:
    return Gallery.create(tmp_path / "people", EMBEDDINGS, np.arange(6), columns={"camera": ["a", "b"] * 3})


def test_threads_that_add_to_one_gallery_take_turns(gallery):
    def add(thread: int) -> None:
        for number in range(4):
            gallery.add(EMBEDDINGS[:1], [100 * thread + number], {"camera": ["a"]})

    threads = [threading.Thread(target=add, args=(number,)) for number in (1, 2, 3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    again = Gallery.open(gallery.path)
    assert sorted(again.column("id")) == [*range(6), *range(100, 104), *range(200, 204), *range(300, 304)]
    assert again.verify() == []


def test_a_thread_waits_for_the_one_that_holds_the_gallery(gallery):
    other = threading.Thread(target=gallery.remove, args=([3],))
    with gallery.writer():
        other.start()
        other.join(0.05)
        assert other.is_alive()
        assert gallery.remove([0]) == 1
        assert len(gallery) == 5
    other.join()
    assert gallery.column("id").tolist() == [1, 2, 4, 5]


def test_a_forked_child_of_a_writer_does_not_write(gallery):
    with gallery.writer():
        child = os.fork()
        if not child:
            code = 2
            try:
                gallery.remove([1])
            except CannotWrite:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        gallery.remove([2])
    assert Gallery.open(gallery.path).column("id").tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("search", ["nearest", "within"])
def test_ids_are_those_of_the_rows_that_were_searched(gallery, monkeypatch, search):
    """Another thread removes and compacts between the search and the look at the ids."""
    found = getattr(ExactSearcher, search)

    def interrupted(self, *more, **named):
        result = found(self, *more, **named)
        gallery.remove([0, 1])
        gallery.compact()
        return result

    monkeypatch.setattr(ExactSearcher, search, interrupted)
    if search == "nearest":
        assert gallery.search(EMBEDDINGS[4], 1).ids.tolist() == [4]
    else:
        assert gallery.within(EMBEDDINGS[4], 0)[0].ids.tolist() == [4]


def test_a_filter_that_another_thread_asked_for_is_not_mine(gallery, monkeypatch):
    equal, where = RowFilter.__eq__, RowFilter(cameras=["a"])
    gallery.search(EMBEDDINGS[0], where=where)

    def interrupted(self, other):
        monkeypatch.setattr(RowFilter, "__eq__", equal)
        assert gallery.search(EMBEDDINGS[0], 6, where=RowFilter(ids=[5])).ids.tolist() == [5]
        return self == other

    monkeypatch.setattr(RowFilter, "__eq__", interrupted)
    assert sorted(gallery.search(EMBEDDINGS[0], 6, where=where).ids) == [0, 2, 4]


FOREIGN = ["codes/mine/thesis.txt", "chunks/notes/x.npy", "chunks/000001/README.txt", "tombstones/here.txt"]


@pytest.mark.parametrize("name", FOREIGN)
def test_folders_that_no_gallery_made_are_refused_and_stay(tmp_path, name):
    file = tmp_path / "place" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with refuses(CannotWrite, f"it holds {name.split('/')[0]}/", path=tmp_path / "place"):
        Gallery.create(tmp_path / "place", EMBEDDINGS, np.arange(6))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", FOREIGN)
def test_what_others_put_into_a_gallery_stays(gallery, name):
    file = gallery.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    for change in (gallery.compact, lambda: gallery.remove([1]), gallery.compact):
        change()
    assert file.read_text() == "mine"
    assert [each.name for each in gallery.path.rglob("000001.*.npy")] == []


@pytest.mark.parametrize("place", ["tombstones", "chunks/000002", "codes/000002/x.npy", ".lock", ".readers-000001"])
def test_no_writer_follows_a_link(gallery, tmp_path, place):
    outside, link = tmp_path / "outside", gallery.path / place
    (outside / "000007").mkdir(parents=True)
    kept = outside / "000007" / "rows.npy"
    kept.write_text("mine")
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(kept if place[0] == "." or place.endswith("npy") else outside)
    if place.endswith("npy"):  # one in a folder of its own is not written through either
        gallery.remove([1])
    else:
        with refuses(CannotWrite, "symbolic link", path=link):
            gallery.remove([1])
    assert [each.name for each in outside.rglob("*")] == ["000007", "rows.npy"]
    assert kept.read_text() == "mine"
    assert Gallery.open(gallery.path).verify() == []

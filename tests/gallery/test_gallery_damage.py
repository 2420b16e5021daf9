"""Damage: no change writes it anew as if it were whole, no search passes over it; and what a rotation was fitted on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from pmm.gallery.gallery import Gallery
from pmm.gallery.storage import changes, short_codes
from pmm.gallery.storage.columns import write_array
from pmm.gallery.storage.manifest import MANIFEST
from pmm.utils.errors import InvalidFile
from tests.refusals import refuses

EMBEDDINGS = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
COLUMNS = {"camera": ["a", "b"] * 100}


@pytest.fixture
def gallery(tmp_path, no_fsync) -> Gallery:
    return Gallery.create(tmp_path / "people", EMBEDDINGS, np.arange(200), columns=COLUMNS)


def flip(gallery: Gallery, name: str, place: int = -1) -> None:
    content = bytearray((gallery.path / name).read_bytes())
    content[place] ^= 1
    (gallery.path / name).write_bytes(content)


def put(gallery: Gallery, kind: str, name: str, change) -> None:
    """A file that is what the manifest says, with other numbers."""
    manifest = json.loads((gallery.path / MANIFEST).read_text())
    entry = manifest["codes"] if kind == "codes" else manifest["chunks"][0]
    file = gallery.path / kind / entry["name"] / name
    array = np.load(file)
    change(array)
    entry["files"][name] = dataclasses.asdict(write_array(file, array))
    (gallery.path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["embeddings.npy", "id.npy", "camera.codes.npy"])
def test_damage_is_not_compacted_into_a_gallery_that_looks_whole(gallery, name):
    file = gallery.path / "chunks" / "000001" / name
    flip(gallery, f"chunks/000001/{name}")
    with refuses(InvalidFile, "changed since", path=file, hint="copy"):
        Gallery.open(gallery.path).compact()
    assert file in [problem.path for problem in Gallery.open(gallery.path).verify()]


def test_damage_is_not_folded_with_what_is_added(gallery, monkeypatch):
    monkeypatch.setattr(changes, "FOLD", 2)
    monkeypatch.setattr(changes, "CHUNK_BYTES", 1000 * 4 * 4)
    gallery.add(EMBEDDINGS[:1], [500], {"camera": ["a"]})
    name = gallery.manifest.chunks[-1].name
    flip(gallery, f"chunks/{name}/embeddings.npy")
    with refuses(InvalidFile, "changed since", path=gallery.path / "chunks" / name / "embeddings.npy"):
        gallery.add(EMBEDDINGS[:1], [501], {"camera": ["a"]})
    assert len(Gallery.open(gallery.path)) == 201


def test_codes_are_not_made_of_damaged_rows_or_by_a_damaged_rotation(gallery, monkeypatch):
    rotation = gallery.path / "codes" / gallery.manifest.codes.name / "rotation.npy"
    flip(gallery, str(rotation.relative_to(gallery.path)))
    with refuses(InvalidFile, "changed since", path=rotation, hint="compact"):
        gallery.add(EMBEDDINGS[:1], [500], {"camera": ["a"]})
    monkeypatch.setattr(short_codes, "MAX_GROWTH", 1)
    flip(gallery, "chunks/000001/embeddings.npy")
    with refuses(InvalidFile, "changed since", path=gallery.path / "chunks" / "000001" / "embeddings.npy"):
        gallery.add(EMBEDDINGS[:1], [500], {"camera": ["a"]})


def test_removed_rows_are_not_taken_from_a_damaged_list(gallery):
    gallery.remove([4])
    name = f"tombstones/{gallery.manifest.tombstones.name}/rows.npy"
    flip(gallery, name, -8)
    damaged = Gallery.open(gallery.path)
    for change in (damaged.compact, lambda: damaged.remove([7])):
        with refuses(InvalidFile, "changed since", path=gallery.path / name):
            change()


def test_codes_of_damaged_rows_are_not_said_to_be_mended_by_compacting(gallery):
    flip(gallery, "chunks/000001/embeddings.npy")
    problems = Gallery.open(gallery.path).verify()
    assert problems
    assert not [problem for problem in problems if "compact" in problem.hint]


def test_a_stored_row_that_has_no_code_is_named(gallery):
    put(gallery, "chunks", "embeddings.npy", lambda rows: rows.__setitem__((150, 2), np.nan))
    with refuses(InvalidFile, "row 150 holds NaN", path=gallery.path / "chunks" / "000001" / "embeddings.npy"):
        Gallery.open(gallery.path).compact()


@pytest.mark.parametrize("term", range(4))
def test_no_row_is_passed_over_because_its_code_holds_no_numbers(gallery, term):
    for value in (np.nan, -np.inf):
        put(gallery, "codes", "000001.terms.npy", lambda terms, value=value: terms.__setitem__((30, term), value))
        opened = Gallery.open(gallery.path)
        with refuses(InvalidFile, "row 30", hint="compact"):
            opened.search(EMBEDDINGS[30], 1)
        assert [problem.hint for problem in opened.verify()] == ["pmm gallery compact writes all codes anew"]
    opened.compact()
    assert opened.search(EMBEDDINGS[30], 1).ids.tolist() == [30]


@pytest.mark.parametrize(("term", "factor"), [(0, -1), (1, -1), (2, 1 + 2.0**-20), (2, 1e30), (3, 0.9)])
def test_terms_that_are_not_those_of_their_row_are_found(tmp_path, no_fsync, term, factor):
    """Each would let a search pass over the row."""
    rows = (np.random.default_rng(1).normal(size=(900, 40)) * np.exp(-np.arange(40) / 3)).astype(np.float32)
    gallery = Gallery.create(tmp_path / "long", rows, np.arange(900))
    put(gallery, "codes", "000001.terms.npy", lambda terms: terms[30].__setitem__(term, terms[30, term] * factor))
    (problem,) = Gallery.open(gallery.path).verify()
    assert "row 30" in problem.problem


@pytest.mark.parametrize("code", [-1, 2])
def test_damaged_cameras_are_one_line_where_a_camera_is_left_out(gallery, code):
    put(gallery, "chunks", "camera.codes.npy", lambda codes: codes.__setitem__(5, code))
    with refuses(InvalidFile, "outside", path=gallery.path / "chunks" / "000001"):
        Gallery.open(gallery.path).search(EMBEDDINGS[5], 1, not_camera="a")


def test_a_reader_does_not_call_a_list_damaged_that_a_later_change_replaced(gallery):
    gallery.remove([1])
    reader = Gallery.open(gallery.path)
    gallery.remove([2])
    assert reader.verify() == []
    assert len(reader) == 199
    (gallery.path / "tombstones" / gallery.manifest.tombstones.name / "rows.npy").unlink()
    (problem,) = gallery.verify()
    assert problem.path.name == "rows.npy"


def test_the_rotation_is_fitted_on_rows_of_the_gallery(gallery, monkeypatch):
    monkeypatch.setattr(short_codes, "SAMPLE", 64)
    gallery.compact()
    assert (gallery.fitted_on, gallery.verify()) == ("", [])
    gallery.add(EMBEDDINGS + 1, np.arange(200, 400), {"camera": ["a"] * 200})
    gallery.remove([0, 4, 8])
    assert gallery.fitted_on == ""
    gallery.add(np.tile(EMBEDDINGS, (3, 1)), np.arange(1000, 1600), {"camera": ["a"] * 600})
    assert (gallery.manifest.codes.rows, gallery.fitted_on, gallery.verify()) == (1000, "", [])
    gallery.compact()
    assert gallery.fitted_on == ""
    queries = short_codes.rows_digest(EMBEDDINGS[:8] + 3)
    for digest, said in ((queries, queries[:12]), ("", "does not name")):
        manifest = json.loads((gallery.path / MANIFEST).read_text()) | {"fitted_on": digest}
        (gallery.path / MANIFEST).write_text(json.dumps(manifest))
        opened = Gallery.open(gallery.path)
        assert opened.fitted_on == (digest or "unknown")
        (problem,) = opened.verify()
        assert said in problem.problem
    opened.compact()
    assert (opened.fitted_on, opened.verify()) == ("", [])


def test_a_rotation_of_more_axes_than_dimensions_is_not_read(gallery):
    file = gallery.path / "codes" / gallery.manifest.codes.name / "rotation.npy"
    stored = write_array(file, np.zeros((50, 4)))
    manifest = json.loads((gallery.path / MANIFEST).read_text())
    manifest["codes"]["files"]["rotation.npy"] = dataclasses.asdict(stored)
    (gallery.path / MANIFEST).write_text(json.dumps(manifest))
    with refuses(InvalidFile, "49 axes of 4", path=file):
        Gallery.open(gallery.path).search(EMBEDDINGS[0])

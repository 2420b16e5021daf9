"""Indices of earlier versions: what is in them is in the gallery, and bad files are one line."""

from __future__ import annotations

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.gallery.gallery import Gallery
from pmm.gallery.npz_index import import_npz, read_npz_index
from pmm.utils.errors import CannotWrite, InvalidFile
from tests.conftest import examples
from tests.gallery.old_index import index_members, npy, source, write_index
from tests.refusals import refuses

EMBEDDINGS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
names = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=9)  # lone surrogates, too: odd file names


@given(
    numbers=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
                     min_size=1, max_size=5),
    folder=names,
    data=st.data(),
)  # fmt: skip
@examples(60)
def test_all_of_it_is_in_the_gallery(tmp_path_factory, numbers, folder, data):
    path = tmp_path_factory.mktemp("index")
    embeddings = np.array(numbers, np.float32)
    texts = tuple(data.draw(st.lists(names, min_size=len(numbers), max_size=len(numbers), unique=True)))
    write_index(path / "index.npz", index_members(embeddings, texts, folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        import_npz(path / "index.npz", path / "gallery")
    gallery = Gallery.open(path / "gallery")
    assert gallery.embeddings().tobytes() == embeddings.tobytes()
    assert tuple(gallery.column("id")) == tuple(gallery.column("path")) == texts
    assert (gallery.folder, gallery.source, gallery.metric) == (folder, source(3), "euclidean")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def huge(content: bytes) -> bytes:
    """The same header, but for a shape of 4 TB."""
    assert b"(7, 4), }" in content
    return content.replace(b"(7, 4), }" + b" " * 10, b"(999999999, 999), }", 1)


def reworded(members: dict[str, bytes], before: str, after: str) -> dict[str, bytes]:
    text = str(np.load(io.BytesIO(members["contract.npy"])))
    assert before in text
    return {"contract.npy": npy(np.array(text.replace(before, after)))}


BAD = {
    "no item named 'paths.npy'": lambda p: p.pop("paths.npy"),
    "format is 'pmm-index-9'; expected 'pmm-index-1'": lambda p: p.update(reworded(p, "index-1", "index-9")),
    "unknown field precise": lambda p: p.update(reworded(p, '"precision"', '"precise"')),
    "embedding.metric is 'taxi'; expected one of euclidean, cosine": lambda p: p.update(
        reworded(p, "euclidean", "taxi")
    ),
    "unknown field embedding.angle": lambda p: p.update(reworded(p, '"dim"', '"angle": 1, "dim"')),
    "preprocessing.height is '128'; expected int": lambda p: p.update(reworded(p, '"height": 128', '"height": "128"')),
    "paths are no texts": lambda p: p.update(reworded(p, '"/people"', "3")),
    "Expecting value": lambda p: p.update({"contract.npy": npy(np.array("hello"))}),
    "damaged, or not an index": lambda p: p.update({"contract.npy": npy(np.array("[1]"))}),
    "are float64 [7, 4]": lambda p: p.update({"embeddings.npy": npy(np.ones((7, 4)))}),
    "holds >f4": lambda p: p.update({"embeddings.npy": npy(np.ones((7, 4), ">f4"))}),
    "float32 [7, 5]": lambda p: p.update({"embeddings.npy": npy(np.ones((7, 5), np.float32))}),
    "float32 [6, 4]": lambda p: p.update({"embeddings.npy": npy(np.ones((6, 4), np.float32))}),
    "float32 [28]": lambda p: p.update({"embeddings.npy": npy(np.ones(28, np.float32))}),
    "7 of 7 embeddings hold NaN": lambda p: p.update({"embeddings.npy": npy(np.full((7, 4), np.nan, np.float32))}),
    "its paths are no texts": lambda p: p.update({"paths.npy": npy(np.ones(7, np.float32))}),
    "paths are no text": lambda p: p.update({"paths.npy": npy(np.array([["a"] * 7]))}),
    "1 of 6 ids": lambda p: p.update({"paths.npy": npy(np.array(["a", "b", "c", "d", "e", "f", "a"]))}),
    "embeddings.npy is not as long": lambda p: p.update({"embeddings.npy": huge(p["embeddings.npy"])}),
    "not as long as it says": lambda p: p.update({"embeddings.npy": p["embeddings.npy"] + b"more"}),
    "is not as long as it": lambda p: p.update({"embeddings.npy": p["embeddings.npy"][:-4]}),
    "paths.npy holds object": lambda p: p.update({"paths.npy": npy(np.array([Bomb()] * 7, object))}),
    "magic string": lambda p: p.update({"paths.npy": pickle.dumps(Bomb())}),
    "not an index": lambda p: p.update({"paths.npy": npy(np.full(7, "a"))[:-4] + b"\xff" * 4}),
}


@pytest.mark.parametrize("reason", BAD)
def test_damage_of_every_kind_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, reason):
    monkeypatch.chdir(tmp_path)
    members = index_members(EMBEDDINGS)
    BAD[reason](members)
    bad = write_index(tmp_path / "bad.npz", members)
    with refuses(InvalidFile, reason, path=bad, hint="pmm embed"):
        import_npz(bad, tmp_path / "gallery")
    assert os.listdir(tmp_path) == ["bad.npz"]


def test_an_index_from_before_other_resizes_is_read(tmp_path):
    members, fields = index_members(EMBEDDINGS), '"antialias": true, "height": 128, "interpolation": "bilinear"'
    members |= reworded(members, fields, '"height": 128')
    members |= reworded(members, '"padding": null, ', "")
    assert read_npz_index(write_index(tmp_path / "older.npz", members)).source == source(4)


def test_a_compressed_file_could_be_a_bomb(tmp_path):
    path = write_index(tmp_path / "bad.npz", index_members(EMBEDDINGS), zipfile.ZIP_DEFLATED)
    with refuses(InvalidFile, "contract.npy", "compressed", path=path):
        read_npz_index(path)


def test_truncated_flipped_and_foreign_files_are_one_line(tmp_path):
    whole = write_index(tmp_path / "a.npz", index_members(EMBEDDINGS)).read_bytes()
    bad = tmp_path / "bad.npz"
    for length in [0, 1, 30, len(whole) // 2, len(whole) - 1]:
        bad.write_bytes(whole[:length])
        with refuses(InvalidFile, "damaged, or not an index", path=bad):
            read_npz_index(bad)
    place = whole.index(EMBEDDINGS.tobytes()) + 5
    bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with refuses(InvalidFile, "CRC", path=bad):
        read_npz_index(bad)
    np.savez(bad, x=np.ones(3))
    with refuses(InvalidFile, "not an index", "contract.npy", path=bad):
        read_npz_index(bad)
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none.npz", expected="an index"):
        read_npz_index(tmp_path / "none.npz")


def test_another_gallery_is_not_replaced(tmp_path):
    index = write_index(tmp_path / "a.npz", index_members(EMBEDDINGS))
    import_npz(index, tmp_path / "gallery")
    with refuses(CannotWrite, "gallery already", path=tmp_path / "gallery"):
        import_npz(index, tmp_path / "gallery")

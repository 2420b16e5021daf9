"""An index: what is saved is what is loaded, bad files are one line, and the nearest are the nearest."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import pickle
import subprocess
import sys
import time
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pmm.evaluation.distances
from pmm.artifacts.manifest import EmbeddingContract
from pmm.data.preprocessing import preprocessing_of
from pmm.gallery.index import Index, IndexContract
from pmm.presets import preset
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidInput, InvalidValue
from tests.conftest import ROOT, examples
from tests.refusals import refuses


def contract(dim: int, metric: str = "euclidean") -> IndexContract:
    return IndexContract(
        checkpoint_sha256="c" * 64,
        artifact_sha256="a" * 64,
        precision="fp32",
        embedding=EmbeddingContract(dim=dim, normalised=metric == "cosine", metric=metric),  # type: ignore[arg-type]
        preprocessing=preprocessing_of(preset("tiny")),
    )


def index_of(embeddings: np.ndarray, metric: str = "euclidean", paths: tuple[str, ...] = ()) -> Index:
    names = paths or tuple(f"{row:03d}.jpg" for row in range(len(embeddings)))
    return Index(
        embeddings=embeddings.astype(np.float32),
        paths=names,
        folder="/people",
        contract=contract(embeddings.shape[1], metric),
    )


@pytest.fixture
def index() -> Index:
    return index_of(np.random.default_rng(0).normal(size=(7, 4)))


names = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=9)  # lone surrogates, too: odd file names


@given(
    numbers=st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
                     min_size=1, max_size=5),
    folder=names,
    data=st.data(),
)  # fmt: skip
@examples(60)
def test_round_trip(tmp_path_factory, numbers, folder, data):
    path = tmp_path_factory.mktemp("index") / "index.npz"
    texts = tuple(data.draw(st.lists(names, min_size=len(numbers), max_size=len(numbers))))
    before = Index(
        embeddings=np.array(numbers, np.float32), paths=texts, folder=folder,
        contract=dataclasses.replace(contract(3), precision="int8"),
    )  # fmt: skip
    before.save(path)
    after = Index.load(path)
    assert after.embeddings.dtype == np.float32
    assert after.embeddings.tobytes() == before.embeddings.tobytes()
    assert (after.paths, after.folder, after.contract) == (texts, folder, before.contract)


def test_equal_content_is_equal_bytes_at_any_time(index, tmp_path, monkeypatch):
    index.save(tmp_path / "a.npz")
    later = time.localtime(time.time() + 1e6)
    monkeypatch.setattr(time, "localtime", lambda *_: later)
    index.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_numpy_reads_it_without_pickle(index, tmp_path):
    index.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["embeddings"], index.embeddings)
        assert arrays["paths"].tolist() == list(index.paths)
        assert '"precision": "fp32"' in arrays["contract"].item()


def exact(embeddings: np.ndarray, query: np.ndarray, metric: str) -> np.ndarray:
    """Distances by the definition, in whole numbers where the inputs are: no rounding that could hide a tie."""
    if metric == "euclidean":
        return np.sqrt(((embeddings[None] - query[:, None]) ** 2).sum(2))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (query, embeddings)]
    return ((unit[0][:, None] - unit[1][None]) ** 2).sum(2) / 2


@given(
    seed=st.integers(0, 1 << 30),
    rows=st.integers(1, 60),
    dim=st.integers(1, 8),
    queries=st.integers(1, 5),
    top=st.integers(1, 70),
    chunk=st.sampled_from([1, 16, 100, 4096]),
    metric=st.sampled_from(["euclidean", "cosine"]),
)
@examples(100)
def test_nearest_is_brute_force_with_ties_by_index(seed, rows, dim, queries, top, chunk, metric):
    rng = np.random.default_rng(seed)
    embeddings = rng.integers(1, 3, (rows, dim)).astype(np.float64)  # few different rows: many ties
    asked = rng.integers(1, 3, (queries, dim)).astype(np.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmm.evaluation.distances, "MAX_ROWS", chunk)
        patch.setattr(pmm.evaluation.distances, "MAX_QUERIES", 2)
        found = index_of(embeddings, metric).nearest(asked, top)
        single = index_of(embeddings, metric).nearest(asked[0], top)
    assert found.indices.shape == found.distances.shape == (queries, min(rows, top))
    distances = exact(embeddings, asked, metric)
    # rounded for the order only: rows on one line have equal cosines but for the last bit
    order = np.argsort(distances.round(12) if metric == "euclidean" else distances, axis=1, kind="stable")[:, :top]
    np.testing.assert_allclose(found.distances, np.take_along_axis(distances, order, 1), atol=1e-12)
    if metric == "euclidean":
        assert np.array_equal(found.indices, order)
    else:  # equal rows, at least, stand in the order of their index
        for near in found.indices:
            for first, second in pairwise(near):
                assert first < second or (embeddings[first] != embeddings[second]).any()
    assert np.array_equal(single.indices, found.indices[0])


@pytest.mark.parametrize("chunk", [3, 4096])
def test_nearest_far_from_the_origin(chunk, monkeypatch):
    """|q|^2 + |g|^2 - 2 q.g has lost the digits here that tell the rows apart: the candidates must still hold them."""
    monkeypatch.setattr(pmm.evaluation.distances, "MAX_ROWS", chunk)
    rng = np.random.default_rng(1)
    step = 2.0**17  # what float32 can tell apart at 2**40; its square is below the rounding of 256 * 2**80 in float64
    embeddings = np.full((400, 256), 2.0**40, np.float32)
    embeddings[:, :4] += step * rng.integers(0, 6, (400, 4)).astype(np.float32)
    embeddings[200:] = embeddings[:200]
    query = embeddings[7] + np.float32(step)
    found = index_of(embeddings).nearest(query, 50)
    distances = exact(embeddings.astype(np.float64), query[None].astype(np.float64), "euclidean")[0]
    assert found.indices.tolist() == np.argsort(distances, kind="stable")[:50].tolist()
    assert index_of(embeddings).nearest(embeddings[9], 1).distances[0] == 0


def test_bad_queries_are_refused(index):
    with refuses(InvalidInput, "query", "[5]", expected="[4] or [Q, 4]"):
        index.nearest(np.zeros(5), 1)
    with refuses(InvalidInput, "query", "NaN", hint="backend"):
        index.nearest(np.array([0, np.nan, 0, 0]), 1)
    with refuses(InvalidValue, name="top", value=0, expected="at least 1"):
        index.nearest(np.zeros(4), 0)
    with refuses(InvalidInput, "query", "all zero", "cosine", index=1):
        index_of(np.ones((2, 4)), "cosine").nearest(np.array([np.ones(4), np.zeros(4)]), 1)


def test_embeddings_that_cannot_be_compared_are_refused_by_name():
    embeddings = np.ones((6, 3))
    embeddings[1, 2], embeddings[3:, 0] = np.inf, np.nan
    with refuses(InvalidInput, "4 of 6", "NaN", "001.jpg, 003.jpg, 004.jpg, ...", index=1, hint="backend"):
        index_of(embeddings)
    with refuses(InvalidInput, "1 of 2", "all zero", "cosine", ": 001.jpg", index=1):
        index_of(np.array([[1.0, 0], [0, 0]]), "cosine")
    with refuses(InvalidInput, "float32 [2, 3]", "1 images", expected="float32 [1, 3]"):
        index_of(np.ones((2, 3)), paths=("a",))
    with refuses(InvalidInput, "float32 [0, 3]", "0 images"):
        index_of(np.ones((0, 3)))


def test_differences_name_what_cannot_be_compared():
    mine = contract(4)
    assert not mine.differences(dataclasses.replace(mine, precision="fp16", artifact_sha256="b" * 64))
    assert mine.differences(dataclasses.replace(mine, checkpoint_sha256="d" * 64))[0].startswith("checkpoint cccc")
    assert mine.differences(contract(4, "cosine")) == ["normalised False, not True", "metric euclidean, not cosine"]
    size = dataclasses.replace(mine.preprocessing, height=256)
    assert mine.differences(dataclasses.replace(mine, preprocessing=size)) == ["height 128, not 256"]
    size = dataclasses.replace(mine.preprocessing, antialias=False, padding=(0, 0, 0))
    assert mine.differences(dataclasses.replace(mine, preprocessing=size)) == [
        "antialias True, not False", "padding none (stretched), not (0, 0, 0)"
    ]  # fmt: skip


def parts(index: Index, folder: Path) -> dict[str, bytes]:
    index.save(folder / "whole.npz")
    with zipfile.ZipFile(folder / "whole.npz") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def huge(content: bytes) -> bytes:
    """The same header, but for a shape of 4 TB."""
    assert b"(7, 4), }" in content
    return content.replace(b"(7, 4), }" + b" " * 10, b"(999999999, 999), }", 1)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


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
    "embeddings.npy is not as long": lambda p: p.update({"embeddings.npy": huge(p["embeddings.npy"])}),
    "not as long as it says": lambda p: p.update({"embeddings.npy": p["embeddings.npy"] + b"more"}),
    "is not as long as it": lambda p: p.update({"embeddings.npy": p["embeddings.npy"][:-4]}),
    "paths.npy holds object": lambda p: p.update({"paths.npy": npy(np.array([Bomb()] * 7, object))}),
    "magic string": lambda p: p.update({"paths.npy": pickle.dumps(Bomb())}),
    "not an index": lambda p: p.update({"paths.npy": npy(np.full(7, "a"))[:-4] + b"\xff" * 4}),
}


def test_an_index_from_before_other_resizes_is_read(tmp_path):
    index = index_of(np.ones((7, 4)))
    members, fields = parts(index, tmp_path), '"antialias": true, "height": 128, "interpolation": "bilinear"'
    members |= reworded(members, fields, '"height": 128')
    members |= reworded(members, '"padding": null, ', "")
    assert Index.load(written(tmp_path / "older.npz", members)).contract == index.contract


@pytest.mark.parametrize("reason", BAD)
def test_damage_of_every_kind_is_one_line(index, tmp_path, monkeypatch, reason):
    monkeypatch.chdir(tmp_path)
    members = parts(index, tmp_path)
    assert Index.load(written(tmp_path / "good.npz", members)).paths == index.paths
    BAD[reason](members)
    with refuses(InvalidFile, reason, path=tmp_path / "bad.npz", hint="pmm embed"):
        Index.load(written(tmp_path / "bad.npz", members))
    assert not (tmp_path / "exploded").exists()


def test_a_compressed_file_could_be_a_bomb(index, tmp_path):
    path = written(tmp_path / "bad.npz", parts(index, tmp_path), zipfile.ZIP_DEFLATED)
    with refuses(InvalidFile, "contract.npy", "compressed", path=path):
        Index.load(path)


def test_truncated_flipped_and_foreign_files_are_one_line(index, tmp_path):
    index.save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    bad = tmp_path / "bad.npz"
    for length in [0, 1, 30, len(whole) // 2, len(whole) - 1]:
        bad.write_bytes(whole[:length])
        with refuses(InvalidFile, "damaged, or not an index", path=bad):
            Index.load(bad)
    place = whole.index(index.embeddings.tobytes()) + 5
    bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with refuses(InvalidFile, "CRC", path=bad):
        Index.load(bad)
    np.savez(bad, x=np.ones(3))
    with refuses(InvalidFile, "not an index", "contract.npy", path=bad):
        Index.load(bad)
    with refuses(InvalidFile, "does not exist", path=tmp_path / "none.npz", expected="an index"):
        Index.load(tmp_path / "none.npz")


def test_full_disk_keeps_the_old_file(index, tmp_path):
    path = tmp_path / "a.npz"
    index.save(path)
    old = path.read_bytes()
    script = (
        "import resource, sys; import numpy as np, dataclasses\n"
        "from pmm.gallery.index import Index; from pmm.utils.errors import CannotWrite\n"
        "index = Index.load(sys.argv[1]); many = np.ones((5000, 4), np.float32)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: dataclasses.replace(index, embeddings=many, paths=('x',) * 5000).save(sys.argv[1])\n"
        "except CannotWrite as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(f"{path}: cannot write: File too large"), done.stderr
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("call", range(4))
def test_no_space_at_any_write_keeps_the_old_file(index, tmp_path, monkeypatch, call):
    """The disk fills at the header, the numbers, the paths or the table of contents."""
    path = tmp_path / "a.npz"
    index.save(path)
    old, calls, write = path.read_bytes(), [0], zipfile._ZipWriteFile.write  # type: ignore[attr-defined]

    def full(self, data):
        calls[0] += 1
        if calls[0] > call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(zipfile._ZipWriteFile, "write", full)  # type: ignore[attr-defined]
    with refuses(CannotWrite, "No space left on device", path=path, hint="unchanged"):
        dataclasses.replace(index, folder="/elsewhere").save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.npz"]


def test_a_search_takes_less_memory_than_the_index():
    """However long the gallery: its numbers in float64 would be twice the index."""
    index = index_of(np.random.default_rng(0).normal(size=(40_000, 64)))
    tracemalloc.start()
    try:
        index.nearest(index.embeddings[:8], 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < index.embeddings.nbytes

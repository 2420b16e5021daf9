"""A gallery: what goes in comes out, searches are exact and say who, and what cannot be is one line."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

import pmm
from pmm.evaluation.distances import half_squares
from pmm.gallery import matches
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage import changes
from pmm.gallery.storage.thresholds import Threshold
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidInput, InvalidValue
from tests.gallery.old_index import source
from tests.refusals import refuses

IDS = [f"{number:03d}.jpg" for number in range(7)]
EMBEDDINGS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
CAMERAS = ["gate", "yard", "gate", "hall", "yard", "gate", "hall"]
TIMES = [0.0, 1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]


@pytest.fixture
def stored(tmp_path, no_fsync) -> Gallery:
    columns = {"camera": CAMERAS, "time": TIMES, "pid": [1, 1, 2, 2, 3, 3, 3], "weather": ["sun", "rain"] * 3 + ["sun"]}
    return Gallery.create(tmp_path / "stored", EMBEDDINGS, IDS, columns=columns)


def test_what_goes_in_comes_out(stored):
    again = Gallery.open(stored.path)
    for gallery in (stored, again):
        assert (len(gallery), gallery.dim, gallery.metric, gallery.precision) == (7, 4, "euclidean", "fp32")
        assert gallery.columns == ("camera", "time", "pid", "weather")
        assert gallery.embeddings().tobytes() == EMBEDDINGS.tobytes()
        assert gallery.column("id").tolist() == IDS
        assert gallery.column("camera").tolist() == CAMERAS
        assert gallery.column("pid").dtype == np.int64
        np.testing.assert_array_equal(gallery.column("time"), TIMES)
        assert gallery.find(["005.jpg", "none", "000.jpg"]).tolist() == [5, -1, 0]
        assert gallery.ids_of(np.array([6, 1])).tolist() == ["006.jpg", "001.jpg"]
        assert gallery.embeddings(np.array([6])).tolist() == EMBEDDINGS[6:].tolist()
        assert (gallery.source, gallery.thresholds, gallery.folder) == (None, (), "")
    with refuses(InvalidInput, "rows that are not there", expected="from 0 to 6"):
        stored.ids_of(np.array([7]))
    with refuses(InvalidValue, name="column", value="colour", choices=("id", *stored.columns)):
        stored.column("colour")


def test_a_search_unpacks_as_ids_and_distances_of_one_query_or_several(stored):
    ids, distances = stored.search(EMBEDDINGS[3], k=2)
    assert (ids[0], distances[0], ids.shape, distances.shape) == ("003.jpg", 0.0, (2,), (2,))
    matches = stored.search(EMBEDDINGS[:5], k=2)
    assert matches.ids.shape == matches.distances.shape == matches.rows.shape == (5, 2)
    assert matches.ids[:, 0].tolist() == IDS[:5]
    assert matches.rows[3].tolist() == stored.find(ids).tolist()
    assert matches.is_match(0.0).tolist() == [[True, False]] * 5
    assert stored.search(EMBEDDINGS[:0]).ids.shape[0] == 0
    near = stored.within(EMBEDDINGS[:2], float(matches.distances[1, 1]))
    assert [each.ids[0] for each in near] == IDS[:2]
    assert near[1].ids.tolist() == matches.ids[1].tolist()
    assert stored.within(EMBEDDINGS[0], 0)[0].ids.tolist() == ["000.jpg"]
    assert len(stored.within(EMBEDDINGS[0], np.inf)[0].ids) == 7


def test_of_fewer_rows_than_k_all_are_returned(stored):
    ids, distances = stored.search(EMBEDDINGS[0], k=100)
    assert sorted(ids) == IDS
    assert (np.diff(distances) >= 0).all()
    assert stored.search(EMBEDDINGS[0], 100, where=RowFilter(cameras=["hall"])).ids.tolist() in (
        ["003.jpg", "006.jpg"], ["006.jpg", "003.jpg"],
    )  # fmt: skip


def test_removed_rows_are_gone_and_appended_ones_are_found(stored):
    assert stored.remove(["003.jpg", "none", "003.jpg", "000.jpg"]) == 2
    assert stored.remove(["003.jpg"]) == 0
    more = EMBEDDINGS[3:] + 10
    columns = {name: stored.column(name)[:4] for name in stored.columns}
    stored.add(more, ["003.jpg", "a", "b", "c"], columns)
    for gallery in (stored, Gallery.open(stored.path)):
        assert sorted(gallery.search(EMBEDDINGS[3], 100).ids) == sorted([*IDS[1:3], *IDS[3:], "a", "b", "c"])
        assert len(gallery.within(EMBEDDINGS[3], np.inf)[0].ids) == len(gallery) == 9
        assert gallery.search(more, 1).ids[:, 0].tolist() == ["003.jpg", "a", "b", "c"]
        assert gallery.search(more, 1).distances.tolist() == [[0.0]] * 4


def test_short_codes_stay_those_of_one_rotation_until_the_gallery_outgrows_it(tmp_path, no_fsync):
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(24, 24))
    gallery = Gallery.create(tmp_path / "g", rng.normal(size=(100, 24)) @ shape, np.arange(100))
    first = gallery.manifest.codes
    gallery.add(rng.normal(size=(90, 24)) @ shape.T + 3, np.arange(100, 190))
    assert gallery.manifest.codes.name == first.name
    assert gallery.verify() == []
    gallery.add(rng.normal(size=(300, 24)) @ shape.T + 3, np.arange(190, 490))
    assert (gallery.manifest.codes.name != first.name, gallery.manifest.codes.rows) == (True, 490)
    assert gallery.verify() == []
    assert gallery.search(gallery.embeddings(), 1).ids[:, 0].tolist() == list(range(490))


def test_many_small_chunks_are_folded_and_few_remain(tmp_path, no_fsync, monkeypatch):
    monkeypatch.setattr(changes, "CHUNK_BYTES", 60 * 4 * 4)
    monkeypatch.setattr(changes, "FOLD", 4)
    rng, sizes = np.random.default_rng(0), [1] * 18 + [7] * 9 + [90, 5, 25, 25, 25]
    gallery, rows, most = Gallery.create(tmp_path / "g", np.empty((0, 4)), np.arange(0)), np.empty((0, 4)), 0
    reader = None
    for count in sizes:
        more = rng.normal(size=(count, 4))
        gallery.add(more, np.arange(len(rows), len(rows) + count))
        rows = np.concatenate([rows, more])
        most = max(most, len(gallery.manifest.chunks))
        reader = reader or Gallery.open(gallery.path)
    assert most < 12
    assert max(chunk.rows for chunk in gallery.manifest.chunks) < 91
    assert gallery.column("id").tolist() == list(range(len(rows)))
    assert np.array_equal(gallery.embeddings(), rows.astype(np.float32))
    assert gallery.verify() == reader.verify() == []
    assert reader.search(rows[0], 1).ids.tolist() == [0]


def test_filters_keep_what_they_say(stored):
    def kept(**parts):
        where = RowFilter(**parts)
        found = stored.search(EMBEDDINGS[0], 100, where=where)
        assert np.sort(found.rows).tolist() == stored.rows_where(where).tolist()
        return sorted(int(name[:3]) for name in found.ids)

    assert kept(cameras=["gate", "nowhere"]) == [0, 2, 5]
    assert kept(since=1) == [1, 2, 3, 5, 6]
    assert kept(until=2.0) == [0, 1, 2]
    assert kept(since=2, until=5) == [2, 3, 5]
    assert kept(ids=["006.jpg", "000.jpg", "none"]) == [0, 6]
    assert kept(columns={"pid": [3], "weather": ["sun"]}) == [4, 6]
    assert kept(columns={"time": [2.0, 5.0]}, cameras=["gate"]) == [2, 5]
    assert kept() == [0, 1, 2, 3, 4, 5, 6]
    stored.remove(["002.jpg"])
    assert kept(cameras=["gate"]) == kept(cameras=["gate"], ids=IDS) == [0, 5]
    with refuses(InvalidInput, "none of the 6 rows", "camera nowhere", "since 3", expected="at least one row"):
        kept(cameras=["nowhere"], since=3)
    with refuses(InvalidInput, "none", "id 002.jpg"):
        kept(ids=["002.jpg"])
    with refuses(InvalidValue, name="column", value="colour", expected="camera, time, pid, weather"):
        kept(columns={"colour": ["red"]})


def test_the_cameras_of_queries_are_left_out(stored):
    matches = stored.search(EMBEDDINGS[:2], 7, not_camera=["gate", "yard"])
    for query, camera in enumerate(["gate", "yard"]):
        there = matches.rows[query] >= 0
        expected = [name for name, own in zip(IDS, CAMERAS, strict=True) if own != camera]
        assert sorted(matches.ids[query][there]) == expected
        assert np.isinf(matches.distances[query][~there]).all()
        assert matches.ids[query][~there].tolist() == [None] * int((~there).sum())
    assert stored.search(EMBEDDINGS[0], 7, not_camera="gate").ids.tolist() == matches.ids[0][:4].tolist()
    assert len(stored.search(EMBEDDINGS[0], 7, not_camera="nowhere").ids) == 7
    hall = RowFilter(cameras=["hall"])
    assert stored.search(EMBEDDINGS[0], where=hall, not_camera="hall").ids.shape == (0,)
    assert stored.search(EMBEDDINGS[:2], where=hall, not_camera=["hall", "gate"]).rows[0].tolist() == [-1, -1]
    assert [len(each.ids) for each in stored.within(EMBEDDINGS[:2], np.inf, where=hall, not_camera="hall")] == [0, 0]
    with refuses(InvalidInput, "2 cameras for 1 queries"):
        stored.search(EMBEDDINGS[0], not_camera=["gate", "hall"])


def test_whole_numbers_are_ids_and_cameras_too(tmp_path, no_fsync):
    ids = np.array([2**63 - 1, -5, 7], np.int64)
    gallery = Gallery.create(tmp_path / "g", EMBEDDINGS[:3], ids, columns={"camera": np.array([1, 2, 1], np.uint8)})
    assert gallery.search(EMBEDDINGS[1], 1).ids.tolist() == [-5]
    assert gallery.find([7, 2**63 - 1, 8]).tolist() == [2, 0, -1]
    assert gallery.search(EMBEDDINGS[1], where=RowFilter(cameras=[1])).ids.dtype == np.int64
    found = gallery.search(EMBEDDINGS[:2], 3, not_camera=[1, 3])
    assert found.ids[0].tolist() == [-5, -1, -1]
    assert found.ids[1].tolist() == [-5, 2**63 - 1, 7]
    with refuses(InvalidInput, "ids are texts", expected="whole numbers"):
        gallery.add(EMBEDDINGS[:1], ["a"], {"camera": [1]})


def test_an_empty_gallery_is_one(tmp_path, no_fsync):
    gallery = Gallery.create(tmp_path / "g", np.empty((0, 4)), [], columns={"camera": []})
    assert (len(gallery), gallery.search(EMBEDDINGS[0]).ids.shape, gallery.find(["a"]).tolist()) == (0, (0,), [-1])
    assert gallery.within(EMBEDDINGS[:2], 1)[1].ids.shape == (0,)
    gallery.add(EMBEDDINGS[:1], ["a"], {"camera": ["x"]})
    assert gallery.remove(["a"]) == 1
    assert gallery.search(EMBEDDINGS[0], not_camera="x").ids.shape == (0,)
    gallery.compact()
    assert (len(gallery), gallery.manifest.stored_rows, gallery.verify()) == (0, 0, [])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_distances_are_exact_ones_of_what_is_stored(tmp_path, no_fsync, metric, precision):
    gallery = Gallery.create(tmp_path / "g", EMBEDDINGS, IDS, metric, precision=precision)
    stored = EMBEDDINGS.astype(np.float16 if precision == "fp16" else np.float32)
    assert np.array_equal(gallery.embeddings(), stored)
    found = gallery.search(EMBEDDINGS[1], 7)
    rows, query = stored[found.rows].astype(np.float64), EMBEDDINGS[1].astype(np.float64)
    if metric == "euclidean":
        assert np.array_equal(found.distances, np.sqrt(2 * half_squares(rows - query)))
    else:
        cosines = rows @ query / (np.linalg.norm(rows, axis=1) * np.linalg.norm(query))
        np.testing.assert_allclose(found.distances, 1 - cosines, atol=1e-15)


def test_the_source_says_what_may_come_in(tmp_path, no_fsync):
    mine = source(4, "cosine")
    gallery = Gallery.create(tmp_path / "g", EMBEDDINGS, IDS, source=mine)
    assert (gallery.source, gallery.metric) == (mine, "cosine")
    assert Gallery.open(tmp_path / "g").source == mine
    with refuses(ConflictingOptions, "euclidean", "cosine", options=("metric", "source")):
        Gallery.create(tmp_path / "h", EMBEDDINGS, IDS, "euclidean", source=mine)
    with refuses(InvalidInput, "float32 [7, 4]", expected="[7, 5]"):
        Gallery.create(tmp_path / "h", EMBEDDINGS, IDS, source=source(5))
    with refuses(ConflictingOptions, options=("source", "model")):
        Gallery.create(tmp_path / "h", EMBEDDINGS, IDS, source=mine, model="x.onnx")
    gallery.add(EMBEDDINGS[:1], ["x"], source=mine)
    other = dataclasses.replace(mine, checkpoint_sha256="d" * 64)
    with refuses(InvalidInput, "checkpoint cccccccccccc..., not dddddddddddd...", path=gallery.path):
        gallery.add(EMBEDDINGS[:1], ["y"], source=other)
    assert not (tmp_path / "h").exists()


def test_a_model_is_looked_into(tmp_path, no_fsync, exported):
    gallery = Gallery.create(tmp_path / "g", np.ones((1, 384), np.float32), ["a"], model=exported)
    assert gallery.source
    assert gallery.source.artifact == str(exported)
    assert gallery.source.embedding.dim == 384


BAD_ROWS = {
    "float32 [7, 4]": lambda: (EMBEDDINGS, IDS[:6]),
    "float32 [7, 3]": lambda: (EMBEDDINGS[:, :3], IDS),
    "float32 [28]": lambda: (EMBEDDINGS.ravel(), IDS),
    "<U1 [7, 4]": lambda: (np.full((7, 4), "a"), IDS),
    "2 of 7 embeddings hold NaN or Inf: n1, n4": lambda: (changed({1: np.nan, 4: np.inf}), new(7)),
    "4 of 7 embeddings hold NaN or Inf: n0, n1, n2, ...": lambda: (changed(dict.fromkeys(range(4), np.inf)), new(7)),
    "1 of 7 embeddings hold numbers above 3.40282e+38": lambda: (changed({2: 1e39}), new(7)),
    "1 of 6 ids are there twice: n0": lambda: (EMBEDDINGS, [*new(6), "n0"]),
    "2 of 7 ids are in the gallery already: 003.jpg, 005.jpg": lambda: (
        EMBEDDINGS, ["003.jpg", "a", "b", "c", "005.jpg", "d", "e"],
    ),
    "ids: number 1 is 3": lambda: (EMBEDDINGS[:2], ["a", 3]),
    "ids are whole numbers": lambda: (EMBEDDINGS[:2], [1, 2]),
    "ids: number 0 is True": lambda: (EMBEDDINGS[:2], [True, False]),
    "ids: number 1 is None": lambda: (EMBEDDINGS[:2], [1, None]),
    "ids: they are float64": lambda: (EMBEDDINGS[:2], np.array([1.0, 2.0])),
    "ids: they are [1, 2]": lambda: (EMBEDDINGS[:2], np.array([["a", "b"]])),
    "ids: it is str": lambda: (EMBEDDINGS[:2], "ab"),
}  # fmt: skip


def new(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def changed(numbers: dict[int, float]) -> np.ndarray:
    embeddings = EMBEDDINGS.astype(np.float64)
    for row, value in numbers.items():
        embeddings[row, row % 4] = value
    return embeddings


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_rows_that_cannot_be_stored_change_nothing(stored, reason):
    embeddings, ids = BAD_ROWS[reason]()
    count = len(ids) if len(ids) in (6, 7) else 2
    columns = {"camera": ["x"] * count, "time": [1] * count, "pid": [1] * count, "weather": [""] * count}
    before = sorted(stored.path.rglob("*")), stored.manifest
    with refuses(InvalidInput, reason):
        stored.add(embeddings, ids, columns)
    assert (sorted(stored.path.rglob("*")), Gallery.open(stored.path).manifest) == before
    assert len(stored) == 7


BAD_COLUMNS = {
    "columns are camera": {"camera": ["x"]},
    "columns are none": {},
    "column camera has 2 values for 1 ids": {"camera": ["x", "y"], "time": [1], "pid": [1], "weather": [""]},
    "column pid holds float64": {"camera": ["x"], "time": [1], "pid": [1.5], "weather": [""]},
    "column time holds texts": {"camera": ["x"], "time": ["noon"], "pid": [1], "weather": [""]},
    "column camera holds int64": {"camera": [3], "time": [1], "pid": [1], "weather": [""]},
    "column weather: number 0 is None": {"camera": ["x"], "time": [1], "pid": [1], "weather": [None]},
}


@pytest.mark.parametrize("reason", BAD_COLUMNS)
def test_columns_have_to_be_those_of_the_gallery(stored, reason):
    with refuses(InvalidInput, reason):
        stored.add(EMBEDDINGS[:1], ["x"], BAD_COLUMNS[reason])
    assert len(Gallery.open(stored.path)) == 7


def test_a_gallery_that_cannot_be_made_is_not_begun(tmp_path):
    path = tmp_path / "g"
    zero = np.array([[1.0, 0], [0, 0], [1e-9, 0]])
    with refuses(InvalidInput, "1 of 3 embeddings are all zero", "cosine: b", index=1):
        Gallery.create(path, zero, ["a", "b", "c"], "cosine")
    with refuses(InvalidInput, "2 of 3 embeddings are all zero in fp16", ": b, c"):
        Gallery.create(path, zero, ["a", "b", "c"], "cosine", precision="fp16")
    with refuses(InvalidInput, "1 of 2", "65504", "fp16: b", hint="fp32"):
        Gallery.create(path, np.array([[65504.0], [65520.0]]), ["a", "b"], precision="fp16")
    with refuses(InvalidValue, name="metric", value="cos", choices=("euclidean", "cosine")):
        Gallery.create(path, EMBEDDINGS, IDS, "cos")  # type: ignore[arg-type]
    with refuses(InvalidValue, name="precision", value="int8", choices=("fp32", "fp16")):
        Gallery.create(path, EMBEDDINGS, IDS, precision="int8")  # type: ignore[arg-type]
    for name in ("id", "Camera", "a.b", "../x", "embeddings"):
        with refuses(InvalidValue, name="columns", value=name):
            Gallery.create(path, EMBEDDINGS, IDS, columns={name: IDS})
    with refuses(InvalidInput, "column time holds texts", expected="seconds"):
        Gallery.create(path, EMBEDDINGS, IDS, columns={"time": IDS})
    with refuses(InvalidInput, "[7]", expected="[7, D]"):
        Gallery.create(path, EMBEDDINGS[:, 0], IDS)
    assert not path.exists()


def test_nothing_is_replaced_by_a_new_gallery(stored, tmp_path):
    with refuses(CannotWrite, "a gallery already", path=stored.path, hint="add"):
        Gallery.create(stored.path, EMBEDDINGS, IDS)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"picture")
    with refuses(CannotWrite, "it holds a.jpg", path=tmp_path / "photos", expected="an empty folder"):
        Gallery.create(tmp_path / "photos", EMBEDDINGS, IDS)
    with refuses(CannotWrite, path=tmp_path / "photos" / "a.jpg", expected="folder"):
        Gallery.create(tmp_path / "photos" / "a.jpg", EMBEDDINGS, IDS)
    assert [each.name for each in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    (tmp_path / "empty").mkdir()
    assert len(Gallery.create(tmp_path / "empty", EMBEDDINGS, IDS)) == 7


def test_bad_queries_are_refused(stored, tmp_path):
    with refuses(InvalidInput, "float32 [5]", expected="[4] or [Q, 4]"):
        stored.search(np.zeros(5, np.float32))
    with refuses(InvalidInput, "2 of 3 query", "NaN", index=1, hint="backend"):
        stored.search([[0, 0, 0, 0], [0, np.nan, 0, 0], [np.inf, 0, 0, 0]])
    for k in (0, -1):
        with refuses(InvalidValue, name="k", value=k, expected="1 or more"):
            stored.search(EMBEDDINGS[0], k)
    for distance in (-0.1, float("nan")):
        with refuses(InvalidValue, name="distance", expected="0 or more"):
            stored.within(EMBEDDINGS[0], distance)
    cosine = Gallery.create(tmp_path / "c", np.ones((2, 4)), ["a", "b"], "cosine")
    with refuses(InvalidInput, "query 1", "all zero", "cosine", index=1):
        cosine.search(np.array([np.ones(4), np.zeros(4)]))
    with refuses(InvalidValue, name="not_camera", expected="no column camera"):
        cosine.search(np.ones(4), not_camera="gate")


def test_thresholds_are_for_one_model_and_precision(tmp_path, no_fsync):
    mine = source(4)
    gallery = Gallery.create(tmp_path / "g", EMBEDDINGS, IDS, source=mine)
    fitting = Threshold(fmr=1e-3, distance=1.5, tpr=0.7, kind="bench", precision="fp32", stored="fp32",
                        checkpoint_sha256=mine.checkpoint_sha256, data="stored")  # fmt: skip
    with refuses(InvalidValue, name="fmr", expected="it has none"):
        gallery.threshold()
    gallery.set_thresholds([fitting, dataclasses.replace(fitting, fmr=1e-4, distance=1.0)])
    again = Gallery.open(gallery.path)
    assert again.threshold(1e-3) == fitting
    assert (
        gallery.search(EMBEDDINGS[0]).is_match(fitting).tolist()
        == (gallery.search(EMBEDDINGS[0]).distances <= 1.5).tolist()
    )
    for fmr in (None, 0.1):
        with refuses(InvalidValue, "0.001, 0.0001", name="fmr", value=fmr):
            again.threshold(fmr)
    for facts, names in (
        ({"stored": "fp16"}, ("stored precision fp16", "stored precision fp32")),
        ({"precision": "int8"}, ("precision int8", "precision fp32")),
        ({"checkpoint_sha256": "e" * 64}, ("checkpoint eeeeeeeeeeee", "checkpoint cccccccccccc")),
    ):
        with refuses(InvalidInput, "0.001", *names):
            again.set_thresholds([dataclasses.replace(fitting, **facts)])
    assert len(again.thresholds) == 2
    for name, value in (("fmr", 0.0), ("distance", -1.0), ("tpr", 1.5), ("distance", float("nan"))):
        with refuses(InvalidValue, name=name):
            dataclasses.replace(fitting, **{name: value})


def test_opening_reads_the_manifest_alone_and_the_first_query_the_codes(tmp_path, no_fsync, monkeypatch):
    embeddings = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    Gallery.create(tmp_path / "g", embeddings, np.arange(20_000), columns={"camera": ["a", "b"] * 10_000})
    read: list[str] = []
    from pmm.gallery.storage import chunks, short_codes, snapshot

    for each in (chunks, short_codes, snapshot):
        monkeypatch.setattr(each, "map_array", spied(each.map_array, read))
    tracemalloc.start()
    try:
        gallery = Gallery.open(tmp_path / "g")
        assert (len(gallery), read) == (20_000, [])
        assert tracemalloc.get_traced_memory()[1] < 1e6
        gallery.search(embeddings[0], 5)
    finally:
        tracemalloc.stop()
    assert read == ["rotation.npy", "000001.codes.npy", "000001.terms.npy", "embeddings.npy", "id.npy"]


def spied(function, read):
    def call(path, *more):
        read.append(path.name)
        return function(path, *more)

    return call


def test_it_is_there_by_its_name():
    assert pmm.Gallery is Gallery
    assert pmm.Matches is matches.Matches
    assert pmm.RowFilter is RowFilter

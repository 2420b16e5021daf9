"""Other engines find in an exported gallery what it finds itself; read back by their own clients.

Where a client is not installed its tests are skipped; tests/clients/test_engines.py runs them where all are.
"""

import csv
import json

import numpy as np
import pytest

from pmm.gallery.exports import batches
from pmm.gallery.exports.faiss_index import export_faiss
from pmm.gallery.exports.milvus import export_milvus
from pmm.gallery.exports.parquet import METADATA, export_parquet
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import CannotWrite, InvalidFile, InvalidInput, InvalidValue, MissingLibrary
from tests.conftest import assert_one_line_error, run_here
from tests.refusals import refuses

ROWS, DIM = 400, 24


@pytest.fixture(params=["euclidean", "cosine"])
def metric(request):
    return request.param


@pytest.fixture(params=["text", "int64"])
def gallery(request, metric, tmp_path, monkeypatch):
    """With removed rows, a time that is missing, and norms that differ: an engine that ignores them finds others."""
    rng = np.random.default_rng(0)
    embeddings = (rng.normal(size=(ROWS, DIM)) * rng.uniform(0.2, 3, (ROWS, 1)) + 0.5).astype(np.float32)
    ids = np.arange(ROWS) * 3 + 100 if request.param == "int64" else [f'{row}, "ä"\n.jpg' for row in range(ROWS)]
    times = np.arange(ROWS) / 7
    times[5] = np.nan
    columns = {"camera": [f"c{row % 3}" for row in range(ROWS)], "time": times, "person": np.arange(ROWS) // 4}
    made = Gallery.create(tmp_path / "gallery", embeddings, ids, metric, columns=columns)
    made.remove(made.ids_of(np.arange(0, 60, 2)))
    monkeypatch.setattr(batches, "BATCH_BYTES", 4 * DIM * 150)  # three batches
    return made


@pytest.fixture
def queries():
    return (np.random.default_rng(1).normal(size=(7, DIM)) + 0.5).astype(np.float32)


def scores(gallery, distances):
    """As faiss and Milvus give distances."""
    return 1 - distances if gallery.metric == "cosine" else distances**2


def unit(queries):
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["flat", "ivf-sq8"])
def test_faiss(gallery, queries, tmp_path, kind):
    faiss = pytest.importorskip("faiss")
    table = export_faiss(gallery, tmp_path / "gallery.faiss", kind)
    index = faiss.read_index(str(tmp_path / "gallery.faiss"))
    assert index.ntotal == len(gallery)
    found, numbers = index.search(unit(queries) if gallery.metric == "cosine" else queries, 10)
    with table.open(newline="", encoding="utf-8") as file:
        rows = {int(row["faiss_id"]): row for row in csv.DictReader(file)}
    assert len(rows) == len(gallery)
    ids, distances = gallery.search(queries, 10)
    named = [[rows[number]["id"] for number in row] for row in numbers.tolist()]
    if kind == "flat":
        assert named == [[str(each) for each in row] for row in ids.tolist()]
        np.testing.assert_allclose(found, scores(gallery, distances), rtol=1e-4, atol=1e-4)
    else:
        index.nprobe = index.nlist  # all lists: what is left is the rounding to bytes
        found, numbers = index.search(unit(queries) if gallery.metric == "cosine" else queries, 10)
        first = [[rows[number]["id"] for number in row] for row in numbers.tolist()]
        shared = [len({*a} & {str(each) for each in b}) for a, b in zip(first, ids.tolist(), strict=True)]
        assert np.mean(shared) >= 8.5
        np.testing.assert_allclose(found[:, 0], scores(gallery, distances)[:, 0], rtol=0.1, atol=0.02)
    if gallery.manifest.ids == "int64":
        assert {str(number) for number in rows} == {row["id"] for row in rows.values()}
    for row in rows.values():
        stored = gallery.find([int(row["id"]) if gallery.manifest.ids == "int64" else row["id"]])
        assert row["camera"] == gallery.column("camera", stored)[0]


def test_no_crop_of_a_gallery_lies_outside_the_range_of_bytes(metric, tmp_path):
    """The farthest of all is found though no sample that faiss is trained on holds it."""
    faiss = pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(2000, 8)).astype(np.float32)
    embeddings[1777] = np.float32([9, -9, 9, -9, 9, -9, 9, -9])
    gallery = Gallery.create(tmp_path / "g", embeddings, np.arange(2000), metric)
    export_faiss(gallery, tmp_path / "g.faiss", "ivf-sq8")
    index = faiss.read_index(str(tmp_path / "g.faiss"))
    index.nprobe = index.nlist
    query = embeddings[1777:1778] * np.float32(1.01)
    found, numbers = index.search(unit(query) if metric == "cosine" else query, 1)
    assert numbers.tolist() == [[1777]]
    assert found[0, 0] == pytest.approx(1.0 if metric == "cosine" else 0.0, abs=0.15)


def test_milvus(gallery, queries, tmp_path):
    pymilvus, _ = pytest.importorskip("pymilvus"), pytest.importorskip("milvus_lite")
    target = tmp_path / "gallery.db"
    export_milvus(gallery, str(target), "people")
    client = pymilvus.MilvusClient(str(target))
    try:
        client.load_collection("people")
        answers = client.search("people", data=queries.tolist(), limit=10, output_fields=["camera", "time", "person"])
        ids, distances = gallery.search(queries, 10)
        assert [[hit["id"] for hit in hits] for hits in answers] == ids.tolist()
        found = [[hit["distance"] for hit in hits] for hits in answers]
        np.testing.assert_allclose(found, scores(gallery, distances), rtol=1e-4, atol=1e-4)
        stored = gallery.find(ids[0])
        assert [hit["entity"]["camera"] for hit in answers[0]] == gallery.column("camera", stored).tolist()
        assert [hit["entity"]["person"] for hit in answers[0]] == gallery.column("person", stored).tolist()
        missing = client.query("people", filter="time is null", output_fields=["id"])
        assert [row["id"] for row in missing] == gallery.ids_of(np.array([5])).tolist()
        assert client.query("people", filter="", output_fields=["count(*)"]) == [{"count(*)": len(gallery)}]
    finally:
        client.close()
    with refuses(CannotWrite, path=target):
        export_milvus(gallery, str(target))


def test_parquet(gallery, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    export_parquet(gallery, tmp_path / "gallery.parquet")
    table = parquet.read_table(tmp_path / "gallery.parquet")
    assert table.column("id").to_pylist() == gallery.column("id").tolist()
    assert table.column("camera").to_pylist() == gallery.column("camera").tolist()
    np.testing.assert_array_equal(table.column("time").to_numpy(), gallery.column("time"))
    np.testing.assert_array_equal(np.stack(table.column("embedding").to_numpy()), gallery.embeddings())
    facts = json.loads(table.schema.metadata[METADATA])
    assert (facts["metric"], facts["stored"], facts["source"]) == (gallery.metric, "fp32", None)


def test_the_command(metric, tmp_path):
    Gallery.create(tmp_path / "g", np.eye(4), list("abcd"), metric)
    pytest.importorskip("faiss")
    done = run_here("-m", "pmm", "gallery", "export", tmp_path / "g", "--to", "faiss", "-o", tmp_path / "g.faiss")
    assert done.returncode == 0, done.stderr
    assert "4 crops" in done.stdout
    assert str(tmp_path / "g.faiss.csv") in done.stdout
    assert ("squared" in done.stdout) == (metric == "euclidean")


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--to", "milvus", "-o", "g.db", "--index", "flat"], ("index", "faiss")),
        (["--to", "faiss", "-o", "g.faiss", "--collection", "a"], ("collection", "milvus")),
        (["--to", "annoy", "-o", "g"], ("--to", "annoy", "faiss", "milvus", "parquet")),
        (["--to", "faiss", "-o", "/proc/none/g"], ("/proc/none/g",)),
    ],
)
def test_refusals(tmp_path, flags, facts):
    Gallery.create(tmp_path / "g", np.eye(4), list("abcd"))
    assert_one_line_error(run_here("-m", "pmm", "gallery", "export", tmp_path / "g", *flags), *facts)


@pytest.mark.parametrize(
    ("module", "export", "package"),
    [
        ("faiss", lambda gallery, out: export_faiss(gallery, out), "faiss-cpu"),
        ("milvus_lite", lambda gallery, out: export_milvus(gallery, str(out.with_suffix(".db"))), "milvus-lite"),
        ("pymilvus", lambda gallery, _: export_milvus(gallery, "http://127.0.0.1:1"), "pymilvus"),
        ("pyarrow", lambda gallery, out: export_parquet(gallery, out), "pyarrow"),
    ],
)
def test_a_library_that_is_missing_is_named(monkeypatch, tmp_path, module, export, package):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    monkeypatch.setattr("pmm.utils.extras.find_spec", lambda name: None if name == module else object())
    gallery = Gallery.create(tmp_path / "g", np.eye(4), list("abcd"))
    with refuses(MissingLibrary, f"pip install {package}", library=module):
        export(gallery, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["g"]


@pytest.mark.parametrize("module", ["faiss", "milvus_lite", "pyarrow"])
def test_an_empty_gallery_is_refused_and_nothing_written(tmp_path, module):
    pytest.importorskip(module)
    gallery = Gallery.create(tmp_path / "g", np.empty((0, 4)), [])
    with refuses(InvalidFile, path=tmp_path / "g"):
        if module == "faiss":
            export_faiss(gallery, tmp_path / "out.db")
        elif module == "milvus_lite":
            export_milvus(gallery, str(tmp_path / "out.db"))
        else:
            export_parquet(gallery, tmp_path / "out.db")
    assert [each.name for each in tmp_path.iterdir()] == ["g"]


def test_what_no_engine_can_hold(tmp_path):
    gallery = Gallery.create(tmp_path / "g", np.eye(4), list("abcd"))
    for name in ("1a", "a b", ""):
        with refuses(InvalidValue, name="--collection", value=name):
            export_milvus(gallery, "http://127.0.0.1:1", name)
    pytest.importorskip("faiss")
    with refuses(InvalidInput, "4 crops", "flat", expected="39 or more"):
        export_faiss(gallery, tmp_path / "g.faiss", "ivf-sq8")
    assert not list(tmp_path.glob("g.faiss*"))


class FullDisk:
    """faiss, as it fails where the disk is full."""

    class IndexIDMap2:
        def __init__(self, index):
            """Takes any."""

        def add_with_ids(self, rows, ids):
            """Keeps none."""

    IndexFlatL2 = IndexFlatIP = int

    @staticmethod
    def write_index(index, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise RuntimeError("Error in virtual size_t faiss::FileIOWriter::operator(): No space left on device")


def test_a_full_disk_leaves_the_index_and_the_table_that_were_there(tmp_path, monkeypatch):
    gallery = Gallery.create(tmp_path / "g", np.eye(4), list("abcd"))
    out, table = tmp_path / "g.faiss", tmp_path / "g.faiss.csv"
    out.write_text("old index")
    table.write_text("old table")
    monkeypatch.setattr("pmm.gallery.exports.faiss_index.import_library", lambda name: FullDisk)
    with refuses(CannotWrite, "No space left", path=out):
        export_faiss(gallery, out)
    assert (out.read_text(), table.read_text()) == ("old index", "old table")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g", "g.faiss", "g.faiss.csv"]


class BrokenMilvus:
    """pymilvus, whose server goes away while it is filled."""

    MilvusException = KeyError
    dropped: list

    class DataType:
        VARCHAR = FLOAT_VECTOR = INT64 = DOUBLE = 1

    class MilvusClient:
        def __init__(self, target):
            self.target = target
            if "://" not in target:
                with open(target, "wb") as file:
                    file.write(b"half")

        def __getattr__(self, name):
            return lambda *args, **options: self

        def has_collection(self, name):
            return False

        def insert(self, name, rows):
            raise KeyError("gone")

        def drop_collection(self, name):
            BrokenMilvus.dropped.append(name)


@pytest.mark.parametrize("target", ["g.db", "http://localhost:19530"])
def test_what_milvus_took_of_an_export_that_failed_is_removed(target, tmp_path, monkeypatch):
    gallery = Gallery.create(tmp_path / "g", np.eye(4), list("abcd"))
    target = target if "://" in target else str(tmp_path / target)
    BrokenMilvus.dropped = []
    monkeypatch.setattr("pmm.gallery.exports.milvus.import_library", lambda name: BrokenMilvus)
    monkeypatch.setattr("pmm.gallery.exports.milvus.check_installed", lambda name: None)
    with refuses(CannotWrite, "gone"):
        export_milvus(gallery, target)
    assert BrokenMilvus.dropped == ["crops"]
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_names_of_files_that_are_no_utf8(tmp_path, monkeypatch):
    """A table keeps their bytes; Parquet and Milvus cannot."""
    gallery = Gallery.create(tmp_path / "g", np.eye(4), ["a.jpg", "b\udcff.jpg", "c.jpg", "d.jpg"])
    for export, library in ((export_parquet, "parquet"), (export_milvus, "milvus")):
        monkeypatch.setattr(f"pmm.gallery.exports.{library}.import_library", lambda name: None)
        monkeypatch.setattr("pmm.gallery.exports.milvus.check_installed", lambda name: None)
        with refuses(InvalidInput, "UTF-8", index=1, hint="faiss"):
            export(gallery, tmp_path / "g.db" if library == "parquet" else str(tmp_path / "g.db"))
    written = type("faiss", (FullDisk,), {"write_index": staticmethod(lambda index, path: None)})
    monkeypatch.setattr("pmm.gallery.exports.faiss_index.import_library", lambda name: written)
    table = export_faiss(gallery, tmp_path / "g.faiss")
    assert b"b\xff.jpg" in table.read_bytes()

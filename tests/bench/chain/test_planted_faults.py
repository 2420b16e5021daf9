"""Twenty faults of galleries and indexes, each planted: the chain refuses it, a gate fails, or what was found names it.

Those of faiss are planted in faiss where it is installed, and in a stand-in of numpy in any case.
"""

import dataclasses

import numpy as np
import pytest

import pmm
from pmm.artifacts.manifest import EmbeddingContract
from pmm.bench.chain.examine import examine
from pmm.bench.chain.gates import chain_failures
from pmm.bench.chain.index_builder import IndexBuilder
from pmm.bench.chain.index_inputs import IndexInputs
from pmm.bench.chain.indexes import CertifiedIndex, FaissIndex
from pmm.bench.chain.outcomes import Listing, OutcomeEvaluator, loss
from pmm.bench.chain.stored import stored_as
from pmm.bench.chain_schema import ChainLink, ChainReport
from pmm.bench.gates import GateFlags
from pmm.data.preprocessing import Preprocessing
from pmm.evaluation.parity.thresholds import verification
from pmm.gallery.storage.short_codes import rows_digest
from pmm.gallery.storage.source import EmbeddingSource, check_comparable
from pmm.gallery.storage.thresholds import Threshold
from pmm.utils.errors import InvalidFile, InvalidInput
from tests.bench.chain import faiss_standin
from tests.bench.chain.people import labelled
from tests.refusals import refuses

EMBEDDED, LABELS = labelled(seed=5, people=40, distractors=200)
QUERIES, ROWS = EMBEDDED
NONE = np.empty(0, np.int64)
INPUTS = IndexInputs(
    vectors=ROWS,
    camids=LABELS.gallery_camids,
    queries=QUERIES,
    query_camids=LABELS.query_camids,
    removed=NONE,
)
SOURCE = EmbeddingSource(
    checkpoint_sha256="1" * 64,
    artifact_sha256="2" * 64,
    precision="fp32",
    embedding=EmbeddingContract(dim=ROWS.shape[1]),
    preprocessing=Preprocessing(height=8, width=4, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
)


@pytest.fixture(params=["stand-in", "faiss"])
def faiss(request):
    """The library, and what has its behaviour."""
    return faiss_standin if request.param == "stand-in" else pytest.importorskip("faiss")


def in_faiss(index, rows=ROWS, **facts):
    """An index of faiss with these rows, as the chain judges it."""
    rows = np.ascontiguousarray(rows, np.float32)
    if not index.is_trained or hasattr(index, "nlist"):
        index.train(rows)
    index.add(rows)
    return FaissIndex(index, disk_bytes=0, **facts)


def found(index, given=INPUTS):
    return [finding.fault for finding in examine(index, given)]


class ListIndex:
    """Brute force over some vectors, with the faults that a test plants: `ids` says which row each vector is, `order`
    makes lists of distances."""

    exact = exact_distances = True
    quantizer, settings, knob, fitted_on = "none", "", "", ""
    resident_bytes = disk_bytes = 0
    search_elsewhere = None

    def __init__(self, vectors=ROWS, ids=None, **faults):
        self.vectors = vectors
        self.ids = np.arange(len(vectors)) if ids is None else ids
        vars(self).update(faults)

    def __len__(self):
        return len(self.vectors)

    def distances(self, queries):
        return np.sqrt(((queries[:, None].astype(np.float64) - self.vectors) ** 2).sum(2))

    def order(self, distances):
        return np.argsort(distances, axis=1, kind="stable")

    def search(self, queries, k):
        distances = self.distances(queries)
        order = self.order(distances)[:, :k]
        return Listing(self.ids[order], np.take_along_axis(distances, order, 1))

    def stored(self, rows):
        place = np.empty(self.ids.max() + 1, np.int64)
        place[self.ids] = np.arange(len(self.ids))
        return self.vectors[place[rows]]


def judged(index, **facts):
    """The gates that the answers of an index fail, against the exact ranking."""
    evaluator = OutcomeEvaluator(LABELS, verification(EMBEDDED, LABELS).points[0].threshold)
    exact = evaluator.exact(EMBEDDED)
    outcome = evaluator.listed(index.search(QUERIES, 14), index.search(QUERIES, 120), 100)
    lost = loss(exact, outcome)
    rates = [dict(zip(("fmr", "tpr"), evaluator.rates(each), strict=True)) for each in (exact, outcome)]
    links = (
        ChainLink(name="torch fp32", kind="checkpoint", parent=None, **rates[0]),
        ChainLink(
            name="index", kind="index", parent="torch fp32", loss=lost, total=lost, knob=index.knob, **rates[1], **facts
        ),
    )
    chain = ChainReport(
        artifact="torch fp32", gallery=len(ROWS), distractors=0, depth=len(ROWS), genuine=1, impostor=1,
        target_fmr=1e-2, threshold=1.0, links=links, seconds=0.0,
    )  # fmt: skip
    return list(chain_failures(chain, GateFlags().parsed(), queries=int(exact.evaluated.sum())))


def test_without_a_fault_nothing_is_found(faiss, tmp_path):
    gallery = pmm.Gallery.create(tmp_path / "g", ROWS, np.arange(len(ROWS)), columns={"camera": LABELS.gallery_camids})
    lists = faiss.IndexIVFFlat(faiss.IndexFlatL2(ROWS.shape[1]), ROWS.shape[1], 8, faiss.METRIC_L2)
    lists.nprobe = 8
    indexes = [
        CertifiedIndex(gallery),
        ListIndex(),
        in_faiss(faiss.IndexFlatL2(ROWS.shape[1])),
        in_faiss(faiss.IndexHNSWFlat(ROWS.shape[1], 16), parameters={"efSearch": 64}),
        in_faiss(faiss.IndexScalarQuantizer(ROWS.shape[1], faiss.ScalarQuantizer.QT_8bit), quantizer="scalar"),
        in_faiss(lists),
    ]
    for index in indexes:
        assert found(index) == []
        assert judged(index) == []


def test_a_graph_of_usearch_has_no_fault(tmp_path):
    pytest.importorskip("usearch")
    index = IndexBuilder(ROWS, LABELS.gallery_camids, tmp_path).usearch(64)
    assert found(index) == []
    assert judged(index) == []
    assert index.search(QUERIES[:1], 500).rows.shape == (1, 500)


def test_inner_product_on_unnormalised_vectors(faiss):
    assert found(in_faiss(faiss.IndexFlatIP(ROWS.shape[1]))) == ["inner product on unnormalised vectors"]
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    at_norm_1 = dataclasses.replace(INPUTS, vectors=unit, queries=QUERIES / np.linalg.norm(QUERIES, axis=1)[:, None])
    assert found(in_faiss(faiss.IndexFlatIP(ROWS.shape[1]), unit), at_norm_1) == []


def test_ef_too_low(faiss):
    graph = faiss.IndexHNSWFlat(ROWS.shape[1], 2)
    index = in_faiss(graph, knob="efSearch (now 1)", parameters={"efSearch": 1})
    failures = judged(index)
    assert "--max-rank1-flips" in [failure.gate for failure in failures]
    assert all("efSearch (now 1)" in failure.message for failure in failures)


def test_nprobe_1(faiss):
    lists = faiss.IndexIVFFlat(faiss.IndexFlatL2(ROWS.shape[1]), ROWS.shape[1], 16, faiss.METRIC_L2)
    index = in_faiss(lists, knob="nprobe (now 1 of 16 lists)", parameters={"nprobe": 1})
    failures = judged(index)
    assert {"--max-map-drop", "--max-rank1-flips", "--max-tpr-drop"} <= {failure.gate for failure in failures}
    assert all("nprobe (now 1 of 16 lists)" in failure.message for failure in failures)


@pytest.mark.parametrize("offset", [1, -1])
def test_shifted_ids(offset):
    ids = (np.arange(len(ROWS)) + offset) % len(ROWS)
    (finding,) = examine(ListIndex(ids=ids), INPUTS)
    assert finding.fault == "shifted ids"
    assert f"{offset:+d}" in finding.evidence


def test_a_stale_gallery_of_another_checkpoint(tmp_path):
    """Refused by provenance and, where that is wrong, found by its vectors."""
    other = dataclasses.replace(SOURCE, checkpoint_sha256="3" * 64)
    with refuses(InvalidFile, "checkpoint", "111111111111", "333333333333", path=tmp_path):
        check_comparable(SOURCE, other, tmp_path)
    others = labelled(seed=6, people=40, distractors=200)[0].gallery
    assert found(ListIndex(others)) == ["stale gallery"]


def test_mixed_galleries():
    rows = ROWS.copy()
    rows[100:160] = labelled(seed=6, people=40, distractors=200)[0].gallery[100:160]
    (finding,) = examine(ListIndex(rows), INPUTS)
    assert finding.fault == "mixed galleries"
    assert "60 of 400 rows" in finding.evidence
    assert "from 100 to 159" in finding.evidence


def test_rows_swapped():
    rows = ROWS.copy()
    rows[[7, 301]] = rows[[301, 7]]
    (finding,) = examine(ListIndex(rows), INPUTS)
    assert finding.fault == "rows swapped"
    assert "7 as 301" in finding.evidence
    silent = ListIndex(rows)
    silent.search = ListIndex(ROWS).search  # where no query meets them, the vectors that it keeps show it
    (finding,) = examine(silent, INPUTS)
    assert finding.fault == "rows swapped"
    assert "7 that of 301" in finding.evidence


def test_a_chunk_twice(faiss):
    index = in_faiss(faiss.IndexFlatL2(ROWS.shape[1]))
    index.index.add(np.ascontiguousarray(ROWS[:50]))
    assert found(index) == ["rows twice"]
    twice = ListIndex(np.concatenate([ROWS[:-50], ROWS[:50]]), np.r_[: len(ROWS) - 50, :50])
    assert "rows twice" in found(twice, dataclasses.replace(INPUTS, removed=np.arange(len(ROWS) - 50, len(ROWS))))


def test_a_wrong_quantizer_range(faiss):
    index = faiss.IndexScalarQuantizer(ROWS.shape[1], faiss.ScalarQuantizer.QT_8bit)
    index.train(np.ascontiguousarray(ROWS * np.float32(0.5)))
    index.add(np.ascontiguousarray(ROWS))
    (finding,) = examine(FaissIndex(index, quantizer="scalar", disk_bytes=0), INPUTS)
    assert finding.fault == "wrong quantizer range"


def test_a_dropped_norm_column():
    class Normless(ListIndex):
        def distances(self, queries):
            squares = (queries.astype(np.float64) ** 2).sum(1)[:, None] - 2 * queries @ self.vectors.T
            return np.sign(squares) * np.sqrt(np.abs(squares))

    assert found(Normless()) == ["dropped norm column"]


def test_a_filter_that_forgets_junk(tmp_path):
    gallery = pmm.Gallery.create(tmp_path / "g", ROWS, np.arange(len(ROWS)), columns={"camera": LABELS.gallery_camids})
    index = CertifiedIndex(gallery)
    assert found(index) == []
    index.search_elsewhere = lambda queries, k, camids: index.search(queries, k)
    assert found(index) == ["filter forgets junk"]


class ElsewhereIndex(ListIndex):
    """Leaves out the query's camera, exactly."""

    def search_elsewhere(self, queries, k, camids):
        distances = self.distances(queries)
        distances[LABELS.gallery_camids == camids[:, None]] = np.inf
        order = self.order(distances)[:, :k]
        return Listing(order, np.take_along_axis(distances, order, 1))


def test_a_filter_that_is_emptied():
    assert found(ElsewhereIndex()) == []
    empty = ElsewhereIndex()
    empty.search_elsewhere = lambda queries, k, camids: Listing(
        np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)
    )
    assert found(empty) == ["filter forgets rows of other cameras"]


def test_a_filter_that_lists_any_rows_of_other_cameras():
    class AnyIndex(ElsewhereIndex):
        def search_elsewhere(self, queries, k, camids):
            distances, rows = self.distances(queries), np.empty((len(queries), k), np.int64)
            for place, camera in enumerate(camids):
                others = np.flatnonzero(LABELS.gallery_camids != camera)
                some = np.random.default_rng(place).choice(others, k, replace=False)
                rows[place] = some[np.argsort(distances[place, some])]
            return Listing(rows, np.take_along_axis(distances, rows, 1))

    (finding,) = examine(AnyIndex(), INPUTS)
    assert finding.fault == "not exact"
    assert "own camera" in finding.evidence


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_exact_gallery_that_compares_by_cosine_has_no_fault(tmp_path, precision):
    """Near each other, rows of half precision are off norm 1 by more than they are apart."""
    rng = np.random.default_rng(0)
    unit = [np.ones(64) + 2e-2 * rng.normal(size=(count, 64)) for count in (40, 400)]
    queries, rows = (each.astype(np.float32) / np.linalg.norm(each, axis=1)[:, None].astype("f4") for each in unit)
    stored, cameras = stored_as(rows, precision), np.arange(400) % 3
    gallery = pmm.Gallery.create(
        tmp_path / "g", rows, np.arange(400), "cosine", columns={"camera": cameras}, precision=precision
    )
    given = IndexInputs(
        vectors=stored, camids=cameras, queries=queries, query_camids=np.arange(40) % 3, removed=NONE, metric="cosine"
    )  # fmt: skip
    assert found(CertifiedIndex(gallery), given) == []


class OffIndex(ListIndex):
    """Tells distances that are too large: `factor` times, those from `place` on."""

    factor, place = 1 + 5e-4, 0

    def search(self, queries, k):
        rows, distances = super().search(queries, k)
        distances[:, self.place :] *= self.factor
        return Listing(rows, distances)


@pytest.mark.parametrize("faults", [{}, {"exact": False}, {"place": 9, "factor": 1.5}, {"factor": 1 + 1e-5}])
def test_distances_that_are_a_little_wrong(faults):
    """All of them, or one in ten."""
    assert found(OffIndex(**faults)) == ["wrong distances"]


@pytest.mark.parametrize(("exact", "fault"), [(True, "not exact"), (False, "lists out of order")])
def test_long_lists_that_are_reversed_behind_the_first_ten(exact, fault):
    class LateIndex(ListIndex):
        def order(self, distances):
            order = super().order(distances)
            return np.concatenate([order[:, :10], order[:, :9:-1]], 1)

    assert found(LateIndex(exact=exact)) == [fault]


def test_removed_rows_that_the_chain_gave_our_own_gallery(tmp_path):
    builder = IndexBuilder(ROWS, LABELS.gallery_camids, tmp_path)
    index = builder.certified("fp32")
    given = dataclasses.replace(INPUTS, removed=builder.removed)
    assert len(builder.removed) == 10
    assert found(index, given) == []

    class Unaware(ListIndex):
        def __len__(self):
            return len(ROWS)

    queries = dataclasses.replace(given, queries=ROWS[:5], query_camids=LABELS.gallery_camids[:5])
    assert found(Unaware(np.concatenate([ROWS, ROWS[:10]])), queries) == ["tombstones ignored"]


def test_cosine_of_zeros(tmp_path):
    rows = ROWS.copy()
    rows[33] = 0
    with refuses(InvalidInput, "zero", index=33):
        pmm.Gallery.create(tmp_path / "g", rows, np.arange(len(rows)), "cosine")
    gallery = pmm.Gallery.create(tmp_path / "h", ROWS, np.arange(len(ROWS)), "cosine")
    with refuses(InvalidInput, "zero"):
        gallery.search(np.zeros(ROWS.shape[1]))


def test_nan_rows(tmp_path):
    rows = ROWS.copy()
    rows[33, 2] = np.nan
    with refuses(InvalidInput, "NaN", index=33):
        pmm.Gallery.create(tmp_path / "g", rows, np.arange(len(rows)))
    silent = ListIndex(rows)
    silent.search = ListIndex(ROWS).search
    (finding,) = examine(silent, INPUTS)
    assert finding.fault == "NaN rows"
    assert "row 33" in finding.evidence


def test_one_cameras_rows_missing(faiss):
    kept = np.flatnonzero(LABELS.gallery_camids != 1)
    (finding,) = examine(ListIndex(ROWS[kept], kept, exact=False), INPUTS)
    assert finding.fault == "rows of a camera missing"
    assert "camera 1" in finding.evidence
    rows = ROWS.copy()
    rows[LABELS.gallery_camids == 1] = 0  # in an index that counts them
    assert found(in_faiss(faiss.IndexFlatL2(ROWS.shape[1]), rows)) == ["rows of a camera missing"]


def test_pca_fitted_on_the_query_set():
    """No figure shows it: only what the index says of itself."""
    centred = QUERIES - QUERIES.mean(0)
    basis = np.linalg.svd(centred, full_matrices=False)[2].T
    rotated = dataclasses.replace(INPUTS, vectors=(ROWS @ basis).astype(np.float32), queries=QUERIES @ basis)
    assert found(ListIndex(rotated.vectors), rotated) == []
    of_queries = ListIndex(rotated.vectors, fitted_on=rows_digest(rotated.queries))
    (finding,) = examine(of_queries, rotated)
    assert finding.fault == "fitted on the query set"
    assert found(ListIndex(rotated.vectors, fitted_on=rows_digest(ROWS)), rotated) == []
    assert found(ListIndex(rotated.vectors, fitted_on="unknown"), rotated) == ["fitted on unknown rows"]


def test_float16_overflow(tmp_path):
    rows = ROWS * np.float32(1e4)
    row = int((np.abs(rows) > 65504).any(1).argmax())
    with refuses(InvalidInput, "65504", index=row, hint="fp32"):
        stored_as(rows, "fp16")
    with refuses(InvalidInput, index=row):
        pmm.Gallery.create(tmp_path / "g", rows, np.arange(len(rows)), precision="fp16")


def test_an_index_built_before_an_append(faiss):
    (finding,) = examine(in_faiss(faiss.IndexFlatL2(ROWS.shape[1]), ROWS[:320]), INPUTS)
    assert finding.fault == "built before an append"
    assert "320 of 400" in finding.evidence


def test_tombstones_ignored(tmp_path, faiss):
    removed = np.arange(0, len(ROWS), 5)
    given = dataclasses.replace(INPUTS, removed=removed)
    assert found(in_faiss(faiss.IndexFlatL2(ROWS.shape[1])), given) == ["tombstones ignored"]
    gallery = pmm.Gallery.create(tmp_path / "g", ROWS, np.arange(len(ROWS)), columns={"camera": LABELS.gallery_camids})
    gallery.remove(removed)
    assert found(CertifiedIndex(gallery), given) == []


@pytest.mark.parametrize("copies", [4, 20])
def test_tie_order_changed(copies):
    rows = ROWS.copy()
    rows[200 : 200 + copies] = rows[5]  # one crop, stored again: all of them are listed, or some
    given = dataclasses.replace(INPUTS, vectors=rows, queries=rows[5:6], query_camids=np.zeros(1, np.int64))

    class LastFirst(ListIndex):
        def order(self, distances):
            return len(rows) - 1 - np.argsort(distances[:, ::-1], axis=1, kind="stable")

    assert found(ListIndex(rows), given) == []
    assert found(LastFirst(rows), given) == ["tie order changed"]


def test_a_threshold_of_another_precision(tmp_path):
    gallery = pmm.Gallery.create(tmp_path / "g", ROWS, np.arange(len(ROWS)), source=SOURCE)
    right = Threshold(
        fmr=1e-3, distance=2.0, kind="bench", precision="fp32", stored="fp32", checkpoint_sha256="1" * 64
    )  # fmt: skip
    gallery.set_thresholds([right])
    for wrong in ({"precision": "int8"}, {"stored": "fp16"}, {"checkpoint_sha256": "3" * 64}):
        with refuses(InvalidInput, "0.001", *[value[:12] for value in wrong.values()]):
            gallery.set_thresholds([dataclasses.replace(right, **wrong)])
    assert gallery.thresholds == (right,)


def test_what_was_trained_on_made_up_crops_is_marked(tmp_path):
    pytest.importorskip("faiss")
    made = {made_up: IndexBuilder(ROWS, LABELS.gallery_camids, tmp_path, made_up=made_up) for made_up in (0, 200)}
    for make in (lambda builder: builder.pca(8), lambda builder: builder.ivf_pq(rescored=False)):
        assert "made-up" in make(made[200]).settings
        assert "made-up" not in make(made[0]).settings

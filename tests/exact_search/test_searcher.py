"""Exact search finds what brute force in float64 finds: the same rows and the same distances."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.exact_search import pair_distances, query_search, scan, searcher
from pmm.exact_search.codes import encode
from pmm.exact_search.rotation import Rotation
from pmm.exact_search.searcher import ExactSearcher
from pmm.utils.errors import InvalidInput, InvalidValue
from pmm.utils.search_library import library
from tests.conftest import examples
from tests.exact_search.brute_force import brute_force, galleries, made_up, nearest
from tests.refusals import refuses

METRICS = ("euclidean", "cosine")
KERNELS = ["numpy", *(["compiled"] if library() else [])]


def searcher_of(rows, r, metric="euclidean", *, parts=1, kernel="numpy", threads=1):
    rotation = Rotation.fit(rows[:: max(1, len(rows) // 50)], r, metric)
    return ExactSearcher(
        np.array_split(rows, parts), metric, rotation, [encode(rotation, rows, metric)], kernel=kernel, threads=threads
    )


def assert_found(found, expected):
    rows, distances = expected
    assert np.array_equal(found.rows, rows)
    assert np.array_equal(found.distances, distances)


@pytest.fixture
def small_steps(monkeypatch):
    """As if the galleries of these tests were large: several passes, and float32 before float64."""
    monkeypatch.setattr(query_search, "SAMPLE", 8)
    monkeypatch.setattr(query_search, "MAX_CANDIDATES", 64)
    monkeypatch.setattr(query_search, "MANY", 1 / 2)
    monkeypatch.setattr(searcher, "QUERIES_AT_ONCE", 3)
    monkeypatch.setattr(pair_distances, "GRAIN", 8)
    monkeypatch.setattr(pair_distances, "QUERIES_PER_ROW", 0)
    monkeypatch.setattr(pair_distances, "PAIRS_AT_ONCE", 7)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("metric", METRICS)
@examples(60)
@given(data=st.data())
def test_the_nearest_of_hard_galleries(metric, data):
    rows, queries, r = data.draw(galleries(metric))
    k = data.draw(st.sampled_from([1, 10, len(rows), len(rows) + 5]))
    expected = nearest(brute_force(queries, rows, metric), k)
    found = searcher_of(rows, r, metric, parts=data.draw(st.integers(1, 3)))
    assert_found(found.nearest(queries, k), expected)
    assert_found(found.nearest(queries[:1], k), [each[:1] for each in expected])


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("metric", METRICS)
@examples(40)
@given(data=st.data())
def test_within_a_distance_with_its_end(metric, data):
    rows, queries, r = data.draw(galleries(metric))
    truth = brute_force(queries, rows, metric)
    distance = float(data.draw(st.sampled_from(truth.ravel().tolist())))
    found = searcher_of(rows, r, metric).within(queries, distance)
    for each, distances in zip(found, truth, strict=True):
        count = int((distances <= distance).sum())
        assert_found(each, nearest(distances[None], count))


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("metric", METRICS)
@examples(40)
@given(data=st.data())
def test_subsets_and_pairs_that_count(metric, data):
    """Small subsets are gathered, large ones masked; the same searcher then searches all again."""
    rows, queries, r = data.draw(galleries(metric))
    seed, k = data.draw(st.integers(0, 2**32)), data.draw(st.sampled_from([1, 10]))
    rng = np.random.default_rng(seed)
    cameras, own = rng.integers(0, 2, len(rows)), rng.integers(0, 3, len(queries))
    subset = np.flatnonzero(rng.random(len(rows)) < data.draw(st.sampled_from([0.0, 0.1, 0.9])))
    truth = brute_force(queries, rows, metric)
    in_subset, other_camera = np.isin(np.arange(len(rows)), subset), cameras != own[:, None]

    def allowed(query, row):
        return cameras[row] != own[query]

    search = searcher_of(rows, r, metric, parts=2)
    for chosen, pairs, counts in (
        (subset, None, np.broadcast_to(in_subset, truth.shape)),
        (subset, allowed, other_camera & in_subset),
        (None, allowed, other_camera),
    ):
        most = len(rows) if chosen is None else len(subset)
        found = search.nearest(queries, k, rows=chosen, allowed=pairs)
        assert_found(found, nearest(truth, min(k, most), counts))
        for each, distances, counting in zip(
            search.within(queries, float(np.median(truth)), rows=chosen, allowed=pairs), truth, counts, strict=True
        ):
            near = counting & (distances <= np.median(truth))
            assert_found(each, nearest(distances[None], int(near.sum()), near[None]))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("count", "dim", "r"), [(1, 1, 1), (9000, 24, 8), (2000, 16, 16)])
def test_several_passes_and_threads(metric, count, dim, r, monkeypatch):
    monkeypatch.setattr(query_search, "SAMPLE", 500)
    monkeypatch.setattr(scan, "GRAIN", 300)
    monkeypatch.setattr(scan, "LEAST_ROWS", 100)
    monkeypatch.setattr(scan, "PAIRS_AT_ONCE", 1000)
    rows = made_up("decaying", count, dim, count)
    queries = rows[:70] + np.float32(0.01)
    search = searcher_of(rows, r, metric, parts=2, threads=2)
    assert_found(search.nearest(queries, 10), nearest(brute_force(queries, rows, metric), 10))


@pytest.mark.parametrize("metric", METRICS)
def test_float16_and_the_distances_of_evaluation(metric):
    rows = made_up("decaying", 200, 12, 1).astype(np.float16)
    queries = rows[:4].astype(np.float32)
    found = searcher_of(rows, 6, metric, parts=3).nearest(queries, 5)
    assert_found(found, nearest(brute_force(queries, rows, metric), 5))
    pairs = EmbeddingDistances(EmbeddingMatrix(queries, metric=metric), EmbeddingMatrix(rows, metric=metric))
    assert np.array_equal(found.distances.ravel(), pairs.exact_pairs(np.repeat(np.arange(4), 5), found.rows.ravel()))


def test_thousands_of_almost_equal_rows_are_mostly_decided_in_float32(monkeypatch):
    rng = np.random.default_rng(3)
    rows = made_up("decaying", 6000, 32, 3)
    rows[:5000] = rows[0] + rng.normal(size=(5000, 32)).astype(np.float32) * 1e-3
    queries = rows[:32] + rng.normal(size=(32, 32)).astype(np.float32) * 1e-3
    measured = []
    exact = pair_distances.PairDistances.exact

    def counted(self, query, row):
        measured.append(len(row))
        return exact(self, query, row)

    monkeypatch.setattr(pair_distances.PairDistances, "exact", counted)
    assert_found(searcher_of(rows, 8).nearest(queries, 5), nearest(brute_force(queries, rows, "euclidean"), 5))
    assert sum(measured) < 5000 * 32 / 20


@pytest.mark.parametrize("k", [200, 1000])
def test_each_pair_is_measured_once_where_many_rows_are_asked_for(k, monkeypatch):
    rows = made_up("decaying", 1000, 16, 0)
    measured = []
    exact = pair_distances.PairDistances.exact

    def counted(self, query, row):
        measured.append(len(row))
        return exact(self, query, row)

    monkeypatch.setattr(pair_distances.PairDistances, "exact", counted)
    found = searcher_of(rows, 8).nearest(rows[:5], k)
    assert_found(found, nearest(brute_force(rows[:5], rows, "euclidean"), k))
    assert sum(measured) == 5 * 1000


def test_pairs_that_few_of_count_are_listed_part_by_part(monkeypatch):
    monkeypatch.setattr(query_search, "MAX_CANDIDATES", 1 << 14)
    rows, listed = made_up("decaying", 2000, 16, 0), []

    def allowed(query, row):
        listed.append(len(row))
        return row < 8

    found = searcher_of(rows, 8).nearest(rows[:16], 10, allowed=allowed)
    assert (found.rows[:, :8] < 8).all()
    assert (found.rows[:, 8:] == -1).all()
    assert max(listed) <= 1 << 12


def test_flat_spectra_are_searched_in_the_rows_themselves():
    rows = made_up("flat", 500, 90, 0)
    search = searcher_of(rows, 90)
    assert search.resident_bytes == 4 * 500
    assert_found(search.nearest(rows[:3], 4), nearest(brute_force(rows[:3], rows, "euclidean"), 4))


def test_threads_may_share_a_searcher():
    """Each with a subset of its own, of which the searcher keeps the last."""
    rows = made_up("decaying", 2000, 24, 0)
    search, truth = searcher_of(rows, 8, threads=2), brute_force(rows[:4], rows, "euclidean")

    def found(step):
        return search.nearest(rows[:4], 5, rows=np.arange(0, 2000, step))

    steps = [1, 2, 7, 30] * 5
    with ThreadPoolExecutor(4) as pool:
        for step, matches in zip(steps, pool.map(found, steps), strict=True):
            assert_found(matches, nearest(truth, 5, np.broadcast_to(np.arange(2000) % step == 0, truth.shape)))


def test_a_masked_subset_takes_no_memory():
    search = searcher_of(made_up("decaying", 400, 40, 0), 8)
    size = search.resident_bytes
    assert size == 400 * (8 + 3) * 4
    search.nearest(made_up("flat", 1, 40, 1), 3, rows=np.arange(1, 400))
    assert search._subset.scan is search._scan


def test_decoded_codes_take_a_sixth_of_the_embeddings():
    rows = made_up("flat", 300, 384, 0)
    assert searcher_of(rows, 200).resident_bytes <= rows.nbytes / 6
    assert_found(searcher_of(rows, 200).nearest(rows[:3], 4), nearest(brute_force(rows[:3], rows, "euclidean"), 4))


def test_what_cannot_be_searched():
    rows = made_up("decaying", 20, 4, 0)
    search, cosine = searcher_of(rows, 2), searcher_of(rows, 2, "cosine")
    with refuses(InvalidValue, 0, name="k"):
        search.nearest(rows[:1], 0)
    for distance in (-1.0, np.nan):
        with refuses(InvalidValue, name="distance"):
            search.within(rows[:1], distance)
    with refuses(InvalidInput, "[1, 3]", expected="[N, 4]"):
        search.nearest(rows[:1, :3], 1)
    with refuses(InvalidInput, index=1):
        search.nearest(np.where([[0], [1]], np.nan, rows[:2]), 1)
    with refuses(InvalidInput, index=1):
        cosine.nearest(np.where([[0], [1]], 0, rows[:2]), 1)
    with refuses(InvalidInput, expected="float32"):
        search.nearest(np.full((1, 4), 1e40), 1)
    with refuses(InvalidValue, name="kernel"):
        searcher_of(rows, 2, kernel="cuda")
    for bad in ([-1, 3], [3, 20]):
        with refuses(InvalidInput, *bad):
            search.nearest(rows[:1], 1, rows=np.array(bad))
    rotation = Rotation.fit(rows, 2)
    with refuses(InvalidInput, 0, 20):
        ExactSearcher([rows], "euclidean", rotation, [])
    with refuses(InvalidValue, name="metric"):
        ExactSearcher([rows], "dot", rotation, [encode(rotation, rows, "euclidean")])
    with refuses(InvalidInput, 19, 20):
        ExactSearcher([rows], "euclidean", rotation, [encode(rotation, rows[:19], "euclidean")])
    with refuses(InvalidInput):
        ExactSearcher([rows], "euclidean", rotation, [encode(Rotation.fit(rows, 3), rows, "euclidean")])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("damaged_terms", "k"), [(False, 2), (True, 2), (True, 20)])
def test_a_damaged_row_hides_no_other(kernel, metric, damaged_terms, k):
    """It is told; and with terms that are no numbers, all is still found."""
    rows = made_up("decaying", 20, 4, 0)
    rotation = Rotation.fit(rows, 2, metric)
    codes = encode(rotation, rows, metric)
    if damaged_terms:
        codes.terms[4] = np.nan
        search = ExactSearcher([rows], metric, rotation, [codes], kernel=kernel)
        assert_found(search.nearest(rows[4:6], k), nearest(brute_force(rows[4:6], rows, metric), k))
        assert [len(each.rows[0]) for each in search.within(rows[4:6], np.inf)] == [20, 20]
    for bad in (np.nan, np.inf, 0) if metric == "cosine" else (np.nan, np.inf):
        held = rows.copy()
        held[4] = bad
        search = ExactSearcher([held], metric, rotation, [codes], kernel=kernel)
        with refuses(InvalidInput, "row 4", index=4):
            search.nearest(rows[4:6], k)
        with refuses(InvalidInput, "row 4", index=4):
            search.within(rows[4:6], 1e308)


def test_any_distance_may_be_asked_for():
    rows = made_up("decaying", 20, 4, 0)
    with np.errstate(all="raise"):
        for distance in (1e308, np.inf):
            assert len(searcher_of(rows, 2).within(rows[:1], distance)[0].rows[0]) == 20


@pytest.mark.parametrize("metric", METRICS)
def test_a_damaged_row_of_a_flat_spectrum_is_told(metric):
    rows = made_up("flat", 60, 90, 0)
    rotation = Rotation.fit(rows, 90, metric)
    codes = encode(rotation, rows, metric)
    rows[50, 3] = np.nan
    search = ExactSearcher([rows], metric, rotation, [codes], kernel="numpy")
    with refuses(InvalidInput, "row 50", index=50):
        search.nearest(rows[:2], 3)

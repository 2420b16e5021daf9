import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.evaluation import distances, reranking
from pmm.evaluation.distance_blocks import Blocks
from pmm.evaluation.metrics import evaluate_distances, evaluate_ranking
from pmm.evaluation.reranking import Reranking, reranked
from pmm.utils.errors import InvalidInput, InvalidValue, OutOfMemory
from tests.conftest import examples
from tests.refusals import refuses

pytestmark = pytest.mark.usefixtures("in_numpy_and_compiled")


def by_hand(query, gallery, k1=20, k2=6, weight=0.3):
    """The published procedure, literally: dense matrices in float64, one item after another. Returns [Q, G]."""
    items = np.concatenate([query, gallery]).astype(float)
    count = len(items)
    squares = np.array([((items - item) ** 2).sum(1) for item in items])
    largest = squares.max(1, keepdims=True)
    shares = np.divide(squares, largest, out=np.zeros_like(squares), where=largest > 0)
    ranking = np.argsort(squares, axis=1, kind="stable")

    def reciprocal(i, k):
        return [j for j in ranking[i, : k + 1] if i in ranking[j, : k + 1]]

    neighbourhood = np.zeros((count, count))
    for i in range(count):
        found = reciprocal(i, k1)
        expanded = set(found)
        for j in found:
            theirs = reciprocal(j, int(np.around(k1 / 2)))
            if len(set(theirs) & set(found)) > 2 / 3 * len(theirs):
                expanded |= set(theirs)
        columns = sorted(expanded)
        neighbourhood[i, columns] = np.exp(-shares[i, columns]) / np.exp(-shares[i, columns]).sum()
    averaged = np.array([neighbourhood[ranking[i, :k2]].sum(0) / min(k2, count) for i in range(count)])
    jaccard = np.empty((len(query), len(gallery)))
    for i in range(len(query)):
        for j in range(len(gallery)):
            shared = np.minimum(averaged[i], averaged[len(query) + j]).sum()
            jaccard[i, j] = 1 - shared / (2 - shared)
    return (1 - weight) * jaccard + weight * shares[: len(query), len(query) :]


def problem(seed=0, queries=12, gallery=60, dim=8, people=6, noise=0.7, dtype=np.float32):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people, dim))
    pids = [rng.integers(0, people, n) for n in (queries, gallery)]
    rows = [(centres[p] + noise * rng.normal(size=(len(p), dim))).astype(dtype) for p in pids]
    return (*rows, *pids, *(rng.integers(0, 3, n) for n in (queries, gallery)))


def whole(found):
    queries, items = np.divmod(np.arange(found.shape[0] * found.shape[1]), found.shape[1])
    return found.exact_pairs(queries, items).reshape(found.shape)


@pytest.mark.parametrize("k1", [4, 5, 6, 7, 9])
def test_half_of_the_neighbours_is_rounded_to_even_as_published(k1):
    query, gallery, *_ = problem(dtype=np.float64)
    found = reranked(query, gallery, parameters=Reranking(k1=k1, k2=2, weight=0.3))
    np.testing.assert_allclose(whole(found), by_hand(query, gallery, k1, 2, 0.3), atol=1e-9)


@examples(40)
@given(
    seed=st.integers(0, 2**31),
    queries=st.integers(1, 6),
    gallery=st.integers(1, 40),
    high=st.integers(1, 6),
    dim=st.integers(1, 3),
    k1=st.integers(1, 25),
    k2=st.integers(1, 8),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_equals_the_published_procedure(seed, queries, gallery, high, dim, k1, k2, weight, dtype):
    """On whole numbers: with ties, equal items, and fewer items than neighbours."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, high + 1, (n, dim)).astype(dtype) for n in (queries, gallery)]
    parameters = Reranking(k1=k1, k2=k2, weight=weight)
    found = reranked(*rows, parameters=parameters)
    np.testing.assert_allclose(whole(found), by_hand(*rows, k1, k2, weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_equals_it_on_features_too(metric):
    query, gallery, *_ = problem()
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows for rows in
            (query.astype(float), gallery.astype(float))]  # fmt: skip
    np.testing.assert_allclose(whole(reranked(query, gallery, metric=metric)), by_hand(*unit), atol=1e-5)


def test_it_helps_where_neighbours_agree():
    query, gallery, *labels = problem(queries=60, gallery=300, people=12, noise=0.8)
    plain, better = evaluate_ranking(query, gallery, *labels), evaluate_distances(reranked(query, gallery), *labels)
    assert better.mAP > plain.mAP + 0.02


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quick_distances_are_wrong_by_what_they_say_at_most(dtype):
    query, gallery, *_ = problem(queries=40, gallery=200, dim=64, dtype=dtype)
    found = reranked(query, gallery)
    exact = whole(found)[3:31]
    block, errors = found.approximate(slice(3, 31), np.empty((28, 200), np.float32))
    assert (np.ptp(block - exact, axis=1) <= 2 * errors).all()  # each query's may lack a constant
    assert errors.max() < 1e-4
    block, errors = found.float64(slice(3, 31))
    assert (np.ptp(block - exact, axis=1) <= 2 * errors).all()
    assert errors.max() < 1e-12
    pairs = np.array([0, 0, 7, 39]), np.array([5, 199, 0, 3])
    assert (found.exact_pairs(*pairs) == whole(found)[pairs]).all()


def test_one_result_for_any_block_and_any_number_of_threads(monkeypatch):
    query, gallery, *labels = problem(queries=40, gallery=150, dim=32, people=20)
    gallery[30:60] = gallery[:30]  # equal items
    first = reranked(query, gallery)
    expected = evaluate_distances(first, *labels)
    for queries, threads in ((1, 1), (7, 3), (64, 2)):
        within = Blocks.within
        monkeypatch.setattr(
            Blocks, "within", lambda *a, q=queries, w=within, **k: Blocks(queries=q, scratch=w(*a, **k).scratch)
        )
        monkeypatch.setattr(reranking, "ROWS_AT_ONCE", queries)
        found = reranked(query, gallery, threads=threads)
        assert (whole(found) == whole(first)).all()
        np.testing.assert_array_equal(
            evaluate_distances(found, *labels, threads=threads).per_query_ap, expected.per_query_ap
        )
        monkeypatch.undo()


def test_items_that_float32_cannot_tell_apart_are_told_apart(monkeypatch):
    rng = np.random.default_rng(0)
    query, gallery = (1 + 1e-6 * rng.normal(size=(n, 16)).astype(np.float32) for n in (10, 400))
    gallery[::2] *= -1  # in two places: float32 cannot tell them apart from the middle either
    calls = []
    original = distances.EmbeddingDistances.float64
    monkeypatch.setattr(
        distances.EmbeddingDistances, "float64", lambda self, rows: calls.append(rows) or original(self, rows)
    )
    found = reranked(query, gallery)
    assert calls, "no block was made in float64"
    np.testing.assert_allclose(whole(found), by_hand(query, gallery), atol=1e-12)


def test_everything_in_one_place():
    found = reranked(np.ones((2, 4), np.float32), np.ones((50, 4), np.float32))
    assert np.isfinite(whole(found)).all()
    np.testing.assert_allclose(whole(found), by_hand(np.ones((2, 4)), np.ones((50, 4))), atol=1e-12)


def test_memory_limits():
    query, gallery, *_ = problem(queries=30, gallery=3000, dim=2)
    with refuses(OutOfMemory, "0.001MB", expected="at least ") as refusal:
        reranked(query, gallery, memory_limit=1000)
    assert re.fullmatch(r"at least \d+MB", refusal.value.expected)
    with refuses(OutOfMemory, "4MB", "re-rank 3,030 items") as refusal:
        reranked(query, gallery, memory_limit=4_000_000)
    least = int(refusal.value.expected.removeprefix("at least ").removesuffix("MB")) * 10**6
    assert reranked(query, gallery, memory_limit=least).resident_bytes < least
    with refuses(OutOfMemory, "re-rank 3,030 items", expected=refusal.value.expected):
        reranked(query, gallery, memory_limit=least - 10**6)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"k1": 0}, "k1"),
        ({"k2": 0}, "k2"),
        ({"weight": -0.1}, "weight"),
        ({"weight": 1.1}, "weight"),
        ({"weight": float("nan")}, "weight"),
    ],
)
def test_parameters_out_of_range(wrong, name):
    with refuses(InvalidValue, *wrong.values(), name=name):
        Reranking(**wrong)


def test_bad_embeddings():
    query, gallery, *_ = problem()
    with refuses(InvalidInput, "8 dimensions", "gallery embeddings 7"):
        reranked(query, gallery[:, :7])
    gallery[3, 2] = np.nan
    with refuses(InvalidInput, "gallery", "NaN or Inf", index=3):
        reranked(query, gallery)

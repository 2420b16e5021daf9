"""The nearest are the nearest: by brute force, with ties, and where float32 and cancellation hide them."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pmm.evaluation.distance_blocks
import pmm.evaluation.embedding_matrix
from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from tests.conftest import examples

pytestmark = pytest.mark.usefixtures("in_numpy_and_compiled")


def search(embeddings: np.ndarray, queries: np.ndarray, k: int, metric: str = "euclidean"):
    """Items and distances [Q, k] as users read them."""
    matrices = (EmbeddingMatrix(rows, metric=metric) for rows in (queries, embeddings.astype(np.float32, copy=False)))
    between = EmbeddingDistances(*matrices)
    blocks = Blocks.within(MEMORY_LIMIT, between.shape, embeddings.shape[1], 1)
    items, halves, _ = nearest(between, min(k, len(embeddings)), blocks)
    return items, halves if metric == "cosine" else np.sqrt(2 * halves * between.factor)


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
        patch.setattr(pmm.evaluation.embedding_matrix, "MAX_ROWS", chunk)
        patch.setattr(pmm.evaluation.distance_blocks, "MAX_QUERIES", 2)
        items, measured = search(embeddings, asked, top, metric)
        single, _ = search(embeddings, asked[:1], top, metric)
    assert items.shape == measured.shape == (queries, min(rows, top))
    distances = exact(embeddings, asked, metric)
    # rounded for the order only: rows on one line have equal cosines but for the last bit
    order = np.argsort(distances.round(12) if metric == "euclidean" else distances, axis=1, kind="stable")[:, :top]
    np.testing.assert_allclose(measured, np.take_along_axis(distances, order, 1), atol=1e-12)
    if metric == "euclidean":
        assert np.array_equal(items, order)
    else:  # equal rows, at least, stand in the order of their index
        for near in items:
            for first, second in pairwise(near):
                assert first < second or (embeddings[first] != embeddings[second]).any()
    assert np.array_equal(single[0], items[0])


@pytest.mark.parametrize("chunk", [3, 4096])
def test_nearest_far_from_the_origin(chunk, monkeypatch):
    """|q|^2 + |g|^2 - 2 q.g has lost the digits here that tell the rows apart: the candidates must still hold them."""
    monkeypatch.setattr(pmm.evaluation.embedding_matrix, "MAX_ROWS", chunk)
    rng = np.random.default_rng(1)
    step = 2.0**17  # what float32 can tell apart at 2**40; its square is below the rounding of 256 * 2**80 in float64
    embeddings = np.full((400, 256), 2.0**40, np.float32)
    embeddings[:, :4] += step * rng.integers(0, 6, (400, 4)).astype(np.float32)
    embeddings[200:] = embeddings[:200]
    query = embeddings[7:8] + np.float32(step)
    items, _ = search(embeddings, query, 50)
    distances = exact(embeddings.astype(np.float64), query.astype(np.float64), "euclidean")[0]
    assert items[0].tolist() == np.argsort(distances, kind="stable")[:50].tolist()
    assert search(embeddings, embeddings[9:10], 1)[1][0, 0] == 0


def test_it_takes_less_memory_than_the_embeddings():
    """However many: their numbers in float64 would be twice as much."""
    embeddings = np.random.default_rng(0).normal(size=(40_000, 64)).astype(np.float32)
    tracemalloc.start()
    try:
        search(embeddings, embeddings[:8], 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < embeddings.nbytes

"""Exact search against brute force in float64."""

import numpy as np
import pytest

from pmm.evaluation.distances import EmbeddingDistances, EmbeddingMatrix
from pmm.exact_search.codes import encode
from pmm.exact_search.rotation import Rotation
from pmm.exact_search.searcher import ExactSearcher


def brute_force(queries, rows, metric):
    """Distances [Q, N] of the project, pair by pair."""
    pairs = EmbeddingDistances(EmbeddingMatrix(queries, metric=metric), EmbeddingMatrix(rows, metric=metric))
    query, row = np.divmod(np.arange(len(queries) * len(rows)), len(rows))
    return pairs.exact_pairs(query, row).reshape(len(queries), len(rows)) * pairs.factor


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("count", "dim", "r"), [(1, 1, 1), (50, 3, 2), (3000, 40, 8), (9000, 16, 16), (300, 70, 70)])
def test_same_rows_and_distances_as_brute_force(metric, count, dim, r):
    rng = np.random.default_rng(count)
    rows = (rng.normal(size=(count, dim)) * np.exp(-np.arange(dim) / 8)).astype(np.float32)
    queries = rows[:5] + np.float32(0.01)
    rotation = Rotation.fit(rows[::3], r, metric)
    searcher = ExactSearcher(
        [rows[: count // 3], rows[count // 3 :]], metric, rotation, [encode(rotation, rows, metric)]
    )
    truth = brute_force(queries, rows, metric)
    order = np.argsort(truth, axis=1, kind="stable")[:, :10]
    found = searcher.nearest(queries, 10)
    assert np.array_equal(found.rows, order)
    assert np.array_equal(found.distances, np.take_along_axis(truth, order, 1))

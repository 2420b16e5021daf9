"""The bounds on rounding hold, against float64, also where they are nearly reached."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.metrics import evaluate_ranking
from pmm.evaluation.nearest import nearest
from pmm.evaluation.rounding import DIMS_AT_ONCE, float64_error, half_squares_float32, pair_error, product_in_parts
from tests.conftest import examples

pytestmark = pytest.mark.usefixtures("in_numpy_and_compiled")
DIMS = [1, 7, 8, 9, DIMS_AT_ONCE - 1, DIMS_AT_ONCE, 2 * DIMS_AT_ONCE + 3]


def rows(rng, count, dim, kind):
    """Numbers whose sums round a lot: of very different sizes, all alike, or near one point."""
    values = rng.normal(size=(count, dim))
    if kind == "spread":
        values *= 10.0 ** rng.integers(-6, 6, (count, dim))
    elif kind == "alike":
        values = np.full((count, dim), 1 / 3) * rng.uniform(0.9, 1.1, (count, 1))
    elif kind == "close":
        values = 1 + 1e-5 * values
    return values.astype(np.float32)


@examples(40)
@given(
    seed=st.integers(0, 1 << 30),
    dim=st.sampled_from(DIMS),
    kind=st.sampled_from(["normal", "spread", "alike", "close"]),
    metric=st.sampled_from(["euclidean", "cosine"]),
    dtype=st.sampled_from([np.float32, np.float16, np.float64]),
)
def test_distances_are_wrong_by_no_more_than_they_say(seed, dim, kind, metric, dtype):
    rng = np.random.default_rng(seed)
    sides = [rows(rng, count, dim, kind if dtype != np.float16 else "normal").astype(dtype) for count in (5, 300)]
    sides[1][7] = sides[0][0]
    distances = EmbeddingDistances(*(EmbeddingMatrix(side, metric=metric) for side in sides))
    queries, items = (each.ravel() for each in np.indices((5, 300)))
    exact = distances.exact_pairs(queries, items).reshape(5, 300)
    block, errors = distances.refined(slice(0, 5), np.empty((5, 300), np.float32))
    assert (np.abs(block - exact) <= errors[:, None]).all()
    block, errors = distances.approximate(slice(0, 5), np.empty((5, 300), np.float32))
    shifted = (block - exact) - (block - exact)[:, :1]  # it may lack a constant
    assert (np.abs(shifted) <= 2 * errors[:, None]).all()
    values, close = distances.close_pairs(queries, items)
    assert (np.abs(values - exact.ravel()) <= close).all()
    assert values[7] <= close[7]


@pytest.mark.parametrize("dim", DIMS)
def test_the_bound_of_squares_is_not_far_from_what_happens(dim):
    """It holds, and is within a few orders of magnitude: a bound that leaves all open would prove nothing."""
    values = np.full((1, dim), 1 / 3, np.float32)
    exact = (values.astype(np.float64) ** 2).sum() / 2
    found = half_squares_float32(values)[0]
    assert abs(found - exact) <= pair_error(np.array([exact]), dim)[0] <= 1e-5 * exact


@pytest.mark.parametrize("dim", DIMS)
def test_a_product_in_parts_is_the_product(dim):
    queries, items = (np.random.default_rng(dim).normal(size=(n, dim)).astype(np.float32) for n in (3, 5))
    found = product_in_parts(queries, items, np.empty((2, 20), np.float32))
    np.testing.assert_allclose(found, queries.astype(float) @ items.T.astype(float), rtol=0, atol=1e-4)


def test_from_the_middle_embeddings_that_are_close_together_are_told_apart():
    """Their norms are small there, and so is the error."""
    gallery = rows(np.random.default_rng(0), 300, 64, "close")
    distances = EmbeddingDistances(EmbeddingMatrix(gallery[:4]), EmbeddingMatrix(gallery))
    out = np.empty((4, 300), np.float32)
    coarse = distances.approximate(slice(0, 4), out)[1]
    assert (distances.refined(slice(0, 4), out)[1] < 1e-6 * coarse).all()


CONSTANT = np.full((64, 2048), 1 / 3, np.float32) * np.linspace(0.5, 2, 64, dtype=np.float32)[:, None]
"""Rows whose squares, added up one by one in float32, all round to one side."""


@pytest.mark.parametrize("scale", [0, 1e-6, 1e-3, 1])
def test_the_bounds_hold_for_a_query_that_is_small_beside_long_rows(scale):
    """Where |q| |g| is nothing, what is left is the rounding of the squares."""
    query = scale * np.random.default_rng(0).normal(size=(4, 2048)).astype(np.float32)
    distances = EmbeddingDistances(EmbeddingMatrix(query), EmbeddingMatrix(CONSTANT))
    queries, items = (each.ravel() for each in np.indices((4, 64)))
    exact = distances.exact_pairs(queries, items).reshape(4, 64)
    block, errors = distances.approximate(slice(0, 4), np.empty((4, 64), np.float32))
    off = block - exact + (query.astype(np.float64) ** 2).sum(1)[:, None] / 2  # the constant that it lacks
    assert (np.abs(off) <= errors[:, None]).all()
    for closer in (distances.refined(slice(0, 4), np.empty((4, 64), np.float32)), distances.float64(slice(0, 4))):
        assert (np.abs(closer[0] - exact) <= closer[1][:, None]).all()


@pytest.mark.parametrize("dim", [1, 2, 384, 8192])
def test_the_bound_of_float64_grants_each_sum_its_rounding(dim):
    """However numpy adds up: a sum of D terms one by one may be off by D units, in both squares and in the product."""
    unit, norms = 2.0**-53, np.array([0.0, 1e-3, 1.0])
    sums = (dim - 1) * unit * (norms**2 / 2 + 1 / 2 + norms)
    assert (float64_error(norms, 1.0, dim) >= sums + (dim - 1) * unit * (norms + 1) ** 2 / 2).all()


@pytest.mark.parametrize("longer", [1 - 1e-6, 1 + 1e-6])
def test_rows_of_nearly_one_norm_are_ranked_as_they_are(longer):
    """A constant row, whose norm rounds most, and another that is a little shorter or longer."""
    constant, other = np.full(2048, 0.7, np.float32), np.random.default_rng(3).normal(size=2048)
    other *= longer * np.linalg.norm(constant.astype(np.float64)) / np.linalg.norm(other)
    query, gallery = np.zeros((1, 2048), np.float32), np.stack([constant, other.astype(np.float32)])
    distances = EmbeddingDistances(EmbeddingMatrix(query), EmbeddingMatrix(gallery))
    exact = distances.exact_pairs(np.zeros(2, np.int64), np.arange(2))
    items, _, _ = nearest(distances, 1, Blocks.within(MEMORY_LIMIT, (1, 2), 2048, 1))
    assert items[0, 0] == exact.argmin() == (longer < 1)
    ranking = evaluate_ranking(query, gallery, [0], [0, 1], [0], [1, 1])
    assert ranking.first_rank[0] == 1 + (longer < 1)

"""The compiled functions do what numpy does, on each instruction set that this processor has."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.evaluation import compiled, distances, ranks
from pmm.evaluation.compiled import DIMS_AT_ONCE, RankKernel, rank_kernels
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.metrics import evaluate_ranking
from pmm.evaluation.rounding import pair_error_float64, refined_error
from pmm.evaluation.windows import DistanceWindows, NumpyWindowCounts
from pmm.utils.build_info import SOURCES
from tests.conftest import examples
from tests.evaluation.test_metrics import close_together, people, two_crowds
from tests.search_library import required_library


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with required_library():
        found = rank_kernels()
        if not found:
            pytest.skip("no instruction set here that ranks are compiled for")
        yield found


def halves(rows):
    return (np.einsum("nd,nd->n", rows, rows, dtype=np.float64) / 2).astype(np.float32)


@examples(60)
@given(
    queries=st.integers(1, 40),
    items=st.integers(1, 90),
    dim=st.sampled_from([0, 1, 3, DIMS_AT_ONCE - 1, DIMS_AT_ONCE, 2 * DIMS_AT_ONCE + 5, 700]),
    seed=st.integers(0, 1 << 30),
)
def test_half_distances_are_as_close_as_their_bound_says(kernels, queries, items, dim, seed):
    rng = np.random.default_rng(seed)
    query, item = (rng.normal(size=(count, dim)).astype(np.float32) for count in (queries, items))
    centre = rng.normal(size=dim).astype(np.float32)
    centred = item - centre
    exact = ((query[:, None].astype(float) - centred) ** 2).sum(2) / 2
    norms = [np.linalg.norm(rows.astype(float), axis=1) for rows in (query, centred)]
    bound = refined_error(norms[0], float(norms[1].max()), dim, DIMS_AT_ONCE)
    for kernel in kernels:
        out = np.full((queries, items + 3), np.nan, np.float32)
        kernel.half_distances(query, halves(query), item, halves(centred), centre, out[:, 2 : 2 + items])
        assert (np.abs(out[:, 2 : 2 + items] - exact) <= bound[:, None]).all()
        assert np.isnan(out[:, [0, 1, -1]]).all()


@pytest.mark.parametrize("dim", [1, 15, 16, 33, 500])
def test_half_squares_depend_on_their_pair_alone(kernels, dim):
    rng = np.random.default_rng(dim)
    wide = rng.normal(size=(60, dim + 7)).astype(np.float32)
    parts = wide[:20, :dim], wide[:20:-2, 3 : 3 + dim]  # rows that lie apart, also backwards
    side = EmbeddingMatrix(*parts)
    assert side.is_float32
    rows = np.concatenate(parts).astype(float)
    first, second = rng.integers(0, len(rows), (2, 300))
    second[:5] = first[:5]
    exact = np.einsum("pd,pd->p", rows[first] - rows[second], rows[first] - rows[second]) / 2
    if dim == 1:  # numpy may give any step between the numbers of a row that has one
        side = EmbeddingMatrix(*map(np.ascontiguousarray, parts))
    addresses = side.addresses(first), side.addresses(second)
    for kernel in kernels:
        found = kernel.half_squares(*addresses, dim)
        assert (np.abs(found - exact) <= pair_error_float64(found, dim)).all()
        assert (found[:5] == 0).all()
        again = kernel.half_squares(*(lie[::-1].copy() for lie in addresses), dim)[::-1]
        np.testing.assert_array_equal(found, again)


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        (np.ones((4, 6), np.float64), "euclidean"),
        (np.ones((4, 6), np.float32), "cosine"),
        (np.ones((4, 12), np.float32)[:, ::2], "euclidean"),
        (np.ones((6, 4), np.float32).T, "euclidean"),
        (np.frombuffer(bytes(97), np.float32, 24, 1).reshape(4, 6), "euclidean"),
    ],
    ids=["float64", "cosine", "every other", "transposed", "not aligned"],
)
def test_rows_that_do_not_lie_side_by_side_in_float32_have_no_address(rows, metric):
    assert EmbeddingMatrix(rows, metric=metric).addresses(np.arange(2)) is None


@st.composite
def windows(draw):
    """A block of distances with ties and junk, and of each query some windows, ascending, that may overlap."""
    queries, items = draw(st.integers(1, 5)), draw(st.sampled_from([1, 15, 64, 700, 4097]))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    levels = draw(st.sampled_from([3, 50, 10_000]))
    block = rng.integers(0, levels, (queries, items)).astype(np.float32)
    block[rng.random(block.shape) < 0.1] = np.inf
    counts = rng.integers(0, draw(st.sampled_from([3, 40, 130])), queries)
    bounds = np.concatenate([[0], counts.cumsum()])
    values = np.concatenate([np.sort(rng.integers(0, levels, count)) for count in counts]).astype(np.float32)
    width = np.float32(draw(st.sampled_from([0, 0.5, 3])))
    return block, bounds, values - width, values + width


@examples(80)
@given(windows())
def test_counts_are_those_of_comparing_each_pair(kernels, problem):
    block, bounds, low, high = problem
    rows = block[np.repeat(np.arange(len(block)), np.diff(bounds))]
    for counts in (NumpyWindowCounts(), *kernels):
        before, upto = counts.count(block, DistanceWindows(bounds, low, high))
        assert before.tolist() == (rows < low[:, None]).sum(1).tolist()
        assert upto.tolist() == (rows <= high[:, None]).sum(1).tolist()


@examples(80)
@given(windows())
def test_what_is_within_windows_is_found_in_order(kernels, problem):
    block, bounds, low, high = problem
    query = np.repeat(np.arange(len(block)), np.diff(bounds))
    apart = np.ones(len(low), bool)
    apart[1:] = (query[1:] != query[:-1]) | (low[1:] > np.maximum.accumulate(high)[:-1])
    low, high, query = low[apart], high[apart], query[apart]
    bounds = np.searchsorted(query, np.arange(len(block) + 1))
    inside = np.zeros(block.shape, bool)
    for row, first, last in zip(query, low, high, strict=True):
        inside[row] |= (block[row] >= first) & (block[row] <= last)
    for counts in (NumpyWindowCounts(), *kernels):
        found = counts.within(block, DistanceWindows(bounds, low, high), int(inside.sum()))
        assert found.tolist() == np.flatnonzero(inside).tolist()


def crowd(**sizes):
    """Few identities: of each query more relevant items than windows that are looked at one by one."""
    return people(ids=3, **sizes)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("make", [people, close_together, two_crowds, crowd])
def test_a_ranking_is_the_same_with_and_without_them(kernels, monkeypatch, make, metric):
    problem = make(queries=60, gallery=500, dim=150)
    results = []
    for kernel in (None, *kernels):
        for module in (distances, ranks):
            monkeypatch.setattr(module, "rank_kernel", lambda kernel=kernel: kernel)
        results.append(evaluate_ranking(*problem, metric=metric))
    for result in results[1:]:
        np.testing.assert_array_equal(result.per_query_ap, results[0].per_query_ap)
        np.testing.assert_array_equal(result.per_query_inp, results[0].per_query_inp)


def test_blocks_come_from_any_layout_of_the_gallery(kernels, monkeypatch):
    query, gallery, *_ = people(queries=20, gallery=300)
    sides = [
        EmbeddingMatrix(gallery),
        EmbeddingMatrix(gallery[:100], gallery[100:], scratch=1 << 16),
        EmbeddingMatrix(np.asfortranarray(gallery)),
        EmbeddingMatrix(gallery.astype(np.float64)),
    ]
    for kernel in kernels:
        monkeypatch.setattr(distances, "rank_kernel", lambda kernel=kernel: kernel)
        for side in sides:
            of = EmbeddingDistances(EmbeddingMatrix(query), side)
            block, errors = of.refined(slice(3, 17), np.empty((14, 300), np.float32))
            assert (np.abs(block - of.float64(slice(3, 17))[0]) <= 2 * errors[:, None]).all()


def test_sizes_are_those_of_the_sources():
    text = (SOURCES / "search" / "search.h").read_text()
    assert int(re.findall(r"kDimsAtOnce = (\d+);", text)[0]) == compiled.DIMS_AT_ONCE


def test_a_kernel_that_finds_no_memory_says_so(kernels, monkeypatch):
    class Full:
        @staticmethod
        def pmm_search_half_distances(*_):
            return -1

    monkeypatch.setattr(RankKernel, "__init__", lambda self: vars(self).update(_library=Full(), _path=0))
    one = np.ones((1, 1), np.float32)
    with pytest.raises(MemoryError):
        RankKernel().half_distances(one, one[0], one, one[0], one[0], one)

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pmm.evaluation import distance_blocks, distances
from pmm.evaluation.compiled import rank_kernel
from pmm.evaluation.distance_blocks import Blocks
from pmm.evaluation.metrics import evaluate_distances, evaluate_ranking
from pmm.utils.errors import InvalidInput, InvalidValue, OutOfMemory
from tests.conftest import examples
from tests.refusals import refuses

pytestmark = pytest.mark.usefixtures("in_numpy_and_compiled")


def by_hand(q, g, q_pids, g_pids, q_cams, g_cams, ap="standard"):
    """The definitions, literally: one sorted list per query."""
    aps, inps, firsts = [], [], []
    for i in range(len(q)):
        d = ((g - q[i]) ** 2).sum(1)
        listed = [j for j in sorted(range(len(g)), key=lambda j: (d[j], j))
                  if not (g_pids[j] == q_pids[i] and g_cams[j] == q_cams[i])]  # fmt: skip
        ranks = [r for r, j in enumerate(listed, 1) if g_pids[j] == q_pids[i]]
        if not ranks:
            continue
        total = 0.0
        for hits, rank in enumerate(ranks, 1):
            if ap == "standard":
                total += hits / rank
            elif ap == "trapezoid":
                total += (hits / rank + (1.0 if rank == 1 else (hits - 1) / (rank - 1))) / 2
            elif rank <= 50:
                total += hits / rank
        aps.append(total / len(ranks))
        inps.append(len(ranks) / ranks[-1])
        firsts.append(ranks[0])
    return aps, inps, firsts


@st.composite
def problems(draw):
    """Integer-valued embeddings with many ties; distractors, same-camera items, queries without a match."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    queries, gallery = draw(st.integers(1, 6)), draw(st.integers(1, 90))
    high, dim = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    people = draw(st.integers(1, 5))
    return (
        rng.integers(0, high + 1, (queries, dim)).astype(float),
        rng.integers(0, high + 1, (gallery, dim)).astype(float),
        rng.integers(1, people + 1, queries),
        rng.integers(0, people + 1, gallery),
        rng.integers(0, 3, queries),
        rng.integers(0, 3, gallery),
    )


@pytest.mark.parametrize("ap", ["standard", "trapezoid", "truncated50"])
@examples(120)
@given(
    problem=problems(),
    dtype=st.sampled_from([np.float32, np.float64, np.int64]),
    given_distances=st.booleans(),
    queries=st.integers(1, 8),
)
def test_equals_the_definitions(problem, ap, dtype, given_distances, queries):
    aps, inps, firsts = by_hand(*problem, ap=ap)
    assume(aps)
    query, gallery, *labels = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distance_blocks, "MAX_QUERIES", queries)
        if given_distances:
            matrix = ((query[:, None] - gallery) ** 2).sum(2)
            result = evaluate_distances(matrix.astype(dtype), *labels, ap=ap, max_rank=10)
        else:
            result = evaluate_ranking(query.astype(dtype), gallery.astype(dtype), *labels, ap=ap, max_rank=10)
    assert result.mAP == pytest.approx(np.mean(aps), abs=1e-9)
    assert result.mINP == pytest.approx(np.mean(inps), abs=1e-9)
    assert result.skipped == len(problem[0]) - len(aps)
    np.testing.assert_allclose(result.per_query_ap[~np.isnan(result.per_query_ap)], aps, atol=1e-9)
    np.testing.assert_allclose(result.per_query_inp[~np.isnan(result.per_query_inp)], inps, atol=1e-9)
    assert (np.isnan(result.per_query_inp) == (result.first_rank == 0)).all()
    np.testing.assert_allclose(result.cmc, [np.mean([f <= r for f in firsts]) for r in range(1, 11)], atol=1e-9)
    assert result.rank1 == result.cmc[0]


def test_a_worked_example():
    # distances 1..5 to the query at 0; relevant at ranks 1 and 4, one same-camera item removed before
    gallery = np.array([[1.0], [2], [3], [4], [0.5]])
    result = evaluate_ranking([[0.0]], gallery, [7], [7, 1, 0, 7, 7], [0], [1, 1, 1, 2, 0])
    assert result.mAP == pytest.approx((1 / 1 + 2 / 4) / 2)
    assert result.mINP == pytest.approx(2 / 4)
    assert evaluate_ranking([[0.0]], gallery, [7], [7, 1, 0, 7, 7], [0], [1, 1, 1, 2, 0], ap="trapezoid").mAP == (
        pytest.approx(((1 + 1) / 2 + (2 / 4 + 1 / 3) / 2) / 2)
    )


@pytest.mark.parametrize(("rank", "expected"), [(49, 1 / 49), (50, 1 / 50), (51, 0.0)])
def test_the_fiftieth_rank_is_the_last_that_counts(rank, expected):
    pids = np.where(np.arange(60) == rank - 1, 7, 1)
    labels = ([7], pids, [0], np.ones(60, int))
    found = evaluate_ranking([[0.0]], np.arange(1.0, 61.0)[:, None], *labels, ap="truncated50")
    assert found.mAP == pytest.approx(expected, abs=1e-12)


def test_ties_go_to_the_lower_gallery_index():
    same = np.zeros((3, 2))
    assert evaluate_ranking(same[:1], same, [1], [2, 1, 2], [0], [1, 1, 1]).first_rank.tolist() == [2]
    assert evaluate_ranking(same[:1], same, [1], [1, 2, 2], [0], [1, 1, 1]).first_rank.tolist() == [1]


def test_torch_and_numpy_agree_and_many_queries_run_in_chunks():
    rng = np.random.default_rng(0)
    q, g = rng.normal(size=(600, 8)).astype(np.float32), rng.normal(size=(40, 8)).astype(np.float32)
    ids = [rng.integers(1, 4, n) for n in (600, 40)] + [rng.integers(0, 2, n) for n in (600, 40)]
    a = evaluate_ranking(q, g, *ids)
    b = evaluate_ranking(torch.from_numpy(q), torch.from_numpy(g), *map(torch.from_numpy, ids))
    assert a.mAP == b.mAP
    assert a.mAP == pytest.approx(np.mean(by_hand(q.astype(float), g.astype(float), *ids)[0]), abs=1e-9)


def people(seed=0, queries=200, gallery=900, dim=48, ids=30, noise=1.0, dtype=np.float32):
    """Embeddings as a trained network's: above zero, clustered, some of the gallery twice."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(ids + 1, dim))
    pids = rng.integers(1, ids + 1, queries), rng.integers(0, ids + 1, gallery)
    rows = [np.maximum(centres[p] + noise * rng.normal(size=(len(p), dim)), 0).astype(dtype) for p in pids]
    rows[1][gallery // 2 : gallery // 2 + 50] = rows[1][:50]
    return (*rows, *pids, *(rng.integers(0, 4, n) for n in (queries, gallery)))


def close_together(seed=0, scale=1e-6, **sizes):
    """As an untrained network's: float32 products cannot tell them apart."""
    query, gallery, *labels = people(seed, **sizes)
    return (1 + scale * query).astype(np.float32), (1 + scale * gallery).astype(np.float32), *labels


def two_crowds(seed=0, **sizes):
    """Close together in two places: float32 cannot tell them apart from the middle of the gallery either."""
    query, gallery, *labels = close_together(seed, **sizes)
    gallery[::2] *= -1
    return query, gallery, *labels


@pytest.mark.parametrize(
    "problem",
    [people(), people(dtype=np.float64), close_together(), two_crowds()],
    ids=["32", "64", "close", "crowds"],
)
def test_features_equal_the_definitions(problem):
    wide = [rows.astype(float) for rows in problem[:2]]
    result = evaluate_ranking(*problem)
    aps, inps, _ = by_hand(*wide, *problem[2:])
    assert result.mAP == pytest.approx(np.mean(aps), abs=1e-9)
    assert result.mINP == pytest.approx(np.mean(inps), abs=1e-9)


@pytest.mark.parametrize(
    ("make", "used"),
    [(people, set()), (close_together, {"refined"}), (two_crowds, {"refined", "float64"})],
)
def test_each_way_settles_what_it_can_and_the_next_the_rest(monkeypatch, make, used, in_numpy_and_compiled):
    if in_numpy_and_compiled and rank_kernel().outruns_blas:
        used = used | {"refined"}  # which is then the first
    called = set()
    ways = distances.EmbeddingDistances.refined, distances.EmbeddingDistances.float64
    for way in ways:

        def spy(self, *block, way=way):
            called.add(way.__name__)
            return way(self, *block)

        monkeypatch.setattr(distances.EmbeddingDistances, way.__name__, spy)
    evaluate_ranking(*make())
    assert called == used


@pytest.mark.parametrize("make", [people, close_together, two_crowds])
def test_the_result_depends_neither_on_memory_nor_on_threads(monkeypatch, make):
    problem = make(dim=400, queries=50, gallery=300)
    expected = evaluate_ranking(*problem, threads=1)
    for queries, chunk, threads in ((1, 1, 1), (7, 100, 3), (64, 333, 2)):
        monkeypatch.setattr(
            Blocks, "within", lambda *a, q=queries, c=chunk, **k: Blocks(queries=q, scratch=c * 32 * 400)
        )
        found = evaluate_ranking(*problem, threads=threads)
        np.testing.assert_array_equal(found.per_query_ap, expected.per_query_ap)
        np.testing.assert_array_equal(found.first_rank, expected.first_rank)


@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e14, 1e37])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_embeddings_of_any_size(factor, metric):
    query, gallery, *labels = people(queries=40, gallery=200)
    expected = evaluate_ranking(query, gallery, *labels, metric=metric)
    factor = 2.0 ** np.round(np.log2(factor))  # exactly, so that nothing but under- and overflow could matter
    scaled = [(rows / 8 * np.float32(factor)) for rows in (query, gallery)]
    np.testing.assert_array_equal(evaluate_ranking(*scaled, *labels, metric=metric).per_query_ap, expected.per_query_ap)
    wider = [rows.astype(float) * factor**8 for rows in (query, gallery)]
    if np.isfinite(wider[0]).all() and wider[0].any(1).all() and wider[1].any(1).all():
        np.testing.assert_array_equal(
            evaluate_ranking(*wider, *labels, metric=metric).per_query_ap, expected.per_query_ap
        )


def test_everything_equal_is_ranked_by_index():
    result = evaluate_ranking(
        np.ones((300, 16), np.float32), np.ones((4000, 16), np.float32),
        np.full(300, 3), np.arange(4000) % 5, np.zeros(300), np.ones(4000),
    )  # fmt: skip
    hits = np.arange(1, 801)
    assert result.mAP == pytest.approx(np.mean(hits / (hits * 5 - 1)), abs=1e-12)


def test_cosine_ranks_by_angle():
    gallery = np.array([[0.1, 0.1], [100.0, 1.0]])
    labels = [1], [2, 1], [0], [1, 1]
    assert evaluate_ranking([[1.0, 0.0]], gallery, *labels, metric="cosine").first_rank.tolist() == [1]
    assert evaluate_ranking([[1.0, 0.0]], gallery, *labels).first_rank.tolist() == [2]
    with refuses(InvalidInput, "gallery", "all zero", "cosine", index=1):
        evaluate_ranking([[1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], *labels, metric="cosine")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cosine_is_the_ranking_of_embeddings_of_length_1(dtype):
    query, gallery, *labels = people(queries=60, gallery=300)
    unit = [rows / np.linalg.norm(rows.astype(float), axis=1, keepdims=True) for rows in (query, gallery)]
    aps, _, firsts = by_hand(*unit, *labels)
    found = evaluate_ranking(query.astype(dtype), gallery.astype(dtype), *labels, metric="cosine")
    np.testing.assert_allclose(found.per_query_ap[found.first_rank > 0], aps, atol=1e-9)
    assert found.first_rank[found.first_rank > 0].tolist() == firsts
    assert found.mAP != evaluate_ranking(query, gallery, *labels).mAP


def test_half_floats():
    query, gallery, *labels = people(queries=30, gallery=100, dtype=np.float16)
    expected = evaluate_ranking(query.astype(float), gallery.astype(float), *labels)
    np.testing.assert_array_equal(evaluate_ranking(query, gallery, *labels).per_query_ap, expected.per_query_ap)
    tensors = [torch.from_numpy(rows).bfloat16() for rows in (query, gallery)]
    found = evaluate_ranking(*tensors, *labels)
    assert found.mAP == evaluate_ranking(*(rows.double() for rows in tensors), *labels).mAP


def test_a_memory_limit_is_kept_to_or_refused():
    problem = people(queries=100, gallery=20_000, dim=8)  # all distances at once would be twice the limit
    expected = evaluate_ranking(*problem)
    with refuses(OutOfMemory, "0.001MB", "100 queries", "20,000 gallery") as refusal:
        evaluate_ranking(*problem, memory_limit=1000, threads=1)
    least = int(refusal.value.expected.removeprefix("at least ").removesuffix("MB")) * 10**6
    tracemalloc.start()
    found = evaluate_ranking(*problem, memory_limit=least, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= least
    np.testing.assert_array_equal(found.per_query_ap, expected.per_query_ap)
    with refuses(OutOfMemory, "100 queries", expected=refusal.value.expected):
        evaluate_ranking(*problem, memory_limit=least - 10**6, threads=1)


@pytest.mark.parametrize("make", [close_together, two_crowds])
@pytest.mark.parametrize("times", [1, 4])
def test_a_memory_limit_is_kept_to_where_much_is_open(make, times):
    problem = make(queries=60, gallery=6000, dim=8)
    with refuses(OutOfMemory) as refusal:
        evaluate_ranking(*problem, memory_limit=1000, threads=1)
    limit = times * int(refusal.value.expected.removeprefix("at least ").removesuffix("MB")) * 10**6
    tracemalloc.start()
    evaluate_ranking(*problem, memory_limit=limit, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= limit


GOOD = ([[0.0, 1.0]], [[0.0, 1.0]], [1], [1], [0], [1])


@pytest.mark.parametrize(
    ("position", "value", "facts"),
    [
        (0, [[0.0, float("nan")]], ("query", "1 of 1", "NaN or Inf", "row 0")),
        (1, [[0.0, float("inf")]], ("gallery", "1 of 1", "NaN or Inf")),
        (1, [[0.0]], ("2 dimensions", "gallery embeddings 1")),
        (0, [[0.0, 1.0], [1.0, 0.0]], ("query", "embeddings [2, 2]", "pids [1]")),
        (0, [0.0, 1.0], ("query", "embeddings [2]")),
        (2, [1, 2], ("query", "pids [2]", "camids [1]")),
        (5, [0], ("no query", "relevant")),
        (3, [2], ("no query", "relevant")),
    ],
)
def test_bad_input_is_one_line(position, value, facts):
    arguments = list(GOOD)
    arguments[position] = value
    with refuses(InvalidInput, *facts):
        evaluate_ranking(*arguments)


@pytest.mark.parametrize(
    ("option", "expected"),
    [({"ap": "mine"}, "trapezoid"), ({"metric": "hamming"}, "euclidean or cosine"), ({"max_rank": 0}, "at least 1")],
)
def test_unknown_options(option, expected):
    ((name, value),) = option.items()
    with refuses(InvalidValue, name=name, value=value, expected=expected):
        evaluate_ranking(*GOOD, **option)


@pytest.mark.parametrize(
    ("matrix", "facts"),
    [([[0.0, 1.0]], ("[1, 2]", "[1, 1]")), ([[np.nan]], ("NaN or Inf", "query 0")), ([0.0], ("[1]", "[Q, G]"))],
)
def test_bad_distances(matrix, facts):
    with refuses(InvalidInput, *facts):
        evaluate_distances(matrix, *GOOD[2:])

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pmm.errors import UserError
from pmm.metrics import distance_matrix, evaluate_ranking


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
@settings(max_examples=120, deadline=None)
@given(problem=problems())
def test_equals_the_definitions(problem, ap):
    aps, inps, firsts = by_hand(*problem, ap=ap)
    assume(aps)
    result = evaluate_ranking(*problem, ap=ap, max_rank=10)
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


def test_cosine_ranks_by_angle():
    q, g = np.array([[1.0, 0.0]]), np.array([[0.1, 0.1], [100.0, 1.0]])
    assert distance_matrix(q, g, "cosine").argmin() == 1
    assert distance_matrix(q, g, "euclidean").argmin() == 0
    with pytest.raises(UserError, match="all zero"):
        distance_matrix(np.zeros((1, 2)), g, "cosine")


GOOD = ([[0.0, 1.0]], [[0.0, 1.0]], [1], [1], [0], [1])


@pytest.mark.parametrize(
    ("position", "value", "text"),
    [
        (0, [[0.0, float("nan")]], "query: 1 of 1 embeddings hold NaN or Inf, the first is row 0"),
        (1, [[0.0, float("inf")]], "gallery: 1 of 1"),
        (1, [[0.0]], "query embeddings have 2 dimensions, gallery embeddings 1"),
        (2, [1, 2], "query: embeddings"),
        (5, [0], "no query has a relevant gallery item"),
        (3, [2], "no query has a relevant gallery item"),
    ],
)
def test_bad_input_is_one_line(position, value, text):
    arguments = list(GOOD)
    arguments[position] = value
    with pytest.raises(UserError, match=text):
        evaluate_ranking(*arguments)


@pytest.mark.parametrize("option", [{"ap": "mine"}, {"metric": "hamming"}, {"max_rank": 0}])
def test_unknown_options(option):
    with pytest.raises(UserError):
        evaluate_ranking(*GOOD, **option)

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pmm.evaluation import distance_blocks
from pmm.evaluation.metrics import evaluate_ranking
from pmm.evaluation.parity import ranking
from pmm.evaluation.parity.labels import QueryGallery
from pmm.evaluation.parity.ranking import first_items, kendall_tau_b, ranking_parity
from pmm.utils.errors import InvalidInput
from tests.conftest import examples
from tests.evaluation.parity.problems import (
    evaluable,
    labels_of,
    off_by,
    people,
    problems,
    ranked,
    same_person,
    shuffled,
    square,
    turned,
)
from tests.refusals import refuses


def tau_b(a, b):
    """Kendall's tau-b by its textbook terms: concordant and discordant pairs, and groups of ties."""
    pairs = [(i, j) for i in range(len(a)) for j in range(i)]
    score = sum((1 if (a[i] < a[j]) == (b[i] < b[j]) else -1) for i, j in pairs if a[i] != a[j] and b[i] != b[j])
    untied = [
        len(pairs) - sum(n * (n - 1) // 2 for n in (list(values).count(v) for v in set(values))) for values in (a, b)
    ]
    if 0 in untied:
        return 1.0 if untied == [0, 0] else 0.0
    return score / math.sqrt(untied[0] * untied[1])


def by_hand(reference, candidate, labels):
    """The definitions, literally: two sorted lists per query."""
    lost = gained = changed = 0
    overlaps, taus = [], []
    for q in evaluable(labels):
        before, after = ranked(reference, labels, q), ranked(candidate, labels, q)
        right_before, right = same_person(labels, q, before[0]), same_person(labels, q, after[0])
        lost += right_before and not right
        gained += right and not right_before
        changed += before[0] != after[0]
        overlaps.append(len(set(before[:10]) & set(after[:10])) / min(10, len(before)))
        first = before[:50]
        taus.append(tau_b([square(reference, q, g) for g in first], [square(candidate, q, g) for g in first]))
    return lost, gained, changed, overlaps, taus


@examples(150)
@given(problem=problems())
def test_equals_the_definitions(problem):
    lost, gained, changed, overlaps, taus = by_hand(*problem)
    if not overlaps:
        with refuses(InvalidInput, "no query", "relevant"):
            ranking_parity(*problem)
        return
    found = ranking_parity(*problem)
    assert (found.rank1_lost, found.rank1_gained, found.top1_changed) == (lost, gained, changed)
    assert found.queries == len(overlaps)
    assert found.top10_overlap == pytest.approx(np.mean(overlaps), abs=1e-12)
    assert found.kendall_tau == pytest.approx(np.mean(taus), abs=1e-12)


@examples(80)
@given(problem=problems(), count=st.sampled_from([1, 3, 10, 50, 100]), seed=st.integers(0, 99))
def test_first_items_are_the_head_of_the_sorted_list(problem, count, seed):
    embedded, _, labels = problem
    queries = np.random.default_rng(seed).integers(0, len(embedded.query), 3).tolist()
    found = first_items(embedded, labels, queries, count)
    assert found.shape == (3, count)
    for query, items in zip(queries, found.tolist(), strict=True):
        expected = ranked(embedded, labels, query)[:count]
        assert items == expected + [-1] * (count - len(expected))


def test_first_items_of_no_query():
    embedded, labels = people()
    assert first_items(embedded, labels, (), 5).shape == (0, 5)


@examples(50)
@given(problem=problems())
def test_identical_embeddings_rank_identically(problem):
    reference, _, labels = problem
    assume(evaluable(labels))
    found = ranking_parity(reference, reference, labels)
    assert (found.rank1_lost, found.rank1_gained, found.top1_changed) == (0, 0, 0)
    assert (found.top10_overlap, found.kendall_tau) == (1.0, 1.0)


def test_by_hand():
    # the reference ranks items 0, 1, 2, the candidate 1, 0, 2; item 3, the nearest to the query at 0, is junk
    labels = labels_of([5], [5, 0, 6, 5], [0], [1, 1, 0, 0])
    reference = QueryGallery(np.array([[0.0]]), np.array([[1.0], [2.0], [3.0], [0.5]]))
    candidate = QueryGallery(np.array([[0.0]]), np.array([[2.0], [1.0], [3.0], [0.5]]))
    found = ranking_parity(reference, candidate, labels)
    assert (found.rank1_lost, found.rank1_gained, found.top1_changed, found.queries) == (1, 0, 1, 1)
    assert found.top10_overlap == 1.0
    assert found.kendall_tau == pytest.approx(1 / 3)  # two pairs of three keep their order
    found = ranking_parity(candidate, reference, labels)
    assert (found.rank1_lost, found.rank1_gained) == (0, 1)


def test_overlap_is_of_ten_and_order_of_fifty():
    distance = np.arange(1.0, 61)[:, None]
    labels = labels_of([1], [1] * 60, [0], [1] * 60)
    reference = QueryGallery(np.zeros((1, 1)), distance)

    def swapped(i, j):
        order = np.arange(60)
        order[[i, j]] = order[[j, i]]
        return ranking_parity(reference, QueryGallery(np.zeros((1, 1)), distance[order]), labels)

    assert swapped(9, 10).top10_overlap == 0.9
    assert swapped(8, 9).top10_overlap == 1.0
    assert swapped(48, 49).kendall_tau == pytest.approx(1 - 2 / (50 * 49 / 2))
    assert swapped(50, 51).kendall_tau == 1.0
    assert swapped(48, 49).top1_changed == swapped(1, 2).top1_changed == 0


def test_a_first_item_may_change_and_stay_right():
    labels = labels_of([1], [1, 1], [0], [1, 1])
    found = ranking_parity(
        QueryGallery(np.zeros((1, 1)), np.array([[1.0], [2.0]])),
        QueryGallery(np.zeros((1, 1)), np.array([[2.0], [1.0]])),
        labels,
    )
    assert (found.top1_changed, found.rank1_lost, found.rank1_gained, found.kendall_tau) == (1, 0, 0, -1.0)


@examples(200)
@given(values=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_kendall_tau_b_equals_its_terms(values):
    a, b = (np.array([pair[side] for pair in values], float) for side in (0, 1))
    assert kendall_tau_b(a, b) == pytest.approx(tau_b(a.tolist(), b.tolist()), abs=1e-12)
    assert kendall_tau_b(a, -b) == pytest.approx(-kendall_tau_b(a, b) if len({*a}) > 1 < len({*b}) else tau_b(a, b))


def test_kendall_tau_b_where_it_is_not_defined_elsewhere():
    one, tied, rising = np.ones(1), np.ones(4), np.arange(4.0)
    assert kendall_tau_b(one[:0], one[:0]) == kendall_tau_b(one, one) == kendall_tau_b(tied, tied) == 1.0
    assert kendall_tau_b(tied, rising) == kendall_tau_b(rising, tied) == 0.0
    # scipy.stats.kendalltau([12, 2, 1, 12, 2], [1, 4, 7, 1, 0]), from its manual
    assert kendall_tau_b(np.array([12.0, 2, 1, 12, 2]), np.array([1.0, 4, 7, 1, 0])) == pytest.approx(-0.4714045)


def test_more_queries_than_a_block_and_agreement_with_evaluate_ranking():
    reference, labels = people(queries=600, gallery=80, noise=2.0)
    candidate = off_by(reference, 0.4)
    found = ranking_parity(reference, candidate, labels)
    args = (labels.query_pids, labels.gallery_pids, labels.query_camids, labels.gallery_camids)
    before, after = (evaluate_ranking(*side, *args).first_rank for side in (reference, candidate))
    assert found.rank1_lost == ((before == 1) & (after != 1)).sum() > 0
    assert found.rank1_gained == ((before != 1) & (after == 1)).sum() > 0
    assert found.queries == (before > 0).sum()
    lost, gained, changed, overlaps, taus = by_hand(reference, candidate, labels)
    assert (found.rank1_lost, found.rank1_gained, found.top1_changed) == (lost, gained, changed)
    assert (found.top10_overlap, found.kendall_tau) == pytest.approx((np.mean(overlaps), np.mean(taus)))


@pytest.mark.parametrize("change", [turned, shuffled])
def test_the_basis_of_the_embedding_space_changes_nothing(change):
    reference, labels = people()
    found = ranking_parity(reference, change(reference), labels)
    assert (found.rank1_lost, found.rank1_gained, found.top1_changed) == (0, 0, 0)
    assert (found.top10_overlap, found.kendall_tau) == (1.0, 1.0)
    candidate = off_by(reference, 0.3)
    assert ranking_parity(reference, candidate, labels) == ranking_parity(reference, change(candidate), labels)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_blocks_change_nothing(monkeypatch, at_once):
    reference, labels = people()
    candidate = off_by(reference, 0.3)
    expected = ranking_parity(reference, candidate, labels), first_items(candidate, labels, [3, 1, 59], 7).tolist()
    monkeypatch.setattr(distance_blocks, "MAX_QUERIES", at_once)
    monkeypatch.setattr(ranking, "MASKS_AT_ONCE", at_once)
    assert ranking_parity(reference, candidate, labels) == expected[0]
    assert first_items(candidate, labels, [3, 1, 59], 7).tolist() == expected[1]


def test_what_does_not_fit_is_named():
    reference, labels = people()
    with refuses(InvalidInput, "candidate embeddings", "[59, 16], [300, 16]"):
        ranking_parity(reference, QueryGallery(reference.query[1:], reference.gallery), labels)
    with refuses(InvalidInput, "reference embeddings", "[59, 16], [300, 16]"):
        ranking_parity(QueryGallery(reference.query[1:], reference.gallery), reference, labels)

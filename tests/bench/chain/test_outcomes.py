"""Outcomes of exact rankings and of lists, held against the evaluation; losses of links add up."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmm.bench.chain.outcomes import FIRST, Listing, OutcomeEvaluator, loss
from pmm.evaluation.metrics import evaluate_ranking
from pmm.evaluation.parity.labels import QueryGallery
from pmm.evaluation.parity.ranking import ranking_parity
from pmm.evaluation.parity.retrieval import retrieval_parity
from pmm.evaluation.parity.thresholds import decision_flips, verification
from tests.bench.chain.people import labelled


@pytest.fixture(scope="module")
def task():
    embedded, labels = labelled(seed=1)
    threshold = verification(embedded, labels).points[0].threshold
    return embedded, labels, OutcomeEvaluator(labels, threshold)


def whole_listing(embedded):
    """The exact ranking of the whole gallery, by its definition."""
    gaps = embedded.query[:, None].astype(np.float64) - embedded.gallery
    distances = np.sqrt((gaps**2).sum(2))
    rows = np.argsort(distances, axis=1, kind="stable")
    return Listing(rows, np.take_along_axis(distances, rows, 1))


def noisy(embedded, scale, seed=3):
    rng = np.random.default_rng(seed)
    return QueryGallery(*(each + scale * rng.normal(size=each.shape).astype(np.float32) for each in embedded))


def test_an_exact_outcome_is_the_evaluations(task):
    embedded, labels, evaluator = task
    outcome, ranking = evaluator.exact(embedded), evaluate_ranking(*embedded, **vars(labels))
    verified = verification(embedded, labels)
    assert np.nanmean(outcome.ap) == pytest.approx(ranking.mAP)
    assert (outcome.right == (ranking.first_rank == 1)).all()
    assert (evaluator.genuine, evaluator.impostor) == (verified.genuine, verified.impostor)
    fmr, tpr = evaluator.rates(outcome)
    assert tpr == verified.points[0].tpr
    assert 0 < fmr <= 1e-2
    assert fmr > 0.9e-2


def test_the_whole_list_is_worth_what_the_exact_ranking_is(task):
    embedded, _, evaluator = task
    exact, listing = evaluator.exact(embedded), whole_listing(embedded)
    listed = evaluator.listed(Listing(*(each[:, :40] for each in listing)), listing, len(embedded.gallery))
    for field in ("ap", "inp", "right", "first", "accepted"):
        np.testing.assert_array_equal(getattr(listed, field), getattr(exact, field))


def test_what_a_list_leaves_out_is_not_found(task):
    embedded, _, evaluator = task
    listing = whole_listing(embedded)
    short = Listing(*(each[:, :40] for each in listing))
    outcomes = [evaluator.listed(short, listing, depth) for depth in (300, 20, 5)]
    assert outcomes[2].ap[outcomes[0].evaluated].mean() < outcomes[1].ap[outcomes[0].evaluated].mean()
    assert (outcomes[2].inp[outcomes[0].evaluated] == 0).any()
    assert len(outcomes[2].accepted) < len(outcomes[0].accepted)
    empty = Listing(np.full((len(embedded.query), 4), -1), np.full((len(embedded.query), 4), np.inf))
    nothing = evaluator.listed(empty, empty, 10)
    assert not nothing.right.any()
    assert np.nansum(nothing.ap) == 0
    assert not len(nothing.accepted)


def test_a_row_that_is_listed_twice_counts_once(task):
    embedded, _, evaluator = task
    listing = whole_listing(embedded)
    doubled = Listing(*(np.repeat(each, 2, axis=1) for each in listing))
    once = evaluator.listed(listing, listing, 300)
    twice = evaluator.listed(doubled, doubled, 300)
    for field in ("ap", "inp", "right", "first", "accepted"):
        np.testing.assert_array_equal(getattr(once, field), getattr(twice, field))


def test_a_loss_is_what_the_bench_calls_one(task):
    embedded, labels, evaluator = task
    other = noisy(embedded, 0.3)
    before, after = evaluator.exact(embedded), evaluator.exact(other)
    found = loss(before, after)
    ranked = [evaluate_ranking(*each, **vars(labels)) for each in (embedded, other)]
    retrieval, order = retrieval_parity(*ranked, labels), ranking_parity(embedded, other, labels)
    ((accepted, rejected),) = decision_flips(embedded, other, labels, [evaluator.threshold])
    assert found.map_delta == pytest.approx(retrieval.map_delta.value)
    assert found.map_delta_interval == pytest.approx(retrieval.map_delta.interval)
    assert found.minp_delta_interval == pytest.approx(retrieval.minp_delta.interval)
    assert (found.rank1_lost, found.rank1_gained) == (order.rank1_lost, order.rank1_gained)
    assert found.top10_overlap == pytest.approx(order.top10_overlap)
    assert (found.newly_accepted, found.newly_rejected) == (accepted, rejected)
    assert found.rank1_lost + found.newly_accepted > 0


@settings(max_examples=5)
@given(scales=st.lists(st.sampled_from([0.0, 0.05, 0.2, 0.5]), min_size=2, max_size=4))
def test_losses_of_a_path_add_up(scales):
    embedded, labels = labelled(seed=2, people=6)
    evaluator = OutcomeEvaluator(labels, 4.0)
    outcomes = [evaluator.exact(noisy(embedded, scale, seed)) for seed, scale in enumerate([0.0, *scales])]
    steps = [loss(one, other) for one, other in pairwise(outcomes)]
    total = loss(outcomes[0], outcomes[-1])
    for name in ("map_delta", "rank1_delta", "minp_delta"):
        assert sum(getattr(step, name) for step in steps) == pytest.approx(getattr(total, name), abs=1e-12)
    net = sum(step.newly_accepted - step.newly_rejected for step in steps)
    assert net == total.newly_accepted - total.newly_rejected


def test_first_rows_are_padded_where_there_are_few(task):
    embedded, _, evaluator = task
    listing = Listing(*(each[:, :3] for each in whole_listing(embedded)))
    outcome = evaluator.listed(listing, listing, 3)
    assert outcome.first.shape == (len(embedded.query), FIRST)
    assert (outcome.first[:, 3:] == -1).all()

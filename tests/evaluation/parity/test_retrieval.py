import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given

from pmm.evaluation.metrics import RankingResult, evaluate_ranking
from pmm.evaluation.parity import retrieval
from pmm.evaluation.parity.retrieval import retrieval_parity
from pmm.utils.errors import InvalidInput
from tests.conftest import examples
from tests.evaluation.parity.problems import evaluable, labels_of, off_by, people, problems
from tests.refusals import refuses


def result(ap, first_rank=None, inp=None):
    """A result with these figures per query; NaN is a skipped query."""
    ap = np.array(ap, float)
    first = np.array(first_rank if first_rank is not None else np.where(np.isnan(ap), 0, 1), np.int64)
    inp = np.array(inp, float) if inp is not None else ap
    found = ~np.isnan(ap)
    return RankingResult(
        mAP=float(ap[found].mean()),
        mINP=float(inp[found].mean()),
        cmc=np.array([(first[found] == 1).mean()]),
        per_query_ap=ap,
        per_query_inp=inp,
        first_rank=first,
        skipped=int((~found).sum()),
    )


def cameras(*camids):
    return labels_of([1] * len(camids), [1], camids, [0])


def ranked(embedded, labels):
    return evaluate_ranking(
        *embedded, labels.query_pids, labels.gallery_pids, labels.query_camids, labels.gallery_camids
    )


@examples(60)
@given(problem=problems())
def test_equals_the_definitions(problem):
    reference, candidate, labels = problem
    queries = evaluable(labels)
    assume(queries)
    before, after = ranked(reference, labels), ranked(candidate, labels)
    found = retrieval_parity(before, after, labels, seed=5, resamples=40)

    # one draw of queries after the other, in python
    rng, draws = np.random.default_rng(5), []
    for _ in range(40):
        draws.append([queries[i] for i in rng.integers(0, len(queries), len(queries))])

    def mean(side, figure, drawn):
        return sum(figure(side, q) for q in drawn) / len(drawn)

    for delta, whole, figure in (
        (found.map_delta, "mAP", lambda side, q: side.per_query_ap[q]),
        (found.rank1_delta, "rank1", lambda side, q: float(side.first_rank[q] == 1)),
        (found.minp_delta, "mINP", lambda side, q: side.per_query_inp[q]),
    ):
        assert delta.value == pytest.approx(getattr(after, whole) - getattr(before, whole), abs=1e-12)
        deltas = [mean(after, figure, drawn) - mean(before, figure, drawn) for drawn in draws]
        assert delta.interval == pytest.approx(tuple(np.percentile(deltas, [2.5, 97.5])), abs=1e-12)

    rows = {row.camid: row for row in found.cameras}
    assert list(rows) == sorted({int(labels.query_camids[q]) for q in queries})
    for camid, row in rows.items():
        here = [q for q in queries if labels.query_camids[q] == camid]
        assert row.queries == len(here)
        assert row.mAP == pytest.approx(sum(after.per_query_ap[q] for q in here) / len(here))
        change = [after.per_query_ap[q] - before.per_query_ap[q] for q in here]
        assert row.map_delta == pytest.approx(sum(change) / len(here), abs=1e-12)

    lost = {q: before.per_query_ap[q] - after.per_query_ap[q] for q in queries}
    worst = sorted((q for q in queries if lost[q] > 0), key=lambda q: (-lost[q], q))
    for count in (0, 1, 3, 100):
        assert found.worst(count) == tuple(worst[:count])


@examples(20)
@given(problem=problems())
def test_identical_rankings(problem):
    reference, _, labels = problem
    assume(evaluable(labels))
    found = retrieval_parity(ranked(reference, labels), ranked(reference, labels), labels, resamples=50)
    for delta in (found.map_delta, found.rank1_delta, found.minp_delta):
        assert (delta.value, delta.interval) == (0.0, (0.0, 0.0))
    assert found.worst(5) == ()
    assert {row.map_delta for row in found.cameras} == {0.0}


def test_by_hand():
    nan = float("nan")
    before = result([0.5, 1.0, nan, 0.4, 0.9, 0.3], [2, 1, 0, 2, 1, 3], [0.2, 0.2, nan, 0.2, 0.2, 0.2])
    after = result([0.7, 0.5, nan, 0.4, 0.2, 0.2], [1, 2, 0, 1, 1, 3], [0.3, 0.2, nan, 0.2, 0.2, 0.2])
    found = retrieval_parity(before, after, cameras(4, 4, 2, 7, 7, 7))
    assert found.map_delta.value == pytest.approx((0.2 - 0.5 + 0 - 0.7 - 0.1) / 5)
    assert found.rank1_delta.value == pytest.approx((1 - 1 + 1) / 5)
    assert found.minp_delta.value == pytest.approx(0.1 / 5)
    assert [(row.camid, row.queries) for row in found.cameras] == [(4, 2), (7, 3)]
    assert found.cameras[0].mAP == pytest.approx((0.7 + 0.5) / 2)
    assert found.cameras[1].map_delta == pytest.approx(-0.8 / 3)
    assert found.worst(10) == (4, 1, 5)
    assert found.worst(2) == (4, 1)
    np.testing.assert_allclose(found.ap_deltas, [0.2, -0.5, nan, 0, -0.7, -0.1])


def test_a_shift_of_every_query_is_certain():
    before = result(np.linspace(0.1, 0.5, 40))
    found = retrieval_parity(before, result(before.per_query_ap + 0.25), cameras(*[0] * 40))
    assert (found.map_delta.value, *found.map_delta.interval) == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_is_that_of_paired_differences():
    """Hard and easy queries are hard and easy for both: unpaired, the interval would be twenty times as wide."""
    rng = np.random.default_rng(0)
    ap = rng.random(500)
    change = rng.normal(-0.01, 0.02, 500)
    found = retrieval_parity(result(ap), result(ap + change), cameras(*[0] * 500)).map_delta
    half = 1.96 * change.std() / np.sqrt(500)
    assert found.interval == pytest.approx((change.mean() - half, change.mean() + half), abs=0.05 * half)
    assert found.interval[1] < 0


def test_the_interval_covers_what_the_queries_were_drawn_from():
    """Of 400 data sets of 80 queries, one in eight of which loses on average 0.2 AP."""
    rng, covered, below = np.random.default_rng(1), 0, 0
    for seed in range(400):
        change = np.where(rng.random(80) < 1 / 8, -rng.random(80) * 0.4, rng.normal(0, 0.02, 80))
        found = retrieval_parity(result(np.full(80, 0.5)), result(0.5 + change), cameras(*[0] * 80), seed=seed,
                                 resamples=300).map_delta.interval  # fmt: skip
        covered += found[0] <= -0.025 <= found[1]
        below += found[1] < -0.025
    assert 0.90 <= covered / 400 <= 0.97
    assert below / 400 < 0.08


def test_deterministic_and_whatever_the_pieces(monkeypatch):
    reference, labels = people()
    before, after = ranked(reference, labels), ranked(off_by(reference, 0.5), labels)
    found = retrieval_parity(before, after, labels, resamples=1001)
    assert found.map_delta.interval[0] < found.map_delta.value < found.map_delta.interval[1]
    assert found.map_delta == retrieval_parity(before, after, labels, resamples=1001).map_delta
    assert found.map_delta != retrieval_parity(before, after, labels, resamples=1001, seed=1).map_delta
    for at_once in (1, 500, 1 << 30):
        monkeypatch.setattr(retrieval, "DRAWS_AT_ONCE", at_once)
        again = retrieval_parity(before, after, labels, resamples=1001)
        assert (again.map_delta, again.rank1_delta, again.minp_delta) == (
            found.map_delta, found.rank1_delta, found.minp_delta
        )  # fmt: skip


def test_memory_stays_bounded_for_many_queries(monkeypatch):
    sizes = []
    real = np.random.default_rng

    class Spy:
        def __init__(self, seed):
            self.rng = real(seed)

        def integers(self, low, high, shape):
            sizes.append(shape[0] * shape[1])
            return self.rng.integers(low, high, shape)

    monkeypatch.setattr(np.random, "default_rng", Spy)
    many = result(np.full(12_000, 0.5))
    retrieval_parity(many, many, cameras(*[0] * 12_000), resamples=200)
    assert max(sizes) <= 1 << 20
    assert sum(sizes) == 200 * 12_000


@pytest.mark.parametrize(
    ("candidate", "camids", "facts"),
    [
        (result([1.0, 1.0]), (0, 0, 0), ("reference ranked 3", "candidate 2", "labels have 3")),
        (result([1.0, 1.0, 0.5]), (0, 0), ("labels have 2",)),
        (result([1.0, 0.5, float("nan")]), (0, 0, 0), ("skipped different",)),
    ],
)
def test_results_that_cannot_be_compared(candidate, camids, facts):
    with refuses(InvalidInput, *facts):
        retrieval_parity(result([1.0, float("nan"), 0.5]), candidate, cameras(*camids))


def test_a_camera_row_has_the_fields_of_the_report():
    found = retrieval_parity(result([1.0]), result([0.5]), cameras(3))
    assert dataclasses.asdict(found.cameras[0]) == {"camid": 3, "queries": 1, "mAP": 0.5, "map_delta": -0.5}

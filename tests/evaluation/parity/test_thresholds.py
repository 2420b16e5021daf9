from bisect import bisect_right
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.evaluation.parity import thresholds
from pmm.evaluation.parity.labels import QueryGallery
from pmm.evaluation.parity.thresholds import Flips, decision_flips, verification
from pmm.utils.errors import InvalidInput
from tests.conftest import examples
from tests.evaluation.parity.problems import (
    is_junk,
    labels_of,
    off_by,
    people,
    problems,
    same_person,
    shuffled,
    square,
    turned,
)
from tests.refusals import refuses


def pairs(embedded, labels):
    """Distances, as float32, of the pairs of one person and of those of two, in the order of the pairs."""
    genuine, impostor = [], []
    for q in range(len(labels.query_pids)):
        for g in range(len(labels.gallery_pids)):
            if not is_junk(labels, q, g):
                kind = genuine if same_person(labels, q, g) else impostor
                kind.append(float(np.float32(np.sqrt(square(embedded, q, g)))))
    return genuine, impostor


def share(distances, threshold):
    """Of sorted distances, at most the threshold."""
    return Fraction(bisect_right(distances, threshold), len(distances))


def bits(value):
    """Place of a float32 among those from 0 up; -1 for a negative one."""
    return int(np.float32(value).view(np.int32)) if value >= 0 else -1


def check(found, embedded, labels, one_in, least_accepted):
    """Against every threshold that decides differently: one per distance, and one that accepts nothing."""
    genuine, impostor = map(sorted, pairs(embedded, labels))
    cuts = [-1.0, *sorted({*genuine, *impostor})]
    assert (found.genuine, found.impostor) == (len(genuine), len(impostor))

    gaps = {cut: abs(share(impostor, cut) - (1 - share(genuine, cut))) for cut in cuts}
    least = min(gaps.values())
    meet = max(cut for cut in cuts if gaps[cut] == least)
    assert found.eer_threshold == meet
    assert found.eer == pytest.approx(float(share(impostor, meet) + 1 - share(genuine, meet)) / 2, abs=1e-12)

    assert [point.fmr for point in found.points] == [1 / one for one in one_in]
    for point, one in zip(found.points, one_in, strict=True):
        if len(impostor) < least_accepted * one:
            assert point.threshold is None
            assert point.tpr is None
            continue
        farthest = max(cut for cut in cuts if share(impostor, cut) <= Fraction(1, one))
        following = min(cut for cut in cuts if cut > farthest)
        assert farthest <= point.threshold < following
        assert point.tpr == pytest.approx(float(share(genuine, farthest)), abs=1e-12)
        # as many float32 numbers lie on either side of it
        assert bits(point.threshold) - bits(farthest) - (bits(following) - bits(point.threshold)) in (0, -1)


@examples(200)
@given(
    problem=problems(),
    one_in=st.sampled_from([(2, 3, 7), (3, 10, 50)]),
    least=st.sampled_from([1, 2, 5]),
    block=st.sampled_from([(1, 1), (2, 7), (512, 4096)]),
)
def test_equals_the_definitions(problem, one_in, least, block):
    embedded, candidate, labels = problem
    genuine, impostor = pairs(embedded, labels)
    with mock.patch.multiple(
        thresholds, ONE_IN=one_in, MIN_ACCEPTED=least, QUERIES_AT_ONCE=block[0], GALLERY_AT_ONCE=block[1]
    ):
        if not genuine or not impostor:
            with refuses(InvalidInput, f"{len(genuine)} pairs of one identity", f"{len(impostor)} of two"):
                verification(embedded, labels)
            return
        found = verification(embedded, labels)
        check(found, embedded, labels, one_in, least)
        limits = [point.threshold for point in found.points]
        flips = decision_flips(embedded, candidate, labels, limits)
    before = [d for kind in pairs(embedded, labels) for d in kind]
    after = [d for kind in pairs(candidate, labels) for d in kind]
    for limit, flip in zip(limits, flips, strict=True):
        if limit is None:
            assert flip is None
            continue
        both = list(zip(before, after, strict=True))
        assert flip.accepted == sum(b <= limit < a for a, b in both)
        assert flip.rejected == sum(a <= limit < b for a, b in both)


def test_real_values_with_the_rates_of_the_report():
    """40 x 300 pairs: enough for 1e-2 and 1e-3, not for 1e-4. Whole numbers up to 2^18 are exact on the grid."""
    embedded, labels = people(queries=40, noise=1.5)
    whole = QueryGallery(*(np.rint(rows * 2**14) for rows in embedded))
    found = verification(whole, labels)
    check(found, whole, labels, (100, 1_000, 10_000), 10)
    assert found.points[1].threshold is not None
    assert found.points[2].threshold is None
    # and the grid moves real values by less than an fp32 backend does
    near = verification(embedded, labels)
    assert near.eer == found.eer
    assert near.eer_threshold * 2**14 == pytest.approx(found.eer_threshold, rel=1e-4)


def test_by_hand():
    # distances 1 and 3 of one person, 2, 4, 5, 6 of two; the last item is junk
    labels = labels_of([1], [1, 1, 2, 0, 3, 2, 1], [0], [1, 2, 0, 0, 1, 2, 0])
    gallery = np.array([[1.0], [3.0], [2.0], [4.0], [5.0], [6.0], [0.0]])
    with mock.patch.multiple(thresholds, ONE_IN=(2, 4, 100), MIN_ACCEPTED=1):
        found = verification(QueryGallery(np.zeros((1, 1)), gallery), labels)
    assert (found.genuine, found.impostor) == (2, 4)
    # at 2: 1/4 of two people accepted, 1/2 of one rejected; at 3: 1/4 and 0. Both are 1/4 apart: the farther
    assert (found.eer_threshold, found.eer) == (3.0, 1 / 8)
    half, quarter, few = found.points
    assert (half.threshold, half.tpr) == (4.5, 1.0)  # 2 of 4 accepted; between 4 and 5
    assert (quarter.threshold, quarter.tpr) == (3.5, 1.0)
    assert (few.fmr, few.threshold, few.tpr) == (0.01, None, None)


def test_thresholds_need_ten_pairs_to_accept():
    def found(impostors):
        labels = labels_of([1], [1] + [2] * impostors, [0], [1] * (impostors + 1))
        gallery = np.arange(impostors + 1.0)[:, None]
        return verification(QueryGallery(np.zeros((1, 1)), gallery), labels).points

    assert [point.threshold for point in found(999)] == [None, None, None]
    few = found(1000)
    assert [point.threshold for point in few] == [10.5, None, None]  # pairs at 1, 2, ... 10 are accepted
    assert found(1099)[0].threshold == 10.5
    assert found(1100)[0].threshold == 11.5
    assert [point.threshold for point in found(100_000)][2] == 10.5


def test_too_many_at_distance_zero():
    labels = labels_of([1], [1, 2, 2, 2], [0], [1] * 4)
    with mock.patch.multiple(thresholds, ONE_IN=(3,), MIN_ACCEPTED=1):
        found = verification(QueryGallery(np.ones((1, 2)), np.ones((4, 2))), labels)
    assert (found.points[0].threshold, found.points[0].tpr) == (-1.0, 0.0)
    assert (found.eer, found.eer_threshold) == (0.5, 0.0)


def test_perfect_separation_and_its_reverse():
    labels = labels_of([1], [1, 1, 2, 2], [0], [1] * 4)
    gallery = np.array([[1.0], [2.0], [5.0], [6.0]])
    assert verification(QueryGallery(np.zeros((1, 1)), gallery), labels).eer == 0.0
    assert verification(QueryGallery(np.zeros((1, 1)), gallery), labels).eer_threshold == 2.0
    assert verification(QueryGallery(np.zeros((1, 1)), gallery[::-1]), labels).eer == 1.0


def test_flips_by_hand():
    labels = labels_of([1], [1, 2, 3, 1, 1], [0], [1, 1, 1, 1, 0])
    before = QueryGallery(np.zeros((1, 1)), np.array([[1.0], [2.0], [3.0], [2.0], [9.0]]))
    after = QueryGallery(np.zeros((1, 1)), np.array([[2.5], [2.0], [1.5], [2.0], [0.0]]))  # the last one is junk
    assert decision_flips(before, after, labels, [2.0, None, 2.5, 0.5]) == (
        Flips(accepted=1, rejected=1), None, Flips(accepted=1, rejected=0), Flips(accepted=0, rejected=0),
    )  # fmt: skip
    assert decision_flips(after, before, labels, [2.5]) == (Flips(accepted=0, rejected=1),)


NONE = Flips(accepted=0, rejected=0)


def test_the_same_embeddings_flip_nothing_and_rounding_alone_flips_nothing():
    embedded, labels = people(queries=40)
    limits = [point.threshold for point in verification(embedded, labels).points]
    assert decision_flips(embedded, embedded, labels, limits) == (NONE, NONE, None)
    assert decision_flips(embedded, shuffled(embedded), labels, limits) == (NONE, NONE, None)
    assert decision_flips(embedded, turned(embedded), labels, limits) == (NONE, NONE, None)
    assert decision_flips(embedded, off_by(embedded, 1e-6), labels, limits) == (NONE, NONE, None)
    moved = decision_flips(embedded, off_by(embedded, 0.1), labels, limits)
    assert moved[0].accepted > 0 < moved[0].rejected


def test_the_basis_of_the_embedding_space_changes_nothing():
    embedded, labels = people(queries=40)
    found, other = verification(embedded, labels), verification(turned(embedded), labels)
    assert verification(shuffled(embedded), labels) == found
    assert (other.eer, other.eer_threshold) == pytest.approx((found.eer, found.eer_threshold))
    for point, its in zip(found.points, other.points, strict=True):
        assert (its.threshold, its.tpr) == pytest.approx((point.threshold, point.tpr))


@pytest.mark.parametrize("block", [(1, 300), (7, 5), (40, 64), (13, 1)])
@pytest.mark.parametrize("dim", [3, 200])
def test_blocks_change_nothing(monkeypatch, block, dim):
    """Bit for bit, though BLAS sums differently in differently shaped blocks."""
    embedded, labels = people(queries=40, dim=dim, noise=3.0)
    embedded.gallery[1::2] = embedded.gallery[0]  # ties, in places of all kinds
    candidate = off_by(embedded, 0.05)
    found = verification(embedded, labels)
    limits = [point.threshold for point in found.points] + [found.eer_threshold]
    flips = decision_flips(embedded, candidate, labels, limits)
    monkeypatch.setattr(thresholds, "QUERIES_AT_ONCE", block[0])
    monkeypatch.setattr(thresholds, "GALLERY_AT_ONCE", block[1])
    assert verification(embedded, labels) == found
    assert decision_flips(embedded, candidate, labels, limits) == flips


@pytest.mark.parametrize("dim", [1, 2, 3, 384, 2048, 2049])
def test_sums_of_products_on_the_grid_are_exact(dim):
    """Whatever the order of summation: the last digit of a float64 is not needed."""
    rng = np.random.default_rng(dim)
    rows = rng.normal(size=(6, dim)) * 10.0 ** rng.integers(-6, 6, (6, 1))
    rows[0] = 1 - 2**-30  # rounds up to a power of two
    grid = thresholds._on_grid(rows)
    largest = np.abs(rows).max(1, keepdims=True)
    assert (np.abs(grid - rows) <= largest * 2.0**-20).all()
    assert grid.dtype == np.float64
    for a in grid:
        for b in grid:
            exact = sum((Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)), Fraction())
            assert a @ b == exact == np.cumsum(a * b)[-1] == np.cumsum((a * b)[::-1])[-1]


@pytest.mark.parametrize("dim", [3, 384, 2048])
def test_the_grid_moves_a_distance_by_less_than_float32_does(dim):
    embedded, labels = people(queries=20, gallery=50, dim=dim)
    gaps = embedded.query[:, None].astype(np.float64) - embedded.gallery
    ((_, (found,)),) = thresholds._blocks(labels, embedded)
    np.testing.assert_allclose(found, np.linalg.norm(gaps, axis=2), rtol=2**-23)


def test_zero_rows_and_equal_rows():
    assert (thresholds._on_grid(np.zeros((2, 5))) == 0).all()
    rows = np.repeat(np.random.default_rng(0).normal(size=(1, 300)), 9, axis=0)
    labels = labels_of([1, 1], [1] + [2] * 6, [0, 0], [1] * 7)
    found = verification(QueryGallery(rows[:2], rows[2:]), labels)
    assert found.eer_threshold == 0.0


def test_what_does_not_fit_is_named():
    embedded, labels = people(queries=40)
    wrong = QueryGallery(embedded.query[1:], embedded.gallery)
    with refuses(InvalidInput, "[39, 16], [300, 16]", "[40, D], [300, D]"):
        verification(wrong, labels)
    with refuses(InvalidInput, "reference embeddings", "[39, 16]"):
        decision_flips(wrong, embedded, labels, [1.0])
    with refuses(InvalidInput, "candidate embeddings", "[39, 16]"):
        decision_flips(embedded, wrong, labels, [1.0])

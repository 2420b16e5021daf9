"""What is stored of a row is never further from it than its error says, and no lower bound is above a distance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.evaluation.embedding_matrix import comparable_rows
from pmm.exact_search.codes import ERROR, REST, SCALE, SQUARE, ShortCodes, encode, project, quantize
from pmm.exact_search.pair_distances import EmbeddingParts
from pmm.exact_search.plan import best_rotation
from pmm.exact_search.rotation import Rotation
from pmm.exact_search.row_scan import RowScan
from pmm.exact_search.scan import NumpyScan, affordable_coordinates
from pmm.utils.errors import InvalidInput
from tests.conftest import examples
from tests.exact_search.brute_force import brute_force, galleries, made_up
from tests.refusals import refuses


def lower_bounds(rotation, queries, rows, metric="euclidean", most=None):
    scan = NumpyScan.of([encode(rotation, rows, metric)], most=most)
    return scan.bounds(project(rotation, queries, metric), slice(0, len(rows)))


def assert_bounded(bounds, distances):
    """By Euclidean distances, of which float64 knows 45 bits."""
    assert (bounds <= np.sqrt(2 * distances) * (1 + 2.0**-45)).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@examples(100)
@given(data=st.data())
def test_no_bound_is_above_a_distance(metric, data):
    """Also not of a basis that is not quite orthonormal, about any mean, with some of the coordinates."""
    rows, queries, r = data.draw(galleries(metric))
    rotation = Rotation.fit(rows[::2], r, metric)
    stretch, shift = data.draw(st.sampled_from([1, 1.004, 0.997])), data.draw(st.sampled_from([0, 1e-3, 10]))
    rotation = Rotation(rotation.mean + shift, rotation.basis * stretch)
    bounds = lower_bounds(rotation, queries, rows, metric, data.draw(st.integers(1, r)))
    truth = brute_force(queries, rows, metric)
    assert_bounded(bounds, truth)
    if r == rows.shape[1]:
        whole = RowScan(EmbeddingParts([rows], metric), rotation, 1)
        assert_bounded(whole.bounds(project(rotation, queries, metric), slice(0, len(rows))), truth)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["decaying", "flat", "levels", "far apart", "about a point"])
def test_no_bound_is_above_a_distance_in_millions_of_pairs(kind):
    for dim, r in ((8, 8), (64, 24), (384, 64), (384, 384)):
        rows = made_up(kind, 20_000, dim, dim)
        queries = rows[:: len(rows) // 64] * np.float32(1.0001)
        bounds = lower_bounds(Rotation.fit(rows[:2000], r), queries, rows)
        assert_bounded(bounds, brute_force(queries, rows, "euclidean"))


def test_bounds_of_near_pairs_far_from_the_mean():
    """Rows that codes hold without error: only the products' roundings are between a bound and the distance."""
    rng = np.random.default_rng(0)
    rotation, scale = Rotation(np.zeros(40), np.eye(40)), float(np.float32(0.1))
    rows = 100.0 + rng.integers(-3, 4, (1000, 40))
    rows[:, 0] = 127
    rows *= scale
    queries, truth = rows[:30], brute_force(rows[:30], rows, "euclidean")
    assert encode(rotation, rows, "euclidean").terms[:, ERROR].max() < 1e-10
    assert_bounded(lower_bounds(rotation, queries, rows), truth)
    scan, asked = NumpyScan.of([encode(rotation, rows, "euclidean")]), project(rotation, queries, "euclidean")
    for column in range(0, 1000, 50):  # what is exactly at the limit
        limits = np.sqrt(2 * truth[:, column])
        found = scan.candidates(asked, limits, slice(0, len(rows)))
        hits = np.zeros(truth.shape, bool)
        hits[found.queries, found.rows] = True
        assert hits[truth <= truth[:, column, None]].all()
        assert_bounded(found.bounds, truth[found.queries, found.rows])


def test_bounds_of_rows_themselves_are_close():
    """Also about a point far from all of them, and of a few."""
    rows = made_up("flat", 1000, 40, 0)
    rotation = Rotation.fit(rows, 40)
    rotation = Rotation(rotation.mean + 1, rotation.basis)
    asked, truth = project(rotation, rows[:9], "euclidean"), np.sqrt(2 * brute_force(rows[:9], rows, "euclidean"))
    whole = RowScan(EmbeddingParts([rows[:300], rows[300:]], "euclidean"), rotation, 1)
    assert whole.resident_bytes == 4 * 1000
    bounds = whole.bounds(asked, slice(0, 1000, 3))
    apart = truth[:, ::3] > 0
    assert bounds[apart] == pytest.approx(truth[:, ::3][apart], rel=1e-4)
    some = whole.take(np.array([5, 700])).take(np.array([1]))
    assert len(some) == 1
    found = some.candidates(asked, truth[:, 700], slice(0, 1))
    assert found.queries.tolist() == list(range(9))
    assert found.bounds == pytest.approx(truth[:, 700], rel=1e-4)


def test_bounds_by_a_basis_that_lengthens():
    rows = np.rint(made_up("flat", 200, 20, 5) * 30)
    rows[:, 0] = 127
    stretched = Rotation(np.zeros(20), np.eye(20) * 1.004)
    assert_bounded(lower_bounds(stretched, rows[:20], rows), brute_force(rows[:20], rows, "euclidean"))


def test_an_error_is_rounded_up():
    rows = np.random.default_rng(1).normal(size=(5000, 24))
    short = encode(Rotation(np.zeros(24), np.eye(24)), rows, "euclidean")
    decoded = short.codes.astype(np.longdouble) * short.terms[:, SCALE, None]
    assert (short.terms[:, REST] == 0).all()
    gaps = np.sqrt(np.square(rows.astype(np.longdouble) - decoded).sum(1))
    assert (short.terms[:, ERROR] >= gaps).all()
    assert short.terms[:, ERROR] == pytest.approx(gaps.astype(float), rel=1e-6)
    assert short.terms[:, SQUARE] == pytest.approx(np.square(decoded).sum(1).astype(float), rel=1e-6)


def test_rests_keep_what_coordinates_leave():
    rows = made_up("decaying", 500, 30, 2)
    rotation = Rotation.fit(rows, 10)
    short = encode(rotation, rows, "euclidean")
    z = rows - rotation.mean
    y = z @ rotation.basis
    assert short.terms[:, REST] == pytest.approx(np.sqrt((z**2).sum(1) - (y**2).sum(1)), rel=1e-5)
    assert project(rotation, rows, "euclidean").prefix(4).rest == pytest.approx(
        np.sqrt((z**2).sum(1) - (y[:, :4] ** 2).sum(1)), rel=1e-5
    )


def test_rows_that_are_too_large_or_too_small_to_code_are_always_candidates():
    rows = np.array([[1e38, 0], [3e38, -3e38], [1e-44, 0], [1, 1]], np.float32)
    rotation = Rotation(np.zeros(2), np.eye(2))
    short = encode(rotation, rows, "euclidean")
    assert np.isinf(short.terms[:2, ERROR]).all()
    scan = NumpyScan.of([short])
    asked = project(rotation, np.array([[0, 1e-44], [1e38, 1e38]]), "euclidean")
    found = scan.candidates(asked, np.zeros(2), slice(0, 4))
    pairs = set(zip(found.queries.tolist(), found.rows.tolist(), strict=True))
    assert pairs == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)}
    assert_bounded(scan.bounds(asked, slice(0, 4)), brute_force([[0, 1e-44], [1e38, 1e38]], rows, "euclidean"))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_rows_themselves_that_are_too_large_too_small_or_damaged_are_always_candidates(metric, kind):
    rows = made_up("flat", 200, 6, 0).astype(kind)
    rotation, most = Rotation.fit(rows, 6, metric), kind(np.finfo(kind).max)
    queries = rows[7:9].astype(np.float32)
    rows[3], rows[40], rows[41] = most, np.nan, np.inf
    if kind is np.float32:
        rows[42] = rows[7] * np.float32(1e-40)
    scan = RowScan(EmbeddingParts([rows[:9], rows[9:]], metric), rotation, 1)
    asked = project(rotation, queries, metric)
    limits = np.zeros(2)
    found = scan.candidates(asked, limits, slice(0, 200))
    assert {7, 40, 41} <= set(found.rows[found.queries == 0].tolist())
    some = scan.take(np.arange(5, 50))
    assert {2, 35, 36} <= set(some.candidates(asked, limits, slice(0, 45)).rows.tolist())
    if kind is np.float32:
        assert {3, 42} & set(found.rows.tolist()) == ({3, 42} if metric == "cosine" else {3})
    assert len(found.rows) <= 2 * 6
    bounds = scan.bounds(asked, slice(0, 200, 3))
    good = np.setdiff1d(np.arange(0, 200, 3), [3, 42])
    assert_bounded(bounds[:, good // 3], brute_force(queries, rows[good], metric))


def test_scans_of_parts_of_slices_and_of_some_rows_are_one():
    rows = made_up("decaying", 100, 12, 4)
    rotation = Rotation.fit(rows, 6)
    short, asked = encode(rotation, rows, "euclidean"), project(rotation, rows[:3], "euclidean")
    whole = NumpyScan.of([short])
    parts = NumpyScan.of([ShortCodes(short.codes[:37], short.terms[:37]), short.take(np.arange(37, 100))])
    bounds = whole.bounds(asked, slice(0, 100))
    assert np.array_equal(parts.bounds(asked, slice(0, 100)), bounds)
    some = np.array([3, 50, 99])
    assert whole.take(some).bounds(asked, slice(0, 3)) == pytest.approx(bounds[:, some], rel=1e-5, abs=1e-5)
    assert whole.bounds(asked, slice(1, 100, 7)) == pytest.approx(bounds[:, 1:100:7], rel=1e-5, abs=1e-5)
    found = whole.candidates(asked, np.full(3, np.inf), slice(10, 60))
    assert (np.diff(found.queries) >= 0).all()
    assert sorted(zip(found.queries, found.rows, strict=True)) == [(q, x) for q in range(3) for x in range(10, 60)]


def test_rows_that_cannot_be_coded_are_named():
    rows = made_up("decaying", 5000, 3, 0)
    rows[4500, 1] = np.inf
    rotation = Rotation.fit(rows[:100], 2)
    with refuses(InvalidInput, index=4500):
        encode(rotation, rows, "euclidean")
    rows[4500] = 0
    with refuses(InvalidInput, index=4500):
        encode(rotation, rows, "cosine")
    with refuses(InvalidInput, expected="[N, 3]"):
        encode(rotation, rows[:, :2], "euclidean")


def test_what_is_no_rotation():
    for mean, basis in ((np.zeros(3), np.eye(2)), (np.zeros(2), np.zeros((2, 0))), (np.zeros(2), np.zeros(2))):
        with refuses(InvalidInput, expected="[D, r]"):
            Rotation(mean, basis)
    with refuses(InvalidInput, expected="orthonormal"):
        Rotation(np.zeros(2), 1.1 * np.eye(2))
    with refuses(InvalidInput, expected="orthonormal"):
        Rotation(np.zeros(2), np.array([[1e200, 1e200], [1e200, -1e200]]))
    with refuses(InvalidInput, "NaN"):
        Rotation(np.zeros(2), np.full((2, 2), np.nan))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_row_far_away_does_not_decide_the_axes(metric):
    rows = made_up("decaying", 3000, 12, 0)
    alone = Rotation.fit(rows[1:], 12, metric)
    rows[0] = 1e12 * rows[0][::-1]
    with_it = Rotation.fit(rows, 12, metric)
    assert np.abs(np.einsum("dr,dr->r", alone.basis, with_it.basis)) == pytest.approx(1, abs=0.05)
    most_equal = np.where(np.arange(100)[:, None] < 60, rows[:1], rows[:100])
    assert Rotation.fit(most_equal, 1, metric).mean == pytest.approx(
        comparable_rows(most_equal, metric).mean(0), rel=1e-9
    )


@pytest.mark.parametrize("column", [SCALE, REST, SQUARE, ERROR])
def test_rows_whose_terms_are_no_numbers_are_always_candidates(column):
    rows = made_up("flat", 5, 4, 0)
    rotation = Rotation.fit(rows, 4)
    short, asked = encode(rotation, rows, "euclidean"), project(rotation, rows[:1] + 9, "euclidean")
    for bad in (np.nan, np.inf):
        short.terms[2, column] = bad
        for most in (4, 2):
            scan = NumpyScan.of([short], most=most)
            assert scan.candidates(asked, np.zeros(1), slice(0, 5)).rows.tolist() == [2]
            assert scan.bounds(asked, slice(0, 5))[0, 2] <= 0


def test_coordinates_are_chosen_by_the_spectrum():
    decaying, flat = made_up("decaying", 3000, 64, 0), made_up("flat", 3000, 64, 0)
    assert best_rotation(decaying, "euclidean", 10**6).r < 48
    assert best_rotation(flat, "cosine", 10**6).r == 64
    assert best_rotation(flat[:, :9], "euclidean", 10**6).r == 9
    assert best_rotation(flat[:1], "euclidean", 1).r == 64
    assert best_rotation(made_up("equal", 300, 64, 0), "euclidean", 300).r == 16


def test_small_dimensions_have_a_least_number_of_coordinates():
    assert [affordable_coordinates(dim) for dim in (8, 64, 384, 1536)] == [16, 16, 61, 253]
    assert quantize(project(Rotation.fit(made_up("flat", 9, 8, 0), 8), made_up("flat", 2, 8, 1), "euclidean")).r == 8

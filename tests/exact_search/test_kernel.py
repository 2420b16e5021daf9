"""The compiled scan finds what the one in numpy finds, on each instruction set that this processor has."""

import contextlib
import ctypes
import platform
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmm.exact_search import kernel
from pmm.exact_search.codes import ERROR, REST, SCALE, ShortCodes, encode, project
from pmm.exact_search.kernel import CompiledScan
from pmm.exact_search.rotation import Rotation
from pmm.exact_search.scan import NumpyScan, decode
from pmm.utils import build_info, search_library
from pmm.utils.errors import BackendUnavailable
from tests.conftest import examples
from tests.refusals import refuses
from tests.search_library import forget, required_library


@pytest.fixture(scope="module", autouse=True)
def library():
    with required_library() as found:
        yield found


def scans(codes, threads=1):
    """One for each instruction set of this processor."""
    return [CompiledScan(codes, threads, path) for path, name in enumerate(search_library.paths()) if name]


def in_numpy(codes):
    """The reference, with all coordinates."""
    matrices = [np.empty((len(part), part.r + 3), np.float32) for part in codes]
    for part, matrix in zip(codes, matrices, strict=True):
        decode(part, matrix)
    return NumpyScan(np.concatenate(matrices))


def pairs(found):
    return list(zip(found.queries.tolist(), found.rows.tolist(), strict=True))


@st.composite
def searches(draw):
    """Rows, queries among and beside them, and a rotation: with ties, rows that are equal, and norms far apart."""
    count, dim = draw(st.integers(1, 70)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = rng.normal(size=(count, dim)) * np.exp(-np.arange(dim) * draw(st.sampled_from([0, 0.3])))
    kind = draw(st.sampled_from(["normal", "levels", "few", "far apart", "about a point"]))
    if kind == "levels":
        rows = np.rint(2 * rows)
    elif kind == "few":
        rows = rows[rng.integers(0, draw(st.integers(1, 3)), count) % count]
    elif kind == "far apart":
        rows *= 10.0 ** rng.uniform(-30, 15, (count, 1))
    elif kind == "about a point":
        rows = 1000 + rows * 1e-3
    rows = rows.astype(np.float32)
    queries = rows[rng.integers(0, count, draw(st.integers(1, 11)))]
    queries = np.concatenate([queries, queries[:2] * np.float32(1.01)])
    return rows, queries, Rotation.fit(rows, draw(st.integers(1, dim)), "euclidean")


def norms(differences):
    return np.sqrt(np.square(differences.astype(np.float64)).sum(-1))


@examples(160)
@given(searches(), st.data())
def test_no_row_is_missed_and_none_is_found_without_need(search, data):
    rows, queries, rotation = search
    codes, projection = encode(rotation, rows, "euclidean"), project(rotation, queries, "euclidean")
    exact = norms(queries[:, None] - rows)
    # adversarial: just what one row has, or nothing, or all
    limits = exact[np.arange(len(queries)), data.draw(st.integers(0, len(rows) - 1))].copy()
    limits[data.draw(st.integers(0, len(queries) - 1))] = data.draw(st.sampled_from([0.0, np.inf]))
    first = data.draw(st.integers(0, len(rows) - 1))
    part = slice(first, data.draw(st.integers(first + 1, len(rows))))

    found = [scan.candidates(projection, limits, part) for scan in scans([codes])]
    known = set(pairs(found[0]))
    needed = exact <= limits[:, None]
    needed[:, : part.start], needed[:, part.stop :] = False, False
    assert set(zip(*map(np.ndarray.tolist, np.nonzero(needed)), strict=True)) <= known
    assert len(known) == len(found[0].rows)
    assert all(part.start <= row < part.stop for _, row in known)
    assert (found[0].bounds <= exact[found[0].queries, found[0].rows]).all()
    for other in found[1:]:  # the same operations on each
        assert pairs(other) == pairs(found[0])
        assert np.array_equal(other.bounds, found[0].bounds)

    stored = codes.codes * codes.terms[:, SCALE, None].astype(np.float64), codes.terms[:, REST].astype(np.float64)
    gaps = norms(projection.coordinates[:, None] - stored[0]), projection.rest[:, None] - stored[1]
    between = np.hypot(*gaps)
    size = np.hypot(norms(stored[0]), stored[1]) + np.hypot(norms(projection.coordinates), projection.rest)[:, None]
    excess = between - codes.terms[:, ERROR] - projection.error[:, None] - limits[:, None]
    assert all(excess[pair] <= 4e-3 * size[pair] + 2.0**-50 for pair in known)


def test_what_float32_rounds_hides_no_row():
    """Rows and queries that their codes hold exactly, and limits that are exactly a distance."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-126, 127, (2000, 24))
    queries = 128 * rows[:50] + rng.integers(-20, 21, (50, 24))  # far from 0 beside how near they are
    rows[:, 0], queries[:, 0] = 127, 128 * 127
    rows, queries = (3 * rows).astype(np.float32), (3 * queries / 128).astype(np.float32)
    rotation = Rotation(np.zeros(24), np.eye(24))
    codes, projection = encode(rotation, rows, "euclidean"), project(rotation, queries, "euclidean")
    assert codes.terms[:, ERROR].max() < 1e-9
    exact = norms(queries[:, None] - rows)
    for scan in scans([codes]):
        found = scan.candidates(projection, exact.diagonal(), slice(0, len(rows)))
        assert (found.bounds <= exact[found.queries, found.rows]).all()
        assert set(zip(range(50), range(50), strict=True)) <= set(pairs(found))


@examples(40)
@given(searches())
def test_bounds_of_all_pairs_are_those_of_numpy(search):
    rows, queries, rotation = search
    codes, projection = encode(rotation, rows, "euclidean"), project(rotation, queries, "euclidean")
    exact = norms(queries[:, None] - rows)
    sizes = norms(rows) + norms(queries)[:, None] + 2 * norms(rotation.mean)
    for step in (1, 3):
        known = in_numpy([codes]).bounds(projection, slice(0, len(rows), step))
        for scan in scans([codes]):
            bounds = scan.bounds(projection, slice(0, len(rows), step))
            assert (bounds <= exact[:, ::step]).all()
            assert (np.abs(np.maximum(bounds, 0) - np.maximum(known, 0)) <= 5e-3 * sizes[:, ::step]).all()


@pytest.fixture(scope="module")
def many():
    """3,001 rows of 21 dimensions in two pieces, 9 queries, and limits that some hundred rows meet."""
    rows = (np.random.default_rng(0).normal(size=(3001, 30)) * np.exp(-np.arange(30) / 9)).astype(np.float32)
    rotation = Rotation.fit(rows, 21, "cosine")
    codes = encode(rotation, rows, "cosine")
    projection = project(rotation, rows[:9] + np.float32(0.1), "cosine")
    limits = np.partition(in_numpy([codes]).bounds(projection, slice(0, 3001)), 200, axis=1)[:, 200]
    pieces = [ShortCodes(codes.codes[some], codes.terms[some]) for some in (slice(0, 1003), slice(1003, 3001))]
    return pieces, projection, limits


def test_pairs_come_by_query_and_row_from_any_number_of_threads(many, monkeypatch):
    pieces, projection, limits = many
    monkeypatch.setattr(kernel, "GRAIN", 64)
    known = pairs(in_numpy(pieces).candidates(projection, limits, slice(0, 3001)))
    for threads in (1, 2, 5):
        for scan in scans(pieces, threads):
            assert len(scan) == 3001
            found = pairs(scan.candidates(projection, limits, slice(0, 3001)))
            assert found == sorted(found)
            assert abs(len(set(found) ^ set(known))) <= 3  # of over a thousand: queries are rounded otherwise
    assert len(known) > 1000


def test_where_there_is_no_room_left_it_goes_on(many, monkeypatch):
    pieces, projection, _ = many
    monkeypatch.setattr(kernel, "ROOM", 1)
    for scan in scans(pieces):
        everything = scan.candidates(projection, np.full(9, np.inf), slice(0, 3001))
        assert pairs(everything) == [(query, row) for query in range(9) for row in range(3001)]


def test_some_rows_are_numbered_anew(many):
    pieces, projection, limits = many
    rows = np.unique(np.random.default_rng(1).integers(0, 3001, 700))
    for scan in scans(pieces):
        some = scan.take(rows)
        assert (len(some), some.resident_bytes) == (len(rows), -(-len(rows) // 16) * 16 * (24 + 16))
        found = some.candidates(projection, limits, slice(0, len(rows)))
        whole = scan.candidates(projection, limits, slice(0, 3001))
        kept = np.isin(whole.rows, rows)
        assert np.array_equal(rows[found.rows], whole.rows[kept])
        assert np.array_equal(found.bounds, whole.bounds[kept])
        assert len(scan.take(rows[:0]).candidates(projection, limits, slice(0, 0)).rows) == 0
        for bad in ([-1], [3001]):
            with pytest.raises(IndexError, match="of 3001"):
                scan.take(np.array(bad))


@pytest.mark.parametrize("dim", [1040, 1200])
def test_sums_of_products_fit_where_all_are_largest(dim):
    """Codes of 127 in every dimension, and queries of the largest code."""
    rotation = Rotation(np.zeros(dim), np.eye(dim))
    ones = np.ones((1, dim), np.float32)
    rows = np.concatenate([ones, -ones, 2 * ones])
    codes, projection = encode(rotation, rows, "euclidean"), project(rotation, ones, "euclidean")
    assert (np.abs(codes.codes) == 127).all()
    for scan in scans([codes]):
        assert pairs(scan.candidates(projection, np.zeros(1), slice(0, 3))) == [(0, 0)]
        bounds = scan.bounds(projection, slice(0, 3))[0]
        assert bounds == pytest.approx(np.array([0, 2, 1]) * dim**0.5, abs=0.01 * dim**0.5)


def test_a_missing_or_stale_library_is_none_unless_it_is_required(tmp_path, monkeypatch, library):
    monkeypatch.setattr(build_info, "SEARCH_LIBRARY", tmp_path / "_search.so")
    monkeypatch.setattr(search_library, "SEARCH_LIBRARY", tmp_path / "_search.so")
    facts = b'pmm kernels built {"compiler": "g++ 12", "sources": "0123456789ab"}\0'
    monkeypatch.setenv("PMM_REQUIRE_EXT", "0")
    for content, reason in (
        (b"", "not compiled"),
        (facts, "of other sources"),
        (facts.replace(b"0123456789ab", build_info.sources_digest(build_info.SOURCES / "search").encode()), "not load"),
    ):
        (tmp_path / "_search.so").write_bytes(content)
        forget()
        assert search_library.library() is None
        assert search_library.paths() == []
        with refuses(BackendUnavailable, hint="numpy"):
            CompiledScan([ShortCodes(np.zeros((1, 1), np.int8), np.zeros((1, 4), np.float32))])
        with monkeypatch.context() as patch:
            patch.setenv("PMM_REQUIRE_EXT", "1")
            forget()
            with pytest.raises(RuntimeError, match=reason):
                search_library.library()
    forget()


def test_sizes_are_those_of_the_sources():
    text = (build_info.SOURCES / "search" / "search.h").read_text()
    sizes = {name: int(value) for name, value in re.findall(r"constexpr int64_t (k\w+) = (\d+);", text)}
    assert (sizes["kRows"], sizes["kGroup"], sizes["kTerms"]) == (kernel.ROWS, kernel.GROUP, kernel.TERMS)
    assert sizes["kTileBlocks"] * kernel.ROWS == kernel.TILE
    assert kernel.LINE == kernel.ROWS * kernel.GROUP


@contextlib.contextmanager
def tiny_numbers_are_zero():
    """On this thread, as `torch.set_flush_denormal(True)` has it."""
    libm, saved = ctypes.CDLL("libm.so.6"), ctypes.create_string_buffer(32)
    assert libm.fegetenv(saved) == 0
    changed = ctypes.create_string_buffer(saved.raw, 32)
    changed[28:32] = (int.from_bytes(saved[28:32], "little") | 0x8040).to_bytes(4, "little")
    assert libm.fesetenv(changed) == 0
    try:
        yield
    finally:
        libm.fesetenv(saved)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the register is another one")
def test_products_that_vanish_hide_no_row():
    """Whether float32 holds numbers below 2^-126 or takes them for 0."""
    rows, queries = np.array([[2.0**-60, 0]], np.float32), np.array([[2.0**-67.2, 2.0**-60]], np.float32)
    rotation = Rotation(np.zeros(2), np.eye(2))
    codes, projection = encode(rotation, rows, "euclidean"), project(rotation, queries, "euclidean")
    exact = norms(queries - rows)
    for scan in scans([codes]):
        for numbers in (contextlib.nullcontext(), tiny_numbers_are_zero()):
            with numbers:
                found = scan.candidates(projection, exact, slice(0, 1))
            assert pairs(found) == [(0, 0)]
            assert found.bounds <= exact


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the register is another one")
@pytest.mark.parametrize("exponent", [-60, -64, -68, -70, -72, -74, -76, -80, -100])
def test_no_bound_of_tiny_rows_is_above_a_distance(exponent):
    rows = (np.random.default_rng(0).normal(size=(3000, 16)) * 2.0**exponent).astype(np.float32)
    queries = rows[:20] * np.float32(1.01)
    rotation = Rotation.fit(rows, 16)
    codes, projection = encode(rotation, rows, "euclidean"), project(rotation, queries, "euclidean")
    exact = norms(queries[:, None] - rows.astype(np.float64))
    for scan in scans([codes]):
        for numbers in (contextlib.nullcontext(), tiny_numbers_are_zero()):
            with numbers:
                assert (scan.bounds(projection, slice(0, 3000)) <= exact).all()


def test_sums_of_products_fit_where_a_file_holds_what_is_never_written():
    """A code of -128."""
    dim = 1040
    queries, rotation = np.full((1, dim), -1, np.float32), Rotation(np.zeros(dim), np.eye(dim))
    terms = np.array([[2.0**-7, 0, dim, 0]], np.float32)
    codes = ShortCodes(np.full((1, dim), -128, np.int8), terms)
    for scan in scans([codes]):
        found = scan.candidates(project(rotation, queries, "euclidean"), np.zeros(1), slice(0, 1))
        assert pairs(found) == [(0, 0)]


def test_a_small_sample_is_kept_and_counted(many, monkeypatch):
    pieces, projection, _ = many
    for most, kept in ((1501, 1501), (1500, 0)):
        monkeypatch.setattr(kernel, "MOST_KEPT", most)
        scan = scans(pieces)[0]
        size = scan.resident_bytes
        whole = scan.bounds(projection, slice(0, 3001))
        assert np.array_equal(scan.bounds(projection, slice(5, 2000)), whole[:, 5:2000])
        assert scan.resident_bytes == size
        assert np.array_equal(scan.bounds(projection, slice(0, 3001, 2)), whole[:, ::2])
        assert scan.resident_bytes == size + -(-kept // 16) * 16 * (24 + 16)

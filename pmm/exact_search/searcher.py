"""The nearest rows of a gallery, exactly, from short codes in memory and the embeddings where they lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distances import Doubles, Floats, Ints, comparable_rows, half_squares
from pmm.exact_search.codes import Projection, ShortCodes, chunks, project
from pmm.exact_search.kernel import CompiledScan, library
from pmm.exact_search.rotation import Rotation
from pmm.exact_search.scan import CodeScan, NumpyScan, affordable_coordinates
from pmm.utils.errors import InvalidInput, InvalidValue
from pmm.utils.hardware import usable_cores
from pmm.utils.threads import in_threads

Allowed = Callable[[Ints, Ints], npt.NDArray[np.bool_]]
"""Of pairs [P], the queries' numbers and rows: which count, bool [P]."""

KERNELS = ("compiled", "numpy")
"""What scans short codes, the fastest first."""
SAMPLE = 8192
"""Rows whose bounds give the first limits."""
PASSES = (1 / 32, 1 / 4, 1)
"""Parts of all rows at whose ends limits are tightened."""
QUERIES_AT_ONCE = 256
PAIRS_AT_ONCE = 512
"""Pairs that are measured at once; their differences stay in a core's cache."""
GRAIN = 4096
"""Pairs that are worth a thread."""


class RowMatches(NamedTuple):
    """Rows of a gallery, the nearest first, ties by row."""

    rows: Ints
    """int64 [Q, k]; -1 where there are no more."""
    distances: Doubles
    """float64 [Q, k]: half the squared Euclidean distance, or 1 - cos; infinite where there are no more."""


class ExactSearcher:
    """Exact search among the embeddings of `parts`, float32 or float16 arrays [n, D], one after another.

    They may be memory-mapped: only rows that may be among the nearest are read. The distance of a pair is that of
    `pmm.evaluation.distances.EmbeddingDistances.exact_pairs`, a function of the pair alone.
    """

    def __init__(
        self,
        parts: Sequence[Floats],
        metric: str,
        rotation: Rotation,
        codes: Sequence[ShortCodes],
        *,
        threads: int = 0,
        kernel: str | None = None,
    ) -> None:
        """Args:
            codes: what `encode` makes of the same rows with `rotation`, in one or several pieces.
            threads: 0 for each core of the quota.
            kernel: what scans the codes; None for the fastest of this machine.

        Raises InvalidInput if codes and embeddings are not of as many rows; InvalidValue for an unknown kernel,
        BackendUnavailable for "compiled" where it is not.
        """
        if kernel is not None and kernel not in KERNELS:
            raise InvalidValue("kernel", kernel, choices=KERNELS)
        if sum(map(len, codes)) != sum(map(len, parts)):
            raise InvalidInput(f"codes of {sum(map(len, codes))} rows, embeddings of {sum(map(len, parts))}")
        if any(some.r != rotation.r for some in codes):
            raise InvalidInput(f"codes of {codes[0].r} dimensions, a rotation of {rotation.r}")
        self._parts, self.metric, self._rotation = parts, metric, rotation
        self._starts = np.cumsum([0, *map(len, parts)])
        self._threads = threads or usable_cores()
        kernel = kernel or ("compiled" if library() else "numpy")
        self._scan: CodeScan = (
            CompiledScan(codes, self._threads)
            if kernel == "compiled"
            else NumpyScan.of(codes, self._threads, affordable_coordinates(rotation.dim))
        )
        self._subset: tuple[Ints, CodeScan] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def resident_bytes(self) -> int:
        """Memory that the search takes beside the embeddings."""
        return self._scan.resident_bytes

    def nearest(
        self, queries: Floats, k: int, *, rows: Ints | None = None, allowed: Allowed | None = None
    ) -> RowMatches:
        """The k nearest rows of each query [Q, D], of all or of a sorted subset `rows`; all if there are fewer.

        Raises InvalidValue for k < 1; InvalidInput for queries of another dimension, NaN or Inf in them, or all zero
        where the metric is cosine, with the `index` of the first.
        """
        if k < 1:
            raise InvalidValue("k", k, "at least 1")
        search = self._search(queries, rows, allowed)
        k = min(k, search.rows)
        result = RowMatches(np.full((len(queries), k), -1), np.full((len(queries), k), np.inf))
        for some in chunks(len(queries), QUERIES_AT_ONCE):
            result.rows[some], result.distances[some] = search.nearest(some, k)
        return result

    def within(
        self, queries: Floats, distance: float, *, rows: Ints | None = None, allowed: Allowed | None = None
    ) -> list[RowMatches]:
        """For each query [Q, D] the rows [1, n] at most so far, as `RowMatches` has distances.

        Raises as `nearest`; InvalidValue for a distance that is negative or NaN.
        """
        if not distance >= 0:
            raise InvalidValue("distance", distance, "0 or more")
        search = self._search(queries, rows, allowed)
        return [search.within(query, distance) for query in range(len(queries))]

    def _search(self, queries: Floats, rows: Ints | None, allowed: Allowed | None) -> _Search:
        projection = project(self._rotation, queries, self.metric)
        with np.errstate(over="ignore"):
            if not np.isfinite(np.asarray(queries, np.float32)).all():
                raise InvalidInput("the query's embedding is beyond the range of float32")
        scan = self._scan
        if rows is not None:
            if self._subset is None or not np.array_equal(self._subset[0], rows):
                self._subset = rows, scan.take(rows)
            scan = self._subset[1]
        return _Search(self, comparable_rows(queries, self.metric), projection, scan, rows, allowed)

    def measure(self, queries: Doubles, query: Ints, rows: Ints) -> Doubles:
        """Exact distances [P] of pairs."""
        out = np.empty(len(rows))

        def part(places: slice) -> None:
            gaps = np.empty((min(PAIRS_AT_ONCE, len(rows)), self._rotation.dim))
            for some in chunks(places.stop - places.start, PAIRS_AT_ONCE):
                pairs = slice(places.start + some.start, places.start + some.stop)
                items = self._take(rows[pairs])
                if self.metric == "cosine":
                    items = comparable_rows(items, self.metric)
                np.subtract(items, queries[query[pairs]], out=gaps[: len(items)], dtype=np.float64)
                out[pairs] = half_squares(gaps[: len(items)])

        in_threads(part, [*chunks(len(rows), max(GRAIN, -(-len(rows) // self._threads)))])
        return out

    def _take(self, rows: Ints) -> Floats:
        if len(self._parts) == 1:
            return self._parts[0].take(rows, axis=0)
        part = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), self._rotation.dim), np.result_type(*self._parts))
        for number in np.unique(part):
            places = part == number
            out[places] = self._parts[number].take(rows[places] - self._starts[number], axis=0)
        return out


class _Search:
    """One call's queries, in the rows that count."""

    def __init__(
        self,
        searcher: ExactSearcher,
        queries: Doubles,
        projection: Projection,
        scan: CodeScan,
        subset: Ints | None,
        allowed: Allowed | None,
    ) -> None:
        self._searcher, self._queries, self._projection = searcher, queries, projection
        self._scan, self._subset, self._allowed = scan, subset, allowed
        self.rows = len(scan)

    def nearest(self, some: slice, k: int) -> tuple[Ints, Doubles]:
        best = _Best(some.stop - some.start, k)
        self._sample(some, best)
        start = 0
        for part in PASSES:
            stop = int(self.rows * part)
            pairs = self._scan.candidates(self._projection.take(some), _limits(best.last), slice(start, stop))
            self._refine(some, *pairs, best)
            start = stop
        return best.rows, best.distances

    def within(self, query: int, distance: float) -> RowMatches:
        place, limit = slice(query, query + 1), _limits(np.array([distance]))
        numbers, rows, _ = self._scan.candidates(self._projection.take(place), limit, slice(0, self.rows))
        numbers, rows = self._counting(numbers + query, self._gallery_rows(rows))
        distances = self._searcher.measure(self._queries, numbers, rows)
        near = distances <= distance
        rows, distances = rows[near], distances[near]
        order = np.lexsort((rows, distances))
        return RowMatches(rows[order][None], distances[order][None])

    def _sample(self, some: slice, best: _Best) -> None:
        """Distances of some rows, so that there are limits; of ever more rows, until there are."""
        step = max(1, self.rows // max(SAMPLE, 4 * best.k))
        waiting = np.arange(some.start, some.stop)
        while len(waiting):
            places = slice(0, self.rows, step)
            bounds = self._scan.bounds(self._projection.take(waiting), places)
            rows = np.arange(0, self.rows, step)
            if self._allowed:
                query, column = np.divmod(np.arange(bounds.size), len(rows))
                bounds.ravel()[~self._allowed(waiting[query], self._gallery_rows(rows[column]))] = np.inf
            count = min(best.k, len(rows))
            columns = np.argpartition(bounds, count - 1, axis=1)[:, :count]
            query = np.repeat(waiting - some.start, count)
            kept = np.take_along_axis(bounds, columns, 1).ravel() < np.inf
            query, rows = query[kept], rows[columns.ravel()[kept]]
            self._measure(some, query, rows, best)
            waiting = np.flatnonzero(np.isinf(best.last)) + some.start
            if step == 1:
                return
            step = max(1, step // 8)

    def _refine(self, some: slice, query: Ints, rows: Ints, bounds: Doubles, best: _Best) -> None:
        """Measure candidates: first those of the lowest bounds, then what the tightened limits leave."""
        first = _firsts(query, bounds, 2 * best.k)
        self._measure(some, query[first], rows[first], best)
        left = np.ones(len(query), bool)
        left[first] = False
        left &= bounds <= _limits(best.last)[query]
        self._measure(some, query[left], rows[left], best)

    def _measure(self, some: slice, query: Ints, rows: Ints, best: _Best) -> None:
        """`query`: numbers from the block's first."""
        numbers, rows = self._counting(query + some.start, self._gallery_rows(rows))
        best.add(numbers - some.start, rows, self._searcher.measure(self._queries, numbers, rows))

    def _counting(self, query: Ints, rows: Ints) -> tuple[Ints, Ints]:
        if self._allowed is None:
            return query, rows
        kept = self._allowed(query, rows)
        return query[kept], rows[kept]

    def _gallery_rows(self, rows: Ints) -> Ints:
        return rows if self._subset is None else self._subset[rows]


class _Best:
    """The nearest so far of each query [Q, k]."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.rows, self.distances = np.full((queries, k), -1), np.full((queries, k), np.inf)

    @property
    def last(self) -> Doubles:
        return self.distances[:, -1]

    def add(self, query: Ints, rows: Ints, distances: Doubles) -> None:
        """Pairs may come twice."""
        queries = len(self.rows)
        query = np.concatenate([np.repeat(np.arange(queries), self.k), query])
        rows = np.concatenate([self.rows.ravel(), rows])
        distances = np.concatenate([self.distances.ravel(), distances])
        order = np.lexsort((rows, distances, query))
        query, rows, distances = query[order], rows[order], distances[order]
        fresh = np.ones(len(query), bool)
        fresh[1:] = (rows[1:] != rows[:-1]) | (query[1:] != query[:-1]) | (rows[1:] < 0)
        query, rows, distances = query[fresh], rows[fresh], distances[fresh]
        starts = np.searchsorted(query, np.arange(queries))
        kept = starts[:, None] + np.arange(self.k)
        self.rows, self.distances = rows[kept], distances[kept]


def _limits(distances: Doubles) -> Doubles:
    """Euclidean distances that contain every pair whose half squared distance, as computed, is at most so large: that
    is wrong by less than (D + 4) 2^-53 of itself, and by what underflows."""
    return np.sqrt(2 * distances) * (1 + 2.0**-30) + 2.0**-500


def _firsts(query: Ints, bounds: Doubles, count: int) -> Ints:
    """Places of the `count` lowest bounds of each query, all if it has fewer; queries ascend."""
    ends = [0, *(np.flatnonzero(np.diff(query)) + 1).tolist(), len(query)]
    return np.concatenate(
        [
            first + np.argpartition(bounds[first:last], count)[:count]
            if last - first > count
            else np.arange(first, last)
            for first, last in itertools.pairwise(ends)
        ]
    )

"""One call's queries: passes over the short codes, ever tighter limits, and exact distances of what they leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.exact_search.codes import Projection, chunks
from pmm.exact_search.pair_distances import PairDistances
from pmm.exact_search.scan import CodeScan
from pmm.utils.arrays import Doubles, Ints

Allowed = Callable[[Ints, Ints], npt.NDArray[np.bool_]]
"""Of pairs [P], the queries' numbers and rows: which count, bool [P]."""

SAMPLE = 8192
"""Rows whose bounds give the first limits."""
FIRST_PASS = 1 / 32
"""Of the rows; each further pass, before which limits are tightened, is at most `GROWTH` times as long."""
GROWTH = 8
QUERIES_AT_ONCE = 64
MANY = 1 / 8
"""Of the rows: to find more of them, all are measured."""
MAX_CANDIDATES = 1 << 22
"""Pairs that a pass may leave, by what the last one left."""


class RowMatches(NamedTuple):
    """Rows of a gallery, the nearest first, ties by row."""

    rows: Ints
    """int64 [Q, k]; -1 where there are no more."""
    distances: Doubles
    """float64 [Q, k]: half the squared Euclidean distance, or 1 - cos; infinite where there are no more."""


class QuerySearch:
    """One call's queries, in the rows that count."""

    def __init__(
        self,
        pairs: PairDistances,
        projection: Projection,
        scan: CodeScan,
        count: int,
        *,
        numbers: Ints | None = None,
        mask: npt.NDArray[np.bool_] | None = None,
        allowed: Allowed | None = None,
    ) -> None:
        """`count`: rows that count, perhaps but for `allowed`."""
        self._pairs, self._projection, self._scan, self.count = pairs, projection, scan, count
        self._numbers, self._mask, self._allowed = numbers, mask, allowed

    def nearest(self, some: slice, k: int) -> tuple[Ints, Doubles]:
        if k > MANY * len(self._scan):
            return self._sorted(some, k)
        best = _Best(some.stop - some.start, k)
        left = self._sample(some, best)
        start, size = 0, max(SAMPLE, int(len(self._scan) * FIRST_PASS))
        while len(left) and start < len(self._scan):
            stop = min(start + size, len(self._scan))
            limits = _limits(best.distances[left - some.start, -1])
            query, rows, bounds = self._scan.candidates(self._projection.take(left), limits, slice(start, stop))
            self._refine(some, *self._counting(left[query], rows, bounds), best)
            size = min(GROWTH * size, max(1, size * MAX_CANDIDATES // max(1, len(rows))))
            start = stop
        return best.rows, best.distances

    def within(self, some: slice, distance: float) -> list[RowMatches]:
        queries = np.arange(some.start, some.stop)
        projection, limits = self._projection.take(some), _limits(np.full(len(queries), distance))
        found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
        for place in chunks(len(self._scan), MAX_CANDIDATES // len(queries)):
            query, rows, bounds = self._scan.candidates(projection, limits, place)
            query, rows, _ = self._counting(queries[query], rows, bounds)
            distances = self._pairs.exact(query, rows)
            near = distances <= distance
            found.append((query[near], rows[near], distances[near]))
        query, rows, distances = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((rows, distances, query))
        ends = np.searchsorted(query[order], queries[1:])
        return [RowMatches(rows[part][None], distances[part][None]) for part in np.split(order, ends)]

    def _sorted(self, some: slice, k: int) -> tuple[Ints, Doubles]:
        """`nearest`, from all distances."""
        best, every = _Best(some.stop - some.start, k), np.arange(len(self._scan))
        for place, query in enumerate(range(some.start, some.stop)):
            asked, rows, _ = self._counting(np.full(len(every), query), every, np.zeros(len(every)))
            distances = self._pairs.exact(asked, rows)
            order = np.lexsort((rows, distances))[:k]
            best.rows[place, : len(order)], best.distances[place, : len(order)] = rows[order], distances[order]
        return best.rows, best.distances

    def _sample(self, some: slice, best: _Best) -> Ints:
        """Measure some rows, so that there are limits; of ever more rows, until each query has k. Returns the queries
        that are not done: others have fewer than k rows, all of which are measured."""
        left = np.arange(some.start, some.stop)
        step = max(1, len(self._scan) // max(SAMPLE, 4 * best.k))
        waiting = left
        while True:
            places = range(0, len(self._scan), step)
            most = MAX_CANDIDATES if self._mask is None and self._allowed is None else MAX_CANDIDATES // 4
            for part in chunks(len(waiting), max(1, most // max(1, len(places)))):  # pairs are listed for these
                self._measure_lowest(some, waiting[part], places, best)
            waiting = left[np.isinf(best.distances[:, -1])]
            if step == 1 or not len(waiting):
                return np.setdiff1d(left, waiting, assume_unique=True)
            step = max(1, step // 8)

    def _measure_lowest(self, some: slice, queries: Ints, places: range, best: _Best) -> None:
        """Measure for each of the queries k rows among `places` of the lowest bounds."""
        bounds = self._scan.bounds(self._projection.take(queries), slice(places.start, places.stop, places.step))
        rows = np.arange(places.start, places.stop, places.step)
        if self._mask is None and self._allowed is None:
            count = min(best.k, len(rows))
            lowest = np.argpartition(bounds, count - 1, axis=1)[:, :count]
            query, numbers = np.repeat(queries, count), self._gallery_rows(rows[lowest.ravel()])
        else:
            pairs = np.repeat(queries, len(rows)), np.tile(rows, len(queries))
            query, numbers, lower = self._counting(*pairs, bounds.ravel())
            first = _firsts(query, lower, best.k)
            query, numbers = query[first], numbers[first]
        best.add(query - some.start, numbers, self._pairs.exact(query, numbers))

    def _refine(self, some: slice, query: Ints, rows: Ints, bounds: Doubles, best: _Best) -> None:
        """Measure candidates: first those of the lowest bounds, then what the tightened limits leave."""
        for closer in (True, False):
            first = _firsts(query, bounds, 2 * best.k)
            best.add(query[first] - some.start, rows[first], self._pairs.exact(query[first], rows[first]))
            left = ~(bounds > _limits(best.distances[:, -1])[query - some.start])  # NaN excludes nothing
            left[first] = False
            query, rows, bounds = query[left], rows[left], bounds[left]
            if not closer or not self._pairs.float32_pays(rows):
                break
            bounds = self._pairs.float32_bounds(query, rows)
        best.add(query - some.start, rows, self._pairs.exact(query, rows))

    def _counting(self, query: Ints, rows: Ints, bounds: Doubles) -> tuple[Ints, Ints, Doubles]:
        """Of pairs with rows of the scan those that count, with rows of the gallery."""
        if self._mask is not None:
            kept = self._mask[rows]
            query, rows, bounds = query[kept], rows[kept], bounds[kept]
        rows = self._gallery_rows(rows)
        if self._allowed is not None:
            kept = self._allowed(query, rows)
            query, rows, bounds = query[kept], rows[kept], bounds[kept]
        return query, rows, bounds

    def _gallery_rows(self, rows: Ints) -> Ints:
        return rows if self._numbers is None else self._numbers[rows]


class _Best:
    """The nearest so far of each query [Q, k], as `RowMatches` has them."""

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.rows, self.distances = np.full((queries, k), -1), np.full((queries, k), np.inf)

    def add(self, query: Ints, rows: Ints, distances: Doubles) -> None:
        """Pairs may come twice."""
        last, last_row = self.distances[query, -1], self.rows[query, -1]
        closer = (distances < last) | ((distances == last) & (rows < last_row))
        query, rows, distances = query[closer], rows[closer], distances[closer]
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
    return np.sqrt(distances) * (2**0.5 * (1 + 2.0**-30)) + 2.0**-500


def _firsts(query: Ints, bounds: Doubles, count: int) -> Ints:
    """Places of the `count` lowest bounds of each query, all if it has fewer; queries ascend."""
    if not len(query):
        return query
    ends = [0, *(np.flatnonzero(np.diff(query)) + 1).tolist(), len(query)]
    return np.concatenate(
        [
            first + np.argpartition(bounds[first:last], count)[:count]
            if last - first > count
            else np.arange(first, last)
            for first, last in itertools.pairwise(ends)
        ]
    )

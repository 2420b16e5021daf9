"""Ranks of each query's relevant gallery items, counted without sorting the gallery. Loads no torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.evaluation.compiled import rank_kernel
from pmm.evaluation.distance_blocks import Blocks, Distances, by_precision
from pmm.evaluation.pid_index import PidIndex
from pmm.evaluation.windows import DistanceWindows, NumpyWindowCounts, WindowCounts
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.threads import single_blas_thread

MAX_OPEN = 40
"""One gallery item in so many may be left open; if more are, the block is computed at higher precision."""
FIRST_QUERIES = 32
PAIRS_AT_ONCE = 1 << 18


class Ranks(NamedTuple):
    """The relevant items of some queries: by query, then by rank."""

    query: Ints
    """[T], ascending."""
    rank: Ints
    """From 1, in the gallery without junk [T]."""


def relevant_ranks(distances: Distances, index: PidIndex, blocks: Blocks, threads: int) -> Iterator[Ranks]:
    """Ranks of all relevant items, block by block of queries; ties go to the lower gallery index.

    An item's rank is one more than the number of items before it. Each of `threads` threads works on whole blocks,
    matrix products included: with BLAS's own threads, all but one would be idle while ranks are counted. A small block
    goes first, alone, to find out which precision the distances need.
    """
    queries, gallery = distances.shape
    buffers = threading.local()
    level = _Level()

    def block_ranks(rows: slice) -> Ranks:
        if not hasattr(buffers, "block"):  # new memory costs as much as what is written there
            buffers.block = np.empty((min(blocks.queries, queries), gallery), np.float32)
        return _block_ranks(distances, index, rows, buffers.block, level)

    first = min(FIRST_QUERIES, blocks.queries, queries)
    waiting: deque[Future[Ranks]] = deque()
    with single_blas_thread(), ThreadPoolExecutor(threads) as pool:
        yield pool.submit(block_ranks, slice(0, first)).result()
        for rows in blocks.cut(queries, threads, first=first):
            waiting.append(pool.submit(block_ranks, rows))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        for done in waiting:
            yield done.result()


class _Level:
    """The precision at which distances are computed: raised when a block leaves so much open that the next level is
    faster, as with embeddings of an untrained network, which are close together."""

    value = 0


def _block_ranks(distances: Distances, index: PidIndex, rows: slice, buffer: Singles, level: _Level) -> Ranks:
    """Ranks of the queries `rows`, from distances at `level` or a higher one."""
    pairs, first = index.pairs(rows), level.value
    blocks = by_precision(distances, rows, buffer[: rows.stop - rows.start], first)
    for number, block, errors in blocks:
        most = block.size // MAX_OPEN if block.dtype == np.float32 else block.size
        with np.errstate(over="ignore"):  # of what lies too far to be of use
            ranks = _Block(distances, rows.start, block, errors, *pairs, comparable=number > 0).ranks(most)
        if ranks is not None:
            return ranks
        level.value = max(level.value, number + 1)
    raise AssertionError("float64 may leave everything open")


class _Block:
    """Distances of some queries [q, G], and their relevant items [T]: by query, then by distance.

    An item comes before a relevant one if its distance is smaller by more than the bounds on both errors. Items closer
    together than that are open: a relevant item is `pending` if its window of error holds another item.
    """

    def __init__(
        self,
        source: Distances,
        first: int,
        distances: Floats,
        errors: Doubles,
        query: Ints,
        item: Ints,
        junk: npt.NDArray[np.bool_],
        *,
        comparable: bool,
    ) -> None:
        """`first` is the first query of the block; `comparable`: its distances compare with those of pairs."""
        self.source, self.first, self.distances, self.errors = source, first, distances, errors
        distances[query[junk], item[junk]] = np.inf
        query, item = query[~junk], item[~junk]
        values, margin = distances[query, item].astype(np.float64), 2 * errors[query]  # the item's, and the other's
        if comparable and errors.any():
            values, close = source.close_pairs(query + first, item)
            margin = errors[query] + close
        order = np.lexsort((values, query))
        self.query, self.item, values, margin = query[order], item[order], values[order], margin[order]
        self.low = _outwards(values - margin, distances.dtype, -np.inf)
        self.high = _outwards(values + margin, distances.dtype, np.inf)
        self.bounds = np.searchsorted(self.query, np.arange(len(distances) + 1))
        """Where each query's relevant items begin, and where the last one's end [q + 1]."""
        self.rank = np.ones(len(self.query), np.int64)
        """One more than the items that are known to come before [T]."""
        self.pending = np.zeros(len(self.query), bool)

    def ranks(self, most_open: int) -> Ranks | None:
        """The ranks, for which open items are measured exactly. None if more than `most_open` are open."""
        counts: WindowCounts = (rank_kernel() if self.distances.dtype == np.float32 else None) or NumpyWindowCounts()
        before, upto = counts.count(self.distances, DistanceWindows(self.bounds, self.low, self.high))
        self.rank, self.pending = before + 1, upto > before + 1
        crowds = self._crowds(before, upto)
        if crowds.size.sum() > most_open:
            return None
        for rows in _cut(crowds.per_query, self._pairs_at_once):
            windows, count = crowds.windows(rows), crowds.per_query[rows].sum()
            if count:
                self._settle(counts.within(self.distances[rows], windows, count) + rows.start * self.distances.shape[1])
        return Ranks(self.query + self.first, self.rank[np.lexsort((self.rank, self.query))])

    def _crowds(self, before: Ints, upto: Ints) -> _Crowds:
        """The crowds of the pending items, given how many lie `before` and `upto` each window [T]. Each pending item's
        rank becomes one more than what lies before its crowd, but for the open ones there."""
        places = np.flatnonzero(self.pending)
        query, low, high = self.query[places], self.low[places], self.high[places]
        apart = (query[1:] != query[:-1]) | (low[1:] > high[:-1])
        start, end = np.flatnonzero(np.append(True, apart)[: len(places)]), np.flatnonzero(np.append(apart, True))
        end = end[: len(start)]
        nearer = before[places[start]]
        crowds = _Crowds(len(self.distances), query[start], low[start], high[end], upto[places[end]] - nearer)
        self.rank[places] = np.repeat(1 + nearer - crowds.open_before, end - start + 1)
        return crowds

    @property
    def _pairs_at_once(self) -> int:
        """Pairs whose measures fit into the memory that a block in float64 would use (see `Blocks`)."""
        queries, gallery = self.distances.shape
        spare = queries // 16 if self.distances.dtype == np.float32 else 0
        return max(1, min(PAIRS_AT_ONCE // gallery, spare)) * gallery

    def _count(
        self, relevant: Ints, windows: tuple[Ints, Floats, Floats], query: Ints, low: Floats, high: Floats
    ) -> npt.NDArray[np.bool_]:
        """Count what comes before the items `relevant` [R], whose `windows` are ascending, among items of ascending
        queries that lie within `low` and `high` [P]; which of them are open [P]."""
        row, lows, highs = windows
        # of each item, how many windows it may have reached, and how many it is surely beyond
        reached = np.searchsorted(_in_order(row, lows), _in_order(query, high), "right")
        beyond = np.searchsorted(_in_order(row, highs), _in_order(query, low), "left")
        begins = np.searchsorted(query, row)
        nearer, upto = (np.bincount(n, minlength=len(row) + 1).cumsum()[:-1] - begins for n in (reached, beyond))
        self.pending[relevant] = upto > nearer + 1
        windows_pending = np.concatenate([[0], self.pending[relevant].cumsum()])
        is_open = windows_pending[reached] > windows_pending[beyond]
        still = np.bincount(reached[is_open], minlength=len(row) + 1).cumsum()[:-1]
        still -= np.searchsorted(query[is_open], row)
        self.rank[relevant] += np.where(self.pending[relevant], nearer - still, nearer)
        return is_open

    def _settle(self, pairs: Ints) -> None:
        """Add to the rank of each pending item its place among the open ones: pairs of a query and an item, numbered
        row by row of the block, ascending; all of these queries."""
        gallery = self.distances.shape[1]
        query, items = np.divmod(pairs, gallery)
        values: Floats
        if self.errors.any():
            values, errors = self.source.close_pairs(query + self.first, items)
            if errors.any():
                relevant, place = self._pending(query, pairs)
                order = np.lexsort((values[place], self.query[relevant]))
                relevant, place = relevant[order], place[order]
                low, high = values - errors, values + errors
                is_open = self._count(relevant, (self.query[relevant], low[place], high[place]), query, low, high)
                query, items, pairs = query[is_open], items[is_open], pairs[is_open]
                values = self.source.exact_pairs(query + self.first, items)
        else:
            values = self.distances[query, items]
        before = np.empty(len(items), np.int64)
        before[np.lexsort((values, query))] = np.arange(len(items))  # stable: ties go to the lower index
        before -= np.searchsorted(query, query)
        relevant, place = self._pending(query, pairs)
        self.rank[relevant] += before[place]
        self.pending[relevant] = False

    def _pending(self, query: Ints, pairs: Ints) -> tuple[Ints, Ints]:
        """The pending items of these queries, and where each is among the open `pairs`."""
        relevant = np.flatnonzero(self.pending & np.isin(self.query, query))
        return relevant, np.searchsorted(pairs, self.query[relevant] * self.distances.shape[1] + self.item[relevant])


class _Crowds(NamedTuple):
    """Pending windows that overlap, taken for one: all items in it are open. By query, then by distance [C]."""

    queries: int
    """In the block."""
    query: Ints
    low: Floats
    high: Floats
    size: Ints
    """Open items in it."""

    @property
    def open_before(self) -> Ints:
        """Open items of the same query that are nearer than the crowd [C]."""
        before = self.size.cumsum() - self.size
        return before - before[np.searchsorted(self.query, self.query)]

    @property
    def per_query(self) -> Ints:
        """Open items of each query of the block [q]."""
        return np.bincount(self.query, self.size, self.queries).astype(np.int64)

    def windows(self, rows: slice) -> DistanceWindows:
        """The crowds of the queries `rows` as windows."""
        bounds = np.searchsorted(self.query, np.arange(rows.start, rows.stop + 1))
        some = slice(bounds[0], bounds[-1])
        return DistanceWindows(bounds - bounds[0], self.low[some], self.high[some])


def _outwards(bounds: Doubles, dtype: Any, end: float) -> Floats:
    """Bounds in `dtype`, rounded away from the interval."""
    rounded = bounds.astype(dtype)
    return rounded if rounded.dtype == bounds.dtype else np.nextafter(rounded, dtype.type(end))


def _cut(counts: Ints, most: int) -> Iterator[slice]:
    """Rows whose `counts` add up to `most` at most, or one row."""
    ends, start = counts.cumsum(), 0
    while start < len(counts):
        before = ends[start] - counts[start]
        stop = max(start + 1, int(np.searchsorted(ends, before + most, "right")))
        yield slice(start, stop)
        start = stop


def _in_order(query: Ints, values: Floats) -> npt.NDArray[np.complex128]:
    """What compares as (query, value): numpy orders complex numbers by their real parts first."""
    keys = np.empty(len(query), np.complex128)
    keys.real, keys.imag = query, values
    return keys

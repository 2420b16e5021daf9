"""Ranks of queries' relevant gallery items: counted, the gallery is never sorted. Loads no torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from pmm.evaluation.distances import Blocks, Distances, Doubles, Floats, Ints, Singles
from pmm.utils.errors import InvalidInput

FEW_ITEMS = 128
"""Gallery items per relevant one up to which sorting each into its place is quicker than counting for each."""
MAX_OPEN = 256
"""One gallery item in so many may be left open by float32; beyond it a block is made in float64."""
PAIRS_AT_ONCE = 1 << 18


class Ranks(NamedTuple):
    """The relevant items of some queries: by query, then by rank."""

    query: Ints
    """[T], ascending."""
    rank: Ints
    """From 1, in the gallery without junk [T]."""


class PidIndex(NamedTuple):
    """Where in the gallery each query's pid is, and the cameras of all."""

    query_camids: Ints
    gallery_camids: Ints
    by_pid: Ints
    """Gallery indices [G]; those of one pid are side by side and ascending."""
    first: Ints
    """Where in `by_pid` each query's pid begins [Q]."""
    last: Ints
    """And ends [Q]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Q, G."""
        return len(self.query_camids), len(self.gallery_camids)

    @property
    def most_pairs(self) -> int:
        """The most gallery items that one query's pid has."""
        return int((self.last - self.first).max(initial=0))

    @classmethod
    def of(cls, query_pids: Any, gallery_pids: Any, query_camids: Any, gallery_camids: Any) -> PidIndex:
        """Raises InvalidInput for shapes that do not fit."""
        q_pids, g_pids, q_cams, g_cams = map(_integers, (query_pids, gallery_pids, query_camids, gallery_camids))
        for name, pids, camids in (("query", q_pids, q_cams), ("gallery", g_pids, g_cams)):
            if pids.ndim != 1 or camids.shape != pids.shape:
                raise InvalidInput(f"{name}: pids {list(pids.shape)}, camids {list(camids.shape)}", expected="[N], [N]")
        by_pid = np.argsort(g_pids, kind="stable")
        ordered = g_pids[by_pid]
        return cls(q_cams, g_cams, by_pid, np.searchsorted(ordered, q_pids), np.searchsorted(ordered, q_pids, "right"))

    def pairs(self, rows: slice) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        """Each of the queries `rows`, counted from the first of them, with each gallery item of its pid [P], ascending;
        and whether the pair is junk, seen by one camera."""
        counts = self.last[rows] - self.first[rows]
        query = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(query)) - np.repeat(counts.cumsum() - counts, counts)
        item = self.by_pid[self.first[rows][query] + within]
        return query, item, self.query_camids[rows][query] == self.gallery_camids[item]


def relevant_ranks(distances: Distances, index: PidIndex, blocks: Blocks, threads: int) -> Iterator[Ranks]:
    """Ranks of all relevant items, block by block of queries; ties go to the lower gallery index.

    An item's rank is one more than the number of items before it. Each of `threads` threads does whole blocks, its
    matrix products included: in turn with BLAS's own threads, one would count while the others have nothing to do.
    """
    queries, gallery = distances.shape
    buffers = threading.local()
    use_float64 = threading.Event()

    def block_ranks(rows: slice) -> Ranks:
        if not hasattr(buffers, "block"):  # new memory costs as much as what is written there
            buffers.block = np.empty((min(blocks.queries, queries), gallery), np.float32)
        return _block_ranks(distances, index, rows, buffers.block, use_float64)

    waiting: deque[Future[Ranks]] = deque()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        for rows in blocks.cut(queries, threads):
            waiting.append(pool.submit(block_ranks, rows))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        for done in waiting:
            yield done.result()


def _block_ranks(
    distances: Distances, index: PidIndex, rows: slice, buffer: Singles, use_float64: threading.Event
) -> Ranks:
    """Ranks of the queries `rows`. Sets `use_float64`, and heeds it, if float32 leaves so much open that float64 is the
    quicker way: embeddings of an untrained network, say, are close together."""
    pairs = index.pairs(rows)
    if not use_float64.is_set():
        block, errors = distances.approximate(rows, buffer[: rows.stop - rows.start])
        most = block.size // MAX_OPEN if block.dtype == np.float32 else block.size
        if (ranks := _Block(block, errors, *pairs).ranks(distances, rows.start, most)) is not None:
            return ranks
        use_float64.set()
    block, errors = distances.float64(rows)
    ranks = _Block(block, errors, *pairs).ranks(distances, rows.start, block.size)
    assert ranks is not None
    return ranks


class _Pairs(NamedTuple):
    """Queries of a block and gallery items, ascending."""

    query: Ints
    item: Ints


class _Block:
    """Distances of some queries [q, G], and their relevant items [T]: by query, then by distance."""

    def __init__(
        self, distances: Floats, errors: Doubles, query: Ints, item: Ints, junk: npt.NDArray[np.bool_]
    ) -> None:
        self.distances, self.errors = distances, errors
        distances[query[junk], item[junk]] = np.inf
        query, item = query[~junk], item[~junk]
        values = distances[query, item]
        order = np.lexsort((values, query))
        self.query, self.item, values = query[order], item[order], values[order]
        margin = (2 * errors).astype(distances.dtype)[self.query]  # the item's error, and the other's
        self.low, self.high = values - margin, values + margin
        self.bounds = np.searchsorted(self.query, np.arange(len(distances) + 1))
        """Where each query's relevant items begin, and where the last one's end [q + 1]."""

    def ranks(self, distances: Distances, first: int, most_open: int) -> Ranks | None:
        """The ranks; what is open is measured exactly. None if more than `most_open` items are.

        `first` is the first query of the block.
        """
        rank = np.zeros(len(self.query), np.int64)
        relevant = np.diff(self.bounds)
        farthest = np.full(len(relevant), -np.inf, self.low.dtype)
        farthest[relevant > 0] = self.high[self.bounds[1:][relevant > 0] - 1]
        near: npt.NDArray[np.bool_] = np.less_equal(self.distances, farthest[:, None])
        counts = np.count_nonzero(near, axis=1)
        many = counts > FEW_ITEMS * relevant
        waiting: list[_Pairs] = []
        left_open = 0
        for rows in _cut(counts, near.shape[1]):
            for query in (np.flatnonzero(many[rows]) + rows.start).tolist():
                if self._count(rank, query, near[query]):
                    near[query], counts[query] = False, 0
            if not counts[rows].any():
                continue
            open_pairs = self._place(rank, rows, near[rows], counts[rows] > 0)
            waiting.append(open_pairs)
            left_open += len(open_pairs.query) - int(relevant[np.unique(open_pairs.query)].sum())
            if left_open > most_open:
                return None
            if sum(len(each.query) for each in waiting) > PAIRS_AT_ONCE:
                self._settle(rank, waiting, distances, first)
                waiting = []
        self._settle(rank, waiting, distances, first)
        return Ranks(self.query + first, rank[np.lexsort((rank, self.query))])

    def _count(self, rank: Ints, query: int, near: npt.NDArray[np.bool_]) -> bool:
        """Rank the relevant items of `query` by passing over its `near` items for each, if none of them is open."""
        relevant = slice(self.bounds[query], self.bounds[query + 1])
        values = self.distances[query][near]
        mask = np.empty(len(values), bool)
        upto = np.array([np.count_nonzero(np.less_equal(values, bound, out=mask)) for bound in self.high[relevant]])
        nearer = np.array([np.count_nonzero(np.less(values, bound, out=mask)) for bound in self.low[relevant]])
        certain = bool((upto == nearer + 1).all())
        if certain:
            rank[relevant] = upto
        return certain

    def _place(self, rank: Ints, rows: slice, near: npt.NDArray[np.bool_], unranked: npt.NDArray[np.bool_]) -> _Pairs:
        """Rank the relevant items of the queries `rows` that have none yet [r] among their `near` items [r, G]. Where
        an item lies within another's bounds: say how many come before the relevant ones, and return the items within
        any bounds."""
        flat = np.flatnonzero(near)
        query, item = np.divmod(flat, near.shape[1])
        values = self.distances[rows].reshape(-1)[flat]
        start, stop = self.bounds[rows.start], self.bounds[rows.stop]
        row = self.query[start:stop] - rows.start
        items = _in_order(query, values)
        # of each item, how many of the bounds it has reached, and how many it is beyond
        reached = np.searchsorted(_in_order(row, self.low[start:stop]), items, "right")
        beyond = np.searchsorted(_in_order(row, self.high[start:stop]), items, "left")
        inside = reached > beyond
        before = np.concatenate([[0], np.bincount(beyond[~inside], minlength=len(row))]).cumsum()
        begins = (self.bounds[rows] - start)[row]
        before = before[1:] - before[begins]
        query, item = query[inside], item[inside]
        relevant = np.diff(self.bounds[rows.start : rows.stop + 1])
        is_open = np.bincount(query, minlength=len(near)) > relevant
        within = np.where(is_open[row], 0, np.arange(len(row)) - begins)
        placed = unranked[row]
        rank[start:stop][placed] = (before + within + 1)[placed]
        left = is_open[query]
        return _Pairs(query[left] + rows.start, item[left])

    def _settle(self, rank: Ints, waiting: list[_Pairs], distances: Distances, first: int) -> None:
        """Add to each `rank` the place of its item among the open ones."""
        if not any(len(each.query) for each in waiting):
            return
        query, items = map(np.concatenate, zip(*waiting, strict=True))
        exact = distances.exact_pairs(query + first, items) if self.errors.any() else self.distances[query, items]
        place = np.empty(len(items), np.int64)
        place[np.lexsort((exact, query))] = np.arange(len(items))  # stable: ties go to the lower index
        place -= np.searchsorted(query, query)
        relevant = np.flatnonzero(np.isin(self.query, query))
        gallery = self.distances.shape[1]
        pair = np.searchsorted(query * gallery + items, self.query[relevant] * gallery + self.item[relevant])
        rank[relevant] += place[pair]


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


def _integers(values: Any) -> Ints:
    return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values, dtype=np.int64)

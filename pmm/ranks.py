"""Ranks of queries' relevant gallery items: counted, the gallery is never sorted. Loads no torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from pmm.distances import Blocks, Distances, Doubles, Floats, Ints, Singles
from pmm.errors import UserError

FEW_ITEMS = 128
"""Gallery items per relevant one up to which sorting each into its place is quicker than counting for each."""
MOST_OPEN = 256
"""One gallery item in so many may be left open by float32; beyond it a block is made in float64."""
PAIRS_AT_ONCE = 1 << 18
NONE = np.empty(0, np.int64)


class Ranks(NamedTuple):
    """The relevant items of some queries: by query, then by rank."""

    query: Ints
    """[T], ascending."""
    rank: Ints
    """From 1, in the gallery without junk [T]."""


class Labels(NamedTuple):
    """Who is where, and the gallery in the order of its pids."""

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
    def of(cls, query_pids: Any, gallery_pids: Any, query_camids: Any, gallery_camids: Any) -> Labels:
        """Raises UserError for shapes that do not fit."""
        q_pids, g_pids, q_cams, g_cams = map(_integers, (query_pids, gallery_pids, query_camids, gallery_camids))
        for name, pids, camids in (("query", q_pids, q_cams), ("gallery", g_pids, g_cams)):
            if pids.ndim != 1 or camids.shape != pids.shape:
                raise UserError(f"{name}: pids {list(pids.shape)}, camids {list(camids.shape)}; expected [N], [N]")
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


def relevant_ranks(distances: Distances, labels: Labels, blocks: Blocks, threads: int) -> Iterator[Ranks]:
    """Ranks of all relevant items, block by block of queries; ties go to the lower gallery index.

    An item's rank is one more than the number of items before it. Each of `threads` threads does whole blocks, its
    matrix products included: in turn with BLAS's own threads, one would count while the others have nothing to do.
    """
    queries, gallery = distances.shape
    buffers = threading.local()
    closely = threading.Event()

    def ranked(rows: slice) -> Ranks:
        if not hasattr(buffers, "mine"):  # new memory costs as much as what is written there
            buffers.mine = np.empty((min(blocks.queries, queries), gallery), np.float32)
        return _ranked(distances, labels, rows, buffers.mine, closely)

    waiting: deque[Future[Ranks]] = deque()
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(threads) as pool:
        for rows in blocks.cut(queries, threads):
            waiting.append(pool.submit(ranked, rows))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        for done in waiting:
            yield done.result()


def _ranked(distances: Distances, labels: Labels, rows: slice, buffer: Singles, closely: threading.Event) -> Ranks:
    """Ranks of the queries `rows`. Sets `closely`, and heeds it, if float32 leaves so much open that float64 is the
    quicker way: embeddings of an untrained network, say, are close together."""
    pairs = labels.pairs(rows)
    if not closely.is_set():
        found, errors = distances.about(rows, buffer[: rows.stop - rows.start])
        most = found.size // MOST_OPEN if found.dtype == np.float32 else found.size
        if (ranks := _Block(found, errors, *pairs).ranks(distances, rows.start, most)) is not None:
            return ranks
        closely.set()
    found, errors = distances.closely(rows)
    ranks = _Block(found, errors, *pairs).ranks(distances, rows.start, found.size)
    assert ranks is not None
    return ranks


class _Open(NamedTuple):
    """What a query's distances leave open."""

    query: int
    relevant: slice
    """Of the block's relevant items, the query's."""
    items: Ints
    """These, and gallery items within the error of one of them, ascending."""


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

    def ranks(self, distances: Distances, first: int, most_open: int) -> Ranks | None:
        """The ranks; what is open is measured exactly. None if more than `most_open` items are.

        `first` is the first query of the block.
        """
        rank = np.empty(len(self.query), np.int64)
        waiting: list[_Open] = []
        waits = left_open = 0
        mask = np.empty(self.distances.shape[1], bool)
        bounds = np.searchsorted(self.query, np.arange(len(self.distances) + 1)).tolist()
        for query, (start, stop) in enumerate(pairwise(bounds)):
            if start == stop:
                continue
            mine = slice(start, stop)
            rank[mine], near = _count(self.distances[query], self.low[mine], self.high[mine], mask)
            if len(near):
                waiting.append(_Open(query, mine, near))
                waits, left_open = waits + len(near), left_open + len(near) - (stop - start)
            if left_open > most_open:
                return None
            if waits > PAIRS_AT_ONCE:
                self._settle(rank, waiting, distances, first)
                waiting, waits = [], 0
        self._settle(rank, waiting, distances, first)
        return Ranks(self.query + first, rank[np.lexsort((rank, self.query))])

    def _settle(self, rank: Ints, waiting: list[_Open], distances: Distances, first: int) -> None:
        """Add to each `rank` the place of its item among the open ones."""
        if not waiting:
            return
        sizes = np.array([len(each.items) for each in waiting])
        query = np.repeat([each.query for each in waiting], sizes)
        items = np.concatenate([each.items for each in waiting])
        exact = distances.exact(query + first, items) if self.errors.any() else self.distances[query, items]
        place = np.empty(len(items), np.int64)
        place[np.lexsort((exact, query))] = np.arange(len(items))  # stable: ties go to the lower index
        place -= np.repeat(sizes.cumsum() - sizes, sizes)
        relevant = np.concatenate([np.arange(each.relevant.start, each.relevant.stop) for each in waiting])
        gallery = self.distances.shape[1]
        own = np.searchsorted(query * gallery + items, self.query[relevant] * gallery + self.item[relevant])
        rank[relevant] += place[own]


def _count(row: Floats, low: Floats, high: Floats, mask: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Of `row` [G] and ascending bounds [R] of the relevant items: their ranks [R], and no items. Or, where an item
    lies within another's bounds: how many come before the relevant ones, and one, without the items within any bounds,
    and these items, ascending."""
    near = row[np.less_equal(row, high[-1], out=mask)]
    if len(near) >= FEW_ITEMS * len(low):
        some = np.empty(len(near), bool)
        nearer = np.array([np.count_nonzero(np.less(near, bound, out=some)) for bound in low])
        upto = np.array([np.count_nonzero(np.less_equal(near, bound, out=some)) for bound in high])
        if (upto == nearer + 1).all():
            return upto, NONE
    # of each item, how many of the bounds it has reached, and how many it is beyond
    reached, beyond = np.searchsorted(low, near, "right"), np.searchsorted(high, near, "left")
    inside = reached > beyond
    before = np.bincount(beyond[~inside], minlength=len(low) + 1)[:-1].cumsum()
    if np.count_nonzero(inside) == len(low):
        return before + np.arange(1, len(low) + 1), NONE
    return before + 1, np.flatnonzero(mask)[inside]


def _integers(values: Any) -> Ints:
    return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values, dtype=np.int64)

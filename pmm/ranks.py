"""Ranks of queries' relevant gallery items: counted, the gallery is never sorted. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.distances import Blocks, Distances, Doubles, Floats, Ints
from pmm.errors import UserError

FEW_ITEMS = 128
"""Gallery items per relevant one up to which sorting each into its place is quicker than counting for each."""
MOST_OPEN = 256
"""One gallery item in so many may be left open by float32; beyond it a block is made in float64."""
PAIRS_AT_ONCE = 1 << 20


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

    An item's rank is one more than the number of items before it.
    """
    queries, gallery = distances.shape
    buffer = np.empty((min(blocks.queries, queries), gallery), np.float32)
    closely = False
    with ThreadPoolExecutor(threads) as pool:
        for rows in blocks.cut(queries):
            pairs = labels.pairs(rows)
            if not closely:
                found, errors = distances.about(rows, buffer[: rows.stop - rows.start])
                block = _Block(found, errors, *pairs)
                block.count(pool, threads)
                # embeddings of an untrained network, say, are too close together for float32
                closely = bool(block.errors.any()) and block.left_open > block.distances.size // MOST_OPEN
            if closely:
                found, errors = distances.closely(rows)
                block = _Block(found, errors, *pairs)
                block.count(pool, threads)
            yield block.settled(distances, rows.start)


class _Open(NamedTuple):
    """What a query's distances leave open."""

    query: int
    relevant: Ints
    """Places in the block's relevant items."""
    items: Ints
    """Gallery items within the error of one of these, ascending."""


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
        self.nearer, self.upto = np.zeros(len(query), np.int64), np.zeros(len(query), np.int64)
        """Items that are certainly nearer, and items that may be no farther, the relevant one included [T]."""

    @property
    def left_open(self) -> int:
        """Pairs whose order the distances' errors leave open."""
        return int((self.upto - self.nearer).sum()) - len(self.item)

    def count(self, pool: ThreadPoolExecutor, threads: int) -> None:
        """Fill `nearer` and `upto`."""
        bounds = np.searchsorted(self.query, np.arange(len(self.distances) + 1)).tolist()
        spans = [(row, slice(*span)) for row, span in enumerate(pairwise(bounds)) if span[0] < span[1]]

        def some(start: int) -> None:
            mask = np.empty(self.distances.shape[1], bool)
            for row, mine in spans[start::threads]:
                _count(self.distances[row], self.low[mine], self.high[mine], self.nearer[mine], self.upto[mine], mask)

        list(pool.map(some, range(threads)))

    def settled(self, distances: Distances, first: int) -> Ranks:
        """The ranks; what is open is measured exactly. `first` is the first query of the block."""
        rank = self.nearer + 1
        unsettled = np.flatnonzero(self.upto - self.nearer > 1)
        waiting: list[_Open] = []
        if len(unsettled):
            queries, starts = np.unique(self.query[unsettled], return_index=True)
            for query, group in zip(queries.tolist(), np.split(unsettled, starts[1:]), strict=True):
                waiting.append(_Open(query, group, self._near(query, group)))
                if sum(len(each.items) for each in waiting) > PAIRS_AT_ONCE:
                    self._settle(rank, waiting, distances, first)
                    waiting = []
            self._settle(rank, waiting, distances, first)
        return Ranks(self.query + first, rank[np.lexsort((rank, self.query))])

    def _settle(self, rank: Ints, waiting: list[_Open], distances: Distances, first: int) -> None:
        if not waiting:
            return
        sizes = np.array([len(each.items) for each in waiting])
        queries = np.repeat([each.query for each in waiting], sizes)
        items = np.concatenate([each.items for each in waiting])
        exact = distances.exact(queries + first, items) if self.errors.any() else self.distances[queries, items]
        for each, values in zip(waiting, np.split(exact, sizes.cumsum()[:-1]), strict=True):
            rank[each.relevant] += self._before(*each, values)

    def _before(self, query: int, group: Ints, items: Ints, exact: Floats) -> Ints:
        """How many of `items`, whose distances are `exact`, come before each relevant item of `group`, of those within
        the error of it."""
        about, found = self.distances[query, items], np.empty(len(group), np.int64)
        at_once = max(1, PAIRS_AT_ONCE // len(items))
        for start in range(0, len(group), at_once):
            some = group[start : start + at_once]
            item, low, high = (values[some, None] for values in (self.item, self.low, self.high))
            own = exact[np.searchsorted(items, item)]
            before = (exact < own) | ((exact == own) & (items < item))
            found[start : start + at_once] = (before & (about >= low) & (about <= high)).sum(1)
        return found

    def _near(self, query: int, group: Ints) -> Ints:
        """Gallery items within the error of one of a query's relevant items, ascending."""
        row, low, high = self.distances[query], self.low[group], self.high[group]
        near = np.flatnonzero((row >= low[0]) & (row <= high[-1]))
        about = row[near]
        return near[np.searchsorted(low, about, "right") > np.searchsorted(high, about, "left")]


def _count(row: Floats, low: Floats, high: Floats, nearer: Ints, upto: Ints, mask: npt.NDArray[np.bool_]) -> None:
    """How many of `row` [G] are below each of `low` [R], and not above each of `high` [R]; both are ascending."""
    row = row[np.less_equal(row, high[-1], out=mask)]
    if len(row) < FEW_ITEMS * len(low):
        nearer[:] = np.bincount(np.searchsorted(low, row, "right"), minlength=len(low) + 1)[:-1].cumsum()
        upto[:] = np.bincount(np.searchsorted(high, row, "left"), minlength=len(low) + 1)[:-1].cumsum()
        return
    mask = mask[: len(row)]
    for k in range(len(low)):
        nearer[k] = np.count_nonzero(np.less(row, low[k], out=mask))
        upto[k] = np.count_nonzero(np.less_equal(row, high[k], out=mask))


def _integers(values: Any) -> Ints:
    return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values, dtype=np.int64)

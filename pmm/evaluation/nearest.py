"""The gallery items nearest to each query: exact, and the same for any size of block. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pmm.evaluation.distance_blocks import Blocks, Distances, by_precision
from pmm.utils.arrays import Doubles, Floats, Ints

MAX_OPEN = 256
"""Items per query that a block may leave open; if there are more, it is computed at higher precision."""
PAIRS_AT_ONCE = 1 << 18
NONE = np.empty(0, np.int64)


class Nearest(NamedTuple):
    """The items nearest to each query, nearest first, ties by gallery index; and the distance of its farthest item."""

    items: Ints
    """Gallery indices [Q, k]; -1 where there are no more."""
    distances: Doubles
    """Exact distances [Q, k]; infinite where there are no more."""
    farthest: Doubles
    """Largest distance, exact [Q]; 0 unless `farthest=True`."""


def nearest(
    distances: Distances,
    k: int,
    blocks: Blocks,
    *,
    threads: int = 1,
    excluded: Callable[[slice], tuple[Ints, Ints]] | None = None,
    farthest: bool = False,
    label: str = "",
) -> Nearest:
    """The k nearest items of each query.

    Args:
        k: at least 1, at most the size of the gallery.
        excluded: for a block of queries, the pairs to leave out: queries, numbered within the block, and items.
        farthest: find the largest distances too.
        label: name of a progress bar; empty for none.
    """
    from tqdm import tqdm

    queries, gallery = distances.shape
    result = Nearest(np.full((queries, k), -1), np.full((queries, k), np.inf), np.zeros(queries))
    buffer = np.empty((min(blocks.queries, queries), gallery), np.float32)
    bar = tqdm(total=queries, desc=label, unit="row", leave=False, disable=None if label else True)
    with bar, ThreadPoolExecutor(threads) as pool:
        for rows in blocks.cut(queries):
            count = rows.stop - rows.start
            pairs = excluded(rows) if excluded else (NONE, NONE)
            # an untrained network's, say, are too close together for the first
            for _, block, errors in by_precision(distances, rows, buffer[:count]):
                lists = _candidates(pool, k, farthest, pairs, block, errors)
                if sum(map(len, lists[0])) + sum(map(len, lists[1])) <= count * max(8 * k, MAX_OPEN):
                    break
            for per_query, put in zip(lists, (_put_nearest, _put_farthest), strict=True):
                start = 0
                while start < count:
                    sizes = np.cumsum([len(items) for items in per_query[start:]])
                    stop = start + max(1, int(np.searchsorted(sizes, PAIRS_AT_ONCE)))
                    _measure(distances, rows.start + start, per_query[start:stop], result, put)
                    start = stop
            bar.update(count)
    return result


def _candidates(
    pool: ThreadPoolExecutor, k: int, farthest: bool, excluded: tuple[Ints, Ints], block: Floats, errors: Doubles
) -> tuple[Sequence[Ints], Sequence[Ints]]:
    """Per row of a `block` of distances [q, G], ascending: the items that may be among the k nearest, and those that
    may be the farthest."""
    block[excluded] = np.inf

    def search(row: Floats, error: float) -> tuple[Ints, Ints]:
        margin = row.dtype.type(2 * error)
        last = np.partition(row, k - 1)[k - 1]
        if np.isinf(last):
            last = row.max(initial=-np.inf, where=row < np.inf)
        near = np.flatnonzero(row <= last + margin)
        if not farthest:
            return near, NONE
        far = row.max()
        if np.isinf(far):
            far = row.max(initial=-np.inf, where=row < np.inf)
        return near, np.flatnonzero((row >= far - margin) & (row < np.inf))

    near, far = zip(*pool.map(search, block, errors), strict=True)
    return near, far


def _measure(
    distances: Distances,
    first: int,
    lists: Sequence[Ints],
    result: Nearest,
    put: Callable[[Nearest, int, Ints, Doubles], None],
) -> None:
    """Store the exact distances from each query, from `first` on, to the items of its list in the result."""
    sizes = np.array([len(items) for items in lists])
    exact = distances.exact_pairs(np.repeat(np.arange(len(lists)), sizes) + first, np.concatenate(lists))
    for query, (items, values) in enumerate(zip(lists, np.split(exact, sizes.cumsum()[:-1]), strict=True), first):
        put(result, query, items, values)


def _put_nearest(result: Nearest, query: int, items: Ints, values: Doubles) -> None:
    order = np.argsort(values, kind="stable")[: result.items.shape[1]]
    result.items[query, : len(order)], result.distances[query, : len(order)] = items[order], values[order]


def _put_farthest(result: Nearest, query: int, items: Ints, values: Doubles) -> None:
    result.farthest[query] = values.max(initial=0)

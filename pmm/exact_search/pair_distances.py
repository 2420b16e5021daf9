"""Distances of pairs of a query and a gallery row, from the embeddings where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distances import half_squares
from pmm.evaluation.embedding_matrix import MAX_ROWS, comparable_rows
from pmm.evaluation.rounding import product_error
from pmm.exact_search.codes import LARGEST, ROOM, SMALLEST, chunks
from pmm.utils.arrays import Doubles, Floats, Ints
from pmm.utils.errors import InvalidInput
from pmm.utils.threads import in_threads

PAIRS_AT_ONCE = 128
"""Pairs that are measured at once; their differences stay in a core's cache."""
GRAIN = 4096
"""Pairs that are worth a thread."""
QUERIES_PER_ROW = 4
"""From so many on, a product of matrices in float32 costs less than the pairs' differences."""


class EmbeddingParts:
    """Embeddings [N, D] in several arrays, perhaps memory-mapped, of which only single rows are read."""

    def __init__(self, parts: Sequence[Floats], metric: str) -> None:
        self.metric, self.dim = metric, parts[0].shape[1]
        self._parts = [np.asarray(part) for part in parts]  # a memory map makes another one of each result
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: Ints) -> Floats:
        """Rows [n, D] as they are compared: in float64 if they had to be normalised."""
        out = self.stored(rows)
        return comparable_rows(out, self.metric) if self.metric == "cosine" else out

    def stored(self, rows: slice | Ints) -> Floats:
        """Rows [n, D] as they are: of a slice without a copy where possible, for most are in one part."""
        if isinstance(rows, slice):
            for piece, start in zip(self._parts, self._starts.tolist(), strict=False):
                if start <= rows.start and rows.stop <= start + len(piece):
                    return piece[rows.start - start : rows.stop - start : rows.step]
            rows = np.arange(rows.start, rows.stop, rows.step)
        if len(self._parts) == 1:
            return self._parts[0].take(rows, axis=0)
        part = np.searchsorted(self._starts, rows, side="right") - 1
        out = np.empty((len(rows), self.dim), np.result_type(*self._parts))
        for number in np.unique(part):
            places = part == number
            out[places] = self._parts[number].take(rows[places] - self._starts[number], axis=0)
        return out


class PairDistances:
    """Distances from `queries` [Q, D], as they are compared, to rows of the gallery."""

    def __init__(self, gallery: EmbeddingParts, queries: Doubles, threads: int) -> None:
        self._gallery, self._queries, self._threads = gallery, queries, threads

    def exact(self, query: Ints, rows: Ints) -> Doubles:
        """Half the squared distances [P], as `EmbeddingDistances.exact_pairs`: each a function of its pair alone.

        Raises InvalidInput for a row that no distance can be measured to, its `index` the row.
        """
        out = np.empty(len(rows))

        def measure(places: slice) -> None:
            gaps = np.empty((min(PAIRS_AT_ONCE, len(rows)), self._gallery.dim))
            for first in range(places.start, places.stop, PAIRS_AT_ONCE):
                pairs = slice(first, min(first + PAIRS_AT_ONCE, places.stop))
                some = gaps[: pairs.stop - first]
                with np.errstate(invalid="ignore"):  # of damaged rows
                    items = self._gallery.take(rows[pairs])
                    np.subtract(items, self._queries[query[pairs]], out=some, dtype=np.float64)
                    out[pairs] = half_squares(some)

        in_threads(measure, [*chunks(len(rows), max(GRAIN, -(-len(rows) // self._threads)))])
        if not (good := np.isfinite(out)).all():
            row = int(rows[good.argmin()])
            raise InvalidInput(f"row {row} of the gallery is damaged", index=row, expected="numbers, not all zero")
        return out

    def float32_pays(self, rows: Ints) -> bool:
        """Whether pairs with these rows are so many, and of so few rows, that `float32_bounds` is cheaper."""
        if len(rows) <= GRAIN:
            return False
        return len(rows) > QUERIES_PER_ROW * int(np.count_nonzero(self._marks(rows)))

    def float32_bounds(self, query: Ints, rows: Ints) -> Doubles:
        """Lower bounds [P] of Euclidean distances, near enough that few stay open even where codes leave everything.

        From a product of matrices in float32 (its error: `product_error`) of what was rounded to float32 about the
        middle of some rows, which shortens a distance by at most 2^-24 of both norms. So they are tight for rows that
        are close together, like thousands of crops of one person. What underflows is less than D 2^-126 in a square.
        """
        marks = self._marks(rows)
        distinct, place = np.flatnonzero(marks), (np.cumsum(marks) - 1)[rows]
        number = (place // MAX_ROWS).astype(np.min_scalar_type(len(distinct) // MAX_ROWS))  # short ones sort faster
        order = np.argsort(number, kind="stable")
        ends = np.searchsorted(number[order], np.arange(-(-len(distinct) // MAX_ROWS) + 1))
        queries = self._queries[query.min() : query.max() + 1]
        query = query - query.min()
        out = np.empty(len(rows))
        for some, first, last in zip(chunks(len(distinct)), ends, ends[1:], strict=False):
            pairs = order[first:last]
            asked, column = query[pairs], place[pairs] - some.start
            with np.errstate(over="ignore", invalid="ignore"):  # of rows that are too large
                out[pairs] = _float32_bounds(queries, self._gallery.take(distinct[some]), asked, column)
        return out

    def _marks(self, rows: Ints) -> npt.NDArray[np.bool_]:
        marks = np.zeros(len(self._gallery), bool)
        marks[rows] = True
        return marks


def _float32_bounds(queries: Doubles, items: Floats, query: Ints, item: Ints) -> Doubles:
    wide = items.astype(np.float64)
    centre = wide.mean(0)
    left, right = (queries - centre).astype(np.float32), (wide - centre).astype(np.float32)
    q, g = (np.linalg.norm(m.astype(np.float64), axis=1)[place] for m, place in ((left, query), (right, item)))
    products = (left @ right.T)[query, item].astype(np.float64)
    squares = q**2 + g**2 - 2 * products - 2 * product_error(q, g, wide.shape[1]) - SMALLEST
    bounds = np.sqrt(np.maximum(squares, 0)) / ROOM - 1.001 * 2.0**-24 * (q + g) - SMALLEST
    return np.where(np.maximum(q, g) < LARGEST, bounds, -np.inf)

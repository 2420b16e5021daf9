"""Distances from queries to a gallery, in blocks, and the same for any size of block. Loads no torch.

The distance of a pair is half its squared Euclidean distance; for cosine that of the two at norm 1, which is 1 - cos.
Many at once are a matrix product in float32, whose last digits depend on the block and on BLAS. So such a block comes
with a bound on its error (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), and pairs that it leaves open
are measured one by one in float64, by their differences: a function of the pair alone, and 0 for equal ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from pmm.evaluation.rounding import (
    float64_error,
    half_squares_float32,
    pair_error,
    product_error,
    product_in_parts,
    refined_error,
)
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.errors import InvalidInput, InvalidValue

METRICS = ("euclidean", "cosine")
MAX_ROWS = 4096
"""Embeddings that are converted to float64 at once, at most."""
PAIRS_AT_ONCE = 128
"""Pairs that are measured at once, at most: with fewer, threads would mostly wait for the interpreter."""
PAIR_NUMBERS = 1 << 16
"""Numbers of the pairs that are measured at once: so many stay in a core's cache."""
MANY_PAIRS = 1 << 18
ITEMS_AT_ONCE = 256
"""Gallery items whose products are summed in parts at once: so many stay in a core's cache."""
CENTRED_BY = 512
"""Gallery items whose mean stands for the centre of all."""
SINGLE_RANGE = (1e-12, 1e15)
"""Largest number among embeddings whose products float32 holds without under- or overflow."""


def squared_distances(query: Floats, gallery: Floats) -> Doubles:
    """Squared Euclidean distances [Q, G] in float64, by the matrix product."""
    query, gallery = np.asarray(query, np.float64), np.asarray(gallery, np.float64)
    squares = np.einsum("gd,gd->g", gallery, gallery)
    return np.einsum("qd,qd->q", query, query)[:, None] + squares - 2 * (query @ gallery.T)


def comparable_rows(rows: Floats, metric: str, exponent: int = 0) -> Doubles:
    """Rows [n, D] in float64 as the metric compares them: times 2^-exponent or, for cosine, at norm 1. Each result
    depends on its row alone."""
    wide = rows.astype(np.float64)
    if exponent:
        wide *= np.ldexp(1.0, -exponent)
    if metric == "cosine":
        wide /= np.abs(wide).max(1, keepdims=True)  # so that squares of a short row do not vanish
        wide /= np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    return wide


class EmbeddingMatrix:
    """Embeddings [N, D] as a metric compares them, in one array or in several that follow each other; errors call them
    `name`."""

    def __init__(
        self, *parts: Floats, metric: str = "euclidean", scratch: int = 1 << 26, name: str = "embeddings"
    ) -> None:
        """Raises InvalidValue for an unknown metric; InvalidInput, its `index` the first bad row, for NaN or Inf, and
        for rows that are all zero where the metric is cosine."""
        if metric not in METRICS:
            raise InvalidValue("metric", metric, choices=METRICS)
        self.parts, self.metric, self.dim = parts, metric, parts[0].shape[1]
        self.starts = np.cumsum([0, *map(len, parts)]).tolist()
        self.chunk = min(MAX_ROWS, max(1, scratch // (32 * max(1, self.dim))))
        """Rows that are in memory in float64 at once."""
        norms, largest = np.zeros(len(self)), np.zeros(len(self))
        for place, rows in self._chunks(slice(0, len(self))):
            largest[place] = np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0))
            with np.errstate(over="ignore", invalid="ignore"):  # float64: they are part of the distances
                norms[place] = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64, casting="same_kind"))
        if not np.isfinite(largest).all():
            bad = np.flatnonzero(~np.isfinite(largest))
            raise InvalidInput(
                f"{name}: {len(bad)} of {len(self)} rows hold NaN or Inf, the first is row {bad[0]}", index=int(bad[0])
            )
        if metric == "cosine" and not largest.all():
            row = int((largest == 0).argmax())
            raise InvalidInput(f"{name}: row {row} is all zero; it has no direction to compare by cosine", index=row)
        top = float(largest.max(initial=0))
        self.fits_float32 = all(part.dtype.itemsize <= 4 for part in parts) and (
            top == 0 or SINGLE_RANGE[0] < (largest.min() if metric == "cosine" else top) <= top < SINGLE_RANGE[1]
        )
        """Whether products may be computed in float32."""
        self.is_float32 = metric == "euclidean" and all(part.dtype == np.float32 for part in parts)
        """Whether the metric compares the rows as they are, in float32."""
        self.exponent = int(np.frexp(top)[1])
        """Exponent of the largest number: where float32 does not do, all are scaled by it to keep squares in range."""
        self.inverse_norms = 1 / norms if metric == "cosine" and self.fits_float32 else None
        self.norms = np.ones(len(self)) if metric == "cosine" else norms

    def __len__(self) -> int:
        return self.starts[-1]

    def float32_rows(self, rows: slice) -> Iterator[tuple[slice, Singles]]:
        """The rows in float32, and their place: as they are if possible, else copies, chunk by chunk."""
        views = self.inverse_norms is None and self.parts[0].dtype == np.float32
        for place, chunk in self._chunks(rows, whole=views):
            if self.inverse_norms is not None:
                yield place, (chunk * self.inverse_norms[place, None]).astype(np.float32)
            else:
                yield place, chunk.astype(np.float32, copy=False)

    def float64_rows(self, rows: slice, exponent: int) -> Iterator[tuple[slice, Doubles]]:
        """The rows in float64, chunk by chunk, and their place; `exponent` as in `take`."""
        for place, chunk in self._chunks(rows):
            yield place, comparable_rows(chunk, self.metric, exponent)

    def take(self, indices: Ints, exponent: int) -> Doubles:
        """Rows [n, D] in float64, as they are compared, times 2^-exponent unless they are at norm 1."""
        return comparable_rows(self._rows(indices), self.metric, exponent)

    def take_views(self, indices: Ints, exponent: int) -> Floats:
        """As `take`, but without conversion if the metric compares the rows as they are."""
        rows = self._rows(indices)
        return rows if self.metric == "euclidean" and not exponent else comparable_rows(rows, self.metric, exponent)

    def _rows(self, indices: Ints) -> Floats:
        if len(self.parts) == 1:
            return self.parts[0].take(indices, axis=0)
        part = np.searchsorted(self.starts, indices, side="right") - 1
        rows = np.empty((len(indices), self.dim), np.result_type(*self.parts))
        for number in np.unique(part):
            in_part = part == number
            rows[in_part] = self.parts[number][indices[in_part] - self.starts[number]]
        return rows

    def first_equal_rows(self) -> Ints:
        """For each row the first that is equal to it [N]."""
        seen: dict[bytes, int] = {}
        return np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(r for p in self.parts for r in p)])

    def _chunks(self, rows: slice, *, whole: bool = False) -> Iterator[tuple[slice, Floats]]:
        """Views of the rows, each in one part and, unless `whole`, of one chunk; and where they lie."""
        for part, start in zip(self.parts, self.starts, strict=False):
            first, last = max(rows.start, start), min(rows.stop, start + len(part))
            step = max(1, last - first) if whole else self.chunk
            for place in range(first, last, step):
                stop = min(place + step, last)
                yield slice(place, stop), part[place - start : stop - start]


class EmbeddingDistances:
    """Distances between embeddings."""

    def __init__(self, query: EmbeddingMatrix, gallery: EmbeddingMatrix) -> None:
        """Raises InvalidInput if their dimensions differ."""
        if query.dim != gallery.dim:
            raise InvalidInput(
                f"query embeddings have {query.dim} dimensions, gallery embeddings {gallery.dim}",
                expected="both from one model",
            )
        self.query, self.gallery = query, gallery
        self.shape, self.dim, self.resident_bytes = (len(query), len(gallery)), query.dim, 0
        self.fits_float32 = query.fits_float32 and gallery.fits_float32
        """Whether `approximate` works in float32."""
        self._exponent = 0 if self.fits_float32 else max(query.exponent, gallery.exponent)
        with np.errstate(over="ignore"):
            self._half_squares = (gallery.norms**2 / 2).astype(np.float32)
            self.factor = 1.0 if query.metric == "cosine" else float(np.ldexp(1.0, 2 * self._exponent))
        """Factor by which all distances are to be multiplied."""

    def approximate(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        if not self.fits_float32:
            return self.float64(rows)
        for place, queries in self.query.float32_rows(rows):
            out_rows = slice(place.start - rows.start, place.stop - rows.start)
            for column, items in self.gallery.float32_rows(slice(0, len(self.gallery))):
                np.matmul(queries, items.T, out=out[out_rows, column])
        np.subtract(self._half_squares, out, out=out)
        longest = self.gallery.norms.max(initial=0)
        return out, product_error(self.query.norms[rows], longest, self.dim)

    def refined(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        if not self.fits_float32:
            return self.float64(rows)
        queries = np.empty((rows.stop - rows.start, self.dim), np.float32)
        for place, part in self._centred_rows(self.query, rows):
            queries[place.start - rows.start : place.stop - rows.start] = part
        query_halves, item_halves = half_squares_float32(queries), self._centred_halves
        spare = np.empty((2, len(queries) * min(ITEMS_AT_ONCE, len(self.gallery))), np.float32)
        for place, items in self._centred_rows(self.gallery, slice(0, len(self.gallery))):
            products = product_in_parts(queries, items, spare)
            np.subtract(item_halves[place].astype(np.float32), products, out=products)
            np.add(products, query_halves.astype(np.float32)[:, None], out=out[: len(queries), place])
        longest = float(np.sqrt(2 * item_halves.max(initial=0)))
        return out[: len(queries)], refined_error(np.sqrt(2 * query_halves), longest, self.dim)

    def float64(self, rows: slice) -> tuple[Doubles, Doubles]:
        queries = self.query.take(np.arange(rows.start, rows.stop), self._exponent) - self._centre
        query_halves, out, longest = half_squares(queries), np.empty((len(queries), len(self.gallery))), 0.0
        for place, items in self.gallery.float64_rows(slice(0, len(self.gallery)), self._exponent):
            items -= self._centre
            item_halves = half_squares(items)
            out[:, place] = (query_halves[:, None] + item_halves) - queries @ items.T
            longest = max(longest, float(np.sqrt(2 * item_halves.max())))
        return out, float64_error(np.sqrt(2 * query_halves), longest, self.dim)

    def close_pairs(self, queries: Ints, items: Ints) -> tuple[Doubles, Doubles]:
        if not (self.fits_float32 and self.query.is_float32 and self.gallery.is_float32):
            exact = self.exact_pairs(queries, items)
            return exact, np.zeros(len(exact))
        out, at_once = np.empty(len(items)), self._pairs_at_once
        for start in range(0, len(items), at_once):
            some = slice(start, start + at_once)
            gaps = self.gallery.take_views(items[some], 0)
            gaps -= self.query.take_views(queries[some], 0)
            out[some] = half_squares_float32(gaps)
        return out, pair_error(out, self.dim)

    def exact_pairs(self, queries: Ints, items: Ints) -> Doubles:
        if len(items) > MANY_PAIRS:  # perhaps of items that are all equal: one of them is enough
            codes, places = np.unique(queries * len(self.gallery) + self._first_equal[items], return_inverse=True)
            if 2 * len(codes) < len(items):
                return self._exact_pairs(*np.divmod(codes, len(self.gallery)))[places]
        return self._exact_pairs(queries, items)

    def _exact_pairs(self, queries: Ints, items: Ints) -> Doubles:
        out, at_once = np.empty(len(items)), self._pairs_at_once
        buffer = np.empty((min(len(items), at_once), self.dim))
        for start in range(0, len(items), at_once):
            some = slice(start, start + at_once)
            rows, places = np.unique(queries[some], return_inverse=True)
            gaps = buffer[: len(places)]
            gallery = self.gallery.take_views(items[some], self._exponent)
            query = self.query.take_views(rows, self._exponent)
            gaps[:] = gallery
            gaps -= query[places]
            out[some] = half_squares(gaps)
        return out

    @property
    def _pairs_at_once(self) -> int:
        return max(PAIRS_AT_ONCE // 4, min(PAIRS_AT_ONCE, PAIR_NUMBERS // max(1, self.dim)))

    def _centred_rows(self, side: EmbeddingMatrix, rows: slice) -> Iterator[tuple[slice, Singles]]:
        """The rows minus `_centre` in float32, in pieces that fit into a core's cache, and their place. Each is
        overwritten by the next."""
        centre = self._centre.astype(np.float32)
        chunks: Iterator[tuple[slice, Floats]] = (
            side.float32_rows(rows) if side.is_float32 else side.float64_rows(rows, 0)
        )
        centred = np.empty((min(ITEMS_AT_ONCE, len(side)), self.dim), np.float32)
        for place, chunk in chunks:
            for start in range(0, len(chunk), ITEMS_AT_ONCE):
                part = chunk[start : start + ITEMS_AT_ONCE]
                out = centred[: len(part)]
                np.subtract(part, centre, out=out, casting="same_kind")
                yield slice(place.start + start, place.start + start + len(part)), out

    @cached_property  # two threads that ask at once find the same
    def _centre(self) -> Doubles:
        """About the centre of the gallery [D]: relative to it, embeddings that are close together have small norms.

        It is the mean of a sample: the bounds hold for any point.
        """
        step = -(-len(self.gallery) // min(CENTRED_BY, self.gallery.chunk))
        return self.gallery.take(np.arange(0, len(self.gallery), max(1, step)), self._exponent).mean(0)

    @cached_property
    def _centred_halves(self) -> Doubles:
        """Half the squared norms of the gallery's `_centred_rows` [G]."""
        rows = self._centred_rows(self.gallery, slice(0, len(self.gallery)))
        return np.concatenate([half_squares_float32(items) for _, items in rows] or [np.empty(0)])

    @cached_property
    def _first_equal(self) -> Ints:
        return self.gallery.first_equal_rows()


def half_squares(rows: Doubles) -> Doubles:
    """Half the squared norm of each row [N, D]; each result depends on its row alone."""
    return np.einsum("nd,nd->n", rows, rows) / 2

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

from pmm.evaluation import compiled
from pmm.evaluation.compiled import rank_kernel
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.rounding import (
    DIMS_AT_ONCE,
    float64_error,
    half_squares_float32,
    pair_error,
    pair_error_float64,
    product_error,
    product_in_parts,
    refined_error,
)
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.errors import InvalidInput

PAIRS_AT_ONCE = 128
"""Pairs that are measured at once, at most: with fewer, threads would mostly wait for the interpreter."""
PAIR_NUMBERS = 1 << 16
"""Numbers of the pairs that are measured at once: so many stay in a core's cache."""
MANY_PAIRS = 1 << 18
ITEMS_AT_ONCE = 256
"""Gallery items whose products are summed in parts at once: so many stay in a core's cache."""
CENTRED_BY = 512
"""Gallery items whose mean stands for the centre of all."""


def squared_distances(query: Floats, gallery: Floats) -> Doubles:
    """Squared Euclidean distances [Q, G] in float64, by the matrix product."""
    query, gallery = np.asarray(query, np.float64), np.asarray(gallery, np.float64)
    squares = np.einsum("gd,gd->g", gallery, gallery)
    return np.einsum("qd,qd->q", query, query)[:, None] + squares - 2 * (query @ gallery.T)


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
        self._kernel = rank_kernel() if self.fits_float32 else None
        self.coarsest = 1 if self._kernel and self._kernel.outruns_blas else 0
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
        halves, out = (query_halves.astype(np.float32), item_halves.astype(np.float32)), out[: len(queries)]
        compute = self._by_kernel if self._kernel else self._in_parts
        dims_at_once = compute(queries, *halves, out)
        longest = float(np.sqrt(2 * item_halves.max(initial=0)))
        return out, refined_error(np.sqrt(2 * query_halves), longest, self.dim, dims_at_once)

    def _by_kernel(self, queries: Singles, query_halves: Singles, item_halves: Singles, out: Singles) -> int:
        """The distances of centred queries, into `out`; and the dimensions in one sum."""
        assert self._kernel
        for place, items, centre in self._rows_and_centre():
            self._kernel.half_distances(queries, query_halves, items, item_halves[place], centre, out[:, place])
        return compiled.DIMS_AT_ONCE

    def _in_parts(self, queries: Singles, query_halves: Singles, item_halves: Singles, out: Singles) -> int:
        """As `_by_kernel`, by numpy."""
        spare = np.empty((2, len(queries) * min(ITEMS_AT_ONCE, len(self.gallery))), np.float32)
        for place, items in self._centred_rows(self.gallery, slice(0, len(self.gallery))):
            products = product_in_parts(queries, items, spare)
            np.subtract(item_halves[place], products, out=products)
            np.add(products, query_halves[:, None], out=out[:, place])
        return DIMS_AT_ONCE

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
        from_rows, to_rows = self.query.addresses(queries), self.gallery.addresses(items)
        if self._kernel and from_rows is not None and to_rows is not None:
            found = self._kernel.half_squares(from_rows, to_rows, self.dim)
            return found, pair_error_float64(found, self.dim)
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

    def _rows_and_centre(self) -> Iterator[tuple[slice, Singles, Singles]]:
        """The gallery in float32, in large pieces, their place, and what is to be subtracted from each row [D]: as it
        is where possible, else copies."""
        everything, gallery = slice(0, len(self.gallery)), self.gallery
        if gallery.is_float32 and all(part.flags.aligned and part.flags.c_contiguous for part in gallery.parts):
            centre = self._centre.astype(np.float32)
            yield from ((place, items, centre) for place, items in gallery.float32_rows(everything))
        else:
            nothing = np.zeros(self.dim, np.float32)
            yield from ((*piece, nothing) for piece in self._centred_rows(gallery, everything, gallery.chunk))

    def _centred_rows(
        self, side: EmbeddingMatrix, rows: slice, at_once: int = ITEMS_AT_ONCE
    ) -> Iterator[tuple[slice, Singles]]:
        """The rows minus `_centre` in float32, in pieces of `at_once`, of which a few fit into a core's cache, and
        their place. Each is overwritten by the next."""
        centre = self._centre.astype(np.float32)
        chunks: Iterator[tuple[slice, Floats]] = (
            side.float32_rows(rows) if side.is_float32 else side.float64_rows(rows, 0)
        )
        centred = np.empty((min(at_once, len(side)), self.dim), np.float32)
        for place, chunk in chunks:
            for start in range(0, len(chunk), at_once):
                part = chunk[start : start + at_once]
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

"""What may be near: rows whose lower bound is within a limit, from short codes alone. In numpy."""

from __future__ import annotations

import abc
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pmm.exact_search.codes import (
    ERROR,
    LARGEST,
    REST,
    SCALE,
    SMALLEST,
    SQUARE,
    Projection,
    ShortCodes,
    chunks,
    distance_to,
    rounded_up,
)
from pmm.utils.arrays import Doubles, Ints, Singles
from pmm.utils.threads import in_threads, single_blas_thread

UNIT = 2.0**-24
"""Unit roundoff of float32."""
MEMORY = 1 / 6
"""Part of the memory of embeddings in float32 that decoded codes take,"""
LEAST_COORDINATES = 16
"""and more where that would leave fewer, which is below 114 dimensions."""
QUERIES_AT_ONCE = 64
PAIRS_AT_ONCE = 1 << 17
"""Their products, and the rows of codes of a chunk, stay in a core's cache."""
LEAST_ROWS = 1 << 11
"""Of a chunk."""
TILE = 16
GRAIN = 1 << 15
"""Rows that are worth a thread."""
NOTHING = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32)


class Candidates(NamedTuple):
    """Pairs [P] of a query and a row, in ascending order of the queries."""

    queries: Ints
    rows: Ints
    bounds: Doubles
    """Never above the Euclidean distance of the pair; may be negative."""


class CodeScan(Protocol):
    """Short codes of N rows, ready to be searched. May be used by several threads at once."""

    def __len__(self) -> int: ...

    @property
    def resident_bytes(self) -> int:
        """Memory that it takes."""

    def candidates(self, queries: Projection, limits: Doubles, rows: slice) -> Candidates:
        """Pairs whose distance may be at most the query's limit [Q]: all of these, perhaps others too.

        Args:
            limits: Euclidean distances, perhaps infinite.
            rows: first and last, without a step.
        """

    def bounds(self, queries: Projection, rows: slice) -> Doubles:
        """Lower bounds [Q, n] of the distances of all pairs with the rows of a slice, perhaps with a step."""

    def take(self, rows: Ints) -> CodeScan:
        """The same of some rows, which are numbered from 0 anew."""


class ProductScan(abc.ABC):
    """Compares with limits the left side of

        square_x - e_x^2 - 2 y_q.y_x - 2 rest_q rest_x - 2 (T + e_q) e_x <= (T + e_q)^2 - square_q

    which is |stored q - stored x| <= T + e_q + e_x, what the distance being at most T demands: a product of matrices in
    float32, chunk by chunk.

    Slack: a float32 product over L terms is wrong by at most gamma_L times the sum of the terms' sizes (Higham 3.1),
    with g for gamma_(L + 16), which has room for each term's own roundings. By Cauchy-Schwarz the sizes sum to at most
    2 |q| |x| + |square_x - e_x^2| + 2 (T + e_q) e_x <= square_q + 2 square_x + e_x^2 + 2 (T + e_q) e_x. So a row's
    column gets g (2 square_x + e_x^2) less, the factor of e_x becomes 1 + 2g of what it was, and g square_q is added on
    the right; L 2^-124 too, for products that underflow.
    """

    def __init__(self, terms: int, threads: int) -> None:
        self._terms, self._threads = terms, threads
        self._buffers = threading.local()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def left_sides(self, rows: slice, vectors: Singles, out: Singles) -> Singles:
        """Write the left sides [n, Q] of some rows and queries, the `RightFactor`'s vectors [L, Q]. Returns e_x [n]."""

    def right_factor(self, queries: Projection, limits: Doubles) -> RightFactor:
        return RightFactor(queries, limits, self._terms)

    def candidates(self, queries: Projection, limits: Doubles, rows: slice) -> Candidates:
        asked = self.right_factor(queries, limits)
        count = rows.stop - rows.start
        parts = [*chunks(count, max(GRAIN, -(-count // self._threads)))] or [slice(0, 0)]
        places = [slice(rows.start + part.start, rows.start + part.stop) for part in parts]
        with single_blas_thread():
            found = in_threads(lambda place: self._part(asked, place), places)
        query, row, values, errors = (np.concatenate(column) for column in zip(*found, strict=True))
        if len(queries) > 1:
            keys = query.astype(np.int16) if len(queries) < 1 << 15 else query  # which are sorted by their digits
            order = np.argsort(keys, kind="stable")
            query, row, values, errors = query[order], row[order], values[order], errors[order]
        return Candidates(query, row, asked.bounds(values, query, errors))

    def _part(self, asked: RightFactor, rows: slice) -> tuple[Ints, Ints, Singles, Singles]:
        """Queries, rows, left sides and errors e_x of the pairs that remain."""
        found = [NOTHING]
        for some in chunks(asked.count, QUERIES_AT_ONCE):
            count = some.stop - some.start
            vectors = np.ascontiguousarray(asked.vectors[some].T)
            height = max(LEAST_ROWS, PAIRS_AT_ONCE // count)
            limits = np.tile(asked.limits[some], TILE)
            values, mask = self._scratch(height * count)
            for place in chunks(rows.stop - rows.start, height):
                pairs = (place.stop - place.start) * count
                left, near = values[:pairs], mask[:pairs]
                chunk = slice(rows.start + place.start, rows.start + place.stop)
                errors = self.left_sides(chunk, vectors, left.reshape(-1, count))
                # limits side by side: short rows would be compared one by one
                tiled = pairs - pairs % len(limits)
                np.less_equal(left[:tiled].reshape(-1, len(limits)), limits, out=near[:tiled].reshape(-1, len(limits)))
                np.less_equal(left[tiled:], limits[: pairs - tiled], out=near[tiled:])
                flat = np.flatnonzero(near)
                if len(flat):
                    row, query = np.divmod(flat, count)
                    found.append((query + some.start, row + (rows.start + place.start), left[flat], errors[row]))
        query, row, left, errors = (np.concatenate(column) for column in zip(*found, strict=True))
        return query, row, left, errors

    def _scratch(self, size: int) -> tuple[Singles, npt.NDArray[np.bool_]]:
        """This thread's own, so that it stays in its cache."""
        if getattr(self._buffers, "size", 0) < size:
            self._buffers.size = size
            self._buffers.values, self._buffers.mask = np.empty(size, np.float32), np.empty(size, bool)
        return self._buffers.values[:size], self._buffers.mask[:size]

    def bounds(self, queries: Projection, rows: slice) -> Doubles:
        asked, places = self.right_factor(queries, np.full(len(queries), np.inf)), range(*rows.indices(len(self)))
        out, query = np.empty((len(queries), len(places))), np.arange(len(queries))[:, None]
        for some in chunks(len(places)):
            part = places[some]
            left = np.empty((len(part), len(queries)), np.float32)
            errors = self.left_sides(slice(part.start, part.stop, part.step), asked.vectors.T, left)
            out[:, some] = asked.bounds(left.T, query, errors)
        return out


class NumpyScan(ProductScan):
    """The codes decoded to float32."""

    def __init__(self, matrix: Singles, threads: int = 1) -> None:
        """`matrix`: what `decode` makes."""
        super().__init__(matrix.shape[1], threads)
        self._matrix = matrix

    @classmethod
    def of(cls, codes: Sequence[ShortCodes], threads: int = 1, most: int | None = None) -> NumpyScan:
        """Of one or several parts, one after another; of their coordinates the first, `most` at most."""
        r = codes[0].r if most is None else min(codes[0].r, most)
        matrix, start = np.empty((sum(map(len, codes)), r + 3), np.float32), 0
        for part in codes:
            for place in chunks(len(part)):
                stop = start + place.stop - place.start
                decode(ShortCodes(part.codes[place], part.terms[place]), matrix[start:stop])
                start = stop
        return cls(matrix, threads)

    def __len__(self) -> int:
        return len(self._matrix)

    @property
    def resident_bytes(self) -> int:
        return self._matrix.nbytes

    def take(self, rows: Ints) -> NumpyScan:
        return NumpyScan(self._matrix[rows], self._threads)

    def left_sides(self, rows: slice, vectors: Singles, out: Singles) -> Singles:
        np.matmul(self._matrix[rows], vectors, out=out)
        return self._matrix[rows, -1]


def decode(codes: ShortCodes, out: Singles) -> None:
    """Write the matrix [n, r + 3] of rows: coordinates, rest, what stands alone on the left side, e_x.

    Of r coordinates, fewer than the codes have, the others' norm joins the rest: (y, rest) to (y', |(y'', rest)|)
    lengthens no difference, so their error bounds what is stored here too.
    """
    r, gamma = out.shape[1] - 3, gamma_of(out.shape[1])
    coded = np.asarray(np.isfinite(codes.terms).all(1))
    singles = np.where(coded[:, None], codes.terms, np.float32(0))
    terms = singles.astype(np.float64)
    square, error = terms[:, SQUARE], terms[:, ERROR]
    np.multiply(codes.codes[:, :r], singles[:, SCALE, None], out=out[:, :r])
    out[:, r] = terms[:, REST]
    if r < codes.r:
        dropped = np.linalg.norm(codes.codes[:, r:].astype(np.float64), axis=1)
        rest = np.hypot(terms[:, SCALE] * dropped, terms[:, REST])
        out[:, r] = rest
        error = rounded_up(error + 2 * UNIT * rest).astype(np.float64)
    out[:, r + 1] = np.where(coded, square - error**2 - gamma * (2 * square + error**2), np.finfo(np.float32).min)
    out[:, r + 2] = error


def affordable_coordinates(dim: int) -> int:
    """How many coordinates of embeddings [N, dim] are decoded at most."""
    return max(LEAST_COORDINATES, int(MEMORY * dim) - 3)


def gamma_of(terms: int) -> float:
    """gamma of so many terms, and of their own roundings."""
    return 1.01 * (terms + 16) * UNIT


class RightFactor:
    """The other factor of the product: its coordinates in float32 (not coded: they are few), and right sides."""

    def __init__(self, queries: Projection, limits: Doubles, terms: int) -> None:
        """`terms`: of the product."""
        queries, gamma = queries.prefix(terms - 3), gamma_of(terms)
        coordinates, rest = queries.coordinates.astype(np.float32), queries.rest.astype(np.float32)
        coordinates[np.abs(coordinates) < SMALLEST] = 0
        rest[rest < SMALLEST] = 0
        self.count, self._gamma = len(rest), gamma
        self._error = distance_to(queries, coordinates, rest) + queries.error
        square = np.einsum("qr,qr->q", coordinates, coordinates, dtype=np.float64) + np.square(rest, dtype=np.float64)
        self._square = square * (1 - gamma) - terms * 2.0**-124
        reach = limits + self._error
        reach[~(reach < LARGEST)] = np.inf  # all rows
        bounded = np.isfinite(reach)
        self._factor = np.where(bounded, 2 * reach * (1 + 2 * gamma), 0).astype(np.float32)
        """Of e_x."""
        self.limits = rounded_up(reach**2 - self._square + 2.0**-40 * (np.where(bounded, reach, 0) ** 2 + square))
        """[Q]"""
        self.vectors = np.concatenate(
            [-2 * coordinates, -2 * rest[:, None], np.ones((len(rest), 1), np.float32), -self._factor[:, None]], axis=1
        )
        """[Q, r + 3]"""

    def bounds(self, left: Singles, queries: Ints, errors: Singles) -> Doubles:
        """Lower bounds of the distances, from left sides: what was taken off there for e_x is added again."""
        error, factor = errors.astype(np.float64), self._factor.astype(np.float64) * (1 - 2 * self._gamma)
        squares = left + (self._square[queries] + error * (error + factor[queries]))
        return np.sqrt(np.maximum(squares, 0)) * (1 - 2.0**-40) - (self._error[queries] + error)

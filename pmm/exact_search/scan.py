"""What may be near: rows whose lower bound is within a limit, from short codes alone. In numpy."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distances import Doubles, Ints, Singles
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

UNIT = 2.0**-24
"""Unit roundoff of float32."""
ROWS_AT_ONCE = 4096
"""Of the codes: with its products, a chunk stays in a core's cache."""
QUERIES_AT_ONCE = 64
NOTHING = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)


class Candidates(NamedTuple):
    """Pairs [P] of a query and a row, in any order, each at most once."""

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


class NumpyScan:
    """The codes decoded to float32, so that a product of matrices gives the left side of

        square_x - e_x^2 - 2 y_q.y_x - 2 rest_q rest_x - 2 (T + e_q) e_x <= (T + e_q)^2 - square_q

    which is |stored q - stored x| <= T + e_q + e_x, what the distance being at most T demands.

    Slack: a float32 product over L terms is wrong by at most gamma_L times the sum of the terms' sizes (Higham 3.1),
    with g for gamma_(L + 16), which has room for each term's own roundings. By Cauchy-Schwarz the sizes sum to at most
    2 |q| |x| + |square_x - e_x^2| + 2 (T + e_q) e_x <= square_q + 2 square_x + e_x^2 + 2 (T + e_q) e_x. So a row's
    column gets g (2 square_x + e_x^2) less, the factor of e_x becomes 1 + 2g of what it was, and g square_q is added on
    the right; L 2^-124 too, for products that underflow.
    """

    def __init__(self, matrix: Singles, threads: int = 1) -> None:
        """`matrix`: what `decode` makes."""
        self._matrix, self._threads, self._gamma = matrix, threads, _gamma(matrix.shape[1])
        self._buffers = threading.local()

    @classmethod
    def of(cls, codes: Sequence[ShortCodes], threads: int = 1) -> NumpyScan:
        """Of one or several parts, one after another."""
        matrix, start = np.empty((sum(map(len, codes)), codes[0].r + 3), np.float32), 0
        for part in codes:
            for place in chunks(len(part)):
                decode(
                    ShortCodes(part.codes[place], part.terms[place]), matrix[start + place.start : start + place.stop]
                )
            start += len(part)
        return cls(matrix, threads)

    def __len__(self) -> int:
        return len(self._matrix)

    @property
    def resident_bytes(self) -> int:
        return self._matrix.nbytes

    def take(self, rows: Ints) -> NumpyScan:
        return NumpyScan(self._matrix[rows], self._threads)

    def candidates(self, queries: Projection, limits: Doubles, rows: slice) -> Candidates:
        asked = _LeftFactor(queries, limits, self._gamma)
        places = [
            (some, slice(rows.start + place.start, rows.start + place.stop))
            for some in chunks(len(queries), QUERIES_AT_ONCE)
            for place in chunks(rows.stop - rows.start, ROWS_AT_ONCE)
        ]
        with ThreadPoolExecutor(self._threads) as pool:
            found = [NOTHING, *pool.map(lambda place: self._chunk(asked, *place), places)]
        query, row, values = (np.concatenate(column) for column in zip(*found, strict=True))
        return Candidates(query, row, asked.bounds(values, query, self._matrix[row, -1]))

    def _chunk(self, asked: _LeftFactor, some: slice, rows: slice) -> tuple[Ints, Ints, Singles]:
        count, height = some.stop - some.start, rows.stop - rows.start
        values, mask = self._scratch(count * height)
        block = values.reshape(count, height)
        np.matmul(asked.vectors[some], self._matrix[rows].T, out=block)
        np.less_equal(block, asked.limits[some, None], out=mask.reshape(count, height))
        flat = np.flatnonzero(mask)
        query, row = np.divmod(flat, height)
        return query + some.start, row + rows.start, values[flat]

    def _scratch(self, size: int) -> tuple[Singles, npt.NDArray[np.bool_]]:
        """This thread's own, so that it stays in its cache."""
        if getattr(self._buffers, "size", 0) < size:
            self._buffers.size = size
            self._buffers.values, self._buffers.mask = np.empty(size, np.float32), np.empty(size, bool)
        return self._buffers.values[:size], self._buffers.mask[:size]

    def bounds(self, queries: Projection, rows: slice) -> Doubles:
        asked = _LeftFactor(queries, np.full(len(queries), np.inf), self._gamma)
        matrix = self._matrix[rows]
        values = asked.vectors @ matrix.T
        return asked.bounds(values, np.arange(len(queries))[:, None], matrix[:, -1])


def decode(codes: ShortCodes, out: Singles) -> None:
    """Write the matrix [n, r + 3] of rows: coordinates, rest, what stands alone on the left side, e_x."""
    r, terms, gamma = codes.r, codes.terms.astype(np.float64), _gamma(codes.r + 3)
    coded = np.isfinite(terms[:, ERROR])
    square, error = terms[:, SQUARE], np.where(coded, terms[:, ERROR], 0)
    np.multiply(codes.codes, codes.terms[:, SCALE, None], out=out[:, :r])
    out[:, r] = terms[:, REST]
    out[:, r + 1] = np.where(coded, square - error**2 - gamma * (2 * square + error**2), np.finfo(np.float32).min)
    out[:, r + 2] = error


def _gamma(terms: int) -> float:
    return 1.01 * (terms + 16) * UNIT


class _LeftFactor:
    """The other factor of the product: its coordinates in float32 (not coded: they are few), and right sides."""

    def __init__(self, queries: Projection, limits: Doubles, gamma: float) -> None:
        coordinates, rest = queries.coordinates.astype(np.float32), queries.rest.astype(np.float32)
        coordinates[np.abs(coordinates) < SMALLEST] = 0
        rest[rest < SMALLEST] = 0
        self._gamma = gamma
        self.error = distance_to(queries, coordinates, rest) + queries.error
        square = np.einsum("qr,qr->q", coordinates, coordinates, dtype=np.float64) + np.square(rest, dtype=np.float64)
        self._square = square * (1 - gamma) - (coordinates.shape[1] + 3) * 2.0**-124
        reach = limits + self.error
        reach[~(reach < LARGEST)] = np.inf  # all rows
        bounded = np.isfinite(reach)
        self.factor = np.where(bounded, 2 * reach * (1 + 2 * gamma), 0).astype(np.float32)
        """Of e_x."""
        self.limits = rounded_up(reach**2 - self._square + 2.0**-40 * (np.where(bounded, reach, 0) ** 2 + square))
        self.vectors = np.concatenate(
            [-2 * coordinates, -2 * rest[:, None], np.ones((len(rest), 1), np.float32), -self.factor[:, None]], axis=1
        )

    def bounds(self, values: Singles, queries: Ints, errors: Singles) -> Doubles:
        """Lower bounds of the distances, from left sides: what was taken off there for e_x is added again."""
        error = errors.astype(np.float64)
        squares = values + (
            self._square[queries] + error * (error + self.factor[queries].astype(np.float64) * (1 - 2 * self._gamma))
        )
        return np.sqrt(np.maximum(squares, 0)) * (1 - 2.0**-40) - (self.error[queries] + error)

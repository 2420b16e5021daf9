"""Where short codes say too little: the embeddings themselves are scanned, in float32."""

from __future__ import annotations

import numpy as np

from pmm.exact_search.codes import LARGEST, Projection, chunks
from pmm.exact_search.pair_distances import EmbeddingParts
from pmm.exact_search.rotation import UNIT, Rotation
from pmm.exact_search.scan import ProductScan, RightFactor, gamma_of
from pmm.utils.arrays import Doubles, Ints, Singles

SHORTEST = 2.0**-60
"""Norm below which products with a row, which are divided by it for cosine, may have vanished."""


class RowScan(ProductScan):
    """Reads all embeddings for every block of queries, and keeps of each row only its norm.

    Rows are as they are, float32 or float16, so e_x is 0; for cosine their products are divided by their norms. For a
    query, the rotation, which has to be one of all dimensions (r = D), is turned back; that adds no more than it
    deviates and rounds.
    """

    def __init__(self, gallery: EmbeddingParts, rotation: Rotation, threads: int) -> None:
        super().__init__(gallery.dim + 3, threads)
        self._gallery, self._rotation = gallery, rotation
        self._numbers: Ints | None = None
        squares = np.empty(len(gallery))
        for some in chunks(len(gallery)):
            rows = gallery.stored(some).astype(np.float64)
            squares[some] = np.einsum("nd,nd->n", rows, rows)
        cosine, gamma = gallery.metric == "cosine", gamma_of(self._terms)
        good = (squares < LARGEST**2) & ((squares > SHORTEST**2) | (not cosine))
        self._open = np.flatnonzero(~good)
        """Rows that are always candidates."""
        self._inverse = (1 / np.sqrt(np.where(good, squares, 1))).astype(np.float32) if cosine else None
        alone = np.ones(len(gallery)) if cosine else np.where(good, squares, 0)
        self._alone = np.where(good, alone * (1 - 2 * gamma), np.finfo(np.float32).min).astype(np.float32)
        """What stands alone on the left side."""

    def __len__(self) -> int:
        return len(self._alone)

    @property
    def resident_bytes(self) -> int:
        return self._alone.nbytes + (0 if self._inverse is None else self._inverse.nbytes)

    def take(self, rows: Ints) -> RowScan:
        some = object.__new__(RowScan)
        ProductScan.__init__(some, self._terms, self._threads)
        some._gallery, some._rotation = self._gallery, self._rotation
        some._numbers = rows if self._numbers is None else self._numbers[rows]
        some._open = np.flatnonzero(np.isin(rows, self._open))
        some._alone, some._inverse = self._alone[rows], None if self._inverse is None else self._inverse[rows]
        return some

    def left_sides(self, rows: slice, vectors: Singles, out: Singles) -> Singles:
        items = self._gallery.stored(rows if self._numbers is None else self._numbers[rows])
        some = range(*rows.indices(len(self)))
        large = [some.index(row) for row in self._open.tolist() if row in some] if len(self._open) else []
        if large or items.dtype != np.float32:
            items = items.astype(np.float32)
            items[large] = 0
        np.matmul(items, vectors[: self._gallery.dim], out=out)
        if self._inverse is not None:
            out *= self._inverse[rows, None]
        out += self._alone[rows, None]
        return np.zeros(len(out), np.float32)

    def right_factor(self, queries: Projection, limits: Doubles) -> RightFactor:
        turning = self._rotation.deviation + 1.01 * (self._gallery.dim + 4) * UNIT * self._rotation.dim**0.5
        coordinates = queries.coordinates @ self._rotation.basis.T + self._rotation.mean
        sizes = np.linalg.norm(queries.coordinates, axis=1) + float(np.linalg.norm(self._rotation.mean))
        error = queries.error + 2 * turning * sizes
        coordinates[np.isinf(error)] = 0
        return super().right_factor(Projection(coordinates, np.zeros(len(error)), error), limits)

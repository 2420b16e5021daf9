"""Where short codes say too little: the embeddings themselves are scanned, in float32."""

from __future__ import annotations

import numpy as np

from pmm.evaluation.distances import Doubles, Ints, Singles
from pmm.exact_search.codes import LARGEST, SMALLEST, Projection
from pmm.exact_search.pair_distances import EmbeddingParts
from pmm.exact_search.rotation import UNIT, Rotation
from pmm.exact_search.scan import ProductScan, RightFactor, gamma_of


class RowScan(ProductScan):
    """Reads all embeddings for every block of queries, and keeps none in memory.

    A row's coordinates are row - mean, rounded to float32: e_x = 2^-24 of their norm. For a query, the rotation, which
    has to be one of all dimensions (r = D), is turned back; that adds no more than it deviates and rounds.
    """

    most_rows = 512

    def __init__(self, gallery: EmbeddingParts, rotation: Rotation, threads: int, numbers: Ints | None = None) -> None:
        """`numbers`: the rows to be scanned, if not all."""
        super().__init__(gallery.dim + 3, threads)
        self._gallery, self._rotation, self._numbers = gallery, rotation, numbers
        self._centre = rotation.mean.astype(np.float32)

    def __len__(self) -> int:
        return len(self._gallery) if self._numbers is None else len(self._numbers)

    @property
    def resident_bytes(self) -> int:
        return self._centre.nbytes

    def take(self, rows: Ints) -> RowScan:
        numbers = rows if self._numbers is None else self._numbers[rows]
        return RowScan(self._gallery, self._rotation, self._threads, numbers)

    def left_factor(self, rows: slice) -> Singles:
        items = self._gallery.read(rows) if self._numbers is None else self._gallery.take(self._numbers[rows])
        out, dim, gamma = self._matrix(len(items)), self._gallery.dim, gamma_of(self._terms)
        with np.errstate(over="ignore", invalid="ignore"):  # of rows that are too large
            np.subtract(items, self._centre, out=out[:, :dim], casting="same_kind")
            square = np.einsum("nd,nd->n", out[:, :dim], out[:, :dim]).astype(np.float64)
            error = (1.01 * 2.0**-24) * np.sqrt(square + dim * 2.0**-120) + SMALLEST  # squares may underflow
            # once more g square_x, for the square itself is a sum in float32
            alone = square - error**2 - gamma * (3 * square + error**2)
        out[:, dim], out[:, dim + 1], out[:, dim + 2] = 0, alone, error
        large = ~(square < LARGEST**2)
        if large.any():
            out[large], out[large, dim + 1] = 0, np.finfo(np.float32).min
        return out

    def _matrix(self, rows: int) -> Singles:
        """This thread's own, for one chunk after another: new memory costs as much as what is written there."""
        if len(getattr(self._buffers, "matrix", ())) < rows:
            self._buffers.matrix = np.empty((rows, self._terms), np.float32)
        return self._buffers.matrix[:rows]

    def right_factor(self, queries: Projection, limits: Doubles) -> RightFactor:
        turning = self._rotation.deviation + 1.01 * (self._gallery.dim + 4) * UNIT * self._rotation.dim**0.5
        norms = np.linalg.norm(queries.coordinates, axis=1)
        coordinates = queries.coordinates @ self._rotation.basis.T + (self._rotation.mean - self._centre)
        error = queries.error + 2 * turning * (norms + float(np.linalg.norm(self._rotation.mean - self._centre)))
        coordinates[np.isinf(error)] = 0
        return super().right_factor(Projection(coordinates, np.zeros(len(error)), error), limits)

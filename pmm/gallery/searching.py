"""Exact search among the rows of a snapshot: filters, cameras left out, and distances as users read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distances import MEMORY_LIMIT, Blocks, EmbeddingDistances, EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from pmm.gallery.filters import RowFilter
from pmm.gallery.snapshot import GallerySnapshot, Rows
from pmm.utils.errors import InvalidInput, InvalidValue

NO_ROW = -1
Doubles: TypeAlias = npt.NDArray[np.float64]
Allowed: TypeAlias = Callable[[Rows, Rows], npt.NDArray[np.bool_]]


class GallerySearcher:
    """Searches one snapshot; what it needs is read at the first query."""

    def __init__(self, snapshot: GallerySnapshot) -> None:
        self.snapshot = snapshot
        self._filtered: tuple[RowFilter, Rows] | None = None

    def nearest(
        self, queries: npt.NDArray[Any], k: int, where: RowFilter | None, not_camera: Any
    ) -> tuple[Rows, Doubles]:
        """Rows and distances [Q, min(k, rows that are looked at)] of checked queries [Q, D]."""
        rows, excluded = self._looked_at(where), self._excluded(queries, not_camera)
        k = min(k, len(rows))
        if not k or not len(queries):
            return np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
        matrix = EmbeddingMatrix(self.snapshot.embeddings(rows), metric=self.snapshot.manifest.metric)
        between = EmbeddingDistances(EmbeddingMatrix(queries, metric=matrix.metric), matrix)
        blocks = Blocks.within(MEMORY_LIMIT, between.shape, matrix.dim, 1)
        items, halves, _ = nearest(between, k, blocks, excluded=excluded and (lambda some: excluded(some, rows)))
        if excluded is not None and not (items >= 0).any():
            raise InvalidInput("every row is of the camera that is left out", expected="rows of other cameras")
        found = np.where(items >= 0, rows[items], NO_ROW)
        return found, self._distances(halves * between.factor)

    def within(
        self, queries: npt.NDArray[Any], distance: float, where: RowFilter | None, not_camera: Any
    ) -> list[tuple[Rows, Doubles]]:
        """Rows and distances of what is at most `distance` away, for each of the checked queries [Q, D]."""
        rows, distances = self.nearest(queries, max(1, len(self.snapshot)), where, not_camera)
        near = (distances <= distance) & (rows >= 0)
        return [(row[keep], each[keep]) for row, each, keep in zip(rows, distances, near, strict=True)]

    def _distances(self, halves: Doubles) -> Doubles:
        return halves if self.snapshot.manifest.metric == "cosine" else np.sqrt(2 * halves)

    def _looked_at(self, where: RowFilter | None) -> Rows:
        if where is None:
            return self.snapshot.live
        if self._filtered is None or self._filtered[0] != where:
            self._filtered = (where, where.rows(self.snapshot))
        return self._filtered[1]

    def _excluded(self, queries: npt.NDArray[Any], not_camera: Any) -> Any:
        if not_camera is None:
            return None
        if "camera" not in self.snapshot.manifest.columns:
            raise InvalidValue("not_camera", not_camera, "a gallery with a column camera")
        numbers, known = self._cameras
        given = [not_camera] * len(queries) if np.isscalar(not_camera) else list(not_camera)
        if len(given) != len(queries):
            raise InvalidInput(f"not_camera has {len(given)} cameras for {len(queries)} queries")
        own = np.array([known.get(each, -1) for each in given])
        return lambda some, rows: np.nonzero(own[some][:, None] == numbers[rows][None])

    @cached_property
    def _cameras(self) -> tuple[npt.NDArray[np.int32], dict[object, int]]:
        return self.snapshot.categories("camera")

"""Exact search among the rows of a snapshot: filters, cameras left out, and distances as users read them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pmm.exact_search.searcher import Allowed, ExactSearcher, RowMatches
from pmm.gallery.filters import RowFilter
from pmm.gallery.matches import Matches
from pmm.gallery.short_codes import read_codes, read_rotation
from pmm.gallery.snapshot import GallerySnapshot, Rows
from pmm.utils.errors import InvalidInput, InvalidValue

Doubles: TypeAlias = npt.NDArray[np.float64]


class GallerySearcher:
    """Searches one snapshot; what it needs is read at the first query."""

    def __init__(self, snapshot: GallerySnapshot) -> None:
        self.snapshot = snapshot
        self._filtered: tuple[RowFilter, Rows] | None = None

    def nearest(
        self, queries: npt.NDArray[Any], k: int, where: RowFilter | None, not_camera: Any
    ) -> tuple[Rows, Doubles]:
        """Rows and distances [Q, K] of checked queries [Q, D]; K is k, or as many as there are."""
        rows, allowed = self._looked_at(where), self._allowed(len(queries), not_camera)
        if not len(self.snapshot) or not len(queries):
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0))
        found = self._exact.nearest(queries, k, rows=rows, allowed=allowed)
        width = int((found.rows >= 0).sum(1).max())  # a query's own camera may leave fewer than k
        if not width:
            raise InvalidInput("every row is of the camera that is left out", expected="rows of other cameras")
        return self._as_read(RowMatches(found.rows[:, :width], found.distances[:, :width]))

    def within(
        self, queries: npt.NDArray[Any], distance: float, where: RowFilter | None, not_camera: Any
    ) -> list[tuple[Rows, Doubles]]:
        """Rows and distances of what is at most `distance` away, for each of the checked queries [Q, D]."""
        rows, allowed = self._looked_at(where), self._allowed(len(queries), not_camera)
        if not len(self.snapshot) or not len(queries):
            return [(np.empty(0, np.int64), np.empty(0))] * len(queries)
        limit = distance if self._is_cosine else distance**2 / 2 * (1 + 2**-40)
        each = map(self._as_read, self._exact.within(queries, limit, rows=rows, allowed=allowed))
        return [(rows[0][near], distances[0][near]) for rows, distances in each for near in [distances[0] <= distance]]

    def matches(self, rows: Rows, distances: Doubles) -> Matches:
        """What was found, with its ids."""
        there, text = rows >= 0, self.snapshot.manifest.ids == "text"
        ids = np.full(rows.shape, None if text else -1, object if text else np.int64)
        ids[there] = self.snapshot.take("id", rows[there])
        return Matches(ids, distances, rows)

    @cached_property
    def _exact(self) -> ExactSearcher:
        snapshot = self.snapshot
        rotation = read_rotation(snapshot)
        codes = read_codes(snapshot, rotation.r)
        parts = [chunk.embeddings for chunk in snapshot.chunks]
        return ExactSearcher(parts, snapshot.manifest.metric, rotation, codes)

    @property
    def resident_bytes(self) -> int:
        """Memory that the short codes take; embeddings stay on the disk."""
        return self._exact.resident_bytes if len(self.snapshot) else 0

    @property
    def _is_cosine(self) -> bool:
        return self.snapshot.manifest.metric == "cosine"

    def _as_read(self, found: RowMatches) -> tuple[Rows, Doubles]:
        return found.rows, found.distances if self._is_cosine else np.sqrt(2 * found.distances)

    def _looked_at(self, where: RowFilter | None) -> Rows | None:
        """None for all that are stored."""
        if where is None:
            return self.snapshot.live if len(self.snapshot.removed) else None
        filtered = self._filtered  # another thread may ask for something else
        if filtered is None or filtered[0] != where:
            self._filtered = filtered = (dataclasses.replace(where), where.rows(self.snapshot))
        return filtered[1]

    def _allowed(self, queries: int, not_camera: Any) -> Allowed | None:
        if not_camera is None:
            return None
        if "camera" not in self.snapshot.manifest.columns:
            raise InvalidValue("not_camera", not_camera, "nothing, as the gallery has no column camera")
        given = [not_camera] * queries if isinstance(not_camera, str | int) else np.asarray(not_camera).tolist()
        if len(given) != queries:
            raise InvalidInput(f"not_camera names {len(given)} cameras for {queries} queries")
        numbers, known = self._cameras
        own = np.array([known.get(camera, -1) for camera in given])
        return lambda query, rows: own[query] != numbers[rows]

    @cached_property
    def _cameras(self) -> tuple[npt.NDArray[np.int32], dict[object, int]]:
        return self.snapshot.categories("camera")

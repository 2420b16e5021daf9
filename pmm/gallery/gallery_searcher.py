"""Exact search among the rows of a snapshot, with filters and cameras to leave out, in distances as users read them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.exact_search.searcher import Allowed, ExactSearcher, RowMatches
from pmm.gallery.filters import RowFilter, check_kind, number_of, values_of
from pmm.gallery.matches import Matches
from pmm.gallery.storage.rows import BROKEN, as_numbers
from pmm.gallery.storage.short_codes import read_codes, read_rotation
from pmm.gallery.storage.snapshot import GallerySnapshot, Rows
from pmm.utils.arrays import Doubles
from pmm.utils.errors import InvalidInput, InvalidValue


class GallerySearcher:
    """Searches one snapshot; what it needs is read at the first query."""

    def __init__(self, snapshot: GallerySnapshot) -> None:
        self.snapshot = snapshot
        self._filtered: tuple[RowFilter, Rows] | None = None

    def nearest(self, queries: npt.ArrayLike, k: int, where: RowFilter | None, not_camera: Any) -> Matches:
        """As `Gallery.search`."""
        if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 1:
            raise InvalidValue("k", k, "a whole number, 1 or more")
        given = as_numbers("query embeddings", queries)
        checked = self._checked(given)
        rows, allowed = self._looked_at(where), self._allowed(len(checked), not_camera)
        if not len(self.snapshot) or not len(checked):
            found = RowMatches(np.empty((len(checked), 0), np.int64), np.empty((len(checked), 0)))
        else:
            found = self._exact.nearest(checked, int(k), rows=rows, allowed=allowed)
        width = int((found.rows >= 0).sum(1).max(initial=0))  # a query's own camera may leave fewer than k
        matches = self._matches(found.rows[:, :width], found.distances[:, :width])
        return matches if given.ndim == 2 else Matches(matches.ids[0], matches.distances[0], matches.rows[0])

    def within(
        self, queries: npt.ArrayLike, distance: float, where: RowFilter | None, not_camera: Any
    ) -> list[Matches]:
        """As `Gallery.within`."""
        distance = number_of("distance", distance, "0 or more")
        if distance < 0:
            raise InvalidValue("distance", distance, "0 or more")
        checked = self._checked(as_numbers("query embeddings", queries))
        rows, allowed = self._looked_at(where), self._allowed(len(checked), not_camera)
        if not len(self.snapshot) or not len(checked):
            return [self._matches(np.empty(0, np.int64), np.empty(0)) for _ in checked]
        limit = distance if self._is_cosine else distance * distance / 2 * (1 + 2**-40)
        found = self._exact.within(checked, limit, rows=rows, allowed=allowed)
        all_of = [self._matches(each.rows[0], each.distances[0]) for each in found]
        near = [each.distances <= distance for each in all_of]
        return [Matches(a.ids[b], a.distances[b], a.rows[b]) for a, b in zip(all_of, near, strict=True)]

    def _checked(self, queries: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[Q, D]. Raises InvalidInput for queries that cannot be compared."""
        dim = self.snapshot.manifest.dim
        if queries.ndim not in (1, 2) or queries.shape[-1] != dim or queries.dtype.kind not in "fiu":
            raise InvalidInput(
                f"query embeddings are {queries.dtype} {list(queries.shape)}", expected=f"numbers [{dim}] or [Q, {dim}]"
            )
        rows = np.atleast_2d(queries)
        if not np.isfinite(rows).all():
            bad = np.flatnonzero(~np.isfinite(rows).all(1))
            raise InvalidInput(
                f"{len(bad)} of {len(rows)} query embeddings hold NaN or Inf, the first is {bad[0]}",
                index=int(bad[0]), hint=BROKEN,
            )  # fmt: skip
        if self._is_cosine and not rows.any(1).all():
            row = int((~rows.any(1)).argmax())
            raise InvalidInput(f"query {row} is all zero; it has no direction to compare by cosine", index=row)
        return rows

    def _matches(self, rows: Rows, halves: Doubles) -> Matches:
        """Rows with their ids and distances as users read them."""
        distances = halves if self._is_cosine else np.sqrt(2 * halves)
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
        """Memory that the short codes use; embeddings stay on disk."""
        return self._exact.resident_bytes if len(self.snapshot) else 0

    @property
    def _is_cosine(self) -> bool:
        return self.snapshot.manifest.metric == "cosine"

    def _looked_at(self, where: RowFilter | None) -> Rows | None:
        """The rows to search; None for all stored rows."""
        if where is None:
            return self.snapshot.live if len(self.snapshot.removed) else None
        if not isinstance(where, RowFilter):
            raise InvalidValue("where", where, "a pmm.RowFilter")
        filtered = self._filtered  # another thread may ask for something else
        if filtered is None or filtered[0] != where:
            self._filtered = filtered = (dataclasses.replace(where), where.rows(self.snapshot))
        return filtered[1]

    def _allowed(self, queries: int, not_camera: Any) -> Allowed | None:
        if not_camera is None:
            return None
        if "camera" not in self.snapshot.manifest.columns:
            raise InvalidValue("not_camera", not_camera, "nothing, as the gallery has no column camera")
        listed = not_camera.tolist() if isinstance(not_camera, np.ndarray) else not_camera
        given = values_of("not_camera", listed if isinstance(listed, list | tuple) else [listed] * queries, (str, int))
        check_kind("not_camera", given, self.snapshot.manifest.columns["camera"])
        if len(given) != queries:
            raise InvalidInput(f"not_camera names {len(given)} cameras for {queries} queries")
        numbers, known = self._cameras
        own = np.array([known.get(camera, -1) for camera in given])
        return lambda query, rows: own[query] != numbers[rows]

    @cached_property
    def _cameras(self) -> tuple[npt.NDArray[np.int32], dict[object, int]]:
        return self.snapshot.categories("camera")

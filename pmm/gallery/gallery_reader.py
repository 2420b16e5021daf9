"""What is read of a gallery: its facts, rows and columns, and exact search among them. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery_searcher import GallerySearcher
from pmm.gallery.matches import Matches
from pmm.gallery.storage.columns import ColumnValues, Ids
from pmm.gallery.storage.manifest import GalleryManifest, StoredPrecision
from pmm.gallery.storage.rows import as_ids
from pmm.gallery.storage.snapshot import GallerySnapshot, Rows
from pmm.gallery.storage.source import EmbeddingSource
from pmm.gallery.storage.thresholds import Threshold, thresholds_for
from pmm.gallery.storage.verification import fitted_on, problems_of
from pmm.utils.errors import InvalidFile, InvalidValue


class GalleryReader:
    """A gallery as a snapshot of it says; `pmm.Gallery` can change it, too."""

    def __init__(self, snapshot: GallerySnapshot) -> None:
        self._use(snapshot)

    def _use(self, snapshot: GallerySnapshot) -> None:
        self._searcher = GallerySearcher(snapshot)

    @property
    def _snapshot(self) -> GallerySnapshot:
        return self._searcher.snapshot

    def __len__(self) -> int:
        return len(self._snapshot)

    @property
    def path(self) -> Path:
        """Of its folder."""
        return self._snapshot.path

    @property
    def manifest(self) -> GalleryManifest:
        """All of it but its arrays."""
        return self._snapshot.manifest

    @property
    def dim(self) -> int:
        """Of the embeddings."""
        return self.manifest.dim

    @property
    def metric(self) -> Literal["euclidean", "cosine"]:
        """That embeddings are compared by."""
        return self.manifest.metric

    @property
    def precision(self) -> StoredPrecision:
        """That embeddings are stored in."""
        return self.manifest.precision

    @property
    def source(self) -> EmbeddingSource | None:
        """What made the embeddings, if that is known."""
        return self.manifest.source

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        """Distances at which two crops count as one person."""
        return self.manifest.thresholds

    @property
    def folder(self) -> str:
        """That paths are relative to."""
        return self.manifest.folder

    @property
    def fitted_on(self) -> str:
        """SHA-256 of the rows, as float32, that the rotation of the short codes was fitted on; empty if they are the
        gallery's own, `unknown` if it does not say."""
        return fitted_on(self._snapshot)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns beside the ids."""
        return tuple(self.manifest.columns)

    @property
    def rows(self) -> Rows:
        """Numbers [N] of the rows that are not removed; `compact` counts them anew. Until then removed rows can be read
        by their numbers, and are in no search."""
        return self._snapshot.live

    def column(self, name: str, rows: Rows | None = None) -> ColumnValues:
        """A column, or the ids (`id`), of all rows or of some. Raises InvalidValue for one that is not there."""
        if name != "id" and name not in self.columns:
            raise InvalidValue("column", name, choices=("id", *self.columns))
        snapshot = self._snapshot  # another thread may change the gallery
        return snapshot.take(name, snapshot.checked(rows))

    def ids_of(self, rows: Rows) -> Ids:
        """The ids of some rows."""
        return self.column("id", rows)  # type: ignore[return-value]

    def embeddings(self, rows: Rows | None = None) -> npt.NDArray[np.float32]:
        """float32 [n, D] of all rows or of some."""
        snapshot = self._snapshot
        return snapshot.embeddings(snapshot.checked(rows)).astype(np.float32, copy=False)

    def find(self, ids: Sequence[str] | Sequence[int] | npt.NDArray[Any]) -> Rows:
        """The row of each id; -1 for one that is not there."""
        return self._snapshot.find(as_ids(ids))

    def rows_where(self, where: RowFilter) -> Rows:
        """The rows [n] that a filter keeps, ascending. Raises InvalidInput if it keeps none, as `search`."""
        return where.rows(self._snapshot)

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        where: RowFilter | None = None,
        not_camera: Any = None,
    ) -> Matches:
        """The `k` rows nearest to each query, all if there are fewer; exact, ties by row.

        Args:
            queries: [D] or [Q, D].
            where: which rows to look at.
            not_camera: a camera, or one per query [Q], whose rows do not count; a query may be left with none.

        Raises InvalidInput for queries of another dimension, NaN or Inf in them, or all zero where the metric is
        cosine, and for a filter that leaves nothing; InvalidValue for k < 1, and for cameras or a filter of other kinds
        of values than the gallery's.
        """
        return self._searcher.nearest(queries, k, where, not_camera)

    @property
    def resident_bytes(self) -> int:
        """Memory that searches keep, once the first was made: the short codes; embeddings stay on the disk."""
        return self._searcher.resident_bytes

    def within(
        self,
        queries: npt.ArrayLike,
        distance: float,
        *,
        where: RowFilter | None = None,
        not_camera: Any = None,
    ) -> list[Matches]:
        """All rows at most `distance` away, for each query; else as `search`."""
        return self._searcher.within(queries, distance, where, not_camera)

    def threshold(self, fmr: float | None = None) -> Threshold:
        """The threshold for a false match rate; without one, the one given without, or the only one.

        Raises InvalidValue if there is none for it, InvalidInput if it is of another model or precision.
        """
        found = thresholds_for(self.thresholds, fmr)
        if len(found) != 1:
            known = ", ".join(f"{each.fmr:g}" for each in self.thresholds if each.fmr)
            expected = f"one of the rates that the gallery has thresholds for ({known or 'it has none'})"
            raise InvalidValue("fmr", fmr, expected, hint="" if known else "pmm threshold measures one")
        found[0].check_fits(self.source, self.precision)
        return found[0]

    def verify(self) -> list[InvalidFile]:
        """What is wrong with the files: changed since they were written, or not fitting each other. Reads them all."""
        return list(problems_of(self._snapshot))

"""Reading a gallery: its facts, rows and columns, and exact search among them. Loads no torch."""

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
    """Reads a snapshot of a gallery; `pmm.Gallery` can also change it."""

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
        """The folder of the gallery."""
        return self._snapshot.path

    @property
    def manifest(self) -> GalleryManifest:
        """Everything but the arrays."""
        return self._snapshot.manifest

    @property
    def dim(self) -> int:
        """Dimensions of an embedding."""
        return self.manifest.dim

    @property
    def metric(self) -> Literal["euclidean", "cosine"]:
        """How embeddings are compared."""
        return self.manifest.metric

    @property
    def precision(self) -> StoredPrecision:
        """Precision in which embeddings are stored."""
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
        """The folder that paths are relative to."""
        return self.manifest.folder

    @property
    def fitted_on(self) -> str:
        """SHA-256 of the rows, as float32, to which the rotation of the short codes was fitted; empty if they are the
        gallery's own, `unknown` if that is not recorded."""
        return fitted_on(self._snapshot)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, without the ids."""
        return tuple(self.manifest.columns)

    @property
    def rows(self) -> Rows:
        """Numbers [N] of the rows that are not removed; `compact` renumbers them. Until then, removed rows can be read
        by their numbers, but no search finds them."""
        return self._snapshot.live

    def column(self, name: str, rows: Rows | None = None) -> ColumnValues:
        """A column, or the ids (`id`), of all rows or of `rows`. Raises InvalidValue for an unknown column."""
        if name != "id" and name not in self.columns:
            raise InvalidValue("column", name, choices=("id", *self.columns))
        snapshot = self._snapshot  # another thread may change the gallery
        return snapshot.take(name, snapshot.checked(rows))

    def ids_of(self, rows: Rows) -> Ids:
        """The ids of `rows`."""
        return self.column("id", rows)  # type: ignore[return-value]

    def embeddings(self, rows: Rows | None = None) -> npt.NDArray[np.float32]:
        """Embeddings float32 [n, D] of all rows or of `rows`."""
        snapshot = self._snapshot
        return snapshot.embeddings(snapshot.checked(rows)).astype(np.float32, copy=False)

    def find(self, ids: Sequence[str] | Sequence[int] | npt.NDArray[Any]) -> Rows:
        """The row of each id; -1 for an id that the gallery does not have."""
        return self._snapshot.find(as_ids(ids))

    def rows_where(self, where: RowFilter) -> Rows:
        """The rows [n] that a filter keeps, ascending. Raises as `search`, so InvalidInput if it keeps none."""
        return where.rows(self._snapshot)

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        where: RowFilter | None = None,
        not_camera: Any = None,
    ) -> Matches:
        """The `k` rows nearest to each query, or all if there are fewer; exact, ties by row.

        Args:
            queries: [D] or [Q, D].
            where: which rows to search.
            not_camera: a camera, or one per query [Q], whose rows are left out; a query may find nothing then.

        Raises InvalidInput for queries of another dimension, with NaN or Inf, or all zero if the metric is cosine, and
        for a filter that keeps no row; InvalidValue for k < 1, and for cameras or filter values of another type than
        the gallery's.
        """
        return self._searcher.nearest(queries, k, where, not_camera)

    @property
    def resident_bytes(self) -> int:
        """Memory that searches use, from the first one on: the short codes. Embeddings stay on disk."""
        return self._searcher.resident_bytes

    def within(
        self,
        queries: npt.ArrayLike,
        distance: float,
        *,
        where: RowFilter | None = None,
        not_camera: Any = None,
    ) -> list[Matches]:
        """For each query, all rows at most `distance` away; arguments and errors as in `search`."""
        return self._searcher.within(queries, distance, where, not_camera)

    def threshold(self, fmr: float | None = None) -> Threshold:
        """The threshold for the false match rate `fmr`; without `fmr`, the one stored without a rate, or the only one.

        Raises InvalidValue if there is none, InvalidInput if it was measured for another model or precision.
        """
        found = thresholds_for(self.thresholds, fmr)
        if len(found) != 1:
            known = ", ".join(f"{each.fmr:g}" for each in self.thresholds if each.fmr)
            expected = f"one of the rates that the gallery has thresholds for ({known or 'it has none'})"
            raise InvalidValue("fmr", fmr, expected, hint="" if known else "pmm threshold measures one")
        found[0].check_fits(self.source, self.precision)
        return found[0]

    def verify(self) -> list[InvalidFile]:
        """Problems of the files: changed since they were written, or not fitting each other. Reads all of them."""
        return list(problems_of(self._snapshot))

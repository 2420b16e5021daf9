"""A gallery on disk: embeddings with ids and columns, and exact search among them. Loads no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.gallery.changes import append, compact
from pmm.gallery.columns import ColumnValues, Ids
from pmm.gallery.creation import check_new, new_manifest, source_of_model
from pmm.gallery.filters import RowFilter
from pmm.gallery.gallery_searcher import GallerySearcher
from pmm.gallery.manifest import GalleryManifest, StoredPrecision
from pmm.gallery.matches import Matches
from pmm.gallery.rows import as_column, as_ids, as_numbers, first_ids, gallery_rows
from pmm.gallery.snapshot import GallerySnapshot, Rows
from pmm.gallery.source import EmbeddingSource, check_added
from pmm.gallery.thresholds import Threshold, thresholds_for
from pmm.gallery.verification import check_unchanged, fitted_on, problems_of
from pmm.gallery.writer import GalleryChange, WriterLock, remove_leftovers
from pmm.utils.errors import InvalidFile, InvalidInput, InvalidValue
from pmm.utils.files import claimed


class Gallery:
    """Embeddings [N, D] on disk, each with an id, and columns beside them.

    What is read stays as it was when this object was made, or changed the gallery; `open` it again for what others
    wrote since. Threads may share it. Its files are mapped into memory: a process that reads one which something else
    makes shorter meanwhile is ended by the system (SIGBUS).

    Example:
        >>> gallery = pmm.Gallery.create("gallery", np.eye(3), ids=["a", "b", "c"])
        >>> ids, distances = gallery.search(np.array([0.9, 0.1, 0]), k=2)
        >>> ids.tolist()
        ['a', 'b']
    """

    def __init__(self, snapshot: GallerySnapshot) -> None:
        self._searcher = GallerySearcher(snapshot)
        self._lock = WriterLock()

    @classmethod
    def create(
        cls,
        path: str | Path,
        embeddings: npt.ArrayLike,
        ids: Sequence[str] | Sequence[int] | npt.NDArray[Any],
        metric: Literal["euclidean", "cosine"] | None = None,
        *,
        source: EmbeddingSource | None = None,
        model: str | Path | None = None,
        columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]] | None = None,
        precision: StoredPrecision = "fp32",
        folder: str = "",
    ) -> Gallery:
        """Write a new gallery.

        Args:
            path: a folder that does not exist, or is empty.
            embeddings: numbers [N, D]; N may be 0.
            ids: [N] texts or whole numbers, each once.
            metric: default that of `source`, or euclidean.
            source: what made the embeddings; or `model`, the file that did.
            columns: name -> [N] texts, whole numbers or floats. `camera`, `time` (seconds) and `path` are those that
                filters and pictures use.
            precision: that embeddings are stored in; distances are exact ones of what is stored.
            folder: that paths are relative to.

        Raises:
            InvalidInput: as `add`.
            InvalidValue: an unknown metric or precision, or a name that no column can have.
            ConflictingOptions: a metric that is not the source's, or a source and a model.
            CannotWrite: `path` is something else, another process writes there, or the disk is full.
        """
        path = Path(path)
        if model is not None:
            source = source_of_model(Path(model), source)
        given, checked_ids = as_numbers("embeddings", embeddings), as_ids(ids)
        checked = {name: as_column(name, each) for name, each in (columns or {}).items()}
        manifest = new_manifest(
            given, checked_ids, metric, source=source, columns=checked, precision=precision, folder=folder
        )
        rows = gallery_rows(manifest, given, checked_ids, checked)
        check_new(path)
        with claimed(path):
            check_new(path)
            remove_leftovers(path, manifest)
            with GalleryChange(path, manifest) as change:
                append(change, rows, None)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> Gallery:
        """The gallery at `path`; read-only media will do.

        Raises InvalidFile for a folder that is no gallery, one of another format, and files that are missing, or longer
        or shorter than they were written.
        """
        return cls(GallerySnapshot.open(Path(path).absolute()))

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

    def add(
        self,
        embeddings: npt.ArrayLike,
        ids: Sequence[str] | Sequence[int] | npt.NDArray[Any],
        columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]] | None = None,
        *,
        source: EmbeddingSource | None = None,
    ) -> None:
        """Append rows, all or none of them; they are on the disk when this returns.

        If the gallery says what made its embeddings, `source` has to say the same of these.

        Raises InvalidInput for an id that is there already, embeddings that cannot be compared (naming the first ids),
        a source that is not the gallery's and columns that are not; InvalidFile where rows that would be written anew
        have changed; CannotWrite if another process writes, or the disk is full.
        """
        given, checked_ids = as_numbers("embeddings", embeddings), as_ids(ids)
        checked = {name: as_column(name, each) for name, each in (columns or {}).items()}
        with self.writer():
            check_added(self.source, source, self.path)
            rows = gallery_rows(self.manifest, given, checked_ids, checked)
            if not len(rows):
                return
            known = np.flatnonzero(self._snapshot.find(checked_ids) >= 0)
            if len(known):
                raise InvalidInput(
                    f"{len(known)} of {len(rows)} ids are in the gallery already: {first_ids(checked_ids, known)}",
                    index=int(known[0]), path=self.path, hint="remove them first, or leave them out",
                )  # fmt: skip
            with GalleryChange(self.path, self.manifest) as change:
                append(change, rows, self._snapshot)
            self._reopen()

    def remove(self, ids: Sequence[str] | Sequence[int] | npt.NDArray[Any]) -> int:
        """Remove the rows of these ids; how many there were. Their place on the disk is free after `compact`."""
        checked_ids = as_ids(ids)
        with self.writer():
            found = self._snapshot.find(checked_ids)
            gone = np.unique(found[found >= 0])
            if len(gone):
                removed = np.union1d(self._snapshot.removed, gone)
                if self.manifest.tombstones:
                    check_unchanged(self._snapshot, "tombstones", self.manifest.tombstones)
                with GalleryChange(self.path, self.manifest) as change:
                    change.commit(tombstones=change.write("tombstones", {"rows.npy": removed}, len(removed)))
                self._reopen()
        return len(gone)

    def compact(self) -> None:
        """Write the rows anew without the removed ones, in few chunks, with short codes that fit them best.

        It needs room for a second gallery on the disk. Others that have opened the gallery keep what they opened, and
        that stays on the disk until the next change after they closed it.
        """
        with self.writer():
            with GalleryChange(self.path, self.manifest) as change:
                compact(change, self._snapshot)
            self._reopen()

    def verify(self) -> list[InvalidFile]:
        """What is wrong with the files: changed since they were written, or not fitting each other. Reads them all."""
        return list(problems_of(self._snapshot))

    def set_thresholds(self, thresholds: Sequence[Threshold]) -> None:
        """Replace the thresholds. Raises InvalidInput for one of another model or precision."""
        with self.writer():
            for threshold in thresholds:
                threshold.check_fits(self.source, self.precision)
            with GalleryChange(self.path, self.manifest) as change:
                change.commit(thresholds=tuple(thresholds))
            self._reopen()

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

    @contextlib.contextmanager
    def writer(self) -> Iterator[None]:
        """Hold the gallery for this thread, as it is now on the disk; without it each change does so for itself.

        Other threads wait if they use this object. Raises CannotWrite if another process or object writes.
        """
        with self._lock.hold(self.path) as first:
            if first:
                self._reopen()
            yield

    def _reopen(self) -> None:
        """Take the newest state, and remove what only the one before held."""
        self._searcher = GallerySearcher(GallerySnapshot.open(self.path))
        remove_leftovers(self.path, self.manifest)

    @property
    def _snapshot(self) -> GallerySnapshot:
        return self._searcher.snapshot

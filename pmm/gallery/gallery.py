"""A gallery on disk: how it is made, opened and changed. Loads no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pmm.gallery.creation import check_new, new_manifest, source_of_model
from pmm.gallery.gallery_reader import GalleryReader
from pmm.gallery.storage.changes import append, compact
from pmm.gallery.storage.manifest import StoredPrecision
from pmm.gallery.storage.rows import as_column, as_ids, as_numbers, first_ids, gallery_rows
from pmm.gallery.storage.snapshot import GallerySnapshot
from pmm.gallery.storage.source import EmbeddingSource, check_added
from pmm.gallery.storage.thresholds import Threshold
from pmm.gallery.storage.verification import check_unchanged
from pmm.gallery.storage.writer import GalleryChange, WriterLock, remove_leftovers
from pmm.utils.errors import InvalidInput
from pmm.utils.files import claimed


class Gallery(GalleryReader):
    """Embeddings [N, D] on disk, each with an id, and columns beside them.

    The object shows the gallery as it was when it was opened, or last changed through this object; `open` it again to
    see what others have written since. Threads may share it. Its files are mapped into memory: if something else
    truncates one, the system ends the process that reads it (SIGBUS).

    Examples:
        >>> gallery = pmm.Gallery.create("gallery", np.eye(3), ids=["a", "b", "c"])
        >>> ids, distances = gallery.search(np.array([0.9, 0.1, 0]), k=2)
        >>> ids.tolist()
        ['a', 'b']
    """

    def __init__(self, snapshot: GallerySnapshot) -> None:
        super().__init__(snapshot)
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
            ids: texts or whole numbers [N], all different.
            metric: how embeddings are compared (default: as `source` says, else euclidean).
            source: what made the embeddings.
            model: the file that made them, in place of `source`.
            columns: name -> texts, whole numbers or floats [N]. Filters and pictures use `camera`, `time` (seconds)
                and `path`.
            precision: how embeddings are stored; distances are exact for the stored values.
            folder: the folder that paths are relative to.

        Raises:
            InvalidInput: as `add`.
            InvalidValue: an unknown metric or precision, or a name that a column cannot have.
            ConflictingOptions: a metric other than the source's, or both a source and a model.
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
        """Open the gallery at `path`, which may be on read-only media.

        Raises InvalidFile if it is no gallery, has another format, or has files that are missing or of another size
        than when they were written.
        """
        return cls(GallerySnapshot.open(Path(path).absolute()))

    def add(
        self,
        embeddings: npt.ArrayLike,
        ids: Sequence[str] | Sequence[int] | npt.NDArray[Any],
        columns: Mapping[str, Sequence[Any] | npt.NDArray[Any]] | None = None,
        *,
        source: EmbeddingSource | None = None,
    ) -> None:
        """Append rows, all or none of them; they are on disk when this returns.

        If the gallery knows what made its embeddings, `source` has to be the same.

        Raises InvalidInput for an id that the gallery already has, embeddings that cannot be compared (naming the first
        ids), another source, or other columns than the gallery's; InvalidFile if stored rows that would be rewritten
        are damaged; CannotWrite if another process is writing, or the disk is full.
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
        """Remove the rows of these ids, and return how many there were. `compact` frees their space on disk."""
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
        """Rewrite the gallery without the removed rows, in few chunks and with short codes fitted to its rows.

        This needs disk space for a second gallery. Whoever has opened the gallery keeps reading the old files; the
        next change after they are closed deletes them.
        """
        with self.writer():
            with GalleryChange(self.path, self.manifest) as change:
                compact(change, self._snapshot)
            self._reopen()

    def set_thresholds(self, thresholds: Sequence[Threshold]) -> None:
        """Replace the thresholds. Raises InvalidInput for one of another model or precision."""
        with self.writer():
            for threshold in thresholds:
                threshold.check_fits(self.source, self.precision)
            with GalleryChange(self.path, self.manifest) as change:
                change.commit(thresholds=tuple(thresholds))
            self._reopen()

    @contextlib.contextmanager
    def writer(self) -> Iterator[None]:
        """Lock the gallery for several changes by this thread, and read its newest state; one change does so itself.

        Other threads that change it through this object wait. Raises CannotWrite if another process or object is
        writing.
        """
        with self._lock.hold(self.path) as first:
            if first:
                self._reopen()
            yield

    def _reopen(self) -> None:
        """Take the newest state, and remove what only the one before held."""
        self._use(GallerySnapshot.open(self.path))
        remove_leftovers(self.path, self.manifest)

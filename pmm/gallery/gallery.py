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

    What is read stays as it was when this object was made, or changed the gallery; `open` it again for what others
    wrote since. Threads may share it. Its files are mapped into memory: a process that reads one which something else
    makes shorter meanwhile is ended by the system (SIGBUS).

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
        """Hold the gallery for this thread, as it is now on the disk; without it each change does so for itself.

        Other threads wait if they use this object. Raises CannotWrite if another process or object writes.
        """
        with self._lock.hold(self.path) as first:
            if first:
                self._reopen()
            yield

    def _reopen(self) -> None:
        """Take the newest state, and remove what only the one before held."""
        self._use(GallerySnapshot.open(self.path))
        remove_leftovers(self.path, self.manifest)

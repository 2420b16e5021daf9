"""One state of a gallery on disk, whole for as long as it is held, whatever a writer does meanwhile."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.gallery.storage.chunks import DTYPES, GalleryChunk
from pmm.gallery.storage.columns import (
    DAMAGED,
    Array,
    ColumnValues,
    HeldFolder,
    Ids,
    NumberColumn,
    TextColumn,
    id_keys,
    map_array,
)
from pmm.gallery.storage.manifest import GalleryManifest, read_gallery_manifest
from pmm.utils.errors import InvalidFile, InvalidInput

Rows = npt.NDArray[np.int64]

READERS = ".readers-"
"""And a number: locked, shared, by whoever reads what belongs to this epoch."""
_ATTEMPTS = 20


def readers_file(path: Path, epoch: int) -> Path:
    """The file that readers of an epoch of the gallery at `path` lock."""
    return path / f"{READERS}{epoch:06d}"


class ReadersLock:
    """Keeps the files of an epoch from being removed, for as long as this object lives; where there is no such file, or
    a file system without locks, it does nothing."""

    def __init__(self, path: Path) -> None:
        import fcntl

        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class GallerySnapshot:
    """What the manifest of one generation says is there. Reads the removed rows; all else when it is used."""

    def __init__(self, folder: HeldFolder, manifest: GalleryManifest, lock: ReadersLock) -> None:
        """Raises InvalidFile for a file that is missing, or longer or shorter than it was written."""
        self.path, self.folder, self.manifest, self._lock = folder.path, folder, manifest, lock
        for place, files in manifest.folders().items():
            for name, stored in files.files.items():
                file = self.path / place / name
                try:
                    size = folder.size(f"{place}/{name}")
                except OSError as error:
                    if not isinstance(error, FileNotFoundError):
                        raise InvalidFile(f"it cannot be read ({error.strerror})", path=file) from error
                    expected = "a file of the gallery"
                    raise InvalidFile("it is missing", path=file, expected=expected, hint=DAMAGED) from None
                if size != stored.size:
                    raise InvalidFile(f"it has {size} bytes, not {stored.size}", path=file, hint=DAMAGED)
        self.chunks = [GalleryChunk(folder, manifest, chunk) for chunk in manifest.chunks]
        self.starts = np.cumsum([0, *map(len, self.chunks)])
        self.removed = self._removed()

    @classmethod
    def open(cls, path: Path) -> GallerySnapshot:
        """The newest state. Raises InvalidFile for a folder that is no gallery, or a damaged one."""
        for _ in range(_ATTEMPTS):  # a writer may replace and remove what was just read of
            manifest = read_gallery_manifest(path)
            lock = ReadersLock(readers_file(path, manifest.epoch))
            try:
                folder = HeldFolder(path)
                if (newest := read_gallery_manifest(path)).epoch == manifest.epoch:
                    return cls(folder, newest, lock)
            except OSError as error:
                raise InvalidFile(f"it cannot be read ({error.strerror})", path=path) from error
            except InvalidFile:
                if read_gallery_manifest(path).generation == manifest.generation:
                    raise
        raise InvalidFile("it is changed faster than it can be opened", path=path, hint="try again")

    @property
    def stored(self) -> int:
        """Rows on disk, removed ones too."""
        return int(self.starts[-1])

    def __len__(self) -> int:
        return self.stored - len(self.removed)

    @property
    def itemsize(self) -> int:
        """Bytes of a stored number of the embeddings."""
        return np.dtype(DTYPES[self.manifest.precision]).itemsize

    @cached_property
    def is_live(self) -> npt.NDArray[np.bool_]:
        """Which of all stored rows are not removed."""
        alive = np.ones(self.stored, np.bool_)
        alive[self.removed] = False
        return alive

    @cached_property
    def live(self) -> Rows:
        """The rows that are not removed [N], ascending."""
        return np.flatnonzero(self.is_live)

    def checked(self, rows: Any) -> Rows:
        """Numbers of rows that are stored, removed ones too; None stands for those that are not removed.

        Raises InvalidInput.
        """
        if rows is None:
            return self.live
        rows = np.asarray(rows)
        inside = (rows.dtype.kind in "iu" or not rows.size) and rows.ndim == 1
        if not inside or (len(rows) and not (rows.min() >= 0 and rows.max() < self.stored)):
            raise InvalidInput("rows that are not there", expected=f"whole numbers [n] from 0 to {self.stored - 1}")
        return rows.astype(np.int64, copy=False)

    def embeddings(self, rows: Rows) -> Array:
        """[n, D] of these rows, as stored."""
        out: Array = np.empty((len(rows), self.manifest.dim), DTYPES[self.manifest.precision])
        for chunk, places, within in self._by_chunk(rows):
            out[places] = chunk.embeddings[within]
        return out

    def take(self, name: str, rows: Rows) -> ColumnValues:
        """Ids (`id`) or values of a column, of these rows."""
        kind = self.manifest.ids if name == "id" else self.manifest.columns[name]
        out: Array = np.empty(len(rows), object if kind == "text" else kind)
        for chunk, places, within in self._by_chunk(rows):
            out[places] = chunk.column(name).take(within)
        return out

    def equal_to(self, name: str, values: Sequence[object]) -> npt.NDArray[np.bool_]:
        """Which of all stored rows hold one of `values` in a column."""
        parts = [chunk.column(name).equal_to(values) for chunk in self.chunks]
        return np.concatenate(parts) if parts else np.zeros(0, np.bool_)

    def numbers(self, name: str) -> Array:
        """A column of numbers, of all stored rows."""
        parts = [column.values for chunk in self.chunks if isinstance(column := chunk.column(name), NumberColumn)]
        return np.concatenate(parts) if parts else np.zeros(0, self.manifest.columns[name])

    def categories(self, name: str) -> tuple[npt.NDArray[np.int32], dict[object, int]]:
        """Of all stored rows a number that is the same where the column is; and value -> number."""
        numbers: dict[object, int] = {}
        out = np.empty(self.stored, np.int32)
        for chunk, start in zip(self.chunks, self.starts, strict=False):
            column = chunk.column(name)
            if isinstance(column, TextColumn) and column.codes is not None:
                values, inverse = column.dictionary(), column.checked_codes(slice(None)).astype(np.int64)
            else:
                values, inverse = np.unique(column.take(np.arange(len(chunk))), return_inverse=True)
            known = [numbers.setdefault(value, len(numbers)) for value in values.tolist()]
            out[start : start + len(chunk)] = np.array(known, np.int32)[inverse]
        return out, numbers

    def find(self, ids: Ids) -> Rows:
        """The row of each id [n]; -1 for one that is not there, or removed."""
        out = np.full(len(ids), -1, np.int64)
        keys = id_keys(ids)
        for chunk, start in zip(self.chunks, self.starts.tolist(), strict=False):
            places, within = chunk.candidates(keys)
            alive = self.is_live[within + start]
            places, within = places[alive], within[alive]
            same = chunk.column("id").take(within) == ids[places]
            out[places[same]] = within[same] + start
        return out

    def _by_chunk(self, rows: Rows) -> Iterator[tuple[GalleryChunk, Rows, Rows]]:
        """Each chunk that has some of the rows, their places among them, and their numbers in the chunk."""
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            yield self.chunks[number], places, rows[places] - self.starts[number]

    def _removed(self) -> Rows:
        stored = self.manifest.tombstones
        if stored is None:
            return np.empty(0, np.int64)
        path = self.path / "tombstones" / stored.name / "rows.npy"
        if "rows.npy" not in stored.files:
            raise InvalidFile("the manifest lists no rows.npy", path=path.parent)
        if stored.rows > self.stored:
            raise InvalidFile("damaged: it removes rows that are not there", path=path, hint=DAMAGED)
        rows = np.array(map_array(path, stored.files["rows.npy"], np.int64, (stored.rows,), self.folder))
        if len(rows) and not (rows[0] >= 0 and rows[-1] < self.stored and (np.diff(rows) > 0).all()):
            raise InvalidFile("damaged: it removes rows that are not there", path=path, hint=DAMAGED)
        return rows

"""Changes of a gallery: folders are written and on the disk before a new manifest names them; one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmm.gallery.storage.columns import Array, write_array
from pmm.gallery.storage.manifest import (
    FILE_NAME,
    FOLDER_KINDS,
    FOLDER_NAME,
    MANIFEST,
    GalleryManifest,
    StoredFolder,
    is_gallery,
    read_gallery_manifest,
)
from pmm.gallery.storage.snapshot import READERS, readers_file
from pmm.utils.errors import CannotWrite, InvalidFile
from pmm.utils.files import cannot_write, locked, sweep, sync_folder

LOCK = ".lock"


class GalleryChange:
    """One change of the gallery at `path`, whose manifest is `manifest`: whole or none. The lock is held."""

    def __init__(self, path: Path, manifest: GalleryManifest) -> None:
        self.path, self.manifest = path, manifest
        self._next = manifest.next_number

    def __enter__(self) -> GalleryChange:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            with contextlib.suppress(InvalidFile):  # a manifest that names what was written may have got to its place
                remove_leftovers(self.path, _on_disk(self.path) or self.manifest)
        if isinstance(error, OSError):
            raise cannot_write(self.path, error) from error

    @property
    def next_number(self) -> int:
        """Number of the folder that is written next."""
        return self._next

    def write(self, kind: str, arrays: Mapping[str, Array], rows: int) -> StoredFolder:
        """A new folder of `arrays` (file name -> array), on the disk."""
        folder = StoredFolder(name=f"{self._next:06d}", rows=rows, files={})
        self._next += 1
        place = self.path / kind / folder.name
        place.mkdir(parents=True)
        sync_folder(place.parent)
        return self.extend(kind, folder, arrays)

    def extend(self, kind: str, folder: StoredFolder, arrays: Mapping[str, Array]) -> StoredFolder:
        """A folder with more arrays."""
        place = self.path / kind / folder.name
        files = {file: write_array(place / file, array) for file, array in arrays.items()}
        sync_folder(place)
        return dataclasses.replace(folder, files={**folder.files, **files})

    def commit(self, **changes: Any) -> None:
        """From here on the gallery is `changes` of its manifest; `remove_leftovers` removes what is no longer named."""
        generation = self.manifest.generation + 1
        manifest = dataclasses.replace(self.manifest, **changes, generation=generation, next_number=self._next)
        readers_file(self.path, manifest.epoch).touch()
        manifest.write(self.path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the gallery at `path` for this process.

    Raises CannotWrite if another one writes, or the gallery holds symbolic links; InvalidFile if there is no gallery.
    """
    read_gallery_manifest(path)  # the lock would make the folder
    refuse_links(path)
    with locked(path / LOCK, wait=False, hint="wait until that has changed it"):
        manifest = read_gallery_manifest(path)
        with contextlib.suppress(OSError):  # a copy without hidden files has none that readers could lock
            readers_file(path, manifest.epoch).touch()
        remove_leftovers(path, manifest)
        yield


class WriterLock:
    """Which thread changes a gallery through one `Gallery`: others wait, and a forked child begins anew."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._lock, self._process, self._held = threading.RLock(), os.getpid(), False

    @contextlib.contextmanager
    def hold(self, path: Path) -> Iterator[bool]:
        """Hold the gallery at `path`; whether this thread did not do so before. Raises as `writing`."""
        if self._process != os.getpid():  # what a parent holds is not this process's
            self._begin()
        with self._lock:
            if self._held:
                yield False
                return
            with writing(path):
                self._held = True
                try:
                    yield True
                finally:
                    self._held = False


def refuse_links(path: Path) -> None:
    """Raise CannotWrite for a symbolic link in a gallery: what is written or removed through it would be elsewhere."""
    own = (MANIFEST, LOCK, *FOLDER_KINDS)
    for folder in (path, *(path / kind for kind in FOLDER_KINDS)):
        if folder.is_dir():
            for each in folder.iterdir():
                if each.is_symlink() and (folder != path or each.name in own or each.name.startswith(READERS)):
                    raise CannotWrite("it is a symbolic link", path=each, hint="put what it leads to in its place")


def remove_leftovers(path: Path, manifest: GalleryManifest) -> None:
    """Remove what the gallery does not name: what a killed writer left, and what no reader holds any more."""
    sweep(path, [MANIFEST])
    named, held = manifest.folders(), _remove_unheld(path, manifest.epoch)
    for kind in FOLDER_KINDS:
        for folder in _folders(path / kind):
            stored = named.get(f"{kind}/{folder.name}")
            if not held or (stored is None and int(folder.name) >= manifest.epoch):
                with contextlib.suppress(OSError):  # what stays is taken by the next writer
                    for file in folder.iterdir():
                        if FILE_NAME.fullmatch(file.name) and (stored is None or file.name not in stored.files):
                            file.unlink()
                    if stored is None:
                        folder.rmdir()  # unless someone has put something of theirs there


def _folders(place: Path) -> list[Path]:
    """What a gallery may have written in its folder `place`."""
    if not place.is_dir() or place.is_symlink():
        return []
    return [each for each in place.iterdir() if FOLDER_NAME.fullmatch(each.name) and not each.is_symlink()]


def _remove_unheld(path: Path, epoch: int) -> bool:
    """Remove locks of earlier epochs that no reader holds; whether one is held."""
    import fcntl

    held = False
    for lock in path.glob(READERS + "*"):
        if lock == readers_file(path, epoch) or lock.is_symlink():
            continue
        try:
            with lock.open("r+") as file:  # NFS gives a lock of one's own for nothing less
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.unlink()
        except OSError:
            held = True
    return held


def _on_disk(path: Path) -> GalleryManifest | None:
    return read_gallery_manifest(path) if is_gallery(path) else None

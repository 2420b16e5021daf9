"""Changes of a gallery: folders are written and on the disk before a new manifest names them; one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pmm.gallery.columns import Array, write_array
from pmm.gallery.manifest import MANIFEST, GalleryManifest, StoredFolder, is_gallery, read_gallery_manifest
from pmm.gallery.snapshot import READERS
from pmm.utils.errors import InvalidFile
from pmm.utils.files import cannot_write, locked, sweep, sync_folder

LOCK = ".lock"
KINDS = ("chunks", "codes", "tombstones")


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
        (self.path / READERS.format(manifest.epoch)).touch()
        manifest.write(self.path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Hold the gallery at `path` for this process. Raises CannotWrite if another one writes, InvalidFile if there is no
    gallery."""
    read_gallery_manifest(path)  # the lock would make the folder
    with locked(path / LOCK, wait=False):
        remove_leftovers(path, read_gallery_manifest(path))
        yield


def remove_leftovers(path: Path, manifest: GalleryManifest) -> None:
    """Remove what the gallery does not name: what a killed writer left, and what no reader holds any more."""
    sweep(path, [MANIFEST])
    named, held = manifest.folders(), _remove_unheld(path, manifest.epoch)
    with contextlib.suppress(OSError):  # what stays is taken by the next writer
        for kind in KINDS:
            for folder in (path / kind).iterdir() if (path / kind).is_dir() else ():
                stored = named.get(f"{kind}/{folder.name}")
                if stored is None:
                    if not held or not folder.name.isdigit() or int(folder.name) >= manifest.epoch:
                        shutil.rmtree(folder)
                elif not held:
                    for file in folder.iterdir():
                        if file.name not in stored.files:
                            file.unlink()


def _remove_unheld(path: Path, epoch: int) -> bool:
    """Remove locks of earlier epochs that no reader holds; whether one is held."""
    import fcntl

    held = False
    for lock in path.glob(READERS.format(0)[:-6] + "*"):
        if lock.name == READERS.format(epoch):
            continue
        try:
            with lock.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lock.unlink()
        except OSError:
            held = True
    return held


def _on_disk(path: Path) -> GalleryManifest | None:
    return read_gallery_manifest(path) if is_gallery(path) else None

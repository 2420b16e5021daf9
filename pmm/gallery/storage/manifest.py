"""What a gallery's folder holds, as its manifest.json says: the files that belong to it, and nothing else does."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pmm.gallery.storage.source import EmbeddingSource
from pmm.gallery.storage.thresholds import Threshold
from pmm.utils.errors import InvalidFile, InvalidValue, UserError, reason_of
from pmm.utils.files import write_file
from pmm.utils.from_dict import from_dict

FORMAT: Literal["pmm-gallery-1"] = "pmm-gallery-1"
MANIFEST = "manifest.json"
A_GALLERY = "a gallery written by pmm embed or pmm.Gallery.create"
COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
RESERVED = ("embeddings", "id")
"""Names that no column of the caller's has."""
MOST_ROWS = 1 << 48
MOST_DIMENSIONS = 1 << 16
MOST_FOLDERS = 10**9 - 1
_MOST_BYTES = 1 << 26
"""Of a manifest."""
FOLDER_KINDS = ("chunks", "codes", "tombstones")
FOLDER_NAME = re.compile(r"[0-9]{6,9}")
FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*\.npy")

ColumnKind = Literal["int64", "float64", "text"]
StoredPrecision = Literal["fp32", "fp16"]


def check_column_name(name: object) -> None:
    """Raise InvalidValue for a name that no column can have."""
    if not isinstance(name, str) or not COLUMN_NAME.fullmatch(name) or name in RESERVED:
        raise InvalidValue("columns", name, "names of small letters, digits and _, and neither id nor embeddings")


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class StoredFolder:
    """A folder of .npy files, which are of so many `rows` (of the gallery, or that went into them)."""

    name: str
    rows: int
    files: dict[str, StoredFile]

    def __post_init__(self) -> None:
        if not FOLDER_NAME.fullmatch(self.name):
            raise InvalidValue("name", self.name, "a number of six digits")
        if not 0 <= self.rows <= MOST_ROWS:
            raise InvalidValue("rows", self.rows, f"0 to {MOST_ROWS}")
        for name in self.files:
            if not FILE_NAME.fullmatch(name):
                raise InvalidValue("files", name, "names of .npy files")


@dataclass(frozen=True, kw_only=True)
class GalleryManifest:
    """All of a gallery but its arrays; each change writes a new one, of the next generation."""

    format: Literal["pmm-gallery-1"] = FORMAT
    generation: int = 1
    dim: int
    metric: Literal["euclidean", "cosine"]
    precision: StoredPrecision
    """Of the stored embeddings."""
    ids: Literal["int64", "text"]
    columns: dict[str, ColumnKind] = field(default_factory=dict)
    """Beside the ids, in the caller's order."""
    folder: str = ""
    """That paths are relative to."""
    source: EmbeddingSource | None = None
    chunks: tuple[StoredFolder, ...] = ()
    codes: StoredFolder | None = None
    """The short codes of all chunks; its `rows` are those that the rotation was fitted on."""
    fitted_on: str = ""
    """SHA-256 of the rows [n, D], as float32, that their rotation was fitted on."""
    tombstones: StoredFolder | None = None
    """The rows that were removed; `rows` says how many."""
    thresholds: tuple[Threshold, ...] = ()
    next_number: int = 1
    """Name of the next folder."""
    epoch: int = 1
    """Number of the first folder since rows or codes were last replaced: what is older goes when no one reads it."""

    def __post_init__(self) -> None:
        if not 1 <= self.dim <= MOST_DIMENSIONS:
            raise InvalidValue("dim", self.dim, f"1 to {MOST_DIMENSIONS}")
        for name in self.columns:
            check_column_name(name)
        if self.generation < 0:
            raise InvalidValue("generation", self.generation, "0 or more")
        if not 1 <= self.next_number <= MOST_FOLDERS:
            raise InvalidValue("next_number", self.next_number, f"1 to {MOST_FOLDERS}")
        if not 1 <= self.epoch <= self.next_number:
            raise InvalidValue("epoch", self.epoch, f"1 to next_number, {self.next_number}")
        names = [folder.name for folder in (*self.chunks, self.codes, self.tombstones) if folder]
        if len(set(names)) < len(names) or any(int(name) >= self.next_number for name in names):
            raise InvalidValue("chunks", names, f"names of their own, below next_number {self.next_number}")
        if self.chunks and self.codes is None:
            raise InvalidValue("codes", None, "short codes of every chunk")

    @property
    def stored_rows(self) -> int:
        """Rows on disk, removed ones too."""
        return sum(chunk.rows for chunk in self.chunks)

    def folders(self) -> dict[str, StoredFolder]:
        """Relative path -> folder of arrays, of all that belong to the gallery."""
        found = {f"chunks/{chunk.name}": chunk for chunk in self.chunks}
        for kind, one in (("codes", self.codes), ("tombstones", self.tombstones)):
            if one:
                found[f"{kind}/{one.name}"] = one
        return found

    def write(self, folder: Path) -> None:
        """Replace the manifest in `folder`: from here on the gallery is what this one says. Raises CannotWrite."""
        write_file(folder / MANIFEST, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def is_gallery(path: Path) -> bool:
    """Whether `path` is a folder with a gallery's manifest, of this format or another."""
    try:
        return b'"pmm-gallery-' in _content(path / MANIFEST, 200)
    except (OSError, ValueError):
        return False


def _content(path: Path, most: int) -> bytes:
    """The first bytes of a file. Raises OSError for pipes and devices, too; ValueError for what is no name."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        return file.read(min(most, facts.st_size))


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or reason_of(error)


def read_gallery_manifest(folder: Path) -> GalleryManifest:
    """The manifest in `folder`.

    Raises InvalidFile if there is none, if it is damaged, or of another format.
    """
    path = folder / MANIFEST
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise InvalidFile("it is no folder", path=folder, expected=A_GALLERY)
    except FileNotFoundError:
        raise InvalidFile("it does not exist", path=folder, expected=A_GALLERY) from None
    except (OSError, ValueError) as error:
        raise InvalidFile(f"it cannot be read ({_reason(error)})", path=folder, expected=A_GALLERY) from error
    try:
        content = _content(path, _MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MB")
        values = json.loads(content)
    except FileNotFoundError:
        raise InvalidFile(f"it holds no {MANIFEST}", path=folder, expected=A_GALLERY) from None
    except OSError as error:
        raise InvalidFile(f"it cannot be read ({_reason(error)})", path=path, expected=A_GALLERY) from error
    except (ValueError, RecursionError) as error:
        raise InvalidFile(f"damaged, or no gallery's ({reason_of(error)})", path=path, expected=A_GALLERY) from error
    form = values.get("format") if isinstance(values, dict) else None
    if form != FORMAT:
        hint = "update pmm, or embed the folder again" if str(form).startswith("pmm-gallery-") else ""
        raise InvalidFile(f"its format is {str(form)[:60]!r}", path=path, expected=f"{FORMAT!r}", hint=hint)
    try:
        return from_dict(GalleryManifest, values)
    except (ValueError, UserError, RecursionError) as error:
        raise InvalidFile(f"damaged ({reason_of(error)})", path=path, expected=A_GALLERY) from error

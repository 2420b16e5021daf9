"""The short codes of a gallery's rows as files: one rotation, and what it makes of each chunk."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from pmm.exact_search.codes import ERROR, ShortCodes, encode
from pmm.exact_search.rotation import Rotation
from pmm.gallery.storage.columns import DAMAGED, Array, map_array
from pmm.gallery.storage.manifest import GalleryManifest, StoredFile, StoredFolder
from pmm.gallery.storage.snapshot import GallerySnapshot
from pmm.gallery.storage.writer import GalleryChange
from pmm.utils.errors import InvalidFile, InvalidInput

ROTATION = "rotation.npy"
SAMPLE = 1 << 15
"""Rows at most that a rotation is fitted on."""
WRITE_ANEW = "pmm gallery compact writes all codes anew"
MAX_GROWTH = 4
"""The rotation is fitted anew when the gallery has so many times the rows that it was fitted for."""


def stride(count: int) -> int:
    """Each how manieth of so many rows a rotation is fitted on."""
    return -(-count // SAMPLE)


def rows_digest(rows: Array) -> str:
    """SHA-256 of rows [n, D] as float32: how a gallery says what its rotation was fitted on."""
    return hashlib.sha256(np.ascontiguousarray(rows, np.float32).data).hexdigest()


def is_outgrown(codes: StoredFolder | None, rows: int) -> bool:
    """Whether a gallery of so many rows needs another rotation than that of its `codes`."""
    return codes is None or rows >= MAX_GROWTH * max(1, codes.rows)


def write_codes(
    change: GalleryChange, rotation: Rotation, rows: int, chunks: Iterable[tuple[StoredFolder, Array]]
) -> StoredFolder:
    """A new folder with the codes of all `chunks` (with their embeddings) of a gallery of so many `rows`."""
    arrays = {ROTATION: np.concatenate([rotation.mean[None], rotation.basis.T])}
    codes = change.write("codes", arrays, rows)
    for chunk, embeddings in chunks:
        codes = append_codes(change, codes, rotation, chunk, embeddings)
    return codes


def append_codes(
    change: GalleryChange, codes: StoredFolder, rotation: Rotation, chunk: StoredFolder, embeddings: Array
) -> StoredFolder:
    """The folder with the codes of one more chunk."""
    short = encode(rotation, embeddings, change.manifest.metric)
    names = _names(chunk)
    return change.extend("codes", codes, {names[0]: short.codes, names[1]: short.terms})


def without_codes(codes: StoredFolder | None, chunks: Iterable[StoredFolder]) -> StoredFolder | None:
    """The folder without the codes of some chunks."""
    gone = {name for chunk in chunks for name in _names(chunk)}
    kept = {name: file for name, file in codes.files.items() if name not in gone} if codes else {}
    return codes and dataclasses.replace(codes, files=kept)


def read_rotation(snapshot: GallerySnapshot) -> Rotation:
    """What the codes were made with. Raises InvalidFile if it is no rotation."""
    folder = snapshot.path / "codes" / _codes(snapshot.manifest).name
    dim = snapshot.manifest.dim
    rows = map_array(folder / ROTATION, _file(snapshot, ROTATION), np.float64, (-1, dim), snapshot.folder)
    if len(rows) > dim + 1:
        raise InvalidFile(f"damaged: {len(rows) - 1} axes of {dim}", path=folder / ROTATION, hint=DAMAGED)
    try:
        return Rotation(np.array(rows[0]), np.ascontiguousarray(rows[1:].T))
    except (InvalidInput, IndexError) as error:
        raise InvalidFile(f"damaged ({error})", path=folder / ROTATION, hint=DAMAGED) from error


def read_codes(snapshot: GallerySnapshot, r: int) -> list[ShortCodes]:
    """The codes of each chunk, memory-mapped. Raises InvalidFile for terms by which a row could never be found."""
    folder, parts = snapshot.path / "codes" / _codes(snapshot.manifest).name, []
    for chunk in snapshot.manifest.chunks:
        codes, terms = _names(chunk)
        part = ShortCodes(
            map_array(folder / codes, _file(snapshot, codes), np.int8, (chunk.rows, r), snapshot.folder),
            map_array(folder / terms, _file(snapshot, terms), np.float32, (chunk.rows, 4), snapshot.folder),
        )
        good = (part.terms[:, ERROR] >= 0) & np.isfinite(part.terms[:, :ERROR]).all(1)
        if not good.all():
            problem = f"damaged: the code of row {int(good.argmin())} holds no numbers"
            raise InvalidFile(problem, path=folder / terms, hint=WRITE_ANEW)
        parts.append(part)
    return parts


def _names(chunk: StoredFolder) -> tuple[str, str]:
    return f"{chunk.name}.codes.npy", f"{chunk.name}.terms.npy"


def _codes(manifest: GalleryManifest) -> StoredFolder:
    assert manifest.codes is not None, "a gallery with rows has codes"
    return manifest.codes


def _file(snapshot: GallerySnapshot, name: str) -> StoredFile:
    codes = _codes(snapshot.manifest)
    if name not in codes.files:
        path = snapshot.path / "codes" / codes.name
        raise InvalidFile(
            f"the manifest lists no {name}", path=path, expected="short codes of every chunk", hint=DAMAGED
        )
    return codes.files[name]

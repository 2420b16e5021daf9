"""Whether a gallery's files are what was written, and fit each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pmm.exact_search.codes import ERROR, REST, SCALE, SQUARE, ShortCodes, chunks, distance_to, project
from pmm.exact_search.rotation import Rotation
from pmm.gallery.storage.chunks import GalleryChunk
from pmm.gallery.storage.columns import DAMAGED
from pmm.gallery.storage.manifest import StoredFolder, read_gallery_manifest
from pmm.gallery.storage.short_codes import WRITE_ANEW, read_codes, read_rotation, rows_digest, stride
from pmm.gallery.storage.snapshot import GallerySnapshot
from pmm.utils.errors import InvalidFile, InvalidInput
from pmm.utils.files import sha256


def problems_of(snapshot: GallerySnapshot) -> Iterator[InvalidFile]:
    """All that is wrong: files that have changed since they were written, then what does not fit together."""
    whole = True
    for place, folder in snapshot.manifest.folders().items():
        kind = place.split("/")[0]
        for name in folder.files:
            for problem in _caught(check_unchanged, snapshot, kind, folder, name):
                if not _is_replaced(snapshot, problem):
                    whole &= name != "embeddings.npy"
                    yield problem
    yield from _caught(_check_ids, snapshot)
    for chunk in snapshot.chunks:
        yield from _caught(_check_columns, chunk)
    if snapshot.chunks and whole:  # codes of damaged rows are not to be written anew
        yield from _caught(_check_codes, snapshot)
        yield from _caught(_check_fitted, snapshot)


def check_unchanged(snapshot: GallerySnapshot, kind: str, folder: StoredFolder, *names: str) -> None:
    """Raise InvalidFile unless the files of a folder, or some of them, are what was written."""
    for name in names or folder.files:
        file, stored = snapshot.path / kind / folder.name / name, folder.files.get(name)
        hint = WRITE_ANEW if kind == "codes" else DAMAGED
        try:
            if stored is not None and sha256(file) != stored.sha256:
                raise InvalidFile("it has changed since it was written", path=file, hint=hint)
        except OSError as error:
            raise InvalidFile(f"it cannot be read ({error.strerror})", path=file, hint=hint) from error


def fitted_on(snapshot: GallerySnapshot) -> str:
    """SHA-256 of the rows that the rotation was fitted on; empty if they are the gallery's own, `unknown` if it does
    not say."""
    manifest = snapshot.manifest
    if manifest.codes is None:
        return ""
    count = manifest.codes.rows
    own = np.arange(0, min(count, snapshot.stored), stride(count))
    return "" if manifest.fitted_on == rows_digest(snapshot.embeddings(own)) else manifest.fitted_on or "unknown"


def _caught(check: Callable[..., None], *what: object) -> Iterator[InvalidFile]:
    try:
        check(*what)
    except InvalidFile as error:
        yield error


def _check_ids(snapshot: GallerySnapshot) -> None:
    """Raise InvalidFile unless each id finds its own row."""
    for some in chunks(len(snapshot), 1 << 18):
        rows = snapshot.live[some]
        ids = snapshot.take("id", rows)
        found = snapshot.find(ids)  # type: ignore[arg-type]
        if (found != rows).any():
            row = int((found != rows).argmax())
            problem = f"id {ids[row]} is of row {rows[row]}, and found in row {found[row]}"
            raise InvalidFile(problem, path=snapshot.path, expected="each id once", hint=DAMAGED)


def _check_columns(chunk: GalleryChunk) -> None:
    """Raise InvalidFile for texts outside their file, keys of other ids, and embeddings that cannot be compared."""
    for name in ("id", *chunk.manifest.columns):
        for some in chunks(len(chunk), 1 << 18):
            chunk.column(name).take(np.arange(len(chunk))[some])
    check_embeddings(chunk)


def check_embeddings(chunk: GalleryChunk) -> None:
    """Raise InvalidFile for embeddings that cannot be compared."""
    cosine = chunk.manifest.metric == "cosine"
    for some in chunks(len(chunk)):
        rows = chunk.embeddings[some]
        bad = ~np.isfinite(rows).all(1) | (~rows.any(1) if cosine else False)
        if bad.any():
            problem = f"row {some.start + int(bad.argmax())} holds NaN or Inf{', or is all zero' if cosine else ''}"
            raise InvalidFile(problem, path=chunk.path / "embeddings.npy", hint=DAMAGED)


def _check_codes(snapshot: GallerySnapshot) -> None:
    """Raise InvalidFile for short codes that are further from their row than they say: searches could miss it."""
    rotation = read_rotation(snapshot)
    for chunk, codes in zip(snapshot.chunks, read_codes(snapshot, rotation.r), strict=True):
        for some in chunks(len(chunk)):
            try:
                bad = ~_bounded(rotation, chunk.embeddings[some], codes, some, snapshot.manifest.metric)
            except InvalidInput:  # NaN, which has been told
                return
            if bad.any():
                problem = f"the short code of row {some.start + int(bad.argmax())} is not that of its embedding"
                raise InvalidFile(problem, path=chunk.path, hint=WRITE_ANEW)


def _check_fitted(snapshot: GallerySnapshot) -> None:
    """Raise InvalidFile for a rotation that was fitted on rows of something else, such as queries."""
    if other := fitted_on(snapshot):
        rows = "rows that it does not name" if other == "unknown" else f"other rows than its own (SHA-256 {other[:12]})"
        problem = f"its rotation was fitted on {rows}"
        raise InvalidFile(problem, path=snapshot.path, hint="pmm gallery compact fits it anew")


def _is_replaced(snapshot: GallerySnapshot, problem: InvalidFile) -> bool:
    """Whether a list of removed rows is gone because a later change wrote another one."""
    folder = snapshot.path / "tombstones"
    if problem.path is None or problem.path.parent.parent != folder or problem.path.exists():
        return False
    return read_gallery_manifest(snapshot.path).generation != snapshot.manifest.generation


def _bounded(rotation: Rotation, rows: Any, codes: ShortCodes, some: slice, metric: str) -> Any:
    projection, terms = project(rotation, rows, metric), codes.terms[some].astype(np.float64)
    decoded = codes.codes[some] * terms[:, SCALE, None]
    with np.errstate(invalid="ignore"):
        least = distance_to(projection, decoded, terms[:, REST]) * (1 - 2.0**-19) - projection.error
    square = np.einsum("nr,nr->n", decoded, decoded) + terms[:, REST] ** 2
    rounding = 1.01 * 2.0**-24 * square + 2.0**-125
    signs = (terms[:, SCALE] >= 0) & (terms[:, REST] >= 0)
    return signs & (least <= terms[:, ERROR]) & (np.abs(terms[:, SQUARE] - square) <= rounding)

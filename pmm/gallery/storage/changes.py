"""What appending and compacting write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np

from pmm.exact_search.plan import best_rotation
from pmm.gallery.storage.columns import Array, Ids
from pmm.gallery.storage.manifest import StoredFolder
from pmm.gallery.storage.rows import GalleryRows
from pmm.gallery.storage.short_codes import (
    ROTATION,
    append_codes,
    is_outgrown,
    read_rotation,
    rows_digest,
    stride,
    without_codes,
    write_codes,
)
from pmm.gallery.storage.snapshot import GallerySnapshot, Rows
from pmm.gallery.storage.verification import check_embeddings, check_unchanged
from pmm.gallery.storage.writer import GalleryChange
from pmm.utils.errors import InvalidInput

CHUNK_BYTES = 1 << 27
"""Of the embeddings of a compacted chunk."""
FOLD = 16
"""So many chunks of about one size become one: each keeps a file open and has its share in every search."""


def append(change: GalleryChange, rows: GalleryRows, before: GallerySnapshot | None) -> None:
    """One more chunk with its short codes, folded with those before it if there are many.

    The codes of all rows are made anew if these need another rotation.
    """
    if not len(rows):
        change.commit()
        return
    manifest, first, epoch = change.manifest, change.next_number, change.manifest.epoch
    count, kept, codes = manifest.stored_rows + len(rows), manifest.chunks, manifest.codes
    if before is not None and (folded := _chunks_to_fold(before, len(rows))):
        kept = kept[: -len(folded)]
        for chunk in folded:
            check_unchanged(before, "chunks", chunk)
        rows = _joined(before, np.arange(sum(chunk.rows for chunk in kept), manifest.stored_rows), rows)
        codes, epoch = without_codes(codes, folded), first
    chunks = (*kept, change.write("chunks", rows.arrays(), len(rows)))
    if before is not None and codes and not is_outgrown(codes, count):
        check_unchanged(before, "codes", codes, ROTATION)
        codes = append_codes(change, codes, read_rotation(before), chunks[-1], rows.embeddings)
        change.commit(chunks=chunks, codes=codes, epoch=epoch)
        return
    parts = [rows.embeddings]
    if before is not None:
        for stored in kept:
            check_unchanged(before, "chunks", stored, "embeddings.npy")
        parts = [*(chunk.embeddings for chunk in before.chunks[: len(kept)]), rows.embeddings]
    with _naming_bad_rows(before):
        sample = _sample(parts, stride(count))
        rotation = best_rotation(sample, manifest.metric, count)
        codes = write_codes(change, rotation, count, zip(chunks, parts, strict=True))
    change.commit(chunks=chunks, codes=codes, epoch=first, fitted_on=rows_digest(sample))


def compact(change: GalleryChange, before: GallerySnapshot) -> None:
    """All rows but the removed ones, in chunks that are as large as they fit in memory twice, and their short codes.

    Raises InvalidFile for files that have changed: written anew they would look whole.
    """
    manifest, first, live = change.manifest, change.next_number, before.live
    for kind, folder in (*(("chunks", chunk) for chunk in manifest.chunks), ("tombstones", manifest.tombstones)):
        if folder:
            check_unchanged(before, kind, folder)
    if not len(live):
        change.commit(chunks=(), codes=None, fitted_on="", tombstones=None, epoch=first)
        return
    chunks, sample = [], before.embeddings(live[:: stride(len(live))])
    with _naming_bad_rows(before):
        rotation = best_rotation(sample, manifest.metric, len(live))
        codes = write_codes(change, rotation, len(live), ())
        for start in range(0, len(live), _full_chunk(before)):
            rows = _rows(before, live[start : start + _full_chunk(before)])
            chunks.append(change.write("chunks", rows.arrays(), len(rows)))
            codes = append_codes(change, codes, rotation, chunks[-1], rows.embeddings)
    change.commit(chunks=tuple(chunks), codes=codes, fitted_on=rows_digest(sample), tombstones=None, epoch=first)


def _chunks_to_fold(before: GallerySnapshot, added: int) -> tuple[StoredFolder, ...]:
    """The last chunks, if with one of so many `added` rows they are `FOLD` that are below some power of `FOLD` rows, or
    fill a chunk; none of them more than half.

    So each row is written again once for each such power, few chunks remain, and none grows beyond one and a half.
    """
    chunks, full, least = before.manifest.chunks, _full_chunk(before), 1
    while least < full // 2:
        least = min(least * FOLD, full // 2)
        first = len(chunks)
        while first and chunks[first - 1].rows < least:
            first -= 1
        count = added + sum(chunk.rows for chunk in chunks[first:])
        if added < least and first < len(chunks) and (len(chunks) - first + 1 >= FOLD or count >= full):
            return chunks[first:]
    return ()


def _sample(parts: Iterable[Array], step: int) -> Array:
    """Each so manieth of the rows that follow each other in `parts`."""
    found, start = [], 0
    for part in parts:
        found.append(part[-start % step :: step])
        start += len(part)
    return np.concatenate(found)


@contextlib.contextmanager
def _naming_bad_rows(before: GallerySnapshot | None) -> Iterator[None]:
    """Raise InvalidFile for a stored row that has no code."""
    try:
        yield
    except (InvalidInput, np.linalg.LinAlgError):
        for chunk in before.chunks if before is not None else ():
            check_embeddings(chunk)
        raise


def _full_chunk(before: GallerySnapshot) -> int:
    """Rows."""
    return max(1, CHUNK_BYTES // (before.itemsize * before.manifest.dim))


def _rows(before: GallerySnapshot, rows: Rows) -> GalleryRows:
    columns = {name: before.take(name, rows) for name in before.manifest.columns}
    ids: Ids = before.take("id", rows)  # type: ignore[assignment]
    return GalleryRows(embeddings=before.embeddings(rows), ids=ids, columns=columns)


def _joined(before: GallerySnapshot, rows: Rows, more: GalleryRows) -> GalleryRows:
    """Rows that are stored, removed ones too, and after them new ones."""
    old = _rows(before, rows)
    return GalleryRows(
        embeddings=np.concatenate([old.embeddings, more.embeddings]),
        ids=np.concatenate([old.ids, more.ids]),
        columns={name: np.concatenate([values, more.columns[name]]) for name, values in old.columns.items()},
    )

"""What appending and compacting write."""

from __future__ import annotations

import numpy as np

from pmm.exact_search.plan import best_rotation
from pmm.gallery.rows import GalleryRows
from pmm.gallery.short_codes import append_codes, is_outgrown, read_rotation, stride, write_codes
from pmm.gallery.snapshot import GallerySnapshot
from pmm.gallery.writer import GalleryChange

CHUNK_BYTES = 1 << 27
"""Of the embeddings of a compacted chunk."""


def append(change: GalleryChange, rows: GalleryRows, before: GallerySnapshot | None) -> None:
    """One more chunk with its short codes; with those of all rows if these need another rotation."""
    if not len(rows):
        change.commit()
        return
    manifest, first = change.manifest, change.next_number
    chunks = (*manifest.chunks, change.write("chunks", rows.arrays(), len(rows)))
    count = manifest.stored_rows + len(rows)
    if before is not None and manifest.codes and not is_outgrown(manifest.codes, count):
        codes = append_codes(change, manifest.codes, read_rotation(before), chunks[-1], rows.embeddings)
        change.commit(chunks=chunks, codes=codes)
        return
    parts = [*(chunk.embeddings for chunk in ([] if before is None else before.chunks)), rows.embeddings]
    rotation = best_rotation(np.concatenate([part[:: stride(count)] for part in parts]), manifest.metric, count)
    codes = write_codes(change, rotation, count, zip(chunks, parts, strict=True))
    change.commit(chunks=chunks, codes=codes, epoch=first)


def compact(change: GalleryChange, before: GallerySnapshot) -> None:
    """All rows but the removed ones, in chunks that are as large as they fit in memory twice, and their short codes."""
    manifest, first, live = change.manifest, change.next_number, before.live
    if not len(live):
        change.commit(chunks=(), codes=None, tombstones=None, epoch=first)
        return
    rotation = best_rotation(before.embeddings(live[:: stride(len(live))]), manifest.metric, len(live))
    codes = write_codes(change, rotation, len(live), ())
    chunks = []
    step = max(1, CHUNK_BYTES // (before.itemsize * manifest.dim))
    for start in range(0, len(live), step):
        some = live[start : start + step]
        ids = before.take("id", some)
        columns = {name: before.take(name, some) for name in manifest.columns}
        rows = GalleryRows(embeddings=before.embeddings(some), ids=ids, columns=columns)  # type: ignore[arg-type]
        chunks.append(change.write("chunks", rows.arrays(), len(rows)))
        codes = append_codes(change, codes, rotation, chunks[-1], rows.embeddings)
    change.commit(chunks=tuple(chunks), codes=codes, tombstones=None, epoch=first)

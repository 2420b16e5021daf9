"""The rows of a gallery, some at once, for what takes them to another engine. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.evaluation.embedding_matrix import comparable_rows
from pmm.gallery.gallery import Gallery
from pmm.gallery.storage.columns import ColumnValues
from pmm.utils.errors import InvalidFile, InvalidInput

BATCH_BYTES = 8 << 20


class RowBatch(NamedTuple):
    """Rows that are not removed, in order."""

    start: int
    """Number of the first, counted without removed ones."""
    embeddings: npt.NDArray[np.float32]
    """[n, D]; at norm 1 where the gallery compares by cosine and that was asked for."""
    columns: dict[str, ColumnValues]
    """`id` and the others, [n] each."""


def row_batches(gallery: Gallery, *, unit: bool = False) -> Iterator[RowBatch]:
    """All rows, batch by batch; with `unit`, those of a cosine gallery at norm 1.

    Raises InvalidFile for a gallery without rows, at once.
    """
    if not len(gallery):
        raise InvalidFile("it is empty", path=gallery.path, expected="a gallery with crops")
    return _batches(gallery, unit)


def longest_text(gallery: Gallery, column: str) -> int:
    """Bytes of the longest text of a column, in UTF-8. Raises InvalidInput for one that has none, as names of files
    may be, its `index` the place among the rows."""
    longest = 0
    for place, text in enumerate(gallery.column(column).tolist()):
        try:
            longest = max(longest, len(text.encode()))
        except UnicodeEncodeError as error:
            problem = f"{column} of row {place} is {text!r}, which is no UTF-8"
            hint = "rename that file and embed it again, or export to faiss, whose table keeps the bytes"
            raise InvalidInput(problem, path=gallery.path, index=place, hint=hint) from error
    return longest


def _batches(gallery: Gallery, unit: bool) -> Iterator[RowBatch]:
    from tqdm import tqdm

    rows = gallery.rows
    step = max(1, BATCH_BYTES // (4 * gallery.dim))
    for start in tqdm(range(0, len(rows), step), desc="export", unit="batch", leave=False, disable=None):
        some = rows[start : start + step]
        embeddings = gallery.embeddings(some)
        if unit and gallery.metric == "cosine":
            embeddings = comparable_rows(embeddings, "cosine").astype(np.float32)
        yield RowBatch(start, embeddings, {name: gallery.column(name, some) for name in ("id", *gallery.columns)})

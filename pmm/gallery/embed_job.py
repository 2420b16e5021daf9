"""Embeds crops in chunks, which are written one by one, so that a killed run can continue. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.data.bad_images import refuse_bad_images
from pmm.embedding.embed import iter_embeddings
from pmm.gallery.crop_metadata import Column
from pmm.runtime.base import Embeddings, Runner
from pmm.utils.errors import InvalidFile

CHUNK_CROPS = 4096
CHUNK_SECONDS = 30.0
"""Embeddings are written after so many crops or so many seconds, whichever comes first."""
FILE_COLUMNS = ("file_size", "file_modified_ns")
"""Columns that tell a later run whether a file has changed."""


@dataclass(frozen=True, kw_only=True)
class CropTable:
    """Crops to embed: their ids, files and columns [N]."""

    ids: Sequence[str] | npt.NDArray[np.int64]
    files: Sequence[Path]
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: npt.NDArray[np.int64]) -> CropTable:
        """These rows of it."""
        chosen = rows.tolist()
        return CropTable(
            ids=self.ids[rows] if isinstance(self.ids, np.ndarray) else [self.ids[row] for row in chosen],
            files=[self.files[row] for row in chosen],
            columns={name: values[rows] for name, values in self.columns.items()},
        )


@dataclass
class EmbedReport:
    """What a run did, in crops."""

    added: int = 0
    """Embedded and written, including changed ones."""
    changed: int = 0
    """How many of the added ones replaced an embedding of an older version of the file."""
    known: int = 0
    """Skipped: the gallery already has them as they are on disk."""
    moved: int = 0
    """How many of the known ones have moved; their new paths were recorded."""
    gone: int = 0
    """In the gallery, but no longer readable in the folder."""
    pruned: int = 0
    """Removed from the gallery, as they are no longer readable in the folder."""
    lost_thresholds: int = 0
    """Thresholds of the upgraded gallery that do not hold for the new embeddings."""
    bad: dict[Path, str] = field(default_factory=dict)
    """Left out: file -> why it cannot be read."""
    seconds: float = 0.0
    """Time for embedding and writing."""


class EmbeddedCrops(NamedTuple):
    """The next crops of a table, and their embeddings [n, D]."""

    crops: CropTable
    embeddings: Embeddings


def file_columns(files: Sequence[Path]) -> dict[str, Column]:
    """Size in bytes and time of the last change of each file."""
    facts = np.array([(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files)], np.int64)
    return dict(zip(FILE_COLUMNS, facts.reshape(-1, 2).T, strict=True))


def embedded_chunks(
    runner: Runner,
    crops: CropTable,
    bad: dict[Path, str],
    *,
    folder: Path,
    skip_bad_images: bool = False,
    batch_size: int = 64,
    label: str = "",
) -> Iterator[EmbeddedCrops]:
    """Embeddings of all crops, in chunks to be written one by one; with a `label`, a progress bar.

    With `skip_bad_images`, files that cannot be read are left out and put into `bad` with the reason; without it,
    raises InvalidFile naming all of them.
    """
    unreadable: dict[int, InvalidFile] = {}
    rows: list[int] = []
    parts: list[Embeddings] = []
    first, since = 0, time.monotonic()
    for batch in iter_embeddings(runner, crops.files, batch_size=batch_size, label=label, unreadable=unreadable):
        numbers = range(first, first + len(batch))
        good = [row for row in numbers if row not in unreadable]
        if len(good) < len(batch):
            bad |= {crops.files[row]: unreadable[row].problem for row in numbers if row in unreadable}
            if not skip_bad_images:
                known = {crops.files[row]: error.problem for row, error in sorted(dict(unreadable).items())}
                refuse_bad_images(known, folder, unseen=crops.files[numbers.stop :])
            batch = batch[[row - first for row in good]]
        rows += good
        parts.append(batch)
        first = numbers.stop
        if len(rows) >= CHUNK_CROPS or (rows and time.monotonic() - since >= CHUNK_SECONDS):
            yield EmbeddedCrops(crops.take(np.array(rows)), np.concatenate(parts))
            rows, parts, since = [], [], time.monotonic()
    if rows:
        yield EmbeddedCrops(crops.take(np.array(rows)), np.concatenate(parts))

"""Crops into a gallery on disk, in chunks: a run that was killed goes on where it was. Loads no torch."""

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
"""What is embedded is written after so many crops or so long, whichever comes first."""
FILE_COLUMNS = ("file_size", "file_modified_ns")
"""By which a later run knows whether a file has changed."""


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
    """Embedded and written, changed ones too."""
    changed: int = 0
    """Of those, how many had been embedded before, with another content."""
    known: int = 0
    """Passed over: they are in the gallery as they are on disk."""
    moved: int = 0
    """Of those, how many are at another place than before, which was recorded."""
    gone: int = 0
    """In the gallery, but no longer readable in the folder."""
    pruned: int = 0
    """Of such, removed."""
    lost_thresholds: int = 0
    """Of the gallery that was upgraded, those that do not hold for the new embeddings."""
    bad: dict[Path, str] = field(default_factory=dict)
    """Left out: file -> why it cannot be read."""
    seconds: float = 0.0
    """Embedding and writing."""


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
    """Embeddings of all crops, in chunks that are to be written one by one; with a `label`, a progress bar.

    Files that cannot be read are put into `bad`, with the reason, and left out; without `skip_bad_images` InvalidFile
    is raised instead, naming all of them.
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

"""Which crops of a folder a gallery already has: unchanged, changed, moved, or gone from the folder."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.gallery.embed_job import CHUNK_CROPS, FILE_COLUMNS, CropTable
from pmm.gallery.gallery import Gallery
from pmm.utils.errors import InvalidInput

Rows = npt.NDArray[np.int64]


class KnownCrops(NamedTuple):
    """What a gallery has of the crops of a table."""

    todo: Rows
    """Rows of the table that are not in the gallery, or have changed since."""
    changed: set[str]
    """Ids of those that have changed."""
    moved: Rows
    """Rows of the table that are in the gallery unchanged, under a path where they no longer are."""


def known_crops(gallery: Gallery, table: CropTable) -> KnownCrops:
    """Compare a table with the gallery. Raises InvalidInput for an id that another crop has."""
    rows = gallery.find(table.ids)
    known = np.flatnonzero(rows >= 0)
    changed, moved = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    if len(known):
        for name in set(FILE_COLUMNS) & set(gallery.columns):
            changed[known] |= gallery.column(name, rows[known]) != table.columns[name][known]
        if "path" in gallery.columns:
            moved[known] = gallery.column("path", rows[known]) != table.columns["path"][known]
            _refuse_others(gallery, table, rows, np.flatnonzero(moved))
    return KnownCrops(
        todo=np.flatnonzero((rows < 0) | changed),
        changed={str(table.ids[row]) for row in np.flatnonzero(changed).tolist()},
        moved=np.flatnonzero(moved & ~changed),
    )


def _refuse_others(gallery: Gallery, table: CropTable, rows: Rows, elsewhere: Rows) -> None:
    """Raises InvalidInput if an id belongs to a file that still exists elsewhere; otherwise the file was moved here."""
    home = Path(gallery.folder)
    for row, path in zip(elsewhere.tolist(), gallery.column("path", rows[elsewhere]).tolist(), strict=True):
        if (home / path).exists():
            raise InvalidInput(
                f"{table.ids[row]} is the id of {home / path} in it already", index=row, path=gallery.path,
                hint="give --prefix NAME/ to tell the crops of several folders apart",
            )  # fmt: skip


def home_moved(gallery: Gallery, ids: Sequence[str], within: Sequence[str]) -> bool:
    """Whether the gallery's own folder is gone, and the crops of these ids are in it `within` this one."""
    if not gallery.folder or Path(gallery.folder).exists() or "path" not in gallery.columns:
        return False
    rows = gallery.find(ids)
    known = rows >= 0
    same = gallery.column("path", rows[known]) == np.array(within, object)[known]
    return bool(len(same) and same.all())


def record_places(gallery: Gallery, crops: CropTable) -> None:
    """Store the new paths of crops that were moved; their embeddings stay."""
    for start in range(0, len(crops), CHUNK_CROPS):
        some = crops.take(np.arange(start, min(start + CHUNK_CROPS, len(crops))))
        rows = gallery.find(some.ids)
        embeddings, columns = gallery.embeddings(rows), {name: gallery.column(name, rows) for name in gallery.columns}
        gallery.remove(some.ids)
        gallery.add(embeddings, some.ids, {**columns, "path": some.columns["path"]}, source=gallery.source)


def gone_crops(gallery: Gallery, folder: Path, here: Set[str], prefix: str) -> list[str]:
    """Ids of crops that were embedded from `folder` with this `prefix`, and are not among the readable ones `here`."""
    if "path" not in gallery.columns:
        return []
    place, home = f"{folder.resolve()}/", gallery.folder
    pairs = zip(gallery.column("id").tolist(), gallery.column("path").tolist(), strict=True)
    return [  # a gallery is larger than what is added: texts, as paths take ten times as long
        id_ for id_, path in pairs
        if id_ not in here and id_.startswith(prefix) and os.path.join(home, path) == place + id_[len(prefix) :]
    ]  # fmt: skip

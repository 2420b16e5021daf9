"""The rows of one append: columns of one length in a folder, mapped when they are first used."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.gallery.storage.columns import DAMAGED, Array, HeldFolder, NumberColumn, TextColumn, map_array
from pmm.gallery.storage.manifest import ColumnKind, GalleryManifest, StoredFolder
from pmm.utils.errors import InvalidFile

DTYPES: dict[str, npt.DTypeLike] = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64, "float64": np.float64}


_MAX_HEADER = 1 << 12
"""Bytes of a .npy file before its numbers."""


class GalleryChunk:
    """Rows that were written together; `manifest` is the gallery's, `stored` this chunk's part of it."""

    def __init__(self, gallery: HeldFolder, manifest: GalleryManifest, stored: StoredFolder) -> None:
        """Raises InvalidFile if the embeddings' file cannot hold the rows."""
        self.path, self.manifest, self.stored = gallery.path / "chunks" / stored.name, manifest, stored
        self._gallery = gallery
        self._columns: dict[str, NumberColumn | TextColumn] = {}
        size = stored.files["embeddings.npy"].size if "embeddings.npy" in stored.files else 0
        numbers = len(self) * manifest.dim * np.dtype(DTYPES[manifest.precision]).itemsize
        if not numbers <= size <= numbers + _MAX_HEADER:
            raise InvalidFile(
                f"damaged: {size} bytes are not {len(self)} rows of {manifest.dim} numbers in {manifest.precision}",
                path=self.path / "embeddings.npy", hint=DAMAGED,
            )  # fmt: skip

    def __len__(self) -> int:
        return self.stored.rows

    @cached_property
    def embeddings(self) -> Array:
        """As stored [n, D], float32 or float16."""
        return self._map("embeddings.npy", DTYPES[self.manifest.precision], len(self), self.manifest.dim)

    def column(self, name: str) -> NumberColumn | TextColumn:
        """The ids (`id`), or the column of this name."""
        if name not in self._columns:
            self._columns[name] = self._read(name, self.manifest.ids if name == "id" else self.manifest.columns[name])
        return self._columns[name]

    def candidates(self, keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Pairs of a place in `keys` and a row [p] that has this key."""
        stored, order = self._keys
        first, last = np.searchsorted(stored, keys, "left"), np.searchsorted(stored, keys, "right")
        counts = last - first
        places = np.repeat(np.arange(len(keys)), counts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = order[np.repeat(first, counts) + within].astype(np.int64)
        if len(rows) and rows.max() >= len(self):
            raise InvalidFile("damaged: an id of a row that is not there", path=self.path)
        return places, rows

    @cached_property
    def _keys(self) -> tuple[Array, Array]:
        return self._map("id.keys.npy", np.uint64, len(self)), self._map("id.order.npy", np.uint32, len(self))

    def _read(self, name: str, kind: ColumnKind) -> NumberColumn | TextColumn:
        if kind != "text":
            return NumberColumn(self._map(f"{name}.npy", DTYPES[kind], len(self)))
        repeated = f"{name}.codes.npy" in self.stored.files
        offsets = self._map(f"{name}.offsets.npy", np.int64, -1 if repeated else len(self) + 1)
        if len(offsets) > len(self) + 1:
            raise InvalidFile(f"damaged: more texts in {name} than rows", path=self.path, hint=DAMAGED)
        return TextColumn(
            offsets=offsets,
            content=self._map(f"{name}.bytes.npy", np.uint8, -1),
            codes=self._map(f"{name}.codes.npy", np.int32, len(self)) if repeated else None,
            path=self.path,
        )

    def _map(self, name: str, dtype: npt.DTypeLike, *shape: int) -> Any:
        if name not in self.stored.files:
            raise InvalidFile(f"the manifest lists no {name}", path=self.path, expected="every column in every chunk")
        return map_array(self.path / name, self.stored.files[name], dtype, shape, self._gallery)

"""The indexes that the chain judges, each behind one contract: our certified search, faiss and usearch.

Rows are counted from 0 in the order in which they were given; distances are Euclidean.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from pmm.bench.chain.outcomes import Listing
from pmm.gallery.gallery import Gallery
from pmm.gallery.matches import Matches
from pmm.utils.arrays import Ints, Singles
from pmm.utils.extras import import_library

Quantizer = Literal["none", "scalar", "coarse"]
"""coarse: some rows come back far from where they were, as from a product quantizer or a projection."""
INNER_PRODUCT = 0
"""faiss.METRIC_INNER_PRODUCT; its results are Euclidean distances where all vectors are at norm 1."""
RESCORED = 1000
"""Rows per query that are measured again in fp32 after a product quantizer."""


class SearchIndex(Protocol):
    """What the chain asks of an index."""

    exact: bool
    """Promises the rows and the distances of brute force, ties by row."""
    exact_distances: bool
    """Promises that the distance of a row that it lists is that of the vectors as they were given."""
    quantizer: Quantizer
    settings: str
    knob: str
    """What to raise where it misses rows; empty where nothing helps."""
    resident_bytes: int
    """In memory while it answers, without what is memory-mapped."""
    disk_bytes: int
    fitted_on: str
    """SHA-256 of the rows that its rotation or quantizer was fitted on (`rows_digest`); empty if those are its own, or
    there is none; "unknown" if it does not say."""

    @property
    def search_elsewhere(self) -> Callable[[Singles, int, Ints], Listing] | None:
        """As `search`, without rows of the cameras [Q] that go with the queries; None if it cannot filter."""

    def __len__(self) -> int:
        """Rows that it has."""

    def search(self, queries: Singles, k: int) -> Listing:
        """The k nearest rows of queries [Q, D]."""

    def stored(self, rows: Ints) -> Singles | None:
        """Vectors [n, D] as it keeps them; None if it does not give them back."""


class CertifiedIndex:
    """`pmm.Gallery`, whose rows are its ids."""

    exact = exact_distances = True
    quantizer: Quantizer = "none"
    knob = ""

    def __init__(self, gallery: Gallery) -> None:
        """`gallery` has the row numbers as ids."""
        self.gallery, self.fitted_on = gallery, gallery.fitted_on
        self.settings = f"{gallery.precision} on disk, memory-mapped"
        files = [path for path in Path(gallery.path).rglob("*") if path.is_file()]
        self.disk_bytes = sum(path.stat().st_size for path in files)
        self.resident_bytes = gallery.resident_bytes

    def __len__(self) -> int:
        return len(self.gallery)

    def search(self, queries: Singles, k: int) -> Listing:
        """As `SearchIndex.search`."""
        return self._listing(self.gallery.search(queries, k), k)

    def search_elsewhere(self, queries: Singles, k: int, camids: Ints) -> Listing:
        """As `SearchIndex.search_elsewhere`."""
        return self._listing(self.gallery.search(queries, k, not_camera=camids), k)

    def _listing(self, matches: Matches, k: int) -> Listing:
        ids, distances = matches
        rows, values = np.full((len(ids), k), -1), np.full((len(ids), k), np.inf)
        rows[:, : ids.shape[1]], values[:, : ids.shape[1]] = ids, distances
        if self.gallery.metric == "cosine":  # 1 - cos is half the square at norm 1
            values = np.sqrt(2 * values.clip(min=0))
        return Listing(rows, values)

    def stored(self, rows: Ints) -> Singles | None:
        """As `SearchIndex.stored`."""
        return self.gallery.embeddings(rows)


class FaissIndex:
    """An index of faiss."""

    exact = False
    search_elsewhere = None

    def __init__(
        self,
        index: Any,
        *,
        settings: str = "",
        knob: str = "",
        quantizer: Quantizer = "none",
        parameters: Mapping[str, int] | None = None,
        rescored_from: Singles | None = None,
        disk_bytes: int | None = None,
        fitted_on: str = "",
    ) -> None:
        """
        Args:
            parameters: of the index, set before each search, so that several can share one.
            rescored_from: the vectors that listed rows are measured by again, if any; they stay memory-mapped.
            disk_bytes: of the file; None: it is written to find out.
        """
        self.index, self.settings, self.knob, self.quantizer = index, settings, knob, quantizer
        self.fitted_on = fitted_on
        self._parameters, self._base = dict(parameters or {}), rescored_from
        self.exact_distances = quantizer == "none" or rescored_from is not None
        self.disk_bytes = self.resident_bytes = file_bytes(index) if disk_bytes is None else disk_bytes
        if rescored_from is not None:
            self.disk_bytes += rescored_from.nbytes

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def search(self, queries: Singles, k: int) -> Listing:
        """As `SearchIndex.search`."""
        for name, value in self._parameters.items():
            target = self.index.hnsw if name == "efSearch" else self.index
            setattr(target, name, value)
        queries = np.ascontiguousarray(queries, np.float32)
        if self._base is None:
            values, rows = self.index.search(queries, k)
            squares = 2 - 2 * values if self.index.metric_type == INNER_PRODUCT else values
            return Listing(rows.astype(np.int64), _roots(squares, rows))
        _, rows = self.index.search(queries, min(len(self), max(k, RESCORED)))
        return _rescored(queries, rows.astype(np.int64), self._base, k)

    def stored(self, rows: Ints) -> Singles | None:
        """As `SearchIndex.stored`."""
        if hasattr(self.index, "make_direct_map"):
            self.index.make_direct_map()
        if hasattr(self.index, "reconstruct_batch"):
            found: Singles = self.index.reconstruct_batch(rows)
        else:
            found = np.stack([self.index.reconstruct(int(row)) for row in rows])
        return found


class UsearchIndex:
    """A graph of usearch."""

    exact, exact_distances = False, True
    quantizer: Quantizer = "none"
    fitted_on = ""
    search_elsewhere = None

    def __init__(self, index: Any, ef: int) -> None:
        self.index, self.settings, self.knob = index, f"M 16, ef {ef}, fp32", f"expansion_search (now {ef})"
        self.disk_bytes = self.resident_bytes = int(index.serialized_length)

    def __len__(self) -> int:
        return len(self.index)

    def search(self, queries: Singles, k: int) -> Listing:
        """As `SearchIndex.search`."""
        found = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        rows, squares = np.atleast_2d(found.keys).astype(np.int64), np.atleast_2d(found.distances)
        counts = np.resize(np.asarray(getattr(found, "counts", rows.shape[1])), len(rows))
        rows = np.where(np.arange(rows.shape[1]) < counts[:, None], rows, -1)
        missing = ((0, 0), (0, k - rows.shape[1]))
        rows, squares = np.pad(rows, missing, constant_values=-1), np.pad(squares, missing)
        return Listing(rows, _roots(squares, rows))

    def stored(self, rows: Ints) -> Singles | None:
        """As `SearchIndex.stored`."""
        kept: Singles = np.asarray(self.index.get(rows), np.float32)
        return kept


def file_bytes(index: Any) -> int:
    """Size of the file of a faiss index: about what it takes in memory, too."""
    faiss = import_library("faiss")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        faiss.write_index(index, str(path))
        return path.stat().st_size


def _roots(squares: Singles, rows: Ints) -> npt.NDArray[np.float64]:
    """Below 0 as far as squares are, which only wrong ones are by more than rounding: `examine` sees that."""
    return np.where(rows >= 0, np.sign(squares) * np.sqrt(np.abs(squares, dtype=np.float64)), np.inf)


def _rescored(queries: Singles, rows: Ints, base: Singles, k: int) -> Listing:
    """The k nearest of the listed rows, by their differences in float64; ties by row."""
    listed, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)
    for place, (query, found) in enumerate(zip(queries, rows, strict=True)):
        found = np.sort(found[found >= 0])
        gaps = base[found].astype(np.float64) - query
        values = np.sqrt(np.einsum("nd,nd->n", gaps, gaps))
        order = np.argsort(values, kind="stable")[:k]
        listed[place, : len(order)], distances[place, : len(order)] = found[order], values[order]
    return Listing(listed, distances)

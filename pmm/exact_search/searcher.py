"""The nearest rows of a gallery, exactly, from short codes in memory and the embeddings where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.evaluation.embedding_matrix import METRICS, comparable_rows
from pmm.exact_search.codes import ShortCodes, chunks, project
from pmm.exact_search.kernel import CompiledScan
from pmm.exact_search.pair_distances import EmbeddingParts, PairDistances
from pmm.exact_search.query_search import QUERIES_AT_ONCE, Allowed, QuerySearch, RowMatches
from pmm.exact_search.rotation import Rotation
from pmm.exact_search.row_scan import RowScan
from pmm.exact_search.scan import CodeScan, NumpyScan, affordable_coordinates
from pmm.utils.arrays import Floats, Ints
from pmm.utils.errors import InvalidInput, InvalidValue
from pmm.utils.hardware import usable_cores
from pmm.utils.search_library import library

KERNELS = ("compiled", "numpy")
"""What scans short codes, the fastest first."""
MASKED = 1 / 8
"""Of the rows: larger subsets are picked from the candidates, for the codes of smaller ones are gathered."""


class ExactSearcher:
    """Exact search among the embeddings of `parts`, float32 or float16 arrays [n, D], one after another.

    They may be memory-mapped: only rows that may be among the nearest are read. The distance of a pair is that of
    `pmm.evaluation.distances.EmbeddingDistances.exact_pairs`, a function of the pair alone.
    """

    def __init__(
        self,
        parts: Sequence[Floats],
        metric: str,
        rotation: Rotation,
        codes: Sequence[ShortCodes],
        *,
        threads: int = 0,
        kernel: str | None = None,
    ) -> None:
        """Args:
            codes: what `encode` makes of the same rows with `rotation`, in one or several pieces.
            threads: 0 for each core of the quota.
            kernel: what scans the codes; None for the fastest of this machine.

        Raises InvalidInput if codes and embeddings are not of as many rows; InvalidValue for an unknown metric or
        kernel, BackendUnavailable for "compiled" where it is not.
        """
        if kernel is not None and kernel not in KERNELS:
            raise InvalidValue("kernel", kernel, choices=KERNELS)
        if metric not in METRICS:
            raise InvalidValue("metric", metric, choices=METRICS)
        if not codes or sum(map(len, codes)) != sum(map(len, parts)):
            raise InvalidInput(f"codes of {sum(map(len, codes))} rows, embeddings of {sum(map(len, parts))}")
        if any(some.r != rotation.r for some in codes):
            raise InvalidInput(f"codes of {codes[0].r} dimensions, a rotation of {rotation.r}")
        self.metric, self._rotation = metric, rotation
        self._embeddings = EmbeddingParts(parts, metric)
        self._threads = threads or usable_cores()
        kernel = kernel or ("compiled" if library() else "numpy")
        self._scan: CodeScan
        most = affordable_coordinates(rotation.dim)
        if kernel == "compiled":
            self._scan = CompiledScan(codes, self._threads)
        elif most < rotation.r == rotation.dim:  # fewer coordinates would leave nearly all rows open
            self._scan = RowScan(self._embeddings, rotation, self._threads)
        else:
            self._scan = NumpyScan.of(codes, self._threads, most)
        self._subset: _Subset | None = None

    def __len__(self) -> int:
        return len(self._embeddings)

    @property
    def resident_bytes(self) -> int:
        """Memory that the search takes beside the embeddings."""
        return self._scan.resident_bytes

    def nearest(
        self, queries: Floats, k: int, *, rows: Ints | None = None, allowed: Allowed | None = None
    ) -> RowMatches:
        """The k nearest rows of each query [Q, D], of all or of a sorted subset `rows`; all if there are fewer.

        Raises InvalidValue for k < 1; InvalidInput for queries of another dimension, NaN or Inf in them, or all zero
        where the metric is cosine, with the `index` of the first; for `rows` that are not there, and a row that is
        damaged.
        """
        if k < 1:
            raise InvalidValue("k", k, "at least 1")
        search = self._search(queries, rows, allowed)
        k = min(k, search.count)
        result = RowMatches(np.full((len(queries), k), -1), np.full((len(queries), k), np.inf))
        for some in chunks(len(queries), QUERIES_AT_ONCE) if k else ():
            result.rows[some], result.distances[some] = search.nearest(some, k)
        return result

    def within(
        self, queries: Floats, distance: float, *, rows: Ints | None = None, allowed: Allowed | None = None
    ) -> list[RowMatches]:
        """For each query [Q, D] the rows [1, n] at most so far, as `RowMatches` has distances.

        Raises as `nearest`; InvalidValue for a distance that is negative or NaN.
        """
        if not distance >= 0:
            raise InvalidValue("distance", distance, "0 or more")
        search = self._search(queries, rows, allowed)
        return [each for some in chunks(len(queries), QUERIES_AT_ONCE) for each in search.within(some, distance)]

    def _search(self, queries: Floats, rows: Ints | None, allowed: Allowed | None) -> QuerySearch:
        projection = project(self._rotation, queries, self.metric)
        wide = comparable_rows(queries, self.metric)
        if wide.size and np.abs(wide).max() > np.finfo(np.float32).max:
            raise InvalidInput("query embeddings are too large", expected="numbers in the range of float32")
        pairs = PairDistances(self._embeddings, wide, self._threads)
        if rows is None:
            return QuerySearch(pairs, projection, self._scan, len(self), allowed=allowed)
        subset = self._subset  # of another thread, perhaps, a moment later
        if subset is None or not np.array_equal(subset.rows, rows):
            subset = self._subset = _Subset.of(rows, self._scan)
        return QuerySearch(
            pairs, projection, subset.scan, len(rows), numbers=subset.numbers, mask=subset.mask, allowed=allowed
        )


class _Subset(NamedTuple):
    """Rows of a gallery, and how they are searched."""

    rows: Ints
    scan: CodeScan
    numbers: Ints | None
    """The gallery's rows, where those of `scan` are others."""
    mask: npt.NDArray[np.bool_] | None
    """Which rows of `scan` count, if not all."""

    @classmethod
    def of(cls, rows: Ints, scan: CodeScan) -> _Subset:
        rows = np.array(rows, np.int64)  # the caller may write into its own
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(scan):
            raise InvalidInput(f"rows {rows.min()} to {rows.max()} of {len(scan)}", expected="rows of the gallery")
        if len(rows) < MASKED * len(scan):
            return cls(rows, scan.take(rows), rows, None)
        mask = np.zeros(len(scan), bool)
        mask[rows] = True
        return cls(rows, scan, None, mask)

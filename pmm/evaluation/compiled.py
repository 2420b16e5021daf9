"""What is compiled of ranking (cpp_ext/search/rank.h): distances of all pairs and of some, and counts of them. Without
it, and on processors that it is not written for, numpy does the same. Loads no torch."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.evaluation.windows import DistanceWindows
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.search_library import address, library, paths

DIMS_AT_ONCE = 64
"""In one sum of the products (cpp_ext/search/search.h)."""
Addresses = npt.NDArray[np.uintp]


class _HalfDistances(ctypes.Structure):
    """`HalfDistances` of cpp_ext/search/search.h."""

    _fields_ = (
        ("query", ctypes.c_void_p), ("item", ctypes.c_void_p), ("query_half", ctypes.c_void_p),
        ("item_half", ctypes.c_void_p), ("centre", ctypes.c_void_p), ("queries", ctypes.c_int64),
        ("items", ctypes.c_int64), ("dims", ctypes.c_int64), ("out", ctypes.c_void_p), ("stride", ctypes.c_int64),
    )  # fmt: skip


class _Windows(ctypes.Structure):
    """`Windows` of cpp_ext/search/search.h."""

    _fields_ = (
        ("distances", ctypes.c_void_p), ("stride", ctypes.c_int64), ("queries", ctypes.c_int64),
        ("items", ctypes.c_int64), ("bounds", ctypes.c_void_p), ("low", ctypes.c_void_p), ("high", ctypes.c_void_p),
        ("before", ctypes.c_void_p), ("upto", ctypes.c_void_p),
    )  # fmt: skip


class RankKernel:
    """The compiled functions on one instruction set. It is a `WindowCounts` of float32."""

    def __init__(self, path: int) -> None:
        """`path`: place among `paths()`, of one that ranks."""
        self._library: Any = library()
        self._path = ctypes.c_int32(path)
        self.outruns_blas = str(paths()[path]).startswith("AVX-512")
        """Whether `half_distances` takes less time than numpy's product; with AVX2 it takes a little more."""

    def half_distances(
        self,
        queries: Singles,
        query_halves: Singles,
        items: Singles,
        item_halves: Singles,
        centre: Singles,
        out: Singles,
    ) -> None:
        """Half the squared distances from queries [q, D] to items [n, D] less the `centre` [D], by their products and
        the halves of their squared norms [q] and [n], into `out` [q, n], perhaps columns of a larger array.

        Each product is the sum of sums of `DIMS_AT_ONCE` terms. All others but `out` are contiguous.
        """
        arguments = _HalfDistances(
            *(array.ctypes.data for array in (queries, items, query_halves, item_halves, centre)),
            *(len(queries), len(items), queries.shape[1], out.ctypes.data, out.strides[0] // out.itemsize),
        )
        if self._library.pmm_search_half_distances(self._path, ctypes.byref(arguments)) < 0:
            raise MemoryError("no memory for a block of distances")

    def half_squares(self, queries: Addresses, items: Addresses, dim: int) -> Doubles:
        """Half the squared distances of pairs of float32 rows [P], which lie at these addresses, in float64: each
        depends on its pair alone."""
        out = np.empty(len(items))
        size = ctypes.c_int64(len(items)), ctypes.c_int64(dim)
        self._library.pmm_search_half_squares(self._path, address(queries), address(items), *size, address(out))
        return out

    def count(self, distances: Floats, windows: DistanceWindows) -> tuple[Ints, Ints]:
        """As `WindowCounts.count`."""
        before, upto = np.empty(len(windows.low), np.int64), np.empty(len(windows.low), np.int64)
        arguments = self._windows(distances, windows, before, upto)
        self._library.pmm_search_count(self._path, ctypes.byref(arguments))
        return before, upto

    def within(self, distances: Floats, windows: DistanceWindows, count: int) -> Ints:
        """As `WindowCounts.within`."""
        out = np.empty(count, np.int64)
        arguments = self._windows(distances, windows)
        found = self._library.pmm_search_within(
            self._path, ctypes.byref(arguments), address(out), ctypes.c_int64(count)
        )
        assert found == count, f"{found} distances in windows of {count}"
        return out

    def _windows(self, distances: Floats, windows: DistanceWindows, *out: Ints) -> _Windows:
        arrays: list[npt.NDArray[Any]] = [windows.bounds, windows.low, windows.high, *out]
        stride = distances.strides[0] // distances.itemsize
        return _Windows(distances.ctypes.data, stride, *distances.shape, *(array.ctypes.data for array in arrays))


def rank_kernels() -> list[RankKernel]:
    """One for each instruction set of this processor that they are written for, the best first."""
    compiled: Any = library()
    return [RankKernel(path) for path, name in enumerate(paths()) if name and compiled.pmm_search_ranks(path)]


@cache
def rank_kernel() -> RankKernel | None:
    """The best one; None where there is none."""
    return next(iter(rank_kernels()), None)

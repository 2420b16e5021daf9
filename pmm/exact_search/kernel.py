"""The compiled scan of short codes (cpp_ext/search/): a `CodeScan` as `NumpyScan` is, and faster. Loads no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.exact_search.codes import LARGEST, Bytes, Projection, Rounded, ShortCodes, rounded_up
from pmm.exact_search.scan import Candidates
from pmm.utils.arrays import Doubles, Ints, Singles
from pmm.utils.build_info import rebuild
from pmm.utils.errors import BackendUnavailable
from pmm.utils.search_library import address, library, paths
from pmm.utils.threads import in_threads

ROWS, GROUP, TERMS, LINE = 16, 4, 4, 64
"""Of a block: rows; dimensions in a group; terms; bytes of a group and of a term (cpp_ext/search/search.h)."""
TILE = 512
"""Rows at most between two looks at the room that is left."""
QUERY_LEVELS = 127 << 7
"""Largest code of a query: 14 bits and a sign, as a second plane costs little and leaves only the rows' error."""
UNDERFLOW = 2.0**-120
"""More than what the scan may lose below float32's range: nine numbers, of up to 2^-126 where such are taken for 0."""
ROOM = 4096
"""Candidates of a query that a thread has room for at first; for more it goes on where it stopped."""
MAX_ROOM = 1 << 20
"""Candidates of all queries."""
MOST_KEPT = 1 << 14
"""Rows of the sample that is kept."""
GRAIN = 1 << 15
"""Rows worth a thread."""

Codes16 = npt.NDArray[np.int16]


class _Scan(ctypes.Structure):
    """`Scan` of cpp_ext/search/search.h."""

    _fields_ = (
        ("blocks", ctypes.c_void_p), ("groups", ctypes.c_int64), ("first", ctypes.c_int64), ("last", ctypes.c_int64),
        ("queries", ctypes.c_void_p), ("terms", ctypes.c_void_p), ("count", ctypes.c_int64), ("rows", ctypes.c_void_p),
        ("reaches", ctypes.c_void_p), ("counts", ctypes.c_void_p), ("capacity", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )  # fmt: skip


class CompiledScan:
    """Short codes, in blocks of 16 rows, and the scan of them on one instruction set."""

    def __init__(self, codes: Sequence[ShortCodes], threads: int = 1, path: int | None = None) -> None:
        """
        Args:
            codes: of one or several parts, one after another.
            path: place among `paths()`; default: the best that this processor has.

        Raises BackendUnavailable if there is no `library()`.
        """
        kernel = library()
        if kernel is None:
            raise BackendUnavailable(
                "the kernel of the search is not compiled", hint=f"{rebuild()}, or search by numpy"
            )
        self._kernel, self._threads = kernel, threads
        self._path = next(place for place, name in enumerate(paths()) if name) if path is None else path
        self._count, self._r = sum(map(len, codes)), codes[0].r
        self._sample: tuple[range, CompiledScan] | None = None
        self._blocks = self._empty_blocks()
        start = 0
        for part in codes:
            values = np.ascontiguousarray(part.codes.reshape(len(part), self._r), np.int8)
            terms = np.ascontiguousarray(part.terms.reshape(len(part), TERMS), np.float32)
            fixed = address(values), address(terms), ctypes.c_int64(self._r), ctypes.c_int64(start)
            self._fill(kernel.pmm_search_pack, fixed, len(part))
            start += len(part)

    def __len__(self) -> int:
        return self._count

    @property
    def resident_bytes(self) -> int:
        """Memory of the blocks, and of the sample that is kept."""
        return self._blocks.nbytes + (self._sample[1].resident_bytes if self._sample else 0)

    def take(self, rows: Ints) -> CompiledScan:
        """The same of some rows [n], which are numbered from 0 anew. Raises IndexError for a row that is not there."""
        rows = np.ascontiguousarray(rows, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        scan = object.__new__(CompiledScan)
        scan._kernel, scan._threads, scan._path = self._kernel, self._threads, self._path
        scan._count, scan._r, scan._sample = len(rows), self._r, None
        scan._blocks = scan._empty_blocks()
        fixed = address(self._blocks), ctypes.c_int64(self._groups), address(rows)
        scan._fill(self._kernel.pmm_search_take, fixed, len(rows))
        return scan

    def candidates(self, queries: Projection, limits: Doubles, rows: slice) -> Candidates:
        """As `CodeScan.candidates`; ordered by query, then row."""
        coded = _Queries(queries, self._r)
        terms = coded.terms(limits)
        parts = self._map(lambda some: self._found(coded, terms, some), rows)
        found = [columns for part in parts for columns in part]
        query, row, reaches = (np.concatenate(column) for column in zip(*found, strict=True))
        if len(found) > 1:
            order = np.argsort(query, kind="stable")
            query, row, reaches = query[order], row[order], reaches[order]
        return Candidates(query, row, coded.bounds(reaches, query))

    def bounds(self, queries: Projection, rows: slice) -> Doubles:
        """As `CodeScan.bounds`."""
        places = range(*rows.indices(len(self)))
        some, part = (self, rows) if places.step == 1 else (self._strided(places), slice(0, len(places)))
        coded = _Queries(queries, self._r)
        terms = coded.terms(np.full(len(queries), np.inf))
        _, reaches, _, _ = some._scan(coded, terms, part, max(TILE, len(places) + 2 * ROWS))
        return coded.bounds(reaches[:, : len(places)], np.arange(len(queries))[:, None])

    def _strided(self, places: range) -> CompiledScan:
        """These rows, which lie all over memory; few are kept, for each search asks for the same at first."""
        sample = self._sample
        if sample is None or sample[0] != places:
            sample = places, self.take(np.arange(places.start, places.stop, places.step))
            if len(places) <= MOST_KEPT:
                self._sample = sample
        return sample[1]

    @property
    def _groups(self) -> int:
        return -(-self._r // GROUP)

    def _empty_blocks(self) -> Bytes:
        """Of all rows, 0, at the start of a line."""
        size = -(-self._count // ROWS) * LINE * (self._groups + TERMS)
        room = np.zeros(size + LINE, np.int8)
        start = -room.ctypes.data % LINE
        return room[start : start + size]

    def _fill(self, function: Any, fixed: tuple[Any, ...], count: int) -> None:
        """Let the kernel's `function` write so many rows."""
        self._map(
            lambda rows: function(*fixed, *map(ctypes.c_int64, (rows.start, rows.stop)), address(self._blocks)),
            slice(0, count),
        )

    def _map(self, work: Callable[[slice], Any], places: slice) -> list[Any]:
        """`work` on parts of a range, one for each thread where that pays."""
        size = places.stop - places.start
        parts = max(1, min(self._threads, size // GRAIN))
        step = -(-max(1, size) // parts)
        cut = [slice(start, min(start + step, places.stop)) for start in range(places.start, places.stop, step)]
        return in_threads(work, cut or [places])

    def _found(self, coded: _Queries, terms: Singles, rows: slice) -> list[tuple[Ints, Ints, Singles]]:
        """Queries, rows and reaches of the candidates, as often as there was room for."""
        room = max(TILE, min(ROOM, MAX_ROOM // max(1, len(terms))))
        parts, first = [], rows.start
        while True:
            row, reaches, counts, reached = self._scan(coded, terms, slice(first, rows.stop), room)
            filled = np.arange(room) < counts[:, None]
            parts.append((np.repeat(np.arange(len(counts)), counts), row[filled], reaches[filled]))
            if reached >= rows.stop:
                return parts
            first, room = reached, min(2 * room, max(TILE, MAX_ROOM // max(1, len(terms))))

    def _scan(self, coded: _Queries, terms: Singles, rows: slice, room: int) -> tuple[Ints, Singles, Ints, int]:
        """Rows and reaches [Q, room], how many of a query are filled [Q], and up to which row all was scanned."""
        count = len(terms)
        out = np.empty((count, room), np.int64), np.empty((count, room), np.float32), np.zeros(count, np.int64)
        scan = _Scan(
            *(
                self._blocks.ctypes.data,
                self._groups,
                rows.start,
                rows.stop,
                coded.codes.ctypes.data,
                terms.ctypes.data,
            ),
            *(count, *(array.ctypes.data for array in out), room, room),
        )
        reached = self._kernel.pmm_search_scan(self._path, ctypes.byref(scan))
        if reached < 0:
            raise MemoryError("no memory for the codes of the queries")
        return *out, reached


class _Queries:
    """Queries as the kernel takes them: codes of 15 bits, fewer where a sum of many would not fit int32."""

    def __init__(self, queries: Projection, r: int) -> None:
        levels = min(QUERY_LEVELS, (2**31 - 1) // (128 * r))  # a damaged file may hold -128
        some = Rounded.of(queries, levels)
        self.codes: Codes16 = np.zeros((len(queries), -(-r // GROUP) * GROUP), np.int16)
        self.codes[:, :r] = some.codes
        self.error = some.error
        # where that is rounded off again, kShrink (cpp_ext/search/scan.h) has more room to spare
        self._terms = np.stack([some.square - UNDERFLOW, 2 * some.scale, 2 * some.rest], axis=1)

    def terms(self, limits: Doubles) -> Singles:
        """[Q, 4], with what reaches the queries' limits."""
        reach = limits + self.error
        reach[~(reach < LARGEST)] = np.inf  # all rows
        return np.concatenate([self._terms.astype(np.float32), rounded_up(reach)[:, None]], axis=1)

    def bounds(self, reaches: Singles, queries: Ints) -> Doubles:
        """Lower bounds of the distances of pairs that such a reach is the least for."""
        return reaches.astype(np.float64) - self.error[queries]

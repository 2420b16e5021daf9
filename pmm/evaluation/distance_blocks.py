"""Distances in blocks: at rising precision, and as large as a memory limit allows. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pmm.evaluation.embedding_matrix import MAX_ROWS
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.errors import OutOfMemory

MEMORY_LIMIT = 2 << 30
"""Bytes that an evaluation may use by default, besides the embeddings."""
MAX_QUERIES = 1024
"""Queries in a block, at most: a larger one is no faster."""


@runtime_checkable
class Distances(Protocol):
    """Distances [Q, G], perhaps times a common factor, computed in blocks."""

    shape: tuple[int, int]
    dim: int
    """Of the embeddings."""
    resident_bytes: int
    """Memory in use all the time, besides the embeddings."""
    coarsest: int
    """The first of `by_precision`'s levels that is of use: the next is as fast as those below."""

    def approximate(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        """Distances of the queries `rows` [q, G], and a bound on the error of each query's [q].

        A constant may be missing from all distances of a query, so they compare with each other only. They may lie in
        `out` [q, G], and the caller may overwrite them.
        """

    def refined(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        """As `approximate`, but closer and with the constant. Slower: for blocks that `approximate` leaves too open."""

    def float64(self, rows: slice) -> tuple[Doubles, Doubles]:
        """As `refined`, in float64. Slower still: for blocks that `refined` leaves too open."""

    def close_pairs(self, queries: Ints, items: Ints) -> tuple[Doubles, Doubles]:
        """As `exact_pairs`, with a bound on each error [P]: faster, or exact. The bound grows with the distance."""

    def exact_pairs(self, queries: Ints, items: Ints) -> Doubles:
        """Distances of pairs of a query and a gallery item [P]; each depends on its pair alone."""


def by_precision(
    distances: Distances, rows: slice, out: Singles, level: int = 0
) -> Iterator[tuple[int, Floats, Doubles]]:
    """The block of the queries `rows` at rising precision, from `level` on, and which it is: 0 approximate, 1 refined,
    2 float64."""
    level = max(level, distances.coarsest)
    if level < 1:
        yield 0, *distances.approximate(rows, out)
    if level < 2:
        yield 1, *distances.refined(rows, out)
    yield 2, *distances.float64(rows)


@dataclass(frozen=True)
class Blocks:
    """How much of the distances is in memory at once."""

    queries: int
    """Queries in a block."""
    scratch: int
    """Bytes for embeddings in float64."""

    @classmethod
    def within(
        cls, limit: int, shape: tuple[int, int], dim: int, threads: int, *, pairs: int = 0, reserved_bytes: int = 0
    ) -> Blocks:
        """Blocks of distances of `shape` [Q, G] that use at most `limit` bytes.

        Args:
            pairs: the most gallery items that share a query's pid.
            reserved_bytes: bytes of the limit that something else uses.

        Raises OutOfMemory if the rest is too little for one query; the least that works is `expected`.
        """
        queries, gallery = shape
        fixed = reserved_bytes + 64 * (queries + gallery) + 160 * gallery * threads
        # float32, float64, whether it is near; the query twice; and the embeddings chunk by chunk
        row = (13 * gallery + 100 * pairs + 8 * dim) * threads + 32 * min(gallery, MAX_ROWS)
        least_scratch = 32 * 64 * max(1, dim)
        least = fixed + row + least_scratch
        if limit < least:
            raise OutOfMemory(
                f"a memory limit of {limit / 1e6:g}MB is too small for {queries:,} queries against {gallery:,} "
                f"gallery crops of {dim} dimensions",
                expected=f"at least {megabytes(least)}",
            )
        scratch = min(1 << 26, max(least_scratch, (limit - fixed) // 4))
        most = max(1, (limit - fixed - scratch) // row)
        return cls(queries=int(min(MAX_QUERIES, max(1, queries), most)), scratch=scratch)

    def cut(self, queries: int, threads: int = 1, *, first: int = 0) -> Iterator[slice]:
        """Blocks of the queries from `first` on, of about equal size and equally many for each of `threads`."""
        parts = -(-(queries - first) // (self.queries * threads)) * threads
        step = max(1, -(-(queries - first) // max(1, parts)))
        for start in range(first, queries, step):
            yield slice(start, min(start + step, queries))


def megabytes(size: int) -> str:
    """`37MB`, rounded up, as --memory-limit takes it."""
    return f"{-(-size // 10**6)}MB"

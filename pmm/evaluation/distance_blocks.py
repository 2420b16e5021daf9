"""What ranks and lists need of distances: how they are computed, more closely each time, and how many at once. Loads no
torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pmm.evaluation.distances import MAX_ROWS, Doubles, Floats, Ints, Singles
from pmm.utils.errors import OutOfMemory

MEMORY_LIMIT = 2 << 30
"""Bytes beyond the embeddings that an evaluation takes by default."""
MAX_QUERIES = 1024
"""In a block: a larger one is no faster."""


@runtime_checkable
class Distances(Protocol):
    """Distances [Q, G], perhaps times a common factor, computed in blocks."""

    shape: tuple[int, int]
    dim: int
    """Of the embeddings."""
    resident_bytes: int
    """Memory that stays taken beyond the embeddings."""

    def approximate(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        """Distances of the queries `rows` [q, G], less perhaps a constant for each query, so to be compared with each
        other only; and by how much each query's are wrong at most [q].

        They may be in `out` [q, G], and the caller may write into them.
        """

    def refined(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        """As `approximate`, closer, without such a constant: slower, for what `approximate` leaves open too often."""

    def float64(self, rows: slice) -> tuple[Doubles, Doubles]:
        """As `refined`, in float64: slower still, for what `refined` leaves open too often."""

    def close_pairs(self, queries: Ints, items: Ints) -> tuple[Doubles, Doubles]:
        """As `exact_pairs`, and by how much each is wrong at most [P]: quicker, or exact. The bound grows with the
        distance."""

    def exact_pairs(self, queries: Ints, items: Ints) -> Doubles:
        """Of pairs [P] of a query and a gallery item: each a function of its pair alone."""


def by_precision(distances: Distances, rows: slice, out: Singles, level: int = 0) -> Iterator[tuple[Floats, Doubles]]:
    """The block of the queries `rows`, closer each time, from `level` on: 0 approximate, 1 refined, 2 float64."""
    if level < 1:
        yield distances.approximate(rows, out)
    if level < 2:
        yield distances.refined(rows, out)
    yield distances.float64(rows)


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
        """Blocks of distances of `shape` [Q, G] that keep to `limit` bytes.

        Args:
            pairs: gallery items of a query's pid, at most.
            reserved_bytes: of the limit, what something else takes.

        Raises OutOfMemory if the rest is too little for one query; the least that works is `expected`.
        """
        queries, gallery = shape
        fixed = reserved_bytes + 64 * (queries + gallery) + 160 * gallery * threads
        # float32, float64, whether it is near, and the embeddings chunk by chunk
        row = (13 * gallery + 100 * pairs) * threads + 32 * min(gallery, MAX_ROWS)
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
        """Blocks of the queries from `first` on, all about as large and as many for each of `threads`."""
        parts = -(-(queries - first) // (self.queries * threads)) * threads
        step = max(1, -(-(queries - first) // max(1, parts)))
        for start in range(first, queries, step):
            yield slice(start, min(start + step, queries))


def megabytes(size: int) -> str:
    """`37MB`, rounded up, as --memory-limit takes it."""
    return f"{-(-size // 10**6)}MB"

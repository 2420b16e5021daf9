"""k-reciprocal re-ranking (Zhong, Zheng, Cao, Li; CVPR 2017) in bounded memory: nothing of size N x N is stored.

Query and gallery together are the N items. Each item's k-reciprocal neighbours, sparse, are found block by block; only
a block of the final distances is in memory. Exact as the distances are: the same for any block. Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks, Distances, megabytes
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from pmm.utils.arguments import Arg
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.errors import OutOfMemory, require
from pmm.utils.hardware import usable_cores

Items = npt.NDArray[np.int32]

ROWS_AT_ONCE = 256
COMPARED_AT_ONCE = 1 << 23
BYTES_PER_NUMBER = 48
"""Of a sparse number, while rows are averaged."""


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """Parameters of k-reciprocal re-ranking, by default those of the paper (Zhong et al., 2017).

    Raises InvalidValue for a value that is out of range.
    """

    k1: int = 20
    """Nearest neighbours of each item among which reciprocal ones are searched."""
    k2: int = 6
    """Nearest items, itself included, whose neighbourhoods are averaged to one (1: no averaging)."""
    weight: Annotated[float, Arg(flag="--rerank-lambda")] = 0.3
    """Share of the original distance in the final one (lambda in the paper), from 0 to 1."""

    def __post_init__(self) -> None:
        require(self.k1 >= 1, "k1", self.k1, "at least 1")
        require(self.k2 >= 1, "k2", self.k2, "at least 1")
        require(0 <= self.weight <= 1, "weight", self.weight, "a number from 0 to 1")


class Sparse(NamedTuple):
    """Rows of numbers that are mostly zero."""

    starts: Ints
    """Where each row begins in the other two, and where the last one ends [N + 1]."""
    columns: npt.NDArray[np.int32]
    """Ascending in a row."""
    values: Doubles


def reranked(
    query: Floats,
    gallery: Floats,
    *,
    metric: str = "euclidean",
    parameters: Reranking | None = None,
    memory_limit: int = MEMORY_LIMIT,
    threads: int = 0,
    label: str = "",
) -> Reranked:
    """Re-ranked distances between embeddings [Q, D] and [G, D], for `pmm.evaluation.metrics.evaluate_distances`.

    Args:
        parameters: default: k1 20, k2 6, lambda 0.3.
        memory_limit: bytes to use at most, besides the embeddings.
        threads: threads that search for neighbours (0: one per core).
        label: name of a progress bar; empty for none.

    Raises:
        InvalidInput: embeddings that do not fit each other, NaN or Inf.
        OutOfMemory: the memory limit is too small; the least that works is its `expected`.
    """
    parameters = parameters or Reranking()
    threads = threads or usable_cores()
    blocks = check_memory(len(query) + len(gallery), query.shape[1], parameters, memory_limit, threads)
    k, neighbour_bytes = _neighbour_memory(len(query) + len(gallery), parameters)
    sides = [
        EmbeddingMatrix(rows, metric=metric, scratch=blocks.scratch, name=f"{name} embeddings")
        for name, rows in (("query", query), ("gallery", gallery))
    ]
    between = EmbeddingDistances(*sides)  # the first to say that dimensions differ
    items = EmbeddingMatrix(query, gallery, metric=metric, scratch=blocks.scratch)
    distances = EmbeddingDistances(items, items)
    ranking = nearest(distances, k, blocks, threads=threads, farthest=True, label=label)
    neighbours = ranking.items.astype(np.int32)
    weights = _reciprocal_weights(distances, neighbours[:, : parameters.k1 + 1], ranking.farthest, parameters.k1)
    allowed = (memory_limit - neighbour_bytes) // BYTES_PER_NUMBER
    weights = _averaged(weights, neighbours[:, : parameters.k2], allowed, memory_limit)
    return Reranked(between, weights, ranking.farthest[: len(query)], parameters.weight)


def check_memory(count: int, dim: int, parameters: Reranking, memory_limit: int, threads: int) -> Blocks:
    """The blocks of distances between N items that use at most `memory_limit` bytes.

    Raises OutOfMemory if that is too little to find neighbours. What their weights need is known only afterwards.
    """
    reserved_bytes = _neighbour_memory(count, parameters)[1]
    return Blocks.within(memory_limit, (count, count), dim, threads, reserved_bytes=reserved_bytes)


def _neighbour_memory(count: int, parameters: Reranking) -> tuple[int, int]:
    """How many neighbours of each of N items are stored, and the bytes of all of them."""
    k = min(max(parameters.k1 + 1, parameters.k2), count)
    return k, count * (16 + 24 * k)


class Reranked:
    """(1 - lambda) times the Jaccard distance of two items' neighbourhoods, plus lambda times their distance as a share
    of the query's largest."""

    def __init__(self, between: EmbeddingDistances, weights: Sparse, farthest: Doubles, share: float) -> None:
        self._between, self._share = between, share
        self.shape, self.dim, self.coarsest = between.shape, between.dim, between.coarsest
        self._scales = np.divide(share, farthest, out=np.zeros(len(farthest)), where=farthest > 0)
        queries = self.shape[0]
        self._query = Sparse(weights.starts[: queries + 1], weights.columns, weights.values)
        self._by_column = _transposed(weights, queries)
        self.resident_bytes = sum(array.nbytes for array in (*weights, *self._by_column))

    def approximate(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        return self._with_jaccard(rows, *self._between.approximate(rows, out))

    def refined(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        return self._with_jaccard(rows, *self._between.refined(rows, out))

    def float64(self, rows: slice) -> tuple[Doubles, Doubles]:
        return self._with_jaccard(rows, *self._between.float64(rows))

    def _with_jaccard(self, rows: slice, block: Any, errors: Doubles) -> tuple[Any, Doubles]:
        for query, row in zip(range(rows.start, rows.stop), block, strict=True):
            row *= row.dtype.type(self._scales[query])
            row += ((1 - self._share) * self._jaccard(query)).astype(row.dtype)
        # the last: rounding of numbers up to about 1
        return block, errors * self._scales[rows] * (1 + 1e-6) + 8 * np.finfo(block.dtype).eps

    def close_pairs(self, queries: Ints, items: Ints) -> tuple[Doubles, Doubles]:
        return self.exact_pairs(queries, items), np.zeros(len(items))

    def exact_pairs(self, queries: Ints, items: Ints) -> Doubles:
        out = self._between.exact_pairs(queries, items) * self._scales[queries]
        for query in np.unique(queries):
            pairs = queries == query
            out[pairs] += ((1 - self._share) * self._jaccard(query))[items[pairs]]
        return out

    def _jaccard(self, query: int) -> Doubles:
        """Of one query to the gallery [G]: 1 - (sum of minima) / (sum of maxima). Each item's weights sum up to 1."""
        row = slice(*self._query.starts[query : query + 2])
        columns, weights = self._query.columns[row], self._query.values[row]
        by_column = self._by_column
        place, counts = _ragged(by_column.starts, columns)
        minima = np.minimum(np.repeat(weights, counts), by_column.values[place])
        shared = np.bincount(by_column.columns[place], minima, minlength=self.shape[1])
        return 1 - shared / (2 - shared)


def _reciprocal_weights(distances: Distances, nearest: Items, farthest: Doubles, k1: int) -> Sparse:
    """For each item, its k-reciprocal neighbours and theirs, weighted by exp(-distance); weights add up to 1."""
    count, k = nearest.shape
    half = min(k, int(np.around(k1 / 2)) + 1)
    mutual, half_mutual = np.empty((count, k), bool), np.empty((count, half), bool)
    at_once = max(1, min(ROWS_AT_ONCE, COMPARED_AT_ONCE // (k * k * half)))
    pieces = [slice(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    for rows in pieces:
        neighbours, item = nearest[rows], np.arange(rows.start, rows.stop)[:, None, None]
        mutual[rows] = (nearest[neighbours] == item).any(2)
        half_mutual[rows] = (nearest[neighbours[:, :half], :half] == item).any(2)
    parts = []
    for rows in pieces:
        neighbours, reciprocal = nearest[rows], mutual[rows]
        second, expanding = nearest[neighbours, :half], half_mutual[neighbours]  # neighbours' neighbours [n, k, half]
        shared = (second[..., None] == neighbours[:, None, None, :]) & reciprocal[:, None, None, :]
        enough = 3 * (shared.any(3) & expanding).sum(2) > 2 * expanding.sum(2)
        expanding &= (enough & reciprocal)[:, :, None]
        second_members = np.where(expanding, second, count).reshape(len(neighbours), k * half)
        members = np.hstack([np.where(reciprocal, neighbours, count), second_members])
        members.sort(1)
        unique = members < count
        unique[:, 1:] &= members[:, 1:] != members[:, :-1]
        sizes = unique.sum(1)
        items, columns = np.repeat(np.arange(rows.start, rows.stop), sizes), members[unique]
        shares = np.divide(
            distances.exact_pairs(items, columns), farthest[items], out=np.zeros(len(items)), where=farthest[items] > 0
        )
        weights = np.exp(-shares)
        totals = np.bincount(items - rows.start, weights, minlength=len(neighbours))
        parts.append((sizes, columns.astype(np.int32), weights / totals[items - rows.start]))
    return _joined(parts)


def _averaged(weights: Sparse, nearest: Items, allowed: int, limit: int) -> Sparse:
    """The mean of the weights of each item's k2 nearest [N, k2].

    Raises OutOfMemory if that is more than `allowed` numbers; the `limit` of bytes that works is `expected`.
    """
    count, k2 = nearest.shape
    parts, total = [], 0
    for start in range(0, count, ROWS_AT_ONCE):
        neighbours = nearest[start : start + ROWS_AT_ONCE]
        place, sizes = _ragged(weights.starts, neighbours.reshape(-1))
        rows = np.repeat(np.repeat(np.arange(len(neighbours)), k2), sizes)
        keys = rows * count + weights.columns[place]
        order = np.argsort(keys, kind="stable")  # of one column, the nearest item's comes first
        first = np.flatnonzero(np.diff(keys[order], prepend=-1))
        total += len(first)
        if total <= allowed:
            values = np.add.reduceat(weights.values[place][order], first) / k2
            items, columns = np.divmod(keys[order][first], count)
            parts.append((np.bincount(items, minlength=len(neighbours)), columns.astype(np.int32), values))
    if total > allowed:
        least = limit + (total - allowed) * BYTES_PER_NUMBER
        raise OutOfMemory(
            f"a memory limit of {limit / 1e6:g}MB is too small to re-rank {count:,} items",
            expected=f"at least {megabytes(least)}",
        )
    return _joined(parts)


def _joined(rows: list[tuple[Ints, Items, Doubles]]) -> Sparse:
    """Of pieces: sizes of rows, columns and values."""
    sizes, columns, values = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
    return Sparse(np.concatenate([[0], sizes.cumsum()]), columns, values)


def _transposed(weights: Sparse, first: int) -> Sparse:
    """The rows from `first` on, by column: row numbers, counted from `first`, are the columns of the result."""
    begin, count = weights.starts[first], len(weights.starts) - 1
    columns = weights.columns[begin:]
    rows = np.repeat(np.arange(count - first, dtype=np.int32), np.diff(weights.starts[first:]))
    order = np.argsort(columns, kind="stable")
    starts = np.concatenate([[0], np.bincount(columns, minlength=count).cumsum()])
    return Sparse(starts, rows[order], weights.values[begin:][order])


def _ragged(starts: Ints, rows: npt.NDArray[np.integer[Any]]) -> tuple[Ints, Ints]:
    """Where the numbers of the named rows lie, one row after another, and how many each has."""
    begin = starts[rows]
    sizes = starts[rows + 1] - begin
    return np.arange(sizes.sum()) + np.repeat(begin - (sizes.cumsum() - sizes), sizes), sizes

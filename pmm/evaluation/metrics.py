"""Ranking metrics of re-identification: mAP, CMC, mINP. Ranks are counted without sorting the gallery.

Results are exact, and the same for any memory limit and any number of threads. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks, Distances
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.pid_index import PidIndex
from pmm.evaluation.ranks import relevant_ranks
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.errors import InvalidInput, InvalidValue
from pmm.utils.hardware import usable_cores

MAX_THREADS = 4
Metric: TypeAlias = Literal["euclidean", "cosine"]
ApDefinition: TypeAlias = Literal["standard", "trapezoid", "truncated50"]


@dataclass(frozen=True)
class RankingResult:
    """The metrics of `evaluate_ranking`; fractions in 0..1."""

    mAP: float  # noqa: N815
    """Mean over the evaluable queries of the average precision."""
    mINP: float  # noqa: N815
    """Mean of R / (rank of the last of R relevant items)."""
    cmc: npt.NDArray[np.float64]
    """cmc[r - 1]: share of queries with a relevant item among the first r [max_rank]."""
    per_query_ap: npt.NDArray[np.float64]
    """Average precision per query [Q]; NaN for a skipped one."""
    per_query_inp: npt.NDArray[np.float64]
    """R / (rank of the last of R relevant items) per query [Q]; NaN for a skipped one."""
    first_rank: Ints
    """Rank (from 1) of each query's first relevant item [Q]; 0 for a skipped one."""
    skipped: int
    """Queries without any relevant item in the gallery."""

    @property
    def rank1(self) -> float:
        """Share of queries whose first item is relevant."""
        return float(self.cmc[0])


def evaluate_ranking(
    query: npt.ArrayLike,
    gallery: npt.ArrayLike,
    query_pids: npt.ArrayLike,
    gallery_pids: npt.ArrayLike,
    query_camids: npt.ArrayLike,
    gallery_camids: npt.ArrayLike,
    *,
    metric: Metric = "euclidean",
    ap: ApDefinition = "standard",
    max_rank: int = 50,
    memory_limit: int = MEMORY_LIMIT,
    threads: int = 0,
) -> RankingResult:
    """Rank the gallery for each query and score it by the single-gallery-shot protocol of Market-1501.

    Gallery items of the query's identity AND camera are removed; distractors stay as wrong matches; queries without any
    relevant item are skipped and counted. Ties go to the lower gallery index. Distances are those of
    `pmm.evaluation.distances`.

    Args:
        query: embeddings [Q, D], numpy or torch.
        gallery: embeddings [G, D], numpy or torch.
        query_pids: identities [Q], integers.
        gallery_pids: identities [G].
        query_camids: cameras [Q], integers.
        gallery_camids: cameras [G].
        metric: "euclidean" or "cosine".
        ap: "standard": AP = (1/R) sum_i i/r_i over the whole list, with r_1 < ... < r_R the ranks of the R relevant
            items. "trapezoid" (Market-1501's Matlab code): the mean of precision before and after each hit.
            "truncated50" (the PMM authors' code): hits after rank 50 count 0, divided by all R.
        max_rank: length of the CMC curve.
        memory_limit: bytes to use at most, besides the embeddings.
        threads: threads that count ranks (0: one per core, at most 4).

    Raises:
        InvalidInput: shapes that do not fit, NaN or Inf among the embeddings, no evaluable query.
        InvalidValue: an unknown metric or ap, max_rank < 1.
        OutOfMemory: a memory limit too small for one query; the least that works is its `expected`.

    Examples:
        >>> query, gallery = np.float32([[0, 1], [1, 0]]), np.float32([[0, 2], [1, 1], [3, 0]])
        >>> result = pmm.evaluate_ranking(query, gallery, [7, 8], [7, 8, 8], [1, 1], [2, 2, 2])
        >>> result.mAP, result.skipped
        (1.0, 0)
    """
    index = PidIndex.of(query_pids, gallery_pids, query_camids, gallery_camids)
    check_choices(ap, max_rank)
    embeddings = [_floats(values) for values in (query, gallery)]
    for name, rows, count in zip(("query", "gallery"), embeddings, index.shape, strict=True):
        if rows.ndim != 2 or len(rows) != count:
            raise InvalidInput(f"{name}: embeddings {list(rows.shape)}, pids [{count}]", expected="[N, D], [N]")
    threads = counting_threads(threads)
    blocks = Blocks.within(memory_limit, index.shape, embeddings[0].shape[1], threads, pairs=index.most_pairs)
    sides = [
        EmbeddingMatrix(rows, metric=metric, scratch=blocks.scratch, name=f"{name} embeddings")
        for name, rows in zip(("query", "gallery"), embeddings, strict=True)
    ]
    return _evaluate(EmbeddingDistances(*sides), index, blocks, ap=ap, max_rank=max_rank, threads=threads)


def evaluate_distances(
    distances: Distances | Floats,
    query_pids: npt.ArrayLike,
    gallery_pids: npt.ArrayLike,
    query_camids: npt.ArrayLike,
    gallery_camids: npt.ArrayLike,
    *,
    ap: ApDefinition = "standard",
    max_rank: int = 50,
    memory_limit: int = MEMORY_LIMIT,
    threads: int = 0,
) -> RankingResult:
    """As `evaluate_ranking`, from distances [Q, G]: a matrix, or what computes blocks of it (see `reranking`).

    Raises as `evaluate_ranking`, and InvalidInput for NaN or Inf in a matrix.
    """
    index = PidIndex.of(query_pids, gallery_pids, query_camids, gallery_camids)
    check_choices(ap, max_rank)
    source: Distances = distances if isinstance(distances, Distances) else _Matrix(_floats(distances))
    if source.shape != index.shape:
        raise InvalidInput(f"distances are {list(source.shape)}", expected=f"{list(index.shape)} by the pids")
    threads = counting_threads(threads)
    blocks = Blocks.within(
        memory_limit, index.shape, source.dim, threads, pairs=index.most_pairs, reserved_bytes=source.resident_bytes
    )
    return _evaluate(source, index, blocks, ap=ap, max_rank=max_rank, threads=threads)


def counting_threads(threads: int) -> int:
    """How many threads count ranks (0: one per core): at most 4, since more only wait for each other."""
    return min(threads or usable_cores(), MAX_THREADS)


def check_choices(ap: str, max_rank: int = 1) -> None:
    """Raises InvalidValue for an unknown definition of AP, or max_rank < 1."""
    if ap not in AP_DEFINITIONS:
        raise InvalidValue("ap", ap, choices=AP_DEFINITIONS)
    if max_rank < 1:
        raise InvalidValue("max_rank", max_rank, "at least 1")


def _evaluate(
    distances: Distances, index: PidIndex, blocks: Blocks, *, ap: str, max_rank: int, threads: int
) -> RankingResult:
    queries = distances.shape[0]
    totals, counts = np.zeros(queries), np.zeros(queries, np.int64)
    first_rank, last_rank = np.zeros(queries, np.int64), np.zeros(queries, np.int64)
    for query, rank in relevant_ranks(distances, index, blocks, threads):
        if not len(query):
            continue
        starts = np.flatnonzero(np.diff(query, prepend=-1))
        evaluable, relevant = query[starts], np.diff(starts, append=len(query))
        hits = np.arange(len(query)) - np.repeat(starts, relevant) + 1
        totals[evaluable] = np.add.reduceat(AP_DEFINITIONS[ap](hits, rank), starts)
        counts[evaluable] = relevant
        first_rank[evaluable], last_rank[evaluable] = rank[starts], rank[starts + relevant - 1]
    with np.errstate(invalid="ignore"):
        per_query_ap, inverse_penalty = totals / counts, counts / last_rank  # NaN for a skipped one
    evaluated = first_rank > 0
    if not evaluated.any():
        raise InvalidInput("no query has a relevant gallery item (same identity, another camera); nothing to evaluate")
    hits = np.bincount(first_rank[evaluated].clip(max=max_rank + 1), minlength=max_rank + 2)[1:-1]
    return RankingResult(
        mAP=float(per_query_ap[evaluated].mean()),
        mINP=float(inverse_penalty[evaluated].mean()),
        cmc=hits.cumsum() / evaluated.sum(),
        per_query_ap=per_query_ap,
        per_query_inp=inverse_penalty,
        first_rank=first_rank,
        skipped=int(queries - evaluated.sum()),
    )


class _Matrix:
    """Distances [Q, G] that the caller computed."""

    def __init__(self, matrix: Floats) -> None:
        if matrix.ndim != 2:
            raise InvalidInput(f"distances are {list(matrix.shape)}", expected="[Q, G]")
        self.matrix, self.shape, self.dim, self.resident_bytes = matrix, matrix.shape, 0, 0
        self.coarsest = 2

    def approximate(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        return self.float64(rows)

    def refined(self, rows: slice, out: Singles) -> tuple[Floats, Doubles]:
        return self.float64(rows)

    def float64(self, rows: slice) -> tuple[Doubles, Doubles]:
        block = self.matrix[rows].astype(np.float64)
        if not np.isfinite(block).all():
            bad = rows.start + int((~np.isfinite(block).all(1)).argmax())
            raise InvalidInput(f"distances hold NaN or Inf, first those of query {bad}", index=bad)
        return block, np.zeros(len(block))

    def close_pairs(self, queries: Ints, items: Ints) -> tuple[Doubles, Doubles]:
        return self.exact_pairs(queries, items), np.zeros(len(items))

    def exact_pairs(self, queries: Ints, items: Ints) -> Doubles:
        return self.matrix[queries, items].astype(np.float64)


def _standard(hits: Ints, ranks: Ints) -> Doubles:
    return hits / ranks


def _trapezoid(hits: Ints, ranks: Ints) -> Doubles:
    before = np.where(ranks == 1, 1.0, (hits - 1) / np.maximum(ranks - 1, 1))
    return (hits / ranks + before) / 2


def _truncated50(hits: Ints, ranks: Ints) -> Doubles:
    return np.where(ranks <= 50, hits / ranks, 0)


AP_DEFINITIONS: dict[str, Callable[[Ints, Ints], Doubles]] = {
    "standard": _standard,
    "trapezoid": _trapezoid,
    "truncated50": _truncated50,
}


def _floats(values: Any) -> Floats:
    """A numpy array of floats from one of numpy or torch or from numbers; float64 and smaller floats are not copied."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() and values.element_size() < 4 else values).numpy()
    values = np.asarray(values)
    return values if values.dtype.kind == "f" and values.dtype.itemsize <= 8 else values.astype(np.float64)

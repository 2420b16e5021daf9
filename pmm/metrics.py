"""Ranking metrics of re-identification: mAP, CMC, mINP. The ranks of the relevant items are counted, not sorted out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.errors import UserError

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class RankingResult:
    """What `evaluate_ranking` found; fractions in 0..1."""

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
    query: Any,
    gallery: Any,
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any,
    gallery_camids: Any,
    *,
    metric: str = "euclidean",
    ap: str = "standard",
    max_rank: int = 50,
) -> RankingResult:
    """Rank the gallery for each query and score it by the single-gallery-shot protocol of Market-1501.

    Gallery items of the query's identity AND camera are removed; distractors stay as wrong matches; queries without any
    relevant item are skipped and counted. Ties go to the lower gallery index.

    Args:
        query, gallery: embeddings [Q, D] and [G, D], numpy or torch.
        query_pids, gallery_pids, query_camids, gallery_camids: [Q] or [G] integers.
        metric: "euclidean" or "cosine".
        ap: "standard": AP = (1/R) sum_i i/r_i over the whole list, with r_1 < ... < r_R the ranks of the R relevant
            items. "trapezoid" (Market-1501's Matlab code): the mean of precision before and after each hit.
            "truncated50" (the PMM authors' code): hits after rank 50 count 0, divided by all R.
        max_rank: length of the CMC curve.

    Raises:
        UserError: shapes that do not fit, NaN or Inf among the embeddings, an unknown metric or ap, no evaluable query.
    """
    query_embeddings, gallery_embeddings = _array(query, np.float64), _array(gallery, np.float64)
    q_pids, g_pids, q_cams, g_cams = (
        _array(ids, np.int64) for ids in (query_pids, gallery_pids, query_camids, gallery_camids)
    )
    _check(query_embeddings, q_pids, q_cams, "query")
    _check(gallery_embeddings, g_pids, g_cams, "gallery")
    if query_embeddings.shape[1] != gallery_embeddings.shape[1]:
        raise UserError(
            f"query embeddings have {query_embeddings.shape[1]} dimensions, gallery embeddings "
            f"{gallery_embeddings.shape[1]}; both must come from one model"
        )
    if ap not in AP_DEFINITIONS:
        raise UserError(f"unknown ap '{ap}'; known: {', '.join(AP_DEFINITIONS)}")
    if max_rank < 1:
        raise UserError(f"max_rank is {max_rank}; it must be at least 1")

    count = len(q_pids)
    per_query_ap = np.full(count, np.nan)
    inverse_penalty = np.full(count, np.nan)
    first_rank = np.zeros(count, np.int64)
    for start in range(0, count, QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        distances = distance_matrix(query_embeddings[rows], gallery_embeddings, metric)
        for i, row in enumerate(distances, start=start):
            same = g_pids == q_pids[i]
            kept = ~(same & (g_cams == q_cams[i]))
            ranks = relevant_ranks(row[kept], same[kept])
            if len(ranks):
                per_query_ap[i] = AP_DEFINITIONS[ap](ranks)
                inverse_penalty[i] = len(ranks) / ranks[-1]
                first_rank[i] = ranks[0]
    evaluated = first_rank > 0
    if not evaluated.any():
        raise UserError("no query has a relevant gallery item (same identity, another camera); nothing to evaluate")
    hits = np.bincount(first_rank[evaluated].clip(max=max_rank + 1), minlength=max_rank + 2)[1:-1]
    return RankingResult(
        mAP=float(per_query_ap[evaluated].mean()),
        mINP=float(inverse_penalty[evaluated].mean()),
        cmc=hits.cumsum() / evaluated.sum(),
        per_query_ap=per_query_ap,
        per_query_inp=inverse_penalty,
        first_rank=first_rank,
        skipped=int(count - evaluated.sum()),
    )


def distance_matrix(query: Floats, gallery: Floats, metric: str) -> npt.NDArray[np.float64]:
    """Distances [Q, G] that rank as `metric` does: squared Euclidean, or 1 - cosine similarity, in float64.

    Raises UserError for an unknown metric or, with cosine, an all-zero embedding.
    """
    query, gallery = np.asarray(query, np.float64), np.asarray(gallery, np.float64)
    if metric == "euclidean":
        squares = np.einsum("gd,gd->g", gallery, gallery)
        return np.einsum("qd,qd->q", query, query)[:, None] + squares - 2 * (query @ gallery.T)
    if metric == "cosine":
        return 1 - _unit(query) @ _unit(gallery).T
    raise UserError(f"unknown metric '{metric}'; known: euclidean, cosine")


def relevant_ranks(distances: Floats, relevant: npt.NDArray[np.bool_]) -> Ints:
    """Ranks (from 1, ascending) of the relevant items [R] in a list [G] sorted by distance, ties by index.

    An item's rank is one more than the number of items before it, so the list itself is never sorted.
    """
    items = np.flatnonzero(relevant)
    items = items[np.argsort(distances[items], kind="stable")]
    bounds = distances[items]
    # nearer[k]: items strictly nearer than the k-th relevant one
    nearer = np.bincount(np.searchsorted(bounds, distances, side="right"), minlength=len(items) + 1)[:-1].cumsum()
    ranks = nearer + 1
    near_or_tied = np.bincount(np.searchsorted(bounds, distances, side="left"), minlength=len(items) + 1)[:-1].cumsum()
    for k in np.flatnonzero(near_or_tied - nearer > 1):
        ranks[k] += np.count_nonzero(distances[: items[k]] == bounds[k])
    return ranks.astype(np.int64)


def _standard(ranks: Ints) -> float:
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def _trapezoid(ranks: Ints) -> float:
    hits = np.arange(1, len(ranks) + 1)
    before = np.where(ranks == 1, 1.0, (hits - 1) / np.maximum(ranks - 1, 1))
    return float(((hits / ranks + before) / 2).mean())


def _truncated50(ranks: Ints) -> float:
    return float(np.where(ranks <= 50, np.arange(1, len(ranks) + 1) / ranks, 0).mean())


AP_DEFINITIONS: dict[str, Callable[[Ints], float]] = {
    "standard": _standard,
    "trapezoid": _trapezoid,
    "truncated50": _truncated50,
}


def _array(values: Any, dtype: Any) -> Any:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values, dtype=dtype)


def _check(embeddings: Floats, pids: Ints, camids: Ints, name: str) -> None:
    if embeddings.ndim != 2 or pids.shape != embeddings.shape[:1] or camids.shape != embeddings.shape[:1]:
        raise UserError(
            f"{name}: embeddings {list(embeddings.shape)}, pids {list(pids.shape)}, camids {list(camids.shape)}; "
            "expected [N, D], [N], [N]"
        )
    bad = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(bad):
        raise UserError(
            f"{name}: {len(bad)} of {len(embeddings)} embeddings hold NaN or Inf, the first is row {bad[0]}"
        )


def _unit(embeddings: Floats) -> Floats:
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if (norms == 0).any():
        raise UserError(f"embedding {int(np.flatnonzero(norms == 0)[0])} is all zero; it has no direction for cosine")
    return embeddings / norms

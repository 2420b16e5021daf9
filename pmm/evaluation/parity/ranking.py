"""Do two backends rank a gallery alike? Rank-1 lost and gained, overlap of the top 10, order of the top 50."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.metrics import Metric
from pmm.evaluation.nearest import Nearest, nearest
from pmm.evaluation.parity.labels import Labels, QueryGallery
from pmm.utils.arrays import Floats, Ints
from pmm.utils.errors import InvalidInput

OVERLAP_ITEMS = 10
ORDER_ITEMS = 50
MASKS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class RankingParity:
    """How a candidate's rankings differ from the reference's, over the queries with a relevant gallery item."""

    queries: int
    rank1_lost: int
    """Queries whose first item is right with the reference, and wrong with the candidate."""
    rank1_gained: int
    top1_changed: int
    """Queries whose first item is another one, right or wrong."""
    top10_overlap: float
    """Mean share of the reference's first ten items among the candidate's first ten."""
    kendall_tau: float
    """Mean of `kendall_tau_b` over the reference's first 50 items."""


def ranking_parity(reference: QueryGallery, candidate: QueryGallery, labels: Labels) -> RankingParity:
    """Compare rankings by Euclidean distance, without junk, ties by gallery index, as `evaluate_ranking` has them.

    Only a block of queries' distances is in memory, and one side's gallery in float64.

    Raises:
        InvalidInput: shapes that do not fit, NaN or Inf, no query with a relevant gallery item.
    """
    before, after = (
        _NearestItems.of(embedded, labels, np.arange(len(labels.query_pids)), count, name)
        for name, embedded, count in (("reference", reference, ORDER_ITEMS), ("candidate", candidate, OVERLAP_ITEMS))
    )
    evaluable = np.concatenate(
        [labels.masks(rows).relevant.any(1) for rows in Blocks(MASKS_AT_ONCE, 0).cut(len(labels.query_pids))]
    )
    lost = gained = changed = 0
    overlaps, taus = [], []
    for query in np.flatnonzero(evaluable).tolist():
        items, distances = before.of_query(query)
        candidate_items, _ = after.of_query(query)
        right_before, right = (
            labels.gallery_pids[each[0]] == labels.query_pids[query] for each in (items, candidate_items)
        )
        lost += int(right_before and not right)
        gained += int(right and not right_before)
        changed += int(items[0] != candidate_items[0])
        overlaps.append(len(np.intersect1d(items[:OVERLAP_ITEMS], candidate_items)) / len(candidate_items))
        taus.append(kendall_tau_b(distances, after.distances.exact_pairs(np.full(len(items), query), items)))
    if not overlaps:
        raise InvalidInput("no query has a relevant gallery item (same identity, another camera); nothing to rank")
    return RankingParity(
        queries=len(overlaps),
        rank1_lost=lost,
        rank1_gained=gained,
        top1_changed=changed,
        top10_overlap=float(np.mean(overlaps)),
        kendall_tau=float(np.mean(taus)),
    )


def first_items(
    embedded: QueryGallery, labels: Labels, queries: Sequence[int] | Ints, count: int, *, metric: Metric = "euclidean"
) -> Ints:
    """Gallery indices [n, count] that rank first for n of the queries, without junk; -1 where there are no more."""
    items = _NearestItems.of(embedded, labels, np.asarray(queries, np.int64), count, metric=metric).nearest.items
    return np.pad(items, ((0, 0), (0, count - items.shape[1])), constant_values=-1)


def kendall_tau_b(a: Floats, b: Floats) -> float:
    """Rank correlation of two sets of distances [N] of the same items: 1 is the same order, -1 the reverse.

    (concordant - discordant) / sqrt(pairs untied in a * pairs untied in b) (Kendall, Biometrika 33, 1945). Without
    any untied pair on one side it is 0, on both sides, or with fewer than two items, 1: neither says anything else.
    """
    x, y = np.sign(a[:, None] - a), np.sign(b[:, None] - b)  # each pair twice, above and below the division
    untied = np.count_nonzero(x), np.count_nonzero(y)
    if not all(untied):
        return float(not any(untied))
    return float((x * y).sum() / np.sqrt(float(untied[0]) * untied[1]))


class _NearestItems(NamedTuple):
    """Distances of some queries, and the first items without junk, by the distances that `evaluate_ranking` ranks by:
    what it calls first is first here."""

    distances: EmbeddingDistances
    nearest: Nearest

    @classmethod
    def of(
        cls,
        embedded: QueryGallery,
        labels: Labels,
        queries: Ints,
        count: int,
        name: str = "",
        metric: Metric = "euclidean",
    ) -> _NearestItems:
        """Raises InvalidInput as `Labels.check`."""
        labels.check(embedded, name)
        distances = EmbeddingDistances(
            EmbeddingMatrix(np.asarray(embedded.query)[queries], metric=metric),
            EmbeddingMatrix(np.asarray(embedded.gallery), metric=metric),
        )
        blocks = Blocks.within(MEMORY_LIMIT, distances.shape, distances.dim, 1)

        def junk(rows: slice) -> tuple[Ints, Ints]:
            query, item = np.nonzero(labels.masks(queries[rows]).junk)
            return query, item

        return cls(distances, nearest(distances, min(count, distances.shape[1]), blocks, excluded=junk))

    def of_query(self, query: int) -> tuple[Ints, Floats]:
        """Gallery items [n] and their distances."""
        listed = self.nearest.items[query] >= 0
        return self.nearest.items[query][listed], self.nearest.distances[query][listed]

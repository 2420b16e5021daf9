"""How the embeddings of a split are ranked and scored. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pmm.data.samples import Split, camids_of, pids_of
from pmm.evaluation.distances import MEMORY_LIMIT, Blocks
from pmm.evaluation.metrics import RankingResult, counting_threads, evaluate_distances, evaluate_ranking
from pmm.evaluation.reranking import Reranking, check_memory, reranked
from pmm.runtime.base import Embeddings
from pmm.utils.hardware import usable_cores


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """How embeddings are ranked and scored; see `pmm.evaluation.metrics`."""

    metric: str = "euclidean"
    ap: str = "standard"
    reranking: Reranking | None = None
    memory_limit: int = MEMORY_LIMIT
    """Bytes beyond the embeddings."""
    threads: int = 0

    def check(self, split: Split, dim: int) -> None:
        """Raise UserError if the memory limit is too small: before hours of embedding."""
        queries, gallery = len(split.query), len(split.gallery)
        if self.reranking:
            check_memory(queries + gallery, dim, self.reranking, self.memory_limit, self.threads or usable_cores())
        else:
            Blocks.within(self.memory_limit, (queries, gallery), dim, counting_threads(self.threads))


def rank_split(
    split: Split, query: Embeddings, gallery: Embeddings, ranking: Ranking | None = None, *, label: str = ""
) -> RankingResult:
    """`evaluate_ranking` of a split's embeddings (by default: standard AP, Euclidean distance); with a `label`, a
    progress bar of that name for re-ranking."""
    how = ranking or Ranking()
    labels = pids_of(split.query), pids_of(split.gallery), camids_of(split.query), camids_of(split.gallery)
    options: dict[str, Any] = {"ap": how.ap, "memory_limit": how.memory_limit, "threads": how.threads}
    if how.reranking is None:
        return evaluate_ranking(query, gallery, *labels, metric=how.metric, **options)
    distances = reranked(
        query, gallery, metric=how.metric, parameters=how.reranking, memory_limit=how.memory_limit,
        threads=how.threads, label=label,
    )  # fmt: skip
    return evaluate_distances(distances, *labels, **options)

"""How the embeddings of a split are ranked and scored. Loads no torch."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from pmm.data.samples import ReidDataset, camids_of, pids_of
from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.embedding_matrix import METRICS
from pmm.evaluation.metrics import (
    ApDefinition,
    Metric,
    RankingResult,
    check_choices,
    counting_threads,
    evaluate_distances,
    evaluate_ranking,
)
from pmm.evaluation.parity.labels import Labels
from pmm.evaluation.reranking import Reranking, check_memory, reranked
from pmm.utils.arrays import Floats
from pmm.utils.errors import InvalidValue
from pmm.utils.hardware import usable_cores

CMC_RANKS = (1, 5, 10, 20)
"""Ranks of the CMC that are printed."""


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    """How embeddings are ranked and scored; see `pmm.evaluation.metrics`."""

    metric: Metric = "euclidean"
    ap: ApDefinition = "standard"
    reranking: Reranking | None = None
    memory_limit: int = MEMORY_LIMIT
    """Bytes that ranking may use besides the embeddings."""
    threads: int = 0
    """CPU threads (0: the default of each step)."""

    def __post_init__(self) -> None:
        """Raises InvalidValue for an unknown metric or definition of AP."""
        if self.metric not in METRICS:
            raise InvalidValue("metric", self.metric, choices=METRICS)
        check_choices(self.ap)

    def check(self, split: ReidDataset, dim: int) -> None:
        """Raises OutOfMemory if the memory limit is too small, before hours are spent on embedding."""
        queries, gallery = len(split.query), len(split.gallery)
        if self.reranking:
            check_memory(queries + gallery, dim, self.reranking, self.memory_limit, self.threads or usable_cores())
        else:
            Blocks.within(self.memory_limit, (queries, gallery), dim, counting_threads(self.threads))


def labels_of(split: ReidDataset) -> Labels:
    """Identities and cameras of a split's query and gallery, named as the arguments of `evaluate_ranking`."""
    return Labels(
        query_pids=pids_of(split.query),
        gallery_pids=pids_of(split.gallery),
        query_camids=camids_of(split.query),
        gallery_camids=camids_of(split.gallery),
    )


def rank_split(
    split: ReidDataset,
    query: Floats,
    gallery: Floats,
    options: RankingOptions | None = None,
    *,
    label: str = "",
) -> RankingResult:
    """`evaluate_ranking` of a split's embeddings (by default: standard AP, Euclidean distance); with a `label`, a
    progress bar of that name for re-ranking."""
    options = options or RankingOptions()
    limits: dict[str, Any] = {"memory_limit": options.memory_limit, "threads": options.threads}
    arguments = {**vars(labels_of(split)), "ap": options.ap, **limits}
    if options.reranking is None:
        return evaluate_ranking(query, gallery, metric=options.metric, **arguments)
    distances = reranked(query, gallery, metric=options.metric, parameters=options.reranking, label=label, **limits)
    return evaluate_distances(distances, **arguments)


def figures(result: RankingResult) -> dict[str, float | int]:
    """The printed figures as plain numbers (fractions)."""
    cmc = {f"rank{rank}": float(result.cmc[rank - 1]) for rank in CMC_RANKS}
    return {"mAP": result.mAP, **cmc, "mINP": result.mINP, "skipped_queries": result.skipped}


def describe_ranking(result: RankingResult) -> str:
    """One line: mAP, CMC and mINP in percent, skipped queries."""
    cmc = "  ".join(f"rank-{rank} {result.cmc[rank - 1]:.1%}" for rank in CMC_RANKS)
    return f"mAP {result.mAP:.1%}  {cmc}  mINP {result.mINP:.1%}  ({result.skipped} queries without a match skipped)"


def per_query_csv(split: ReidDataset, result: RankingResult) -> str:
    """CSV with a line per query; AP, INP and rank of the first match are empty for a skipped query."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("query", "pid", "camid", "AP", "INP", "first_match_rank"))
    rows = zip(split.query, result.per_query_ap, result.per_query_inp, result.first_rank.tolist(), strict=True)
    for sample, ap, inp, first in rows:
        scores = (f"{ap:.6f}", f"{inp:.6f}", first) if first else ("", "", "")
        writer.writerow((sample.path, sample.pid, sample.camid, *scores))
    return text.getvalue()

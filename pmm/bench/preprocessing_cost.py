"""What mistakes in preparing crops cost: the reference's retrieval with each, and with none, on the same crops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from pmm.bench.accuracy import AccuracyEvaluator, Reference
from pmm.bench.resume_store import ResumeStore
from pmm.bench.schema import PreprocessingCost, WrongPreprocessing
from pmm.data.samples import ReidDataset, evenly_spaced
from pmm.data.splits import matchable
from pmm.evaluation.metrics import RankingResult, evaluate_ranking
from pmm.evaluation.parity.retrieval import retrieval_parity
from pmm.evaluation.ranking import labels_of
from pmm.runtime.base import Embeddings
from pmm.utils.errors import UserError

MOST_CROPS = 2000
"""Of the sample."""
EmbedWrongly = Callable[[str, list[int]], Embeddings]
"""Embeddings of some crops, by their places in queries and gallery, prepared with the mistake of that name."""


class PreprocessingCosts:
    """Measures the mistakes on crops of one data set."""

    def __init__(self, split: ReidDataset, *, sample: bool, resume_store: ResumeStore) -> None:
        """`sample`: on at most `MOST_CROPS` crops, see `sampled`; else on all."""
        every = range(len(split.query) + len(split.gallery))
        self._rows = sampled(split, MOST_CROPS) if sample else list(every)
        self._is_sample = len(self._rows) < len(every)
        queries = len(split.query)
        part = ReidDataset(
            train=(),
            query=tuple(split.query[row] for row in self._rows if row < queries),
            gallery=tuple(split.gallery[row - queries] for row in self._rows if row >= queries),
        )
        self._accuracy, self._labels, self._resume_store = AccuracyEvaluator(part), labels_of(part), resume_store

    def measure(
        self, mistakes: list[dict[str, str]], right: Reference, embed: EmbedWrongly, after_each: Callable[[], None]
    ) -> WrongPreprocessing:
        """The cost of each of `mistakes`, as `describe_source` has them.

        Args:
            right: the reference with the right preprocessing, on all crops.
            embed: called for each mistake that no interrupted run has measured.
            after_each: called when a mistake is done.
        """
        rows = np.concatenate(right.embedded)[self._rows]
        ranking, costs = self._ranking(rows), []
        for mistake in mistakes:
            costs.append(self._cost(mistake, ranking, embed))
            after_each()
        split = self._accuracy.split
        return WrongPreprocessing(
            sample=self._is_sample,
            identities=len({each.pid for each in split.query}),
            queries=len(split.query),
            gallery=len(split.gallery),
            mAP=ranking.mAP,
            rank1=ranking.rank1,
            costs=tuple(costs),
        )

    def _cost(self, mistake: dict[str, str], right: RankingResult, embed: EmbedWrongly) -> PreprocessingCost:
        words, reason = mistake["mistake"], mistake["reason"]
        key = f"{mistake['name']}-{len(self._rows)}"
        if earlier := self._resume_store.preprocessing_cost(key):
            return earlier
        try:
            if reason:
                raise UserError(reason)
            wrong = self._ranking(embed(mistake["name"], self._rows))
        except UserError as error:  # the comparison of backends goes on without it
            return PreprocessingCost(mistake=words, reason=str(error))
        parity = retrieval_parity(right, wrong, self._labels)
        cost = PreprocessingCost(
            mistake=words,
            mAP=wrong.mAP,
            rank1=wrong.rank1,
            map_delta=parity.map_delta.value,
            map_delta_interval=parity.map_delta.interval,
            rank1_delta=parity.rank1_delta.value,
            rank1_delta_interval=parity.rank1_delta.interval,
        )
        self._resume_store.store_preprocessing_cost(key, cost)
        return cost

    def _ranking(self, embeddings: Embeddings) -> RankingResult:
        return evaluate_ranking(*self._accuracy.split_embeddings(embeddings), **vars(self._labels))


def sampled(split: ReidDataset, most: int) -> list[int]:
    """Places, in queries and then gallery, of all crops of some identities: evenly over those whose queries are
    evaluated, as many as have at most `most` crops together (but two, or no ranking could be wrong).

    All places if there are no more, or no two such identities.
    """
    pids = [sample.pid for sample in (*split.query, *split.gallery)]
    evaluated = zip(split.query, matchable(split.query, split.gallery), strict=True)
    known = sorted({sample.pid for sample, counts in evaluated if counts})
    if len(pids) <= most or len(known) < 2:
        return list(range(len(pids)))
    crops = Counter(pids)
    at_most = max(2, min(len(known), most // min(crops[pid] for pid in known)))
    for count in range(at_most, 1, -1):
        chosen = {known[place] for place in evenly_spaced(len(known), count)}
        if count == 2 or sum(crops[pid] for pid in chosen) <= most:
            break
    return [place for place, pid in enumerate(pids) if pid in chosen]

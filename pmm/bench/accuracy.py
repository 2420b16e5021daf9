"""What a backend's embeddings do to numbers, ranking, retrieval and decisions, as fields of a `Result`."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pmm.bench.result_schema import CameraResult, LostQuery, OperatingPoint, Thresholds
from pmm.data.samples import ReidDataset, Sample
from pmm.data.splits import matchable
from pmm.evaluation.metrics import RankingResult, evaluate_ranking
from pmm.evaluation.parity.labels import QueryGallery
from pmm.evaluation.parity.numeric import numeric_parity
from pmm.evaluation.parity.ranking import first_items, ranking_parity
from pmm.evaluation.parity.retrieval import retrieval_parity
from pmm.evaluation.parity.thresholds import Verification, decision_flips, verification
from pmm.evaluation.ranking import labels_of
from pmm.runtime.base import Embeddings
from pmm.utils.errors import InvalidInput
from pmm.utils.files import sha256

WORST_QUERIES = 5
LARGEST = 1e15
"""Beyond it squared distances leave the range of float32."""
FIRST_ITEMS = 5


@dataclass(frozen=True)
class Reference:
    """The backend that the others are compared with: its embeddings, and all that follows from them alone."""

    embedded: QueryGallery
    ranking: RankingResult
    verification: Verification


def crops_digest(samples: Iterable[Sample]) -> str:
    """SHA-256 of the names, labels and contents of `samples`, in their order: equal for the same data set."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.path.name} {sample.pid} {sample.camid} {sha256(sample.path)}\n".encode())
    return digest.hexdigest()


class AccuracyEvaluator:
    """Accuracy of embeddings of one data set."""

    def __init__(self, split: ReidDataset) -> None:
        self.split = split
        self.samples = (*split.query, *split.gallery)
        self.labels = labels_of(split)
        self.evaluable = sum(matchable(split.query, split.gallery))

    def split_embeddings(self, embeddings: Embeddings) -> QueryGallery:
        """Query [Q, D] and gallery [G, D] of embeddings [Q + G, D] in that order. Raises InvalidInput for NaN, Inf."""
        bad = np.flatnonzero(~(abs(embeddings) < LARGEST).all(1))
        if len(bad):
            problem = f"{len(bad)} of {len(embeddings)} embeddings contain NaN, Inf or numbers of {LARGEST:g} and more"
            first = int(bad[0])
            raise InvalidInput(f"{problem}, the first that of {self.samples[first].path.name}", index=first)
        count = len(self.split.query)
        return QueryGallery(embeddings[:count], embeddings[count:])

    def reference(self, embedded: QueryGallery) -> Reference:
        """All that the others are compared with."""
        return Reference(embedded, self._ranking(embedded), verification(embedded, self.labels))

    def figures(self, candidate: QueryGallery, reference: Reference) -> dict[str, Any]:
        """Fields of a `Result`: the three tiers of parity, per camera, thresholds, and the queries that lost most."""
        is_reference = candidate is reference.embedded
        ranking = reference.ranking if is_reference else self._ranking(candidate)
        verified = reference.verification if is_reference else verification(candidate, self.labels)
        order = ranking_parity(reference.embedded, candidate, self.labels)
        retrieval = retrieval_parity(reference.ranking, ranking, self.labels)
        return {
            "mAP": ranking.mAP,
            "rank1": ranking.rank1,
            "mINP": ranking.mINP,
            "skipped_queries": ranking.skipped,
            "map_delta": retrieval.map_delta.value,
            "map_delta_interval": retrieval.map_delta.interval,
            "rank1_delta": retrieval.rank1_delta.value,
            "rank1_delta_interval": retrieval.rank1_delta.interval,
            "minp_delta": retrieval.minp_delta.value,
            "minp_delta_interval": retrieval.minp_delta.interval,
            **self._numeric_fields(candidate, reference.embedded),
            "rank1_lost": order.rank1_lost,
            "rank1_gained": order.rank1_gained,
            "top1_changed": order.top1_changed,
            "top10_overlap": order.top10_overlap,
            "kendall_tau": order.kendall_tau,
            "per_query_ap": tuple(round(ap, 6) if math.isfinite(ap) else None for ap in ranking.per_query_ap.tolist()),
            "cameras": tuple(CameraResult(**dataclasses.asdict(row)) for row in retrieval.cameras),
            "worst_queries": self._worst_queries(candidate, reference, ranking, retrieval.worst(WORST_QUERIES)),
            "thresholds": self._thresholds(candidate, reference, verified),
        }

    def _ranking(self, embedded: QueryGallery) -> RankingResult:
        return evaluate_ranking(*embedded, **vars(self.labels))

    def _numeric_fields(self, candidate: QueryGallery, reference: QueryGallery) -> dict[str, Any]:
        parity = numeric_parity(np.concatenate(reference), np.concatenate(candidate))
        return {
            "min_cosine": parity.min_cosine,
            "p1_cosine": parity.p1_cosine,
            "median_cosine": parity.median_cosine,
            "worst_crop": None if candidate is reference else str(self.samples[parity.worst_row].path),
            "max_abs": parity.max_abs,
            "max_norm_error": parity.max_norm_error,
        }

    def _worst_queries(
        self, candidate: QueryGallery, reference: Reference, ranking: RankingResult, queries: Any
    ) -> tuple[LostQuery, ...]:
        split, pids = self.split, self.labels.gallery_pids
        lists = [first_items(each, self.labels, queries, FIRST_ITEMS) for each in (reference.embedded, candidate)]
        lost = []
        for place, index in enumerate(queries):
            sample = split.query[index]
            before, after = ([int(item) for item in items[place] if item >= 0] for items in lists)
            lost.append(
                LostQuery(
                    path=str(sample.path),
                    pid=sample.pid,
                    camid=sample.camid,
                    ap_reference=float(reference.ranking.per_query_ap[index]),
                    ap=float(ranking.per_query_ap[index]),
                    first_reference=tuple(str(split.gallery[item].path) for item in before),
                    first=tuple(str(split.gallery[item].path) for item in after),
                    right_reference=tuple(bool(pids[item] == sample.pid) for item in before),
                    right=tuple(bool(pids[item] == sample.pid) for item in after),
                )
            )
        return tuple(lost)

    def _thresholds(self, candidate: QueryGallery, reference: Reference, verified: Verification) -> Thresholds:
        flips = decision_flips(
            reference.embedded, candidate, self.labels, [point.threshold for point in reference.verification.points]
        )
        return Thresholds(
            genuine=verified.genuine,
            impostor=verified.impostor,
            eer=verified.eer,
            eer_threshold=verified.eer_threshold,
            points=tuple(
                OperatingPoint(
                    fmr=point.fmr,
                    threshold=point.threshold,
                    tpr=point.tpr,
                    flips=flip and flip.accepted + flip.rejected,
                    newly_accepted=flip and flip.accepted,
                    newly_rejected=flip and flip.rejected,
                )
                for point, flip in zip(verified.points, flips, strict=True)
            ),
        )

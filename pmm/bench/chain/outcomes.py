"""What the answers of a link of the chain are worth, query by query, and what one link loses against another.

A link ranks the whole gallery exactly (embeddings, stored vectors), or lists some rows per query (an index): what it
does not list it does not find. Junk, which shows the query's identity in the query's camera, counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.bench.chain_schema import ChainLoss
from pmm.evaluation.distances import EmbeddingDistances, squared_distances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix, comparable_rows
from pmm.evaluation.metrics import Metric, evaluate_ranking
from pmm.evaluation.parity.labels import Labels, QueryGallery
from pmm.evaluation.parity.ranking import first_items
from pmm.evaluation.parity.retrieval import paired_bootstrap
from pmm.evaluation.pid_index import PidIndex
from pmm.utils.arrays import Doubles, Ints

FIRST = 10
"""Crops that are shown to a user, without junk."""
GALLERY_AT_ONCE = 4096


class Listing(NamedTuple):
    """What an index answers: rows [Q, k], the nearest first, -1 where there are no more; and Euclidean distances."""

    rows: Ints
    distances: Doubles


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """Of one link, for each query."""

    ap: Doubles
    """Average precision [Q]; NaN without a relevant row in the gallery."""
    inp: Doubles
    """R / (rank of the last of R relevant rows) [Q]; 0 if one of them was not found."""
    right: npt.NDArray[np.bool_]
    """Whether the first row is relevant [Q]."""
    first: Ints
    """The first ten rows [Q, 10]; -1 where there are no more."""
    accepted: Ints
    """Pairs that lie within the threshold, as query * G + row, ascending."""

    @property
    def evaluated(self) -> npt.NDArray[np.bool_]:
        """Queries with a relevant row [Q]."""
        return np.isfinite(self.ap)


class OutcomeEvaluator:
    """Outcomes on one set of labels at one threshold of the Euclidean distance; for cosine, of that of rows at norm
    1."""

    def __init__(self, labels: Labels, threshold: float, metric: Metric = "euclidean") -> None:
        self.labels, self.threshold, self.metric = labels, threshold, metric
        queries, gallery = len(labels.query_pids), len(labels.gallery_pids)
        self.shape = queries, gallery
        index = PidIndex.of(**vars(labels))
        self.relevant, self.junk = np.zeros(queries, np.int64), np.zeros(queries, np.int64)
        """How many rows of each kind a query has [Q]."""
        for row in range(queries):
            _, _, junk = index.pairs(slice(row, row + 1))
            self.junk[row], self.relevant[row] = np.count_nonzero(junk), np.count_nonzero(~junk)
        self.genuine = int(self.relevant.sum())
        """Pairs of one identity, without junk."""
        self.impostor = queries * gallery - self.genuine - int(self.junk.sum())
        """Pairs of two identities."""

    def exact(self, embedded: QueryGallery) -> Outcome:
        """Of the exact ranking of the whole gallery. Raises InvalidInput as `evaluate_ranking`."""
        ranking = evaluate_ranking(*embedded, **vars(self.labels), metric=self.metric)
        return Outcome(
            ap=ranking.per_query_ap,
            inp=ranking.per_query_inp,
            right=ranking.first_rank == 1,
            first=first_items(embedded, self.labels, np.arange(self.shape[0]), FIRST, metric=self.metric),
            accepted=self._accepted(embedded),
        )

    def listed(self, short: Listing, deep: Listing, depth: int) -> Outcome:
        """Of what an index lists: the first rows are those of the `short` lists, average precision and accepted pairs
        come from the `deep` ones, of which `depth` rows count."""
        rows = self._without_junk(short.rows)
        first = _leftmost(rows, FIRST)
        right = self._is_relevant(first)[:, 0]
        rows = self._without_junk(deep.rows)
        rank = np.cumsum(rows >= 0, axis=1)
        rows = np.where(rank <= depth, rows, -1)
        relevant = self._is_relevant(rows)
        hits = np.cumsum(relevant, axis=1)
        query, place = np.nonzero(relevant)
        ap, starts = np.zeros(len(rows)), np.flatnonzero(np.diff(query, prepend=-1))
        if len(query):  # summed as `evaluate_ranking` sums, to the last digit
            ap[query[starts]] = np.add.reduceat(hits[query, place] / rank[query, place], starts)
        with np.errstate(divide="ignore", invalid="ignore"):
            ap /= self.relevant
            last = np.where(relevant, rank, 0).max(1, initial=0)
            inp = np.where(hits[:, -1] == self.relevant, self.relevant / last, 0.0)
        ap[self.relevant == 0] = inp[self.relevant == 0] = np.nan
        query, place = np.nonzero((rows >= 0) & (deep.distances <= self.threshold))
        accepted = np.unique(query * self.shape[1] + rows[query, place])
        return Outcome(ap=ap, inp=inp, right=right & (self.relevant > 0), first=first, accepted=accepted)

    def rates(self, outcome: Outcome) -> tuple[float, float]:
        """False match rate and true-positive rate at the threshold."""
        query, row = np.divmod(outcome.accepted, self.shape[1])
        genuine = int((self.labels.query_pids[query] == self.labels.gallery_pids[row]).sum())
        return (len(query) - genuine) / max(1, self.impostor), genuine / max(1, self.genuine)

    def _accepted(self, embedded: QueryGallery) -> Ints:
        """Pairs within the threshold: found by a product in float64, then measured by their differences."""
        query, gallery = embedded
        distances = EmbeddingDistances(*(EmbeddingMatrix(each, metric=self.metric) for each in embedded))
        query = comparable_rows(query, self.metric)
        found = [np.empty(0, np.int64)]
        longest = float(np.max(distances.query.norms, initial=0) ** 2)
        for start in range(0, len(gallery), GALLERY_AT_ONCE):
            rows = comparable_rows(gallery[start : start + GALLERY_AT_ONCE], self.metric)
            norms = float(np.max(distances.gallery.norms[start : start + len(rows)], initial=0) ** 2)
            slack = 1e-9 * (longest + norms)  # far above the rounding of float64
            squares = squared_distances(query, rows)
            near, item = np.nonzero(squares <= self.threshold**2 + slack)
            item += start
            measured = np.sqrt(2 * distances.exact_pairs(near, item) * distances.factor)
            keep = (measured <= self.threshold) & ~self._is_junk(near, item)
            found.append(near[keep] * self.shape[1] + item[keep])
        return np.sort(np.concatenate(found))

    def _is_junk(self, query: Ints, row: Ints) -> npt.NDArray[np.bool_]:
        labels = self.labels
        same = labels.query_pids[query] == labels.gallery_pids[row]
        result: npt.NDArray[np.bool_] = same & (labels.query_camids[query] == labels.gallery_camids[row])
        return result

    def _is_relevant(self, rows: Ints) -> npt.NDArray[np.bool_]:
        """Of rows [Q, k] without junk."""
        same = self.labels.gallery_pids[rows] == self.labels.query_pids[:, None]
        result: npt.NDArray[np.bool_] = same & (rows >= 0)
        return result

    def _without_junk(self, rows: Ints) -> Ints:
        """Rows [Q, k] with -1 for junk, and for a row that was listed before."""
        query = np.broadcast_to(np.arange(len(rows))[:, None], rows.shape)
        order = np.argsort(rows, axis=1, kind="stable")
        ordered = np.take_along_axis(rows, order, 1)
        again = np.zeros(rows.shape, bool)
        np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
        return np.where((rows < 0) | again | self._is_junk(query, rows), -1, rows)


def loss(before: Outcome, after: Outcome) -> ChainLoss:
    """What `after` loses against `before`; intervals are a paired bootstrap over queries."""
    evaluated = before.evaluated
    deltas = np.stack([after.ap - before.ap, after.right.astype(float) - before.right, after.inp - before.inp])
    deltas = deltas[:, evaluated]
    (map_low, map_high), (rank1_low, rank1_high), (minp_low, minp_high) = paired_bootstrap(deltas).tolist()
    lost = int((before.right & ~after.right & evaluated).sum())
    gained = int((after.right & ~before.right & evaluated).sum())
    shared = [
        len(np.intersect1d(rows[rows >= 0], others[others >= 0])) / max(1, int((rows >= 0).sum()))
        for rows, others in zip(before.first[evaluated], after.first[evaluated], strict=True)
    ]
    return ChainLoss(
        map_delta=float(deltas[0].mean()),
        map_delta_interval=(map_low, map_high),
        rank1_delta=float(deltas[1].mean()),
        rank1_delta_interval=(rank1_low, rank1_high),
        minp_delta=float(deltas[2].mean()),
        minp_delta_interval=(minp_low, minp_high),
        rank1_lost=lost,
        rank1_gained=gained,
        top10_overlap=float(np.mean(shared)),
        newly_accepted=len(np.setdiff1d(after.accepted, before.accepted, assume_unique=True)),
        newly_rejected=len(np.setdiff1d(before.accepted, after.accepted, assume_unique=True)),
    )


def _leftmost(rows: Ints, count: int) -> Ints:
    """The first `count` of each row's entries that are not -1 [Q, count], padded with -1."""
    order = np.argsort(rows < 0, axis=1, kind="stable")[:, :count]
    kept = np.take_along_axis(rows, order, 1)
    return np.pad(kept, ((0, 0), (0, count - kept.shape[1])), constant_values=-1)

"""Do two backends rank a gallery alike? First items that turned, overlap of the first ten, order of the first fifty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.errors import UserError
from pmm.metrics import QUERIES_AT_ONCE, distance_matrix
from pmm.parity.labels import Bools, Embedded, Floats, Ints, Labels

OVERLAP_ITEMS = 10
ORDER_ITEMS = 50


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


def ranking_parity(reference: Embedded, candidate: Embedded, labels: Labels) -> RankingParity:
    """Compare rankings by Euclidean distance, without junk, ties by gallery index, as `evaluate_ranking` has them.

    Only a block of queries' distances is in memory, and one side's gallery in float64.

    Raises:
        UserError: shapes that do not fit, NaN or Inf, no query with a relevant gallery item.
    """
    for name, embedded in (("reference", reference), ("candidate", candidate)):
        labels.check(embedded, name)
    queries = np.arange(len(labels.query_pids))
    firsts: list[tuple[Ints, Floats]] = []  # of the reference, per query: items and their distances
    for row in _rows(reference, labels, queries):
        items = _first(row.distances, ORDER_ITEMS)
        firsts.append((items, row.distances[items]))
    lost = gained = changed = 0
    overlaps, taus = [], []
    for (items, distances), row in zip(firsts, _rows(candidate, labels, queries), strict=True):
        if not row.relevant.any():
            continue
        found = _first(row.distances, OVERLAP_ITEMS)
        right_before, right = row.relevant[items[0]], row.relevant[found[0]]
        lost += int(right_before and not right)
        gained += int(right and not right_before)
        changed += int(items[0] != found[0])
        overlaps.append(len(np.intersect1d(items[:OVERLAP_ITEMS], found)) / len(found))
        taus.append(kendall_tau_b(distances, row.distances[items]))
    if not overlaps:
        raise UserError("no query has a relevant gallery item (same identity, another camera); nothing to rank")
    return RankingParity(
        queries=len(overlaps),
        rank1_lost=lost,
        rank1_gained=gained,
        top1_changed=changed,
        top10_overlap=float(np.mean(overlaps)),
        kendall_tau=float(np.mean(taus)),
    )


def first_items(embedded: Embedded, labels: Labels, queries: Sequence[int] | Ints, count: int) -> Ints:
    """Gallery indices [n, count] that rank first for n of the queries, without junk; -1 where there are no more."""
    labels.check(embedded, "given")
    found = np.full((len(queries), count), -1)
    for row, place in zip(_rows(embedded, labels, np.asarray(queries, np.int64)), found, strict=True):
        items = _first(row.distances, count)
        place[: len(items)] = items
    return found


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


class _Row(NamedTuple):
    distances: npt.NDArray[np.float64]
    """Of one query to the gallery, squared [G]; infinite for junk."""
    relevant: Bools
    """[G]"""


def _rows(embedded: Embedded, labels: Labels, queries: Ints) -> Iterator[_Row]:
    """One row per query. In blocks of the size that `evaluate_ranking` takes, whose last digits are then the same: what
    it calls first is first here."""
    gallery = np.asarray(embedded.gallery, np.float64)
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        block = queries[start : start + QUERIES_AT_ONCE]
        distances = distance_matrix(np.asarray(embedded.query)[block], gallery, "euclidean")
        relevant, junk = labels.masks(block)
        distances[junk] = np.inf
        yield from map(_Row, distances, relevant)


def _first(distances: npt.NDArray[np.float64], count: int) -> Ints:
    """Indices of the `count` least finite ones of `distances` [G], or of all if there are fewer; ties by index."""
    # all that tie with the last one stay until the stable sort: a partition alone takes any of them
    last = min(count, len(distances)) - 1
    items = np.flatnonzero(distances <= np.partition(distances, last)[last])
    items = items[np.argsort(distances[items], kind="stable")][:count]
    return items[np.isfinite(distances[items])]

"""Did retrieval survive? Deltas of mAP, Rank-1 and mINP with a paired bootstrap, per camera, and the worst queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pmm.evaluation.metrics import RankingResult
from pmm.evaluation.parity.labels import Labels
from pmm.utils.errors import InvalidInput

DRAWS_AT_ONCE = 1 << 20
"""Queries that the bootstrap draws at once: 8 MiB."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The candidate's figure minus the reference's; below 0 is a loss."""

    value: float
    interval: tuple[float, float]
    """Percentile interval of the paired bootstrap, at 95 %. A few dozen queries make it too narrow."""


@dataclass(frozen=True, kw_only=True)
class CameraParity:
    """The queries of one camera."""

    camid: int
    queries: int
    """Evaluable ones."""
    mAP: float  # noqa: N815
    """The candidate's."""
    map_delta: float


@dataclass(frozen=True, kw_only=True, eq=False)
class RetrievalParity:
    """How a candidate's retrieval differs from the reference's, over the queries that both evaluated."""

    map_delta: Delta
    rank1_delta: Delta
    minp_delta: Delta
    cameras: tuple[CameraParity, ...]
    """By camid, those with an evaluable query."""
    ap_deltas: npt.NDArray[np.float64]
    """Per query [Q]; NaN for a skipped one."""

    def worst(self, count: int) -> tuple[int, ...]:
        """Queries that lost most AP, at most `count` and none that lost nothing, the worst first, ties by index."""
        order = np.argsort(self.ap_deltas, kind="stable")[:count]  # NaN comes last
        return tuple(int(query) for query in order if self.ap_deltas[query] < 0)


def retrieval_parity(
    reference: RankingResult, candidate: RankingResult, labels: Labels, *, seed: int = 0, resamples: int = 10_000
) -> RetrievalParity:
    """Compare two results of `evaluate_ranking` query by query.

    The bootstrap draws evaluable queries with replacement, for both sides the same ones, so that what makes a query
    hard for both cancels (Efron & Tibshirani, An Introduction to the Bootstrap, 13.3).

    Raises InvalidInput if the two did not evaluate the same queries, those of `labels`.
    """
    evaluated = np.isfinite(reference.per_query_ap)
    if not len(evaluated) == len(candidate.per_query_ap) == len(labels.query_camids):
        raise InvalidInput(
            f"the reference ranked {len(evaluated)} queries, the candidate {len(candidate.per_query_ap)}, "
            f"and the labels have {len(labels.query_camids)}",
            expected="the same queries",
        )
    if (evaluated != np.isfinite(candidate.per_query_ap)).any():
        raise InvalidInput("reference and candidate skipped different queries", hint="rank both with the same labels")
    ap_deltas = candidate.per_query_ap - reference.per_query_ap
    rank1_deltas = (candidate.first_rank == 1).astype(float) - (reference.first_rank == 1)
    minp_deltas = candidate.per_query_inp - reference.per_query_inp
    deltas = np.stack([ap_deltas, rank1_deltas, minp_deltas])[:, evaluated]
    intervals = paired_bootstrap(deltas, seed=seed, resamples=resamples)
    map_delta, rank1_delta, minp_delta = (
        Delta(value=float(value), interval=(float(low), float(high)))
        for value, (low, high) in zip(deltas.mean(1), intervals, strict=True)
    )
    cameras = []
    for camid in np.unique(labels.query_camids[evaluated]):
        of_camera = evaluated & (labels.query_camids == camid)
        cameras.append(
            CameraParity(
                camid=int(camid),
                queries=int(of_camera.sum()),
                mAP=float(candidate.per_query_ap[of_camera].mean()),
                map_delta=float(ap_deltas[of_camera].mean()),
            )
        )
    return RetrievalParity(
        map_delta=map_delta,
        rank1_delta=rank1_delta,
        minp_delta=minp_delta,
        cameras=tuple(cameras),
        ap_deltas=ap_deltas,
    )


def paired_bootstrap(
    deltas: npt.NDArray[np.float64], *, seed: int = 0, resamples: int = 10_000
) -> npt.NDArray[np.float64]:
    """Percentile interval, at 95 %, of the mean of each row of `deltas` [K, N]: low and high [K, 2].

    The N columns (queries) are drawn together, with replacement, for all rows.
    """
    rng, count = np.random.default_rng(seed), deltas.shape[1]
    means = np.empty((len(deltas), resamples))
    at_once = max(1, DRAWS_AT_ONCE // count)
    for start in range(0, resamples, at_once):
        drawn = rng.integers(0, count, (min(at_once, resamples - start), count))
        for row, row_means in zip(deltas, means, strict=True):
            row_means[start : start + len(drawn)] = row[drawn].mean(1)
    return np.percentile(means, [2.5, 97.5], axis=1).T

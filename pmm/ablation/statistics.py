"""Statistics of a few runs per row: mean and spread, and the difference of two rows over their common seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pmm.bench.result_schema import Interval

CONFIDENCE = 0.95
SAME = 1e-12
"""Differences within this are equal: figures are fractions, rounded at 1e-16."""
NOT_SIGNIFICANT = "no significant difference"
ONE_SEED = "one seed: no interval"
NO_SPREAD = "no spread: no interval"
NO_COMMON_SEED = "no common seed"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one figure over the seeds of a row."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of the sample (with n - 1); None for one seed."""
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of one figure between two rows, over the seeds that both finished."""

    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    mean: float | None
    interval: Interval | None
    """Paired t-interval at 95 %; None where there is none, for the reason in `reading`."""
    reading: str
    """higher, lower, no significant difference, or why there is no interval."""


def spread(values: Sequence[float]) -> Spread | None:
    """None if there is no value."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(n=len(values), mean=statistics.fmean(values), sd=sd, min=min(values), max=max(values))


def difference(row: Mapping[int, float], against: Mapping[int, float]) -> Difference:
    """`row` minus `against` (both seed -> figure), paired by seed.

    The interval holds if the differences of all seeds there could be are normally distributed: mean +- t sd / sqrt(n),
    t the quantile of Student's distribution with n - 1 degrees of freedom (Student, 1908).
    """
    seeds = tuple(sorted(row.keys() & against.keys()))
    values = tuple(row[seed] - against[seed] for seed in seeds)
    if not values:
        return Difference(seeds=(), per_seed=(), mean=None, interval=None, reading=NO_COMMON_SEED)
    mean, interval = statistics.fmean(values), mean_interval(values)
    return Difference(seeds=seeds, per_seed=values, mean=mean, interval=interval, reading=_reading(values, interval))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The 95 % confidence interval of the mean of the distribution that `values` were drawn from.

    None for a single value, and for values that are all equal: their sd is 0 because the figure is coarse (rank-1 of
    few queries, for example), and an interval without width would claim certainty.
    """
    if len(values) < 2 or max(values) - min(values) <= SAME:
        return None
    from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats has it too, and takes a second to load

    mean = statistics.fmean(values)
    reach = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def _reading(values: Sequence[float], interval: Interval | None) -> str:
    if interval is not None:
        return NOT_SIGNIFICANT if interval[0] <= 0 <= interval[1] else "higher" if interval[0] > 0 else "lower"
    if len(values) == 1:
        return ONE_SEED
    return NOT_SIGNIFICANT if max(map(abs, values)) <= SAME else NO_SPREAD

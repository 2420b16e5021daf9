"""What a handful of runs per row say: mean and spread, and the difference of two rows that share their seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pmm.bench.schema import Interval

CONFIDENCE = 0.95
SAME = 1e-12
"""Differences that lie no further apart than this are equal: figures are fractions, rounded at 1e-16."""
NOT_TOLD_APART = "not told apart"
ONE_SEED = "one seed: no interval"
NO_SPREAD = "no spread: no interval"
NOTHING = "no seed in common"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Of one figure over the seeds of a row."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of the sample (n - 1 below the root); None for one seed."""
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one figure between a row and another, over the seeds that both finished."""

    seeds: tuple[int, ...]
    per_seed: tuple[float, ...]
    mean: float | None
    interval: Interval | None
    """Paired t-interval at 95 %; None where none can be given, and `reading` says why."""
    reading: str
    """higher, lower, or why neither can be said."""


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
        return Difference(seeds=(), per_seed=(), mean=None, interval=None, reading=NOTHING)
    mean, interval = statistics.fmean(values), mean_interval(values)
    return Difference(seeds=seeds, per_seed=values, mean=mean, interval=interval, reading=_reading(values, interval))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Where the mean of what `values` were drawn from lies, at 95 %.

    None for a single value, and for values that are all equal: their sd is 0 by the coarseness of the figure (a rank-1
    of few queries, say), and an interval without width would claim to know.
    """
    if len(values) < 2 or max(values) - min(values) <= SAME:
        return None
    mean = statistics.fmean(values)
    reach = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - reach, mean + reach


def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t with `freedom` (1, 2, ...) degrees of freedom lies with `probability`.

    The distribution function is a finite sum of powers of cos(atan(t / sqrt(freedom))); it is inverted by bisection, to
    the last bits. Raises ValueError for a probability outside 0..1, both excluded, or no degree of freedom.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"no quantile at {probability} with {freedom} degrees of freedom")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _between(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _between(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle)): Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine * cosine * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def _reading(values: Sequence[float], interval: Interval | None) -> str:
    if interval is not None:
        return NOT_TOLD_APART if interval[0] <= 0 <= interval[1] else "higher" if interval[0] > 0 else "lower"
    if len(values) == 1:
        return ONE_SEED
    return NOT_TOLD_APART if max(map(abs, values)) <= SAME else NO_SPREAD

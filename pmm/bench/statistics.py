"""Statistics of latency samples, and their reliability: percentiles, ratios, drift, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pmm.bench.result_schema import Interval

Samples = npt.NDArray[np.float64]

INTERVAL_ROUNDS = 6  # fewer do not give a median a two-sided 95 % interval
TAIL = 0.025  # of each side of an interval

DRIFT = 0.05
"""Largest relative change from the first turn to the last, by the trend of the turns' medians."""
DRIFT_CHANCE = 0.005
"""Significance level of a trend: steady times show an equally clear one at most this often."""
DRIFT_TURNS = 7
"""Fewer turns cannot show a trend at this level, even if each is slower than the one before."""
TURN_OFF, TURNS_OFF = 0.15, 0.1
"""Largest relative distance of a turn's median from the median of all turns; largest share of turns beyond it. On an
idle virtual machine about one turn in a hundred is beyond it."""
SPREAD = 0.2
"""Largest distance of the quartiles of all samples, relative to the median."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Samples of one step in order, in ms."""

    samples_ms: tuple[float, ...]
    turns_s: tuple[float, ...] = ()
    """When each turn began, seconds after the first turn of all steps."""

    @property
    def p50(self) -> float:
        """Median (nearest rank), ms."""
        return percentile(self.samples_ms, 50)


@dataclass(frozen=True)
class Ratio:
    """The ratio of two steps' median times, and its 95 % interval if there are enough rounds."""

    value: float
    interval: Interval | None

    def times(self, factor: float) -> Ratio:
        """The ratio per unit of work, if the first step does 1 / `factor` of the other's work."""
        bounds = (self.interval[0] * factor, self.interval[1] * factor) if self.interval else None
        return Ratio(self.value * factor, bounds)


def percentile(samples: Sequence[float] | Samples, percent: float) -> float:
    """The sample of nearest rank, as in MLPerf LoadGen: the least that more than `percent` % of all do not exceed.

    Where `percent` % of all is a whole number of samples, this is the next one above (for p50: the upper median).
    """
    return float(np.sort(samples)[_rank(len(samples), percent) - 1])


def percentile_interval(samples: Sequence[float] | Samples, percent: float) -> Interval | None:
    """The two samples that are the 95 % interval of the distribution's percentile, for any distribution.

    Each side errs in at most 2.5 % of all cases, exactly, for independent samples. None with too few samples: below 6
    for the median, 36 for p90, 72 for p95, 368 for p99.
    """
    ranks = _interval_ranks(len(samples), percent)
    if ranks is None:
        return None
    ordered = np.sort(samples)
    return float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1])


def median_ratio(above: Latency, below: Latency, *, block: int, seed: int = 0, resamples: int = 2000) -> Ratio:
    """Median of `above` divided by median of `below`, both from one `measure` with turns of `block` samples.

    Over the rounds that both have, so that drift of the machine cancels. The interval is a bootstrap over these rounds;
    there is none with fewer than 6.
    """
    rounds = [np.array(x.samples_ms).reshape(-1, block) for x in (above, below)]
    shared = min(map(len, rounds))
    rounds = [samples[:shared] for samples in rounds]
    value = percentile(rounds[0].ravel(), 50) / percentile(rounds[1].ravel(), 50)
    if shared < INTERVAL_ROUNDS:
        return Ratio(value, None)
    drawn_rounds = np.random.default_rng(seed).integers(0, shared, (resamples, shared))
    medians = []
    for samples in rounds:
        drawn = samples[drawn_rounds].reshape(resamples, -1)
        middle = _rank(drawn.shape[1], 50) - 1
        medians.append(np.partition(drawn, middle, axis=1)[:, middle])
    low, high = np.quantile(medians[0] / medians[1], [TAIL, 1 - TAIL])
    return Ratio(value, (float(low), float(high)))


def stability_flags(
    samples_ms: Sequence[float],
    turns_s: Sequence[float],
    *,
    block: int,
    steady: bool = True,
    warmup_s: float = 0.0,
) -> tuple[str, ...]:
    """Why the median of `samples_ms`, taken in turns of `block` that began at `turns_s`, is unreliable: a line for each
    reason, () for none. `steady`: the warm-up of `warmup_s` seconds ended because the runs no longer changed.
    """
    if min(samples_ms) <= 0:
        return ("too short: the clock measures some samples as 0 ms",)
    turns = np.median(np.reshape(samples_ms, (-1, block)), axis=1)
    flags = (
        None if steady else f"not steady: still changing after {warmup_s:.1f} s of warm-up",
        _drift(turns, np.asarray(turns_s)),
        _noise(np.asarray(samples_ms), turns),
    )
    return tuple(line for line in flags if line)


def _drift(turns: Samples, began: Samples) -> str | None:
    """Mann and Kendall's test for a trend of the turns' medians, and Theil and Sen's slope of their logarithms for its
    size. Both compare pairs of turns only, so that a few outliers do not make a trend.
    """
    every = math.ceil(len(turns) / 1000)  # the number of pairs is quadratic
    turns, began = turns[::every], began[::every]
    n = len(turns)
    if n < DRIFT_TURNS:
        return None
    earlier, later = np.triu_indices(n, 1)
    rises = np.log(turns[later] / turns[earlier])
    score = max(abs(np.sign(rises).sum()) - 1, 0) / math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    slope = float(np.median(rises / (began[later] - began[earlier])))
    change = math.expm1(slope * (began[-1] - began[0]))
    if math.erfc(score / math.sqrt(2)) > DRIFT_CHANCE or abs(change) <= DRIFT:
        return None
    return f"drifts: {100 * abs(change):.0f} % {'slower' if change > 0 else 'faster'} at the end than at the start"


def _noise(samples: Samples, turns: Samples) -> str | None:
    """Of the machine from turn to turn, else from sample to sample."""
    off = int((abs(turns / np.median(turns) - 1) > TURN_OFF).sum())
    if off >= 2 and off > TURNS_OFF * len(turns):
        ends = f"they range from {turns.min():.3g} to {turns.max():.3g} ms"
        return f"noisy: the medians of {off} of {len(turns)} turns are more than {100 * TURN_OFF:.0f} % off; {ends}"
    low, middle, high = (percentile(samples, percent) for percent in (25, 50, 75))
    if high - low > SPREAD * middle:
        return f"noisy: the middle half of the samples ranges from {low:.3g} to {high:.3g} ms"
    return None


def _rank(n: int, percent: float) -> int:
    """Rank of a percentile among n samples, 1..n."""
    return int(n * (percent / 100)) + 1  # LoadGen's arithmetic; the product is whole where the true one is


@lru_cache
def _interval_ranks(n: int, percent: float) -> tuple[int, int] | None:
    """Ranks (1..n) of the samples that bound the percentile's interval; None if there are too few samples.

    The percentile lies below the sample of rank r with the probability that fewer than r of n samples lie below it,
    which is binomial (David & Nagaraja, Order Statistics, 7.1).
    """
    from scipy.special import bdtrik  # what scipy.stats.binom.ppf rounds up; that takes a second to load

    share = percent / 100
    low, high = math.ceil(bdtrik(TAIL, n, share)), n + 1 - math.ceil(bdtrik(TAIL, n, 1 - share))
    return (low, high) if low >= 1 and high <= n else None

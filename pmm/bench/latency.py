"""Latency of steps that are already bound to their input: warmed up, interleaved in random blocks, raw samples kept."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

INTERVAL_ROUNDS = 6  # fewer do not give a median a two-sided 95 % interval
P90_SAMPLES = 36  # fewer do not give the 90th percentile a two-sided 95 % interval


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """How long to measure. Times in seconds."""

    warmup: float = 0.5
    """Of warm-up per step."""
    warmup_runs: int = 3
    """Runs of warm-up per step, at least."""
    samples: int = 200
    """Samples per step."""
    block: int = 10
    """Samples of one step in a row, before another step's turn."""
    settle: float = 0.05
    """Not counted at the start of a turn: other steps have left their data in the caches and their threads spinning."""
    lead: int = 1
    """Runs that are not counted at the start of a turn, at least."""
    budget: float = 10.0
    """Most time for one step; past it a step ends with the samples it has, but never without a full block."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Samples of one step in the order taken, in ms."""

    samples_ms: tuple[float, ...]

    @property
    def p50(self) -> float:
        """Median, ms."""
        return float(np.median(self.samples_ms))

    @property
    def p90(self) -> float | None:
        """90th percentile (nearest rank), ms; None with fewer than 36 samples."""
        if len(self.samples_ms) < P90_SAMPLES:
            return None
        return float(np.quantile(self.samples_ms, 0.9, method="inverted_cdf"))

    def per_second(self, batch: int) -> float:
        """Images per second of back-to-back runs on batches of `batch` images."""
        return batch * len(self.samples_ms) * 1000 / sum(self.samples_ms)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one step takes as another: the ratio of the medians, and its 95 % interval if there is."""

    value: float
    interval: tuple[float, float] | None

    def times(self, factor: float) -> Ratio:
        """Per unit of work, where the first step does 1 / `factor` of the other's."""
        bounds = (self.interval[0] * factor, self.interval[1] * factor) if self.interval else None
        return Ratio(self.value * factor, bounds)


def median_ratio(above: Latency, below: Latency, *, block: int, seed: int = 0, resamples: int = 2000) -> Ratio:
    """Median of `above` over median of `below`, both from one `measure` with turns of `block` samples.

    The interval is a bootstrap over rounds, paired where both took part, so that drift of the machine cancels; none
    with fewer than 6 rounds of either.
    """
    rounds = [np.array(x.samples_ms).reshape(-1, block) for x in (above, below)]
    value = above.p50 / below.p50
    shared = min(map(len, rounds))
    if shared < INTERVAL_ROUNDS:
        return Ratio(value, None)
    rng = np.random.default_rng(seed)
    paired = rng.integers(0, shared, (resamples, shared))
    medians = []
    for found in rounds:
        rest = (
            rng.integers(shared, len(found), (resamples, len(found) - shared)) if len(found) > shared else paired[:, :0]
        )
        medians.append(np.median(found[np.hstack([paired, rest])].reshape(resamples, -1), axis=1))
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    return Ratio(value, (float(low), float(high)))


def measure(
    steps: Mapping[str, Callable[[], object]],
    plan: LatencyPlan,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Latency]:
    """Time each of `steps` (a call that returns when its result is complete) by the host clock, or by `stopwatch`,
    which runs a step and returns its ms.

    Steps take turns in blocks of random order, so that a machine that slows down slows all of them.
    """
    timed = stopwatch or partial(_by_clock, clock)
    for step in steps.values():
        _run(step, plan.warmup_runs, plan.warmup, clock)
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    waiting = list(steps)
    while waiting:
        order.shuffle(waiting)
        for name in waiting:
            begin = clock()
            _run(steps[name], plan.lead, plan.settle, clock)
            for _ in range(plan.block):
                samples[name].append(timed(steps[name]))
            spent[name] += clock() - begin
        waiting = [n for n in waiting if len(samples[n]) < plan.samples and spent[n] < plan.budget]
    return {name: Latency(samples_ms=tuple(values)) for name, values in samples.items()}


def _by_clock(clock: Callable[[], float], step: Callable[[], object]) -> float:
    start = clock()
    step()
    return (clock() - start) * 1000


def _run(step: Callable[[], object], least: int, seconds: float, clock: Callable[[], float]) -> None:
    """Run `step` at least `least` times and for `seconds`."""
    runs, begin = 0, clock()
    while runs < least or clock() - begin < seconds:
        step()
        runs += 1

"""Latency of steps that are already bound to their input: warmed up, interleaved in random blocks, raw samples kept."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

P90_SAMPLES = 36  # fewer do not give the 90th percentile a two-sided 95 % interval


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """How long to measure. Times in seconds."""

    warmup: float = 0.5
    """Of warm-up per step, and at least three runs."""
    samples: int = 200
    """Samples per step."""
    block: int = 10
    """Samples of one step in a row, before another step's turn."""
    settle: float = 0.05
    """Not counted at the start of a turn: other steps have left their data in the caches and their threads spinning."""
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


def measure(
    steps: Mapping[str, Callable[[], None]],
    plan: LatencyPlan,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Latency]:
    """Time each of `steps` (a call that returns when its result is complete), host clock.

    Steps take turns in blocks of random order, so that a machine that slows down slows all of them.
    """
    for step in steps.values():
        _run(step, 3, plan.warmup, clock)
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    waiting = list(steps)
    while waiting:
        order.shuffle(waiting)
        for name in waiting:
            begin = clock()
            _run(steps[name], 1, plan.settle, clock)
            for _ in range(plan.block):
                start = clock()
                steps[name]()
                samples[name].append((clock() - start) * 1000)
            spent[name] += clock() - begin
        waiting = [n for n in waiting if len(samples[n]) < plan.samples and spent[n] < plan.budget]
    return {name: Latency(samples_ms=tuple(values)) for name, values in samples.items()}


def _run(step: Callable[[], None], least: int, seconds: float, clock: Callable[[], float]) -> None:
    """Run `step` at least `least` times and for `seconds`."""
    runs, begin = 0, clock()
    while runs < least or clock() - begin < seconds:
        step()
        runs += 1

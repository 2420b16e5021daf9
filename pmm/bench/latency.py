"""Latency of steps that are bound to their input: warm-up, interleaved blocks in random order, all raw samples."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from pmm.bench.statistics import Latency
from pmm.runtime.base import BoundRun

STEADY = 0.05
"""Warm-up continues while the medians of its last third and the third before differ by more than this, relatively."""

Clock = Callable[[], float]
Stopwatch = Callable[[Callable[[], object]], float]


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """How long to measure. Times in seconds."""

    warmup: float = 0.5
    """Least warm-up per step."""
    warmup_runs: int = 3
    """Fewest runs of warm-up per step."""
    warmup_limit: float = 0.0
    """Longest warm-up per step while it is not steady; without effect below `warmup`."""
    samples: int = 200
    """Samples per step, up to a full block."""
    block: int = 10
    """Samples of one step in a row, before another step's turn."""
    settle: float = 0.05
    """Time at the start of a turn that is not counted: caches and threads are still busy with the other steps."""
    lead: int = 1
    """Fewest runs at the start of a turn that are not counted."""
    budget: float = 10.0
    """Most time for one step, which then ends with the samples it has, but at least one block."""


class WarmUp(NamedTuple):
    """The result of a warm-up."""

    seconds: float
    steady: bool
    """It ended because the runs no longer changed, not at its time limit."""
    run_ms: float
    """Median of the last third of the runs."""


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """The results of steps that took turns."""

    latencies: dict[str, Latency]
    """Of the steps without a failure."""
    failures: dict[str, Exception]
    """The exceptions of the other steps."""


def measure(
    steps: Mapping[str, Callable[[], object]],
    plan: LatencyPlan,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Latency]:
    """Time each of `steps` (a call that returns when its result is complete) by the host clock, or by `stopwatch`,
    which runs a step and returns its ms.

    Steps take turns in blocks of random order, so that a machine that slows down slows all of them.
    """
    for step in steps.values():
        warm_up(step, plan, clock)
    turns = {name: partial(run_turn, step, plan, clock, stopwatch) for name, step in steps.items()}
    return interleave(turns, plan, seed=seed, clock=clock).latencies


def interleave(
    turns: Mapping[str, Callable[[], Sequence[float]]],
    plan: LatencyPlan,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    drop: type[Exception] | tuple[type[Exception], ...] = (),
) -> Interleaved:
    """Let steps take turns: each call of `turns` runs one and returns a block of samples in ms. Rounds have random
    order.

    A step ends with `plan.samples` samples, after `plan.budget` seconds of its turns, or with a turn that raises one of
    `drop`; the others go on. Any other exception ends them all.
    """
    order = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in turns}
    began: dict[str, list[float]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    failures: dict[str, Exception] = {}
    waiting, first = list(turns), clock()
    while waiting:
        order.shuffle(waiting)
        for name in waiting:
            begin = clock()
            try:
                samples[name] += turns[name]()
            except drop as error:
                failures[name] = error
            began[name].append(begin - first)
            spent[name] += clock() - begin
        waiting = [
            n for n in waiting if n not in failures and len(samples[n]) < plan.samples and spent[n] < plan.budget
        ]
    latencies = {
        name: Latency(samples_ms=tuple(samples[name]), turns_s=tuple(began[name]))
        for name in turns
        if name not in failures
    }
    return Interleaved(latencies=latencies, failures=failures)


def run_turn(
    step: Callable[[], object],
    plan: LatencyPlan,
    clock: Clock = time.perf_counter,
    stopwatch: Stopwatch | None = None,
) -> list[float]:
    """A turn of `step`: a start that is not counted, then a block of samples in ms (see `measure`)."""
    _run(step, plan.lead, plan.settle, clock)
    timed = stopwatch or partial(_by_clock, clock)
    return [timed(step) for _ in range(plan.block)]


def warm_up(step: Callable[[], object], plan: LatencyPlan, clock: Clock = time.perf_counter) -> WarmUp:
    """Run `step` until it is steady: the median of the last third of the runs is that of the third before, within 5 %.

    At least `plan.warmup` seconds and `plan.warmup_runs` runs; after `plan.warmup_limit` seconds it ends in any case.
    """
    runs: list[float] = []
    begin, next_look = clock(), 0.0
    while True:
        start = clock()
        step()
        now = clock()
        runs.append(now - start)
        spent = now - begin
        if len(runs) < plan.warmup_runs or spent < max(plan.warmup, next_look):
            continue
        steady = _steady(runs)
        if steady or spent >= plan.warmup_limit:
            return WarmUp(spent, steady, 1000 * float(np.median(runs[-max(1, len(runs) // 3) :])))
        next_look = min(1.2 * spent, plan.warmup_limit)  # not after each run: there may be many thousands


def throughput(
    step: BoundRun, *, batch: int, in_flight: int, seconds: float, clock: Clock = time.perf_counter
) -> float:
    """Images per second of wall time, `batch` per call: up to `in_flight` calls are submitted, then waited for, and so
    on for `seconds`. The first group is not counted. A group ends early when the time is over, for slow calls.
    """
    _submit(step, in_flight, clock() + seconds, clock)
    calls, begin = 0, clock()
    end = begin
    while not calls or end - begin < seconds:
        calls += _submit(step, in_flight, begin + seconds, clock)
        end = clock()
    return batch * calls / (end - begin)


def _submit(step: BoundRun, most: int, until: float, clock: Clock) -> int:
    """Submit calls, at least one and at most `most` before the time `until`, and wait for them; returns how many."""
    calls = 0
    while not calls or (calls < most and clock() < until):
        step.enqueue()
        calls += 1
    step.wait()
    return calls


def _steady(runs: Sequence[float]) -> bool:
    third = len(runs) // 3
    if not third:
        return False
    before, last = np.median(runs[-2 * third : -third]), np.median(runs[-third:])
    return bool(abs(last - before) <= STEADY * before)


def _by_clock(clock: Clock, step: Callable[[], object]) -> float:
    start = clock()
    step()
    return (clock() - start) * 1000


def _run(step: Callable[[], object], least: int, seconds: float, clock: Clock) -> None:
    """Run `step` at least `least` times and for `seconds`."""
    runs, begin = 0, clock()
    while runs < least or clock() - begin < seconds:
        step()
        runs += 1

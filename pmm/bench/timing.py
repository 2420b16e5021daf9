"""Time all backends at one batch size: warm them up, then run blocks of calls of each in turn, in random order."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pmm.bench.latency import Clock, LatencyPlan, interleave
from pmm.bench.result_schema import Estimate, Timing
from pmm.bench.statistics import Latency, median_ratio, percentile, percentile_interval, stability_flags
from pmm.bench.workers import WorkerFailed, WorkerProcess

BLOCK_MS = 400.0
"""A block of the slowest backend takes no longer, if it holds more than one sample."""
IN_FLIGHT = {"cpu": 1, "cuda": 8}
"""Calls submitted at once for the throughput; a CPU is busy with one."""
BIND_SHARE, TURNS_SHARE, EXTRAS_SHARE = 0.2, 0.5, 0.3
"""Of the work on one backend, for the progress: to bind and warm up, to take turns, to measure the rest."""
TAILS = (50, 90, 95, 99)


@dataclass(frozen=True)
class BatchTimings:
    """Timings and failures at one batch size, by name of the result."""

    timings: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Why the backend could not run at this batch size; its worker is still alive."""
    crashed: dict[str, str] = field(default_factory=dict)
    """Why the worker ended."""
    min_cosine: dict[str, float] = field(default_factory=dict)
    """Least cosine of an embedding in this batch with the same crop's in a batch of 64."""
    norm_error: dict[str, float] = field(default_factory=dict)
    """Largest relative difference of their norms."""


def time_batch(
    workers: Mapping[str, tuple[WorkerProcess, str]],
    paths: Sequence[Path],
    plan: LatencyPlan,
    *,
    reference: str,
    extras_s: float,
    advance: Callable[[str, float], None],
    clock: Clock = time.perf_counter,
) -> BatchTimings:
    """Time one batch, the images of `paths`, on all `workers`.

    Args:
        workers: worker and its device, cpu or cuda, per name.
        reference: name of the result that speedups are relative to.
        extras_s: seconds each for throughput, device times and end to end.
        advance: called with a name and the share of its work that is done.
        clock: of the beginnings of turns and the time budgets.
    """
    timer = _BatchTimer(workers, paths, advance)
    slowest_ms = timer.bind(plan)
    plan = dataclasses.replace(plan, block=max(1, min(plan.block, int(BLOCK_MS / slowest_ms))))
    latencies = timer.take_turns(plan, clock)
    base = latencies.get(reference)
    for name, latency in latencies.items():
        speedup = _speedup(base, latency, plan.block) if base and name != reference else None
        timer.finish(name, latency, plan.block, speedup, extras_s)
    return timer.found


class _BatchTimer:
    """The workers at one batch size, and what was found so far."""

    def __init__(
        self,
        workers: Mapping[str, tuple[WorkerProcess, str]],
        paths: Sequence[Path],
        advance: Callable[[str, float], None],
    ) -> None:
        """Arguments as `time_batch`."""
        self._workers, self._advance = workers, advance
        self._batch, self._files = len(paths), [str(path) for path in paths]
        self._bound: dict[str, dict[str, Any]] = {}
        self.found = BatchTimings()

    def bind(self, plan: LatencyPlan) -> float:
        """Bind the images and warm up; returns the time of one run of the slowest backend, ms."""
        for name, (worker, _) in self._workers.items():
            try:
                bound = worker.call("bind", paths=self._files, plan=dataclasses.asdict(plan))
            except WorkerFailed as error:
                (self.found.refused if worker.alive else self.found.crashed)[name] = str(error)
            else:
                self._bound[name] = bound
                self.found.min_cosine[name], self.found.norm_error[name] = bound["min_cosine"], bound["norm_error"]
            self._advance(name, BIND_SHARE)
        return max((bound["run_ms"] for bound in self._bound.values()), default=BLOCK_MS)

    def take_turns(self, plan: LatencyPlan, clock: Clock) -> dict[str, Latency]:
        """The samples of all that are bound, in turns; those that crash are left out."""
        settings = dataclasses.asdict(plan)

        def turn(name: str) -> list[float]:
            self._advance(name, TURNS_SHARE * plan.block / plan.samples)
            return self._workers[name][0].call("turn", batch=self._batch, plan=settings)

        turns = {name: partial(turn, name) for name in self._bound}
        interleaved = interleave(turns, plan, seed=self._batch, clock=clock, drop=WorkerFailed)
        self.found.crashed.update({name: str(error) for name, error in interleaved.failures.items()})
        return interleaved.latencies

    def finish(self, name: str, latency: Latency, block: int, speedup: Estimate | None, extras_s: float) -> None:
        """Measure throughput, device times and end to end, and put all figures of `name` together."""
        worker, device = self._workers[name]
        try:
            extras = {
                "images_per_s": worker.call(
                    "throughput", batch=self._batch, in_flight=IN_FLIGHT[device], seconds=extras_s
                ),
                **worker.call("device_times", batch=self._batch, seconds=extras_s),
                **worker.call("end_to_end", paths=self._files, seconds=extras_s),
            }
        except WorkerFailed as error:
            self.found.crashed[name] = str(error)
            return
        bound, samples = self._bound[name], tuple(round(value, 4) for value in latency.samples_ms)
        warm_up = {key: bound[key] for key in ("warmup_s", "steady")}
        self.found.timings[name] = Timing(
            batch=self._batch,
            samples_ms=samples,
            block=block,
            turns_s=tuple(round(value, 3) for value in latency.turns_s),
            speedup=speedup,
            in_flight=IN_FLIGHT[device],
            profile=bound["profile"],
            flags=stability_flags(samples, latency.turns_s, block=block, **warm_up),
            **warm_up,
            **_percentiles(samples),
            **extras,
        )
        self._advance(name, EXTRAS_SHARE)


def _percentiles(samples: Sequence[float]) -> dict[str, Any]:
    """The fields p50_ms, p50_interval_ms, ...: those without an interval are None, but for the median."""
    fields: dict[str, Any] = {}
    for percent in TAILS:
        interval = fields[f"p{percent}_interval_ms"] = percentile_interval(samples, percent)
        enough = interval is not None or percent == 50
        fields[f"p{percent}_ms"] = percentile(samples, percent) if enough else None
    return fields


def _speedup(reference: Latency, latency: Latency, block: int) -> Estimate:
    ratio = median_ratio(reference, latency, block=block)
    return Estimate(value=ratio.value, interval=ratio.interval)

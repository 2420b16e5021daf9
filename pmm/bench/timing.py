"""Time all backends at one batch size: warm them up, then run blocks of calls of each in turn, in random order."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
TAILS = (50, 90, 95, 99)


@dataclass(frozen=True)
class BatchTimings:
    """Timings and failures at one batch size, by name of the result."""

    timings: dict[str, Timing]
    refused: dict[str, str]
    """Why the backend could not run at this batch size; its worker is still alive."""
    crashed: dict[str, str]
    """Why the worker ended."""
    min_cosine: dict[str, float]
    """Least cosine of an embedding in this batch with the same crop's in a batch of 64."""
    norm_error: dict[str, float]
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
    batch, files = len(paths), [str(path) for path in paths]
    refused: dict[str, str] = {}
    crashed: dict[str, str] = {}
    bound: dict[str, dict[str, Any]] = {}
    for name, (worker, _) in workers.items():
        try:
            bound[name] = worker.call("bind", paths=files, plan=dataclasses.asdict(plan))
        except WorkerFailed as error:
            (refused if worker.alive else crashed)[name] = str(error)
        advance(name, 0.2)
    if not bound:
        return BatchTimings({}, refused, crashed, {}, {})
    slowest = max(each["run_ms"] for each in bound.values())
    plan = dataclasses.replace(plan, block=max(1, min(plan.block, int(BLOCK_MS / slowest))))
    settings = dataclasses.asdict(plan)

    def turn(name: str) -> list[float]:
        advance(name, 0.5 * plan.block / plan.samples)
        return workers[name][0].call("turn", batch=batch, plan=settings)

    turns = {name: partial(turn, name) for name in bound}
    interleaved = interleave(turns, plan, seed=batch, clock=clock, drop=WorkerFailed)
    crashed |= {name: str(error) for name, error in interleaved.failures.items()}
    base, timings = interleaved.latencies.get(reference), {}
    for name, latency in interleaved.latencies.items():
        worker, device = workers[name]
        try:
            extra = {
                "images_per_s": worker.call("throughput", batch=batch, in_flight=IN_FLIGHT[device], seconds=extras_s),
                **worker.call("device_times", batch=batch, seconds=extras_s),
                **worker.call("end_to_end", paths=files, seconds=extras_s),
            }
        except WorkerFailed as error:
            crashed[name] = str(error)
            continue
        warm, samples = bound[name], tuple(round(value, 4) for value in latency.samples_ms)
        timings[name] = Timing(
            batch=batch,
            samples_ms=samples,
            block=plan.block,
            turns_s=tuple(round(value, 3) for value in latency.turns_s),
            warmup_s=warm["warmup_s"],
            steady=warm["steady"],
            **_percentiles(samples),
            speedup=_speedup(base, latency, plan.block) if base and name != reference else None,
            in_flight=IN_FLIGHT[device],
            profile=warm["profile"],
            flags=stability_flags(
                samples, latency.turns_s, block=plan.block, steady=warm["steady"], warmup_s=warm["warmup_s"]
            ),
            **extra,
        )
        advance(name, 0.3)
    min_cosine, norm_error = (
        {name: each[figure] for name, each in bound.items()} for figure in ("min_cosine", "norm_error")
    )
    return BatchTimings(timings, refused, crashed, min_cosine, norm_error)


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

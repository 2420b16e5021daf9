"""All backends at one batch size: warmed up, then told in turn, in random order, to run a block each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pmm.bench.latency import Clock, LatencyPlan, interleave
from pmm.bench.schema import Estimate, Timing
from pmm.bench.statistics import Latency, median_ratio, percentile, percentile_interval, stability_flags
from pmm.bench.workers import WorkerFailed, WorkerProcess

BLOCK_MS = 400.0
"""A block of the slowest backend takes no longer, if it holds more than one sample."""
IN_FLIGHT = {"cpu": 1, "cuda": 8}
"""Calls submitted at once for the throughput; a CPU is busy with one."""
TAILS = (50, 90, 95, 99)


@dataclass(frozen=True)
class Timed:
    """What came of it, per name."""

    timings: dict[str, Timing]
    refused: dict[str, str]
    """Could not run at this batch size, and why; the worker lives on."""
    died: dict[str, str]
    """The worker is gone."""
    least_cosine: dict[str, float]
    """Of an embedding in this batch with the same crop's in a batch of 64."""
    length_error: dict[str, float]
    """Largest relative difference of their lengths."""


def time_batch(
    workers: Mapping[str, tuple[WorkerProcess, str]],
    paths: Sequence[Path],
    plan: LatencyPlan,
    *,
    reference: str,
    extras_s: float,
    advance: Callable[[str, float], None],
    clock: Clock = time.perf_counter,
) -> Timed:
    """Time one batch, the images of `paths`, on all `workers`.

    Args:
        workers: worker and its device, cpu or cuda, per name.
        reference: name of the one that speed-ups are against.
        extras_s: seconds each for throughput, device times and end to end.
        advance: told who has done something, and the share of its work that this was.
        clock: says when turns begin, and when a worker's time is over.
    """
    batch, files = len(paths), [str(path) for path in paths]
    refused: dict[str, str] = {}
    died: dict[str, str] = {}
    bound: dict[str, dict[str, Any]] = {}
    for name, (worker, _) in workers.items():
        try:
            bound[name] = worker.ask("bind", paths=files, plan=dataclasses.asdict(plan))
        except WorkerFailed as error:
            (refused if worker.alive else died)[name] = str(error)
        advance(name, 0.2)
    if not bound:
        return Timed({}, refused, died, {}, {})
    slowest = max(each["run_ms"] for each in bound.values())
    plan = dataclasses.replace(plan, block=max(1, min(plan.block, int(BLOCK_MS / slowest))))
    told = dataclasses.asdict(plan)

    def turn(name: str) -> list[float]:
        advance(name, 0.5 * plan.block / plan.samples)
        return workers[name][0].ask("turn", batch=batch, plan=told)

    turns = {name: partial(turn, name) for name in bound}
    found = interleave(turns, plan, seed=batch, clock=clock, drop=WorkerFailed)
    died |= {name: str(error) for name, error in found.failures.items()}
    base, timings = found.latencies.get(reference), {}
    for name, latency in found.latencies.items():
        worker, device = workers[name]
        try:
            extra = {
                "images_per_s": worker.ask("push", batch=batch, in_flight=IN_FLIGHT[device], seconds=extras_s),
                **worker.ask("device_times", batch=batch, seconds=extras_s),
                **worker.ask("end_to_end", paths=files, seconds=extras_s),
            }
        except WorkerFailed as error:
            died[name] = str(error)
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
    least_cosine, length_error = (
        {name: each[figure] for name, each in bound.items()} for figure in ("least_cosine", "length_error")
    )
    return Timed(timings, refused, died, least_cosine, length_error)


def _percentiles(samples: Sequence[float]) -> dict[str, Any]:
    """The fields p50_ms, p50_interval_ms, ...: those without an interval are None, but for the median."""
    found: dict[str, Any] = {}
    for percent in TAILS:
        interval = percentile_interval(samples, percent)
        found[f"p{percent}_interval_ms"] = interval
        told = interval is not None or percent == 50
        found[f"p{percent}_ms"] = percentile(samples, percent) if told else None
    return found


def _speedup(reference: Latency, latency: Latency, block: int) -> Estimate:
    ratio = median_ratio(reference, latency, block=block)
    return Estimate(value=ratio.value, interval=ratio.interval)

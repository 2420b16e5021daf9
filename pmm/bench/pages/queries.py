"""Queries on a `BenchReport`: which results ran, in which order, how fast, and which rank like the reference."""

from __future__ import annotations

from pmm.bench.result_schema import Estimate, Result, Timing
from pmm.bench.schema import BenchReport

SAME_RANKING = 0.001
"""A backend "ranks like the reference" if mAP and rank-1 differ by no more than this (0.1 points)."""


def completed(report: BenchReport) -> list[Result]:
    """Results with figures, the fastest at the smallest batch first; those without a latency last."""
    batches = batch_sizes(report)

    def latency(result: Result) -> float:
        timing = timing_at(result, batches[0]) if batches else None
        return timing.p50_ms if timing else float("inf")

    return sorted((r for r in report.results if r.status == "ok"), key=latency)


def incomplete(report: BenchReport) -> list[Result]:
    """Results without figures: those that failed first."""
    return sorted((r for r in report.results if r.status != "ok"), key=lambda r: r.status != "failed")


def reference_of(report: BenchReport) -> Result | None:
    """The result that the others are compared with, if it ran."""
    reference = report.result(report.reference)
    return reference if reference is not None and reference.status == "ok" else None


def batch_sizes(report: BenchReport) -> list[int]:
    """All that some backend was timed at, ascending."""
    return sorted({t.batch for r in report.results if r.status == "ok" for t in r.batches})


def shown_batches(report: BenchReport) -> list[int]:
    """The batch sizes that a table has room for: all, or the smallest, the largest and two between."""
    sizes = batch_sizes(report)
    return sizes if len(sizes) <= 4 else [sizes[round(third * (len(sizes) - 1) / 3)] for third in range(4)]


def timing_at(result: Result, batch: int) -> Timing | None:
    return next((t for t in result.batches if t.batch == batch), None)


def speedup(report: BenchReport, result: Result, batch: int) -> Estimate | None:
    """Speedup over the reference at `batch`; without an interval where the report has none."""
    reference = reference_of(report)
    timing, base = timing_at(result, batch), timing_at(reference, batch) if reference else None
    if timing is None or base is None or result is reference:
        return None
    return timing.speedup or (Estimate(value=base.p50_ms / timing.p50_ms, interval=None) if timing.p50_ms else None)


def best_throughput(result: Result) -> Timing | None:
    """The batch size with the most images per second."""
    return max(result.batches, key=lambda t: t.images_per_s, default=None)


def ranks_alike(result: Result) -> bool:
    """mAP and rank-1 are the reference's, within `SAME_RANKING`."""
    deltas = (result.map_delta, result.rank1_delta)
    # the margin is of rounding: 0.7120 - 0.7110 is not exactly 0.001
    return all(delta is not None and abs(delta) <= SAME_RANKING + 1e-9 for delta in deltas)


def failed_gates(report: BenchReport, result: Result) -> list[str]:
    """The gates that it fails, as flags."""
    return [f.gate for f in report.gates.failures if f.result == result.name]


def failing_links(report: BenchReport) -> list[str]:
    """Links of the chain whose gates fail the run, by name."""
    links = report.chain.links if report.chain else ()
    failed = {failure.result for failure in report.gates.failures}
    return [link.name for link in links if link.kind in ("stored", "index") and link.name in failed]


def may_ship(report: BenchReport, result: Result) -> bool:
    """It ran and fails no gate. Without a gate on mAP, it must rank like the reference."""
    if result.status != "ok" or failed_gates(report, result):
        return False
    return report.gates.max_map_drop is not None or ranks_alike(result)


def shipping(report: BenchReport) -> list[Result]:
    """All but the reference that may ship, the fastest first."""
    return [r for r in completed(report) if r is not reference_of(report) and may_ship(report, r)]


def flagged(report: BenchReport) -> list[tuple[Result, Timing]]:
    """Unreliable latencies."""
    return [(r, t) for r in completed(report) for t in r.batches if t.flags]

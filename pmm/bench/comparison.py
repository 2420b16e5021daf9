"""Compare two reports of the bench: which backend became slower or less accurate, beyond noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pmm.bench.result_schema import Result, Timing
from pmm.bench.schema import BenchReport
from pmm.bench.statistics import percentile
from pmm.evaluation.parity.retrieval import paired_bootstrap
from pmm.utils.errors import ConflictingOptions, InvalidFile

RESAMPLES = 2000
MIN_TURNS = 6
"""Fewer give the ratio of two medians no interval."""

Kind = Literal["worse", "better", "same", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one backend, before and after."""

    result: str
    figure: str
    """mAP, p50 at batch 8, status, ..."""
    kind: Kind
    summary: str
    """Before, after and the interval of the change, one line."""


def compare(old: BenchReport, new: BenchReport, *, max_slowdown: float, max_map_drop: float) -> list[Change]:
    """Every backend of `old`, in `new`.

    A figure is worse if the 95 % interval of its change lies wholly beyond what is allowed. Latencies are compared as
    they are where both reports come from the same hardware, else relative to the reference of their own report.

    Args:
        max_slowdown: of a median, as a fraction.
        max_map_drop: as a fraction.

    Raises:
        ConflictingOptions: the reports were measured on different crops, or have no backend in common.
        InvalidFile: a report lacks figures.
    """
    if old.dataset.digest != new.dataset.digest:
        crops = [f"{report.dataset.queries} queries of {report.dataset.name}" for report in (old, new)]
        raise ConflictingOptions(f"the reports were measured on different crops: {' and '.join(crops)}", "OLD", "NEW")
    if not {r.name for r in old.results} & {r.name for r in new.results}:
        raise ConflictingOptions(f"the reports have no backend in common: {_names(old)}; {_names(new)}", "OLD", "NEW")
    absolute = hardware(old) == hardware(new)
    changes: list[Change] = []
    for before in old.results:
        after = new.result(before.name)
        changes += _status(before, after)
        if after is None or before.status != "ok" or after.status != "ok":
            continue
        changes.append(_accuracy(before, after, max_map_drop))
        for timing in before.batches:
            now = next((t for t in after.batches if t.batch == timing.batch), None)
            if absolute:
                changes.append(_latency(before.name, timing, now, max_slowdown))
            elif before.name not in (old.reference, new.reference):
                changes.append(_speedup(before.name, timing, now, max_slowdown, same=old.reference == new.reference))
    if not changes:
        raise ConflictingOptions("no backend was measured in both reports", "OLD", "NEW")
    return changes


def hardware(report: BenchReport) -> dict[str, object]:
    """The hardware that latencies depend on."""
    return {name: report.environment.get(name) for name in ("cpu", "threads", "gpus")}


def _status(before: Result, after: Result | None) -> Iterator[Change]:
    now = "not measured" if after is None else after.status
    if before.status == "ok" and now != "ok":
        reason = f" ({after.reason})" if after and after.reason else ""
        yield Change(result=before.name, figure="status", kind="worse", summary=f"was ok, now {now}{reason}")
    elif before.status != "ok" and now == "ok":
        yield Change(result=before.name, figure="status", kind="better", summary=f"was {before.status}, now ok")
    elif after and "failed" in (before.status, now):
        summary = f"was {before.status}, now {now} ({after.reason or before.reason})"
        yield Change(result=before.name, figure="status", kind="unknown", summary=summary)


def _accuracy(before: Result, after: Result, allowed: float) -> Change:
    counts = [len(result.per_query_ap) for result in (after, before)]
    both = zip(after.per_query_ap, before.per_query_ap, strict=False)
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    if before.mAP is None or after.mAP is None or not pairs or counts[0] != counts[1]:
        old, new = (sum(ap is not None for ap in r.per_query_ap) if r.mAP is not None else 0 for r in (before, after))
        which = "OLD" if old <= new else "NEW"
        problem = f"mAP or per_query_ap of {before.name} is incomplete in the report {which}"
        raise InvalidFile(problem, hint="run pmm bench again")
    deltas = np.array([[a - b for a, b in pairs]])
    ((low, high),) = paired_bootstrap(deltas)
    change = f"{100 * (after.mAP - before.mAP):+.2f} points, {100 * low:+.2f} to {100 * high:+.2f}"
    summary = f"{before.mAP:.2%} -> {after.mAP:.2%} ({change})"
    kind: Kind = "worse" if high < -allowed else "better" if low > allowed else "same"
    return Change(result=before.name, figure="mAP", kind=kind, summary=summary)


def _latency(name: str, before: Timing, after: Timing | None, allowed: float) -> Change:
    figure = f"p50 at batch {before.batch}"
    if after is None:
        return Change(result=name, figure=figure, kind="worse", summary=f"{before.p50_ms:.3g} ms -> not measured")
    summary = f"{before.p50_ms:.3g} -> {after.p50_ms:.3g} ms"
    interval = _ratio_interval(before, after)
    if interval is None:
        return Change(result=name, figure=figure, kind="unknown", summary=f"{summary}: too few samples for an interval")
    low, high = interval
    summary += f" ({after.p50_ms / before.p50_ms:.2f}x, {low:.2f} to {high:.2f})"
    if before.flags or after.flags:
        flags = "; ".join(dict.fromkeys((*before.flags, *after.flags)))
        return Change(result=name, figure=figure, kind="unknown", summary=f"{summary}: unreliable ({flags})")
    kind: Kind = "worse" if low > 1 + allowed else "better" if high < 1 / (1 + allowed) else "same"
    return Change(result=name, figure=figure, kind=kind, summary=summary)


def _speedup(name: str, before: Timing, after: Timing | None, allowed: float, *, same: bool) -> Change:
    """Speedup over the reference of the same report: comparable even if the machines differ, if it is the `same`."""
    figure = f"speedup at batch {before.batch}"
    if after is None:
        return Change(result=name, figure=figure, kind="worse", summary="was measured, now not measured")
    if not same:
        return Change(result=name, figure=figure, kind="unknown", summary="the reports have different references")
    was, now = before.speedup, after.speedup
    if was is None or now is None or was.interval is None or now.interval is None:
        return Change(result=name, figure=figure, kind="unknown", summary="too few samples for an interval")
    summary = f"{was.value:.2f}x -> {now.value:.2f}x over the reference, on different hardware"
    # both intervals at once: wider than the 95 % interval of the ratio, so that few changes are called one wrongly
    low, high = now.interval[0] / was.interval[1], now.interval[1] / was.interval[0]
    kind: Kind = "worse" if high < 1 / (1 + allowed) else "better" if low > 1 + allowed else "same"
    return Change(result=name, figure=figure, kind=kind, summary=summary)


def _ratio_interval(before: Timing, after: Timing) -> tuple[float, float] | None:
    """Of the ratio of the medians of two separate runs: a bootstrap over the turns of each."""
    medians, rng = [], np.random.default_rng(0)
    for timing in (before, after):
        turns = np.reshape(timing.samples_ms, (-1, timing.block))
        if len(turns) < MIN_TURNS:
            return None
        drawn = turns[rng.integers(0, len(turns), (RESAMPLES, len(turns)))].reshape(RESAMPLES, -1)
        medians.append(np.array([percentile(row, 50) for row in drawn]))
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return float(low), float(high)


def _names(report: BenchReport) -> str:
    return ", ".join(result.name for result in report.results)

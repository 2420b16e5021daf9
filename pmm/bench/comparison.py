"""Two reports of the bench: what got slower or less accurate beyond noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pmm.bench.schema import BenchReport, Result, Timing
from pmm.bench.statistics import percentile
from pmm.evaluation.parity.retrieval import paired_bootstrap
from pmm.utils.errors import UserError

RESAMPLES = 2000
LEAST_TURNS = 6
"""Fewer give the ratio of two medians no interval."""

Kind = Literal["worse", "better", "same", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of one backend, before and after."""

    result: str
    figure: str
    """mAP, p50 at batch 8, status, ..."""
    kind: Kind
    said: str
    """Before, after and the interval of the change, one line."""


def compare(old: BenchReport, new: BenchReport, *, max_slowdown: float, max_map_drop: float) -> list[Change]:
    """Every backend of `old`, in `new`.

    A figure is worse if the 95 % interval of its change lies wholly beyond what is allowed. Latencies are compared as
    they are where both reports come from the same hardware, else relative to the reference of their own report.

    Args:
        max_slowdown: of a median, as a fraction.
        max_map_drop: as a fraction.

    Raises:
        UserError: the reports were measured on other crops, have no backend in common, or were edited.
    """
    if old.dataset.digest != new.dataset.digest:
        raise UserError(
            f"measured on other crops ({old.dataset.name}, {old.dataset.queries} queries; {new.dataset.name}, "
            f"{new.dataset.queries} queries): the two cannot be compared"
        )
    if not {r.name for r in old.results} & {r.name for r in new.results}:
        raise UserError(f"no backend in common: {_names(old)} and {_names(new)}")
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
            elif before.name != old.reference:
                changes.append(_speedup(before.name, timing, now, max_slowdown))
    if not changes:
        raise UserError("no backend was measured in both reports; nothing to compare")
    return changes


def hardware(report: BenchReport) -> dict[str, object]:
    """What latencies depend on, besides the software."""
    return {name: report.environment.get(name) for name in ("cpu", "threads", "gpus")}


def _status(before: Result, after: Result | None) -> Iterator[Change]:
    now = "not measured" if after is None else after.status
    if before.status == "ok" and now != "ok":
        reason = f" ({after.reason})" if after and after.reason else ""
        yield Change(result=before.name, figure="status", kind="worse", said=f"was ok, now {now}{reason}")
    elif before.status != "ok" and now == "ok":
        yield Change(result=before.name, figure="status", kind="better", said=f"was {before.status}, now ok")
    elif after and "failed" in (before.status, now):
        said = f"was {before.status}, now {now} ({after.reason or before.reason})"
        yield Change(result=before.name, figure="status", kind="unknown", said=said)


def _accuracy(before: Result, after: Result, allowed: float) -> Change:
    counts = [len(result.per_query_ap) for result in (after, before)]
    both = zip(after.per_query_ap, before.per_query_ap, strict=False)
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    if before.mAP is None or after.mAP is None or not pairs or counts[0] != counts[1]:
        raise UserError(f"{before.name}: mAP or per_query_ap is incomplete in a report; measure again with pmm bench")
    deltas = np.array([[a - b for a, b in pairs]])
    ((low, high),) = paired_bootstrap(deltas)
    change = f"{100 * (after.mAP - before.mAP):+.2f} points, {100 * low:+.2f} to {100 * high:+.2f}"
    said = f"{before.mAP:.2%} -> {after.mAP:.2%} ({change})"
    kind: Kind = "worse" if high < -allowed else "better" if low > allowed else "same"
    return Change(result=before.name, figure="mAP", kind=kind, said=said)


def _latency(name: str, before: Timing, after: Timing | None, allowed: float) -> Change:
    figure = f"p50 at batch {before.batch}"
    if after is None:
        return Change(result=name, figure=figure, kind="worse", said=f"{before.p50_ms:.3g} ms -> not measured")
    said = f"{before.p50_ms:.3g} -> {after.p50_ms:.3g} ms"
    interval = _ratio_interval(before, after)
    if interval is None:
        return Change(result=name, figure=figure, kind="unknown", said=f"{said}: too few samples to tell")
    low, high = interval
    said += f" ({after.p50_ms / before.p50_ms:.2f}x, {low:.2f} to {high:.2f})"
    if before.flags or after.flags:
        flags = "; ".join(dict.fromkeys((*before.flags, *after.flags)))
        return Change(result=name, figure=figure, kind="unknown", said=f"{said}: not to be trusted ({flags})")
    kind: Kind = "worse" if low > 1 + allowed else "better" if high < 1 / (1 + allowed) else "same"
    return Change(result=name, figure=figure, kind=kind, said=said)


def _speedup(name: str, before: Timing, after: Timing | None, allowed: float) -> Change:
    """Times as fast as the reference of the same report: what is left of the change if the machines differ."""
    figure = f"speed-up at batch {before.batch}"
    if after is None:
        return Change(result=name, figure=figure, kind="worse", said="was measured, now it is not")
    was, now = before.speedup, after.speedup
    if was is None or now is None or was.interval is None or now.interval is None:
        return Change(result=name, figure=figure, kind="unknown", said="too few samples to tell")
    said = f"{was.value:.2f}x -> {now.value:.2f}x of the reference, on other hardware"
    # both intervals at once: wider than 95 % of the ratio, so that a change is called one with care
    low, high = now.interval[0] / was.interval[1], now.interval[1] / was.interval[0]
    kind: Kind = "worse" if high < 1 / (1 + allowed) else "better" if low > 1 + allowed else "same"
    return Change(result=name, figure=figure, kind=kind, said=said)


def _ratio_interval(before: Timing, after: Timing) -> tuple[float, float] | None:
    """Of the ratio of the medians of two separate runs: a bootstrap over the turns of each."""
    medians, rng = [], np.random.default_rng(0)
    for timing in (before, after):
        turns = np.reshape(timing.samples_ms, (-1, timing.block))
        if len(turns) < LEAST_TURNS:
            return None
        drawn = turns[rng.integers(0, len(turns), (RESAMPLES, len(turns)))].reshape(RESAMPLES, -1)
        medians.append(np.array([percentile(row, 50) for row in drawn]))
    low, high = np.quantile(medians[1] / medians[0], [0.025, 0.975])
    return float(low), float(high)


def _names(report: BenchReport) -> str:
    return ", ".join(result.name for result in report.results)

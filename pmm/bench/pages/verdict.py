"""The verdict: which backend and precision may ship, with what certainty, and which gates fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmm.bench.gates import CHAIN_GATES, WITHOUT_BOUND, requirements
from pmm.bench.pages.format import (
    NONE,
    between,
    count,
    display_name,
    number,
    one_line,
    percent,
    points,
    times,
)
from pmm.bench.pages.queries import (
    SAME_RANKING,
    batch_sizes,
    best_throughput,
    completed,
    failed_gates,
    failing_links,
    incomplete,
    ranks_alike,
    reference_of,
    shipping,
    speedup,
    timing_at,
)
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport

SAME_SPEED = 1.05
"""Two medians closer than this ratio are called equal: timing on a shared machine is no more precise."""

Status = Literal["failed", "undecided", "passed", "not judged", "off"]
STATUSES: tuple[Status, ...] = ("failed", "undecided", "passed", "not judged", "off")
Tone = Literal["good", "mixed", "bad"]


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One large number about the result that may ship."""

    value: str
    label: str
    detail: str
    """Its interval, or what else belongs to it."""


@dataclass(frozen=True, kw_only=True)
class GateLine:
    """One gate: what it requires, and which results fail it."""

    flag: str
    requirement: str
    status: Status
    """undecided: all that break it may do so by chance; not judged: there is no result that it applies to."""
    failures: tuple[str, ...] = ()
    """One line each: the result and its figure."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`headline` is a sentence or two, `details` are further sentences. `tone` is "bad" if a gate failed, a backend
    crashed or nothing can be compared; "mixed" if the ranking of a backend differs within the gates, or only the
    reference may ship; else "good". Backends that this machine cannot run do not count."""

    headline: str
    failing: str
    """How many results fail a gate, as a sentence; empty if none does."""
    details: tuple[str, ...]
    tone: Tone
    ships: str | None
    """Name of the fastest result that may ship."""
    figures: tuple[KeyFigure, ...]
    gates: tuple[GateLine, ...]


def verdict(report: BenchReport) -> Verdict:
    """What the figures mean, in words."""
    headline, best, details = _headline(report)
    failing = [r for r in report.results if failed_gates(report, r)]
    broken = failing_links(report)
    others = [r for r in completed(report) if r is not reference_of(report)]
    if failing or broken or any(r.status == "failed" for r in report.results) or reference_of(report) is None:
        tone: Tone = "bad"
    else:
        tone = "good" if best and all(map(ranks_alike, others)) else "mixed"
    return Verdict(
        headline=f"{one_line(headline)}.",
        failing=" ".join(filter(None, [_failing(report, failing), _failing_links(broken), _too_few(report)])),
        details=tuple(f"{one_line(sentence)}." for sentence in (*details, *_absent(report))),
        tone=tone,
        ships=best.name if best else None,
        figures=_figures(report, best) if best else (),
        gates=tuple(_gate_lines(report)),
    )


def _headline(report: BenchReport) -> tuple[str, Result | None, list[str]]:
    """The headline, the result that it says may ship, and details on the results that ran."""
    reference = reference_of(report)
    others = [r for r in completed(report) if r is not reference]
    if reference is None or reference.mAP is None:
        reached = [f"{display_name(r)} reaches mAP {percent(r.mAP)}" for r in others]
        unknown = f"Which backends keep the accuracy is unknown: the reference, {report.reference}, "
        return unknown + _why_absent(report), None, reached
    if not others:
        alone = f"{display_name(reference)} reaches mAP {percent(reference.mAP)}"
        return f"{alone}; no other backend was measured, so there is nothing to compare", None, []
    able = shipping(report)
    if not able:
        why = "fails a gate" if all(failed_gates(report, r) for r in others) else "ranks differently or fails a gate"
        broken = [f for f in report.gates.failures if f.result in {r.name for r in others}]
        if broken and all(f.undecided for f in broken):
            why = "breaks a gate, perhaps by chance"
        each = f"the only other result {why}" if len(others) == 1 else f"each of the {len(others)} other results {why}"
        return f"Only {display_name(reference)} itself may ship: {each}", None, _groups(others)
    best = able[0]
    headline = f"{display_name(best)} may ship: {_accuracy(best, reference)}{_speed(report, best, reference)}"
    return headline, best, [*_certainty(report, best, able, reference), *_groups(others)]


def _failing(report: BenchReport, failing: list[Result]) -> str:
    if not failing:
        return ""
    names = f": {', '.join(one_line(r.name) for r in failing)}" if len(failing) <= 4 else ""
    return f"{len(failing)} of {len(report.results)} results fail{'s' * (len(failing) == 1)} a gate{names}."


def _failing_links(names: list[str]) -> str:
    if not names:
        return ""
    return f"In the chain to the index, {', '.join(map(one_line, names))} fail{'s' * (len(names) == 1)} a gate."


def _too_few(report: BenchReport) -> str:
    """What there are too few queries for, as a sentence."""
    names = dict.fromkeys(one_line(f.result) for f in report.gates.failures if f.undecided)
    queries = count(report.dataset.queries)
    return f"{queries} queries are too few to judge {', '.join(names)}: judge on a larger set." if names else ""


def _accuracy(result: Result, reference: Result) -> str:
    """Whether it ranks like the reference, with the figures."""
    name = display_name(reference)
    interval = between(result.map_delta_interval, points)
    interval = interval and f", 95 % interval {interval}"
    change = f"{points(result.map_delta)} points{interval}"
    if ranks_alike(result):
        return f"it ranks like {name} (mAP {percent(result.mAP)}, difference {change})"
    if result.map_delta is None:
        return f"its mAP could not be compared with that of {name}"
    if abs(result.map_delta) <= SAME_RANKING:
        return f"it keeps mAP (difference {change}), but its rank-1 changes by {points(result.rank1_delta)} points"
    verb = "loses" if result.map_delta < 0 else "gains"
    instead = f"{percent(result.mAP)} instead of {percent(reference.mAP)}"
    return f"it {verb} {abs(100 * result.map_delta):.2f} points of mAP ({instead}{interval}), which the gates allow"


def _speed(report: BenchReport, result: Result, reference: Result) -> str:
    """The end of a sentence, such as ", with a speedup of 1.8x at batch 1 (1.7x to 1.9x)"; empty if the result was not
    timed beside the reference."""
    over = "" if result.device == reference.device else f" over {display_name(reference)}"
    for batch in batch_sizes(report):
        if estimate := speedup(report, result, batch):
            same = 1 / SAME_SPEED < estimate.value < SAME_SPEED
            start = "at about the same speed:" if same else "but is slower:" if estimate.value < 1 else "with"
            interval = between(estimate.interval, times) or "too few samples for an interval"
            return f", {start} a speedup of {times(estimate.value)}{over} at batch {batch} ({interval})"
    return ""


def _certainty(report: BenchReport, best: Result, able: list[Result], reference: Result) -> list[str]:
    """What limits the headline: intervals, unreliable figures, equally fast results."""
    limits = []
    queries = count(report.dataset.queries)
    if best.map_delta_interval is None:
        limits.append("There are too few queries for an interval of the difference of mAP")
    elif (worst := best.map_delta_interval[0]) < -SAME_RANKING:
        lost = f"{abs(100 * worst):.2f} points of mAP"
        limits.append(f"With {queries} queries, a loss of up to {lost} cannot be ruled out")
    first = batch_sizes(report)[:1]
    timing = timing_at(best, first[0]) if first else None
    if timing and timing.flags:
        flags = "; ".join(timing.flags)
        limits.append(f"Its latency at batch {timing.batch} is unreliable ({flags}): measure again on an idle machine")
    if not ranks_alike(best):
        alike = next((r for r in able if ranks_alike(r)), None)
        if alike:
            speed = _speed(report, alike, reference)
            limits.append(f"The fastest that ranks like the reference is {alike.name}{speed}")
        else:
            limits.append("No backend that may ship ranks like the reference")
    rivals = [r.name for r in able[1:] if timing and _as_fast(r, best, timing.batch)]
    if rivals:
        limits.append(f"No significant difference in speed to {', '.join(rivals)}")
    return limits


def _as_fast(rival: Result, best: Result, batch: int) -> bool:
    """The intervals of their medians overlap."""
    timings = [timing_at(result, batch) for result in (rival, best)]
    intervals = [timing.p50_interval_ms for timing in timings if timing and timing.p50_interval_ms]
    return len(intervals) == 2 and intervals[0][0] <= intervals[1][1]


def _groups(others: list[Result]) -> list[str]:
    """The results that rank like the reference, and the others."""
    if len(others) == 1:  # the headline is about it
        return []
    alike = [r.name for r in others if ranks_alike(r)]
    rest = [r for r in others if not ranks_alike(r)]
    near = f"{100 * SAME_RANKING:g} points of the reference's mAP and rank-1"
    groups = [f"Within {near} ({len(alike)} of {len(others)}): {', '.join(alike)}"] if alike else []
    if rest:
        groups.append(f"Not within {near} ({len(rest)} of {len(others)}): {', '.join(map(_change, rest))}")
    return groups


def _change(result: Result) -> str:
    if result.map_delta is None:
        return f"{result.name} (not compared)"
    if abs(result.map_delta) <= SAME_RANKING and result.rank1_delta is not None:
        return f"{result.name} (rank-1 {points(result.rank1_delta)} points)"
    return f"{result.name} (mAP {points(result.map_delta)} points)"


def _absent(report: BenchReport) -> list[str]:
    """The results that failed, and those that this machine cannot run, by reason."""
    sentences = []
    for status, words in (("failed", "Failed"), ("unavailable", "Unavailable on this machine")):
        names: dict[str, list[str]] = {}
        for result in incomplete(report):
            if result.status == status and result.name != report.reference:
                names.setdefault(one_line(result.reason or "no reason given").rstrip("."), []).append(result.name)
        if names:
            groups = (f"{', '.join(results)} ({reason})" for reason, results in names.items())
            sentences.append(f"{words}: {'; '.join(groups)}")
    return sentences


def _why_absent(report: BenchReport) -> str:
    reference = report.result(report.reference)
    if reference is None or reference.status == "ok":
        return "was not measured"
    verb = "failed" if reference.status == "failed" else "cannot run on this machine"
    return f"{verb} ({one_line(reference.reason or 'no reason given').rstrip('.')})"


def _figures(report: BenchReport, best: Result) -> tuple[KeyFigure, ...]:
    """The large numbers about the result that may ship."""
    batches = batch_sizes(report)
    timing = timing_at(best, batches[0]) if batches else None
    estimate = speedup(report, best, batches[0]) if batches else None
    figures = []
    if estimate:
        label = f"speedup over {report.reference}, batch {batches[0]}"
        figures.append(KeyFigure(value=times(estimate.value), label=label, detail=between(estimate.interval, times)))
    label, interval = f"points of mAP compared with {report.reference}", between(best.map_delta_interval, points)
    figures.append(KeyFigure(value=points(best.map_delta), label=label, detail=interval))
    if timing:
        images = "one image" if timing.batch == 1 else f"{timing.batch} images"
        p95 = "" if timing.p95_ms is None else f"p95 {number(timing.p95_ms)} ms"
        figures.append(KeyFigure(value=f"{number(timing.p50_ms)} ms", label=f"median time for {images}", detail=p95))
    if most := best_throughput(best):
        label = "images per second, highest throughput"
        figures.append(KeyFigure(value=number(most.images_per_s), label=label, detail=f"batch {most.batch}"))
    return tuple(figure for figure in figures if figure.value != NONE)


def _gate_lines(report: BenchReport) -> list[GateLine]:
    """Every gate, the failed ones first, those that are off last."""
    required = requirements(report.gates, batch_sizes(report))
    if report.chain is None:
        required = {flag: requirement for flag, requirement in required.items() if flag not in CHAIN_GATES}
    # a gate that is unknown here must not vanish
    unlisted = {failure.gate for failure in report.gates.failures} - required.keys()
    required |= {gate: WITHOUT_BOUND.get(gate, "") for gate in sorted(unlisted)}
    judged = any(result is not reference_of(report) for result in completed(report))
    lines = []
    for flag, requirement in required.items():
        found = [f for f in report.gates.failures if f.gate == flag]
        failures = tuple(f"{one_line(f.result)}: {one_line(f.message)}" for f in found)
        status: Status = "passed" if judged else "not judged"
        if found:
            status = "undecided" if all(f.undecided for f in found) else "failed"
        elif requirement is None:
            status = "off"
        lines.append(GateLine(flag=flag, requirement=requirement or "", status=status, failures=failures))
    return sorted(lines, key=lambda gate: STATUSES.index(gate.status))


def count_by_status(gate_lines: tuple[GateLine, ...]) -> str:
    """How many failed, passed and are off: "1 failed, 3 passed, 1 off"."""
    counts = {status: sum(gate.status == status for gate in gate_lines) for status in STATUSES}
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n)

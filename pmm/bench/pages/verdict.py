"""The verdict: which backend and precision may ship, how sure that is, and what each gate says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pmm.bench.pages.format import (
    NONE,
    between,
    count,
    number,
    one_line,
    percent,
    points,
    spoken,
    times,
)
from pmm.bench.pages.gate_list import GateLine, gates
from pmm.bench.pages.queries import (
    SAME_RANKING,
    batch_sizes,
    best_throughput,
    failed_gates,
    missing,
    ran,
    ranks_alike,
    reference_of,
    shipping,
    speedup,
    timing_at,
)
from pmm.bench.schema import BenchReport, Estimate, Result

# Two medians closer than this ratio are called equal: timing on a shared machine is no better.
SAME_SPEED = 1.05

Tone = Literal["good", "mixed", "bad"]


@dataclass(frozen=True, kw_only=True)
class KeyFigure:
    """One number of the result that may ship, large."""

    value: str
    means: str
    sure: str
    """How sure, or what belongs to it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`headline` is a sentence or two, `sentences` what else to know. `tone` is "bad" if a gate failed, a backend
    crashed or nothing can be compared; "mixed" if one ranks otherwise within the gates, or none but the reference may
    ship; else "good". What this machine cannot run does not count."""

    headline: str
    failing: str
    """How many results fail a gate, as a sentence; empty if none does."""
    sentences: tuple[str, ...]
    tone: Tone
    ships: str | None
    """Name of the fastest result that may ship."""
    figures: tuple[KeyFigure, ...]
    gates: tuple[GateLine, ...]


def verdict(report: BenchReport) -> Verdict:
    """What the figures mean, in words."""
    headline, best, said = _headline(report)
    failing = [r for r in report.results if failed_gates(report, r)]
    others = [r for r in ran(report) if r is not reference_of(report)]
    if failing or any(r.status == "failed" for r in report.results) or reference_of(report) is None:
        tone: Tone = "bad"
    else:
        tone = "good" if best and all(map(ranks_alike, others)) else "mixed"
    return Verdict(
        headline=f"{one_line(headline)}.",
        failing=_failing(report, failing),
        sentences=tuple(f"{one_line(sentence)}." for sentence in (*said, *_absent(report))),
        tone=tone,
        ships=best.name if best else None,
        figures=_figures(report, best) if best else (),
        gates=tuple(gates(report)),
    )


def _headline(report: BenchReport) -> tuple[str, Result | None, list[str]]:
    """The headline, the result that it says may ship, and what else to know of those that ran."""
    reference = reference_of(report)
    others = [r for r in ran(report) if r is not reference]
    if reference is None or reference.mAP is None:
        said = [f"{spoken(r)} reaches mAP {percent(r.mAP)}" for r in others]
        unknown = f"Whether mAP survived is unknown: {report.reference}, which the others are compared with, "
        return unknown + _why_absent(report), None, said
    if not others:
        alone = f"{spoken(reference)} reaches mAP {percent(reference.mAP)}; no other backend was measured, so there is "
        return f"{alone}nothing to compare", None, []
    able = shipping(report)
    if not able:
        why = "fails a gate" if all(failed_gates(report, r) for r in others) else "ranks otherwise or fails a gate"
        each = f"the one other backend {why}" if len(others) == 1 else f"each of the {len(others)} others {why}"
        return f"Nothing may ship but {spoken(reference)} itself: {each}", None, _groups(others)
    best = able[0]
    speed = _speed(report, best, reference)
    headline = f"{spoken(best)} may ship: {_accuracy(best, reference)}{_joined(speed)}"
    return headline, best, [*_how_sure(report, best, able, reference), *_groups(others)]


def _failing(report: BenchReport, failing: list[Result]) -> str:
    if not failing:
        return ""
    named = f": {', '.join(one_line(r.name) for r in failing)}" if len(failing) <= 4 else ""
    return f"{len(failing)} of {len(report.results)} results fail{'s' * (len(failing) == 1)} a gate{named}."


def _accuracy(result: Result, reference: Result) -> str:
    """Whether it ranks as the reference does, with the figures."""
    theirs = spoken(reference)
    surely = between(result.map_delta_interval, points)
    sure = f"; 95 % sure: {surely}" if surely else ""
    if ranks_alike(result):
        said = f"it ranks as {theirs} does (mAP {percent(result.mAP)}, difference {points(result.map_delta)} points"
        return f"{said}{sure})"
    if result.map_delta is None:
        return f"its mAP could not be compared with that of {theirs}"
    if abs(result.map_delta) <= SAME_RANKING:
        return (
            f"it keeps mAP (difference {points(result.map_delta)} points{sure}), though its rank-1 moved by "
            f"{points(result.rank1_delta)} points"
        )
    verb = "loses" if result.map_delta < 0 else "gains"
    instead = f"{percent(result.mAP)} instead of {percent(reference.mAP)}"
    return f"it {verb} {abs(100 * result.map_delta):.2f} points of mAP ({instead}{sure}), which the gates allow"


def _speed(report: BenchReport, result: Result, reference: Result) -> str:
    """Such as "1.8x as fast at batch 1 (1.7x to 1.9x)"; empty if it was not timed beside the reference."""
    batch = next((b for b in batch_sizes(report) if speedup(report, result, b)), None)
    found = None if batch is None else speedup(report, result, batch)
    if found is None:
        return ""
    than = "" if result.device == reference.device else f" as {spoken(reference)}"
    if 1 / SAME_SPEED < found.value < SAME_SPEED:
        return f"about as fast{than} at batch {batch}{_range(found)}"
    if found.value < 1:
        return f"slower: {times(found.value)} as fast{than} at batch {batch}{_range(found)}"
    return f"{times(found.value)} as fast{than} at batch {batch}{_range(found)}"


def _joined(speed: str) -> str:
    """Behind what is said of accuracy."""
    return f", {'but' if speed.startswith('slower') else 'and'} is {speed}" if speed else ""


def _range(found: Estimate) -> str:
    return f" ({between(found.interval, times)})" if found.interval else " (too few samples to say how sure)"


def _how_sure(report: BenchReport, best: Result, able: list[Result], reference: Result) -> list[str]:
    """What the headline leaves open."""
    said = []
    queries = count(report.dataset.queries)
    if best.map_delta_interval is None:
        said.append("Too few queries to say how sure the difference of mAP is")
    elif (worst := best.map_delta_interval[0]) < -SAME_RANKING:
        said.append(
            f"With {queries} queries a true loss of up to {abs(100 * worst):.2f} points of mAP cannot be ruled out"
        )
    first = batch_sizes(report)[:1]
    mine = timing_at(best, first[0]) if first else None
    if mine and mine.flags:
        flags = "; ".join(mine.flags)
        said.append(
            f"Its latency at batch {mine.batch} is not to be trusted ({flags}): measure again on a quiet machine"
        )
    if not ranks_alike(best):
        alike = next((r for r in able if ranks_alike(r)), None)
        if alike:
            speed = _speed(report, alike, reference)
            said.append(f"The fastest that ranks as the reference does is {alike.name}{speed and f', {speed}'}")
        else:
            said.append("None that may ship ranks as the reference does")
    rivals = [r.name for r in able[1:] if mine and _as_fast(r, best, mine.batch)]
    if rivals:
        said.append(f"As fast, as far as this measurement can tell: {', '.join(rivals)}")
    return said


def _as_fast(rival: Result, best: Result, batch: int) -> bool:
    """The intervals of their medians overlap."""
    theirs, mine = timing_at(rival, batch), timing_at(best, batch)
    if theirs is None or mine is None or theirs.p50_interval_ms is None or mine.p50_interval_ms is None:
        return False
    return theirs.p50_interval_ms[0] <= mine.p50_interval_ms[1]


def _groups(others: list[Result]) -> list[str]:
    """The results by what became of their ranking."""
    if len(others) == 1:  # the headline speaks of nothing else
        return []
    alike = [r.name for r in others if ranks_alike(r)]
    rest = [r for r in others if not ranks_alike(r)]
    said = [f"Rank as the reference does ({len(alike)} of {len(others)}): {', '.join(alike)}"] if alike else []
    if rest:
        said.append(f"Rank otherwise ({len(rest)} of {len(others)}): {', '.join(map(_change, rest))}")
    return said


def _change(result: Result) -> str:
    if result.map_delta is None:
        return f"{result.name} (not compared)"
    if abs(result.map_delta) <= SAME_RANKING and result.rank1_delta is not None:
        return f"{result.name} (rank-1 {points(result.rank1_delta)} points)"
    return f"{result.name} (mAP {points(result.map_delta)} points)"


def _absent(report: BenchReport) -> list[str]:
    """Who failed, and who could not run here, by reason."""
    said = []
    for status, words in (("failed", "Went wrong"), ("unavailable", "Could not run here")):
        names: dict[str, list[str]] = {}
        for result in missing(report):
            if result.status == status and result.name != report.reference:
                names.setdefault(one_line(result.reason or "no reason given").rstrip("."), []).append(result.name)
        said += [f"{words}: " + "; ".join(f"{', '.join(who)} ({why})" for why, who in names.items())] if names else []
    return said


def _why_absent(report: BenchReport) -> str:
    found = report.result(report.reference)
    if found is None or found.status == "ok":
        return "was not measured"
    verb = "failed" if found.status == "failed" else "could not run here"
    return f"{verb} ({one_line(found.reason or 'no reason given').rstrip('.')})"


def _figures(report: BenchReport, best: Result) -> tuple[KeyFigure, ...]:
    """The numbers that decide, of the result that may ship."""
    figures = []
    batches = batch_sizes(report)
    mine = timing_at(best, batches[0]) if batches else None
    found = speedup(report, best, batches[0]) if batches else None
    if found:
        means = f"as fast as {report.reference}, batch {batches[0]}"
        figures.append(KeyFigure(value=times(found.value), means=means, sure=between(found.interval, times)))
    change = f"points of mAP against {report.reference}"
    figures.append(KeyFigure(value=points(best.map_delta), means=change, sure=between(best.map_delta_interval, points)))
    if mine:
        images = "one image" if mine.batch == 1 else f"{mine.batch} images"
        slow = "" if mine.p95_ms is None else f"95 of 100 calls within {number(mine.p95_ms)} ms"
        figures.append(KeyFigure(value=f"{number(mine.p50_ms)} ms", means=f"for {images}, typically", sure=slow))
    if most := best_throughput(best):
        means = "images per second at best"
        figures.append(KeyFigure(value=number(most.images_per_s), means=means, sure=f"batch {most.batch}"))
    return tuple(figure for figure in figures if figure.value != NONE)

"""Tables of a bench report, as values that the page and the Markdown share: their parts, and the table of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pmm.bench.pages.format import (
    NONE,
    between,
    cosine,
    count,
    device_label,
    number,
    one_line,
    percent,
    points,
    times,
)
from pmm.bench.pages.queries import (
    SAME_RANKING,
    best_throughput,
    completed,
    failed_gates,
    may_ship,
    ranks_alike,
    reference_of,
    shipping,
    shown_batches,
    speedup,
    timing_at,
)
from pmm.bench.result_schema import Interval, Result, Timing
from pmm.bench.schema import BenchReport

UNSTEADY = "!"
"""After an unreliable latency."""


@dataclass(frozen=True)
class Cell:
    text: str
    sub: str = ""
    """In small letters below: an interval, a unit."""
    tone: str = ""
    """good, mixed or bad for a judgement; best for the result of the verdict."""


@dataclass(frozen=True)
class Column:
    head: str
    sub: str = ""
    group: str = ""
    """Title above it and its neighbours of the same group."""
    words: bool = False
    """Text, to be aligned left."""


Figures = Callable[[Result], str | Cell]
"""The cell of a column, per result."""


@dataclass(frozen=True)
class Table:
    """`rows` hold a cell for the first column, which names the row, and one per further column."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Groups above the columns, as (title, columns under it); empty without any."""
        groups: list[tuple[str, int]] = []
        for column in self.columns:
            if groups and groups[-1][0] == column.group:
                groups[-1] = (column.group, groups[-1][1] + 1)
            else:
                groups.append((column.group, 1))
        return groups if any(title for title, _ in groups) else []


def table_of(
    report: BenchReport, results: Sequence[Result], columns: Iterable[tuple[Column, Figures]], *, keep: int = 0
) -> Table:
    """A row per result, without empty columns; the first `keep` stay in any case."""
    heads, filled = [Column("result")], []
    for index, (column, figures) in enumerate(columns):
        cells = [cell if isinstance(cell, Cell) else Cell(cell) for cell in map(figures, results)]
        if index < keep or any(cell.text != NONE for cell in cells):
            heads.append(column)
            filled.append(cells)
    names = [_name(report, result) for result in results]
    return Table(tuple(heads), tuple(zip(names, *filled, strict=True)))


def but_reference(report: BenchReport, figures: Figures) -> Figures:
    """`figures` of a comparison with the reference, which has none with itself."""
    reference = reference_of(report)
    return lambda result: NONE if result is reference else figures(result)


def results_table(report: BenchReport) -> Table:
    """One row per result that ran: whether it may ship, mAP and its change, latency, speed."""
    batches = shown_batches(report)
    first = batches[0] if batches else 0

    def change(result: Result) -> Cell:
        interval = result.map_delta_interval
        return Cell(points(result.map_delta), between(interval, points), loss_tone(result.map_delta, interval))

    def speed(result: Result) -> str | Cell:
        estimate = speedup(report, result, first)
        return Cell(times(estimate.value), between(estimate.interval, times)) if estimate else NONE

    def most(result: Result) -> str | Cell:
        timing = best_throughput(result)
        return Cell(number(timing.images_per_s), f"batch {timing.batch}") if timing else NONE

    def latency(timing: Timing) -> Cell:
        slow = "" if timing.p95_ms is None else number(timing.p95_ms)
        return Cell(marked(timing), slow, "mixed" if timing.flags else "")

    columns: list[tuple[Column, Figures]] = [
        (Column("may ship?", words=True), lambda r: ship_status(report, r)),
        (Column("mAP"), lambda r: percent(r.mAP)),
        (Column("difference", "points"), but_reference(report, change)),
        (Column("rank-1", "lost / gained"), but_reference(report, rank1_flips)),
        (Column("worst cosine"), but_reference(report, lambda r: cosine(r.min_cosine))),
        *((Column(f"batch {batch}", "p50, p95 ms"), timed(batch, latency)) for batch in batches),
        (Column("speedup", f"batch {first}"), but_reference(report, speed)),
        (Column("images/s", "highest"), most),
    ]
    return table_of(report, completed(report), columns, keep=2)


def ship_status(report: BenchReport, result: Result) -> Cell:
    """Whether the result may ship, in a word."""
    if failed := failed_gates(report, result):
        return Cell("fails", ", ".join(map(one_line, failed)), "bad")
    if result is reference_of(report):
        return Cell("reference")
    if may_ship(report, result):
        return Cell("may ship", "", "good") if ranks_alike(result) else Cell("may ship", "different ranking", "mixed")
    return Cell("no", "different ranking", "mixed")


def timed(batch: int, figures: Callable[[Timing], str | Cell]) -> Figures:
    """`figures` of the timing at one batch size, if there is one."""

    def cell(result: Result) -> str | Cell:
        timing = timing_at(result, batch)
        return NONE if timing is None else figures(timing)

    return cell


def marked(timing: Timing) -> str:
    """The median, with a mark if it is unreliable."""
    return f"{number(timing.p50_ms)} {UNSTEADY}" if timing.flags else number(timing.p50_ms)


def rank1_flips(result: Result) -> str:
    """Queries whose first crop turned wrong, and whose first crop turned right."""
    return both(count(result.rank1_lost), count(result.rank1_gained))


def loss_tone(delta: float | None, interval: Interval | None = None) -> str:
    """Tone of a difference: bad for a loss, mixed for one that may be random."""
    if delta is None or delta >= -SAME_RANKING:
        return ""
    return "mixed" if interval and interval[1] >= 0 else "bad"


def both(first: str, second: str) -> str:
    return NONE if first == second == NONE else f"{first} / {second}"


def lines(*texts: str) -> str:
    """The `texts` that are not empty, one below the other."""
    return "\n".join(text for text in texts if text not in ("", NONE))


def _name(report: BenchReport, result: Result) -> Cell:
    words = ["reference"] if result is reference_of(report) else []
    if len({r.device for r in completed(report)}) > 1:
        words.append(device_label(result.device))
    return Cell(one_line(result.name), ", ".join(words), "best" if result in shipping(report)[:1] else "")

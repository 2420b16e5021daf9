"""What wrong preprocessing costs, in a bench report: a section, and a line for the terminal."""

from __future__ import annotations

from pmm.bench.pages.format import NONE, between, one_line, percent, points
from pmm.bench.pages.sections import Part, Section
from pmm.bench.pages.tables import Cell, Column, Table, loss_tone
from pmm.bench.result_schema import Interval
from pmm.bench.schema import BenchReport, WrongPreprocessing


def section(report: BenchReport) -> Section | None:
    """What mistakes in preparing crops cost; None if that was not measured."""
    wrong = report.wrong_preprocessing
    if wrong is None:
        return None
    crops = f"{wrong.queries:,} queries and {wrong.gallery:,} gallery crops"
    which = f"on all {crops}"
    if wrong.sample:
        which = (
            f"on a sample: all crops of {wrong.identities:,} identities, {crops}. Among so few a query is easier than "
            "among all, so only the differences count"
        )
    return Section(
        anchor="preprocessing",
        title="What wrong preprocessing costs",
        note=f"The same network, {report.reference}, on crops that were prepared with one mistake each, {which}. "
        f"Correct preprocessing: {report.checkpoint.preprocessing}.",
        parts=(Part(table=_table(wrong)),),
        terms=(
            ("mistake", "in the program that prepares the crops; queries and gallery are prepared alike"),
            ("difference, interval", "from the correct preprocessing on the same crops, in points, and its 95 % "
             "interval (bootstrap over queries)"),
        ),
    )  # fmt: skip


def mistakes_line(report: BenchReport) -> str:
    """The same in one line, mAP alone; empty if nothing was measured."""
    wrong = report.wrong_preprocessing
    measured = [cost for cost in wrong.costs if cost.mAP is not None] if wrong else []
    if wrong is None or not measured:
        return ""
    costs = "; ".join(f"{points(cost.map_delta)} ({one_line(cost.mistake)})" for cost in measured)
    crops = f"{wrong.queries + wrong.gallery:,} crops"
    return f"wrong preprocessing changes mAP of {one_line(report.reference)} on {crops}, in points: {costs}"


def _table(wrong: WrongPreprocessing) -> Table:
    def change(delta: float | None, interval: Interval | None) -> Cell:
        return Cell(points(delta), between(interval, points), loss_tone(delta, interval))

    right = (Cell("none", "correct preprocessing"), Cell(percent(wrong.mAP)), Cell(NONE), Cell(percent(wrong.rank1)))
    rows = [(*right, Cell(NONE))]
    for cost in wrong.costs:
        rows.append(
            (
                Cell(one_line(cost.mistake), one_line(cost.reason) and f"not measured: {one_line(cost.reason)}"),
                Cell(percent(cost.mAP)),
                change(cost.map_delta, cost.map_delta_interval),
                Cell(percent(cost.rank1)),
                change(cost.rank1_delta, cost.rank1_delta_interval),
            )
        )
    difference = Column("difference", "points, interval")
    heads = (Column("mistake"), Column("mAP"), difference, Column("rank-1"), difference)
    return Table(heads, tuple(rows))

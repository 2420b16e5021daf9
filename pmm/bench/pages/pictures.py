"""Pictures of ranked lists for a bench report: of the reference, and of each backend's largest losses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pmm.bench.pages.format import one_line, percent
from pmm.bench.result_schema import LostQuery
from pmm.bench.schema import BenchReport
from pmm.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from pmm.bench.accuracy import AccuracyEvaluator, Reference


MIN_LOSS = 0.01
"""Loss of average precision from which a query has a picture: below it the lists look the same."""
QUERIES, ITEMS, HEIGHT = 5, 5, 128
"""Of a picture: queries, items in each list, and the height of a crop in pixels."""


@dataclass(frozen=True, kw_only=True)
class ReportPictures:
    """Pictures of a report, besides its plots."""

    ranked: Image.Image | None = None
    """Ranked lists of the reference."""
    worst: Mapping[str, Image.Image] = field(default_factory=dict)
    """Name of a result -> its queries with the largest loss, by `worst_picture`."""


def pictures(report: BenchReport, accuracy: AccuracyEvaluator, reference: Reference) -> ReportPictures:
    """All pictures of a report; none if a crop can no longer be read: that must not prevent the report."""
    from pmm.visualize.ranked import ranked_picture

    try:
        ranked = ranked_picture(accuracy.split, reference.embedded, reference.ranking.per_query_ap)
        return ReportPictures(ranked=ranked, worst=worst_pictures(report))
    except UserError as error:
        logging.getLogger("pmm").warning("the report has no pictures of ranked lists: %s", error)
        return ReportPictures()


def worst_pictures(report: BenchReport) -> dict[str, Image.Image]:
    """`worst_picture` of every result with a query that lost a point or more. Raises UserError if a crop cannot be
    read."""
    drawn = {}
    for result in report.results:
        lost = tuple(q for q in result.worst_queries if q.ap_reference - q.ap >= MIN_LOSS)
        if lost:
            drawn[result.name] = worst_picture(result.name, lost[:QUERIES], report.reference)
    return drawn


def worst_picture(name: str, lost: Sequence[LostQuery], reference: str) -> Image.Image:
    """One line per query in `lost`: its crop, the first crops of the reference, and those of the result `name`.

    Raises ValueError if there is none, UserError if a crop cannot be read.
    """
    from pmm.visualize.lists import compared_lists

    return compared_lists(
        [Path(q.path) for q in lost],
        [_row(q.first_reference, q.right_reference) for q in lost],
        [_row(q.first, q.right) for q in lost],
        heads=(one_line(reference), one_line(name)),
        titles=[
            f"AP {percent(q.ap_reference)} -> {percent(q.ap)}   (identity {q.pid}, camera {q.camid})" for q in lost
        ],
        height=HEIGHT,
    )


def _row(paths: tuple[str, ...], right: tuple[bool, ...]) -> list[tuple[Path, bool | None]]:
    row: list[tuple[Path, bool | None]] = [(Path(path), judged) for path, judged in zip(paths, right, strict=True)]
    return row[:ITEMS]

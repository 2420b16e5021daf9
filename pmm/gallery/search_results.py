"""What searches found: as tables to read, as JSON, and as CSV. Loads no torch."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pmm.gallery.storage.thresholds import Threshold
from pmm.utils.errors import printable

SHOWN = ("camera", "time")
"""Columns of the gallery that a table shows."""
DATES = (1e8, 1e11)
"""Seconds that are shown as a date: since 1970, from 1973 on; what is smaller counts something else."""


@dataclass(frozen=True, kw_only=True)
class FoundCrop:
    """A row of the gallery, as near as `distance` to the query; `columns` are the gallery's, by name."""

    id: str | int
    distance: float
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """The crops nearest to one query, nearest first."""

    query: str
    found: tuple[FoundCrop, ...]


@dataclass(frozen=True, kw_only=True)
class SearchResults:
    """Of one or several queries in one gallery; with a `threshold`, what lies within it is a match."""

    gallery: str
    metric: str
    results: tuple[QueryResult, ...]
    threshold: float | None = None
    origin: Threshold | None = None
    """What the gallery says of the threshold, if it comes from there."""

    def is_match(self, crop: FoundCrop) -> bool | None:
        """Whether the crop lies within the threshold; None without one."""
        return None if self.threshold is None else crop.distance <= self.threshold

    def as_table(self) -> str:
        """A table per query, headed by its name where there are several; a line per crop, in columns."""
        single = len(self.results) == 1
        return "\n\n".join(self._table(result) if single else self._titled(result) for result in self.results)

    def as_json(self) -> str:
        """All of it, with every column of the gallery; numbers in full."""
        facts: dict[str, Any] = {"gallery": self.gallery, "metric": self.metric, "threshold": self.threshold}
        if self.origin:
            facts["threshold_of"] = {name: value for name, value in vars(self.origin).items() if value is not None}
        facts["queries"] = [
            {
                "query": result.query,
                "found": [
                    {"rank": rank, "id": crop.id, "distance": crop.distance}
                    | ({} if self.threshold is None else {"match": self.is_match(crop)})
                    | crop.columns
                    for rank, crop in enumerate(result.found, start=1)
                ],
            }
            for result in self.results
        ]
        return json.dumps(facts, indent=1)

    def as_csv(self) -> str:
        """A line per query and crop, with every column of the gallery; match is 1, 0, or empty without a threshold."""
        names = list(dict.fromkeys(name for result in self.results for crop in result.found for name in crop.columns))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("query", "rank", "id", "distance", "match", *names))
        for result in self.results:
            for rank, crop in enumerate(result.found, start=1):
                match = self.is_match(crop)
                cells = (result.query, rank, crop.id, repr(crop.distance), "" if match is None else int(match))
                writer.writerow((*cells, *(crop.columns.get(name, "") for name in names)))
        return text.getvalue().rstrip("\n")

    def _titled(self, result: QueryResult) -> str:
        matches = sum(map(bool, map(self.is_match, result.found)))
        count = "" if self.threshold is None else f" ({matches} within the threshold)"
        return f"{printable(result.query)}{count}\n{self._table(result)}"

    def _table(self, result: QueryResult) -> str:
        shown = [name for name in SHOWN if any(name in crop.columns for crop in result.found)]
        judged = [] if self.threshold is None else ["match"]
        lines = [["rank", "distance", *judged, *shown, "id"]]
        for rank, crop in enumerate(result.found, start=1):
            match = [] if self.threshold is None else ["match" if self.is_match(crop) else "no match"]
            values = [_shown(crop.columns.get(name, "")) for name in shown]
            lines.append([str(rank), f"{crop.distance:.4f}", *match, *values, printable(crop.id)])
        return aligned_columns(lines, right=2)


def aligned_columns(lines: Sequence[Sequence[str]], right: int = 0) -> str:
    """Lines of cells as columns two blanks apart; the first `right` are aligned to the right."""
    wide = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place < right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, wide, strict=True))
        ).rstrip()
        for line in lines
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        if DATES[0] <= value < DATES[1]:
            precise = "milliseconds" if round(value % 1, 3) % 1 else "seconds"
            return datetime.fromtimestamp(round(value, 3), UTC).isoformat(timespec=precise).replace("+00:00", "Z")
        return f"{value:.15g}"
    return "" if value is None else printable(value)

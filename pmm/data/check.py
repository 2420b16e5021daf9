"""The report of pmm check: what a data set holds, what is wrong with it, whether it is usable. Loads no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from pmm.data.counts import Counts, Figure, cameras_of, counts_of, published_figures
from pmm.data.findings import Finding, find
from pmm.data.images import ImageFacts, inspect_images
from pmm.data.readers import scan
from pmm.data.scan import Scan
from pmm.utils.errors import printable
from pmm.utils.hardware import usable_cores

SCHEMA = 1
EXAMPLES = 3
LONGEST_EXAMPLE = 200


@dataclass(frozen=True, kw_only=True)
class Report:
    """Sizes are smallest, median and largest in pixels, of the images that can be read."""

    schema: int
    dataset: str
    folder: str
    layout: str
    parts: dict[str, Counts]
    cameras: int
    width: tuple[int, int, int] | None
    height: tuple[int, int, int] | None
    published: tuple[Figure, ...]
    findings: tuple[Finding, ...]
    usable: bool
    verdict: str

    def of_level(self, level: str) -> list[Finding]:
        """The findings that are problems, warnings or notes."""
        return [finding for finding in self.findings if finding.level == level]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"published": [figure._asdict() for figure in self.published]}


def check(dataset: str, root: str | Path, *, threads: int = 0, label: str = "") -> Report:
    """Inspect every crop of the data set `dataset` under `root`; with a `label`, with a progress bar of that name.

    Raises InvalidValue for an unknown name, InvalidFile for a missing folder or another layout; all else that is wrong
    is in the report.
    """
    from tqdm import tqdm

    scanned = scan(dataset, root)
    paths = list(dict.fromkeys(sample.path for part in scanned.without_junk().values() for sample in part))
    with tqdm(total=len(paths), desc=label, unit="img", leave=False, disable=None if label else True) as bar:
        facts = dict(zip(paths, inspect_images(paths, threads or usable_cores(), bar.update), strict=True))
    return _report(scanned, facts)


def lines(report: Report) -> list[str]:
    """The report in lines for the screen; each finding is one line with three examples at most."""
    head = [f"{report.dataset} in {report.folder}", report.layout, "", *_table(report), _totals(report), ""]
    width = max((len(f"{finding.count:,}") for finding in report.findings), default=0)
    findings = [_line(finding, width) for finding in report.findings]
    return [*head, *findings, *([""] if findings else []), report.verdict]


def _report(scanned: Scan, facts: dict[Path, ImageFacts]) -> Report:
    findings = find(scanned, facts)
    good = [fact for fact in facts.values() if not fact.fault]
    problems, warnings = (sum(f.level == level for f in findings) for level in ("problem", "warning"))
    if problems:
        verdict = f"NOT usable: {_plural(problems, 'problem')}"
    else:
        verdict = f"usable, {_plural(warnings, 'warning')}" if warnings else "usable"
    return Report(
        schema=SCHEMA,
        dataset=scanned.spec.name,
        folder=printable(scanned.folder),
        layout=scanned.layout,
        parts=counts_of(scanned),
        cameras=cameras_of(scanned),
        width=_spread([fact.width for fact in good]),
        height=_spread([fact.height for fact in good]),
        published=tuple(published_figures(scanned)),
        findings=tuple(findings),
        usable=not problems,
        verdict=verdict,
    )


def _spread(values: Sequence[int]) -> tuple[int, int, int] | None:
    return (min(values), median_low(values), max(values)) if values else None


def _table(report: Report) -> list[str]:
    """Aligned columns; published counts only for data sets that have them."""
    figures = {figure.key: figure for figure in report.published}
    images_of = {name: figures.get(name) for name in report.parts}
    ids_of = {"train": figures.get("train_ids"), "query": figures.get("test_ids")}
    rows = [["", "images", "published", "identities", "published", "cameras", "junk", "distractors"]]
    for name, counts in report.parts.items():
        numbers = [
            f"{n:,}" for n in (counts.images, counts.identities, counts.cameras, counts.junk, counts.distractors)
        ]
        images, identities, cameras, junk, distractors = numbers
        cameras = cameras if report.cameras else "unknown"
        row = [
            name,
            images,
            _versus_published(images_of[name]),
            identities,
            _versus_published(ids_of.get(name)),
            cameras,
            junk,
            distractors,
        ]
        rows.append(row)
    if not figures:
        rows = [[cell for column, cell in enumerate(row) if column not in (2, 4)] for row in rows]
    left = (0, 2, 4) if figures else (0,)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def _versus_published(figure: Figure | None) -> str:
    if figure is None:
        return ""
    off = figure.found - figure.published
    return f"{off:+,} ({figure.published:,})" if off else "as published"


def _totals(report: Report) -> str:
    cameras = _plural(report.cameras, "camera") + " in all" if report.cameras else "cameras unknown"
    figure = next((figure for figure in report.published if figure.key == "cameras"), None)
    beside = ""
    if figure:
        beside = ", as published" if figure.found == figure.published else f" (published: {figure.published})"
    sizes = ""
    if report.width and report.height:
        pairs = [f"{width}x{height}" for width, height in zip(report.width, report.height, strict=True)]
        sizes = f"; width x height from {pairs[0]} to {pairs[2]} pixels, median {pairs[1]}"
    return f"{cameras}{beside}{sizes}"


def _line(finding: Finding, width: int) -> str:
    count = f"{finding.count:>{width},} x " if finding.about else " " * (width + 3)
    shown_of = ", ".join(
        about if len(about) <= LONGEST_EXAMPLE else about[: LONGEST_EXAMPLE - 3] + "..."
        for about in finding.about[:EXAMPLES]
    )
    more = f" and {len(finding.about) - EXAMPLES:,} more" if len(finding.about) > EXAMPLES else ""
    examples = f": {shown_of}{more}" if finding.about else ""
    return f"{finding.level:<7}  {count}{finding.text}{examples}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"

"""The report of a bench as it may leave the machine: without its folders and, if asked for, without people."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from pmm.bench.pages.pictures import ReportPictures, worst_pictures
from pmm.bench.pages.report import write_reports
from pmm.bench.result_schema import Result
from pmm.bench.schema import BenchReport
from pmm.utils.errors import UserError

RANKED = "ranked-lists.png"
FOLDERS = re.compile(r"(?<![\w.:/<~-])(?:~|[A-Za-z]:)?[/\\](?:[^/\\\s'\"`,;:()<>|]+[/\\])+(?=[^/\\\s])")
"""The folders of an absolute path, in a sentence too: all but its last part."""
T = TypeVar("T")


def write_pages(report: BenchReport, report_folder: Path, out: Path, *, pictures: bool) -> None:
    """Write `report` anew into `out`, from whose pages in `report_folder` the ranked lists are taken.

    Where crops cannot be read any more, a warning says so, and the pages have no pictures of lost queries.
    """
    drawn = _pictures(report, report_folder) if pictures else ReportPictures()
    shown = report if pictures else without_people(report)
    write_reports(without_folders(shown), out, drawn)


def without_people(report: BenchReport) -> BenchReport:
    """`report` without the names of crops."""

    def stripped(result: Result) -> Result:
        return dataclasses.replace(result, worst_crop=None, worst_queries=())

    crops = {result.worst_crop for result in report.results if result.worst_crop}
    failures = tuple(
        dataclasses.replace(failure, message=_without(failure.message, crops)) for failure in report.gates.failures
    )
    gates = dataclasses.replace(report.gates, failures=failures)
    return dataclasses.replace(report, results=tuple(map(stripped, report.results)), gates=gates)


def without_folders(report: BenchReport) -> BenchReport:
    """`report` without the folders of this machine: crops are named within their data set, other files by name."""
    root = f"{report.dataset.root.rstrip('/')}/"
    shown = dataclasses.replace(
        report,
        checkpoint=dataclasses.replace(report.checkpoint, path=Path(report.checkpoint.path).name),
        dataset=dataclasses.replace(report.dataset, root=Path(report.dataset.root).name),
        results=tuple(
            dataclasses.replace(result, artifact=result.artifact and Path(result.artifact).name)
            for result in report.results
        ),
    )
    return _replaced(shown, lambda text: FOLDERS.sub("", text.replace(root, "") if len(root) > 1 else text))


def _without(text: str, names: set[str]) -> str:
    for name in names:
        text = text.replace(f" ({name})", "")
    return text


def _replaced(value: T, change: Any) -> T:
    """`value` with each text in it, at any depth, changed."""
    changed: Any = value
    if isinstance(value, str):
        changed = change(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: _replaced(getattr(value, each.name), change) for each in dataclasses.fields(value)}
        changed = dataclasses.replace(value, **fields)
    elif isinstance(value, tuple | list):
        changed = type(value)(_replaced(each, change) for each in value)
    elif isinstance(value, dict):
        changed = {key: _replaced(each, change) for key, each in value.items()}
    return changed


def _pictures(report: BenchReport, report_folder: Path) -> ReportPictures:
    ranked, path = None, report_folder / RANKED
    if path.is_file():
        with Image.open(path) as image:
            ranked = image.convert("RGB")
    try:
        return ReportPictures(ranked=ranked, worst=worst_pictures(report))
    except UserError as error:
        logging.getLogger("pmm").warning("the report has no pictures of lost queries: %s", error)
        return ReportPictures(ranked=ranked)

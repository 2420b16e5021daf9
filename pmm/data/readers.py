"""Data sets on disk -> `Split`. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

from pmm.data.folders import form_of, looks_like_folders, scan_folders
from pmm.data.layouts import Layout, layout_of, lookalikes
from pmm.data.market import scan_market
from pmm.data.msmt17 import scan_msmt17
from pmm.data.samples import Split
from pmm.data.scan import IMAGE_SUFFIXES, Problem, Scan, is_folder, shown
from pmm.errors import UserError

__all__ = ["DEFAULT_LAYOUT", "IMAGE_SUFFIXES", "read_dataset", "scan"]

DEFAULT_LAYOUT = "market1501"
"""Of a root that nothing else says the layout of."""
_SCANNERS = {"market": scan_market, "msmt17": scan_msmt17, "folder": scan_folders}


def read_dataset(name: str, root: str | Path) -> Split:
    """The data set `name` under `root`: junk dropped, distractors kept, cameras of named data sets zero-based.

    Synthetic people are on disk as Market-1501 and are read by the same code. Raises UserError for an unknown name, a
    missing folder, another layout (saying what was found), and the first of whatever `scan` finds wrong.
    """
    found = scan(name, root)
    if found.problems:
        raise UserError(_first_of(found.problems))
    return Split(**found.people(), notes=tuple(found.notes))


def scan(name: str, root: str | Path) -> Scan:
    """The data set `name` under `root` as it lies there, with junk and a list of problems that a reader refuses.

    Raises UserError for an unknown name, a missing folder, or another layout.
    """
    layout = layout_of(name)
    return _SCANNERS[layout.kind](layout, _locate(layout, Path(root)))


def _first_of(problems: list[Problem]) -> str:
    first = problems[0]
    alike = sum(problem.kind == first.kind for problem in problems) - 1
    others = len(problems) - 1 - alike
    more = [f"{alike} more like this"] if alike else []
    if others:
        more.append(f"{others} other problem{'s' if others > 1 else ''}")
    return f"{first} (and {' and '.join(more)}; python -m pmm.data.check lists all)" if more else str(first)


def _locate(layout: Layout, root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; expected the root of {layout.name}")
    if layout.kind == "folder":
        alike = lookalikes(root)  # any tree is folders in folders: the other layouts go first
        place = root if not alike and form_of(root) else None
    else:
        place = layout.place_below(root)
        alike = lookalikes(root) or ["folder"] * looks_like_folders(root) if place is None else []
    if place is not None:
        return place
    with os.scandir(root) as entries:
        found = sorted(shown(entry.name) + "/" * is_folder(entry) for entry in entries)
    listed = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "") if found else "nothing"
    advice = f"; it looks like --dataset {' or '.join(alike)}" if alike else _lacking(layout, root)
    raise UserError(
        f"{shown(root)} has not the layout of {layout.name}: expected {layout.expected}; found {listed}{advice}"
    )


def _lacking(layout: Layout, root: Path) -> str:
    """What the place that comes nearest to `layout` lacks, if any has a part of it."""
    missing = {place: layout.missing_in(root / place) for place in layout.places if (root / place).is_dir()}
    place = min(missing, key=lambda place: len(missing[place]), default="")
    if len(missing[place]) in (0, len(layout.folders) + len(layout.lists)):
        return ""
    return f"; {shown(root / place)} lacks {', '.join(missing[place])}"

"""Data sets on disk -> `ReidDataset`. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

from pmm.data.folders import PARTS, form_of, looks_like_folders, scan_folders
from pmm.data.layouts import DatasetSpec, dataset_spec, lookalikes, named_by
from pmm.data.market import scan_market
from pmm.data.msmt17 import scan_msmt17
from pmm.data.samples import ReidDataset
from pmm.data.scan import Problem, Scan, is_folder, shown
from pmm.utils.errors import UserError

DEFAULT_LAYOUT = "market1501"
"""Of a root that nothing else says the layout of."""
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
DEPTH, MOST_CHILDREN = 3, 20
"""How far below a wrong root a data set is looked for, and in how many folders of each."""
_SCANNERS = {"market": scan_market, "msmt17": scan_msmt17, "folder": scan_folders}


def read_dataset(name: str, root: str | Path) -> ReidDataset:
    """The data set `name` under `root`: junk dropped, distractors kept, cameras of named data sets zero-based.

    Synthetic people are on disk as Market-1501 and are read by the same code. Raises UserError for an unknown name, a
    missing folder, another layout (saying what was found), and the first of whatever `scan` finds wrong.
    """
    found = scan(name, root)
    if found.problems:
        raise UserError(_first_of(found.problems))
    return ReidDataset(**found.people(), notes=tuple(found.notes))


def scan(name: str, root: str | Path) -> Scan:
    """The data set `name` under `root` as it lies there, with junk and a list of problems that a reader refuses.

    Raises UserError for an unknown name, a missing folder, or another layout.
    """
    layout = dataset_spec(name)
    place = _locate(layout, Path(root))
    found = _SCANNERS[layout.kind](layout, place)
    if layout.places != ("",) and (others := _anothers(layout, place)):
        found.notes.append(f"a folder named {shown(place.name)} usually holds {' or '.join(others)}, not {layout.name}")
    return found


def _first_of(problems: list[Problem]) -> str:
    first = problems[0]
    alike = sum(problem.kind == first.kind for problem in problems) - 1
    others = len(problems) - 1 - alike
    more = [f"{alike} more like this"] if alike else []
    if others:
        more.append(f"{others} other problem{'s' if others > 1 else ''}")
    return f"{first} (and {' and '.join(more)}; pmm check lists all)" if more else str(first)


def _locate(layout: DatasetSpec, root: Path) -> Path:
    if not root.is_dir():
        archive = root.is_file() and root.suffix.lower() in ARCHIVES
        what = (
            "an archive; unpack it and give the folder"
            if archive
            else f"not a folder; expected the root of {layout.name}"
        )
        raise UserError(f"{shown(root)} is {what}")
    place = _place(layout, root)
    if place is not None:
        return place
    with os.scandir(root) as entries:
        found = sorted(shown(entry.name) + "/" * is_folder(entry) for entry in entries)
    listed = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "") if found else "nothing"
    advice = _advice(layout, root, [name for name in found if Path(name).suffix.lower() in ARCHIVES])
    raise UserError(
        f"{shown(root)} has not the layout of {layout.name}: expected {layout.expected}; found {listed}"
        + (f"; {advice}" if advice else "")
    )


def _place(layout: DatasetSpec, root: Path) -> Path | None:
    """Where `layout` is, at `root` or in one of its places below it."""
    if layout.kind == "folder":  # any tree is folders in folders: the other layouts go first
        return root if not lookalikes(root) and form_of(root) else None
    return layout.place_below(root)


def _advice(layout: DatasetSpec, root: Path, archives: list[str]) -> str:
    """What to do about a `root` that has not the `layout`, in words; empty if nothing is known."""
    if elsewhere := _elsewhere(layout, root):
        return f"it is in {shown(elsewhere)}: give that as root"
    if renamed := _capitalised(layout, root):
        return f"rename {renamed}"
    if alike := lookalikes(root) or ["folder"] * (layout.kind != "folder" and looks_like_folders(root)):
        return f"it looks like --dataset {' or '.join(alike)}"
    if lacking := _lacking(layout, root):
        return lacking
    return f"unpack {archives[0]}, and give the folder" if archives else ""


def _elsewhere(layout: DatasetSpec, root: Path) -> Path | None:
    """The folder above `root`, or one of those below it, that has the `layout`."""
    if layout.kind == "folder":  # which nearly every folder has
        return None
    below, found = [root], [root.resolve().parent]
    for _ in range(DEPTH):
        below = [child for folder in below for child in _folders_in(folder)[:MOST_CHILDREN]]
        found += below
    return next((folder for folder in found if layout.is_at(folder) and not _anothers(layout, folder)), None)


def _anothers(layout: DatasetSpec, folder: Path) -> list[str]:
    """The data sets that `folder` is named after, if `layout` is none of them."""
    names = named_by(folder)
    return [] if layout.name in names else names


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if not e.name.startswith(".") and is_folder(e))
    except OSError:
        return []


def _capitalised(layout: DatasetSpec, root: Path) -> str:
    """Which folders of `root` are those of the layout but for their capital letters, and what to call them."""
    names = layout.folders or PARTS
    there = {path.name for path in _folders_in(root)}
    pairs = [(name, wanted) for name in sorted(there) for wanted in names if name.casefold() == wanted != name]
    return ", ".join(f"{shown(root / name)} to {wanted}" for name, wanted in pairs if wanted not in there)


def _lacking(layout: DatasetSpec, root: Path) -> str:
    """What the place that comes nearest to `layout` lacks, if any has a part of it."""
    missing = {place: layout.missing_in(root / place) for place in layout.places if (root / place).is_dir()}
    place = min(missing, key=lambda place: len(missing[place]), default="")
    if len(missing[place]) in (0, len(layout.folders) + len(layout.lists)):
        return ""
    return f"{shown(root / place)} lacks {', '.join(missing[place])}"

"""Data sets on disk -> `ReidDataset`. Loads no torch."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path

from pmm.data.dataset_specs import DatasetSpec, dataset_spec, names_at, names_for_folder
from pmm.data.folder_layout import PARTS_OF_OTHERS
from pmm.data.folders import PARTS, looks_like_folders, parts_in, scan_folders
from pmm.data.left_out import ARCHIVES, is_image_name, left_out_lines
from pmm.data.market import scan_market
from pmm.data.msmt17 import scan_msmt17
from pmm.data.samples import ReidDataset
from pmm.data.scan import Problem, Scan, is_folder
from pmm.utils.errors import InvalidFile, UserError, printable

DEFAULT_DATASET = "market1501"
"""The data set that a root is read as if its name is not known."""
DEPTH, MAX_CHILDREN = 3, 20
"""How many levels below a wrong root a data set is searched, and in how many folders of each."""
LAYOUTS = {"market": scan_market, "msmt17": scan_msmt17, "folder": scan_folders}
"""`DatasetSpec.layout` -> what lists the files of it."""


def read_dataset(name: str, root: str | Path, *, flags: str = "") -> ReidDataset:
    """The data set `name` under `root`: junk dropped, distractors kept, cameras of named data sets zero-based.

    The synthetic data set has the layout of Market-1501 and is read by the same code. Raises InvalidValue for an
    unknown name, InvalidFile for a missing folder, another layout, and the first of the problems that `scan` lists;
    they name --dataset and --root, or with `flags` "verify" --verify-dataset and --verify-root.
    """
    try:
        scanned = scan(name, root)
        if scanned.problems:
            raise _first_of(scanned.problems)
    except UserError as error:
        if flags:
            for fact in ("problem", "expected", "hint"):
                setattr(error, fact, re.sub("--(?=dataset|root)", f"--{flags}-", getattr(error, fact)))
        raise
    left_out = tuple(left_out_lines(scanned.skipped, scanned.folder))
    return ReidDataset(**scanned.without_junk(), notes=tuple(scanned.notes), left_out=left_out, name=scanned.spec.name)


def scan(name: str, root: str | Path) -> Scan:
    """The data set `name` under `root` as it is on disk, with junk and a list of its problems.

    Raises InvalidValue for an unknown name, InvalidFile for a missing folder or another layout.
    """
    spec = dataset_spec(name)
    place = _locate(spec, Path(root))
    scanned = LAYOUTS[spec.layout](spec, place)
    if spec.places != ("",) and (others := _other_names(spec, place)):
        scanned.notes.append(
            f"a folder named {printable(place.name)} usually holds {' or '.join(others)}, not {spec.name}"
        )
    return scanned


def _first_of(problems: list[Problem]) -> InvalidFile:
    first = problems[0]
    alike = sum(problem.kind == first.kind for problem in problems) - 1
    others = len(problems) - 1 - alike
    more = [f"{alike} more like this"] if alike else []
    if others:
        more.append(f"{others} other problem{'s' if others > 1 else ''}")
    problem = f"line {first.line}: " * bool(first.line) + f"{first.kind}; {first.detail}"
    if not more:
        return InvalidFile(problem, path=first.path)
    return InvalidFile(f"{problem} (and {' and '.join(more)})", path=first.path, hint="pmm check lists all")


def _locate(spec: DatasetSpec, root: Path) -> Path:
    if not root.is_dir():
        if root.is_file() and root.suffix.lower() in ARCHIVES:
            raise InvalidFile("it is an archive", path=root, hint="unpack it and give the folder")
        problem = "it is not a folder" if root.exists() else "there is no such folder"
        raise InvalidFile(problem, path=root, expected=f"the root of {spec.name}", hint=_nearest(root))
    if not os.access(root, os.R_OK | os.X_OK):
        raise InvalidFile("no permission to read it", path=root, hint="check its permissions")
    place = _place(spec, root)
    if place is not None:
        return place
    with os.scandir(root) as entries:
        names = sorted(printable(entry.name) + "/" * is_folder(entry) for entry in entries)
    listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"
    problem = f"it does not have the layout of {spec.name} (it holds {listed})"
    advice = _advice(spec, root, [name for name in names if Path(name).suffix.lower() in ARCHIVES])
    raise InvalidFile(problem, path=root, expected=spec.expected, hint=advice)


def _nearest(root: Path) -> str:
    """The folder that a missing `root` may mean, or the last one on the way to it that is there."""
    if root.exists():
        return f"give the folder that it is in, {printable(root.parent)}"
    above = next(folder for folder in root.absolute().parents if folder.is_dir())
    missing = root.absolute().relative_to(above).parts[0]
    alike = get_close_matches(missing, [folder.name for folder in _folders_in(above)], n=1)
    return f"did you mean {printable(above / alike[0])}?" if alike else f"{printable(above)} is there"


def _place(spec: DatasetSpec, root: Path) -> Path | None:
    """The folder of the data set, `root` or one of its places below it."""
    if spec.layout == "folder":  # any tree is folders in folders: the other data sets go first
        return root if not names_at(root) and parts_in(root) else None
    return spec.place_below(root)


def _advice(spec: DatasetSpec, root: Path, archives: list[str]) -> str:
    """What to do about a `root` without the data set, in words; empty if nothing is known."""
    if elsewhere := _elsewhere(spec, root):
        return f"use --root {printable(elsewhere)}, which holds it"
    if renamed := _capitalised(spec, root):
        return f"rename {renamed}"
    if alike := names_at(root) or ["folder"] * (spec.layout != "folder" and looks_like_folders(root)):
        return f"it looks like --dataset {' or '.join(alike)}"
    if spec.layout == "folder" and (advice := _advice_for_one_folder(root)):
        return advice
    if missing := _missing(spec, root):
        return missing
    return f"unpack {archives[0]} and give the folder" if archives else ""


def _advice_for_one_folder(root: Path) -> str:
    """What to do about a `root` that holds images itself, as the folder of one identity or of a part does."""
    above = root.resolve().parent
    if not _holds_images(root):
        return ""
    if alike := names_at(above):
        return f"it is a part of a data set: use --dataset {' or '.join(alike)} --root {printable(above)}"
    if sum(map(_holds_images, _folders_in(above)[:MAX_CHILDREN])) > 1:
        return f"if it is the folder of one identity, use --root {printable(above)}"
    return "put the images of each identity into a folder of its own (pmm embed takes images of unknown people)"


def _holds_images(folder: Path) -> bool:
    try:
        return any(map(is_image_name, os.listdir(folder)))
    except OSError:
        return False


def _elsewhere(spec: DatasetSpec, root: Path) -> Path | None:
    """The folder above `root`, or one of those below it, that holds the data set."""
    if spec.layout == "folder":  # nearly every folder would do
        return None
    level, searched = [root], [root.resolve().parent]
    for _ in range(DEPTH):
        level = [child for folder in level for child in _folders_in(folder)[:MAX_CHILDREN]]
        searched += level
    return next((folder for folder in searched if spec.is_at(folder) and not _other_names(spec, folder)), None)


def _other_names(spec: DatasetSpec, folder: Path) -> list[str]:
    """The data sets that `folder` is named after, if `spec` is none of them."""
    names = names_for_folder(folder)
    return [] if spec.name in names else names


def _folders_in(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(e.path) for e in entries if not e.name.startswith(".") and is_folder(e))
    except OSError:
        return []


def _capitalised(spec: DatasetSpec, root: Path) -> str:
    """Which folders of `root` to rename, because they are those of the data set but for capital letters, or as others
    name them."""
    folders = {path.name for path in _folders_in(root)}
    usual = {} if spec.folders else PARTS_OF_OTHERS
    pairs = [
        (name, to)
        for name in sorted(folders)
        for to in spec.folders or PARTS
        if to in (name.casefold(), usual.get(name.casefold())) and name != to
    ]
    return ", ".join(f"{printable(root / name)} to {to}" for name, to in pairs if to not in folders)


def _missing(spec: DatasetSpec, root: Path) -> str:
    """What is missing in the place that holds most of the data set, if any place holds a part of it."""
    missing = {place: spec.missing_in(root / place) for place in spec.places if (root / place).is_dir()}
    place = min(missing, key=lambda place: len(missing[place]), default="")
    if len(missing[place]) in (0, len(spec.folders) + len(spec.lists)):
        return ""
    return f"{printable(root / place)} has no {', '.join(missing[place])}"

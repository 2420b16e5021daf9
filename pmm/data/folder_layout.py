"""What the folders above the images of a custom data set are: identities, cameras, dates. Loads no torch.

`folder:camera/identity` says it from the root (or from train, query, gallery and test) down. Plain `folder` takes the
first folder for the identity, and refuses folders that look as if they were something else: figures over cameras that
were taken for people are false, and look well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pmm.data.samples import JUNK_FOLDER
from pmm.utils.errors import InvalidFile, InvalidValue, printable

IDENTITY, CAMERA, DATE, ANY = "identity", "camera", "date", "any"
LEVELS = (IDENTITY, CAMERA, DATE, ANY)
MOST_LEVELS = 6
LAYOUT_EXPECTED = (
    "identity, and if there are more folders camera, date or any, from the outer to the inner one with / between, as "
    "folder:camera/identity"
)
NAMED = 3
"""Folders that a message names."""
_CAMERA = "(?i:(?:ip|web)?cam(?:era)?|kamera|cctv|gopro|channel)"
_CAMERA_NAME = re.compile(
    rf"(?:{_CAMERA}|(?i:c|ch|view))[ _-]?\d{{1,4}}(?i:[ _-]?s\d{{1,4}})?"  # c1, cam_02, CCTV-1, c1s1
    rf"|{_CAMERA}(?:[A-Z]|[ _-]\w[\w -]*)"  # camA, cam_front1
    rf"|\w[\w -]*[ _-]{_CAMERA}\d{{0,4}}",  # front_cam
    re.ASCII,
)
_YEAR, _MONTH, _DAY = r"(?:19|20)\d\d", r"(?:0?[1-9]|1[0-2])", r"(?:0?[1-9]|[12]\d|3[01])"
_DATE_NAME = re.compile(
    rf"(?:{_YEAR}[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])|{_YEAR}[-_.]{_MONTH}[-_.]{_DAY}"
    rf"|{_DAY}[-_.]{_MONTH}[-_.]{_YEAR}|{_MONTH}[-_.]{_DAY}[-_.]{_YEAR})(?:[-_. T].*)?"
    rf"|{_YEAR}[-.](?:0[1-9]|1[0-2])|{_YEAR}-?W(?:0[1-9]|[1-4]\d|5[0-3])",
    re.ASCII,
)
PARTS_OF_OTHERS = {
    "training": "train", "testing": "test", "val": "test", "valid": "test", "validation": "test", "probe": "query",
    "queries": "query", "galleries": "gallery",
}  # fmt: skip
"""How others name the parts of a data set, and how they are named here."""

Folders = tuple[str, ...]
"""Names of the folders of an image, from below its part down."""


def parse_layout(layout: str, *, name: str) -> Folders:
    """The levels of a layout as `camera/identity`. Raises InvalidValue, with `name` as the value of --dataset."""
    levels = tuple(layout.split("/"))
    if unknown := [level for level in levels if level not in LEVELS]:
        nearest = InvalidValue("--dataset", unknown[0], choices=LEVELS).hint
        raise InvalidValue("--dataset", name, LAYOUT_EXPECTED, hint=nearest)
    if IDENTITY not in levels or levels.count(CAMERA) > 1 or len(levels) > MOST_LEVELS:
        raise InvalidValue("--dataset", name, LAYOUT_EXPECTED)
    return levels


def fits(folders: Folders, levels: Folders) -> bool:
    """Whether an image in `folders` is as deep as the layout says; `any` at its end is any number of folders."""
    if levels[-1] == ANY:
        return len(folders) >= len(levels) - 1
    return len(folders) == len(levels)


def at_level(folders: Folders, levels: Folders, wanted: str) -> str:
    """The names of the folders that are `wanted`, with / between; `identity/identity` are numbered anew in each."""
    return "/".join(name for name, level in zip(folders, levels, strict=False) if level == wanted)


def numbered_cameras(names: Sequence[str]) -> dict[str, int]:
    """A number for each camera's folder: that in its name, where each has one of its own; else from 1 by name.

    Capitals and leading zeros make no other camera: `cam1` of queries is `Cam01` of the gallery.
    """
    same = {name: re.sub(r"(?<!\d)0+(?=\d)", "", name.casefold(), flags=re.ASCII) for name in names}
    distinct = sorted(set(same.values()))
    found = [re.findall(r"\d{1,9}", name, re.ASCII) for name in distinct]
    numbers = [int(each[0]) for each in found if len(each) == 1]
    if len(set(numbers)) != len(distinct):
        numbers = list(range(1, len(distinct) + 1))
    number_of = dict(zip(distinct, numbers, strict=True))
    return {name: number_of[each] for name, each in same.items()}


def mostly_deeper(images: Sequence[Folders]) -> tuple[list[str], list[str]]:
    """The first folders that hold mostly images of their own, and those that hold mostly folders of images."""
    own = Counter(folders[0] for folders in images if len(folders) == 1)
    deep = Counter(folders[0] for folders in images if len(folders) > 1)
    names = sorted((own | deep).keys() - {JUNK_FOLDER})
    deeper = [name for name in names if deep[name] > own[name]]
    return [name for name in names if name not in deeper], deeper


def check_plain(root: Path, part: Path, images: Sequence[Folders]) -> str:
    """What has to be said of taking the first folders of `part` for identities; empty if nothing.

    Raises InvalidFile, naming the root or the layout that would do, if these folders seem to be something else, which
    half of them are enough for.
    """
    plain, deeper = mostly_deeper(images)
    if deeper and len(deeper) >= len(plain):
        chosen = [folders for folders in images if folders[0] in deeper]
        problem = f"its folders ({first_few(deeper)}) hold folders of images, not images"
        raise InvalidFile(
            problem, path=part, expected="one folder of images per identity", hint=_ways(root, part, chosen)
        )
    for kind, pattern in (("camera", _CAMERA_NAME), ("date", _DATE_NAME)):
        named = list(filter(pattern.fullmatch, sorted(plain + deeper)))
        if named and 2 * len(named) >= len(plain + deeper):
            here, above = printable(part.resolve().name), printable(root.resolve().parent)
            one = f"if {here} is one of several identities, use --root {above} --dataset folder:identity/{kind}"
            raise InvalidFile(
                f"its folders are named as {kind}s ({first_few(named)}), not as people",
                path=part,
                expected="one folder of images per identity",
                hint=f"{one}; if they are people, --dataset folder:identity",
            )
    below = sorted({folders[0] for folders in images if len(folders) > 1} - {JUNK_FOLDER})
    return f"folders below those of identities say nothing, no camera either: in {first_few(below)}" if below else ""


def _ways(root: Path, part: Path, images: Sequence[Folders]) -> str:
    """How to read images that lie deeper than one folder, in words."""
    first = sorted({folders[0] for folders in images})
    if renamed := [
        f"{name} to {PARTS_OF_OTHERS[name.casefold()]}" for name in first if name.casefold() in PARTS_OF_OTHERS
    ]:
        return f"if these are parts of a data set, rename {', '.join(renamed)}"
    if len(first) == 1 and part == root:
        inner = _only_folder(images)
        return f"use --root {printable(root.joinpath(*inner))}, whose folders are people then; or {_layouts(images)}"
    return f"say what the folders are: {_layouts(images)}"


def _only_folder(images: Sequence[Folders]) -> Folders:
    """The folders that all images have in common, at most down to those of identities."""
    common = 0
    while len({folders[: common + 1] for folders in images}) == 1 and all(len(each) > common + 1 for each in images):
        common += 1
    return images[0][:common]


def _layouts(images: Sequence[Folders]) -> str:
    """The layouts that the names of the folders allow."""
    depth = Counter(map(len, images)).most_common(1)[0][0]
    others = sorted({"/".join(folders) for folders in images if len(folders) != depth})
    names = [sorted({folders[level] for folders in images if len(folders) == depth}) for level in range(depth)]
    kinds = [_kind(level, innermost=level is names[-1]) for level in names]
    if CAMERA in kinds:  # one camera, whatever else has such names
        first = kinds.index(CAMERA)
        kinds = [ANY if kind == CAMERA and place != first else kind for place, kind in enumerate(kinds)]
    unknown = [place for place, kind in enumerate(kinds) if not kind] or [depth - 1]
    ways = []
    for place in dict.fromkeys((unknown[0], unknown[-1])):
        layout = "/".join(IDENTITY if level == place else kind or ANY for level, kind in enumerate(kinds))
        ways.append(f"folder:{layout} if {first_few(names[place])} are people")
    cameras = f" (with {CAMERA} in place of {ANY} if those are cameras)" * (ANY in ways[0] and CAMERA not in ways[0])
    moved = f"; the images in {first_few(others)} are to be {depth} folders deep too" if others else ""
    return f"--dataset {', or '.join(ways)}{cameras}{moved}"


def _kind(names: Sequence[str], *, innermost: bool) -> str:
    """What folders of these names are; empty if their names do not say it."""
    if all(map(_CAMERA_NAME.fullmatch, names)):
        return CAMERA
    if all(map(_DATE_NAME.fullmatch, names)):
        return DATE
    return ANY if len(names) == 1 and not innermost else ""


def first_few(names: Sequence[str]) -> str:
    """The first three of `names`, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(map(printable, names[:NAMED])) + more

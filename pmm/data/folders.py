"""Custom data sets: one folder of crops per identity, the camera in the names of files or folders, or unknown. Loads no
torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pmm.data.dataset_specs import MARKET_FOLDERS, DatasetSpec
from pmm.data.folder_layout import (
    ANY,
    CAMERA,
    IDENTITY,
    Folders,
    at_level,
    check_plain,
    first_few,
    fits,
    numbered_cameras,
)  # fmt: skip
from pmm.data.left_out import OTHER_KIND, is_image_name, reason_left_out
from pmm.data.market import parse_name
from pmm.data.samples import JUNK, JUNK_FOLDER, UNKNOWN_CAMERA, Sample
from pmm.data.scan import Scan, fault_of, is_folder, is_text, is_valid_file, skip
from pmm.data.splits import GALLERY_CAMERA, QUERY_CAMERA, draw_queries, with_cameras
from pmm.utils.errors import InvalidFile, printable

POOL = ""
"""The part whose identity folders lie in the root itself."""
PARTS = ("train", "query", "gallery", "test")
RESERVED = {*PARTS, *MARKET_FOLDERS, "mask_train_v2", "mask_test_v2"}
"""Folders that are no identities, in any capitalisation: of another layout, of an incomplete one, or of several data
sets below."""
NO_CAMERAS = (
    "no file name has a camera, so crops of the query's camera count as matches: figures are higher than across "
    "cameras and not comparable with published ones"
)
NO_TRAIN = "there is no train folder, so nothing to train on"
DRAWN = "query and gallery are drawn from {}: the first crop of each {} is query"
ONE_PART = "{} is one part of the data set in {}"
SHARED = (
    "train and test have the same identities and crops, so figures say nothing about new identities: move some "
    "identity folders into train/ and the others into test/"
)
IDENTITIES = "identities are the folders {}"
BESIDE = "{} beside {} is left out: no part of the data set"
PART_BELOW = "part of a data set below an identity"
MOST_LOOKED_AT = 1000
"""Folders in which an image is looked for, to say what a root may be."""
PLAIN = (IDENTITY, ANY)
"""The levels where nothing else is said."""
_MARKET_NAME = re.compile(r"\d{4}_c\d{1,4}(?:s\d|_f\d).*", re.ASCII)
"""Of files of Market-1501 and DukeMTMC-reID; less may be a frame's number and a camera."""
_CAMERA = re.compile(r"(?:^|_)(?:cam|c)(\d{1,9})(?!\d)", re.ASCII | re.IGNORECASE)


class _FolderCrop(NamedTuple):
    path: Path
    folders: Folders
    identity: str


def camera_of_crop(name: str) -> int | None:
    """The number in the first `c12` or `cam12` at the start of a file name or after a `_`; None if there is none."""
    match = _CAMERA.search(name)
    return int(match[1]) if match else None


def parts_in(root: Path) -> tuple[str, ...] | None:
    """The parts that hold identity folders: of train, query, gallery, or train, test, or one pool; None if none do."""
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if not entry.name.startswith(".") and is_folder(entry)}
    if {"query", "gallery"} <= folders:
        return PARTS[:3] if "train" in folders else PARTS[1:3]
    if {"train", "test"} <= folders:
        return "train", "test"
    return None if not folders or any(map(is_reserved, folders)) else (POOL,)


def is_reserved(name: str) -> bool:
    """Whether a folder of that name is part of a data set, not an identity."""
    return name.casefold() in RESERVED


def looks_like_folders(root: Path) -> bool:
    """Whether a folder of a part of `root` holds an image, itself or somewhere below it."""
    for part in parts_in(root) or ():
        places = (place for place in islice(os.walk(root / part), MOST_LOOKED_AT) if Path(place[0]) != root / part)
        if any(is_image_name(name) for _, _, names in places for name in names):
            return True
    return False


def scan_folders(spec: DatasetSpec, root: Path) -> Scan:
    """The crops by identity and path: below the folders that the spec's levels name, or below each first folder.

    Identities are numbered from 1 in the order of their names over all parts, but for junk, the folder `-1`. Cameras
    keep the numbers of the names; if no name has one, train has the unknown camera and query and gallery have two
    different ones. Raises InvalidFile, where no levels are named, for folders that seem to be no people's.
    """
    names = parts_in(root) or ()
    within = " in " + ", ".join(names) if names != (POOL,) else ""
    levels = spec.levels or PLAIN
    layout = "one folder per identity" if levels == PLAIN else f"folders {'/'.join(levels)}"
    scan = Scan(spec, root, layout + within)
    crops_of = {part: list(_crops(root / part, levels, scan)) for part in names}
    every = [crop for crops in crops_of.values() for crop in crops]
    doubts = []
    if not spec.levels and not any(problem.kind == PART_BELOW for problem in scan.problems):
        for part, crops in crops_of.items():
            if note := check_plain(root, root / part, [crop.folders for crop in crops]):
                doubts.append(note)
            _check_names(root / part, crops)
    identities = sorted({crop.identity for crop in every} - {JUNK_FOLDER})
    pids = {name: number for number, name in enumerate(identities, 1)} | {JUNK_FOLDER: JUNK}
    cameras = _cameras_of_folders(every, levels) if CAMERA in levels else _cameras([c.path for c in every], scan)
    samples = {
        part: tuple(Sample(crop.path, pids[crop.identity], cameras[crop.path]) for crop in crops)
        for part, crops in crops_of.items()
    }
    for part, found in samples.items():
        if all(sample.pid == JUNK for sample in found):
            scan.add_problem("holds no usable image", _expected(levels), root / part)
    if names == (POOL,):
        scan.notes.append(IDENTITIES.format(first_few(identities)))
    elif names:
        _note_beside(scan, names)
    scan.cameras_known = set(cameras.values()) != {UNKNOWN_CAMERA}
    if names == (POOL,) and is_reserved((whole := root.resolve()).name):
        with contextlib.suppress(OSError):  # of a folder above that may not be read
            if whole.name in (parts_in(whole.parent) or ()):
                scan.notes.append(ONE_PART.format(printable(root), printable(whole.parent)))
    _arrange(scan, samples)
    if not scan.cameras_known:
        scan.notes.append(NO_CAMERAS)
    scan.notes += dict.fromkeys(doubts)
    return scan


def _check_names(part: Path, crops: list[_FolderCrop]) -> None:
    """Raises InvalidFile if file names as of Market-1501 say other identities than the folders."""
    named = [
        (crop, parsed[0])
        for crop in crops
        if _MARKET_NAME.match(crop.path.name) and (parsed := parse_name(crop.path.name))
    ]
    pairs = {(crop.identity, pid) for crop, pid in named}
    folders_of = Counter(pid for _, pid in pairs)
    pids_of = Counter(identity for identity, _ in pairs)
    for crop, pid in named:
        if folders_of[pid] > 1 and pids_of[crop.identity] > 1:
            example = printable(crop.path.relative_to(part))
            raise InvalidFile(
                f"file names and folders disagree on who is who: {example} is identity {pid} by its name, which is in "
                f"{folders_of[pid]} folders, and its folder has {pids_of[crop.identity]} such identities",
                path=part,
                expected="one folder of images per identity",
                hint=f"if the names are right, move the files to {', '.join(MARKET_FOLDERS)} for --dataset market1501; "
                "if the folders are people, --dataset folder:identity",
            )


def _note_beside(scan: Scan, names: tuple[str, ...]) -> None:
    """Note the folders and images beside the parts; what else is there goes to the skipped files."""
    beside = []
    with os.scandir(scan.folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            hidden = entry.name.startswith(".")
            if not hidden and is_folder(entry):
                beside += [] if entry.name in names else [f"{entry.name}/"]
            elif is_image_name(entry.name) or reason_left_out(path) is OTHER_KIND:
                beside.append(entry.name)
            else:
                scan.skipped.append(path)
    if beside:
        scan.notes.append(BESIDE.format(first_few(sorted(beside)), ", ".join(names)))


def _arrange(scan: Scan, samples: dict[str, tuple[Sample, ...]]) -> None:
    """Fill train, query and gallery of `scan` from the parts on disk."""
    scan.train = samples.get("train", samples.get(POOL, ()))
    if "query" in samples:
        scan.query = with_cameras(samples["query"], QUERY_CAMERA)
        scan.gallery = with_cameras(samples["gallery"], GALLERY_CAMERA)
        if "train" not in samples:
            scan.notes.append(NO_TRAIN)
        return
    test = samples.get("test", scan.train)
    scan.query, scan.gallery = draw_queries(sample for sample in test if sample.pid != JUNK)
    scan.gallery += tuple(sample for sample in test if sample.pid == JUNK)
    each = "identity and camera" if scan.cameras_known else "identity"
    scan.notes.append(DRAWN.format("test" if "test" in samples else "all crops", each))
    if "test" not in samples:
        scan.parts_share_identities = True
        scan.notes.append(SHARED)


def _cameras(paths: list[Path], scan: Scan) -> dict[Path, int]:
    cameras = {path: camera_of_crop(path.name) for path in paths}
    named = next((path for path in paths if cameras[path] is not None), None)
    if named is not None:
        example = printable(named.relative_to(scan.folder))
        detail = f"{example} has one; name the camera of all files (c1, cam1) or of none"
        for path in (path for path in paths if cameras[path] is None):
            scan.add_problem("no camera in the name", detail, path)
    return {path: UNKNOWN_CAMERA if camid is None else camid for path, camid in cameras.items()}


def _cameras_of_folders(crops: list[_FolderCrop], levels: Folders) -> dict[Path, int]:
    names = [at_level(crop.folders, levels, CAMERA) for crop in crops]
    numbers = numbered_cameras(names)
    return {crop.path: numbers[name] for crop, name in zip(crops, names, strict=True)}


def _crops(part: Path, levels: Folders, scan: Scan) -> Iterator[_FolderCrop]:
    """The images below the folders of `part`, in the order of identities and of paths."""
    found = []
    for path in _below(part, len(levels) - (levels[-1] == ANY), scan, is_part=True):
        folders = path.relative_to(part).parts[:-1]
        if not folders:
            scan.add_problem("lies in no identity folder", _expected(levels), path)
        elif not fits(folders, levels):
            scan.add_problem("not as deep as the layout", _expected(levels), path)
        else:
            identity = at_level(folders, levels, IDENTITY)
            found.append(_FolderCrop(path, folders, JUNK_FOLDER if JUNK_FOLDER in identity.split("/") else identity))
    yield from sorted(found, key=lambda crop: (crop.identity, crop.path))


def _expected(levels: Folders) -> str:
    return "expected one folder of crops per identity" if levels == PLAIN else f"expected {'/'.join(levels)}/IMAGE"


def _below(folder: Path, named: int, scan: Scan, *, is_part: bool = False) -> Iterator[Path]:
    """The images below a folder. Only `named` levels of folders may be links: others may lead in a circle."""
    try:
        listed = os.scandir(folder)
    except OSError as error:
        scan.add_problem("a folder that cannot be read", f"{error.strerror}; check its permissions", folder)
        return
    with listed as entries:
        for entry in entries:
            path = folder / entry.name
            if is_image_name(entry.name):
                if is_valid_file(entry, scan):
                    yield path
            elif entry.name.startswith(".") or not is_folder(entry):
                if named > 0 and entry.is_symlink() and entry.name[0] != "." and (fault := fault_of(entry)):
                    scan.add_problem(fault, "expected a folder; mend or remove the link", path)
                else:
                    skip(path, scan)
            elif not is_text(entry.name):
                scan.add_problem("a name that is no UTF-8", "rename the folder", path)
            elif is_reserved(entry.name) and not is_part:
                detail = f"use --root {printable(folder)}, or rename it"
                scan.add_problem(PART_BELOW, detail, path)
            elif entry.is_symlink() and named <= 0:
                scan.add_problem("a linked folder", "only the folder of an identity may be a link; copy it", path)
            else:
                images = _below(path, named - 1, scan)
                first = next(images, None)
                if first is not None:
                    yield first
                    yield from images
                elif named > 0:
                    scan.skipped.append(path)

"""Custom data sets: one folder of crops per identity, the camera in the file names or unknown. Loads no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pmm.data.dataset_specs import MARKET_FOLDERS, DatasetSpec
from pmm.data.samples import JUNK, UNKNOWN_CAMERA, Sample
from pmm.data.scan import Scan, is_folder, is_image_name, is_text, is_valid_file, skip
from pmm.data.splits import GALLERY_CAMERA, QUERY_CAMERA, draw_queries, with_cameras
from pmm.utils.errors import printable

POOL = ""
"""The part whose identity folders lie in the root itself."""
PARTS = ("train", "query", "gallery", "test")
RESERVED = {*PARTS, *MARKET_FOLDERS, "mask_train_v2", "mask_test_v2"}
"""Folders that are no identities, in any capitalisation: of another layout, of an incomplete one, or of several data
sets below."""
JUNK_FOLDER = "-1"
NO_CAMERAS = (
    "no file name has a camera, so crops of the query's camera count as matches: figures are higher than across "
    "cameras and not comparable with published ones"
)
NO_TRAIN = "there is no train folder, so nothing to train on"
DRAWN = "query and gallery are drawn from {}: the first crop of each {} is query"
SHARED = "train and test have the same identities and crops: figures say nothing about new identities"
_CAMERA = re.compile(r"(?:^|_)(?:cam|c)(\d{1,9})(?!\d)", re.ASCII | re.IGNORECASE)


class _FolderCrop(NamedTuple):
    path: Path
    identity: str


def parse_camera(name: str) -> int | None:
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
    """Whether an identity folder below `root` holds an image."""
    for part in parts_in(root) or ():
        with os.scandir(root / part) as entries:
            for entry in entries:
                if is_folder(entry) and any(is_image_name(name) for name in os.listdir(entry.path)):
                    return True
    return False


def scan_folders(spec: DatasetSpec, root: Path) -> Scan:
    """The crops below each identity folder, however deep, by identity and path.

    Identities are numbered from 1 in the order of their folders' names over all parts, but for junk, the folder `-1`.
    Cameras keep the numbers of the names; if no name has one, train has the unknown camera and query and gallery have
    two different ones.
    """
    names = parts_in(root) or ()
    within = " in " + ", ".join(names) if names != (POOL,) else ""
    scan = Scan(spec, root, f"one folder per identity{within}")
    crops_of = {part: list(_crops(root / part, scan)) for part in names}
    identities = sorted({crop.identity for crops in crops_of.values() for crop in crops} - {JUNK_FOLDER})
    pids = {name: number for number, name in enumerate(identities, 1)} | {JUNK_FOLDER: JUNK}
    cameras = _cameras([crop.path for crops in crops_of.values() for crop in crops], scan)
    samples = {
        part: tuple(Sample(crop.path, pids[crop.identity], cameras[crop.path]) for crop in crops)
        for part, crops in crops_of.items()
    }
    for part, crops in samples.items():
        if all(sample.pid == JUNK for sample in crops):
            scan.add_problem("holds no usable image", "expected folders of crops, one per identity", root / part)
    scan.cameras_known = set(cameras.values()) != {UNKNOWN_CAMERA}
    _arrange(scan, samples)
    if not scan.cameras_known:
        scan.notes.append(NO_CAMERAS)
    return scan


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
    cameras = {path: parse_camera(path.name) for path in paths}
    named = next((path for path in paths if cameras[path] is not None), None)
    if named is not None:
        example = printable(named.relative_to(scan.folder))
        detail = f"{example} has one; name the camera of all files (c1, cam1) or of none"
        for path in (path for path in paths if cameras[path] is None):
            scan.add_problem("no camera in the name", detail, path)
    return {path: UNKNOWN_CAMERA if camid is None else camid for path, camid in cameras.items()}


def _crops(part: Path, scan: Scan) -> Iterator[_FolderCrop]:
    """The images below each identity folder of `part`, in the order of identities and of paths."""
    with os.scandir(part) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for entry in children:
        if not entry.name.startswith(".") and is_folder(entry):
            if is_text(entry.name):
                yield from (_FolderCrop(path, entry.name) for path in sorted(_below(Path(entry.path), scan)))
            else:
                scan.add_problem("a name that is no UTF-8", "rename the folder", Path(entry.path))
        elif is_image_name(entry.name):
            if is_valid_file(entry, scan):
                scan.add_problem(
                    "lies in no identity folder", "expected one folder of crops per identity", Path(entry.path)
                )
        else:
            skip(Path(entry.path), scan)


def _below(folder: Path, scan: Scan) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if is_image_name(entry.name):
                if is_valid_file(entry, scan):
                    yield path
            elif entry.name.startswith(".") or not is_folder(entry):
                skip(path, scan)
            elif is_reserved(entry.name):
                detail = f"use --root {printable(folder)}, or rename it"
                scan.add_problem("part of a data set below an identity", detail, path)
            elif entry.is_symlink():  # it may lead in a circle
                scan.add_problem("a linked folder", "only the folder of an identity may be a link; copy it", path)
            else:
                yield from _below(path, scan)

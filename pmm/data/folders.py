"""Data sets of one's own: one folder of crops per identity, the camera in the file names or nowhere. Loads no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pmm.data.layouts import MARKET_FOLDERS, DatasetSpec
from pmm.data.samples import JUNK, UNKNOWN_CAMERA, Sample
from pmm.data.scan import Scan, is_folder, is_image_name, is_text, shown, skip, sound
from pmm.data.splits import GALLERY_CAMERA, QUERY_CAMERA, draw_queries, with_cameras

POOL = ""
"""The part whose identity folders lie in the root itself."""
PARTS = ("train", "query", "gallery", "test")
RESERVED = {*PARTS, *MARKET_FOLDERS, "mask_train_v2", "mask_test_v2"}
"""Folders that are no identities, however they are capitalised: another layout, an incomplete one, or one of several
data sets below."""
JUNK_FOLDER = "-1"
NO_CAMERAS = (
    "no file name tells a camera, so crops of the query's own camera count as matches: figures come out higher than "
    "across cameras and do not compare with published ones"
)
NO_TRAIN = "there is no train folder: nothing to train on"
DRAWN = "query and gallery are drawn from {}: the first crop of each {} is query"
SHARED = "train and test are the same people and crops: figures say nothing about people not trained on"
_CAMERA = re.compile(r"(?:^|_)(?:cam|c)(\d{1,9})(?!\d)", re.ASCII | re.IGNORECASE)


class _Crop(NamedTuple):
    path: Path
    identity: str


def parse_camera(name: str) -> int | None:
    """The number in the first `c12` or `cam12` that starts a file name or follows a `_`, as it stands; or None."""
    match = _CAMERA.search(name)
    return int(match[1]) if match else None


def form_of(root: Path) -> tuple[str, ...] | None:
    """The parts that hold identity folders: of train, query, gallery, or train, test, or one pool; None if none do."""
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if not entry.name.startswith(".") and is_folder(entry)}
    if {"query", "gallery"} <= folders:
        return PARTS[:3] if "train" in folders else PARTS[1:3]
    if {"train", "test"} <= folders:
        return "train", "test"
    return None if not folders or any(map(is_reserved, folders)) else (POOL,)


def is_reserved(name: str) -> bool:
    """Whether a folder of that name is part of some data set, and no identity."""
    return name.casefold() in RESERVED


def looks_like_folders(root: Path) -> bool:
    """Whether some identity folder of the form that `root` has holds an image."""
    for part in form_of(root) or ():
        with os.scandir(root / part) as entries:
            for entry in entries:
                if is_folder(entry) and any(is_image_name(name) for name in os.listdir(entry.path)):
                    return True
    return False


def scan_folders(layout: DatasetSpec, root: Path) -> Scan:
    """The crops below each identity folder, however deep, by identity and path.

    Identities are numbered from 1 in the order of their folders' names over all parts, but for junk, the folder `-1`.
    Cameras keep the numbers of the names; if no name has one, train has the unknown camera and query and gallery have
    two different ones.
    """
    form = form_of(root) or ()
    within = " in " + ", ".join(form) if form != (POOL,) else ""
    scan = Scan(layout, root, f"one folder per identity{within}")
    found = {part: list(_crops(root / part, scan)) for part in form}
    identities = sorted({crop.identity for crops in found.values() for crop in crops} - {JUNK_FOLDER})
    pids = {name: number for number, name in enumerate(identities, 1)} | {JUNK_FOLDER: JUNK}
    cameras = _cameras([crop.path for crops in found.values() for crop in crops], scan)
    samples = {
        part: tuple(Sample(crop.path, pids[crop.identity], cameras[crop.path]) for crop in crops)
        for part, crops in found.items()
    }
    for part, crops in samples.items():
        if all(sample.pid == JUNK for sample in crops):
            scan.refuse("holds no usable image", "expected folders of crops, one per identity", root / part)
    scan.cameras_known = set(cameras.values()) != {UNKNOWN_CAMERA}
    _arrange(scan, samples)
    if not scan.cameras_known:
        scan.notes.append(NO_CAMERAS)
    return scan


def _arrange(scan: Scan, samples: dict[str, tuple[Sample, ...]]) -> None:
    """Train, query and gallery from the parts there are."""
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
        scan.parts_share_people = True
        scan.notes.append(SHARED)


def _cameras(paths: list[Path], scan: Scan) -> dict[Path, int]:
    cameras = {path: parse_camera(path.name) for path in paths}
    named = next((path for path in paths if cameras[path] is not None), None)
    if named is not None:
        other = f"{shown(named.relative_to(scan.folder))} has one; name the camera of all files (c1, cam1) or of none"
        for path in (path for path in paths if cameras[path] is None):
            scan.refuse("no camera in the name", other, path)
    return {path: UNKNOWN_CAMERA if camid is None else camid for path, camid in cameras.items()}


def _crops(part: Path, scan: Scan) -> Iterator[_Crop]:
    """The images below each identity folder of `part`, in the order of identities and of paths."""
    with os.scandir(part) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for entry in children:
        if not entry.name.startswith(".") and is_folder(entry):
            if is_text(entry.name):
                yield from (_Crop(path, entry.name) for path in sorted(_below(Path(entry.path), scan)))
            else:
                scan.refuse("a name that is no UTF-8", "rename the folder", Path(entry.path))
        elif is_image_name(entry.name):
            if sound(entry, scan):
                scan.refuse("lies in no identity folder", "expected one folder of crops per identity", Path(entry.path))
        else:
            skip(Path(entry.path), scan)


def _below(folder: Path, scan: Scan) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if is_image_name(entry.name):
                if sound(entry, scan):
                    yield path
            elif entry.name.startswith(".") or not is_folder(entry):
                skip(path, scan)
            elif is_reserved(entry.name):
                scan.refuse("part of a data set below an identity", f"give {shown(folder)} as root, or rename it", path)
            elif entry.is_symlink():  # may lead round in a circle
                scan.refuse("a linked folder", "only an identity's own folder may be a link; expected a folder", path)
            else:
                yield from _below(path, scan)

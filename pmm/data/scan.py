"""A data set as it is on disk: its crops, junk included, and a list of problems. Loads no torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pmm.data.dataset_specs import DatasetSpec
from pmm.data.left_out import IMAGE_SUFFIXES, OTHER_KIND, is_image_name, reason_left_out
from pmm.data.samples import JUNK, Sample
from pmm.utils.errors import printable


class Problem(NamedTuple):
    """Something that a reader refuses: its kind, a detail, and the file (and line of it) it is about."""

    kind: str
    detail: str
    path: Path
    line: int = 0


@dataclass
class Scan:
    """A data set in `folder`: the crops of each part, junk included, its problems, and what had to be assumed."""

    spec: DatasetSpec
    folder: Path
    layout: str
    """Of the folder, in words."""
    train: tuple[Sample, ...] = ()
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    """Files and folders that are left out; `pmm.data.left_out` says why."""
    cameras_known: bool = True
    parts_share_identities: bool = False
    """Whether train and test have the same identities by construction."""

    def parts(self) -> dict[str, tuple[Sample, ...]]:
        """Crops by the name of their part."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    def without_junk(self) -> dict[str, tuple[Sample, ...]]:
        """`parts` without junk."""
        return {name: tuple(s for s in part if s.pid != JUNK) for name, part in self.parts().items()}

    def add_problem(self, kind: str, detail: str, path: Path, line: int = 0) -> None:
        """Add a problem."""
        self.problems.append(Problem(kind, detail, path, line))


def images_in(folder: Path, scan: Scan) -> list[str]:
    """Sorted names of the images directly in `folder`; all else goes to `scan`'s problems or skipped files."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image_name(entry.name):
                if is_valid_file(entry, scan):
                    names.append(entry.name)
            elif not entry.name.startswith(".") and is_folder(entry) and any(map(is_image_name, os.listdir(entry))):
                detail = "move them up or away; --dataset folder takes folders of people in train, query and gallery"
                scan.add_problem("a folder of images where files are expected", detail, folder / entry.name)
            else:
                skip(folder / entry.name, scan)
    return sorted(names)


def skip(path: Path, scan: Scan) -> None:
    """Leave out `path`, which is hidden or no image; an image of a kind that is not read is a problem."""
    if reason_left_out(path) is OTHER_KIND:
        kind, expected = f"an image that ends in {path.suffix.lower()}", f"expected {', '.join(IMAGE_SUFFIXES)}"
        scan.add_problem(kind, f"{expected}; convert it", path)
    else:
        scan.skipped.append(path)


def is_valid_file(entry: os.DirEntry[str], scan: Scan) -> bool:
    """Whether `entry`, which has the name of an image, is a file; if not, adds the problem to `scan`.

    Most file systems list types with names; then only symbolic links need another call.
    """
    path = Path(entry.path)
    if not is_text(entry.name):
        scan.add_problem("a name that is no UTF-8", "rename the file", path)
    elif (fault := fault_of(entry)) is not None:
        scan.add_problem(fault, f"expected an image; {image_advice()}", path)
    else:
        return True
    return False


def fault_of(entry: os.DirEntry[str]) -> str | None:
    """Why `entry` is no file that can be opened, or a link to one; None if it is."""
    try:
        if entry.is_file():
            return None
        if entry.is_dir():
            return "a folder with the name of an image"
        return "a link to nothing" if entry.is_symlink() else "not a regular file"
    except OSError as error:  # links in a circle, a target without permission
        return f"not accessible ({error.strerror})"


def image_advice(error: BaseException | None = None) -> str:
    """What to do about an image that cannot be read, by the `error` of reading it."""
    code = getattr(error, "errno", None)
    if code == errno.ENOENT:
        return "check the path"
    if code == errno.EISDIR:
        return "give the files in it (pmm embed takes a folder)"
    return "check its permissions" if code in (errno.EACCES, errno.EPERM) else "replace or remove it"


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `entry` is a folder or a link to one; a link that leads nowhere or in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def check_unique_stems(names: Iterable[str], folder: Path, scan: Scan) -> None:
    """Add a problem for each of `names` that differs from an earlier one in its suffix only."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            detail = f"only the suffix differs from {printable(other)}; remove one"
            scan.add_problem("duplicate names", detail, folder / name)


def is_text(name: str) -> bool:
    """Whether the bytes of a name on disk are UTF-8."""
    return name.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in name)

"""What is on disk, before anything is refused: crops with junk, and a list of what is wrong. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pmm.data.layouts import DatasetSpec
from pmm.data.samples import JUNK, Sample

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
OTHER_IMAGES = (".gif", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".heif", ".ppm", ".pgm", ".tga")
"""Suffixes of images too, which are not read: to leave such files out in silence would change figures."""


class Problem(NamedTuple):
    """Something that a strict reader refuses: of which kind, more of it, and the file (and line of it) it is about."""

    kind: str
    detail: str
    path: Path
    line: int = 0

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        return f"{shown(self.path)}{line}: {self.kind}; {self.detail}"


@dataclass
class Scan:
    """A data set as found in `folder`: crops of each part, junk among them, and what was wrong or had to be assumed."""

    layout: DatasetSpec
    folder: Path
    form: str
    """What the folder looks like, in words."""
    train: tuple[Sample, ...] = ()
    query: tuple[Sample, ...] = ()
    gallery: tuple[Sample, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    """What is hidden or no image by its name."""
    cameras_known: bool = True
    parts_share_people: bool = False
    """Whether train and test are the same people by construction."""

    def parts(self) -> dict[str, tuple[Sample, ...]]:
        """Crops by the name of their part."""
        return {"train": self.train, "query": self.query, "gallery": self.gallery}

    def people(self) -> dict[str, tuple[Sample, ...]]:
        """`parts` without junk."""
        return {name: tuple(s for s in part if s.pid != JUNK) for name, part in self.parts().items()}

    def refuse(self, kind: str, detail: str, path: Path, line: int = 0) -> None:
        """Add a problem."""
        self.problems.append(Problem(kind, detail, path, line))


def images_in(folder: Path, scan: Scan) -> list[str]:
    """Sorted names of the images directly in `folder`; what is none goes to `scan`'s problems or skipped files."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_image_name(entry.name):
                if sound(entry, scan):
                    names.append(entry.name)
            elif not entry.name.startswith(".") and is_folder(entry) and any(map(is_image_name, os.listdir(entry))):
                scan.refuse("a folder of images where files are expected", "move them out or away", folder / entry.name)
            else:
                skip(folder / entry.name, scan)
    return sorted(names)


def skip(path: Path, scan: Scan) -> None:
    """Leave `path` out, which is hidden or no image that is read; the latter only if it is no image at all."""
    suffix = path.suffix.lower()
    if suffix in OTHER_IMAGES and not path.name.startswith("."):
        scan.refuse(f"an image that ends in {suffix}", f"expected {', '.join(IMAGE_SUFFIXES)}; convert it", path)
    else:
        scan.skipped.append(path)


def is_image_name(name: str) -> bool:
    """Whether `name` is an image's; hidden files, as the `._*.jpg` that macOS leaves beside images, are not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def sound(entry: os.DirEntry[str], scan: Scan) -> bool:
    """Whether `entry`, named as an image, is a file of that name; if not, the problem is added to `scan`.

    A file system that tells types while it lists is asked nothing more, but for symbolic links.
    """
    path = Path(entry.path)
    if not is_text(entry.name):
        scan.refuse("a name that is no UTF-8", "rename the file", path)
    elif (fault := fault_of(entry)) is not None:
        scan.refuse(fault, "expected an image; replace or remove it", path)
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


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `entry` is a folder or a link to one; a link that leads nowhere or round in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def refuse_one_stem(names: Iterable[str], folder: Path, scan: Scan) -> None:
    """Add a problem for each of `names` that differs from an earlier one in its suffix only."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(os.path.splitext(name)[0], name)
        if other != name:
            scan.refuse("duplicate names", f"only the suffix differs from {shown(other)}; remove one", folder / name)


def is_text(name: str) -> bool:
    """Whether the bytes of a name on disk are UTF-8."""
    return name.isascii() or not any("\udc80" <= letter <= "\udcff" for letter in name)


def shown(text: object) -> str:
    """`text` on one line and fit for every terminal: bytes that are no UTF-8 and control characters are escaped."""
    return "".join(
        letter
        if letter.isprintable()
        else f"\\x{ord(letter) - 0xDC00:02x}"
        if "\udc80" <= letter <= "\udcff"
        else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )

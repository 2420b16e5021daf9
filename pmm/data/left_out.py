"""What is left out of a folder of images, by one rule for every command, and why. Loads no torch.

Images are the regular files with a suffix of `IMAGE_SUFFIXES`, in any capitals. What is hidden is left out with all
that is below it, and so are linked folders, which may lead in a circle; a data set's reader enters those of identities.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pmm.utils.errors import printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
OTHER_IMAGES = (".gif", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".heif", ".ppm", ".pgm", ".tga")
"""Suffixes of images that are not read. In data sets they are problems: leaving them out would change figures."""
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")


class Reason(NamedTuple):
    """Why something is left out: a stable name, what it is (one, and several), and what to do about it."""

    name: str
    one: str
    several: str
    advice: str = ""


HIDDEN = Reason("hidden", "hidden file or folder", "hidden files or folders")
OTHER_KIND = Reason(
    "other kind", "image of a kind that is not read", "images of kinds that are not read", "convert to JPEG or PNG"
)
LINKED = Reason("linked", "linked folder", "linked folders", "copy it, or give it as a folder of its own")
ARCHIVE = Reason("archive", "archive", "archives", "unpack it")
VIDEO = Reason("video", "video", "videos", "embed the crops of its people")
FOLDER = Reason("folder", "folder without images", "folders without images")
NO_IMAGE = Reason("no image", "file that is no image by its name", "files that are no images by their names")
REASONS = (OTHER_KIND, LINKED, ARCHIVE, VIDEO, FOLDER, NO_IMAGE, HIDDEN)
"""In the order in which they are told."""


def is_image_name(name: str) -> bool:
    """Whether `name` is an image's; hidden files are none, such as the `._*.jpg` that macOS leaves beside images."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def reason_left_out(path: Path) -> Reason:
    """Why `path`, which is no image by its name, or a folder that is not entered, is left out."""
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return HIDDEN
    if os.path.isdir(path):
        return LINKED if os.path.islink(path) else FOLDER
    for reason, suffixes in ((OTHER_KIND, OTHER_IMAGES), (ARCHIVE, ARCHIVES), (VIDEO, VIDEOS)):
        if suffix in suffixes:
            return reason
    return NO_IMAGE


def by_reason(paths: Iterable[Path]) -> dict[Reason, list[Path]]:
    """What is left out by the reason for it, in the order of `REASONS`."""
    found: dict[Reason, list[Path]] = {reason: [] for reason in REASONS}
    for path in paths:
        found[reason_left_out(path)].append(path)
    return {reason: sorted(paths) for reason, paths in found.items() if paths}


def left_out_lines(paths: Iterable[Path], folder: Path) -> list[str]:
    """A line for each reason: how many, the first of them, and what to do."""
    lines = []
    for reason, found in by_reason(paths).items():
        count = f"1 {reason.one}" if len(found) == 1 else f"{len(found):,} {reason.several}"
        first = printable(found[0].relative_to(folder).as_posix())
        more = f" and {len(found) - 1:,} more" if len(found) > 1 else ""
        lines.append(f"left out {count}: {first}{more}" + f"; {reason.advice}" * bool(reason.advice))
    return lines

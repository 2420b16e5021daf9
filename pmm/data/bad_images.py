"""Images that cannot be read: all of them are told, or left out and counted. Loads no torch."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pmm.data.crops import iter_crops, load_crops
from pmm.data.images import EMPTY
from pmm.data.preprocessing import Crops, Resize
from pmm.utils.errors import InvalidFile, printable
from pmm.utils.facts import how_many

HEADERS_READ = 10_000
"""Files of which the first look reads the header too, about 0.1 ms each; of more it asks for the size alone. So many
are decoded, to name all bad ones, once one is known to be bad."""
LISTED = 20
"""Bad files that one message names; three where all have one reason."""
MEND = "replace or remove them"
SKIP = f"{MEND}, or give --skip-bad-images to leave them out"
NO_FILE = "it is no regular file"
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class BadImageOptions:
    """What becomes of images that cannot be read."""

    skip_bad_images: bool = False
    """Leave out images that are gone or cannot be read, and count them, instead of stopping."""


def first_look(files: Sequence[Path]) -> dict[Path, str]:
    """Which of `files` are bad at first sight, and why: gone, without permission, empty, and of up to 10,000 files also
    those that do not begin as an image. What is damaged further on is found when it is decoded."""
    headers = len(files) <= HEADERS_READ
    return {file: fault for file in files if (fault := _fault(file, header=headers))}


def _fault(file: Path, *, header: bool) -> str:
    try:
        facts = file.stat()
        if not stat.S_ISREG(facts.st_mode):  # a pipe would be waited on for ever
            return NO_FILE
        if facts.st_size == 0:
            return EMPTY
        if not os.access(file, os.R_OK):
            return "no permission to read it"
        if header:
            with Image.open(file):
                pass
    except UnidentifiedImageError:
        return "it is no image"
    except OSError as error:
        return "it does not exist" if isinstance(error, FileNotFoundError) else str(error.strerror or error)
    except Exception as error:  # a header made to harm raises anything
        return type(error).__name__
    return ""


def unreadable_images(files: Sequence[Path], *, label: str = "") -> dict[Path, str]:
    """Which of `files` cannot be decoded, and why, in their order; with a `label`, a progress bar of that name."""
    from tqdm import tqdm

    bad = first_look(files)
    rest = [file for file in files if file not in bad]
    errors: dict[int, InvalidFile] = {}
    with tqdm(total=len(rest), desc=label, unit="img", leave=False, disable=None if label else True) as bar:
        for crops in iter_crops(rest, Resize(height=1, width=1), BATCH, unreadable=errors):
            bar.update(len(crops))
    bad |= {rest[row]: error.problem for row, error in errors.items()}
    return {file: bad[file] for file in dict.fromkeys(files) if file in bad}


def refuse_bad_images(bad: Mapping[Path, str], folder: Path, *, unseen: Sequence[Path] = (), hint: str = SKIP) -> None:
    """Raises InvalidFile naming the `bad` images of `folder`, if any, and those of the `unseen` that are bad too (of
    their first 10,000: then there may be others further on)."""
    if bad:
        more = len(unseen) > HEADERS_READ
        raise _listing({**bad, **unreadable_images(unseen[:HEADERS_READ])}, folder, more=more, hint=hint)


def refuse_at_sight(files: Sequence[Path], folder: Path) -> None:
    """Raises InvalidFile naming all bad ones of `files`, those that are damaged further on too, if one is bad at first
    sight; else none is decoded."""
    if bad := first_look(files):
        refuse_bad_images(bad, folder, unseen=[file for file in files if file not in bad])


def naming_all(error: InvalidFile, files: Sequence[Path], *, hint: str = SKIP) -> InvalidFile:
    """`error` of one of `files`, which are looked at now; or if more of the first 10,000 cannot be read, one that names
    them all, with the folder that they have in common."""
    bad = unreadable_images(files[:HEADERS_READ])
    if len(bad) < 2:
        return error
    folder = Path(os.path.commonpath([file.parent.absolute() for file in files]))
    return _listing(bad, folder, more=len(files) > HEADERS_READ, hint=hint)


def _listing(bad: Mapping[Path, str], folder: Path, *, more: bool, hint: str) -> InvalidFile:
    listed = LISTED if len(set(bad.values())) > 1 else 3
    named = [f"{_within(file, folder)} ({reason})" for file, reason in list(bad.items())[:listed]]
    rest = [f"{len(bad) - listed:,} more"] if len(bad) > listed else []
    count = f"{'at least ' * more}{how_many(len(bad), 'image')}"
    return InvalidFile(f"{count} cannot be read: {', '.join([*named, *rest])}", path=folder, hint=hint)


def refuse_none_left(bad: Mapping[Path, str], files: Sequence[Path], folder: Path) -> None:
    """Raises InvalidFile with the first reason if all `files` of `folder` are `bad`."""
    if files and len(bad) == len(set(files)):
        first, reason = next(iter(bad.items()))
        problem = f"none of {how_many(len(bad), 'image')} can be read, so there is nothing to evaluate"
        raise InvalidFile(f"{problem}; the first is {_within(first, folder)} ({reason})", path=folder)


def load_readable(files: Sequence[Path], size: Resize, *, least: int) -> Crops:
    """Crops [N, H, W, 3] of those of `files` that can be read; a line (logger "pmm") counts the others.

    Raises InvalidFile, of the first that is bad, if fewer than `least` are left.
    """
    try:
        return load_crops(files, size)
    except InvalidFile:
        bad = unreadable_images(files)
        rest = [file for file in files if file not in bad]
        if len(rest) < least or not bad:
            raise
        first, reason = next(iter(bad.items()))
        line = f"{how_many(len(bad), 'image')} of {len(files)} left out, the first is {first} ({reason})"
        logging.getLogger("pmm").warning("%s", printable(line))
        return load_crops(rest, size)


def bad_image_lines(bad: Mapping[Path, str]) -> list[str]:
    """A line for each image that was left out, up to 20 of them, and one that counts the others."""
    lines = [f"left out {file}: {reason}" for file, reason in list(bad.items())[:LISTED]]
    return lines + [f"left out {how_many(len(bad) - LISTED, 'more image')}"] * (len(bad) > LISTED)


def _within(file: Path, folder: Path) -> str:
    for place in (file, file.absolute()):
        if place.is_relative_to(folder):
            return place.relative_to(folder).as_posix()
    return str(file)

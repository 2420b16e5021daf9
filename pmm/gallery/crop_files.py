"""The crops in a folder: every image below it, and those that cannot be read. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pmm.data.scan import IMAGE_SUFFIXES, image_advice
from pmm.utils.errors import InvalidFile, one_of
from pmm.utils.facts import how_many

HEADERS_READ = 10_000
"""Files of which the first look reads the header too, about 0.1 ms each; of more it asks for the size alone."""
LISTED = 20
"""Bad files that one message names; three where all have one reason."""
SKIP = "replace or remove them, or give --skip-bad-images to leave them out"


def images_below(folder: Path) -> list[Path]:
    """Every image in `folder` and below it, in the order of its path; hidden files and folders are left out.

    Folders that are symbolic links are not entered: they may lead round in a circle. Raises InvalidFile if there is no
    image, or a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InvalidFile(str(error.strerror), path=error.filename, expected="a folder of images") from error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(place, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    if not files:
        raise InvalidFile("it holds no image", path=folder, expected=f"files ending in {one_of(IMAGE_SUFFIXES)}")
    for file in files:
        if file.exists() and not file.is_file():  # a pipe would be waited on for ever
            raise InvalidFile("it is no regular file", path=file, expected="an image", hint=image_advice())
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def first_look(files: Sequence[Path]) -> dict[Path, str]:
    """Which of `files` are bad at first sight, and why: gone, without permission, empty, and of up to 10,000 files also
    those that do not begin as an image. What is damaged further on is found when it is decoded."""
    headers = len(files) <= HEADERS_READ
    return {file: fault for file in files if (fault := _fault(file, header=headers))}


def _fault(file: Path, *, header: bool) -> str:
    try:
        if file.stat().st_size == 0:
            return "it is empty"
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


def refuse_bad_images(bad: Mapping[Path, str], folder: Path, *, more: bool = False, hint: str = SKIP) -> None:
    """Raises InvalidFile naming the `bad` images of `folder`, if any; with `more` there may be others further on."""
    if not bad:
        return
    listed = LISTED if len(set(bad.values())) > 1 else 3
    named = [f"{_within(file, folder)} ({reason})" for file, reason in list(bad.items())[:listed]]
    rest = [f"{len(bad) - listed} more"] if len(bad) > listed else []
    count = f"{'at least ' * more}{how_many(len(bad), 'image')}"
    raise InvalidFile(
        f"{count} cannot be read: {', '.join([*named, *rest])}",
        path=folder,
        hint=hint,
    )


def _within(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else str(file)

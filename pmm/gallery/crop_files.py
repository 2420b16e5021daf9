"""The crops in a folder: every image below it, what is left out, and what cannot be read. Loads no torch."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from pmm.data.bad_images import NO_FILE, first_look, refuse_bad_images
from pmm.data.left_out import ARCHIVE, IMAGE_SUFFIXES, is_image_name, left_out_lines, reason_left_out
from pmm.data.scan import image_advice
from pmm.utils.errors import InvalidFile, one_of, printable


@dataclass
class ImageFolder:
    """The images in `folder` and below it, in the order of their paths; what is left out; and what cannot be read."""

    folder: Path
    images: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    unreadable: dict[Path, str] = field(default_factory=dict)
    """Folders that cannot be read, and why."""

    @property
    def lines(self) -> list[str]:
        """What is left out, and why."""
        return left_out_lines(self.left_out, self.folder)

    def readable(self, *, skip_bad_images: bool) -> tuple[list[Path], dict[Path, str]]:
        """The images that are not bad at first sight, and what is bad.

        Raises InvalidFile naming all that is bad, unless it is to be skipped; and if nothing else is there.
        """
        at_sight = first_look(self.images)
        bad = {**self.unreadable, **at_sight}
        files = [file for file in self.images if file not in at_sight]
        if not skip_bad_images:
            refuse_bad_images(bad, self.folder, unseen=files)
        if not files:
            first, reason = next(iter(bad.items()))
            hint = f"the first is {first.relative_to(self.folder)} ({reason})"
            raise InvalidFile(f"none of its {len(self.images)} images can be read", path=self.folder, hint=hint)
        return files, bad


def walk_images(folder: Path) -> ImageFolder:
    """The images in `folder` and below it. Raises InvalidFile if it is no folder that can be read, or has no image."""
    _check_folder(folder)
    found = ImageFolder(folder)

    def keep(error: OSError) -> None:
        found.unreadable[Path(error.filename)] = f"a folder: {error.strerror}"

    for place, folders, names in os.walk(folder, onerror=keep):
        inside = []
        for name in folders:
            left = name.startswith(".") or os.path.islink(os.path.join(place, name))
            (found.left_out.append(Path(place, name)) if left else inside.append(name))
        folders[:] = inside
        for name in names:
            (found.images if is_image_name(name) else found.left_out).append(Path(place, name))
    if folder in found.unreadable:
        reason = found.unreadable[folder].removeprefix("a folder: ")
        raise InvalidFile(reason, path=folder, expected="a folder of images", hint="check its permissions")
    if not found.images:
        unreadable = [f"{path.relative_to(folder)} is {reason}" for path, reason in found.unreadable.items()]
        hint = "; ".join([*unreadable[:3], *found.lines])
        expected = f"files ending in {one_of(IMAGE_SUFFIXES)}"
        raise InvalidFile("it holds no image", path=folder, expected=expected, hint=hint)
    found.images.sort(key=lambda file: file.relative_to(folder).as_posix())
    return found


def images_below(folder: Path) -> list[Path]:
    """The images of `walk_images`, and a line (logger "pmm") for each reason why something is left out.

    Raises InvalidFile as it does, and for a folder that cannot be read or a file that is no regular one.
    """
    found = walk_images(folder)
    irregular = {file: NO_FILE for file in found.images if file.exists() and not file.is_file()}
    for path, reason in {**found.unreadable, **irregular}.items():
        raise InvalidFile(reason, path=path, expected="an image", hint=image_advice())
    for line in found.lines:
        logging.getLogger("pmm").warning("%s: %s", printable(folder), line)
    return found.images


def _check_folder(folder: Path) -> None:
    """Raises InvalidFile for what is no folder."""
    if folder.is_dir():
        return
    problem, hint = "No such file or directory", ""
    if folder.exists():
        problem = "it is not a folder"
        if is_image_name(folder.name):
            hint = f"give the folder that it is in, {folder.parent}"
        else:
            reason = reason_left_out(folder)
            hint = "unpack it and give the folder" if reason is ARCHIVE else reason.advice
    raise InvalidFile(problem, path=folder, expected="a folder of images", hint=hint)

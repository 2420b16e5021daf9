"""Read all files of a gallery: whether they are what was written, and fit each other. Exits with 1 if not.

pmm gallery verify GALLERY
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.gallery import Gallery
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.facts import how_many


@dataclass(frozen=True, kw_only=True)
class GalleryVerifyCommand:
    """`pmm gallery verify GALLERY`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""


def main(prog: str) -> int:
    """Entry point."""
    command = command_line.parse(GalleryVerifyCommand, prog=prog, description=__doc__ or "")
    gallery = Gallery.open(command.gallery)
    problems = gallery.verify()
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{command.gallery}: {how_many(len(gallery), 'crop')}, all files are as they were written")
    return int(bool(problems))

"""Write a gallery anew: without the crops that were removed, in few files, and with short codes that fit it best.

pmm gallery compact GALLERY

It needs room for a second gallery on the disk meanwhile. Searches go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.describe import describe_gallery
from pmm.gallery.gallery import Gallery
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.facts import how_many


@dataclass(frozen=True, kw_only=True)
class GalleryCompactCommand:
    """`pmm gallery compact GALLERY`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryCompactCommand, prog=prog, description=__doc__ or "")
    before = describe_gallery(command.gallery)
    gallery = Gallery.open(command.gallery)
    with gallery.writer():
        gallery.compact()
    after = describe_gallery(command.gallery)
    print(
        f"{command.gallery}: {how_many(after['crops'], 'crop')}, {how_many(before['removed'], 'removed one')} gone; "
        f"{how_many(after['chunks'], 'chunk')} (of {before['chunks']}), {after['size_mb']:g} MB (of "
        f"{before['size_mb']:g})"
    )

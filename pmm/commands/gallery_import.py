"""An index (.npz) of an earlier version becomes a gallery.

pmm gallery import INDEX.npz -o GALLERY
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.npz_index import import_npz
from pmm.gallery.unfinished import check_new_gallery
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.facts import how_many


@dataclass(frozen=True, kw_only=True)
class GalleryImportCommand:
    """`pmm gallery import INDEX.npz -o GALLERY`"""

    index: Annotated[Path, Arg("INDEX.npz", positional=True)]
    """Index that pmm embed of an earlier version wrote."""
    out: Annotated[Path, Arg("GALLERY", short="-o")]
    """Folder to write the gallery to."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryImportCommand, prog=prog, description=__doc__ or "")
    check_new_gallery(command.out)
    gallery = import_npz(command.index, command.out)
    print(f"{command.out}: {how_many(len(gallery), 'crop')}, {gallery.dim} dimensions, {gallery.metric}")

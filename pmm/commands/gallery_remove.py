"""Remove crops from a gallery: by their ids, or those that filters keep. The images stay where they are.

pmm gallery remove GALLERY ID ... [--ids FILE]
pmm gallery remove GALLERY --time-to 2026-05-01 [--camera 3] [--dry-run]

Their place on the disk is free after pmm gallery compact. pmm embed --append of their folder brings them back, if their
images are still in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pmm.gallery.gallery import Gallery
from pmm.gallery.removal import ids_to_remove
from pmm.gallery.search_options import RowFilterFlags
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions
from pmm.utils.facts import how_many


@dataclass(frozen=True, kw_only=True)
class GalleryRemoveCommand:
    """`pmm gallery remove GALLERY ID ...`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""
    id: Annotated[tuple[str, ...], Arg("ID", positional=True)] = ()
    """Crops to remove, as pmm search names them."""
    ids: Annotated[Path | None, Arg("FILE")] = None
    """Text file with an id on each line."""
    dry_run: bool = False
    """Say how many, and remove none."""
    rows: Annotated[RowFilterFlags, Arg(group="filters")] = field(default_factory=RowFilterFlags)

    def __post_init__(self) -> None:
        named = bool(self.id or self.ids)
        if named == (self.rows != RowFilterFlags()):
            problem = "ids and filters cannot be combined" if named else "nothing says which crops to remove"
            expected = "ids or --ids FILE, or filters such as --camera"
            raise ConflictingOptions(problem, "--ids", "--where", expected=expected)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryRemoveCommand, prog=prog, description=__doc__ or "")
    gallery = Gallery.open(command.gallery)
    with_filter = command.rows.row_filter(gallery)
    ids = gallery.ids_of(gallery.rows_where(with_filter)).tolist() if with_filter else []
    ids = ids or ids_to_remove(gallery, command.id, command.ids)
    if command.dry_run:
        print(f"{command.gallery}: {how_many(len(ids), 'crop')} of {len(gallery):,} would be removed")
        return
    removed = gallery.remove(ids)
    print(f"{command.gallery}: {how_many(removed, 'crop')} removed, {len(gallery):,} left")

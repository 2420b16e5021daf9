"""Remove crops from a gallery: by their ids, or those that filters keep. The images stay where they are.

pmm gallery remove GALLERY ID ... [--ids FILE]
pmm gallery remove GALLERY --time-to 2026-05-01 [--camera 3] [--dry-run]

Their place on the disk is free after pmm gallery compact. pmm embed --append of their folder brings them back, if their
images are still in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.gallery import Gallery
from pmm.gallery.removal import ids_to_remove
from pmm.gallery.search_options import row_filter
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
    camera: Annotated[tuple[str, ...], Arg("NAME", group="filters")] = ()
    """Those of these cameras, one or several."""
    time_from: Annotated[str, Arg("TIME", group="filters")] = ""
    """From this time on: seconds, or a date as 2026-05-01T14:30:00 (UTC where it names no zone)."""
    time_to: Annotated[str, Arg("TIME", group="filters")] = ""
    """Until this time, which is in."""
    where: Annotated[tuple[str, ...], Arg("NAME=VALUE", group="filters")] = ()
    """Those with this value in a column of the gallery, or with this id; of one NAME several values may be given."""
    dry_run: bool = False
    """Say how many, and remove none."""

    def __post_init__(self) -> None:
        named = bool(self.id or self.ids)
        filtered = bool(self.camera or self.time_from or self.time_to or self.where)
        if named == filtered:
            problem = "ids and filters cannot be combined" if named else "nothing says which crops to remove"
            expected = "ids or --ids FILE, or filters such as --camera"
            raise ConflictingOptions(problem, "--ids", "--where", expected=expected)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryRemoveCommand, prog=prog, description=__doc__ or "")
    gallery = Gallery.open(command.gallery)
    with_filter = row_filter(
        gallery, cameras=command.camera, since=command.time_from, until=command.time_to, where=command.where
    )
    ids = gallery.ids_of(gallery.rows_where(with_filter)).tolist() if with_filter else []
    ids = ids or ids_to_remove(gallery, command.id, command.ids)
    if command.dry_run:
        print(f"{command.gallery}: {how_many(len(ids), 'crop')} of {len(gallery):,} would be removed")
        return
    removed = gallery.remove(ids)
    print(f"{command.gallery}: {how_many(removed, 'crop')} removed, {len(gallery):,} left")

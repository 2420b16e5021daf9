"""Add embeddings that another program made to a gallery, or make one of them. Images are for pmm embed.

pmm gallery add GALLERY EMBEDDINGS.npz [--metric cosine]
pmm gallery add GALLERY EMBEDDINGS.npy --ids IDS.txt

All of them are added or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pmm.gallery.add_foreign import add_foreign
from pmm.gallery.foreign_embeddings import read_embeddings
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import InvalidInput
from pmm.utils.facts import how_many


@dataclass(frozen=True, kw_only=True)
class GalleryAddCommand:
    """`pmm gallery add GALLERY EMBEDDINGS.npz`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery to add to, or folder to make one in."""
    embeddings: Annotated[Path, Arg("EMBEDDINGS.npz", positional=True)]
    """Arrays embeddings [N, D] and ids [N], and any others [N] as columns (camera, time, path, ...); or a .npy file of
    embeddings alone."""
    ids: Annotated[Path | None, Arg("FILE")] = None
    """Ids of a .npy file's embeddings: a .npy file, or a text file with one on each line."""
    metric: Literal["euclidean", "cosine"] | None = None
    """How a new gallery compares embeddings: euclidean or cosine."""
    store: Literal["fp32", "fp16"] | None = None
    """Precision that a new gallery stores embeddings in: fp32, unless fp16 is given."""
    model: Annotated[Path | None, Arg("FILE")] = None
    """File of PMM that made the embeddings: a gallery of pmm embed takes no others."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryAddCommand, prog=prog, description=__doc__ or "")
    read = read_embeddings(command.embeddings, command.ids)
    try:
        gallery = add_foreign(command.gallery, read, metric=command.metric, store=command.store, model=command.model)
    except InvalidInput as error:
        error.path, error.hint = error.path or command.embeddings, error.hint or "nothing was added"
        raise
    print(
        f"{command.gallery}: {how_many(len(read.ids), 'crop')} added; {how_many(len(gallery), 'crop')}, {gallery.dim} "
        f"dimensions, {gallery.metric}, stored in {gallery.precision}"
    )

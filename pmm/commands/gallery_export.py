"""Take a gallery to another engine: an index file of faiss, a collection of Milvus, or a Parquet file.

pmm gallery export GALLERY --to faiss -o gallery.faiss [--index ivf-sq8]
pmm gallery export GALLERY --to milvus -o gallery.db
pmm gallery export GALLERY --to milvus -o http://HOST:19530
pmm gallery export GALLERY --to parquet -o gallery.parquet

A gallery is searched exactly as it is; another engine is for more crops than one machine holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pmm.gallery.exports.faiss_index import FaissKind, export_faiss
from pmm.gallery.exports.milvus import export_milvus, is_server
from pmm.gallery.exports.parquet import export_parquet
from pmm.gallery.gallery import Gallery
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.errors import ConflictingOptions
from pmm.utils.facts import how_many
from pmm.utils.files import output_file


@dataclass(frozen=True, kw_only=True)
class GalleryExportCommand:
    """`pmm gallery export GALLERY --to faiss|milvus|parquet -o OUT`"""

    gallery: Annotated[Path, Arg("GALLERY", positional=True)]
    """Gallery written by pmm embed."""
    to: Annotated[Literal["faiss", "milvus", "parquet"], Arg("ENGINE")]
    """faiss, milvus or parquet."""
    out: Annotated[str, Arg("OUT", short="-o")]
    """File to write; for Milvus a file (.db) or the address of a server."""
    index: Annotated[FaissKind | None, Arg("NAME")] = None
    """Of faiss: flat, which is exact, or ivf-sq8, which stores a byte per dimension and may miss crops (default:
    flat)."""
    collection: Annotated[str, Arg("NAME")] = ""
    """Of Milvus: the collection to make (default: crops)."""

    def __post_init__(self) -> None:
        if self.index and self.to != "faiss":
            raise ConflictingOptions("--index needs --to faiss", "--index", "--to")
        if self.collection and self.to != "milvus":
            raise ConflictingOptions("--collection needs --to milvus", "--collection", "--to")


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(GalleryExportCommand, prog=prog, description=__doc__ or "")
    gallery, out = Gallery.open(command.gallery), Path(command.out)
    if not (command.to == "milvus" and is_server(command.out)):
        output_file(out)
    cosine = gallery.metric == "cosine"
    print_as = ""
    if command.to == "faiss":
        table = export_faiss(gallery, out, command.index or "flat")
        scores = "inner products, 1 - distance" if cosine else "squared distances"
        print_as = f"; {table} says which crop each id is; faiss gives {scores}"
    elif command.to == "milvus":
        export_milvus(gallery, command.out, command.collection or "crops")
        print_as = f"; Milvus gives {'the similarity, 1 - distance' if cosine else 'squared distances'}"
    else:
        export_parquet(gallery, out)
    print(f"{command.out}: {how_many(len(gallery), 'crop')}, {gallery.dim} dimensions, {gallery.metric}{print_as}")

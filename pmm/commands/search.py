"""Find the crops of an index that are most like one image. Loads no torch for an ONNX file or an engine.

pmm search INDEX.npz --query IMAGE --artifact ARTIFACT [--top 10] [--picture OUT.png]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pmm.gallery.index import Index, Neighbours
from pmm.gallery.search import search, table
from pmm.runtime.open import BACKEND_HELP, check_backend
from pmm.utils import command_line
from pmm.utils.arguments import Arg
from pmm.utils.files import existing_file, output_file, replacing
from pmm.utils.hardware import cuda_index


@dataclass(frozen=True, kw_only=True)
class SearchCommand:
    """`pmm search INDEX.npz --query IMAGE --artifact ARTIFACT`"""

    index: Annotated[Path, Arg("INDEX.npz", positional=True)]
    """Index written by pmm embed (.npz)."""
    query: Annotated[Path, Arg("IMAGE")]
    """Image to look for."""
    artifact: Annotated[Path, Arg("ARTIFACT")]
    """Model that embeds the query: the file that made the index, or another one of the same checkpoint."""
    top: Annotated[int, Arg(least=1)] = 10
    """How many crops to list."""
    picture: Annotated[Path | None, Arg("OUT.png")] = None
    """Also draw the first results (20 at most) to this file (.png)."""
    folder: Annotated[Path | None, Arg("FOLDER")] = None
    """For --picture: folder of the indexed crops (default: the one that was embedded)."""
    backend: Annotated[str, Arg("NAME", help=BACKEND_HELP)] = "auto"
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""

    def __post_init__(self) -> None:
        check_backend(self.backend)
        cuda_index(self.device)


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(SearchCommand, prog=prog, description=__doc__ or "")
    existing_file(command.query, "an image to look for")
    if command.picture:
        output_file(command.picture, command.query, command.index, command.artifact, suffixes=(".png",))
    index = Index.load(command.index)
    neighbours = search(
        index, command.query, command.artifact, top=command.top, backend=command.backend, device=command.device
    )
    if command.picture:
        _draw(command, command.picture, index, neighbours, prog)
    print(table(index, neighbours))


def _draw(command: SearchCommand, out: Path, index: Index, neighbours: Neighbours, prog: str) -> None:
    from pmm.visualize.ranked import MAX_NEIGHBOURS, neighbours_picture

    picture = neighbours_picture(command.query, index, neighbours, command.folder)
    with replacing(out) as temporary:
        picture.save(temporary)
    if len(neighbours.indices) > MAX_NEIGHBOURS:
        print(f"{prog}: note: {out} shows the first {MAX_NEIGHBOURS}", file=sys.stderr)

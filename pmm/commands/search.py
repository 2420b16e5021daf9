"""Find the crops of an index that are most like one image. Loads no torch for an ONNX file or an engine.

pmm search INDEX.npz --query IMG --artifact ARTIFACT --top 10 [--picture OUT.png]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image

from pmm.data.crops import load_crops
from pmm.gallery.embed import contract_of
from pmm.gallery.index import Index, IndexContract, Neighbours
from pmm.runtime.open import open_runner
from pmm.utils import command_line
from pmm.utils.errors import UserError
from pmm.utils.files import existing_file, output_file, replacing
from pmm.utils.hardware import cuda_index

PICTURED = 20


@dataclass(frozen=True, kw_only=True)
class SearchCommand:
    """`pmm search INDEX.npz --query IMG --artifact ARTIFACT --top 10 [--picture OUT.png]`"""

    index: tyro.conf.Positional[Path]
    """Index written by pmm embed (.npz)."""
    query: Path
    """Image to look for."""
    artifact: Path
    """What embeds the query: the checkpoint, ONNX file or engine that made the index, or another file made from the
    same checkpoint."""
    top: int = 10
    """How many to list."""
    picture: Path | None = None
    """Also draw the first results (20 at most) to this file (.png)."""
    folder: Path | None = None
    """For the picture: where the indexed crops are now, if they have moved."""
    device: str = "auto"
    """Where to run: auto, cpu, cuda, or cuda:N for the GPU of that number."""


def main(prog: str) -> None:
    """Entry point."""
    command = command_line.parse(SearchCommand, prog=prog, description=__doc__ or "")
    if command.top < 1:
        raise UserError(f"--top is {command.top}; it must be at least 1")
    cuda_index(command.device)
    existing_file(command.query, "an image to look for")
    if command.picture:
        if command.picture.suffix.lower() != ".png":
            raise UserError(f"--picture is {command.picture}; give it a name that ends in .png")
        output_file(command.picture, command.query, command.index, command.artifact)
    index = Index.load(command.index)
    with open_runner(command.artifact, device=command.device) as runner:
        note = check_fits(index.contract, contract_of(command.artifact, runner), command)
        size = runner.preprocessing
        query = runner(load_crops([command.query], size.height, size.width))[0]
    found = index.nearest(query, command.top)
    picture = draw(command, index, found) if command.picture else None
    if note:
        print(f"{prog}: note: {note}", file=sys.stderr)
    if command.picture and picture:
        with replacing(command.picture) as temporary:
            picture.save(temporary)
        if len(found.indices) > PICTURED:
            print(f"{prog}: note: {command.picture} shows the first {PICTURED}", file=sys.stderr)
    print(table(index, found))


def check_fits(indexed: IndexContract, asked: IndexContract, command: SearchCommand) -> str:
    """What the user should know about comparing embeddings of two files; empty if it is the same file.

    Raises UserError if they cannot be compared.
    """
    differences = indexed.differences(asked)
    if differences:
        raise UserError(
            f"{command.artifact} does not fit {command.index}, embeddings of different models are not comparable "
            f"(the index has {'; '.join(differences)}); use the artifact that made the index, or embed the folder again"
        )
    if indexed.precision != asked.precision:
        return f"the index was made in {indexed.precision}, the query in {asked.precision}; distances differ a little"
    if indexed.artifact_sha256 != asked.artifact_sha256:
        return "the index was made by another file of the same checkpoint; distances may differ in the last digits"
    return ""


def table(index: Index, found: Neighbours) -> str:
    """A line per result: rank, distance (for a cosine contract the similarity), path; in columns."""
    measures, wide = measures_of(index, found), len(str(len(found.indices)))
    lines = zip(measures, found.indices.tolist(), strict=True)
    longest = max(map(len, measures))
    return "\n".join(
        f"{rank:>{wide}}  {measure:>{longest}}  {_on_one_line(index.paths[row])}"
        for rank, (measure, row) in enumerate(lines, start=1)
    )


def measures_of(index: Index, found: Neighbours) -> list[str]:
    """The distances as printed: Euclidean, or cosine similarity."""
    cosine = index.contract.embedding.metric == "cosine"
    return [f"{1 - distance if cosine else distance:.4f}" for distance in found.distances.tolist()]


def draw(command: SearchCommand, index: Index, found: Neighbours) -> Image.Image:
    """The query and its first results, their distances below. Raises UserError if a crop is missing or unreadable."""
    from pmm.visualize.lists import ranked_lists

    folder = command.folder or Path(index.folder)
    crops = [folder / index.paths[row] for row in found.indices[:PICTURED].tolist()]
    gone = [crop for crop in crops if not crop.is_file()]
    if gone:
        raise UserError(
            f"cannot draw {command.picture}: {len(gone)} of {len(crops)} crops are missing, the first is {gone[0]}; "
            "give --folder DIR if they have moved"
        )
    words = "cosine similarity" if index.contract.embedding.metric == "cosine" else "distance"
    captions = [measures_of(index, found)[:PICTURED]]
    return ranked_lists(
        [command.query], [[(crop, None) for crop in crops]], height=192, captions=captions, measure=words
    )


def _on_one_line(path: str) -> str:
    """A name with a line break or a terminal's control code in it would break the table."""
    return path if path.isprintable() else path.encode("unicode_escape").decode()

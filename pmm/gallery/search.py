"""Search: the crops of an index that are most like an image. Loads no torch for an ONNX file or an engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pmm.gallery.embed import contract_of, embed_files
from pmm.gallery.index import Index, IndexContract, Neighbours
from pmm.runtime.base import Runner
from pmm.runtime.open import open_runner
from pmm.utils.errors import UserError
from pmm.utils.facts import printable


def search(
    index: Index | str | Path,
    query: str | Path | Sequence[str | Path],
    artifact: str | Path,
    *,
    top: int = 10,
    backend: str = "auto",
    device: str = "auto",
) -> Neighbours:
    """The crops of an index that are most like an image, nearest first.

    Args:
        index: what `pmm.embed` made, or the file that it was saved to.
        query: an image file, or several of them.
        artifact: what embeds the query: the file that made the index, or another file of the same checkpoint. Where
            that rounds otherwise, one line (logger "pmm") says so.
        top: how many, or all if there are fewer.
        backend, device: as `pmm.open_runner`.

    Returns:
        Rows of the index and distances: [K] each for one image, [Q, K] for several.

    Raises:
        UserError: embeddings of another model than the index holds, a bad image, top < 1, or as `pmm.open_runner` and
            `Index.load`.

    Example:
        >>> index = pmm.embed("best.onnx", "crops")
        >>> found = pmm.search(index, "query.jpg", "best.onnx", top=3)
        >>> [index.file(row).exists() for row in found.indices]
        [True, True, True]
    """
    opened = index if isinstance(index, Index) else Index.load(index)
    one = isinstance(query, str | Path)
    files = [Path(query)] if one else [Path(each) for each in query]  # type: ignore[arg-type, union-attr]
    with open_runner(artifact, backend, device=device) as runner:
        found, note = nearest_to(files, opened, runner, Path(artifact), top)
    if note:
        logging.getLogger("pmm").warning("%s: %s", artifact, note)
    return Neighbours(found.indices[0], found.distances[0]) if one else found


def nearest_to(files: Sequence[Path], index: Index, runner: Runner, artifact: Path, top: int) -> tuple[Neighbours, str]:
    """As `search`, of an `artifact` that is open as `runner`, for several images; and what the user should know."""
    note = check_comparable(index.contract, contract_of(artifact, runner), artifact)
    return index.nearest(embed_files(runner, files), top), note


def check_comparable(indexed: IndexContract, asked: IndexContract, artifact: Path) -> str:
    """What the user should know about comparing embeddings of two files; empty if it is the same file.

    Raises UserError if they cannot be compared.
    """
    differences = indexed.differences(asked)
    if differences:
        raise UserError(
            f"{artifact} does not fit the index, embeddings of different models are not comparable (the index has "
            f"{'; '.join(differences)}); use the artifact that made the index, or embed the folder again"
        )
    if indexed.precision != asked.precision:
        return f"the index was made in {indexed.precision}, the query in {asked.precision}; distances differ a little"
    if indexed.artifact_sha256 != asked.artifact_sha256:
        return "the index was made by another file of the same checkpoint; distances may differ in the last digits"
    return ""


def table(index: Index, found: Neighbours) -> str:
    """A line per result of one query [K]: rank, distance (for a cosine contract the similarity), path; in columns."""
    measures, wide = measures_of(index, found), len(str(len(found.indices)))
    lines = zip(measures, found.indices.tolist(), strict=True)
    longest = max(map(len, measures))
    return "\n".join(
        f"{rank:>{wide}}  {measure:>{longest}}  {printable(index.paths[row])}"
        for rank, (measure, row) in enumerate(lines, start=1)
    )


def measures_of(index: Index, found: Neighbours) -> list[str]:
    """The distances [K] as printed: Euclidean, or cosine similarity."""
    cosine = index.contract.embedding.metric == "cosine"
    return [f"{1 - distance if cosine else distance:.4f}" for distance in found.distances.tolist()]

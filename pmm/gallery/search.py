"""Search: the crops of an index that are most like an image. Loads no torch for an ONNX file or an engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pmm.gallery.embed import contract_of, embed_files
from pmm.gallery.index import Index, IndexContract, Neighbours
from pmm.runtime.open import open_runner
from pmm.utils.errors import InvalidFile, printable


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
        artifact: what embeds the query: the file that made the index, or another file of the same checkpoint. If that
            rounds differently, one line (logger "pmm") says so.
        top: how many, or all if there are fewer.
        backend, device: as `pmm.open_runner`.

    Returns:
        Rows of the index and distances: [K] each for one image, [Q, K] for several.

    Raises:
        InvalidFile: an artifact of another model than the index, a bad image, or as `Index.load`.
        InvalidValue: top < 1.
        UserError: as `pmm.open_runner`.

    Example:
        >>> index = pmm.embed("best.onnx", "crops")
        >>> neighbours = pmm.search(index, "query.jpg", "best.onnx", top=3)
        >>> [index.file(row).exists() for row in neighbours.indices]
        [True, True, True]
    """
    index = index if isinstance(index, Index) else Index.load(index)
    single = isinstance(query, str | Path)
    files = [Path(query)] if single else [Path(each) for each in query]  # type: ignore[arg-type, union-attr]
    with open_runner(artifact, backend, device=device) as runner:
        check_comparable(index.contract, contract_of(Path(artifact), runner), Path(artifact))
        neighbours = index.nearest(embed_files(runner, files), top)
    return Neighbours(neighbours.indices[0], neighbours.distances[0]) if single else neighbours


def check_comparable(indexed: IndexContract, query: IndexContract, artifact: Path) -> None:
    """Warn (logger "pmm") if embeddings of the query's `artifact` round differently from the index's.

    Raises InvalidFile if they cannot be compared.
    """
    differences = indexed.differences(query)
    if differences:
        raise InvalidFile(
            "it does not fit the index: embeddings of different models are not comparable (the index has "
            f"{'; '.join(differences)})",
            path=artifact,
            hint="use the artifact that made the index, or embed the folder again",
        )
    log = logging.getLogger("pmm")
    if indexed.precision != query.precision:
        precisions = f"the index was made in {indexed.precision}, the query in {query.precision}"
        log.warning("%s: %s; distances differ a little", artifact, precisions)
    elif indexed.artifact_sha256 != query.artifact_sha256:
        note = "the index was made by another file of the same checkpoint; distances may differ in the last digits"
        log.warning("%s: %s", artifact, note)


def table(index: Index, neighbours: Neighbours) -> str:
    """A line per result of one query [K]: rank, distance (for a cosine contract the similarity), path; in columns."""
    measures, wide = measures_of(index, neighbours), len(str(len(neighbours.indices)))
    lines = zip(measures, neighbours.indices.tolist(), strict=True)
    longest = max(map(len, measures))
    return "\n".join(
        f"{rank:>{wide}}  {measure:>{longest}}  {printable(index.paths[row])}"
        for rank, (measure, row) in enumerate(lines, start=1)
    )


def measures_of(index: Index, neighbours: Neighbours) -> list[str]:
    """The distances [K] as printed: Euclidean, or cosine similarity."""
    cosine = index.contract.embedding.metric == "cosine"
    return [f"{1 - distance if cosine else distance:.4f}" for distance in neighbours.distances.tolist()]

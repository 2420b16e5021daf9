"""What a new gallery will be, and whether there is a place for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pmm.evaluation.embedding_matrix import METRICS
from pmm.evaluation.metrics import Metric
from pmm.gallery.model_of import source_of
from pmm.gallery.storage.columns import Array, Ids
from pmm.gallery.storage.manifest import (
    FILE_NAME,
    FOLDER_KINDS,
    FOLDER_NAME,
    GalleryManifest,
    StoredPrecision,
    check_column_name,
    is_gallery,
)
from pmm.gallery.storage.rows import check_columns, kind_of_values
from pmm.gallery.storage.source import EmbeddingSource
from pmm.gallery.storage.writer import refuse_links
from pmm.utils.errors import CannotWrite, ConflictingOptions, InvalidInput, InvalidValue
from pmm.utils.files import cannot_write


def new_manifest(
    embeddings: Array,
    ids: Ids,
    metric: Metric | None,
    *,
    source: EmbeddingSource | None,
    columns: Mapping[str, Array],
    precision: StoredPrecision,
    folder: str,
) -> GalleryManifest:
    """That of a gallery before its first rows.

    Raises InvalidValue for an unknown metric or precision, or a name that no column can have; InvalidInput for columns
    that do not fit the meaning of their name, and embeddings without dimensions; ConflictingOptions for a metric that
    is not the source's.
    """
    if precision not in ("fp32", "fp16"):
        raise InvalidValue("precision", precision, choices=("fp32", "fp16"))
    if metric is not None and metric not in METRICS:
        raise InvalidValue("metric", metric, choices=METRICS)
    if source and metric not in (None, source.embedding.metric):
        raise ConflictingOptions(
            f"{{metric}} is {metric}, and {{source}} compares by {source.embedding.metric}", "metric", "source"
        )
    for name in columns:
        check_column_name(name)
    check_columns(columns)
    dim = source.embedding.dim if source else embeddings.shape[1] if embeddings.ndim == 2 else 0
    if dim < 1:
        raise InvalidInput(f"embeddings are {list(embeddings.shape)}", expected=f"numbers [{len(ids)}, D]")
    return GalleryManifest(
        generation=0,
        dim=dim,
        metric=metric or (source.embedding.metric if source else "euclidean"),
        precision=precision,
        ids="text" if ids.dtype == object else "int64",
        folder=folder,
        source=source,
        columns={name: kind_of_values(name, values) for name, values in columns.items()},
    )


def source_of_model(model: Path, source: EmbeddingSource | None = None) -> EmbeddingSource:
    """The source of embeddings that the file `model` computes. Raises ConflictingOptions if a `source` is given too."""
    from pmm.runtime.open import open_runner

    if source is not None:
        raise ConflictingOptions("{source} and {model} exclude each other", "source", "model", hint="give one of them")
    with open_runner(model) as runner:
        return source_of(model, runner)


def check_new(path: Path) -> None:
    """Raises CannotWrite unless `path` can become a gallery: it may hold hidden files and what a killed `create` left,
    nothing else."""
    if "\0" in str(path):
        raise CannotWrite("no name can hold the character NUL", path=path)
    if is_gallery(path):
        raise CannotWrite("it is a gallery already", path=path, hint="add to it, or give another name")
    try:
        if not path.is_dir():
            return
        refuse_links(path)
        other = next(_foreign(path), None)
    except OSError as error:
        raise cannot_write(path, error) from error
    if other:
        problem = f"it holds {other.relative_to(path)}"
        raise CannotWrite(problem, path=path, expected="an empty folder, or one to make")


def _foreign(path: Path) -> Iterator[Path]:
    """Files that no gallery has written: only a gallery's own files may be removed."""
    for each in sorted(path.iterdir()):
        if each.name[0] == ".":
            continue
        if each.name not in FOLDER_KINDS or not each.is_dir():
            yield each
            continue
        for folder in sorted(each.iterdir()):
            if not FOLDER_NAME.fullmatch(folder.name) or not folder.is_dir():
                yield folder
            else:
                yield from (file for file in sorted(folder.iterdir()) if not FILE_NAME.fullmatch(file.name))

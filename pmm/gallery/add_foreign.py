"""Add embeddings of other programs to a gallery, if they can be compared with those in it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pmm.gallery.creation import source_of_model
from pmm.gallery.foreign_embeddings import ForeignEmbeddings
from pmm.gallery.gallery import Gallery
from pmm.gallery.model_of import check_artifact, check_gallery_precision
from pmm.gallery.storage.manifest import StoredPrecision, is_gallery
from pmm.gallery.storage.source import check_comparable
from pmm.gallery.unfinished import check_new_gallery
from pmm.utils.errors import ConflictingOptions, InvalidFile, InvalidInput
from pmm.utils.files import existing_file


def add_foreign(
    path: Path,
    read: ForeignEmbeddings,
    *,
    metric: Literal["euclidean", "cosine"] | None = None,
    store: StoredPrecision | None = None,
    model: Path | None = None,
) -> Gallery:
    """Add what was read to the gallery at `path`, or make one there.

    Args:
        metric, store: metric and stored precision (default: fp32) of a new gallery, which needs a metric unless the
            model says it.
        model: the file that made the embeddings, if it is one of PMM.

    Raises:
        ConflictingOptions: a metric or precision that is not the gallery's; a new one without a metric.
        InvalidFile: another model than the gallery's, or none said for a gallery of one.
        InvalidInput: as `Gallery.add`.
        CannotWrite: as `Gallery.create` and `Gallery.add`.
    """
    if not is_gallery(path):
        return _create(path, read, metric, store or "fp32", model)
    gallery = Gallery.open(path)
    if metric not in (None, gallery.metric):
        problem = f"--metric is {metric}, and the gallery compares by {gallery.metric}"
        raise ConflictingOptions(problem, "--metric", hint="leave --metric out")
    if store not in (None, gallery.precision):
        problem = f"--store is {store}, and the gallery stores {gallery.precision}"
        raise ConflictingOptions(problem, "--store", hint="leave --store out")
    if model is None and gallery.source:
        problem = "a model of PMM made it, and embeddings of another one cannot be compared with its own"
        raise InvalidFile(problem, path=path, hint="give --model FILE if that made these, or another name")
    source = None
    if model is not None:
        if gallery.source is None:
            problem = "it does not say what made its embeddings, so those of a model are not mixed in"
            raise InvalidFile(problem, path=path, hint="give another name, or leave --model out")
        check_artifact(gallery.source, existing_file(model, "a model"))
        source = source_of_model(model)
        check_comparable(gallery.source, source, model)
        check_gallery_precision(gallery.source, source, model)
    gallery.add(read.embeddings, read.ids, read.columns, source=source)
    return gallery


def _create(
    path: Path,
    read: ForeignEmbeddings,
    metric: Literal["euclidean", "cosine"] | None,
    store: StoredPrecision,
    model: Path | None,
) -> Gallery:
    check_new_gallery(path)
    if metric is None and model is None:
        problem = f"{path} is new, and nothing says how its embeddings are compared"
        raise ConflictingOptions(problem, "--metric", hint="give --metric euclidean or cosine")
    if not len(read.ids):
        raise InvalidInput("there are no embeddings", expected="1 or more")
    source = source_of_model(existing_file(model, "a model")) if model else None
    return Gallery.create(path, read.embeddings, read.ids, metric, source=source, columns=read.columns, precision=store)

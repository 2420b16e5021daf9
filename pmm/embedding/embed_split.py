"""Queries and gallery of a data set -> embeddings; images that cannot be read are all named, or left out. Loads no
torch for an ONNX file or an engine."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pmm.data.bad_images import refuse_bad_images, refuse_none_left, unreadable_images
from pmm.data.samples import ReidDataset
from pmm.data.splits import without_images
from pmm.embedding.embed import embed_samples
from pmm.runtime.base import Embeddings, Runner
from pmm.utils.errors import InvalidFile


class EmbeddedSplit(NamedTuple):
    """The crops that can be read, and their embeddings [Q, D] and [G, D]."""

    split: ReidDataset
    query: Embeddings
    gallery: Embeddings
    bad: dict[str, dict[Path, str]]
    """Images that were left out, and why, under "query" and "gallery"."""


def embed_split(
    runner: Runner,
    split: ReidDataset,
    folder: Path,
    *,
    skip_bad_images: bool = False,
    batch_size: int = 64,
    label: str = "",
    flip: bool = False,
) -> EmbeddedSplit:
    """Embed queries and gallery of the data set in `folder`; each has a progress bar named `label` and the part.

    Raises InvalidFile naming all images that cannot be read, unless they are to be skipped, and as `embed_samples`.
    """
    embeddings: dict[str, Embeddings] = {}
    bad: dict[str, dict[Path, str]] = {}
    for name, samples in (("query", split.query), ("gallery", split.gallery)):
        unreadable: dict[int, InvalidFile] | None = {} if skip_bad_images else None
        try:
            rows = embed_samples(
                runner, samples, batch_size=batch_size, label=label + name, flip=flip, unreadable=unreadable
            )
        except InvalidFile as error:
            files = [sample.path for sample in (*split.query, *split.gallery)]
            if error.path in files:
                refuse_bad_images(unreadable_images(files, label="bad images"), folder)
            raise
        bad[name] = {samples[row].path: error.problem for row, error in sorted((unreadable or {}).items())}
        refuse_none_left(bad[name], [sample.path for sample in samples], folder)
        embeddings[name] = np.delete(rows, list(unreadable), axis=0) if unreadable else rows
    kept = without_images(split, {**bad["query"], **bad["gallery"]})
    return EmbeddedSplit(kept, embeddings["query"], embeddings["gallery"], bad)

"""A large gallery to search: crops of people, and made-up ones by the model of `pmm.bench.chain.distractors`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.lab.ranking import MARKET, synthetic_embeddings
from pmm.bench.chain.distractors import DistractorRecipe
from pmm.utils.arrays import Ints, Singles

ROWS_AT_ONCE = 50_000
"""Of the gallery, in memory."""


class People(NamedTuple):
    """Embeddings of crops [N, D] of a training part, a gallery and queries."""

    name: str
    train: Singles
    train_pids: Ints
    gallery: Singles
    queries: Singles

    def rows(self, count: int) -> Iterator[Singles]:
        """`count` embeddings, `ROWS_AT_ONCE` at a time: the gallery, then made-up people."""
        waiting, held = [self.gallery[:count]], min(count, len(self.gallery))
        for more in DistractorRecipe.of(self.train, self.train_pids, count - held).rows(self.train):
            waiting.append(more)
            held += len(more)
            if sum(map(len, waiting)) >= ROWS_AT_ONCE:
                yield np.concatenate(waiting)
                waiting = []
        if waiting:
            yield np.concatenate(waiting)


def synthetic_people(dim: int, queries: int) -> People:
    """Clusters in few dimensions, as `bench.lab.ranking` draws them: their test part, in two, is all that there is."""
    size = MARKET._replace(queries=queries + 3000, gallery=2400, identities=200, distractors=0)
    drawn = synthetic_embeddings(size, dim)
    return People(
        f"synthetic clusters of {dim} dimensions", drawn.gallery, drawn.gallery_pids, drawn.query[queries:],
        drawn.query[:queries],
    )  # fmt: skip


def embedded_people(artifact: Path, root: Path, queries: int) -> People:
    """Of synthetic people at `root` (see `pmm synthetic`), what a trained network makes of them.

    Raises UserError for a file or a data set that cannot be used.
    """
    from pmm.data.readers import read_dataset
    from pmm.embedding.embed import embed_samples
    from pmm.runtime.open import open_runner

    split = read_dataset("synthetic", root)
    with open_runner(artifact) as runner:
        train, gallery, query = (
            embed_samples(runner, samples, label=name)
            for name, samples in (("train", split.train), ("gallery", split.gallery), ("query", split.query[:queries]))
        )
    pids = np.array([sample.pid for sample in split.train])
    return People(f"a trained network's ({artifact.name})", train, pids, gallery, query)

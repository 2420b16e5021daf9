"""Crops on disk -> embeddings, the same way for every backend. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pmm.data.crops import Crops, iter_crops
from pmm.data.samples import Sample, Split, camids_of, pids_of
from pmm.metrics import RankingResult, evaluate_ranking
from pmm.runtime.base import Embeddings, Runner


def embed_samples(runner: Runner, samples: Sequence[Sample], *, batch_size: int = 64, label: str = "") -> Embeddings:
    """Embeddings [N, D] of `samples`, in order; with a `label`, a progress bar of that name."""
    from tqdm import tqdm

    size = runner.preprocessing
    batches = iter_crops([sample.path for sample in samples], size.height, size.width, batch_size)
    with tqdm(total=len(samples), desc=label, unit="img", leave=False, disable=None if label else True) as bar:
        done = []
        for crops in batches:
            done.append(runner(crops))
            bar.update(len(crops))
    return np.concatenate(done)


def embed_crops(runner: Runner, crops: Crops, *, batch_size: int = 64) -> Embeddings:
    """Embeddings [N, D] of crops already in memory [N, H, W, 3]."""
    return np.concatenate([runner(crops[start : start + batch_size]) for start in range(0, len(crops), batch_size)])


def rank_split(split: Split, query: Embeddings, gallery: Embeddings) -> RankingResult:
    """`evaluate_ranking` of a split's embeddings: standard AP, Euclidean distance."""
    return evaluate_ranking(
        query,
        gallery,
        pids_of(split.query),
        pids_of(split.gallery),
        camids_of(split.query),
        camids_of(split.gallery),
    )

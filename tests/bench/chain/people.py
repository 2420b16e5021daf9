"""Embeddings of made-up people for the chain: clusters, some cameras, norms that differ, no distribution's tails."""

from __future__ import annotations

import numpy as np

from pmm.evaluation.parity.labels import Labels, QueryGallery

DIM = 16
CAMERAS = 3


def labelled(
    seed: int = 0, people: int = 20, crops: int = 5, dim: int = DIM, distractors: int = 60
) -> tuple[QueryGallery, Labels]:
    """Two queries and some gallery crops of each person, `distractors` of nobody; every third crop per camera."""
    rng = np.random.default_rng(seed)
    centres = rng.gamma(2.0, 1.0, (people, dim))

    def drawn(pids: np.ndarray) -> np.ndarray:
        return (centres[pids] + 0.9 * rng.normal(size=(len(pids), dim))).clip(min=0).astype(np.float32)

    query_pids, gallery_pids = np.repeat(np.arange(people), 2), np.repeat(np.arange(people), crops)
    others = rng.gamma(2.0, 1.0, (distractors, dim)).astype(np.float32)
    gallery = np.concatenate([drawn(gallery_pids), others])
    order = rng.permutation(len(gallery))
    pids = np.concatenate([gallery_pids, people + np.arange(distractors)])[order]
    labels = Labels(
        query_pids=query_pids.astype(np.int64),
        gallery_pids=pids.astype(np.int64),
        query_camids=rng.integers(0, CAMERAS, len(query_pids)),
        gallery_camids=rng.integers(0, CAMERAS, len(gallery)),
    )
    return QueryGallery(drawn(query_pids), gallery[order]), labels

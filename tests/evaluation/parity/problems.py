"""Small data sets with everything that goes wrong in them, and the definitions taken literally, pair by pair."""

import numpy as np
from hypothesis import strategies as st

from pmm.evaluation.parity.labels import Labels, QueryGallery


def labels_of(query_pids, gallery_pids, query_camids, gallery_camids):
    return Labels(
        query_pids=np.array(query_pids),
        gallery_pids=np.array(gallery_pids),
        query_camids=np.array(query_camids),
        gallery_camids=np.array(gallery_camids),
    )


@st.composite
def problems(draw):
    """Reference, candidate and labels: whole numbers with many ties; distractors, junk, queries without a match,
    a single query, galleries of fewer than ten. The candidate is the reference, or a little off, or another."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    queries, gallery = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 5, 9, 10, 11, 30, 60, 90]))
    high, dim = draw(st.sampled_from([1, 2, 4, 20])), draw(st.integers(1, 3))
    people, cameras = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    changed = draw(st.sampled_from([0.0, 0.1, 1.0]))
    reference = QueryGallery(
        *(rng.integers(0, high + 1, (rows, dim)).astype(np.float32) for rows in (queries, gallery))
    )
    candidate = QueryGallery(
        *(np.where(rng.random(x.shape) < changed, rng.integers(0, high + 1, x.shape), x) for x in reference)
    )
    labels = labels_of(
        rng.integers(1, people + 1, queries),
        rng.integers(0, people + 1, gallery),
        rng.integers(0, cameras, queries),
        rng.integers(0, cameras, gallery),
    )
    return reference, candidate, labels


def people(queries=60, gallery=300, dim=16, identities=20, noise=1.0, seed=0):
    """Real-valued embeddings of structured people, and their labels."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(identities + 1, dim))
    labels = labels_of(
        rng.integers(1, identities + 1, queries),
        rng.integers(0, identities + 1, gallery),
        rng.integers(0, 3, queries),
        rng.integers(0, 3, gallery),
    )
    rows = [
        (centres[pids] + noise * rng.normal(size=(len(pids), dim))).astype(np.float32)
        for pids in (labels.query_pids, labels.gallery_pids)
    ]
    return QueryGallery(*rows), labels


def off_by(embedded, size, seed=1):
    """The same embeddings with noise of that size."""
    rng = np.random.default_rng(seed)
    return QueryGallery(*((rows + size * rng.normal(size=rows.shape)).astype(np.float32) for rows in embedded))


def turned(embedded, seed=2):
    """The same embeddings in a rotated space."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(embedded.query.shape[1],) * 2))
    return QueryGallery(*(rows.astype(np.float64) @ turn for rows in embedded))


def shuffled(embedded, seed=3):
    """The same embeddings with their dimensions in another order."""
    order = np.random.default_rng(seed).permutation(embedded.query.shape[1])
    return QueryGallery(*(rows[:, order] for rows in embedded))


def square(embedded, q, g):
    """Squared distance of one pair."""
    return sum((float(a) - float(b)) ** 2 for a, b in zip(embedded.query[q], embedded.gallery[g], strict=True))


def same_person(labels, q, g):
    return labels.query_pids[q] == labels.gallery_pids[g]


def is_junk(labels, q, g):
    return same_person(labels, q, g) and labels.query_camids[q] == labels.gallery_camids[g]


def evaluable(labels):
    """Queries with a relevant gallery item."""
    pairs = [(q, g) for q in range(len(labels.query_pids)) for g in range(len(labels.gallery_pids))]
    return sorted({q for q, g in pairs if same_person(labels, q, g) and not is_junk(labels, q, g)})


def ranked(embedded, labels, q):
    """The whole list of one query, by distance, then index."""
    kept = [g for g in range(len(labels.gallery_pids)) if not is_junk(labels, q, g)]
    return sorted(kept, key=lambda g: (square(embedded, q, g), g))

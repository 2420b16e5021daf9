"""Distances by their definition, and galleries that are hard to search."""

import numpy as np
from hypothesis import strategies as st

from pmm.evaluation.embedding_matrix import comparable_rows

KINDS = ("decaying", "flat", "levels", "few", "equal", "far apart", "about a point", "zeros")


def brute_force(queries, rows, metric):
    """Half the squared distances [Q, N] in float64, as `pmm.evaluation` has them."""
    queries, rows = (comparable_rows(np.asarray(each), metric) for each in (queries, rows))
    return np.stack([np.einsum("nd,nd->n", rows - query, rows - query) / 2 for query in queries])


def nearest(distances, k, counts=None):
    """Rows [Q, k], ties by row, and distances; -1 and infinite where there are no more. `counts` [Q, N]."""
    if counts is not None:
        distances = np.where(counts, distances, np.inf)
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(distances, order, 1)
    return np.where(np.isinf(found), -1, order), found


def made_up(kind, count, dim, seed):
    """Rows float32 [count, dim] with ties, equal ones, spectra or norms that are hard for codes."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dim))
    if kind == "decaying":
        rows *= np.exp(-np.arange(dim) / 6)
    elif kind == "levels":
        rows = np.rint(rows)
    elif kind == "few":
        rows = rows[rng.integers(0, min(3, count), count)]
    elif kind == "equal":
        rows[:] = rows[0]
    elif kind == "far apart":
        rows *= 10.0 ** rng.uniform(-30, 15, (count, 1))
    elif kind == "about a point":
        rows = 1000 + 1e-3 * rows
    elif kind == "zeros":
        rows[rng.random(count) < 0.5] = 0
    return rows.astype(np.float32)


@st.composite
def galleries(draw, metric, most=300):
    """Rows, queries among, beside and far from them, and a number of coordinates."""
    kind = draw(st.sampled_from([kind for kind in KINDS if metric == "euclidean" or kind != "zeros"]))
    count, dim = draw(st.integers(1, most)), draw(st.integers(1, 70))
    rows = made_up(kind, count, dim, draw(st.integers(0, 2**32)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    queries = rows[rng.integers(0, count, draw(st.integers(1, 6)))]
    queries = np.concatenate([queries, queries[:1] * np.float32(1.001), rows[:1] + 1, made_up("flat", 1, dim, count)])
    if metric == "cosine":
        rows[:, 0] += (rows == 0).all(1)
        queries[:, 0] += (queries == 0).all(1)
    return rows, queries, draw(st.sampled_from([1, (dim + 1) // 2, dim]))

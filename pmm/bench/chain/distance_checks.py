"""Whether distances are those of the rows that an index lists, and lists those of brute force. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pmm.bench.chain.index_inputs import NEAREST, Answers, IndexFault, IndexInputs
from pmm.bench.chain.indexes import SearchIndex
from pmm.data.samples import evenly_spaced
from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix, comparable_rows
from pmm.evaluation.nearest import nearest
from pmm.evaluation.rounding import UNIT, product_error
from pmm.utils.arrays import Floats, Ints

MANY = 0.1
"""Share of the distances that is wrong where the formula is."""
DISTANCE_TOLERANCE = 1e-3
"""How far distances may be off where they are compared with a formula, relative to the numbers in it."""
EXACT = 1e-6
"""How far an exact index may be off, relative to the distance: what is told is rounded."""
TIED = 1e-9
FILTERED = 32
"""Queries that are asked for rows of other cameras."""


def wrong_distances(index: SearchIndex, inputs: IndexInputs, answers: Answers, *, known: bool) -> Iterator[IndexFault]:
    """Distances that are not those of the rows: `known`, only if it is known what they are instead."""
    query, place = np.nonzero((answers.listing.rows >= 0) & (answers.listing.rows < len(inputs.vectors)))
    if not len(query):
        return
    q = np.asarray(inputs.queries[answers.asked[query]], np.float64)
    x = np.asarray(inputs.vectors[answers.listing.rows[query, place]], np.float64)
    told = answers.listing.distances[query, place]
    if index.exact:
        true = np.linalg.norm(comparable_rows(q, inputs.metric) - comparable_rows(x, inputs.metric), axis=1)
        wrong = ~(abs(told - true) <= EXACT * true + 1e-30)
    else:  # |q|^2 + |x|^2 - 2 q x in float32, its root taken
        true = np.linalg.norm(q - x, axis=1)
        norms = np.linalg.norm(q, axis=1), np.linalg.norm(x, axis=1)
        limit = 2 * product_error(norms[0], norms[1], q.shape[1]) + q.shape[1] * UNIT * (norms[0] + norms[1]) ** 2
        wrong = ~(abs(told * np.abs(told) - true**2) <= limit + 1e-30)
    what = _formula(told, q, x, true)
    if known and (not what or wrong.mean() <= MANY):
        return
    if not wrong.any() or not (known or index.exact_distances):
        return
    lengths = np.linalg.norm(x, axis=1)
    fault, evidence = {
        "inner product": (
            "inner product on unnormalised vectors",
            "they are inner products of vectors that are not at norm 1 (norms range from "
            f"{lengths.min():.3g} to {lengths.max():.3g})",
        ),
        "norms": ("dropped norm column", "the squared norms of the rows are left out of them"),
        "squares": ("squared distances", "they are squares"),
        "": ("wrong distances", f"the first is {told[wrong][0]:.9g}, and {true[wrong][0]:.9g} by the vectors"),
    }[what]
    yield IndexFault(fault, f"{wrong.mean():.2%} of the distances are not those of the rows that it lists: {evidence}")


def _formula(told: Floats, q: Floats, x: Floats, true: Floats) -> str:
    """What distances of pairs of rows q and x [P, D] are, if they are no Euclidean ones; empty if that is unknown."""
    products, squares = np.einsum("pd,pd->p", q, x), np.einsum("pd,pd->p", q, q)
    scale = float(np.abs(products).mean() + squares.mean()) or 1.0
    signed = told * np.abs(told)  # the square, if a root was taken of what may be below 0

    def agree(*formulas: tuple[Floats, Floats]) -> bool:
        return any(bool(np.median(abs(one - other)) <= DISTANCE_TOLERANCE * scale) for one, other in formulas)

    if agree((signed, true**2)):
        return ""
    if agree((signed, 2 - 2 * products), (told, products), (told, -products)):
        return "inner product"
    if agree((signed, squares - 2 * products), (told, squares - 2 * products)):
        return "norms"
    return "squares" if agree((told, true**2)) else ""


def certificate(inputs: IndexInputs, answers: Answers, *, elsewhere: bool = False) -> Iterator[IndexFault]:
    """An index that promises the rows of brute force lists these, ties by row; `elsewhere`: without rows of the query's
    own camera."""
    rows = answers.listing.rows[:, : len(inputs.vectors)]
    queries, vectors = (
        EmbeddingMatrix(each, metric=inputs.metric) for each in (inputs.queries[answers.asked], inputs.vectors)
    )
    between = EmbeddingDistances(queries, vectors)
    removed = np.flatnonzero(~inputs.live)

    def excluded(some: slice) -> tuple[Ints, Ints]:
        count = some.stop - some.start
        query, item = np.repeat(np.arange(count), len(removed)), np.tile(removed, count)
        if elsewhere:
            own = np.nonzero(inputs.query_camids[answers.asked[some], None] == inputs.camids)
            query, item = np.concatenate([query, own[0]]), np.concatenate([item, own[1]])
        return query, item

    blocks = Blocks.within(MEMORY_LIMIT, between.shape, between.dim, 1)
    truth, halves, _ = nearest(between, rows.shape[1], blocks, excluded=excluded)
    differing = np.flatnonzero((truth != rows).any(1))
    if not len(differing):
        return
    query = int(differing[0])
    place = int((truth[query] != rows[query]).argmax())
    true, told = np.sqrt(2 * halves * between.factor), answers.listing.distances[:, : rows.shape[1]]
    # exact ties only: rows in another order at the same distances
    tied = np.isclose(told[differing], true[differing], rtol=TIED, atol=0).all() and (rows[differing] >= 0).all()
    lists = f"{len(differing)} of {len(rows)} lists differ from brute force"
    where = f"query {int(answers.asked[query])} has row {int(rows[query, place])} at place {place + 1}"
    should = f"not {int(truth[query, place])}"
    if tied:
        yield IndexFault("tie order changed", f"{lists} where rows are equally far: {where}, {should}; ties go by row")
    else:
        yield IndexFault("not exact", f"{lists}: {where}, {should}")


def filter_faults(index: SearchIndex, inputs: IndexInputs) -> Iterator[IndexFault]:
    """A search that leaves the query's own camera out lists none of its rows, and all others as it should."""
    if index.search_elsewhere is None:
        return
    asked = inputs.asked[evenly_spaced(len(inputs.asked), FILTERED)]
    camids = inputs.query_camids[asked]
    queries = np.asarray(inputs.queries[asked], np.float32)
    answers = Answers(asked, index.search_elsewhere(queries, min(NEAREST, len(index)), camids))
    rows = answers.listing.rows
    junk = (rows >= 0) & (inputs.camids[np.minimum(rows, len(inputs.camids) - 1)] == camids[:, None])
    if junk.any():
        row = int(rows[junk][0])
        evidence = (
            f"{int(junk.any(1).sum())} of {len(rows)} lists have rows of the query's own camera, one is row {row}"
        )
        yield IndexFault("filter forgets junk", evidence)
        return
    others = np.array([np.count_nonzero(inputs.live & (inputs.camids != camera)) for camera in camids.tolist()])
    empty = ((rows >= 0).sum(1) == 0) & (others > 0)
    if empty.any():
        query = int(asked[empty][0])
        evidence = f"{int(empty.sum())} of {len(rows)} lists are empty, one is that of query {query}"
        yield IndexFault("filter forgets rows of other cameras", evidence)
        return
    yield from wrong_distances(index, inputs, answers, known=False)
    if index.exact:
        for fault, evidence in certificate(inputs, answers, elsewhere=True):
            yield IndexFault(fault, f"without the query's own camera, {evidence}")

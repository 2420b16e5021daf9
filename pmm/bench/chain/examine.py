"""What is wrong with an index: its rows, ids, distances, filters and provenance, held against the vectors that it was
given. What it misses because it is approximate is no fault; the gates judge that.

Each check names the fault that its figures look like, so that the reader knows where to search.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pmm.bench.chain.distance_checks import DISTANCE_TOLERANCE, certificate, filter_faults, wrong_distances
from pmm.bench.chain.index_inputs import NEAREST, PROBES, Answers, IndexFault, IndexInputs
from pmm.bench.chain.indexes import SearchIndex
from pmm.data.samples import evenly_spaced
from pmm.evaluation.distance_blocks import MEMORY_LIMIT, Blocks
from pmm.evaluation.distances import EmbeddingDistances
from pmm.evaluation.embedding_matrix import EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from pmm.gallery.storage.short_codes import rows_digest
from pmm.utils.arrays import Ints

DEEP, DEEP_QUERIES = 1000, 4
"""Rows of a long list, and queries that one is asked for."""
MOST = 0.9
"""Of the probes of a group: a graph or an inverted list may miss some, no group as a whole."""
TOLERANCES = {"none": 2e-3, "scalar": 0.1}
"""How far a row, as the index keeps it, may be from the row that it was given, relative to the rows' spread. Half
precision rounds by 5e-4; what is kept coarsely is not compared."""
CLIPPED = 0.01
"""Share of the numbers that a scalar quantizer may clip: a row that was added later may lie outside."""
ROWS_AT_ONCE = 4096


def examine(index: SearchIndex, inputs: IndexInputs) -> tuple[IndexFault, ...]:
    """All that is wrong with `index`; what hides everything else comes first, and alone."""
    if found := tuple(_provenance(index, inputs)):
        return found
    probes = _Probes(index, inputs)
    short, deep = _ask(index, inputs, inputs.asked, NEAREST), _ask(index, inputs, inputs.asked[:DEEP_QUERIES], DEEP)
    if found := tuple(wrong_distances(index, inputs, short, known=True)):
        return found
    if found := (*_sizes(index, inputs, probes), *_identities(inputs, probes)):
        return found
    if found := (*_kept(index, inputs), *_lists(inputs, short)):
        return found
    for answers in (short, deep):
        if found := tuple(wrong_distances(index, inputs, answers, known=False)):
            return found
        if index.exact and (found := tuple(certificate(inputs, answers))):
            return found
    return (*_lists(inputs, deep), *filter_faults(index, inputs))


def _ask(index: SearchIndex, inputs: IndexInputs, asked: Ints, k: int) -> Answers:
    return Answers(asked, index.search(np.asarray(inputs.queries[asked], np.float32), min(k, len(index))))


class _Probes:
    """What an index answers to its own rows."""

    def __init__(self, index: SearchIndex, inputs: IndexInputs) -> None:
        self.rows = inputs.probes
        self.vectors = np.asarray(inputs.vectors[self.rows], np.float32)
        self.listing = index.search(self.vectors, min(NEAREST, max(1, len(index))))
        self.found = (self.listing.rows == self.rows[:, None]).any(1)
        first = self.listing.rows[:, 0]
        known = (first >= 0) & (first < len(inputs.vectors))
        equal = np.zeros(len(first), np.bool_)
        equal[known] = (inputs.vectors[first[known]] == inputs.vectors[self.rows[known]]).all(1)
        self.found |= equal & (index.quantizer == "none")  # one of many that are equal


def _provenance(index: SearchIndex, inputs: IndexInputs) -> Iterator[IndexFault]:
    fitted = index.fitted_on
    if fitted == "unknown":
        yield IndexFault("fitted on unknown rows", "it does not say what its rotation or quantizer was fitted on")
    elif fitted == rows_digest(inputs.queries):
        yield IndexFault(
            "fitted on the query set",
            f"its rotation or quantizer was fitted on the {len(inputs.queries):,} queries that judge it "
            f"(SHA-256 {fitted[:12]}...); no figure shows it",
        )


def _sizes(index: SearchIndex, inputs: IndexInputs, probes: _Probes) -> Iterator[IndexFault]:
    """Rows that are missing, or too many."""
    expected, has = int(inputs.live.sum()), len(index)
    if has > len(inputs.vectors):
        yield IndexFault("rows twice", f"it has {has:,} rows for {expected:,} vectors: a chunk was added twice")
        return
    missing = ~probes.found
    if has < expected and missing.any() and not missing[probes.rows < has].mean() > 1 - MOST:
        late = probes.rows >= has
        if missing[late].mean() >= MOST:
            evidence = f"it has the first {has:,} of {expected:,} rows and finds none of the others"
            yield IndexFault("built before an append", f"{evidence}: build it again")
            return
    cameras = inputs.camids[probes.rows]
    for camera in np.unique(cameras).tolist():
        of_camera = cameras == camera
        if missing[of_camera].mean() >= MOST and missing[~of_camera].mean() < 0.5:
            rows = int((inputs.camids[inputs.live] == camera).sum())
            yield IndexFault("rows of a camera missing", f"none of the {rows:,} rows of camera {camera} is found")
            return
    if has < expected:
        yield IndexFault("rows missing", f"it has {has:,} rows for {expected:,} vectors")


def _identities(inputs: IndexInputs, probes: _Probes) -> Iterator[IndexFault]:
    """Rows that come back under another number."""
    first = np.where(np.isin(probes.listing.rows[:, 0], inputs.removed), -1, probes.listing.rows[:, 0])
    if (first[first >= 0] >= len(inputs.vectors)).any():
        worst = int(first.max())
        yield IndexFault("ids out of range", f"it lists row {worst:,} of {len(inputs.vectors):,}")
        return
    # what comes back in a row's place, at distance 0, is the row under another number
    near = probes.listing.distances[:, 0] <= DISTANCE_TOLERANCE * inputs.spread
    other = near & (first >= 0) & ~probes.found
    if not other.any():
        return
    offsets, counts = np.unique((first - probes.rows)[other], return_counts=True)
    offset, count = int(offsets[counts.argmax()]), int(counts.max())
    if count >= 0.5 * len(probes.rows):
        yield IndexFault(
            "shifted ids", f"{count} of {len(probes.rows)} rows come back as the row {offset:+d} places away"
        )
    else:
        row, became = int(probes.rows[other][0]), int(first[other][0])
        yield IndexFault(
            "rows swapped", f"{int(other.sum())} of {len(probes.rows)} rows come back as others: {row} as {became}"
        )


def _kept(index: SearchIndex, inputs: IndexInputs) -> Iterator[IndexFault]:
    """Rows whose vectors are not those that were given."""
    if index.quantizer == "coarse":
        return
    limit, wrong, clipped, numbers = TOLERANCES[index.quantizer] * inputs.spread, [], 0, 0
    low, high = np.full(inputs.vectors.shape[1], np.inf), np.full(inputs.vectors.shape[1], -np.inf)
    rows = np.flatnonzero(inputs.live)
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    if index.quantizer != "none":
        parts = [inputs.probes]
    for part in parts:
        stored = index.stored(part)
        if stored is None:
            return
        truth = np.asarray(inputs.vectors[part], np.float64)
        wrong.append(part[~(np.linalg.norm(stored - truth, axis=1) <= limit)])
        low, high = np.minimum(low, stored.min(0)), np.maximum(high, stored.max(0))
        if index.quantizer == "scalar":
            step = (high - low) / 255
            clipped += int(((truth > high + step) | (truth < low - step)).sum())
            numbers += truth.size
    if numbers and clipped > CLIPPED * numbers:
        yield IndexFault(
            "wrong quantizer range",
            f"{clipped / numbers:.0%} of the numbers lie outside the range of its scalar quantizer and are clipped: it "
            "was trained on other vectors",
        )
        return
    bad, checked = np.concatenate(wrong), int(sum(map(len, parts)))
    if len(bad):
        yield _other_vectors(index, inputs, bad, checked)


def _other_vectors(index: SearchIndex, inputs: IndexInputs, bad: Ints, checked: int) -> IndexFault:
    """What the rows `bad`, which hold other vectors, hold instead."""
    some = bad[evenly_spaced(len(bad), PROBES)]
    stored = index.stored(some)
    assert stored is not None
    if not (finite := np.isfinite(stored).all(1)).all():
        row = int(some[~finite][0])
        return IndexFault("NaN rows", f"{len(bad):,} of {checked:,} rows are wrong, and row {row} holds NaN or Inf")
    between = EmbeddingDistances(EmbeddingMatrix(stored), EmbeddingMatrix(np.asarray(inputs.vectors, np.float32)))
    became, halves, _ = nearest(between, 1, Blocks.within(MEMORY_LIMIT, between.shape, between.dim, 1))
    same = np.sqrt(2 * halves[:, 0] * between.factor) <= TOLERANCES[index.quantizer] * inputs.spread
    if same.mean() >= MOST:
        row, other = int(some[same][0]), int(became[:, 0][same][0])
        return IndexFault(
            "rows swapped", f"{len(bad):,} of {checked:,} rows hold the vector of another: {row} that of {other}"
        )
    first, last = int(bad[0]), int(bad[-1])
    which = f"{len(bad):,} of {checked:,} rows, from {first} to {last}, are no embeddings of this model's crops"
    fault = "stale gallery" if len(bad) == checked else "mixed galleries"
    return IndexFault(fault, f"{which}: embed them again")


def _lists(inputs: IndexInputs, answers: Answers) -> Iterator[IndexFault]:
    """Rows that a list must not have, and an order that it must have."""
    listing = answers.listing
    removed = np.isin(listing.rows, inputs.removed)
    if removed.any():
        count, row = int(removed.any(1).sum()), int(listing.rows[removed][0])
        evidence = f"{count} of {len(removed)} lists have rows that were removed, the first is row {row}"
        yield IndexFault("tombstones ignored", evidence)
    ordered = np.sort(listing.rows, axis=1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if again.any():
        row = int(ordered[:, 1:][again][0])
        yield IndexFault(
            "rows twice", f"{int(again.any(1).sum())} of {len(again)} lists have a row twice, one is row {row}"
        )
    falls = np.flatnonzero((listing.distances[:, 1:] < listing.distances[:, :-1]).any(1))
    if len(falls):
        query = int(answers.asked[falls[0]])
        evidence = f"{len(falls)} of {len(listing.rows)} lists put a row before a nearer one, as of query {query}"
        yield IndexFault("lists out of order", evidence)

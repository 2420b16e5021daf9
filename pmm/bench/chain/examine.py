"""What is wrong with an index: its rows, ids, distances, filters and provenance, held against the vectors that it was
given. What it misses because it is approximate is no fault; the gates judge that.

Each check names the fault that its figures look like, so that the reader knows where to search.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.bench.chain.indexes import SearchIndex
from pmm.bench.chain.outcomes import Listing
from pmm.data.samples import evenly_spaced
from pmm.evaluation.distances import MEMORY_LIMIT, Blocks, EmbeddingDistances, EmbeddingMatrix
from pmm.evaluation.nearest import nearest
from pmm.evaluation.parity.labels import Floats, Ints

NEAREST = 10
PROBES = 256
"""Rows, and queries, that an index is asked for."""
MOST = 0.9
"""Of the probes of a group: a graph or an inverted list may miss some, no group as a whole."""
TOLERANCES = {"none": 2e-3, "scalar": 0.1}
"""How far a row, as the index keeps it, may be from the row that it was given, relative to the rows' spread. Half
precision rounds by 5e-4; what is kept coarsely is not compared."""
DISTANCE_TOLERANCE = 1e-3
"""How far a distance may be off, relative to the norms: float32 by the formula |q|^2 + |x|^2 - 2 q x is off by up to
the root of its rounding where rows are near."""
CLIPPED = 0.01
"""Share of the numbers that a scalar quantizer may clip: a row that was added later may lie outside."""
ROWS_AT_ONCE = 4096


class IndexFault(NamedTuple):
    """A fault in a few words, and what shows it."""

    fault: str
    said: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.said}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """What an index was made of, and is asked."""

    vectors: Floats
    """[N, D]; removed rows too."""
    camids: Ints
    """[N]"""
    queries: Floats
    """[Q, D]"""
    query_camids: Ints
    """[Q]"""
    removed: Ints
    """Rows that were taken out again."""

    @cached_property
    def live(self) -> npt.NDArray[np.bool_]:
        """[N]"""
        alive = np.ones(len(self.vectors), np.bool_)
        alive[self.removed] = False
        return alive

    @cached_property
    def probes(self) -> Ints:
        """Live rows: evenly over all, and over those of each camera; the last ones too."""
        rows = np.flatnonzero(self.live)
        chosen = [rows[evenly_spaced(len(rows), PROBES)], rows[-NEAREST:]]
        for camera in np.unique(self.camids[rows]):
            of_camera = rows[self.camids[rows] == camera]
            chosen.append(of_camera[evenly_spaced(len(of_camera), NEAREST)])
        return np.unique(np.concatenate(chosen))

    @cached_property
    def asked(self) -> Ints:
        """The queries that are asked."""
        return np.asarray(evenly_spaced(len(self.queries), PROBES), np.int64)

    @cached_property
    def spread(self) -> float:
        """Typical distance of a row from the mean row: what an error is large or small against."""
        sample = np.asarray(self.vectors[self.probes], np.float64)
        return float(np.sqrt(((sample - sample.mean(0)) ** 2).sum(1).mean())) or 1.0


def rows_digest(rows: Floats) -> str:
    """SHA-256 of rows [n, D] as float32: how an index says what it was fitted on."""
    return hashlib.sha256(np.ascontiguousarray(rows, np.float32).tobytes()).hexdigest()


def examine(index: SearchIndex, given: Given) -> tuple[IndexFault, ...]:
    """All that is wrong with `index`; what hides everything else comes first, and alone."""
    if found := tuple(_provenance(index, given)):
        return found
    probes = _Probes(index, given)
    listing = index.search(np.asarray(given.queries[given.asked], np.float32), min(NEAREST, len(index)))
    in_range = bool((listing.rows < len(given.vectors)).all())
    if in_range and (found := tuple(_distances(index, given, listing, known=True))):
        return found
    if found := (*_sizes(index, given, probes), *_identities(given, probes)):
        return found
    if found := (*_kept(index, given), *_lists(given, listing)):
        return found
    if found := tuple(_distances(index, given, listing, known=False)):
        return found
    return (*_certificate(index, given, listing), *_filter(index, given))


class _Probes:
    """What an index answers to its own rows."""

    def __init__(self, index: SearchIndex, given: Given) -> None:
        self.rows = given.probes
        self.vectors = np.asarray(given.vectors[self.rows], np.float32)
        self.listing = index.search(self.vectors, min(NEAREST, max(1, len(index))))
        self.found = (self.listing.rows == self.rows[:, None]).any(1)
        first = self.listing.rows[:, 0]
        known = (first >= 0) & (first < len(given.vectors))
        equal = np.zeros(len(first), np.bool_)
        equal[known] = (given.vectors[first[known]] == given.vectors[self.rows[known]]).all(1)
        self.found |= equal & (index.quantizer == "none")  # one of many that are equal


def _provenance(index: SearchIndex, given: Given) -> Iterator[IndexFault]:
    fitted = index.fitted_on
    if fitted == "unknown":
        yield IndexFault("fitted on unknown rows", "it does not say what its rotation or quantizer was fitted on")
    elif fitted == rows_digest(given.queries):
        yield IndexFault(
            "fitted on the query set",
            f"its rotation or quantizer was fitted on the {len(given.queries):,} queries that judge it "
            f"(SHA-256 {fitted[:12]}...); no figure shows it",
        )


def _sizes(index: SearchIndex, given: Given, probes: _Probes) -> Iterator[IndexFault]:
    """Rows that are missing, or too many."""
    expected, has = int(given.live.sum()), len(index)
    if has > len(given.vectors):
        yield IndexFault("rows twice", f"it has {has:,} rows for {expected:,} vectors: a chunk was added twice")
        return
    missing = ~probes.found
    if has < expected and missing.any() and not missing[probes.rows < has].mean() > 1 - MOST:
        late = probes.rows >= has
        if missing[late].mean() >= MOST:
            said = f"it has the first {has:,} of {expected:,} rows and finds none of the others"
            yield IndexFault("built before an append", f"{said}: build it again")
            return
    cameras = given.camids[probes.rows]
    for camera in np.unique(cameras).tolist():
        of_camera = cameras == camera
        if missing[of_camera].mean() >= MOST and missing[~of_camera].mean() < 0.5:
            rows = int((given.camids[given.live] == camera).sum())
            yield IndexFault("rows of a camera missing", f"none of the {rows:,} rows of camera {camera} is found")
            return
    if has < expected:
        yield IndexFault("rows missing", f"it has {has:,} rows for {expected:,} vectors")


def _identities(given: Given, probes: _Probes) -> Iterator[IndexFault]:
    """Rows that come back under another number."""
    first = probes.listing.rows[:, 0]
    if (first[first >= 0] >= len(given.vectors)).any():
        worst = int(first.max())
        yield IndexFault("ids out of range", f"it lists row {worst:,} of {len(given.vectors):,}")
        return
    # what comes back in a row's place, at distance 0, is the row under another number
    near = probes.listing.distances[:, 0] <= DISTANCE_TOLERANCE * given.spread
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


def _kept(index: SearchIndex, given: Given) -> Iterator[IndexFault]:
    """Rows whose vectors are not those that were given."""
    if index.quantizer == "coarse":
        return
    limit, wrong, clipped, numbers = TOLERANCES[index.quantizer] * given.spread, [], 0, 0
    low, high = np.full(given.vectors.shape[1], np.inf), np.full(given.vectors.shape[1], -np.inf)
    rows = np.flatnonzero(given.live)
    parts = [rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE)]
    if index.quantizer != "none":
        parts = [given.probes]
    for part in parts:
        stored = index.stored(part)
        if stored is None:
            return
        truth = np.asarray(given.vectors[part], np.float64)
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
        yield _other_vectors(index, given, bad, checked)


def _other_vectors(index: SearchIndex, given: Given, bad: Ints, checked: int) -> IndexFault:
    """What the rows `bad`, which hold other vectors, hold instead."""
    some = bad[evenly_spaced(len(bad), PROBES)]
    stored = index.stored(some)
    assert stored is not None
    if not (finite := np.isfinite(stored).all(1)).all():
        row = int(some[~finite][0])
        return IndexFault("NaN rows", f"{len(bad):,} of {checked:,} rows are wrong, and row {row} holds NaN or Inf")
    between = EmbeddingDistances(EmbeddingMatrix(stored), EmbeddingMatrix(np.asarray(given.vectors, np.float32)))
    became, halves, _ = nearest(between, 1, Blocks.within(MEMORY_LIMIT, between.shape, between.dim, 1))
    same = np.sqrt(2 * halves[:, 0] * between.factor) <= TOLERANCES[index.quantizer] * given.spread
    if same.mean() >= MOST:
        row, other = int(some[same][0]), int(became[:, 0][same][0])
        return IndexFault(
            "rows swapped", f"{len(bad):,} of {checked:,} rows hold the vector of another: {row} that of {other}"
        )
    first, last = int(bad[0]), int(bad[-1])
    which = f"{len(bad):,} of {checked:,} rows, from {first} to {last}, are no embeddings of this model's crops"
    fault = "stale gallery" if len(bad) == checked else "mixed galleries"
    return IndexFault(fault, f"{which}: embed them again")


def _lists(given: Given, listing: Listing) -> Iterator[IndexFault]:
    """Rows that a list must not have."""
    removed = np.isin(listing.rows, given.removed)
    if removed.any():
        count, row = int(removed.any(1).sum()), int(listing.rows[removed][0])
        said = f"{count} of {len(removed)} lists have rows that were removed, the first is row {row}"
        yield IndexFault("tombstones ignored", said)
    ordered = np.sort(listing.rows, axis=1)
    again = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if again.any():
        row = int(ordered[:, 1:][again][0])
        yield IndexFault(
            "rows twice", f"{int(again.any(1).sum())} of {len(again)} lists have a row twice, one is row {row}"
        )


def _distances(index: SearchIndex, given: Given, listing: Listing, *, known: bool) -> Iterator[IndexFault]:
    """Distances that are not those of the rows: `known`, only if it is known what they are instead."""
    query, place = np.nonzero(listing.rows >= 0)
    q = np.asarray(given.queries[given.asked[query]], np.float64)
    x = np.asarray(given.vectors[listing.rows[query, place]], np.float64)
    told, true = listing.distances[query, place], np.linalg.norm(q - x, axis=1)
    norms = np.linalg.norm(q, axis=1) + np.linalg.norm(x, axis=1)
    wrong = ~(abs(told - true) <= np.maximum(DISTANCE_TOLERANCE * norms, 1e-30))
    what = _formula(told, q, x, true)
    if wrong.mean() <= 1 - MOST or not (what if known else index.exact_distances):
        return
    lengths = np.linalg.norm(x, axis=1)
    fault, said = {
        "inner product": (
            "inner product on unnormalised vectors",
            "they are inner products of vectors that are not at norm 1 (norms range from "
            f"{lengths.min():.3g} to {lengths.max():.3g})",
        ),
        "norms": ("dropped norm column", "the squared norms of the rows are left out of them"),
        "squares": ("squared distances", "they are squares"),
        "": ("wrong distances", f"the first is {told[wrong][0]:.4g}, and {true[wrong][0]:.4g} by the vectors"),
    }[what]
    yield IndexFault(fault, f"{wrong.mean():.0%} of the distances are not those of the rows that it lists: {said}")


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


def _certificate(index: SearchIndex, given: Given, listing: Listing) -> Iterator[IndexFault]:
    """An index that promises the rows of brute force lists these, ties by row."""
    if not index.exact:
        return
    live = np.flatnonzero(given.live)
    vectors = given.vectors if len(live) == len(given.vectors) else given.vectors[live]
    between = EmbeddingDistances(EmbeddingMatrix(given.queries[given.asked]), EmbeddingMatrix(vectors))
    k = min(listing.rows.shape[1], len(live))
    items, halves, _ = nearest(between, k, Blocks.within(MEMORY_LIMIT, between.shape, between.dim, 1))
    truth, rows = live[items], listing.rows[:, :k]
    differing = np.flatnonzero((truth != rows).any(1))
    if not len(differing):
        return
    query = int(differing[0])
    place = int((truth[query] != rows[query]).argmax())
    true = np.sqrt(2 * halves * between.factor)
    told = listing.distances[:, :k]
    # exact ties only: rows in another order at the same distances
    tied = np.isclose(told[differing], true[differing], rtol=1e-9, atol=0).all()
    lists = f"{len(differing)} of {len(rows)} lists differ from brute force"
    where = f"query {int(given.asked[query])} has row {int(rows[query, place])} at place {place + 1}"
    should = f"not {int(truth[query, place])}"
    if tied:
        yield IndexFault("tie order changed", f"{lists} where rows are equally far: {where}, {should}; ties go by row")
    else:
        yield IndexFault("not exact", f"{lists}: {where}, {should}")


def _filter(index: SearchIndex, given: Given) -> Iterator[IndexFault]:
    """A search that leaves the query's own camera out lists none of its rows, and all others as it should."""
    if index.search_elsewhere is None:
        return
    queries = np.asarray(given.queries[given.asked], np.float32)
    camids = given.query_camids[given.asked]
    rows = index.search_elsewhere(queries, min(NEAREST, len(index)), camids).rows
    junk = (rows >= 0) & (given.camids[rows] == camids[:, None])
    if junk.any():
        row = int(rows[junk][0])
        said = f"{int(junk.any(1).sum())} of {len(rows)} lists have rows of the query's own camera, one is row {row}"
        yield IndexFault("filter forgets junk", said)

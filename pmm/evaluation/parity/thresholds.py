"""Verification: does a pair of crops show one identity? Error rates at thresholds of distance, and flips.

Over every query with every gallery item but junk. These pairs are far too many to keep (958 million for MSMT17), so
their distances, float32, are counted: first by the upper half of their bits, then, around each threshold, by the lower
half. So thresholds are exact, and nothing depends on how the pairs are cut into blocks (see `_on_grid`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.evaluation.distances import squared_distances
from pmm.evaluation.parity.labels import Labels, Masks, QueryGallery
from pmm.utils.arrays import Bools, Floats, Ints
from pmm.utils.errors import InvalidInput

ONE_IN = (100, 1_000, 10_000)
"""Of how many pairs of two identities one may be accepted: false match rates of 1e-2, 1e-3 and 1e-4."""
MIN_ACCEPTED = 10
"""Pairs of two identities that a threshold must be able to accept: with fewer, its true rate may well be another by a
third (1 / sqrt(10)), and a single crop sets it."""
QUERIES_AT_ONCE = 512
GALLERY_AT_ONCE = 4096
HALF = 16  # bits of a distance
LOWER = (1 << HALF) - 1
IMPOSTOR, GENUINE = 0, 1  # rows of counts: pairs of two identities, pairs of one


@dataclass(frozen=True, kw_only=True)
class Point:
    """Accept a pair as one identity where its distance is at most the threshold."""

    fmr: float
    """Share of the pairs of two identities that may be accepted."""
    threshold: float | None
    """Euclidean distance, a float32. Any that accepts one pair more accepts too many; it is halfway from the farthest
    accepted pair to the nearest other, so that rounding alone flips neither. -1: too many are at distance 0, none is
    accepted. None: fewer than 10 / fmr pairs show two identities."""
    tpr: float | None
    """Share of the pairs of one identity that are accepted."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How well distances tell pairs of one identity from pairs of two."""

    genuine: int
    """Pairs of one identity, seen by two cameras."""
    impostor: int
    """Pairs of two identities."""
    eer: float
    """Equal error rate: the mean of the two error rates where they are closest."""
    eer_threshold: float
    """The farthest distance accepted there; of two that are as good, the farther."""
    points: tuple[Point, ...]


class Flips(NamedTuple):
    """Verification flips: how many pairs the candidate decides otherwise than the reference."""

    accepted: int
    """By the candidate only."""
    rejected: int
    """By the candidate only."""


def verification(embedded: QueryGallery, labels: Labels) -> Verification:
    """Equal error rate, and the thresholds for false match rates of 1e-2, 1e-3 and 1e-4.

    Raises InvalidInput for shapes that do not fit, NaN or Inf, or without pairs of one identity or of two.
    """
    labels.check(embedded)
    upper = np.zeros((2, 1 << HALF - 1), np.int64)
    for keys in _keys(embedded, labels):
        upper += np.bincount(keys >> HALF, minlength=upper.size).reshape(upper.shape)
    impostor, genuine = upper.sum(1).tolist()
    if not impostor or not genuine:
        raise InvalidInput(
            f"verification: {genuine} pairs of one identity under two cameras, {impostor} of two identities",
            expected="some of both",
        )

    def excess(counts: Ints) -> Ints:
        """False matches minus false non-matches: the difference of the two rates, in units that make it whole."""
        return counts[IMPOSTOR] * genuine - (genuine - counts[GENUINE]) * impostor

    def too_many(most: int, counts: Ints) -> Bools:
        return counts[IMPOSTOR] > most

    allowed = [impostor // pairs for pairs in ONE_IN if impostor >= MIN_ACCEPTED * pairs]
    tests: list[_Test] = [lambda counts: excess(counts) >= 0, *(partial(too_many, most) for most in allowed)]
    equal, *crossings = _crossings(embedded, labels, upper, tests)
    after = abs(excess(equal.counts)) <= abs(excess(equal.counts_before))
    key, counts = (equal.key, equal.counts) if after else (equal.key_before, equal.counts_before)
    points = []
    for pairs, crossing in zip_longest(ONE_IN, crossings):  # those without a crossing are the last ones
        threshold = crossing and _distance((crossing.key_before + crossing.key) // 2)
        tpr = crossing and float(crossing.counts_before[GENUINE] / genuine)
        points.append(Point(fmr=1 / pairs, threshold=threshold, tpr=tpr))
    return Verification(
        genuine=genuine,
        impostor=impostor,
        eer=float(counts[IMPOSTOR] / impostor + (genuine - counts[GENUINE]) / genuine) / 2,
        eer_threshold=_distance(key),
        points=tuple(points),
    )


def decision_flips(
    reference: QueryGallery, candidate: QueryGallery, labels: Labels, thresholds: Sequence[float | None]
) -> tuple[Flips | None, ...]:
    """At each of `thresholds`, pairs that only the candidate accepts and pairs that only it rejects; None at None.

    Thresholds are the reference's, as `verification` gives them: both decide at the same one.
    """
    for name, embedded in (("reference", reference), ("candidate", candidate)):
        labels.check(embedded, name)
    flips = np.zeros((len(thresholds), 2), np.int64)
    for masks, (before, after) in _blocks(labels, reference, candidate):
        for counts, threshold in zip(flips, thresholds, strict=True):
            if threshold is not None:
                accepted = after <= threshold
                flipped = (accepted != (before <= threshold)) & ~masks.junk
                counts += np.count_nonzero(flipped & accepted), np.count_nonzero(flipped & ~accepted)
    return tuple(
        None if threshold is None else Flips(*counts)
        for threshold, counts in zip(thresholds, flips.tolist(), strict=True)
    )


_Test = Callable[[Ints], Bools]
"""Of how many pairs of each kind are accepted [2, N]: False [N] up to some distance, True from there on."""


class _Crossing(NamedTuple):
    """The least distance of any pair that is too far to be accepted: where a test turns true."""

    key: int
    counts: Ints
    """Impostor and genuine pairs up to it [2]."""
    key_before: int
    """Of the greatest distance below; -1 if there is none."""
    counts_before: Ints
    """Pairs up to that one [2]."""


def _crossings(embedded: QueryGallery, labels: Labels, upper: Ints, tests: Sequence[_Test]) -> list[_Crossing]:
    """Where each test turns true. `upper` counts pairs by the upper half of their keys [2, 2^15]."""
    filled = np.flatnonzero(upper.any(0))
    # per test: the bin in which it turns true, and the filled one below, which may hold the distance before
    windows = [filled[filled <= test(upper.cumsum(1)).argmax()][-2:].tolist() for test in tests]
    lower = {place: np.zeros((2, 1 << HALF), np.int64) for window in windows for place in window}
    for keys in _keys(embedded, labels):
        places = keys >> HALF & LOWER >> 1
        for place, bins in lower.items():
            inside = keys[places == place]
            bins += np.bincount(inside >> 31 << HALF | inside & LOWER, minlength=bins.size).reshape(bins.shape)
    crossings = []
    for window, test in zip(windows, tests, strict=True):
        bins = np.hstack([lower[place] for place in window])
        filled_bins = np.flatnonzero(bins.any(0))
        keys = np.r_[-1, np.array(window)[filled_bins >> HALF] << HALF | filled_bins & LOWER].tolist()
        below = upper[:, : window[0]].sum(1, keepdims=True)
        counts = np.hstack([below, bins[:, filled_bins]]).cumsum(1)
        i = int(test(counts).argmax())  # at least 1: no test holds where the window begins
        crossings.append(_Crossing(keys[i], counts[:, i], keys[i - 1], counts[:, i - 1]))
    return crossings


def _keys(embedded: QueryGallery, labels: Labels) -> Iterator[npt.NDArray[np.uint32]]:
    """Bits of the distances of a block's pairs [N], which sort as the distances do; the sign bit is set for pairs of
    one identity."""
    for masks, (distances,) in _blocks(labels, embedded):
        kind = masks.relevant.astype(np.uint32) << np.uint32(31)
        yield (distances.view(np.uint32) | kind)[~masks.junk]


def _distance(key: int) -> float:
    """What the bits `key` stand for."""
    return float(np.uint32(key).view(np.float32)) if key >= 0 else -1.0


def _blocks(labels: Labels, *sides: QueryGallery) -> Iterator[tuple[Masks, list[npt.NDArray[np.float32]]]]:
    """Block by block, which pairs count, and their distances by each side's embeddings [q, g]."""
    for first in range(0, len(labels.gallery_pids), GALLERY_AT_ONCE):
        columns = slice(first, first + GALLERY_AT_ONCE)
        galleries = [_on_grid(side.gallery[columns]) for side in sides]
        for start in range(0, len(labels.query_pids), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            distances = []
            for side, gallery in zip(sides, galleries, strict=True):
                squares = squared_distances(_on_grid(side.query[rows]), gallery)
                distances.append(np.sqrt(squares.clip(min=0)).astype(np.float32))
            yield labels.masks(rows, columns), distances


def _on_grid(rows: Floats) -> npt.NDArray[np.float64]:
    """Each of `rows` [N, D] rounded to a grid so fine, and so coarse, that products of two rows sum up without error.

    The sum of D products of numbers of b binary digits has 2 b + log2(D) digits, and float64 holds 53. So a pair's
    distance depends on its two rows alone, not on their place in a block nor on how BLAS sums, and equal rows are at
    distance 0. For D = 2048, b is 21: a number moves by at most 2^-21 of the row's largest, far less than two fp32
    backends differ by.
    """
    rows = np.asarray(rows, np.float64)
    digits = (53 - (rows.shape[1] - 1).bit_length()) // 2
    _, exponents = np.frexp(np.abs(rows).max(1, keepdims=True))
    units = np.ldexp(1.0, exponents - digits)
    return np.rint(rows / units) * units

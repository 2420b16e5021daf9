"""A threshold without identity labels: people whom one camera sees at one time are different people. Loads no torch.

Their pairs tell the false match rate (FMR) of a distance: the share of pairs of different people that it takes for one.
How sure that is does not depend on how many pairs there are: whoever resembles others does so in all pairs, and people
who come together may be dressed alike. So stretches of time are counted, so far apart that no person is in two of them.
Of each, the share of its pairs that a distance accepts is one independent number from 0 to 1, and the bound on their
mean assumes nothing else: who bets fairly that each share is below the target wins 1 / (1 - confidence) times the stake
with a probability of at most 1 - confidence, if the mean is not (Waudby-Smith and Ramdas, Journal of the Royal
Statistical Society B 86, 2024; here with stakes that are fixed beforehand). The farther the distance, the larger the
shares and the less is won, so the farthest that wins is as sure as one that was chosen beforehand.

It takes some 3.3 / FMR stretches for 95 %. No method that assumes nothing can do with fewer than 3 / FMR: if one
stretch in 1 / FMR shows a crowd in uniform, fewer most likely show none. bench/lab/camera_threshold.py tries it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.utils.arrays import Doubles, Ints
from pmm.utils.errors import InvalidInput, InvalidValue

WINDOW = 0.25
"""Share of a stretch whose crops are used; after it, one stretch of time passes unused, so that people leave."""
STAKES = np.array([1.0, 0.5, 0.25, 0.125])
"""Of what is at most at stake on each stretch. High ones win soon where few pairs are accepted, low ones outlive
stretches in which all are."""
SHARES = np.array([0.7, 0.1, 0.1, 0.1])
"""Of the money that is bet so."""
PAIRS_PER_STRETCH = 2_000
"""If a stretch has more pairs, so many are drawn at random: their expected share is the same."""


class SeenAtOnce(NamedTuple):
    """Pairs of crops that one camera saw at one time."""

    first: Ints
    """Rows [P]."""
    second: Ints
    """Rows [P]."""
    stretch: Ints
    """Number of the stretch of time that the pair is from [P], 0 to stretches - 1; each has a pair."""
    stretches: int


@dataclass(frozen=True, kw_only=True)
class CameraThreshold:
    """The farthest distance whose false match rate is at most the target, at this confidence."""

    fmr: float
    """The target."""
    confidence: float
    stretches: int
    pairs: int
    """Of crops."""
    distance: float | None
    """None: too few stretches to tell."""
    estimate: float
    """False match rate at this distance, each stretch counting alike; at distance 0 where there is no threshold."""
    upper: float
    """Upper confidence bound of the false match rate, likewise."""
    stretches_needed: int | None
    """How many would do. None: no number does, because too many pairs are at distance 0."""


def pairs_seen_at_once(
    camera: npt.NDArray[Any],
    time: npt.ArrayLike,
    *,
    stretch: float,
    same_time: float = 0.0,
    person: npt.NDArray[Any] | None = None,
) -> SeenAtOnce:
    """Pairs of crops of different people, from stretches of time that share no person.

    Args:
        camera: of each crop [N].
        time: in seconds [N].
        stretch: seconds. No person is seen over a longer time, from the first to the last crop, whatever the camera.
        same_time: crops of one camera whose times differ by no more are seen at once.
        person: who or which track each crop shows [N], if that is known. Pairs of one person are left out, and who is
            seen over a longer time than `stretch` counts in one stretch alone. If not known, a person who is seen twice
            within `same_time` counts as two that look alike: on the safe side.

    Raises InvalidInput for columns that do not fit and times that are NaN or Inf, InvalidValue for a time that cannot
    be.
    """
    cameras = np.unique(np.asarray(camera), return_inverse=True)[1]
    times = np.asarray(time, np.float64)
    if times.shape != cameras.shape or (person is not None and np.shape(person) != cameras.shape):
        raise InvalidInput(f"cameras {list(cameras.shape)}, times {list(times.shape)}", expected="[N] of each")
    if not np.isfinite(times).all():
        bad = np.flatnonzero(~np.isfinite(times))
        raise InvalidInput(
            f"{len(bad)} of {len(times)} crops have no time, the first is row {bad[0]}", index=int(bad[0])
        )
    if not (stretch > 0 and math.isfinite(stretch)):
        raise InvalidValue("stretch", stretch, "more than 0 seconds")
    if not 0 <= same_time <= WINDOW * stretch:
        raise InvalidValue("same_time", same_time, f"0 seconds to {WINDOW:g} of a stretch")
    of_crop = _stretches(times, stretch)
    people = None if person is None else np.unique(np.asarray(person), return_inverse=True)[1]
    if people is not None and people.size:
        counted = np.full(people.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(counted, people[of_crop >= 0], of_crop[of_crop >= 0])
        of_crop = np.where(of_crop == counted[people], of_crop, -1)
    rows = np.flatnonzero(of_crop >= 0)
    rows = rows[np.lexsort((times[rows], cameras[rows], of_crop[rows]))]
    first, second = _near(of_crop[rows], cameras[rows], times[rows], same_time)
    first, second = rows[first], rows[second]
    if people is not None:
        different = people[first] != people[second]
        first, second = first[different], second[different]
    known, stretches = np.unique(of_crop[first], return_inverse=True)
    return SeenAtOnce(first, second, stretches, len(known))


def _stretches(times: Doubles, stretch: float) -> Ints:
    """Which one each crop is of; -1 where people who were seen before may still be there."""
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    found = np.full(len(times), -1, np.int64)
    begin, number = 0, 0
    while begin < len(ordered):
        last = ordered[begin] + WINDOW * stretch
        end = int(np.searchsorted(ordered, last, "right"))
        found[order[begin:end]] = number
        begin, number = int(np.searchsorted(ordered, last + stretch, "right")), number + 1
    return found


def _near(stretch: Ints, camera: Ints, time: Doubles, same_time: float) -> tuple[Ints, Ints]:
    """Pairs of indices into these sorted arrays; if a stretch has very many, a random sample of them."""
    if not len(time):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    start = np.flatnonzero(np.r_[True, (np.diff(stretch) != 0) | (np.diff(camera) != 0)])
    last = np.empty(len(time), np.int64)  # the last that is seen at once with each
    for begin, end in zip(start, [*start[1:], len(time)], strict=True):
        some = time[begin:end]
        last[begin:end] = begin + np.searchsorted(some, some + same_time, "right") - 1
    before = np.r_[0, np.cumsum(last - np.arange(len(time)))]  # pairs are numbered by their first
    edges = np.flatnonzero(np.r_[True, np.diff(stretch) != 0, True])
    sizes = np.diff(before[edges])
    taken = np.minimum(sizes, PAIRS_PER_STRETCH)
    pair = np.arange(taken.sum()) - (np.cumsum(taken) - taken).repeat(taken)
    many = (sizes > taken).repeat(taken)
    pair[many] = np.random.default_rng(0).integers(0, sizes.repeat(taken)[many])
    pair += before[edges[:-1]].repeat(taken)
    first = np.searchsorted(before, pair, "right") - 1
    return first, first + 1 + pair - before[first]


def camera_threshold(
    distances: npt.ArrayLike, pairs: SeenAtOnce, fmr: float, *, confidence: float = 0.95
) -> CameraThreshold:
    """The threshold for a false match rate, from the distances [P] of `pairs`.

    Raises InvalidValue for an `fmr` that is no share or a `confidence` that is none above a half, InvalidInput without
    pairs.
    """
    if not 0 < fmr < 1:
        raise InvalidValue("fmr", fmr, "more than 0 and less than 1")
    if not 0.5 < confidence < 1:
        raise InvalidValue("confidence", confidence, "more than 0.5 and less than 1")
    if not pairs.stretches:
        raise InvalidInput("no two people are seen at once", expected="crops that one camera saw at one time")
    values = np.asarray(distances, np.float64)
    order = np.argsort(values, kind="stable")
    ordered, stretch = values[order], pairs.stretch[order]
    sizes = np.bincount(stretch, minlength=pairs.stretches)
    ends = np.r_[0, np.flatnonzero(np.diff(ordered, append=np.inf)) + 1]  # of several at one distance, all or none
    wanted = -math.log1p(-confidence)

    def accepted(place: int) -> Doubles:
        return np.bincount(stretch[: ends[place]], minlength=pairs.stretches) / sizes

    found = bisect_left(range(len(ends)), True, key=lambda place: _won(accepted(place), fmr) < wanted) - 1
    distance = _between(ordered, int(ends[found])) if found >= 0 else None
    at_zero = int(np.searchsorted(ends, np.searchsorted(ordered, 0.0, "right")))
    shares = accepted(at_zero if distance is None else found)
    return CameraThreshold(
        fmr=fmr, confidence=confidence, stretches=pairs.stretches, pairs=len(values), distance=distance,
        estimate=float(shares.mean()), upper=_upper(shares, wanted),
        stretches_needed=_needed(accepted(at_zero), fmr, wanted),
    )  # fmt: skip


def _between(ordered: Doubles, end: int) -> float | None:
    """A distance that accepts the pairs before `end` and no others; None if those from `end` on are at 0."""
    if end == len(ordered):
        return float(ordered[-1])
    following = float(ordered[end])
    if end == 0:
        return math.nextafter(following, 0.0) if following > 0 else None
    middle = float(ordered[end - 1]) + (following - float(ordered[end - 1])) / 2
    return middle if middle < following else float(ordered[end - 1])


def _growth(shares: Doubles, mean: float) -> Doubles:
    """Logarithm of what each stake wins on each stretch [4, stretches] if it is bet that shares are below `mean`."""
    with np.errstate(divide="ignore"):
        return np.log1p(STAKES[:, None] * (mean - shares) / (1 - mean))


def _won(shares: Doubles, mean: float) -> float:
    """Logarithm of what all stakes win."""
    return float(np.logaddexp.reduce(np.log(SHARES) + _growth(shares, mean).sum(axis=1)))


def _upper(shares: Doubles, wanted: float) -> float:
    """The largest mean against which less is won."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _won(shares, middle) < wanted else (low, middle)
    return high


def _needed(shares: Doubles, fmr: float, wanted: float) -> int | None:
    """How many stretches like these would be enough; None if no number is."""
    growth = _growth(shares, fmr).mean(axis=1)
    enough = (wanted - np.log(SHARES))[growth > 0] / growth[growth > 0]
    return math.ceil(enough.min()) if enough.size else None

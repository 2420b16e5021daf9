"""A threshold without identity labels: people whom one camera sees at one time are different people. Loads no torch.

Their pairs tell the false match rate (FMR) of a distance: the share of pairs of different people that it takes for one.
How sure that is depends on how many people there are, not on how many pairs: whoever resembles others does so in all
pairs. So people are the unit. Of those alone whom one camera saw together, a pair of people counts once, however many
crops show it; the variance of the rate allows for two pairs that share a person (dyadic cluster-robust: Aronow, Samii
and Assenova, Political Analysis 23, 2015). It says how many independent pairs would be as sure, and the upper bound is
Clopper and Pearson's for so many (Korn and Graubard, Survey Methodology 24, 1998), with Student's t for as many people
as the variance comes from, and with one more person who resembles as many as the worst of those seen. No distribution
of distances is assumed. The bound is followed from near pairs on up to the first distance where it is above the target,
so that looking at many distances costs no confidence (Bauer, Statistics in Medicine 10, 1991). bench/lab/
camera_threshold.py says how well it holds.

For any population whatever it cannot: people who resemble everybody, if one in 1 / FMR does, are hardly among fewer
people than that. `guaranteed` asks for a bound that holds even so: Hoeffding's (JASA 58, 1963, theorem 1) for pairs
that share people, of which sets without a common person are as many as one person has pairs and one more (Janson,
Random Structures and Algorithms 24, 2004; Vizing). It takes some 3 / FMR people and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.utils.errors import InvalidInput, InvalidValue

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

START = 0.2
"""Share of the target that the nearest pairs must reach before a bound is computed: of very few it says little."""
MAX_CANDIDATES = 200
"""Distances for which a bound is computed."""


class SeenAtOnce(NamedTuple):
    """Pairs of crops that one camera saw at one time."""

    first: Ints
    """Rows [P]."""
    second: Ints
    """Rows [P]."""
    weight: Doubles
    """Of each pair [P]: those of one pair of people, or of one camera and one stretch of time, share what it weighs."""
    group: Ints
    """Which pair of people, or camera and stretch of time [P]."""
    one: Ints
    """The unit that the pair belongs to [P]: a person, or a stretch of time."""
    other: Ints
    """The other person [P]; the same stretch of time."""
    people: int
    """In these pairs, at least."""


@dataclass(frozen=True, kw_only=True)
class CameraThreshold:
    """The farthest distance whose false match rate is at most the target, at this confidence."""

    fmr: float
    """The target."""
    confidence: float
    guaranteed: bool
    """The bound holds for any population whatever."""
    people: int
    people_pairs: int
    """Pairs of people, as many as they count for."""
    distance: float | None
    """None: too few people to tell."""
    estimate: float
    """False match rate among the pairs; of the nearest pair's distance where there is no threshold."""
    upper: float
    """Upper confidence bound of the false match rate, likewise."""
    people_needed: int
    """About so many people would do, meeting as many others each."""


def pairs_seen_at_once(
    camera: npt.NDArray[Any],
    time: npt.ArrayLike,
    *,
    same_time: float = 0.0,
    person: npt.NDArray[Any] | None = None,
    stretch: float = 600.0,
) -> SeenAtOnce:
    """Pairs of crops of different people.

    Args:
        camera: of each crop [N].
        time: in seconds [N].
        same_time: crops of one camera whose times differ by no more are seen at once.
        person: who or which track each crop shows [N], if that is known: pairs of one person are left out. If not, a
            person who is seen twice within `same_time` counts as two that look alike: on the safe side.
        stretch: seconds. Where people are not known, one may be seen again and again for so long, and by all cameras;
            so a stretch of time is the unit, and counts for as many people as its fullest moment shows.

    Raises InvalidInput for columns that do not fit and times that are NaN or Inf, InvalidValue for a negative time.
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
    if not same_time >= 0:
        raise InvalidValue("same_time", same_time, "0 seconds or more")
    if not stretch > 0:
        raise InvalidValue("stretch", stretch, "more than 0 seconds")
    order = np.lexsort((times, cameras))
    near: list[tuple[Ints, Ints]] = []
    begin = np.arange(len(order) - 1)
    step = 1
    while len(begin):
        begin = begin[begin + step < len(order)]
        first, second = order[begin], order[begin + step]
        at_once = (cameras[first] == cameras[second]) & (times[second] - times[first] <= same_time)
        begin, step = begin[at_once], step + 1
        near.append((first[at_once], second[at_once]))
    first, second = (np.concatenate([each[i] for each in near] or [np.empty(0, np.int64)]) for i in (0, 1))
    if person is not None:
        return _by_person(first, second, np.unique(np.asarray(person), return_inverse=True)[1])
    return _by_stretch(first, second, cameras, np.floor((times - times.min(initial=np.inf)) / stretch).astype(np.int64))


def _by_person(first: Ints, second: Ints, person: Ints) -> SeenAtOnce:
    different = person[first] != person[second]
    first, second = first[different], second[different]
    ends = np.sort(np.stack([person[first], person[second]]), axis=0)
    group, sizes = np.unique(ends[0] * (person.max(initial=0) + 1) + ends[1], return_inverse=True, return_counts=True)[
        1:
    ]
    return SeenAtOnce(first, second, 1 / sizes[group], group, ends[0], ends[1], len(np.unique(ends)))


def _by_stretch(first: Ints, second: Ints, camera: Ints, stretch: Ints) -> SeenAtOnce:
    unit = stretch[first]
    group, sizes = np.unique(
        unit * (camera.max(initial=0) + 1) + camera[first], return_inverse=True, return_counts=True
    )[1:]
    # others that the first of its moment is seen with, and itself: the fullest moment has no fewer people
    crops, with_others = np.unique(first, return_counts=True)
    most = np.zeros(len(sizes), np.int64)
    group_of_crop = np.empty(stretch.size, np.int64)
    group_of_crop[first] = group
    np.maximum.at(most, group_of_crop[crops], with_others + 1)
    unit_of_group = np.empty(len(sizes), np.int64)
    unit_of_group[group] = unit
    fullest: dict[int, int] = {}
    for number, count in zip(unit_of_group.tolist(), most.tolist(), strict=True):
        fullest[number] = max(fullest.get(number, 0), count)
    weight = (most * (most - 1) / 2 / sizes)[group]
    return SeenAtOnce(first, second, weight, group, unit, unit, sum(fullest.values()))


def camera_threshold(
    distances: npt.ArrayLike, pairs: SeenAtOnce, fmr: float, *, confidence: float = 0.95, guaranteed: bool = False
) -> CameraThreshold:
    """The threshold for a false match rate, from the distances [P] of `pairs`.

    Raises InvalidValue for an `fmr` or a `confidence` that is no share, InvalidInput without any pair or with one unit.
    """
    for name, share in (("fmr", fmr), ("confidence", confidence)):
        if not 0 < share < 1:
            raise InvalidValue(name, share, "more than 0 and less than 1")
    values = np.asarray(distances, np.float64)
    units, ends = np.unique(np.concatenate([pairs.one, pairs.other]), return_inverse=True)
    if len(units) < 2:
        raise InvalidInput(
            f"{len(pairs.first)} pairs of crops that one camera saw at once, of {pairs.people} people",
            expected="people whom a camera sees together, again and again",
        )
    one, other = ends[: len(values)], ends[len(values) :]
    bound = _Bound(pairs.weight, pairs.group, one, other, len(units), confidence, guaranteed)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    last = np.flatnonzero(np.diff(ordered, append=np.inf))  # of several at one distance, all are taken or none
    shares = pairs.weight[order].cumsum()[last] / bound.total
    last = last[: max(1, int(np.searchsorted(shares, fmr, "right")))]
    start = min(int(np.searchsorted(shares[: len(last)], fmr * START)), len(last) - 1)
    last = last[start:]
    if len(last) > MAX_CANDIDATES:
        last = last[np.linspace(0, len(last) - 1, MAX_CANDIDATES).astype(np.int64)]
    found = -1
    estimate, upper = bound.at(order[: last[0] + 1])
    lowest = upper
    for place in last.tolist():
        rate, above = bound.at(order[: place + 1])
        if above > fmr:
            break
        found, estimate, upper = place, rate, above
    distance = None
    if found >= 0:
        following = ordered[found + 1] if found + 1 < len(ordered) else ordered[found]
        distance = float((ordered[found] + following) / 2)
    return CameraThreshold(
        fmr=fmr, confidence=confidence, guaranteed=guaranteed, people=pairs.people, people_pairs=round(bound.total),
        distance=distance, estimate=estimate, upper=upper,
        people_needed=pairs.people if found >= 0 else _about(pairs.people * lowest / fmr),
    )  # fmt: skip


class _Bound:
    """Upper confidence bound of the share of pairs that a distance accepts."""

    def __init__(
        self, weight: Doubles, group: Ints, one: Ints, other: Ints, units: int, confidence: float, guaranteed: bool
    ) -> None:
        self._weight, self._group, self._one, self._other = weight, group, one, other
        self._units, self._confidence, self._guaranteed = units, confidence, guaranteed
        self._dyads = bool((one != other).any())
        self.total = float(weight.sum())
        self._of_group = np.bincount(group, weight)
        self._of_unit = self._by_unit(np.arange(len(weight)))

    def at(self, accepted: Ints) -> tuple[float, float]:
        """The share that the `accepted` pairs are, and its bound."""
        weight = self._weight[accepted]
        rate = min(1.0, float(weight.sum()) / self.total)
        return rate, self._anyhow(rate) if self._guaranteed else self._as_sure_as_independent(rate, accepted)

    def _as_sure_as_independent(self, rate: float, accepted: Ints) -> float:
        from scipy.special import betaincinv, ndtri, stdtrit

        accepted_by_unit = self._by_unit(accepted)
        squares = ((accepted_by_unit - rate * self._of_unit) / self.total) ** 2
        variance = squares.sum()
        if self._dyads:  # a pair is in the sums of both its people
            by_group = np.bincount(self._group[accepted], self._weight[accepted], minlength=len(self._of_group))
            own = (by_group - rate * self._of_group) / self.total
            variance -= own @ own
        variance *= self._units / (self._units - 1)
        # as if of so many people as the variance comes from
        freedom = max(1.0, squares.sum() ** 2 / (squares**2).sum() - 1) if squares.any() else self._units - 1
        few = (ndtri(self._confidence) / stdtrit(freedom, self._confidence)) ** 2
        independent = few * (self.total if variance <= 0 else min(self.total, rate * (1 - rate) / variance))
        hits = independent * min(1.0, rate + accepted_by_unit.max() / self.total)
        return float(betaincinv(hits + 1, max(independent - hits, 1e-9), self._confidence))

    def _anyhow(self, rate: float) -> float:
        """The largest share for which relative entropy leaves `rate` as likely as 1 - confidence."""
        count = self.total / (self._of_unit.max() + 1 if self._dyads else self._of_unit.max())
        low, high = rate, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            divergence = (1 - rate) * math.log((1 - rate) / (1 - middle)) if middle < 1 and rate < 1 else math.inf
            divergence += rate * math.log(rate / middle) if rate else 0.0
            low, high = (low, middle) if count * divergence > -math.log(1 - self._confidence) else (middle, high)
        return high

    def _by_unit(self, pairs: Ints) -> Doubles:
        ends = (self._one, self._other) if self._dyads else (self._one,)
        sums = np.zeros(self._units)
        for end in ends:
            sums += np.bincount(end[pairs], self._weight[pairs], minlength=self._units)
        return sums


def _about(count: float) -> int:
    """Rounded up to two digits: it is an estimate."""
    unit = 10 ** max(0, int(math.log10(max(count, 1))) - 1)
    return math.ceil(count / unit) * unit

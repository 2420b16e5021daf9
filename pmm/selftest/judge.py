"""What a client's embeddings of the selftest's crops say: right, or which mistake. Pure numpy.

Nothing is guessed: the embeddings of each mistake are in the selftest, and are compared as the right ones are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.selftest.vectors import Selftest, Tolerance

Rows = npt.NDArray[np.float64]
"""[N, D]."""
Explanation = tuple[tuple[str, ...], tuple[str, ...], bool]
"""Mistakes that were made together, others than the first that would look the same, whether they are met exactly."""
MAX_ORDERED = 6
"""Rows that are tried in every order."""
UNIT = 1e-3
"""By which the norms of rows may differ from 1, to count as normalised."""
NEARER, NEXT = 0.35, 0.6
"""A mistake that is not met exactly is likely if the embeddings are so much nearer to its own than to the right ones,
and than to those of any other (as ratios of distances)."""

NORMS = {
    "l2_missing": (
        "the embeddings have not norm 1",
        "divide each by its norm, or take the output of the file as it is",
    ),
    "l2_added": ("the embeddings were given norm 1", "take the output of the file as it is: its norm counts"),
    "norms": ("the norms are others, the directions right", "take the output of the file as it is, unscaled"),
}
"""Of embeddings that are right but for their norms: what was done, and what to do."""
OTHERS = {
    "rows": ("the rows are in another order", "write one row for each crop, in the order of their names"),
    "repeated": ("all rows are the same", "give each crop to the file: is a buffer used again before it was read?"),
    "other_resize": ("another resize, none that is known here", ""),
}


@dataclass(frozen=True, kw_only=True)
class SelftestVerdict:
    """Of one client's embeddings."""

    passed: bool
    mistakes: tuple[str, ...] = ()
    """What was done wrong, all of it together; nothing if that is unknown."""
    or_one_of: tuple[str, ...] = ()
    """Mistakes that cannot be told from the first of `mistakes` at this precision."""
    exact: bool = True
    """Whether the embeddings are those of the mistake; else they are only much nearer to them than to any others."""
    undecidable: tuple[str, ...] = ()
    """Mistakes that cannot be seen at this precision: their embeddings are as good as the right ones."""
    precision: str
    min_cosine: float
    """Of the worst row with the expected one."""
    max_norm_error: float
    tolerance: Tolerance
    advice: tuple[str, ...] = ()
    """What was done and what to do, a line for each of `mistakes`."""


def judge(selftest: Selftest, embeddings: npt.NDArray[Any], precision: str = "") -> SelftestVerdict:
    """Judge a client's `embeddings` [N, D] of the crops, finite numbers in their order, computed in `precision`
    (default: that of the artifact)."""
    vectors, precision = selftest.vectors, precision or selftest.precision
    tolerance, given = selftest.tolerances[precision], np.asarray(embeddings, np.float64)
    comparison = _Comparison(
        given=given,
        expected=vectors.expected.astype(np.float64),
        own=vectors.own.astype(np.float64),
        wrong={each.name: vectors.wrong(each.name).astype(np.float64) for each in vectors.mistakes},
        sized=vectors.sized,
        resizes={each.name for each in vectors.mistakes if each.resizes},
        normalised=vectors.normalised,
        tolerance=tolerance,
    )
    mistakes, others, exact = comparison.explain()
    known = {each.name: (each.description, each.fix) for each in vectors.mistakes} | NORMS | OTHERS
    resize = next((each.fix for each in vectors.mistakes if each.resizes), "")
    return SelftestVerdict(
        passed=mistakes == () and exact,
        mistakes=mistakes,
        or_one_of=others,
        exact=exact,
        undecidable=comparison.undecidable(),
        precision=precision,
        min_cosine=float(cosines(given, comparison.expected).min()),
        max_norm_error=float(norm_errors(given, comparison.expected).max()),
        tolerance=tolerance,
        advice=tuple("; ".join(filter(None, (known[name][0], known[name][1] or resize))) for name in mistakes),
    )


def cosines(left: Rows, right: Rows) -> Rows:
    """Row by row [N]; 0 for a row of zeros."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(1) / np.where(norms > 0, norms, 1)


def norm_errors(given: Rows, expected: Rows) -> Rows:
    """Row by row [N], relative to the expected norm."""
    norms = np.linalg.norm(expected, axis=1)
    return np.abs(np.linalg.norm(given, axis=1) - norms) / np.where(norms > 0, norms, 1)


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    given: Rows
    expected: Rows
    own: Rows
    """What the right embeddings are by whatever computed the wrong ones."""
    wrong: dict[str, Rows]
    sized: list[int]
    resizes: set[str]
    normalised: bool
    tolerance: Tolerance

    def explain(self) -> Explanation:
        """`SelftestVerdict.mistakes`, `or_one_of` and `exact`."""
        names = sorted(self.wrong, key=self._distance_of)
        right = min(self._distance(self.expected), self._distance(self.own))
        if self._same(self.expected) and not (names and self._distance_of(names[0]) < NEARER * right):
            return (self._of_norms, (), True) if self._of_norms else ((), (), True)
        if same := [name for name in names if self._same(self.wrong[name])]:
            return self._named(same, (), exact=True)
        if self._agree(self.given, self.expected):
            return ("norms",), (), True
        if self._in_another_order():
            return ("rows",), (), True
        if len(self.given) > 1 and (cosines(self.given, self.given[:1]) > 1 - 1e-9).all():
            return ("repeated",), (), True
        return self._of_two(names) or self._nearest(names)

    def undecidable(self) -> tuple[str, ...]:
        """`SelftestVerdict.undecidable`."""
        near = self.tolerance.max_norm_error
        return tuple(
            name
            for name, wrong in self.wrong.items()
            if self._agree(wrong, self.expected) and norm_errors(wrong, self.expected).max() <= near
        )

    @property
    def _of_norms(self) -> tuple[str, ...]:
        """What was done to the norms of all rows, whatever their directions are."""
        unit = bool((np.abs(np.linalg.norm(self.given, axis=1) - 1) <= UNIT).all())
        near = norm_errors(self.given, self.expected).max() <= self.tolerance.max_norm_error
        return () if near or unit == self.normalised else ("l2_missing" if self.normalised else "l2_added",)

    def _agree(self, left: Rows, right: Rows) -> bool:
        return bool((cosines(left, right) >= self.tolerance.min_cosine).all())

    def _same(self, rows: Rows, at: list[int] | None = None) -> bool:
        """Whether what was given is `rows`, at these places or at all; but for the norms where all are wrong."""
        at = list(range(len(rows))) if at is None else at
        near = self._of_norms or norm_errors(self.given[at], rows[at]).max() <= self.tolerance.max_norm_error
        return bool(near) and self._agree(self.given[at], rows[at])

    def _in_another_order(self) -> bool:
        orders = permutations(range(len(self.given))) if len(self.given) <= MAX_ORDERED else ()
        return any(self._same(self.expected[list(order)]) for order in orders)

    def _of_two(self, names: list[str]) -> Explanation | None:
        """Of clients that resize in another way and, perhaps, make a mistake that shows in every crop: of that tell the
        crops that need no resize."""
        if not 0 < len(self.sized) < len(self.given):
            return None
        if self._same(self.expected, self.sized):
            likely = self._nearest([name for name in names if name in self.resizes])
            return likely if likely[0] else (("other_resize", *self._of_norms), (), True)
        same = [name for name in names if name not in self.resizes and self._same(self.wrong[name], self.sized)]
        return self._named(same, ("other_resize",), exact=True) if same else None

    def _nearest(self, names: list[str]) -> Explanation:
        """Of `names`, the nearest first."""
        if names:
            first, *others = (self._distance_of(name) for name in names)
            if first < NEARER * self._distance(self.expected) and all(first < NEXT * other for other in others[:1]):
                return self._named(names[:1], (), exact=False)
        return (), (), False

    def _named(self, names: list[str], more: tuple[str, ...], *, exact: bool) -> Explanation:
        """The first of `names`, the nearest first, and those that are not clearly further away."""
        first, *others = names
        alike = [name for name in others if self._distance_of(first) >= NEARER * self._distance_of(name)]
        return (first, *more, *self._of_norms), tuple(alike), exact

    def _distance_of(self, name: str) -> float:
        return self._distance(self.wrong[name])

    def _distance(self, rows: Rows) -> float:
        """Mean over rows, between directions and, unless all norms are wrong, of norms."""
        between = np.sqrt(np.maximum(0, 2 - 2 * cosines(self.given, rows)))
        return float((between if self._of_norms else between + norm_errors(self.given, rows)).mean())

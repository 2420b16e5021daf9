"""What a client's embeddings of the selftest's crops say: right, or which mistake. Pure numpy.

Nothing is guessed: the embeddings of each mistake are in the selftest, and are compared as the right ones are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, permutations
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
LIKE = 0.5
"""A crop is resized otherwise if its embedding is so much nearer to its own than to that of another crop."""
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
    "zeros": ("a row has no numbers but zeros", "give each crop to the file, and wait for what comes out"),
    "repeated": ("rows are the same", "give each crop to the file: is a buffer used again before it was read?"),
    "other_resize": ("probably another resize, none that is known here", ""),
    "only_resized": ("only the crops that need a resize are wrong, and not as by another resize alone", ""),
}
ROUNDED = "the resize rounds otherwise, by a grey level or so: that may be"
"""Of embeddings that are right, but for what `SelftestVectors.rounding` allows."""


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
    """What was done and what to do, a line for each of `mistakes`; or what may be otherwise, and is."""


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
        rounding=vectors.rounding,
    )
    mistakes, others, exact = comparison.explain()
    passed = mistakes == () and exact
    known = {each.name: (each.description, each.fix) for each in vectors.mistakes} | NORMS | OTHERS
    resize = next((each.fix for each in vectors.mistakes if each.resizes), "")
    advice = tuple("; ".join(filter(None, (known[name][0], known[name][1] or resize))) for name in mistakes)
    return SelftestVerdict(
        passed=passed,
        mistakes=mistakes,
        or_one_of=others,
        exact=exact,
        undecidable=comparison.undecidable(),
        precision=precision,
        min_cosine=float(cosines(given, comparison.expected).min()),
        max_norm_error=float(norm_errors(given, comparison.expected).max()),
        tolerance=tolerance,
        advice=(ROUNDED,) if passed and comparison.rounds_otherwise else advice,
    )


def describe_verdict(verdict: SelftestVerdict) -> str:
    """One line: whether it passed, by how much, and what that cannot tell."""
    tolerance = verdict.tolerance
    figures = (
        f"worst cosine {verdict.min_cosine:.7f} ({tolerance.min_cosine:.7g} or more for {verdict.precision}), norms "
        f"within {verdict.max_norm_error:.2%} ({tolerance.max_norm_error:.2%})"
    )
    if verdict.passed:
        hidden = f"; in {verdict.precision} it would not show: {', '.join(verdict.undecidable)}"
        return f"passed: {figures}{hidden if verdict.undecidable else ''}"
    if not verdict.mistakes:
        return f"FAILED: {figures}; no known mistake explains it"
    found = " and ".join(verdict.mistakes)
    others = f", or {', or '.join(verdict.or_one_of)}" if verdict.or_one_of else ""
    return f"FAILED: {figures}; {'the mistake is' if verdict.exact else 'the nearest mistake is'} {found}{others}"


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
    rounding: Tolerance

    def explain(self) -> Explanation:
        """`SelftestVerdict.mistakes`, `or_one_of` and `exact`."""
        names = sorted(self.wrong, key=self._distance_of)
        if self._same(self.expected) and not (names and self._distance_of(names[0]) < NEARER * self._distance_of_right):
            return (self._of_norms, (), True) if self._of_norms else ((), (), True)
        if same := [name for name in names if self._same(self.wrong[name])]:
            return self._named(same, (), exact=True)
        if self._agree(self.given, self.expected):
            return ("norms",), (), True
        if self._in_another_order():
            return ("rows", *self._of_norms), (), True
        if (np.linalg.norm(self.given, axis=1) == 0).any():
            return ("zeros",), (), True
        if self._repeats():
            return ("repeated", *self._of_norms), (), True
        return self._of_two(names) or self._nearest(names)

    def undecidable(self) -> tuple[str, ...]:
        """`SelftestVerdict.undecidable`."""
        right = self._distance_of_right
        return tuple(
            name
            for name, wrong in self.wrong.items()
            if self._agree(wrong, self.expected)
            and (norm_errors(wrong, self.expected) <= self._most_norm_error).all()
            and right >= NEARER * self._distance_of(name)
            and self._distance_of(name) >= NEARER * right
        )

    @property
    def rounds_otherwise(self) -> bool:
        """Whether the embeddings are not right but for `rounding`."""
        near = (norm_errors(self.given, self.expected) <= self.tolerance.max_norm_error).all()
        return not (near and (cosines(self.given, self.expected) >= self.tolerance.min_cosine).all())

    @property
    def _is_sized(self) -> npt.NDArray[np.bool_]:
        """Which rows [N] no resize touches."""
        return np.isin(np.arange(len(self.given)), self.sized)

    @property
    def _least_cosine(self) -> Rows:
        """Row by row [N]."""
        least = self.tolerance.min_cosine
        return np.where(self._is_sized, least, min(least, self.rounding.min_cosine))

    @property
    def _most_norm_error(self) -> Rows:
        """Row by row [N]."""
        most = self.tolerance.max_norm_error
        return np.where(self._is_sized, most, max(most, self.rounding.max_norm_error))

    @property
    def _distance_of_right(self) -> float:
        return min(self._distance(self.expected), self._distance(self.own))

    @property
    def _of_norms(self) -> tuple[str, ...]:
        """What was done to the norms of all rows, whatever their directions are."""
        unit = bool((np.abs(np.linalg.norm(self.given, axis=1) - 1) <= UNIT).all())
        near = bool((norm_errors(self.given, self.expected) <= self._most_norm_error).all())
        return () if near or unit == self.normalised else ("l2_missing" if self.normalised else "l2_added",)

    def _agree(self, left: Rows, right: Rows, at: slice | list[int] = slice(None)) -> bool:
        """Whether all directions do, of these rows."""
        return bool((cosines(left, right) >= self._least_cosine)[at].all())

    def _same(self, rows: Rows, at: list[int] | None = None) -> bool:
        """Whether what was given is `rows`, at these places or at all; but for the norms where all are wrong."""
        at = list(range(len(rows))) if at is None else at
        near = self._of_norms or (norm_errors(self.given, rows) <= self._most_norm_error)[at].all()
        return bool(near) and self._agree(self.given, rows, at)

    def _in_another_order(self) -> bool:
        orders = permutations(range(len(self.given))) if len(self.given) <= MAX_ORDERED else ()
        return any(self._same(self.expected[list(order)]) for order in orders)

    def _repeats(self) -> bool:
        """Whether two rows are the same, of which others are expected."""
        return any(
            cosines(self.given[[one]], self.given[[two]])[0] > 1 - 1e-9
            and cosines(self.expected[[one]], self.expected[[two]])[0] <= 1 - 1e-9
            for one, two in combinations(range(len(self.given)), 2)
        )

    def _like(self, rows: Rows) -> bool:
        """Whether the crops that are resized are far nearer to their own of `rows` than to those of other crops."""
        between = np.stack([np.sqrt(np.maximum(0, 2 - 2 * cosines(self.given, row[None]))) for row in rows])  # [N, N]
        own = np.diag(between).copy()
        np.fill_diagonal(between, np.inf)
        return bool((own <= LIKE * between.min(0))[~self._is_sized].all())

    def _of_two(self, names: list[str]) -> Explanation | None:
        """Of clients that resize in another way and, perhaps, make a mistake that shows in every crop: of that tell the
        crops that need no resize."""
        if not 0 < len(self.sized) < len(self.given):
            return None
        if self._same(self.expected, self.sized):
            likely = self._nearest([name for name in names if name in self.resizes])
            if likely[0]:
                return likely
            name = "other_resize" if self._like(self.expected) else "only_resized"
            return (name, *self._of_norms), (), False
        same = [name for name in names if name not in self.resizes and self._same(self.wrong[name], self.sized)]
        alone = [name for name in same if not any(name.startswith(f"{other}_") for other in same)]
        same = [name for name in alone if self._like(self.wrong[name])]
        return self._named(same, ("other_resize",), exact=False) if same else None

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

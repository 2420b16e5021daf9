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
    wrong: dict[str, Rows]
    sized: list[int]
    resizes: set[str]
    normalised: bool
    tolerance: Tolerance

    def explain(self) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
        """`SelftestVerdict.mistakes`, `or_one_of` and `exact`."""
        if self._same(self.expected):
            return self._of_norms(self.expected), (), True
        if same := sorted((name for name in self.wrong if self._same(self.wrong[name])), key=self._distance_of):
            return (same[0], *self._of_norms(self.wrong[same[0]])), tuple(same[1:]), True
        if self._in_another_order():
            return ("rows",), (), True
        if len(self.given) > 1 and (cosines(self.given, self.given[:1]) > 1 - 1e-9).all():
            return ("repeated",), (), True
        return self._of_two() or self._nearest()

    def undecidable(self) -> tuple[str, ...]:
        """`SelftestVerdict.undecidable`."""
        return tuple(
            name
            for name, wrong in self.wrong.items()
            if self._agree(wrong, self.expected) and norm_errors(wrong, self.expected).max() <= self._norm_error
        )

    @property
    def _norm_error(self) -> float:
        return self.tolerance.max_norm_error

    def _agree(self, left: Rows, right: Rows) -> bool:
        return bool((cosines(left, right) >= self.tolerance.min_cosine).all())

    def _same(self, rows: Rows) -> bool:
        return self._agree(self.given, rows)

    def _of_norms(self, rows: Rows) -> tuple[str, ...]:
        """What was done to the norms of embeddings that are `rows` but for them."""
        norms = np.linalg.norm(self.given, axis=1)
        if norm_errors(self.given, rows).max() <= self._norm_error:
            return ()
        if self.normalised:
            return ("l2_missing",)
        return ("l2_added" if (np.abs(norms - 1) <= UNIT).all() else "norms",)

    def _in_another_order(self) -> bool:
        orders = permutations(range(len(self.given))) if len(self.given) <= 6 else ()
        return any(self._same(self.expected[list(order)]) for order in orders)

    def _of_two(self) -> tuple[tuple[str, ...], tuple[str, ...], bool] | None:
        """Of clients that resize in another way and, perhaps, make a mistake that shows in every crop: of that tell the
        crops that need no resize."""
        rest = [row for row in range(len(self.given)) if row not in self.sized]
        if not self.sized or not rest:
            return None
        if self._agree(self.given[self.sized], self.expected[self.sized]):
            likely = self._nearest(of=self.resizes)
            return likely if likely[0] else (("other_resize",), (), True)
        same = [
            name
            for name in self.wrong
            if name not in self.resizes and self._agree(self.given[self.sized], self.wrong[name][self.sized])
        ]
        same.sort(key=self._distance_of)
        return ((same[0], "other_resize"), tuple(same[1:]), True) if same else None

    def _nearest(self, of: set[str] | None = None) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
        names = sorted(self.wrong if of is None else of & self.wrong.keys(), key=self._distance_of)
        if not names:
            return (), (), False
        right, first, *others = (self._distance(self.expected), *map(self._distance_of, names))
        if first < NEARER * right and all(first < NEXT * other for other in others[:1]):
            return (names[0],), (), False
        return (), (), False

    def _distance_of(self, name: str) -> float:
        return self._distance(self.wrong[name])

    def _distance(self, rows: Rows) -> float:
        """Mean over rows, between directions."""
        return float(np.sqrt(np.maximum(0, 2 - 2 * cosines(self.given, rows))).mean())

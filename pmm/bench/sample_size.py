"""How many queries it takes to tell a broken bound from chance."""

from __future__ import annotations

import math

CHANCE = 0.05
"""Of so many flips, or more, where no more than the allowed share flip in the long run."""
MORE = 1.5
"""As many queries at least, as a multiple: of a few queries that change, a bootstrap's interval is too narrow."""
MOST = 10_000_000
"""Queries beyond which no number is named."""


def queries_for_drop(drop: float, allowed: float, interval: tuple[float, float] | None, queries: int) -> int | None:
    """How many queries would tell that mAP falls by more than `allowed`, if it falls by `drop`, which is more.

    None if `queries` do: the difference's 95 % `interval` lies below -`allowed`, or is unknown. Its width goes with
    1 / sqrt(queries).
    """
    if interval is None or interval[1] < -allowed:
        return None
    wider = min((interval[1] + drop) / (drop - allowed), MOST)  # of the next number above `allowed`, beyond all numbers
    return _at_most(queries * max(MORE, wider**2))


def queries_for_flips(flips: int, queries: int, allowed: float) -> int | None:
    """How many queries would tell that more than the share `allowed` of them flip, if as many do as `flips` of
    `queries`; None if these tell (binomial test, one-sided, at `CHANCE`)."""
    from scipy.special import bdtrc  # the chance of more than k of n; scipy.stats takes a second to load

    many, share = float(queries), flips / queries
    while many < MOST and bdtrc(math.floor(share * many + 1e-9) - 1, math.floor(many), allowed) >= CHANCE:
        many *= 1.1
    return None if many == queries else _at_most(many)


def too_few_queries(needed: int | None) -> str:
    """The end of a sentence on a broken bound; empty if it is broken for certain."""
    if needed is None:
        return ""
    number = f"about {needed:,}" if needed < MOST else "far more"
    return f" (too few queries to rule out chance; {number} would be enough)"


def _at_most(number: float) -> int:
    """Rounded up to two digits."""
    if number >= MOST:
        return MOST
    digits = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return math.ceil(number / digits) * digits

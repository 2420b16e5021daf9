"""Windows of distance: how many gallery items lie before and in each, and which. The reference for what is compiled.

Loads no torch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from pmm.utils.arrays import Floats, Ints


class DistanceWindows(NamedTuple):
    """Intervals of distance, of each of q queries some: ascending at both ends."""

    bounds: Ints
    """Where each query's begin, and where the last one's end [q + 1]."""
    low: Floats
    """[T]."""
    high: Floats
    """[T]."""


class WindowCounts(Protocol):
    """What finds the distances of a block [q, G] in windows."""

    def count(self, distances: Floats, windows: DistanceWindows) -> tuple[Ints, Ints]:
        """How many of a query's distances are below each window [T], and how many are not above it [T]."""

    def within(self, distances: Floats, windows: DistanceWindows, count: int) -> Ints:
        """The `count` distances in windows that do not overlap: their places in the block row by row, ascending."""


class NumpyWindowCounts:
    """`WindowCounts` in numpy."""

    def count(self, distances: Floats, windows: DistanceWindows) -> tuple[Ints, Ints]:
        """As `WindowCounts.count`."""
        before, upto = np.zeros(len(windows.low), np.int64), np.zeros(len(windows.low), np.int64)
        for row, some in zip(distances, _of_each_query(windows), strict=True):
            low, high = windows.low[some], windows.high[some]
            if len(low):
                near = np.sort(row[row <= high[-1]])
                before[some], upto[some] = near.searchsorted(low, "left"), near.searchsorted(high, "right")
        return before, upto

    def within(self, distances: Floats, windows: DistanceWindows, count: int) -> Ints:
        """As `WindowCounts.within`."""
        found = [np.empty(0, np.int64)]
        for query, some in enumerate(_of_each_query(windows)):
            row, low, high = distances[query], windows.low[some], windows.high[some]
            if len(low):
                near = np.flatnonzero((row >= low[0]) & (row <= high[-1]))
                window = high.searchsorted(row[near], "left")
                found.append(near[row[near] >= low[window]] + query * len(row))
        return np.concatenate(found)


def _of_each_query(windows: DistanceWindows) -> list[slice]:
    bounds = windows.bounds.tolist()
    return [slice(*pair) for pair in pairwise(bounds)]

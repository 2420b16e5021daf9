"""Thresholds of distance that the bench measured for a file, as its manifest keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pmm.utils.errors import InvalidValue


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """Two crops are accepted as one identity where their distance is at most `distance`.

    Raises InvalidValue for a rate outside 0..1 or a negative distance.
    """

    fmr: float
    """False match rate: the target share of pairs of two identities that are accepted."""
    distance: float
    """Euclidean distance or, for embeddings that are compared by cosine, 1 - cosine similarity."""
    tpr: float
    """True-positive rate: the share of pairs of one identity that are accepted."""

    def __post_init__(self) -> None:
        for name, most in (("fmr", 1.0), ("tpr", 1.0), ("distance", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                expected = "0 to 1" if most == 1 else "a distance of 0 or more"
                raise InvalidValue(name, getattr(self, name), expected)


@dataclass(frozen=True, kw_only=True)
class MeasuredThresholds:
    """Thresholds of one file in one precision on one data set, for embeddings stored in fp32."""

    precision: str
    """That the file ran in: fp32, tf32, fp16, bf16 or int8."""
    metric: Literal["euclidean", "cosine"]
    data: str
    """Name of the data set."""
    data_digest: str
    """Of names and contents of its query and gallery."""
    genuine: int
    """Pairs of one identity that it was measured on."""
    impostor: int
    """The same of two identities."""
    points: tuple[MeasuredPoint, ...]
    """From the highest rate to the lowest; rates that need more pairs are left out."""

    def at(self, fmr: float) -> MeasuredPoint | None:
        """The point measured for this target rate; None if there is none."""
        return next((point for point in self.points if abs(point.fmr - fmr) <= 1e-9 * fmr), None)


def as_metric(distance: float, metric: str) -> float:
    """A Euclidean distance of two embeddings as galleries of that metric give it: at norm 1, 1 - cos is half its
    square."""
    return distance * distance / 2 if metric == "cosine" else distance

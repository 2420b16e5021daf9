"""What an index is checked with: the vectors that it was built from, and the queries. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.bench.chain.outcomes import Listing
from pmm.data.samples import evenly_spaced
from pmm.utils.arrays import Floats, Ints

NEAREST = 10
PROBES = 256
"""Rows, and queries, that an index is checked with."""


class Answers(NamedTuple):
    """Lists of some queries."""

    asked: Ints
    """Which queries [q]."""
    listing: Listing
    """[q, k]"""


class IndexFault(NamedTuple):
    """A fault in a few words, and what shows it."""

    fault: str
    evidence: str

    def __str__(self) -> str:
        return f"{self.fault}: {self.evidence}"


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexInputs:
    """What an index was built from, and the queries to check it with."""

    vectors: Floats
    """[N, D]; removed rows too."""
    camids: Ints
    """[N]"""
    queries: Floats
    """[Q, D]"""
    query_camids: Ints
    """[Q]"""
    removed: Ints
    """Rows that were taken out again; those of a number of N or more have no vector here."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """What an exact index compares by; cosine: distances are Euclidean ones of rows at norm 1."""

    @cached_property
    def live(self) -> npt.NDArray[np.bool_]:
        """[N]"""
        alive = np.ones(len(self.vectors), np.bool_)
        alive[self.removed[self.removed < len(alive)]] = False
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

"""A data set in memory: its samples in three parts. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

JUNK = -1
"""Identity of a crop without a usable person; dropped when a data set is read."""
JUNK_FOLDER = "-1"
"""Its folder, where identities have folders."""
DISTRACTOR = 0
"""Identity of the gallery's wrong matches for every query, in data sets with the layout of Market-1501."""
UNKNOWN_CAMERA = -1


class Sample(NamedTuple):
    """One crop: its file, the identity on it and the camera (only whether two are equal matters; -1: unknown)."""

    path: Path
    pid: int
    camid: int


@dataclass(frozen=True)
class ReidDataset:
    """A data set: training crops, queries and the gallery to search, and what its reader had to assume."""

    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = field(default=(), compare=False)
    """What else is in its folders: how much for which reason, in words."""
    name: str = field(default="", compare=False)
    """As `pmm check --help` has it; empty for crops that are no known data set's."""


def pids_of(samples: tuple[Sample, ...]) -> npt.NDArray[np.int64]:
    """Identities [N]."""
    return np.array([sample.pid for sample in samples], dtype=np.int64)


def camids_of(samples: tuple[Sample, ...]) -> npt.NDArray[np.int64]:
    """Cameras [N]."""
    return np.array([sample.camid for sample in samples], dtype=np.int64)


def class_indices(samples: tuple[Sample, ...]) -> dict[int, int]:
    """Training label of each identity: its index in sorted order."""
    return {pid: index for index, pid in enumerate(sorted({sample.pid for sample in samples}))}


def evenly_spaced(count: int, chosen: int) -> Sequence[int]:
    """At most `chosen` of `count` indices, from the first to the last."""
    return np.linspace(0, count - 1, min(chosen, count)).astype(int).tolist()

"""What a data set is made of. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Sample(NamedTuple):
    """One crop: its file, the identity on it (0: a distractor) and the camera (zero-based)."""

    path: Path
    pid: int
    camid: int


@dataclass(frozen=True)
class Split:
    """A data set: training crops, queries and the gallery they are searched in."""

    train: tuple[Sample, ...]
    query: tuple[Sample, ...]
    gallery: tuple[Sample, ...]

    def describe(self) -> str:
        """Images and identities of each part, in one line."""
        parts = (("train", self.train), ("query", self.query), ("gallery", self.gallery))
        return ", ".join(f"{name} {len(s)} images of {len({x.pid for x in s})} identities" for name, s in parts)


def pids_of(samples: tuple[Sample, ...]) -> npt.NDArray[np.int64]:
    """Identities [N]."""
    return np.array([sample.pid for sample in samples], dtype=np.int64)


def camids_of(samples: tuple[Sample, ...]) -> npt.NDArray[np.int64]:
    """Cameras [N]."""
    return np.array([sample.camid for sample in samples], dtype=np.int64)


def class_indices(samples: tuple[Sample, ...]) -> dict[int, int]:
    """Training label of each identity: its place in sorted order."""
    return {pid: index for index, pid in enumerate(sorted({sample.pid for sample in samples}))}

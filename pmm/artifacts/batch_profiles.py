"""Batches that an engine is built for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pmm.utils.errors import ConflictingOptions, InvalidValue

MAX_IMAGES = 4096
"""Per run of an engine: a runner keeps buffers for so many."""


@dataclass(frozen=True, kw_only=True)
class BatchProfile:
    """The batches that an optimisation profile is for. Raises InvalidValue unless 1 <= least <= best <= most."""

    least: int = 1
    best: int = 8
    most: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.best <= self.most <= MAX_IMAGES:
            expected = f"1 <= min <= best <= max <= {MAX_IMAGES}, as 1 8 64"
            raise InvalidValue("batch", str(self), expected)

    def __str__(self) -> str:
        return f"{self.least} {self.best} {self.most}"


@dataclass(frozen=True)
class BatchProfiles:
    """The optimisation profiles of an engine, in order of size. Raises InvalidValue without one, ConflictingOptions for
    ones without an order."""

    profiles: tuple[BatchProfile, ...] = (BatchProfile(),)

    def __post_init__(self) -> None:
        if not self.profiles:
            raise InvalidValue("batch", "", "a batch profile, as 1 8 64")
        for before, after in zip(self.profiles, self.profiles[1:], strict=False):
            if not (before.best < after.best and before.most <= after.most and before.least <= after.least):
                raise ConflictingOptions(
                    f"{{batch}} {after} after {{batch}} {before}",
                    "batch",
                    expected="each for larger batches than the one before (best grows, min and max do not shrink), "
                    "as 1 1 1 and 1 8 64",
                )

    @property
    def least(self) -> int:
        """The smallest batch that any of them takes."""
        return self.profiles[0].least

    @property
    def most(self) -> int:
        """The largest batch that any of them takes."""
        return self.profiles[-1].most

    @property
    def best(self) -> int:
        """The batch that the one for the largest batches is optimised for."""
        return self.profiles[-1].best

    def runs_as(self, count: int) -> tuple[int, int]:
        """The profile (its index) in which `count` images run, and the batch they run as: at least `count`, more only
        where no profile takes so few. Of several profiles, the one whose best batch is nearest, as a ratio.

        Raises ValueError for more images than `most`.
        """
        fitting = [(max(count, p.least), at) for at, p in enumerate(self.profiles) if count <= p.most]
        if not fitting:
            raise ValueError(f"{count} images; the largest profile takes {self.most}")
        batch = min(fitting)[0]
        return min((abs(math.log(self.profiles[at].best / batch)), at) for padded, at in fitting if padded == batch)[
            1
        ], batch

    def __str__(self) -> str:
        return ", ".join(map(str, self.profiles))

"""The windows that hide a part of a crop. Loads no numpy: flags are checked with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pmm.utils.errors import InvalidValue

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

AREA = 10
"""Of a crop, in windows."""


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The squares that are tried on a crop: every `step` pixels, the last place where one fits excluded, as the
    authors have it (github.com/huanghoujing/AOS4ReID)."""

    height: int
    width: int
    """Of the crop, in pixels."""
    step: int

    @property
    def side(self) -> int:
        """Of a window, in pixels."""
        return math.isqrt(self.height * self.width // AREA)

    @cached_property
    def tops(self) -> range:
        """First row of each row of windows."""
        return range(0, self.height - self.side, self.step)

    @cached_property
    def lefts(self) -> range:
        """First column of each column of windows."""
        return range(0, self.width - self.side, self.step)

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    def rectangles(self) -> npt.NDArray[np.int64]:
        """[W, 4], row by row: top, left, bottom, right, the ends excluded."""
        import numpy as np

        top, left = (grid.ravel() for grid in np.meshgrid(self.tops, self.lefts, indexing="ij"))
        return np.stack([top, left, top + self.side, left + self.side], 1).astype(np.int64).reshape(-1, 4)

    def check(self) -> None:
        """Raises InvalidValue for a step or a crop that leaves fewer than two windows to choose from."""
        crops = f"{self.height}x{self.width} crops, whose windows are {self.side}x{self.side}"
        if min(self.height, self.width) <= self.side:
            raise InvalidValue("--width", self.width, f"less oblong crops for windows to fit than {crops}")
        if len(self) < 2:
            most = max(self.height, self.width) - self.side - 1
            raise InvalidValue("--aos-step", self.step, f"{most} at most, for two windows or more on {crops}")

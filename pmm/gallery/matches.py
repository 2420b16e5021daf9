"""What a search of a gallery found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.gallery.storage.columns import Ids
from pmm.gallery.storage.snapshot import Rows
from pmm.gallery.storage.thresholds import Threshold


@dataclass(frozen=True, eq=False)
class Matches:
    """What is nearest to one query [K] or to several [Q, K], nearest first, ties by row. Unpacks as ids, distances."""

    ids: Ids
    """As they were given; where a query has fewer matches than others, None or, of whole numbers, -1 (where that is an
    id, too, `rows` tells them apart)."""
    distances: npt.NDArray[np.float64]
    """Euclidean distance or, if the gallery's metric is cosine, 1 - cosine similarity; infinite where there is none."""
    rows: Rows
    """Of the gallery as it was; -1 where there is none."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.distances))

    def is_match(self, threshold: Threshold | float) -> npt.NDArray[np.bool_]:
        """Which of them lie within a threshold."""
        return self.distances <= (threshold.distance if isinstance(threshold, Threshold) else threshold)

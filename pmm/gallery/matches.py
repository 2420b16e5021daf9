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
    """The rows nearest to one query [K] or to several [Q, K], nearest first, ties by row. Unpacks as ids, distances."""

    ids: Ids
    """As in the gallery. Where a query has fewer matches than others, the rest is None or, if ids are whole numbers, -1
    (should -1 be an id, look at `rows`)."""
    distances: npt.NDArray[np.float64]
    """Euclidean distance or, if the gallery's metric is cosine, 1 - cosine similarity; infinite for no match."""
    rows: Rows
    """Row numbers in the gallery as it was searched; -1 where there is no match."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.distances))

    def is_match(self, threshold: Threshold | float) -> npt.NDArray[np.bool_]:
        """Which matches lie within a threshold, as booleans of the shape of `distances`."""
        return self.distances <= (threshold.distance if isinstance(threshold, Threshold) else threshold)

"""Which gallery items show a query's identity, and which of these are junk. Loads no torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.utils.arrays import Ints
from pmm.utils.errors import InvalidInput


class PidIndex(NamedTuple):
    """Where in the gallery each query's pid is, and the camera of every crop."""

    query_camids: Ints
    gallery_camids: Ints
    by_pid: Ints
    """Gallery indices [G]; those of one pid are side by side and ascending."""
    first: Ints
    """Where in `by_pid` each query's pid begins [Q]."""
    last: Ints
    """Where it ends [Q]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Q, G."""
        return len(self.query_camids), len(self.gallery_camids)

    @property
    def most_pairs(self) -> int:
        """The largest number of gallery items that share a query's pid."""
        return int((self.last - self.first).max(initial=0))

    @classmethod
    def of(cls, query_pids: Any, gallery_pids: Any, query_camids: Any, gallery_camids: Any) -> PidIndex:
        """Raises InvalidInput for shapes that do not fit."""
        q_pids, g_pids, q_cams, g_cams = map(_integers, (query_pids, gallery_pids, query_camids, gallery_camids))
        for name, pids, camids in (("query", q_pids, q_cams), ("gallery", g_pids, g_cams)):
            if pids.ndim != 1 or camids.shape != pids.shape:
                raise InvalidInput(f"{name}: pids {list(pids.shape)}, camids {list(camids.shape)}", expected="[N], [N]")
        by_pid = np.argsort(g_pids, kind="stable")
        ordered = g_pids[by_pid]
        return cls(q_cams, g_cams, by_pid, np.searchsorted(ordered, q_pids), np.searchsorted(ordered, q_pids, "right"))

    def pairs(self, rows: slice) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
        """All pairs of one of the queries `rows`, numbered from the first of them, and a gallery item of its pid [P],
        ascending; and whether the pair is junk, that is, seen by one camera."""
        counts = self.last[rows] - self.first[rows]
        query = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(query)) - np.repeat(counts.cumsum() - counts, counts)
        item = self.by_pid[self.first[rows][query] + within]
        return query, item, self.query_camids[rows][query] == self.gallery_camids[item]


def _integers(values: Any) -> Ints:
    return np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values, dtype=np.int64)

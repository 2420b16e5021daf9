"""The data on which two backends are compared: embeddings of queries and gallery, identity and camera of each crop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pmm.utils.arrays import Bools, Floats, Ints
from pmm.utils.errors import InvalidInput

ALL = slice(None)


class QueryGallery(NamedTuple):
    """One backend's embeddings of a data set's query and gallery."""

    query: Floats
    """Embeddings [Q, D]."""
    gallery: Floats
    """Embeddings [G, D]."""


class Masks(NamedTuple):
    """Which pairs of queries [q] and gallery items [g] are relevant or junk; all others show two identities."""

    relevant: Bools
    """Same identity, different cameras [q, g]."""
    junk: Bools
    """Same identity, same camera [q, g]: such pairs are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """Identities and cameras of a data set's query and gallery.

    Distractors (pid 0 in Market-1501) share no query's identity, so they need no rule of their own. Crops of pid -1 are
    junk; pmm.data.readers drops them, and here they are refused, since they would count as distractors.

    Raises InvalidInput for shapes that do not fit, an empty part, and pid -1.
    """

    query_pids: Ints
    """[Q]"""
    gallery_pids: Ints
    """[G]"""
    query_camids: Ints
    """[Q]"""
    gallery_camids: Ints
    """[G]"""

    def __post_init__(self) -> None:
        for name in ("query", "gallery"):
            pids, camids = getattr(self, f"{name}_pids"), getattr(self, f"{name}_camids")
            if pids.ndim != 1 or pids.shape != camids.shape or not len(pids):
                raise InvalidInput(
                    f"{name}: pids {list(pids.shape)}, camids {list(camids.shape)}", expected="[N], [N], N >= 1"
                )
            if (pids == -1).any():
                junk = int((pids == -1).argmax())
                raise InvalidInput(f"{name}: item {junk} has pid -1 (junk)", index=junk, hint="leave such crops out")

    def masks(self, queries: slice | Ints, gallery: slice = ALL) -> Masks:
        """Of the named queries with the named part of the gallery."""
        same = self.query_pids[queries, None] == self.gallery_pids[gallery]
        same_camera = self.query_camids[queries, None] == self.gallery_camids[gallery]
        return Masks(same & ~same_camera, same & same_camera)

    def check(self, embedded: QueryGallery, name: str = "") -> None:
        """Raise InvalidInput if embeddings, called `name` (reference, say), do not fit the labels or hold NaN or
        Inf."""
        name = f"{name} embeddings".strip()
        shapes = [np.shape(rows) for rows in embedded]
        expected = [(len(pids), *shapes[0][1:]) for pids in (self.query_pids, self.gallery_pids)]
        if shapes != expected or len(shapes[0]) != 2:
            raise InvalidInput(
                f"{name} of query and gallery are {', '.join(str(list(shape)) for shape in shapes)}",
                expected=f"[{len(self.query_pids)}, D], [{len(self.gallery_pids)}, D]",
            )
        for part, rows in zip(QueryGallery._fields, embedded, strict=True):
            check_finite(rows, f"{name} of the {part}")


def check_finite(rows: Floats, name: str) -> None:
    """Raise InvalidInput, its `index` the first bad row, if the rows [N, D] called `name` hold NaN or Inf."""
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        raise InvalidInput(
            f"{name}: {len(bad)} of {len(rows)} rows hold NaN or Inf, the first is row {bad[0]}", index=int(bad[0])
        )

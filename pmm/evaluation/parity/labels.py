"""What two backends are compared on: embeddings of queries and gallery, and who and where is on each crop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.utils.errors import UserError

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

ALL = slice(None)


class QueryGallery(NamedTuple):
    """What one backend made of a data set's query and gallery."""

    query: Floats
    """Embeddings [Q, D]."""
    gallery: Floats
    """Embeddings [G, D]."""


class Masks(NamedTuple):
    """What some queries [q] and gallery items [g] are to each other; pairs that are neither show two people."""

    relevant: Bools
    """One person, two cameras [q, g]."""
    junk: Bools
    """One person, one camera [q, g]: such pairs count for nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """Identities and cameras of a data set's query and gallery.

    Distractors (pid 0 in Market-1501) are no query's identity and so need no rule of their own. Crops of pid -1 are
    junk in this field; pmm.data.readers drops them, and here they are refused: as any other pid they would count as
    distractors.

    Raises UserError for shapes that do not fit, an empty part, and pid -1.
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
                raise UserError(
                    f"{name}: pids {list(pids.shape)}, camids {list(camids.shape)}; expected [N], [N], N >= 1"
                )
            if (pids == -1).any():
                raise UserError(f"{name}: item {int((pids == -1).argmax())} has pid -1 (junk); leave such crops out")

    def masks(self, queries: slice | Ints, gallery: slice = ALL) -> Masks:
        """Of the named queries with the named part of the gallery."""
        same = self.query_pids[queries, None] == self.gallery_pids[gallery]
        here = self.query_camids[queries, None] == self.gallery_camids[gallery]
        return Masks(same & ~here, same & here)

    def check(self, embedded: QueryGallery, name: str) -> None:
        """Raise UserError, saying it is `name`, if embeddings do not fit the labels or hold NaN or Inf."""
        shapes = [np.shape(rows) for rows in embedded]
        expected = [(len(pids), *shapes[0][1:]) for pids in (self.query_pids, self.gallery_pids)]
        if shapes != expected or len(shapes[0]) != 2:
            found = ", ".join(str(list(shape)) for shape in shapes)
            raise UserError(
                f"parity: {name} embeddings of query and gallery are {found}; "
                f"expected [{len(self.query_pids)}, D], [{len(self.gallery_pids)}, D]"
            )
        for part, rows in zip(QueryGallery._fields, embedded, strict=True):
            bad = np.flatnonzero(~np.isfinite(rows).all(1))
            if len(bad):
                raise UserError(
                    f"parity: {len(bad)} of {len(rows)} {name} embeddings of the {part} hold NaN or Inf, "
                    f"the first is row {bad[0]}"
                )

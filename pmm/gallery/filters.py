"""Which rows of a gallery a search looks at: by camera, time, id or a column of the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pmm.gallery.rows import as_ids
from pmm.gallery.snapshot import GallerySnapshot
from pmm.utils.errors import InvalidInput, InvalidValue


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """Rows for which all that is given holds; what is empty or None asks for nothing.

    Example:
        >>> night = RowFilter(cameras=["gate", "yard"], since=1.6e9)
    """

    cameras: Sequence[str | int] = ()
    """Any of these."""
    since: float | None = None
    """In the unit of the gallery's `time`; this moment is in, rows without a time (NaN) are not."""
    until: float | None = None
    """As `since`."""
    ids: Sequence[str | int] = ()
    """Any of these; those that the gallery does not have are passed over."""
    columns: Mapping[str, Sequence[str | int | float]] = field(default_factory=dict)
    """Column -> any of these values."""

    def rows(self, snapshot: GallerySnapshot) -> npt.NDArray[np.int64]:
        """The rows that are kept [n], ascending.

        Raises InvalidValue for a column that the gallery does not have, InvalidInput if no row is kept.
        """
        keep = snapshot.is_live.copy()
        wanted = {**({"camera": self.cameras} if len(self.cameras) else {}), **self.columns}
        for name, values in wanted.items():
            _check_column(name, snapshot)
            keep &= snapshot.equal_to(name, list(values))
        if self.since is not None or self.until is not None:
            _check_column("time", snapshot)
            times = snapshot.numbers("time")
            keep &= (times >= (-np.inf if self.since is None else self.since)) & (
                times <= (np.inf if self.until is None else self.until)
            )
        if len(self.ids):
            found = snapshot.find(as_ids(self.ids)) if len(snapshot) else np.empty(0, np.int64)
            named = np.zeros(len(keep), np.bool_)
            named[found[found >= 0]] = True
            keep &= named
        rows = np.flatnonzero(keep)
        if not len(rows):
            raise InvalidInput(
                f"none of the {len(snapshot)} rows of {snapshot.path} fits the filter ({self})",
                expected="a filter that keeps at least one row",
            )
        return rows

    def __str__(self) -> str:
        parts = [f"{name} {_short(values)}" for name, values in (("camera", self.cameras), ("id", self.ids)) if values]
        parts += [f"{name} {_short(values)}" for name, values in self.columns.items()]
        parts += [
            f"{name} {value:g}" for name, value in (("since", self.since), ("until", self.until)) if value is not None
        ]
        return ", ".join(parts) or "everything"


def _short(values: Sequence[object]) -> str:
    return " or ".join(map(str, values[:3])) + (" or ..." if len(values) > 3 else "")


def _check_column(name: str, snapshot: GallerySnapshot) -> None:
    columns = snapshot.manifest.columns
    if name not in columns:
        raise InvalidValue("column", name, f"one of the gallery's ({', '.join(columns) or 'it has none'})")

"""Which rows of a gallery to search: by camera, time, id or any other column."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.gallery.storage.manifest import ColumnKind
from pmm.gallery.storage.rows import as_ids
from pmm.gallery.storage.snapshot import GallerySnapshot
from pmm.utils.errors import InvalidInput, InvalidValue


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """Keeps the rows that meet all conditions; an empty one, or None, is no condition.

    Examples:
        >>> night = RowFilter(cameras=["gate", "yard"], since=1.6e9)
    """

    cameras: Sequence[str | int] = ()
    """Any of these."""
    since: float | None = None
    """Earliest time, included, in the unit of the gallery's `time`. Rows without a time (NaN) are left out."""
    until: float | None = None
    """Latest time, included; else as `since`."""
    ids: Sequence[str | int] = ()
    """Any of these; ids that the gallery does not have are ignored."""
    columns: Mapping[str, Sequence[str | int | float]] = field(default_factory=dict)
    """Column -> the values of which a row has any."""

    def __post_init__(self) -> None:
        """Raises InvalidValue for anything that is no list of values, or no time. Lists are copied."""
        for name in ("cameras", "ids"):
            object.__setattr__(self, name, values_of(name, getattr(self, name), (str, int)))
        if not isinstance(self.columns, Mapping) or not all(isinstance(name, str) for name in self.columns):
            raise InvalidValue("columns", self.columns, "names of columns with lists of values")
        columns = {name: values_of(name, values, (str, int, float)) for name, values in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        for name in ("since", "until"):
            if (time := getattr(self, name)) is not None:
                object.__setattr__(self, name, number_of(name, time, "a number, in the unit of the gallery's times"))

    def rows(self, snapshot: GallerySnapshot) -> npt.NDArray[np.int64]:
        """The rows that the filter keeps [n], ascending.

        Raises InvalidValue for an unknown column, or values of another type than the column's; InvalidInput if no row
        is kept.
        """
        keep = snapshot.is_live.copy()
        wanted = {**({"camera": self.cameras} if len(self.cameras) else {}), **self.columns}
        for name, values in wanted.items():
            _check_column(name, snapshot)
            check_kind(name, values, snapshot.manifest.columns[name])
            keep &= snapshot.equal_to(name, values)
        if self.since is not None or self.until is not None:
            _check_column("time", snapshot)
            times = snapshot.numbers("time")
            keep &= (times >= (-np.inf if self.since is None else self.since)) & (
                times <= (np.inf if self.until is None else self.until)
            )
        if len(self.ids):
            check_kind("id", self.ids, snapshot.manifest.ids)
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


def values_of(name: str, given: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """The values in a list, a set or an array. Raises InvalidValue for anything else, or values of other kinds."""
    values = given.tolist() if isinstance(given, np.ndarray) else given
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InvalidValue(name, given, "a list of values")
    found = tuple(value.item() if isinstance(value, np.generic) else value for value in values)
    for value in found:
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InvalidValue(name, value, "texts or numbers" if float in kinds else "texts or whole numbers")
    return found


def number_of(name: str, given: Any, expected: str) -> float:
    """The number `given`. Raises InvalidValue for NaN and what is no number."""
    if isinstance(given, int | float | np.integer | np.floating) and not isinstance(given, bool):
        with contextlib.suppress(OverflowError):
            if not math.isnan(number := float(given)):
                return number
    raise InvalidValue(name, given, expected)


def check_kind(name: str, values: Iterable[object], kind: ColumnKind) -> None:
    """Raise InvalidValue for a text where a column holds numbers, or a number where it holds texts."""
    for value in values:
        if isinstance(value, str) != (kind == "text"):
            expected = {"text": "texts", "int64": "whole numbers", "float64": "numbers"}[kind]
            raise InvalidValue(name, value, f"{expected}, as the gallery holds")


def _short(values: Sequence[object]) -> str:
    return " or ".join(map(str, values[:3])) + (" or ..." if len(values) > 3 else "")


def _check_column(name: str, snapshot: GallerySnapshot) -> None:
    columns = snapshot.manifest.columns
    if name not in columns:
        raise InvalidValue("column", name, f"one of the gallery's ({', '.join(columns) or 'it has none'})")

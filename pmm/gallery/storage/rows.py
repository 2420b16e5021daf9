"""Rows from the caller, checked and as they are stored, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pmm.gallery.storage.chunks import DTYPES
from pmm.gallery.storage.columns import Array, Ids, column_arrays, key_arrays
from pmm.gallery.storage.manifest import ColumnKind, GalleryManifest
from pmm.utils.errors import InvalidInput, printable

BROKEN = "the model or the backend is broken"
COLUMN_KINDS: dict[str, ColumnKind] = {"camera": "text", "time": "float64", "path": "text"}
"""Columns that have a meaning; `camera` may hold whole numbers, too."""
MEANINGS = {"camera": "texts or whole numbers", "time": "seconds", "path": "texts"}
_BLOCK = 1 << 22
"""Numbers that are checked at once."""


@dataclass(frozen=True, kw_only=True)
class GalleryRows:
    """Rows of a chunk to be: embeddings [n, D] in the stored precision, ids and columns [n]."""

    embeddings: Array
    ids: Ids
    columns: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.ids)

    def arrays(self) -> dict[str, Array]:
        """File name -> array."""
        arrays = {"embeddings.npy": self.embeddings, **column_arrays("id", self.ids), **key_arrays(self.ids)}
        for name, values in self.columns.items():
            arrays |= column_arrays(name, values)
        return arrays


def gallery_rows(manifest: GalleryManifest, embeddings: Any, ids: Ids, columns: Mapping[str, Array]) -> GalleryRows:
    """Rows that fit the manifest; `ids` and `columns` are as `as_ids` and `as_column` give them.

    Raises InvalidInput for embeddings of another shape, NaN or Inf, numbers too large for the stored precision, rows
    that are all zero where the metric is cosine, an id that is there twice, and columns that are not the gallery's.
    """
    given = np.asarray(embeddings)
    if given.ndim != 2 or given.dtype.kind not in "fiu" or given.shape != (len(ids), manifest.dim):
        raise InvalidInput(
            f"embeddings are {given.dtype} {list(given.shape)} for {len(ids)} ids",
            expected=f"numbers [{len(ids)}, {manifest.dim}]",
        )
    if set(columns) != set(manifest.columns):
        raise InvalidInput(
            f"columns are {', '.join(map(str, columns)) or 'none'}", expected=f"{', '.join(manifest.columns) or 'none'}"
        )
    if (ids.dtype == object) != (manifest.ids == "text") and len(ids):
        kinds = {"int64": "whole numbers", "text": "texts"}
        raise InvalidInput(f"ids are {kinds['text' if ids.dtype == object else 'int64']}", expected=kinds[manifest.ids])
    _refuse_twice(ids)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(given, DTYPES[manifest.precision])
    _check(given, stored, manifest, ids)
    kept = {name: _of_kind(name, columns[name], kind, len(ids)) for name, kind in manifest.columns.items()}
    return GalleryRows(embeddings=stored, ids=ids, columns=kept)


def as_numbers(name: str, given: Any) -> Array:
    """An array of what may be lists. Raises InvalidInput for rows of several lengths."""
    try:
        return np.asarray(given)
    except ValueError:
        raise InvalidInput(f"{name}: their rows are not of one length", expected="numbers [N, D]") from None


def as_ids(ids: Any) -> Ids:
    """Whole numbers as int64, texts as objects. Raises InvalidInput for anything else."""
    return _plain("ids", ids, "whole numbers or texts, all of one kind", numbers="iu")


def as_column(name: str, values: Any) -> Array:
    """int64, float64, or texts as objects. Raises InvalidInput for anything else."""
    return _plain(f"column {name}", values, "numbers or texts, all of one kind", numbers="iuf")


def kind_of_values(name: str, values: Array) -> ColumnKind:
    """How a column of these values is stored; a column of a name with a meaning, as that needs it."""
    kind: ColumnKind = "text" if values.dtype == object else "float64" if values.dtype.kind == "f" else "int64"
    return kind if name == "camera" and kind == "int64" else COLUMN_KINDS.get(name, kind)


def first_ids(ids: Ids, bad: npt.NDArray[np.int64]) -> str:
    """The ids of the first bad rows."""
    return ", ".join(printable(ids[row]) for row in bad[:3]) + (", ..." if len(bad) > 3 else "")


def _plain(name: str, values: Any, expected: str, *, numbers: str) -> Array:
    if isinstance(values, np.ndarray):
        if values.ndim != 1:
            raise InvalidInput(f"{name}: they are {list(values.shape)}", expected=f"[N] {expected}")
        array = values.tolist() if values.dtype.kind in "USO" else values
    elif isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise InvalidInput(f"{name}: it is {type(values).__name__}", expected=f"a list or an array of {expected}")
    else:
        array = list(values)
    if isinstance(array, list):
        kinds = str if array and isinstance(array[0], str) else int | float | np.integer | np.floating
        bad = next((i for i, v in enumerate(array) if not isinstance(v, kinds) or isinstance(v, bool)), None)
        if bad is not None:
            raise InvalidInput(f"{name}: number {bad} is {array[bad]!r}", index=bad, expected=expected)
        if kinds is str or not array:
            texts = np.empty(len(array), object)
            texts[:] = [str(text) for text in array]
            return texts
        whole = all(isinstance(value, int | np.integer) for value in array)
        array = np.asarray(array)
        if whole and array.dtype.kind not in "iu":  # as numpy mixes what is below 0 with what is above 2^63
            raise InvalidInput(f"{name}: some numbers are too large", expected="-2^63 to 2^63 - 1")
    if array.dtype.kind not in numbers:
        raise InvalidInput(f"{name}: they are {array.dtype}", expected=expected)
    if array.dtype.kind == "f":
        return array.astype(np.float64, copy=False)
    if array.dtype.kind == "u" and len(array) and int(array.max()) > np.iinfo(np.int64).max:
        raise InvalidInput(f"{name}: {array.max()} is too large", expected="at most 2^63 - 1")
    return array.astype(np.int64, copy=False)


def _of_kind(name: str, values: Array, kind: ColumnKind, rows: int) -> Array:
    if len(values) != rows:
        raise InvalidInput(f"column {name} has {len(values)} values for {rows} ids", expected=f"{rows}")
    is_text = values.dtype == object
    if is_text != (kind == "text") or (kind == "int64" and values.dtype.kind == "f"):
        if rows == 0:
            return np.empty(0, object if kind == "text" else kind)
        raise InvalidInput(
            f"column {name} holds {'texts' if is_text else values.dtype}", expected=f"{kind}, as in the gallery"
        )
    return values if is_text else values.astype(kind, copy=False)


def _refuse_twice(ids: Ids) -> None:
    if len(set(ids.tolist())) < len(ids):
        unique, first, counts = np.unique(ids, return_index=True, return_counts=True)
        twice = np.sort(first[counts > 1])
        raise InvalidInput(
            f"{len(twice)} of {len(unique)} ids are there twice: {first_ids(ids, twice)}", index=int(twice[0]),
            expected="an id for each row",
        )  # fmt: skip


def _check(given: Array, stored: Array, manifest: GalleryManifest, ids: Ids) -> None:
    """Refuse rows that cannot be compared, naming the first."""
    step = max(1, _BLOCK // manifest.dim)
    bad_input, too_large, zero = [], [], []
    for start in range(0, len(stored), step):
        block = stored[start : start + step]
        infinite = ~np.isfinite(block).all(1)
        if infinite.any():
            broken = ~np.isfinite(given[start : start + step]).all(1)
            bad_input.append(np.flatnonzero(broken) + start)
            too_large.append(np.flatnonzero(infinite & ~broken) + start)
        if manifest.metric == "cosine":
            zero.append(np.flatnonzero(~block.any(1)) + start)
    small = " in fp16" if manifest.precision == "fp16" else ""
    limit = np.finfo(DTYPES[manifest.precision]).max
    for rows, problem, hint in (
        (bad_input, "hold NaN or Inf", BROKEN),
        (too_large, f"hold numbers above {limit:g}, too large for {manifest.precision}", "store them in fp32"),
        (zero, f"are all zero{small} and have no direction to compare by cosine", ""),
    ):
        bad = np.concatenate(rows) if rows else np.empty(0, np.int64)
        if len(bad):
            raise InvalidInput(
                f"{len(bad)} of {len(ids)} embeddings {problem}: {first_ids(ids, bad)}", index=int(bad[0]),
                hint=hint if manifest.precision == "fp16" or rows is not too_large else "",
            )  # fmt: skip


def check_columns(columns: Mapping[str, Array]) -> None:
    """Raise InvalidInput for a column whose values do not fit the meaning of its name."""
    for name, values in columns.items():
        if len(values) and (kind_of_values(name, values) == "text") != (values.dtype == object):
            raise InvalidInput(
                f"column {name} holds {'texts' if values.dtype == object else values.dtype}", expected=MEANINGS[name]
            )

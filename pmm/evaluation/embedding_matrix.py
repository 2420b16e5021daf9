"""Embeddings as a metric compares them, in any float, in one array or several. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pmm.evaluation.compiled import Addresses
from pmm.utils.arrays import Doubles, Floats, Ints, Singles
from pmm.utils.errors import InvalidInput, InvalidValue

METRICS = ("euclidean", "cosine")
MAX_ROWS = 4096
"""Embeddings that are converted to float64 at once, at most."""
SINGLE_RANGE = (1e-12, 1e15)
"""Largest number among embeddings whose products float32 holds without under- or overflow."""


def comparable_rows(rows: Floats, metric: str, exponent: int = 0) -> Doubles:
    """Rows [n, D] in float64 as the metric compares them: times 2^-exponent or, for cosine, at norm 1. Each result
    depends on its row alone."""
    wide = rows.astype(np.float64)
    if exponent:
        wide *= np.ldexp(1.0, -exponent)
    if metric == "cosine":
        wide /= np.abs(wide).max(1, keepdims=True)  # so that squares of a short row do not vanish
        wide /= np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    return wide


class EmbeddingMatrix:
    """Embeddings [N, D] as a metric compares them, in one array or in several that follow each other; errors call them
    `name`."""

    def __init__(
        self, *parts: Floats, metric: str = "euclidean", scratch: int = 1 << 26, name: str = "embeddings"
    ) -> None:
        """Raises InvalidValue for an unknown metric; InvalidInput, its `index` the first bad row, for NaN or Inf, and
        for rows that are all zero where the metric is cosine."""
        if metric not in METRICS:
            raise InvalidValue("metric", metric, choices=METRICS)
        self.parts, self.metric, self.dim = parts, metric, parts[0].shape[1]
        self.starts = np.cumsum([0, *map(len, parts)]).tolist()
        self.chunk = min(MAX_ROWS, max(1, scratch // (32 * max(1, self.dim))))
        """Rows that are in memory in float64 at once."""
        norms, largest = np.zeros(len(self)), np.zeros(len(self))
        for place, rows in self._chunks(slice(0, len(self))):
            largest[place] = np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0))
            with np.errstate(over="ignore", invalid="ignore"):  # float64: they are part of the distances
                norms[place] = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64, casting="same_kind"))
        if not np.isfinite(largest).all():
            bad = np.flatnonzero(~np.isfinite(largest))
            raise InvalidInput(
                f"{name}: {len(bad)} of {len(self)} rows hold NaN or Inf, the first is row {bad[0]}", index=int(bad[0])
            )
        if metric == "cosine" and not largest.all():
            row = int((largest == 0).argmax())
            raise InvalidInput(f"{name}: row {row} is all zero; it has no direction to compare by cosine", index=row)
        top = float(largest.max(initial=0))
        self.fits_float32 = all(part.dtype.itemsize <= 4 for part in parts) and (
            top == 0 or SINGLE_RANGE[0] < (largest.min() if metric == "cosine" else top) <= top < SINGLE_RANGE[1]
        )
        """Whether products may be computed in float32."""
        self.is_float32 = metric == "euclidean" and all(part.dtype == np.float32 for part in parts)
        """Whether the metric compares the rows as they are, in float32."""
        self.exponent = int(np.frexp(top)[1])
        """Exponent of the largest number: where float32 does not do, all are scaled by it to keep squares in range."""
        self.inverse_norms = 1 / norms if metric == "cosine" and self.fits_float32 else None
        self.norms = np.ones(len(self)) if metric == "cosine" else norms

    def __len__(self) -> int:
        return self.starts[-1]

    def float32_rows(self, rows: slice) -> Iterator[tuple[slice, Singles]]:
        """The rows in float32, and their place: as they are if possible, else copies, chunk by chunk."""
        views = self.inverse_norms is None and self.parts[0].dtype == np.float32
        for place, chunk in self._chunks(rows, whole=views):
            if self.inverse_norms is not None:
                yield place, (chunk * self.inverse_norms[place, None]).astype(np.float32)
            else:
                yield place, chunk.astype(np.float32, copy=False)

    def float64_rows(self, rows: slice, exponent: int) -> Iterator[tuple[slice, Doubles]]:
        """The rows in float64, chunk by chunk, and their place; `exponent` as in `take`."""
        for place, chunk in self._chunks(rows):
            yield place, comparable_rows(chunk, self.metric, exponent)

    def take(self, indices: Ints, exponent: int) -> Doubles:
        """Rows [n, D] in float64, as they are compared, times 2^-exponent unless they are at norm 1."""
        return comparable_rows(self._rows(indices), self.metric, exponent)

    def take_views(self, indices: Ints, exponent: int) -> Floats:
        """As `take`, but without conversion if the metric compares the rows as they are."""
        rows = self._rows(indices)
        return rows if self.metric == "euclidean" and not exponent else comparable_rows(rows, self.metric, exponent)

    def _rows(self, indices: Ints) -> Floats:
        if len(self.parts) == 1:
            return self.parts[0].take(indices, axis=0)
        part = np.searchsorted(self.starts, indices, side="right") - 1
        rows = np.empty((len(indices), self.dim), np.result_type(*self.parts))
        for number in np.unique(part):
            in_part = part == number
            rows[in_part] = self.parts[number][indices[in_part] - self.starts[number]]
        return rows

    def addresses(self, indices: Ints) -> Addresses | None:
        """Where rows [n] lie, for `RankKernel.half_squares`; None if they are not compared as they are, in float32, or
        a row's numbers do not lie side by side."""
        side_by_side = all(part.flags.aligned and part.strides[1] == part.itemsize for part in self.parts)
        if not (self.is_float32 and side_by_side):
            return None
        part = np.searchsorted(self.starts[1:-1], indices, side="right")
        first, step = ([part.ctypes.data for part in self.parts], [part.strides[0] for part in self.parts])
        rows = indices - np.array(self.starts)[part]
        return (np.array(first, np.int64)[part] + np.array(step, np.int64)[part] * rows).astype(np.uintp)

    def first_equal_rows(self) -> Ints:
        """For each row the first that is equal to it [N]."""
        seen: dict[bytes, int] = {}
        return np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(r for p in self.parts for r in p)])

    def _chunks(self, rows: slice, *, whole: bool = False) -> Iterator[tuple[slice, Floats]]:
        """Views of the rows, each in one part and, unless `whole`, of one chunk; and where they lie."""
        for part, start in zip(self.parts, self.starts, strict=False):
            first, last = max(rows.start, start), min(rows.stop, start + len(part))
            step = max(1, last - first) if whole else self.chunk
            for place in range(first, last, step):
                stop = min(place + step, last)
                yield slice(place, stop), part[place - start : stop - start]

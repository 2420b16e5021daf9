"""Vectors as they come back from being stored in fewer bits. Loads no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pmm.utils.arrays import Singles
from pmm.utils.errors import InvalidInput

ROWS_AT_ONCE = 4096


def stored_as(vectors: Singles, precision: str) -> Singles:
    """The vectors [N, D] as they come back from being stored in fp32, fp16, or int8 with a scale per vector.

    Raises InvalidInput for a number that fp16 does not hold.
    """
    if precision == "fp32":
        return vectors
    stored = np.empty(vectors.shape, np.float32)
    for start in range(0, len(vectors), ROWS_AT_ONCE):  # nothing else of the size of all
        some = slice(start, start + ROWS_AT_ONCE)
        stored[some] = _as_fp16(vectors[some], start) if precision == "fp16" else _as_int8(vectors[some])
    return stored


def stored_bytes(rows: int, dim: int, precision: str) -> int:
    """Bytes of the vectors alone; int8 has a float32 scale each."""
    return rows * {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim + 4}[precision]


def _as_fp16(vectors: Singles, first: int) -> npt.NDArray[np.float16]:
    """`first`: number of the first row."""
    with np.errstate(over="ignore"):
        half = vectors.astype(np.float16)
    if not np.isfinite(half).all():
        row = int((~np.isfinite(half).all(1)).argmax())
        largest = float(np.abs(vectors[row]).max())
        raise InvalidInput(
            f"row {first + row} holds {largest:g}, and float16 ends at {np.finfo(np.float16).max:g}",
            index=first + row,
            hint="store in fp32",
        )
    return half


def _as_int8(vectors: Singles) -> Singles:
    scales = np.abs(vectors).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(vectors, scales, out=np.zeros_like(vectors), where=scales > 0))
    return codes.astype(np.int8) * scales

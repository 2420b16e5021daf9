"""Bilinear resizing as OpenCV does it, to the last grey level, in numpy: who serves a network needs no OpenCV.

The definition is `cv2.resize(pixels, (width, height))` of OpenCV 4 and 5 for uint8: no antialias, weights of 11 bits.
At exactly half the size OpenCV takes INTER_AREA, which then is the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # this file is also served on its own: see pmm.export.triton_ensemble
    from pmm.data.preprocessing import Crops

ONE = np.float32(1 << 11)
"""The weight of a whole pixel."""


def resize_as_opencv(pixels: Crops, height: int, width: int) -> Crops:
    """`pixels` uint8 [h, w, C] resized to [height, width, C]."""
    rows, columns = _taps(pixels.shape[0], height), _taps(pixels.shape[1], width)

    def products(row: int) -> npt.NDArray[Any]:
        """Columns first: the products of one of the two source rows of each row."""
        lines = pixels.take(rows.at[row], 0)
        left, right = (lines.take(columns.at[k], 1) * columns.weights[k][:, None] for k in (0, 1))
        left += right
        left >>= 4
        left *= rows.weights[row][:, None, None]
        left >>= 16
        return left

    # each product loses its lowest bits before the sum is rounded: so OpenCV fits them into 16
    sums = products(0) + products(1)
    sums += 2
    return (sums >> 2).astype(np.uint8)


class _Taps(NamedTuple):
    """The two source pixels of each pixel along one side, and their weights."""

    at: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int32]


@lru_cache(512)
def _taps(before: int, after: int) -> _Taps:
    place = ((np.arange(after) + 0.5) * (1 / (after / before)) - 0.5).astype(np.float32)
    low = np.floor(place).astype(np.int64)
    share = place - low.astype(np.float32)
    at = np.stack([low, low + 1]).clip(0, before - 1)
    return _Taps(at, np.rint(np.stack([1 - share, share]) * ONE).astype(np.int32))

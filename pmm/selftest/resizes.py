"""Resizes of other libraries, made again in numpy: what clients do that take them for the contract's."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pmm.data.preprocessing import Crops


def nearest(pixels: Crops, height: int, width: int) -> Crops:
    """uint8 [h, w, 3] -> [height, width, 3]: of each pixel the one at its upper left corner, as OpenCV's."""
    rows, columns = (np.arange(after) * before // after for before, after in zip(pixels.shape, (height, width)))  # noqa: B905
    return np.ascontiguousarray(pixels[rows][:, columns])


def area(pixels: Crops, height: int, width: int) -> Crops:
    """uint8 [h, w, 3] -> [height, width, 3]: OpenCV's INTER_AREA, each pixel the mean of all that it covers."""
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    rows, columns = (_area_shares(before, after, shrinks) for before, after in zip(pixels.shape, (height, width)))  # noqa: B905
    return np.rint(np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)).clip(0, 255).astype(np.uint8)


def _area_shares(before: int, after: int, shrinks: bool) -> npt.NDArray[np.float64]:
    """[after, before]: the share of each pixel along one side in each of the resized ones."""
    at, scale = np.arange(after)[:, None], before / after
    cells = np.arange(before)[None]
    if shrinks:
        covered = np.minimum((at + 1) * scale, cells + 1) - np.maximum(at * scale, cells)
        return covered.clip(0) / scale
    low = np.floor(at * scale)  # OpenCV enlarges with it as linearly, only from nearer places
    share = np.maximum(0, at + 1 - (low + 1) / scale) % 1
    return (cells == low) * (1 - share) + (cells == np.minimum(low + 1, before - 1)) * share

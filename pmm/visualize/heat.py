"""A class activation map laid over its crop, and the scale of its colours."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from pmm.data.preprocessing import Crops
from pmm.utils.arrays import Floats

COLOURS = "inferno"
"""Perceptually uniform, its lightness grows with the value: read right by colour-blind eyes, and in grey."""
LEAST, MOST = 0.2, 0.8
"""Share of the colour over the crop, in grey, where the map is 0 and where it is largest."""
LUMA = (0.299, 0.587, 0.114)
"""Of grey, in red, green and blue."""
_MID_GREY = 150


def heated(crop: Crops, cam: Floats, cell: int, size: tuple[int, int], *, smooth: bool = True) -> Image.Image:
    """The crop in grey under its map, as an RGB picture of `size` (width, height).

    Args:
        crop: uint8 RGB [H, W, 3].
        cam: not negative [h, w]; it is scaled to its own maximum, and an empty one adds nothing.
        cell: pixels of the crop that a cell of the map lies below, each way; what lies outside the crop is cut off.
        smooth: between the centres of the cells the map is interpolated; else each cell is of one colour.
    """
    shown = np.asarray(resized(crop, size), np.float32)
    grey = (shown @ np.array(LUMA, np.float32))[..., None]
    whole = tuple(round(cells * cell * side / pixels) for cells, side, pixels in
                  zip(cam.shape[::-1], size, crop.shape[1::-1], strict=True))  # fmt: skip
    return Image.fromarray(_blend(grey, _stretched(cam, whole, smooth)[: size[1], : size[0]]))


def resized(crop: Crops, size: tuple[int, int]) -> Image.Image:
    """The crop as a picture of `size` (width, height)."""
    return Image.fromarray(crop).resize(size, Image.Resampling.BICUBIC)


def scale(width: int, height: int) -> Image.Image:
    """The colours from 0 to the largest, over a middle grey."""
    values = np.linspace(0, 1, width, dtype=np.float32)[None].repeat(height, 0)
    return Image.fromarray(_blend(np.full((height, width, 1), _MID_GREY, np.float32), values))


def _stretched(cam: Floats, size: tuple[int, ...], smooth: bool) -> Floats:
    """[h, w] -> [height, width] in 0..1."""
    largest = float(cam.max(initial=0))
    shares = np.asarray(cam / largest if largest > 0 else np.zeros_like(cam), np.float32)
    # not bicubic, which makes up values beyond those of the cells
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(shares).resize((size[0], size[1]), how)).clip(0, 1)


def _blend(grey: Floats, values: Floats) -> Crops:
    """grey [H, W, 1] in 0..255 under the colours of `values` [H, W] in 0..1 -> uint8 [H, W, 3]."""
    colours = _table()[(values * 255).round().astype(int)]
    share = (LEAST + (MOST - LEAST) * values)[..., None]
    return (grey * (1 - share) + colours * share).round().clip(0, 255).astype(np.uint8)


@cache
def _table() -> npt.NDArray[np.float32]:
    """The colours [256, 3] in 0..255."""
    from matplotlib import colormaps

    return (255 * colormaps[COLOURS](np.linspace(0, 1, 256))[:, :3]).astype(np.float32)

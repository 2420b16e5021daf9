"""Random augmentation of training crops: flip, shift and Cutout."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pmm.data.preprocessing import Crops
from pmm.recipe import RecipeConfig


class Augmentation(NamedTuple):
    """The augmentation of the crops of a batch."""

    mirrored: npt.NDArray[np.bool_]
    """[B]"""
    down: npt.NDArray[np.int64]
    """[B], the row that becomes row 0; negative: the first row is repeated above."""
    right: npt.NDArray[np.int64]
    """[B], the column (of the mirrored crop) that becomes column 0."""
    cutouts: npt.NDArray[np.int64]
    """[B, 4]: top, left, bottom, right of the pixels that are cut out, the ends excluded; all 0 for none."""


def draw_augmentation(
    recipe: RecipeConfig, height: int, width: int, count: int, rng: np.random.Generator
) -> Augmentation:
    """Random flip, shift and Cutout of `count` crops [height, width], drawn in this order, each for all crops.

    One generator for the batch: seeding one for each crop would take a fifth of the time of decoding it, or more.
    """
    mirrored = rng.random(count) < recipe.flip
    down, right = rng.integers(-recipe.shift, recipe.shift + 1, (2, count))
    cut = rng.random(count) < recipe.cutout
    rows, columns = min(recipe.cutout_size[0], height), min(recipe.cutout_size[1], width)
    top, left = rng.integers(0, height - rows + 1, count), rng.integers(0, width - columns + 1, count)
    return Augmentation(mirrored, down, right, np.stack([top, left, top + rows, left + columns], 1) * cut[:, None])


def shift_into(out: Crops, crop: Crops, down: int, right: int) -> None:
    """`crop` uint8 [H, W, 3] into `out` [H, W, 3], moved up by `down` and left by `right` pixels.

    Its border is repeated.
    """
    if not down and not right:
        out[:] = crop
        return
    height, width = crop.shape[:2]
    down, right = (min(max(by, 1 - size), size - 1) for by, size in ((down, height), (right, width)))
    top, bottom = max(-down, 0), min(height - down, height)
    left, end = max(-right, 0), min(width - right, width)
    out[top:bottom, left:end] = crop[top + down : bottom + down, left + right : end + right]
    out[top:bottom, :left], out[top:bottom, end:] = out[top:bottom, left, None], out[top:bottom, end - 1, None]
    out[:top], out[bottom:] = out[top], out[bottom - 1]

"""The crops of a selftest: pictures by a formula of whole numbers, so that any language can make the same bytes.

Crop k of h x w pixels has at row y and column x, for each channel c (0 red, 1 green, 2 blue), with // rounding down:

    u = (2 * x + 1) * 512 // w                      where it is, in 1024ths of the width
    v = (2 * y + 1) * 512 // h                      and of the height
    part = 1 if (u - 512)**2 * 3 + (v - 170)**2 * 5 < 62000             a head
           2 if abs(u - 512) < 250 and 290 <= v < 600                   a torso
           3 if 60 < abs(u - 512) < 230 and 600 <= v < 960              two legs
           0 otherwise                                                  what is behind
    paint = 30 + (83 * part + 61 * k + 97 * c + 29 * part * c + 41 * k * c) % 170
    shade = (u * (c + 1) + v * (3 - c)) // 64       smooth, and of another slope in each channel
    grain = (7 * x + 13 * y + x * y * (k + 2) + 5 * c) % 31             fine, where a resize shows
    pixel = min(255, paint * 3 // 4 + shade * 3 // 4 + grain)
"""

from __future__ import annotations

import numpy as np

from pmm.data.preprocessing import Crops, Resize

SIZED = 2
"""So many crops, the first ones, have the model's size: no resize touches them."""
ROWS = 4
"""Crops in all."""


def crop_sizes(size: Resize) -> list[tuple[int, int]]:
    """Height and width of each crop: two of the model's size, a large one of about three times its sides, and a small
    one of another shape."""
    height, width = size.height, size.width
    large = (3 * height - height // 8, 3 * width + width // 8 + 1)
    small = (max(4, height // 2 + 3), max(4, width * 3 // 4 + 1))
    return [(height, width)] * SIZED + [large, small]


def selftest_crops(size: Resize) -> list[Crops]:
    """The crops for a model of this size, each uint8 RGB [h, w, 3]."""
    return [crop(k, *sides) for k, sides in enumerate(crop_sizes(size))]


def crop(k: int, height: int, width: int) -> Crops:
    """Crop number k as uint8 RGB [height, width, 3], by the formula above."""
    y, x, c = np.ogrid[:height, :width, :3]
    u, v = (2 * x + 1) * 512 // width, (2 * y + 1) * 512 // height
    aside = abs(u - 512)
    part = np.select(
        [
            aside**2 * 3 + (v - 170) ** 2 * 5 < 62000,
            (aside < 250) & (v >= 290) & (v < 600),
            (aside > 60) & (aside < 230) & (v >= 600) & (v < 960),
        ],
        [1, 2, 3],
    )
    paint = 30 + (83 * part + 61 * k + 97 * c + 29 * part * c + 41 * k * c) % 170
    shade = (u * (c + 1) + v * (3 - c)) // 64
    grain = (7 * x + 13 * y + x * y * (k + 2) + 5 * c) % 31
    return np.minimum(255, paint * 3 // 4 + shade * 3 // 4 + grain).astype(np.uint8)

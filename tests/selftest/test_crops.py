"""The crops are what their formula says, in any language, and such that mistakes show."""

import numpy as np
import pytest

from pmm.data.preprocessing import Resize
from pmm.selftest.crops import ROWS, SIZED, crop, crop_sizes, selftest_crops


def by_the_formula(k, h, w):
    """Word by word as the docstring has it, with whole numbers of Python."""
    pixels = np.zeros((h, w, 3), np.uint8)
    for y in range(h):
        for x in range(w):
            for c in range(3):
                u, v = (2 * x + 1) * 512 // w, (2 * y + 1) * 512 // h
                part = 0
                if (u - 512) ** 2 * 3 + (v - 170) ** 2 * 5 < 62000:
                    part = 1
                elif abs(u - 512) < 250 and 290 <= v < 600:
                    part = 2
                elif 60 < abs(u - 512) < 230 and 600 <= v < 960:
                    part = 3
                paint = 30 + (83 * part + 61 * k + 97 * c + 29 * part * c + 41 * k * c) % 170
                shade = (u * (c + 1) + v * (3 - c)) // 64
                grain = (7 * x + 13 * y + x * y * (k + 2) + 5 * c) % 31
                pixels[y, x, c] = min(255, paint * 3 // 4 + shade * 3 // 4 + grain)
    return pixels


@pytest.mark.parametrize("k", range(ROWS))
def test_a_crop_is_what_the_formula_says(k):
    assert np.array_equal(crop(k, 37, 22), by_the_formula(k, 37, 22))


@pytest.mark.parametrize("size", [(128, 64), (384, 128), (224, 224), (16, 8), (4, 4)])
def test_some_need_no_resize_one_shrinks_and_one_grows_in_another_shape(size):
    height, width = size
    resize = Resize(height=height, width=width)
    sizes, crops = crop_sizes(resize), selftest_crops(resize)
    assert [each.shape[:2] for each in crops] == sizes
    assert sizes[:SIZED] == [size] * SIZED
    (_, _), (_, _), large, small = sizes
    assert all(2.5 < big / side < 3.7 for big, side in zip(large, size, strict=True))
    assert any(little < side for little, side in zip(small, size, strict=True)) or size == (4, 4)
    for crop_size in (large, small):
        if size != (4, 4):
            assert abs(crop_size[0] / crop_size[1] / (height / width) - 1) > 0.05, "padding shows"


def test_channels_differ_and_nothing_is_clipped():
    for pixels in selftest_crops(Resize(height=128, width=64)):
        means = pixels.mean((0, 1))
        assert min(abs(a - b) for a, b in zip(means, np.roll(means, 1), strict=True)) > 2
        assert pixels.max() < 255
        assert pixels.min() > 0

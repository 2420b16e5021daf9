"""The pictures of learnt parts, and of what hurts when it is hidden."""

import numpy as np
import pytest

from pmm.data.windows import Windows
from pmm.visualize.parts import _spread, occlusion_picture, parts_picture

CROP = np.full((1, 128, 64, 3), 90, np.uint8)


def stripes(count):
    """Each cell of an 8x4 map wholly of its stripe: [1, count, 8, 4]."""
    return np.eye(count)[:, np.repeat(np.arange(count), 8 // count)][None, :, :, None].repeat(4, 3)


def test_a_cell_has_the_colour_of_its_part():
    four, two = (np.asarray(parts_picture(["a"], CROP, stripes(count), 16, height=128)) for count in (4, 2))
    colours = {tuple(pixel) for pixel in four[:, 100:].reshape(-1, 3)}
    assert len(colours) > len({tuple(pixel) for pixel in two[:, 100:].reshape(-1, 3)})
    assert four.shape[1] > two.shape[1]


def test_a_map_that_reaches_beyond_the_crop_is_cut():
    assert parts_picture(["a"], np.full((1, 100, 50, 3), 90, np.uint8), stripes(4), 16, height=128).height > 128


def test_what_hurts_is_where_the_windows_are_that_hurt():
    windows = Windows(height=128, width=64, step=10)
    drops = np.zeros((len(windows.tops), len(windows.lefts)))
    drops[2, 1] = 0.5
    spread = _spread(drops, windows)
    top, left, bottom, right = windows.rectangles()[2 * len(windows.lefts) + 1]
    assert spread[top:bottom, left:right].min() > 0
    spread[top:bottom, left:right] = 0
    assert not spread.any()
    assert windows.side == 28


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_every_table_can_be_drawn(value):
    windows = Windows(height=128, width=64, step=16)
    drops = np.full((len(windows.tops), len(windows.lefts)), value)
    assert occlusion_picture(["a"], CROP, [drops], windows, height=128).height > 128

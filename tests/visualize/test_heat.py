"""A map over its crop: the colours lie where the cells do, and say what the scale says."""

import numpy as np
import pytest

from pmm.visualize.heat import LEAST, MOST, heated, scale

CELL = 16


def crop(height, width, value=120):
    return np.full((height, width, 3), value, np.uint8)


@pytest.mark.parametrize(("height", "width"), [(64, 32), (128, 64), (101, 37)])
@pytest.mark.parametrize("zoom", [1, 2])
def test_a_cell_is_coloured_over_its_own_pixels(height, width, zoom):
    """Where the size is no multiple of the cell, the last cells reach beyond the crop."""
    rows, columns = -(-height // CELL), -(-width // CELL)
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, 1)):
        cam = np.zeros((rows, columns), np.float32)
        cam[row, column] = 3
        pixels = np.asarray(heated(crop(height, width), cam, CELL, (zoom * width, zoom * height), smooth=False))
        assert pixels.shape == (zoom * height, zoom * width, 3)
        hot = (pixels != pixels[(0, 0) if (row, column) != (0, 0) else (-1, -1)]).any(axis=2)
        expected = np.zeros_like(hot)
        expected[zoom * CELL * row : zoom * CELL * (row + 1), zoom * CELL * column : zoom * CELL * (column + 1)] = True
        assert np.array_equal(hot, expected)


def test_a_smooth_map_is_hottest_in_the_middle_of_its_cell():
    cam = np.zeros((4, 2), np.float32)
    cam[2, 1] = 0.01  # scaled to its own maximum
    pixels = np.asarray(heated(crop(64, 32), cam, CELL, (32, 64)), int).sum(axis=2)
    assert np.unravel_index(pixels.argmax(), pixels.shape) in [(39, 23), (39, 24), (40, 23), (40, 24)]
    assert pixels[40, 23] > pixels[40, 12] > pixels[40, 4]


def test_colours_are_those_of_the_scale():
    table = np.asarray(scale(256, 1))[0]
    grey = crop(16, 16 * 3, 150)
    cam = np.array([[0, 0.5, 1]], np.float32)
    pixels = np.asarray(heated(grey, cam, CELL, (48, 16), smooth=False))[8, [8, 24, 40]]
    for found, place in zip(pixels, (0, 128, 255), strict=True):
        assert np.abs(found.astype(int) - table[place]).max() <= 1
    lightness = table @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness[16:]) > -1).all()
    assert lightness[-1] > lightness[40] + 80, "the scale must be read in grey too"


def test_an_empty_map_shows_the_crop_in_grey():
    coloured = crop(32, 16)
    coloured[..., 0] = 200
    pixels = np.asarray(heated(coloured, np.zeros((2, 1), np.float32), CELL, (16, 32)))
    grey = 0.299 * 200 + (0.587 + 0.114) * 120
    assert np.abs(pixels.astype(float) - (1 - LEAST) * grey).max() <= 2
    assert MOST > 2 * LEAST
